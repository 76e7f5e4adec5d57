"""Whatever clients do, in whatever order, through either of two brokers: the contract holds of messages and topics.

Hypothesis makes up sequences of calls, compares each answer with what `model.py` permits, and after each step
everything that can be seen. What it finds it shortens to the few calls that matter, which it prints.

The brokers are real ones without their ports and background tasks: what is called is what `POST /rpc` calls with the
text of a request. So nothing happens but what a step does, and a sweep is a step like others: nothing that a client
sees may depend on it, save when what has used up its deliveries arrives in the dead-letter queue.

STATE_MACHINE_EXAMPLES (200) says how many sequences, STATE_MACHINE_SEED (1) which; what is printed at a failure is
enough to repeat it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeVar

import msgspec
import psycopg
import pytest
import uvloop
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from broker.model import Lease, lease_of, receipt_of
from broker.server import Server
from broker.settings import Settings
from broker.storage.low_water import Floors, LowWater
from broker.storage.sessions import configure
from broker.sweeper import sweep_once
from model import QUANTUM_SECONDS, TIMES, Message, Model, New, Queue, Receipt, Refused, Shown

T = TypeVar("T")
Params = dict[str, Any]

EXAMPLES = int(os.environ.get("STATE_MACHINE_EXAMPLES", "200"))
SEED = int(os.environ.get("STATE_MACHINE_SEED", "1"))
STEPS = 50
# Only catches a hang.
PATIENCE = 60.0

# Every column that says when something is or was: what is found in the catalogue cannot be forgotten here.
COLUMNS = """
SELECT a.attrelid::regclass::text, array_agg(quote_ident(a.attname)), bool_and(a.atttypid = 'timestamptz'::regtype)
FROM pg_attribute a
JOIN pg_class c ON c.oid = a.attrelid
JOIN pg_type t ON t.oid = a.atttypid
WHERE c.relnamespace = 'broker'::regnamespace AND c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped
    AND t.typcategory = 'D'
