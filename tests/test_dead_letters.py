"""Dead letters: never handed out once more than is permitted, moved in one statement, and back again.

The sweeper is kept from sweeping but where a test says so. Time passes by moving the times that are stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from broker.errors import LeaseLost
from broker.model import lease_of
from broker.storage import dead_letters, inspection, leases, low_water, queues, sweeps
from broker.storage.database import Connection
from broker.sweeper import sweep_once
from conftest import Broker, Connect, StartBroker, dequeue
from gate import wait_until_blocked
from outside import eventually
from test_concurrency import transaction
from test_messages import MOMENT, bodies, error_type, fill, pass_time, receipts, send, take


@pytest.fixture
async def broker(start_broker: StartBroker) -> Broker:
    """A broker whose sweeper does nothing while a test runs."""
    started: Broker = await start_broker(sweep_interval=3600)
    return started


@pytest.fixture(autouse=True)
def always_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let brokers find what `pass_time` has moved below their low-water hints whenever a queue seems empty."""
    monkeypatch.setattr(low_water, "DOUBT_SHARE", 0)


@pytest.fixture
async def work(broker: Broker) -> Broker:
    """A broker with a queue `work` that permits two deliveries, whose dead letters come to `dead`."""
    await broker.call("create_queue", queue="dead")
    await broker.call("create_queue", queue="work", max_receives=2, dead_letter_queue="dead")
    return broker


async def use_up(broker: Broker, connection: Connection, deliveries: int = 2, queue: str = "work") -> list[str]:
    """Take every message so often, and let each lease end; return the receipts of the last deliveries."""
    last: list[str] = []
    for _ in range(deliveries):
        last = receipts(await take(broker, 1000, queue))
        await pass_time(connection, 60)
    return last


async def statuses(broker: Broker, queue: str) -> list[str]:
    return [each["status"] for each in (await broker.call("list_messages", queue=queue))["messages"]]


async def counts(broker: Broker, queue: str) -> tuple[int, int, int]:
    counted = await broker.call("count_messages", queue=queue)
    assert counted["total"] == counted["ready"] + counted["delayed"] + counted["leased"]
    return counted["ready"], counted["delayed"], counted["leased"]


@pytest.mark.parametrize("permitted", [1, 2, 3])
async def test_a_message_is_handed_out_as_often_as_permitted_and_no_more_swept_or_not(
    broker: Broker, connection: Connection, permitted: int
) -> None:
    await broker.call("create_queue", queue="work", max_receives=permitted)
    await send(broker, "x", queue="work")
    for time in range(1, permitted + 1):
        (message,) = await take(broker, queue="work")
        assert message["receive_count"] == time
        assert await counts(broker, "work") == (0, 0, 1)
        await pass_time(connection, 60)
    assert await take(broker, queue="work") == []
    assert await take(broker, queue="work", delivery="at_most_once") == []
    assert await counts(broker, "work") == (0, 0, 0)
    assert await statuses(broker, "work") == []
    queue = await broker.call("get_queue", queue="work")
    assert queue["oldest_ready_age"] is None


async def test_a_consumer_does_not_wait_for_what_is_never_handed_out_again(
    work: Broker, connection: Connection
) -> None:
    await send(work, "x", queue="work")
    await use_up(work, connection)
    assert await take(work, queue="work", wait=0.2) == []


