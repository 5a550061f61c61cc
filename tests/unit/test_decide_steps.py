"""What a worker does about one order, step by step: answers in, calls and the outcome out; and what stays in doubt."""

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
    CHALLENGE,
    CHILD_ID,
    ENGINE_CLOCK,
    EXPIRED,
    FEW,
    FINISHED,
    FORBIDDEN,
    GATEWAY,
    GONE,
    LATE_CLOCK,
    LIMITED,
    NEW,
    NO_CONNECTION,
    NO_METHOD,
    NO_PATH,
    NOT_THERE,
    ODD,
    OK,
    ONE,
    OVERLOAD,
    POLICY,
    RACE,
    REGION,
    REJECTED,
    SILENT,
    T0,
    TIMEOUT,
    TOOK_MS,
    TRIGGERED,
    TRIGGERING,
    UNAVAILABLE,
    UNKNOWN_ERROR,
    WINDOW_MS,
    Answer,
    C,
    Q,
    attempt,
    play,
    refusal,
)
from worker import decide, listing
from worker.classify import Means, OrderRef, classify
from worker.decide import PASSED, Again, Policy, Stop, call_for, doubts, first_step, last_status, next_step
from worker.job import Rules

#: words, answers, calls made, outcome's kind. Enqueued just now, by algo id, with the default bounds.
PROCEDURE: list[tuple[str, list[Answer], list[str], str]] = [
    # the cancel is confirmed
    ("confirmed", [OK], [C], "cancelled"),
    ("no connection, then confirmed", [NO_CONNECTION, OK], [C, C], "cancelled"),
    ("overload, then confirmed", [OVERLOAD, UNAVAILABLE, OK], [C, C, C], "cancelled"),
    ("429, then confirmed", [LIMITED, OK], [C, C], "cancelled"),
    ("late clock, then confirmed", [LATE_CLOCK, ENGINE_CLOCK, OK], [C, C, C], "cancelled"),
    # an unclear cancel is read before anything else
    ("timeout, query CANCELED", [TIMEOUT, CANCELED], [C, Q], "cancelled"),
    ("502, query CANCELED", [GATEWAY, CANCELED], [C, Q], "cancelled"),
    ("503 unknown error, query CANCELED", [UNKNOWN_ERROR, CANCELED], [C, Q], "cancelled"),
    ("timeout, query NEW, confirmed", [TIMEOUT, NEW, OK], [C, Q, C], "cancelled"),
    ("timeout, query NEW, -2011, CANCELED", [TIMEOUT, NEW, GONE, CANCELED], [C, Q, C, Q], "cancelled"),
    ("timeout, query times out, CANCELED", [TIMEOUT, TIMEOUT, CANCELED], [C, Q, Q], "cancelled"),
    ("timeout, query overloaded, CANCELED", [TIMEOUT, OVERLOAD, CANCELED], [C, Q, Q], "cancelled"),
    ("timeout, query not sent, CANCELED", [TIMEOUT, NO_CONNECTION, CANCELED], [C, Q, Q], "cancelled"),
    ("timeout, query 429, CANCELED", [TIMEOUT, LIMITED, CANCELED], [C, Q, Q], "cancelled"),
    ("timeout, query late clock, CANCELED", [TIMEOUT, LATE_CLOCK, CANCELED], [C, Q, Q], "cancelled"),
    ("-2011, query times out, CANCELED", [GONE, TIMEOUT, CANCELED], [C, Q, Q], "already_cancelled"),
    ("timeout, query TRIGGERED", [TIMEOUT, TRIGGERED], [C, Q], "triggered"),
    ("timeout, query EXPIRED", [TIMEOUT, EXPIRED], [C, Q], "expired"),
    # "unknown order" alone decides nothing
    ("-2011, query CANCELED", [GONE, CANCELED], [C, Q], "already_cancelled"),
    ("-2011, query NEW, confirmed", [GONE, NEW, OK], [C, Q, C], "cancelled"),
    ("-2011, query TRIGGERED", [GONE, TRIGGERED], [C, Q], "triggered"),
    ("-2011, query FINISHED", [GONE, FINISHED], [C, Q], "triggered"),
    ("-2011, query EXPIRED", [GONE, EXPIRED], [C, Q], "expired"),
    ("-2011, query REJECTED", [GONE, REJECTED], [C, Q], "rejected"),
    ("-2013 to the cancel, query CANCELED", [NOT_THERE, CANCELED], [C, Q], "already_cancelled"),
    ("-2011, -2013 at first, then CANCELED", [GONE, NOT_THERE, NOT_THERE, CANCELED], [C, Q, Q, Q], "already_cancelled"),
    ("-2011, -2013 at first, then NEW", [GONE, NOT_THERE, NEW, OK], [C, Q, Q, C], "cancelled"),
    ("maintenance, then confirmed", [refusal(400, -2011, "Rest API trading is not enabled."), OK], [C, C], "cancelled"),
    # the trigger's few milliseconds
    ("-2011, TRIGGERING, TRIGGERED", [GONE, TRIGGERING, TRIGGERING, TRIGGERED], [C, Q, Q, Q], "triggered"),
    ("-4117, TRIGGERED", [RACE, TRIGGERED], [C, Q], "triggered"),
    ("-4117, NEW again, confirmed", [RACE, NEW, OK], [C, Q, C], "cancelled"),
    ("TRIGGERING, then REJECTED", [RACE, TRIGGERING, REJECTED], [C, Q, Q], "rejected"),
    ("a state of the future, then CANCELED", [GONE, ODD, CANCELED], [C, Q, Q], "already_cancelled"),
    # refusals that repeating cannot change
    ("bad key", [BAD_KEY], [C], "refused"),
    ("bad parameter", [BAD_PARAM], [C], "refused"),
    ("451, then confirmed", [REGION, REGION, OK], [C, C, C], "cancelled"),
    ("404 and 405 of an edge, then confirmed", [NO_PATH, NO_METHOD, OK], [C, C, C], "cancelled"),
    ("timeout, query 404 and 451, CANCELED", [TIMEOUT, NO_PATH, REGION, CANCELED], [C, Q, Q, Q], "cancelled"),
    ("overload, then bad key", [OVERLOAD, BAD_KEY], [C, C], "refused"),
    ("-2011, query refused", [GONE, BAD_KEY], [C, Q], "refused"),
    ("timeout, query refused", [TIMEOUT, BAD_KEY], [C, Q], "unknown"),
    ("timeout, NEW at once, refused", [TIMEOUT, NEW, BAD_KEY], [C, Q, C], "unknown"),
    # silence is a doubt, but not for good: what is said when it cannot strike any more is believed
    ("silence, query CANCELED", [SILENT, CANCELED], [C, Q], "cancelled"),
    ("silence, query silent, NEW, confirmed", [SILENT, SILENT, NEW, OK], [C, Q, Q, C], "cancelled"),
    ("silence, query refused, and refused later", [SILENT, BAD_KEY], [C, Q, Q], "refused"),
    ("silence, query refused, CANCELED later", [SILENT, BAD_KEY, CANCELED], [C, Q, Q], "cancelled"),
    ("silence, NEW at once, refused", [SILENT, NEW, BAD_KEY], [C, Q, C, Q], "refused"),
    ("silence and a timeout, refused", [SILENT, NEW, TIMEOUT, BAD_KEY], [C, Q, C, Q], "unknown"),
]


