"""What to do next about the child of a triggered order: the order that it became. Pure decisions, as in
:mod:`worker.decide`.

A child is read once and told. Where the request wants it cancelled, it is cancelled until the exchange shows that it
rests no more; then alone the outcome is ``triggered``. Its calls go by the exchange's own order id, so a repeated one
never meets another order, and none of them bears on the parent's doubt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from producer.message import CHILD_ENDED, WORKER_LOST, Attempt, Call, OutcomeKind
from worker.classify import GATED, ChildRef, ChildView, Means, Verdict
from worker.decide import (
    DOUBT_PAUSE_MS,
    LAST_TRY_MS,
    LOOK_UP_WITHIN_MS,
    MAX_RESYNCS,
    NOT_DONE,
    QUICK_DOUBTS,
    TRIGGER_POLL_MS,
    UNREADABLE,
    Again,
    Policy,
    Span,
    Stop,
    accepted_until_ms,
    backoff_ms,
    is_silence,
    pause_ms,
    spent,
    trailing,
)

_REFUSED = frozenset({Means.DENIED, Means.KEY_REFUSED})


@dataclass(slots=True)
class Child:
    """The child of one triggered order, as far as this holder knows it."""

    ref: ChildRef
    parent: Stop  # the outcome where nothing more is to be said of the child
    is_asked: bool = False
    view: ChildView | None = None  # never what Redis tells of earlier holders: that can be forged

    def learn(self, verdict: Verdict) -> None:
        """Keep what an answer told. A cancel's tells no average price: while nothing more was executed it stays."""
        seen, before = verdict.child, self.view
        if seen is None:
            return
        if seen.avg_price is None and before is not None and before.executed_qty == seen.executed_qty:
            seen = replace(seen, avg_price=before.avg_price)
        self.view = seen


@dataclass(frozen=True, slots=True)
class ChildCase:
    """What a decision needs to know of the request; times by Redis' clock, ms since the epoch."""

    cancels: bool  # the child is to be cancelled, not only told of
    deadline_at_ms: int
    retried: bool = False  # an earlier run has ended, whose calls the history lacks
    ahead: Span | None = None  # Redis' clock minus the exchange's, ms; None: not known
    told_to: int = 0  # as in :class:`worker.decide.Case`


def child_step(case: ChildCase, child: Child, history: Sequence[Attempt], policy: Policy, now_ms: int) -> Stop | Again:
    """What a worker does about a child before anything new was heard of it."""
    calls = _calls(history)
    if _is_told(case, child, history, policy):
        return _told(case, child, history, policy)
    last = calls[-1] if calls else None
    if now_ms >= case.deadline_at_ms:
        call = _last_call(case, child, calls)
        return Again(call) if call is not None else bound(child, history, policy, "the deadline passed")
    call = _call_after(case, child, last, now_ms)
    why = spent(history, policy, call)
    return bound(child, history, policy, why) if why else Again(call)


def after_child(
    case: ChildCase,
    child: Child,
    history: Sequence[Attempt],
    verdict: Verdict,
    policy: Policy,
    now_ms: int,
    roll: float,
) -> Stop | Again:
    """What follows the call about a child that ends ``history`` and got ``verdict``, which ``child`` has learned.

    ``roll`` is a random number in [0, 1): the jitter of a delay.
    """
    if (stop := _refused_or_lost(case, child, history, verdict, policy)) is not None:
        return stop
    step = child_step(case, child, history, policy, now_ms)
    if isinstance(step, Stop):
        return step
    delay_ms, left_ms = _delay(case, history, verdict, policy, now_ms, roll), case.deadline_at_ms - now_ms
    if delay_ms >= left_ms:
        if verdict.means in GATED:
            return bound(child, history, policy, "the deadline comes before the next try")
        if left_ms <= 0:
            delay_ms = min(delay_ms, LAST_TRY_MS)
        else:  # within the last second what is done after the deadline comes next
            delay_ms = left_ms - LAST_TRY_MS if left_ms > LAST_TRY_MS else left_ms
    return replace(step, delay_ms=delay_ms, resync=verdict.means is Means.CLOCK)


