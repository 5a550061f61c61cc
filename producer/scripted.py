"""What becomes of a request of a double (:mod:`producer.testing`): the record that a worker would make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypedDict

from rq.job import JobStatus

from producer.message import (
    CHILD_ENDED,
    Attempt,
    Call,
    CancelRequest,
    ListedOrder,
    OnTrigger,
    Outcome,
    OutcomeKind,
    may_be_live,
)
from producer.untrusted import MAX_MSG_CHARS, InvalidRequest, checked_seconds, clean_text

#: Where ids that the exchange would have given begin.
FIRST_ALGO_ID = 2_000_000_000_000_000
#: How long a signed call takes at the exchange that is played here, ms.
CALL_MS = 5
#: Longest step of the double's time, s (a century): a record's times must fit in 64 bits.
MAX_STEP_S = 100 * 365 * 86_400
#: Longest id of a child order that a worker records, characters (`worker.classify`).
_MAX_ORDER_ID_CHARS = 40
#: Longest error, characters: a worker adds a few words to what the exchange said.
_MAX_ERROR_CHARS = 2 * MAX_MSG_CHARS

#: What one signed call came to: call, HTTP status, code, words, verdict.
Answer: TypeAlias = tuple[Call, int | None, int | None, str, str]
_UNKNOWN_ORDER: Answer = (Call.CANCEL, 400, -2011, "Unknown order sent.", "no_such_order")
_NO_SUCH_ORDER: Answer = (Call.QUERY, 400, -2013, "Order does not exist.", "no_such_order")
CONFIRMED: Answer = (Call.CANCEL, 200, 200, "success", "confirmed")
_KEY_REFUSED: Answer = (Call.CANCEL, 401, -2015, "Invalid API-key, IP, or permissions for action.", "key_refused")
_UNCLEAR: Answer = (Call.CANCEL, None, None, "read: TimeoutError", "unclear")

#: How a kind of outcome comes about: the states that the order can be in, the usual one first; the calls before a query
#: that shows the state, if there is one and no cancel was confirmed; the error.
STORIES: dict[OutcomeKind, tuple[tuple[str | None, ...], tuple[Answer, ...], str | None]] = {
    OutcomeKind.CANCELLED: (("CANCELED",), (CONFIRMED,), None),
    OutcomeKind.ALREADY_CANCELLED: (("CANCELED",), (_UNKNOWN_ORDER,), None),
    OutcomeKind.TRIGGERED: (("TRIGGERED", "FINISHED"), (_UNKNOWN_ORDER,), None),
    OutcomeKind.EXPIRED: (("EXPIRED",), (_UNKNOWN_ORDER,), None),
    OutcomeKind.REJECTED: (("REJECTED",), (_UNKNOWN_ORDER,), None),
    OutcomeKind.NOT_FOUND: ((None,), (_UNKNOWN_ORDER, _NO_SUCH_ORDER), "unknown to the exchange: {1} {2} {3}"),
    OutcomeKind.REFUSED: ((None,), (_KEY_REFUSED,), "refused: {1} {2} {3}"),
    OutcomeKind.OVERDUE: ((None,), (), "the deadline passed before anything was sent"),
    OutcomeKind.GAVE_UP: (("NEW", "TRIGGERING"), (_UNKNOWN_ORDER,), "the deadline passed; last: {4} {3}"),
    OutcomeKind.UNKNOWN: ((None,), (_UNCLEAR,), "the deadline passed; last: {4} {3}"),
}


class Said(TypedDict, total=False):
    """What an outcome says beside its kind."""

    order_status: str | None
    actual_order_id: str | None
    symbol: str | None
    error: str | None
    child_status: str | None
    child_executed_qty: str | None
    child_avg_price: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What becomes of one run of a request."""

    kind: OutcomeKind = OutcomeKind.CANCELLED
    order_status: str | None = None
    actual_order_id: str | None = None
    symbol: str | None = None
    error: str | None = None
    after_s: float = 0.0
    child_status: str | None = None
    child_executed_qty: str | None = None
    child_avg_price: str | None = None

    def __post_init__(self) -> None:
        """Raises InvalidRequest for what no worker would record."""
        object.__setattr__(self, "after_s", checked_seconds("after_s", self.after_s, MAX_STEP_S, or_zero=True))
        if self.kind not in STORIES:
            raise InvalidRequest("kind", self.kind, f"must be one of {', '.join(STORIES)}")
        statuses = STORIES[self.kind][0]
        if self.order_status not in (None, *statuses):
            named = " or ".join(status for status in statuses if status) or "left out"
            raise InvalidRequest("order_status", self.order_status, f"with {self.kind} it is {named}")
        if self.symbol is not None:
            CancelRequest(FIRST_ALGO_ID, symbol=self.symbol)  # one rule for both
        self._check("actual_order_id", self.kind is OutcomeKind.TRIGGERED, _MAX_ORDER_ID_CHARS)
        for name in ("child_status", "child_executed_qty", "child_avg_price"):
            self._check(name, self.kind is OutcomeKind.TRIGGERED, _MAX_ORDER_ID_CHARS)
        self._check("error", OutcomeKind(self.kind).failed, _MAX_ERROR_CHARS)

    def _check(self, name: str, is_apt: bool, limit: int) -> None:
        """Workers record a stranger's words as `clean_text` leaves them, and never empty ones."""
        value = getattr(self, name)
        if value is not None and not is_apt:
            raise InvalidRequest(name, value, f"no {self.kind} request has one")
        if value is not None and not (isinstance(value, str) and value and clean_text(value, limit) == value):
            rule = f"must be text of 1 to {limit} characters without control characters or blanks around it"
            raise InvalidRequest(name, value, rule)

    @property
    def status(self) -> str | None:
        """The state of the order."""
        return self.order_status or STORIES[self.kind][0][0]

    def child(self, on_trigger: OnTrigger | str) -> dict[str, Any]:
        """What the outcome of a request says of the order that this one became."""
        names = ("child_status", "child_executed_qty", "child_avg_price")
        is_ours = self.child_status == "CANCELED" and on_trigger == OnTrigger.CANCEL_CHILD
        ended = {"child_cancelled": is_ours} if self.child_status in CHILD_ENDED else {}
        return {name: getattr(self, name) for name in names} | ended

    @property
    def answers(self) -> tuple[Answer, ...]:
        """What the calls came to."""
        before = STORIES[self.kind][1]
        if self.status is None or CONFIRMED in before:
            return before
        verdict = "open" if self.status == "NEW" else self.status.lower()
        return (*before, (Call.QUERY, 200, None, self.status, verdict))


