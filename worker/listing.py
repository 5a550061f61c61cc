"""What to do next about all open orders of a symbol: pure decisions, as in :mod:`worker.decide`.

The orders are listed, and a request is made for each that was open when they were asked for. A listing is a read: it is
repeated until it is answered, and leaves no doubt. What was opened later is nobody's business here, and what cannot be
told is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from producer.message import Attempt, Call, OutcomeKind
from worker.classify import GATED, Means, OrderView, Verdict
from worker.decide import (
    LAST_TRY_MS,
    LOOK_UP_WITHIN_MS,
    MAX_RESYNCS,
    QUICK_DOUBTS,
    Again,
    Policy,
    Span,
    Stop,
    backoff_ms,
    counted,
    is_silence,
    pause_ms,
    trailing,
    was_before,
)

_REFUSED = frozenset({Means.DENIED, Means.KEY_REFUSED})


@dataclass(frozen=True, slots=True)
class ListingCase:
    """What a decision needs to know of the request; times by Redis' clock, ms since the epoch."""

    before_ms: int  # orders that were created later are not meant
    deadline_at_ms: int
    ahead: Span | None = None  # Redis' clock minus the exchange's, ms; None: not known


def listing_step(case: ListingCase, history: Sequence[Attempt], policy: Policy, now_ms: int) -> Stop | Again:
    """What a worker does about a listing before anything new was heard."""
    if now_ms >= case.deadline_at_ms:
        if not history:
            return Stop(OutcomeKind.OVERDUE, error="the deadline passed before anything was sent")
        return unlisted(history, "the deadline passed")
    if (used := counted(history)) >= policy.max_attempts:
        return unlisted(history, f"{used} counted attempts were made")
    return Again(Call.LIST_OPEN)


def after_listing(
    case: ListingCase, history: Sequence[Attempt], verdict: Verdict, policy: Policy, now_ms: int, roll: float
) -> Stop | Again:
    """What follows the listing that ends ``history`` and got ``verdict``; ``roll`` as in
    :func:`worker.decide.next_step`."""
    if verdict.means is Means.LISTED and case.ahead is not None:
        return _listed(case.before_ms, case.ahead, verdict.orders)
    if verdict.means in _REFUSED:
        said = " ".join(str(part) for part in (verdict.http, verdict.code, verdict.msg) if part not in (None, ""))
        return Stop(OutcomeKind.REFUSED, error=f"refused: {said}")
    step = listing_step(case, history, policy, now_ms)
    if isinstance(step, Stop):
        return step
    delay_ms, left_ms = _delay(case, history, verdict, policy, now_ms, roll), case.deadline_at_ms - now_ms
    if delay_ms >= left_ms:
        if verdict.means in GATED or left_ms <= LAST_TRY_MS:
            return unlisted(history, "the deadline comes before the next try")
        delay_ms = left_ms - LAST_TRY_MS
    return Again(Call.LIST_OPEN, delay_ms, resync=verdict.means is Means.CLOCK)


def unlisted(history: Sequence[Attempt], why: str) -> Stop:
    """The end of a listing that is out of time or of attempts."""
    last = f"; last: {history[-1].verdict} {history[-1].msg}".rstrip() if history else ""
    return Stop(OutcomeKind.GAVE_UP, error=f"{why}, so the open orders are not known{last}")


def has_untold(case: ListingCase, verdict: Verdict) -> bool:
    """Whether a list holds orders of which the clocks, as they are known, cannot tell whether they were there."""
    if case.ahead is None:
        return bool(verdict.orders)
    return bool(_listed(case.before_ms, case.ahead, verdict.orders).left_alone)


def _listed(before_ms: int, ahead: Span, orders: Sequence[OrderView]) -> Stop:
    ages = [(order, was_before(order.create_time_ms, ahead, before_ms)) for order in orders]
    meant = tuple(order for order, was_there in ages if was_there)
    untold = tuple(order.algo_id for order, was_there in ages if was_there is None)
    return Stop(OutcomeKind.LISTED, orders=meant, left_alone=untold)


def _delay(
    case: ListingCase, history: Sequence[Attempt], verdict: Verdict, policy: Policy, now_ms: int, roll: float
) -> int:
    if verdict.means in GATED:
        return pause_ms(verdict, policy, now_ms, case.ahead)
    if verdict.means is Means.CLOCK and trailing(history, Means.CLOCK) <= MAX_RESYNCS:
        own_ms = 0
    elif is_silence(history[-1]) and sum(attempt.verdict == Means.UNCLEAR for attempt in history) <= QUICK_DOUBTS:
        own_ms = int(LOOK_UP_WITHIN_MS * roll)
    else:
        own_ms = backoff_ms(len(history), policy, roll)
    return max(own_ms, verdict.retry_after_ms or 0)
