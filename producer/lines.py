"""What the connections of both clients do alike: they carry conversations, and one of them listens for all who wait."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import redis

from producer.place import Place
from producer.protocol import (
    NO_ANSWER,
    UNSENT,
    Ask,
    Commands,
    Conversation,
    NoConnectionFree,
    NotOurs,
    QueueUnavailable,
    Slow,
    T,
    Wire,
    carried,
    good,
    stream_entries,
)
from producer.redis_url import given, is_refused, passes, why
from producer.waiting import LOOK_S, Waiters, look

#: Connections for calls; beside them one for calls that wait for a disk, and one that listens for all waiters.
CONNECTIONS = 2
#: Longest time that one read of the ledger waits for news, ms.
_BLOCK_MS = 1000
#: Entries of the ledger read at a time.
_PAGE = 500
#: Between two tries to reach Redis, s.
_AGAIN_S = 0.1
#: The id of a record, for a look at which of those that are waited for it may be.
_ID = re.compile(rb'"id":"([^"\\]{1,256})"')
#: What is said in the place of a call's doubt where surely nothing of it was sent.
NOTHING_SENT = "; nothing was sent: a repeat makes the first request"


def is_unsent(error: BaseException) -> bool:
    """Whether an error came before anything of a call was sent."""
    return UNSENT in getattr(error, "__notes__", ())


@dataclass(slots=True)
class _Call:
    """``repeat``: its commands may be sent again if an answer is lost."""

    repeat: bool
    has_left: bool = False  # whether something of it may have
    was_lost: bool = False  # whether something of it has, and no answer came
    was_heeded: bool = False  # whether a command of it was answered without an error


class BaseLines:
    """All connections of a client in one process, and event loop if there is one."""

    event: type[Any]

    def __init__(self, place: Place, wire: Wire, link: Callable[[], Any], line: type[Any]) -> None:
        self._wire = wire
        self._address = place.address
        self._link = link
        self._calls = line(link, CONNECTIONS)
        self._slow = line(link, 1)
        self.waiters = Waiters()

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
            was_refused = isinstance(error, redis.AuthenticationError | redis.ResponseError) and not call.was_heeded
            if was_refused and not call.was_lost:
                doubt = ""  # all of it
            elif doubt and not call.has_left:
                doubt = NOTHING_SENT
            told = self._unavailable(error, doubt)
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
            said = f"Redis refused the login ({type(error).__name__})"
        elif isinstance(error, redis.ResponseError):
            said = f"Redis refused ({why(error)})"
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
            call.was_lost = call.was_lost or not is_unsent(error)
            call.has_left = call.has_left or call.was_lost
            raise
        call.has_left = True
        call.was_heeded = call.was_heeded or any(not isinstance(answer, Exception) for answer in answers)
        return answers

    async def _hear(self, link: Any, ready: Callable[[], object]) -> None:
        """What is done on a connection of its own while anybody waits.

        ``ready`` is called when nothing that is recorded from then on can be missed, or nothing can be heard. Errors
        that pass are told to nobody before a call's time is up.
        """

        failing_since: float | None = None

        async def ask(commands: Commands) -> list[Any]:
            nonlocal failing_since
            (answers,) = await given(link.ask([commands], self._now() + LOOK_S + self._wire.timeout_s))
            if not any(isinstance(answer, Exception) for answer in answers):
                failing_since = None
            return list(answers)

        while not self.waiters.are_few():
            try:
                await self._follow(ask, ready)
            except (redis.RedisError, *NO_ANSWER) as told:
                error = told if isinstance(told, redis.RedisError) else NotOurs(type(told).__name__)
                now = time.monotonic()
                failing_since = failing_since or now
                if not passes(error) or now - failing_since > self._wire.timeout_s:
                    self.waiters.fail(self._unavailable(error))
                    ready()
            await self._pause(_AGAIN_S)

    async def _pause(self, seconds: float) -> None:
        await given(self.wait(self.event(), seconds))

    async def _follow(self, ask: Ask, ready: Callable[[], object]) -> None:
        """Follow the ledger and hand out what is waited for, until nobody waits any more."""
        keys = self._wire.keys
        block_ms = self._wire.server_wait_ms(_BLOCK_MS)
        position: str | None = None
        with contextlib.suppress(redis.ResponseError):  # somebody else's key, or no right to read it
            position = await carried(self._wire.newest(), ask)
        ready()
        look_at = 0.0
        entries: list[tuple[str, dict[Any, Any]]] = []
        while not self.waiters.are_few():
            began, came, wanted = time.monotonic(), self.waiters.came, self.waiters.wanted()
            if began < look_at:
                hinted = {_hint(fields) for _, fields in entries}
                wanted = [job_id for job_id in wanted if job_id in hinted]
            self.waiters.tell(await carried(look(keys, wanted), ask), came)
            if began >= look_at:
                now = time.monotonic()
                look_at = now + max(LOOK_S, 10 * (now - began))
            if position is None:
                await self._pause(LOOK_S)
            else:
                command = ("XREAD", "COUNT", _PAGE, "BLOCK", block_ms, "STREAMS", keys.outcomes, position)
                (page,) = good(await ask([command]))
                entries = stream_entries(page[0][1] if page else [])
                position = entries[-1][0] if entries else position
            if entries or position is None:
                self.waiters.news()


def _hint(fields: Mapping[Any, Any]) -> str:
    """Whose outcome a ledger entry may be."""
    found = _ID.search(fields.get(b"outcome", b""))
    return found[1].decode("utf-8", "replace") if found else ""
