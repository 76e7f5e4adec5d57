"""From the text of a request to its calls: the batch, the envelope of each, how deep they are.

Every text is read by a parser that makes no object for each of its parts, as often as it takes to find out what it
is: mostly twice, once for the envelope and once for the params. That is too often for a text of megabytes: see
`read_at_once`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import Raw

from broker.errors import InvalidParams, InvalidRequest, ParseError
from broker.nesting import has_more_elements, is_deeper
from broker.schema import NO_PARAMS, MethodSchema

MAX_BATCH = 1_000

# Of a call as long as this only those values are looked at for their nesting that are short enough to be a body: all
# else is refused for its length, or has a type that is not deep.
LONG_CALL_BYTES = 2**20 + 2**16
GLANCED_AT_BYTES = 2**16

_NULL = Raw(b"null")
_NOTHING = Raw(b"")


class Envelope(msgspec.Struct):
    """The members of a request, each as it was sent, empty where it was not."""

    jsonrpc: Raw = _NOTHING
    method: Raw = _NOTHING
    params: Raw = _NOTHING
    id: Raw = _NOTHING


@dataclass(frozen=True)
class LongCall:
    """A call that was read at once: its envelope, and its params by name, or what is wrong with them."""

    envelope: Envelope
    values: dict[str, Any] | InvalidParams

    def params(self) -> dict[str, Any]:
        """Return the params by name. Raises InvalidParams."""
        if isinstance(self.values, InvalidParams):
            raise self.values
        return self.values


_read_envelope = msgspec.json.Decoder(Envelope).decode
_read_any = msgspec.json.Decoder(Raw).decode
_read_elements = msgspec.json.Decoder(list[Raw]).decode
_read_string = msgspec.json.Decoder(str).decode

# Of a batch that is too deep for the parser only this much is taken apart by us.
_SPLIT_BYTES = 2**20
_STRUCTURE = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[{]+|[\]}]+|,', re.DOTALL)

# What stands before and behind the params of a call, where it is as short and plain as any client writes it; whether
# it is JSON is not asked here.
_PLAIN_MEMBER = rb'"(?:jsonrpc|method|id)"\s*+:\s*+(?:"[^"\\]*+"|[^\s",:\[\]{}]++)\s*+'
_BEFORE_PARAMS = re.compile(rb"\s*+\{\s*+(?:" + _PLAIN_MEMBER + rb',\s*+)*+"params"\s*+:\s*+(?=\{)')
_END_OF_PARAMS = re.compile(rb"\}(?=\s*+(?:,\s*+" + _PLAIN_MEMBER + rb")*+\}\s*+\Z)")
_AROUND_BYTES = 1024
_PLACE = re.compile(r"(?<=\(byte )\d+(?=\)\Z)")


def _is_batch(text: bytes) -> bool:
    # Without a copy of all of it, but where it begins with a thousand spaces.
    return (text[:1024].lstrip() or text.lstrip()).startswith(b"[")


def read_elements(text: bytes, max_nesting: int) -> list[Raw] | None:
    """Return the elements of a batch, None where the text is a single request. Raises ParseError, InvalidRequest."""
    try:
        if not text.isascii():
            text.decode()
        if not _is_batch(text):
            # A glance at the beginning spares the reading of the rest, which takes longest where it is deep.
            if len(text) > LONG_CALL_BYTES and is_deeper(text[:GLANCED_AT_BYTES], max_nesting):
                raise _too_deep(max_nesting)
            return None
        if has_more_elements(text, MAX_BATCH):
            _read_any(text)
            raise InvalidRequest(reason=f"a batch holds at most {MAX_BATCH} calls", counted_as="batch")
        elements = _read_batch(text, max_nesting)
    except UnicodeDecodeError as error:
        raise ParseError(reason=f"byte {error.start} is not UTF-8") from None
    except msgspec.DecodeError as error:
        raise ParseError(reason=_without_prefix(str(error))) from None
    except RecursionError:
        raise _too_deep(max_nesting) from None
    if not elements:
        raise InvalidRequest(reason="a batch holds at least one call")
    if len(elements) > MAX_BATCH:
        reason = f"a batch holds at most {MAX_BATCH} calls, and this one has {len(elements)}"
        raise InvalidRequest(reason=reason, counted_as="batch")
    return elements


def _read_batch(text: bytes, max_nesting: int) -> list[Raw]:
    try:
        return _read_elements(text)
    except RecursionError:
        return _split(text, max_nesting)


def _split(text: bytes, max_nesting: int) -> list[Raw]:
    """Return the elements of a batch that is nested too deep for the parser; those that are not to blame are read.

    Raises InvalidRequest where the text is too long to be taken apart here, which takes ten times as long.
    """
    if len(text) > _SPLIT_BYTES:
        raise _too_deep(max_nesting)
    elements = []
    depth = 0
    begins_at = text.index(b"[") + 1
    for found in _STRUCTURE.finditer(text):
        mark, ends_at = found[0], found.end()
        if mark[0] in b"[{":
            depth += len(mark)
        elif mark[0] in b"]}":
            depth -= len(mark)
        if (mark == b"," and depth == 1) or depth == 0:
            element = text[begins_at : ends_at - 1]
            begins_at = ends_at
            # What is too deep is not parsed here and will be refused by its nesting.
            elements.append(Raw(element) if is_deeper(element, max_nesting) else _read_any(element))
        if depth == 0:
            break
    if depth or text[begins_at:].strip(b" \t\r\n"):
        raise ParseError(reason="its brackets do not match")
    return elements


def _without_prefix(message: str) -> str:
    if message == "Input data was truncated":
        return "it ends too early, or holds half of a surrogate pair"
    return message.removeprefix("JSON is malformed: ")


def _too_deep(max_nesting: int) -> InvalidRequest:
    return InvalidRequest(reason=f"it is nested deeper than {max_nesting}", counted_as="nesting")


def _are_deeper(values: Iterable[Any], most: int) -> bool:
    """Whether the text of a value, or of one inside of it, is nested deeper than this."""
    for value in values:
        if isinstance(value, Raw):
            deeper = len(value) < LONG_CALL_BYTES and is_deeper(bytes(value), most)
        elif isinstance(value, list):
            deeper = _are_deeper(value, most - 1)
        elif isinstance(value, msgspec.Struct):
            deeper = _are_deeper([getattr(value, name) for name in value.__struct_fields__], most - 1)
        else:
            deeper = False
        if deeper:
            return True
    return False


def read_at_once(element: Raw, schemas: Mapping[str, MethodSchema], max_nesting: int) -> LongCall | None:
    """Return a long call that was read in one pass; None where that is not possible, which says nothing of it.

    What stands around the params is read for itself, and the params by the type of their method. Where both are valid,
    so is the whole. Where the params are no JSON, they may end earlier; else nothing behind them could make them so.

    Raises ParseError and InvalidRequest.
    """
    if len(element) <= LONG_CALL_BYTES:
        return None
    text = memoryview(element)
    before = _BEFORE_PARAMS.match(text, 0, _AROUND_BYTES)
    end = _END_OF_PARAMS.search(text, len(text) - _AROUND_BYTES)
    if before is None or end is None:
        return None
    try:
        envelope = _read_envelope(before[0] + b"{}" + text[end.end() :])
        id_of(envelope)
        schema = schemas.get(method_of(envelope))
    except (msgspec.DecodeError, InvalidRequest):
        return None
    if schema is None:
        return None
    begins_at = before.end()
    envelope.params = Raw(text[begins_at : end.end()])
    try:
        return LongCall(envelope, _values(schema, envelope.params))
    except RecursionError:
        raise _too_deep(max_nesting) from None
    except msgspec.DecodeError as error:
        reason = _without_prefix(str(error))
        if reason.startswith("trailing characters"):
            return None  # the params end elsewhere
        raise ParseError(reason=_PLACE.sub(lambda place: str(begins_at + int(place[0])), reason)) from None


def _values(schema: MethodSchema, params: Raw) -> dict[str, Any] | InvalidParams:
    """Return params by name, or what is wrong with them. Raises DecodeError and RecursionError: they are no JSON."""
    try:
        return schema.decode(params)
    except msgspec.ValidationError as error:
        _read_any(params)  # what follows was not read yet
        return schema.explain(str(error), params)
    except InvalidParams as error:
        _read_any(params)
        return error


def check_long_call(element: Raw, values: Mapping[str, Any], max_nesting: int) -> None:
    """Raise InvalidRequest where a param of a long call is too deep."""
    # Two levels are those of the call and of its params.
    if len(element) > LONG_CALL_BYTES and _are_deeper(values.values(), max_nesting - 2):
        raise _too_deep(max_nesting)


def read_envelope(element: Raw, max_nesting: int) -> Envelope:
    """Return the parts of a request. Raises ParseError and InvalidRequest."""
    try:
        envelope = _read_envelope(element)
    except msgspec.ValidationError:
        _check_json(element)
        raise InvalidRequest(reason="a request is an object") from None
    except msgspec.DecodeError as error:
        raise ParseError(reason=_without_prefix(str(error))) from None
    except RecursionError:
        raise _too_deep(max_nesting) from None
    if len(element) <= LONG_CALL_BYTES and is_deeper(bytes(element), max_nesting):
        raise _too_deep(max_nesting)
    return envelope


def _check_json(text: Raw) -> None:
    """Raise ParseError where a text is no JSON."""
    try:
        _read_any(text)
    except msgspec.DecodeError as error:
        raise ParseError(reason=_without_prefix(str(error))) from None
    except RecursionError:
        pass


def id_of(envelope: Envelope) -> Raw:
    """Return the id, null where there is none. Raises InvalidRequest."""
    first = _first(envelope.id)
    if first in b"tf[{" and first:
        raise InvalidRequest(reason="`id` is a string, a number or null")
    return envelope.id if first else _NULL


def method_of(envelope: Envelope) -> str:
    """Return the method's name; check the rest of the envelope too. Raises InvalidRequest."""
    if not _is_version_2(envelope.jsonrpc):
        raise InvalidRequest(reason='`jsonrpc` must be "2.0"')
    if _first(envelope.method) != b'"':
        raise InvalidRequest(reason="`method` must be a string")
    if _first(envelope.params) not in (b"{", b"[", b""):
        raise InvalidRequest(reason="`params` must be an object")
    return _read_string(envelope.method)


def _first(value: Raw) -> bytes:
    """Return the first byte of a value, without a copy of all of it."""
    return memoryview(value)[:1].tobytes()


def _is_version_2(version: Raw) -> bool:
    # There are other ways of writing the string.
    return bytes(version) == b'"2.0"' or (_first(version) == b'"' and _read_string(version) == "2.0")


def params_of(envelope: Envelope) -> Raw:
    """Return the params. Raises InvalidParams where they are a list."""
    first = _first(envelope.params)
    if first == b"[":
        raise InvalidParams(
            reason="Params go by name: send `params` as an object.", param="params", limit="an object", given="an array"
        )
    return envelope.params if first else NO_PARAMS