async def test_a_dead_letter_is_the_same_message_in_another_queue(work: Broker, connection: Connection) -> None:
    (message_id,) = await send(work, {"a": 1.0}, queue="work", headers={"h": "v"}, sender="s", ttl=1000)
    before = await work.call("get_message", queue="work", message_id=message_id)
    await use_up(work, connection)
    assert (await dead_letters.settle(connection, 10)).moved == {"dead": 1}
    assert await error_type(work, "get_message", queue="work", message_id=message_id) == "message_not_found"
    shown = await work.call("get_message", queue="dead", message_id=message_id)
    (listed,) = (await work.call("list_messages", queue="dead"))["messages"]
    assert shown == listed
    assert (shown["status"], shown["receive_count"], shown["expires_at"], shown["first_received_at"]) == (
        "ready", 0, None, None,
    )  # fmt: skip
    (taken,) = await take(work, queue="dead")
    assert (taken["receive_count"], taken["expires_at"]) == (1, None)
    for each in (shown, taken):
        assert (each["message_id"], each["queue"]) == (message_id, "dead")
        for name in ("body", "headers", "sender"):
            assert each[name] == before[name]
        assert set(each["dead_letter"]) == {"source_queue", "reason", "receive_count", "dead_at"}
        assert MOMENT.fullmatch(each["dead_letter"].pop("dead_at"))
        assert each["dead_letter"] == {"source_queue": "work", "reason": "max_receives", "receive_count": 2}
    (once,) = [each async for each in at_most_once(work, connection)]
    assert once["dead_letter"]["source_queue"] == "work"


async def at_most_once(work: Broker, connection: Connection) -> Any:
    await send(work, "y", queue="work")
    await use_up(work, connection)
    await dead_letters.settle(connection, 10)
    for each in await take(work, 10, "dead", delivery="at_most_once"):
        if each["body"] == "y":
            yield each


async def test_what_is_no_dead_letter_shows_none(work: Broker) -> None:
    await send(work, 1, queue="dead")
    (taken,) = await take(work, queue="dead")
    assert taken["dead_letter"] is None


async def test_without_a_dead_letter_queue_it_is_dropped_and_counted(
    start_broker: StartBroker, connection: Connection
) -> None:
    broker = await start_broker(sweep_interval=0.01)
    await broker.call("create_queue", queue="work", max_receives=1)
    await send(broker, 1, 2, queue="work")
    await take(broker, 2, queue="work", visibility_timeout=0.01)

    async def dropped() -> bool:
        return "wonderq_messages_dropped_total 2.0" in broker.server.metrics.text().decode()

    await eventually(dropped)
    cursor = await connection.execute("SELECT count(*) FROM broker.messages")
    assert await cursor.fetchone() == (0,)


async def test_a_running_broker_moves_dead_letters_and_wakes_who_waits_for_them(start_broker: StartBroker) -> None:
    broker = await start_broker(sweep_interval=0.01)
    other = await start_broker(sweep_interval=3600)
    await broker.call("create_queue", queue="dead")
    await broker.call("create_queue", queue="work", max_receives=1, dead_letter_queue="dead")
    for waiting in (broker, other):
        task = asyncio.ensure_future(take(waiting, queue="dead", wait=30))
        await send(broker, "x", queue="work")
        await take(broker, queue="work", visibility_timeout=0.01)
        assert bodies(await task) == ["x"]

    async def are_counted() -> bool:
        """The other one may see a message before this one has counted what it has moved."""
        return "wonderq_messages_dead_lettered_total 2.0" in broker.server.metrics.text().decode()

    await eventually(are_counted)


async def test_its_last_holder_may_delete_extend_change_and_see_the_message(
    work: Broker, connection: Connection
) -> None:
    (message_id,) = await send(work, 1, queue="work")
    await take(work, queue="work")
    await pass_time(connection, 60)
    (message,) = await take(work, queue="work")
    assert (await work.call("get_message", queue="work", message_id=message_id))["status"] == "leased"
    assert await statuses(work, "work") == ["leased"]
    assert await error_type(work, "delete_message", queue="work", message_id=message_id) == "message_leased"
    await work.call("update_message", queue="work", message_id=message_id, receipt=message["receipt"], body=2)
    await work.call("extend_visibility", receipt=message["receipt"], visibility_timeout=90)
    await pass_time(connection, 60)
    assert (await dead_letters.settle(connection, 10)).messages == 0
    assert await work.call("delete", receipt=message["receipt"]) == {"deleted": True}


async def test_its_last_holder_may_delete_it_until_it_has_moved(work: Broker, connection: Connection) -> None:
    await send(work, 1, queue="work")
    (receipt,) = await use_up(work, connection)
    assert await work.call("delete", receipt=receipt) == {"deleted": True}
    assert (await dead_letters.settle(connection, 10)).messages == 0


