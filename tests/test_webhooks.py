"""Push, through brokers and to receivers on this machine that take messages, refuse them, or do neither.

Where a test is about what is tried again, pauses are short; where it is about what is not, they are long, the stored
times are moved, and brokers are given several looks to find nothing to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from typing import Any

import pytest
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from broker import draining, server, webhooks
from broker.endpoints import Endpoint
from broker.errors import BrokerError
from broker.server import Server
from broker.settings import Settings
from broker.storage.database import Connection
from broker.webhooks import pause_after
from conftest import Broker, StartBroker
from outside import eventually, without_database
from receiver import Behaviour, Pushed, Receiver, answering, receiving, resetting, saying, silent

LOOPBACK = ("127.0.0.0/8",)
LONG = 3600.0
# Nothing waits for so long but what hangs.
NEVER = 60.0


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let brokers look often, and stop without waiting for strangers' requests."""
    monkeypatch.setattr(draining, "QUIET_TIME", 0.02)
    monkeypatch.setattr(webhooks, "LOOK_SECONDS", 0.05)


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let messages be tried again at once, and endpoints that fail be probed all the time."""
    monkeypatch.setattr(webhooks, "FIRST_PAUSE_SECONDS", 0.005)
    monkeypatch.setattr(webhooks, "PROBE_SECONDS", 0.02)


@pytest.fixture
def start_pusher(start_broker: StartBroker) -> Callable[..., Any]:
    """Start brokers that push to this machine: `await start_pusher()`."""

    async def start(**more: Any) -> Broker:
        started: Broker = await start_broker(
            **{"webhook_allow": LOOPBACK, "sweep_interval": 0.05, "webhook_timeout": NEVER, **more}
        )
        return started

    return start


@pytest.fixture
async def broker(start_pusher: Callable[..., Any]) -> Broker:
    """A broker that pushes to this machine."""
    started: Broker = await start_pusher()
    return started


async def subscribe(broker: Broker, receiver: Receiver | str, topic: str = "t", **params: Any) -> dict[str, Any]:
    """Subscribe a receiver to a topic that is made where it is not there."""
    await broker.call("create_topic", topic=topic)
    url = receiver if isinstance(receiver, str) else receiver.url
    subscription: dict[str, Any] = await broker.call(
        "subscribe", topic=topic, url=url, **{"name": f"to-{url.rsplit(':', 1)[1].split('/')[0]}", **params}
    )
    return subscription


async def publish(broker: Broker, *bodies: Any, topic: str = "t") -> list[str]:
    """Publish messages; return the ids under which they were published."""
    published = [await broker.call("publish", topic=topic, body=body) for body in bodies]
    return [each["message_id"] for each in published]


async def all_messages(broker: Broker, queue: str) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = (await broker.call("list_messages", queue=queue, limit=1000))["messages"]
    return messages


async def emptied(broker: Broker, queue: str) -> None:
    """Wait until a queue has no messages."""

    async def is_empty() -> bool:
        return not await all_messages(broker, queue)

    await eventually(is_empty)


async def state_of(broker: Broker, subscription: dict[str, Any]) -> str:
    """Return the state of a subscription, as everybody sees it."""
    listed = (await broker.call("list_subscriptions", topic="t"))["subscriptions"]
    (state,) = (each["state"] for each in listed if each["subscription_id"] == subscription["subscription_id"])
    return str(state)


async def has_state(broker: Broker, subscription: dict[str, Any], state: str) -> None:
    async def is_so() -> bool:
        return await state_of(broker, subscription) == state

    await eventually(is_so)


def endpoint_of(broker: Broker) -> Endpoint:
    """Return what a broker knows of the one endpoint that there is."""
    (endpoint,) = broker.server.webhooks._endpoints.values()
    return endpoint


async def known(broker: Broker, condition: Callable[[Endpoint], bool]) -> None:
    """Wait until a broker knows something of the one endpoint that there is."""

    async def is_so() -> bool:
        return len(broker.server.webhooks._endpoints) == 1 and condition(endpoint_of(broker))

    await eventually(is_so)


async def looked(*brokers: Broker, times: int = 3) -> None:
    """Wait until each of these has looked at the subscriptions some times more, from beginning to end."""
    for broker in brokers:
        with counting_looks(broker) as looks:
            await eventually(partial(more_than, looks, times))


async def more_than(counted: list[None], times: int) -> bool:
    return len(counted) > times


@contextlib.contextmanager
def counting_looks(broker: Broker) -> Iterator[list[None]]:
    """Yield a list that grows with each look that a broker takes at the subscriptions."""
    looks: list[None] = []
    service = broker.server.webhooks
    look = service._look

    async def counted() -> None:
        await look()
        looks.append(None)

    service._look = counted  # type: ignore[method-assign]
    yield looks
    service._look = look  # type: ignore[method-assign]


async def at_rest(*brokers: Broker) -> None:
    """Wait until nothing is on its way."""

    async def is_so() -> bool:
        return not any(broker.server.webhooks.under_way for broker in brokers)

    await eventually(is_so)


async def make_ready(connection: Connection) -> None:
    """Let every pause be over: those of messages, of endpoints, and those between probes."""
    await connection.execute("UPDATE broker.messages SET visible_at = clock_timestamp()")
    await connection.execute(
        "UPDATE broker.subscriptions SET paused_until = NULL, probe_at = clock_timestamp() WHERE probe_at IS NOT NULL"
        " OR paused_until IS NOT NULL"
    )


def seconds_until(timestamp: str) -> float:
    return (datetime.fromisoformat(timestamp) - datetime.now(UTC)).total_seconds()


class Held:
    """A receiver's answer that a test holds back."""

    def __init__(self, then: Behaviour) -> None:
        self.release = asyncio.Event()
        self._then = then

    async def __call__(self, pushed: Pushed, writer: asyncio.StreamWriter) -> None:
        await self.release.wait()
        await self._then(pushed, writer)


