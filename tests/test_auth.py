"""Who has a token may do what it permits, and nobody else anything.

The expectations are the contract's, method by method, and not read from the schema: what the schema says is compared
with them.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from typing import Any

import pytest

from broker import auth
from broker.auth import Auth
from broker.credentials import is_pattern, like, matches, new_token, read_token
from broker.errors import Unavailable
from broker.schema import SchemaError, compile_methods, load_document
from broker.storage import subscriptions, tokens
from broker.storage.database import Connection
from broker.storage.tokens import Grant, TooManyTokens
from conftest import Broker, StartBroker

SEND, RECEIVE, MANAGE, ADMIN, FREE = "send", "receive", "manage", "admin", "free"

# What the contract asks for, and the params that name what it is asked for.
CONTRACT: dict[str, tuple[str, dict[str, Any]]] = {
    "enqueue": (SEND, {"queue": "{}", "body": 1}),
    "enqueue_batch": (SEND, {"queue": "{}", "messages": [{"body": 1}]}),
    "dequeue": (RECEIVE, {"queue": "{}"}),
    "delete": (RECEIVE, {"receipt": "receipt of {}"}),
    "delete_batch": (RECEIVE, {"receipts": ["receipt of {}"]}),
    "extend_visibility": (RECEIVE, {"receipt": "receipt of {}", "visibility_timeout": 30}),
    "extend_visibility_batch": (RECEIVE, {"receipts": ["receipt of {}"], "visibility_timeout": 30}),
    "create_queue": (MANAGE, {"queue": "{}"}),
    "update_queue": (MANAGE, {"queue": "{}", "delay": 0}),
    "get_queue": (MANAGE, {"queue": "{}"}),
    "purge_queue": (MANAGE, {"queue": "{}.empty"}),
    "delete_queue": (MANAGE, {"queue": "{}.gone"}),
    "count_messages": (MANAGE, {"queue": "{}"}),
    "get_stats": (MANAGE, {"queue": "{}"}),
    "list_messages": (MANAGE, {"queue": "{}"}),
    "get_message": (MANAGE, {"queue": "{}", "message_id": "0000000000000001"}),
    "update_message": (MANAGE, {"queue": "{}", "message_id": "0000000000000001", "headers": {"a": "b"}}),
    "delete_message": (MANAGE, {"queue": "{}", "message_id": "7fffffffffffffff"}),
    "redrive": (MANAGE, {"queue": "{}"}),
    "create_topic": (MANAGE, {"topic": "{}"}),
    "delete_topic": (MANAGE, {"topic": "{}.gone"}),
    "subscribe": (MANAGE, {"topic": "{}", "name": "again", "queue": "{}"}),
    "rotate_secret": (MANAGE, {"subscription_id": "subscription of {}"}),
    "unsubscribe": (MANAGE, {"subscription_id": "subscription of {}"}),
    "list_subscriptions": (MANAGE, {"topic": "{}"}),
    "publish": (SEND, {"topic": "{}", "body": 1}),
    "broadcast": (MANAGE, {"topic": "{}"}),
    "get_caller": (FREE, {}),
    "get_server": (ADMIN, {}),
    "rpc.discover": (FREE, {}),
    # Lists show what may be managed, and are refused to nobody.
    "list_queues": (FREE, {}),
    "list_topics": (FREE, {}),
}
KINDS = (SEND, RECEIVE, MANAGE, ADMIN, "none")
OWN, OTHER = "own.things", "others.things"
EVERYTHING = Grant(["*"], ["*"], ["*"], admin=True)


class World:
    """A broker that asks for tokens, with queues, topics and messages under two names."""

    def __init__(self, broker: Broker, connection: Connection) -> None:
        self.broker = broker
        self.connection = connection
        self._tokens: dict[str, str] = {}
        self.receipts: dict[str, str] = {}
        self.subscriptions: dict[str, str] = {}

    async def token(self, name: str, grant: Grant) -> str:
        if name not in self._tokens:
            self._tokens[name] = await tokens.create(self.connection, name, grant, None)
            await self.broker.server.auth.refresh()
        return self._tokens[name]

    async def of_kind(self, kind: str) -> str:
        """Return a token that permits one thing, for names that begin with own."""
        patterns = {verb: ["own.*"] if verb == kind else [] for verb in (SEND, RECEIVE, MANAGE)}
        return await self.token(f"only-{kind}", Grant(**patterns, admin=kind == ADMIN))

    async def answer(self, token: str | None, method: str, /, **params: Any) -> dict[str, Any]:
        return await answer(self.broker, token, method, **params)

    @property
    def boss_token(self) -> str:
        """A token that permits everything."""
        return self._tokens["boss"]

    async def boss(self, method: str, /, **params: Any) -> Any:
        answered = await self.answer(await self.token("boss", EVERYTHING), method, **params)
        assert "result" in answered, answered
        return answered["result"]

    def filled_in(self, value: Any, name: str) -> Any:
        """Return params with a name, and what belongs to it, in place of the marks."""
        if isinstance(value, dict):
            return {key: self.filled_in(each, name) for key, each in value.items()}
        if isinstance(value, list):
            return [self.filled_in(each, name) for each in value]
        if not isinstance(value, str):
            return value
        if value.startswith("receipt of"):
            return self.receipts[name]
        if value.startswith("subscription of"):
            return self.subscriptions[name]
        return value.format(name)

    async def furnish(self) -> None:
        for name in (OWN, OTHER):
            for queue in (name, f"{name}.empty", f"{name}.gone"):
                await self.boss("create_queue", queue=queue)
            for topic in (name, f"{name}.gone"):
                await self.boss("create_topic", topic=topic)
            subscribed = await self.boss("subscribe", topic=name, name="one", queue=name)
            self.subscriptions[name] = subscribed["subscription_id"]
            await self.boss("enqueue", queue=name, body=1)
            (message,) = (await self.boss("dequeue", queue=name))["messages"]
            self.receipts[name] = message["receipt"]


async def answer(broker: Broker, token: str | None, method: str, /, **params: Any) -> dict[str, Any]:
    # What differs between two answers is then what they say.
    headers = {"X-Request-Id": "same"} | ({} if token is None else {"Authorization": f"Bearer {token}"})
    request = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
    status, body = await broker.post(request, **headers)
    answered: dict[str, Any] = {"status": status, **json.loads(body)}
    return answered


@pytest.fixture
async def world(start_broker: StartBroker, connection: Connection) -> World:
    made = World(await start_broker(auth="required", sweep_interval=3600), connection)
    await made.furnish()
    return made


def error_type(answered: dict[str, Any]) -> str | None:
    """Return the type of an answer's error, or of the first of its results, None where there is none."""
    if "error" in answered:
        found: str = answered["error"]["data"]["type"]
        return found
    result = answered["result"]
    results = result.get("results") if isinstance(result, dict) else None
    if results and "error" in results[0]:
        inner: str = results[0]["error"]["data"]["type"]
        return inner
    return None


