-- Topics: who subscribes, and what becomes of what is published.
--
-- A publish puts a copy of the message into the queue of each subscription. From then on a copy is a message like any
-- other, with an id, leases and an end of its own; nothing on its way knows of topics.

-- Ids come from the sequence of the queues: the messages that a topic stores until they are broadcast, and the
-- idempotency keys of a topic, carry its id where others carry a queue's.
CREATE TABLE broker.topics (
    id         integer     PRIMARY KEY DEFAULT nextval('broker.queues_id_seq'),
    name       text        COLLATE "C" NOT NULL,
    -- Whether copies are made when a message is published, or when the topic is told to broadcast.
    delivery   text        NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    -- A deleted topic keeps its row until the last of its messages is removed. Its name is free at once.
    deleted_at timestamptz,

    CONSTRAINT topic_name_is_well_formed CHECK (name ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$'),
    CONSTRAINT delivery_is_known CHECK (delivery IN ('immediate', 'on_broadcast'))
);

-- Names are unique among the topics that live.
CREATE UNIQUE INDEX live_topic_by_name ON broker.topics (name) WHERE deleted_at IS NULL;
CREATE INDEX deleted_topic ON broker.topics (id) WHERE deleted_at IS NOT NULL;

-- Read by every publish, and changed by those alone who hold the lock of the table of queues (see subscriptions.py): so
-- the topic and the queue of a subscription live as long as it does.
CREATE TABLE broker.subscriptions (
    id           bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    topic_id     integer     NOT NULL REFERENCES broker.topics (id),
    -- Where copies go. With a url it is the subscription's own, which nobody named.
    queue_id     integer     NOT NULL REFERENCES broker.queues (id),
    name         text        COLLATE "C" NOT NULL,
    url          text,
    -- {header: [values]}; null: everything matches.
    filter       jsonb,
    state        text        NOT NULL DEFAULT 'active',
    -- Of an endpoint that fails: when it may be tried next, by any broker.
    probe_at     timestamptz,
    -- An endpoint has asked to be left alone until then.
    paused_until timestamptz,
    created_at   timestamptz NOT NULL DEFAULT now(),

    CONSTRAINT subscription_of_a_topic_has_its_own_name UNIQUE (topic_id, name),
    CONSTRAINT subscription_name_is_well_formed CHECK (name ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$'),
    CONSTRAINT state_is_known CHECK (state IN ('active', 'failing', 'ended')),
    CONSTRAINT failing_endpoint_has_a_time_to_be_tried CHECK (state <> 'failing' OR probe_at IS NOT NULL)
);

CREATE INDEX subscription_by_queue ON broker.subscriptions (queue_id);
CREATE INDEX pushed_subscription ON broker.subscriptions (id) WHERE url IS NOT NULL AND state <> 'ended';
CREATE INDEX ended_subscription ON broker.subscriptions (queue_id) WHERE state = 'ended';

-- What requests to an endpoint are signed with. A secret that was replaced counts until its end.
CREATE TABLE broker.subscription_secrets (
    id              bigint      GENERATED ALWAYS AS IDENTITY,
    subscription_id bigint      NOT NULL REFERENCES broker.subscriptions (id) ON DELETE CASCADE,
    secret          bytea       NOT NULL,
    ends_at         timestamptz NOT NULL DEFAULT 'infinity',

    PRIMARY KEY (subscription_id, id)
);

-- Of a copy: the topic, by the name that it had, and the id under which the message was published.
ALTER TABLE broker.messages
    ADD COLUMN topic text COLLATE "C",
    ADD COLUMN published_id bigint;

ALTER TABLE broker.messages ALTER COLUMN topic SET STATISTICS 0;
ALTER TABLE broker.messages ALTER COLUMN published_id SET STATISTICS 0;

-- Of a message that was published under the key: how many copies were made. A publish that is repeated says it again.
ALTER TABLE broker.idempotency_keys ADD COLUMN deliveries integer;
