"""What to do next about one order: pure decisions from the history of its attempts.

:func:`first_step` and :func:`next_step` give :class:`Stop` (with the outcome's kind) or :class:`Again` (with a delay
and the call to make). Nothing here reads a clock, draws a random number, or talks to anybody: time and chance are
arguments, so that every decision can be replayed from the attempts that an outcome records. :mod:`worker.listing` and
:mod:`worker.child` decide about other questions by functions of the same names.

The rule above all others: whether the exchange can have *seen* a cancel is asked before whether to try again. An
attempt that may have worked stays in doubt until a query settles it; no later refusal does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import NamedTuple

from producer.message import Attempt, Call, OutcomeKind
from producer.untrusted import clean_text
from worker.classify import GATED, REFUSED, SILENCE, STATUS_MEANS, ChildView, Means, OrderView, Verdict, child_of

#: A cancel by client id alone is sent without a look-up only this soon after the request was made, ms: before anybody
#: has learned that the order is gone, and opened another one under its id.
BLIND_CANCEL_MS = 100
#: Clock refusals in a row that are answered at once, by a fresh clock and signature.
MAX_RESYNCS = 3
#: First wait before an order that is just being triggered is looked at again, ms: a trigger takes about ten.
TRIGGER_POLL_MS = 10
#: So many answers without the id of its child end the waiting for it where nothing hangs on the child.
MAX_CHILD_POLLS = 5
#: How long after a silence the order is looked up, ms, by chance up to this: whoever met the same silence asks, too.
LOOK_UP_WITHIN_MS = 20
#: The longest pause before an order that is open after an unclear cancel is cancelled again, ms; at least half of it.
DOUBT_PAUSE_MS = 30
#: So many unclear answers are followed by these short pauses; what was waited for answers doubles, and then backs off.
QUICK_DOUBTS = 2
#: The last try starts at least this long before the deadline, ms, so that there is time for its answer.
LAST_TRY_MS = 1000
#: How far ahead of the exchange's clock a timestamp may be, ms (exchange.md 2).
AHEAD_MS = 1000
#: Pauses where the exchange names none, ms: after 429, and after 418 (its shortest ban is two minutes).
LIMIT_PAUSE_MS = 10_000
BAN_PAUSE_MS = 120_000
#: No pause is shorter, ms: one of nothing would ask a closed exchange again and again. After a 451 it is the pause: it
#: names no end, lasts for ever or for moments, and is worth one look a second.
LEAST_PAUSE_MS = 1_000
#: No pause is longer, ms, whatever an answer says: the longest ban is three days (exchange.md 3).
MAX_PAUSE_MS = 3 * 24 * 3600 * 1000
#: Attempts that a history keeps at the most (:func:`bounded`); with the longest texts a third of what can be read back.
MAX_HISTORY = 200
#: So many of the newest are kept without a gap: more than any delay looks back.
_TAIL = 40
_MAX_NAME_CHARS = 64
#: What the one attempt says that stands for a history that cannot be read.
UNREADABLE = "the recorded attempts cannot be read"

#: Answers by which the order has left its client id to whoever wants it.
_FREES_CLIENT_ID = frozenset(
    {Means.CONFIRMED, Means.CANCELED, Means.TRIGGERED, Means.FINISHED, Means.EXPIRED, Means.REJECTED}
)
_MEANS_STATUS = {means.value: status for status, means in STATUS_MEANS.items()}
#: States in which the order has become another one, the child.
_BECAME_ANOTHER = frozenset({Means.TRIGGERED.name, Means.FINISHED.name})
#: Cleanly not done, whatever the call.
NOT_DONE = GATED | {Means.BUSY, Means.CLOCK, Means.NOT_SENT}
#: After these answers to a cancel the order's state must be read before anything else is tried.
_ASK_AFTER = frozenset({Means.UNCLEAR, Means.NO_SUCH_ORDER, Means.TRIGGER_RACE, Means.CONFIRMED}) | REFUSED


@dataclass(frozen=True, slots=True)
class Policy:
    """The bounds of a request, from the worker's settings."""

    max_attempts: int = 200  # more than the default deadline has time for
    backoff_base_ms: int = 100
    backoff_cap_ms: int = 15_000
    not_found_horizon_ms: int = 10_000
    recv_window_ms: int = 5_000
    waf_pause_ms: int = 300_000


