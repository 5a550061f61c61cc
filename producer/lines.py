"""What the connections of both clients do alike: they carry conversations, and one of them listens for all who wait."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import redis

from producer.place import Place
from producer.protocol import Commands, Conversation, NotOurs, Slow, T, Wire, availability, carried
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

    async def carry(self, conversation: Conversation[T], doubt: str, repeat: bool) -> T:
        """See :meth:`producer.base.BaseClient.converse`."""
        with availability(self._address, doubt):
            try:
                return await carried(conversation, partial(self._answers, repeat))
            except NotOurs:
                self._calls.distrust()
                raise

    async def _answers(self, repeat: bool, commands: Commands) -> list[Any]:
        ends_at = self._now() + self._wire.timeout_s
        if not isinstance(commands, Slow):
            return await self._twice(self._calls, repeat, commands, ends_at)
        try:
            return await self._twice(self._slow, repeat, commands, ends_at)
        except redis.RedisError as error:
            return [error] * len(commands)

    async def _twice(self, line: Any, repeat: bool, commands: Commands, ends_at: float) -> list[Any]:
        """The answers, asked for once more if they were lost, or refused by a server that may not be the right one."""
        try:
            answers: list[Any] = await given(line.carry(commands, ends_at))
            # What was refused so wrote nothing, and another connection may lead to another server.
            if not is_refused(answers) or not (repeat or len(commands) == 1):
                return answers
        except redis.AuthenticationError:
            raise
        except redis.ConnectionError:
            # Closed by the server, say. The ids are in the words: a repeat finds itself.
            if not repeat or self._now() >= ends_at:
                raise
        return cast(list[Any], await given(line.carry(commands, ends_at)))

    async def _hear(self, link: Any, ready: Callable[[], object]) -> None:
        async def ask(commands: Commands) -> list[Any]:
            (answers,) = await given(link.ask([commands], self._now() + LOOK_S + self._wire.timeout_s))
            return list(answers)

        async def pause(seconds: float) -> None:
            await given(self.wait(self.event(), seconds))

        await self.waiters.listen(ask, pause, ready, self._address)