def test_the_schema_asks_for_what_the_contract_says() -> None:
    methods = compile_methods(load_document())
    assert methods.keys() == CONTRACT.keys(), "a new method needs a line here"
    for name, (permission, params) in CONTRACT.items():
        schema = methods[name]
        if name.startswith("list_") and permission == FREE:
            assert (schema.permission, schema.permission_on) == (MANAGE, ()), name
            continue
        assert schema.permission == permission, name
        assert set(schema.permission_on) <= set(schema.params)
        marked = {key for key, value in params.items() if "{}" in json.dumps(value)}
        assert marked <= set(schema.permission_on), name
    assert {name for name, schema in methods.items() if schema.permission_null} == {"count_messages", "get_stats"}


@pytest.mark.parametrize("broken", [{"x-permission": "any"}, {"x-permission": None}, {"x-permission-on": ["nothing"]}])
def test_a_method_whose_permission_is_not_said_stops_the_start(broken: dict[str, Any]) -> None:
    document = load_document()
    document["methods"][0] = document["methods"][0] | broken
    with pytest.raises(SchemaError, match=r"enqueue: .*permission"):
        compile_methods(document)
    del document["methods"][0]["x-permission"]
    with pytest.raises(SchemaError, match="enqueue: x-permission"):
        compile_methods(document)


async def test_every_method_is_open_to_those_whose_token_permits_it_and_to_nobody_else(world: World) -> None:
    """Every kind of token calls every method, for a name that it is for and for another."""
    wrong = []
    for method, (permission, params) in CONTRACT.items():
        for name in (OTHER, OWN):
            for kind in sorted(KINDS, key=lambda kind: kind == permission):  # who may do it does it last
                answered = await world.answer(await world.of_kind(kind), method, **world.filled_in(params, name))
                found = error_type(answered)
                hidden = method in ("unsubscribe", "rotate_secret")
                refused = found == ("subscription_not_found" if hidden else "forbidden")
                may = permission == FREE or (kind == permission and (name == OWN or permission == ADMIN))
                if refused == may or answered["status"] != 200:
                    wrong.append(f"{method} for {name} with {kind}: {answered}")
    assert not wrong, "\n".join(wrong)