class Span(NamedTuple):
    """Least and greatest value of something that is not known exactly, both possible."""

    lo: int
    hi: int


@dataclass(frozen=True, slots=True)
class Case:
    """What a decision needs to know of the request; times by Redis' clock, ms since the epoch."""

    by_client_id: bool  # only a client id is known: nothing pinned it to an algo id yet
    meant_at_ms: int  # when the request was first made: an order created later is not meant
    deadline_at_ms: int
    policy: Policy = Policy()
    ahead: Span | None = None  # Redis' clock minus the exchange's, ms; None: not known
    retried: bool = False  # an earlier run has ended, whose calls the history lacks
    sends_late: bool = False  # a call may leave later than it was decided
    strikes_until_ms: int = 0  # until then a cancel by client id that got no clear answer may meet the id's next order
    cancels_child: bool = False  # what the order becomes by triggering is to be cancelled, too
    told_to: int = 0  # up to this attempt Redis tells what earlier holders did: no outcome rests on that alone


@dataclass(frozen=True, slots=True)
class Stop:
    """The request is over."""

    kind: OutcomeKind
    order_status: str | None = None
    actual_order_id: str | None = None
    error: str | None = None
    is_left_alone: bool = False  # the order that the client id means now is not the one that was meant
    child: ChildView | None = None  # the order that it became, as far as an answer told
    child_cancelled: bool | None = None  # see producer.message.Outcome
    orders: tuple[OrderView, ...] | None = None  # of a listing: those that were open when it was asked for
    left_alone: tuple[int, ...] = ()  # ... and those of which that cannot be told


@dataclass(frozen=True, slots=True)
class Again:
    """Make ``call`` in ``delay_ms``; ``resync``: with the exchange's clock measured anew before."""

    call: Call
    delay_ms: int = 0
    resync: bool = False


PASSED, TOO_LATE = "the deadline passed", "the deadline comes before the next try"


def first_step(case: Case, history: Sequence[Attempt], now_ms: int) -> Stop | Again:
    """What a worker does with a request that it was just given: nothing was sent yet, or a retry is due.

    Also what it does with a step that had to wait: it is decided anew. ``now_ms`` is the latest that Redis' clock can
    show, here and elsewhere: a request by client id must never be taken for a younger one than it is.
    """
    if now_ms >= case.deadline_at_ms:
        return Again(Call.QUERY) if _may_look_again(case, history) else bound(case, history, now_ms, PASSED)
    call = call_for(case, history, now_ms)
    why = spent(history, case.policy, call)
    return bound(case, history, now_ms, why) if why else Again(call)


def next_step(case: Case, history: Sequence[Attempt], verdict: Verdict, now_ms: int, roll: float) -> Stop | Again:
    """What follows the attempt that ends ``history`` and got ``verdict``.

    ``roll`` is a random number in [0, 1): the jitter of a delay. The delay never ends at or past the deadline.
    """
    stop = _final(case, history, verdict, now_ms)
    if stop is not None:
        return stop
    if verdict.order is not None:
        case = replace(case, by_client_id=False)  # the answer told the algo id, and the caller pins it
    if now_ms >= case.deadline_at_ms:
        return bound(case, history, now_ms, PASSED)
    wanted_ms = delay_after(case, verdict, now_ms, _own_delay(case, history, verdict, now_ms, roll))
    if why := spent(history, case.policy, call_for(case, history, now_ms + wanted_ms)):
        return bound(case, history, now_ms, why)
    delay_ms = in_time(case, verdict, now_ms, wanted_ms)
    if delay_ms is None:
        return bound(case, history, now_ms, TOO_LATE)
    return Again(call_for(case, history, now_ms + delay_ms), delay_ms, resync=verdict.means is Means.CLOCK)


def delay_after(case: Case, verdict: Verdict, now_ms: int, own_ms: int) -> int:
    """How long to wait after an answer, ms: ``own_ms``, unless the exchange asks for another time."""
    if verdict.means in GATED:
        return pause_ms(verdict, case.policy, now_ms, case.ahead)
    return max(own_ms, verdict.retry_after_ms or 0)