@pytest.mark.parametrize(("answers", "calls", "kind"), [p[1:] for p in PROCEDURE], ids=[p[0] for p in PROCEDURE])
def test_the_procedure(answers: list[Answer], calls: list[str], kind: str) -> None:
    """Each list of answers leads through these calls to this outcome."""
    played = play(answers)
    assert played.calls == calls
    assert played.kind == kind


#: Few attempts within a day.
LONG = {"policy": FEW, "deadline_s": 86_400}
#: words, answers, how it is played, calls made or their number, outcome's kind.
BOUNDS: list[tuple[str, list[Answer], dict[str, Any], list[str] | int, str]] = [
    ("overdue", [OK], {"age_ms": 300_000}, [], "overdue"),
    ("a moment before the deadline it is still sent", [OK], {"age_ms": 299_999}, [C], "cancelled"),
    ("stuck TRIGGERING", [RACE, TRIGGERING], {"policy": ANSWERED}, 25, "gave_up"),
    ("stuck TRIGGERING until the deadline", [RACE, TRIGGERING], {"deadline_s": 5, "roll": 0.99}, 10, "gave_up"),
    ("stuck TRIGGERING after a timeout", [TIMEOUT, TRIGGERING], {"policy": ANSWERED}, 25, "unknown"),
    ("a state of the future for ever", [GONE, ODD], {"policy": ANSWERED}, 25, "gave_up"),
    ("no connection until the deadline", [NO_CONNECTION], {"deadline_s": 2}, 6, "gave_up"),
    *[
        (f"{name} for an hour", [answer], {"policy": FEW, "deadline_s": 3_600}, 484, "gave_up")
        for name, answer in (("no connection", NO_CONNECTION), ("overload", OVERLOAD), ("404", NO_PATH))
    ],
    ("clock refusals for an hour", [LATE_CLOCK], {"policy": FEW, "deadline_s": 3_600}, 484, "gave_up"),
    ("451 until the deadline", [REGION], {"policy": FEW, "deadline_s": 10}, [C] * 10, "gave_up"),
    ("no connection for hours, then confirmed", [*[NO_CONNECTION] * 900, OK], LONG, 901, "cancelled"),
    ("overload for hours, then gone", [*[OVERLOAD] * 900, GONE, CANCELED], LONG, 902, "already_cancelled"),
    ("429 until the deadline", [LIMITED], {"deadline_s": 10}, [C] * 4, "gave_up"),
    ("403, longer than the deadline", [FORBIDDEN], {}, [C], "gave_up"),
    ("403 and a challenge, then confirmed", [FORBIDDEN, CHALLENGE, OK], {"deadline_s": 900}, [C, C, C], "cancelled"),
    ("-2011 and NEW for ever", [GONE, NEW] * 30, {"policy": ANSWERED}, 24, "gave_up"),
    ("timeout and NEW at once for ever", [TIMEOUT, NEW] * 30, {"policy": ANSWERED, "roll": 0.01}, 24, "unknown"),
    ("timeouts for ever", [TIMEOUT], {"policy": ANSWERED}, 25, "unknown"),
    ("no answer until the default deadline", [TIMEOUT], {"roll": 0.9}, 30, "unknown"),
    ("one attempt allowed, overload, confirmed", [OVERLOAD, OVERLOAD, OK], {"policy": ONE}, [C] * 3, "cancelled"),
    ("one attempt allowed, timeout", [TIMEOUT], {"policy": ONE}, [C], "unknown"),
    (
        "two allowed: the last is a query's",
        [TIMEOUT, CANCELED],
        {"policy": Policy(max_attempts=2)},
        [C, Q],
        "cancelled",
    ),
    ("silence, refused, the deadline within its window", [SILENT, BAD_KEY], {"deadline_s": 3}, [C, Q, Q], "unknown"),
    ("two allowed: no second cancel", [GONE, NEW, OK], {"policy": Policy(max_attempts=2)}, [C, Q], "gave_up"),
    ("three allowed: none after NEW", [TIMEOUT, NEW, OK], {"policy": Policy(max_attempts=3)}, [C, Q], "unknown"),
]


