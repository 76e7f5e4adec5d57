"""Whether a caller may do what he asks for: the one place where that is decided.

What a method needs stands in the schema: a verb (`x-permission`), and the params that name what it is needed for
(`x-permission-on`). A param that is null names nothing. What stands for a queue or a topic is followed to its name: a
receipt to the queue it is of, a subscription to its topic.

Promises. Nothing is told of what the caller may not know: a name is refused whether or not there is anything behind
it, and so is a receipt; a subscription of a topic that he may not manage is not found; errors name nothing but what
he has named, or may use. Lists are not refused but show what he may manage: see `methods`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Mapping
from typing import Any, NoReturn

import msgspec

from broker.auth import Caller
from broker.errors import BrokerError, Forbidden, SubscriptionNotFound, forbidden_receipt
from broker.model import lease_of
from broker.rpc import Call
from broker.schema import MethodSchema
from broker.storage import queues, subscriptions
from broker.storage.database import Database

VERBS = ("send", "receive", "manage")
# Names of queues by their ids, which never change.
MOST_QUEUES = 10_000


class Permissions:
    """Decides, with what the database knows of receipts and subscriptions."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._queue_names: dict[int, str] = {}

    def permit(self, call: Call, schema: MethodSchema, params: Mapping[str, Any]) -> Awaitable[None] | None:
        """Return None where the caller may carry out this call, or what is to be awaited first.

        Raises Forbidden; what is awaited SubscriptionNotFound, too.
        """
        caller, verb = call.caller, schema.permission
        if caller is None or verb == "free":
            return None
        if len(schema.permission_on) == 1:  # As nearly all calls have it: nothing to be looked up.
            (param,) = schema.permission_on
            value = params[param]
            if param in ("queue", "topic") and type(value) is str and caller.may(verb, value):
                return None
            if param == "receipt" and self._is_of_known_queue(caller, verb, value):
                return None
        return self._look(caller, verb, call, schema, params)

    def _is_of_known_queue(self, caller: Caller, verb: str, receipt: str) -> bool:
        """Whether a receipt is of a queue whose name is known, and that the caller may use."""
        try:
            name = self._queue_names.get(lease_of(receipt).queue_id)
        except BrokerError:
            return False
        return name is not None and caller.may(verb, name)

    async def _look(
        self, caller: Caller, verb: str, call: Call, schema: MethodSchema, params: Mapping[str, Any]
    ) -> None:
        named = {name: params[name] for name in schema.permission_on if params[name] not in (None, msgspec.UNSET)}
        if "admin" in (verb, None if named else schema.permission_null):
            if not caller.is_admin:
                _forbid("admin", None)
            return
        for param, value in named.items():
            match param:
                case "receipt":
                    await self._permit_receipt(caller, verb, value)
                case "receipts":
                    call.barred_queues = await self._barred(caller, verb, value)
                case "subscription_id":
                    await self._permit_subscription(caller, verb, value)
                case _:
                    if not caller.may(verb, value):
                        _forbid(verb, value)

    async def _permit_receipt(self, caller: Caller, verb: str, receipt: str) -> None:
        try:
            queue_id = lease_of(receipt).queue_id
        except BrokerError:
            return  # the method says what is wrong with it
        if await self._barred_queues(caller, verb, {queue_id}):
            _forbid(verb, None)

    async def _barred(self, caller: Caller, verb: str, receipts: Iterable[str]) -> frozenset[int]:
        ids = set()
        for receipt in receipts:
            try:
                ids.add(lease_of(receipt).queue_id)
            except BrokerError:
                continue
        return await self._barred_queues(caller, verb, ids)

    async def _barred_queues(self, caller: Caller, verb: str, ids: set[int]) -> frozenset[int]:
        """Return those of these queues that the verb is not permitted for; one that nobody knows has no name."""
        unknown = [queue_id for queue_id in ids if queue_id not in self._queue_names]
        if unknown:
            found = await self._database.read(lambda connection: queues.names_of(connection, unknown))
            if len(self._queue_names) > MOST_QUEUES:
                self._queue_names.clear()
            self._queue_names.update(found)
        return frozenset(each for each in ids if not caller.may(verb, self._queue_names.get(each, "")))

    async def _permit_subscription(self, caller: Caller, verb: str, subscription_id: str) -> None:
        topic = await self._database.read(lambda connection: subscriptions.topic_of(connection, subscription_id))
        if topic is None or not caller.may(verb, topic):
            raise SubscriptionNotFound(subscription_id=subscription_id)


def conceal(caller: Caller, params: Mapping[str, Any], error: BrokerError) -> BrokerError:
    """Return an error that names no queue and no topic but those that the caller has named, or may use.

    What he publishes goes to queues, and what he deletes is used by queues and topics, of which he need not know.
    """
    named, senders = error.extra.get("queue"), error.extra.get("senders", ())
    unknown = [each for each in (named, *senders) if each is not None and not _may_know(caller, params, each)]
    if not unknown:
        return error
    told = {"queue": "of a subscription" if named in unknown else named}
    if senders:
        told["reason"] = "something sends to it that the token does not permit to see"
    return type(error)(outcome=error.outcome, index=error.index, counted_as=error.counted_as, **error.extra | told)


def _may_know(caller: Caller, params: Mapping[str, Any], name: str) -> bool:
    return name in params.values() or any(caller.may(verb, name) for verb in VERBS)


def _forbid(permission: str, name: str | None) -> NoReturn:
    if permission == "admin":
        reason = "The token does not permit `admin`; use one that was made with --admin"
        raise Forbidden(reason=reason, permission=permission)
    if name is None:
        raise forbidden_receipt(permission)
    reason = f"The token does not permit `{permission}` for {name}; use one that was made with --{permission} for it"
    raise Forbidden(reason=reason, permission=permission, name=name)