def in_time(case: Case, verdict: Verdict, now_ms: int, delay_ms: int) -> int | None:
    """A delay, or what of it leaves time for a last try before the deadline; None: there is no time, or nothing may be
    sent before."""
    left_ms = case.deadline_at_ms - now_ms
    if delay_ms < left_ms:
        return delay_ms
    return None if verdict.means in GATED or left_ms <= LAST_TRY_MS else left_ms - LAST_TRY_MS


def call_for(case: Case, history: Sequence[Attempt], at_ms: int) -> Call:
    """Which call comes next at ``at_ms``: a query wherever a cancel would be a guess."""
    if history and _asks(history[-1]):
        return Call.CANCEL if _wants_last_word(case, history, at_ms) else Call.QUERY
    # Whatever was sent before, even what was refused, took time in which the id can have changed hands. A clock that
    # shows a time before the request was set back, and tells nothing.
    is_first = not (history or case.retried or case.sends_late)
    is_fresh = is_first and 0 <= at_ms - case.meant_at_ms <= BLIND_CANCEL_MS
    return Call.CANCEL if is_fresh or not case.by_client_id else Call.QUERY


def _may_look_again(case: Case, history: Sequence[Attempt]) -> bool:
    """Whether a triggered order is asked for once more after the deadline: one that Redis alone tells of, or whose
    child is to be cancelled: :mod:`worker.child` ends what is begun, and tells which order may be live."""
    seen = _last_seen(history)
    if seen is None or _status(seen) not in _BECAME_ANOTHER or not (case.cancels_child or seen.n <= case.told_to):
        return False
    return not any(a.call is Call.QUERY and a.at_ms >= case.deadline_at_ms for a in history)


def _asks(last: Attempt) -> bool:
    """Whether the last attempt was a question that got no answer for good, or left one to ask."""
    if last.call is Call.CANCEL:
        return last.verdict in _ASK_AFTER
    return not (last.call is Call.QUERY and last.verdict == Means.OPEN)


def _wants_last_word(case: Case, history: Sequence[Attempt], at_ms: int) -> bool:
    """Whether "no such order" would be believed now, but for one more cancel.

    Where the book is late, an order that cancels and queries have missed can be cancelled all the same. It is asked
    once, and by algo id alone: that never means another order, and cancels of what does not exist lead to a ban.
    """
    first = _first_missed(history)
    if first is None or case.by_client_id or not _misses(history[-1]) or at_ms >= case.deadline_at_ms:
        return False
    is_due = at_ms >= _horizon_ends(history, case.policy, at_ms)
    is_asked = any(attempt.call is Call.CANCEL for attempt in history[first + 1 :])
    return is_due and not is_asked and not spent(history, case.policy, Call.CANCEL)


def doubts(history: Sequence[Attempt], policy: Policy) -> list[Attempt]:
    """The cancels that may have worked, or may still work, without a query having settled it; those of a child are
    :mod:`worker.child`'s.

    A query that shows the order open settles only those cancels whose time window had closed when it was asked: no
    request is newly accepted once its timestamp is older than recvWindow (exchange.md 4.4).
    """
    open_at_ms = max((a.at_ms for a in history if _shows_state(a) and a.verdict == Means.OPEN), default=None)
    return [
        attempt
        for attempt in history
        if _may_have_worked(attempt) and (open_at_ms is None or accepted_until_ms(attempt, policy) > open_at_ms)
    ]


def accepted_until_ms(attempt: Attempt, policy: Policy) -> int:
    """From when on, by Redis' clock, the exchange accepts the request no more, as far as the record alone tells."""
    return attempt.at_ms + attempt.ms + policy.recv_window_ms + AHEAD_MS


def is_silence(attempt: Attempt) -> bool:
    """Whether the request left, or may have left, and nothing at all came back for as long as was waited."""
    return attempt.verdict == Means.UNCLEAR and attempt.http is None and attempt.msg == SILENCE


def looks_up_a_silence(history: Sequence[Attempt]) -> bool:
    """Whether the query that comes next is asked only because nothing came back."""
    return bool(history) and is_silence(history[-1])


def _may_have_worked(attempt: Attempt) -> bool:
    return attempt.call is Call.CANCEL and attempt.verdict == Means.UNCLEAR


