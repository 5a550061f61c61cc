"""Waiting in an event loop, and threads for what cannot be waited for there.

These are daemons, so that none of them holds the process at its end. An executor's threads would: a name look-up or a
login that hangs is waited for when the interpreter ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

__all__ = ["WorkerLoop", "came_by", "in_daemon_thread", "wait_for"]

T = TypeVar("T")

#: How often the loop looks at its sockets between the end of a wait's time and a time-out: the next pass takes up
#: what has come, a second delivers it, TLS within TLS needs a third. A loop that stood still is no silence.
_LAST_LOOKS = 3


async def wait_for(event: asyncio.Event, timeout_s: float) -> None:
    """Wait for an event, at most so long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()


async def came_by(what: asyncio.Future[Any], ends_at_s: float) -> bool:
    """Wait for something until a time of the loop's clock; whether it came."""
    loop = asyncio.get_running_loop()
    woken = loop.create_future()  # asyncio.wait does the same, and takes twice as long for each call

    def wake(_: object = None) -> None:
        if not woken.done():
            woken.set_result(None)

    timer = loop.call_at(ends_at_s, wake)
    what.add_done_callback(wake)
    try:
        await woken
    finally:
        timer.cancel()
        what.remove_done_callback(wake)
    for _ in range(_LAST_LOOKS):
        if not what.done():
            await asyncio.sleep(0)
    return what.done()


async def in_daemon_thread(work: Callable[[], T], name: str) -> T:
    """Have ``work`` done in a thread of its own; gives what it gives, and raises what it raises.

    Raises:
        RuntimeError: no thread can be started.
    """
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: BaseException | None) -> None:
        if result.done():  # nobody waits any more
            return
        if error is None:
            result.set_result(value)  # type: ignore[arg-type]
        else:
            result.set_exception(error)

    def run() -> None:
        value, error = None, None
        try:
            value = work()
        except Exception as raised:  # noqa: BLE001 - it is the asker's to handle
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await result


class WorkerLoop(asyncio.SelectorEventLoop):
    """An event loop that looks names up in daemon threads.

    A look-up that outlasts its callers goes on alone, and later callers join it in place of starting another.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lookups: dict[tuple[Any, ...], asyncio.Task[Any]] = {}

    async def getaddrinfo(self, host: Any, port: Any, **hints: Any) -> Any:
        """See :func:`socket.getaddrinfo`."""
        key = (host, port, *sorted(hints.items()))
        running = self._lookups.get(key)
        if running is None:
            work = in_daemon_thread(partial(socket.getaddrinfo, host, port, **hints), "resolver")
            running = self._lookups[key] = self.create_task(work)
            running.add_done_callback(partial(self._looked_up, key))
        return await asyncio.shield(running)

    def _looked_up(self, key: tuple[Any, ...], task: asyncio.Task[Any]) -> None:
        del self._lookups[key]
        if not task.cancelled():
            task.exception()  # whoever asked may have gone: asyncio would tell of an error that nobody heard of