async def test_given_up_by_its_last_holder_it_is_a_dead_letter_at_once(work: Broker, connection: Connection) -> None:
    await send(work, 1, queue="work")
    await use_up(work, connection, 1)
    (message,) = await take(work, queue="work")
    await work.call("extend_visibility", receipt=message["receipt"], visibility_timeout=0)
    assert (await dead_letters.settle(connection, 10)).moved == {"dead": 1}


async def test_a_delivery_that_nobody_heard_of_does_not_count(connection: Connection) -> None:
    await queues.create(connection, "work", {"max_receives": 1})
    await fill(connection, "work", 1)
    for _ in range(3):
        delivery = await dequeue(connection, "work", 1, 30)
        assert [message.receive_count for message in delivery.messages] == [1]
        assert await leases.give_back(connection, delivery.leases) == 1
        assert (await dead_letters.settle(connection, 10)).messages == 0


async def test_old_receipts_are_lost_for_ever(work: Broker, connection: Connection) -> None:
    await send(work, 1, queue="work")
    (receipt,) = await use_up(work, connection)

    async def is_lost(other: str = receipt) -> None:
        assert await error_type(work, "delete", receipt=other) == "lease_lost"
        answer = await work.call("delete_batch", receipts=[other, other])
        assert [each["error"]["code"] if "error" in each else each for each in answer["results"]] == [1004] * 2
        assert await error_type(work, "extend_visibility", receipt=other, visibility_timeout=5) == "lease_lost"

    await dead_letters.settle(connection, 10)
    await is_lost()
    (dead,) = await take(work, queue="dead")
    await is_lost()
    await pass_time(connection, 60)
    assert await work.call("redrive", queue="dead") == {"moved": 1, "complete": True}
    await is_lost()
    await is_lost(dead["receipt"])
    (again,) = await take(work, queue="work")
    await is_lost()
    await is_lost(dead["receipt"])
    assert await work.call("delete", receipt=again["receipt"]) == {"deleted": True}
    assert await work.call("delete", receipt=again["receipt"]) == {"deleted": False}


async def test_old_receipts_are_lost_also_where_the_queue_is_gone(work: Broker, connection: Connection) -> None:
    await send(work, 1, queue="work")
    (receipt,) = await use_up(work, connection)
    await dead_letters.settle(connection, 10)
    await work.call("delete_queue", queue="work")
    assert await error_type(work, "delete", receipt=receipt) == "lease_lost"


async def test_dead_letters_go_on_from_queue_to_queue(broker: Broker, connection: Connection) -> None:
    await broker.call("create_queue", queue="last")
    await broker.call("create_queue", queue="second", max_receives=1, dead_letter_queue="last")
    await broker.call("create_queue", queue="first", max_receives=1, dead_letter_queue="second")
    await send(broker, 1, queue="first")
    for queue in ("first", "second"):
        await use_up(broker, connection, 1, queue)
        await dead_letters.settle(connection, 10)
    (message,) = await take(broker, queue="last")
    assert message["dead_letter"]["source_queue"] == "second"


async def test_what_expired_before_its_last_lease_ended_has_expired(work: Broker, connection: Connection) -> None:
    await send(work, 1, queue="work", ttl=50)
    await send(work, 2, queue="work", ttl=100)
    await take(work, 2, queue="work", visibility_timeout=1)
    await pass_time(connection, 2)
    await take(work, 2, queue="work", visibility_timeout=60)
    await pass_time(connection, 1000)
    assert await sweeps.remove_expired(connection, 10) == {"work": 1}
    assert (await dead_letters.settle(connection, 10)).moved == {"dead": 1}
    assert bodies(await take(work, 10, queue="dead")) == [2]


async def test_messages_are_moved_in_bounded_batches(work: Broker, connection: Connection) -> None:
    await send(work, *range(5), queue="work")
    await use_up(work, connection)
    settled = [(await dead_letters.settle(connection, 2)).messages for _ in range(4)]
    assert settled == [2, 2, 1, 0]
    assert bodies(await take(work, 10, queue="dead")) == [0, 1, 2, 3, 4]


