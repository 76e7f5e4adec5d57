"""`rpc_schema.json` is a valid OpenRPC 1.3.2 document, true to itself and to the contract's list of methods.

Its JSON Schemas are of draft 7, the draft of OpenRPC 1.3. Nothing is fetched: the meta-schemas lie in
`tests/data`.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator, FormatChecker  # type: ignore[import-untyped]
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

import broker
from broker.errors import BrokerError
from broker.model import lease_of, message_number_of

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"

Json = dict[str, Any]
DOCUMENT: Json = json.loads((ROOT / "rpc_schema.json").read_text("utf-8"))
METHODS: list[Json] = DOCUMENT["methods"]
COMPONENTS: Json = DOCUMENT["components"]

PROMISED = {
    *("enqueue", "enqueue_batch", "dequeue"),
    *("delete", "delete_batch", "extend_visibility", "extend_visibility_batch"),
    *("create_queue", "update_queue", "get_queue", "list_queues", "purge_queue", "delete_queue"),
    *("count_messages", "list_messages", "get_message", "update_message", "delete_message"),
    *("redrive", "get_caller", "get_server", "rpc.discover"),
    *("create_topic", "delete_topic", "list_topics", "publish", "broadcast"),
    *("subscribe", "unsubscribe", "list_subscriptions", "rotate_secret"),
}
# Answered before it is known which method is meant: no method lists them.
BEFORE_ANY_METHOD = {"parse_error", "invalid_request", "method_not_found"}

FORMATS = FormatChecker(formats=())
TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


@FORMATS.checks("date-time")  # type: ignore[untyped-decorator]
def is_timestamp(value: object) -> bool:
    """Hold examples to the contract's form, which is narrower than RFC 3339."""
    return not isinstance(value, str) or TIMESTAMP.fullmatch(value) is not None


def load_meta_schemas() -> tuple[Json, Registry[Any]]:
    """Return the OpenRPC meta-schema, and a registry in which its references resolve offline."""
    openrpc = json.loads((DATA / "openrpc_meta_schema_1.3.2.json").read_text("utf-8"))
    schemas = json.loads((DATA / "json_schema_tools_meta_schema.json").read_text("utf-8"))
    # It is referred to with and without the slash at the end.
    names = ("https://meta.json-schema.tools", "https://meta.json-schema.tools/")
    resource: Resource[Any] = DRAFT7.create_resource(schemas)
    registry: Registry[Any] = Registry().with_resources((name, resource) for name in names)
    return openrpc, registry


META_SCHEMA, META_REGISTRY = load_meta_schemas()
REGISTRY: Registry[Any] = Registry().with_resource("urn:wonderq", DRAFT7.create_resource(DOCUMENT))


def faults(document: Json) -> list[str]:
    """Return what the meta-schema has against a document."""
    validator = Draft7Validator(META_SCHEMA, registry=META_REGISTRY)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


def faults_of_value(value: Any, pointer: str) -> list[str]:
    """Return what the schema at a JSON pointer into the document has against a value."""
    schema = {"$ref": f"urn:wonderq#{pointer}"}
    validator = Draft7Validator(schema, registry=REGISTRY, format_checker=FORMATS)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]