# ---------------------------------------------------------------------------------------------------------- deliveries


async def test_a_copy_is_pushed_as_it_was_published_under_its_own_id_signed_and_then_deleted(broker: Broker) -> None:
    async with receiving() as receiver:
        subscription = await subscribe(broker, receiver)
        body = b'{"jsonrpc":"2.0","id":1,"method":"publish","params":{"topic":"t","body":{ "a" : 1.0,"a":"\\u0000" }}}'
        status, _ = await broker.post(body)
        assert status == 200
        (pushed,) = await receiver.received(1)
        await emptied(broker, subscription["queue"])
    assert pushed.body == b'{ "a" : 1.0,"a":"\\u0000" }'
    assert pushed.headers["content-type"] == "application/json"
    Webhook(subscription["secret"]).verify(pushed.body, pushed.headers, json_parse=False)
    with pytest.raises(WebhookVerificationError):
        Webhook(subscription["secret"]).verify(pushed.body + b" ", pushed.headers, json_parse=False)


async def test_every_subscriber_gets_every_message_once(broker: Broker) -> None:
    async with receiving() as one, receiving() as other:
        queues = [(await subscribe(broker, each))["queue"] for each in (one, other)]
        await publish(broker, *range(200))
        for receiver in (one, other):
            assert sorted(pushed.json for pushed in await receiver.received(200)) == list(range(200))
        for queue in queues:
            await emptied(broker, queue)
        ids = [pushed.message_id for receiver in (one, other) for pushed in receiver.requests]
        assert len(set(ids)) == len(ids) == 400


async def test_two_brokers_share_one_subscription_and_push_nothing_twice(start_pusher: Callable[..., Any]) -> None:
    async def slowly(pushed: Pushed, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.005)
        await answering(204)(pushed, writer)

    brokers = [await start_pusher(webhook_concurrency=4) for _ in range(2)]
    async with receiving(slowly) as receiver:
        queue = (await subscribe(brokers[0], receiver))["queue"]
        for broker in brokers:
            await known(broker, lambda endpoint: endpoint.consumer is not None)
        await asyncio.gather(*(publish(brokers[n % 2], *range(n, 400, 8)) for n in range(8)))
        await receiver.received(400)
        await emptied(brokers[0], queue)
        assert sorted(pushed.json for pushed in receiver.requests) == list(range(400))
        assert receiver.most_at_once <= 8
    for broker in brokers:
        assert "delivered" in {each.labels["outcome"] for each in pushes(broker)}, "each has done some of it"


def pushes(broker: Broker) -> list[Any]:
    (family,) = broker.server.metrics.pushes.collect()
    return [each for each in family.samples if each.name.endswith("_total") and each.value]