async def test_a_dead_letter_has_no_delay_and_fills_its_queue_whatever_its_limits(
    work: Broker, connection: Connection
) -> None:
    await work.call("update_queue", queue="dead", delay=100, max_messages=1, max_message_bytes=1, message_ttl=1)
    await send(work, "long", "longer", queue="work")
    await use_up(work, connection)
    await dead_letters.settle(connection, 10)
    assert await counts(work, "dead") == (2, 0, 0)


# Limits that change


async def test_a_limit_that_is_lowered_counts_at_once(broker: Broker, connection: Connection) -> None:
    await broker.call("create_queue", queue="dead")
    await broker.call("create_queue", queue="work", dead_letter_queue="dead")
    await send(broker, *range(3), queue="work")
    for _ in range(3):
        await use_up(broker, connection, 1)
    await send(broker, "new", queue="work")
    await broker.call("update_queue", queue="work", max_receives=3)
    assert bodies(await take(broker, 10, queue="work")) == ["new"]
    swept = [await sweep_once(connection, 2) for _ in range(4)]
    assert [each.exhausted for each in swept] == [2, 1, 0, 0]
    assert sum(each.settled.messages for each in swept) == 3
    assert bodies(await take(broker, 10, queue="dead")) == [0, 1, 2]
    assert (await take(broker, queue="dead")) == []


async def test_after_a_limit_was_lowered_the_sweeper_looks_until_no_older_statement_can_be_under_way(
    work: Broker, connection: Connection, connect: Connect
) -> None:
    async def chores() -> bool:
        return (await sweeps.chores(connection)).lowered_max_receives

    async def pass_time_for_queues(seconds: float) -> None:
        await connection.execute(
            "UPDATE broker.queues SET max_receives_lowered_at = max_receives_lowered_at - %s * interval '1 second'",
            [seconds],
        )

    assert not await chores()
    await work.call("update_queue", queue="work", max_receives=3)
    assert not await chores(), "it was raised"
    await work.call("update_queue", queue="work", max_receives=1)
    await sweep_once(connection)
    assert await chores()
    await pass_time_for_queues(61)
    await fill(connection, "work", 1, lane=1)
    await connection.execute("UPDATE broker.messages SET receive_count = 1")
    other = await connect()
    async with transaction(other):
        await other.execute("SELECT FROM broker.messages FOR UPDATE")
        assert (await sweep_once(connection)).exhausted == 0
    assert await chores(), "what somebody has locked is seen"
    assert (await sweep_once(connection)).exhausted == 1
    await sweep_once(connection)
    assert not await chores()


async def test_a_limit_that_is_raised_brings_back_what_was_not_moved_yet(work: Broker, connection: Connection) -> None:
    await send(work, 1, queue="work")
    await use_up(work, connection)
    await work.call("update_queue", queue="work", max_receives=3)
    assert (await dead_letters.settle(connection, 10)).returned == {"work": 1}
    (message,) = await take(work, queue="work")
    assert message["receive_count"] == 3
    await pass_time(connection, 60)
    await work.call("update_queue", queue="work", max_receives=None)
    await dead_letters.settle(connection, 10)
    assert [message["receive_count"] for message in await take(work, queue="work")] == [4]


# The queues that are named


async def test_a_queue_shows_where_its_dead_letters_go(work: Broker) -> None:
    for queue in (
        await work.call("get_queue", queue="work"),
        (await work.call("list_queues", prefix="work"))["queues"][0],
        await work.call("create_queue", queue="work", max_receives=2, dead_letter_queue="dead"),
        await work.call("update_queue", queue="work", delay=0),
    ):
        assert (queue["max_receives"], queue["dead_letter_queue"]) == (2, "dead")
    assert await error_type(work, "create_queue", queue="work", dead_letter_queue="default") == "queue_exists"
    assert await error_type(work, "create_queue", queue="work", max_receives=3) == "queue_exists"
    cleared = await work.call("update_queue", queue="work", max_receives=None, dead_letter_queue=None)
    assert (cleared["max_receives"], cleared["dead_letter_queue"]) == (None, None)