GROUP BY a.attrelid
"""
TABLES = """
SELECT c.oid::regclass::text
FROM pg_class c
WHERE c.relnamespace = 'broker'::regnamespace AND c.relkind = 'r' AND c.relname <> 'migrations'
ORDER BY EXISTS (SELECT FROM pg_constraint f WHERE f.conrelid = c.oid AND f.contype = 'f') DESC
"""


class _Error(msgspec.Struct):
    code: int
    message: str
    data: dict[str, Any]


class _Answer(msgspec.Struct):
    id: int
    result: msgspec.Raw = msgspec.Raw(b"")
    error: _Error | None = None


class _Page(msgspec.Struct):
    messages: list[Shown]
    next: str | None


_SHAPES: dict[str, Any] = {
    "dequeue": msgspec.json.Decoder(dict[str, list[Shown]]),
    "list_messages": msgspec.json.Decoder(_Page),
    "get_message": msgspec.json.Decoder(Shown),
    "update_message": msgspec.json.Decoder(Shown),
}
_ANYTHING = msgspec.json.Decoder()


class Broker:
    """A broker that is called as its port would call it."""

    def __init__(self, conninfo: str) -> None:
        self.server = Server(conninfo, Settings(database_connections=2, request_timeout=PATIENCE))

    async def open(self) -> None:
        await self.server.database.open(PATIENCE)

    async def close(self) -> None:
        await self.server.waiting.settle(PATIENCE)
        await self.server.database.close()

    def forget(self) -> None:
        """Be as if just started; the connections stay, whose statements are planned already."""
        self.server.calls.low_water.forget()
        self.server.calls._hand_outs.clear()

    async def call(self, method: str, **params: Any) -> Any:
        """Call a method; return its result, or how it was refused."""
        (answer,) = await self.batch([(method, params)])
        return answer

    async def batch(self, calls: Sequence[tuple[str, Params]], *, hangs_up: bool = False) -> list[Any]:
        """Call methods at the same time; a client that hangs up has gone when the answer is ready."""
        undo: list[Any] = []
        request = msgspec.json.encode(
            [
                {"jsonrpc": "2.0", "id": n, "method": method, "params": params}
                for n, (method, params) in enumerate(calls)
            ]
        )
        text = await self.server.rpc.answer(request, undo)
        assert text is not None
        if hangs_up:
            for undo_one in undo:
                undo_one()
            await self.server.waiting.settle(PATIENCE)
        answers = msgspec.json.decode(text, type=list[_Answer])
        assert [answer.id for answer in answers] == list(range(len(calls)))
        return [
            Refused(answer.error.data["type"], answer.error.data)
            if answer.error
            else _SHAPES.get(method, _ANYTHING).decode(answer.result)
            for (method, _), answer in zip(calls, answers, strict=True)
        ]


class World:
    """A database, and what all examples share of it."""

    def __init__(self, conninfo: str) -> None:
        self.conninfo = conninfo
        self.loop = uvloop.new_event_loop()
        self.connection = self.do(self._connect())
        columns = self._rows(COLUMNS)
        assert all(is_timestamp for _, _, is_timestamp in columns), f"a time that is no timestamptz: {columns}"
        self._shift = "; ".join(
            f"UPDATE {table} SET " + ", ".join(f"{name} = {name} - interval '{{0}} seconds'" for name in names)
            for table, names, _ in columns
        )
        # Not TRUNCATE, after which every statement would be planned anew.
        self._empty = "; ".join(
            [f"DELETE FROM {table}" for (table,) in self._rows(TABLES)]
            + ["INSERT INTO broker.queues (name) VALUES ('default')", "INSERT INTO broker.sweeps DEFAULT VALUES"]
        )
        self.brokers = [Broker(conninfo) for _ in range(2)]
        for broker in self.brokers:
            self.do(broker.open())

    async def _connect(self) -> psycopg.AsyncConnection[Any]:
        connection = await psycopg.AsyncConnection.connect(self.conninfo, autocommit=True)
        await configure(connection)
        return connection

    def _rows(self, statement: str) -> list[Any]:
        async def fetch() -> list[Any]:
            return await (await self.connection.execute(statement)).fetchall()

        return self.do(fetch())

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, PATIENCE))

    def do_at_once(self, *work: Coroutine[Any, Any, T]) -> list[T]:
        async def gather() -> list[T]:
            return await asyncio.gather(*work)

        return self.do(gather())

    def empty(self) -> datetime:
        """Leave nothing of the example before; return the database's time."""
        self._run(self._empty)
        for broker in self.brokers:
            broker.forget()
        ((now,),) = self._rows("SELECT clock_timestamp()")
        return now  # type: ignore[no-any-return]

    def restart(self, broker: int) -> None:
        self.do(self.brokers[broker].close())
        self.brokers[broker] = Broker(self.conninfo)
        self.do(self.brokers[broker].open())

    def pass_time(self, seconds: int) -> None:
        """Let everything have happened so many seconds earlier.

        What brokers remember of the database's time moves with it. If it did not, they would believe that nothing
        ready lies before a time up to which, in the tables as they are now, nobody has ever looked; and if they were
        made to forget, no hint would ever outlive a lease, and a wrong one would never be found.
        """
        self._run(self._shift.format(seconds))
        for broker in self.brokers:
            _move_hints(broker.server.calls.low_water, timedelta(seconds=seconds))

    def _run(self, statements: str) -> None:
        async def execute() -> None:
            await self.connection.execute(statements)

        self.do(execute())

    def sweep(self) -> None:
        """Sweep as a broker does: the second time what the first has found."""
        for _ in range(2):
            self.do(sweep_once(self.connection))

    def close(self) -> None:
        for broker in self.brokers:
            self.do(broker.close())
        self.do(self.connection.close())
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()


