-- Idempotency keys, dead letters, and broker.enqueue for producers that use SQL.

-- What a producer has sent under a key of its own. A table apart from the messages, because a key outlives them.
-- Its primary key is what makes two producers with one key wait for each other: the second finds the first one's row.
-- A row whose time is over is as if it were not there, trimmed or not.
CREATE TABLE broker.idempotency_keys (
    first_used_at timestamptz NOT NULL,
    -- first_used_at and the window that the queue had then. Where the window has become shorter, that one counts.
    expires_at    timestamptz NOT NULL,
    message_id    bigint      NOT NULL,
    queue_id      integer     NOT NULL,
    key           text        COLLATE "C" NOT NULL,
    -- Of the body's bytes: the same key with another body is a mistake.
    body_hash     bytea       NOT NULL,

    PRIMARY KEY (queue_id, key)
)
-- A key that is used again is written anew without a change, and fits onto its page.
WITH (
    fillfactor = 90,
    autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_vacuum_threshold = 10000,
    autovacuum_vacuum_cost_limit = 2000,
    vacuum_truncate = off
);

-- For the sweeper.
CREATE INDEX idempotency_key_by_end ON broker.idempotency_keys (expires_at);

-- Where dead letters go. A target is named by its id; that it lives, and that no circle comes about, is seen to by
-- those who change queues, one after the other (see queues.py).
ALTER TABLE broker.queues
    ADD COLUMN max_receives integer,
    ADD COLUMN dead_letter_queue_id integer,
    -- When max_receives was last lowered, until the sweeper has found all messages that have used up their deliveries by
    -- that. They lie in lane 1, where no dequeue takes them.
    ADD COLUMN max_receives_lowered_at timestamptz,
    ADD CONSTRAINT max_receives_is_in_range CHECK (max_receives BETWEEN 1 AND 1000),
    ADD CONSTRAINT dead_letter_queue_is_another CHECK (dead_letter_queue_id <> id);

CREATE INDEX live_queue_by_dead_letter_queue ON broker.queues (dead_letter_queue_id)
    WHERE deleted_at IS NULL AND dead_letter_queue_id IS NOT NULL;

-- Lane 2: on its last permitted delivery. No dequeue reads it; in its past part lies what has used up its deliveries,
-- until the sweeper moves it. The rows that there are satisfy the narrower constraint that goes.
ALTER TABLE broker.messages
    -- Where it came from, when, and why, as consumers are shown it. Null: it is no dead letter.
    ADD COLUMN dead_letter json,
    -- When it last came into its queue from another one. Null: it was enqueued here.
    ADD COLUMN moved_at timestamptz,
    DROP CONSTRAINT lane_is_known,
    ADD CONSTRAINT lane_is_known CHECK (lane IN (0, 1, 2)) NOT VALID;

ALTER TABLE broker.messages ALTER COLUMN dead_letter SET STATISTICS 0;
ALTER TABLE broker.messages ALTER COLUMN moved_at SET STATISTICS 0;

-- For the sweeper: what has used up its deliveries, and was not deleted when the last lease ended.
CREATE INDEX exhausted_message_by_time ON broker.messages (visible_at) WHERE lane = 2;

-- An old receipt names the queue that its message has left. Whether it moved, or is gone, is looked up by its id.
-- The number is negative so that no other index can be used in place of this one.
CREATE INDEX moved_message_by_id ON broker.messages ((-id)) WHERE moved_at IS NOT NULL;

-- For producers that use SQL: a message is stored if and only if their transaction commits, and no outbox is needed.
-- The rules are those of the RPC method (storing.py, idempotency.py). Who may call it needs no right to the tables.
--
-- The transaction may stay open for as long as it likes. The message is stamped with the time of the call, after the
-- transaction has its id: until it ends, no broker takes that time for past (low_water.py). A key is held until then.
-- Nobody is notified, because that takes a lock over all of the database at commit; consumers that wait look for
-- themselves.
CREATE FUNCTION broker.enqueue(
    queue           text,
    body            json,
    headers         json             DEFAULT NULL,
    sender          text             DEFAULT NULL,
    delay           double precision DEFAULT NULL,
    ttl             double precision DEFAULT NULL,
    idempotency_key text             DEFAULT NULL
) RETURNS text
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    target     broker.queues;
    body_bytes integer := octet_length(body::text);
    body_hash  bytea   := sha256(convert_to(body::text, 'UTF8'));
    known      broker.idempotency_keys;
    held       bigint;
    message_id bigint;
    stamp      timestamptz;
