"""Two or three sessions of which each takes its steps in order: every way in which these can come between each other.

In the manner of PostgreSQL's own isolation tests. A session is one transaction: BEGIN and its statement are its first
step, COMMIT is its last, so that others take their steps while it is open. A step that has to wait for a lock is left
waiting, as is seen in the server's tables of locks; the next step is somebody else's. A step of a session that still
waits is taken when its turn comes after all. Nothing sleeps.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from broker.storage.database import Connection

S = TypeVar("S")

# Only catches a hang.
PATIENCE = 30.0

# Unlike pg_stat_activity, which says that a session waits until it has noticed that it need not, this is so from the
# moment in which the other one's COMMIT is answered.
_IS_BLOCKED = "SELECT cardinality(pg_blocking_pids(%s)) > 0"

Statement = Callable[[Connection, S], Awaitable[Any]]


@dataclass(frozen=True)
class Case(Generic[S]):
    """What happens at the same time, and how it may end.

    `setup` makes the scene, on a connection of its own, and is given what it returns to the statements, which stand by
    the names of their sessions. `outcome` says in a few words what they have come to, from their results and from what
    is left; `permitted` has all those that there may be, each with the reason why.
    """

    setup: Callable[[Connection], Awaitable[S]]
    statements: Mapping[str, Statement[S]]
    outcome: Callable[[Connection, S, Mapping[str, Any]], Awaitable[str]]
    permitted: Mapping[str, str]


def interleavings(sessions: Sequence[str], steps: int = 2) -> Iterator[tuple[str, ...]]:
    """Yield every order in which sessions can take their steps, as the names of those whose turn it is."""

    def continued(left: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
        if not any(left.values()):
            yield ()
        for name in left:
            if left[name]:
                for rest in continued({**left, name: left[name] - 1}):
                    yield (name, *rest)

    yield from continued(dict.fromkeys(sessions, steps))


async def play(case: Case[S], order: Sequence[str], observer: Connection, connections: Sequence[Connection]) -> str:
    """Set the scene, let the sessions take their steps in this order; return the outcome. Raises what a step raises."""
    scene = await case.setup(observer)
    sessions = {
        name: _Session(connection, statement, scene)
        for (name, statement), connection in zip(case.statements.items(), connections, strict=False)
    }
    for name in order:
        sessions[name].due += 1
        await _go_on(sessions.values(), observer)
    async with asyncio.timeout(PATIENCE):
        while any(session.is_at_work for session in sessions.values()):
            # One that seemed to wait went on; or all wait for each other, and PostgreSQL will fail one of them.
            at_work = [session.task for session in sessions.values() if session.task and session.is_at_work]
            await asyncio.wait(at_work, return_when=asyncio.FIRST_COMPLETED)
            await _go_on(sessions.values(), observer)
    return await case.outcome(observer, scene, {name: session.result for name, session in sessions.items()})


class _Session(Generic[S]):
    """One transaction. `due` steps may be taken; `task` is the one that has been begun last."""

    def __init__(self, connection: Connection, statement: Statement[S], scene: S) -> None:
        self.connection = connection
        self.due = 0
        self.result: Any = None
        self.task: asyncio.Task[None] | None = None
        self._steps = deque([lambda: self._first(statement, scene), self._last])

    async def _first(self, statement: Statement[S], scene: S) -> None:
        await self.connection.execute("BEGIN")
        self.result = await statement(self.connection, scene)

    async def _last(self) -> None:
        await self.connection.execute("COMMIT")

    @property
    def is_at_work(self) -> bool:
        return self.task is not None and not self.task.done()

    def begin(self) -> bool:
        """Begin the next step, if one is due and the one before is done. Raises what that one has raised."""
        if self.is_at_work:
            return False
        if self.task is not None:
            self.task.result()
        if not self.due or not self._steps:
            return False
        self.due -= 1
        self.task = asyncio.ensure_future(self._steps.popleft()())
        return True

    async def settled(self, observer: Connection) -> None:
        """Return when the step is done, or waits for somebody's lock."""
        async with asyncio.timeout(PATIENCE):
            while self.is_at_work:
                cursor = await observer.execute(_IS_BLOCKED, [self.connection.info.backend_pid])
                if await cursor.fetchone() == (True,):
                    return


async def _go_on(sessions: Collection[_Session[S]], observer: Connection) -> None:
    """Let every session take the steps that are due, until each is done or waits."""
    for session in sessions:
        await session.settled(observer)
    while sum(session.begin() for session in sessions):
        for session in sessions:
            await session.settled(observer)
