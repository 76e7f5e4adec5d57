"""The schema made to work: one msgspec type for the params of each method, built from `rpc_schema.json`.

Decoding with such a type is the validation. Only when it fails is the schema read again, for an error that
names the param, what it may be, and what was given.

Understood, and refused at the start where it is anything else: type (also a list with "null"), enum, minimum,
maximum, exclusiveMinimum, minLength, maxLength, pattern, items, minItems, maxItems, properties with required
and additionalProperties false, additionalProperties with propertyNames, maxProperties, $ref, allOf and anyOf
of one schema (anyOf with null). A schema without a type is any JSON value, kept as its bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Raw

from broker.errors import InvalidParams
from broker.nesting import has_more_elements

Schema = Mapping[str, Any]

NO_PARAMS = Raw(b"{}")
GIVEN_SHOWN = 100
# What is longer may have a million members: it is not taken apart to say what is wrong with it.
LONG_PARAMS_BYTES = 2**18
PERMISSIONS = ("send", "receive", "manage", "admin", "free")
_REF = "#/components/schemas/"
_MISSING = Raw(b"")


class SchemaError(Exception):
    """The schema and the program disagree; the message names the culprit."""


def load_document() -> dict[str, Any]:
    """Return rpc_schema.json."""
    text = resources.files("broker").joinpath("rpc_schema.json").read_bytes()
    document: dict[str, Any] = msgspec.json.decode(text)
    return document


@dataclass(frozen=True)
class MethodSchema:
    """What the schema says of one method, ready for use."""

    name: str
    params: Mapping[str, Schema]
    required: frozenset[str]
    # A verb, admin or free; the params that name what it is needed for; and what is needed where they are all null,
    # None where then nothing is.
    permission: str
    permission_on: tuple[str, ...]
    permission_null: str | None
    is_read_only: bool
    decoder: msgspec.json.Decoder[Any]
    components: Mapping[str, Schema]
    # The one param that is a list, where all others are plain values.
    list_param: str | None = None

    @property
    def is_administrative(self) -> bool:
        """Whether it changes what is there for others, which is written down."""
        return self.permission in ("manage", "admin") and not self.is_read_only

    def read(self, params: Raw) -> dict[str, Any]:
        """Return the params by name, defaults filled in; UNSET for one that is not given and has none.

        Raises InvalidParams.
        """
        try:
            return self.decode(params)
        except msgspec.DecodeError as error:
            raise self.explain(str(error), params) from None

    def decode(self, params: Raw) -> dict[str, Any]:
        """Return the params as `read` does, of a text that may be no JSON.

        Raises InvalidParams where a list is far too long, and msgspec's DecodeError.
        """
        if self.list_param is not None and len(params) > LONG_PARAMS_BYTES:
            self._check_length(self.list_param, params)
        struct = self.decoder.decode(params)
        values = {name: getattr(struct, name) for name in self.params}
        for name, value in values.items():
            if value is _MISSING:
                values[name] = UNSET
        return values

    def _check_length(self, name: str, params: Raw) -> None:
        """Raise InvalidParams where the list has far too many elements, before each of them is made an object."""
        schema = _resolve(self.params[name], self.components)
        most = schema["maxItems"]
        if has_more_elements(memoryview(params), most, at_depth=2):
            limit, given = describe(schema, self.components), f"more than {most} elements"
            raise _refusal(f"`{name}` must be {limit}, and {given} were given.", name, limit=limit, given=given)

    def explain(self, error: str, params: Raw) -> InvalidParams:
        """Say what is wrong with params that were refused, in the words of the contract."""
        whole = {"type": "object", "properties": self.params}
        if error.startswith("Object contains unknown field"):
            if len(params) > LONG_PARAMS_BYTES:
                return _unknown_in_long(whole, error, self.components)
            return _unknown_param(whole, params, self.components)
        if found := re.match(r"Object missing required field `(.*?)`(?: - at `\$(.*)`)?", error):
            field, inside = found.groups()
            where = _join(inside or "", field)
            limit = describe(_at(whole, where, self.components), self.components)
            return _refusal(f"`{where}` is missing; it must be {limit}.", where, limit=limit)
        place = re.search(r" - at (?:`key` in )?`\$(.*)`$", error)
        where = _join("", place.group(1).removesuffix("[...]")) if place else ""
        limit = describe(_at(whole, where, self.components), self.components)
        given = _given(params, where)
        name = f"`{where}`" if where else "`params`"
        return _refusal(f"{name} must be {limit}, and {given} was given.", where, limit=limit, given=given)


def _refusal(reason: str, where: str, **data: Any) -> InvalidParams:
    """Return the error for the param at a path; `index` is told where it lies in an element of a list."""
    refusal = InvalidParams(reason=reason, param=where, **data)
    if element := re.match(r"\w+\[(\d+)\]", where):
        refusal.extra["index"] = int(element.group(1))
    return refusal


def _unknown_param(whole: Schema, params: Raw, components: Mapping[str, Schema]) -> InvalidParams:
    """Name a param that does not exist.

    It is searched for anew: its name may hold anything, also what msgspec's sentence about it is made of.
    """
    path, name, value, schema = _first_unknown(whole, params, components, "") or ("", "", params, whole)
    shown = _cut(name)
    where = f"{path}.{shown}" if path else shown
    known = ", ".join(schema["properties"]) or "none"
    refusal = _refusal(f"There is no param `{where}`; known are: {known}.", path, given=_shown(value))
    refusal.extra["param"] = where
    return refusal


def _unknown_in_long(whole: Schema, error: str, components: Mapping[str, Schema]) -> InvalidParams:
    """Name a param that does not exist by msgspec's sentence alone: there may be a million of them."""
    found = re.match(r"Object contains unknown field `(.*?)`(?: - at `\$(.*)`)?\Z", error, re.DOTALL)
    name, inside = found.groups() if found else ("", "")
    path = _join("", (inside or "").removesuffix("[...]"))
    where = f"{path}.{_cut(name)}" if path else _cut(name)
    known = ", ".join(_resolve(_at(whole, path, components), components).get("properties", ())) or "none"
    refusal = _refusal(f"There is no param `{where}`; known are: {known}.", path)
    refusal.extra["param"] = where
    return refusal