BEGIN
    SELECT q.* INTO target FROM broker.queues q WHERE q.name = queue AND q.deleted_at IS NULL;
    CASE
        WHEN target.id IS NULL THEN
            RAISE EXCEPTION 'There is no queue %.', coalesce(queue, 'NULL')
                USING ERRCODE = 'WQ001', HINT = 'Create it with create_queue, or see list_queues.';
        WHEN body IS NULL THEN
            RAISE EXCEPTION 'The body is NULL.'
                USING ERRCODE = '22004', HINT = 'Any JSON value is a body; for JSON''s null write ''null''.';
        WHEN NOT coalesce(delay, 0) BETWEEN 0 AND 31536000 THEN
            RAISE EXCEPTION 'delay must be from 0 to 31,536,000 seconds, not %.', delay USING ERRCODE = '22023';
        WHEN NOT (coalesce(ttl, 1) > 0 AND coalesce(ttl, 1) <= 31536000) THEN
            RAISE EXCEPTION 'ttl must be more than 0 and at most 31,536,000 seconds, not %.', ttl
                USING ERRCODE = '22023';
        WHEN char_length(sender) > 128 THEN
            RAISE EXCEPTION 'sender may have 128 characters, and has %.', char_length(sender) USING ERRCODE = '22023';
        WHEN NOT coalesce(char_length(idempotency_key), 1) BETWEEN 1 AND 128 THEN
            RAISE EXCEPTION 'idempotency_key must have 1 to 128 characters, not %.', char_length(idempotency_key)
                USING ERRCODE = '22023';
        WHEN headers IS NOT NULL AND json_typeof(headers) <> 'object' THEN
            RAISE EXCEPTION 'headers must be a JSON object.' USING ERRCODE = '22023';
        ELSE
    END CASE;
    IF headers IS NOT NULL THEN
        IF EXISTS (SELECT FROM json_each(headers) h WHERE json_typeof(h.value) <> 'string') THEN
            RAISE EXCEPTION 'headers must have strings as values.' USING ERRCODE = '22023';
        END IF;
        IF (SELECT count(*) > 64 OR sum(octet_length(h.key) + octet_length(h.value)) > 4096
            FROM json_each_text(headers) h) THEN
            RAISE EXCEPTION 'headers may have 64 names, and 4096 bytes in all.' USING ERRCODE = '22023';
        END IF;
    END IF;

    PERFORM pg_current_xact_id();
    stamp := clock_timestamp();
    message_id := nextval('broker.message_ids');
    IF idempotency_key IS NOT NULL THEN
        INSERT INTO broker.idempotency_keys AS k (queue_id, key, message_id, body_hash, first_used_at, expires_at)
        VALUES (
            target.id, idempotency_key, message_id, body_hash, stamp,
            stamp + target.idempotency_window * interval '1 second'
        )
        ON CONFLICT ON CONSTRAINT idempotency_keys_pkey DO UPDATE
        SET (message_id, body_hash, first_used_at, expires_at) = (
            SELECT r.a, r.b, r.c, r.d
            FROM (VALUES
                (true, k.message_id, k.body_hash, k.first_used_at, k.expires_at),
                (false, excluded.message_id, excluded.body_hash, excluded.first_used_at, excluded.expires_at)
            ) AS r (is_old, a, b, c, d)
            WHERE r.is_old = (
                least(k.expires_at, k.first_used_at + (excluded.expires_at - excluded.first_used_at))
                > excluded.first_used_at
            )
        )
        RETURNING k.* INTO known;
        IF known.body_hash <> body_hash THEN
            RAISE EXCEPTION 'The idempotency_key % was used for another body on the queue %.', idempotency_key, queue
                USING ERRCODE = 'WQ007', HINT = 'Send a key of its own with each message.';
        END IF;
        IF known.message_id <> message_id THEN
            RETURN lpad(to_hex(known.message_id), 16, '0');
        END IF;
    END IF;

    IF body_bytes > target.max_message_bytes THEN
        RAISE EXCEPTION 'The body has % bytes and the queue % takes %.', body_bytes, queue, target.max_message_bytes
            USING ERRCODE = 'WQ005', HINT = 'Send less, or raise max_message_bytes with update_queue.';
    END IF;
    IF target.max_messages <= 10000 THEN
        SELECT count(*) INTO held
        FROM (
            SELECT
            FROM broker.messages m
            WHERE m.queue_id = target.id
                AND (
                    m.expires_at IS NULL OR m.expires_at > stamp
                    OR (m.lane > 0 AND m.visible_at > stamp)
                )
            LIMIT target.max_messages
        ) AS c;
    ELSIF target.max_messages IS NOT NULL THEN
        SELECT s.messages INTO held FROM broker.queue_sizes s WHERE s.queue_id = target.id;
    END IF;
    IF held >= target.max_messages THEN
        RAISE EXCEPTION 'The queue % holds its max_messages, %.', queue, target.max_messages
            USING ERRCODE = 'WQ014',
                HINT = 'Wait until consumers have caught up, or raise the limit with update_queue.';
    END IF;
    INSERT INTO broker.messages (
        queue_id, id, enqueued_at, visible_at, expires_at, body_bytes, lane, sender, headers, body
    )
    VALUES (
        target.id, message_id, stamp,
        stamp + coalesce(delay, target.delay) * interval '1 second',
        stamp + coalesce(ttl, target.message_ttl) * interval '1 second',
        body_bytes, 0, sender, headers, body
    );
    RETURN lpad(to_hex(message_id), 16, '0');
END
$$;

REVOKE ALL ON FUNCTION broker.enqueue(text, json, json, text, double precision, double precision, text) FROM PUBLIC;