async def test_an_unknown_target_is_not_found(work: Broker) -> None:
    error = await work.error("create_queue", queue="x", dead_letter_queue="nowhere")
    assert (error["code"], error["data"]["queue"]) == (1001, "nowhere")
    assert await error_type(work, "get_queue", queue="x") == "queue_not_found"
    error = await work.error("update_queue", queue="work", dead_letter_queue="nowhere", delay=5)
    assert (error["code"], error["data"]["queue"]) == (1001, "nowhere")
    assert (await work.call("get_queue", queue="work"))["delay"] == 0
    error = await work.error("update_queue", queue="nobody", dead_letter_queue="dead")
    assert (error["code"], error["data"]["queue"]) == (1001, "nobody")


async def test_a_circle_is_refused(broker: Broker) -> None:
    for queue, target in (("c", None), ("b", "c"), ("a", "b")):
        await broker.call("create_queue", queue=queue, dead_letter_queue=target)
    for method, queue, target in (
        ("update_queue", "c", "a"),
        ("update_queue", "c", "b"),
        ("update_queue", "b", "a"),
        ("update_queue", "a", "a"),
        ("create_queue", "new", "new"),
        ("create_queue", "c", "c"),
    ):
        error = await broker.error(method, queue=queue, dead_letter_queue=target)
        assert (error["code"], error["data"]["param"]) == (-32602, "dead_letter_queue")
    assert (await broker.call("get_queue", queue="c"))["dead_letter_queue"] is None


@pytest.mark.parametrize("limit", [0, 1001, 1.5, "3", True])
async def test_what_is_no_limit_is_refused(broker: Broker, limit: Any) -> None:
    for method in ("create_queue", "update_queue"):
        error = await broker.error(method, queue="default", max_receives=limit)
        assert (error["code"], error["data"]["param"]) == (-32602, "max_receives")


async def test_a_target_cannot_be_deleted_while_it_is_named(work: Broker) -> None:
    error = await work.error("delete_queue", queue="dead")
    assert error["code"] == 1011
    assert "work" in error["message"]
    await work.call("update_queue", queue="work", dead_letter_queue=None)
    assert (await work.call("delete_queue", queue="dead"))["complete"]
    await work.call("create_queue", queue="dead")
    await work.call("update_queue", queue="work", dead_letter_queue="dead")
    await work.call("delete_queue", queue="work")
    assert (await work.call("delete_queue", queue="dead"))["complete"]


async def test_a_target_that_is_being_deleted_is_not_found_and_one_that_is_named_is_in_use(connect: Connect) -> None:
    one, two, observer = await connect(), await connect(), await connect()
    for name in ("work", "dead"):
        await queues.create(one, name, {})
    async with transaction(one):
        await queues._delete(one, "dead")
        task = asyncio.ensure_future(queues.update(two, "work", {"dead_letter_queue": "dead"}))
        await wait_until_blocked(observer, two)
    with pytest.raises(Exception, match="There is no queue dead"):
        await task
    await queues.create(one, "dead", {})
    async with transaction(one):
        await queues.update(one, "work", {"dead_letter_queue": "dead"})
        deletion = asyncio.ensure_future(queues._delete(two, "dead"))
        await wait_until_blocked(observer, two)
    with pytest.raises(Exception, match="the dead_letter_queue of work"):
        await deletion


async def test_two_who_would_close_a_circle_together(connect: Connect) -> None:
    one, two, observer = await connect(), await connect(), await connect()
    for name in ("a", "b"):
        await queues.create(one, name, {})
    async with transaction(one):
        await queues.update(one, "a", {"dead_letter_queue": "b"})
        task = asyncio.ensure_future(queues.update(two, "b", {"dead_letter_queue": "a"}))
        await wait_until_blocked(observer, two)
    with pytest.raises(Exception, match="must not lead back to b: b → a → b"):
        await task