def _refused_or_lost(
    case: ChildCase, child: Child, history: Sequence[Attempt], verdict: Verdict, policy: Policy
) -> Stop | None:
    if not case.cancels or _is_told(case, child, history, policy):
        return None
    if verdict.means in _REFUSED:
        return _refused(child, history, verdict, policy)
    if _is_lost(history, policy):
        return bound(child, history, policy, "the exchange does not know the child of the triggered order")
    return None


def _calls(history: Sequence[Attempt]) -> list[Attempt]:
    return [attempt for attempt in history if attempt.call in (Call.CANCEL_CHILD, Call.QUERY_CHILD)]


def _is_told(case: ChildCase, child: Child, history: Sequence[Attempt], policy: Policy) -> bool:
    """Whether nothing more is to be asked."""
    view, calls = child.view, _calls(history)
    if view is not None and view.status in CHILD_ENDED:
        is_priced = view.avg_price is not None or not _was_filled(view)
        return is_priced or calls[-1].call is Call.QUERY_CHILD
    if not case.cancels:
        return child.is_asked
    is_in_vain = child.is_asked and (calls[-1].verdict in _REFUSED or _is_lost(history, policy))
    return is_in_vain and _is_surely_over(child, calls)


def _is_surely_over(child: Child, calls: Sequence[Attempt]) -> bool:
    """Whether nothing of it rests though nobody saw its end: the exchange calls a parent finished once its child was
    filled or cancelled. What was seen open is looked at."""
    return child.parent.order_status == Means.FINISHED.name and all(a.verdict != Means.OPEN for a in calls)


def _was_filled(view: ChildView) -> bool:
    return view.executed_qty is None or bool(view.executed_qty.strip("0."))


def _call_after(case: ChildCase, child: Child, last: Attempt | None, now_ms: int) -> Call:
    if not case.cancels or (last is None and _is_surely_over(child, ())):
        return Call.QUERY_CHILD
    if last is None:  # late, there is time for no more than a cancel, and a look whether it worked
        return Call.CANCEL_CHILD if case.deadline_at_ms - now_ms <= LAST_TRY_MS else Call.QUERY_CHILD
    if last.call is Call.CANCEL_CHILD:
        return Call.CANCEL_CHILD if last.verdict in NOT_DONE else Call.QUERY_CHILD
    return Call.CANCEL_CHILD if last.verdict == Means.OPEN else Call.QUERY_CHILD


def _last_call(case: ChildCase, child: Child, calls: Sequence[Attempt]) -> Call | None:
    """What is done after the deadline: a child that was seen late gets one cancel, and a look whether it worked."""
    if not case.cancels:
        return Call.QUERY_CHILD
    if _is_surely_over(child, calls):
        is_asked = any(attempt.at_ms >= case.deadline_at_ms for attempt in calls)
        return None if is_asked else Call.QUERY_CHILD
    cancels = [attempt for attempt in calls if attempt.call is Call.CANCEL_CHILD]
    if not any(attempt.verdict not in NOT_DONE for attempt in cancels):
        return None if any(attempt.at_ms >= case.deadline_at_ms for attempt in cancels) else Call.CANCEL_CHILD
    return Call.QUERY_CHILD if calls[-1].call is Call.CANCEL_CHILD else None


def _told(case: ChildCase, child: Child, history: Sequence[Attempt], policy: Policy) -> Stop:
    view = child.view
    if view is None:
        return child.parent
    return replace(child.parent, child=view, child_cancelled=_by_us(case, view, history, policy))


def _by_us(case: ChildCase, view: ChildView, history: Sequence[Attempt], policy: Policy) -> bool | None:
    if view.status != "CANCELED":
        return False if view.status in CHILD_ENDED else None
    tried = _unsettled(history, policy)
    if any(attempt.call is Call.CANCEL_CHILD and attempt.n > case.told_to for attempt in tried):
        return True
    # Which call a lost worker had made nobody knows, nor whether what Redis tells of earlier holders is true.
    return None if tried or case.retried else False


