"""Doubles of the two clients for strategies' own unit tests: no Redis, no worker, no waiting.

::

    fake = FakeCancelClient()
    fake.will(algo_id=7, kind=OutcomeKind.TRIGGERED, actual_order_id="8886774")
    strategy = Strategy(fake)  # takes a CancelClient
    strategy.flatten()
    assert [request.algo_id for request in fake.requests] == [7]

They are the clients with another wire. A request gets its outcome within the call that enqueues it, unless
:meth:`FakeCancelClient.will` says when or :meth:`FakeCancelClient.hold` says never.

Time is the double's own: it stands still but for `advance` and for waiting, which moves it and returns at once. Without
a time-out a `wait` really waits, until another thread or task calls `settle`. Deadlines do not pass by themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Self, TypeVar, Unpack, cast

import redis

from producer.aio import AsyncCancelClient
from producer.base import BaseClient
from producer.client import CancelClient
from producer.door import checked_id, checked_ids, checked_requests
from producer.job_fields import fields_of_job
from producer.message import (
    DEFAULT_ACCOUNT,
    DEFAULT_QUEUE,
    CancelRequest,
    ListedOrder,
    OpenRequest,
    Outcome,
    OutcomeKind,
    decode_outcome,
    encode_call,
)
from producer.protocol import (
    Accepted,
    Conversation,
    NotDurable,
    QueueUnavailable,
    TicketFields,
    UnknownRequest,
    entry_parts,
    rows,
)
from producer.redis_url import Address, given
from producer.scripted import CALL_MS, FIRST_ALGO_ID, HELD, MAX_STEP_S, FakeJob, Line, Said, became, listed
from producer.status import WINDOW_S, Gate, Percentiles, Status
from producer.untrusted import InvalidRequest, checked_flag, checked_seconds
from producer.waiting import End, QueueWire, closed

T = TypeVar("T")

__all__ = ["AsyncFakeCancelClient", "FakeCancelClient"]

_FIRST_ORDER_ID = 8_800_000_000


def _checked_count(name: str, value: object) -> float:
    if value is None:
        return math.inf
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidRequest(name, value, "must be a whole number, 1 or more, or left out")
    return value


# --- the queue, its worker and its exchange ---------------------------------------------------------------------------


class _Play(QueueWire):
    """The state that the double's methods work on: it answers what a client would ask Redis.

    Thread-safe; its clock is moved, it does not run.
    """

    def __init__(self, queue: str) -> None:
        super().__init__(queue)
        self.now_ms = time.time_ns() // 1_000_000
        self.requests: list[CancelRequest] = []
        self.undurable = False
        self.is_closed = False
        self.lock = threading.RLock()
        self._jobs: dict[str, FakeJob] = {}
        self._open: dict[str, str] = {}  # order key to the job that pursues it
        self._failed: dict[str, None] = {}
        self._ledger: list[tuple[tuple[int, int], Outcome]] = []
        self._due: list[tuple[int, int, str, int]] = []  # when, in which order, job and its run
        #: By order, account, or empty for all: what becomes of it, and for how many runs; the last one holds.
        self._lines: dict[str, list[tuple[Line, float]]] = {}
        #: What is open on an account's symbol, for the next listing of it.
        self.opened: dict[tuple[str, str], list[int]] = {}
        self.outage_calls = 0.0  # how many calls the outage still lasts
        self.is_carried_out = False
        self._algo_ids: dict[str, int] = {}
        self._wakes: list[Callable[[], object]] = []  # of those who wait for the next outcome, from whatever thread
        self._counted = 0

    # what is asked: each conversation checks what it is given, asks nobody, and answers

    def carry(self, client: object, conversation: Conversation[T], doubt: str) -> T:
        """Answer a conversation of a client.

        Raises:
            InvalidRequest: it is closed.
            QueueUnavailable: during an outage.
        """
        if self.is_closed:
            raise closed(client)
        with self.lock:
            next(conversation)
            is_lost, self.outage_calls = self.outage_calls > 0, max(0, self.outage_calls - 1)
            if not is_lost or self.is_carried_out:
                try:
                    conversation.send([])
                except StopIteration as end:
                    if not is_lost:
                        return cast(T, end.value)
            raise QueueUnavailable(f"Redis did not answer (ConnectionError) [a double]{doubt}")

    def enqueue(self, requests: Iterable[CancelRequest], durable: bool) -> Conversation[Accepted]:
        checked_flag("durable", durable)
        new = [row for chunk in rows(checked_requests(requests)) for batch in chunk for row in batch]
        yield ()
        carried: dict[int, tuple[str, CancelRequest, bool]] = {}
        self.requests += [row.request for row in sorted(new, key=lambda row: row.position)]
        asked_id, carrying_id, at_once = "", "", self.now_ms
        for row in new:
            job_id = carrying_id if row.id == asked_id else self._open.get(row.request.order_key, "")
            carried[row.position] = (job_id or row.id, row.request, bool(job_id))
            if not job_id:
                self._jobs[row.id] = job = FakeJob(row.id, row.request, self.now_ms)
                at_once = max(at_once, self._begin(job))
            asked_id, carrying_id = row.id, job_id or row.id
        self.move_to(at_once)
        is_undurable = durable and self.undurable and bool(new)
        undurable = NotDurable("enqueued, but this server cannot confirm it as durable") if is_undurable else None
        return Accepted([carried[position] for position in range(len(carried))], undurable)

    def look(self, job_ids: Iterable[str], *, for_the_gone: bool = True) -> Conversation[dict[str, End]]:
        yield ()
        gone = {job_id for job_id in job_ids if job_id not in self._jobs} if for_the_gone else set()
        unknown = {job_id: UnknownRequest([job_id], self.keys.queue, "requests (any more)") for job_id in gone}
        return unknown | self._ended(job_ids)

    def _ended(self, job_ids: Iterable[str]) -> dict[str, End]:
        found = [(job_id, self._jobs.get(job_id)) for job_id in job_ids]
        return {job_id: job.outcome for job_id, job in found if job is not None and job.outcome is not None}

    def heard(self, job_ids: list[str], timeout_s: float | None) -> dict[str, End] | None:
        """The outcomes of open requests, once the clock has been moved to them; None: somebody has to settle first."""
        with self.lock:
            due_ms = [self._jobs[job_id].due_ms for job_id in job_ids if self._jobs[job_id].outcome is None]
            last_ms = max((each for each in due_ms if each is not None), default=self.now_ms)
            if timeout_s is not None and due_ms:
                ends_ms = self.now_ms + round(min(timeout_s, MAX_STEP_S) * 1000)
                last_ms = ends_ms if None in due_ms else min(ends_ms, last_ms)
            self.move_to(last_ms)
            must_wait = timeout_s is None and None in due_ms and not self.is_closed
            return None if must_wait else self._ended(job_ids)

    def served(self) -> Conversation[bool | None]:
        yield ()
        return None

    def page(self, after: str, *, gaps: bool = True) -> Conversation[list[tuple[str, Any]]]:  # noqa: ARG002
        yield ()
        return self._after(after)

    def _after(self, after: str) -> list[tuple[str, Any]]:
        place = entry_parts(after)
        newer = [("{}-{}".format(*at), outcome) for at, outcome in self._ledger if at > place]
        return [(at, {b"outcome": outcome.encode().encode()}) for at, outcome in newer]

    def newest(self) -> Conversation[str]:
        yield ()
        return "{}-{}".format(*self._ledger[-1][0]) if self._ledger else "0-0"

    def goes_on_after(self, after: str) -> bool | None:
        """Whether the ledger does, once the clock has been moved to what is due; None: somebody has to settle first."""
        with self.lock:
            while self._due and not self._after(after):
                self.move_to(self._due[0][0])
            return True if self.is_closed or self._after(after) else None

    def retry(self, job_ids: Iterable[object], missing_ok: bool) -> Conversation[list[str]]:
        asked = list(dict.fromkeys(checked_ids(job_ids)))
        yield ()
        known = [job_id for job_id in asked if job_id in self._failed]
        if not missing_ok and len(known) < len(asked):
            raise UnknownRequest([name for name in asked if name not in self._failed], self.keys.queue)
        at_once = self.now_ms
        for job_id in known:
            job = self._jobs[job_id]
            del self._failed[job_id]
            job.run, job.outcome, job.enqueued_at_ms = job.run + 1, None, self.now_ms
            at_once = max(at_once, self._begin(job))
        self.move_to(at_once)
        return known

    def failed_ids(self) -> Conversation[list[str]]:
        yield ()
        return list(self._failed)

    def statuses(self, job_ids: Iterable[object]) -> Conversation[list[str | None]]:
        found = [self._jobs.get(job_id) for job_id in checked_ids(job_ids)]
        yield ()
        return [None if job is None else job.rq_status.value for job in found]

    def status(self) -> Conversation[Status]:
        yield ()
        waiting = [job.enqueued_at_ms for job in self._jobs.values() if job.outcome is None]
        last = [outcome for at, outcome in self._ledger if at[0] > self.now_ms - 1000 * WINDOW_S]
        return Status(
            queue=self.keys.queue,
            at_ms=self.now_ms,
            queued=len(waiting),
            oldest_queued_s=(self.now_ms - min(waiting)) / 1000 if waiting else None,
            failed=len(self._failed),
            gates=(Gate("all", open=True),),
            outcomes=dict(Counter(outcome.kind.value for outcome in last)),
            enqueue_to_outcome=Percentiles.of(outcome.took_ms for outcome in last),
            enqueue_to_first_attempt=Percentiles.of(outcome.first_attempt_ms for outcome in last),
        )

    def job_fields(self, job_id: str) -> Conversation[dict[bytes, bytes]]:
        yield ()
        job = self._jobs.get(job_id)
        if job is None:
            return {}
        fields = {name.encode(): str(value).encode() for name, value in fields_of_job(self.keys.queue).items()}
        told = {b"status": job.rq_status.value.encode(), b"description": job.request.describe().encode()}
        return fields | told | {b"data": encode_call(job.request), b"created_at": b"2025-01-01T00:00:00.000000Z"}

    # what is scripted

    def script(self, key: str, line: Line, runs: float) -> None:
        with self.lock:
            before = self._lines.get(key, []) if runs < math.inf else []  # else nothing before it will ever hold again
            self._lines[key] = [*before, (line, runs)]

    def settle(self, job_id: str, line: Line) -> Outcome:
        with self.lock:
            job = self._jobs.get(job_id)
            if job is None:
                raise ValueError(f"{job_id!r} is no request of this double")
            if job.outcome is not None:
                raise ValueError(f"{job_id} has its outcome already: {job.outcome.kind}")
            job.line = line
            self.now_ms += CALL_MS * len(line.answers)
            return self._record(job, self.now_ms)

    def move_to(self, now_ms: int) -> None:
        """Let the time come, and record what is due by then."""
        with self.lock:
            while self._due and self._due[0][0] <= now_ms:
                due_ms, _, job_id, run = heapq.heappop(self._due)
                self.now_ms = max(self.now_ms, due_ms)
                job = self._jobs[job_id]
                if job.run == run and job.outcome is None:
                    self._record(job, due_ms)
            self.now_ms = max(self.now_ms, now_ms)

    # waiting for somebody who settles

    async def until(self, look: Callable[[], T | None], wake: Callable[[], object], wait: Callable[[], Any]) -> T:
        """What a look gives as soon as it gives something: after an outcome (or the end) ``wake`` ends a ``wait``."""
        while True:
            with self.lock:
                if (found := look()) is not None:
                    return found
                self._wakes.append(wake)
            await given(wait())

    def _tell(self) -> None:
        with self.lock:
            wakes, self._wakes = self._wakes, []
        for wake in wakes:
            with contextlib.suppress(RuntimeError):  # of a loop that has been closed
                wake()

    def close(self) -> None:
        with self.lock:
            self.is_closed = True
        self._tell()

    # how it comes about

    def _begin(self, job: FakeJob) -> int:
        """Start a run as its script says; gives when it ends if that is at once, else now."""
        if job.request.joins:
            self._open.setdefault(job.request.order_key, job.id)
        job.line, job.due_ms = self._line_for(job.request), None
        if job.line is HELD:
            return self.now_ms
        least_ms = CALL_MS * len(job.line.answers)
        job.due_ms = self.now_ms + max(round(job.line.after_s * 1000), least_ms)
        self._counted += 1
        heapq.heappush(self._due, (job.due_ms, self._counted, job.id, job.run))
        return self.now_ms if job.line.after_s else job.due_ms

    def _line_for(self, request: CancelRequest) -> Line:
        if isinstance(request, OpenRequest):
            return Line()
        keys = [request.order_key, request.account, ""]
        if request.client_algo_id is not None:
            keys.insert(1, CancelRequest(client_algo_id=request.client_algo_id, account=request.account).order_key)
        for key in keys:
            if lines := self._lines.get(key):
                line, runs = lines.pop()
                lines += [(line, runs - 1)] if runs > 1 else []
                return line
        return Line()

    def _listed(self, job: FakeJob, at_ms: int) -> Outcome:
        """The end of a listing: each order that is open gets a request, or joins the one that it has."""
        asked = job.request
        names = ("account", "symbol", "tag")
        known: dict[str, Any] = {name: getattr(asked, name) for name in names}
        orders: list[ListedOrder] = []
        for algo_id in self.opened.pop((asked.account, asked.symbol or ""), []):
            request = CancelRequest(algo_id, urgent=asked.urgent, on_trigger=asked.on_trigger, **known)
            job_id = self._open.get(request.order_key) or os.urandom(16).hex()
            orders.append(ListedOrder(algo_id, job_id))
            self.requests.append(request)
            if job_id not in self._jobs:
                self._jobs[job_id] = made = FakeJob(job_id, request, at_ms)
                self._begin(made)
        return listed(job, at_ms, orders)

    def _record(self, job: FakeJob, at_ms: int) -> Outcome:
        if isinstance(job.request, OpenRequest):
            outcome = self._listed(job, at_ms)
        else:
            outcome = became(job, at_ms, self._algo_id(job.request), _FIRST_ORDER_ID + len(self._ledger))
        job.outcome = decode_outcome(outcome.encode())  # what no client could read is not given here either
        self._file(job, job.outcome)
        return job.outcome

    def _file(self, job: FakeJob, outcome: Outcome) -> None:
        if self._open.get(job.request.order_key) == job.id:
            del self._open[job.request.order_key]
        if outcome.kind.failed:
            self._failed[job.id] = None
        last_ms, sequence = self._ledger[-1][0] if self._ledger else (0, 0)
        at_ms = max(self.now_ms, last_ms)
        self._ledger.append(((at_ms, sequence + 1 if at_ms == last_ms else 0), outcome))
        self._tell()

    def _algo_id(self, request: CancelRequest) -> int:
        if request.algo_id is not None:
            return request.algo_id
        return self._algo_ids.setdefault(request.order_key, FIRST_ALGO_ID + len(self._algo_ids))


# --- what both doubles have -------------------------------------------------------------------------------------------


class _Scripted(BaseClient):
    """The script of a double, and what was asked of it."""

    def __init__(self, queue: str = DEFAULT_QUEUE) -> None:
        self._play = _Play(queue)
        self._wire: QueueWire = self._play
        self.keys = self._play.keys
        self._redis: Any = redis.Redis(unix_socket_path="/a double has no Redis")

    @classmethod
    def _at(cls, address: Address, call_s: float, options: dict[str, Any], queue: str) -> Self:  # noqa: ARG003
        return cls(queue)  # what leads nowhere is checked all the same

    def _alarm(self) -> tuple[Callable[[], object], Callable[[], Any]]:
        """What wakes a caller from any thread, and how one waits for it; it may be used again."""
        raise NotImplementedError

    @contextlib.contextmanager
    def _news(self) -> Iterator[Callable[[str], Any]]:
        yield lambda position: self._play.until(partial(self._play.goes_on_after, position), *self._alarm())

    async def _listen_for(self, job_ids: list[str], timeout_s: float | None, began_at: float) -> dict[str, End]:  # noqa: ARG002
        return await self._play.until(partial(self._play.heard, job_ids, timeout_s), *self._alarm())

    @property
    def requests(self) -> list[CancelRequest]:
        """Every request that was asked for, in order, those that joined another's job too."""
        return list(self._play.requests)

    def will(
        self,
        *,
        kind: OutcomeKind,
        algo_id: int | None = None,
        client_algo_id: str | None = None,
        account: str | None = None,
        after_s: float = 0.0,
        runs: int | None = None,
        **said: Unpack[Said],
    ) -> None:
        """Say what becomes of a request for this order; without an id, of any for ``account`` or of any at all.

        What is said last holds, for ever or for so many ``runs`` (requests and retries), after which that holds again
        what was said before; an order's own script goes before its account's. Where nothing is said an order is
        ``cancelled``. ``said`` are fields of the outcome (:class:`producer.scripted.Said`): ``order_status`` FINISHED
        goes with ``triggered``, TRIGGERING with ``gave_up``, what is said of a child with ``triggered``. The outcome
        comes after ``after_s`` seconds of the double's time, a century at the most.

        Raises:
            InvalidRequest: no request can name that order, no worker would record that, or ``after_s`` or ``runs`` is
                no such number.
        """
        count = _checked_count("runs", runs)
        line = Line(kind=kind, after_s=after_s, **said)
        self._play.script(_key(algo_id, client_algo_id, account), line, count)

    def hold(
        self, *, algo_id: int | None = None, client_algo_id: str | None = None, account: str | None = None
    ) -> None:
        """As :meth:`will`, but nothing becomes of such a request until :meth:`settle`: as if no worker were there.

        Raises:
            InvalidRequest: no request can name that order.
        """
        self._play.script(_key(algo_id, client_algo_id, account), HELD, math.inf)

    def opened(self, symbol: str, *algo_ids: int, account: str = DEFAULT_ACCOUNT) -> None:
        """Say which orders are open on ``symbol``: the next `cancel_open` of it lists them, once. What becomes of each
        is said by :meth:`will`.

        Raises:
            InvalidRequest: no request can name that symbol, account or order.
        """
        OpenRequest(symbol=symbol, account=account)
        for algo_id in algo_ids:
            CancelRequest(algo_id)
        self._play.opened.setdefault((account, symbol), []).extend(algo_ids)

    def settle(
        self, ticket_or_id: TicketFields | str, kind: OutcomeKind = OutcomeKind.CANCELLED, **said: Unpack[Said]
    ) -> Outcome:
        """Record the outcome of a request now, and wake those who wait for it.

        Raises:
            InvalidRequest: no worker would record that.
            ValueError: the request is unknown or has its outcome.
        """
        job_id = checked_id(ticket_or_id)
        return self._play.settle(job_id, Line(kind=kind, **said))

    def advance(self, seconds: float) -> None:
        """Let time pass: what is due by then gets its outcome.

        Raises:
            InvalidRequest: it would have to run backwards, or further than a century.
        """
        step_s = checked_seconds("seconds", seconds, MAX_STEP_S, or_zero=True)
        self._play.move_to(self._play.now_ms + round(step_s * 1000))

    def unavailable(self, calls: int | None = None, *, carried_out: bool = False) -> None:
        """Have the next ``calls`` calls, or all until :meth:`available`, raise QueueUnavailable.

        ``carried_out``: Redis does what it is asked and its answer is lost, so that a repeat by algo id finds it done.

        Raises:
            InvalidRequest: ``calls`` is no number of calls.
        """
        self._play.outage_calls, self._play.is_carried_out = _checked_count("calls", calls), carried_out

    def available(self) -> None:
        """End what :meth:`unavailable` began."""
        self._play.outage_calls = 0

    def not_durable(self) -> None:
        """Have every call with ``durable=True`` raise NotDurable from now on, its requests enqueued all the same."""
        self._play.undurable = True


