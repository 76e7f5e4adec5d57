"""What can be known of a JSON text before it is taken apart: how deep it is, and whether it has too many parts.

A request may be made of nothing but brackets, strings or commas, millions of them: nothing here makes an object for
each.
"""

from __future__ import annotations

import re
from itertools import accumulate
from operator import add

_CHUNK = 65_536
_NOT_MARKS = bytes(set(range(256)) - set(b'[]{}"'))
_BITS = bytes.maketrans(b"[{]}", b"1100")
# How much of a list is looked at for the number of its elements.
_LOOKED_AT = 65_536
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[{]++|[\]}]++|,', re.DOTALL)


def _steps(brackets: int) -> list[int]:
    """Return the depth behind each of eight brackets, given as the bits of a byte: 1 opens."""
    return list(accumulate(1 if brackets >> place & 1 else -1 for place in range(7, -1, -1)))


# By eight brackets: by how much the depth has changed behind them, as a signed byte, and its highest on the way.
_CHANGE = bytes(_steps(brackets)[-1] & 0xFF for brackets in range(256))
_HIGHEST = bytes(max(0, *_steps(brackets)) for brackets in range(256))


def is_deeper(text: bytes, most: int) -> bool:
    """Whether valid JSON is nested deeper than this; a scalar has a depth of 0."""
    # Few brackets cannot be deep.
    if text.count(b"[") + text.count(b"{") <= most:
        return False
    # Without escaped quotes a string ends at the next one; pairs of quotes do not change what lies inside.
    marks = text.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, _NOT_MARKS).replace(b'""', b"")
    depth = in_string = 0
    for start in range(0, len(marks), _CHUNK):
        parts = marks[start : start + _CHUNK].split(b'"')
        brackets = b"".join(parts[in_string::2])
        in_string ^= (len(parts) - 1) & 1
        if not brackets:
            continue
        # Eight at a time, filled up with some that close; reading digits of base 2 takes a time that grows with them.
        missing = -len(brackets) % 8
        packed = int(brackets.translate(_BITS) + b"0" * missing, 2).to_bytes((len(brackets) + missing) // 8, "big")
        depths = list(accumulate(memoryview(packed.translate(_CHANGE)).cast("b"), initial=depth))
        depth = depths.pop() + missing
        if max(depths) + 8 > most and max(map(add, depths, packed.translate(_HIGHEST))) > most:
            return True
    return False


def has_more_elements(text: bytes | memoryview, number: int, *, at_depth: int = 1) -> bool:
    """Whether the beginning of a text shows already that its list has more elements than this.

    Where it does not, nobody knows. The list is the text itself, or what lies in it at a depth. The text need not be
    valid.
    """
    depth = elements = 0
    for found in _TOKEN.finditer(text, 0, _LOOKED_AT):
        marks = found[0]
        if marks[0] in b"[{":
            depth += len(marks)
        elif marks[0] in b"]}":
            depth -= len(marks)
            if depth <= 0:
                return False
        elif marks == b"," and depth == at_depth:
            elements += 1
            if elements >= number:
                return True
    return False
