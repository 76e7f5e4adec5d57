"""The bugs that the mutation check puts into the broker, and for each the tests that must notice it.

Those of one kind stand together. A test is named by what pytest calls it, without its cases or with one; a file stands
for all of its tests. It must be the test whose promise the bug breaks, not one that fails by chance.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """A bug: in a file of the broker every text, which must be there, is replaced; every test must fail."""

    name: str
    file: str
    edits: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]


IDEMPOTENCY = "tests/test_idempotency.py::"
STANDBY = "tests/faults/test_standby.py::"
AMBIGUOUS = "tests/faults/test_ambiguous.py::"
MESSAGES = "tests/test_messages.py::"
CONCURRENCY = "tests/test_concurrency.py::"
DEAD_LETTERS = "tests/test_dead_letters.py::"
OUTCOMES = "tests/test_outcomes.py::"
WAITING = "tests/test_waiting.py::"
LOW_WATER = "tests/test_low_water.py::"
ISOLATION = "tests/faults/test_isolation.py::"
ADDRESSES = "tests/test_addresses.py::"
RECEIVERS = "tests/test_receivers.py::"
WEBHOOKS = "tests/test_webhooks.py::"
PUBLISHING = "tests/test_publishing.py::"
PUBLISHING_KEYS = "tests/test_publishing_keys.py::"
BROADCAST = "tests/test_broadcast.py::"
SUBSCRIPTIONS = "tests/test_subscriptions.py::"
URLS = "tests/test_url_subscriptions.py::"
ENDED = "tests/test_ended_subscriptions.py::"
TOPICS = "tests/test_topics.py::"
TOPIC_ISOLATION = "tests/faults/test_topic_isolation.py"
AUTH = "tests/test_auth.py::"
LIMITS = "tests/test_limits.py::"
TRANSPORT = "tests/test_transport.py::"

UNCONFIRMED = STANDBY + "test_a_commit_that_no_standby_has_confirmed_is_never_answered_with_a_result"
REPEATED = STANDBY + "test_what_was_done_already_is_confirmed_only_when_the_standby_has_it"
AWAY = STANDBY + "test_while_the_standby_is_away_writes_are_refused_at_once_reads_go_on_and_nothing_is_lost"
BEHIND = (
    "tests/faults/test_failover.py::"
    "test_what_only_the_dead_primary_had_was_acknowledged_only_where_nobody_waits_for_the_standby[True]"
)

_EXPIRY = "            AND (expires_at IS NULL OR expires_at > w.now) AND receive_count < w.max_receives\n"
_KEY_UPDATE = """    ON CONFLICT (queue_id, key) DO UPDATE SET (message_id, body_hash, first_used_at, expires_at) = (
        SELECT a, b, c, d
        FROM (VALUES
            (true, k.message_id, k.body_hash, k.first_used_at, k.expires_at),
            (false, excluded.message_id, excluded.body_hash, excluded.first_used_at, excluded.expires_at)
        ) AS r (is_old, a, b, c, d)
        WHERE is_old = (
            least(k.expires_at, k.first_used_at + (excluded.expires_at - excluded.first_used_at))
            > excluded.first_used_at
        )
    )
"""
_KNOWN = """        SELECT e.body_hash
        FROM broker.idempotency_keys e
"""

_PUBLISH_KEY_UPDATE = """    ON CONFLICT (queue_id, key) DO UPDATE SET
        (message_id, body_hash, first_used_at, expires_at, deliveries) = (
            SELECT a, b, c, d, e
            FROM (VALUES
                (true, k.message_id, k.body_hash, k.first_used_at, k.expires_at, k.deliveries),
                (
                    false, excluded.message_id, excluded.body_hash, excluded.first_used_at, excluded.expires_at,
                    excluded.deliveries
                )
            ) AS r (is_old, a, b, c, d, e)
            WHERE is_old = (k.expires_at > excluded.first_used_at)
        )
"""
_IN_TWO = """async def _in_two(connection: Connection, params: dict[str, Any]) -> tuple[Any, ...]:
    keys = await fetch(connection, _PUBLISH.replace("WHERE NOT repeats", "WHERE false"), params)
    new = [number for number, repeats in zip(keys[1] or (), keys[3] or (), strict=True) if not repeats]
    copies = _PUBLISH.replace("WHERE NOT repeats", f"WHERE n = ANY (ARRAY{new}::bigint[])")
    row = await fetch(connection, copies, params)
    return (*row[:3], keys[3], *row[4:])