@pytest.mark.parametrize(("answers", "how", "calls", "kind"), [b[1:] for b in BOUNDS], ids=[b[0] for b in BOUNDS])
def test_the_bounds(answers: list[Answer], how: dict[str, Any], calls: list[str] | int, kind: str) -> None:
    """Attempts and time are both bounded, and the kind says whether a cancel may have worked."""
    played = play(answers, **how)
    assert (played.calls if isinstance(calls, list) else len(played.calls)) == calls
    assert played.kind == kind


# ---- not found ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "kind"), [(GONE, "not_found"), (TIMEOUT, "unknown"), (NOT_THERE, "not_found"), (SILENT, "not_found")]
)
@pytest.mark.parametrize("roll", [0.01, 0.5, 0.99])
def test_no_such_order_is_believed_at_the_horizon(first: Answer, kind: str, roll: float) -> None:
    """It is asked again until the horizon, and then cancelled once more and asked; a doubt before makes it unknown."""
    played = play([first, NOT_THERE], roll=roll)
    assert played.kind == kind
    since_ms = next(a.at_ms for a in played.history if a.verdict == "no_such_order")
    *_, before, last_word, last_look = played.history
    assert before.at_ms <= since_ms + POLICY.not_found_horizon_ms <= last_word.at_ms <= last_look.at_ms
    assert played.calls == [C] + [Q] * (len(played.calls) - 3) + [C, Q]
    assert "no such order" not in (played.stop.error or "")
    assert "400 -2013 Order does not exist." in (played.stop.error or "")


def test_no_such_order_is_not_believed_while_a_silent_cancel_may_strike() -> None:
    """With a short horizon it is asked until the window of the silent cancel has closed, and once more."""
    played = play([SILENT, NOT_THERE], policy=Policy(not_found_horizon_ms=0), roll=0.9)
    assert played.kind == "not_found"
    assert played.history[-1].at_ms >= T0 + WINDOW_MS


