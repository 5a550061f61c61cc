"""What holds for any history: requests played through with random answers, times and chances on a fake clock."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from hypothesis import given
from hypothesis import strategies as st

from producer.message import Attempt, Call, OutcomeKind, decode_attempts, encode_attempts
from tests.decisions import (
    ALGO_ID,
    BAD_KEY,
    BAD_PARAM,
    CANCELED,
    CLIENT_ID,
    ENGINE_CLOCK,
    EXPIRED,
    FORBIDDEN,
    GATEWAY,
    GONE,
    LATE_CLOCK,
    NEW,
    NO_CONNECTION,
    NO_PATH,
    NOT_THERE,
    ODD,
    OK,
    RACE,
    REGION,
    REJECTED,
    SILENT,
    T0,
    TIMEOUT,
    TRIGGERING,
    Answer,
    refusal,
    state,
)
from tests.examples import examples
from worker.classify import GATED, SILENCE, Means, OrderRef, Verdict, child_of, classify
from worker.decide import (
    BLIND_CANCEL_MS,
    LAST_TRY_MS,
    MAX_RESYNCS,
    NOT_DONE,
    Again,
    Case,
    Policy,
    Span,
    Stop,
    counted,
    first_step,
    next_step,
    pause_ms,
    silent_until_ms,
)

PROFILE = examples(30)
_T = TypeVar("_T")

#: How long after its timestamp a cancel can still be accepted, and how far ahead that may have been, ms.
STRIKE_MS = 5_000 + 1_000
#: In some runs a cancel by client id may meet the id's next order until so long after the start, ms.
STRIKES_UNTIL_MS = 400
#: Against a loop that never ends; bounds of attempts and time end every run long before.
MAX_CALLS = 3_000


#: What either call may be answered with; those that end nothing stand first, because shrinking prefers them.
_EITHER: tuple[Answer, ...] = (
    *(refusal(503, -1008, retry_after_ms=2_500), NO_PATH, REGION, NO_CONNECTION, TIMEOUT, SILENT),
    *(LATE_CLOCK, ENGINE_CLOCK, refusal(429, -1003, retry_after_ms=1_000)),
    *(refusal(418, -1003, f"banned until {T0 + 20_000}", retry_after_ms=500), GATEWAY, BAD_KEY, BAD_PARAM),
)
_TO_A_CANCEL = (GONE, RACE, *_EITHER, OK)
_TO_A_QUERY = (
    *(NOT_THERE, NEW, TRIGGERING, ODD, *_EITHER, FORBIDDEN),
    *(CANCELED, state("TRIGGERED"), state("FINISHED"), EXPIRED, REJECTED, state("NEW", created_ms=T0 + 60_000)),
)


@dataclasses.dataclass(frozen=True)
class Moment:
    """What the world does about one call, and when the next one starts."""

    to_a_cancel: Answer
    to_a_query: Answer
    took_ms: int
    roll: float
    late_ms: int  # how much later than planned somebody comes back to the request; 0: the same worker, at once


@dataclasses.dataclass(frozen=True)
class Turn:
    """One call, its verdict, and what was decided then."""

    case: Case
    call: Call
    sent_ms: int
    history: tuple[Attempt, ...]  # up to and with this call
    verdict: Verdict
    now_ms: int
    roll: float
    step: Stop | Again


@dataclasses.dataclass(frozen=True)
class Run:
    """One request from its first step to its outcome."""

    case: Case
    turns: tuple[Turn, ...]
    stop: Stop
    ended_ms: int

    @property
    def policy(self) -> Policy:
        """Its bounds."""
        return self.case.policy

    @property
    def history(self) -> tuple[Attempt, ...]:
        """Every attempt made."""
        return self.turns[-1].history if self.turns else ()

    @property
    def unclear_cancels(self) -> list[Attempt]:
        """Cancels that may have worked."""
        return [a for a in self.history if a.call is Call.CANCEL and a.verdict == "unclear"]


def _play(case: Case, moments: list[Moment], start_ms: int) -> Run:
    first, now_ms, turns, history = case, start_ms, list[Turn](), list[Attempt]()
    step = first_step(case, (), now_ms)
    while isinstance(step, Again):
        assert len(turns) < MAX_CALLS, "it does not end"
        moment, call, sent_ms = moments[len(turns) % len(moments)], step.call, now_ms
        ref = OrderRef(None, CLIENT_ID) if case.by_client_id else OrderRef(ALGO_ID)
        verdict = classify(call, ref, moment.to_a_cancel if call is Call.CANCEL else moment.to_a_query)
        means, n = verdict.means.value, len(history) + 1
        history.append(Attempt(n, sent_ms, call, verdict.http, verdict.code, verdict.msg, means, moment.took_ms))
        now_ms += moment.took_ms
        step = next_step(case, history, verdict, now_ms, moment.roll)
        turns.append(Turn(case, call, sent_ms, tuple(history), verdict, now_ms, moment.roll, step))
        if isinstance(step, Again):
            now_ms += step.delay_ms + moment.late_ms
            if verdict.order is not None:
                case = dataclasses.replace(case, by_client_id=False)
            if moment.late_ms:
                step = first_step(case, history, now_ms)
    return Run(first, tuple(turns), step, now_ms)


def _case(chance: bytes) -> Case:
    ahead = _one_of((Span(0, 0), Span(-3, 40), Span(-70_000, 70_000), None), chance[0] >> 1)
    strikes_ms = T0 + STRIKES_UNTIL_MS if chance[1] >= 200 else 0
    deadline_ms = T0 + _one_of((30_000, 1, 900, 5_000, 120_000), chance[1])
    policy = Policy(
        max_attempts=1 + chance[2] % 12,
        backoff_base_ms=_one_of((100, 1, 4_000), chance[3]),
        backoff_cap_ms=_one_of((15_000, 1_000), chance[4]),
        not_found_horizon_ms=_one_of((2_000, 0, 10_000), chance[5]),
        waf_pause_ms=9_000,
    )
    return Case(bool(chance[0] % 2), T0, deadline_ms, policy, ahead, strikes_until_ms=strikes_ms)


def _moment(chance: bytes) -> Moment:
    return Moment(
        to_a_cancel=_one_of(_TO_A_CANCEL, chance[0]),
        to_a_query=_one_of(_TO_A_QUERY, chance[1]),
        took_ms=_one_of((50, 5, 700, 4_000), chance[2] >> 4),
        roll=_one_of((0.5, 0.0, 0.999), chance[2] & 15),
        late_ms=_one_of((0, 0, 20, 1_500, 40_000), chance[3]),
    )


def _run(chance: bytes) -> Run:
    """A run by chance. It is read from one string of bytes, because drawing every choice takes ten times as long."""
    moments = [_moment(chance[at : at + 4]) for at in range(8, len(chance) - 3, 4)]
    return _play(_case(chance), moments, _one_of((T0, T0 + 1_500, T0 + 99), chance[6]))


def _one_of(options: Sequence[_T], chance: int) -> _T:
    return options[chance % len(options)]


RUNS = st.binary(min_size=20, max_size=40).map(_run)


def any_run(test: Callable[[Run], None]) -> Callable[[], None]:
    """Let a rule be tried on runs by chance, the same ones each time."""
    return PROFILE(given(RUNS)(test))


def _planned(run: Run) -> Iterator[tuple[Turn, Again]]:
    """Every decision to go on, with the turn that led to it."""
    return ((turn, turn.step) for turn in run.turns if isinstance(turn.step, Again))


# ---- the runs below are worth something: they reach every end -------------------------------------------------------


def test_the_runs_reach_every_kind() -> None:
    """No rule here holds only because its case never comes up."""
    chance = random.Random(7)
    ends = set(OutcomeKind) - {OutcomeKind.LISTED}  # that one is about many orders
    assert {_run(chance.randbytes(40)).stop.kind for _ in range(600)} == ends


# ---- bounds ---------------------------------------------------------------------------------------------------------


@any_run
def test_it_ends_within_its_bounds(run: Run) -> None:
    """Counted attempts stay within their bound, and nothing is sent at or after the deadline."""
    assert counted(run.history) <= run.policy.max_attempts
    assert all(turn.sent_ms < run.case.deadline_at_ms for turn in run.turns)


@any_run
def test_no_delay_reaches_the_deadline(run: Run) -> None:
    """A call that is planned can still be made: its time lies before the deadline, and never in the past."""
    for turn, again in _planned(run):
        assert again.delay_ms >= 0
        assert turn.now_ms + again.delay_ms < run.case.deadline_at_ms


@any_run
def test_no_delay_exceeds_what_asked_for_it(run: Run) -> None:
    """A delay is at most the backoff's cap, the time that the exchange asked for, or the window of a cancel, in which
    it may still strike."""
    for turn, again in _planned(run):
        if turn.verdict.means in GATED:
            assert again.delay_ms == pause_ms(turn.verdict, run.policy, turn.now_ms, run.case.ahead)
        else:
            strikes_ms = max(silent_until_ms(turn.history, run.policy), turn.case.strikes_until_ms) - turn.now_ms
            assert again.delay_ms <= max(run.policy.backoff_cap_ms, turn.verdict.retry_after_ms or 0, strikes_ms)


@any_run
def test_what_was_cleanly_not_done_is_bounded_by_the_deadline_alone(run: Run) -> None:
    """It costs no attempt, and where nothing else is answered the request ends no sooner than its last try."""
    for turn in run.turns:
        if turn.verdict.means in NOT_DONE:
            assert counted(turn.history) == counted(turn.history[:-1])
    if run.stop.kind.failed and all(turn.verdict.means in NOT_DONE for turn in run.turns):
        last = run.turns[-1] if run.turns else None
        is_pause = last is not None and last.verdict.means in GATED
        assert is_pause or run.ended_ms >= run.case.deadline_at_ms - LAST_TRY_MS


@any_run
def test_a_clock_refusal_is_answered_at_once_three_times(run: Run) -> None:
    """By a measured clock; one that cannot be set right is not measured in a tight loop, whatever comes between."""
    for turn, again in _planned(run):
        assert again.resync is (turn.verdict.means is Means.CLOCK)
        lately = sum(attempt.verdict == Means.CLOCK for attempt in turn.history[-40:])
        if again.resync and lately <= MAX_RESYNCS:
            assert again.delay_ms == 0
        elif again.resync and turn.roll and run.policy.backoff_base_ms > 1:
            assert again.delay_ms > 0


@any_run
def test_the_last_attempt_is_kept_for_a_query(run: Run) -> None:
    """The attempt that exhausts the bound is never a second cancel: somebody has to tell what the cancels did."""
    for turn in run.turns:
        if turn.call is Call.CANCEL and counted(turn.history[:-1]) > 0:
            assert counted(turn.history[:-1]) + 1 < run.policy.max_attempts


# ---- what an outcome may claim --------------------------------------------------------------------------------------


@any_run
def test_cancelled_is_proven(run: Run) -> None:
    """`cancelled` comes from a confirmed 200, or from a query that says CANCELED after an unclear cancel."""
    if run.stop.kind is OutcomeKind.CANCELLED:
        last = run.turns[-1]
        assert last.verdict.http == 200
        assert last.verdict.means is Means.CONFIRMED or (last.verdict.means is Means.CANCELED and run.unclear_cancels)


@any_run
def test_already_cancelled_is_not_ours(run: Run) -> None:
    """`already_cancelled` comes from a query, and no cancel of ours may have done it."""
    if run.stop.kind is OutcomeKind.ALREADY_CANCELLED:
        assert run.turns[-1].verdict.means is Means.CANCELED
        assert not run.unclear_cancels


@any_run
def test_an_unsettled_cancel_is_never_called_a_failure(run: Run) -> None:
    """While a cancel may have worked, the outcome claims neither that it was refused nor that nothing was done."""
    seen_open_ms = [a.at_ms for a in run.history if a.verdict == "open"]
    last_open_ms = max(seen_open_ms, default=0)
    unsettled = [a for a in run.unclear_cancels if last_open_ms < a.at_ms + a.ms + STRIKE_MS]
    if run.stop.kind in ("refused", "not_found"):  # a silence is settled by what is said when it cannot strike any more
        unsettled = [a for a in unsettled if a.msg != SILENCE or run.history[-1].at_ms < a.at_ms + a.ms + STRIKE_MS]
    if unsettled:
        assert run.stop.kind not in ("refused", "not_found", "gave_up", "overdue", "already_cancelled")


@any_run
def test_unknown_has_a_reason(run: Run) -> None:
    """`unknown` is no way out: a cancel was unclear, or the client id had become a newer order's."""
    if run.stop.kind is OutcomeKind.UNKNOWN:
        assert run.unclear_cancels or "left alone" in (run.stop.error or "")


