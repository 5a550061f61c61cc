"""The client for strategies that are not asyncio programs: enqueue cancels, learn what became of them.

Needs a Redis connection and nothing else: no exchange key, no HTTP. Errors: :class:`~producer.message.InvalidRequest`
before anything is sent, :class:`QueueUnavailable` when Redis does not answer in time, :class:`WaitTimeout` when an
outcome is not there yet.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self, overload

import redis
import redis.asyncio as aio
from rq.exceptions import NoSuchJobError
from rq.job import Job
from rq.serializers import JSONSerializer

from producer.door import checked_id, checked_position, checked_timeout, checked_wait
from producer.link import Lines
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
class Ticket(TicketFields):
    """A request that is on the queue. ``duplicate``: it shares the job of an unfinished request for the same order.

    It can be pickled; the copy has no client: give it to the `wait` of one.
    """

    _client: CancelClient | None = field(default=None, repr=False, compare=False)

    def wait(self, timeout_s: float | None = None) -> Outcome:
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


class CancelClient:
    """Puts cancel requests on a queue and reads their outcomes. One for a process is enough.

    Any number of threads may use it: it holds at most 4 connections, for which its callers queue, and none of them
    crosses a fork. A ``connection`` of yours says where Redis is, and by its ``socket_timeout`` (2 s if it has none)
    how long a call may take; the client makes connections of its own from it.
    """

    def __init__(self, connection: redis.Redis, queue: str = DEFAULT_QUEUE) -> None:
        self._place = Place.of(connection, redis.Redis, aio.Redis, "AsyncCancelClient")
        self._redis = connection
        self._wire = QueueWire(queue, self._place.timeout_s)
        self.keys = self._wire.keys
        self._lines: dict[int, Lines] = {}  # by process
        self._is_closed = False

    @classmethod
    def from_url(
        cls, url: str, queue: str = DEFAULT_QUEUE, *, timeout_s: float | timedelta | None = None, **options: Any
    ) -> Self:
        """A client for the Redis at ``url``; ``options`` go to redis-py's connections.

        ``timeout_s`` bounds each call (each thousand of `cancel_many`), waiting for a connection and a repeat included;
        left out, the URL's ``socket_timeout`` does, else 2 s.

        Raises:
            InvalidRequest: ``url``, ``timeout_s`` or ``queue`` cannot be used.
        """
        address = checked_url(url)
        call_s = checked_timeout(address.options.get("socket_timeout", TIMEOUT_S) if timeout_s is None else timeout_s)
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
        accepted = self.converse(self._wire.enqueue(requests, durable), doubt=IN_DOUBT)
        tickets = [Ticket(*carried, self) for carried in accepted.carried]
        if accepted.not_durable is not None:
            accepted.not_durable.tickets = tickets
            raise accepted.not_durable
        return tickets

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
        return self._list_open(
            OpenRequest(
                symbol=symbol, account=account, deadline_s=deadline_s, urgent=urgent, tag=tag, on_trigger=on_trigger
            )
        )

    def _list_open(self, request: OpenRequest) -> OpenTicket:
        accepted = self.converse(self._wire.enqueue([request], durable=False), doubt=OPEN_IN_DOUBT)
        return OpenTicket(*accepted.carried[0], _client=self, asked_ms=accepted.asked_ms)

    def outcome(self, ticket_or_id: TicketFields | str) -> Outcome | None:
        """The outcome of a request, or None while there is none (or no longer: it is kept for OUTCOME_TTL_S).

        Raises:
            MalformedMessage: its record is not an outcome of this version, or not about this order.
            QueueUnavailable: Redis did not answer.
        """
        ((job_id, request),) = one_wanted(ticket_or_id).items()
        ends = self.converse(self._wire.look([job_id], for_the_gone=False))
        return outcome_or_raise(proven(ends[job_id], request)) if job_id in ends else None

    def outcomes_of(self, tickets_or_ids: Iterable[TicketFields | str]) -> dict[str, Outcome]:
        """Those outcomes that are there, by id; one round trip for each 1,000, two where some failed.

        A record that is no outcome of this version, or not about the ticket, is left out and logged with its id.
        """
        wanted = wanted_of(tickets_or_ids)
        ends = self.converse(self._wire.look(wanted, for_the_gone=False))
        return readable({job_id: proven(end, wanted[job_id]) for job_id, end in ends.items()})

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
                if not page and not (follow and goes_on_after(position)):
                    return

    @contextlib.contextmanager
    def _news(self) -> Iterator[Callable[[str], bool]]:
        """A function that waits for news of the ledger, and says whether it goes on after an entry or may do so."""
        lines, news = self._mine(), threading.Event()

        def goes_on_after(_: str) -> bool:
            lines.listener()
            news.wait(LOOK_S)
            news.clear()
            return True

        with lines.waiters.waiting((), news.set):
            yield goes_on_after

    @overload
    def wait(self, ticket_or_id: Ticket | str, timeout_s: float | timedelta | None = None) -> Outcome: ...
    @overload
    def wait(self, ticket_or_id: OpenTicket, timeout_s: float | timedelta | None = None) -> OpenOutcome: ...
    def wait(
        self, ticket_or_id: Ticket | OpenTicket | str, timeout_s: float | timedelta | None = None
    ) -> Outcome | OpenOutcome:
        """Block until a request has an outcome; see :meth:`Ticket.wait`. For a ticket of `cancel_open`, until all
        its orders have theirs; by its id alone, until they are listed."""
        if isinstance(ticket_or_id, OpenTicketFields):
            return self._wait_for_open(ticket_or_id, checked_wait(timeout_s))
        return outcome_or_raise(*self._ends(one_wanted(ticket_or_id), timeout_s).values())

    def wait_many(self, tickets_or_ids: Iterable[Ticket | str], timeout_s: float | timedelta | None = None) -> Waited:
        """Block until all have their outcome or the time is up; gives what ended and what stands, and raises nothing
        (but InvalidRequest).

        What stands is given with what `wait` would raise for it: WaitTimeout, UnknownRequest, MalformedMessage or
        QueueUnavailable.
        """
        return split(self._ends(many_wanted(tickets_or_ids), timeout_s))

    def _wait_for_open(self, ticket: OpenTicketFields, timeout_s: float | None) -> OpenOutcome:
        began_at = time.monotonic()
        conversation = pursue(ticket, self.keys.queue)
        try:
            step = next(conversation)
            while True:
                if isinstance(step, OpenRequest):
                    step = conversation.send(self._list_open(step))
                else:
                    left_s = None if timeout_s is None else max(began_at + timeout_s - time.monotonic(), 0.0)
                    step = conversation.send(self._ends(dict(step), left_s))
        except StopIteration as end:
            outcome: OpenOutcome = end.value
            return outcome

    def _ends(self, wanted: dict[str, CancelRequest | None], timeout: object) -> dict[str, End]:
        timeout_s = checked_wait(timeout)
        began_at = time.monotonic()
        ends: dict[str, End] = {}
        try:
            ends = self.converse(self._wire.look(wanted))
            if ends.keys() != wanted.keys() and timeout_s != 0:
                ends |= self._listen_for([job_id for job_id in wanted if job_id not in ends], timeout_s, began_at)
            if ends.keys() != wanted.keys():
                ends |= self._timed_out([job_id for job_id in wanted if job_id not in ends], timeout_s)
        except QueueUnavailable as error:
            ends = dict.fromkeys(wanted, error) | ends
        return {job_id: proven(ends[job_id], request) for job_id, request in wanted.items()}

    def _timed_out(self, job_ids: list[str], timeout_s: float | None) -> dict[str, End]:
        served: bool | None = None
        with contextlib.suppress(QueueUnavailable):
            served = self.converse(self._wire.served())
        return {job_id: timed_out(job_id, timeout_s, self.keys.queue, served) for job_id in job_ids}

    def _listen_for(self, job_ids: list[str], timeout_s: float | None, began_at: float) -> dict[str, End]:
        ends_at = None if timeout_s is None else began_at + timeout_s
        lines, came = self._mine(), threading.Event()
        with lines.waiters.waiting(job_ids, came.set) as waiter:
            look_s = math.inf if lines.listener() else LOOK_S
            while True:
                # What came before the listener was there, it does not hear of.
                asked = lines.waiters.came
                lines.waiters.tell(self.converse(self._wire.look(job_ids)), asked)
                left_s = math.inf if ends_at is None else max(0.0, ends_at - time.monotonic())
                pause_s = min(left_s, look_s)
                if came.wait(None if pause_s == math.inf else pause_s) or pause_s == left_s:
                    return dict(waiter.ends)

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
        """Carry a conversation with Redis to its end; ``repeat``: its commands may be sent again if an answer is lost.

        ``doubt`` is what the error says of a call that may have been carried out.

        Raises:
            InvalidRequest: the client is closed.
            QueueUnavailable: Redis did not answer, or refused.
        """
        return self._mine().converse(conversation, doubt, repeat=repeat)

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