def test_asking_for_a_lost_order_costs_no_attempts() -> None:
    """A long horizon does not run into the bound on attempts."""
    played = play([GONE, NOT_THERE], policy=Policy(max_attempts=3, not_found_horizon_ms=200_000), roll=0.1)
    assert len(played.calls) > 20
    assert played.kind == "not_found"


def test_a_cancels_word_alone_is_never_believed() -> None:
    """Even with no horizon at all, "unknown order" from a cancel is checked by a query, a cancel, and a query."""
    played = play([GONE, NOT_THERE], policy=Policy(not_found_horizon_ms=0))
    assert played.calls == [C, Q, C, Q]
    assert played.kind == "not_found"


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        ([OK], "cancelled"),
        ([OVERLOAD, REGION, LATE_CLOCK, OK], "cancelled"),
        ([TIMEOUT, CANCELED], "cancelled"),
        ([GONE, NEW, OK], "cancelled"),
        ([GONE, TRIGGERED], "triggered"),
        ([TIMEOUT, NOT_THERE], "unknown"),
        ([BAD_KEY], "refused"),
    ],
)
def test_a_late_book_is_asked_once_more_before_it_is_believed(answers: list[Answer], kind: str) -> None:
    """Where cancel and queries have missed the order until the horizon, a second cancel has the last word."""
    missed = [GONE, NOT_THERE, NOT_THERE]
    played = play([*missed, *answers], policy=Policy(not_found_horizon_ms=600), roll=0.9)
    assert played.calls[:4] == [C, Q, Q, C]
    assert played.kind == kind
    assert played.calls[4:] == [Q if answer in (NEW, CANCELED, TRIGGERED, NOT_THERE) else C for answer in answers[1:]]


def test_an_unknown_client_id_is_not_cancelled_again() -> None:
    """A request by client id alone has no last word: by then the id may mean another order."""
    played = play([NOT_THERE], by_client_id=True, age_ms=5_000)
    assert (set(played.calls), played.kind) == ({Q}, "not_found")


def test_where_no_attempt_is_left_the_order_is_believed_to_be_gone() -> None:
    """A bound on attempts that leaves no room for the last word makes no failure of what queries have told."""
    played = play([GONE, NOT_THERE], policy=Policy(max_attempts=2))
    assert (played.calls.count(C), played.kind) == (1, "not_found")


@pytest.mark.parametrize("seen", [Means.OPEN, Means.TRIGGERING, Means.ODD_STATUS])
def test_the_horizon_is_counted_from_when_the_order_was_last_seen(seen: Means) -> None:
    """Not a millisecond before the horizon is it believed, and a state in between starts the horizon anew."""
    lost_ms = T0 + 9_000
    history = [
        attempt(Means.NO_SUCH_ORDER),
        attempt(Means.NO_SUCH_ORDER, Call.QUERY, T0 + 50),
        attempt(seen, Call.QUERY, T0 + 8_000),
        attempt(Means.NO_SUCH_ORDER, Call.QUERY, lost_ms),
        attempt(Means.NO_SUCH_ORDER, Call.QUERY, lost_ms + 8_000),
    ]
    verdict = classify(Call.QUERY, OrderRef(ALGO_ID), NOT_THERE)
    assert next_step(CASE, history[:-1], verdict, lost_ms + 500, 0.5) == Again(Call.QUERY, 400)
    early = next_step(CASE, history, verdict, lost_ms + 9_999, 0.999)
    assert early == Again(Call.CANCEL, 1)
    assert next_step(CASE, history, verdict, lost_ms + 10_000, 0.999) == Again(Call.CANCEL)
    asked = [attempt(Means.NO_SUCH_ORDER, at_ms=lost_ms + 10_000), attempt(Means.NO_SUCH_ORDER, Call.QUERY, lost_ms)]
    stop = next_step(CASE, [*history, *asked], verdict, lost_ms + 10_050, 0.999)
    assert isinstance(stop, Stop)
    assert stop.kind == "not_found"


def test_the_deadline_comes_before_the_horizon() -> None:
    """A request that is no longer wanted is not asked about until a longer horizon ends."""
    played = play([GONE, NOT_THERE], deadline_s=4)
    assert played.kind == "gave_up"
    assert played.now_ms < T0 + 4_000 + TOOK_MS


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


@pytest.mark.parametrize("rules", [decide, listing])
def test_what_was_never_sent_is_overdue_whatever_kept_it(rules: Rules) -> None:
    """A first call that its key, the weight or a pause held back until the deadline was no try."""
    assert rules.bound(CASE, (), CASE.deadline_at_ms, PASSED).kind is OutcomeKind.OVERDUE


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
