-- Queues and messages with leases.
--
-- One table holds every message; its lease is a few columns of the row. The primary key begins with
-- queue_id, so that the table can be distributed by queue one day.
--
-- The lanes. Within a queue a message lies in one of two lanes, ordered by the time at which it becomes
-- visible: lane 0 was never handed out, lane 1 was handed out before. What is delayed or leased lies in the
-- future part of its lane, so that taking the next message never walks past it, and a lease that ends needs
-- no write to become ready. The lane is a column rather than a condition on receive_count: one prepared
-- statement reads the lanes in either order, and a message that is given back because its consumer hung up
-- keeps its place among the returned ones although its receive_count is as before.

CREATE TABLE broker.queues (
    id                 integer          GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name               text             COLLATE "C" NOT NULL,
    visibility_timeout double precision NOT NULL DEFAULT 30,
    message_ttl        double precision,
    delay              double precision NOT NULL DEFAULT 0,
    max_message_bytes  integer          NOT NULL DEFAULT 4096,
    idempotency_window double precision NOT NULL DEFAULT 300,
    max_messages       bigint,
    paused             boolean          NOT NULL DEFAULT false,
    created_at         timestamptz      NOT NULL DEFAULT now(),
    updated_at         timestamptz      NOT NULL DEFAULT now(),
    -- A deleted queue keeps its row until the last of its messages is removed. Its name is free at once.
    deleted_at         timestamptz,

    CONSTRAINT queue_name_is_well_formed CHECK (name ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$'),
    CONSTRAINT visibility_timeout_is_in_range CHECK (visibility_timeout > 0 AND visibility_timeout <= 43200),
    CONSTRAINT message_ttl_is_in_range CHECK (message_ttl > 0 AND message_ttl <= 31536000),
    CONSTRAINT delay_is_in_range CHECK (delay >= 0 AND delay <= 31536000),
    CONSTRAINT max_message_bytes_is_in_range CHECK (max_message_bytes BETWEEN 1 AND 1048576),
    CONSTRAINT idempotency_window_is_in_range CHECK (idempotency_window > 0 AND idempotency_window <= 604800),
    CONSTRAINT max_messages_is_positive CHECK (max_messages > 0)
);

-- Names are unique among the queues that live.
CREATE UNIQUE INDEX live_queue_by_name ON broker.queues (name) WHERE deleted_at IS NULL;
CREATE INDEX deleted_queue_by_name ON broker.queues (name, id) WHERE deleted_at IS NOT NULL;

INSERT INTO broker.queues (name) VALUES ('default');

-- Ids are handed out in order, one at a time: a larger CACHE would give a session a range of its own, and
-- messages of concurrent producers would no longer be ordered by the time they came.
CREATE SEQUENCE broker.message_ids AS bigint CACHE 1;

-- No foreign key to queues: it would lock the queue's row for every message that is stored. A message
-- that is stored while its queue is being deleted is invisible, because its queue is, and the sweeper
-- removes it.
CREATE TABLE broker.messages (
    queue_id          integer     NOT NULL,
    id                bigint      NOT NULL,
    enqueued_at       timestamptz NOT NULL,
    visible_at        timestamptz NOT NULL,
    expires_at        timestamptz,
    first_received_at timestamptz,
    lease_token       uuid,
    receive_count     integer     NOT NULL DEFAULT 0,
    body_bytes        integer     NOT NULL,
    lane              smallint    NOT NULL DEFAULT 0,
    sender            text,
    -- json keeps the text as it came; jsonb would not. NULL: no headers.
    headers           json,
    body              json        NOT NULL,

    PRIMARY KEY (queue_id, id),
    CONSTRAINT receive_count_is_not_negative CHECK (receive_count >= 0),
    CONSTRAINT lane_is_known CHECK (lane IN (0, 1))
);

-- The lanes, and the only way to walk them: with (queue_id * 4::bigint + lane) = …, written just so, with
-- lane >= 0, and with ORDER BY visible_at, id. No other statement can use this index, because none knows its
-- first column nor says lane >= 0, which is always true; and walking a lane can use no other. The planner must
-- not have the choice: where a table that was drained fills up again it takes every index for equally cheap, and
-- has read a whole queue to find one message. Four numbers a queue: there is room for two lanes more.
CREATE INDEX message_by_queue_lane_and_visible_at
    ON broker.messages ((queue_id * 4::bigint + lane), visible_at, id)
    WHERE lane >= 0;

-- For the sweeper: what has expired and is held by nobody, oldest first. While a lease runs, visible_at is
-- its end, so a message that is held lies in the future part.
CREATE INDEX expiring_message_by_time ON broker.messages (greatest(expires_at, visible_at))
    WHERE expires_at IS NOT NULL;

-- How many messages lie in the queues that have a large max_messages, as the sweeper last saw it.
CREATE TABLE broker.queue_sizes (
    queue_id   integer     PRIMARY KEY,
    messages   bigint      NOT NULL,
    counted_at timestamptz NOT NULL
);

-- Up to when ended leases have been counted, so that each is counted by one broker. One row.
CREATE TABLE broker.sweeps (
    only_row               boolean     PRIMARY KEY DEFAULT true,
    ended_leases_seen_until timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT there_is_one_row CHECK (only_row)
);

INSERT INTO broker.sweeps DEFAULT VALUES;