def _move_hints(hints: LowWater, by: timedelta) -> None:
    def earlier(moment: datetime | None) -> datetime | None:
        return None if moment is None else moment - by

    for queue, floors in hints._floors.items():
        hints._floors[queue] = Floors(*map(earlier, floors))
    for n, (moment, xmax) in enumerate(hints._notes):
        hints._notes[n] = moment - by, xmax
    hints._newest = earlier(hints._newest)


# What steps are made of. A step that needs a message or a receipt takes the one of this number, counted from the newest
# back; so what is drawn never depends on what a broker answered.
QUEUES = ("work", "dead", "default")
BROKERS = st.sampled_from((0, 1))
NAMES = st.sampled_from(("work", "work", "work", "work", "dead", "default"))
PICKS = st.integers(0, 7)
LEASES = st.sampled_from((None, None, 1, 2, 5))
BODIES = st.sampled_from((b"1", b"1.0", rb'"\u0000"', b'{"a": 1,"a":2}', b"[1e400]"))
# Where nothing is deleted that keys were used for, half of these are duplicates.
MESSAGES = st.one_of(
    st.builds(
        New,
        body=BODIES,
        headers=st.sampled_from(({}, {"kind": "é"})),
        sender=st.sampled_from((None, "me")),
        delay=st.sampled_from((None, None, None, 0, 1, 3)),
        ttl=st.sampled_from((None, None, None, 1, 2, 4)),
        key=st.none(),
    ),
    st.tuples(st.sampled_from((b"1", b"1", b"1", b"1.0")), st.sampled_from(("one", "two"))).map(
        lambda body_and_key: New(body_and_key[0], key=body_and_key[1])
    ),
)
ATTRIBUTES = st.lists(
    st.sampled_from(
        [("max_receives", value) for value in (None, 1, 2, 3)]
        + [("dead_letter_queue", value) for value in ("dead", "dead", "dead", None, "work", "missing")]
        + [("max_messages", value) for value in (None, 3, 6)]
        + [("visibility_timeout", value) for value in (1, 2)]
        + [("idempotency_window", value) for value in (1, 3)]
        + [("message_ttl", value) for value in (None, 2)]
        + [("delay", value) for value in (None, 1)]
        + [("max_message_bytes", value) for value in (None, 6)]
        + [("paused", value) for value in (False, False, False, True)]
    ),
    min_size=1,
    max_size=3,
).map(dict)
# The defaults are seconds, and would end while an example runs.
LONG_ENOUGH: Params = {"visibility_timeout": 2, "idempotency_window": 3}
MALFORMED = ("", "a receipt", "A" * 43)


TOPICS = st.sampled_from(("now", "later"))
FILTERS = st.sampled_from((None, None, {}, {"kind": ["é"]}, {"kind": ["e", "é"], "other": ["x"]}))
SUBSCRIPTIONS = st.sampled_from(("one", "two"))


def in_seconds(attributes: Params) -> Params:
    return {
        name: value * QUANTUM_SECONDS if value is not None and name in TIMES else value
        for name, value in attributes.items()
    }


def seconds(quanta: int | None) -> int | None:
    return None if quanta is None else quanta * QUANTUM_SECONDS


def sent(message: New) -> Params:
    """Return the params of a message; what is null is left out."""
    params: Params = {"body": msgspec.Raw(message.body)}
    named = {
        "headers": message.headers or None,
        "sender": message.sender,
        "delay": seconds(message.delay),
        "ttl": seconds(message.ttl),
        "idempotency_key": message.key,
    }
    return params | {name: value for name, value in named.items() if value is not None}


def as_batch(answer: Any) -> Any:
    """Return the answer of `enqueue` as `enqueue_batch` would give it."""
    return answer if isinstance(answer, Refused) else {"messages": [answer]}


def messages_of(answer: Any) -> Any:
    return answer if isinstance(answer, Refused) else answer["messages"]


