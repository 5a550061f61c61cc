"""Threads for what cannot be waited for in an event loop: daemons, so that none of them holds the process at its end.

An executor's threads would: a name look-up or a login that hangs is waited for when the interpreter ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

__all__ = ["WorkerLoop", "in_daemon_thread"]

T = TypeVar("T")


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
    """An event loop that looks names up in daemon threads."""

    async def getaddrinfo(self, host: Any, port: Any, **hints: Any) -> Any:
        """See :func:`socket.getaddrinfo`."""
        return await in_daemon_thread(partial(socket.getaddrinfo, host, port, **hints), "resolver")
