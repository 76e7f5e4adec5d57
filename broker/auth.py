"""Who calls, and what he may do: tokens are checked here, and nowhere else.

Every process knows the tokens that count as of a second ago, by their ids; a caller's secret is hashed and compared in
constant time. Whoever shows no token that counts hears the same, after the same work, whether there is no such id, the
secret is wrong, or it was revoked: the tokens are read anew first, so that one that was just made is known.

Promises. What was revoked counts nowhere after five seconds: not for calls that wait, and not where the database cannot
be asked, because nobody is let in then. Once there was a token, `auto` asks for one for good. Failures from one address
are refused for a while when there were many; who shows a token that counts is never refused for the failures of others.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from broker.credentials import like, matches, read_token
from broker.errors import BrokerError, Forbidden, Overloaded, Unavailable
from broker.storage import tokens
from broker.storage.database import Connection, Database
from broker.storage.tokens import Grant, StoredToken

log = logging.getLogger("broker.auth")
audit_log = logging.getLogger("broker.audit")

REFRESH_SECONDS = 1.0
# A read that is not answered by then gives its connection back to those who call.
READ_SECONDS = 2.0
# Older than this, what is known of the tokens counts no more.
MAX_AGE_SECONDS = 4.0
# Read anew for callers who are not known, but not more often.
LEAST_AGE_SECONDS = 0.1
# The window in which failures of one address are counted, and of how many addresses.
THROTTLE_SECONDS = 60.0
MOST_ADDRESSES = 10_000
# Names of which it is remembered whether a token permits them.
MOST_NAMES = 10_000
# A header that is longer than one with a token needs to be is taken apart each time.
LONGEST_KNOWN = 128
_DUMMY_HASH = bytes(32)


class Unauthorized(Exception):
    """There is no token, or none that counts."""


class Throttled(Exception):
    """Too many failures from this address; `retry_after` says for how many seconds it is refused."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


@dataclass(frozen=True)
class CallLimits:
    """What one token may do at one time in one process: calls in flight, those that wait too, and calls a second."""

    in_flight: int = 1_000
    per_second: float = 10_000.0


@dataclass(eq=False)
class Caller:
    """Somebody with a token. `name` is the token's."""

    name: str
    grant: Grant
    limits: CallLimits = field(default_factory=CallLimits)
    in_flight: int = 0
    # Calls that may begin at once: what a second permits, and refilled in a second.
    _left: float = 0.0
    _counted_at: float = float("-inf")
    # What was asked before, for names that are asked for again and again.
    _known: dict[tuple[str, str], bool] = field(default_factory=dict)
    _counts_no_more: bool = False
    # Of those calls that wait.
    _waits: set[asyncio.Timeout] = field(default_factory=set)

    def begin(self) -> None:
        """Count a call that begins; `end` is to be called for it. Raises Overloaded."""
        if self._left >= 1 and self.in_flight < self.limits.in_flight:
            self._left -= 1  # What a second permits is refilled only where it is used up: the clock costs as much.
            self.in_flight += 1
            return
        if self.in_flight >= self.limits.in_flight:
            raise Overloaded(
                limit=self.limits.in_flight,
                what="calls in flight for one token",
                retry_after=1,
                counted_as="calls_per_token",
            )
        now = time.monotonic()
        per_second = self.limits.per_second
        self._left = min(per_second, self._left + (now - self._counted_at) * per_second)
        self._counted_at = now
        if self._left < 1:
            raise Overloaded(
                limit=per_second,
                what="calls a second for one token",
                retry_after=1,
                counted_as="call_rate_per_token",
            )
        self._left -= 1
        self.in_flight += 1

    def end(self) -> None:
        """Count a call that has ended."""
        self.in_flight -= 1

    @asynccontextmanager
    async def while_it_counts(self) -> AsyncIterator[None]:
        """Let something wait as long as the token counts. Raises Forbidden when it counts no more."""
        over = Forbidden(reason="The token was revoked, or has expired, while this call waited")
        if self._counts_no_more:
            raise over
        try:
            async with asyncio.timeout(None) as wait:
                self._waits.add(wait)
                try:
                    yield
                finally:
                    self._waits.discard(wait)
        except TimeoutError:
            raise over from None

    def call_off(self) -> None:
        """End all that waits: the token counts no more."""
        self._counts_no_more = True
        for wait in self._waits:
            wait.reschedule(0)

    def may(self, verb: str, name: str) -> bool:
        """Whether the token permits `send`, `receive` or `manage` for a name."""
        known = self._known.get((verb, name))
        if known is None:
            known = matches(getattr(self.grant, verb), name)
            if len(self._known) >= MOST_NAMES:
                self._known.clear()
            self._known[verb, name] = known
        return known

    @property
    def is_admin(self) -> bool:
        return self.grant.admin

    def like(self, verb: str) -> list[str]:
        """Return the patterns of a verb, as LIKE reads them."""
        return like(getattr(self.grant, verb))


