"""The asyncio client's connections: few, shared by all tasks of one event loop, none across a fork or to another loop.

Each connection is a task's own. Callers queue, and a connection that becomes free sends all that queues by then and
hands out the answers. So nothing waits for company, and a caller that is cancelled leaves no connection half read.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import redis

from producer.lines import BaseLines
from producer.place import Place
from producer.protocol import CHUNK, UNSENT, Commands, NoConnectionFree, Slow, Wire, packets, weight
from producer.redis_url import is_refused
from producer.waiting import unheard


class _Trip:
    """One round trip of one caller."""

    def __init__(self, commands: Commands, ends_at: float) -> None:
        self.commands = commands
        self.ends_at = ends_at
        self.is_taken = False  # by a connection
        self.is_sent = False  # or may be
        self.came: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()

    def fail(self, error: BaseException) -> None:
        if not self.came.done():
            self.came.set_exception(error)


def _late(is_sent: bool) -> redis.TimeoutError:
    error = redis.TimeoutError("no answer in time")
    if not is_sent:
        error.add_note(UNSENT)
    return error


class AsyncLink:
    """One connection, opened when it is needed and anew when it broke."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._opened_at: float | None = None

    async def ask(
        self,
        trips: Sequence[Commands],
        ends_at: float,
        distrusted_at: float = 0.0,
        leaving: Callable[[], object] = lambda: None,
    ) -> list[list[Any]]:
        """The answers to several round trips at once; an error answer stands in its place.

        ``leaving`` is called before anything is sent, on a connection that stands.

        Raises:
            redis.RedisError: no answer; the connection is closed.
        """
        is_leaving = False
        try:
            async with asyncio.timeout_at(ends_at):
                try:
                    await self._prepare(distrusted_at)
                except redis.RedisError as error:
                    error.add_note(UNSENT)
                    raise
                is_leaving = True
                leaving()
                for packed in packets(self._connection, trips):
                    await self._connection.send_packed_command([packed])
                return [[await self._answer() for _ in range(len(commands))] for commands in trips]
        except TimeoutError as error:
            await self.close()
            raise _late(is_leaving) from error
        except OSError as error:
            await self.close()
            raise redis.ConnectionError(type(error).__name__) from error
        except BaseException:
            await self.close()
            raise

    async def _prepare(self, distrusted_at: float) -> None:
        if self._opened_at is not None and self._opened_at < distrusted_at:
            await self.close()
        await getattr(self._connection, "make_ready", self._connection.connect)()
        self._opened_at = self._opened_at or asyncio.get_running_loop().time()

    async def _answer(self) -> Any:
        try:
            return await self._connection.read_response()
        except redis.ResponseError as error:
            return error

    async def close(self) -> None:
        """Part with the server."""
        self._opened_at = None
        with contextlib.suppress(redis.RedisError, OSError):
            await self._connection.disconnect(nowait=True)


class AsyncLine:
    """Some connections, each with a task that carries what is queued."""

    def __init__(self, make: Callable[[], AsyncLink], most: int) -> None:
        self._make = make
        self._most = most
        self._queue: asyncio.Queue[_Trip] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = 0
        self._distrusted_at = 0.0

    async def carry(self, commands: Commands, ends_at: float) -> list[Any]:
        """The answers to the commands of one round trip.

        Raises:
            NoConnectionFree: the call's time was up before one was.
            redis.RedisError: no answer; what was asked may have been carried out.
        """
        trip = _Trip(commands, ends_at)
        self._queue.put_nowait(trip)
        if self._queue.qsize() > self._idle and len(self._tasks) < self._most:
            task = asyncio.get_running_loop().create_task(self._run())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            async with asyncio.timeout_at(ends_at):
                return await trip.came
        except TimeoutError:
            raise (_late(trip.is_sent) if trip.is_taken else NoConnectionFree(self._most)) from None

    async def _run(self) -> None:
        link = self._make()
        batch: list[_Trip] = []
        try:
            while True:
                self._idle += 1
                try:
                    batch = [await self._queue.get()]
                finally:
                    self._idle -= 1
                batch = self._fill(batch)
                if batch:
                    await self._carry(link, batch)
        finally:
            for trip in batch:
                trip.fail(redis.ConnectionError("the connection was closed"))
            await link.close()

    def _fill(self, batch: list[_Trip]) -> list[_Trip]:
        """Whoever queues by now, as far as there is room; but those who have given up."""
        room = CHUNK - weight(batch[0].commands)
        while room > 0 and not self._queue.empty():
            batch.append(self._queue.get_nowait())
            room -= weight(batch[-1].commands)
        return [trip for trip in batch if not trip.came.done()]

    async def _carry(self, link: AsyncLink, batch: list[_Trip]) -> None:
        def leaving() -> None:
            for trip in batch:
                trip.is_sent = True

        for trip in batch:
            trip.is_taken = True
        are_alike = isinstance(batch[0].commands, Slow)
        asked = [trip.commands for trip in (batch[:1] if are_alike else batch)]
        try:
            told = await link.ask(asked, max(trip.ends_at for trip in batch), self._distrusted_at, leaving)
        except redis.RedisError as error:
            self.distrust()
            for trip in batch:
                trip.fail(error)
            return
        if any(map(is_refused, told)):
            self.distrust()
        for trip, answers in zip(batch, told * len(batch) if are_alike else told, strict=True):
            if not trip.came.done():
                trip.came.set_result(answers)

    def distrust(self) -> None:
        """What was open until now may lead to nobody, or to another server than it should."""
        self._distrusted_at = asyncio.get_running_loop().time()

    async def close(self) -> None:
        """Part with the server; what is under way fails."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class AsyncLines(BaseLines):
    """All connections of a client in one event loop, and the task that listens for whoever waits."""

    event = asyncio.Event

    def __init__(self, place: Place, wire: Wire) -> None:
        self.loop = asyncio.get_running_loop()
        self.pid = os.getpid()
        super().__init__(place, wire, lambda: AsyncLink(place.make()), AsyncLine)
        self._listening: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()

    def _now(self) -> float:
        return self.loop.time()

    @staticmethod
    async def wait(event: asyncio.Event, timeout_s: float | None) -> bool:
        """See :meth:`BaseLines.wait`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await event.wait()
        return event.is_set()

    async def listener(self) -> bool:
        """See :meth:`BaseLines.listener`."""
        if self._listening is None or self._listening.done():
            self._ready.clear()
            self._listening = self.loop.create_task(self._listen())
        await self.wait(self._ready, self._wire.timeout_s)
        return True

    async def _listen(self) -> None:
        link = self._link()
        try:
            await self._hear(link, self._ready.set)
        except Exception as error:
            self.waiters.fail(unheard(error))
            raise
        finally:
            await link.close()

    async def close(self, why: Exception) -> None:
        """Part with the server; whoever waits is told."""
        self.waiters.close(why)
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
        await self._calls.close()
        await self._slow.close()