def _shows_state(attempt: Attempt) -> bool:
    """Whether it told the order's state; a call that this version does not know may have been about another order."""
    return attempt.call is Call.QUERY and (attempt.verdict in _MEANS_STATUS or attempt.verdict == Means.ODD_STATUS)


def counted(history: Sequence[Attempt]) -> int:
    """How many attempts count against the bound: those that were answered about the order or may have been carried out.

    What was cleanly not done does no harm, and the deadline alone bounds it. A repeated "no such order" has a bound of
    its own, the horizon.
    """
    return _counts(history)[-1]


def _counts(history: Sequence[Attempt]) -> list[int]:
    """How many count before each attempt, and in all."""
    counts, total = list[int](), 0
    for attempt in history:
        total = total if attempt.counted_before is None else attempt.counted_before
        counts.append(total)
        is_repeat = attempt.verdict == Means.NO_SUCH_ORDER and attempt.call in (Call.QUERY, Call.QUERY_CHILD)
        total += attempt.verdict not in NOT_DONE and not is_repeat
    return [*counts, total]


def last_status(history: Sequence[Attempt]) -> str | None:
    """The order's state as last seen by a query, in the exchange's spelling."""
    seen = _last_seen(history)
    return None if seen is None else _status(seen)


def _status(seen: Attempt) -> str:
    return _MEANS_STATUS.get(seen.verdict, seen.msg)


def _last_seen(history: Sequence[Attempt]) -> Attempt | None:
    return next((attempt for attempt in reversed(history) if _shows_state(attempt)), None)


def _final(case: Case, history: Sequence[Attempt], verdict: Verdict, now_ms: int) -> Stop | None:
    means, order = verdict.means, verdict.order
    is_found = case.by_client_id and means is not Means.CONFIRMED
    if order is not None and is_found and (doubt := _why_not_meant(case, order)):
        return Stop(OutcomeKind.UNKNOWN, error=f"{doubt}: left alone", is_left_alone=True)
    if means in _FREES_CLIENT_ID:
        if now_ms < case.strikes_until_ms or _awaits_child(case, history, verdict, now_ms):
            return None
        return _off_the_book(case, history, verdict)
    if means in REFUSED or means is Means.NO_SUCH_ORDER:
        return _unless_in_doubt(case, history, verdict, now_ms)
    return None


def _awaits_child(case: Case, history: Sequence[Attempt], verdict: Verdict, now_ms: int) -> bool:
    """Whether the exchange has still to tell which order a triggered one became. It may be late (exchange.md 1.8)."""
    if verdict.msg not in _BECAME_ANOTHER or child_of(verdict.order) is not None or now_ms >= case.deadline_at_ms:
        return False
    is_bound = verdict.means is Means.FINISHED or not case.cancels_child  # nothing of it rests, or nobody hangs on it
    return not is_bound or trailing(history, verdict.means) <= MAX_CHILD_POLLS


def _off_the_book(case: Case, history: Sequence[Attempt], verdict: Verdict) -> Stop:
    means, order = verdict.means, verdict.order
    if means is Means.CONFIRMED:
        return Stop(OutcomeKind.CANCELLED, "CANCELED")
    if means is Means.CANCELED:
        ours = any(_may_have_worked(attempt) or attempt.verdict == Means.CONFIRMED for attempt in history)
        return Stop(OutcomeKind.CANCELLED if ours else OutcomeKind.ALREADY_CANCELLED, "CANCELED")
    if means in (Means.TRIGGERED, Means.FINISHED):
        is_unproven = case.cancels_child and means is Means.TRIGGERED and child_of(order) is None
        if is_unproven:
            return Stop(OutcomeKind.GAVE_UP, verdict.msg, error="the exchange named no child of the triggered order")
        return Stop(OutcomeKind.TRIGGERED, verdict.msg, order.actual_order_id if order else None)
    return Stop(OutcomeKind.EXPIRED if means is Means.EXPIRED else OutcomeKind.REJECTED, verdict.msg)


