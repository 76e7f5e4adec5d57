-- Who may call: tokens. A token is `wq_`, its id, a dot and a secret; of the secret only the hash is here.
--
-- A row stays when its token was revoked or has expired: as long as there is one, a broker that was not told otherwise
-- lets nobody in without a token.
CREATE TABLE broker.tokens (
    id          text        COLLATE "C" PRIMARY KEY,
    -- Who it is for. While one is replaced by another both have the same name.
    name        text        COLLATE "C" NOT NULL,
    -- SHA-256 of 32 random bytes: nothing slower is needed for what nobody can guess.
    secret_hash bytea       NOT NULL,
    -- Name patterns, in which * stands for anything.
    send        text[]      NOT NULL DEFAULT '{}',
    receive     text[]      NOT NULL DEFAULT '{}',
    manage      text[]      NOT NULL DEFAULT '{}',
    admin       boolean     NOT NULL DEFAULT false,
    created_at  timestamptz NOT NULL DEFAULT now(),
    expires_at  timestamptz,
    revoked_at  timestamptz,

    CONSTRAINT token_name_is_well_formed CHECK (name ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$'),
    CONSTRAINT secret_hash_is_one CHECK (octet_length(secret_hash) = 32)
);

CREATE INDEX unrevoked_token_by_name ON broker.tokens (name) WHERE revoked_at IS NULL;

-- Which share of all messages lies in each of the commonest lanes, as ANALYZE has found it: see counting.py. Statistics
-- of an index are shown to its owner alone, who need not be the role that brokers connect as.
CREATE FUNCTION broker.lane_shares() RETURNS TABLE (lanes real, commonest bigint[], shares real[])
LANGUAGE sql
STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT s.n_distinct, s.most_common_vals::text::bigint[], s.most_common_freqs
    FROM pg_stats s
    WHERE s.schemaname = 'broker' AND s.tablename = 'message_by_queue_lane_and_visible_at' AND s.attname = 'expr'
$$;