def _refused(child: Child, history: Sequence[Attempt], verdict: Verdict, policy: Policy) -> Stop:
    said = " ".join(str(part) for part in (verdict.http, verdict.code, verdict.msg) if part not in (None, ""))
    kind = OutcomeKind.UNKNOWN if _unsettled(history, policy) else OutcomeKind.REFUSED
    error = f"the child of the triggered order is not cancelled: {said}"
    return replace(child.parent, kind=kind, child=child.view, error=error)


def bound(child: Child, history: Sequence[Attempt], policy: Policy, why: str) -> Stop:
    """The end of a request that is out of time or of attempts, as one whose child may be live unless it is over."""
    if _is_surely_over(child, _calls(history)):
        return child.parent
    kind = OutcomeKind.UNKNOWN if _unsettled(history, policy) else OutcomeKind.GAVE_UP
    error = f"{why}; the child of the triggered order may be live"
    return replace(child.parent, kind=kind, child=child.view, error=error)


def _may_have_cancelled(attempt: Attempt) -> bool:
    """Whether the call may have taken the child off the book; of some nobody knows which one it was."""
    if attempt.call is Call.CANCEL_CHILD:
        return attempt.verdict in (Means.UNCLEAR, Means.CONFIRMED)
    return attempt.msg in (WORKER_LOST, UNREADABLE) or not isinstance(attempt.call, Call)


def _unsettled(history: Sequence[Attempt], policy: Policy) -> list[Attempt]:
    """The calls that may have cancelled the child, or still may: a look that showed it open, asked for when a call
    could be accepted no more, settles that one."""
    opened = [a.at_ms for a in history if a.call is Call.QUERY_CHILD and a.verdict == Means.OPEN]
    seen_ms = max(opened, default=0)
    tried = [attempt for attempt in history if _may_have_cancelled(attempt)]
    return [a for a in tried if a.verdict == Means.CONFIRMED or accepted_until_ms(a, policy) > seen_ms]


def _is_lost(history: Sequence[Attempt], policy: Policy) -> bool:
    """Whether "no such order" is believed. Just after a trigger it is lag (exchange.md 1.8)."""
    last = history[-1]
    if last.call is not Call.QUERY_CHILD or last.verdict != Means.NO_SUCH_ORDER:
        return False
    first_ms = last.at_ms
    for attempt in reversed(_calls(history)):
        if attempt.verdict == Means.OPEN:
            break
        first_ms = attempt.at_ms if attempt.verdict == Means.NO_SUCH_ORDER else first_ms
    return last.at_ms - first_ms >= policy.not_found_horizon_ms


def _delay(
    case: ChildCase, history: Sequence[Attempt], verdict: Verdict, policy: Policy, now_ms: int, roll: float
) -> int:
    last, means = history[-1], verdict.means
    if means in GATED:
        return pause_ms(verdict, policy, now_ms, case.ahead)
    calls = _calls(history)
    cancels = sum(attempt.call is Call.CANCEL_CHILD for attempt in calls)
    is_quick = sum(attempt.verdict == Means.UNCLEAR for attempt in calls) <= QUICK_DOUBTS
    if means is Means.CLOCK and trailing(history, Means.CLOCK) <= MAX_RESYNCS:
        own_ms = 0
    elif is_quick and is_silence(last):
        own_ms = int(LOOK_UP_WITHIN_MS * roll)
    elif (means is Means.OPEN and not cancels) or (last.call is Call.CANCEL_CHILD and means not in NOT_DONE):
        own_ms = 0
    elif means is Means.OPEN and is_quick and cancels <= QUICK_DOUBTS:
        own_ms = int(DOUBT_PAUSE_MS * (0.5 + roll / 2))
    elif means is Means.OPEN:  # cancels of what does not exist lead to a ban: never at once
        own_ms = backoff_ms(cancels, policy, 0.5 + roll / 2)
    elif means is Means.NO_SUCH_ORDER:
        doublings = min(trailing(history, means), 32)
        own_ms = int(min(TRIGGER_POLL_MS << doublings, policy.backoff_cap_ms) * (0.5 + roll / 2))
    else:
        own_ms = backoff_ms(len(calls), policy, roll)
    return max(own_ms, verdict.retry_after_ms or 0)
