"""The way to Redis: one request at a time on one connection, opened anew after it broke, no lost answer ever repeated.

The one place that knows how a worker connects and what its errors say.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import redis
import redis.asyncio as aio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from producer.message import clean_text
from worker.clock import local_ns
from worker.store import ANSWER_WITHIN_S, Request, Stamps, Words

__all__ = [
    "AsyncLink",
    "BlockingLink",
    "Link",
    "connect",
    "connect_like",
    "is_about_rows",
    "open_link",
    "trouble",
    "will_pass",
]

T = TypeVar("T")

#: Of the blocking client: RQ's registration, and RQ's commands (pub/sub).
MAX_CONNECTIONS = 2

_ASYNC_KINDS: tuple[tuple[type[Any], type[Any]], ...] = (
    (redis.SSLConnection, aio.SSLConnection),
    (redis.UnixDomainSocketConnection, aio.UnixDomainSocketConnection),
    (redis.Connection, aio.Connection),
)
#: Options of a blocking pool that mean nothing for one connection, or are our own to set.
_NOT_LENT = ("retry", "socket_timeout", "maint_notifications_config", "maint_notifications_pool_handler")
#: An error of the script is about its rows, unless a server says this of itself; Redis 6.2 wraps that in one.
_ROWS = re.compile(r"script|WRONGTYPE", re.IGNORECASE)
_SERVER = re.compile(r"\b(BUSY|CLUSTERDOWN|LOADING|MASTERDOWN|MISCONF|NOREPLICAS|OOM|READONLY|TRYAGAIN|UNKILLABLE)\b")
#: Those of them that redis-py has classes for, without that word in their text.
_PASSING = (
    redis.ReadOnlyError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.MasterDownError,
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.TryAgainError,
)


class Link(Protocol):
    """A way to have requests answered."""

    async def ask(self, make: Callable[[], Request[T]]) -> T:
        """Make the request when its turn has come, and its round trip.

        Raises:
            redis.RedisError: no answer (what ran is not known then), or one that is an error.
        """


def connect(url: str, **options: Any) -> redis.Redis:
    """A blocking client: few connections, and never a repeat of a command whose reply was lost."""
    ours = _pool_options(is_tcp=not url.startswith("unix:"))
    return redis.Redis(connection_pool=redis.BlockingConnectionPool.from_url(url, **ours, **options))


def connect_like(connection: redis.Redis) -> redis.Redis:
    """The same for the address and credentials of another client (the one that RQ's command line made)."""
    pool = connection.connection_pool
    is_tcp = not issubclass(pool.connection_class, redis.UnixDomainSocketConnection)
    options = {**pool.connection_kwargs, **_pool_options(is_tcp=is_tcp)}
    for name in ("maint_notifications_config", "maint_notifications_pool_handler"):
        options.pop(name, None)  # bound to the other pool
    return redis.Redis(connection_pool=redis.BlockingConnectionPool(connection_class=pool.connection_class, **options))


def _pool_options(*, is_tcp: bool) -> dict[str, Any]:
    return {
        "max_connections": MAX_CONNECTIONS,
        "timeout": ANSWER_WITHIN_S,
        "socket_timeout": ANSWER_WITHIN_S,
        "socket_connect_timeout": ANSWER_WITHIN_S,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
        **({"socket_keepalive": True} if is_tcp else {}),
    }


def open_link(like: redis.Redis) -> AsyncLink:
    """A link of an event loop to where ``like`` connects to; it connects at its first request."""
    pool = like.connection_pool
    options = {name: value for name, value in pool.connection_kwargs.items() if name not in _NOT_LENT}
    kind = next(ours for theirs, ours in _ASYNC_KINDS if issubclass(pool.connection_class, theirs))
    return AsyncLink(kind(**options, retry=AsyncRetry(NoBackoff(), 0), socket_timeout=None))


class AsyncLink:
    """The link of an event loop."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._turn = asyncio.Lock()

    async def ask(self, make: Callable[[], Request[T]]) -> T:
        """See :meth:`Link.ask`."""
        async with self._turn:
            request, answers, stamps = await self._round_trips(make)
            try:
                return request.read(answers, stamps)
            except Exception as error:
                # An answer that makes no sense may be another question's: the next one must not get this one's. And a
                # server that cannot serve may not be the one any more that the address leads to.
                if not isinstance(error, redis.RedisError) or will_pass(error):
                    await self._connection.disconnect(nowait=True)
                raise

    async def _round_trips(self, make: Callable[[], Request[T]]) -> tuple[Request[T], list[Any], Stamps]:
        patience = _Patience()
        try:
            if not self._connection.is_connected:
                await self._connection.connect()
                patience.begin_anew()  # a request may tell the server how long it is waited for
            request = make()
            answers, stamps = await self._round_trip(request.commands)
            if isinstance(answers[-1], redis.exceptions.NoScriptError):
                again, stamps = await self._round_trip(request.anew())
                answers[-1] = again[-1]
        except BaseException as error:
            patience.end()
            await self._connection.disconnect(nowait=True)
            if patience.has_ended(error):
                raise redis.TimeoutError("no answer in time") from None
            if isinstance(error, OSError):
                raise redis.ConnectionError(type(error).__name__) from error
            raise
        finally:
            patience.end()
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

    async def close(self) -> None:
        """Part with the server."""
        with contextlib.suppress(redis.RedisError, OSError):
            await self._connection.disconnect(nowait=True)


class _Patience:
    """Ends a wait that takes too long, as :func:`asyncio.timeout` does.

    But a loop that stood still hears of its alarms first, with the answer unread. So when this one comes, whatever has
    arrived is read before anything ends. And it is the waiting task that is ended: a connection that is closed wakes it
    no sooner than all that was written has left, or TLS has taken its leave.
    """

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._loop, self._task, self._cancelling = asyncio.get_running_loop(), task, task.cancelling()
        self._passes, self._is_over = 3, False
        self._alarm: asyncio.Handle = self._loop.call_later(ANSWER_WITHIN_S, self._look)

    def _look(self) -> None:
        if self._passes:
            self._passes -= 1
            self._alarm = self._loop.call_later(0, self._look)
        else:
            self._is_over = True
            self._task.cancel()

    def begin_anew(self) -> None:
        """What was waited for has come, and something else is."""
        self.end()
        self._passes = 3
        self._alarm = self._loop.call_later(ANSWER_WITHIN_S, self._look)

    def has_ended(self, error: BaseException) -> bool:
        """Whether this ended the wait, and nobody else the task: to be asked once, with what the wait raised."""
        is_ours = self._is_over and self._task.uncancel() <= self._cancelling
        return is_ours and isinstance(error, asyncio.CancelledError)

    def end(self) -> None:
        """Nothing is waited for any more."""
        self._alarm.cancel()


class BlockingLink:
    """The link of whoever makes one request at a time and has nothing else to do meanwhile."""

    def __init__(self, connection: redis.Redis) -> None:
        self._connection = connection

    async def ask(self, make: Callable[[], Request[T]]) -> T:
        """See :meth:`Link.ask`."""
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
        with self._connection.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            return list(pipeline.execute(raise_on_error=False))


def will_pass(error: BaseException) -> bool:
    """Whether an error tells of what passes: no answer, or a server that is full, read-only, busy, still loading …"""
    if isinstance(error, redis.ResponseError):
        return isinstance(error, _PASSING) or bool(_SERVER.search(str(error)))
    is_away = isinstance(error, redis.ConnectionError | redis.TimeoutError)
    return is_away and not isinstance(error, redis.AuthenticationError)


def is_about_rows(error: BaseException) -> bool:
    """Whether a script failed for what it was given, or that cannot be sent at all, and not for the state of its
    server."""
    said = str(error)
    is_script = type(error) is redis.ResponseError and _ROWS.search(said) and not _SERVER.search(said)
    return bool(is_script) or isinstance(error, redis.DataError)


def trouble(error: BaseException) -> str:
    """Why Redis does not answer, in words for people: the kind of an error and, where a certificate was refused, the
    way out.

    Nothing else of its text: that can hold the address with its password.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            said = clean_text(cause.verify_message)
            return f"{type(error).__name__}: certificate refused: {said}; see REDIS_TLS_CA and REDIS_TLS_VERIFY"
        cause = cause.__cause__ or cause.__context__
    return type(error).__name__
