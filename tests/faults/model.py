"""The message part of the contract in plain Python: what clients may see, and nothing of how it is done.

Times are whole quanta since the model began, far longer than any run takes: what happens between two of them happens
in the same one, and what is due in a later one is not due yet, however slow the machine. What happened first in a
quantum is told by `order`.

Each operation is given what a broker answered. It fails where the contract does not permit that answer, and else takes
over from it what the contract leaves open: ids, receipts, and which of several messages were handed out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

QUANTUM_SECONDS = 1000
FRESH_FIRST_EVERY = 8

# In quanta where they are times.
DEFAULTS: Mapping[str, Any] = {
    "visibility_timeout": 0.03,
    "message_ttl": None,
    "delay": 0,
    "max_message_bytes": 4096,
    "max_receives": None,
    "dead_letter_queue": None,
    "idempotency_window": 0.3,
    "max_messages": None,
    "paused": False,
}
TIMES = ("visibility_timeout", "message_ttl", "delay", "idempotency_window")


class Shown(msgspec.Struct, forbid_unknown_fields=True):
    """A message as it is delivered (with a receipt) or looked at (with a status)."""

    message_id: str
    queue: str
    body: msgspec.Raw
    headers: dict[str, str]
    sender: str | None
    receive_count: int
    enqueued_at: str
    first_received_at: str | None
    visible_at: str
    expires_at: str | None
    dead_letter: dict[str, Any] | None
    topic: str | None = None
    published_id: str | None = None
    receipt: str | None | msgspec.UnsetType = msgspec.UNSET
    status: str | msgspec.UnsetType = msgspec.UNSET


class Refused(NamedTuple):
    """An error that a call was answered with."""

    type: str
    data: dict[str, Any]


class New(NamedTuple):
    """A message as a producer sends it; times in quanta, None for the queue's."""

    body: bytes
    headers: Mapping[str, str] = {}
    sender: str | None = None
    delay: int | None = None
    ttl: int | None = None
    key: str | None = None


@dataclass(eq=False)
class Key:
    """The first use of an idempotency key, and the shortest and the longest window its queue has had since.

    And, where it is a topic's, how many copies were made.
    """

    message_id: str
    body: bytes
    used_at: int
    shortest: float
    longest: float
    deliveries: int = 0


@dataclass(eq=False)
class Queue:
    name: str
    attributes: dict[str, Any]
    messages: dict[str, Message] = field(default_factory=dict)
    keys: dict[str, Key] = field(default_factory=dict)
    is_deleted: bool = False

    @property
    def max_receives(self) -> float:
        limit: int | None = self.attributes["max_receives"]
        return float("inf") if limit is None else limit


@dataclass(eq=False)
class Subscription:
    id: str
    queue: Queue
    filter: Mapping[str, Sequence[str]] | None

    def wants(self, headers: Mapping[str, str]) -> bool:
        return all(headers.get(name) in values for name, values in (self.filter or {}).items())


@dataclass(eq=False)
class Topic:
    """`stored` are the messages that wait for a broadcast, the oldest first, by the id that publish has answered."""

    name: str
    delivery: str
    subscriptions: dict[str, Subscription] = field(default_factory=dict)
    keys: dict[str, Key] = field(default_factory=dict)
    stored: dict[str, Stored] = field(default_factory=dict)

    def wanted_by(self, headers: Mapping[str, str]) -> list[Subscription]:
        return [each for each in self.subscriptions.values() if each.wants(headers)]


class Stored(NamedTuple):
    """What was published to be broadcast, and when."""

    new: New
    published_at: int
    order: tuple[int, int]

    @property
    def expires_at(self) -> int | None:
        return None if self.new.ttl is None else self.published_at + self.new.ttl


@dataclass(eq=False)
class Message:
    """A message that is or was there. `receipt` is the newest one, None where nobody was given one."""

    id: str
    queue: Queue
    body: bytes
    headers: dict[str, str]
    sender: str | None
    enqueued_at: int
    visible_at: int
    # When it became visible, among those that did in the same quantum; None where nobody can tell.
    order: tuple[int, int] | None
    expires_at: int | None
    # Of a copy: the topic, and the id that publish has answered.
    published: tuple[str, str] | None = None
    receive_count: int = 0
    first_received_at: int | None = None
    was_handed_out: bool = False
    receipt: str | None = None
    # It is on the last delivery that it may have, or that one is over.
    is_last: bool = False
    moves: int = 0
    # Without `dead_at`, which is known from when to when it may be; and the text that it is shown as since.
    dead_letter: dict[str, Any] | None = None
    died: tuple[int, int] = (0, 0)
    dead_at: str | None = None
    is_gone: bool = False