async def test_names_that_are_refused_are_refused_whether_or_not_they_exist(world: World) -> None:
    token = await world.of_kind(MANAGE)
    for method, params in (("get_queue", {"queue": "{}"}), ("list_subscriptions", {"topic": "{}"})):
        known = await world.answer(token, method, **world.filled_in(params, OTHER))
        unknown = await world.answer(token, method, **world.filled_in(params, "others.absent"))
        assert json.dumps(known).replace(OTHER, "others.absent") == json.dumps(unknown)


async def test_a_subscription_of_a_topic_that_may_not_be_managed_is_as_one_that_is_not_there(world: World) -> None:
    token, theirs = await world.of_kind(MANAGE), world.subscriptions[OTHER]
    known = await world.answer(token, "unsubscribe", subscription_id=theirs)
    unknown = await world.answer(token, "unsubscribe", subscription_id="00000000000fffff")
    assert json.dumps(known).replace(theirs, "00000000000fffff") == json.dumps(unknown)
    assert len((await world.boss("list_subscriptions", topic=OTHER))["subscriptions"]) == 1


async def test_errors_do_not_name_what_the_caller_may_not_know(world: World) -> None:
    """A foreign queue subscribes to a topic that he publishes to, and sends its dead letters to a queue of his."""
    await world.boss("create_queue", queue="secret", max_messages=1, dead_letter_queue=f"{OWN}.empty", max_receives=1)
    await world.boss("create_topic", topic="own.news")
    await world.boss("subscribe", topic="own.news", name="one", queue="secret")
    await world.boss("subscribe", topic="own.news", name="two", queue=f"{OWN}.gone")
    calls: tuple[tuple[str, str, dict[str, Any]], ...] = (
        (SEND, "publish", {"topic": "own.news", "body": "x" * 5000}),
        (MANAGE, "delete_queue", {"queue": f"{OWN}.empty"}),
    )
    for verb, method, params in calls:
        told = [await world.answer(token, method, **params) for token in (await world.of_kind(verb), world.boss_token)]
        assert [error_type(each) for each in told] == [error_type(told[1])] * 2
        assert ["secret" in json.dumps(each) for each in told] == [False, True]
        assert told[0]["error"]["data"].keys() == told[1]["error"]["data"].keys()
    in_use = await world.answer(await world.of_kind(MANAGE), "delete_queue", queue=f"{OWN}.gone")
    assert "own.news" in in_use["error"]["message"], "what he may manage is named"


async def test_a_dead_letter_queue_must_be_one_that_may_be_managed(world: World) -> None:
    token = await world.of_kind(MANAGE)
    for method, params in (
        ("create_queue", {"queue": "own.new"}),
        ("update_queue", {"queue": OWN}),
        ("subscribe", {"topic": OWN, "name": "u", "url": "https://192.0.2.1/"}),
    ):
        assert error_type(await world.answer(token, method, **params, dead_letter_queue=OTHER)) == "forbidden"
    assert error_type(await world.answer(token, "subscribe", topic=OWN, name="q", queue=OTHER)) == "forbidden"
    assert error_type(await world.answer(token, "redrive", queue=OWN, to=OTHER)) == "forbidden"


async def test_a_receipt_alone_is_worth_nothing(world: World) -> None:
    token = await world.of_kind(RECEIVE)
    receipt = world.receipts[OTHER]
    results = (await world.answer(token, "delete_batch", receipts=[receipt, world.receipts[OWN], "x"]))["result"][
        "results"
    ]
    assert [each.get("deleted") or each["error"]["data"]["type"] for each in results] == [
        "forbidden", True, "invalid_receipt",
    ]  # fmt: skip
    assert (
        error_type(await world.answer(token, "extend_visibility", receipt=receipt, visibility_timeout=0)) == "forbidden"
    )
    assert (await world.boss("delete", receipt=receipt)) == {"deleted": True}


async def test_a_receipt_of_a_queue_that_was_deleted_says_what_it_did(world: World) -> None:
    await world.boss("unsubscribe", subscription_id=world.subscriptions[OWN])
    await world.boss("delete_queue", queue=OWN)
    token = await world.of_kind(RECEIVE)
    assert (await world.answer(token, "delete", receipt=world.receipts[OWN]))["result"] == {"deleted": False}


async def test_lists_show_what_may_be_managed(world: World) -> None:
    token = await world.of_kind(MANAGE)

    async def names(method: str, key: str, field: str, **params: Any) -> set[str]:
        return {each[field] for each in (await world.answer(token, method, **params))["result"][key]}

    assert await names("list_queues", "queues", "queue") == {OWN, f"{OWN}.empty", f"{OWN}.gone"}
    assert await names("list_queues", "queues", "queue", prefix="others") == set()
    assert await names("list_topics", "topics", "topic", counts=True) == {OWN, f"{OWN}.gone"}
    assert await names("list_subscriptions", "subscriptions", "topic") == {OWN}
    page = (await world.answer(token, "list_queues", limit=2))["result"]
    assert page["next"] is not None, "a page is filled with what may be seen"
    rest = (await world.answer(token, "list_queues", limit=2, after=page["next"]))["result"]
    assert (len(page["queues"]), len(rest["queues"]), rest["next"]) == (2, 1, None)