async def test_no_more_are_on_their_way_than_the_limit_says_and_it_is_reached(
    start_pusher: Callable[..., Any],
) -> None:
    broker = await start_pusher(webhook_concurrency=5)
    held = Held(answering(204))
    async with receiving() as receiver:
        await subscribe(broker, receiver)
        await publish(broker, *range(20))
        await receiver.received(20)
        await at_rest(broker)
        receiver.behave = held
        await publish(broker, *range(20))
        await receiver.received(25)
        await looked(broker)
        assert (receiver.answering, endpoint_of(broker).sent, endpoint_of(broker).places) == (5, 5, 5)
        held.release.set()
        await receiver.received(40)
        assert receiver.most_at_once == 5


async def test_a_new_endpoint_is_sent_few_messages_until_it_has_taken_some(broker: Broker) -> None:
    held = Held(answering(204))
    async with receiving(held) as receiver:
        await subscribe(broker, receiver)
        await publish(broker, *range(50))
        await receiver.received(2)
        await looked(broker)
        assert len(receiver.requests) == 2
        held.release.set()
        await receiver.received(50)
        await at_rest(broker)
        receiver.behave = silent
        await publish(broker, *range(50))
        await receiver.received(50 + 50)


async def test_consumers_of_the_broker_s_own_take_no_place_from_its_clients(start_pusher: Callable[..., Any]) -> None:
    broker = await start_pusher(max_waiting_consumers=1)
    async with receiving() as receiver:
        for name in "abc":
            await subscribe(broker, receiver, name=name)
        await eventually(lambda: has_consumers(broker, 3))
        assert await broker.call("dequeue", wait=0.1) == {"messages": []}
        assert broker.server.waiting.waiting == 0


async def has_consumers(broker: Broker, count: int) -> bool:
    return sum(each.consumer is not None for each in broker.server.webhooks._endpoints.values()) == count


async def test_an_unsubscribed_url_is_left_alone_by_every_broker(start_pusher: Callable[..., Any]) -> None:
    brokers = [await start_pusher() for _ in range(2)]
    async with receiving() as receiver:
        subscription = await subscribe(brokers[0], receiver)
        for broker in brokers:
            await eventually(partial(has_consumers, broker, 1))
        consumers = [endpoint_of(broker).consumer for broker in brokers]
        await brokers[0].call("unsubscribe", subscription_id=subscription["subscription_id"])
        for broker in brokers:
            await eventually(partial(has_consumers, broker, 0))
        for consumer in consumers:
            assert consumer is not None
            await asyncio.wait_for(asyncio.wait({consumer}), NEVER)
        assert not receiver.requests


async def test_after_a_rotation_either_secret_fits_and_after_a_day_the_new_one_alone(
    broker: Broker, connection: Connection
) -> None:
    async with receiving() as receiver:
        subscription = await subscribe(broker, receiver)
        old = subscription["secret"]
        new = (await broker.call("rotate_secret", subscription_id=subscription["subscription_id"]))["secret"]
        await known(broker, lambda endpoint: len(endpoint.target.secrets) == 2)
        await publish(broker, 1)
        (pushed,) = await receiver.received(1)
        assert pushed.headers["webhook-signature"].count("v1,") == 2
        for secret in (old, new):
            Webhook(secret).verify(pushed.body, pushed.headers)
        await connection.execute(
            "UPDATE broker.subscription_secrets SET ends_at = now() + (ends_at - now()) - interval '24 hours'"
            " WHERE ends_at < 'infinity'"
        )
        await known(broker, lambda endpoint: len(endpoint.target.secrets) == 1)
        await publish(broker, 2)
        _, pushed = await receiver.received(2)
        Webhook(new).verify(pushed.body, pushed.headers)
        with pytest.raises(WebhookVerificationError):
            Webhook(old).verify(pushed.body, pushed.headers)


# ------------------------------------------------------------------------------------------------------------ failures


BAD: dict[str, Behaviour] = {
    "500": answering(500),
    "404": answering(404),
    "a redirect": answering(302, Location="http://127.0.0.1/"),
    "garbage": saying(b"\x16\x03\x01 garbage\r\n\r\n", then_close=True),
    "half an answer and a reset": resetting(b"HTTP/1.1 200 OK\r\nContent-Le"),
    "a reset": resetting(),
    "nothing at all, or a minute later": silent,
}


