"""The client for asyncio programs: the methods of :class:`producer.client.CancelClient` as coroutines.

Cancelling a task that is in one of them ends it and leaves no connection half read.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self, cast, overload

import redis
import redis.asyncio as aio

from producer.aio_link import AsyncLines
from producer.base import BaseClient
from producer.door import checked_position
from producer.message import DEFAULT_ACCOUNT, DEFAULT_QUEUE, CancelRequest, OnTrigger, OpenRequest, Outcome
from producer.open_orders import OpenOutcome, OpenTicketFields
from producer.place import Place
from producer.protocol import RETRY_IN_DOUBT, Conversation, T, TicketFields, readable_entries
from producer.redis_url import Address
from producer.status import Status
from producer.untrusted import checked_flag
from producer.waiting import QueueWire, Waited, closed


@dataclass(frozen=True, slots=True)
class AsyncTicket(TicketFields):
    """A request that is on the queue. ``duplicate``: it shares the job of an unfinished request for the same order.

    It can be pickled; the copy has no client: give it to the `wait` of one.
    """

    _client: AsyncCancelClient | None = field(default=None, repr=False, compare=False)

    async def wait(self, timeout_s: float | timedelta | None = None) -> Outcome:
        """Wait until the outcome is recorded; see :meth:`producer.client.Ticket.wait`."""
        return await self.needed(self._client).wait(self, timeout_s)


@dataclass(frozen=True, slots=True)
class AsyncOpenTicket(OpenTicketFields):
    """A request for all open conditional orders of a symbol that is on the queue. A pickled copy has no client."""

    _client: AsyncCancelClient | None = field(default=None, repr=False, compare=False)

    async def wait(self, timeout_s: float | timedelta | None = None) -> OpenOutcome:
        """Wait until the orders were listed, all their requests have ended, and a second look found no more.

        Raises as `wait` of one request; the WaitTimeout has in ``so_far`` what is known.
        """
        return await self.needed(self._client).wait(self, timeout_s)


class AsyncCancelClient(BaseClient):
    """Puts cancel requests on a queue and reads their outcomes.

    Any number of tasks may use it: it holds at most 4 connections in an event loop, for which its callers queue, and
    none of them crosses a fork or serves another loop: a second `asyncio.run` gets connections of its own. A
    ``connection`` of yours is read as :class:`~producer.client.CancelClient` reads it. RQ knows no asyncio, so
    :meth:`CancelClient.job` has no counterpart here.
    """

    _ticket = AsyncTicket
    _open_ticket = AsyncOpenTicket

    def __init__(self, connection: aio.Redis, queue: str = DEFAULT_QUEUE) -> None:
        self._place = Place.of(connection, aio.Redis, redis.Redis, "CancelClient")
        self._redis = connection
        self._wire = QueueWire(queue, self._place.timeout_s)
        self.keys = self._wire.keys
        self._lines: list[AsyncLines] = []  # of each loop and process; what a parent's loop watches is never touched
        self._is_closed = False

    @classmethod
    def _at(cls, address: Address, call_s: float, options: dict[str, Any], queue: str) -> Self:
        return cls(address.async_client(call_s, **options), queue)

    async def close(self) -> None:
        """Give the connections back, a brought one too. A closed client refuses every call."""
        self._is_closed = True
        loop = asyncio.get_running_loop()
        for lines in [each for each in self._lines if each.pid == os.getpid()]:
            self._lines.remove(lines)
            if lines.loop is loop:
                await lines.close(closed(self))
            elif lines.loop.is_running():
                asyncio.run_coroutine_threadsafe(lines.close(closed(self)), lines.loop)
        with contextlib.suppress(redis.RedisError, RuntimeError):  # it was used in a loop that has been closed
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
        on_trigger: OnTrigger | str = OnTrigger.REPORT,
        durable: bool = False,
    ) -> AsyncTicket:
        """See :meth:`CancelClient.cancel`."""
        request = CancelRequest(algo_id, client_algo_id, account, deadline_s, urgent, symbol, tag, on_trigger)
        return (await self.cancel_many([request], durable=durable))[0]

    async def cancel_many(self, requests: Iterable[CancelRequest], *, durable: bool = False) -> list[AsyncTicket]:
        """See :meth:`CancelClient.cancel_many`."""
        return await self._enqueue(requests, durable)

    async def cancel_open(
        self,
        symbol: str,
        *,
        account: str = DEFAULT_ACCOUNT,
        deadline_s: float | None = None,
        urgent: bool = False,
        tag: str | None = None,
        on_trigger: OnTrigger | str = OnTrigger.REPORT,
    ) -> AsyncOpenTicket:
        """See :meth:`CancelClient.cancel_open`."""
        request = OpenRequest(None, None, account, deadline_s, urgent, symbol, tag, on_trigger)
        return cast(AsyncOpenTicket, await self._list_open(request))

    async def outcome(self, ticket_or_id: TicketFields | str) -> Outcome | None:
        """See :meth:`CancelClient.outcome`."""
        return await self._outcome(ticket_or_id)

    async def outcomes_of(self, tickets_or_ids: Iterable[TicketFields | str]) -> dict[str, Outcome]:
        """See :meth:`CancelClient.outcomes_of`."""
        return await self._outcomes_of(tickets_or_ids)

    def outcomes(self, after: str = "0-0", *, follow: bool = False) -> AsyncIterator[tuple[str, Outcome]]:
        """See :meth:`CancelClient.outcomes`."""
        return self._entries(checked_position(after), checked_flag("follow", follow))

    async def _entries(self, position: str, follow: bool) -> AsyncIterator[tuple[str, Outcome]]:
        if position == "$":
            position = await self.converse(self._wire.newest())
        with self._news() as goes_on_after:
            while True:
                page = await self.converse(self._wire.page(position))
                for position, outcome in readable_entries(page):
                    if outcome is not None:
                        yield position, outcome
                if not page and not (follow and await goes_on_after(position)):
                    return

    @overload
    async def wait(self, ticket_or_id: AsyncTicket | str, timeout_s: float | timedelta | None = None) -> Outcome: ...
    @overload
    async def wait(self, ticket_or_id: AsyncOpenTicket, timeout_s: float | timedelta | None = None) -> OpenOutcome: ...
    async def wait(
        self, ticket_or_id: AsyncTicket | AsyncOpenTicket | str, timeout_s: float | timedelta | None = None
    ) -> Outcome | OpenOutcome:
        """Block until a request has an outcome; see :meth:`AsyncTicket.wait`. For a ticket of `cancel_open`, until all
        its orders have theirs; by its id alone, until they are listed."""
        return cast(Outcome | OpenOutcome, await self._wait(ticket_or_id, timeout_s))

    async def wait_many(
        self, tickets_or_ids: Iterable[AsyncTicket | str], timeout_s: float | timedelta | None = None
    ) -> Waited:
        """See :meth:`CancelClient.wait_many`."""
        return await self._wait_many(tickets_or_ids, timeout_s)

    async def retry(self, tickets_or_ids: Iterable[TicketFields | str], *, missing_ok: bool = False) -> list[str]:
        """See :meth:`CancelClient.retry`."""
        conversation = self._wire.retry(tickets_or_ids, checked_flag("missing_ok", missing_ok))
        return await self.converse(conversation, repeat=False, doubt=RETRY_IN_DOUBT)

    async def failed_ids(self) -> list[str]:
        """See :meth:`CancelClient.failed_ids`."""
        return await self.converse(self._wire.failed_ids())

    async def statuses(self, tickets_or_ids: Iterable[TicketFields | str]) -> list[str | None]:
        """See :meth:`CancelClient.statuses`."""
        return await self.converse(self._wire.statuses(tickets_or_ids))

    async def status(self) -> Status:
        """See :meth:`CancelClient.status`."""
        return await self.converse(self._wire.status())

    async def converse(self, conversation: Conversation[T], *, repeat: bool = True, doubt: str = "") -> T:
        """See :meth:`CancelClient.converse`."""
        return await self._mine().carry(conversation, doubt, repeat)

    def _mine(self) -> AsyncLines:
        """The connections of this loop: those of another would answer nobody, those of a parent's are its own."""
        if self._is_closed:
            raise closed(self)
        loop, pid = asyncio.get_running_loop(), os.getpid()
        for lines in tuple(self._lines):  # loops of other threads come and go
            if lines.loop is loop and lines.pid == pid:
                return lines
            # What a loop of this process had open it closed at its end; a parent's is kept: letting go would close it.
            if lines.pid == pid and lines.loop.is_closed():
                with contextlib.suppress(ValueError):
                    self._lines.remove(lines)
        mine = AsyncLines(self._place, self._wire)
        self._lines.append(mine)
        return mine
