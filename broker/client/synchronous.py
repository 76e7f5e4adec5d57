"""The client for programs that are not asynchronous: every method blocks until it has its result.

    with SyncClient("http://127.0.0.1:8080") as client:
        client.enqueue("mail", {"to": "ada"})

It is no second implementation: `Client` runs on an event loop in a thread of its own, and each method here is made from
the one there. It may be used from several threads, also from one whose own event loop runs, which then stands still.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from queue import SimpleQueue
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, Unpack, cast

from broker.client.client import DEFAULT_URL, Client
from broker.client.consumer import Consumer
from broker.client.messages import ConsumerOptions, Handler
from broker.client.signals import told_by_signals

P = ParamSpec("P")
R = TypeVar("R")

_END = object()


def _sync(
    method: Callable[Concatenate[Client, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[SyncClient, P], R]:
    @functools.wraps(method)
    def call(self: SyncClient, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._run(lambda: method(self._client, *args, **kwargs))

    return call


def _iterated(
    method: Callable[Concatenate[Client, P], AsyncIterator[R]],
) -> Callable[Concatenate[SyncClient, P], Iterator[R]]:
    @functools.wraps(method)
    def iterate(self: SyncClient, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[R]:
        found = method(self._client, *args, **kwargs)

        async def following() -> Any:
            return await anext(found, _END)

        while (one := self._run(following)) is not _END:
            yield one

    return iterate


class SyncClient:
    """One broker, to be used as `with SyncClient(url, token) as client`; the parameters are those of `Client`."""

    def __init__(
        self, url: str = DEFAULT_URL, token: str | None = None, *, deadline: float = 30.0, attempt_timeout: float = 15.0
    ) -> None:
        self._client = Client(url, token, deadline=deadline, attempt_timeout=attempt_timeout)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @classmethod
    def from_environment(cls, *, deadline: float = 30.0) -> Self:
        """Return a client of the broker that BROKER_URL and BROKER_TOKEN name."""
        made = cls(deadline=deadline)
        made._client = Client.from_environment(deadline=deadline)
        return made

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wonderq-client", daemon=True)
        self._thread.start()
        self._run(self._client.__aenter__)
        return self

    def __exit__(self, *_: object) -> None:
        loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return
        self._run(self._client.__aexit__)
        self._loop = None
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    call = _sync(Client.call)
    enqueue = _sync(Client.enqueue)
    enqueue_batch = _sync(Client.enqueue_batch)
    dequeue = _sync(Client.dequeue)
    delete = _sync(Client.delete)
    delete_batch = _sync(Client.delete_batch)
    extend_visibility = _sync(Client.extend_visibility)
    extend_visibility_batch = _sync(Client.extend_visibility_batch)
    create_queue = _sync(Client.create_queue)
    update_queue = _sync(Client.update_queue)
    get_queue = _sync(Client.get_queue)
    list_queues = _iterated(Client.list_queues)
    list_messages = _iterated(Client.list_messages)
    purge_queue = _sync(Client.purge_queue)
    delete_queue = _sync(Client.delete_queue)
    redrive = _sync(Client.redrive)
    count_messages = _sync(Client.count_messages)
    create_topic = _sync(Client.create_topic)
    subscribe = _sync(Client.subscribe)
    unsubscribe = _sync(Client.unsubscribe)
    publish = _sync(Client.publish)
    broadcast = _sync(Client.broadcast)

    def consume(self, queue: str, handler: Handler, **options: Unpack[ConsumerOptions]) -> None:
        """Let a handler have every message, in as many threads as `concurrency`, until SIGTERM or SIGINT.

        In the main thread; in another one signals do not come, and it goes on until `max_messages` or an error.
        """

        async def make() -> Consumer:
            return Consumer(self._client, queue, handler, **options)

        consumer = self._run(make)
        loop = self._loop
        assert loop is not None, "_run has seen it"
        with told_by_signals(lambda: loop.call_soon_threadsafe(consumer.told_to_stop)):
            self._run(lambda: consumer.run(handle_signals=False))

    def _run(self, work: Callable[[], Coroutine[Any, Any, R]]) -> R:
        """Do something on the loop's thread; return its result. Ctrl-C cancels it.

        The coroutine is made over there: of one made here, Ctrl-C before the handing over would leave a warning.
        """
        if self._loop is None:
            raise RuntimeError("The client is not open: use `with SyncClient(...) as client`.")
        if threading.current_thread() is self._thread:
            raise RuntimeError("A coroutine of this client's own loop cannot wait for it: use Client there.")
        loop, answer, tasks = (
            self._loop,
            SimpleQueue[tuple[R | None, BaseException | None]](),
            list[asyncio.Task[None]](),
        )

        async def deliver() -> None:
            try:
                result = await work()
            except BaseException as error:
                answer.put((None, error))
            else:
                answer.put((result, None))

        def cancel() -> None:
            for task in tasks:  # None, where Ctrl-C came before the handing over.
                task.cancel()

        # Not by a future: Ctrl-C between two steps of its lock, which are Python's, leaves that locked for ever.
        try:
            loop.call_soon_threadsafe(lambda: tasks.append(loop.create_task(deliver())))
            result, error = answer.get()
        except BaseException:
            loop.call_soon_threadsafe(cancel)
            raise
        if error is not None:
            raise error
        return cast(R, result)
