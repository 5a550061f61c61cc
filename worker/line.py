"""Redis in an event loop: requests leave as they come, answers arrive in their order, and nothing here ever waits.

redis-py opens each connection (address, TLS, login), in a thread that may wait, and names the server's errors.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import hiredis
import redis

from worker import log
from worker.helpers import Aside
from worker.store import SOCKET_TIMEOUT_S, Request, Store, Words

__all__ = ["Line", "Lines"]

T = TypeVar("T")

#: What a socket that must not wait says instead: of TLS, a record can be incomplete in either direction.
_NOT_NOW = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_READ_SIZE = 64 * 1024
_NOTHING = object()
#: First and longest wait while Redis is away, s; between them exponential with jitter.
_AWAY_FIRST_S, _AWAY_LONGEST_S = 0.05, 1.0
#: After Redis came back, others' expired leases are left alone this long, s: their holders settle first.
_SETTLE_FIRST_S = 2.0


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
    :data:`~worker.store.SOCKET_TIMEOUT_S`, and after it ``on_error`` of each request that was not answered; whether
    those ran is not known then.
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
        """Send ``request``; one of the two is called later, ``on_error`` for an answer that is an error or for none."""
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
            while self._asked:
                self._asked.popleft().on_error(error)

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


class Lines:
    """Two connections: one for the claim that waits at the queue, one for all else. Each is opened anew when it breaks.

    Used by the thread of ``loop`` alone; ``aside`` does what waits; ``on_up`` is called when a connection stands.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, store: Store, aside: Aside, on_up: Callable[[], None]) -> None:
        self._loop = loop
        self._store = store
        self._aside = aside
        self._on_up = on_up
        self._lines: list[Line | None] = [None, None]
        self._waiting = 0  # which one waits, or waited last, at the queue
        self._troubles = 0
        self._back_at_s = 0.0  # monotonic
        self.is_away = False
        self.refused: redis.AuthenticationError | None = None  # Redis does not know our password any more

    def open(self) -> None:
        """Connect."""
        for number in range(len(self._lines)):
            self._reach(number)

    def close(self) -> None:
        """Part with both."""
        for number, line in enumerate(self._lines):
            if line is not None:
                line.close()
                self._store.release(line.connection)
                self._lines[number] = None

    @property
    def can_ask(self) -> bool:
        """Whether the connection for all else stands."""
        return self._lines[1 - self._waiting] is not None

    @property
    def are_up(self) -> bool:
        """Whether both stand."""
        return None not in self._lines

    @property
    def may_take_lost(self) -> bool:
        """Whether the holders of expired leases have had time to settle since Redis was away."""
        return not self.is_away and time.monotonic() >= self._back_at_s

    def ask(
        self, request: Request[T], on_answer: Callable[[T], None], on_error: Callable[[redis.RedisError], None]
    ) -> None:
        """Send ``request``, never behind a claim that waits; see :meth:`Line.ask`."""
        self._ask(1 - self._waiting, request, on_answer, on_error)

    def ask_waiting(
        self, request: Request[T], on_answer: Callable[[T], None], on_error: Callable[[redis.RedisError], None]
    ) -> None:
        """Send the claim that waits; there is one at a time."""
        # In turn, so that neither connection is ever idle for so long that the server closes it.
        self._waiting = 1 - self._waiting
        self._ask(self._waiting, request, on_answer, on_error)

    def _ask(
        self,
        number: int,
        request: Request[T],
        on_answer: Callable[[T], None],
        on_error: Callable[[redis.RedisError], None],
    ) -> None:
        line = self._lines[number]
        if line is None:
            self._loop.call_soon(on_error, redis.ConnectionError("not connected"))
        else:
            line.ask(request, on_answer, on_error)

    def worked(self) -> None:
        """Note that Redis did what it was asked."""
        self._troubles = 0
        if self.is_away:
            self.is_away = False
            self._back_at_s = time.monotonic() + _SETTLE_FIRST_S
            log.info("redis", state="back")

    def trouble(self, error: BaseException) -> float:
        """Note that it did not; gives how long to leave it alone, s."""
        if isinstance(error, redis.AuthenticationError):
            self.refused = error
        if not self.is_away:
            self.is_away = True
            log.error("redis", state="away", error=type(error).__name__)
        longest_s = min(_AWAY_FIRST_S * (1 << min(self._troubles, 10)), _AWAY_LONGEST_S)
        self._troubles += 1
        return longest_s * (0.5 + random.random() / 2)

    def _reach(self, number: int) -> None:
        self._aside(self._store.connect, partial(self._connected, number))

    def _connected(self, number: int, connection: Any, error: BaseException | None) -> None:
        if error is not None:
            self._loop.call_later(self.trouble(error), self._reach, number)
            return
        self._lines[number] = Line(self._loop, connection, partial(self._broken, number))
        self._on_up()

    def _broken(self, number: int, error: redis.RedisError) -> None:
        line, self._lines[number] = self._lines[number], None
        if line is not None:
            self._store.release(line.connection)
        self._loop.call_later(self.trouble(error), self._reach, number)
