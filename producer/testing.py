"""Doubles of the two clients for strategies' own unit tests: no Redis, no worker, no waiting.

::

    fake = FakeCancelClient()
    fake.will(algo_id=7, kind=OutcomeKind.TRIGGERED, actual_order_id="8886774")
    strategy = Strategy(fake)  # takes a CancelClient
    strategy.flatten()
    assert [request.algo_id for request in fake.requests] == [7]

They take, refuse and give what the clients do, and a request gets its outcome within the call that enqueues it, unless
:meth:`FakeCancelClient.will` says when or :meth:`FakeCancelClient.hold` says never. Two requests for one order
therefore share a job only while the first is held or its outcome is still to come, or inside one `cancel_many`; by
client id alone only inside one.

Time is the double's own: it stands still but for `advance` and for waiting, which moves it and returns at once. A
`wait` that is given a time ends at once with the outcome that is due by then, or with WaitTimeout; without one it
really waits, as it does for the real client, until another thread or task calls `settle`. Deadlines do not pass by
themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import math
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self

import redis
from redis.connection import parse_url
from rq.defaults import RQ_KEY_PREFIX
from rq.exceptions import NoSuchJobError
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from producer.aio import AsyncCancelClient, AsyncTicket
from producer.client import CancelClient, Ticket
from producer.keys import Keys
from producer.message import (
    DEFAULT_ACCOUNT,
    DEFAULT_QUEUE,
    MAX_MSG_CHARS,
    TASK,
    Attempt,
    Call,
    CancelRequest,
    InvalidRequest,
    Outcome,
    OutcomeKind,
    check_queue_name,
    clean_text,
    decode_outcome,
    encode_request,
    may_be_live,
)
from producer.protocol import (
    NotDurable,
    QueueUnavailable,
    TicketFields,
    UnknownRequest,
    WaitTimeout,
    check_position,
    rows,
)
from producer.status import Gate, Percentiles, Status

__all__ = ["AsyncFakeCancelClient", "FakeCancelClient"]

#: How long a signed call takes at the exchange that is played here, ms.
_CALL_MS = 5
#: Where ids that the exchange would have given begin.
_FIRST_ALGO_ID = 2_000_000_000_000_000
_FIRST_ORDER_ID = 8_800_000_000
_WINDOW_MS = 60_000
_WORKER = "fake"
#: Longest step of the double's time, s (a century): a record's times must fit in 64 bits.
_MAX_STEP_S = 100 * 365 * 86_400
#: Longest id of a child order that a worker records, characters (`worker.classify`).
_MAX_ORDER_ID_CHARS = 40
#: Longest error, characters: a worker adds a few words to what the exchange said.
_MAX_ERROR_CHARS = 2 * MAX_MSG_CHARS


# --- what an outcome looks like ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Answer:
    """What one signed call came to."""

    call: Call
    http: int | None
    code: int | None
    msg: str
    verdict: str


_UNKNOWN_ORDER = _Answer(Call.CANCEL, 400, -2011, "Unknown order sent.", "no_such_order")
_NO_SUCH_ORDER = _Answer(Call.QUERY, 400, -2013, "Order does not exist.", "no_such_order")
_CONFIRMED = _Answer(Call.CANCEL, 200, 200, "success", "confirmed")
_KEY_REFUSED = _Answer(Call.CANCEL, 401, -2015, "Invalid API-key, IP, or permissions for action.", "key_refused")
_UNCLEAR = _Answer(Call.CANCEL, None, None, "read: TimeoutError", "unclear")


def _seen(status: str) -> _Answer:
    return _Answer(Call.QUERY, 200, None, status, _VERDICT_OF.get(status, "odd_status"))


_VERDICT_OF = {
    "NEW": "open",
    "CANCELED": "canceled",
    "TRIGGERING": "triggering",
    "TRIGGERED": "triggered",
    "FINISHED": "finished",
    "EXPIRED": "expired",
    "REJECTED": "rejected",
}


@dataclass(frozen=True, slots=True)
class _Story:
    """How a kind of outcome comes about: the states that the order can be in, the usual one first, and the calls."""

    statuses: tuple[str | None, ...]
    before: tuple[_Answer, ...]  # a query that shows the state follows, if there is one and no cancel was confirmed
    error: str | None = None

    def answers(self, status: str | None) -> tuple[_Answer, ...]:
        shown = status is not None and _CONFIRMED not in self.before
        return (*self.before, _seen(status)) if shown and status else self.before


_STORIES = {
    OutcomeKind.CANCELLED: _Story(("CANCELED",), (_CONFIRMED,)),
    OutcomeKind.ALREADY_CANCELLED: _Story(("CANCELED",), (_UNKNOWN_ORDER,)),
    OutcomeKind.TRIGGERED: _Story(("TRIGGERED", "FINISHED"), (_UNKNOWN_ORDER,)),
    OutcomeKind.EXPIRED: _Story(("EXPIRED",), (_UNKNOWN_ORDER,)),
    OutcomeKind.REJECTED: _Story(("REJECTED",), (_UNKNOWN_ORDER,)),
    OutcomeKind.NOT_FOUND: _Story(
        (None,), (_UNKNOWN_ORDER, _NO_SUCH_ORDER), "unknown to the exchange: 400 -2013 Order does not exist."
    ),
    OutcomeKind.REFUSED: _Story(
        (None,), (_KEY_REFUSED,), "refused: 401 -2015 Invalid API-key, IP, or permissions for action."
    ),
    OutcomeKind.OVERDUE: _Story((None,), (), "the deadline passed before anything was sent"),
    OutcomeKind.GAVE_UP: _Story(("NEW", "TRIGGERING"), (_UNKNOWN_ORDER,), "the deadline passed; last: {verdict} {msg}"),
    OutcomeKind.UNKNOWN: _Story((None,), (_UNCLEAR,), "the deadline passed; last: {verdict} {msg}"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """What becomes of one run of a request. ``kind`` None: nothing, until it is settled by hand."""

    kind: OutcomeKind | None = OutcomeKind.CANCELLED
    order_status: str | None = None
    actual_order_id: str | None = None
    symbol: str | None = None
    error: str | None = None
    after_s: float = 0.0

    def __post_init__(self) -> None:
        """Raises InvalidRequest for what no worker would record."""
        if self.kind is None:
            return
        statuses = _STORIES[self.kind].statuses
        if self.order_status is not None and self.order_status not in statuses:
            named = " or ".join(status for status in statuses if status) or "left out"
            raise InvalidRequest("order_status", self.order_status, f"with {self.kind} it is {named}")
        if self.actual_order_id is not None:
            if self.kind is not OutcomeKind.TRIGGERED:
                raise InvalidRequest("actual_order_id", self.actual_order_id, "only a triggered order has one")
            _check_order_id(self.actual_order_id)
        if self.symbol is not None:
            CancelRequest(_FIRST_ALGO_ID, symbol=self.symbol)  # one rule for both
        if self.error is not None:
            if not self.kind.failed:
                raise InvalidRequest("error", self.error, f"{self.kind} is no failure")
            _check_clean("error", self.error, _MAX_ERROR_CHARS)
        _check_step("after_s", self.after_s)


def _kind(value: object) -> OutcomeKind:
    try:
        return OutcomeKind(value)  # type: ignore[arg-type]
    except ValueError:
        raise InvalidRequest("kind", value, f"must be one of {', '.join(OutcomeKind)}") from None


def _check_order_id(value: object) -> None:
    _check_clean("actual_order_id", value, _MAX_ORDER_ID_CHARS)
    if value == "0":
        raise InvalidRequest("actual_order_id", value, "the exchange means by it that there is none")


def _check_clean(name: str, value: object, limit: int) -> None:
    """Workers record a stranger's words as `clean_text` leaves them, and never empty ones."""
    if not isinstance(value, str) or not value or clean_text(value, limit) != value:
        rule = f"must be text of 1 to {limit} characters without control characters or blanks around it"
        raise InvalidRequest(name, value, rule)