async def test_dead_letters_are_redriven_to_queues_that_may_be_managed(world: World, connection: Connection) -> None:
    await world.boss("create_queue", queue="own.dead")
    for source in (OWN, OTHER):
        await world.boss("purge_queue", queue=source)
        await world.boss("enqueue", queue="own.dead", body=source)
    await connection.execute(
        "UPDATE broker.messages SET dead_letter = json_build_object('source_queue', trim(both '\"' from body::text))"
        " WHERE queue_id = (SELECT id FROM broker.queues WHERE name = 'own.dead')"
    )
    moved = (await world.answer(await world.of_kind(MANAGE), "redrive", queue="own.dead"))["result"]
    assert moved == {"moved": 1, "complete": True}
    assert (await world.boss("redrive", queue="own.dead"))["moved"] == 1


async def test_counting_everything_needs_admin(world: World) -> None:
    for method in ("count_messages", "get_stats"):
        assert error_type(await world.answer(await world.of_kind(MANAGE), method)) == "forbidden"
        assert "result" in await world.answer(await world.of_kind(ADMIN), method)


async def test_the_sender_is_the_token(world: World) -> None:
    token = await world.token("ada", Grant(send=["own.*"]))
    await world.boss("purge_queue", queue=OWN)
    for method, params in (
        ("enqueue", {"queue": OWN, "body": 1, "sender": "bob"}),
        ("enqueue_batch", {"queue": OWN, "messages": [{"body": 2, "sender": "bob"}, {"body": 3}]}),
        ("publish", {"topic": OWN, "body": 4, "sender": "bob"}),
    ):
        assert "result" in await world.answer(token, method, **params)
    listed = (await world.boss("list_messages", queue=OWN))["messages"]
    assert [(each["body"], each["sender"]) for each in listed] == [(n, "ada") for n in (1, 2, 3, 4)]


async def test_nobody_without_a_token_is_let_in(world: World) -> None:
    good = await world.token("boss", EVERYTHING)
    other = new_token()
    shown = [
        None, "", "Bearer", "Bearer x", f"Basic {good}", f"Token {good}", f"Bearer {good}x", f"Bearer {good[:-1]}",
        f"Bearer {other.text}", f"Bearer {good[:20]}{other.text[20:]}", f"Bearer {other.text[:20]}{good[20:]}",
    ]  # fmt: skip
    answers = set()
    for authorization in shown:
        headers = {"X-Request-Id": "same"} | ({} if authorization is None else {"Authorization": authorization})
        async with world.broker.http.post(f"{world.broker.url}/rpc", json={}, headers=headers) as response:
            assert response.status == 401
            assert response.headers["WWW-Authenticate"] == "Bearer"
            answers.add(await response.read())
    assert len(answers) == 1, "whoever guesses learns nothing"
    error = json.loads(answers.pop())
    assert (error["id"], error["error"]["code"], error["error"]["data"]["type"]) == (None, -32003, "forbidden")
    assert "result" in await world.answer(good, "get_server")
    async with world.broker.http.post(
        f"{world.broker.url}/rpc", json={}, headers={"Authorization": f"bearer  {good} "}
    ) as response:
        assert response.status == 200, "the scheme is no matter of letters"


