"""The client for asyncio programs: the methods of :class:`producer.client.CancelClient` as coroutines.

Cancelling a task that is in one of them ends it and leaves no connection half read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Self, cast

import redis.asyncio as redis

from producer.message import DEFAULT_ACCOUNT, DEFAULT_QUEUE, CancelRequest, Outcome
from producer.protocol import (
    Commands,
    Conversation,
    T,
    TicketFields,
    Wire,
    availability,
    check_position,
    patience,
    readable_entries,
    timeout_of,
)
from producer.redis_url import Address, is_refused
from producer.status import Status, read_status


@dataclass(frozen=True, slots=True)
class AsyncTicket(TicketFields):
    """A request that is on the queue. ``duplicate``: it shares the job of an unfinished request for the same order."""

    _client: AsyncCancelClient = field(repr=False, compare=False)

    async def wait(self, timeout_s: float | None = None) -> Outcome:
        """Wait until the outcome is recorded, at most ``timeout_s`` seconds (None: as long as it takes).

        Raises:
            WaitTimeout: no outcome within that time; the request goes on.
            QueueUnavailable: Redis did not answer.
        """
        return await self._client.wait(self.id, timeout_s)


class AsyncCancelClient:
    """Puts cancel requests on a queue and reads their outcomes. Belongs to one event loop.

    A ``connection`` of yours should have a ``socket_timeout``: it is what bounds each call. RQ knows no asyncio, so
    :meth:`CancelClient.job` has no counterpart here.
    """

    def __init__(self, connection: redis.Redis, queue: str = DEFAULT_QUEUE) -> None:
        self._redis = connection
        self._wire = Wire(queue, timeout_of(connection.connection_pool.connection_kwargs))
        self.keys = self._wire.keys

    @classmethod
    def from_url(cls, url: str, queue: str = DEFAULT_QUEUE, *, timeout_s: float = 2.0, **options: Any) -> Self:
        """A client with connections of its own.

        ``timeout_s`` bounds every call; ``options`` go to redis-py's pool.

        Raises:
            BadRedisUrl: ``url`` is none of :data:`producer.redis_url.FORMS`.
        """
        return cls(Address.parse(url).async_client(timeout_s, **options), queue)

    async def close(self) -> None:
        """Give the connections back."""
        await self._redis.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def cancel(
        self,
        *,
        algo_id: int | None = None,
        client_algo_id: str | None = None,
        account: str = DEFAULT_ACCOUNT,
        deadline_s: float | None = None,
        urgent: bool = False,
        symbol: str | None = None,
        tag: str | None = None,
        durable: bool = False,
    ) -> AsyncTicket:
        """Enqueue one cancel and return at once; see :meth:`CancelClient.cancel` for fields and errors."""
        request = CancelRequest(algo_id, client_algo_id, account, deadline_s, urgent, symbol, tag)
        return (await self.cancel_many([request], durable=durable))[0]

    async def cancel_many(self, requests: Iterable[CancelRequest], *, durable: bool = False) -> list[AsyncTicket]:
        """Enqueue many cancels, one round trip for each 1,000; tickets in the order of the requests.

        Requests for one order share a ticket, also by client id alone. Raises like :meth:`cancel`.
        """
        accepted = await self.converse(self._wire.enqueue(requests, durable))
        tickets = [AsyncTicket(*carried, self) for carried in accepted.carried]
        if accepted.not_durable is not None:
            accepted.not_durable.tickets = tickets
            raise accepted.not_durable
        return tickets

    async def outcome(self, job_id: str) -> Outcome | None:
        """The outcome of a request, or None while there is none (or no longer: it is kept for OUTCOME_TTL_S)."""
        return await self.converse(self._wire.outcome(job_id))

    async def outcomes_of(self, job_ids: Iterable[str]) -> dict[str, Outcome]:
        """Those outcomes of ``job_ids`` that are there, by id; see :meth:`CancelClient.outcomes_of`."""
        return await self.converse(self._wire.outcomes_of(job_ids))

    def outcomes(self, after: str = "0-0", *, follow: bool = False) -> AsyncIterator[tuple[str, Outcome]]:
        """The ledger after a stream id, for ``async for``; see :meth:`CancelClient.outcomes`."""
        return self._entries(check_position(after), follow)

    async def _entries(self, position: str, follow: bool) -> AsyncIterator[tuple[str, Outcome]]:
        if position == "$":
            position = await self.converse(self._wire.newest())
        while (page := await self.converse(self._wire.page(position, follow))) or follow:
            for position, outcome in readable_entries(page):
                if outcome is not None:
                    yield position, outcome

    async def wait(self, job_id: str, timeout_s: float | None = None) -> Outcome:
        """Wait until ``job_id`` has an outcome; see :meth:`AsyncTicket.wait`."""
        listen_s, end_if_cancelled = patience(job_id, timeout_s), _cancellation()
        if (outcome := await self.outcome(job_id)) is not None:
            return outcome
        with availability():
            async with self._redis.pubsub() as channel:
                await channel.subscribe(self.keys.outcome_prefix + job_id)
                end_if_cancelled()
                while (outcome := await self.outcome(job_id)) is None:
                    await channel.get_message(timeout=listen_s())
                    end_if_cancelled()
        return outcome

    async def retry(self, job_ids: Iterable[str], *, missing_ok: bool = False) -> list[str]:
        """Start a new run of requests that ended in a failed kind; see :meth:`CancelClient.retry`."""
        return await self.converse(self._wire.retry(job_ids, missing_ok), repeat=False)

    async def failed_ids(self) -> list[str]:
        """Ids of the requests that ended in a failed kind and can be retried, oldest first."""
        return await self.converse(self._wire.failed_ids())

    async def statuses(self, job_ids: Iterable[str]) -> list[str | None]:
        """RQ's status of each job, None where there is no such job; one round trip for each 1,000."""
        return await self.converse(self._wire.statuses(list(job_ids)))

    async def status(self) -> Status:
        """How the queue stands, in three round trips; see :class:`producer.status.Status`."""
        return await self.converse(read_status(self.keys))

    async def converse(self, conversation: Conversation[T], *, repeat: bool = True) -> T:
        end_if_cancelled = _cancellation()
        with availability():
            try:
                commands = next(conversation)
                while True:
                    answers = await self._answers(commands, repeat)
                    end_if_cancelled()
                    commands = conversation.send(answers)
            except StopIteration as end:
                return cast(T, end.value)

    async def _answers(self, commands: Commands, repeat: bool) -> list[Any]:
        try:
            answers = await self._round_trip(commands)
        except redis.AuthenticationError:
            raise
        except redis.ConnectionError:
            if not repeat:
                raise
            # A kept connection that the server had closed. The ids are in the words: a repeat finds itself.
            return await self._round_trip(commands)
        if is_refused(answers):  # the server may not be the primary any more
            await self._redis.connection_pool.disconnect(inuse_connections=False)
            return await self._round_trip(commands)
        return answers

    async def _round_trip(self, commands: Commands) -> list[Any]:
        if len(commands) > 1:
            # One connection for all: WAITAOF speaks of what its own connection has written.
            async with self._redis.pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                return await pipeline.execute(raise_on_error=False)
        try:
            return [await self._redis.execute_command(*command) for command in commands]
        except redis.ResponseError as error:
            return [error]


def _cancellation() -> Callable[[], None]:
    """A function that raises CancelledError if this task has been cancelled since now.

    redis-py sends under asyncio.wait_for, which before Python 3.12 forgets a cancellation that comes just as it ends: a
    waiter would then wait on for ever.
    """
    task = asyncio.current_task()
    before = 0 if task is None else task.cancelling()

    def end_if_cancelled() -> None:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError

    return end_if_cancelled
