"""Tokens and what they permit, as text: how a token is made and read, and which names a pattern stands for.

A token is `wq_`, an id of 16 characters, a dot and a secret of 43: 256 random bits in base64 for URLs. Who has the
database has only the hash of the secret.
"""

from __future__ import annotations

import re
import secrets
from base64 import urlsafe_b64encode
from collections.abc import Iterable
from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple

SECRET_BYTES = 32
_TOKEN = re.compile(r"wq_([0-9a-f]{16})\.([A-Za-z0-9_-]{43})")
_PATTERN = re.compile(r"[A-Za-z0-9._*-]{1,128}")


class NewToken(NamedTuple):
    """A token that nobody has had before: its text is told once, the rest is kept."""

    id: str
    secret_hash: bytes
    text: str


class Presented(NamedTuple):
    """What a caller shows: which token he says it is, and the hash of the secret that he has."""

    id: str
    secret_hash: bytes


def new_token() -> NewToken:
    """Make a token."""
    token_id = secrets.token_hex(8)
    secret = urlsafe_b64encode(secrets.token_bytes(SECRET_BYTES)).rstrip(b"=").decode()
    return NewToken(token_id, _hash(secret), f"wq_{token_id}.{secret}")


def read_token(text: str) -> Presented | None:
    """Return what a token's text says; None where it is not one that a broker makes."""
    found = _TOKEN.fullmatch(text)
    return None if found is None else Presented(found[1], _hash(found[2]))


def _hash(secret: str) -> bytes:
    return sha256(secret.encode()).digest()


def is_pattern(text: str) -> bool:
    """Whether a name pattern could match a name: letters, digits, dots, underscores, hyphens, and *."""
    return _PATTERN.fullmatch(text) is not None


def matches(patterns: Iterable[str], name: str) -> bool:
    """Whether one of these patterns stands for a name; in a pattern only * is special, and stands for anything."""
    return any(_compiled(pattern).fullmatch(name) is not None for pattern in patterns)


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, pattern.split("*"))), re.DOTALL)


def like(patterns: Iterable[str]) -> list[str]:
    """Return patterns as LIKE reads them, with a backslash before what is special there."""
    return [re.sub(r"([\\%_])", r"\\\1", pattern).replace("*", "%") for pattern in patterns]
