"""The life of a message as a client sees it, promise by promise, with the contract's numbers.

The sweeper is kept from sweeping: no promise rests on it. Time passes by moving the times that are stored.
"""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from psycopg import sql

from broker.errors import InvalidReceipt
from broker.model import NewMessage, lease_of, receipt_of, timestamp
from broker.storage import handing_out, inspection, leases, low_water, storing
from broker.storage.sessions import Connection, configure
from broker.storage.storing import EnqueueCall, Stored
from conftest import Broker, Connect, StartBroker, dequeue

MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


@pytest.fixture
async def broker(start_broker: StartBroker) -> Broker:
    """A broker whose sweeper does nothing while a test runs."""
    started: Broker = await start_broker(sweep_interval=3600)
    return started


@pytest.fixture(autouse=True)
def always_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let brokers find what `pass_time` has moved below their low-water hints whenever a queue seems empty."""
    monkeypatch.setattr(low_water, "DOUBT_SHARE", 0)


async def pass_time(connection: Connection, seconds: float) -> None:
    """Let so much time pass for every message."""
    await connection.execute(
        """
        UPDATE broker.messages
        SET
            enqueued_at = enqueued_at - %(by)s::interval,
            visible_at = visible_at - %(by)s::interval,
            expires_at = expires_at - %(by)s::interval,
            first_received_at = first_received_at - %(by)s::interval
        """,
        {"by": f"{seconds} s"},
    )


async def fill(connection: Connection, queue: str, how_many: int, visible_in: float = 0, lane: int = 0) -> None:
    """Store many messages at once."""
    await connection.execute(
        """
        INSERT INTO broker.messages (queue_id, id, enqueued_at, visible_at, body_bytes, lane, body)
        SELECT q.id, nextval('broker.message_ids'), now(), now() + %s * interval '1 second', 1, %s, '1'
        FROM broker.queues q, generate_series(1, %s) n
        WHERE q.name = %s
        """,
        [visible_in, lane, how_many, queue],
    )


async def send(broker: Broker, *bodies: Any, queue: str = "default", **how: Any) -> list[str]:
    """Store messages one by one; return their ids."""
    return [(await broker.call("enqueue", queue=queue, body=body, **how))["message_id"] for body in bodies]


async def take(broker: Broker, max_messages: int = 1, queue: str = "default", **how: Any) -> list[dict[str, Any]]:
    """Dequeue; return the messages."""
    answer = await broker.call("dequeue", queue=queue, max_messages=max_messages, **how)
    taken: list[dict[str, Any]] = answer["messages"]
    return taken


def bodies(taken: list[dict[str, Any]]) -> list[Any]:
    return [message["body"] for message in taken]


def receipts(taken: list[dict[str, Any]]) -> list[str]:
    return [message["receipt"] for message in taken]


async def error_type(broker: Broker, method: str, /, **params: Any) -> str:
    error = await broker.error(method, **params)
    kind: str = error["data"]["type"]
    return kind


async def extension_error(broker: Broker, receipt: str) -> str:
    return await error_type(broker, "extend_visibility", receipt=receipt, visibility_timeout=9)


async def total(broker: Broker, queue: str = "default") -> int:
    counted: int = (await broker.call("count_messages", queue=queue))["total"]
    return counted


def seconds_between(earlier: str, later: str) -> float:
    return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()


def seconds_from_now(moment: str) -> float:
    return (datetime.fromisoformat(moment) - datetime.now(UTC)).total_seconds()


# Promise 3: order


async def test_promise_3_fresh_messages_come_oldest_first(broker: Broker) -> None:
    await send(broker, 1, 2, 3)
    assert bodies(await take(broker, 2)) == [1, 2]
    assert bodies(await take(broker, 2)) == [3]


async def test_promise_3_a_batch_keeps_its_order(broker: Broker) -> None:
    await broker.call("enqueue_batch", messages=[{"body": n} for n in range(500)])
    taken: list[int] = []
    for _ in range(5):
        taken += bodies(await take(broker, 100))
    assert taken == list(range(500))


async def test_promise_3_returned_messages_come_before_fresh_ones(broker: Broker, connection: Connection) -> None:
    await send(broker, "first", "second")
    await take(broker, 2)
    await send(broker, "fresh")
    await pass_time(connection, 31)
    assert bodies(await take(broker, 3)) == ["first", "second", "fresh"]


async def test_promise_3_one_hand_out_in_eight_takes_fresh_ones_first(broker: Broker, connection: Connection) -> None:
    await send(broker, *["returned"] * 20)
    await take(broker, 20)
    await pass_time(connection, 31)
    await send(broker, *["fresh"] * 3)
    taken = []
    for _ in range(16):
        taken += bodies(await take(broker))
    # The first hand-out was the one that took the twenty.
    assert [n for n, body in enumerate(taken, start=2) if body == "fresh"] == [8, 16]


async def test_promise_3_the_answer_lists_messages_in_hand_out_order(broker: Broker, connection: Connection) -> None:
    """Also where the lane that is looked into first does not give enough."""
    await send(broker, "a", "b", "c")
    await take(broker, 2)
    await pass_time(connection, 31)
    await send(broker, "d")
    delivery = await dequeue(connection, "default", 4, None, fresh_first=True)
    assert [bytes(message.body) for message in delivery.messages] == [b'"c"', b'"d"', b'"a"', b'"b"']


# Delay, ttl and what queues say


async def test_a_delayed_message_is_handed_out_when_its_time_has_come(broker: Broker, connection: Connection) -> None:
    await send(broker, "later", delay=60)
    await send(broker, "now")
    assert bodies(await take(broker, 2)) == ["now"]
    await pass_time(connection, 59)
    assert bodies(await take(broker)) == ["now"], "its lease has ended, and the delay has not"
    await pass_time(connection, 2)
    assert bodies(await take(broker)) == ["later"]


async def test_null_means_the_value_of_the_queue(broker: Broker) -> None:
    await broker.call("create_queue", queue="q", delay=100, message_ttl=1000, visibility_timeout=7.5)
    by_queue, own = (
        await send(broker, 1, queue="q", delay=None, ttl=None),
        await send(broker, 2, queue="q", delay=0, ttl=50),
    )
    shown = await broker.call("get_message", queue="q", message_id=by_queue[0])
    assert shown["status"] == "delayed"
    assert seconds_between(shown["enqueued_at"], shown["visible_at"]) == 100
    assert seconds_between(shown["enqueued_at"], shown["expires_at"]) == 1000
    shown = await broker.call("get_message", queue="q", message_id=own[0])
    assert shown["status"] == "ready"
    assert shown["visible_at"] == shown["enqueued_at"]
    assert seconds_between(shown["enqueued_at"], shown["expires_at"]) == 50
    (message,) = await take(broker, queue="q", visibility_timeout=None)
    assert seconds_between(message["first_received_at"], message["visible_at"]) == 7.5


async def test_a_message_without_ttl_never_expires(broker: Broker, connection: Connection) -> None:
    await send(broker, 1)
    await pass_time(connection, 10 * 365 * 86400)
    (message,) = await take(broker)
    assert message["expires_at"] is None


async def test_fractions_of_a_second_are_kept(broker: Broker) -> None:
    (sent,) = await send(broker, 1, delay=0.25, ttl=1.000001)
    shown = await broker.call("get_message", queue="default", message_id=sent)
    assert seconds_between(shown["enqueued_at"], shown["visible_at"]) == 0.25
    assert seconds_between(shown["enqueued_at"], shown["expires_at"]) == 1.000001


# Promise 6: expired messages


async def test_promise_6_an_expired_message_is_invisible_everywhere_at_once(
    broker: Broker, connection: Connection
) -> None:
    (sent,) = await send(broker, "old", ttl=10)
    await pass_time(connection, 11)
    assert await take(broker) == []
    assert await take(broker, delivery="at_most_once") == []
    nothing = {"ready": 0, "delayed": 0, "leased": 0, "total": 0, "exact": True}
    assert await broker.call("count_messages", queue="default") == nothing
    assert await broker.call("count_messages") == nothing
    queue = await broker.call("get_queue", queue="default")
    assert queue["counts"] == nothing
    assert queue["oldest_ready_age"] is None
    assert (await broker.call("list_messages", queue="default"))["messages"] == []
    this = {"queue": "default", "message_id": sent}
    assert await error_type(broker, "get_message", **this) == "message_not_found"
    assert await error_type(broker, "update_message", **this, body=1) == "message_not_found"
    assert await broker.call("delete_message", **this) == {"deleted": False}
    assert await handing_out.next_visible(connection, ["default"]) == {"default": None}
    row = await (await connection.execute("SELECT count(*) FROM broker.messages")).fetchone()
    assert row == (1,), "and yet nobody has swept"


async def test_promise_6_a_delayed_message_that_has_expired_is_invisible_too(
    broker: Broker, connection: Connection
) -> None:
    """Whether its delay is over or not."""
    for sent in [*await send(broker, 1, ttl=10, delay=100), *await send(broker, 1, ttl=10, delay=5)]:
        await pass_time(connection, 11)
        assert await total(broker) == 0
        assert (await broker.call("list_messages", queue="default"))["messages"] == []
        assert await error_type(broker, "get_message", queue="default", message_id=sent) == "message_not_found"
    await pass_time(connection, 100)
    assert await take(broker) == []


async def test_promise_6_an_expired_message_that_was_returned_is_not_handed_out(
    broker: Broker, connection: Connection
) -> None:
    await send(broker, 1, ttl=40)
    (message,) = await take(broker)
    await pass_time(connection, 31)
    assert await total(broker) == 1
    await pass_time(connection, 10)
    assert await take(broker) == []
    assert await total(broker) == 0
    assert await broker.call("delete", receipt=message["receipt"]) == {"deleted": False}


async def test_promise_6_who_holds_an_expired_message_may_still_delete_it(
    broker: Broker, connection: Connection
) -> None:
    await send(broker, 1, ttl=10)
    (message,) = await take(broker)
    await pass_time(connection, 20)
    assert (await broker.call("count_messages", queue="default"))["leased"] == 1
    assert await broker.call("delete", receipt=message["receipt"]) == {"deleted": True}


async def test_promise_6_who_holds_an_expired_message_may_extend_change_and_see_it(
    broker: Broker, connection: Connection
) -> None:
    await send(broker, 1, ttl=10)
    (message,) = await take(broker)
    await pass_time(connection, 20)
    await broker.call("extend_visibility", receipt=message["receipt"], visibility_timeout=60)
    this = {"queue": "default", "message_id": message["message_id"]}
    assert (await broker.call("get_message", **this))["status"] == "leased"
    changed = await broker.call("update_message", **this, receipt=message["receipt"], body="new")
    assert changed["body"] == "new"
    await broker.call("extend_visibility", receipt=message["receipt"], visibility_timeout=0)
    assert await total(broker) == 0
    assert await take(broker) == []


# Promises 2 and 4: leases and receipts


async def test_promise_2_while_a_lease_runs_nobody_else_is_given_the_message(
    broker: Broker, connection: Connection
) -> None:
    (sent,) = await send(broker, 1)
    (message,) = await take(broker, visibility_timeout=60)
    assert message["message_id"] == sent
    await pass_time(connection, 59)
    assert await take(broker) == []
    assert await take(broker, delivery="at_most_once") == []


async def test_promise_2_when_a_lease_ends_the_message_is_ready_again(broker: Broker, connection: Connection) -> None:
    await send(broker, 1)
    (first,) = await take(broker)
    await pass_time(connection, 31)
    assert (await broker.call("count_messages", queue="default"))["ready"] == 1
    (second,) = await take(broker)
    assert (first["receive_count"], second["receive_count"]) == (1, 2)
    assert first["receipt"] != second["receipt"]
    assert seconds_between(second["first_received_at"], first["first_received_at"]) == 31
    assert seconds_from_now(second["visible_at"]) == pytest.approx(30, abs=10)


async def test_promise_4_a_receipt_deletes_after_its_time_as_long_as_nobody_took_the_message(
    broker: Broker, connection: Connection
) -> None:
    await send(broker, 1)
    (message,) = await take(broker)
    await pass_time(connection, 3600)
    assert await broker.call("delete", receipt=message["receipt"]) == {"deleted": True}
    assert await total(broker) == 0


async def test_promise_4_a_stale_receipt_changes_nothing(broker: Broker, connection: Connection) -> None:
    await send(broker, 1)
    (first,) = await take(broker)
    await pass_time(connection, 31)
    (second,) = await take(broker)
    assert await error_type(broker, "delete", receipt=first["receipt"]) == "lease_lost"
    assert await extension_error(broker, first["receipt"]) == "lease_lost"
    shown = await broker.call("get_message", queue="default", message_id=first["message_id"])
    assert shown["visible_at"] == second["visible_at"]
    assert await broker.call("delete", receipt=second["receipt"]) == {"deleted": True}
    assert await broker.call("delete", receipt=first["receipt"]) == {"deleted": False}
    assert await extension_error(broker, first["receipt"]) == "lease_lost"


async def test_an_extension_counts_from_now(broker: Broker, connection: Connection) -> None:
    await send(broker, 1)
    (message,) = await take(broker, visibility_timeout=100)
    await pass_time(connection, 90)
    answer = await broker.call("extend_visibility", receipt=message["receipt"], visibility_timeout=50)
    assert seconds_from_now(answer["visible_at"]) == pytest.approx(50, abs=10)
    await pass_time(connection, 45)
    assert await take(broker) == []
    shorter = await broker.call("extend_visibility", receipt=message["receipt"], visibility_timeout=1)
    assert seconds_from_now(shorter["visible_at"]) < 2
    await pass_time(connection, 2)
    assert bodies(await take(broker)) == [1]


async def test_an_extension_by_nothing_gives_the_message_back_at_once(broker: Broker) -> None:
    await send(broker, 1)
    (message,) = await take(broker)
    await broker.call("extend_visibility", receipt=message["receipt"], visibility_timeout=0)
    assert (await broker.call("count_messages", queue="default"))["ready"] == 1
    assert (
        await error_type(broker, "extend_visibility", receipt=message["receipt"], visibility_timeout=9) == "lease_lost"
    )
    (again,) = await take(broker)
    assert again["receive_count"] == 2
    assert await error_type(broker, "delete", receipt=message["receipt"]) == "lease_lost"


async def test_promise_4_a_lease_whose_time_is_over_is_not_extended(broker: Broker, connection: Connection) -> None:
    await send(broker, 1)
    (message,) = await take(broker)
    await pass_time(connection, 31)
    assert (
        await error_type(broker, "extend_visibility", receipt=message["receipt"], visibility_timeout=9) == "lease_lost"
    )
    assert bodies(await take(broker)) == [1]


async def test_of_a_repeated_receipt_the_first_deletes_and_the_others_come_too_late(broker: Broker) -> None:
    await send(broker, 1, 2)
    one, two = receipts(await take(broker, 2))
    answer = await broker.call("delete_batch", receipts=[one, two, one, two, one])
    assert [result["deleted"] for result in answer["results"]] == [True, True, False, False, False]


async def test_in_a_batch_every_receipt_gets_its_own_answer(broker: Broker, connection: Connection) -> None:
    await send(broker, 1, 2, 3)
    stale, gone, good = receipts(await take(broker, 3))
    await broker.call("delete", receipt=gone)
    await broker.call("extend_visibility", receipt=good, visibility_timeout=1000)
    await pass_time(connection, 31)
    assert bodies(await take(broker)) == [1]
    given = [stale, "nonsense", gone, good, good[:-1], good[:-1] + ("A" if good[-1] != "A" else "Q"), good]
    extended = (await broker.call("extend_visibility_batch", receipts=given, visibility_timeout=60))["results"]
    assert [result.get("error", {}).get("data", {}).get("type", "extended") for result in extended] == [
        "lease_lost",
        "invalid_receipt",
        "lease_lost",
        "extended",
        "invalid_receipt",
        "invalid_receipt",
        "extended",
    ]
    assert extended[3] == extended[6]
    deleted = (await broker.call("delete_batch", receipts=given))["results"]
    assert [result.get("error", {}).get("code", result.get("deleted")) for result in deleted] == [
        1004,
        1010,
        False,
        True,
        1010,
        1010,
        False,
    ]


async def test_a_single_invalid_receipt_is_an_error(broker: Broker) -> None:
    for receipt in ("", "x" * 43, "é" * 43):
        assert await error_type(broker, "delete", receipt=receipt) in ("invalid_receipt", "invalid_params")
    assert await error_type(broker, "extend_visibility", receipt="x" * 43, visibility_timeout=1) == "invalid_receipt"


async def test_a_receipt_is_taken_back_as_it_was_made_and_no_other_way(broker: Broker) -> None:
    await send(broker, 1)
    (message,) = await take(broker)
    receipt = message["receipt"]
    assert receipt_of(lease_of(receipt)) == receipt
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    for place in range(len(receipt)):
        for other in alphabet[:: 1 if place == 42 else 7]:
            if other != receipt[place]:
                with pytest.raises(InvalidReceipt):
                    lease_of(receipt[:place] + other + receipt[place + 1 :])


async def test_a_receipt_of_another_message_with_its_token_guessed_wrong_has_no_effect(broker: Broker) -> None:
    await send(broker, 1, 2)
    one, two = [lease_of(receipt) for receipt in receipts(await take(broker, 2))]
    mixed = receipt_of(type(one)(one.queue_id, one.id, two.token))
    assert await error_type(broker, "delete", receipt=mixed) == "lease_lost"
    assert await total(broker) == 2


# Promise 5: at most once


async def test_promise_5_at_most_once_the_message_is_gone_before_the_answer_leaves(
    broker: Broker, connection: Connection
) -> None:
    (sent,) = await send(broker, "once")
    (message,) = await take(broker, delivery="at_most_once")
    assert message["message_id"] == sent
    assert message["receipt"] is None
    assert message["receive_count"] == 1
    assert MOMENT.fullmatch(message["first_received_at"])
    # Another session sees it: it is committed.
    row = await (await connection.execute("SELECT count(*) FROM broker.messages")).fetchone()
    assert row == (0,)
    assert await take(broker) == []


async def test_promise_5_at_most_once_counts_earlier_deliveries(broker: Broker, connection: Connection) -> None:
    await send(broker, 1)
    (first,) = await take(broker)
    await pass_time(connection, 31)
    (last,) = await take(broker, delivery="at_most_once")
    assert last["receive_count"] == 2
    assert seconds_between(last["first_received_at"], first["first_received_at"]) == 31
    assert await broker.call("delete", receipt=first["receipt"]) == {"deleted": False}


async def test_promise_5_at_most_once_keeps_order_and_number(broker: Broker) -> None:
    await send(broker, *range(10))
    assert bodies(await take(broker, 4, delivery="at_most_once")) == [0, 1, 2, 3]
    assert await total(broker) == 6


# An answer has at most 8 MiB of bodies


async def send_mebibytes(connection: Connection, queue: str, how_many: int) -> None:
    """Store bodies of one mebibyte each, which begin with their number."""
    new = [NewMessage(f'"{n}{"x" * (2**20 - 3)}"', None, None, None, None) for n in range(how_many)]
    (stored,) = await storing.enqueue(connection, [EnqueueCall(queue, new)])
    assert isinstance(stored, Stored), stored


async def test_an_answer_stops_after_eight_mebibytes_of_bodies_and_leaves_the_rest_ready(
    broker: Broker, connection: Connection
) -> None:
    await broker.call("create_queue", queue="large", max_message_bytes=2**20)
    for delivery in ("at_least_once", "at_most_once"):
        await send_mebibytes(connection, "large", 10)
        first = await take(broker, 10, "large", delivery=delivery)
        assert len(first) == 8, "eight bodies of exactly one mebibyte fit"
        assert (await broker.call("count_messages", queue="large", status="ready"))["total"] == 2
        assert len(await take(broker, 10, "large", delivery=delivery)) == 2


async def test_an_answer_never_stops_before_its_first_message(connection: Connection) -> None:
    """A body can be longer than all that an answer may have, where it was stored in SQL."""
    await fill(connection, "default", 2)
    await connection.execute("UPDATE broker.messages SET body_bytes = 9 * 1024 * 1024")
    for _ in range(2):
        assert len((await dequeue(connection, "default", 10, None)).messages) == 1
    page, following = await inspection.list_by_id(connection, "default", None, 10, -1)
    assert len(page) == 1
    assert following == page[0].message_id


# What a delivery shows


async def test_a_delivery_shows_the_message_with_all_its_fields(broker: Broker) -> None:
    (sent,) = await send(broker, {"a": [1]}, headers={"x": "y"}, sender="me", ttl=60)
    (message,) = await take(broker)
    assert list(message) == [
        "message_id", "queue", "receipt", "body", "headers", "sender", "receive_count", "enqueued_at",
        "first_received_at", "visible_at", "expires_at", "dead_letter",
    ]  # fmt: skip
    assert message["message_id"] == sent
    assert message["queue"] == "default"
    assert message["headers"] == {"x": "y"}
    assert message["sender"] == "me"
    assert message["dead_letter"] is None
    assert seconds_between(message["first_received_at"], message["visible_at"]) == 30


@pytest.mark.parametrize("senders", [[None, "ö", None], ["a", "b", "ö"], [None, None]])
async def test_messages_that_are_stored_together_keep_each_its_own_sender(
    broker: Broker, senders: list[str | None]
) -> None:
    await broker.call("enqueue_batch", messages=[{"body": 1, "sender": sender} for sender in senders])
    assert [message["sender"] for message in await take(broker, 10)] == senders


async def test_a_body_comes_back_in_the_very_bytes_that_were_sent(broker: Broker) -> None:
    for body in (
        b"1.0", b"1e400", b"123456789012345678901234567890", b'"\\u0000"', b'{"a":1,"a":2}', b'{ "b" : [ 1 ,2 ]}'
    ):  # fmt: skip
        await broker.post(b'{"jsonrpc":"2.0","id":1,"method":"enqueue","params":{"body":' + body + b"}}")
        _, answer = await broker.post(b'{"jsonrpc":"2.0","id":1,"method":"dequeue","params":{}}')
        assert b'"body":' + body + b',"headers"' in answer


async def test_moments_always_have_six_digits(broker: Broker, connection: Connection) -> None:
    (sent,) = await send(broker, 1, ttl=60)
    await connection.execute(
        "UPDATE broker.messages SET enqueued_at = '2026-11-22 16:10:53+00', visible_at = '2026-11-22 18:10:53.1+02'"
    )
    shown = await broker.call("get_message", queue="default", message_id=sent)
    assert shown["enqueued_at"] == "2026-11-22T16:10:53.000000Z"
    assert shown["visible_at"] == "2026-11-22T16:10:53.100000Z"
    (message,) = await take(broker)
    queue = await broker.call("get_queue", queue="default")
    moments = [message[name] for name in ("enqueued_at", "first_received_at", "visible_at", "expires_at")]
    assert all(MOMENT.fullmatch(moment) for moment in [*moments, queue["created_at"], queue["updated_at"]])
    assert timestamp(datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)) == "2026-01-02T03:04:05.000000Z"


# Promise 7: give back


async def test_promise_7_what_is_given_back_is_as_it_was(connection: Connection) -> None:
    new = [NewMessage("1", '{"a":"b"}', "me", None, 60.0)]
    (stored,) = await storing.enqueue(connection, [EnqueueCall("default", new)])
    assert isinstance(stored, Stored)
    before = await inspection.get(connection, "default", f"{stored.ids[0]:016x}")
    delivery = await dequeue(connection, "default", 1, None)
    assert await leases.give_back(connection, delivery.leases) == 1
    after = await inspection.get(connection, "default", before.message_id)
    assert after.visible_at >= before.visible_at
    after.visible_at = before.visible_at
    assert after == before
    assert await leases.give_back(connection, delivery.leases) == 0
    again = (await dequeue(connection, "default", 1, None)).messages[0]
    assert again.receive_count == 1
    assert again.first_received_at != delivery.messages[0].first_received_at


async def test_promise_7_a_later_delivery_that_is_given_back_leaves_the_earlier_ones_counted(
    connection: Connection,
) -> None:
    await fill(connection, "default", 1)
    first = await dequeue(connection, "default", 1, None)
    await pass_time(connection, 31)
    second = await dequeue(connection, "default", 1, None)
    await leases.give_back(connection, second.leases)
    shown = await inspection.get(connection, "default", first.messages[0].message_id)
    assert shown.status == "ready"
    assert shown.receive_count == 1
    assert shown.first_received_at == second.messages[0].first_received_at
    # Nobody heard of the second delivery, and the first one's receipt stays overtaken.
    (result,) = await leases.delete(connection, first.leases)
    assert result is not True


# Queues


ATTRIBUTES = {
    "visibility_timeout": 30,
    "message_ttl": None,
    "delay": 0,
    "max_message_bytes": 4096,
    "max_receives": None,
    "dead_letter_queue": None,
    "idempotency_window": 300,
    "max_messages": None,
    "paused": False,
}
OTHERS = {
    "visibility_timeout": 1.5,
    "message_ttl": 86400,
    "delay": 2.25,
    "max_message_bytes": 2**20,
    "idempotency_window": 604800,
    "max_messages": 5,
    "paused": True,
}


async def test_a_queue_has_the_contracts_defaults_and_the_default_queue_exists(broker: Broker) -> None:
    for made in (
        await broker.call("create_queue", queue="new"),
        await broker.call("get_queue", queue="default"),
        await broker.call("create_queue", queue="nulls", **dict.fromkeys(ATTRIBUTES)),
    ):
        assert {name: made[name] for name in ATTRIBUTES} == ATTRIBUTES


async def test_a_queue_keeps_what_it_was_created_with(broker: Broker) -> None:
    made = await broker.call("create_queue", queue="q", **OTHERS)
    assert {name: made[name] for name in OTHERS} == OTHERS
    got = await broker.call("get_queue", queue="q")
    assert {name: got[name] for name in OTHERS} == OTHERS


async def test_creating_a_queue_again_changes_nothing_where_what_is_named_is_so_already(broker: Broker) -> None:
    made = await broker.call("create_queue", queue="q", **OTHERS)
    assert await broker.call("create_queue", queue="q") == made
    assert await broker.call("create_queue", queue="q", **OTHERS) == made
    assert await broker.call("create_queue", queue="q", delay=2.25) == made


async def test_creating_a_queue_again_with_another_value_is_refused(broker: Broker) -> None:
    for name, value in OTHERS.items():
        await broker.call("create_queue", queue=name, **{name: value})
        error = await broker.error("create_queue", queue=name, **{name: ATTRIBUTES[name]})
        assert error["code"] == 1002
        assert name in error["message"]
        # Null is the default: it is another value too.
        assert (await broker.error("create_queue", queue=name, **{name: None}))["code"] == 1002


async def test_an_update_changes_what_it_names_and_null_clears(broker: Broker) -> None:
    made = await broker.call("create_queue", queue="q")
    changed = await broker.call("update_queue", queue="q", **OTHERS)
    assert {name: changed[name] for name in OTHERS} == OTHERS
    assert changed["created_at"] == made["created_at"]
    assert changed["updated_at"] > made["updated_at"]
    for name in ATTRIBUTES:
        changed = await broker.call("update_queue", queue="q", **{name: None})
        assert changed[name] == ATTRIBUTES[name]
    assert {name: changed[name] for name in ATTRIBUTES} == ATTRIBUTES
    assert await broker.call("update_queue", queue="q") == changed
    assert await error_type(broker, "update_queue", queue="nowhere", delay=1) == "queue_not_found"


async def test_a_body_may_be_as_long_as_its_queue_says(broker: Broker) -> None:
    await broker.call("create_queue", queue="q", max_message_bytes=10)
    await send(broker, "x" * 8, queue="q")
    error = await broker.error("enqueue", queue="q", body="x" * 9)
    assert error["code"] == 1005
    assert (error["data"]["limit"], error["data"]["given"]) == (10, 11)
    error = await broker.error("enqueue", queue="q", body="äöüä")
    assert error["data"]["given"] > 10, "bytes count, not characters"


async def test_a_batch_is_stored_whole_or_not_at_all(broker: Broker) -> None:
    await broker.call("create_queue", queue="q", max_message_bytes=10)
    batch = [{"body": 1}, {"body": 2}, {"body": "x" * 20}, {"body": 4}]
    error = await broker.error("enqueue_batch", queue="q", messages=batch)
    assert error["code"] == 1005
    assert error["data"]["index"] == 2
    assert await total(broker, "q") == 0


async def test_a_paused_queue_takes_messages_and_hands_out_none(broker: Broker, connection: Connection) -> None:
    await broker.call("create_queue", queue="q", paused=True)
    await send(broker, 1, queue="q")
    assert await take(broker, queue="q") == []
    assert await take(broker, queue="q", delivery="at_most_once") == []
    assert await handing_out.next_visible(connection, ["q"]) == {"q": None}
    assert (await broker.call("count_messages", queue="q"))["ready"] == 1
    await broker.call("update_queue", queue="q", paused=False)
    (message,) = await take(broker, queue="q")
    await broker.call("update_queue", queue="q", paused=True)
    assert await broker.call("delete", receipt=message["receipt"]) == {"deleted": True}


async def test_a_queue_that_is_full_says_so_until_there_is_room(broker: Broker) -> None:
    await broker.call("create_queue", queue="q", max_messages=3)
    await send(broker, 1, 2, queue="q")
    error = await broker.error("enqueue_batch", queue="q", messages=[{"body": 3}, {"body": 4}])
    assert error["code"] == 1014
    assert error["data"]["retryable"] is True
    assert error["data"]["index"] == 1
    await broker.call("enqueue_batch", queue="q", messages=[{"body": 3}])
    assert (await broker.error("enqueue", queue="q", body=4))["code"] == 1014
    (message,) = await take(broker, queue="q")
    assert (await broker.error("enqueue", queue="q", body=4))["code"] == 1014, "what is leased counts"
    await broker.call("delete", receipt=message["receipt"])
    await send(broker, 4, queue="q")


async def test_expired_messages_take_no_room_in_a_queue(broker: Broker, connection: Connection) -> None:
    await broker.call("create_queue", queue="q", max_messages=2)
    await send(broker, 1, 2, queue="q", ttl=10)
    await pass_time(connection, 11)
    await send(broker, 3, 4, queue="q")


async def test_one_full_queue_does_not_stop_another_in_the_same_statement(connection: Connection) -> None:
    await connection.execute("INSERT INTO broker.queues (name, max_messages) VALUES ('full', 1), ('roomy', 10)")
    new = [NewMessage("1", None, None, None, None)]
    calls = [
        EnqueueCall(name, new * n) for name, n in (("full", 1), ("roomy", 2), ("full", 1), ("none", 1), ("roomy", 1))
    ]
    results = await storing.enqueue(connection, calls)
    kinds = [len(result.ids) if isinstance(result, Stored) else result.type for result in results]
    assert kinds == [1, 2, "queue_full", "queue_not_found", 1]


async def test_messages_of_queues_that_do_not_exist(broker: Broker) -> None:
    this = {"queue": "nowhere", "message_id": "0" * 16}
    for method, params in (
        ("enqueue", {"queue": "nowhere", "body": 1}),
        ("enqueue_batch", {"queue": "nowhere", "messages": [{"body": 1}]}),
        ("dequeue", {"queue": "nowhere"}),
        ("get_queue", {"queue": "nowhere"}),
        ("purge_queue", {"queue": "nowhere"}),
        ("delete_queue", {"queue": "nowhere"}),
        ("count_messages", {"queue": "nowhere"}),
        ("list_messages", {"queue": "nowhere"}),
        ("get_message", this),
        ("update_message", {**this, "body": 1}),
        ("delete_message", this),
    ):
        assert (await broker.error(method, **params))["code"] == 1001, method


# Purge and deletion of queues


async def stock(broker: Broker, queue: str) -> tuple[dict[str, Any], list[str]]:
    """Put a ready, a delayed and a leased message into a queue; return the leased one, and all ids."""
    ids = await send(broker, "leased", queue=queue)
    (leased,) = await take(broker, queue=queue)
    ids += await send(broker, "ready", queue=queue)
    ids += await send(broker, "delayed", queue=queue, delay=100)
    return leased, ids


async def test_a_purge_removes_leased_and_delayed_messages_too(broker: Broker) -> None:
    leased, _ = await stock(broker, "default")
    assert await broker.call("purge_queue", queue="default") == {"purged": 3, "complete": True}
    assert await total(broker) == 0
    assert await broker.call("delete", receipt=leased["receipt"]) == {"deleted": False}
    assert await broker.call("purge_queue", queue="default") == {"purged": 0, "complete": True}
    await send(broker, "after")
    assert bodies(await take(broker)) == ["after"]


async def test_a_purge_goes_on_over_many_transactions(broker: Broker, connection: Connection) -> None:
    await broker.call("create_queue", queue="other")
    await send(broker, 1, queue="other")
    await fill(connection, "default", 12_000)
    assert await broker.call("purge_queue", queue="default") == {"purged": 12_000, "complete": True}
    assert await total(broker, "other") == 1


async def test_a_deleted_queue_is_gone_with_all_its_messages(broker: Broker) -> None:
    await broker.call("create_queue", queue="q")
    leased, ids = await stock(broker, "q")
    assert await broker.call("delete_queue", queue="q") == {"deleted_messages": 3, "complete": True}
    assert await error_type(broker, "get_queue", queue="q") == "queue_not_found"
    assert await error_type(broker, "delete_queue", queue="q") == "queue_not_found"
    assert await broker.call("delete", receipt=leased["receipt"]) == {"deleted": False}
    assert await extension_error(broker, leased["receipt"]) == "lease_lost"
    assert (await broker.call("count_messages"))["total"] == 0
    await broker.call("create_queue", queue="q")
    assert await take(broker, 10, "q") == []
    for message_id in ids:
        assert await error_type(broker, "get_message", queue="q", message_id=message_id) == "message_not_found"


async def test_a_queue_created_again_under_the_same_name_has_its_own_messages(
    broker: Broker, connection: Connection
) -> None:
    """Also while the messages of the old one are still being removed."""
    await broker.call("create_queue", queue="q")
    leased, _ = await stock(broker, "q")
    await connection.execute("UPDATE broker.queues SET deleted_at = now() WHERE name = 'q'")
    await broker.call("create_queue", queue="q")
    assert await take(broker, 10, "q") == []
    assert await total(broker, "q") == 0
    assert (await broker.call("count_messages"))["total"] == 0
    await send(broker, "new", queue="q")
    (message,) = await take(broker, 10, "q")
    assert message["body"] == "new"
    answer = await broker.call("delete_batch", receipts=[leased["receipt"], message["receipt"]])
    assert answer["results"] == [{"deleted": False}, {"deleted": True}]


async def test_an_incomplete_deletion_is_completed_by_calling_again(
    start_broker: StartBroker, connection: Connection
) -> None:
    broker: Broker = await start_broker(sweep_interval=3600)
    async with asyncio.timeout(30):
        while b'wonderq_sweeps_total{outcome="done"} 1.0' not in broker.server.metrics.text():
            await asyncio.sleep(0.01)
    await broker.call("create_queue", queue="q")
    await fill(connection, "q", 10)
    await connection.execute("UPDATE broker.queues SET deleted_at = now() WHERE name = 'q'")
    assert await broker.call("delete_queue", queue="q") == {"deleted_messages": 10, "complete": True}
    assert await error_type(broker, "delete_queue", queue="q") == "queue_not_found"


async def test_the_default_queue_cannot_be_deleted(broker: Broker) -> None:
    await send(broker, 1)
    assert (await broker.error("delete_queue", queue="default"))["code"] == 1011
    assert await total(broker) == 1


# Counting


async def test_messages_are_counted_by_status(broker: Broker) -> None:
    await broker.call("create_queue", queue="other")
    await stock(broker, "default")
    await stock(broker, "other")
    each = {"ready": 1, "delayed": 1, "leased": 1, "total": 3, "exact": True}
    assert await broker.call("count_messages", queue="default") == each
    assert (await broker.call("get_queue", queue="default"))["counts"] == each
    everything = {"ready": 2, "delayed": 2, "leased": 2, "total": 6, "exact": True}
    assert await broker.call("count_messages") == everything
    assert await broker.call("count_messages", queue=None, status=None) == everything
    for status in ("ready", "delayed", "leased"):
        assert await broker.call("count_messages", status=status) == {"total": 2, "exact": True}
        assert await broker.call("count_messages", queue="other", status=status) == {"total": 1, "exact": True}


async def test_counts_are_exact_up_to_ten_thousand(broker: Broker, connection: Connection) -> None:
    await fill(connection, "default", 10_000)
    for queue in ("default", None):
        counts = await broker.call("count_messages", queue=queue)
        assert (counts["ready"], counts["exact"]) == (10_000, True)


@pytest.mark.parametrize(
    ("status", "how"),
    [("ready", {}), ("ready", {"lane": 1}), ("delayed", {"visible_in": 99}), ("leased", {"visible_in": 99, "lane": 1})],
)
async def test_beyond_ten_thousand_counts_may_be_estimates(
    broker: Broker, connection: Connection, status: str, how: dict[str, Any]
) -> None:
    await fill(connection, "default", 20_000, **how)
    await connection.execute("ANALYZE broker.messages")
    for queue in ("default", None):
        counts = await broker.call("count_messages", queue=queue)
        assert counts[status] == pytest.approx(20_000, rel=0.1)
        assert counts["total"] == counts["ready"] + counts["delayed"] + counts["leased"]
        figure = await broker.call("count_messages", queue=queue, status=status)
        assert figure["total"] == pytest.approx(20_000, rel=0.1)


async def test_a_small_figure_is_exact_beside_a_large_one(broker: Broker, connection: Connection) -> None:
    await fill(connection, "default", 15_000)
    await broker.call("create_queue", queue="other")
    await stock(broker, "other")
    await send(broker, 1, 2, delay=99)
    for queue, leased, delayed in (("default", 0, 2), (None, 1, 3)):
        assert await broker.call("count_messages", queue=queue, status="leased") == {"total": leased, "exact": True}
        assert await broker.call("count_messages", queue=queue, status="delayed") == {"total": delayed, "exact": True}
        ready = (await broker.call("count_messages", queue=queue, status="ready"))["total"]
        assert ready == pytest.approx(15_000, rel=0.1)


async def test_the_age_of_the_oldest_ready_message_is_how_long_it_could_have_been_handed_out(
    broker: Broker, connection: Connection
) -> None:
    async def age() -> float | None:
        oldest: float | None = (await broker.call("get_queue", queue="default"))["oldest_ready_age"]
        return oldest

    assert await age() is None
    await send(broker, 1, delay=50)
    assert await age() is None
    await pass_time(connection, 70)
    assert await age() == pytest.approx(20, abs=10)
    await send(broker, 2)
    assert await age() == pytest.approx(20, abs=10)
    await take(broker)
    found = await age()
    assert found is not None
    assert found < 10
    await take(broker)
    assert await age() is None
    await pass_time(connection, 100)
    assert await age() == pytest.approx(70, abs=10)


# Listing


async def test_messages_are_listed_by_id_page_by_page(broker: Broker) -> None:
    ids = await send(broker, *range(7))
    await take(broker, 2)
    found: list[str] = []
    after, pages = None, 0
    while True:
        page = await broker.call("list_messages", queue="default", limit=3, after=after)
        found += [message["message_id"] for message in page["messages"]]
        pages += 1
        if (after := page["next"]) is None:
            break
    assert found == ids == sorted(ids)
    assert pages == 3
    everything = await broker.call("list_messages", queue="default", limit=7)
    assert everything["next"] is None, "a page that ends with the last message is the last page"
    assert "receipt" not in everything["messages"][0]


async def test_listing_leases_nothing(broker: Broker) -> None:
    await send(broker, 1)
    before = await broker.call("list_messages", queue="default")
    assert await broker.call("list_messages", queue="default") == before
    (message,) = await take(broker)
    assert message["receive_count"] == 1


async def test_messages_are_listed_by_status(broker: Broker) -> None:
    leased, ids = await stock(broker, "default")
    for status, message_id in zip(("leased", "ready", "delayed"), ids, strict=True):
        (message,) = (await broker.call("list_messages", queue="default", status=status))["messages"]
        assert (message["message_id"], message["status"], message["body"]) == (message_id, status, status)
        assert await broker.call("get_message", queue="default", message_id=message_id) == message
    assert leased["message_id"] == ids[0]


async def test_a_page_stops_after_eight_mebibytes_of_bodies(broker: Broker, connection: Connection) -> None:
    await broker.call("create_queue", queue="large", max_message_bytes=2**20)
    await send_mebibytes(connection, "large", 10)
    first = await broker.call("list_messages", queue="large")
    assert len(first["messages"]) == 8
    second = await broker.call("list_messages", queue="large", after=first["next"])
    assert [message["body"][0] for message in second["messages"]] == ["8", "9"]
    assert second["next"] is None


async def test_a_cursor_that_is_none_is_refused(broker: Broker) -> None:
    assert (await broker.error("list_messages", queue="default", after="zzz"))["code"] == -32602


async def test_a_message_id_that_cannot_be_is_not_found(broker: Broker) -> None:
    for message_id in ("0" * 16, "f" * 16, "F" * 16, "x", "0" * 15, "7" + "f" * 15):
        assert await error_type(broker, "get_message", queue="default", message_id=message_id) == "message_not_found"


async def test_a_message_is_found_only_in_its_own_queue(broker: Broker) -> None:
    await broker.call("create_queue", queue="other")
    (sent,) = await send(broker, 1)
    assert await error_type(broker, "get_message", queue="other", message_id=sent) == "message_not_found"
    assert await broker.call("delete_message", queue="other", message_id=sent) == {"deleted": False}
    assert await total(broker) == 1


async def test_queues_are_listed_by_name_page_by_page(broker: Broker) -> None:
    names = ["B", "a", "a-1", "a-2", "a.x", "aa", "b", "default"]
    for name in reversed(names[:-1]):
        await broker.call("create_queue", queue=name)
    found: list[str] = []
    after = None
    while True:
        page = await broker.call("list_queues", limit=3, after=after)
        found += [queue["queue"] for queue in page["queues"]]
        if (after := page["next"]) is None:
            break
    assert found == names
    everything = await broker.call("list_queues", limit=len(names))
    assert everything["next"] is None
    assert "counts" not in everything["queues"][0]


async def test_a_prefix_is_taken_letter_by_letter(broker: Broker) -> None:
    for name in ("a", "a-1", "a_1", "ab", "b"):
        await broker.call("create_queue", queue=name)
    for prefix, names in (("a", ["a", "a-1", "a_1", "ab"]), ("a-", ["a-1"]), ("a_", ["a_1"]), ("%", []), ("A", [])):
        found: list[str] = []
        after = None
        while True:
            page = await broker.call("list_queues", prefix=prefix, limit=1, after=after)
            found += [queue["queue"] for queue in page["queues"]]
            if (after := page["next"]) is None:
                break
        assert found == names


async def test_of_all_queues_only_those_are_listed_that_another_has_for_its_dead_letters(broker: Broker) -> None:
    for name in ("dead-a", "dead-b", "other", "was-dead"):
        await broker.call("create_queue", queue=name)
    for name, target in (("a1", "dead-a"), ("a2", "dead-a"), ("b", "dead-b"), ("gone", "was-dead")):
        await broker.call("create_queue", queue=name, dead_letter_queue=target)
    await broker.call("delete_queue", queue="gone")
    await stock(broker, "dead-a")
    page = await broker.call("list_queues", dead_letter_queues=True, counts=True)
    assert [(each["queue"], each["counts"]["total"]) for each in page["queues"]] == [("dead-a", 3), ("dead-b", 0)]
    first = await broker.call("list_queues", dead_letter_queues=True, limit=1)
    rest = await broker.call("list_queues", dead_letter_queues=True, limit=1, after=first["next"])
    assert [each["queue"] for each in first["queues"] + rest["queues"]] == ["dead-a", "dead-b"]
    assert rest["next"] is None
    (found,) = (await broker.call("list_queues", dead_letter_queues=True, prefix="dead-b"))["queues"]
    assert found["queue"] == "dead-b"
    assert (await broker.call("list_queues", dead_letter_queues=True, prefix="a"))["queues"] == []


async def test_queues_are_listed_with_their_counts_where_that_is_asked_for(broker: Broker) -> None:
    await broker.call("create_queue", queue="other")
    await stock(broker, "other")
    page = await broker.call("list_queues", counts=True)
    default, other = page["queues"]
    assert default["counts"]["total"] == 0
    assert default["oldest_ready_age"] is None
    assert other["counts"] == {"ready": 1, "delayed": 1, "leased": 1, "total": 3, "exact": True}
    assert other["oldest_ready_age"] >= 0


# Changing and deleting single messages


async def test_a_message_that_nobody_holds_is_changed_in_place(broker: Broker) -> None:
    await send(broker, "first", "second", headers={"a": "b"})
    listed = (await broker.call("list_messages", queue="default"))["messages"]
    this = {"queue": "default", "message_id": listed[0]["message_id"]}
    changed = await broker.call("update_message", **this, body={"new": 1})
    assert changed == {**listed[0], "body": {"new": 1}}
    assert await broker.call("update_message", **this, headers={"c": "d"}) == {**changed, "headers": {"c": "d"}}
    assert (await broker.call("update_message", **this, headers={}))["headers"] == {}
    assert (await broker.call("update_message", **this, body=None))["body"] is None
    assert bodies(await take(broker, 2)) == [None, "second"]


async def test_a_delayed_message_may_be_changed_and_deleted(broker: Broker) -> None:
    (sent,) = await send(broker, 1, delay=60)
    this = {"queue": "default", "message_id": sent}
    assert (await broker.call("update_message", **this, body=2))["status"] == "delayed"
    assert await broker.call("delete_message", **this) == {"deleted": True}
    assert await broker.call("delete_message", **this) == {"deleted": False}


@pytest.mark.parametrize("method", ["update_message", "delete_message"])
async def test_only_the_holder_may_change_or_delete_a_message_that_is_held(
    broker: Broker, connection: Connection, method: str
) -> None:
    body = {"body": "new"} if method == "update_message" else {}
    await send(broker, 1, 2)
    stale, other = await take(broker, 2)
    await broker.call("extend_visibility", receipt=other["receipt"], visibility_timeout=1000)
    await pass_time(connection, 31)
    (held,) = await take(broker)
    this = {"queue": "default", "message_id": held["message_id"], **body}
    assert (await broker.error(method, **this))["code"] == 1006
    assert (await broker.error(method, **this, receipt=stale["receipt"]))["code"] == 1004
    assert (await broker.error(method, **this, receipt=other["receipt"]))["code"] == 1004
    assert (await broker.error(method, **this, receipt="nonsense"))["code"] == 1010
    shown = await broker.call("get_message", queue="default", message_id=held["message_id"])
    assert shown["body"] == held["body"]
    result = await broker.call(method, **this, receipt=held["receipt"])
    assert result == {"deleted": True} if method == "delete_message" else result["body"] == "new"


async def test_a_change_by_the_holder_leaves_the_lease_as_it_is(broker: Broker) -> None:
    await send(broker, 1)
    (held,) = await take(broker)
    this = {"queue": "default", "message_id": held["message_id"]}
    changed = await broker.call("update_message", **this, receipt=held["receipt"], body=2)
    assert (changed["status"], changed["visible_at"]) == ("leased", held["visible_at"])
    assert await broker.call("delete", receipt=held["receipt"]) == {"deleted": True}


async def test_once_a_lease_has_ended_its_message_may_be_changed_by_anybody_but_not_by_stale_receipts(
    broker: Broker, connection: Connection
) -> None:
    await send(broker, 1)
    (first,) = await take(broker)
    await pass_time(connection, 31)
    this = {"queue": "default", "message_id": first["message_id"]}
    assert (await broker.call("update_message", **this, body=2))["body"] == 2
    assert (await broker.call("update_message", **this, body=3, receipt=first["receipt"]))["body"] == 3
    await take(broker)
    await pass_time(connection, 31)
    assert (await broker.error("update_message", **this, body=4, receipt=first["receipt"]))["code"] == 1004
    assert await broker.call("delete_message", **this) == {"deleted": True}


async def test_a_new_body_may_be_as_long_as_the_queue_says_and_counts_in_its_new_length(
    broker: Broker, connection: Connection
) -> None:
    (sent,) = await send(broker, 1)
    this = {"queue": "default", "message_id": sent}
    error = await broker.error("update_message", **this, body="x" * 5000)
    assert error["code"] == 1005
    assert (error["data"]["limit"], error["data"]["given"]) == (4096, 5002)
    await broker.call("update_message", **this, body="äö")
    row = await (
        await connection.execute("SELECT body_bytes, octet_length(body::text) FROM broker.messages")
    ).fetchone()
    assert row is not None
    assert row[0] == row[1]
    assert (await broker.error("update_message", **this))["code"] == -32602


# Sessions


async def test_no_default_of_the_database_changes_what_the_statements_do(database_url: str, connect: Connect) -> None:
    """Encoding, dates, isolation and planner as a role or a database may set them for all its sessions."""
    admin: Connection = await connect()
    hostile = {
        "client_encoding": "LATIN1",
        "DateStyle": "German, DMY",
        "TimeZone": "Asia/Kathmandu",
        "default_transaction_isolation": "serializable",
        "plan_cache_mode": "force_generic_plan",
        "enable_seqscan": "on",
    }
    for name, value in hostile.items():
        await admin.execute(
            sql.SQL("ALTER DATABASE {} SET {} = {}").format(
                sql.Identifier(admin.info.dbname), sql.Identifier(name), sql.Literal(value)
            )
        )
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await configure(connection)
        new = [NewMessage('"€ 🙂"', None, "Łódź", None, 60.0)]
        await storing.enqueue(connection, [EnqueueCall("default", new)])
        (message,) = (await dequeue(connection, "default", 1, None)).messages
        assert bytes(message.body).decode() == '"€ 🙂"'
        assert message.sender == "Łódź"
        assert MOMENT.fullmatch(message.enqueued_at)
        assert abs(seconds_from_now(message.enqueued_at)) < 60
        row = await (await connection.execute("SHOW transaction_isolation")).fetchone()
        assert row == ("read committed",)
