"""The way to Redis: one request at a time on one connection, opened anew after it broke, no lost answer ever repeated.

Where it leads, and which errors pass, is known to :mod:`producer.redis_url`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import redis

from producer.redis_url import Address, code_of, is_refused, passes, why
from worker import log
from worker.clock import local_ns
from worker.daemon import came_by
from worker.store import ANSWER_WITHIN_S, Request, Stamps, Words

__all__ = [
    "AsyncLink",
    "BlockingLink",
    "Channel",
    "Link",
    "Outage",
    "connect",
    "is_about_rows",
]

T = TypeVar("T")

#: Of the blocking client: RQ's registration, and a stock worker's steps and renewals.
MAX_CONNECTIONS = 2
#: A Redis that stays away is told of this often, s.
TELL_EVERY_S = 60.0

#: An error of the script is about its rows, unless a server says this of itself; Redis 6.2 wraps that in one.
_ROWS = re.compile(r"script|WRONGTYPE", re.IGNORECASE)
#: A connection on which only others speak is asked for a sign of life this often, s.
PROBE_EVERY_S = 10.0


def connect(place: str | redis.Redis, **options: Any) -> redis.Redis:
    """A blocking client: few connections, and never a repeat of a command whose reply was lost.

    ``place`` is a URL, or another client (the one that RQ's command line made), whose address and credentials it has.
    """
    address = Address.parse(place) if isinstance(place, str) else Address.of(place)
    return address.client(ANSWER_WITHIN_S, max_connections=MAX_CONNECTIONS, protocol=2, **options)


class _Line:
    """A connection of an event loop to where ``like`` connects to; it connects when it is first needed."""

    def __init__(self, like: redis.Redis) -> None:
        self._connection: Any = Address.of(like).async_connection(ANSWER_WITHIN_S, protocol=2, socket_timeout=None)

    async def _bound(self, work: Coroutine[Any, Any, T], within_s: float = ANSWER_WITHIN_S) -> T:
        """Wait for something no longer than this; whatever goes wrong, the connection is closed.

        In a task of its own, which is ended then: a connection that is closed wakes nobody before all that was written
        has left, or TLS has taken its leave.
        """
        loop = asyncio.get_running_loop()
        doing = loop.create_task(work)
        try:
            await asyncio.sleep(0)  # it begins: a loop that stood still before took none of its time
            if not await came_by(doing, loop.time() + within_s):
                raise redis.TimeoutError("no answer in time")
            return doing.result()
        except BaseException as error:
            doing.cancel()
            await asyncio.gather(doing, return_exceptions=True)
            await self._connection.disconnect(nowait=True)
            if isinstance(error, OSError):
                raise redis.ConnectionError(type(error).__name__) from error
            raise

    async def close(self) -> None:
        """Part with the server."""
        with contextlib.suppress(redis.RedisError, OSError):
            await self._connection.disconnect(nowait=True)


class AsyncLink(_Line):
    """The way of an event loop to have requests answered: one after the other."""

    def __init__(self, like: redis.Redis) -> None:
        super().__init__(like)
        self._turn = asyncio.Lock()
        #: How often it was connected.
        self.opened = 0

    async def ask(self, make: Callable[[], Request[T]]) -> T:
        """Make the request when its turn has come, and its round trip.

        Raises:
            redis.RedisError: no answer (what ran is not known then), or one that is an error.
        """
        async with self._turn:
            if not self._connection.is_connected:
                await self._bound(self._connection.connect())
                self.opened += 1
            request, answers, stamps = await self._bound(self._round_trips(make))
            try:
                return request.read(answers, stamps)
            except Exception as error:
                # An answer that makes no sense may be another question's: the next one must not get this one's. And a
                # server that cannot serve may not be the one any more that the address leads to.
                if not isinstance(error, redis.RedisError) or passes(error):
                    await self._connection.disconnect(nowait=True)
                raise

    async def _round_trips(self, make: Callable[[], Request[T]]) -> tuple[Request[T], list[Any], Stamps]:
        request = make()  # right before it is sent: it may tell the server how long it is waited for
        answers, stamps = await self._round_trip(request.commands)
        if isinstance(answers[-1], redis.exceptions.NoScriptError):
            again, stamps = await self._round_trip(request.anew())
            answers[-1] = again[-1]
        return request, answers, stamps

    async def _round_trip(self, commands: Sequence[Words]) -> tuple[list[Any], Stamps]:
        connection, answers = self._connection, []
        asked_ns = local_ns()
        await connection.send_packed_command(connection.pack_commands(commands))
        for _ in commands:
            try:
                answers.append(await connection.read_response())
            except redis.ResponseError as error:
                answers.append(error)
        return answers, Stamps(asked_ns, local_ns())

    async def drop_if_idle(self) -> None:
        """Another connection to the same server has broken: do not trust this one either."""
        if not self._turn.locked():
            async with self._turn:
                await self._connection.disconnect(nowait=True)


class Channel(_Line):
    """What is published under a name, heard on a connection of its own that is probed while nobody speaks."""

    def __init__(self, like: redis.Redis, name: str) -> None:
        super().__init__(like)
        self._name = name

    async def open(self) -> None:
        """Begin to hear, if that is not so yet.

        Raises:
            redis.RedisError: not now, or not allowed.
        """
        if not self._connection.is_connected:
            await self._bound(self._subscribe())

    async def _subscribe(self) -> None:
        await self._connection.connect()
        await self._connection.send_command("SUBSCRIBE", self._name)
        await self._connection.read_response()

    async def hear(self) -> bytes | None:
        """What is published next; None: nothing within :data:`PROBE_EVERY_S`, but the connection stands.

        Raises:
            redis.RedisError: it broke. What is published until it is opened again is not heard.
        """
        await self.open()
        answer = await self._bound(self._next(), PROBE_EVERY_S + ANSWER_WITHIN_S)
        return answer[2] if answer[0] == b"message" else None

    async def _next(self) -> Any:
        answer = await self._connection.read_response(timeout=PROBE_EVERY_S)
        if answer is None:
            await self._connection.send_command("PING")
            answer = await self._connection.read_response()
        return answer


class BlockingLink:
    """The link of whoever makes one request at a time and has nothing else to do meanwhile."""

    def __init__(self, connection: redis.Redis) -> None:
        self._connection = connection

    async def ask(self, make: Callable[[], Request[T]]) -> T:
        """See :meth:`AsyncLink.ask`."""
        return self.ask_now(make())

    def ask_now(self, request: Request[T]) -> T:
        """The same without a loop."""
        asked_ns = local_ns()
        answers = self._round_trip(request.commands)
        if isinstance(answers[-1], redis.exceptions.NoScriptError):
            asked_ns = local_ns()
            answers[-1] = self._round_trip(request.anew())[-1]
        return request.read(answers, Stamps(asked_ns, local_ns()))

    def _round_trip(self, commands: Sequence[Words]) -> list[Any]:
        answers = self._once(commands)
        # The server may not be the primary any more. A script that was refused wrote nothing; one that ran is not run
        # again, whatever became of the command before it.
        if is_refused(answers[-1:]):
            self._connection.connection_pool.disconnect(inuse_connections=False)
            answers = self._once(commands)
        return answers

    def _once(self, commands: Sequence[Words]) -> list[Any]:
        with self._connection.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            return list(pipeline.execute(raise_on_error=False))


def is_about_rows(error: BaseException) -> bool:
    """Whether a script failed for what it was given, or that cannot be sent at all, and not for the state of its
    server."""
    is_script = type(error) is redis.ResponseError and _ROWS.search(str(error)) and not code_of(error)
    return bool(is_script) or isinstance(error, redis.DataError)


#: A way to have requests answered.
Link = AsyncLink | BlockingLink


class Outage:
    """Tells of a Redis that is away, or cannot serve: at once, again each minute, and when it is back."""

    def __init__(self) -> None:
        self.is_on = False
        self._told_ns = 0

    def note(self, error: BaseException) -> None:
        """Something that was asked was not done."""
        if not self.is_on or local_ns() > self._told_ns + TELL_EVERY_S * 1e9:
            self.is_on, self._told_ns = True, local_ns()
            log.error("redis", state="away", error=why(error))

    def end(self) -> bool:
        """Something was done; whether that is news."""
        was_on, self.is_on = self.is_on, False
        if was_on:
            log.info("redis", state="back")
        return was_on
