"""Tokens in the database: make, list, revoke, and read them all for those who check.

Few and small: every process reads those that count once a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from broker.credentials import new_token
from broker.storage import sessions
from broker.storage.database import Connection

# Of one name, so that one can be replaced by another while both count; and in all.
MAX_OF_A_NAME = 2
MAX_TOKENS = 10_000


class TooManyTokens(Exception):
    """There are as many tokens as there may be; the message says which, and what to do."""


class Grant(NamedTuple):
    """What a token permits: three verbs, each for names that one of its patterns matches, and `admin`."""

    send: Sequence[str] = ()
    receive: Sequence[str] = ()
    manage: Sequence[str] = ()
    admin: bool = False


class StoredToken(NamedTuple):
    """A token that counts now."""

    id: str
    name: str
    secret_hash: bytes
    grant: Grant


class ShownToken(NamedTuple):
    """A token as it is listed. `state` is valid, expired or revoked."""

    id: str
    name: str
    grant: Grant
    created_at: datetime
    expires_at: datetime | None
    state: str


_LOCK = """
LOCK TABLE broker.tokens IN SHARE ROW EXCLUSIVE MODE
"""

_COUNT = """
SELECT count(*) FILTER (WHERE name = %(name)s), count(*)
FROM broker.tokens
WHERE revoked_at IS NULL AND (expires_at IS NULL OR expires_at > statement_timestamp())
"""

_CREATE = """
INSERT INTO broker.tokens (id, name, secret_hash, send, receive, manage, admin, expires_at)
VALUES (
    %(id)s, %(name)s, %(secret_hash)s, %(send)s, %(receive)s, %(manage)s, %(admin)s,
    statement_timestamp() + %(expires_in)s::float8 * interval '1 second'
)
"""


async def create(connection: Connection, name: str, grant: Grant, expires_in: float | None) -> str:
    """Make a token; return its text, which is told nowhere else. `expires_in` in seconds, None: never.

    Raises TooManyTokens.
    """
    made = new_token()
    async with connection.transaction():
        await connection.execute(_LOCK)
        row = await (await connection.execute(_COUNT, {"name": name})).fetchone()
        assert row is not None, "a select of aggregates returns one row"
        if row[0] >= MAX_OF_A_NAME:
            raise TooManyTokens(
                f"{name} has {MAX_OF_A_NAME} tokens that count; revoke the older one first: token revoke {name} --older"
            )
        if row[1] >= MAX_TOKENS:
            raise TooManyTokens(f"There are {MAX_TOKENS} tokens that count; revoke one that nobody needs: token list")
        params = {"id": made.id, "secret_hash": made.secret_hash, "name": name, "expires_in": expires_in}
        lists = {verb: list(patterns) for verb, patterns in zip(("send", "receive", "manage"), grant[:3], strict=True)}
        await connection.execute(_CREATE, params | lists | {"admin": grant.admin})
    return made.text


_LIST = """
SELECT
    id, name, send, receive, manage, admin, created_at, expires_at,
    CASE
        WHEN revoked_at IS NOT NULL THEN 'revoked'
        WHEN expires_at <= statement_timestamp() THEN 'expired'
        ELSE 'valid'
    END
FROM broker.tokens
ORDER BY name, created_at, id
"""


async def list_all(connection: Connection) -> list[ShownToken]:
    """Return every token that there ever was, by name, the oldest first."""
    return [
        ShownToken(token_id, name, Grant(*grant), created_at, expires_at, state)
        for token_id, name, *grant, created_at, expires_at, state in await (await connection.execute(_LIST)).fetchall()
    ]


# Locks: the rows that it changes; who revokes the same at the same time finds them revoked.
_REVOKE = """
UPDATE broker.tokens
SET revoked_at = statement_timestamp()
WHERE revoked_at IS NULL AND name = %(name)s
    AND (
        NOT %(older)s
        OR id <> (
            SELECT t.id
            FROM broker.tokens t
            WHERE t.name = %(name)s AND t.revoked_at IS NULL
            ORDER BY t.created_at DESC, t.id
            LIMIT 1
        )
    )
"""


async def revoke(connection: Connection, name: str, *, older: bool = False) -> int:
    """Revoke the tokens of a name, all but the newest where it is the `older`; return how many."""
    return (await connection.execute(_REVOKE, {"name": name, "older": older})).rowcount


_VALID = """
SELECT id, name, secret_hash, send, receive, manage, admin
FROM broker.tokens
WHERE revoked_at IS NULL AND (expires_at IS NULL OR expires_at > statement_timestamp())
"""

_EVER = """
SELECT EXISTS (SELECT FROM broker.tokens WHERE id > '')
"""


async def read_valid(connection: Connection) -> list[StoredToken]:
    """Return the tokens that count now."""
    rows = await (await connection.execute(_VALID)).fetchall()
    return [StoredToken(token_id, name, secret, Grant(*grant)) for token_id, name, secret, *grant in rows]


async def were_ever(connection: Connection) -> bool:
    """Whether there ever was a token."""
    return (await (await connection.execute(_EVER)).fetchone()) == (True,)


async def were_ever_on(conninfo: str) -> bool:
    """Whether there ever was a token in a database. Raises psycopg.Error."""
    async with await sessions.connect(conninfo) as connection:
        return await were_ever(connection)