def _first_unknown(
    schema: Schema, value: Raw, components: Mapping[str, Schema], path: str
) -> tuple[str, str, Raw, Schema] | None:
    """Return (path of the object, name, value, schema of the object) of the first member that does not exist."""
    schema = _resolve(schema, components)
    if "properties" in schema and bytes(value)[:1] == b"{":
        members = msgspec.json.decode(value, type=dict[str, Raw])
        for name, member in members.items():
            if name not in schema["properties"]:
                return path, name, member, schema
        inside = [(schema["properties"][name], member, _join(path, name)) for name, member in members.items()]
    elif "items" in schema and bytes(value)[:1] == b"[":
        elements = msgspec.json.decode(value, type=list[Raw])
        inside = [(schema["items"], element, f"{path}[{n}]") for n, element in enumerate(elements)]
    else:
        return None
    return next(filter(None, (_first_unknown(each, part, components, at) for each, part, at in inside)), None)


def compile_methods(document: Schema) -> dict[str, MethodSchema]:
    """Return the methods of a schema document by name. Raises SchemaError."""
    components = document.get("components", {}).get("schemas", {})
    return {method["name"]: _compile(method, components) for method in document["methods"]}


def _compile(method: Schema, components: Mapping[str, Schema]) -> MethodSchema:
    params = {param["name"]: param["schema"] for param in method["params"]}
    required = frozenset(param["name"] for param in method["params"] if param.get("required"))
    struct = _struct(method["name"], params, required, components)
    return MethodSchema(
        name=method["name"],
        params=params,
        required=required,
        permission=_permission(method),
        permission_on=tuple(method.get("x-permission-on", ())),
        # Where it is not said what it is for, it is not for everybody.
        permission_null=method.get("x-permission-null", None if "x-permission-on" in method else "admin"),
        is_read_only=method.get("x-read-only", False),
        decoder=msgspec.json.Decoder(struct),
        list_param=_list_param(params, components),
        components=components,
    )


def _list_param(params: Mapping[str, Schema], components: Mapping[str, Schema]) -> str | None:
    """Return the name of the param that is a list, where nothing else beside it can be one."""
    try:
        kinds = {name: _resolve(schema, components).get("type") for name, schema in params.items()}
    except SchemaError:
        return None  # `_type` says what is wrong
    flat = ("string", "integer", "number", "boolean")
    lists = [name for name, kind in kinds.items() if kind not in flat]
    return lists[0] if len(lists) == 1 and kinds[lists[0]] == "array" else None


