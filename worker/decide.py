"""What to do next about one order: pure decisions from the history of its attempts.

:func:`first_step` and :func:`next_step` give :class:`Stop` (with the outcome's kind) or :class:`Again` (with a delay
and the call to make). Nothing here reads a clock, draws a random number, or talks to anybody: time and chance are
arguments, so that every decision can be replayed from the attempts that an outcome records.

The rule above all others: whether the exchange can have *seen* a cancel is asked before whether to try again. An
attempt that may have worked stays in doubt until a query settles it; no later refusal does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from producer.message import Attempt, Call, OutcomeKind
from worker.classify import GATED, STATUS_MEANS, Means, OrderView, Verdict

#: A request by client id alone is sent without a look-up only this soon after it was asked, ms; it is also how much
#: later than the request an order may claim to be created and still be the one that was meant (two hosts' clocks).
CLIENT_ID_GRACE_MS = 1000
#: Clock refusals in a row that are answered at once, by a fresh clock and signature.
MAX_RESYNCS = 3
#: First wait before an order that is just being triggered is looked at again, ms: a trigger takes about ten.
TRIGGER_POLL_MS = 10
#: The last try starts at least this long before the deadline, ms, so that there is time for its answer.
LAST_TRY_MS = 1000
#: How far ahead of the exchange's clock a timestamp may be, ms (exchange.md 2).
AHEAD_MS = 1000
#: Pauses where the exchange names none, ms: after 429, and after 418 (its shortest ban is two minutes).
LIMIT_PAUSE_MS = 10_000
BAN_PAUSE_MS = 120_000
#: No pause is shorter, ms: one of nothing would ask a closed exchange again and again, and count no attempt.
LEAST_PAUSE_MS = 1_000

_MEANS_STATUS = {means.value: status for status, means in STATUS_MEANS.items()}
_REFUSED = frozenset({Means.DENIED, Means.KEY_REFUSED})


@dataclass(frozen=True, slots=True)
class Policy:
    """The bounds of a request, from the worker's settings."""

    max_attempts: int = 25
    backoff_base_ms: int = 100
    backoff_cap_ms: int = 15_000
    not_found_horizon_ms: int = 10_000
    recv_window_ms: int = 5_000
    waf_pause_ms: int = 300_000


@dataclass(frozen=True, slots=True)
class Case:
    """What a decision needs to know of the request; times by Redis' clock, ms since the epoch."""

    by_client_id: bool  # only a client id is known: nothing pinned it to an algo id yet
    meant_at_ms: int  # when the request was first made: an order created later is not the one that was meant
    deadline_at_ms: int


@dataclass(frozen=True, slots=True)
class Stop:
    """The request is over."""

    kind: OutcomeKind
    order_status: str | None = None
    actual_order_id: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Again:
    """Make ``call`` in ``delay_ms``; ``resync``: with the exchange's clock measured anew before."""

    call: Call
    delay_ms: int = 0
    resync: bool = False


def first_step(case: Case, history: Sequence[Attempt], policy: Policy, now_ms: int) -> Stop | Again:
    """What a worker does with a request that it was just given: nothing was sent yet, or a retry is due."""
    if now_ms >= case.deadline_at_ms:
        if not history:
            return Stop(OutcomeKind.OVERDUE, error="the deadline passed before anything was sent")
        return _bound(history, policy, "the deadline passed")
    call = call_for(case, history, policy, now_ms)
    return _attempts_left(history, policy, call) or Again(call)


def next_step(
    case: Case, history: Sequence[Attempt], verdict: Verdict, policy: Policy, now_ms: int, roll: float
) -> Stop | Again:
    """What follows the attempt that ends ``history`` and got ``verdict``.

    ``roll`` is a random number in [0, 1): the jitter of a delay. The delay never ends at or past the deadline.
    """
    stop = _final(case, history, verdict, policy, now_ms)
    if stop is not None:
        return stop
    if verdict.order is not None:
        case = replace(case, by_client_id=False)  # the answer told the algo id, and the caller pins it
    if now_ms >= case.deadline_at_ms:
        return _bound(history, policy, "the deadline passed")
    delay_ms = _delay(history, verdict, policy, now_ms, roll)
    if (stop := _attempts_left(history, policy, call_for(case, history, policy, now_ms + delay_ms))) is not None:
        return stop
    left_ms = case.deadline_at_ms - now_ms
    if delay_ms >= left_ms:
        if verdict.means in GATED or left_ms <= LAST_TRY_MS:
            return _bound(history, policy, "the deadline comes before the next try")
        delay_ms = left_ms - LAST_TRY_MS
    call = call_for(case, history, policy, now_ms + delay_ms)
    return Again(call, delay_ms, resync=verdict.means is Means.CLOCK)


