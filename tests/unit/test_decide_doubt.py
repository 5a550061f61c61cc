"""What is decided on a history: coming back to a request, what its outcome tells, and what stays in doubt."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from producer.message import Attempt, Call, OutcomeKind
from tests.decisions import (
    ALGO_ID,
    ANSWERED,
    BAD_KEY,
    BAD_PARAM,
    CANCELED,
    CASE,
    CHILD_ID,
    EXPIRED,
    FINISHED,
    GONE,
    NEW,
    NO_CONNECTION,
    NOT_THERE,
    ODD,
    OK,
    OVERLOAD,
    POLICY,
    RACE,
    REJECTED,
    T0,
    TIMEOUT,
    TRIGGERED,
    TRIGGERING,
    WINDOW_MS,
    Answer,
    C,
    Q,
    attempt,
    play,
)
from worker.classify import Means, OrderRef, classify
from worker.decide import Again, Policy, Stop, call_for, doubts, first_step, last_status, next_step

# ---- coming back to a request ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("means", "kind"), [(Means.UNCLEAR, "unknown"), (Means.BUSY, "gave_up"), (Means.NOT_SENT, "gave_up")]
)
def test_after_the_deadline_a_retry_is_not_sent(means: Means, kind: str) -> None:
    """A request that was tried and came back too late ends by what its attempts left behind, never as overdue."""
    stop = first_step(CASE, [attempt(means)], CASE.deadline_at_ms)
    assert isinstance(stop, Stop)
    assert stop.kind == kind
    assert stop.error == f"the deadline passed; last: {means}"


def test_a_trigger_that_another_holder_saw_is_looked_at_again() -> None:
    """What Redis tells of an earlier holder's answers makes no outcome: after the deadline too the order is asked for
    once; what was heard by oneself, waiting for the child's id, is the end."""
    late, seen = CASE.deadline_at_ms, attempt(Means.TRIGGERED, Call.QUERY)
    told = dataclasses.replace(CASE, told_to=1)
    assert first_step(told, [seen], late) == Again(Call.QUERY)
    asked = attempt(Means.UNCLEAR, Call.QUERY, at_ms=late, n=2)
    stop = first_step(told, [seen, asked], late + 1)
    assert isinstance(stop, Stop)
    assert (stop.kind, stop.order_status) == (OutcomeKind.GAVE_UP, "TRIGGERED")
    assert first_step(CASE, [seen], late) == Stop(OutcomeKind.TRIGGERED, "TRIGGERED")


def test_the_deadline_during_the_last_call_ends_the_request() -> None:
    """An answer that comes after the deadline is still read, but leads to no further call."""
    late = CASE.deadline_at_ms
    answers: list[tuple[Answer, Call, str]] = [
        (OK, Call.CANCEL, "cancelled"),
        (CANCELED, Call.QUERY, "already_cancelled"),
        (OVERLOAD, Call.CANCEL, "gave_up"),
        (TIMEOUT, Call.CANCEL, "unknown"),
        (NEW, Call.QUERY, "gave_up"),
    ]
    for answer, call, kind in answers:
        verdict = classify(call, OrderRef(ALGO_ID), answer)
        stop = next_step(CASE, [attempt(verdict.means, call)], verdict, late, 0.5)
        assert isinstance(stop, Stop)
        assert stop.kind == kind
        assert not stop.kind.failed or (stop.error or "").startswith("the deadline passed; last: ")


# ---- what the outcome tells -----------------------------------------------------------------------------------------


def test_a_triggered_order_hands_on_its_child() -> None:
    """The strategy gets the id of the order that is live now, and the state in the exchange's words."""
    stop = play([GONE, TRIGGERED]).stop
    assert (stop.order_status, stop.actual_order_id) == ("TRIGGERED", CHILD_ID)
    stop = play([GONE, FINISHED]).stop
    assert (stop.order_status, stop.actual_order_id) == ("FINISHED", CHILD_ID)


@pytest.mark.parametrize(
    ("answers", "status"),
    [
        ([OK], "CANCELED"),
        ([TIMEOUT, CANCELED], "CANCELED"),
        ([GONE, EXPIRED], "EXPIRED"),
        ([GONE, REJECTED], "REJECTED"),
        ([RACE, TRIGGERING], "TRIGGERING"),
        ([GONE, ODD], "PENDING_CANCEL"),
        ([GONE, NEW, BAD_KEY], "NEW"),
        ([BAD_KEY], None),
        ([TIMEOUT], None),
    ],
)
def test_the_outcome_holds_the_state_as_last_seen(answers: list[Answer], status: str | None) -> None:
    """Whoever has to look gets the order's last known state, if any was seen."""
    assert play(answers).stop.order_status == status


