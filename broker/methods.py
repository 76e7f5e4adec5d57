"""The RPC methods: one short function each, in the schema's order.

A function has its method's name and params. Values have been checked against the schema before, defaults are
filled in, and what was not given and has no default is UNSET; only what the schema cannot say is checked here.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from msgspec import UNSET, Raw, UnsetType

from broker import __version__
from broker.errors import BrokerError, InvalidParams, MessageTooLarge, QueueNotFound, error_object, forbidden_receipt
from broker.metrics import Metrics
from broker.model import (
    Counts,
    Lease,
    NewMessage,
    Queue,
    Subscription,
    Topic,
    lease_of,
    message_id_of,
    message_number_of,
    timestamp,
)
from broker.rpc import Call, Method
from broker.settings import Settings, limits_in_force
from broker.signatures import secret_text
from broker.storage import (
    broadcasting,
    counting,
    dead_letters,
    durability,
    inspection,
    leases,
    queues,
    statistics,
    subscriptions,
    topics,
    totals,
)
from broker.storage.calls import Calls
from broker.storage.database import Database
from broker.storage.messages import TOO_LARGE
from broker.storage.notifications import News
from broker.storage.publishing import Published
from broker.storage.storing import Stored
from broker.storage.tokens import Grant
from broker.tally import DELETED, ENQUEUED, Tally
from broker.texts import header_text, json_text, new_message, too_large
from broker.waiting import SHORT_LEASE_SECONDS, WaitingRoom

# More consumers than can wait.
EVERYBODY = 2**31
# Methods whose name is no Python name.
RENAMED = {"discover": "rpc.discover"}
# What those may do of whom no token is asked.
EVERYTHING = Grant(send=("*",), receive=("*",), manage=("*",), admin=True)


@dataclass
class Methods:
    """What the methods stand on, and the methods themselves."""

    database: Database
    calls: Calls
    waiting: WaitingRoom
    metrics: Metrics
    tally: Tally
    settings: Settings
    document: Mapping[str, Any]
    # Whether a url may be pushed to: raises InvalidParams where not.
    check_url: Callable[[str], Awaitable[None]]
    # Told when somebody has come or gone who is pushed to.
    subscriptions_changed: Callable[[], None]
    started_at: float = field(default_factory=time.monotonic)

    def by_name(self) -> dict[str, Method]:
        """Return every method under the name that clients call it by."""
        return {
            RENAMED.get(name, name): getattr(self, name)
            for name, function in vars(type(self)).items()
            if inspect.iscoroutinefunction(function) and not name.startswith("_")
        }

    async def enqueue(
        self,
        call: Call,
        queue: str,
        body: Raw,
        headers: dict[str, str],
        sender: str | None,
        delay: float | None,
        ttl: float | None,
        idempotency_key: str | None,
    ) -> dict[str, Any]:
        message = new_message(body, headers, sender_of(call, sender), delay, ttl, idempotency_key)
        try:
            stored = await self._store(queue, [message])
        except MessageTooLarge as error:
            raise too_large(error, body) from None
        return _enqueued(stored.ids[0], is_duplicate=bool(stored.duplicates))

    async def enqueue_batch(self, call: Call, queue: str, messages: Sequence[Any]) -> dict[str, Any]:
        self.metrics.batch("enqueue_batch", len(messages))
        new = []
        for index, each in enumerate(messages):
            try:
                where = f"messages[{index}].headers"
                sender = sender_of(call, each.sender)
                new.append(
                    new_message(each.body, each.headers, sender, each.delay, each.ttl, each.idempotency_key, where)
                )
            except InvalidParams as error:
                raise error.with_data(index=index) from None
        over = next((index for index, each in enumerate(new) if each.body == TOO_LARGE), None)
        try:
            stored = await self._store(queue, new if over is None else [new[over]])
        except MessageTooLarge as error:
            place = error.index if over is None else over
            assert place is not None, "the error of a batch names the message"
            raise too_large(error, messages[place].body).with_data(index=place) from None
        except BrokerError as error:
            raise error.with_data(index=error.index) if error.index is not None else error from None
        return {
            "messages": [
                _enqueued(number, is_duplicate=place in stored.duplicates) for place, number in enumerate(stored.ids)
            ]
        }

    async def _store(self, queue: str, new: Sequence[NewMessage]) -> Stored:
        stored = await self.calls.enqueue(queue, new)
        self.stored(queue, stored)
        return stored

    def stored(self, queue: str, stored: Stored) -> None:
        """Count messages that were stored, and let those know who wait for them."""
        new = len(stored.ids) - len(stored.duplicates)
        self.metrics.enqueued.inc(new)
        if stored.duplicates:
            self.metrics.duplicates.inc(len(stored.duplicates))
        if new:
            self.waiting.tell(News(queue, stored.shortest_delay, new))

    async def dequeue(
        self,
        call: Call,
        queue: str,
        max_messages: int,
        visibility_timeout: float | None,
        wait: float,
        delivery: str,
    ) -> dict[str, Any]:
        if call.is_notification:
            return {"messages": []}
        taken = await self.waiting.dequeue(
            queue,
            max_messages,
            visibility_timeout,
            wait,
            at_most_once=delivery == "at_most_once",
            while_allowed=nullcontext if call.caller is None else call.caller.while_it_counts,
        )
        if taken.leases:
            call.undo.append(lambda: self.waiting.give_back_soon(queue, taken))
        self.metrics.delivered.inc(len(taken.messages))
        self.metrics.batch("dequeue", len(taken.messages))
        return {"messages": taken.messages}

    async def delete(self, call: Call, receipt: str) -> dict[str, Any]:
        (deleted,) = await self.calls.delete([call.lease or lease_of(receipt)])
        if isinstance(deleted, BrokerError):
            raise deleted
        self.metrics.deleted.inc(deleted)
        return {"deleted": deleted}

    async def delete_batch(self, call: Call, receipts: Sequence[str]) -> dict[str, Any]:
        self.metrics.batch("delete_batch", len(receipts))
        results = await self._for_receipts(call, receipts, self.calls.delete)
        self.metrics.deleted.inc(sum(result is True for result in results))
        return {
            "results": [
                {"error": error_object(result)} if isinstance(result, BrokerError) else {"deleted": result}
                for result in results
            ]
        }

    async def extend_visibility(self, call: Call, receipt: str, visibility_timeout: float) -> dict[str, Any]:
        (extended,) = await self._extend([call.lease or lease_of(receipt)], visibility_timeout)
        if isinstance(extended, BrokerError):
            raise extended
        return {"visible_at": timestamp(extended.visible_at)}

    async def extend_visibility_batch(
        self, call: Call, receipts: Sequence[str], visibility_timeout: float
    ) -> dict[str, Any]:
        self.metrics.batch("extend_visibility_batch", len(receipts))
        results = await self._for_receipts(call, receipts, lambda held: self._extend(held, visibility_timeout))
        return {
            "results": [
                {"error": error_object(result)}
                if isinstance(result, BrokerError)
                else {"visible_at": timestamp(result.visible_at)}
                for result in results
            ]
        }

    async def _extend(self, held: Sequence[Lease], visibility_timeout: float) -> list[leases.Extended | BrokerError]:
        results = await self.calls.extend(held, visibility_timeout)
        if visibility_timeout < SHORT_LEASE_SECONDS:
            for result in results:
                if not isinstance(result, BrokerError):
                    self.waiting.tell(News(result.queue, visibility_timeout, 1))
        return results

    async def _for_receipts(self, call: Call, receipts: Sequence[str], work: Any) -> list[Any]:
        """Do the work for those receipts that are ones, and that the caller may use; put errors in place of others."""
        results: list[Any] = []
        held: list[Lease] = []
        places: list[int] = []
        for place, receipt in enumerate(receipts):
            try:
                lease = lease_of(receipt)
                if lease.queue_id in call.barred_queues:
                    raise forbidden_receipt("receive")
                held.append(lease)
                places.append(place)
                results.append(None)
            except BrokerError as error:
                results.append(error)
        if held:
            for place, result in zip(places, await work(held), strict=True):
                results[place] = result
        return results

    async def create_queue(self, call: Call, queue: str, **attributes: Any) -> Queue:
        return await self.database.write(lambda connection: queues.create(connection, queue, attributes))

    async def update_queue(self, call: Call, queue: str, **attributes: Any) -> Queue:
        updated = await self.database.write(lambda connection: queues.update(connection, queue, attributes))
        self.waiting.tell(News(queue, 0.0, EVERYBODY))
        return updated

    async def get_queue(self, call: Call, queue: str) -> Queue:
        found = await self.database.read(lambda connection: queues.get(connection, queue))
        if not await self._add_counts([found]):
            raise QueueNotFound(queue=queue)
        return found

    async def list_queues(
        self, call: Call, prefix: str, counts: bool, dead_letter_queues: bool, limit: int, after: str | None
    ) -> dict[str, Any]:
        page, next_name = await self.database.read(
            lambda connection: queues.list_by_name(
                connection, prefix, limit, after, like=may_manage(call), are_targets=dead_letter_queues
            )
        )
        return {"queues": await self._add_counts(page) if counts else page, "next": next_name}

    async def _add_counts(self, page: list[Queue]) -> list[Queue]:
        """Add what lies in the queues; those that were deleted meanwhile are left out."""
        names = [each.queue for each in page]
        counted = await self.database.read(lambda connection: counting.count(connection, names))
        page = [each for each in page if each.queue in counted]
        for each in page:
            each.counts = counted[each.queue].counts
            each.oldest_ready_age = counted[each.queue].oldest_ready_age
        return page

    async def purge_queue(self, call: Call, queue: str) -> dict[str, Any]:
        purged, complete = await queues.purge(self.database, queue)
        return {"purged": purged, "complete": complete}

    async def delete_queue(self, call: Call, queue: str) -> dict[str, Any]:
        deleted, complete = await queues.delete(self.database, queue)
        self.tally.forget(queue)
        self.waiting.tell(News(queue, 0.0, EVERYBODY))
        return {"deleted_messages": deleted, "complete": complete}

    async def count_messages(self, call: Call, queue: str | None, status: str | None) -> Counts | dict[str, Any]:
        if queue is None:
            counted = await self.database.read(totals.count_all)
        else:
            found = await self.database.read(lambda connection: counting.count(connection, [queue]))
            if queue not in found:
                raise QueueNotFound(queue=queue)
            counted = found[queue]
        return counted.counts if status is None else counted.of_status(status)

    async def get_stats(self, call: Call, queue: str | None, minutes: int) -> dict[str, Any]:
        counted = await self.database.read(lambda connection: statistics.read(connection, queue, minutes))
        return {"queue": queue, "minutes": counted}

    async def list_messages(
        self, call: Call, queue: str, status: str | None, limit: int, after: str | None
    ) -> dict[str, Any]:
        after_number = _cursor_number(after)
        page, next_id = await self.database.read(
            lambda connection: inspection.list_by_id(connection, queue, status, limit, after_number)
        )
        return {"messages": page, "next": next_id}

    async def get_message(self, call: Call, queue: str, message_id: str) -> Any:
        return await self.database.read(lambda connection: inspection.get(connection, queue, message_id))

    async def update_message(
        self,
        call: Call,
        queue: str,
        message_id: str,
        receipt: str | None,
        body: Raw | UnsetType,
        headers: dict[str, str] | UnsetType,
    ) -> Any:
        if body is UNSET and headers is UNSET:
            raise InvalidParams(reason="Nothing to change: name `body`, `headers` or both.", param="body")
        lease = None if receipt is None else lease_of(receipt)
        new_body = None if isinstance(body, UnsetType) else json_text(body)
        new_headers = None if isinstance(headers, UnsetType) else header_text(headers)
        changes_headers = headers is not UNSET
        try:
            return await self.database.write(
                lambda connection: inspection.update(
                    connection, queue, message_id, lease, new_body, new_headers, changes_headers=changes_headers
                )
            )
        except MessageTooLarge as error:
            assert not isinstance(body, UnsetType), "headers alone are of no size here"
            raise too_large(error, body) from None

    async def delete_message(self, call: Call, queue: str, message_id: str, receipt: str | None) -> dict[str, Any]:
        lease = None if receipt is None else lease_of(receipt)
        deleted = await self.database.write(lambda connection: inspection.delete(connection, queue, message_id, lease))
        self.metrics.deleted.inc(deleted)
        self.tally.add(queue, DELETED, deleted)
        return {"deleted": deleted}

    async def redrive(self, call: Call, queue: str, to: str | None, max_messages: int | None) -> dict[str, Any]:
        redriven = await dead_letters.redrive(self.database, queue, to, max_messages, like=may_manage(call))
        moved = sum(redriven.moved.values())
        self.metrics.redriven.inc(moved)
        for target, messages in redriven.moved.items():
            self.waiting.tell(News(target, 0.0, messages))
        return {"moved": moved, "complete": redriven.complete}

    async def create_topic(self, call: Call, topic: str, delivery: str | UnsetType) -> Topic:
        named = None if isinstance(delivery, UnsetType) else delivery
        return await self.database.write(lambda connection: topics.create(connection, topic, named))

    async def delete_topic(self, call: Call, topic: str) -> dict[str, Any]:
        deleted, complete = await topics.delete(self.database, topic)
        self.subscriptions_changed()
        return {"deleted_messages": deleted, "complete": complete}

    async def list_topics(self, call: Call, prefix: str, counts: bool, limit: int, after: str | None) -> dict[str, Any]:
        page, next_name = await self.database.read(
            lambda connection: topics.list_by_name(
                connection, prefix, limit, after, counts=counts, like=may_manage(call)
            )
        )
        return {"topics": page, "next": next_name}

    async def subscribe(
        self,
        call: Call,
        topic: str,
        name: str,
        queue: str | None,
        url: str | None,
        filter: dict[str, list[str]] | None,  # noqa: A002 - the contract's word
        **attributes: Any,
    ) -> Subscription:
        if (queue is None) == (url is None):
            raise InvalidParams(reason="Name either `queue` or `url`.", param="queue" if queue is None else "url")
        for param, value in attributes.items():
            if url is None and value not in (UNSET, None):
                reason = f"`{param}` is for a `url`; the queue has its own: see update_queue."
                raise InvalidParams(reason=reason, param=param, given=value)
        if url is not None:
            await self.check_url(url)
        subscription, secret = await self.database.write(
            lambda connection: subscriptions.subscribe(
                connection, topic, name, queue=queue, url=url, filter=filter, attributes=attributes
            )
        )
        self.subscriptions_changed()
        if secret is not None:
            subscription.secret = secret_text(secret)
        return subscription

    async def unsubscribe(self, call: Call, subscription_id: str) -> dict[str, Any]:
        deleted = await subscriptions.unsubscribe(self.database, subscription_id)
        self.subscriptions_changed()
        return {"deleted_messages": deleted}

    async def list_subscriptions(self, call: Call, topic: str | None, limit: int, after: str | None) -> dict[str, Any]:
        after_number = _cursor_number(after)
        page, next_id = await self.database.read(
            lambda connection: subscriptions.list_by_id(connection, topic, limit, after_number, like=may_manage(call))
        )
        return {"subscriptions": page, "next": next_id}

    async def rotate_secret(self, call: Call, subscription_id: str) -> dict[str, Any]:
        secret = await self.database.write(lambda connection: subscriptions.rotate_secret(connection, subscription_id))
        self.subscriptions_changed()
        return {"secret": secret_text(secret)}

    async def publish(
        self,
        call: Call,
        topic: str,
        body: Raw,
        headers: dict[str, str],
        sender: str | None,
        delay: float | None,
        ttl: float | None,
        idempotency_key: str | None,
    ) -> dict[str, Any]:
        message = new_message(body, headers, sender_of(call, sender), delay, ttl, idempotency_key)
        try:
            published = await self.calls.publish(topic, message)
        except MessageTooLarge as error:
            raise too_large(error, body) from None
        self.published(published)
        return _enqueued(published.id, is_duplicate=published.is_duplicate) | {"deliveries": published.deliveries}

    def published(self, published: Published) -> None:
        """Count a message that was published, and let those know who wait for its copies."""
        if published.is_duplicate:
            self.metrics.duplicates.inc()
        else:
            self.metrics.published.inc()
        self._copied(published.news)

    def _copied(self, news: Sequence[News]) -> None:
        """Count copies, and let those know who wait for them."""
        self.metrics.enqueued.inc(sum(each.messages for each in news))
        for each in news:
            self.waiting.tell(each)

    async def broadcast(self, call: Call, topic: str) -> dict[str, Any]:
        given_out = await broadcasting.broadcast(self.database, topic)
        for news in given_out.news:
            self.tally.add(news.queue, ENQUEUED, news.messages)
        self._copied(given_out.news)
        return {"messages": given_out.messages, "deliveries": given_out.deliveries, "complete": given_out.complete}

    async def get_caller(self, call: Call) -> dict[str, Any]:
        caller = call.caller
        grant = EVERYTHING if caller is None else caller.grant
        return {
            "name": None if caller is None else caller.name,
            "auth_required": caller is not None,
            "send": grant.send,
            "receive": grant.receive,
            "manage": grant.manage,
            "admin": grant.admin,
        }

    async def get_server(self, call: Call) -> dict[str, Any]:
        facts = await self.database.read(durability.server_facts)
        return {
            "version": __version__,
            "uptime": round(time.monotonic() - self.started_at, 3),
            "postgresql_version": facts.version,
            "durability": facts.durability,
            "processes": self.settings.processes,
            "limits": limits_in_force(self.settings),
        }

    async def discover(self, call: Call) -> Mapping[str, Any]:
        return self.document


def sender_of(call: Call, sender: str | None) -> str | None:
    """Return who sends a message: the token's name, or who the caller says he is."""
    return sender if call.caller is None else call.caller.name


def may_manage(call: Call) -> list[str] | None:
    """Return the patterns of names that a caller may manage, None where he may manage all."""
    return None if call.caller is None else call.caller.like("manage")


def _cursor_number(after: str | None) -> int:
    """Return the number to continue behind. Raises InvalidParams."""
    number = -1 if after is None else message_number_of(after)
    if number is None:
        raise InvalidParams(reason="`after` must be the `next` of the page before.", param="after", given=after)
    return number


def _enqueued(number: int, *, is_duplicate: bool) -> dict[str, Any]:
    return {"message_id": message_id_of(number), "duplicate": is_duplicate}