async def test_an_unknown_id_and_a_wrong_secret_are_told_apart_by_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers are compared byte for byte, the work for them by what is called, because times tell more of a machine."""
    good = await world.token("boss", EVERYTHING)
    other = new_token().text
    wrong_secret, unknown_id = good[:20] + other[20:], other
    revoked = await world.token("revoked", EVERYTHING)
    await tokens.revoke(world.connection, "revoked")
    await world.broker.server.auth.refresh()
    done: list[str] = []

    def noting(what: str, function: Any) -> Any:
        def noted(*given: Any) -> Any:
            done.append(what)
            return function(*given)

        return noted

    monkeypatch.setattr(hmac, "compare_digest", noting("compared", hmac.compare_digest))
    monkeypatch.setattr(auth, "read_token", noting("hashed", read_token))
    monkeypatch.setattr(Auth, "_read", noting("looked up", Auth._read))
    seen = set()
    for token in (wrong_secret, unknown_id, revoked):
        await world.broker.server.auth.refresh()  # each begins as long after the tokens were read
        done.clear()
        headers = {"X-Request-Id": "same", "Authorization": f"Bearer {token}"}
        async with world.broker.http.post(f"{world.broker.url}/rpc", json={}, headers=headers) as response:
            told = tuple((name, value) for name, value in response.headers.items() if name != "Date")
            seen.add((response.status, told, await response.read(), tuple(done)))
    ((status, _, _, work),) = seen
    assert status == 401
    assert work == ("hashed", "compared", "looked up", "hashed", "compared")


async def test_some_pages_are_free_and_metrics_are_not(world: World) -> None:
    async def status(path: str, **headers: str) -> int:
        async with world.broker.http.get(world.broker.url + path, headers=headers) as response:
            return response.status

    for path in ("/livez", "/readyz", "/healthz", "/openrpc.json", "/", "/dashboard/app.js"):
        assert await status(path) == 200
    assert await status("/metrics") == 401
    assert await status("/metrics", Authorization=f"Bearer {await world.of_kind('none')}") == 200


async def test_a_caller_is_told_what_his_token_permits(world: World) -> None:
    grant = Grant(["a", "b*"], [], ["*.own"], admin=False)
    token = await world.token("somebody", grant)
    assert (await world.answer(token, "get_caller"))["result"] == {
        "name": "somebody",
        "auth_required": True,
        "send": ["a", "b*"],
        "receive": [],
        "manage": ["*.own"],
        "admin": False,
    }
    assert (await world.answer(None, "get_caller"))["status"] == 401


async def test_where_no_token_is_needed_everybody_may_do_everything(broker: Broker) -> None:
    told = await broker.call("get_caller")
    assert told == {
        "name": None,
        "auth_required": False,
        "send": ["*"],
        "receive": ["*"],
        "manage": ["*"],
        "admin": True,
    }


async def test_only_pages_of_named_sites_may_call_from_a_browser(start_broker: StartBroker) -> None:
    broker = await start_broker(cors_origin=("https://tools.example",))
    call = {"jsonrpc": "2.0", "id": 1, "method": "enqueue", "params": {"body": 1}}

    async def headers(method: str, origin: str, **more: Any) -> tuple[int, dict[str, str]]:
        json_text = {"Origin": origin, "Content-Type": "application/json"}
        async with broker.http.request(method, f"{broker.url}/rpc", headers=json_text, **more) as response:
            await response.read()
            named = {name: value for name, value in response.headers.items() if name.startswith("Access-Control")}
            return response.status, named

    status, told = await headers("OPTIONS", "https://tools.example")
    assert (status, told["Access-Control-Allow-Origin"]) == (204, "https://tools.example")
    assert "authorization" in told["Access-Control-Allow-Headers"]
    assert await headers("POST", "https://tools.example", json=call) == (
        200,
        {
            "Access-Control-Allow-Origin": "https://tools.example",
            "Access-Control-Expose-Headers": "Retry-After, X-Request-Id",
        },
    )  # fmt: skip
    taking = call | {"method": "dequeue", "params": {}}
    assert (await headers("POST", "https://tools.example", json=taking))[1], "also where messages are handed out"
    assert (await headers("POST", "https://tools.example", data=b"x"))[1], "also what is refused"
    for origin in ("https://evil.example", "https://tools.example.evil", "null", ""):
        assert await headers("OPTIONS", origin) == (405, {})
        assert (await headers("POST", origin, json=call))[1] == {}
    closed = await start_broker()
    async with closed.http.options(f"{closed.url}/rpc", headers={"Origin": "https://tools.example"}) as response:
        assert (response.status, response.headers.get("Access-Control-Allow-Origin")) == (405, None)


async def test_after_the_first_token_auto_asks_for_one_for_good(
    start_broker: StartBroker, connection: Connection
) -> None:
    broker = await start_broker()
    assert "result" in await answer(broker, None, "get_server")
    assert "result" in await answer(broker, "no token is asked for", "get_server")
    await tokens.create(connection, "first", EVERYTHING, None)
    async with asyncio.timeout(30):
        while (await answer(broker, None, "get_server"))["status"] == 200:
            await asyncio.sleep(0.05)
    assert await tokens.revoke(connection, "first") == 1
    await broker.server.auth.refresh()
    assert (await answer(broker, None, "get_server"))["status"] == 401
    another = await start_broker()
    assert (await answer(another, None, "get_server"))["status"] == 401
    off = await start_broker(auth="off")
    assert (await answer(off, None, "get_server"))["status"] == 200


async def test_a_token_counts_at_once_and_not_after_it_is_revoked_or_has_expired(
    world: World, connection: Connection
) -> None:
    token = await tokens.create(connection, "ada", EVERYTHING, expires_in=3600)
    await asyncio.sleep(auth.LEAST_AGE_SECONDS)
    assert (await world.answer(token, "get_server"))["status"] == 200, "it was looked up when it was shown"
    await connection.execute("UPDATE broker.tokens SET expires_at = now() WHERE name = 'ada'")
    await world.broker.server.auth.refresh()
    assert (await world.answer(token, "get_server"))["status"] == 401
    await connection.execute("UPDATE broker.tokens SET expires_at = NULL WHERE name = 'ada'")
    await world.broker.server.auth.refresh()
    assert (await world.answer(token, "get_server"))["status"] == 200
    await tokens.revoke(connection, "ada")
    async with asyncio.timeout(30):
        while (await world.answer(token, "get_server"))["status"] == 200:
            await asyncio.sleep(0.05)


async def test_who_waits_without_a_token_is_sent_away_when_the_first_one_is_made(
    start_broker: StartBroker, connection: Connection
) -> None:
    broker = await start_broker()
    waits = [asyncio.create_task(answer(broker, None, "dequeue", wait=60)) for _ in range(3)]
    async with asyncio.timeout(30):
        while broker.server.waiting.waiting < 3:
            await asyncio.sleep(0.01)
        token = await tokens.create(connection, "ada", EVERYTHING, None)
        answers = await asyncio.gather(*waits)
    assert [(each["status"], each["result"]) for each in answers] == [(200, {"messages": []})] * 3
    stays = asyncio.create_task(answer(broker, token, "dequeue", wait=60))
    stored = await answer(broker, token, "enqueue", body=1)
    (message,) = (await stays)["result"]["messages"]
    assert message["message_id"] == stored["result"]["message_id"]


async def test_a_call_that_waits_ends_when_its_token_counts_no_more_and_takes_nothing(
    world: World, connection: Connection
) -> None:
    token = await tokens.create(connection, "ada", EVERYTHING, None)
    server = world.broker.server
    await server.auth.refresh()
    waits = [asyncio.create_task(world.answer(token, "dequeue", queue=f"{OWN}.empty", wait=60)) for _ in range(3)]
    stays = asyncio.create_task(world.answer(world.boss_token, "dequeue", queue=f"{OWN}.empty", wait=60))
    async with asyncio.timeout(30):
        while server.waiting.waiting < 4:
            await asyncio.sleep(0.01)
        await tokens.revoke(connection, "ada")
        assert [error_type(each) for each in await asyncio.gather(*waits)] == ["forbidden"] * 3
        assert server.waiting.waiting == 1
        stored = await world.boss("enqueue", queue=f"{OWN}.empty", body="for others")
        (message,) = (await stays)["result"]["messages"]
    assert message["message_id"] == stored["message_id"]


async def test_nobody_is_let_in_by_what_was_known_too_long_ago(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    token = await world.token("boss", EVERYTHING)
    broker_auth = world.broker.server.auth

    async def away(self: Auth) -> None:
        raise Unavailable(reason="The database cannot be reached")

    monkeypatch.setattr(Auth, "_read", away)
    assert (await world.answer(token, "rpc.discover"))["status"] == 200
    broker_auth._read_at -= 5.0  # as long as a token that was revoked may count
    answered = await world.answer(token, "rpc.discover")
    assert (answered["status"], answered["error"]["data"]["type"]) == (503, "unavailable")
    monkeypatch.undo()
    assert (await world.answer(token, "rpc.discover"))["status"] == 200


async def test_failed_logins_from_an_address_are_throttled_and_good_ones_never(
    start_broker: StartBroker, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    broker = await start_broker(auth="required", max_failed_logins=3, trusted_proxy=("127.0.0.0/8",))
    good = await tokens.create(connection, "good", EVERYTHING, None)

    async def post(token: str, forwarded: str | None = None) -> tuple[int, str | None]:
        headers = {"Authorization": f"Bearer {token}"} | ({"X-Forwarded-For": forwarded} if forwarded else {})
        async with broker.http.post(f"{broker.url}/rpc", json={}, headers=headers) as response:
            return response.status, response.headers.get("Retry-After")

    assert [(await post("bad"))[0] for _ in range(5)] == [401, 401, 401, 429, 429]
    status, retry_after = await post("bad")
    assert status == 429
    assert 0 < int(retry_after or 0) <= auth.THROTTLE_SECONDS
    assert (await post(good))[0] == 200
    assert (await post("bad", "192.0.2.7"))[0] == 401, "another address, as a proxy says that is believed"
    assert (await post("bad", "192.0.2.9, 127.0.0.1"))[0] == 401, "what a client says before its proxy is not"
    for forwarded in ("192.0.2.7:4711", "192.0.2.7, 127.0.0.2:81", "[2001:db8::7]:4711", "2001:db8::7"):
        assert (await post("bad", forwarded))[0] == 401, "some proxies name the port as well"
    known = broker.server.auth._failures
    counted = {address: failures for address, (_, failures) in known.items()}
    assert counted == {"127.0.0.1": 3, "192.0.2.7": 3, "192.0.2.9": 1, "2001:db8::7": 2}
    throttled = [record.getMessage() for record in caplog.records if "throttled" in record.getMessage()]
    begun = [f"no access caller=- address={address} outcome=throttled" for address in ("127.0.0.1", "192.0.2.7")]
    assert throttled == begun, "once, when it begins"
    known["127.0.0.1"] = (known["127.0.0.1"][0] - auth.THROTTLE_SECONDS - 1, 3)
    assert (await post("bad"))[0] == 401, "a minute has passed"


async def test_what_a_client_says_of_its_address_is_not_believed(
    start_broker: StartBroker, connection: Connection
) -> None:
    broker = await start_broker(auth="required", trusted_proxy=("192.0.2.0/24",))
    for address in ("198.51.100.1", "198.51.100.2"):
        async with broker.http.post(f"{broker.url}/rpc", json={}, headers={"X-Forwarded-For": address}) as response:
            assert response.status == 401
    assert list(broker.server.auth._failures) == ["127.0.0.1"]


async def test_one_token_cannot_take_all_places(start_broker: StartBroker, connection: Connection) -> None:
    broker = await start_broker(auth="required", max_calls_per_token=2)
    greedy = await tokens.create(connection, "greedy", EVERYTHING, None)
    other = await tokens.create(connection, "other", EVERYTHING, None)
    waiting = [asyncio.create_task(answer(broker, greedy, "dequeue", wait=60)) for _ in range(2)]
    async with asyncio.timeout(30):
        while broker.server.waiting.waiting < 2:
            await asyncio.sleep(0.01)
    refused = (await answer(broker, greedy, "enqueue", body=1))["error"]
    assert (refused["code"], refused["data"]["type"]) == (-32002, "overloaded")
    assert refused["data"]["retry_after"] > 0
    for _ in waiting:
        assert "result" in await answer(broker, other, "enqueue", body=1)
    assert all("result" in each for each in await asyncio.gather(*waiting))
    assert "result" in await answer(broker, greedy, "enqueue", body=1)


async def test_one_token_has_so_many_calls_a_second(start_broker: StartBroker, connection: Connection) -> None:
    broker = await start_broker(auth="required", max_call_rate_per_token=10.0)
    token = await tokens.create(connection, "fast", EVERYTHING, None)
    batch = [{"jsonrpc": "2.0", "id": n, "method": "rpc.discover"} for n in range(50)]
    began_at = time.monotonic()
    _, body = await broker.post(json.dumps(batch).encode(), Authorization=f"Bearer {token}")
    seconds = time.monotonic() - began_at
    refused = [each for each in json.loads(body) if "error" in each]
    assert 10 <= 50 - len(refused) <= 10 + 10 * seconds
    assert {each["error"]["data"]["type"] for each in refused} == {"overloaded"}


async def test_acts_of_administration_and_refusals_are_written_down(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    token = await world.of_kind(MANAGE)
    with caplog.at_level(logging.INFO, "broker.audit"):
        await world.answer(token, "create_queue", queue="own.new")
        await world.answer(token, "get_queue", queue="own.new")
        await world.answer(token, "delete_queue", queue=OTHER)
        await world.answer(token, "enqueue", queue=OWN, body="a body")
        await world.answer(token, "purge_queue", queue="own.absent")
        await world.answer(None, "purge_queue", queue=OWN)
    said = [record.getMessage() for record in caplog.records if record.name == "broker.audit"]
    said = [line for line in said if not line.startswith("token_counts")]
    assert said == [
        "create_queue caller=only-manage address=127.0.0.1 queue=own.new outcome=ok",
        f"delete_queue caller=only-manage address=127.0.0.1 queue={OTHER} outcome=forbidden",
        f"enqueue caller=only-manage address=127.0.0.1 queue={OWN} outcome=forbidden",
        "purge_queue caller=only-manage address=127.0.0.1 queue=own.absent outcome=queue_not_found",
        "no access caller=- address=127.0.0.1 path=/rpc outcome=unauthorized",
    ]


async def test_every_act_of_administration_gives_one_line_whoever_does_it(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Every method that the schema says to change what is there for others is called, by who may and by who may not."""
    methods = compile_methods(load_document())
    acts = [
        name for name, schema in methods.items() if schema.permission in (MANAGE, ADMIN) and not schema.is_read_only
    ]
    assert {"delete_queue", "redrive", "rotate_secret", "update_message", "broadcast"} <= set(acts)
    reading = [name for name, (permission, _) in CONTRACT.items() if permission != FREE and name not in acts]
    for name in (*acts, *reading):
        params = world.filled_in(CONTRACT[name][1], OWN)
        for token, caller in ((await world.of_kind("none"), "only-none"), (world.boss_token, "boss")):
            caplog.clear()
            with caplog.at_level(logging.INFO, "broker.audit"):
                answered = await world.answer(token, name, **params)
            said = [record.getMessage() for record in caplog.records if record.name == "broker.audit"]
            outcome = answered["error"]["data"]["type"] if "error" in answered else "ok"
            if name not in acts and outcome != "forbidden":
                assert said == []
                continue
            (line,) = said
            assert line.startswith(f"{name} caller={caller} address=127.0.0.1 ")
            assert line.endswith(f" outcome={outcome}")
            for param in ("queue", "topic", "message_id", "subscription_id"):
                assert param not in params or f" {param}={params[param]}" in line