def _permission(method: Schema) -> str:
    """Return what a method needs. Raises SchemaError where that is not said, or is nothing that can be granted."""
    name, permission = method["name"], method.get("x-permission")
    if permission not in PERMISSIONS:
        raise SchemaError(f"{name}: x-permission must be one of {', '.join(PERMISSIONS)}, not {permission}")
    unknown = set(method.get("x-permission-on", ())) - {param["name"] for param in method["params"]}
    if unknown:
        raise SchemaError(f"{name}: {unknown.pop()} in x-permission-on is no param")
    return str(permission)


def _struct(
    name: str, properties: Mapping[str, Schema], required: frozenset[str], components: Mapping[str, Schema]
) -> type[msgspec.Struct]:
    """Build the type of an object with these properties."""
    fields: list[Any] = []
    for field, schema in properties.items():
        kind = _type(schema, components, f"{name}.{field}")
        if field in required:
            fields.append((field, kind))
        elif kind is Raw:
            # Raw must stand alone as a field's type, so it cannot be UNSET; see MethodSchema.read.
            fields.append((field, kind, _MISSING))
        elif "default" in schema:
            fields.append((field, kind, _default(schema["default"])))
        else:
            fields.append((field, kind | msgspec.UnsetType, UNSET))
    return msgspec.defstruct(re.sub(r"\W", "_", name), fields, forbid_unknown_fields=True, kw_only=True, frozen=True)


def _default(value: Any) -> Any:
    if isinstance(value, dict | list):
        return value or msgspec.field(default_factory=type(value))
    return value


_UNDERSTOOD = {
    "type", "enum", "minimum", "maximum", "exclusiveMinimum", "minLength", "maxLength", "pattern", "items",
    "minItems", "maxItems", "properties", "required", "additionalProperties", "propertyNames", "maxProperties",
    "$ref", "allOf", "anyOf", "description", "default", "format",
}  # fmt: skip

_LIMITS = {
    "minimum": "ge", "maximum": "le", "exclusiveMinimum": "gt", "minLength": "min_length",
    "maxLength": "max_length", "minItems": "min_length", "maxItems": "max_length", "maxProperties": "max_length",
}  # fmt: skip


def _type(schema: Schema, components: Mapping[str, Schema], place: str) -> Any:
    """Return the Python type that msgspec decodes a schema's values into."""
    unknown = set(schema) - _UNDERSTOOD
    if unknown:
        raise SchemaError(f"{place}: the schema says {unknown.pop()}, which is not understood")
    try:
        schema = _resolve(schema, components)
    except SchemaError as error:
        raise SchemaError(f"{place}: {error}") from None
    kinds = schema.get("type")
    if kinds is None:
        if "enum" in schema:
            return Literal[tuple(schema["enum"])]
        return Raw
    if isinstance(kinds, list):
        others = [_type({**schema, "type": kind}, components, place) for kind in kinds if kind != "null"]
        return others[0] | None
    match kinds:
        case "null":
            return None
        case "boolean":
            return bool
        case "integer":
            kind: Any = int
        case "number":
            kind = float
        case "string" if "enum" in schema:
            return Literal[tuple(schema["enum"])]
        case "string":
            kind = str
        case "array":
            kind = list[_type(schema["items"], components, f"{place}[]")]  # type: ignore[misc]
        case "object" if "properties" in schema:
            required = frozenset(schema.get("required", ()))
            return _struct(place, schema["properties"], required, components)
        case "object":
            key = _type(schema.get("propertyNames", {"type": "string"}), components, place)
            kind = dict[key, _type(schema["additionalProperties"], components, place)]  # type: ignore[misc,valid-type]
        case _:
            raise SchemaError(f"{place}: there is no type {kinds}")
    limits = {ours: schema[theirs] for theirs, ours in _LIMITS.items() if theirs in schema}
    if "pattern" in schema:
        limits["pattern"] = _python_pattern(schema["pattern"])
    return Annotated[kind, Meta(**limits)] if limits else kind


def _python_pattern(pattern: str) -> str:
    r"""Return a JSON Schema pattern for Python, whose `$` would let a line break pass at the end."""
    return pattern[:-1] + r"\Z" if pattern.endswith("$") else pattern