def _unless_in_doubt(case: Case, history: Sequence[Attempt], verdict: Verdict, now_ms: int) -> Stop | None:
    """The end by a refusal, or by "no such order" that is believed. One silence must not make it ``unknown`` for good.

    A silence is settled by its late answer, or by what is said when it cannot strike any more: the exchange would show
    an order that was cancelled, and refused the silent call as it does this one. An answer that left it open is not.
    """
    policy = case.policy
    if verdict.means in REFUSED:
        kind, said = OutcomeKind.REFUSED, "refused"
    elif now_ms < _horizon_ends(history, policy, now_ms) or _wants_last_word(case, history, now_ms):
        return None
    else:
        kind, said = OutcomeKind.NOT_FOUND, "unknown to the exchange"
    if silent_until_ms(history, policy) > history[-1].at_ms:
        return None
    is_certain = all(map(is_silence, doubts(history, policy)))
    return Stop(kind if is_certain else OutcomeKind.UNKNOWN, last_status(history), error=f"{said}: {quoted(verdict)}")


def silent_until_ms(history: Sequence[Attempt], policy: Policy) -> int:
    """Until when a silent cancel may still be accepted; 0 where there is none, or the doubt has other reasons too."""
    in_doubt = doubts(history, policy)
    if not all(map(is_silence, in_doubt)):
        return 0
    return max((accepted_until_ms(attempt, policy) for attempt in in_doubt), default=0)


def _why_not_meant(case: Case, order: OrderView) -> str:
    """Why an order that bears the client id may not be the one that was meant; empty: it was there at the request."""
    created_ms, ahead = order.create_time_ms, case.ahead
    untold = "it cannot be told whether the client id's order was created before the request"
    if created_ms is None:
        return f"{untold}: it has no time of creation"
    if ahead is None:
        return f"{untold}: the clocks are not measured"
    if (is_older := was_before(created_ms, ahead, case.meant_at_ms)) is not None:
        return "" if is_older else "the client id belongs to an order created after the request"
    return f"{untold}: the clocks are known to {ahead.hi - ahead.lo} ms"


def was_before(created_ms: int | None, ahead: Span, at_ms: int) -> bool | None:
    """Whether an order that the exchange's clock dates was there at a moment of Redis' clock; None: not to be told."""
    if created_ms is None:
        return None
    if created_ms + ahead.hi <= at_ms:
        return True
    return False if created_ms + ahead.lo > at_ms else None


def _horizon_ends(history: Sequence[Attempt], policy: Policy, now_ms: int) -> int:
    """When "no such order" is believed: a horizon after its first time, but never on a cancel's word alone."""
    if history[-1].call is Call.CANCEL:
        return now_ms + 1
    first = _first_missed(history)
    return history[-1 if first is None else first].at_ms + policy.not_found_horizon_ms


def _first_missed(history: Sequence[Attempt]) -> int | None:
    """Where the first "no such order" stands since the order's state was last seen."""
    first = None
    for at in reversed(range(len(history))):
        if _shows_state(history[at]):
            break
        if _misses(history[at]):
            first = at
    return first


def _misses(attempt: Attempt) -> bool:
    return attempt.verdict == Means.NO_SUCH_ORDER and attempt.call in (Call.CANCEL, Call.QUERY)


def spent(history: Sequence[Attempt], policy: Policy, call: Call) -> str:
    """Why no further ``call`` may be made, empty if one may: the bound on attempts. The last one is kept for the query
    that tells what the cancels before it did."""
    used = counted(history)
    spare = 1 if call.cancels and used > 0 else 0
    return f"{used} counted attempts were made" if used + spare >= policy.max_attempts else ""


def bound(case: Case, history: Sequence[Attempt], now_ms: int, why: str) -> Stop:
    """The end of a request that is out of time or of attempts."""
    seen = _last_seen(history)
    status = None if seen is None else _status(seen)
    is_ours = seen is not None and seen.n > case.told_to
    # What an order has become is told, even where the exchange never said which one it is.
    if status in _BECAME_ANOTHER and is_ours and not case.cancels_child and now_ms >= case.strikes_until_ms:
        return Stop(OutcomeKind.TRIGGERED, status)
    of_child = any(a.call is Call.CANCEL_CHILD and a.verdict == Means.UNCLEAR for a in history)
    kind = OutcomeKind.UNKNOWN if of_child or doubts(history, case.policy) else OutcomeKind.GAVE_UP
    return unfinished(history, kind, status, why)