class Receipt(NamedTuple):
    text: str
    message: Message
    queue: Queue
    moves: int


class Model:
    """Everything that the brokers of one database have been told and have answered.

    `quantum_of` says in which quantum a time lies that a broker has shown.
    """

    def __init__(self, quantum_of: Callable[[str], int]) -> None:
        self.now = 0
        self._events = 0
        self._quantum_of = quantum_of
        self.queues: dict[str, Queue] = {"default": Queue("default", dict(DEFAULTS))}
        self.topics: dict[str, Topic] = {}
        self.ids: dict[str, Message] = {}
        self.receipts: list[Receipt] = []
        self._hand_outs: dict[tuple[int, str], deque[str]] = {}

    # Time

    def pass_time(self, quanta: int) -> None:
        self.now += quanta
        self._let_go()

    def _tick(self) -> int:
        self._events += 1
        return self._events

    def _let_go(self) -> None:
        """Take note of what has expired. What a consumer holds has not."""
        for queue in self.queues.values():
            for message in list(queue.messages.values()):
                if not self._is_held(message) and self._has_expired(message):
                    self._remove(message)
        for topic in self.topics.values():
            for message_id, stored in list(topic.stored.items()):
                if stored.expires_at is not None and stored.expires_at <= self.now:
                    del topic.stored[message_id]

    def _has_expired(self, message: Message) -> bool:
        """Whether a message that nobody holds has: one whose deliveries were used up before is a dead letter."""
        until = message.visible_at if message.is_last else self.now
        return message.expires_at is not None and message.expires_at <= until

    def _is_held(self, message: Message) -> bool:
        return message.was_handed_out and message.visible_at > self.now

    def _is_exhausted(self, message: Message) -> bool:
        """Whether it only waits to become a dead letter, and is not to be seen until it has."""
        return message.is_last and not self._is_held(message)

    def _remove(self, message: Message) -> None:
        message.is_gone = True
        del message.queue.messages[message.id]

    def status(self, message: Message) -> str:
        if message.visible_at <= self.now:
            return "ready"
        return "leased" if message.was_handed_out else "delayed"

    def visible(self, queue: Queue) -> list[Message]:
        """Return what looking into a queue shows."""
        return [message for message in queue.messages.values() if not self._is_exhausted(message)]

    def ready(self, queue: Queue) -> list[Message]:
        """Return what a dequeue may take."""
        if queue.attributes["paused"]:
            return []
        return [
            message
            for message in self.visible(queue)
            if message.visible_at <= self.now and message.receive_count < queue.max_receives
        ]

    # Enqueue

    def enqueue(self, name: str, new: Sequence[New], answer: Any) -> None:
        """Check what `enqueue_batch` answered, or `enqueue` in its form."""
        queue = self.queues.get(name)
        if queue is None:
            uses = {(each.key, each.body) for each in new if each.key is not None}
            conflicts = len(uses) > len({key for key, _ in uses})
            return expect_refusal(answer, {"queue_not_found"} | ({"idempotency_conflict"} if conflicts else set()))
        known = [self._known(queue, new[:n], each) for n, each in enumerate(new)]
        refusals = self._refusals(queue, new, known)
        if isinstance(answer, Refused):
            assert answer.type in refusals, (answer, refusals)
            assert answer.data.get("index", 0) in refusals[answer.type][0], (answer, refusals)
            return None
        assert not [type_ for type_, (_, is_certain) in refusals.items() if is_certain], (answer, refusals)
        assert len(answer["messages"]) == len(new)
        order = self._tick()
        for n, (each, given) in enumerate(zip(new, answer["messages"], strict=True)):
            is_known, key = self._known(queue, new[:n], each)
            assert is_known is None or given["duplicate"] is is_known, (n, each, given)
            if given["duplicate"]:
                assert key is not None
                assert given["message_id"] == key.message_id
                continue
            assert given["message_id"] not in self.ids, "an id is unique for ever"
            delay = queue.attributes["delay"] if each.delay is None else each.delay
            ttl = queue.attributes["message_ttl"] if each.ttl is None else each.ttl
            message = Message(
                given["message_id"], queue, each.body, dict(each.headers), each.sender, self.now, self.now + delay,
                (order, n), None if ttl is None else self.now + ttl,
            )  # fmt: skip
            self.ids[message.id] = queue.messages[message.id] = message
            if each.key is not None:
                window = queue.attributes["idempotency_window"]
                queue.keys[each.key] = Key(message.id, each.body, self.now, window, window)
        return None

    def _known(self, queue: Queue, before: Sequence[New], new: New) -> tuple[bool | None, Key | None]:
        """Whether a message's key is in use, by the queue's window or by a message before it in its batch.

        None where the window has been another one meanwhile, and either may be so.
        """
        if new.key is None:
            return False, None
        key = queue.keys.get(new.key)
        if key is not None and self.now - key.used_at < key.shortest:
            return True, key
        if any(each.key == new.key for each in before):
            return True, key
        if key is not None and self.now - key.used_at < key.longest:
            return None, key
        return False, None

    def _refusals(
        self, queue: Queue, new: Sequence[New], known: Sequence[tuple[bool | None, Key | None]]
    ) -> dict[str, tuple[set[int], bool]]:
        """Return what a call may be refused for: which of its messages may be named, and whether it has to be."""
        refusals: dict[str, tuple[set[int], bool]] = {}

        def add(type_: str, index: int, *, is_certain: bool) -> None:
            indexes, was_certain = refusals.get(type_, (set(), False))
            refusals[type_] = indexes | {index}, was_certain or is_certain

        for n, (each, (is_known, key)) in enumerate(zip(new, known, strict=True)):
            if len(each.body) > queue.attributes["max_message_bytes"]:
                add("message_too_large", n, is_certain=is_known is False)
            if is_known is not False:
                first = next((other.body for other in new[:n] if other.key == each.key), None)
                bodies = {body for body in (first, key and key.body) if body is not None}
                if bodies != {each.body}:
                    add("idempotency_conflict", n, is_certain=is_known is True and (key is None or first is None))
        limit = queue.attributes["max_messages"]
        if limit is not None:
            fewest = len(self.visible(queue)) + sum(is_known is False for is_known, _ in known)
            for n in range(len(new)):
                if len(queue.messages) + len(new) > limit:
                    is_certain = fewest > limit and any(is_known is False for is_known, _ in known)
                    add("queue_full", n, is_certain=is_certain)
        return refusals

    # Dequeue

    def dequeue(
        self,
        broker: int,
        name: str,
        max_messages: int,
        visibility_timeout: int | None,
        answer: Any,
        *,
        at_most_once: bool = False,
    ) -> list[Message]:
        """Check one hand-out, its order too; return what was handed out."""
        queue = self.queues.get(name)
        if queue is None:
            expect_refusal(answer, {"queue_not_found"})
            return []
        ready = self.ready(queue)
        returned = [message for message in ready if message.was_handed_out]
        # Of what came from another queue nobody knows when.
        fresh = sorted(
            (message for message in ready if not message.was_handed_out and message.order is not None),
            key=lambda message: (message.visible_at, message.order),
        )
        taken = self._take(queue, visibility_timeout, answer, ready, at_most_once=at_most_once)
        assert len(taken) == min(max_messages, len(ready)), f"{len(taken)} of {len(ready)} ready ones"
        taken_in_order = [message for message in taken if message in fresh]
        assert taken_in_order == fresh[: len(taken_in_order)], "fresh ones come oldest first"
        if taken:
            hand_outs = self._hand_outs.setdefault((broker, name), deque(maxlen=FRESH_FIRST_EVERY - 1))
            hand_outs.append(
                _began_with([message in returned for message in taken], len(returned), len(ready), hand_outs)
            )
        return taken

    def dequeue_at_once(
        self, name: str, max_messages: Sequence[int], visibility_timeout: int | None, answers: Sequence[Any]
    ) -> None:
        """Check hand-outs that were under way at the same time, by whichever brokers."""
        queue = self.queues.get(name)
        if queue is None:
            for answer in answers:
                expect_refusal(answer, {"queue_not_found"})
            return
        ready = self.ready(queue)
        left = list(ready)
        for most, answer in zip(max_messages, answers, strict=True):
            taken = self._take(queue, visibility_timeout, answer, left)
            assert len(taken) <= most
            left = [message for message in left if message not in taken]
        assert len(left) == max(0, len(ready) - sum(max_messages)), "somebody got less than there was"
        for (_, of_queue), hand_outs in self._hand_outs.items():
            if of_queue == name:
                hand_outs.clear()

    def _take(
        self,
        queue: Queue,
        visibility_timeout: int | None,
        answer: Any,
        ready: Collection[Message],
        *,
        at_most_once: bool = False,
    ) -> list[Message]:
        """Take note of a hand-out; return its messages."""
        assert not isinstance(answer, Refused), answer
        lease = queue.attributes["visibility_timeout"] if visibility_timeout is None else visibility_timeout
        order = self._tick()
        taken: list[Message] = []
        for n, shown in enumerate(answer):
            message = self.ids[shown.message_id]
            assert message in ready, f"{message} is not to be handed out"
            assert message not in taken, f"{message} is handed out twice"
            taken.append(message)
            message.receive_count += 1
            message.is_last = message.receive_count >= queue.max_receives
            message.was_handed_out = True
            message.visible_at = self.now + (0 if at_most_once else lease)
            message.order = (order, n)
            if message.first_received_at is None:
                message.first_received_at = self.now
            self.check_shown(message, shown)
            assert shown.status is msgspec.UNSET
            message.receipt = shown.receipt
            if at_most_once:
                assert shown.receipt is None
                self._remove(message)
            else:
                assert shown.receipt not in {receipt.text for receipt in self.receipts}, "a receipt names one lease"
                self.receipts.append(Receipt(shown.receipt, message, queue, message.moves))
        return taken

    # What a receipt is good for

    def may_delete(self, receipt: Receipt) -> set[bool | str]:
        """Return what `delete` may answer: True, False or lease_lost."""
        message = receipt.message
        if receipt.moves < message.moves:
            return {"lease_lost", False} if message.is_gone or receipt.queue.is_deleted else {"lease_lost"}
        if message.is_gone:
            return {False}
        return {True} if message.receipt == receipt.text else {"lease_lost"}

    def delete(self, receipts: Sequence[Receipt], answers: Sequence[bool | str]) -> None:
        """Check what `delete_batch` answered: as if one after the other, but what was lost before may be said to be."""
        lost_before = [self.may_delete(receipt) & {"lease_lost"} for receipt in receipts]
        for receipt, was_lost, answer in zip(receipts, lost_before, answers, strict=True):
            permitted = self.may_delete(receipt) | was_lost
            assert answer in permitted, f"{answer} and not {permitted} for {receipt}"
            if answer is True:
                self._remove(receipt.message)

    def extend(self, receipts: Collection[Receipt], visibility_timeout: int, answers: Sequence[str | None]) -> None:
        """Check what became of leases; an answer is the new `visible_at`, None for lease_lost."""
        order = self._tick()
        held = [
            not receipt.message.is_gone and receipt.message.receipt == receipt.text and self._is_held(receipt.message)
            for receipt in receipts
        ]
        for receipt, is_held, answer in zip(receipts, held, answers, strict=True):
            assert (answer is not None) == is_held, f"{answer} for {receipt}"
            if answer is not None:
                receipt.message.visible_at = self.now + visibility_timeout
                receipt.message.order = (order, 0)
                assert self._quantum_of(answer) == receipt.message.visible_at
        self._let_go()

    def give_back(self, taken: Collection[Message]) -> None:
        """Their consumer has hung up before it was answered."""
        order = self._tick()
        for message in taken:
            message.receive_count -= 1
            message.is_last = False
            message.visible_at = self.now
            message.order = (order, 0)
            message.receipt = None
            if not message.receive_count:
                message.first_received_at = None
        self.receipts = [
            receipt for receipt in self.receipts if receipt.message not in taken or receipt.message.receipt
        ]
        self._let_go()

    # Looking inside

    def find(self, name: str, message_id: str) -> Message | None:
        """Return a message that looking into a queue shows."""
        queue = self.queues.get(name)
        message = queue.messages.get(message_id) if queue else None
        return None if message is None or self._is_exhausted(message) else message

    def get_message(self, name: str, message_id: str, answer: Any) -> None:
        message = self.find(name, message_id)
        if name not in self.queues:
            expect_refusal(answer, {"queue_not_found"})
        elif message is None:
            expect_refusal(answer, {"message_not_found"})
        else:
            self.check_looked_at(message, answer)

    def _may_change(self, message: Message, receipt: str | None) -> str | None:
        """Return what it is refused with to change a message, None where it may be."""
        if receipt is None:
            return "message_leased" if self._is_held(message) else None
        return None if message.receipt == receipt else "lease_lost"

    def update_message(self, name: str, message_id: str, receipt: str | None, body: bytes, answer: Any) -> None:
        message = self.find(name, message_id)
        if message is None:
            return self.get_message(name, message_id, answer)
        refusals = {self._may_change(message, receipt)} - {None}
        if len(body) > message.queue.attributes["max_message_bytes"]:
            refusals.add("message_too_large")
        if refusals:
            return expect_refusal(answer, refusals)
        message.body = body
        return self.check_looked_at(message, answer)

    def delete_message(self, name: str, message_id: str, receipt: str | None, answer: Any) -> None:
        message = self.find(name, message_id)
        if name not in self.queues:
            return expect_refusal(answer, {"queue_not_found"})
        if message is None:
            assert answer == {"deleted": False}, answer
            return None
        refusal = self._may_change(message, receipt)
        if refusal is not None:
            return expect_refusal(answer, {refusal})
        assert answer == {"deleted": True}, answer
        self._remove(message)
        return None

    def check_shown(self, message: Message, shown: Shown) -> None:
        """Check everything that a message shows of itself, here or to its consumer."""
        times = [
            None if each is None else self._quantum_of(each)
            for each in (shown.enqueued_at, shown.first_received_at, shown.visible_at, shown.expires_at)
        ]
        assert (
            (shown.message_id, shown.queue, bytes(shown.body), shown.headers, shown.sender, shown.receive_count)
            == (message.id, message.queue.name, message.body, message.headers, message.sender, message.receive_count)
        ), (message, shown)  # fmt: skip
        assert (shown.topic, shown.published_id) == (message.published or (None, None)), (message, shown)
        assert times == [message.enqueued_at, message.first_received_at, int(message.visible_at), message.expires_at], (
            message, shown, times,
        )  # fmt: skip
        self._check_dead_letter(message, shown.dead_letter)

    def _check_dead_letter(self, message: Message, shown: dict[str, Any] | None) -> None:
        if message.dead_letter is None or shown is None:
            assert message.dead_letter is shown, (message, shown)
            return
        if message.dead_at is None:
            message.dead_at = shown["dead_at"]
            assert message.died[0] <= self._quantum_of(shown["dead_at"]) <= message.died[1], (message, shown)
        assert shown == {**message.dead_letter, "dead_at": message.dead_at}, (message, shown)

    def check_looked_at(self, message: Message, shown: Shown) -> None:
        assert shown.status == self.status(message), (message, shown)
        assert shown.receipt is msgspec.UNSET
        self.check_shown(message, shown)

    def check_listed(self, queue: Queue, page: Sequence[Shown]) -> None:
        """Check what `list_messages` shows of a whole queue."""
        listed = [shown.message_id for shown in page]
        there = self.visible(queue)
        assert listed == sorted(message.id for message in there), (queue.name, there)
        for shown in page:
            self.check_looked_at(self.ids[shown.message_id], shown)

    def counts(self, queues: Collection[Queue]) -> dict[str, int | bool]:
        """Return what `count_messages` has to answer."""
        statuses = [self.status(message) for queue in queues for message in self.visible(queue)]
        by_status = {name: statuses.count(name) for name in ("ready", "delayed", "leased")}
        return {**by_status, "total": len(statuses), "exact": True}

    def check_queue(self, shown: Mapping[str, Any]) -> None:
        """Check a queue object that carries counts."""
        queue = self.queues[shown["queue"]]
        for name, value in queue.attributes.items():
            in_seconds = value is not None and name in TIMES
            assert shown[name] == (value * QUANTUM_SECONDS if in_seconds else value), (name, value, shown[name])
        assert shown["counts"] == self.counts([queue]), (queue.name, shown["counts"], queue.messages)
        since = [message.visible_at for message in self.visible(queue) if self.status(message) == "ready"]
        age = shown["oldest_ready_age"]
        assert (age is None) == (not since), (queue.name, shown)
        if since:
            assert age // QUANTUM_SECONDS == int(self.now - min(since)), (queue.name, age)

    # Queues

    def create_queue(self, name: str, attributes: Mapping[str, Any], answer: Any) -> None:
        queue = self.queues.get(name)
        target = attributes.get("dead_letter_queue")
        wanted = {each: DEFAULTS[each] if value is None else value for each, value in attributes.items()}
        if queue is not None:
            differs = any(queue.attributes[each] != value for each, value in wanted.items())
            if differs:
                expect_refusal(answer, {"queue_exists"} | self._target_refusals(name, target))
            else:
                assert answer["queue"] == name, answer
            return
        refusals = self._target_refusals(name, target)
        if refusals:
            expect_refusal(answer, refusals)
            return
        assert answer["queue"] == name, answer
        self.queues[name] = Queue(name, {**DEFAULTS, **wanted})

    def update_queue(self, name: str, attributes: Mapping[str, Any], answer: Any) -> None:
        queue = self.queues.get(name)
        refusals = self._target_refusals(name, attributes.get("dead_letter_queue"))
        if queue is None:
            return expect_refusal(answer, {"queue_not_found"} | refusals)
        if refusals:
            return expect_refusal(answer, refusals)
        assert answer["queue"] == name, answer
        queue.attributes.update(
            {each: DEFAULTS[each] if value is None else value for each, value in attributes.items()}
        )
        window = queue.attributes["idempotency_window"]
        for key in queue.keys.values():
            key.shortest, key.longest = min(key.shortest, window), max(key.longest, window)
        return None

    def _target_refusals(self, name: str, target: str | None) -> set[str]:
        """Return what a dead-letter queue may be refused with: it has to live, and no way may lead back."""
        if target is None:
            return set()
        refusals = {"queue_not_found"} if target not in self.queues and target != name else set()
        after: str | None = target
        while after is not None and after != name:
            queue = self.queues.get(after)
            after = queue.attributes["dead_letter_queue"] if queue else None
        return refusals | {"invalid_params"} if after == name else refusals

    def purge_queue(self, name: str, answer: Any) -> None:
        queue = self.queues.get(name)
        if queue is None:
            return expect_refusal(answer, {"queue_not_found"})
        # What has expired or used up its deliveries may lie there still, and be counted.
        assert answer["complete"] is True, answer
        assert answer["purged"] >= len(self.visible(queue)), (answer, queue)
        for message in list(queue.messages.values()):
            self._remove(message)
        return None

    def delete_queue(self, name: str, answer: Any) -> None:
        queue = self.queues.get(name)
        is_target = any(other.attributes["dead_letter_queue"] == name for other in self.queues.values())
        is_subscribed = queue in [each.queue for topic in self.topics.values() for each in topic.subscriptions.values()]
        if name == "default" or ((is_target or is_subscribed) and queue is not None):
            return expect_refusal(answer, {"queue_in_use"})
        if queue is None:
            return expect_refusal(answer, {"queue_not_found"})
        assert answer["complete"] is True, answer
        assert answer["deleted_messages"] >= len(self.visible(queue)), (answer, queue)
        for message in list(queue.messages.values()):
            self._remove(message)
        queue.is_deleted = True
        del self.queues[name]
        return None

    # Dead letters

    def is_unsettled(self) -> bool:
        """Whether max_receives was changed under messages: what they become is open until something has swept."""
        return any(
            self._is_exhausted(message)
            if message.receive_count < queue.max_receives
            else message.was_handed_out and not message.is_last
            for queue in self.queues.values()
            for message in queue.messages.values()
        )

    def sweep(self) -> None:
        """Let everything that has used up its deliveries become what it has to."""
        for queue in self.queues.values():
            for message in list(queue.messages.values()):
                message.is_last = message.is_last or (
                    message.was_handed_out and message.receive_count >= queue.max_receives
                )
                if self._is_exhausted(message):
                    self._bury(message)
        self._let_go()

    def _bury(self, message: Message) -> None:
        queue = message.queue
        target = queue.attributes["dead_letter_queue"]
        if message.receive_count < queue.max_receives:
            message.is_last = False
            message.visible_at = self.now
        elif target is None:
            self._remove(message)
        else:
            message.dead_letter = {
                "source_queue": queue.name, "reason": "max_receives", "receive_count": message.receive_count
            }  # fmt: skip
            message.died, message.dead_at = (message.visible_at, self.now), None
            self._move(message, self.queues[target])

    def _move(self, message: Message, target: Queue) -> None:
        del message.queue.messages[message.id]
        target.messages[message.id] = message
        message.queue = target
        message.visible_at = self.now
        message.order = None
        message.expires_at = message.first_received_at = message.receipt = None
        message.receive_count = 0
        message.was_handed_out = message.is_last = False
        message.moves += 1

    def redrive(self, name: str, to: str | None, max_messages: int | None, answer: Any, moved: Collection[str]) -> None:
        """Check what `redrive` answered; `moved` are the messages that have left the queue since it was asked."""
        queue = self.queues.get(name)
        refusals = {"queue_not_found"} if queue is None or (to is not None and to not in self.queues) else set()
        if to == name:
            refusals.add("invalid_params")
        if queue is None or refusals:
            return expect_refusal(answer, refusals)
        targets = {
            message: self.queues.get(to or message.dead_letter["source_queue"])
            for message in self.visible(queue)
            if message.dead_letter is not None and not self._is_held(message)
        }
        redriven = {message: target for message, target in targets.items() if target not in (None, queue)}
        expected = len(redriven) if max_messages is None else min(max_messages, len(redriven))
        assert answer == {"moved": expected, "complete": expected == len(redriven)}, (answer, redriven)
        assert len(moved) == expected
        for message_id in moved:
            target = redriven[self.ids[message_id]]
            assert target is not None
            self._move(self.ids[message_id], target)
            self.ids[message_id].dead_letter = None
        return None

    # Topics

    def create_topic(self, name: str, delivery: str | None, answer: Any) -> None:
        topic = self.topics.get(name)
        if topic is not None and delivery not in (None, topic.delivery):
            return expect_refusal(answer, {"topic_exists"})
        if topic is None:
            topic = self.topics[name] = Topic(name, delivery or "immediate")
        assert (answer["topic"], answer["delivery"]) == (name, topic.delivery), answer
        return None

    def delete_topic(self, name: str, answer: Any) -> None:
        topic = self.topics.pop(name, None)
        if topic is None:
            return expect_refusal(answer, {"topic_not_found"})
        # What has expired may lie there still, and be counted.
        assert answer["complete"] is True, answer
        assert answer["deleted_messages"] >= len(topic.stored), (answer, topic)
        return None

    def subscribe(
        self, name: str, subscription: str, queue: str, wanted: Mapping[str, Sequence[str]] | None, answer: Any
    ) -> None:
        topic = self.topics.get(name)
        if topic is None:
            refusals = {"topic_not_found"} | ({"queue_not_found"} if queue not in self.queues else set())
            return expect_refusal(answer, refusals)
        known = topic.subscriptions.get(subscription)
        if known is not None and (known.queue is not self.queues.get(queue) or known.filter != wanted):
            return expect_refusal(answer, {"subscription_exists"})
        if known is None:
            if queue not in self.queues:
                return expect_refusal(answer, {"queue_not_found"})
            known = Subscription(answer["subscription_id"], self.queues[queue], wanted)
            topic.subscriptions[subscription] = known
        assert (answer["subscription_id"], answer["queue"], answer["filter"], answer["state"]) == (
            known.id, queue, wanted, "active",
        ), answer  # fmt: skip
        return None

    def unsubscribe(self, topic: Topic, subscription: str, answer: Any) -> None:
        del topic.subscriptions[subscription]
        assert answer == {"deleted_messages": 0}, answer

    def publish(self, name: str, new: New, answer: Any, found: Mapping[str, Collection[Shown]]) -> None:
        """Check what `publish` answered; `found` are the copies that have come since it was asked, by their queue."""
        topic = self.topics.get(name)
        if topic is None:
            return expect_refusal(answer, {"topic_not_found"})
        window = DEFAULTS["idempotency_window"]
        key = topic.keys.get(new.key) if new.key is not None else None
        if key is not None and self.now - key.used_at < window:
            if key.body != new.body:
                return expect_refusal(answer, {"idempotency_conflict"})
            assert not any(found.values()), found
            assert answer == {"message_id": key.message_id, "duplicate": True, "deliveries": key.deliveries}, answer
            return None
        takers = topic.wanted_by(new.headers) if topic.delivery == "immediate" else []
        if isinstance(answer, Refused):
            assert not any(found.values()), found
            return self._check_refusal(takers, new, answer)
        message_id = answer["message_id"]
        assert answer == {"message_id": message_id, "duplicate": False, "deliveries": len(takers)}, (answer, takers)
        assert message_id not in self.ids, "an id is unique for ever"
        if new.key is not None:
            topic.keys[new.key] = Key(message_id, new.body, self.now, window, window, len(takers))
        order = (self._tick(), 0)
        topic.stored[message_id] = Stored(new, self.now, order)
        if topic.delivery == "immediate":
            self._give_out(topic, message_id, order, found)
        else:
            assert not any(found.values()), found
        return None

    def broadcast(self, name: str, answer: Any, found: Mapping[str, Collection[Shown]]) -> None:
        """Check what `broadcast` answered; `found` are the copies that have come since it was asked, by their queue."""
        topic = self.topics.get(name)
        if topic is None or topic.delivery == "immediate":
            return expect_refusal(answer, {"topic_not_found" if topic is None else "invalid_params"})
        if isinstance(answer, Refused):
            assert topic.stored, answer
            assert not any(found.values()), (answer, found)
            first = next(iter(topic.stored.values())).new
            return self._check_refusal(topic.wanted_by(first.headers), first, answer)
        taken = list(topic.stored)[: answer["messages"]]
        given = {each.published_id for shown in found.values() for each in shown}
        assert given <= set(taken), "the oldest are given out first"
        assert answer["messages"] == len(taken), (answer, topic)
        tick = self._tick()
        deliveries = [self._give_out(topic, message_id, (tick, n), found) for n, message_id in enumerate(taken)]
        assert answer["deliveries"] == sum(deliveries), (answer, deliveries)
        assert answer["complete"] == (not topic.stored), (answer, topic)
        if topic.stored:
            assert taken, "who gives out nothing says why"
            first = next(iter(topic.stored.values())).new
            assert self._limits(topic.wanted_by(first.headers), first)[0], "there was room for the next one"
        return None

    def _check_refusal(self, takers: Sequence[Subscription], new: New, answer: Refused | None) -> None:
        """Fail where copies were refused that all queues take, or, the answer being None, taken that one does not."""
        permitted, is_certain = self._limits(takers, new)
        if answer is None:
            assert not is_certain, (permitted, takers)
        else:
            expect_refusal(answer, {type_ for type_, _ in permitted})
            assert (answer.type, answer.data["queue"]) in permitted, (answer, permitted)

    def _limits(self, takers: Sequence[Subscription], new: New) -> tuple[set[tuple[str, str]], bool]:
        """Return with what queues may refuse copies, and whether one has to. What nobody sees any more takes room."""
        permitted: set[tuple[str, str]] = set()
        is_certain = False
        for queue in {each.queue for each in takers}:
            if len(new.body) > queue.attributes["max_message_bytes"]:
                permitted.add(("message_too_large", queue.name))
                is_certain = True
            limit = queue.attributes["max_messages"]
            copies = sum(each.queue is queue for each in takers)
            if limit is not None and len(queue.messages) + copies > limit:
                permitted.add(("queue_full", queue.name))
                is_certain = is_certain or len(self.visible(queue)) + copies > limit
        return permitted, is_certain

    def _give_out(
        self, topic: Topic, message_id: str, order: tuple[int, int], found: Mapping[str, Collection[Shown]]
    ) -> int:
        """Take over the copies of a stored message, of which each subscription that wants it has one; return how many.

        It is not stored any more then.
        """
        new = topic.stored[message_id].new
        takers = topic.wanted_by(new.headers)
        self._check_refusal(takers, new, None)
        left = {queue: [each for each in shown if each.published_id == message_id] for queue, shown in found.items()}
        for taker in takers:
            assert left[taker.queue.name], f"{taker.queue.name} has no copy of {message_id}"
            shown = left[taker.queue.name].pop(0)
            self._add_copy(topic, message_id, taker.queue, shown.message_id, order)
        assert not any(left.values()), f"copies that nobody wants: {left}"
        del topic.stored[message_id]
        return len(takers)

    def _add_copy(self, topic: Topic, message_id: str, queue: Queue, copy_id: str, order: tuple[int, int]) -> None:
        stored = topic.stored[message_id]
        new = stored.new
        visible_at = self.now + (queue.attributes["delay"] if new.delay is None else new.delay)
        if topic.delivery == "on_broadcast":
            # A delay counts from publish on; without one the queue has its own, from now on.
            delayed_until = stored.published_at + (new.delay or 0)
            visible_at = max(delayed_until, self.now) if new.delay else self.now + queue.attributes["delay"]
            order = stored.order if new.delay and delayed_until > self.now else order
        ttl = queue.attributes["message_ttl"]
        expires_at = stored.expires_at if new.ttl is not None else (None if ttl is None else self.now + ttl)
        assert copy_id not in self.ids, "an id is unique for ever"
        message = Message(
            copy_id, queue, new.body, dict(new.headers), new.sender, self.now, visible_at, order, expires_at,
            (topic.name, message_id),
        )  # fmt: skip
        self.ids[message.id] = queue.messages[message.id] = message

    def check_topics(self, shown: Sequence[Mapping[str, Any]]) -> None:
        """Check what `list_topics` shows, with counts."""
        assert [(each["topic"], each["delivery"], each["subscriptions"], each["messages"]) for each in shown] == [
            (topic.name, topic.delivery, len(topic.subscriptions), len(topic.stored))
            for _, topic in sorted(self.topics.items())
        ], (shown, self.topics)

    # What goes on without a client

    def broker_restarted(self, broker: int) -> None:
        for number, name in list(self._hand_outs):
            if number == broker:
                del self._hand_outs[number, name]


def _began_with(were_returned: Sequence[bool], all_returned: int, all_ready: int, before: Collection[str]) -> str:
    """Return what a hand-out began with: "returned" ones, or "fresh" ones, or "either" where that cannot be told.

    Returned ones come first, but in one hand-out of eight the fresh ones. `before` has the last seven.
    """
    taken = len(were_returned)
    returned_first = [n < all_returned for n in range(taken)]
    fresh_first = [n >= all_ready - all_returned for n in range(taken)]
    assert were_returned in (returned_first, fresh_first), f"fresh and returned ones are mixed: {were_returned}"
    if returned_first == fresh_first:
        return "either"
    if were_returned == fresh_first:
        assert "fresh" not in before, "fresh ones came first twice among eight hand-outs"
        return "fresh"
    assert list(before).count("returned") < FRESH_FIRST_EVERY - 1, "returned ones came first eight times in a row"
    return "returned"


def expect_refusal(answer: Any, types: Collection[str | None]) -> None:
    """Fail where the answer is not an error of one of these types that says that nothing was done."""
    assert isinstance(answer, Refused), f"{answer} and not {types}"
    assert answer.type in types, f"{answer} and not {types}"
    assert answer.data["outcome"] == "none", answer
