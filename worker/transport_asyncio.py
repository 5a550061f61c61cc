"""The worker's way to the exchange: many calls at once in one event loop, on connections that are kept.

Asyncio carries the bytes, :mod:`worker.http1` reads the answers. Can the exchange have seen a request? That is known
to the byte: ``seen`` turns true when the first one is handed to the connection.
"""

from __future__ import annotations

import asyncio
import select
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from worker.classify import NO_ANSWER, SILENCE
from worker.clock import local_ns
from worker.http1 import MalformedResponse, ResponseReader
from worker.transport import BODY_LIMIT, IDLE_BOUND_S, Failed, Raw, Request, Route, decoded, named
from worker.transport_connect import Addresses, Opening, TunnelRefused

__all__ = ["OPENERS", "AsyncioTransport"]

#: Connections opened at once at the most: a burst finds few open, and no exchange likes 64 handshakes in one moment.
OPENERS = 8
#: Most bytes that one answer may take with its framing, more than any has: a flood must not keep the event loop.
ANSWER_LIMIT = 1024 * 1024
#: Most bytes of one read. All connections of a loop read into one buffer, as each read is dealt with at once.
_READ_SIZE = 16 * 1024
#: How often the loop looks at its sockets between the end of an attempt's time and a time-out: the next pass takes up
#: what has come, a second delivers it, TLS within TLS needs a third. A loop that stood still is no silence.
_LAST_LOOKS = 3

#: Nothing on the way forgets a flow sooner than after this time, ns.
_FORGOTTEN_AFTER_NS = 1_000_000_000

#: Why a request was not written: its new connection had ended, or something else than an answer had come.
_NOT_SENT = "not sent: ConnectionResetError"
_CLOSED = "could not connect: ConnectionAbortedError"


class _Connection(asyncio.BufferedProtocol):
    """A connection to the exchange, which serves one request after the other."""

    __slots__ = (
        "_buffer",
        "_done",
        "_ends_at_s",
        "_expiry",
        "_is_dropped",
        "_loop",
        "_poll",
        "_taken",
        "_transport",
        "body_limit",
        "error",
        "idle_since_ns",
        "late",
        "reader",
        "received_ns",
        "sent_ns",
    )

    _poll: select.poll

    def __init__(self, loop: asyncio.AbstractEventLoop, buffer: memoryview) -> None:
        self._loop = loop
        self._buffer = buffer
        self._done: asyncio.Future[None] | None = None  # of the request under way
        self._expiry: asyncio.Handle | None = None
        self._ends_at_s = 0.0
        self._taken = 0
        self._transport: asyncio.Transport | None = None
        self._is_dropped = False
        self.body_limit = BODY_LIMIT
        self.reader = ResponseReader(BODY_LIMIT)
        self.error: BaseException | None = None
        self.late: asyncio.Future[None] | None = None  # of a request under way that is waited for no more
        self.idle_since_ns = self.sent_ns = self.received_ns = 0

    def attach(self, transport: asyncio.Transport) -> None:
        """From now on the bytes go through ``transport``."""
        self._transport = transport
        if self._is_dropped:  # something came along with the handshake
            transport.abort()
            return
        self._poll = select.poll()
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def ask(self, data: bytes, silent_at_s: float, ends_at_s: float, body_limit: int) -> asyncio.Future[None]:
        """Write a request. The future is done when :attr:`reader` has the answer, or :attr:`error` says why not.

        It is done at ``silent_at_s`` at the latest. If that is before ``ends_at_s``, :attr:`late` then stands for it.
        """
        self.body_limit, self.reader = body_limit, ResponseReader(body_limit)
        self.error, self.late, self._taken, self.received_ns = None, None, 0, 0
        self._done = done = self._loop.create_future()
        self._ends_at_s = ends_at_s
        self._expiry = self._loop.call_at(min(silent_at_s, ends_at_s), self._expire, _LAST_LOOKS)
        self.sent_ns = local_ns()
        assert self._transport is not None
        self._transport.write(data)
        return done

    @property
    def is_over(self) -> bool:
        """Whether it is closed, or about to be."""
        return self._transport is None or self._transport.is_closing()

    def stands(self) -> bool:
        """Whether a request may be written, as far as can be told: nothing has come unasked, and nothing lies unread.

        On a new connection session tickets may, which say nothing.
        """
        return not (self.is_over or (self.received_ns and self._poll.poll(0)))

    def abort(self) -> None:
        """Close it at once; whatever was asked has no answer any more."""
        self._end(ConnectionAbortedError())
        self._is_dropped = True
        if self._transport is not None:
            self._transport.abort()

    # -- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.attach(transport)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._done is None:
            self.abort()  # nobody asked
        else:
            self._take(bytes(self._buffer[:nbytes]))

    def eof_received(self) -> None:
        if self._done is not None:
            self._take(b"")
        self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc)
        self.abort()

    # -- one answer

    def _take(self, data: bytes) -> None:
        reader = self.reader
        self._taken += len(data)
        try:
            reader.feed(data)
        except Exception as error:  # noqa: BLE001 - whatever it was, the request is in doubt
            self._end(error)
            return
        if reader.status and not self.received_ns:
            self.received_ns = local_ns()
        if reader.ended:
            self._end(None)
        elif self._taken > ANSWER_LIMIT:
            self._end(MalformedResponse("a flood"))

    def _end(self, error: BaseException | None) -> None:
        done, self._done = self._done, None
        if done is not None:
            if self._expiry is not None:
                self._expiry.cancel()
            self.error = error
            if not done.done():
                done.set_result(None)

    def _expire(self, looks: int) -> None:
        if looks > 0:
            self._expiry = self._loop.call_soon(self._expire, looks - 1)
        elif self._done is not None and self.late is None and self._loop.time() < self._ends_at_s:
            if not self._done.done():
                self._done.set_result(None)
            self._done = self.late = self._loop.create_future()
            self._expiry = self._loop.call_at(self._ends_at_s, self._expire, _LAST_LOOKS)
        else:
            self._end(TimeoutError())