def _resolve(schema: Schema, components: Mapping[str, Schema]) -> Schema:
    """Return a schema with its reference, single `allOf` and nullable `anyOf` put in place."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix(_REF)
        if name not in components:
            raise SchemaError(f"there is no {schema['$ref']}")
        return _resolve(components[name], components)
    if "allOf" in schema:
        (only,) = schema["allOf"]
        return {**_resolve(only, components), **{k: v for k, v in schema.items() if k != "allOf"}}
    if "anyOf" in schema:
        others = [_resolve(each, components) for each in schema["anyOf"] if each.get("type") != "null"]
        if len(others) != 1 or len(schema["anyOf"]) != 2:
            raise SchemaError(f"anyOf means a schema or null, and here it is {schema['anyOf']}")
        rest = {k: v for k, v in schema.items() if k != "anyOf"}
        return {**others[0], **rest, "type": [others[0]["type"], "null"]}
    return schema


def describe(schema: Schema, components: Mapping[str, Schema]) -> str:
    """Say in words what a value must be: "an integer from 1 to 1000"."""
    schema = _resolve(schema, components)
    kinds = schema.get("type")
    if isinstance(kinds, list):
        other = next(kind for kind in kinds if kind != "null")
        return describe({**schema, "type": other}, components) + ", or null"
    if "enum" in schema:
        return "one of " + ", ".join(f'"{value}"' for value in schema["enum"])
    match kinds:
        case "integer" | "number":
            return ("an integer" if kinds == "integer" else "a number") + _range(schema)
        case "string":
            return "a string" + _string_limits(schema)
        case "array":
            return f"an array of {schema.get('minItems', 0)} to {schema.get('maxItems', 'any number of')} elements"
        case "object" if "maxProperties" in schema and schema["additionalProperties"].get("type") == "array":
            return f"an object of at most {schema['maxProperties']} names, each with {_of(schema)}"
        case "object" if "maxProperties" in schema:
            return f"an object of at most {schema['maxProperties']} strings without NUL"
        case "object":
            return "an object with the members " + (", ".join(schema.get("properties", {})) or "that it may have")
        case "boolean":
            return "true or false"
        case "null":
            return "null"
        case _:
            return "a JSON value"


def _of(schema: Schema) -> str:
    values = schema["additionalProperties"]
    return f"an array of {values['minItems']} to {values['maxItems']} strings without NUL"


def _range(schema: Schema) -> str:
    if "exclusiveMinimum" in schema:
        return f" above {schema['exclusiveMinimum']} and at most {schema['maximum']}"
    return f" from {schema['minimum']} to {schema['maximum']}" if "minimum" in schema else ""


def _string_limits(schema: Schema) -> str:
    limits = []
    if "maxLength" in schema:
        limits.append(f" of {schema.get('minLength', 0)} to {schema['maxLength']} characters")
    if schema.get("pattern") == r"^[^\u0000]*$":
        limits.append(" without NUL")
    elif "pattern" in schema:
        limits.append(f" that matches {schema['pattern']}")
    return "".join(limits)


def _join(path: str, field: str) -> str:
    return f"{path}.{field}".strip(".")


def _steps(path: str) -> list[str | int]:
    """Split `messages[3].delay` into "messages", 3, "delay"."""
    return [int(index) if index else name for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path)] if path else []


def _at(schema: Schema, path: str, components: Mapping[str, Schema]) -> Schema:
    """Return the schema of the value at a path."""
    for step in _steps(path):
        schema = _resolve(schema, components)
        schema = schema.get("items", {}) if isinstance(step, int) else schema.get("properties", {}).get(step, {})
    return schema


def _given(params: Raw, path: str) -> str:
    """Return the JSON text of the value at a path, cut where it is long."""
    value = params
    try:
        for step in _steps(path):
            if isinstance(step, int):
                value = msgspec.json.decode(value, type=list[Raw])[step]
            else:
                value = msgspec.json.decode(value, type=dict[str, Raw])[step]
    except (msgspec.DecodeError, LookupError):
        return "something else"
    return _shown(value)


def _shown(value: Raw) -> str:
    return _cut(bytes(value).decode(errors="replace"))


def _cut(text: str) -> str:
    return text if len(text) <= GIVEN_SHOWN else f"{text[:GIVEN_SHOWN]}… ({len(text)} characters)"