class Contract(RuleBasedStateMachine):
    """Clients of two brokers, and the model beside them."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.began_at = world.empty()
        self.brokers = world.brokers
        self.model = Model(self.quantum_of)

    def quantum_of(self, shown: str) -> int:
        since = (datetime.fromisoformat(shown) - self.began_at).total_seconds()
        return int(since // QUANTUM_SECONDS) + self.model.now

    def call(self, broker: int, method: str, **params: Any) -> Any:
        return self.world.do(self.brokers[broker].call(method, **params))

    # Queues

    @initialize(
        max_receives=st.sampled_from((2, 1, 2, None)),
        has_dead_letters=st.sampled_from((True, True, True, False)),
        max_messages=st.sampled_from((None, None, 4)),
        messages=st.lists(MESSAGES, min_size=1, max_size=4),
        wanted=FILTERS,
    )
    def begin(
        self,
        max_receives: int | None,
        has_dead_letters: bool,
        max_messages: int | None,
        messages: list[New],
        wanted: Params | None,
    ) -> None:
        self.update(0, "default", LONG_ENOUGH)
        self.create(0, "dead", LONG_ENOUGH)
        target = "dead" if has_dead_letters else None
        limits = {"max_receives": max_receives, "dead_letter_queue": target, "max_messages": max_messages}
        self.create(1, "work", LONG_ENOUGH | limits)
        self.enqueue_all(0, "work", messages)
        for topic, delivery in (("now", "immediate"), ("later", "on_broadcast")):
            self.create_topic(0, topic, delivery)
            self.subscribe(1, topic, "one", "work", wanted)
        self.subscribe(0, "now", "two", "default", None)
        self.publish(0, "later", messages, "nothing")
        self.publish(1, "now", messages[:1], "nothing")

    def create(self, broker: int, queue: str, attributes: Params) -> None:
        answer = self.call(broker, "create_queue", queue=queue, **in_seconds(attributes))
        self.model.create_queue(queue, attributes, answer)

    def update(self, broker: int, queue: str, attributes: Params) -> None:
        answer = self.call(broker, "update_queue", queue=queue, **in_seconds(attributes))
        self.model.update_queue(queue, attributes, answer)

    @rule(
        broker=BROKERS,
        queue=NAMES,
        how=st.sampled_from(("update",) * 6 + ("create", "create", "purge", "delete", "anew", "anew")),
        attributes=ATTRIBUTES,
    )
    def manage_queue(self, broker: int, queue: str, how: str, attributes: Params) -> None:
        if how == "update":
            self.update(broker, queue, attributes)
        elif how == "purge":
            self.model.purge_queue(queue, self.call(broker, "purge_queue", queue=queue))
        else:
            if how != "create":
                self.model.delete_queue(queue, self.call(broker, "delete_queue", queue=queue))
            if how != "delete":
                self.create(1 - broker, queue, LONG_ENOUGH | attributes)

    # Messages

    @rule(broker=BROKERS, queue=NAMES, message=MESSAGES)
    def enqueue(self, broker: int, queue: str, message: New) -> None:
        answer = self.call(broker, "enqueue", queue=queue, **sent(message))
        self.model.enqueue(queue, [message], as_batch(answer))

    @rule(broker=BROKERS, queue=NAMES, messages=st.lists(MESSAGES, min_size=1, max_size=4))
    def enqueue_batch(self, broker: int, queue: str, messages: list[New]) -> None:
        self.enqueue_all(broker, queue, messages)

    def enqueue_all(self, broker: int, queue: str, messages: list[New]) -> None:
        answer = self.call(broker, "enqueue_batch", queue=queue, messages=[sent(message) for message in messages])
        self.model.enqueue(queue, messages, answer)

    @rule(
        broker=BROKERS,
        queue=NAMES,
        most=st.sampled_from((1, 1, 2, 5)),
        lease=LEASES,
        delivery=st.sampled_from(("at_least_once", "at_least_once", "at_least_once", "at_most_once")),
    )
    def dequeue(self, broker: int, queue: str, most: int, lease: int | None, delivery: str) -> None:
        answer = self.call(
            broker, "dequeue", queue=queue, max_messages=most, visibility_timeout=seconds(lease), delivery=delivery
        )
        at_most_once = delivery == "at_most_once"
        self.model.dequeue(broker, queue, most, lease, messages_of(answer), at_most_once=at_most_once)

    @rule(broker=BROKERS, queue=NAMES, times=st.sampled_from((2, 9, 9)))
    def dequeue_and_return_one_by_one(self, broker: int, queue: str, times: int) -> None:
        """As consumers do that fail at everything: nothing may starve."""
        for _ in range(times):
            answer = self.call(broker, "dequeue", queue=queue)
            if not self.model.dequeue(broker, queue, 1, None, messages_of(answer)):
                break
            self.extend(broker, [self.model.receipts[-1]], 0)
            self.check(broker)

    @rule(broker=BROKERS, leases=st.tuples(LEASES, LEASES, LEASES))
    def dequeue_from_all_queues(self, broker: int, leases: Sequence[int | None]) -> None:
        calls: list[tuple[str, Params]] = [
            ("dequeue", {"queue": queue, "max_messages": 2, "visibility_timeout": seconds(lease)})
            for queue, lease in zip(QUEUES, leases, strict=True)
        ]
        answers = self.world.do(self.brokers[broker].batch(calls))
        for queue, lease, answer in zip(QUEUES, leases, answers, strict=True):
            self.model.dequeue(broker, queue, 2, lease, messages_of(answer))

    @rule(queue=NAMES, most=st.lists(st.integers(1, 3), min_size=2, max_size=4), lease=LEASES)
    def dequeue_at_both_brokers(self, queue: str, most: list[int], lease: int | None) -> None:
        calls: list[list[tuple[str, Params]]] = [
            [
                ("dequeue", {"queue": queue, "max_messages": each, "visibility_timeout": seconds(lease)})
                for each in most[n::2]
            ]
            for n in range(2)
        ]
        answers = self.world.do_at_once(*(broker.batch(calls[n]) for n, broker in enumerate(self.brokers)))
        all_answers = [messages_of(answer) for each in answers for answer in each]
        self.model.dequeue_at_once(queue, most[0::2] + most[1::2], lease, all_answers)

    @rule(broker=BROKERS, queue=NAMES, most=st.integers(1, 3))
    def dequeue_and_hang_up(self, broker: int, queue: str, most: int) -> None:
        calls: list[tuple[str, Params]] = [("dequeue", {"queue": queue, "max_messages": most})]
        (answer,) = self.world.do(self.brokers[broker].batch(calls, hangs_up=True))
        self.model.give_back(self.model.dequeue(broker, queue, most, None, messages_of(answer)))

    # Receipts

    def receipts(self, picks: Iterable[int]) -> list[Receipt]:
        """Return receipts of messages that are there still, or, for the two highest numbers, of any."""
        known = self.model.receipts
        live = [receipt for receipt in known if not receipt.message.is_gone]
        chosen = [(live if pick < 6 else known, pick) for pick in picks]
        return [receipts[-1 - pick % len(receipts)] for receipts, pick in chosen if receipts]

    @rule(broker=BROKERS, picks=st.lists(PICKS, min_size=1, max_size=4), malformed=st.sampled_from(MALFORMED))
    def delete(self, broker: int, picks: list[int], malformed: str) -> None:
        receipts = self.receipts(picks)
        if len(receipts) == 1:
            answer = self.call(broker, "delete", receipt=receipts[0].text)
            self.model.delete(receipts, [answer.type if isinstance(answer, Refused) else answer["deleted"]])
            return
        texts = [receipt.text for receipt in receipts]
        *results, guessed, last = self.call(broker, "delete_batch", receipts=[*texts, self.guess(picks[0]), malformed])[
            "results"
        ]
        assert last["error"]["code"] == 1010
        assert "error" in guessed or guessed == {"deleted": False}
        answers = [each["error"]["data"]["type"] if "error" in each else each["deleted"] for each in results]
        self.model.delete(receipts, answers)

    def guess(self, pick: int) -> str:
        """Return a receipt as a broker would make it, for a message that there is, but not the lease."""
        lease = next((lease_of(receipt.text) for receipt in self.receipts([pick])), Lease(1, 1, b""))
        return receipt_of(Lease(lease.queue_id, lease.id, bytes(16)))

    def extend(self, broker: int, receipts: list[Receipt], quanta: int) -> None:
        texts = [each.text for each in receipts]
        params: Params = {"receipts": [*texts, self.guess(0)], "visibility_timeout": seconds(quanta)}
        *results, guessed = self.call(broker, "extend_visibility_batch", **params)["results"]
        assert guessed["error"]["data"]["type"] == "lease_lost"
        assert {each["error"]["data"]["type"] for each in results if "error" in each} <= {"lease_lost"}
        self.model.extend(receipts, quanta, [each.get("visible_at") for each in results])

    @rule(broker=BROKERS, picks=st.lists(PICKS, min_size=1, max_size=3), quanta=st.sampled_from((0, 0, 1, 3)))
    def extend_visibility(self, broker: int, picks: list[int], quanta: int) -> None:
        receipts = self.receipts(picks)
        if len(receipts) != 1:
            if receipts:
                self.extend(broker, receipts, quanta)
            return
        params: Params = {"receipt": receipts[0].text, "visibility_timeout": seconds(quanta)}
        answer = self.call(broker, "extend_visibility", **params)
        if isinstance(answer, Refused):
            assert answer.type == "lease_lost"
        self.model.extend(receipts, quanta, [None if isinstance(answer, Refused) else answer["visible_at"]])

    # Looking inside

    def message(self, pick: int) -> Message | None:
        """Return a message that is there still, or, for the two highest numbers, any."""
        known = [message for message in self.model.ids.values() if pick > 5 or not message.is_gone]
        return known[-1 - pick % len(known)] if known else None

    @rule(broker=BROKERS, pick=PICKS, by=PICKS, method=st.sampled_from(("get", "update", "delete")), body=BODIES)
    def one_message(self, broker: int, pick: int, by: int, method: str, body: bytes) -> None:
        """Look at a message, change it or delete it: by its newest receipt, by none, or by some other."""
        message = self.message(pick)
        if message is None:
            return
        receipt = message.receipt if by < 2 else None
        if by > 5:
            receipt = next((each.text for each in self.receipts([by])), None)
        queue = message.queue.name
        params = {"queue": queue, "message_id": message.id}
        if method == "get":
            self.model.get_message(queue, message.id, self.call(broker, "get_message", **params))
        elif method == "delete":
            answer = self.call(broker, "delete_message", **params, receipt=receipt)
            self.model.delete_message(queue, message.id, receipt, answer)
        else:
            answer = self.call(broker, "update_message", **params, receipt=receipt, body=msgspec.Raw(body))
            self.model.update_message(queue, message.id, receipt, body, answer)

    @rule(broker=BROKERS, queue=NAMES, status=st.sampled_from(("ready", "delayed", "leased")), limit=st.integers(1, 3))
    def look_around(self, broker: int, queue: str, status: str, limit: int) -> None:
        calls: list[tuple[str, Params]] = [
            ("count_messages", {}),
            ("count_messages", {"queue": queue, "status": status}),
            ("list_messages", {"queue": queue, "status": status, "limit": limit}),
        ]
        everywhere, here, page = self.world.do(self.brokers[broker].batch(calls))
        assert everywhere == self.model.counts(self.model.queues.values())
        if queue not in self.model.queues:
            assert here.type == page.type == "queue_not_found"
            return
        there = self.model.queues[queue]
        of_status = sorted(each.id for each in self.model.visible(there) if self.model.status(each) == status)
        assert here == {"total": len(of_status), "exact": True}
        assert [shown.message_id for shown in page.messages] == of_status[:limit]
        assert (page.next is None) == (len(of_status) <= limit)

    # Dead letters

    @rule(
        broker=BROKERS,
        queue=st.sampled_from(("dead", "dead", "work")),
        to=st.sampled_from((None, None, "work", "default", "missing")),
        most=st.sampled_from((None, None, 1)),
    )
    def redrive(self, broker: int, queue: str, to: str | None, most: int | None) -> None:
        self.redrive_all(broker, queue, to, most)

    def redrive_all(self, broker: int, queue: str, to: str | None, most: int | None) -> None:
        answer = self.call(broker, "redrive", queue=queue, to=to, max_messages=most)
        there = self.model.queues.get(queue)
        left = {shown.message_id for shown in self.listed(broker, there)} if there else set()
        moved = [each.id for each in self.model.visible(there) if each.id not in left] if there else []
        self.model.redrive(queue, to, most, answer, moved)

    def listed(self, broker: int, queue: Queue) -> list[Shown]:
        page: _Page = self.call(broker, "list_messages", queue=queue.name)
        return page.messages

    # Topics

    def create_topic(self, broker: int, topic: str, delivery: str | None) -> None:
        named = {} if delivery is None else {"delivery": delivery}
        self.model.create_topic(topic, delivery, self.call(broker, "create_topic", topic=topic, **named))

    def subscribe(self, broker: int, topic: str, name: str, queue: str, wanted: Params | None) -> None:
        answer = self.call(broker, "subscribe", topic=topic, name=name, queue=queue, filter=wanted)
        self.model.subscribe(topic, name, queue, wanted, answer)

    @rule(
        broker=BROKERS,
        topic=TOPICS,
        how=st.sampled_from(("subscribe",) * 4 + ("unsubscribe", "unsubscribe", "create", "delete", "anew")),
        name=SUBSCRIPTIONS,
        queue=NAMES,
        wanted=FILTERS,
        delivery=st.sampled_from((None, "immediate", "on_broadcast")),
    )
    def manage_topic(
        self, broker: int, topic: str, how: str, name: str, queue: str, wanted: Params | None, delivery: str | None
    ) -> None:
        if how == "unsubscribe":
            there = self.model.topics.get(topic)
            known = there.subscriptions.get(name) if there else None
            if there is not None and known is not None:
                answer = self.call(broker, "unsubscribe", subscription_id=known.id)
                self.model.unsubscribe(there, name, answer)
        if how in ("delete", "anew"):
            self.model.delete_topic(topic, self.call(broker, "delete_topic", topic=topic))
        if how in ("create", "anew"):
            self.create_topic(1 - broker, topic, delivery)
        if how in ("subscribe", "anew"):
            self.subscribe(broker, topic, name, queue, wanted)

    def come(self, broker: int, answer: Any) -> dict[str, list[Shown]]:
        """Return the messages that nobody knows of yet, by their queue.

        Where the answer says that there are none nobody looks: a message too many is found after each step.
        """
        if isinstance(answer, Refused) or answer.get("duplicate") or not answer["deliveries"]:
            return {queue: [] for queue in self.model.queues}
        calls: list[tuple[str, Params]] = [("list_messages", {"queue": queue}) for queue in self.model.queues]
        pages = self.world.do(self.brokers[broker].batch(calls))
        return {
            queue: [shown for shown in page.messages if shown.message_id not in self.model.ids]
            for queue, page in zip(self.model.queues, pages, strict=True)
        }

    @rule(
        broker=BROKERS,
        topic=TOPICS,
        messages=st.lists(MESSAGES, min_size=1, max_size=3),
        then=st.sampled_from(("nothing", "nothing", "broadcast", "time passes", "broadcast after a time")),
    )
    def publish(self, broker: int, topic: str, messages: list[New], then: str) -> None:
        for message in messages:
            answer = self.call(broker, "publish", topic=topic, **sent(message))
            self.model.publish(topic, message, answer, self.come(1 - broker, answer))
        if "time" in then:
            self.check(broker)
            self.pass_time(1)
        if "broadcast" in then:
            self.check(broker)
            self.broadcast_now(1 - broker, topic)

    @rule(broker=BROKERS, topic=st.sampled_from(("later", "later", "later", "now")))
    def broadcast(self, broker: int, topic: str) -> None:
        self.broadcast_now(broker, topic)

    def broadcast_now(self, broker: int, topic: str) -> None:
        answer = self.call(broker, "broadcast", topic=topic)
        self.model.broadcast(topic, answer, self.come(1 - broker, answer))

    # What goes on without clients

    @rule(
        quanta=st.sampled_from((1, 1, 1, 0, 2, 4)),
        sweeps=st.booleans(),
        restarts=st.sampled_from((None, None, None, None, 0, 1)),
    )
    def time_passes(self, quanta: int, sweeps: bool, restarts: int | None) -> None:
        self.pass_time(quanta)
        if sweeps:
            self.sweep()
        if restarts is not None:
            self.world.restart(restarts)
            self.model.broker_restarted(restarts)

    @rule(
        broker=BROKERS,
        queue=NAMES,
        times=st.integers(1, 3),
        then=st.sampled_from(("sweep", "sweep and redrive", "nothing")),
    )
    def consumers_fail(self, broker: int, queue: str, times: int, then: str) -> None:
        """They take all there is, and die of it."""
        for _ in range(times):
            lease: Params = {"max_messages": 9, "visibility_timeout": QUANTUM_SECONDS}
            answer = self.call(broker, "dequeue", queue=queue, **lease)
            self.model.dequeue(broker, queue, 9, 1, messages_of(answer))
            self.pass_time(1)
            self.check(broker)
        if then != "nothing":
            self.sweep()
        if then == "sweep and redrive":
            self.check(broker)
            self.redrive_all(broker, "dead", None, None)

    def pass_time(self, quanta: int) -> None:
        self.world.pass_time(quanta * QUANTUM_SECONDS)
        self.model.pass_time(quanta)

    def sweep(self) -> None:
        self.world.sweep()
        self.model.sweep()

    # What always holds

    @invariant()
    def everything_is_as_the_model_says(self) -> None:
        self.check(self.model.now % 2)

    def check(self, broker: int) -> None:
        if self.model.is_unsettled():
            self.sweep()
        queues = list(self.model.queues.values())
        calls: list[tuple[str, Params]] = [("list_queues", {"counts": True}), ("list_topics", {"counts": True})]
        calls += [("list_messages", {"queue": queue.name}) for queue in queues]
        objects, topics, *pages = self.world.do(self.brokers[broker].batch(calls))
        assert [shown["queue"] for shown in objects["queues"]] == sorted(queue.name for queue in queues)
        for shown in objects["queues"]:
            self.model.check_queue(shown)
        self.model.check_topics(topics["topics"])
        for queue, page in zip(queues, pages, strict=True):
            assert page.next is None
            self.model.check_listed(queue, page.messages)


@pytest.fixture
def world(database_url: str) -> Iterator[World]:
    made = World(database_url)
    yield made
    made.close()


# A sequence that fails is shortened, by trying many.
@pytest.mark.timeout(1800)
def test_whatever_clients_do_the_contract_holds(world: World) -> None:
    chosen = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    # A class made here, so that the seed stays with it.
    seeded = seed(SEED)(type("Seeded", (Contract,), {"__init__": lambda self: Contract.__init__(self, world)}))
    try:
        run_state_machine_as_test(seeded, settings=chosen)
    except BaseException as error:
        error.add_note(f"Repeat it with STATE_MACHINE_SEED={SEED} STATE_MACHINE_EXAMPLES={EXAMPLES} pytest {__file__}")
        raise
