"""Values in PostgreSQL's binary format, where psycopg's own way would take most of the time.

Lists are sent as arrays: psycopg can do that for lists of any type, and looks at every element for it. Here the type
is said by who sends it. Times come as the eight bytes that `timestamptz_send` writes; most messages of a batch share
them, so they are read once.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import ClassVar

from psycopg.abc import Buffer
from psycopg.adapt import AdaptersMap, Dumper
from psycopg.pq import Format

_HEAD = struct.Struct(">iiIii")
_LENGTH = struct.Struct(">i").pack
_UUID_LENGTH = _LENGTH(16)
_MICROSECONDS = struct.Struct(">q")
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)


def moment_of(data: bytes) -> datetime:
    """Return the time in UTC that `timestamptz_send` has written; of infinity there is none."""
    return _EPOCH + timedelta(microseconds=_MICROSECONDS.unpack(data)[0])


class Array:
    """An array of one dimension. An element is in the binary format of its type, with its length before it."""

    oid: ClassVar[int]
    element_oid: ClassVar[int]

    __slots__ = ("elements", "length")

    def __init__(self, elements: bytes, length: int) -> None:
        self.elements = elements
        self.length = length


class Int4Array(Array):
    """int[], without NULLs."""

    oid, element_oid = 1007, 23

    __slots__ = ()

    def __init__(self, values: Sequence[int]) -> None:
        pairs = [part for value in values for part in (4, value)]
        super().__init__(struct.pack(f">{len(pairs)}i", *pairs), len(values))


class Int8Array(Array):
    """bigint[], without NULLs."""

    oid, element_oid = 1016, 20

    __slots__ = ()

    def __init__(self, values: Sequence[int]) -> None:
        pairs = [part for value in values for part in (8, value)]
        super().__init__(struct.pack(">" + "iq" * len(values), *pairs), len(values))


class ByteaArray(Array):
    """bytea[], without NULLs."""

    oid, element_oid = 1001, 17

    __slots__ = ()

    def __init__(self, values: Sequence[bytes]) -> None:
        super().__init__(b"".join([_LENGTH(len(value)) + value for value in values]), len(values))


class UuidArray(Array):
    """uuid[], without NULLs."""

    oid, element_oid = 2951, 2950

    __slots__ = ()

    def __init__(self, values: Sequence[bytes]) -> None:
        super().__init__(b"".join([_UUID_LENGTH + value for value in values]), len(values))


def random_uuids(count: int) -> UuidArray:
    """Return so many values of 16 random bytes from the system's generator for secrets."""
    values = os.urandom(16 * count)
    return UuidArray([values[start : start + 16] for start in range(0, len(values), 16)])


class TextArray(Array):
    """text[] in UTF-8, without NULLs."""

    oid, element_oid = 1009, 25

    __slots__ = ()

    def __init__(self, values: Sequence[bytes]) -> None:
        super().__init__(b"".join([_LENGTH(len(value)) + value for value in values]), len(values))


def _dumper_of(array: type[Array]) -> type[Dumper]:
    class ArrayDumper(Dumper):
        oid = array.oid
        format = Format.BINARY

        def dump(self, obj: Array) -> Buffer:
            return _HEAD.pack(1, 0, obj.element_oid, obj.length, 1) + obj.elements

    return ArrayDumper


def register(adapters: AdaptersMap) -> None:
    """Let a connection send these arrays."""
    for array in (Int4Array, Int8Array, ByteaArray, UuidArray, TextArray):
        adapters.register_dumper(array, _dumper_of(array))