"""
_TAKEN = (
    "        p.topic_id, p.header_values, m.id, m.enqueued_at, m.visible_at, m.expires_at, m.body_bytes, m.sender,"
    " m.headers,\n        m.body\n"
)
_NOT_REFUSED = "        AND p.id <> coalesce((SELECT message_id FROM refused), 0)\n"
_NO_TOPICS = "    SELECT id, deleted_at FROM broker.topics WHERE false\n"

MUTATIONS = (
    # What is said to be done before it is safe.
    Mutation(
        "dedupe by DO NOTHING: the duplicate is answered from what a read has found",
        "broker/storage/idempotency.py",
        (
            (_KNOWN, _KNOWN.replace("e.body_hash", "e.body_hash, e.message_id")),
            ("k.body_hash AS known\n", "k.body_hash AS known, k.message_id AS known_id\n"),
            ("    WHERE key IS NOT NULL\n", "    WHERE key IS NOT NULL AND known IS NULL\n"),
            (_KEY_UPDATE, "    ON CONFLICT (queue_id, key) DO NOTHING\n"),
            ("coalesce(c.message_id, n.id) AS id", "coalesce(c.message_id, n.known_id, n.id) AS id"),
            (
                "coalesce(c.message_id <> n.id, false) AS repeats",
                "coalesce(c.message_id <> n.id, n.known IS NOT NULL) AS repeats",
            ),
        ),
        (REPEATED + "[a key]", ISOLATION.removesuffix("::")),
    ),
    Mutation(
        "a duplicate is answered by a transaction that has an id and wrote nothing",
        "broker/storage/idempotency.py",
        (
            (_KNOWN, _KNOWN.replace("e.body_hash", "e.body_hash, e.message_id")),
            ("k.body_hash AS known\n", "k.body_hash AS known, k.message_id AS known_id\n"),
            ("    WHERE key IS NOT NULL\n", "    WHERE key IS NOT NULL AND known IS NULL\n"),
            ("coalesce(c.message_id, n.id) AS id", "coalesce(c.message_id, n.known_id, n.id) AS id"),
            (
                "coalesce(c.message_id <> n.id, false) AS repeats",
                "coalesce(c.message_id <> n.id, n.known IS NOT NULL) AS repeats",
            ),
        ),
        (REPEATED + "[a key]",),
    ),
    Mutation(
        "a second delete answers without waiting for the standby",
        "broker/storage/leases.py",
        (("pg_logical_emit_message(true, 'wonderq', '') END", "pg_current_wal_lsn() END"),),
        (REPEATED + "[a delete]",),
    ),
    Mutation(
        "what was found done is not confirmed",
        "broker/storage/database.py",
        (("    await connection.execute(_CONFIRM)\n", "    del connection\n"),),
        (REPEATED + "[a queue]", REPEATED + "[a delete by id]"),
    ),
    Mutation(
        "synchronous_commit = off",
        "broker/storage/database.py",
        (
            (
                "            facts = await durability.server_facts(connection)\n",
                "            facts = await durability.server_facts(connection)\n"
                '            await connection.execute("SET synchronous_commit = off")\n',
            ),
        ),
        (UNCONFIRMED + "[enqueue-False-cancel]", BEHIND),
    ),
    Mutation(
        "synchronous_commit = local",
        "broker/storage/database.py",
        (
            (
                "            facts = await durability.server_facts(connection)\n",
                "            facts = await durability.server_facts(connection)\n"
                '            await connection.execute("SET synchronous_commit = local")\n',
            ),
        ),
        (UNCONFIRMED + "[enqueue-False-cancel]", BEHIND),
    ),
    Mutation(
        "synchronous_commit off is not noticed at the start",
        "broker/storage/durability.py",
        (('if self.synchronous_commit == "off":', "if False:"),),
        (
            OUTCOMES + "test_the_level_is_what_the_settings_make_of_a_message",
            "tests/test_processes.py::test_what_the_broker_s_own_role_has_set_counts",
        ),
    ),
    Mutation(
        "the notice that no standby has confirmed is ignored",
        "broker/storage/database.py",
        (("if diagnostic.source_function == STOPPED_WAITING:", "if False:"),),
        (UNCONFIRMED + "[plain-False-cancel]", UNCONFIRMED + "[several-True-cancel]"),
    ),
    Mutation(
        "at most once: the message is leased, not removed",
        "broker/storage/handing_out.py",
        (("_REMOVE if at_most_once else _LEASE", "_LEASE"), ("if not at_most_once:", "if True:")),
        (MESSAGES + "test_promise_5_at_most_once_the_message_is_gone_before_the_answer_leaves",),
    ),
    Mutation(
        "news are sent in a transaction that writes",
        "broker/storage/notifications.py",
        (('"SELECT pg_notify(', "\"SELECT pg_logical_emit_message(true, '', ''), pg_notify("),),
        (STANDBY + "test_news_wait_for_no_standby",),
    ),
    # Leases.
    Mutation(
        "delete does not look at the receipt's token",
        "broker/storage/leases.py",
        (
            (
                "m.id = w.id\n        AND uuid_send(m.lease_token) = w.token\n    RETURNING w.n, m.expires_at",
                "m.id = w.id\n    RETURNING w.n, m.expires_at",
            ),
        ),
        (
            MESSAGES + "test_promise_4_a_stale_receipt_changes_nothing",
            CONCURRENCY + "test_a_delete_that_meets_a_new_lease_has_lost_it_if_that_is_committed",
            ISOLATION.removesuffix("::"),
        ),
    ),
    Mutation(
        "extend does not look at the receipt's token",
        "broker/storage/leases.py",
        (("    AND uuid_send(m.lease_token) = w.token AND m.visible_at >", "    AND m.visible_at >"),),
        (MESSAGES + "test_promise_4_a_stale_receipt_changes_nothing",),
    ),
    Mutation(
        "a lease that has ended is extended",
        "broker/storage/leases.py",
        ((" = w.token AND m.visible_at > statement_timestamp()\n", " = w.token\n"),),
        (MESSAGES + "test_promise_4_a_lease_whose_time_is_over_is_not_extended",),
    ),
    Mutation(
        "dequeue waits for locks",
        "broker/storage/handing_out.py",
        (("        FOR UPDATE SKIP LOCKED\n", "        FOR UPDATE\n"),),
        (CONCURRENCY + "test_dequeue_skips_what_an_open_transaction_has_locked_and_sees_it_afterwards",),
    ),
    Mutation(
        "dequeue locks nothing",
        "broker/storage/handing_out.py",
        (("        FOR UPDATE SKIP LOCKED\n", ""),),
        (
            CONCURRENCY + "test_two_consumers_never_lease_one_message",
            CONCURRENCY + "test_what_was_leased_since_the_snapshot_is_not_handed_out_again",
        ),
    ),
    Mutation(
        "a lease begins by the broker's clock",
        "broker/storage/handing_out.py",
        (
            ("    SELECT clock_timestamp() AS now\n", "    SELECT to_timestamp(%(broker_now)s) AS now\n"),
            (
                '"max_bytes": MAX_BODY_BYTES_PER_ANSWER,',
                '"max_bytes": MAX_BODY_BYTES_PER_ANSWER, "broker_now": __import__("time").time(),',
            ),
        ),
        ("tests/test_clock.py::test_leases_end_by_the_clock_that_there_is",),
    ),
    Mutation(
        "leased messages are handed out",
        "broker/storage/handing_out.py",
        ((" AND visible_at <= w.now\n", "\n"),),
        (
            MESSAGES + "test_promise_2_while_a_lease_runs_nobody_else_is_given_the_message",
            MESSAGES + "test_a_delayed_message_is_handed_out_when_its_time_has_come",
        ),
    ),
    Mutation(
        "an expired message is handed out",
        "broker/storage/handing_out.py",
        ((_EXPIRY, "            AND receive_count < w.max_receives\n"), (_EXPIRY.split(") AND")[0] + ")\n", "")),
        (
            MESSAGES + "test_promise_6_an_expired_message_is_invisible_everywhere_at_once",
            MESSAGES + "test_promise_6_an_expired_message_that_was_returned_is_not_handed_out",
        ),
    ),
    Mutation(
        "the sweeper removes what somebody holds",
        "broker/storage/sweeps.py",
        (("greatest(expires_at, visible_at) <= statement_timestamp()", "expires_at <= statement_timestamp()"),),
        ("tests/test_sweeper.py::test_a_message_that_expired_while_it_is_held_is_left_until_its_lease_ends",),
    ),
    Mutation(
        "a delivery that nobody heard of is counted",
        "broker/storage/leases.py",
        (("    receive_count = m.receive_count - 1,\n", ""),),
        (
            MESSAGES + "test_promise_7_what_is_given_back_is_as_it_was",
            DEAD_LETTERS + "test_a_delivery_that_nobody_heard_of_does_not_count",
        ),
    ),
    Mutation(
        "what was leased for a client that hung up is kept",
        "broker/waiting.py",
        (
            (
                "        if delivery.leases:\n            self._in_background",
                "        if False:\n            self._in_background",
            ),
        ),
        (
            WAITING + "test_a_client_that_hangs_up_between_lease_and_answer_takes_nothing",
            WAITING + "test_what_a_gone_client_leased_goes_to_the_next_at_once",
        ),
    ),
    # What answers say.
    Mutation(
        "delete answers true for what is gone",
        "broker/storage/leases.py",
        (("[False] * len(leases)", "[True] * len(leases)"),),
        (
            CONCURRENCY + "test_of_two_deletes_the_second_waits_and_answers_false",
            ISOLATION.removesuffix("::"),
        ),
    ),
    Mutation(
        "delete answers true for a lease that is lost",
        "broker/storage/leases.py",
        (("results[first_mention[lease]] = LeaseLost()", "results[first_mention[lease]] = True"),),
        (MESSAGES + "test_promise_4_a_stale_receipt_changes_nothing", ISOLATION.removesuffix("::")),
    ),
    Mutation(
        "a connection that is lost under a statement is said to have done nothing",
        "broker/storage/outcomes.py",
        (("(Moment.LOST_AFTER_SENDING, UNKNOWN,", "(Moment.LOST_AFTER_SENDING, NONE,"),),
        (
            OUTCOMES + "test_a_lost_connection_and_a_deadline_leave_in_doubt_only_what_was_sent",
            AMBIGUOUS + "test_a_message_whose_enqueue_was_cut_off_and_repeated_is_stored_once",
        ),
    ),
    Mutation(
        "a session that was terminated is said to have done nothing",
        "broker/storage/outcomes.py",
        (('or the server is being stopped", UNKNOWN', 'or the server is being stopped", NONE'),),
        (
            OUTCOMES + "test_a_terminated_session_leaves_its_write_in_doubt_and_not_its_read",
            "tests/test_group_commit.py::test_a_lost_connection_leaves_every_call_of_the_statement_unknown",
        ),
    ),
    Mutation(
        "a deadline that passes under a statement is said to have done nothing",
        "broker/storage/outcomes.py",
        (("(Moment.LATE_AFTER_SENDING, UNKNOWN,", "(Moment.LATE_AFTER_SENDING, NONE,"),),
        (
            OUTCOMES + "test_a_lost_connection_and_a_deadline_leave_in_doubt_only_what_was_sent",
            OUTCOMES + "test_a_server_that_does_not_answer_opens_the_breaker_until_it_does",
        ),
    ),
    Mutation(
        "what shares a statement is said not to have been sent",
        "broker/storage/group_commit.py",
        (("                pending.is_sent = True\n", "                pending.is_sent = False\n"),),
        (OUTCOMES + "test_a_server_that_does_not_answer_opens_the_breaker_until_it_does",),
    ),
    Mutation(
        "an I/O error at a commit is said to have done nothing",
        "broker/storage/outcomes.py",
        (('58030 (I/O error) above all", UNKNOWN', '58030 (I/O error) above all", NONE'),),
        (OUTCOMES + "test_what_an_sqlstate_says_of_a_write",),
    ),
    Mutation(
        "the database repeats what may have been done",
        "broker/storage/database.py",
        (("if not failure_of(error, is_sent=is_sent).lost_race or attempt ==", "if attempt =="),),
        (AMBIGUOUS + "test_what_has_no_key_is_sent_once",),
    ),
    # Keys and dead letters.
    Mutation(
        "another body under a known key is taken for a duplicate",
        "broker/storage/idempotency.py",
        (
            ("            WHEN known <> body_hash THEN 'idempotency_conflict'\n", ""),
            ("coalesce(c.body_hash <> n.body_hash, false) AS differs", "false AS differs"),
        ),
        (IDEMPOTENCY + "test_another_body_under_the_same_key_is_a_conflict",),
    ),
    Mutation(
        "a key ends only when it is swept",
        "broker/storage/idempotency.py",
        (
            (
                "            least(k.expires_at, k.first_used_at + (excluded.expires_at - excluded.first_used_at))\n",
                "            'infinity'::timestamptz\n",
            ),
        ),
        (IDEMPOTENCY + "test_a_key_is_free_again_when_its_window_is_over",),
    ),
    Mutation(
        "a batch is stored in part",
        "broker/storage/storing.py",
        (
            (
                "    WHERE i.call NOT IN (SELECT call FROM refused)\n    RETURNING id",
                "    WHERE i.refusal IS NULL\n    RETURNING id",
            ),
            (
                "    FROM input\n    WHERE call NOT IN (SELECT call FROM refused)\n    LIMIT 1",
                "    FROM input\n    LIMIT 1",
            ),
        ),
        (MESSAGES + "test_a_batch_is_stored_whole_or_not_at_all",),
    ),
    Mutation(
        "a dead letter comes a delivery too late",
        "broker/storage/handing_out.py",
        (
            ("m.receive_count + 1 < p.max_receives THEN 1", "m.receive_count < p.max_receives THEN 1"),
            ("AND receive_count < w.max_receives\n", "AND receive_count <= w.max_receives\n"),
        ),
        (DEAD_LETTERS + "test_a_message_is_handed_out_as_often_as_permitted_and_no_more_swept_or_not",),
    ),
    Mutation(
        "a dead letter keeps its receipts",
        "broker/storage/leases.py",
        (("WHEN m.id IS NULL THEN NOT EXISTS (", "WHEN m.id IS NULL THEN true OR NOT EXISTS ("),),
        (DEAD_LETTERS + "test_old_receipts_are_lost_for_ever",),
    ),
    Mutation(
        "dead letters are moved by two sweepers at once",
        "broker/storage/dead_letters.py",
        (("    LIMIT %(batch)s\n    FOR UPDATE SKIP LOCKED\n),\nstamp", "    LIMIT %(batch)s\n),\nstamp"),),
        (
            DEAD_LETTERS + "test_two_sweepers_at_once_move_different_messages",
            DEAD_LETTERS + "test_a_move_skips_what_is_being_deleted",
        ),
    ),
    # Topics.
    Mutation(
        "copies are made of a duplicate too",
        "broker/storage/publishing.py",
        (("FROM (SELECT * FROM decided WHERE NOT repeats ORDER BY n)", "FROM (SELECT * FROM decided ORDER BY n)"),),
        (
            PUBLISHING_KEYS + "test_a_key_publishes_one_message",
            PUBLISHING_KEYS + "test_a_publisher_that_was_cut_off_repeats_it",
            TOPIC_ISOLATION,
        ),
    ),
    Mutation(
        "a publish's key DO NOTHING: whoever waits for it publishes anew",
        "broker/storage/publishing.py",
        ((_PUBLISH_KEY_UPDATE, "    ON CONFLICT (queue_id, key) DO NOTHING\n"),),
        (PUBLISHING_KEYS + "test_of_two_with_one_key_the_second_waits_and_is_the_duplicate", TOPIC_ISOLATION),
    ),
    Mutation(
        "the key of a publish is committed before its copies are made",
        "broker/storage/publishing.py",
        (
            (
                "await fetch(connection, _PUBLISH, _params(calls))",
                "await _in_two(connection, _params(calls))",
            ),
            ("def _put_off(", _IN_TWO + "def _put_off("),
        ),
        (PUBLISHING_KEYS + "test_a_publish_whose_copies_are_not_stored_has_used_no_key",),
    ),
    Mutation(
        "a duplicate says how many copies there would be now",
        "broker/storage/publishing.py",
        (("coalesce(c.deliveries, n.deliveries) AS delivered", "n.deliveries AS delivered"),),
        (PUBLISHING_KEYS + "test_a_duplicate_says_how_many_copies_there_were_the_first_time",),
    ),
    Mutation(
        "a publish to nobody is answered by a transaction that wrote nothing",
        "broker/storage/publishing.py",
        (("THEN pg_logical_emit_message(true, 'wonderq', '')", "THEN pg_current_wal_lsn()"),),
        (REPEATED + "[a publish to nobody]", PUBLISHING_KEYS + "test_every_answer_is_of_a_transaction_that_wrote"),
    ),
    Mutation(
        "a filter asks for any of its headers",
        "broker/storage/publishing.py",
        (
            ("        OR NOT EXISTS (\n", "        OR s.filter = '{}' OR EXISTS (\n"),
            ("WHERE NOT coalesce(f.value ?", "WHERE coalesce(f.value ?"),
        ),
        (
            PUBLISHING + "test_a_message_matches_where_each_header_has_one_of_its_values",
            SUBSCRIPTIONS + "test_a_filter_may_be_as_large_as_is_said",
        ),
    ),
    Mutation(
        "a header that is missing matches",
        "broker/storage/publishing.py",
        (("(i.header_values ->> f.key), false)", "(i.header_values ->> f.key), true)"),),
        (PUBLISHING + "test_a_message_matches_where_each_header_has_one_of_its_values",),
    ),
    Mutation(
        "subscriptions that have ended are still served",
        "broker/storage/publishing.py",
        ((" AND s.state <> 'ended'\n", "\n"),),
        (ENDED + "test_who_has_ended_gets_no_more_copies",),
    ),
    Mutation(
        "a queue that is full keeps back only its own copy",
        "broker/storage/publishing.py",
        (("WHERE w.n NOT IN (SELECT n FROM refused)", "WHERE w.n NOT IN (SELECT n FROM refused WHERE queue IS NULL)"),),
        (
            PUBLISHING + "test_a_full_queue_is_named_and_nobody_gets_the_message",
            PUBLISHING + "test_a_queue_that_does_not_take_a_body_of_this_size_is_named_and_nobody_gets_it",
        ),
    ),
    Mutation(
        "nobody is woken by copies",
        "broker/methods.py",
        (("        for each in news:\n            self.waiting.tell(each)\n", ""),),
        (
            PUBLISHING + "test_who_waits_for_any_of_the_queues_is_woken",
            BROADCAST + "test_who_waits_for_any_of_the_queues_is_woken",
        ),
    ),
    Mutation(
        "a broadcast keeps what it has given out",
        "broker/storage/broadcasting.py",
        (
            (
                "    DELETE FROM broker.messages m\n    USING picked p\n",
                "    SELECT\n" + _TAKEN + "    FROM broker.messages m\n    CROSS JOIN picked p\n",
            ),
            ("    RETURNING\n" + _TAKEN, ""),
        ),
        (
            BROADCAST + "test_what_is_published_is_stored_until_it_is_broadcast",
            TOPIC_ISOLATION,
        ),
    ),
    Mutation(
        "a broadcast goes past what a queue does not take",
        "broker/storage/broadcasting.py",
        (("        AND p.id < coalesce((SELECT message_id FROM refused), 9223372036854775807)\n", _NOT_REFUSED),),
        (BROADCAST + "test_a_queue_that_does_not_take_a_message_stops_it_and_all_from_there_on_stays",),
    ),
    Mutation(
        "a broadcast waits for locks",
        "broker/storage/broadcasting.py",
        (("    FOR UPDATE SKIP LOCKED\n", "    FOR UPDATE\n"),),
        (BROADCAST + "test_of_two_at_once_each_message_is_taken_by_one_and_who_comes_second_knows_there_is_more",),
    ),
    Mutation(
        "a broadcast gives out what has expired",
        "broker/storage/broadcasting.py",
        (("    AND (m.expires_at IS NULL OR m.expires_at > statement_timestamp())\n", ""),),
        (BROADCAST + "test_what_expires_before_is_not_given_out_swept_or_not",),
    ),
    Mutation(
        "a broadcast that was broken off says that it is complete",
        "broker/storage/broadcasting.py",
        (("complete=more == (False,))", "complete=True)"),),
        (
            BROADCAST + "test_a_broadcast_whose_time_is_over_says_so_and_is_repeated",
            BROADCAST + "test_a_queue_that_does_not_take_a_message_stops_it_and_all_from_there_on_stays",
        ),
    ),
    Mutation(
        "a queue that a subscription sends to is deleted",
        "broker/storage/queues.py",
        (("JOIN broker.subscriptions s ON s.queue_id = q.id\n", "JOIN broker.subscriptions s ON false\n"),),
        (SUBSCRIPTIONS + "test_a_queue_that_a_subscription_names_is_in_use", TOPIC_ISOLATION),
    ),
    Mutation(
        "who subscribes locks nothing",
        "broker/storage/subscriptions.py",
        (("        await connection.execute(queues.LOCK_QUEUES)\n        found", "        found"),),
        (
            SUBSCRIPTIONS
            + "test_a_queue_that_is_being_deleted_is_not_found_and_one_that_is_being_subscribed_is_in_use",
            TOPIC_ISOLATION,
        ),
    ),
    Mutation(
        "the sweeper takes what somebody holds of a subscription that has ended",
        "broker/storage/dead_letters.py",
        (
            (
                "WHERE queue_id = s.queue_id AND (lane = 0 OR visible_at <= statement_timestamp())\n",
                "WHERE queue_id = s.queue_id\n",
            ),
        ),
        (ENDED + "test_what_is_held_follows_when_its_lease_ends_and_may_be_deleted_before",),
    ),
    Mutation(
        "what a deleted topic stored stays for ever",
        "broker/storage/sweeps.py",
        (("    SELECT id, deleted_at FROM broker.topics WHERE deleted_at IS NOT NULL\n", _NO_TOPICS),),
        (TOPICS + "test_what_a_deleted_topic_leaves_is_removed_in_bounded_batches_and_its_row_after_a_day",),
    ),
    Mutation(
        "a secret that was replaced counts no more",
        "broker/storage/subscriptions.py",
        (("SET ends_at = now() + interval '24 hours'", "SET ends_at = now()"),),
        (URLS + "test_a_secret_that_was_replaced_counts_for_24_hours_more",),
    ),
    Mutation(
        "every broker probes",
        "broker/storage/subscriptions.py",
        (
            (
                "SET probe_at = statement_timestamp() + %(every_seconds)s",
                "SET probe_at = s.probe_at + 0 * %(every_seconds)s",
            ),
        ),
        (URLS + "test_of_two_brokers_one_probes",),
    ),
    # What keeps a broker going.
    Mutation(
        "the breaker never opens",
        "broker/storage/breaker.py",
        (("        before, self.reason = self.reason, reason\n", "        before, self.reason = self.reason, None\n"),),
        (OUTCOMES + "test_a_server_that_does_not_answer_opens_the_breaker_until_it_does", AWAY),
    ),
    Mutation(
        "the breaker does not see who waits for a standby",
        "broker/storage/breaker.py",
        (("wait_event = 'SyncRep'", "wait_event = 'SyncRap'"),),
        (AWAY,),
    ),
    Mutation(
        "a call that is given up keeps its connection",
        "broker/storage/database.py",
        (("        self._is_given_up = True\n        self.cut()\n", "        self._is_given_up = True\n"),),
        (OUTCOMES + "test_a_call_that_is_given_up_leaves_its_place_to_the_next",),
    ),
    Mutation(
        "the low-water hint does not heed transactions that are under way",
        "broker/storage/low_water.py",
        (
            ("if notes and notes[0][1] <= view.xmin:", "if notes:"),
            ("return min(notes[0][0], view.now) - MARGIN", "return view.now - MARGIN"),
        ),
        (
            LOW_WATER + "test_a_transaction_that_lasts_brings_its_message_below_no_hint",
            LOW_WATER + "test_many_brokers_hand_out_everything_whatever_their_hints",
        ),
    ),
    Mutation(
        "a consumer that goes away takes its wake-up along",
        "broker/waiting.py",
        (("return self.wake(1, is_news=is_news) > 0 and is_news", "return False"),),
        (WAITING + "test_a_consumer_that_hangs_up_when_it_is_woken_passes_the_wake_up_on",),
    ),
    Mutation(
        "nobody looks for what no news came of",
        "broker/waiting.py",
        (("                self._to_look_at.update(self._lines)\n                next", "                next"),),
        (WAITING + "test_rows_inserted_in_sql_are_seen_within_about_a_second",),
    ),
    # What is pushed, to whom, and how often.
    Mutation(
        "push: one address that may be reached is enough",
        "broker/addresses.py",
        (
            (
                "        for address in addresses:\n            self._guard.check_address(address, self._scheme)\n",
                "        self._guard.check_address(addresses[0], self._scheme)\n",
            ),
        ),
        (ADDRESSES + "test_one_forbidden_address_among_many_is_enough",),
    ),
    Mutation(
        "push: a host that is an address is not looked at when it is connected to",
        "broker/addresses.py",
        (("        self.check_address(str(address[0]), scheme)\n", ""),),
        (ADDRESSES + "test_no_private_address_is_reached_in_any_notation",),
    ),
    Mutation(
        "push: what was looked up before is taken for true",
        "broker/addresses.py",
        (("            use_dns_cache=False,\n", ""), ("keepalive_timeout=KEEP_ALIVE_SECONDS", "force_close=True")),
        (ADDRESSES + "test_each_connection_asks_anew",),
    ),
    Mutation(
        "push: redirects are followed",
        "broker/receivers.py",
        (("allow_redirects=False", "allow_redirects=True"),),
        (RECEIVERS + "test_a_redirect_to_a_private_address_is_not_followed",),
    ),
    Mutation(
        "push: an answer counts when its body has been read",
        "broker/receivers.py",
        (("        left = -1\n", "        raise\n"),),
        (RECEIVERS + "test_the_head_alone_decides_and_the_rest_is_read_to_a_limit",),
    ),
    Mutation(
        "push: the body of an answer is read to its end",
        "broker/receivers.py",
        (("while left >= 0 and not", "while not"), ("timeout(ANSWER_SECONDS)", "timeout(None)")),
        (RECEIVERS + "test_a_connection_is_used_again_after_a_short_answer_and_dropped_after_a_long_one",),
    ),
    Mutation(
        "push: only the newest secret signs",
        "broker/receivers.py",
        (("body, secrets),", "body, secrets[:1]),"),),
        (WEBHOOKS + "test_after_a_rotation_either_secret_fits_and_after_a_day_the_new_one_alone",),
    ),
    Mutation(
        "push: who is slow may have every place",
        "broker/places.py",
        (
            ("if holder.places < self._free:", "if self._free:"),
            ("if each.places < self._free)", "if self._free)"),
        ),
        (
            "tests/test_places.py::test_who_takes_all_that_he_can_leaves_half_of_it",
            WEBHOOKS + "test_endpoints_that_answer_no_more_leave_places_for_the_others",
        ),
    ),
    Mutation(
        "push: a place that was granted to somebody who has gone is lost",
        "broker/places.py",
        (
            (
                "                self.release(holder)  # it was granted, and nobody is there to use it\n",
                "                pass\n",
            ),
        ),
        (
            "tests/test_places.py::test_no_place_is_lost_or_made_whatever_happens",
            "tests/test_places.py::test_who_ceases_to_wait_takes_no_place_with_him_whenever_that_is",
        ),
    ),
    Mutation(
        "push: other brokers hear of no pause",
        "broker/webhooks.py",
        (("self._note(endpoint, lambda connection: subscriptions.pause(connection, number, seconds))", "pass"),),
        (WEBHOOKS + "test_an_endpoint_that_asks_for_patience_is_left_alone_by_every_broker_for_so_long",),
    ),
    Mutation(
        "push: an endpoint that fails is probed by whoever likes",
        "broker/storage/subscriptions.py",
        (
            (
                "SET probe_at = statement_timestamp() + %(every_seconds)s::float8 *",
                "SET probe_at = statement_timestamp() + 0 *",
            ),
        ),
        (WEBHOOKS + "test_an_endpoint_that_fails_is_probed_by_one_broker_with_one_message_until_it_takes_one",),
    ),
    Mutation(
        "push: probes take the places of the others",
        "broker/webhooks.py",
        (("        self._probes = asyncio.Semaphore(PROBES)\n", "        self._probes = asyncio.Semaphore(10**6)\n"),),
        (WEBHOOKS + "test_any_number_of_endpoints_that_fail_take_no_place_at_all",),
    ),
    Mutation(
        "push: after its last delivery a message waits as after any other",
        "broker/webhooks.py",
        (("push.message.receive_count >= max_receives:", "push.message.receive_count > max_receives:"),),
        (WEBHOOKS + "test_after_its_last_delivery_a_message_is_a_dead_letter_at_once",),
    ),
    Mutation(
        "push: a delete that the database does not answer is given up",
        "broker/webhooks.py",
        (
            (
                "        deleted = await self._until_answered(lambda: self._calls.delete([lease]))\n",
                "        deleted = await self._calls.delete([lease])\n",
            ),
        ),
        (WEBHOOKS + "test_what_was_taken_while_the_database_was_away_is_deleted_when_it_is_back_and_pushed_once",),
    ),
    Mutation(
        "push: a broker that stops keeps the leases of what was not answered",
        "broker/webhooks.py",
        (("            if not push.is_answered:\n", "            if False:\n"),),
        (WEBHOOKS + "test_what_a_stopped_broker_had_no_answer_to_is_pushed_by_the_next_at_once",),
    ),
    Mutation(
        "push: what finds no place is kept",
        "broker/webhooks.py",
        (("            self._give_back(endpoint.target.queue, delivery.leases[sent:])\n", "            pass\n"),),
        (WEBHOOKS + "test_a_message_that_finds_no_place_in_time_is_given_back_uncounted",),
    ),
    Mutation(
        "push: 410 is a failure like any other",
        "broker/receivers.py",
        (("        return Answer(Outcome.GONE)\n", "        return Answer(Outcome.REFUSED)\n"),),
        (WEBHOOKS + "test_410_ends_the_subscription_and_what_is_left_becomes_dead_letters",),
    ),
    Mutation(
        "push: consumers of the broker's own take the places of clients",
        "broker/server.py",
        (("partial(self.waiting.dequeue, takes_place=False)", "self.waiting.dequeue"),),
        (WEBHOOKS + "test_consumers_of_the_broker_s_own_take_no_place_from_its_clients",),
    ),
    # Who may call, and what: tokens, permissions, limits, the audit log.
    Mutation(
        "tokens: the secret is not compared",
        "broker/auth.py",
        (("return caller if hmac.compare_digest(secret_hash, presented.secret_hash) else None", "return caller"),),
        (AUTH + "test_nobody_without_a_token_is_let_in",),
    ),
    Mutation(
        "tokens: an unknown id is answered at once",
        "broker/auth.py",
        (
            (
                "        secret_hash, caller = self._callers.get(presented.id, (_DUMMY_HASH, None))\n",
                "        if presented.id not in self._callers:\n            return None\n"
                "        secret_hash, caller = self._callers[presented.id]\n",
            ),
        ),
        (AUTH + "test_an_unknown_id_and_a_wrong_secret_are_told_apart_by_nothing",),
    ),
    Mutation(
        "tokens: expiry is not looked at",
        "broker/storage/tokens.py",
        (
            (
                'WHERE revoked_at IS NULL AND (expires_at IS NULL OR expires_at > statement_timestamp())\n"""\n\n_EVER',
                'WHERE revoked_at IS NULL\n"""\n\n_EVER',
            ),
        ),
        (
            AUTH + "test_a_token_counts_at_once_and_not_after_it_is_revoked_or_has_expired",
            "tests/test_revocation.py"
            "::test_a_token_that_counts_no_more_is_refused_by_every_process_within_five_seconds[expired]",
        ),
    ),
    Mutation(
        "tokens: who was let in stays in",
        "broker/auth.py",
        (("        self._let_in.clear()\n", ""),),
        (
            AUTH + "test_a_token_counts_at_once_and_not_after_it_is_revoked_or_has_expired",
            "tests/test_revocation.py"
            "::test_a_token_that_counts_no_more_is_refused_by_every_process_within_five_seconds[revoked]",
        ),
    ),
    Mutation(
        "tokens: what was known counts for ever",
        "broker/auth.py",
        (("MAX_AGE_SECONDS = 4.0", "MAX_AGE_SECONDS = 4e9"),),
        (AUTH + "test_nobody_is_let_in_by_what_was_known_too_long_ago",),
    ),
    Mutation(
        "tokens: with the last one gone everybody is let in again",
        "broker/auth.py",
        (
            (
                "        self._is_required = self._is_required or were_ever\n",
                '        self._is_required = self._mode == "required" or bool(found)\n',
            ),
        ),
        (AUTH + "test_after_the_first_token_auto_asks_for_one_for_good",),
    ),
    Mutation(
        "tokens: failures are never throttled",
        "broker/auth.py",
        (("if failures >= self._max_failures and left > 0:", "if False:"),),
        (
            AUTH + "test_failed_logins_from_an_address_are_throttled_and_good_ones_never",
            LIMITS + "test_failed_logins_are_limited",
        ),
    ),
    Mutation(
        "tokens: the sender is whoever the producer says",
        "broker/methods.py",
        (("return sender if call.caller is None else call.caller.name", "return sender"),),
        (AUTH + "test_the_sender_is_the_token",),
    ),
    Mutation(
        "permissions: a receipt is good in any hand",
        "broker/permissions.py",
        (
            ("        if await self._barred_queues(caller, verb, {queue_id}):\n", "        if False:\n"),
            ("return name is not None and caller.may(verb, name)", "return True"),
        ),
        (
            AUTH + "test_a_receipt_alone_is_worth_nothing",
            AUTH + "test_every_method_is_open_to_those_whose_token_permits_it_and_to_nobody_else",
        ),
    ),
    Mutation(
        "permissions: the receipts of a batch are good in any hand",
        "broker/methods.py",
        (("if lease.queue_id in call.barred_queues:", "if False:"),),
        (AUTH + "test_a_receipt_alone_is_worth_nothing",),
    ),
    Mutation(
        "permissions: lists show everything",
        "broker/methods.py",
        (('return None if call.caller is None else call.caller.like("manage")', "return None"),),
        (AUTH + "test_lists_show_what_may_be_managed",),
    ),
    Mutation(
        "permissions: of two names only the first is looked at",
        "broker/permissions.py",
        (("        for param, value in named.items():\n", "        for param, value in [*named.items()][:1]:\n"),),
        (AUTH + "test_a_dead_letter_queue_must_be_one_that_may_be_managed",),
    ),
    Mutation(
        "permissions: a pattern is a regular expression",
        "broker/credentials.py",
        (('".*".join(map(re.escape, pattern.split("*")))', 'pattern.replace("*", ".*")'),),
        (AUTH + "test_in_a_pattern_only_the_star_is_special",),
    ),
    Mutation(
        "network: what anybody says of his address is believed",
        "broker/entrance.py",
        (
            ("        if not self._proxies:\n            return address\n", ""),
            (
                "if not any(is_in(address, network) for network in self._proxies) or not each.strip():",
                "if not each.strip():",
            ),
        ),
        (AUTH + "test_what_a_client_says_of_its_address_is_not_believed",),
    ),
    Mutation(
        "network: the pages of every site may call",
        "broker/entrance.py",
        (
            ('request.headers.get("Origin") if self._origins else None', 'request.headers.get("Origin")'),
            ("        if origin in self._origins:\n", "        if origin is not None:\n"),
        ),
        (AUTH + "test_only_pages_of_named_sites_may_call_from_a_browser",),
    ),
    Mutation(
        "network: the Host header is not looked at",
        "broker/entrance.py",
        (("if host is None or not self._checks_host:", "if True:"),),
        (TRANSPORT + "test_a_foreign_name_in_host_is_421",),
    ),
    Mutation(
        "audit: who was refused is not written down",
        "broker/rpc.py",
        (("if schema.is_administrative or outcome == Forbidden.type:", "if schema.is_administrative:"),),
        (
            AUTH + "test_acts_of_administration_and_refusals_are_written_down",
            AUTH + "test_every_act_of_administration_gives_one_line_whoever_does_it",
        ),
    ),
    Mutation(
        "audit: acts on single messages are not written down",
        "broker/schema.py",
        (
            (
                'return self.permission in ("manage", "admin") and not self.is_read_only',
                'return self.permission in ("manage", "admin") and not self.is_read_only and "mess" not in self.name',
            ),
        ),
        (AUTH + "test_every_act_of_administration_gives_one_line_whoever_does_it",),
    ),
    Mutation(
        "limits: calls in flight are not counted",
        "broker/rpc.py",
        (("        self._in_flight += 1\n", ""), ("            self._in_flight -= 1\n", "")),
        (LIMITS + "test_calls_in_flight_of_all_clients_are_limited_those_that_wait_too",),
    ),
    Mutation(
        "limits: one token may have as many calls under way as there are places",
        "broker/auth.py",
        (("self._left >= 1 and self.in_flight < self.limits.in_flight", "self._left >= 1"),),
        (
            LIMITS + "test_calls_of_one_token_are_limited_at_one_time_and_in_a_second",
            AUTH + "test_one_token_cannot_take_all_places",
        ),
    ),
    Mutation(
        "errors: what has been answered is left to the garbage collector",
        "broker/rpc.py",
        (("        let_go(error)\n", ""),),
        ("tests/test_garbage.py::test_a_request_leaves_nothing_to_the_garbage_collector",),
    ),
    Mutation(
        "limits: a client is blamed for the time that the broker stood still",
        "broker/connections.py",
        (("now > deadline + STOOD_STILL_SECONDS and _peek(self.transport)", "False"),),
        ("tests/test_slow_clients.py::test_a_broker_that_stood_still_blames_nobody_whose_request_has_come_meanwhile",),
    ),
    Mutation(
        "limits: a silent connection stays as long as an idle one",
        "broker/connections.py",
        (
            (
                "        self._next_keepalive_close_time = self._loop.time() + spread(self._limits.header_timeout)\n",
                "        self._next_keepalive_close_time = self._loop.time() + 10 * self._limits.keepalive_timeout\n",
            ),
        ),
        (LIMITS + "test_times_for_head_and_body_are_settings",),
    ),
    Mutation(
        "limits: the bodies of a long call may be as deep as they like",
        "broker/envelopes.py",
        (("len(value) < LONG_CALL_BYTES and is_deeper(bytes(value), most)", "False"),),
        ("tests/test_hostile_bodies.py::test_a_body_that_is_made_to_cost_much_is_answered_as_any_other[deep]",),
    ),
    Mutation(
        "limits: who is sent away for a slow head is cut off",
        "broker/connections.py",
        (
            (
                "                if self._head_deadline is None:\n                    self.force_close()\n",
                "                if True:\n                    self.force_close()\n",
            ),
        ),
        (LIMITS + "test_times_for_head_and_body_are_settings",),
    ),
)