class Auth:
    """The tokens, as this process knows them. `mode` is auto, required or off."""

    def __init__(self, database: Database, mode: str, *, max_failures: int, limits: CallLimits) -> None:
        self._database = database
        self._mode = mode
        self._max_failures = max_failures
        self._limits = limits
        self._callers: Mapping[str, tuple[bytes, Caller]] = {}
        # Who showed this Authorization header since the tokens were read: it need not be taken apart again.
        self._let_in: dict[str, Caller] = {}
        self._is_required = mode == "required"
        self._read_at = float("-inf")
        self._reading: asyncio.Task[None] | None = None
        # When counting began, and how many failures there were since; the oldest address first.
        self._failures: OrderedDict[str, tuple[float, int]] = OrderedDict()
        # Told when a token is needed where none was before: who was let in without one may still be here.
        self.became_required: Callable[[], None] = lambda: None

    @property
    def is_required(self) -> bool:
        """Whether a caller needs a token."""
        return self._is_required

    async def run(self) -> None:
        """Read the tokens once a second until cancelled."""
        if self._mode == "off":
            return
        while True:
            try:
                await self.refresh()
            except BrokerError as error:
                log.warning("the tokens were not read reason=%s", error.type)
            await asyncio.sleep(REFRESH_SECONDS)

    async def refresh(self) -> None:
        """Read the tokens now, with whoever else wants that. Raises Unavailable."""
        if self._mode == "off":
            return
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
        await asyncio.shield(self._reading)

    async def _read(self) -> None:
        asked_at = time.monotonic()
        read = _read if self._is_required else _read_if_there_are
        found, were_ever = await self._database.read(read, timeout=READ_SECONDS)
        before = {token_id: caller for token_id, (_, caller) in self._callers.items()}
        self._callers = {each.id: (each.secret_hash, self._caller(before.get(each.id), each)) for each in found}
        if self._read_at > float("-inf"):
            self._tell_of_changes(before)
        self._let_in.clear()
        was_required = self._is_required
        self._is_required = self._is_required or were_ever
        if self._is_required and not was_required:
            self.became_required()
        self._read_at = asked_at

    def _tell_of_changes(self, before: Mapping[str, Caller]) -> None:
        """Write down which tokens count since now, and which no more, whose calls do not wait any longer.

        Who makes and revokes them is not here.
        """
        now = {token_id: caller for token_id, (_, caller) in self._callers.items()}
        for token_id in now.keys() - before.keys():
            audit_log.info("token_counts name=%s token_id=%s outcome=%s", now[token_id].name, token_id, "ok")
        for token_id in before.keys() - now.keys():
            before[token_id].call_off()
            audit_log.info("token_counts_no_more name=%s token_id=%s outcome=%s", before[token_id].name, token_id, "ok")

    def _caller(self, before: Caller | None, token: StoredToken) -> Caller:
        """Return who has a token: him who was known before, whose calls are counted."""
        return before or Caller(token.name, token.grant, self._limits)

    def known(self, authorization: str | None) -> Caller | None:
        """Return who calls, where he was let in before and nothing has changed since; None where `identify` must say.

        Only who has shown a good token finds himself here, so what it takes to look tells nothing of a token.
        """
        if self._mode == "off" or authorization is None or time.monotonic() - self._read_at > MAX_AGE_SECONDS:
            return None
        return self._let_in.get(authorization)

    async def identify(self, authorization: str | None, address: str) -> Caller | None:
        """Return who calls, by his Authorization header; None where nobody needs a token.

        Raises Unauthorized, Throttled, and Unavailable where the tokens cannot be looked up.
        """
        if self._mode == "off":
            return None
        if self._mode == "auto" and not self._is_required:
            return None
        if time.monotonic() - self._read_at > MAX_AGE_SECONDS:
            await self._refresh_or_refuse()
        caller = self._find(authorization)
        if caller is None:
            caller = await self._find_anew(authorization, address)
        if authorization is not None and len(authorization) < LONGEST_KNOWN and len(self._let_in) < MOST_NAMES:
            self._let_in[authorization] = caller
        return caller

    async def _find_anew(self, authorization: str | None, address: str) -> Caller:
        """Look once more when the tokens have been read anew. Raises Unauthorized and Throttled."""
        self._refuse_if_throttled(address)
        came_at = time.monotonic()
        await asyncio.sleep(self._read_at + LEAST_AGE_SECONDS - came_at)
        while self._read_at < came_at:
            await self._refresh_or_refuse()
        caller = self._find(authorization)
        if caller is None:
            self._note_failure(address)
            raise Unauthorized
        return caller

    async def _refresh_or_refuse(self) -> None:
        try:
            await self.refresh()
        except BrokerError as error:
            raise Unavailable(
                reason="The tokens cannot be looked up, because the database cannot be reached"
            ) from error

    def _find(self, authorization: str | None) -> Caller | None:
        scheme, _, text = (authorization or "").partition(" ")
        presented = read_token(text.strip()) if scheme.lower() == "bearer" else None
        if presented is None:
            return None
        secret_hash, caller = self._callers.get(presented.id, (_DUMMY_HASH, None))
        return caller if hmac.compare_digest(secret_hash, presented.secret_hash) else None

    def _refuse_if_throttled(self, address: str) -> None:
        since, failures = self._failures.get(address, (0.0, 0))
        left = since + THROTTLE_SECONDS - time.monotonic()
        if failures >= self._max_failures and left > 0:
            raise Throttled(left)

    def _note_failure(self, address: str) -> None:
        now = time.monotonic()
        since, failures = self._failures.pop(address, (now, 0))
        if now - since > THROTTLE_SECONDS:
            since, failures = now, 0
        self._failures[address] = (since, failures + 1)
        if failures + 1 == self._max_failures:
            # Once: what comes now is only counted, or whoever guesses would fill the log.
            audit_log.warning("no access caller=%s address=%s outcome=%s", "-", address, "throttled")
        if len(self._failures) > MOST_ADDRESSES:
            self._failures.popitem(last=False)


async def _read(connection: Connection) -> tuple[list[StoredToken], bool]:
    return await tokens.read_valid(connection), True


async def _read_if_there_are(connection: Connection) -> tuple[list[StoredToken], bool]:
    # One statement a second where there are none, as where there are.
    return await _read(connection) if await tokens.were_ever(connection) else ([], False)