@pytest.mark.parametrize(
    ("answers", "how", "error"),
    [
        ([BAD_KEY], {}, "refused: 401 -2015 Invalid API-key, IP, or permissions for action."),
        ([BAD_PARAM], {}, "refused: 400 -1102 Mandatory parameter was not sent."),
        ([OK], {"age_ms": 300_000}, "the deadline passed before anything was sent"),
        ([TIMEOUT], {"policy": ANSWERED}, "25 counted attempts were made; last: unclear ReadTimeout"),
        ([NO_CONNECTION], {}, "the deadline comes before the next try; last: not_sent ConnectionRefusedError"),
    ],
)
def test_an_outcome_says_why(answers: list[Answer], how: dict[str, Any], error: str) -> None:
    """A refusal is quoted with status and code; which bound was reached, and at what answer, is named."""
    assert play(answers, **how).stop.error == error


def test_the_last_state_skips_what_shows_none() -> None:
    """Answers without a state do not hide the one seen before."""
    history = [attempt(Means.OPEN, Call.QUERY), attempt(Means.BUSY), attempt(Means.UNCLEAR)]
    assert last_status(history) == "NEW"
    assert last_status(history[1:]) is None
    assert last_status([*history, attempt(Means.FINISHED, "query_child")]) == "NEW"


def test_a_newer_workers_calls_about_another_order_start_no_horizon() -> None:
    """That a child order is not known says nothing of its parent."""
    verdict = classify(Call.QUERY, OrderRef(ALGO_ID), NOT_THERE)
    missed = attempt(Means.NO_SUCH_ORDER, Call.QUERY, T0 + 20_000)
    history = [attempt(Means.NO_SUCH_ORDER, "query_child"), attempt(Means.UNCLEAR, "cancel_child"), missed]
    assert isinstance(next_step(CASE, history, verdict, T0 + 20_050, 0.5), Again)
    known = [attempt(Means.NO_SUCH_ORDER), attempt(Means.NO_SUCH_ORDER, at_ms=T0 + 11_000), missed]
    assert isinstance(next_step(CASE, known, verdict, T0 + 20_050, 0.5), Stop)


# ---- doubt ----------------------------------------------------------------------------------------------------------


LATE = T0 + 60_000
#: words, what was done, whether a cancel stays in doubt.
DOUBTS: list[tuple[str, list[Attempt], bool]] = [
    ("nothing sent", [], False),
    ("clean refusals", [attempt(Means.BUSY), attempt(Means.NO_SUCH_ORDER)], False),
    ("an unclear query", [attempt(Means.UNCLEAR, Call.QUERY)], False),
    ("an unclear cancel", [attempt(Means.UNCLEAR)], True),
    ("a refusal clears nothing", [attempt(Means.UNCLEAR), attempt(Means.DENIED)], True),
    ("nor no such order", [attempt(Means.UNCLEAR), attempt(Means.NO_SUCH_ORDER, Call.QUERY, LATE)], True),
    ("nor TRIGGERING", [attempt(Means.UNCLEAR), attempt(Means.TRIGGERING, Call.QUERY, LATE)], True),
    ("NEW in its window", [attempt(Means.UNCLEAR), attempt(Means.OPEN, Call.QUERY, T0 + WINDOW_MS - 1)], True),
    ("NEW after its window", [attempt(Means.UNCLEAR), attempt(Means.OPEN, Call.QUERY, T0 + WINDOW_MS)], False),
    ("NEW before it", [attempt(Means.OPEN, Call.QUERY), attempt(Means.UNCLEAR, at_ms=T0 + 50)], True),
    ("NEW twice", [attempt(Means.UNCLEAR), *(attempt(Means.OPEN, Call.QUERY, ms) for ms in (T0 + 100, LATE))], False),
    ("of another order", [attempt(Means.UNCLEAR, "cancel_child")], False),
    ("NEW of another order", [attempt(Means.UNCLEAR), attempt(Means.OPEN, "query_child", LATE)], True),
]


@pytest.mark.parametrize(("history", "doubt"), [row[1:] for row in DOUBTS], ids=[row[0] for row in DOUBTS])
def test_only_a_query_after_the_window_settles_an_unclear_cancel(history: list[Attempt], doubt: bool) -> None:
    """A cancel that may have worked stays in doubt until the order is seen open when it can no longer strike."""
    assert bool(doubts(history, POLICY)) is doubt


def test_a_settled_cancel_leaves_the_next_refusal_a_refusal() -> None:
    """Once a late query shows the order open, the unclear cancel before it did nothing."""
    policy = Policy(backoff_base_ms=8_000, backoff_cap_ms=8_000)
    played = play([TIMEOUT, TIMEOUT, NEW, BAD_KEY], roll=0.999, policy=policy)
    assert (played.calls, played.kind) == ([C, Q, Q, C], "refused")


@pytest.mark.parametrize("last", [attempt(Means.CONFIRMED, "cancel_child"), attempt(Means.OPEN, "query_child")])
def test_a_call_about_another_order_says_nothing_of_this_one(last: Attempt) -> None:
    """The order's state is asked for anew; what follows its own calls is the procedure's."""
    assert call_for(CASE, [last], T0 + 100) is Call.QUERY