def unfinished(history: Sequence[Attempt], kind: OutcomeKind, status: str | None, why: str) -> Stop:
    """The end of a request that is overdue if nothing was tried; else ``why`` is said, and what was answered last."""
    if not history:
        return Stop(OutcomeKind.OVERDUE, error="the deadline passed before anything was sent")
    return Stop(kind, status, error=f"{why}; last: {history[-1].verdict} {history[-1].msg}".rstrip())


def _own_delay(case: Case, history: Sequence[Attempt], verdict: Verdict, now_ms: int, roll: float) -> int:
    means, call, policy = verdict.means, history[-1].call, case.policy
    if means in _FREES_CLIENT_ID and now_ms < case.strikes_until_ms:
        return case.strikes_until_ms - now_ms
    if means in REFUSED:
        return max(silent_until_ms(history, policy) - now_ms, 0)
    if (quick_ms := quick_delay(history, policy, roll)) is not None:
        return quick_ms
    if is_quick(history) and means is Means.OPEN and len(history) > 1 and history[-2].verdict == Means.UNCLEAR:
        return min(int(DOUBT_PAUSE_MS * (0.5 + roll / 2)), policy.backoff_cap_ms)
    if call is Call.CANCEL and means in (Means.UNCLEAR, Means.NO_SUCH_ORDER):
        return 0
    if means is Means.OPEN and not any(a.call is Call.CANCEL for a in history):
        return 0
    if means is Means.TRIGGER_RACE:
        return polled_ms(0, policy, roll)
    if means in (Means.TRIGGERING, Means.TRIGGERED, Means.FINISHED):
        return polled_ms(trailing(history, means), policy, roll)
    delay_ms = backoff_ms(len(history), policy, roll)
    if means is Means.NO_SUCH_ORDER:  # one more look just when it would be believed
        believed_ms = max(_horizon_ends(history, policy, now_ms), silent_until_ms(history, policy))
        return min(delay_ms, max(believed_ms - now_ms, 0))
    return delay_ms


def _lately(calls: Sequence[Attempt], means: Means) -> int:
    """How many of the latest calls got this verdict."""
    return sum(attempt.verdict == means for attempt in calls[-_TAIL:])


def is_quick(calls: Sequence[Attempt]) -> bool:
    """Whether so few of the latest calls were unclear that a short pause follows them."""
    return _lately(calls, Means.UNCLEAR) <= QUICK_DOUBTS


def quick_delay(calls: Sequence[Attempt], policy: Policy, roll: float) -> int | None:
    """How long to wait where our clock was refused, or nothing came back, ms; None: neither, or too often."""
    if calls[-1].verdict == Means.CLOCK and _lately(calls, Means.CLOCK) <= MAX_RESYNCS:
        return 0
    if is_silence(calls[-1]) and is_quick(calls):  # others may have met it too
        return min(int(LOOK_UP_WITHIN_MS * roll), policy.backoff_cap_ms)
    return None


def polled_ms(times: int, policy: Policy, roll: float) -> int:
    """How long to wait before what triggers is looked at again that was looked at so often, ms."""
    return int(min(TRIGGER_POLL_MS << min(times, 32), policy.backoff_cap_ms) * (0.5 + roll / 2))


def pause_ms(verdict: Verdict, policy: Policy, now_ms: int, ahead: Span | None) -> int:
    """How long nobody on this address may send, ms from ``now_ms``, after a gated verdict.

    ``now_ms`` and ``ahead`` as in :class:`Case`. While ``ahead`` is not known, a ban's end, which the exchange tells by
    its own clock, can make a pause longer than it is without, and never shorter.
    """
    if verdict.means is Means.BLOCKED:
        return max(verdict.retry_after_ms or 0, LEAST_PAUSE_MS) if verdict.http == 451 else policy.waf_pause_ms
    asked_ms, until_ms = verdict.retry_after_ms, verdict.banned_until_ms
    if asked_ms is None and (until_ms is None or ahead is None):
        asked_ms = BAN_PAUSE_MS if verdict.http == 418 else LIMIT_PAUSE_MS
    if until_ms is not None:
        asked_ms = max(asked_ms or 0, until_ms + (0 if ahead is None else ahead.hi) - now_ms)
    return min(max(asked_ms or 0, LEAST_PAUSE_MS), MAX_PAUSE_MS)


