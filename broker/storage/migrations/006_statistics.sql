-- What happened in each minute: rows that brokers append, and sum up, and trim (see storage/statistics.py).
--
-- No call writes here, and no row is ever updated. Each process appends about once a second what its statements have
-- done since, a row for each queue where something happened, and one for all queues together. When a minute is over its
-- rows are replaced by their sum.
--
-- What it takes: some 110 bytes for a queue and minute in which anything happened, its index entries included. A hundred
-- queues that are busy all day come to 16 MB. Of single queues no more than about a million rows are kept, which is some
-- 110 MB; all queues together are kept for a day in any case.
CREATE TABLE broker.statistics (
    -- On the database's clock, counted from 1970: small, and arithmetic with it depends on no time zone.
    minute    integer NOT NULL,
    -- 0: all queues together, also those that were deleted since. No foreign key: rows of a queue that was just deleted
    -- do no harm, and go with the others of their minute.
    queue_id  integer NOT NULL,
    enqueued  integer NOT NULL,
    delivered integer NOT NULL,
    deleted   integer NOT NULL,
    returned  integer NOT NULL,
    dead      integer NOT NULL,
    expired   integer NOT NULL,
    -- Of all queues together: how many rows of single queues came with this one.
    queues    integer NOT NULL,
    -- Whether it stands for all the rows that were appended by then.
    is_sum    boolean NOT NULL
)
-- Rows are never updated.
WITH (
    fillfactor = 100,
    autovacuum_vacuum_scale_factor = 0.05,
    autovacuum_vacuum_threshold = 10000,
    vacuum_truncate = off
);

-- For those who ask.
CREATE INDEX statistics_by_queue_and_minute ON broker.statistics (queue_id, minute);

-- For those who tidy up. The expressions see to it that neither index can be used in place of another one.
CREATE INDEX statistics_by_minute ON broker.statistics ((-minute));
CREATE INDEX unsummed_statistics_by_minute ON broker.statistics ((minute::bigint)) WHERE NOT is_sum;
