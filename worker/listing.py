"""What to do next about all open orders of a symbol: pure decisions, as in :mod:`worker.decide`.

The orders are listed, and a request is made for each that was open when they were asked for. A listing is a read: it is
repeated until it is answered, and leaves no doubt. What was opened later (than ``meant_at_ms`` of the case) is nobody's
business here, and what cannot be told is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from producer.message import Attempt, Call, OutcomeKind
from worker.classify import REFUSED, Means, OrderView, Verdict
from worker.decide import (
    PASSED,
    TOO_LATE,
    Again,
    Case,
    Span,
    Stop,
    backoff_ms,
    delay_after,
    in_time,
    quick_delay,
    quoted,
    spent,
    unfinished,
    was_before,
)


def first_step(case: Case, history: Sequence[Attempt], now_ms: int) -> Stop | Again:
    """See :func:`worker.decide.first_step`."""
    why = PASSED if now_ms >= case.deadline_at_ms else spent(history, case.policy, Call.LIST_OPEN)
    return bound(case, history, now_ms, why) if why else Again(Call.LIST_OPEN)


def next_step(case: Case, history: Sequence[Attempt], verdict: Verdict, now_ms: int, roll: float) -> Stop | Again:
    """See :func:`worker.decide.next_step`."""
    if verdict.means is Means.LISTED and case.ahead is not None:
        return _listed(case, case.ahead, verdict.orders)
    if verdict.means in REFUSED:
        return Stop(OutcomeKind.REFUSED, error=f"refused: {quoted(verdict)}")
    step = first_step(case, history, now_ms)
    if isinstance(step, Stop):
        return step
    quick_ms = quick_delay(history, case.policy, roll)
    own_ms = backoff_ms(len(history), case.policy, roll) if quick_ms is None else quick_ms
    delay_ms = in_time(case, verdict, now_ms, delay_after(case, verdict, now_ms, own_ms))
    if delay_ms is None:
        return bound(case, history, now_ms, TOO_LATE)
    return Again(Call.LIST_OPEN, delay_ms, resync=verdict.means is Means.CLOCK)


def bound(case: Case, history: Sequence[Attempt], now_ms: int, why: str) -> Stop:  # noqa: ARG001 - as job.Rules has it
    """See :func:`worker.decide.bound`."""
    return unfinished(history, OutcomeKind.GAVE_UP, None, f"{why}, so the open orders are not known")


def has_untold(case: Case, verdict: Verdict) -> bool:
    """Whether a list holds orders of which the clocks, as they are known, cannot tell whether they were there."""
    if case.ahead is None:
        return bool(verdict.orders)
    return bool(_listed(case, case.ahead, verdict.orders).left_alone)


def _listed(case: Case, ahead: Span, orders: Sequence[OrderView]) -> Stop:
    ages = [(order, was_before(order.create_time_ms, ahead, case.meant_at_ms)) for order in orders]
    meant = tuple(order for order, was_there in ages if was_there)
    untold = tuple(order.algo_id for order, was_there in ages if was_there is None)
    return Stop(OutcomeKind.LISTED, orders=meant, left_alone=untold)
