"""What holds for every statement about messages, in whichever module it stands.

A function that sends a statement sends one, and so runs one transaction. Two at once:

- Rows are locked in the order of the primary key (queue_id, id) wherever a statement waits for a lock, so
  two statements never wait for each other in a circle. `dequeue` does not wait: it skips what is locked.
- READ COMMITTED. A statement that waited for a row looks at the row's newest version before it acts, and
  finds the lease taken, ended or gone.
- Rows picked under a lock go through one MATERIALIZED step before they are joined again for the write. An
  inlined union or join is evaluated anew when a row was updated meanwhile, and hands out more or fewer
  rows than were picked.
- One clock, the database's: `statement_timestamp()`, which an index condition can use.
- A plan must not depend on statistics, which say "empty" while a queue that was drained fills up again. So
  every statement leaves the planner one way: lanes are walked by the number of the lane, which only their
  index knows, and rows are looked up with `m.queue_id = ANY (ARRAY[p.queue_id]) AND m.id = p.id`. Of the same
  condition with `=` the planner can make a hash or merge join, or a scan of all messages that looks at the
  list of picked rows for each: 54 seconds for 1,000 messages of 200,000, measured. An array can only be looked
  up in the index of the primary key.
"""

# What every statement that looks at messages shares: what nobody holds and has expired is not there, nor what has used
# up its deliveries, on its way to the dead letters. (In lane 0 lies what was never handed out, so nobody holds it.)
IS_ALIVE = """(
    (m.lane > 0 AND m.visible_at > statement_timestamp())
    OR (m.lane < 2 AND (m.expires_at IS NULL OR m.expires_at > statement_timestamp()))
)"""

# Stands for a body that is longer than any queue takes, so that the database says what is wrong without having to be
# sent it: no JSON is empty.
TOO_LARGE = ""