def backoff_ms(attempts: int, policy: Policy, roll: float) -> int:
    """Exponential backoff with full jitter after ``attempts`` (1 or more), ms: uniform from 0 to the doubled base."""
    ceiling = min(policy.backoff_base_ms << min(attempts - 1, 32), policy.backoff_cap_ms)
    return int(ceiling * roll)


def trailing(history: Sequence[Attempt], means: Means) -> int:
    """How many of the latest attempts in a row got this verdict."""
    return sum(1 for _ in takewhile(lambda attempt: attempt.verdict == means, reversed(history)))


def quoted(verdict: Verdict) -> str:
    """What an answer said, with status and code."""
    return " ".join(str(part) for part in (verdict.http, verdict.code, verdict.msg) if part not in (None, ""))


# ---- the history as it is kept --------------------------------------------------------------------------------------


def unread(now_ms: int) -> list[Attempt]:
    """What stands for a history that is larger than any that is written: it may have held a cancel that worked.
    ``now_ms`` is the latest that Redis' clock can show."""
    return [Attempt(1, now_ms, Call.CANCEL, None, None, UNREADABLE, Means.UNCLEAR.value, 0)]


def as_known(history: Sequence[Attempt]) -> list[Attempt]:
    """A history out of Redis as this version knows it: a verdict of a newer worker's is read as unclear, and no text is
    longer than a record's."""
    return [
        replace(
            attempt,
            call=attempt.call if isinstance(attempt.call, Call) else clean_text(attempt.call, _MAX_NAME_CHARS),
            msg=clean_text(attempt.msg),
            verdict=attempt.verdict if attempt.verdict in _KNOWN else Means.UNCLEAR.value,
        )
        for attempt in history
    ]


_KNOWN = frozenset(means.value for means in Means)


def next_number(history: Sequence[Attempt]) -> int:
    """The number of the attempt that follows; in a bounded history there are fewer attempts than numbers."""
    return max((attempt.n for attempt in history), default=0) + 1


def bounded(history: Sequence[Attempt]) -> list[Attempt]:
    """The history as it is kept: at most :data:`MAX_HISTORY` attempts.

    Every decision is the same by it as by the whole, now and after further attempts. The first, the newest and the
    unclear attempts stay (of too many unclear ones the oldest go); what is left out leaves a gap in the numbers.
    """
    whole = list(history)
    if len(whole) <= MAX_HISTORY:
        return whole
    kept = _needed(whole)
    rest = [at for at in reversed(range(len(whole))) if at not in kept]
    rest.sort(key=lambda at: whole[at].verdict != Means.UNCLEAR)  # stable: the newest first among each
    kept.update(rest[: MAX_HISTORY - len(kept)])
    told_at = len(whole) - _TAIL
    before = {told_at: _counts(whole)[told_at]}
    return [
        replace(attempt, counted_before=before.get(at)) if at <= told_at else attempt
        for at, attempt in enumerate(whole)
        if at in kept
    ]


def _needed(history: Sequence[Attempt]) -> set[int]:
    """Where the attempts stand without which a decision could be another one."""
    places = range(len(history))
    unclear = [at for at in places if _may_have_worked(history[at])]
    answered = [at for at in unclear if not is_silence(history[at])]
    opened = [at for at in places if history[at].call is Call.QUERY and history[at].verdict == Means.OPEN]
    found = (
        0,
        next((at for at in places if history[at].call is Call.CANCEL), None),
        next((at for at in reversed(places) if history[at].call is Call.CANCEL), None),
        next((at for at in reversed(places) if _shows_state(history[at])), None),
        next((at for at in places if history[at].verdict == Means.CONFIRMED), None),
        next((at for at in reversed(places) if history[at].call is Call.CANCEL_CHILD), None),
        next((at for at in places if history[at].call is Call.QUERY_CHILD), None),
        _first_missed(history),
        # the last to lose their doubt, of all and of those that are no silence,
        *(max(some, key=lambda at: history[at].at_ms + history[at].ms, default=None) for some in (unclear, answered)),
        max(opened, key=lambda at: history[at].at_ms, default=None),  # what takes it
    )
    return {at for at in found if at is not None} | set(places[-_TAIL:])