@any_run
def test_overdue_means_that_nothing_was_sent(run: Run) -> None:
    """`overdue` is the outcome of a request for which no call was made, and of no other."""
    assert (run.stop.kind is OutcomeKind.OVERDUE) is (not run.turns)


@any_run
def test_a_failure_says_why(run: Run) -> None:
    """Every kind that wants somebody to look explains itself."""
    assert bool(run.stop.error) is run.stop.kind.failed


@any_run
def test_nobody_is_told_that_the_id_is_free_while_a_cancel_may_strike(run: Run) -> None:
    """An outcome by which the order has left its client id is not told before no cancel by it can be accepted."""
    if run.stop.kind in ("cancelled", "already_cancelled", "triggered", "expired", "rejected"):
        assert run.ended_ms >= run.case.strikes_until_ms


_ENDS = {
    Means.CONFIRMED: {OutcomeKind.CANCELLED},
    Means.CANCELED: {OutcomeKind.CANCELLED, OutcomeKind.ALREADY_CANCELLED},
    Means.TRIGGERED: {OutcomeKind.TRIGGERED},
    Means.FINISHED: {OutcomeKind.TRIGGERED},
    Means.EXPIRED: {OutcomeKind.EXPIRED},
    Means.REJECTED: {OutcomeKind.REJECTED},
    Means.DENIED: {OutcomeKind.REFUSED, OutcomeKind.UNKNOWN},
    Means.KEY_REFUSED: {OutcomeKind.REFUSED, OutcomeKind.UNKNOWN},
}


