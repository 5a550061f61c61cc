"""The client for asyncio programs: the methods of :class:`producer.client.CancelClient` as coroutines.

Cancelling a task that is in one of them ends it and leaves no connection half read.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self, overload

import redis
import redis.asyncio as aio

from producer.aio_link import AsyncLines
from producer.door import checked_position, checked_timeout, checked_wait
from producer.message import DEFAULT_ACCOUNT, DEFAULT_QUEUE, CancelRequest, OnTrigger, OpenRequest, Outcome
from producer.open_orders import OPEN_IN_DOUBT, OpenOutcome, OpenTicketFields, pursue
from producer.place import Place, checked_url
from producer.protocol import (
    IN_DOUBT,
    RETRY_IN_DOUBT,
    TIMEOUT_S,
    Conversation,
    QueueUnavailable,
    T,
    TicketFields,
    readable_entries,
)
from producer.status import Status
from producer.untrusted import checked_flag
from producer.waiting import (
    LOOK_S,
    End,
    QueueWire,
    Waited,
    closed,
    many_wanted,
    one_wanted,
    outcome_or_raise,
    proven,
    readable,
    split,
    timed_out,
    wanted_of,
)


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


class AsyncCancelClient:
    """Puts cancel requests on a queue and reads their outcomes.

    Any number of tasks may use it: it holds at most 4 connections in an event loop, for which its callers queue, and
    none of them crosses a fork or serves another loop: a second `asyncio.run` gets connections of its own. A
    ``connection`` of yours is read as :class:`~producer.client.CancelClient` reads it. RQ knows no asyncio, so
    :meth:`CancelClient.job` has no counterpart here.
    """

    def __init__(self, connection: aio.Redis, queue: str = DEFAULT_QUEUE) -> None:
        self._place = Place.of(connection, aio.Redis, redis.Redis, "CancelClient")
        self._redis = connection
        self._wire = QueueWire(queue, self._place.timeout_s)
        self.keys = self._wire.keys
        self._lines: list[AsyncLines] = []  # of each loop and process; what a parent's loop watches is never touched
        self._is_closed = False

    @classmethod
    def from_url(
        cls, url: str, queue: str = DEFAULT_QUEUE, *, timeout_s: float | timedelta | None = None, **options: Any
    ) -> Self:
        """A client for the Redis at ``url``; see :meth:`CancelClient.from_url`."""
        address = checked_url(url)
        call_s = checked_timeout(address.options.get("socket_timeout", TIMEOUT_S) if timeout_s is None else timeout_s)
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
        """Enqueue one cancel and return at once. The fields are those of :class:`CancelRequest`.

        ``durable=True`` also waits until the server has the request in its append-only file.

        Raises:
            InvalidRequest: a field breaks its rule; nothing was enqueued.
            QueueUnavailable: Redis did not answer in time; calling again is safe (by client id alone it makes a second
                job, which means the order that has the id then).
            NotDurable: the request is on the queue, but this server cannot promise that it survives a crash.
        """
        request = CancelRequest(algo_id, client_algo_id, account, deadline_s, urgent, symbol, tag, on_trigger)
        return (await self.cancel_many([request], durable=durable))[0]

    async def cancel_many(self, requests: Iterable[CancelRequest], *, durable: bool = False) -> list[AsyncTicket]:
        """Enqueue many cancels, one round trip for each 1,000; tickets in the order of the requests.

        Requests for one order share a ticket, also by client id alone. Raises like :meth:`cancel`.
        """
        accepted = await self.converse(self._wire.enqueue(requests, durable), doubt=IN_DOUBT)
        tickets = [AsyncTicket(*carried, self) for carried in accepted.carried]
        if accepted.not_durable is not None:
            accepted.not_durable.tickets = tickets
            raise accepted.not_durable
        return tickets

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
        """See :meth:`producer.client.CancelClient.cancel_open`."""
        return await self._list_open(
            OpenRequest(
                symbol=symbol, account=account, deadline_s=deadline_s, urgent=urgent, tag=tag, on_trigger=on_trigger
            )
        )

    async def _list_open(self, request: OpenRequest) -> AsyncOpenTicket:
        accepted = await self.converse(self._wire.enqueue([request], durable=False), doubt=OPEN_IN_DOUBT)
        return AsyncOpenTicket(*accepted.carried[0], _client=self, asked_ms=accepted.asked_ms)

    async def outcome(self, ticket_or_id: TicketFields | str) -> Outcome | None:
        """The outcome of a request, or None while there is none (or no longer: it is kept for OUTCOME_TTL_S).

        Raises:
            MalformedMessage: its record is not an outcome of this version, or not about this order.
            QueueUnavailable: Redis did not answer.
        """
        ((job_id, request),) = one_wanted(ticket_or_id).items()
        ends = await self.converse(self._wire.look([job_id], for_the_gone=False))
        return outcome_or_raise(proven(ends[job_id], request)) if job_id in ends else None

    async def outcomes_of(self, tickets_or_ids: Iterable[TicketFields | str]) -> dict[str, Outcome]:
        """Those outcomes that are there, by id; one round trip for each 1,000, two where some failed.

        A record that is no outcome of this version, or not about the ticket, is left out and logged with its id.
        """
        wanted = wanted_of(tickets_or_ids)
        ends = await self.converse(self._wire.look(wanted, for_the_gone=False))
        return readable({job_id: proven(end, wanted[job_id]) for job_id, end in ends.items()})

    def outcomes(self, after: str = "0-0", *, follow: bool = False) -> AsyncIterator[tuple[str, Outcome]]:
        """The ledger after a stream id: pairs of stream id and outcome, oldest first; ``follow`` waits for new ones.

        ``$`` stands for the newest entry, ``0-0`` for all that are left: the ledger keeps about LEDGER_MAXLEN. An entry
        that is no outcome of this version is passed over and logged with its stream id. An error ends the iteration: go
        on with a new one after the last stream id that came.

        Raises:
            InvalidRequest: ``after`` is no stream id.
            LedgerGap: entries after that position were trimmed before they were read; it says where to go on.
            QueueUnavailable: Redis did not answer.
        """
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

    @contextlib.contextmanager
    def _news(self) -> Iterator[Callable[[str], Awaitable[bool]]]:
        """A function that waits for news of the ledger, and says whether it goes on after an entry or may do so."""
        lines, news = self._mine(), asyncio.Event()

        async def goes_on_after(_: str) -> bool:
            await lines.listener()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await news.wait()
            news.clear()
            return True

        with lines.waiters.waiting((), news.set):
            yield goes_on_after

    @overload
    async def wait(self, ticket_or_id: AsyncTicket | str, timeout_s: float | timedelta | None = None) -> Outcome: ...
    @overload
    async def wait(self, ticket_or_id: AsyncOpenTicket, timeout_s: float | timedelta | None = None) -> OpenOutcome: ...
    async def wait(
        self, ticket_or_id: AsyncTicket | AsyncOpenTicket | str, timeout_s: float | timedelta | None = None
    ) -> Outcome | OpenOutcome:
        """Block until a request has an outcome; see :meth:`AsyncTicket.wait`. For a ticket of `cancel_open`, until all
        its orders have theirs; by its id alone, until they are listed."""
        if isinstance(ticket_or_id, OpenTicketFields):
            return await self._wait_for_open(ticket_or_id, checked_wait(timeout_s))
        return outcome_or_raise(*(await self._ends(one_wanted(ticket_or_id), timeout_s)).values())

    async def wait_many(
        self, tickets_or_ids: Iterable[AsyncTicket | str], timeout_s: float | timedelta | None = None
    ) -> Waited:
        """Block until all have their outcome or the time is up; gives what ended and what stands, and raises nothing
        (but InvalidRequest).

        What stands is given with what `wait` would raise for it: WaitTimeout, UnknownRequest, MalformedMessage or
        QueueUnavailable.
        """
        return split(await self._ends(many_wanted(tickets_or_ids), timeout_s))

    async def _wait_for_open(self, ticket: OpenTicketFields, timeout_s: float | None) -> OpenOutcome:
        began_at = asyncio.get_running_loop().time()
        conversation = pursue(ticket, self.keys.queue)
        try:
            step = next(conversation)
            while True:
                if isinstance(step, OpenRequest):
                    step = conversation.send(await self._list_open(step))
                else:
                    left_s = (
                        None
                        if timeout_s is None
                        else max(began_at + timeout_s - asyncio.get_running_loop().time(), 0.0)
                    )
                    step = conversation.send(await self._ends(dict(step), left_s))
        except StopIteration as end:
            outcome: OpenOutcome = end.value
            return outcome

    async def _ends(self, wanted: dict[str, CancelRequest | None], timeout: object) -> dict[str, End]:
        timeout_s = checked_wait(timeout)
        began_at = asyncio.get_running_loop().time()
        ends: dict[str, End] = {}
        try:
            ends = await self.converse(self._wire.look(wanted))
            if ends.keys() != wanted.keys() and timeout_s != 0:
                ends |= await self._listen_for([job_id for job_id in wanted if job_id not in ends], timeout_s, began_at)
            if ends.keys() != wanted.keys():
                ends |= await self._timed_out([job_id for job_id in wanted if job_id not in ends], timeout_s)
        except QueueUnavailable as error:
            ends = dict.fromkeys(wanted, error) | ends
        return {job_id: proven(ends[job_id], request) for job_id, request in wanted.items()}

    async def _timed_out(self, job_ids: list[str], timeout_s: float | None) -> dict[str, End]:
        served: bool | None = None
        with contextlib.suppress(QueueUnavailable):
            served = await self.converse(self._wire.served())
        return {job_id: timed_out(job_id, timeout_s, self.keys.queue, served) for job_id in job_ids}

    async def _listen_for(self, job_ids: list[str], timeout_s: float | None, began_at: float) -> dict[str, End]:
        ends_at = None if timeout_s is None else began_at + timeout_s
        lines, came = self._mine(), asyncio.Event()
        with lines.waiters.waiting(job_ids, came.set) as waiter:
            await lines.listener()
            # What came before the listener was there, it does not hear of.
            asked = lines.waiters.came
            lines.waiters.tell(await self.converse(self._wire.look(job_ids)), asked)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(ends_at):
                    await came.wait()
            return dict(waiter.ends)

    async def retry(self, tickets_or_ids: Iterable[TicketFields | str], *, missing_ok: bool = False) -> list[str]:
        """Start a new run, with a new deadline, of requests that ended in a failed kind; returns their ids.

        ``missing_ok`` leaves out the ids that cannot be retried (any more) instead of raising.

        Raises:
            UnknownRequest: some are not among the failed ones; none was started.
            QueueUnavailable: Redis did not answer; those that it started meanwhile are no longer among the failed ones.
        """
        conversation = self._wire.retry(tickets_or_ids, checked_flag("missing_ok", missing_ok))
        return await self.converse(conversation, repeat=False, doubt=RETRY_IN_DOUBT)

    async def failed_ids(self) -> list[str]:
        """Ids of the requests that ended in a failed kind and can be retried, oldest first."""
        return await self.converse(self._wire.failed_ids())

    async def statuses(self, tickets_or_ids: Iterable[TicketFields | str]) -> list[str | None]:
        """RQ's status of each job, None where there is no such job; one round trip for each 1,000."""
        return await self.converse(self._wire.statuses(tickets_or_ids))

    async def status(self) -> Status:
        """How the queue stands, in three round trips; see :class:`producer.status.Status`."""
        return await self.converse(self._wire.status())

    async def converse(self, conversation: Conversation[T], *, repeat: bool = True, doubt: str = "") -> T:
        """See :meth:`CancelClient.converse`."""
        return await self._mine().converse(conversation, doubt, repeat=repeat)

    def _mine(self) -> AsyncLines:
        """The connections of this loop: those of another would answer nobody, those of a parent's are its own."""
        if self._is_closed:
            raise closed(self)
        loop, pid = asyncio.get_running_loop(), os.getpid()
        for lines in self._lines:
            if lines.loop is loop and lines.pid == pid:
                return lines
        # What a loop of this process had open it closed at its end; a parent's is kept, as letting go would close it.
        self._lines = [each for each in self._lines if each.pid != pid or not each.loop.is_closed()]
        self._lines.append(AsyncLines(self._place, self._wire))
        return self._lines[-1]