def _check_step(name: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= _MAX_STEP_S:  # type: ignore[operator]
        raise InvalidRequest(name, value, f"must be a number of seconds from 0 to {_MAX_STEP_S}")


def _check_count(name: str, value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InvalidRequest(name, value, "must be a whole number, 1 or more, or left out")


class _Lines:
    """The lines for one order (or account, or all), the one that holds last; beside each for how many runs it does."""

    def __init__(self) -> None:
        self._lines: list[tuple[_Line, float]] = []

    def add(self, line: _Line, runs: float) -> None:
        if runs == math.inf:
            self._lines.clear()  # nothing before it will ever hold again
        self._lines.append((line, runs))

    def next(self) -> _Line | None:
        if not self._lines:
            return None
        line, runs = self._lines.pop()
        if runs > 1:
            self._lines.append((line, runs - 1))
        return line


# --- the queue, its worker and its exchange ---------------------------------------------------------------------------


@dataclass(slots=True)
class _FakeJob:
    """A job of the double: open while it has no outcome."""

    id: str
    request: CancelRequest
    enqueued_at_ms: int
    run: int = 1
    line: _Line = field(default_factory=_Line)
    due_ms: int | None = None  # None: held
    outcome: Outcome | None = None


@dataclass(slots=True)
class _Outage:
    calls: float  # how many calls it still lasts
    carried_out: bool


class _Play:
    """The state that the double's methods work on. Thread-safe; its clock is moved, it does not run."""

    def __init__(self, queue: str) -> None:
        self.keys = Keys(check_queue_name(queue), RQ_KEY_PREFIX)
        self.now_ms = time.time_ns() // 1_000_000
        self.requests: list[CancelRequest] = []
        self.undurable = False
        self.news = threading.Condition(threading.RLock())
        self._jobs: dict[str, _FakeJob] = {}
        self._open: dict[str, str] = {}  # order key to the job that pursues it
        self._failed: dict[str, None] = {}
        self._ledger: list[tuple[tuple[int, int], Outcome]] = []
        self._due: list[tuple[int, int, str, int]] = []  # when, in which order, job and its run
        self._lines: dict[str, _Lines] = {}
        self._outage: _Outage | None = None
        self._algo_ids: dict[str, int] = {}
        self._listeners: list[asyncio.Future[None]] = []
        self._counted = 0
        self.closings = 0

    # what is asked

    def enqueue(self, requests: Iterable[CancelRequest]) -> list[tuple[str, CancelRequest, bool]]:
        with self.news:
            carried: dict[int, tuple[str, CancelRequest, bool]] = {}
            new = [row for chunk in rows(requests) for batch in chunk for row in batch]
            lost_reply = self._outage_now()
            self.requests += [row.request for row in sorted(new, key=lambda row: row.position)]
            asked_id, carrying_id, at_once = "", "", self.now_ms
            for row in new:
                job_id = carrying_id if row.id == asked_id else self._open.get(row.request.order_key, "")
                carried[row.position] = (job_id or row.id, row.request, bool(job_id))
                if not job_id:
                    self._jobs[row.id] = job = _FakeJob(row.id, row.request, self.now_ms)
                    at_once = max(at_once, self._begin(job))
                asked_id, carrying_id = row.id, job_id or row.id
            self.move_to(at_once)
            if lost_reply:
                self._fail()
            return [carried[position] for position in range(len(carried))]

    def look(self, job_id: str, timeout_s: float | None) -> Outcome | None:
        """The outcome, once the clock has been moved to it; None if somebody has to settle it first.

        Raises:
            WaitTimeout: it is not due within ``timeout_s``.
        """
        with self.news:
            self.reach()
            job = self._jobs.get(job_id)
            if job is None or job.outcome is None:
                due_ms = None if job is None else job.due_ms
                if timeout_s is None or timeout_s == math.inf:
                    if due_ms is None:
                        return None
                    self.move_to(due_ms)
                else:
                    ends_ms = self.now_ms + int(min(max(timeout_s, 0), _MAX_STEP_S) * 1000)
                    self.move_to(ends_ms if due_ms is None else min(ends_ms, due_ms))
            if job is None or job.outcome is None:
                raise WaitTimeout(f"no outcome of {job_id} within {timeout_s} s; the request goes on")
            return job.outcome

    def outcome(self, job_id: str) -> Outcome | None:
        with self.news:
            self.reach()
            job = self._jobs.get(job_id)
            return None if job is None else job.outcome

    def outcomes_of(self, job_ids: Iterable[str]) -> dict[str, Outcome]:
        with self.news:
            self.reach()
            found = [(job_id, self._jobs.get(job_id)) for job_id in job_ids]
            return {job_id: job.outcome for job_id, job in found if job is not None and job.outcome is not None}

    def page(self, after: str) -> list[tuple[str, Outcome]]:
        ms, _, sequence = after.partition("-")
        with self.news:
            self.reach()
            place = (int(ms), int(sequence or 0))
            return [("{}-{}".format(*at), outcome) for at, outcome in self._ledger if at > place]

    def newest(self) -> str:
        with self.news:
            self.reach()
            return "{}-{}".format(*self._ledger[-1][0]) if self._ledger else "0-0"

    def pass_to_next(self) -> bool:
        """Move the clock to the next outcome that is due; False if none will come by itself."""
        with self.news:
            while self._due:
                due_ms, _, job_id, run = self._due[0]
                if self._waits(job_id, run):
                    self.move_to(due_ms)
                    return True
                heapq.heappop(self._due)
            return False

    def retry(self, job_ids: Iterable[str], missing_ok: bool) -> list[str]:
        with self.news:
            asked = list(dict.fromkeys(job_ids))
            lost_reply = self._outage_now()
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
            if lost_reply:
                self._fail()
            return known

    def failed_ids(self) -> list[str]:
        with self.news:
            self.reach()
            return list(self._failed)

    def rq_status(self, job_id: str) -> JobStatus | None:
        job = self._jobs.get(job_id)
        if job is None:
            return None
        if job.outcome is None:
            return JobStatus.QUEUED
        return JobStatus.FAILED if job.outcome.kind.failed else JobStatus.FINISHED

    def statuses(self, job_ids: Iterable[str]) -> list[str | None]:
        with self.news:
            self.reach()
            found = [self.rq_status(job_id) for job_id in job_ids]
            return [None if status is None else status.value for status in found]

    def status(self) -> Status:
        with self.news:
            self.reach()
            waiting = [job.enqueued_at_ms for job in self._jobs.values() if job.outcome is None]
            last = [outcome for at, outcome in self._ledger if at[0] > self.now_ms - _WINDOW_MS]
            return Status(
                queue=self.keys.queue,
                at_ms=self.now_ms,
                queued=len(waiting),
                oldest_queued_s=(self.now_ms - min(waiting)) / 1000 if waiting else None,
                in_flight=0,
                scheduled=0,
                failed=len(self._failed),
                suspended=False,
                gates=(Gate("all", open=True),),
                keys=(),
                used_weight=None,
                weight_limit=None,
                outcomes=Counter(outcome.kind.value for outcome in last),
                outcomes_partial=False,
                enqueue_to_outcome=Percentiles.of([o.finished_at_ms - (o.enqueued_at_ms or 0) for o in last]),
                enqueue_to_first_attempt=Percentiles.of(
                    [o.attempts[0].at_ms - (o.enqueued_at_ms or 0) for o in last if o.attempts]
                ),
                workers=(),
            )

    def job(self, job_id: str) -> Job:
        with self.news:
            self.reach()
            job = self._jobs.get(job_id)
            if job is None:
                raise NoSuchJobError(f"No such job: {self.keys.job_prefix}{job_id}")
            return Job.create(
                TASK,
                args=[encode_request(job.request)],
                connection=redis.Redis(connection_pool=redis.ConnectionPool(connection_class=_NoConnection)),
                serializer=JSONSerializer,
                id=job_id,
                origin=self.keys.queue,
                status=self.rq_status(job_id),
                description=job.request.describe(),
            )

    # what is scripted

    def script(self, key: str, line: _Line, runs: float) -> None:
        with self.news:
            self._lines.setdefault(key, _Lines()).add(line, runs)

    def break_down(self, calls: float, carried_out: bool) -> None:
        with self.news:
            self._outage = _Outage(calls, carried_out)

    def mend(self) -> None:
        with self.news:
            self._outage = None

    def settle(self, job_id: str, line: _Line) -> Outcome:
        with self.news:
            job = self._jobs.get(job_id)
            if job is None:
                raise ValueError(f"{job_id!r} is no request of this double")
            if job.outcome is not None:
                raise ValueError(f"{job_id} has its outcome already: {job.outcome.kind}")
            job.line = line
            self.now_ms += _CALL_MS * len(self._answers(line))
            return self._record(job, self.now_ms)

    def move_to(self, now_ms: int) -> None:
        """Let the time come, and record what is due by then."""
        with self.news:
            while self._due and self._due[0][0] <= now_ms:
                due_ms, _, job_id, run = heapq.heappop(self._due)
                self.now_ms = max(self.now_ms, due_ms)
                if self._waits(job_id, run):
                    self._record(self._jobs[job_id], due_ms)
            self.now_ms = max(self.now_ms, now_ms)

    def reach(self) -> None:
        """Raises QueueUnavailable during an outage."""
        if self._outage_now():
            self._fail()

    # waiting for somebody who settles

    def listen(self) -> asyncio.Future[None]:
        """A future that is done at the next outcome (or closing) after now."""
        with self.news:
            self._listeners = [future for future in self._listeners if not future.done()]
            future = asyncio.get_running_loop().create_future()
            self._listeners.append(future)
            return future

    def tell(self) -> None:
        """Wake those who wait for news."""
        with self.news:
            listeners, self._listeners = self._listeners, []
            self.news.notify_all()
        for future in listeners:
            with contextlib.suppress(RuntimeError):  # its loop has been closed
                future.get_loop().call_soon_threadsafe(_wake, future)

    def close(self) -> None:
        with self.news:
            self.closings += 1
        self.tell()

    # how it comes about

    def _begin(self, job: _FakeJob) -> int:
        """Start a run as its script says; gives when it ends if that is at once, else now."""
        if job.request.joins:
            self._open.setdefault(job.request.order_key, job.id)
        job.line, job.due_ms = self._line_for(job.request), None
        if job.line.kind is None:
            return self.now_ms
        least_ms = _CALL_MS * len(self._answers(job.line))
        job.due_ms = self.now_ms + max(round(job.line.after_s * 1000), least_ms)
        self._counted += 1
        heapq.heappush(self._due, (job.due_ms, self._counted, job.id, job.run))
        return self.now_ms if job.line.after_s else job.due_ms

    def _line_for(self, request: CancelRequest) -> _Line:
        keys = [request.order_key, request.account, ""]
        if request.client_algo_id is not None:
            keys.insert(1, CancelRequest(client_algo_id=request.client_algo_id, account=request.account).order_key)
        lines = (self._lines[key].next() for key in keys if key in self._lines)
        return next((line for line in lines if line is not None), _Line())

    def _waits(self, job_id: str, run: int) -> bool:
        job = self._jobs[job_id]
        return job.run == run and job.outcome is None

    @staticmethod
    def _answers(line: _Line) -> tuple[_Answer, ...]:
        story = _STORIES[line.kind or OutcomeKind.CANCELLED]
        return story.answers(line.order_status or story.statuses[0])

    def _record(self, job: _FakeJob, at_ms: int) -> Outcome:
        request, line, kind = job.request, job.line, job.line.kind or OutcomeKind.CANCELLED
        status = line.order_status or _STORIES[kind].statuses[0]
        answers = self._answers(line)
        attempts = tuple(
            Attempt(n, at_ms - _CALL_MS * (len(answers) + 1 - n), a.call, a.http, a.code, a.msg, a.verdict, _CALL_MS)
            for n, a in enumerate(answers, 1)
        )
        shown = any(answer.call is Call.QUERY and answer.http == 200 for answer in answers)
        found = shown or _CONFIRMED in answers
        error = line.error or _STORIES[kind].error
        if error is not None and line.error is None and answers:
            error = error.format(verdict=answers[-1].verdict, msg=answers[-1].msg)
        outcome = Outcome(
            id=job.id,
            run=job.run,
            kind=kind,
            account=request.account,
            algo_id=self._algo_id(request) if found else request.algo_id,
            client_algo_id=request.client_algo_id,
            symbol=request.symbol or line.symbol or ("BTCUSDT" if shown else None),
            tag=request.tag,
            may_be_live=may_be_live(kind, status),
            order_status=status,
            actual_order_id=self._order_id(line) if kind is OutcomeKind.TRIGGERED else None,
            attempts=attempts,
            enqueued_at_ms=job.enqueued_at_ms,
            finished_at_ms=at_ms,
            worker=_WORKER,
            error=error,
        )
        job.outcome = decode_outcome(outcome.encode())  # what no client could read is not given here either
        self._file(job, job.outcome)
        return job.outcome

    def _file(self, job: _FakeJob, outcome: Outcome) -> None:
        if self._open.get(job.request.order_key) == job.id:
            del self._open[job.request.order_key]
        if outcome.kind.failed:
            self._failed[job.id] = None
        last_ms, sequence = self._ledger[-1][0] if self._ledger else (0, 0)
        at_ms = max(self.now_ms, last_ms)
        self._ledger.append(((at_ms, sequence + 1 if at_ms == last_ms else 0), outcome))
        self.tell()

    def _algo_id(self, request: CancelRequest) -> int:
        if request.algo_id is not None:
            return request.algo_id
        return self._algo_ids.setdefault(request.order_key, _FIRST_ALGO_ID + len(self._algo_ids))

    def _order_id(self, line: _Line) -> str:
        self._counted += 1
        return line.actual_order_id or str(_FIRST_ORDER_ID + self._counted)

    def _outage_now(self) -> bool:
        """Whether this call's reply is lost; raises QueueUnavailable if the call is lost as a whole."""
        outage = self._outage
        if outage is None:
            return False
        outage.calls -= 1
        if outage.calls <= 0:
            self._outage = None
        if not outage.carried_out:
            self._fail()
        return True

    @staticmethod
    def _fail() -> NoReturn:
        raise QueueUnavailable("Redis did not answer (ConnectionError); repeating the call is safe")


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class _NoConnection(redis.Connection):
    """What RQ's job of a double is given: there is no Redis to ask."""

    def connect(self) -> None:
        raise redis.ConnectionError("a double has no Redis")


# --- what both doubles have -------------------------------------------------------------------------------------------


class _Scripted:
    """The script of a double, and what was asked of it."""

    _play: _Play

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
        order_status: str | None = None,
        actual_order_id: str | None = None,
        symbol: str | None = None,
        error: str | None = None,
        after_s: float = 0.0,
        runs: int | None = None,
    ) -> None:
        """Say what becomes of a request for this order; without an id, of any for ``account`` or of any at all.

        What is said last holds, for ever or for so many ``runs`` (requests and retries), after which that holds again
        what was said before; an order's own script goes before its account's. Where nothing is said an order is
        ``cancelled``. ``order_status`` FINISHED goes with ``triggered``, TRIGGERING with ``gave_up``. The outcome comes
        after ``after_s`` seconds of the double's time, a century at the most.

        Raises:
            InvalidRequest: no request can name that order, no worker would record that, or ``after_s`` or ``runs`` is
                no such number.
        """
        _check_count("runs", runs)
        line = _Line(
            kind=_kind(kind),
            order_status=order_status,
            actual_order_id=actual_order_id,
            symbol=symbol,
            error=error,
            after_s=after_s,
        )
        self._play.script(_key(algo_id, client_algo_id, account), line, math.inf if runs is None else runs)

    def hold(
        self, *, algo_id: int | None = None, client_algo_id: str | None = None, account: str | None = None
    ) -> None:
        """As :meth:`will`, but nothing becomes of such a request until :meth:`settle`: as if no worker were there.

        Raises:
            InvalidRequest: no request can name that order.
        """
        self._play.script(_key(algo_id, client_algo_id, account), _Line(kind=None), math.inf)

    def settle(
        self,
        ticket_or_id: TicketFields | str,
        kind: OutcomeKind = OutcomeKind.CANCELLED,
        *,
        order_status: str | None = None,
        actual_order_id: str | None = None,
        symbol: str | None = None,
        error: str | None = None,
    ) -> Outcome:
        """Record the outcome of a request now, and wake those who wait for it.

        Raises:
            InvalidRequest: no worker would record that.
            ValueError: the request is unknown or has its outcome.
        """
        job_id = ticket_or_id if isinstance(ticket_or_id, str) else ticket_or_id.id
        line = _Line(
            kind=_kind(kind),
            order_status=order_status,
            actual_order_id=actual_order_id,
            symbol=symbol,
            error=error,
        )
        return self._play.settle(job_id, line)

    def advance(self, seconds: float) -> None:
        """Let time pass: what is due by then gets its outcome.

        Raises:
            InvalidRequest: it would have to run backwards, or further than a century.
        """
        _check_step("seconds", seconds)
        self._play.move_to(self._play.now_ms + round(seconds * 1000))

    def unavailable(self, calls: int | None = None, *, carried_out: bool = False) -> None:
        """Have the next ``calls`` calls, or all until :meth:`available`, raise QueueUnavailable.

        ``carried_out``: Redis does what it is asked and its answer is lost, so that a repeat by algo id finds it done.

        Raises:
            InvalidRequest: ``calls`` is no number of calls.
        """
        _check_count("calls", calls)
        self._play.break_down(math.inf if calls is None else calls, carried_out)

    def available(self) -> None:
        """End what :meth:`unavailable` began."""
        self._play.mend()

    def not_durable(self) -> None:
        """Have every call with ``durable=True`` raise NotDurable from now on, its requests enqueued all the same."""
        self._play.undurable = True


def _key(algo_id: int | None, client_algo_id: str | None, account: str | None) -> str:
    """What a script is kept under; raises InvalidRequest for an order that no request can name."""
    nobody = algo_id is None and client_algo_id is None
    checked = CancelRequest(
        _FIRST_ALGO_ID if nobody else algo_id, client_algo_id, DEFAULT_ACCOUNT if account is None else account
    )
    return (account or "") if nobody else checked.order_key


def _not_durable(tickets: Sequence[TicketFields]) -> NotDurable:
    error = NotDurable("enqueued, but this server cannot confirm it as durable")
    error.tickets = tickets
    return error


# --- the doubles ------------------------------------------------------------------------------------------------------


class FakeCancelClient(_Scripted, CancelClient):
    """A :class:`CancelClient` without Redis; see the module's text. Thread-safe."""

    def __init__(self, queue: str = DEFAULT_QUEUE) -> None:
        self._play = _Play(queue)
        self.keys = self._play.keys

    @classmethod
    def from_url(cls, url: str, queue: str = DEFAULT_QUEUE, *, timeout_s: float = 2.0, **options: Any) -> Self:  # noqa: ARG003
        """A double; the URL must be one that the real client takes, and leads nowhere."""
        parse_url(url)
        return cls(queue)

    def close(self) -> None:
        """End the iterations that follow the ledger."""
        self._play.close()

    def cancel_many(self, requests: Iterable[CancelRequest], *, durable: bool = False) -> list[Ticket]:
        """As :meth:`CancelClient.cancel_many`."""
        tickets = [Ticket(*carried, self) for carried in self._play.enqueue(requests)]
        if durable and self._play.undurable:
            raise _not_durable(tickets)
        return tickets

    def outcome(self, job_id: str) -> Outcome | None:
        """As :meth:`CancelClient.outcome`; an outcome is kept for good."""
        return self._play.outcome(job_id)

    def outcomes_of(self, job_ids: Iterable[str]) -> dict[str, Outcome]:
        """As :meth:`CancelClient.outcomes_of`."""
        return self._play.outcomes_of(job_ids)

    def outcomes(self, after: str = "0-0", *, follow: bool = False) -> Iterator[tuple[str, Outcome]]:
        """As :meth:`CancelClient.outcomes`; ``follow`` moves the time to what is due, and then waits for `settle`.

        :meth:`close` ends an iteration that waits.
        """
        return self._follow(check_position(after), follow)

    def _follow(self, position: str, follow: bool) -> Iterator[tuple[str, Outcome]]:
        play, closings = self._play, self._play.closings
        if position == "$":
            position = play.newest()
        while True:
            page = play.page(position)
            for position, outcome in page:
                yield position, outcome
            if page:
                continue
            if not follow or play.closings != closings:
                return
            with play.news:
                if not play.page(position) and not play.pass_to_next() and play.closings == closings:
                    play.news.wait()

    def wait(self, job_id: str, timeout_s: float | None = None) -> Outcome:
        """As :meth:`CancelClient.wait`, by the double's time; without ``timeout_s`` it may really wait for `settle`."""
        with self._play.news:
            while (outcome := self._play.look(job_id, timeout_s)) is None:
                self._play.news.wait()
            return outcome

    def retry(self, job_ids: Iterable[str], *, missing_ok: bool = False) -> list[str]:
        """As :meth:`CancelClient.retry`."""
        return self._play.retry(job_ids, missing_ok)

    def failed_ids(self) -> list[str]:
        """As :meth:`CancelClient.failed_ids`."""
        return self._play.failed_ids()

    def statuses(self, job_ids: Iterable[str]) -> list[str | None]:
        """As :meth:`CancelClient.statuses`."""
        return self._play.statuses(job_ids)

    def status(self) -> Status:
        """As :meth:`CancelClient.status`, with what the double knows of it: no gate is closed, no worker is there."""
        return self._play.status()

    def job(self, ticket_or_id: Ticket | str) -> Job:
        """As :meth:`CancelClient.job`, as it stands: it cannot be refreshed or saved."""
        return self._play.job(ticket_or_id if isinstance(ticket_or_id, str) else ticket_or_id.id)


class AsyncFakeCancelClient(_Scripted, AsyncCancelClient):
    """An :class:`AsyncCancelClient` without Redis; see the module's text. Each call gives way to the loop once."""

    def __init__(self, queue: str = DEFAULT_QUEUE) -> None:
        self._play = _Play(queue)
        self.keys = self._play.keys

    @classmethod
    def from_url(cls, url: str, queue: str = DEFAULT_QUEUE, *, timeout_s: float = 2.0, **options: Any) -> Self:  # noqa: ARG003
        """A double; the URL must be one that the real client takes, and leads nowhere."""
        parse_url(url)
        return cls(queue)

    async def close(self) -> None:
        """End the iterations that follow the ledger."""
        self._play.close()
        await asyncio.sleep(0)

    async def cancel_many(self, requests: Iterable[CancelRequest], *, durable: bool = False) -> list[AsyncTicket]:
        """As :meth:`CancelClient.cancel_many`."""
        tickets = [AsyncTicket(*carried, self) for carried in self._play.enqueue(requests)]
        await asyncio.sleep(0)
        if durable and self._play.undurable:
            raise _not_durable(tickets)
        return tickets

    async def outcome(self, job_id: str) -> Outcome | None:
        """As :meth:`CancelClient.outcome`; an outcome is kept for good."""
        await asyncio.sleep(0)
        return self._play.outcome(job_id)

    async def outcomes_of(self, job_ids: Iterable[str]) -> dict[str, Outcome]:
        """As :meth:`CancelClient.outcomes_of`."""
        await asyncio.sleep(0)
        return self._play.outcomes_of(job_ids)

    def outcomes(self, after: str = "0-0", *, follow: bool = False) -> AsyncIterator[tuple[str, Outcome]]:
        """As :meth:`FakeCancelClient.outcomes`, for ``async for``."""
        return self._follow(check_position(after), follow)

    async def _follow(self, position: str, follow: bool) -> AsyncIterator[tuple[str, Outcome]]:
        play, closings = self._play, self._play.closings
        if position == "$":
            position = play.newest()
        while True:
            news = play.listen()
            page = play.page(position)
            for position, outcome in page:
                yield position, outcome
            if not page:
                if not follow or play.closings != closings:
                    return
                if not play.pass_to_next():
                    await news
            await asyncio.sleep(0)

    async def wait(self, job_id: str, timeout_s: float | None = None) -> Outcome:
        """As :meth:`FakeCancelClient.wait`."""
        await asyncio.sleep(0)
        while True:
            news = self._play.listen()
            try:
                if (outcome := self._play.look(job_id, timeout_s)) is not None:
                    return outcome
                await news
            finally:
                news.cancel()

    async def retry(self, job_ids: Iterable[str], *, missing_ok: bool = False) -> list[str]:
        """As :meth:`CancelClient.retry`."""
        await asyncio.sleep(0)
        return self._play.retry(job_ids, missing_ok)

    async def failed_ids(self) -> list[str]:
        """As :meth:`CancelClient.failed_ids`."""
        await asyncio.sleep(0)
        return self._play.failed_ids()

    async def statuses(self, job_ids: Iterable[str]) -> list[str | None]:
        """As :meth:`CancelClient.statuses`."""
        await asyncio.sleep(0)
        return self._play.statuses(job_ids)

    async def status(self) -> Status:
        """As :meth:`FakeCancelClient.status`."""
        await asyncio.sleep(0)
        return self._play.status()