@any_run
def test_what_is_final_ends_the_request(run: Run) -> None:
    """After a final state or a permanent refusal no call follows, so the same refusal is never met twice; but for what
    may still strike, also where no attempt is left to look at what it did, and for a child that the exchange has not
    named yet."""
    for turn in run.turns:
        may_strike = turn.now_ms < run.case.strikes_until_ms
        is_open = may_strike or any(a.msg == SILENCE for a in turn.history)
        is_unnamed = turn.verdict.means in (Means.TRIGGERED, Means.FINISHED) and child_of(turn.verdict.order) is None
        if turn.verdict.means in _ENDS and (turn is run.turns[-1] or not (is_open or is_unnamed)):
            assert turn is run.turns[-1]
            is_bound = may_strike and "counted attempts" in (run.stop.error or "")
            assert run.stop.kind in _ENDS[turn.verdict.means] or is_bound or "left alone" in (run.stop.error or "")


# ---- which call -----------------------------------------------------------------------------------------------------


@any_run
def test_a_bare_client_id_is_cancelled_only_at_once(run: Run) -> None:
    """A client id may be reused: a cancel by it is the very first call, a tenth of a second after the request."""
    for turn in run.turns:
        if turn.case.by_client_id and turn.call is Call.CANCEL:
            assert turn is run.turns[0]
            assert turn.sent_ms - T0 <= BLIND_CANCEL_MS