async def test_that_a_token_begins_or_ends_to_count_is_written_down(
    world: World, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    text = await tokens.create(connection, "ada", Grant(), None)
    presented = read_token(text)
    assert presented is not None
    with caplog.at_level(logging.INFO, "broker.audit"):
        await world.broker.server.auth.refresh()
        await tokens.revoke(connection, "ada")
        await world.broker.server.auth.refresh()
        await world.broker.server.auth.refresh()
    said = [record.getMessage() for record in caplog.records if record.name == "broker.audit"]
    assert [line for line in said if "name=ada" in line] == [
        f"token_counts name=ada token_id={presented.id} outcome=ok",
        f"token_counts_no_more name=ada token_id={presented.id} outcome=ok",
    ]


async def test_no_secret_is_stored_or_logged(
    world: World, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        text = await tokens.create(connection, "ada", EVERYTHING, None)
        await world.answer(text, "create_queue", queue="q")
        await world.answer(text[:-1], "create_queue", queue="q")
    secret = text.split(".")[1]
    cursor = await connection.execute("SELECT t::text FROM broker.tokens t")
    assert not any(secret in row[0] for row in await cursor.fetchall())
    assert not any(secret in record.getMessage() for record in caplog.records)
    assert all(secret not in str(each) for each in await tokens.list_all(connection))


async def test_two_tokens_of_a_name_count_at_one_time(connection: Connection) -> None:
    first = await tokens.create(connection, "ada", Grant(send=["a"]), None)
    second = await tokens.create(connection, "ada", Grant(send=["b"]), None)
    with pytest.raises(TooManyTokens, match="revoke ada --older"):
        await tokens.create(connection, "ada", Grant(), None)
    assert await tokens.revoke(connection, "ada", older=True) == 1
    presented = read_token(second)
    assert presented is not None
    assert [each.id for each in await tokens.read_valid(connection)] == [presented.id]
    await tokens.create(connection, "ada", Grant(), None)
    assert await tokens.revoke(connection, "ada") == 2
    assert await tokens.revoke(connection, "ada") == 0
    assert first != second


@pytest.mark.parametrize(
    ("pattern", "name", "is_match"),
    [
        ("mail", "mail", True),
        ("mail", "mails", False),
        ("mail", "xmail", False),
        ("mail*", "mail", True),
        ("mail.*", "mail.out", True),
        ("mail.*", "mailXout", False),
        ("*.out", "mail.out", True),
        ("a*c*e", "abcde", True),
        ("a*c*e", "abde", False),
        ("*", "anything", True),
        ("[a-z]", "a", False),
        ("a?c", "abc", False),
        ("a_c", "abc", False),
    ],
)
async def test_in_a_pattern_only_the_star_is_special(
    connection: Connection, pattern: str, name: str, is_match: bool
) -> None:
    assert matches([pattern], name) is is_match
    cursor = await connection.execute("SELECT %s LIKE ANY (%s)", [name, like([pattern])])
    assert await cursor.fetchone() == (is_match,)


def test_tokens_and_patterns_are_read_strictly() -> None:
    made = new_token()
    presented = read_token(made.text)
    assert presented is not None
    assert (presented.id, presented.secret_hash) == (made.id, made.secret_hash)
    assert len(made.text) >= 43
    for text in (made.text + "\n", made.text.upper(), made.text[1:], "", made.text.replace(".", ":")):
        assert read_token(text) is None
    assert [is_pattern(text) for text in ("a.*", "*", "", "a b", "a%", "é")] == [True, True, False, False, False, False]


async def test_a_subscription_knows_its_topic(world: World, connection: Connection) -> None:
    assert await subscriptions.topic_of(connection, world.subscriptions[OWN]) == OWN
    assert await subscriptions.topic_of(connection, "00000000000fffff") is None
    assert await subscriptions.topic_of(connection, "no id") is None