# Two at once


async def exhausted(connection: Connection, how_many: int = 1) -> list[Any]:
    """Leave messages that have used up their deliveries; return the leases of the last ones."""
    await queues.create(connection, "dead", {})
    await queues.create(connection, "work", {"max_receives": 1, "dead_letter_queue": "dead"})
    await fill(connection, "work", how_many)
    delivery = await dequeue(connection, "work", how_many, 30)
    await pass_time(connection, 60)
    return delivery.leases


async def test_two_sweepers_at_once_move_different_messages(connect: Connect) -> None:
    one, two = await connect(), await connect()
    await exhausted(one, 5)
    async with transaction(one):
        assert (await dead_letters.settle(one, 3)).moved == {"dead": 3}
        assert (await dead_letters.settle(two, 10)).moved == {"dead": 2}


async def test_a_delete_that_meets_a_move_has_lost_its_lease(connect: Connect) -> None:
    one, two, observer = await connect(), await connect(), await connect()
    held = await exhausted(one)
    async with transaction(one):
        await dead_letters.settle(one, 10)
        task = asyncio.ensure_future(leases.delete(two, held))
        await wait_until_blocked(observer, two)
    (result,) = await task
    assert isinstance(result, LeaseLost)


async def test_a_move_skips_what_is_being_deleted(connect: Connect) -> None:
    one, two = await connect(), await connect()
    held = await exhausted(one)
    async with transaction(one):
        assert await leases.delete(one, held) == [True]
        assert (await dead_letters.settle(two, 10)).messages == 0
    assert (await dead_letters.settle(two, 10)).messages == 0


@pytest.mark.parametrize("what", ["give_back", "purge", "delete_message", "extend"])
async def test_whoever_waits_for_a_message_that_moves_finds_it_gone(connect: Connect, what: str) -> None:
    one, two, observer = await connect(), await connect(), await connect()
    (held,) = await exhausted(one)
    work: dict[str, Callable[[], Awaitable[Any]]] = {
        "give_back": lambda: leases.give_back(two, [held]),
        "purge": lambda: queues.purge_batch(two, held.queue_id),
        "delete_message": lambda: inspection.delete(two, "work", f"{held.id:016x}", held),
        "extend": lambda: leases.extend(two, [held], [0]),
    }
    async with transaction(one):
        await dead_letters.settle(one, 10)
        task = asyncio.ensure_future(work[what]())
        if what == "extend":  # its lease is over: it does not wait
            assert isinstance((await task)[0], LeaseLost)
        elif what == "delete_message":  # what has used up its deliveries is not there: it does not wait
            assert await task is False
        else:
            await wait_until_blocked(observer, two)
    assert not await task or what == "extend"
    cursor = await one.execute("SELECT q.name FROM broker.messages m JOIN broker.queues q ON q.id = m.queue_id")
    assert await cursor.fetchall() == [("dead",)]


# Redrive


async def dead_letters_of(work: Broker, connection: Connection, *sent: Any, queue: str = "work") -> list[str]:
    ids = await send(work, *sent, queue=queue)
    await use_up(work, connection, 2, queue)
    await dead_letters.settle(connection, 1000)
    return ids


async def test_a_redrive_takes_each_message_to_where_it_came_from(work: Broker, connection: Connection) -> None:
    await work.call("create_queue", queue="other", max_receives=2, dead_letter_queue="dead")
    ids = await dead_letters_of(work, connection, 1, 2, queue="work")
    ids += await dead_letters_of(work, connection, 3, queue="other")
    await send(work, "sent here", queue="dead")
    assert await work.call("redrive", queue="dead") == {"moved": 3, "complete": True}
    assert bodies(await take(work, 10, queue="dead")) == ["sent here"]
    taken = await take(work, 10, queue="work") + await take(work, 10, queue="other")
    assert bodies(taken) == [1, 2, 3]
    assert [each["message_id"] for each in taken] == ids
    assert [(each["receive_count"], each["dead_letter"], each["expires_at"]) for each in taken] == [(1, None, None)] * 3