@any_run
def test_an_order_by_client_id_is_ours_only_if_it_is_proven(run: Run) -> None:
    """What a query by client id shows is used only if the order is older than the request by both clocks' bounds."""
    for turn in run.turns:
        order, ahead = turn.verdict.order, turn.case.ahead
        if turn.case.by_client_id and order is not None and turn.verdict.means is not Means.CONFIRMED:
            created_ms = order.create_time_ms
            proven = ahead is not None and created_ms is not None and created_ms + ahead.hi <= T0
            assert proven is not ("left alone" in (run.stop.error or ""))


@any_run
def test_after_an_unclear_cancel_the_state_is_read_first(run: Run) -> None:
    """Between an unclear cancel and the next cancel stands a query that was answered with NEW, or until the horizon
    with "no such order", and that only once."""
    last_words = 0
    for turn in run.turns:
        if turn.call is Call.CANCEL:
            before = [a for a in turn.history[:-1] if a.verdict in ("unclear", "no_such_order", "trigger_race", "open")]
            last_words += bool(before) and before[-1].verdict == "no_such_order" and turn.verdict.means in _ANSWERED
            assert not before or before[-1].verdict == "open" or before[-1].call is Call.QUERY
    assert last_words <= 1 or any(a.verdict in _STATES for a in run.history)


