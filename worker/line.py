"""One connection to Redis in an event loop: requests leave as they come, answers arrive in their order.

redis-py opens it (address, TLS, login) and names its errors; from then on nothing here ever waits.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import hiredis
import redis

from worker.store import SOCKET_TIMEOUT_S, Request, Words

__all__ = ["Line"]

T = TypeVar("T")

#: What a socket that must not wait says instead: of TLS, a record can be incomplete in either direction.
_NOT_NOW = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_READ_SIZE = 64 * 1024
_NOTHING = object()


@dataclass(slots=True)
class _Asked:
    """A request that was sent."""

    request: Request[Any]
    on_answer: Callable[[Any], None]
    on_error: Callable[[redis.RedisError], None]
    asked_at_s: float  # monotonic
    wanted: int  # answers still to come
    answers: list[Any]
    anew: bool = False  # sent a second time, with its script

    def done(self) -> None:
        try:
            result = self.request.read(self.answers)
        except redis.RedisError as error:
            self.on_error(error)
        except Exception as error:  # noqa: BLE001 - whatever the server said, its asker must hear of it
            self.on_error(redis.ResponseError(f"an answer that makes no sense: {type(error).__name__}"))
        else:
            self.on_answer(result)


class Line:
    """A connection of :meth:`worker.store.Store.connect`, used by the thread of ``loop`` alone.

    ``on_broken`` is called once if the connection breaks or an answer takes longer than
    :data:`~worker.store.SOCKET_TIMEOUT_S`; what ran of the requests that were not answered is not known then, and
    nobody is told of them one by one.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, connection: Any, on_broken: Callable[[redis.RedisError], None]
    ) -> None:
        self.connection = connection
        self._loop = loop
        self._on_broken = on_broken
        self._sock = connection._sock  # redis-py lends it under this name only, and likewise what names errors
        self._sock.setblocking(False)
        self._fileno = self._sock.fileno()
        self._reader = hiredis.Reader(
            protocolError=redis.InvalidResponse, replyError=connection._parser.parse_error, notEnoughData=_NOTHING
        )
        self._asked: deque[_Asked] = deque()
        self._unsent = bytearray()
        self._blocked = False  # the rest is written when the socket takes it
        self._alarm: asyncio.TimerHandle | None = None
        self._open = True
        loop.add_reader(self._fileno, self._readable)

    def ask(
        self,
        request: Request[T],
        on_answer: Callable[[T], None],
        on_error: Callable[[redis.RedisError], None],
    ) -> None:
        """Send ``request``; one of the two is called later, ``on_error`` for an answer that is an error."""
        commands = request.commands
        self._asked.append(_Asked(request, on_answer, on_error, time.monotonic(), len(commands), []))
        self._send(commands)
        if self._alarm is None:
            self._alarm = self._loop.call_later(SOCKET_TIMEOUT_S, self._look)

    def close(self) -> None:
        """Nothing is sent or told any more; the connection is its owner's to close."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._fileno)
            self._loop.remove_writer(self._fileno)
            if self._alarm is not None:
                self._alarm.cancel()

    def _broken(self, error: redis.RedisError) -> None:
        if self._open:
            self.close()
            self._on_broken(error)

    # -- out

    def _send(self, commands: Sequence[Words]) -> None:
        self._unsent += b"".join(self.connection.pack_commands(commands))
        if not self._blocked:
            self._writable()

    def _writable(self) -> None:
        try:
            sent = self._sock.send(self._unsent)
        except _NOT_NOW:
            sent = 0
        except OSError as error:
            self._loop.call_soon(self._broken, redis.ConnectionError(f"not sent: {type(error).__name__}"))
            return
        del self._unsent[:sent]
        if self._unsent and not self._blocked:
            self._loop.add_writer(self._fileno, self._writable)
        elif self._blocked and not self._unsent:
            self._loop.remove_writer(self._fileno)
        self._blocked = bool(self._unsent)

    # -- in

    def _readable(self) -> None:
        try:
            while self._take(self._sock.recv(_READ_SIZE)):
                pass
        except _NOT_NOW:
            pass
        except redis.RedisError as error:  # what came is no answer
            self._broken(error)
        except OSError as error:
            self._broken(redis.ConnectionError(f"no answer: {type(error).__name__}"))

    def _take(self, data: bytes) -> bool:
        """Take in what came; whether to look for more at once: of TLS, the rest of a record is seen by nobody else."""
        if not data:
            self._broken(redis.ConnectionError("the server closed the connection"))
            return False
        self._reader.feed(data)
        while self._open and (answer := self._reader.gets()) is not _NOTHING:
            self._answer(answer)
        return self._open and (len(data) == _READ_SIZE or isinstance(self._sock, ssl.SSLSocket))

    def _answer(self, answer: Any) -> None:
        if not self._asked:
            self._broken(redis.InvalidResponse("an answer that nobody asked for"))
            return
        asked = self._asked[0]
        asked.answers.append(answer)
        asked.wanted -= 1
        if asked.wanted:
            return
        self._asked.popleft()
        if asked.anew:
            asked.answers[-2:] = asked.answers[-1:]
        elif isinstance(answer, redis.exceptions.NoScriptError):
            self._ask_anew(asked)
            return
        asked.done()

    def _ask_anew(self, asked: _Asked) -> None:
        """The server did not have the script: load it and call it, behind whatever was asked meanwhile."""
        asked.answers.pop()
        asked.wanted, asked.anew, asked.asked_at_s = 2, True, time.monotonic()
        self._asked.append(asked)
        self._send(asked.request.anew())

    def _look(self) -> None:
        """Whether the oldest request has waited too long; else look again when it would have."""
        self._alarm = None
        left_s = self._left_s()
        if left_s <= 0:
            # A process that was paused hears of its alarms first, with the answers unread.
            self._readable()
            left_s = self._left_s()
        if left_s <= 0:
            self._broken(redis.TimeoutError("no answer in time"))
        elif self._asked and self._open and self._alarm is None:
            self._alarm = self._loop.call_later(left_s, self._look)

    def _left_s(self) -> float:
        return self._asked[0].asked_at_s + SOCKET_TIMEOUT_S - time.monotonic() if self._asked else SOCKET_TIMEOUT_S