@pytest.mark.parametrize("behave", BAD.values(), ids=BAD)
@pytest.mark.usefixtures("short_pauses")
async def test_what_is_not_taken_is_tried_until_its_deliveries_are_used_up_and_others_get_theirs(
    start_pusher: Callable[..., Any], behave: Behaviour
) -> None:
    broker = await start_pusher(webhook_timeout=0.3)
    await broker.call("create_queue", queue="dead")
    async with receiving(behave) as bad, receiving() as good:
        subscription = await subscribe(broker, bad, max_receives=2, dead_letter_queue="dead")
        await subscribe(broker, good)
        await publish(broker, "a", "b")
        await good.received(2)
        await eventually(lambda: has_messages(broker, "dead", 2))
        await at_rest(broker)
        attempts = Counter(pushed.message_id for pushed in bad.requests)
        dead = await all_messages(broker, "dead")
        assert attempts == {each["message_id"]: 2 for each in dead}
        for each in dead:
            letter = each["dead_letter"]
            assert (letter["source_queue"], letter["reason"]) == (subscription["queue"], "max_receives")
            assert letter["receive_count"] == 2
        assert await all_messages(broker, subscription["queue"]) == []


async def has_messages(broker: Broker, queue: str, count: int) -> bool:
    return len(await all_messages(broker, queue)) == count


@pytest.mark.parametrize("behave", BAD.values(), ids=BAD)
@pytest.mark.usefixtures("short_pauses")
async def test_what_an_endpoint_does_not_take_at_first_it_gets_later(
    start_pusher: Callable[..., Any], behave: Behaviour
) -> None:
    broker = await start_pusher(webhook_timeout=0.3)

    async def at_first(pushed: Pushed, writer: asyncio.StreamWriter) -> None:
        attempts = sum(each.message_id == pushed.message_id for each in receiver.requests)
        await (behave if attempts < 3 else answering(200))(pushed, writer)

    async with receiving(at_first) as receiver:
        subscription = await subscribe(broker, receiver)
        await publish(broker, "a", "b")
        await emptied(broker, subscription["queue"])
        assert sorted(Counter(pushed.json for pushed in receiver.requests).items()) == [("a", 3), ("b", 3)]
        for pushed in receiver.requests:
            Webhook(subscription["secret"]).verify(pushed.body, pushed.headers)
        await has_state(broker, subscription, "active")


async def test_a_redirect_to_a_private_address_is_not_followed(broker: Broker) -> None:
    async with receiving() as private, receiving(answering(307, Location=private.url)) as receiver:
        await subscribe(broker, receiver)
        await publish(broker, 1)
        await receiver.received(1)
        await at_rest(broker)
        assert private.connections == 0


async def test_a_message_that_was_refused_is_held_back_in_the_database_for_a_second_about(broker: Broker) -> None:
    async with receiving(answering(500)) as receiver:
        subscription = await subscribe(broker, receiver)
        await publish(broker, 1)
        await receiver.received(1)
        await at_rest(broker)
        (message,) = await all_messages(broker, subscription["queue"])
        assert (message["receive_count"], message["status"]) == (1, "leased")
        assert seconds_until(message["visible_at"]) <= 1.5