_ANSWERED = frozenset(Means) - NOT_DONE
_STATES = {"open", "triggering", "odd_status"}


# ---- replay ---------------------------------------------------------------------------------------------------------


@any_run
def test_recorded_attempts_lead_to_the_same_decisions(run: Run) -> None:
    """Every decision follows from the recorded attempts and the answer alone, and again in the same way."""
    for turn in run.turns:
        recorded = decode_attempts(encode_attempts(turn.history))
        assert recorded == turn.history
        assert next_step(turn.case, recorded, turn.verdict, turn.now_ms, turn.roll) == turn.step


@any_run
def test_an_outcome_can_be_explained_from_its_attempts(run: Run) -> None:
    """The record alone, without the order that the answer described, leads to the recorded kind and calls."""
    for turn in run.turns:
        last = turn.history[-1]
        verdict = Verdict(Means(last.verdict), last.http, last.code, last.msg)
        again = next_step(turn.case, turn.history, verdict, turn.now_ms, turn.roll)
        if isinstance(turn.step, Stop) and isinstance(again, Stop) and "left alone" not in (turn.step.error or ""):
            assert again.kind is turn.step.kind
            assert again.error == turn.step.error


@PROFILE
@given(
    st.lists(st.tuples(st.sampled_from(Call), st.sampled_from(Means), st.integers(0, 9_000)), max_size=8),
    st.binary(min_size=6, max_size=6),
)
def test_any_recorded_history_leads_to_a_first_step(rows: list[tuple[Call, Means, int]], chance: bytes) -> None:
    """Whatever attempts a job hash holds, coming back to it leads to a call within the bounds or to an outcome."""
    case = _case(chance)
    history = [Attempt(n, T0 + ms, call, None, None, "", means.value, 5) for n, (call, means, ms) in enumerate(rows, 1)]
    step = first_step(case, history, T0 + 9_000)
    if isinstance(step, Again):
        assert case.deadline_at_ms > T0 + 9_000
        assert counted(history) < case.policy.max_attempts
        assert step.delay_ms == 0
        assert not (case.by_client_id and step.call is Call.CANCEL)
    else:
        assert step.kind in ("gave_up", "unknown", "triggered") or (step.kind == "overdue" and not history)
        assert step.kind != "triggered" or step.order_status in ("TRIGGERED", "FINISHED")
