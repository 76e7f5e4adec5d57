-- How the table of messages is kept in shape. No setting changes what the broker does, only what it costs.
-- `make bench-flat` measures it with and without fillfactor and autovacuum's settings (cell table-settings).
--
-- fillfactor: every message is stored once and written anew once, when it is leased. Where the new version fits
-- onto the page of the old one, the log holds only what changed, and not the body again; and one page is touched
-- instead of two. Half of a page has to be free for that. Measured with bodies of 200 bytes in batches of 100, over a
-- message's whole life: 897 bytes of WAL instead of 1,143 at fillfactor 100 (1,040 at 70, 884 at 40), and 15 to 20 %
-- less time for the lease. The price: while it waits, a message takes about twice its size on disk.
--
-- autovacuum: every message leaves two dead rows. By default a table is vacuumed when a fifth of it is dead, which
-- is two million rows of a backlog of ten millions, and slowly. Here it is when one in a hundred is dead, and ten
-- times as fast. Measured with batches of 100 beside a backlog of a million, 150 seconds each: the rate is the same
-- within one per cent, and the table grows by 8 % less; with a larger backlog the default would begin later still.
--
-- vacuum_truncate: giving back the empty end of the table takes a lock that stops every reader and writer, and a
-- queue that is drained and filled again needs the pages anyway.
--
-- Statistics: no plan depends on them (see messages.py). What is never asked for is not collected, so that ANALYZE
-- does not read bodies. Which lanes hold how much is asked for: counts beyond those that are exact are estimated with
-- it. With 100 queues of the same size they are off by 7 % at the default of 100, by 3.4 % at 500 (root mean square).
ALTER TABLE broker.messages SET (
    fillfactor = 50,
    autovacuum_vacuum_scale_factor = 0.01,
    autovacuum_vacuum_threshold = 10000,
    autovacuum_vacuum_cost_limit = 2000,
    vacuum_truncate = off,
    toast.autovacuum_vacuum_scale_factor = 0.01,
    toast.autovacuum_vacuum_threshold = 10000,
    toast.autovacuum_vacuum_cost_limit = 2000,
    toast.vacuum_truncate = off
);

ALTER TABLE broker.messages ALTER COLUMN body SET STATISTICS 0;
ALTER TABLE broker.messages ALTER COLUMN headers SET STATISTICS 0;
ALTER TABLE broker.messages ALTER COLUMN sender SET STATISTICS 0;
ALTER TABLE broker.messages ALTER COLUMN lease_token SET STATISTICS 0;
ALTER INDEX broker.message_by_queue_lane_and_visible_at ALTER COLUMN 1 SET STATISTICS 500;