def walk(node: Any, pointer: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of a JSON document with its JSON pointer."""
    yield pointer, node
    members: Any = ()
    if isinstance(node, dict):
        members = node.items()
    elif isinstance(node, list):
        members = enumerate(node)
    for key, member in members:
        yield from walk(member, f"{pointer}/{str(key).replace('~', '~0').replace('/', '~1')}")


def references() -> set[str]:
    """Return every `$ref` of the document."""
    return {node["$ref"] for _, node in walk(DOCUMENT) if isinstance(node, dict) and "$ref" in node}


def examples() -> list[Any]:
    """Return (pointer of the method, method, example) for each example, named after both."""
    return [
        pytest.param(f"/methods/{number}", method, example, id=f"{method['name']}: {example['name']}")
        for number, method in enumerate(METHODS)
        for example in method["examples"]
    ]


def defaults() -> list[Any]:
    """Return (pointer, default) for each schema that has a default."""
    return [
        pytest.param(pointer, node["default"], id=pointer)
        for pointer, node in walk(DOCUMENT)
        if isinstance(node, dict) and "default" in node and not pointer.endswith("/properties")
    ]


each_method = pytest.mark.parametrize("method", METHODS, ids=[method["name"] for method in METHODS])


def test_the_schema_is_a_valid_openrpc_document() -> None:
    assert DOCUMENT["openrpc"] == "1.3.2"
    assert faults(DOCUMENT) == []


def set_member(*path: str | int, to: Any) -> Callable[[Json], None]:
    """Return a function that changes one member of a document."""

    def change(document: Json) -> None:
        node: Any = document
        for step in path[:-1]:
            node = node[step]
        node[path[-1]] = to

    return change


BROKEN = {
    "a version that 1.3.2 does not know": set_member("openrpc", to="1.4.1"),
    "no info": lambda document: document.pop("info"),
    "an unknown member": set_member("metods", to=[]),
    "a method without a name": lambda document: document["methods"][0].pop("name"),
    "a method without params": lambda document: document["methods"][0].pop("params"),
    "an unknown member of a method": set_member("methods", 0, "permission", to="send"),
    "a param without a schema": lambda document: document["methods"][0]["params"][0].pop("schema"),
    "a param that is neither required nor not": set_member("methods", 0, "params", 0, "required", to="yes"),
    "a result that is text": set_member("methods", 0, "result", to="a message id"),
    "an example without params": lambda document: document["methods"][0]["examples"][0].pop("params"),
    "an error whose code is text": set_member("components", "errors", "parse_error", "code", to="-32700"),
    "a type that JSON has not": set_member("components", "schemas", "QueueName", "type", to="text"),
    "a limit that is text": set_member("components", "schemas", "Sender", "maxLength", to="128"),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_a_broken_schema_is_rejected(breakage: Callable[[Json], object]) -> None:
    document = copy.deepcopy(DOCUMENT)
    breakage(document)
    assert faults(document) != []


def test_every_reference_resolves() -> None:
    resolver = REGISTRY.resolver()
    assert references()
    for reference in references():
        assert reference.startswith("#/components/"), "shared things live among the components"
        resolver.lookup(f"urn:wonderq{reference}")


def test_every_component_is_used() -> None:
    defined = {f"#/components/{kind}/{name}" for kind, found in COMPONENTS.items() for name in found}
    unused = defined - references()
    assert unused == {f"#/components/errors/{name}" for name in BEFORE_ANY_METHOD}


def test_every_method_of_the_contract_is_there_once() -> None:
    names = [method["name"] for method in METHODS]
    assert len(names) == len(set(names))
    assert set(names) >= PROMISED


@each_method
def test_a_method_says_what_it_does_and_who_may_call_it(method: Json) -> None:
    assert method["summary"].endswith(".")
    assert method["x-permission"] in {"send", "receive", "manage", "admin", "free"}
    assert isinstance(method["x-read-only"], bool)
    assert method["paramStructure"] == "by-name"
    assert method["examples"]


@each_method
def test_every_param_is_described_and_has_a_name_of_its_own(method: Json) -> None:
    names = [param["name"] for param in method["params"]]
    assert len(names) == len(set(names))
    for param in method["params"]:
        schema = json.dumps(param["schema"])
        assert "description" in param or "description" in schema or "$ref" in schema, param["name"]


def limitless(schema: Json) -> list[str]:
    """Return pointers to the lists, strings and numbers in a schema that have no upper limit, in shared types too."""
    found = []
    for pointer, node in walk(schema):
        if not isinstance(node, dict):
            continue
        if "$ref" in node:
            found += limitless(COMPONENTS["schemas"][node["$ref"].rpartition("/")[2]])
        kinds = {node["type"]} if isinstance(node.get("type"), str) else set(node.get("type", ()))
        # A name pattern has its limit inside; propertyNames and members count against the 4 KiB of headers.
        limited_elsewhere = (
            "enum" in node
            or "{0," in node.get("pattern", "")
            or pointer.endswith(("/propertyNames", "/additionalProperties"))
        )
        for kind, limit in (("array", "maxItems"), ("string", "maxLength"), ("number", "maximum")):
            if kind in kinds and limit not in node and not limited_elsewhere:
                found.append(pointer)
        if "integer" in kinds and "maximum" not in node:
            found.append(pointer)
    return found


@each_method
def test_every_list_string_and_number_among_the_params_has_a_limit(method: Json) -> None:
    for param in method["params"]:
        assert limitless(param["schema"]) == [], param["name"]


@each_method
def test_a_method_lists_each_error_once_and_those_that_any_call_may_get(method: Json) -> None:
    listed = [error["$ref"].rpartition("/")[2] for error in method["errors"]]
    assert len(listed) == len(set(listed))
    assert set(listed) >= {"invalid_params", "unavailable", "overloaded", "internal_error"}


@pytest.mark.parametrize(("pointer", "method", "example"), examples())
def test_an_example_is_valid(pointer: str, method: Json, example: Json) -> None:
    places = {param["name"]: number for number, param in enumerate(method["params"])}
    given = [param["name"] for param in example["params"]]
    assert len(given) == len(set(given))
    assert {param["name"] for param in method["params"] if param["required"]} <= set(given)
    for param in example["params"]:
        place = f"{pointer}/params/{places[param['name']]}/schema"
        assert faults_of_value(param["value"], place) == [], param["name"]
    if method["name"] != "rpc.discover":
        assert faults_of_value(example["result"]["value"], f"{pointer}/result/schema") == []


def test_an_invalid_example_would_be_noticed() -> None:
    assert faults_of_value("-starts with a hyphen", "/components/schemas/QueueName") != []
    assert faults_of_value("2026-11-22T16:10:53Z", "/components/schemas/Timestamp") != []
    assert faults_of_value({"message_id": "1"}, "/components/schemas/Enqueued") != []


def test_the_ids_and_receipts_of_the_examples_are_such_as_this_broker_makes() -> None:
    """Whoever tries an example gets an answer about the message, not about a malformed receipt."""
    for method in METHODS:
        for pointer, node in walk(method["examples"]):
            if pointer.endswith("/receipt"):
                lease_of(node)
            if pointer.endswith("/message_id"):
                assert message_number_of(node) is not None
            if isinstance(node, dict) and node.get("name") == "receipt":
                lease_of(node["value"])


@pytest.mark.parametrize(("pointer", "default"), defaults())
def test_a_default_is_valid(pointer: str, default: Any) -> None:
    assert faults_of_value(default, pointer) == []


def test_no_two_errors_share_a_code() -> None:
    codes = [error["code"] for error in COMPONENTS["errors"].values()]
    assert len(codes) == len(set(codes))


def error_classes(base: type[BrokerError]) -> Iterator[type[BrokerError]]:
    """Yield the errors that have a code."""
    for error in base.__subclasses__():
        if "code" in vars(error):
            yield error
        yield from error_classes(error)


def test_the_schema_lists_the_errors_that_the_broker_raises() -> None:
    raised = {error.type: error.code for error in error_classes(BrokerError)}
    assert {name: error["code"] for name, error in COMPONENTS["errors"].items()} == raised


def test_an_error_in_an_example_is_what_the_broker_says() -> None:
    classes = {error.type: error for error in error_classes(BrokerError)}
    shown = [
        node
        for method in METHODS
        for pointer, node in walk(method["examples"])
        if pointer.endswith("/error") and isinstance(node, dict)
    ]
    assert shown
    for error in shown:
        real = classes[error["data"]["type"]]()
        assert (error["code"], error["message"], error["data"]) == (real.code, real.message, real.data)


def test_the_schema_has_the_version_of_the_package() -> None:
    assert DOCUMENT["info"]["version"] == broker.__version__