def call_for(case: Case, history: Sequence[Attempt], policy: Policy, at_ms: int) -> Call:
    """Which call comes next at ``at_ms``: a query wherever a cancel would be a guess."""
    last = history[-1] if history else None
    if last is not None and last.verdict != Means.OPEN and (last.call is Call.QUERY or last.verdict in _ASK_AFTER):
        return Call.QUERY  # it was not answered for good, or there is something to ask
    stale = at_ms - case.meant_at_ms > CLIENT_ID_GRACE_MS or in_doubt(history, policy)
    return Call.QUERY if case.by_client_id and stale else Call.CANCEL


#: After these answers to a cancel the order's state must be read before anything else is tried.
_ASK_AFTER = frozenset({Means.UNCLEAR, Means.NO_SUCH_ORDER, Means.TRIGGER_RACE})


def in_doubt(history: Sequence[Attempt], policy: Policy) -> bool:
    """Whether a cancel of ours may have worked, or may still work, without a query having settled it.

    A query that shows the order open settles only those cancels whose time window had closed when it was asked: no
    request is newly accepted once its timestamp is older than recvWindow (exchange.md 4.4).
    """
    open_at_ms = max((a.at_ms for a in history if a.verdict == Means.OPEN), default=None)
    window_ms = policy.recv_window_ms + AHEAD_MS
    return any(
        attempt.call is Call.CANCEL
        and attempt.verdict == Means.UNCLEAR
        and (open_at_ms is None or attempt.at_ms + attempt.ms + window_ms > open_at_ms)
        for attempt in history
    )


def counted(history: Sequence[Attempt]) -> int:
    """How many attempts count against the bound.

    Not counted: what brought a pause for everybody (LIMITED, BLOCKED); clock refusals as far as they are answered at
    once; and a repeated "no such order", whose own bound is the horizon.
    """
    total = clocks = 0
    for attempt in history:
        means = attempt.verdict
        clocks = clocks + 1 if means == Means.CLOCK else 0
        free = means in GATED or 0 < clocks <= MAX_RESYNCS
        free = free or (means == Means.NO_SUCH_ORDER and attempt.call is Call.QUERY)
        total += not free
    return total


def last_status(history: Sequence[Attempt]) -> str | None:
    """The order's state as last seen by a query, in the exchange's spelling."""
    for attempt in reversed(history):
        if attempt.verdict in _MEANS_STATUS:
            return _MEANS_STATUS[attempt.verdict]
        if attempt.verdict == Means.ODD_STATUS:
            return attempt.msg
    return None


def _final(case: Case, history: Sequence[Attempt], verdict: Verdict, policy: Policy, now_ms: int) -> Stop | None:
    means, order = verdict.means, verdict.order
    if means is Means.CONFIRMED:
        return Stop(OutcomeKind.CANCELLED, "CANCELED")
    if order is not None and _is_newer_order(case, order):
        return Stop(
            OutcomeKind.UNKNOWN, error="the client id belongs to an order created after the request: left alone"
        )
    if means is Means.CANCELED:
        ours = any(a.call is Call.CANCEL and a.verdict == Means.UNCLEAR for a in history)
        return Stop(OutcomeKind.CANCELLED if ours else OutcomeKind.ALREADY_CANCELLED, "CANCELED")
    if means in (Means.TRIGGERED, Means.FINISHED):
        return Stop(OutcomeKind.TRIGGERED, verdict.msg, order.actual_order_id if order else None)
    if means is Means.EXPIRED:
        return Stop(OutcomeKind.EXPIRED, verdict.msg)
    if means is Means.REJECTED:
        return Stop(OutcomeKind.REJECTED, verdict.msg)
    if means in _REFUSED:
        kind = OutcomeKind.UNKNOWN if in_doubt(history, policy) else OutcomeKind.REFUSED
        return Stop(kind, last_status(history), error=f"refused: {_quoted(verdict)}")
    if means is Means.NO_SUCH_ORDER and now_ms >= _horizon_ends(history, policy, now_ms):
        kind = OutcomeKind.UNKNOWN if in_doubt(history, policy) else OutcomeKind.NOT_FOUND
        return Stop(kind, last_status(history), error=f"unknown to the exchange: {_quoted(verdict)}")
    return None