#: Nothing, until it is settled by hand.
HELD = Line()


@dataclass(slots=True)
class FakeJob:
    """A job of the double: open while it has no outcome."""

    id: str
    request: CancelRequest
    enqueued_at_ms: int
    run: int = 1
    line: Line = field(default_factory=Line)
    due_ms: int | None = None  # None: held
    outcome: Outcome | None = None

    @property
    def rq_status(self) -> JobStatus:
        if self.outcome is None:
            return JobStatus.QUEUED
        return JobStatus.FAILED if self.outcome.kind.failed else JobStatus.FINISHED


def became(job: FakeJob, at_ms: int, algo_id: int, order_id: int) -> Outcome:
    """The record of a request for one order; ``algo_id`` is what the exchange would show, ``order_id`` of a child."""
    request, line, kind = job.request, job.line, OutcomeKind(job.line.kind)
    answers = line.answers
    attempts = tuple(
        Attempt(n, at_ms - CALL_MS * (len(answers) + 1 - n), *answer, CALL_MS) for n, answer in enumerate(answers, 1)
    )
    shown = any(call is Call.QUERY and http == 200 for call, http, *_ in answers)
    found = shown or CONFIRMED in answers
    return Outcome(
        kind=kind,
        algo_id=algo_id if found else request.algo_id,
        client_algo_id=request.client_algo_id,
        symbol=request.symbol or line.symbol or ("BTCUSDT" if shown else None),
        may_be_live=may_be_live(kind, line.status, line.child_status),
        order_status=line.status,
        actual_order_id=line.actual_order_id or str(order_id) if kind == "triggered" else None,
        attempts=attempts,
        error=line.error or (STORIES[kind][2] or "").format(*(answers[-1] if answers else ())) or None,
        **line.child(request.on_trigger),
        **_common(job, at_ms),
    )


def listed(job: FakeJob, at_ms: int, orders: Sequence[ListedOrder]) -> Outcome:
    """The record of a request for all open orders of a symbol."""
    return Outcome(
        kind=OutcomeKind.LISTED,
        symbol=job.request.symbol,
        may_be_live=True if orders else None,
        orders=tuple(orders),
        before_ms=job.enqueued_at_ms,
        **_common(job, at_ms),
    )


def _common(job: FakeJob, at_ms: int) -> dict[str, Any]:
    times = {"enqueued_at_ms": job.enqueued_at_ms, "finished_at_ms": at_ms}
    return {
        "id": job.id,
        "run": job.run,
        "account": job.request.account,
        "tag": job.request.tag,
        "worker": "fake",
    } | times
