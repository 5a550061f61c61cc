"""What to do next about the child of a triggered order: the order that it became. Decisions as in
:mod:`worker.decide`.

A child is read once and told. Where the request wants it cancelled, it is cancelled until the exchange shows that it
rests no more; then alone the outcome is ``triggered``. Its calls go by the exchange's own order id, so a repeated one
never meets another order, and none of them bears on the parent's doubt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from producer.message import CHILD_ENDED, WORKER_LOST, Attempt, Call, OutcomeKind
from worker.classify import GATED, REFUSED, ChildRef, ChildView, Means, Verdict
from worker.decide import (
    DOUBT_PAUSE_MS,
    LAST_TRY_MS,
    NOT_DONE,
    PASSED,
    QUICK_DOUBTS,
    TOO_LATE,
    UNREADABLE,
    Again,
    Case,
    Policy,
    Stop,
    accepted_until_ms,
    backoff_ms,
    delay_after,
    in_time,
    is_quick,
    polled_ms,
    quick_delay,
    quoted,
    spent,
    trailing,
)

_OF_CHILD = (Call.CANCEL_CHILD, Call.QUERY_CHILD)


@dataclass(slots=True)
class Child:
    """The child of one triggered order, as far as this holder knows it; its :class:`worker.job.Rules`."""

    ref: ChildRef
    parent: Stop  # the outcome where nothing more is to be said of the child
    is_asked: bool = False
    view: ChildView | None = None  # never what Redis tells of earlier holders: that can be forged

    def learn(self, verdict: Verdict) -> None:
        """Keep what an answer told. A cancel's tells no average price: while nothing more was executed it stays."""
        self.is_asked = True
        seen, before = verdict.child, self.view
        if seen is None:
            return
        if seen.avg_price is None and before is not None and before.executed_qty == seen.executed_qty:
            seen = replace(seen, avg_price=before.avg_price)
        self.view = seen

    def first_step(self, case: Case, history: Sequence[Attempt], now_ms: int) -> Stop | Again:
        """See :func:`worker.decide.first_step`."""
        calls = _calls(history)
        if self._is_told(case, history):
            return self._told(case, history)
        if now_ms >= case.deadline_at_ms:
            late = self._late_call(case, calls)
            return Again(late) if late is not None else self.bound(case, history, now_ms, PASSED)
        call = self._call(case, calls, now_ms)
        why = spent(history, case.policy, call)
        return self.bound(case, history, now_ms, why) if why else Again(call)

    def next_step(
        self, case: Case, history: Sequence[Attempt], verdict: Verdict, now_ms: int, roll: float
    ) -> Stop | Again:
        """See :func:`worker.decide.next_step`; the verdict was learned before."""
        if case.cancels_child and not self._is_told(case, history):
            if verdict.means in REFUSED:
                error = f"the child of the triggered order is not cancelled: {quoted(verdict)}"
                return self._failed(case, history, OutcomeKind.REFUSED, error)
            if _is_lost(history, case.policy):
                return self.bound(case, history, now_ms, "the exchange does not know the child of the triggered order")
        step = self.first_step(case, history, now_ms)
        if isinstance(step, Stop):
            return step
        wanted_ms = delay_after(case, verdict, now_ms, _own_delay(case, history, verdict, roll))
        delay_ms = in_time(case, verdict, now_ms, wanted_ms)
        if delay_ms is None and verdict.means in GATED:
            return self.bound(case, history, now_ms, TOO_LATE)
        if delay_ms is None:  # within the last second what is done after the deadline comes next
            left_ms = case.deadline_at_ms - now_ms
            delay_ms = left_ms if left_ms > 0 else min(wanted_ms, LAST_TRY_MS)
        return replace(step, delay_ms=delay_ms, resync=verdict.means is Means.CLOCK)

    def bound(self, case: Case, history: Sequence[Attempt], now_ms: int, why: str) -> Stop:  # noqa: ARG002 - as Rules
        """See :func:`worker.decide.bound`: a child that may be live, unless it is over."""
        if self._is_surely_over(_calls(history)):
            return self.parent
        return self._failed(case, history, OutcomeKind.GAVE_UP, f"{why}; the child of the triggered order may be live")

    def _failed(self, case: Case, history: Sequence[Attempt], kind: OutcomeKind, error: str) -> Stop:
        kind = OutcomeKind.UNKNOWN if _unsettled(history, case.policy) else kind
        return replace(self.parent, kind=kind, child=self.view, error=error)

    def _is_told(self, case: Case, history: Sequence[Attempt]) -> bool:
        """Whether nothing more is to be asked."""
        view, calls = self.view, _calls(history)
        if view is not None and view.status in CHILD_ENDED:
            is_priced = view.avg_price is not None or not _was_filled(view)
            return is_priced or calls[-1].call is Call.QUERY_CHILD
        if not case.cancels_child:
            return self.is_asked
        is_in_vain = self.is_asked and (calls[-1].verdict in REFUSED or _is_lost(history, case.policy))
        return is_in_vain and self._is_surely_over(calls)

    def _told(self, case: Case, history: Sequence[Attempt]) -> Stop:
        if self.view is None:
            return self.parent
        return replace(self.parent, child=self.view, child_cancelled=_by_us(case, self.view, history))

    def _is_surely_over(self, calls: Sequence[Attempt]) -> bool:
        """Whether nothing of it rests though nobody saw its end: the exchange calls a parent finished once its child
        was filled or cancelled. What was seen open is looked at."""
        return self.parent.order_status == Means.FINISHED.name and all(a.verdict != Means.OPEN for a in calls)

    def _call(self, case: Case, calls: Sequence[Attempt], now_ms: int) -> Call:
        if not case.cancels_child or (not calls and self._is_surely_over(())):
            return Call.QUERY_CHILD
        if not calls:  # late, there is time for no more than a cancel, and a look whether it worked
            is_cancelled = case.deadline_at_ms - now_ms <= LAST_TRY_MS
        elif calls[-1].call is Call.CANCEL_CHILD:
            is_cancelled = calls[-1].verdict in NOT_DONE
        else:
            is_cancelled = calls[-1].verdict == Means.OPEN
        return Call.CANCEL_CHILD if is_cancelled else Call.QUERY_CHILD

    def _late_call(self, case: Case, calls: Sequence[Attempt]) -> Call | None:
        """What is done after the deadline: a child that was seen late gets one cancel, and a look whether it worked."""
        if not case.cancels_child:
            return Call.QUERY_CHILD
        is_over = self._is_surely_over(calls)
        cancels = [attempt for attempt in calls if attempt.call is Call.CANCEL_CHILD]
        if is_over or all(attempt.verdict in NOT_DONE for attempt in cancels):
            is_tried = any(attempt.at_ms >= case.deadline_at_ms for attempt in (calls if is_over else cancels))
            call = Call.QUERY_CHILD if is_over else Call.CANCEL_CHILD
            return None if is_tried else call
        is_unseen = self.view is None and not self.is_asked  # by this holder, who is to tell what it is
        return Call.QUERY_CHILD if is_unseen or calls[-1].call is Call.CANCEL_CHILD else None