def _is_newer_order(case: Case, order: OrderView) -> bool:
    created = order.create_time_ms
    return case.by_client_id and (created is None or created > case.meant_at_ms + CLIENT_ID_GRACE_MS)


def _horizon_ends(history: Sequence[Attempt], policy: Policy, now_ms: int) -> int:
    """When "no such order" is believed: a horizon after its first time, but never on a cancel's word alone."""
    if history[-1].call is Call.CANCEL:
        return now_ms + 1
    first_ms = history[-1].at_ms
    for attempt in reversed(history):
        if attempt.verdict in _MEANS_STATUS or attempt.verdict == Means.ODD_STATUS:
            break
        if attempt.verdict == Means.NO_SUCH_ORDER:
            first_ms = attempt.at_ms
    return first_ms + policy.not_found_horizon_ms


def _attempts_left(history: Sequence[Attempt], policy: Policy, call: Call) -> Stop | None:
    """The bound on attempts; the last one is kept for the query that tells what the cancels before it did."""
    used = counted(history)
    spare = 1 if call is Call.CANCEL and used > 0 else 0
    return _bound(history, policy, f"{used} attempts were made") if used + spare >= policy.max_attempts else None


def _bound(history: Sequence[Attempt], policy: Policy, why: str) -> Stop:
    kind = OutcomeKind.UNKNOWN if in_doubt(history, policy) else OutcomeKind.GAVE_UP
    said = f"; last: {history[-1].verdict} {history[-1].msg}".rstrip() if history else ""
    return Stop(kind, last_status(history), error=f"{why}{said}")


def _delay(history: Sequence[Attempt], verdict: Verdict, policy: Policy, now_ms: int, roll: float) -> int:
    means, call = verdict.means, history[-1].call
    if means in GATED:
        return pause_ms(verdict, policy, now_ms)
    if means is Means.CLOCK and _trailing(history, Means.CLOCK) <= MAX_RESYNCS:
        return 0
    if call is Call.CANCEL and means in (Means.UNCLEAR, Means.NO_SUCH_ORDER):
        return 0
    if means is Means.OPEN and not any(a.call is Call.CANCEL for a in history):
        return 0
    if means in (Means.TRIGGER_RACE, Means.TRIGGERING):
        doublings = min(_trailing(history, Means.TRIGGERING), 32)
        return int(min(TRIGGER_POLL_MS << doublings, policy.backoff_cap_ms) * (0.5 + roll / 2))
    delay_ms = backoff_ms(len(history), policy, roll)
    if means is Means.NO_SUCH_ORDER:  # one more look just when it would be believed
        return min(delay_ms, _horizon_ends(history, policy, now_ms) - now_ms)
    return delay_ms


def pause_ms(verdict: Verdict, policy: Policy, now_ms: int) -> int:
    """How long nobody on this address may send, ms from ``now_ms``, after a gated verdict."""
    if verdict.means is Means.BLOCKED:
        return policy.waf_pause_ms
    asked = verdict.retry_after_ms
    if verdict.banned_until_ms is not None:
        asked = max(asked or 0, verdict.banned_until_ms - now_ms)
    if asked is None:
        return BAN_PAUSE_MS if verdict.http == 418 else LIMIT_PAUSE_MS
    return max(asked, LEAST_PAUSE_MS)


def backoff_ms(attempts: int, policy: Policy, roll: float) -> int:
    """Exponential backoff with full jitter after ``attempts`` (1 or more), ms: uniform from 0 to the doubled base."""
    ceiling = min(policy.backoff_base_ms << min(attempts - 1, 32), policy.backoff_cap_ms)
    return int(ceiling * roll)


def _trailing(history: Sequence[Attempt], means: Means) -> int:
    count = 0
    for attempt in reversed(history):
        if attempt.verdict != means:
            break
        count += 1
    return count


def _quoted(verdict: Verdict) -> str:
    return " ".join(str(part) for part in (verdict.http, verdict.code, verdict.msg) if part not in (None, ""))


def as_known(history: Sequence[Attempt]) -> list[Attempt]:
    """A history out of Redis; a verdict that this version does not know (a newer worker's) is read as unclear."""
    return [a if a.verdict in _KNOWN else replace(a, verdict=Means.UNCLEAR.value) for a in history]


_KNOWN = frozenset(means.value for means in Means)
