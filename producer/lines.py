"""What the connections of both clients do alike: they carry conversations, and one of them listens for all who wait."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import redis

from producer.place import Place
from producer.protocol import (
    Commands,
    Conversation,
    Doubt,
    NotOurs,
    QueueUnavailable,
    Slow,
    T,
    Wire,
    availability,
    carried,
    is_unsent,
)
from producer.redis_url import given, is_refused
from producer.waiting import LOOK_S, Waiters

#: Connections for calls; beside them one for calls that wait for a disk, and one that listens for all waiters.
CONNECTIONS = 2


class BaseLines:
    """All connections of a client in one process, and event loop if there is one."""

    event: type[Any]

    @staticmethod
    def wait(event: Any, timeout_s: float | None) -> Any:
        """Wait until it is set, at most so long."""
        raise NotImplementedError

    def __init__(self, place: Place, wire: Wire, link: Callable[[], Any], line: type[Any]) -> None:
        self._wire = wire
        self._address = place.address
        self._link = link
        self._calls = line(link, CONNECTIONS)
        self._slow = line(link, 1)
        self.waiters = Waiters(wire)

    def _now(self) -> float:
        raise NotImplementedError

    async def carry(self, conversation: Conversation[T], words: str, repeat: bool) -> T:
        """See :meth:`producer.base.BaseClient.converse`."""
        doubt = Doubt(words)
        try:
            with availability(self._address, doubt):
                try:
                    return await carried(conversation, partial(self._answers, doubt, repeat))
                except NotOurs:
                    self._calls.distrust()
                    raise
        except QueueUnavailable as error:
            error.nothing_sent = not doubt.has_left
            raise

    async def _answers(self, doubt: Doubt, repeat: bool, commands: Commands) -> list[Any]:
        """The answers, asked for once more if they were lost, or refused by a server that may not be the right one."""
        ends_at = self._now() + self._wire.timeout_s
        ask = partial(self._ask, doubt, commands, ends_at)
        try:
            try:
                answers = await ask()
                # What was refused so wrote nothing, and another connection may lead to another server.
                if not is_refused(answers) or not (repeat or len(commands) == 1):
                    return answers
            except redis.AuthenticationError:
                raise
            except redis.ConnectionError:
                # Closed by the server, say. The ids are in the words: a repeat finds itself.
                if not repeat or self._now() >= ends_at:
                    raise
            return await ask()
        except redis.RedisError as error:
            if not isinstance(commands, Slow):
                raise
            return [error] * len(commands)

    async def _ask(self, doubt: Doubt, commands: Commands, ends_at: float) -> list[Any]:
        line = self._slow if isinstance(commands, Slow) else self._calls
        try:
            answers: list[Any] = await given(line.carry(commands, ends_at))
        except redis.RedisError as error:
            doubt.has_left = doubt.has_left or not is_unsent(error)
            raise
        doubt.has_left = True
        return answers

    async def _hear(self, link: Any, ready: Callable[[], object]) -> None:
        async def ask(commands: Commands) -> list[Any]:
            (answers,) = await given(link.ask([commands], self._now() + LOOK_S + self._wire.timeout_s))
            return list(answers)

        async def pause(seconds: float) -> None:
            await given(self.wait(self.event(), seconds))

        await self.waiters.listen(ask, pause, ready, self._address)