def _calls(history: Sequence[Attempt]) -> list[Attempt]:
    return [attempt for attempt in history if attempt.call in _OF_CHILD]


def _was_filled(view: ChildView) -> bool:
    return view.executed_qty is None or bool(view.executed_qty.strip("0."))


def _by_us(case: Case, view: ChildView, history: Sequence[Attempt]) -> bool | None:
    if view.status != "CANCELED":
        return False if view.status in CHILD_ENDED else None
    tried = _unsettled(history, case.policy)
    if any(attempt.call is Call.CANCEL_CHILD and attempt.n > case.told_to for attempt in tried):
        return True
    # Which call a lost worker had made nobody knows, nor whether what Redis tells of earlier holders is true.
    return None if tried or case.retried else False


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


def _own_delay(case: Case, history: Sequence[Attempt], verdict: Verdict, roll: float) -> int:
    means, policy, calls = verdict.means, case.policy, _calls(history)
    cancels = sum(attempt.call is Call.CANCEL_CHILD for attempt in calls)
    if (quick_ms := quick_delay(calls, policy, roll)) is not None:
        return quick_ms
    if (means is Means.OPEN and not cancels) or (calls[-1].call is Call.CANCEL_CHILD and means not in NOT_DONE):
        return 0
    if means is Means.OPEN and is_quick(calls) and cancels <= QUICK_DOUBTS:
        return int(DOUBT_PAUSE_MS * (0.5 + roll / 2))
    if means is Means.OPEN:  # cancels of what does not exist lead to a ban: never at once
        return backoff_ms(cancels, policy, 0.5 + roll / 2)
    if means is Means.NO_SUCH_ORDER:
        return polled_ms(trailing(calls, means), policy, roll)
    return backoff_ms(len(calls), policy, roll)
