"""The worker's way to the exchange: many calls at once in one event loop, on connections that are kept.

Can the exchange have seen a request? That is known to the byte: ``seen`` turns true when the first one is handed to the
connection.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from worker.classify import NO_ANSWER, SILENCE
from worker.clock import local_ns
from worker.daemon import came_by
from worker.http1 import ResponseReader
from worker.transport import IDLE_BOUND_S, Failed, Raw, Request, Route, decoded, named
from worker.transport_connect import Connection, Opener, TunnelRefused

__all__ = ["OPENERS", "AsyncioTransport"]

#: Connections opened at once at the most: a burst finds few open, and no exchange likes 64 handshakes in one moment.
OPENERS = 8
#: Nothing on the way forgets a flow sooner than after this time, ns.
_FORGOTTEN_AFTER_NS = 1_000_000_000

#: Why a request was not written: its new connection had ended, or something else than an answer had come.
_NOT_SENT = "not sent: ConnectionResetError"
_CLOSED = "could not connect: ConnectionAbortedError"


class _Pool:
    """Connections to one exchange: the idle one that was used last is used first, and who finds none waits.

    A waiting call takes what comes first, a connection that another call has done with or a new one. New ones are
    opened by tasks of the pool, one for each waiting call and :data:`OPENERS` at the most; one that comes too late for
    its call serves the next.
    """

    def __init__(self, route: Route, size: int, idle_bound_s: float) -> None:
        self._size = size
        self._idle_bound_ns = round(idle_bound_s * 1e9)
        self._idle: deque[Connection] = deque()  # the one used last at the right end
        self._waiting: dict[asyncio.Future[Connection | Failed], float] = {}  # calls, and until when they wait
        self._opening: dict[asyncio.Task[None], Connection] = {}
        self._overdue = "could not connect"  # the phase of the latest opening that ran out of time
        self._opener = Opener(route)
        self._closed = False

    def take_idle(self) -> Connection | None:
        """The connection used last of those that stand, None if there is none."""
        self._close_aged()
        while self._idle:
            connection = self._idle.pop()
            if connection.stands():
                return connection
            connection.abort()
        return None

    async def wait(self, ends_at_s: float) -> Connection | Failed:
        """A connection that has fallen free or been opened, or why there is none by ``ends_at_s``."""
        if self._closed:
            return Failed(False, _CLOSED)
        turn: asyncio.Future[Connection | Failed] = asyncio.get_running_loop().create_future()
        self._waiting[turn] = ends_at_s
        self._open_more()
        try:
            if await came_by(turn, ends_at_s):
                return turn.result()
        except BaseException:
            if turn.done() and isinstance(came := turn.result(), Connection):
                self.give_back(came)
            raise
        finally:
            self._waiting.pop(turn, None)
        phase = next((connection.phase for connection in self._opening.values()), self._overdue)
        return Failed(False, f"{phase}: TimeoutError")

    def distrust(self, silent: Connection) -> None:
        """Close what has been idle at least as long as a connection had that does not answer now.

        If something on the way forgot that one for its silence, it forgot them as well.
        """
        if silent.sent_ns - silent.idle_since_ns < _FORGOTTEN_AFTER_NS:
            return
        while self._idle and self._idle[0].idle_since_ns <= silent.idle_since_ns:
            self._idle.popleft().abort()

    def give_back(self, connection: Connection) -> None:
        """Part with a connection, which serves the next call if nothing of this one can still come."""
        if self._closed or connection.is_over or not connection.reusable:
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
        for task in self._opening:
            task.cancel()
        while self._idle:
            self._idle.pop().abort()
        while self._answer_first(Failed(False, _CLOSED)):
            pass

    def _answer_first(self, came: Connection | Failed) -> bool:
        """Give it to the call that has waited longest; False: none waits."""
        if not self._waiting:
            return False
        turn = next(iter(self._waiting))
        del self._waiting[turn]
        turn.set_result(came)
        return True

    def _close_aged(self) -> None:
        since_ns = local_ns() - self._idle_bound_ns
        while self._idle and self._idle[0].idle_since_ns < since_ns:
            self._idle.popleft().abort()

    # -- opening

    def _open_more(self) -> None:
        while len(self._opening) < min(OPENERS, len(self._waiting)):
            ends_at_s = next(reversed(self._waiting.values()))  # the latest call waits longest
            if ends_at_s <= asyncio.get_running_loop().time():
                return
            connection = self._opener.new()
            task = asyncio.create_task(self._open(connection, ends_at_s))
            self._opening[task] = connection
            task.add_done_callback(self._opened)

    def _opened(self, task: asyncio.Task[None]) -> None:
        del self._opening[task]
        if not (self._closed or task.cancelled()):
            self._open_more()

    async def _open(self, connection: Connection, ends_at_s: float) -> None:
        try:
            async with asyncio.timeout_at(ends_at_s) as bound:
                await self._opener.open(connection)
        except TunnelRefused as refused:
            self._answer_first(Failed(False, f"{connection.phase}: {refused}"))
        except Exception as error:  # noqa: BLE001 - the call that waits for it must hear of it
            if bound.expired():  # a call that has time left gets another try
                self._overdue = connection.phase
            else:
                self._answer_first(Failed(False, named(connection.phase, error)))
        else:
            if connection.is_over:  # opened again for the same call, and again, it would be a flood
                self._answer_first(Failed(False, _NOT_SENT))
            else:
                self.give_back(connection)


class AsyncioTransport:
    """Requests of one event loop; see :class:`worker.transport.Transport`. Any number of calls at once.

    ``pool_size`` is how many connections are kept when nobody uses them, ``idle_bound_s`` how long, seconds. Belongs
    to the loop that makes the first call, and is to be closed in it.
    """

    def __init__(self, route: Route, *, pool_size: int = 64, idle_bound_s: float = IDLE_BOUND_S) -> None:
        self._route = route
        self._pool = _Pool(route, pool_size, idle_bound_s)
        self._silent: dict[asyncio.Task[Raw | Failed], Connection] = {}

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
                self._pool.give_back(connection)
                return Failed(False, "not sent: TimeoutError")
        written = self._write(connection, make)
        if not isinstance(written, Request):
            self._pool.give_back(connection)
            return written
        silent_at_s = ends_at_s if written.patience_s is None else min(loop.time() + written.patience_s, ends_at_s)
        try:
            if not await came_by(connection.done, silent_at_s) and silent_at_s < ends_at_s:
                return self._left_open(connection, ends_at_s)
        except BaseException:
            connection.abort()
            raise
        return self._answer(connection)

    def close(self) -> None:
        """See :meth:`worker.transport.Transport.close`; what is waited for no more is closed, too."""
        self._pool.close()
        for connection in self._silent.values():
            connection.abort()

    def _write(self, connection: Connection, make: Callable[[], Request | None]) -> Request | Failed | None:
        # In a frame of its own, so that no signature is among the variables that a later error's traceback shows.
        try:
            request = make()
            if request is None:
                return None
            data = self._route.encode(request)
        except Exception as error:  # noqa: BLE001 - its text may hold what it was to sign
            return Failed(False, named("not sent", error))
        connection.ask(data, ResponseReader(request.body_limit))
        return request

    def _left_open(self, connection: Connection, ends_at_s: float) -> Failed:
        """What a call is told that waits no more, while its connection does."""

        async def follow() -> Raw | Failed:
            await came_by(connection.done, ends_at_s)
            return self._answer(connection)

        late = asyncio.create_task(follow())
        self._silent[late] = connection
        late.add_done_callback(self._silent.pop)
        self._pool.distrust(connection)
        return Failed(True, SILENCE, late)

    def _answer(self, connection: Connection) -> Raw | Failed:
        connection.end(TimeoutError())
        reader = connection.reader
        self._pool.give_back(connection)
        if not reader.status:
            return Failed(True, named(NO_ANSWER, connection.error or ConnectionAbortedError()))
        body, whole = decoded(reader.headers, reader.body, reader.whole, reader.body_limit)
        return Raw(reader.status, reader.headers, body, whole, connection.sent_ns, connection.received_ns)