async def test_a_redrive_may_go_elsewhere_and_stop_early(work: Broker, connection: Connection) -> None:
    await dead_letters_of(work, connection, 1, 2, 3)
    assert await work.call("redrive", queue="dead", to="default", max_messages=2) == {"moved": 2, "complete": False}
    assert bodies(await take(work, 10)) == [1, 2]
    assert await work.call("redrive", queue="dead", to="default", max_messages=1) == {"moved": 1, "complete": True}
    assert await work.call("redrive", queue="dead", to="default") == {"moved": 0, "complete": True}


async def test_a_redrive_leaves_what_is_held_and_what_has_nowhere_to_go(work: Broker, connection: Connection) -> None:
    await work.call("create_queue", queue="gone", max_receives=2, dead_letter_queue="dead")
    await dead_letters_of(work, connection, "orphan", queue="gone")
    await work.call("delete_queue", queue="gone")
    await dead_letters_of(work, connection, 1, 2)
    held = await take(work, 2, queue="dead")
    assert bodies(held) == ["orphan", 1]
    assert await work.call("redrive", queue="dead") == {"moved": 1, "complete": True}
    assert await work.call("delete", receipt=held[1]["receipt"]) == {"deleted": True}
    await pass_time(connection, 60)
    assert await work.call("redrive", queue="dead") == {"moved": 0, "complete": True}
    assert await work.call("redrive", queue="dead", to="default") == {"moved": 1, "complete": True}
    assert bodies(await take(work)) == ["orphan"]


async def test_a_redrive_goes_on_over_many_transactions(work: Broker, connection: Connection) -> None:
    await fill(connection, "dead", 2500)
    await connection.execute("""UPDATE broker.messages SET dead_letter = '{"source_queue": "work"}'""")
    assert await work.call("redrive", queue="dead") == {"moved": 2500, "complete": True}
    assert await counts(work, "work") == (2500, 0, 0)


async def test_a_redrive_wakes_who_waits(work: Broker, connection: Connection) -> None:
    await dead_letters_of(work, connection, 1)
    task = asyncio.ensure_future(take(work, queue="work", wait=30))

    async def waits() -> bool:
        return work.server.waiting.waiting == 1

    await eventually(waits)
    await work.call("redrive", queue="dead")
    assert bodies(await task) == [1]
    assert "wonderq_messages_redriven_total 1.0" in work.server.metrics.text().decode()


async def test_a_redrive_needs_queues_that_exist_and_differ(work: Broker) -> None:
    assert await error_type(work, "redrive", queue="nowhere") == "queue_not_found"
    assert (await work.error("redrive", queue="dead", to="nowhere"))["data"]["queue"] == "nowhere"
    assert (await work.error("redrive", queue="dead", to="dead"))["data"]["param"] == "to"
    assert await work.call("redrive", queue="work") == {"moved": 0, "complete": True}


async def test_two_redrives_at_once_move_each_message_once(connect: Connect) -> None:
    one, two = await connect(), await connect()
    await exhausted(one, 5)
    await dead_letters.settle(one, 10)
    row = await (await one.execute("SELECT id FROM broker.queues WHERE name = 'dead'")).fetchone()
    assert row is not None
    async with transaction(one):
        moved, _ = await dead_letters.redrive_batch(one, row[0], None, 3)
        assert moved == {"work": 3}
        moved, _ = await dead_letters.redrive_batch(two, row[0], None, 10)
        assert moved == {"work": 2}


async def test_a_redrive_skips_what_is_being_handed_out(connect: Connect) -> None:
    one, two = await connect(), await connect()
    await exhausted(one, 2)
    await dead_letters.settle(one, 10)
    async with transaction(one):
        (message,) = (await dequeue(one, "dead", 1, 30)).messages
        assert message.receipt is not None
        queue_id = lease_of(message.receipt).queue_id
        moved, _ = await dead_letters.redrive_batch(two, queue_id, None, 10)
        assert moved == {"work": 1}
        assert (await dequeue(two, "dead", 1, 30)).messages == []