@dataclass(slots=True, eq=False)
class _Waiter:
    """A call that has no connection yet."""

    turn: asyncio.Future[_Connection | Failed]
    ends_at_s: float  # of the loop's clock


class _Pool:
    """Connections to one exchange: the idle one that was used last is used first, and who finds none waits.

    A waiting call takes what comes first, a connection that another call has done with or a new one. New ones are
    opened by tasks of the pool, one for each waiting call and :data:`OPENERS` at the most; one that comes too late for
    its call serves the next.
    """

    def __init__(self, route: Route, size: int, idle_bound_s: float) -> None:
        self._size = size
        self._idle_bound_ns = round(idle_bound_s * 1e9)
        self._idle: deque[_Connection] = deque()  # the one used last at the right end
        self._waiting: deque[_Waiter] = deque()
        self._openings: dict[asyncio.Task[None], Opening] = {}
        self._route = route
        self._addresses = Addresses()
        self._closed = False
        self._buffer = memoryview(bytearray(_READ_SIZE))

    def take_idle(self) -> _Connection | None:
        """The connection used last of those that stand, None if there is none."""
        self._close_aged()
        while self._idle:
            connection = self._idle.pop()
            if connection.stands():
                return connection
            connection.abort()
        return None

    async def wait(self, ends_at_s: float) -> _Connection | Failed:
        """A connection that has fallen free or been opened, or why there is none by ``ends_at_s``."""
        if self._closed:
            return Failed(False, _CLOSED)
        loop = asyncio.get_running_loop()
        waiter = _Waiter(loop.create_future(), ends_at_s)
        self._waiting.append(waiter)
        self._open_more()
        expiry = loop.call_at(ends_at_s, self._expire, waiter)
        try:
            return await waiter.turn
        except BaseException:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            elif not waiter.turn.cancelled():
                came = waiter.turn.result()
                if isinstance(came, _Connection):
                    self.give_back_unused(came)
            raise
        finally:
            expiry.cancel()

    def distrust(self, silent: _Connection) -> None:
        """Close what has been idle at least as long as a connection had that does not answer now.

        If something on the way forgot that one for its silence, it forgot them as well.
        """
        if silent.sent_ns - silent.idle_since_ns < _FORGOTTEN_AFTER_NS:
            return
        while self._idle and self._idle[0].idle_since_ns <= silent.idle_since_ns:
            self._idle.popleft().abort()

    def give_back(self, connection: _Connection) -> None:
        """Part with a connection, which serves the next call if nothing of this one can still come."""
        if connection.reader.reusable:
            self.give_back_unused(connection)
        else:
            connection.abort()

    def give_back_unused(self, connection: _Connection) -> None:
        """Part with a connection on which nothing was asked, or nothing is left to come."""
        if self._closed or connection.is_over:
            connection.abort()
            return
        if self._answer_first(connection):
            return
        self._close_aged()
        if len(self._idle) >= self._size:
            connection.abort()
            return
        connection.idle_since_ns = local_ns()
        self._idle.append(connection)

    def close(self) -> None:
        self._closed = True
        for task in self._openings:
            task.cancel()
        while self._idle:
            self._idle.pop().abort()
        while self._waiting:
            self._answer_first(Failed(False, _CLOSED))

    def _answer_first(self, came: _Connection | Failed) -> bool:
        while self._waiting:
            turn = self._waiting.popleft().turn
            if not turn.done():
                turn.set_result(came)
                return True
        return False

    def _close_aged(self) -> None:
        since_ns = local_ns() - self._idle_bound_ns
        while self._idle and self._idle[0].idle_since_ns < since_ns:
            self._idle.popleft().abort()

    def _expire(self, waiter: _Waiter) -> None:
        if not waiter.turn.done():
            phase = next((opening.phase for opening in self._openings.values()), "could not connect")
            self._waiting.remove(waiter)
            waiter.turn.set_result(Failed(False, f"{phase}: TimeoutError"))

    # -- opening

    def _open_more(self) -> None:
        loop = asyncio.get_running_loop()
        while len(self._openings) < min(OPENERS, len(self._waiting)):
            opening = Opening(self._route, self._addresses, loop)
            task = loop.create_task(self._open(opening, self._waiting[-1].ends_at_s))
            self._openings[task] = opening
            task.add_done_callback(self._opened)

    def _opened(self, task: asyncio.Task[None]) -> None:
        del self._openings[task]
        if not (self._closed or task.cancelled()):
            self._open_more()

    async def _open(self, opening: Opening, ends_at_s: float) -> None:
        connection = _Connection(asyncio.get_running_loop(), self._buffer)
        try:
            async with asyncio.timeout_at(ends_at_s) as bound:
                await opening.connect(connection, connection.attach)
        except TunnelRefused as refused:
            self._answer_first(Failed(False, f"{opening.phase}: {refused.status}"))
        except Exception as error:  # noqa: BLE001 - the call that waits for it must hear of it
            if not bound.expired():  # else a call that has time left gets another try
                self._answer_first(Failed(False, named(opening.phase, error)))
        else:
            if connection.is_over:  # opened again for the same call, and again, it would be a flood
                self._answer_first(Failed(False, _NOT_SENT))
            else:
                self.give_back_unused(connection)


