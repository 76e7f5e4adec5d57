"""Two or three calls at once, in every order in which their statements and commits can come: what each may come to.

The calls are the product's own functions on transactions that stay open (see `steps.py`). A case names every outcome
that the contract permits, and why; each has to come about in some order, and no other may. No order may end in a
deadlock.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any, NamedTuple, TypeVar, cast

import psycopg
import pytest

from broker.errors import BrokerError
from broker.model import Lease, NewMessage, message_number_of
from broker.storage import dead_letters, handing_out, idempotency, inspection, leases, queues, sweeps
from broker.storage.database import Connection, Database
from broker.storage.group_commit import AGAIN
from broker.storage.handing_out import Wanted
from broker.storage.sessions import configure
from broker.storage.storing import EnqueueCall, Stored
from steps import Case, interleavings, play

T = TypeVar("T")

BATCH = 100
ENDED = -3600.0
TABLES = ("messages", "idempotency_keys", "subscriptions", "topics", "queues")


class Scene(NamedTuple):
    """The messages that lie in the queue `work`, by number; the lease of the first one, if somebody has it.

    And the subscription, where there is a topic.
    """

    ids: list[int]
    lease: Lease
    subscription: str = ""


class OneConnection:
    """In place of a `Database`, for what works in several transactions: here they are all in one."""

    request_timeout = 60.0

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def write(self, operation: Callable[[Connection], Awaitable[T]], timeout: float | None = None) -> T:
        return await operation(self._connection)

    read = write


def on(connection: Connection) -> Database:
    return cast(Database, OneConnection(connection))


# The scenes


def scene(
    *,
    messages: int = 1,
    lease_seconds: float | None = None,
    max_receives: int | None = None,
    target: str | None = None,
    key: str | None = None,
    expired: bool = False,
    is_dead: bool = False,
    keys_ended: bool = False,
) -> Callable[[Connection], Awaitable[Scene]]:
    """Return what sets a scene: queues `work` and `dead`, messages in `work`, the first of them leased.

    `target` is the dead-letter queue of `work`. Where the first message `is_dead` it lies in `dead` already.
    """

    async def setup(connection: Connection) -> Scene:
        for table in TABLES:
            await connection.execute(f"DELETE FROM broker.{table}")
        for queue in ("default", "dead"):
            await queues.create(connection, queue, {})
        await queues.create(connection, "work", {"max_receives": max_receives, "dead_letter_queue": target})
        ids: list[int] = []
        if messages:
            stored = await enqueue(connection, *[str(n) for n in range(messages)], key=key)
            ids = stored.ids
        lease = Lease(0, 0, b"")
        if lease_seconds is not None:
            (lease,) = (await hand_out(connection, "work", 1)).leases
            await connection.execute(
                "UPDATE broker.messages SET visible_at = clock_timestamp() + %s * interval '1 second' WHERE lane > 0",
                [lease_seconds],
            )
        if expired:
            await connection.execute(
                "UPDATE broker.messages SET expires_at = clock_timestamp() - interval '2 hours', enqueued_at ="
                " clock_timestamp() - interval '3 hours'"
            )
        if keys_ended:
            await connection.execute(
                "UPDATE broker.idempotency_keys SET first_used_at = first_used_at - interval '1 hour',"
                " expires_at = expires_at - interval '1 hour'"
            )
        if is_dead:
            assert (await dead_letters.settle(connection, BATCH)).messages == 1
        return Scene(ids, lease)

    return setup


# The calls, as their results are spoken of


async def hand_out(connection: Connection, queue: str, max_messages: int) -> handing_out.Delivery:
    handed_out = await handing_out.hand_out(connection, [Wanted(queue, max_messages, None)], at_most_once=False)
    return handed_out.deliveries[queue]


async def enqueue(connection: Connection, *bodies: str, key: str | None = None) -> Stored:
    new = [NewMessage(body, None, None, None, None, key) for body in bodies]
    while True:
        (result,) = await idempotency.enqueue(connection, [EnqueueCall("work", new, has_keys=key is not None)])
        if result is not AGAIN:
            break
        # Its statement has failed, and it is run again.
        await connection.execute("ROLLBACK")
        await connection.execute("BEGIN")
    if isinstance(result, BrokerError):
        raise result
    assert isinstance(result, Stored)
    return result


Call = Callable[[Connection, Scene], Awaitable[Any]]


def dequeue(queue: str = "work") -> Call:
    async def call(connection: Connection, scene: Scene) -> str:
        delivery = await hand_out(connection, queue, 1)
        return (
            " ".join(
                f"took {scene.ids.index(message_number_of(message.message_id) or 0)} for the {message.receive_count}."
                for message in delivery.messages
            )
            or "took nothing"
        )

    return call


async def delete(connection: Connection, scene: Scene) -> str:
    (result,) = await leases.delete(connection, [scene.lease])
    return result.type if isinstance(result, BrokerError) else f"deleted: {result}"


def extend(seconds: float) -> Call:
    async def call(connection: Connection, scene: Scene) -> str:
        (result,) = await leases.extend(connection, [scene.lease], [seconds])
        return result.type if isinstance(result, BrokerError) else "extended"

    return call


async def give_back(connection: Connection, scene: Scene) -> str:
    return f"gave {await leases.give_back(connection, [scene.lease])} back"


async def delete_message(connection: Connection, scene: Scene) -> str:
    return await said(inspection.delete(connection, "work", f"{scene.ids[0]:016x}", None))


def send(body: str, *more: str, key: str | None = None) -> Call:
    async def call(connection: Connection, scene: Scene) -> str:
        try:
            stored = await enqueue(connection, body, *more, key=key)
        except BrokerError as error:
            return error.type
        return "duplicate" if stored.duplicates else "stored"

    return call


async def bury(connection: Connection, scene: Scene) -> str:
    settled = await dead_letters.settle(connection, BATCH)
    return f"moved {sum(settled.moved.values())}"


async def remove_expired(connection: Connection, scene: Scene) -> str:
    await sweeps.remove_expired(connection, BATCH)
    return "swept"


async def forget_keys(connection: Connection, scene: Scene) -> str:
    await sweeps.forget_keys(connection, BATCH)
    return "trimmed"


async def purge(connection: Connection, scene: Scene) -> str:
    await queues.purge(on(connection), "work")
    return "purged"


def delete_queue(queue: str) -> Call:
    async def call(connection: Connection, scene: Scene) -> str:
        return await said(queues.delete(on(connection), queue), "deleted the queue")

    return call


async def redrive(connection: Connection, scene: Scene) -> str:
    redriven = await dead_letters.redrive(on(connection), "dead", None, None)
    return f"moved {sum(redriven.moved.values())} back"


async def name_target(connection: Connection, scene: Scene) -> str:
    return await said(queues.update(connection, "work", {"dead_letter_queue": "dead"}), "named the target")


async def said(work: Awaitable[Any], words: str | None = None) -> str:
    try:
        result = await work
    except BrokerError as error:
        return error.type
    return words or str(result)


# The outcomes


async def told(connection: Connection, scene: Scene, results: Mapping[str, str]) -> str:
    """Say what each was told, then what lies in the queues that live."""
    cursor = await connection.execute(
        "SELECT q.name, count(m.id) FROM broker.queues q JOIN broker.messages m ON m.queue_id = q.id"
        " WHERE q.deleted_at IS NULL GROUP BY q.name ORDER BY q.name"
    )
    left = [f"{count} in {name}" for name, count in await cursor.fetchall()]
    return "; ".join([*results.values(), ", ".join(left) or "nothing left"])


async def taken(connection: Connection, scene: Scene, results: Mapping[str, str]) -> str:
    return ", ".join(sorted(results.values()))


async def deleted_queue(connection: Connection, scene: Scene, results: Mapping[str, str]) -> str:
    """Say also what remains when the sweeper has been there."""
    outcome = await told(connection, scene, results)
    await sweeps.remove_deleted(connection, BATCH)
    cursor = await connection.execute(
        "SELECT count(*) FROM broker.messages m JOIN broker.queues q ON q.id = m.queue_id"
        " WHERE q.deleted_at IS NOT NULL"
    )
    assert await cursor.fetchone() == (0,), "the message of a queue that was deleted meanwhile stays for ever"
    return outcome


CASES: dict[str, Case[Scene]] = {
    "dequeue / dequeue": Case(
        scene(messages=1),
        {"one": dequeue(), "two": dequeue()},
        taken,
        {"took 0 for the 1., took nothing": "one message is for one consumer"},
    ),
    "dequeue / dequeue / dequeue, two messages": Case(
        scene(messages=2),
        {"one": dequeue(), "two": dequeue(), "three": dequeue()},
        taken,
        {"took 0 for the 1., took 1 for the 1., took nothing": "who meets a locked message takes the next one"},
    ),
    "dequeue / delete with the receipt before": Case(
        scene(lease_seconds=ENDED),
        {"dequeue": dequeue(), "delete": delete},
        told,
        {
            "took 0 for the 2.; lease_lost; 1 in work": "a later lease makes the receipt worthless",
            "took nothing; deleted: True; nothing left": "no later lease was taken, so it is good",
        },
    ),
    "extend / dequeue, the lease runs": Case(
        scene(lease_seconds=60),
        {"extend": extend(60), "dequeue": dequeue()},
        told,
        {"extended; took nothing; 1 in work": "while a lease runs, nobody else is given the message"},
    ),
    "extend / dequeue, the lease is over": Case(
        scene(lease_seconds=ENDED),
        {"extend": extend(60), "dequeue": dequeue()},
        told,
        {"lease_lost; took 0 for the 2.; 1 in work": "a lease that is over cannot be extended, taken anew or not"},
    ),
    "extend by nothing / dequeue": Case(
        scene(lease_seconds=60),
        {"extend": extend(0), "dequeue": dequeue()},
        told,
        {
            "extended; took 0 for the 2.; 1 in work": "given back at once, so ready once that is committed",
            "extended; took nothing; 1 in work": "not given back yet when it was looked for",
        },
    ),
    "extend / delete": Case(
        scene(lease_seconds=60),
        {"extend": extend(60), "delete": delete},
        told,
        {
            "extended; deleted: True; nothing left": "the receipt stays good",
            "lease_lost; deleted: True; nothing left": "of a message that is gone there is no lease",
        },
    ),
    "delete / delete": Case(
        scene(lease_seconds=60),
        {"one": delete, "two": delete},
        taken,
        {"deleted: False, deleted: True": "one has deleted it, for the other it is gone"},
    ),
    "give back / dequeue, the lease runs": Case(
        scene(lease_seconds=60),
        {"give back": give_back, "dequeue": dequeue()},
        told,
        {
            "gave 1 back; took 0 for the 1.; 1 in work": "nobody has heard of the first delivery",
            "gave 1 back; took nothing; 1 in work": "not given back yet when it was looked for",
        },
    ),
    "give back / dequeue, the lease is over": Case(
        scene(lease_seconds=ENDED),
        {"give back": give_back, "dequeue": dequeue()},
        told,
        {
            "gave 1 back; took 0 for the 1.; 1 in work": "nobody has heard of the first delivery",
            "gave 1 back; took nothing; 1 in work": "locked when it was looked for",
            "gave 0 back; took 0 for the 2.; 1 in work": "the later lease is somebody else's",
        },
    ),
    "purge / dequeue": Case(
        scene(),
        {"purge": purge, "dequeue": dequeue()},
        told,
        {
            "purged; took nothing; nothing left": "gone, or about to be",
            "purged; took 0 for the 1.; nothing left": "leased messages are purged as well",
        },
    ),
    "delete a message that nobody holds / dequeue": Case(
        scene(),
        {"delete": delete_message, "dequeue": dequeue()},
        told,
        {
            "True; took nothing; nothing left": "deleted first",
            "message_leased; took 0 for the 1.; 1 in work": "while somebody holds it only the holder may",
        },
    ),
    "delete / the sweeper, it has expired": Case(
        scene(lease_seconds=ENDED, expired=True),
        {"delete": delete, "sweep": remove_expired},
        told,
        {"deleted: False; swept; nothing left": "expired and held by nobody: it is gone already, swept or not"},
    ),
    "delete / the sweeper, it is held beyond its time": Case(
        scene(lease_seconds=60, expired=True),
        {"delete": delete, "sweep": remove_expired},
        told,
        {"deleted: True; swept; nothing left": "who holds it may still delete it, and the sweeper leaves it alone"},
    ),
    "delete the queue / enqueue": Case(
        scene(),
        {"delete": delete_queue("work"), "enqueue": send("1")},
        deleted_queue,
        {
            "deleted the queue; stored; nothing left": "stored before the queue was deleted, and gone with it",
            "deleted the queue; queue_not_found; nothing left": "there was no queue any more",
        },
    ),
    "delete the queue / enqueue with a key": Case(
        scene(),
        {"delete": delete_queue("work"), "enqueue": send("1", key="k")},
        deleted_queue,
        {
            "deleted the queue; stored; nothing left": "stored before the queue was deleted, and gone with it",
            "deleted the queue; queue_not_found; nothing left": "there was no queue any more",
        },
    ),
    "enqueue / enqueue with the same key": Case(
        scene(messages=0),
        {"one": send("1", key="k"), "two": send("1", key="k"), "three": send("1", key="k")},
        lambda connection, scene, results: told(connection, scene, dict(enumerate_sorted(results))),
        {"duplicate; duplicate; stored; 1 in work": "the same key stores one message, whoever comes first"},
    ),
    "enqueue / enqueue with the same key and another body": Case(
        scene(messages=0),
        {"one": send("1", key="k"), "two": send("2", key="k")},
        lambda connection, scene, results: told(connection, scene, dict(enumerate_sorted(results))),
        {"idempotency_conflict; stored; 1 in work": "the key is the first one's"},
    ),
    "trim the keys / enqueue with a key whose time is over": Case(
        scene(key="k", keys_ended=True),
        {"trim": forget_keys, "enqueue": send("0", key="k"), "again": send("0", key="k")},
        lambda connection, scene, results: told(connection, scene, dict(enumerate_sorted(results))),
        {"duplicate; stored; trimmed; 2 in work": "it is free, trimmed or not, and then in use again"},
    ),
    "trim the keys / enqueue with a key in use": Case(
        scene(key="k"),
        {"trim": forget_keys, "enqueue": send("0", key="k")},
        told,
        {"trimmed; duplicate; 1 in work": "its time is not over"},
    ),
    "move to the dead-letter queue / delete with the last receipt": Case(
        scene(lease_seconds=ENDED, max_receives=1, target="dead"),
        {"move": bury, "delete": delete},
        told,
        {
            "moved 1; lease_lost; 1 in dead": "once it has moved, old receipts are worthless",
            "moved 0; deleted: True; nothing left": "no later lease was taken, and it had not moved",
        },
    ),
    "move to the dead-letter queue / delete / dequeue there": Case(
        scene(lease_seconds=ENDED, max_receives=1, target="dead"),
        {"move": bury, "delete": delete, "dequeue": dequeue("dead")},
        told,
        {
            "moved 1; lease_lost; took 0 for the 1.; 1 in dead": "moved, and taken there by somebody else",
            "moved 1; lease_lost; took nothing; 1 in dead": "not there yet when it was looked for",
            "moved 0; deleted: True; took nothing; nothing left": "deleted before it could move",
        },
    ),
    "move to the dead-letter queue / the same": Case(
        scene(lease_seconds=ENDED, max_receives=1, target="dead"),
        {"one": bury, "two": bury},
        lambda connection, scene, results: told(connection, scene, dict(enumerate_sorted(results))),
        {"moved 0; moved 1; 1 in dead": "two sweepers move it once"},
    ),
    "move to the dead-letter queue / purge": Case(
        scene(lease_seconds=ENDED, max_receives=1, target="dead"),
        {"move": bury, "purge": purge},
        told,
        {
            "moved 1; purged; 1 in dead": "it had left, or was about to",
            "moved 0; purged; nothing left": "purged before it could move",
        },
    ),
    "move to the dead-letter queue / delete both queues": Case(
        scene(lease_seconds=ENDED, max_receives=1, target="dead"),
        {"move": bury, "delete": delete_queue("work"), "target": delete_queue("dead")},
        deleted_queue,
        {
            "moved 1; deleted the queue; deleted the queue; nothing left": "moved, and gone with the target",
            "moved 1; deleted the queue; queue_in_use; 1 in dead": "moved; the target was still named",
            "moved 0; deleted the queue; deleted the queue; nothing left": "gone with its queue before it could move",
            "moved 0; deleted the queue; queue_in_use; nothing left": "so too; the target was still named",
        },
    ),
    "redrive / dequeue": Case(
        scene(lease_seconds=ENDED, max_receives=1, target="dead", is_dead=True),
        {"redrive": redrive, "dequeue": dequeue("dead")},
        told,
        {
            "moved 1 back; took nothing; 1 in work": "it had left, or was about to",
            "moved 0 back; took 0 for the 1.; 1 in dead": "what somebody holds stays",
        },
    ),
    "redrive / dequeue where it comes back to": Case(
        scene(lease_seconds=ENDED, max_receives=1, target="dead", is_dead=True),
        {"redrive": redrive, "dequeue": dequeue("work")},
        told,
        {
            "moved 1 back; took 0 for the 1.; 1 in work": "back, and counted anew",
            "moved 1 back; took nothing; 1 in work": "not there yet when it was looked for",
        },
    ),
    "redrive / redrive": Case(
        scene(lease_seconds=ENDED, max_receives=1, target="dead", is_dead=True),
        {"one": redrive, "two": redrive},
        lambda connection, scene, results: told(connection, scene, dict(enumerate_sorted(results))),
        {"moved 0 back; moved 1 back; 1 in work": "it moves once"},
    ),
    "redrive / delete with the receipt from before it died": Case(
        scene(lease_seconds=ENDED, max_receives=1, target="dead", is_dead=True),
        {"redrive": redrive, "delete": delete},
        told,
        {"moved 1 back; lease_lost; 1 in work": "old receipts are worthless for ever, back in their queue too"},
    ),
    "name a dead-letter queue / delete it": Case(
        scene(),
        {"name": name_target, "delete": delete_queue("dead")},
        told,
        {
            "named the target; queue_in_use; 1 in work": "others name it",
            "queue_not_found; deleted the queue; 1 in work": "it is no more",
        },
    ),
}


def enumerate_sorted(results: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the results without regard to who had which."""
    return [(str(n), result) for n, result in enumerate(sorted(results.values()))]


@pytest.fixture
async def connections(database_url: str) -> AsyncIterator[list[Connection]]:
    """Four connections as a broker makes them."""
    async with AsyncExitStack() as stack:
        made: list[Connection] = []
        for _ in range(4):
            connection: Connection = await psycopg.AsyncConnection.connect(database_url, autocommit=True)
            await configure(connection)
            # A machine that is slow to take the next step is no fault.
            await connection.execute("SET idle_in_transaction_session_timeout = 0")
            made.append(await stack.enter_async_context(connection))
        yield made


@pytest.mark.parametrize("name", CASES)
async def test_every_order_of_calls_at_once_comes_to_something_that_the_contract_permits(
    connections: list[Connection], name: str
) -> None:
    await check_every_order(connections, CASES[name])


async def check_every_order(connections: list[Connection], case: Case[Scene]) -> None:
    """Fail where an order comes to what is not permitted, or no order to what is."""
    observer, *others = connections
    outcomes: dict[str, tuple[str, ...]] = {}
    for order in interleavings(list(case.statements)):
        outcome = await play(case, order, observer, others)
        outcomes.setdefault(outcome, order)
    assert outcomes.keys() == case.permitted.keys(), json.dumps(outcomes, indent=1)
