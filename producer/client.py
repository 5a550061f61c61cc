"""The client for strategies that are not asyncio programs: enqueue cancels, learn what became of them.

Needs a Redis connection and nothing else: no exchange key, no HTTP. Errors: :class:`~producer.message.InvalidRequest`
before anything is sent, :class:`QueueUnavailable` when Redis does not answer in time, :class:`WaitTimeout` when an
outcome is not there yet.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self, cast, overload

import redis
import redis.asyncio as aio
from rq.exceptions import NoSuchJobError
from rq.job import Job
from rq.serializers import JSONSerializer

from producer.base import BaseClient
from producer.door import checked_id, checked_position
from producer.link import Lines
from producer.message import DEFAULT_ACCOUNT, DEFAULT_QUEUE, CancelRequest, OnTrigger, OpenRequest, Outcome
from producer.open_orders import OpenOutcome, OpenTicketFields
from producer.place import Place
from producer.protocol import RETRY_IN_DOUBT, Conversation, T, TicketFields, readable_entries
from producer.redis_url import Address, at_once
from producer.status import Status
from producer.untrusted import checked_flag
from producer.waiting import QueueWire, Waited, closed


@dataclass(frozen=True, slots=True)
class Ticket(TicketFields):
    """A request that is on the queue. ``duplicate``: it shares the job of an unfinished request for the same order.

    It can be pickled; the copy has no client: give it to the `wait` of one.
    """

    _client: CancelClient | None = field(default=None, repr=False, compare=False)

    def wait(self, timeout_s: float | timedelta | None = None) -> Outcome:
        """Block until the outcome is recorded, at most ``timeout_s`` seconds (None: as long as it takes).

        Raises:
            WaitTimeout: no outcome within that time; the request goes on. Says whether a live worker serves the queue.
            UnknownRequest: nobody knows the request (any more): it was removed, or its outcome has expired.
            MalformedMessage: its record is not an outcome of this version, or not about this order.
            QueueUnavailable: Redis did not answer.
        """
        return self.needed(self._client).wait(self, timeout_s)


@dataclass(frozen=True, slots=True)
class OpenTicket(OpenTicketFields):
    """A request for all open conditional orders of a symbol that is on the queue. A pickled copy has no client."""

    _client: CancelClient | None = field(default=None, repr=False, compare=False)

    def wait(self, timeout_s: float | timedelta | None = None) -> OpenOutcome:
        """Block until the orders were listed, all their requests have ended, and a second look found no more.

        Raises as `wait` of one request; the WaitTimeout has in ``so_far`` what is known.
        """
        return self.needed(self._client).wait(self, timeout_s)


class CancelClient(BaseClient):
    """Puts cancel requests on a queue and reads their outcomes. One for a process is enough.

    Any number of threads may use it: it holds at most 4 connections, for which its callers queue, and none of them
    crosses a fork. A ``connection`` of yours says where Redis is, and by its ``socket_timeout`` (2 s if it has none)
    how long a call may take; the client makes connections of its own from it.
    """

    _ticket = Ticket
    _open_ticket = OpenTicket

    def __init__(self, connection: redis.Redis, queue: str = DEFAULT_QUEUE) -> None:
        self._place = Place.of(connection, redis.Redis, aio.Redis, "AsyncCancelClient")
        self._redis = connection
        self._wire = QueueWire(queue, self._place.timeout_s)
        self.keys = self._wire.keys
        self._lines: dict[int, Lines] = {}  # by process
        self._is_closed = False

    @classmethod
    def _at(cls, address: Address, call_s: float, options: dict[str, Any], queue: str) -> Self:
        return cls(address.client(call_s, **options), queue)

    def close(self) -> None:
        """Give the connections back, a brought one too. A closed client refuses every call."""
        self._is_closed = True
        if (lines := self._lines.pop(os.getpid(), None)) is not None:
            lines.close(closed(self))
        self._redis.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cancel(
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
    ) -> Ticket:
        """Enqueue one cancel and return at once. The fields are those of :class:`CancelRequest`.

        ``durable=True`` also waits until the server has the request in its append-only file.

        Raises:
            InvalidRequest: a field breaks its rule; nothing was enqueued.
            QueueUnavailable: Redis did not answer in time; calling again is safe (by client id alone it makes a second
                job, which means the order that has the id then).
            NotDurable: the request is on the queue, but this server cannot promise that it survives a crash.
        """
        request = CancelRequest(algo_id, client_algo_id, account, deadline_s, urgent, symbol, tag, on_trigger)
        return self.cancel_many([request], durable=durable)[0]

    def cancel_many(self, requests: Iterable[CancelRequest], *, durable: bool = False) -> list[Ticket]:
        """Enqueue many cancels, one round trip for each 1,000; tickets in the order of the requests.

        Requests for one order share a ticket, also by client id alone. Raises like :meth:`cancel`.
        """
        return at_once(self._enqueue(requests, durable))

    def cancel_open(
        self,
        symbol: str,
        *,
        account: str = DEFAULT_ACCOUNT,
        deadline_s: float | None = None,
        urgent: bool = False,
        tag: str | None = None,
        on_trigger: OnTrigger | str = OnTrigger.REPORT,
    ) -> OpenTicket:
        """Ask for all conditional orders of ``symbol`` that are open now to be cancelled, and return at once.

        *This removes protection; positions and normal orders stay.* A worker lists the orders and makes an ordinary
        request for each; what is opened from now on is left alone, and so is what the clocks cannot tell.

        Raises:
            InvalidRequest: a field breaks its rule; nothing was enqueued.
            QueueUnavailable: Redis did not answer in time; a repeat means the orders that are open then.
        """
        request = OpenRequest(None, None, account, deadline_s, urgent, symbol, tag, on_trigger)
        return cast(OpenTicket, at_once(self._list_open(request)))

    def outcome(self, ticket_or_id: TicketFields | str) -> Outcome | None:
        """The outcome of a request, or None while there is none (or no longer: it is kept for OUTCOME_TTL_S).

        Raises:
            MalformedMessage: its record is not an outcome of this version, or not about this order.
            QueueUnavailable: Redis did not answer.
        """
        return at_once(self._outcome(ticket_or_id))

    def outcomes_of(self, tickets_or_ids: Iterable[TicketFields | str]) -> dict[str, Outcome]:
        """Those outcomes that are there, by id; one round trip for each 1,000, two where some failed.

        A record that is no outcome of this version, or not about the ticket, is left out and logged with its id.
        """
        return at_once(self._outcomes_of(tickets_or_ids))

    def outcomes(self, after: str = "0-0", *, follow: bool = False) -> Iterator[tuple[str, Outcome]]:
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

    def _entries(self, position: str, follow: bool) -> Iterator[tuple[str, Outcome]]:
        if position == "$":
            position = self.converse(self._wire.newest())
        with self._news() as goes_on_after:
            while True:
                page = self.converse(self._wire.page(position))
                for position, outcome in readable_entries(page):
                    if outcome is not None:
                        yield position, outcome
                if not page and not (follow and at_once(goes_on_after(position))):
                    return

    @overload
    def wait(self, ticket_or_id: Ticket | str, timeout_s: float | timedelta | None = None) -> Outcome: ...
    @overload
    def wait(self, ticket_or_id: OpenTicket, timeout_s: float | timedelta | None = None) -> OpenOutcome: ...
    def wait(
        self, ticket_or_id: Ticket | OpenTicket | str, timeout_s: float | timedelta | None = None
    ) -> Outcome | OpenOutcome:
        """Block until a request has an outcome; see :meth:`Ticket.wait`. For a ticket of `cancel_open`, until all
        its orders have theirs; by its id alone, until they are listed."""
        return cast(Outcome | OpenOutcome, at_once(self._wait(ticket_or_id, timeout_s)))

    def wait_many(self, tickets_or_ids: Iterable[Ticket | str], timeout_s: float | timedelta | None = None) -> Waited:
        """Block until all have their outcome or the time is up; gives what ended and what stands, and raises nothing
        (but InvalidRequest).

        What stands is given with what `wait` would raise for it: WaitTimeout, UnknownRequest, MalformedMessage or
        QueueUnavailable.
        """
        return at_once(self._wait_many(tickets_or_ids, timeout_s))

    def retry(self, tickets_or_ids: Iterable[TicketFields | str], *, missing_ok: bool = False) -> list[str]:
        """Start a new run, with a new deadline, of requests that ended in a failed kind; returns their ids.

        ``missing_ok`` leaves out the ids that cannot be retried (any more) instead of raising.

        Raises:
            UnknownRequest: some are not among the failed ones; none was started.
            QueueUnavailable: Redis did not answer; those that it started meanwhile are no longer among the failed ones.
        """
        conversation = self._wire.retry(tickets_or_ids, checked_flag("missing_ok", missing_ok))
        return self.converse(conversation, repeat=False, doubt=RETRY_IN_DOUBT)

    def failed_ids(self) -> list[str]:
        """Ids of the requests that ended in a failed kind and can be retried, oldest first."""
        return self.converse(self._wire.failed_ids())

    def statuses(self, tickets_or_ids: Iterable[TicketFields | str]) -> list[str | None]:
        """RQ's status of each job, None where there is no such job; one round trip for each 1,000."""
        return self.converse(self._wire.statuses(tickets_or_ids))

    def status(self) -> Status:
        """How the queue stands, in three round trips; see :class:`producer.status.Status`."""
        return self.converse(self._wire.status())

    def job(self, ticket_or_id: TicketFields | str) -> Job:
        """RQ's job of a request, for those who look at the queue through RQ.

        What RQ asks of it later goes over the connection that the client was made of, which must not decode answers.
        """
        job_id = checked_id(ticket_or_id)
        fields = self.converse(self._wire.job_fields(job_id))
        if not fields:
            raise NoSuchJobError(f"No such job: {self.keys.job_prefix}{job_id}")
        job = Job(job_id, connection=self._redis, serializer=JSONSerializer)
        job.restore(fields)
        return job

    def converse(self, conversation: Conversation[T], *, repeat: bool = True, doubt: str = "") -> T:
        """See :meth:`producer.base.BaseClient.converse`."""
        return at_once(self._mine().carry(conversation, doubt, repeat))

    def _mine(self) -> Lines:
        """The connections of this process: a fork shares its parent's sockets, and must not use them."""
        if self._is_closed:
            raise closed(self)
        pid = os.getpid()
        if (lines := self._lines.get(pid)) is None:
            parents = list(self._lines.values())
            lines = self._lines.setdefault(pid, Lines(self._place, self._wire))  # another thread may come by
            for others in parents:
                others.leave_behind()
        return lines