class AsyncioTransport:
    """Requests of one event loop; see :class:`worker.transport.Transport`. Any number of calls at once.

    ``pool_size`` is how many connections are kept when nobody uses them, ``idle_bound_s`` how long, seconds. Belongs
    to the loop that makes the first call, and is to be closed in it.
    """

    def __init__(self, route: Route, *, pool_size: int = 64, idle_bound_s: float = IDLE_BOUND_S) -> None:
        self.requests_sent = 0
        self._route = route
        self._pool = _Pool(route, pool_size, idle_bound_s)
        self._silent: set[_Connection] = set()

    async def send(self, make: Callable[[], Request | None], patience_s: float) -> Raw | Failed | None:
        """See :meth:`worker.transport.Transport.send`."""
        loop = asyncio.get_running_loop()
        ends_at_s = loop.time() + patience_s
        connection = self._pool.take_idle()
        if connection is None:
            # What is sent shall have time to be answered: a request that never left can be tried again without doubt.
            came = await self._pool.wait(ends_at_s - patience_s / 2)
            if isinstance(came, Failed):
                return came
            connection = came
            if not connection.stands():
                connection.abort()
                return Failed(False, _NOT_SENT)
            if loop.time() >= ends_at_s:
                self._pool.give_back_unused(connection)
                return Failed(False, "not sent: TimeoutError")
        asked = self._ask(connection, make, ends_at_s)
        if not isinstance(asked, tuple):
            return asked
        done, late = asked
        try:
            await done
        except BaseException:
            connection.abort()
            raise
        return self._answer(connection) if connection.late is None else self._left_open(connection, late)

    def close(self) -> None:
        """See :meth:`worker.transport.Transport.close`; what is waited for no more is closed, too."""
        self._pool.close()
        for connection in self._silent:
            connection.abort()

    def _left_open(self, connection: _Connection, late: Callable[[Raw | Failed], None] | None) -> Failed:
        """What a call is told that waits no more, while its connection does."""

        def ended(_: object) -> None:
            self._silent.discard(connection)
            answer = self._answer(connection)
            if late is not None:
                late(answer)

        assert connection.late is not None
        self._silent.add(connection)
        connection.late.add_done_callback(ended)
        self._pool.distrust(connection)
        return Failed(True, SILENCE, is_open=late is not None)

    def _ask(
        self, connection: _Connection, make: Callable[[], Request | None], ends_at_s: float
    ) -> tuple[asyncio.Future[None], Callable[[Raw | Failed], None] | None] | Failed | None:
        # In a frame of its own, so that no signature is among the variables that a later error's traceback shows.
        try:
            request = make()
            data = b"" if request is None else self._route.encode(request)
        except Exception as error:  # noqa: BLE001 - its text may hold what it was to sign
            self._pool.give_back_unused(connection)
            return Failed(False, named("not sent", error))
        except BaseException:
            self._pool.give_back_unused(connection)
            raise
        if request is None:
            self._pool.give_back_unused(connection)
            return None
        self.requests_sent += 1
        silent_at_s = ends_at_s
        if request.patience_s is not None:
            silent_at_s = asyncio.get_running_loop().time() + request.patience_s
        return connection.ask(data, silent_at_s, ends_at_s, request.body_limit), request.late

    def _answer(self, connection: _Connection) -> Raw | Failed:
        reader, error = connection.reader, connection.error
        self._pool.give_back(connection)
        if not reader.status:
            return Failed(True, named(NO_ANSWER, error or ConnectionAbortedError()))
        body, whole = decoded(reader.headers, reader.body, reader.whole, connection.body_limit)
        return Raw(reader.status, reader.headers, body, whole, connection.sent_ns, connection.received_ns)
