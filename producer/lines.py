"""What the connections of both clients do alike: they carry conversations, and one of them listens for all who wait."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import redis

from producer.place import Place
from producer.protocol import (
    UNSENT,
    Commands,
    Conversation,
    NoConnectionFree,
    NotOurs,
    QueueUnavailable,
    Slow,
    T,
    Wire,
    carried,
)
from producer.redis_url import given, is_refused, why
from producer.waiting import LOOK_S, Waiters

#: Connections for calls; beside them one for calls that wait for a disk, and one that listens for all waiters.
CONNECTIONS = 2
#: What is said in the place of a call's doubt where surely nothing of it was sent.
NOTHING_SENT = "; nothing was sent: a repeat makes the first request"


@contextlib.contextmanager
def unsent() -> Iterator[None]:
    """For what comes before a call is sent: errors of Redis get a note that says so."""
    try:
        yield
    except redis.RedisError as error:
        error.add_note(UNSENT)
        raise


def is_unsent(error: BaseException) -> bool:
    """Whether an error has that note."""
    return UNSENT in getattr(error, "__notes__", ())


@dataclass(slots=True)
class _Call:
    """``repeat``: its commands may be sent again if an answer is lost."""

    repeat: bool
    has_left: bool = False  # whether something of it may have


class BaseLines:
    """All connections of a client in one process, and event loop if there is one."""

    event: type[Any]

    def __init__(self, place: Place, wire: Wire, link: Callable[[], Any], line: type[Any]) -> None:
        self._wire = wire
        self._address = place.address
        self._link = link
        self._calls = line(link, CONNECTIONS)
        self._slow = line(link, 1)
        self.waiters = Waiters(wire)

    @staticmethod
    def wait(event: Any, timeout_s: float | None) -> Any:
        """Wait until it is set, at most so long; gives whether it is."""
        raise NotImplementedError

    def listener(self) -> Any:
        """See to it that somebody listens, and that from now on nothing is missed; False: there is no thread to be had,
        as the system has none left, or as the interpreter is about to end."""
        raise NotImplementedError

    def _now(self) -> float:
        raise NotImplementedError

    async def carry(self, conversation: Conversation[T], doubt: str, repeat: bool) -> T:
        """See :meth:`producer.base.BaseClient.converse`."""
        call = _Call(repeat)
        try:
            return await carried(conversation, partial(self._answers, call))
        except redis.RedisError as error:
            if isinstance(error, NotOurs):
                self._calls.distrust()
            told = self._unavailable(error, doubt if call.has_left or not doubt else NOTHING_SENT)
            told.nothing_sent = not call.has_left
            raise told from told.__cause__

    def _unavailable(self, error: redis.RedisError, doubt: str = "") -> QueueUnavailable:
        """Redis' own error as one of ours, which names the address; what quotes a command or a password is left out."""
        cause: redis.RedisError | None = None
        if isinstance(error, NoConnectionFree):
            said = str(error)
        elif isinstance(error, NotOurs):
            said = "Redis answered something else than was asked"
        elif isinstance(error, redis.AuthenticationError):
            said, doubt = f"Redis refused the login ({type(error).__name__})", ""
        elif isinstance(error, redis.ResponseError):
            said, doubt = f"Redis refused ({why(error)})", ""
        elif "max number of clients" in str(error):
            said = "Redis refused (it serves no more connections: its own limit, maxclients, is reached)"
        else:
            said, cause = f"Redis did not answer ({why(error)})", error
        told = QueueUnavailable(f"{said} [{self._address}]{doubt}")
        told.__cause__ = cause
        return told

    async def _answers(self, call: _Call, commands: Commands) -> list[Any]:
        """The answers, asked for once more if they were lost, or refused by a server that may not be the right one."""
        ends_at = self._now() + self._wire.timeout_s
        ask = partial(self._ask, call, commands, ends_at)
        try:
            try:
                answers = await ask()
                # What was refused so wrote nothing, and another connection may lead to another server.
                if not is_refused(answers) or not (call.repeat or len(commands) == 1):
                    return answers
            except redis.AuthenticationError:
                raise
            except redis.ConnectionError:
                # Closed by the server, say. The ids are in the words: a repeat finds itself.
                if not call.repeat or self._now() >= ends_at:
                    raise
            return await ask()
        except redis.RedisError as error:
            if not isinstance(commands, Slow):
                raise
            return [error] * len(commands)

    async def _ask(self, call: _Call, commands: Commands, ends_at: float) -> list[Any]:
        line = self._slow if isinstance(commands, Slow) else self._calls
        try:
            answers: list[Any] = await given(line.carry(commands, ends_at))
        except redis.RedisError as error:
            call.has_left = call.has_left or not is_unsent(error)
            raise
        call.has_left = True
        return answers

    async def _hear(self, link: Any, ready: Callable[[], object]) -> None:
        async def ask(commands: Commands) -> list[Any]:
            (answers,) = await given(link.ask([commands], self._now() + LOOK_S + self._wire.timeout_s))
            return list(answers)

        async def pause(seconds: float) -> None:
            await given(self.wait(self.event(), seconds))

        await self.waiters.listen(ask, pause, ready, self._unavailable)