async def test_after_its_last_delivery_a_message_is_a_dead_letter_at_once(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the endpoint asked to be left alone for an hour."""
    monkeypatch.setattr(webhooks, "FIRST_PAUSE_SECONDS", LONG)
    await broker.call("create_queue", queue="dead")
    for number, behave in enumerate((answering(500), answering(503, Retry_After="3600"))):
        async with receiving(behave) as receiver:
            await subscribe(broker, receiver, topic=str(number), max_receives=1, dead_letter_queue="dead")
            await publish(broker, 1, topic=str(number))
            await eventually(partial(has_messages, broker, "dead", number + 1))
            assert len(receiver.requests) == 1


def test_pauses_double_from_a_second_to_an_hour_and_vary_by_half() -> None:
    for receive_count in range(1, 1001):
        pauses = [pause_after(receive_count) for _ in range(50)]
        middle = 2.0 ** min(receive_count - 1, 30)
        assert all(min(0.5 * middle, 3600.0) <= pause <= min(1.5 * middle, 3600.0) for pause in pauses)
        assert receive_count > 12 or len(set(pauses)) > 10


def in_an_hour() -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=LONG), usegmt=True)


@pytest.mark.parametrize("form", [lambda: "3600", in_an_hour], ids=["seconds", "date"])
@pytest.mark.parametrize("status", [429, 503])
async def test_an_endpoint_that_asks_for_patience_is_left_alone_by_every_broker_for_so_long(
    start_pusher: Callable[..., Any], connection: Connection, status: int, form: Callable[[], str]
) -> None:
    brokers = [await start_pusher() for _ in range(2)]
    async with receiving(answering(status, Retry_After=form())) as receiver:
        subscription = await subscribe(brokers[0], receiver)
        await publish(brokers[0], 1)
        await receiver.received(1)
        await at_rest(*brokers)
        loop = asyncio.get_running_loop()
        for broker in brokers:
            await known(broker, lambda endpoint: endpoint.paused_until > loop.time() + LONG - 100)
            assert endpoint_of(broker).consumer is None
        (message,) = await all_messages(brokers[0], subscription["queue"])
        assert LONG - 100 < seconds_until(message["visible_at"]) <= LONG
        await publish(brokers[1], 2)
        await looked(*brokers)
        assert len(receiver.requests) == 1
        receiver.behave = answering(204)
        await make_ready(connection)
        await emptied(brokers[0], subscription["queue"])
        assert sorted(pushed.json for pushed in receiver.requests) == [1, 1, 2]


async def test_a_short_patience_ends_on_time_though_nobody_looks(
    start_pusher: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = await start_pusher()

    async def once(pushed: Pushed, writer: asyncio.StreamWriter) -> None:
        await answering(503 if len(receiver.requests) == 1 else 204, Retry_After="1")(pushed, writer)

    async with receiving(once) as receiver:
        await subscribe(broker, receiver)
        await known(broker, lambda endpoint: endpoint.consumer is not None)
        monkeypatch.setattr(webhooks, "LOOK_SECONDS", NEVER)
        await looked(broker, times=0)
        await publish(broker, 1)
        first, second = await receiver.received(2)
        assert second.at - first.at >= 0.99


async def test_410_ends_the_subscription_and_what_is_left_becomes_dead_letters(
    start_pusher: Callable[..., Any],
) -> None:
    brokers = [await start_pusher(webhook_concurrency=1) for _ in range(2)]
    await brokers[0].call("create_queue", queue="dead")
    async with receiving(answering(410)) as receiver:
        subscription = await subscribe(brokers[0], receiver, dead_letter_queue="dead")
        # Or the first answer would come before the last copy was made.
        await brokers[0].call("update_queue", queue=subscription["queue"], paused=True)
        await publish(brokers[0], *range(10))
        await brokers[0].call("update_queue", queue=subscription["queue"], paused=False)
        await has_state(brokers[1], subscription, "ended")
        await eventually(lambda: has_messages(brokers[0], "dead", 10))
        dead = await all_messages(brokers[0], "dead")
        assert {each["dead_letter"]["reason"] for each in dead} == {"subscription_ended"}
        for broker in brokers:
            await eventually(partial(has_consumers, broker, 0))
        sent = len(receiver.requests)
        assert sent <= 4, "each broker had two on their way at most"
        assert (await brokers[0].call("publish", topic="t", body=1))["deliveries"] == 0
        await looked(*brokers)
        assert len(receiver.requests) == sent


async def test_an_endpoint_that_fails_is_probed_by_one_broker_with_one_message_until_it_takes_one(
    start_pusher: Callable[..., Any], connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Probes are an hour apart; each time the hour is moved to its end."""
    monkeypatch.setattr(webhooks, "PROBE_SECONDS", LONG)
    monkeypatch.setattr(webhooks, "FIRST_PAUSE_SECONDS", LONG)
    brokers = [await start_pusher() for _ in range(2)]
    async with receiving(answering(500)) as receiver:
        subscription = await subscribe(brokers[0], receiver)
        await publish(brokers[0], *range(30))
        await has_state(brokers[0], subscription, "failing")
        for broker in brokers:
            await known(broker, lambda endpoint: endpoint.is_failing)
        await at_rest(*brokers)
        for _ in range(3):
            before = len(receiver.requests)
            await looked(*brokers)
            assert len(receiver.requests) == before, "nobody tries it between the probes"
            await make_ready(connection)
            await receiver.received(before + 1)
            await at_rest(*brokers)
            await looked(*brokers)
            assert len(receiver.requests) == before + 1
        assert await state_of(brokers[1], subscription) == "failing"
        text = await metrics_of(brokers[1])
        assert 'wonderq_subscriptions{state="failing"} 1.0' in text
        receiver.behave = answering(204)
        await make_ready(connection)
        await has_state(brokers[0], subscription, "active")
        await make_ready(connection)
        await emptied(brokers[0], subscription["queue"])
        assert {pushed.json for pushed in receiver.requests} == set(range(30))


async def metrics_of(broker: Broker) -> str:
    async with broker.http.get(f"{broker.url}/metrics") as response:
        return await response.text()


async def test_an_endpoint_that_fails_is_left_alone_where_it_has_no_message(
    start_pusher: Callable[..., Any], connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "PROBE_SECONDS", 0.01)
    broker = await start_pusher()
    async with receiving() as receiver:
        subscription = await subscribe(broker, receiver)
        await connection.execute("UPDATE broker.subscriptions SET state = 'failing', probe_at = now()")
        await known(broker, lambda endpoint: endpoint.is_failing)
        await looked(broker, times=10)
        assert not receiver.connections
        await publish(broker, 1)
        await receiver.received(1)
        await has_state(broker, subscription, "active")


@pytest.mark.usefixtures("short_pauses")
async def test_a_success_between_failures_keeps_an_endpoint_active(broker: Broker) -> None:
    async def now_and_then(pushed: Pushed, writer: asyncio.StreamWriter) -> None:
        await answering(204 if len(receiver.requests) % 5 == 0 else 500)(pushed, writer)

    async with receiving(now_and_then) as receiver:
        subscription = await subscribe(broker, receiver, max_receives=1000)
        await known(broker, lambda endpoint: endpoint.consumer is not None)
        endpoint_of(broker).at_once = 1
        for number in range(5):
            await publish(broker, number)
            await receiver.received(5 * number + 5)
            await emptied(broker, subscription["queue"])
        assert endpoint_of(broker).failures_in_a_row == 0
        assert await state_of(broker, subscription) == "active"


# -------------------------------------------------------------------------------------------------- what may be reached


async def test_a_url_that_may_not_be_reached_is_refused_and_nobody_connects(start_broker: StartBroker) -> None:
    broker: Broker = await start_broker()
    await broker.call("create_topic", topic="t")
    async with receiving() as receiver:
        for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "2130706433"):
            for scheme in ("http", "https"):
                url = f"{scheme}://{host}:{receiver.port}/"
                error = await broker.error("subscribe", topic="t", name="a", url=url)
                assert (error["code"], error["data"]["param"]) == (-32602, "url"), url
        assert receiver.connections == 0
    assert (await broker.call("list_subscriptions", topic="t"))["subscriptions"] == []