def _key(algo_id: int | None, client_algo_id: str | None, account: str | None) -> str:
    """What a script is kept under; raises InvalidRequest for an order that no request can name."""
    nobody = algo_id is None and client_algo_id is None
    checked = CancelRequest(
        FIRST_ALGO_ID if nobody else algo_id, client_algo_id, DEFAULT_ACCOUNT if account is None else account
    )
    return (account or "") if nobody else checked.order_key


# --- the doubles ------------------------------------------------------------------------------------------------------


class FakeCancelClient(_Scripted, CancelClient):
    """A :class:`CancelClient` without Redis; see the module's text. Thread-safe."""

    def close(self) -> None:
        """Those who wait, or follow the ledger, are told that it is closed."""
        self._play.close()

    def converse(self, conversation: Conversation[T], *, repeat: bool = True, doubt: str = "") -> T:  # noqa: ARG002
        """As :meth:`CancelClient.converse`, without asking anybody."""
        return self._play.carry(self, conversation, doubt)

    def _alarm(self) -> tuple[Callable[[], object], Callable[[], Any]]:
        bell = threading.Semaphore(0)
        return bell.release, bell.acquire


class AsyncFakeCancelClient(_Scripted, AsyncCancelClient):
    """An :class:`AsyncCancelClient` without Redis; see the module's text. Each call gives way to the loop once."""

    async def close(self) -> None:
        """Those who wait, or follow the ledger, are told that it is closed."""
        self._play.close()
        await asyncio.sleep(0)

    async def converse(self, conversation: Conversation[T], *, repeat: bool = True, doubt: str = "") -> T:  # noqa: ARG002
        """As :meth:`AsyncCancelClient.converse`, without asking anybody."""
        try:
            return self._play.carry(self, conversation, doubt)
        finally:
            await asyncio.sleep(0)

    def _alarm(self) -> tuple[Callable[[], object], Callable[[], Any]]:
        bell = asyncio.Semaphore(0)
        return partial(asyncio.get_running_loop().call_soon_threadsafe, bell.release), bell.acquire