@pytest.mark.usefixtures("short_pauses")
async def test_a_host_that_moves_to_a_private_address_gets_no_connection_and_its_messages_are_dead_letters(
    start_pusher: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses = ["127.0.0.7"]
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **options: Any) -> Any:
        return real(addresses[-1] if host == "moving.test" else host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    broker = await start_pusher(webhook_allow=("127.0.0.7/32",))
    await broker.call("create_queue", queue="dead")
    async with receiving() as receiver:
        url = f"http://moving.test:{receiver.port}/"
        await subscribe(broker, url, max_receives=2, dead_letter_queue="dead")
        addresses.append("127.0.0.1")
        await publish(broker, 1)
        await eventually(lambda: has_messages(broker, "dead", 1))
        assert receiver.connections == 0
    assert {each.labels["outcome"] for each in pushes(broker)} == {"forbidden"}


@pytest.mark.usefixtures("short_pauses")
async def test_a_url_that_cannot_be_read_any_more_holds_up_no_other(
    start_pusher: Callable[..., Any], connection: Connection
) -> None:
    first = await start_pusher()
    first.server.webhooks.stop_taking()
    async with receiving() as receiver:
        subscription = await subscribe(first, receiver, name="spoilt")
        await connection.execute("UPDATE broker.subscriptions SET url = 'http://[::1'")
        await subscribe(first, receiver)
        await start_pusher()
        await publish(first, 1)
        await receiver.received(1)
        await has_state(first, subscription, "failing")


# ------------------------------------------------------------------------------------------------------- dead endpoints


async def test_endpoints_that_answer_no_more_leave_places_for_the_others(start_pusher: Callable[..., Any]) -> None:
    """Each of them has been quick, and so been given many places, when it begins to hang; nothing here ends a push."""
    broker = await start_pusher(webhook_total=32)
    async with contextlib.AsyncExitStack() as stack:
        dead = [await stack.enter_async_context(receiving()) for _ in range(3)]
        for receiver in dead:
            await subscribe(broker, receiver, topic="dead")
        await publish(broker, *range(40), topic="dead")
        for receiver in dead:
            await receiver.received(40)
        await at_rest(broker)
        for receiver in dead:
            receiver.behave = silent
        for number in range(40):
            await publish(broker, number, topic="dead")
        for receiver in dead:
            await receiver.received(42)
        await looked(broker)
        assert broker.server.webhooks._places.taken >= 16, "they have taken what they could"
        healthy = await stack.enter_async_context(receiving())
        subscription = await subscribe(broker, healthy)
        await publish(broker, *range(100))
        await healthy.received(100)
        await emptied(broker, subscription["queue"])
        for receiver in dead:
            assert receiver.answering == len(receiver.requests) - 40 > 0, "it still hangs"


async def test_any_number_of_endpoints_that_fail_take_no_place_at_all(
    start_pusher: Callable[..., Any], connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "PROBES", 2)
    monkeypatch.setattr(webhooks, "PROBE_SECONDS", 0.01)
    broker = await start_pusher(webhook_total=1)
    async with receiving(silent) as dead, receiving() as healthy:
        for number in range(10):
            await subscribe(broker, dead, topic="dead", name=str(number))
        await connection.execute("UPDATE broker.subscriptions SET state = 'failing', probe_at = now()")
        await eventually(lambda: has_consumers(broker, 0))
        await publish(broker, 1, topic="dead")
        await dead.received(2)
        subscription = await subscribe(broker, healthy)
        await publish(broker, *range(50))
        await healthy.received(50)
        await emptied(broker, subscription["queue"])
        assert dead.answering == len(dead.requests) == 2, "the probes hang, and no more than may be"


async def test_a_message_that_finds_no_place_in_time_is_given_back_uncounted(
    start_pusher: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "PATIENCE_SECONDS", 0.05)
    broker = await start_pusher(webhook_total=1)
    held = Held(answering(204))
    async with receiving(held) as slow, receiving() as other:
        await subscribe(broker, slow, topic="slow")
        await publish(broker, 1, topic="slow")
        await slow.received(1)
        given_back: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        give_back_soon = broker.server.webhooks._give_back_soon

        def watch(queue: str, delivery: Any) -> None:
            give_back_soon(queue, delivery)
            if delivery.leases and not given_back.done():
                given_back.set_result(queue)

        broker.server.webhooks._give_back_soon = watch
        subscription = await subscribe(broker, other)
        await publish(broker, 2)
        assert await asyncio.wait_for(given_back, NEVER) == subscription["queue"]
        held.release.set()
        (pushed,) = await other.received(1)
        await emptied(broker, subscription["queue"])
        assert pushed.json == 2


# -------------------------------------------------------------------------------------------- stopping and the database


async def test_a_broker_that_stops_lets_what_is_on_its_way_arrive_and_takes_nothing_new(
    database_url: str, connection: Connection, start_pusher: Callable[..., Any]
) -> None:
    held = Held(answering(204))
    settings = replace(Settings(host="127.0.0.1", port=0), webhook_allow=LOOPBACK, webhook_timeout=NEVER)
    other = await start_pusher(webhook_allow=())
    other.server.webhooks.stop_taking()
    async with receiving(held) as receiver:
        stopping = await Server(database_url, settings).__aenter__()
        created = await subscribe(Broker(stopping.url, stopping, other.http), receiver)
        await publish(other, *range(50))
        await receiver.received(2)
        leaving = asyncio.create_task(stopping.__aexit__())
        await eventually(partial(is_draining, stopping))
        await publish(other, 50)
        held.release.set()
        await leaving
        assert len(receiver.requests) == 2
        left = await all_messages(other, created["queue"])
        assert len(left) == 49
        assert {(each["status"], each["receive_count"]) for each in left} == {("ready", 0)}


async def is_draining(stopping: Server) -> bool:
    return stopping.runner.is_draining


async def test_what_a_stopped_broker_had_no_answer_to_is_pushed_by_the_next_at_once(
    database_url: str, start_pusher: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "PUSH_SECONDS", 0.1)
    settings = replace(Settings(host="127.0.0.1", port=0), webhook_allow=LOOPBACK, webhook_timeout=NEVER)
    next_one = await start_pusher()
    next_one.server.webhooks.stop_taking()
    async with receiving(silent) as receiver:
        async with Server(database_url, settings) as first:
            created = await subscribe(Broker(first.url, first, next_one.http), receiver, max_receives=1)
            await publish(next_one, "a")
            await receiver.received(1)
        (message,) = await all_messages(next_one, created["queue"])
        assert (message["status"], message["receive_count"]) == ("ready", 0), "it was not the endpoint's fault"
        receiver.behave = answering(204)
        next_one.server.webhooks._is_stopping = False
        next_one.server.webhooks.changed()
        await receiver.received(2)
        await emptied(next_one, created["queue"])
        assert len({pushed.message_id for pushed in receiver.requests}) == 1


async def test_what_was_taken_while_the_database_was_away_is_deleted_when_it_is_back_and_pushed_once(
    start_pusher: Callable[..., Any], test_server: str, database_url: str
) -> None:
    broker = await start_pusher(request_timeout=0.5)
    held = Held(answering(204))
    async with receiving(held) as receiver:
        subscription = await subscribe(broker, receiver)
        await publish(broker, 1)
        await receiver.received(1)
        has_failed = asyncio.Event()
        delete = broker.server.calls.delete

        async def watched(held: Any) -> Any:
            try:
                return await delete(held)
            except BrokerError:
                has_failed.set()
                raise

        broker.server.calls.delete = watched
        with without_database(test_server, database_url):
            held.release.set()
            await asyncio.wait_for(has_failed.wait(), NEVER)
        await emptied(broker, subscription["queue"])
        await publish(broker, 2)
        await receiver.received(2)
        await emptied(broker, subscription["queue"])
        assert [pushed.json for pushed in receiver.requests] == [1, 2]


# --------------------------------------------------------------------------------------------------- what is said of it


async def test_metrics_count_pushes_by_their_outcome_and_subscriptions_by_state(broker: Broker) -> None:
    outcomes = iter([answering(500), answering(204)])

    async def behave(pushed: Pushed, writer: asyncio.StreamWriter) -> None:
        await next(outcomes)(pushed, writer)

    async with receiving(behave) as receiver:
        subscription = await subscribe(broker, receiver)
        await publish(broker, 1)
        await emptied(broker, subscription["queue"])
        text = await metrics_of(broker)
    for line in (
        'wonderq_pushes_total{outcome="refused"} 1.0',
        'wonderq_pushes_total{outcome="delivered"} 1.0',
        "wonderq_push_seconds_count 2.0",
        "wonderq_pushes_under_way 0.0",
        "wonderq_messages_delivered_total 2.0",
        "wonderq_messages_deleted_total 1.0",
        'wonderq_subscriptions{state="active"} 1.0',
    ):
        assert line in text.splitlines(), line


@pytest.mark.usefixtures("short_pauses")
async def test_the_log_tells_nothing_of_urls_but_their_hosts_and_nothing_of_bodies_and_answers(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with receiving(answering(500, b"the-answer")) as receiver:
        url = f"{receiver.url}/the-path?key=the-key"
        subscription = await subscribe(broker, url, name="a", max_receives=10)
        await publish(broker, "the-body")
        await has_state(broker, subscription, "failing")
        receiver.behave = answering(410, b"the-answer")
        await has_state(broker, subscription, "ended")
    said = [record.getMessage() for record in caplog.records if record.name.startswith("broker")]
    assert any("host=127.0.0.1" in line for line in said)
    for word in ("the-path", "the-key", "the-body", "the-answer", subscription["secret"]):
        assert not any(word in line for line in said), word
