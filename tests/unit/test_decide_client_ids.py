"""What a worker does about an order that is named by its client id alone: only what is proven to be meant is hit."""

from __future__ import annotations

from typing import Any

import pytest

from producer.message import Attempt, Call
from tests.decisions import (
    CANCELED,
    GONE,
    LATE_CLOCK,
    LIMITED,
    NEW,
    NEWER,
    NO_CONNECTION,
    OK,
    OVERLOAD,
    RACE,
    SAME,
    T0,
    TIMEOUT,
    Answer,
    C,
    Q,
    attempt,
    play,
    refusal,
    state,
)
from worker.classify import Means, Reply
from worker.decide import BLIND_CANCEL_MS, Again, Case, Policy, Span, first_step

# ---- by client id alone ---------------------------------------------------------------------------------------------


#: words, what was done before, how long after the request it is decided in ms, what else is known, the call.
CALLS: list[tuple[str, list[Attempt], int, dict[str, Any], Call]] = [
    ("at once", [], BLIND_CANCEL_MS, {}, Call.CANCEL),
    ("later, or when it had to wait", [], BLIND_CANCEL_MS + 1, {}, Call.QUERY),
    ("by a clock that was set back", [], -1, {}, Call.QUERY),
    ("in a later run, whatever the first has sent", [], 1, {"retried": True}, Call.QUERY),
    ("where the call may leave later", [], 1, {"sends_late": True}, Call.QUERY),
    ("in a later run, by algo id", [], 1, {"retried": True, "by_client_id": False}, Call.CANCEL),
    ("after an unclear cancel", [attempt(Means.UNCLEAR)], 60, {}, Call.QUERY),
    ("after a cancel that was not done", [attempt(Means.BUSY)], 60, {}, Call.QUERY),
    ("where another worker saw it open", [attempt(Means.OPEN, Call.QUERY)], 60, {}, Call.QUERY),
    ("... after a cancel", [attempt(Means.UNCLEAR), attempt(Means.OPEN, Call.QUERY, T0 + 50)], 60, {}, Call.QUERY),
]


@pytest.mark.parametrize(("history", "after_ms", "known", "call"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_a_client_id_is_cancelled_at_once_or_looked_up(
    history: list[Attempt], after_ms: int, known: dict[str, Any], call: Call
) -> None:
    """Up to a tenth of a second after the request the id cannot have been reused: no look-up delays the cancel. Later,
    and after whatever was sent, it may be another order's."""
    case = Case(**{"by_client_id": True, "meant_at_ms": T0, "deadline_at_ms": T0 + 300_000} | known)
    assert first_step(case, history, T0 + after_ms) == Again(call)


def test_an_old_client_id_is_resolved_first_and_cancelled_by_algo_id() -> None:
    """What a look-up shows is cancelled, that very order, without a delay."""
    played = play([NEW, OK], by_client_id=True, age_ms=BLIND_CANCEL_MS + 1)
    assert (played.calls, played.kind, played.delays) == ([Q, C], "cancelled", [0])


@pytest.mark.parametrize(
    "first",
    [TIMEOUT, GONE, OVERLOAD, NO_CONNECTION, LATE_CLOCK, LIMITED, RACE],
    ids=["unclear", "unknown order", "overload", "not sent", "clock", "limited", "triggering"],
)
def test_a_second_cancel_is_never_sent_by_client_id(first: Answer) -> None:
    """Whatever the first answer was and however soon it came, the order is looked up and then cancelled by algo id."""
    played = play([first, NEW, OK], by_client_id=True, roll=0.0)
    assert (played.calls, played.kind) == ([C, Q, C], "cancelled")


@pytest.mark.parametrize("before", [[TIMEOUT], [GONE], [NO_CONNECTION]])
def test_a_newer_order_under_the_client_id_is_left_alone(before: list[Answer]) -> None:
    """An order created after the request was never meant: no cancel is sent to it."""
    played = play([*before, NEWER], by_client_id=True, roll=0.999, policy=Policy(backoff_base_ms=5_000))
    assert (played.calls, played.kind) == ([C, Q], "unknown")
    assert played.stop.error == "the client id belongs to an order created after the request: left alone"


@pytest.mark.parametrize("answer", [state(s, created_ms=T0 + 60_000) for s in ("NEW", "CANCELED", "TRIGGERED")])
def test_no_state_of_a_newer_order_is_reported_as_ours(answer: Reply) -> None:
    """That a newer order was cancelled says nothing about the one that was meant."""
    played = play([answer], by_client_id=True, age_ms=5_000)
    assert (played.calls, played.kind) == ([Q], "unknown")


#: Offset of Redis' clock to the exchange's, the order's age at the request, and what is made of it.
AGES: list[tuple[str, Span | None, int | None, str]] = [
    ("clocks alike, created before", SAME, 1, "cancelled"),
    ("clocks alike, created in the same millisecond", SAME, 0, "cancelled"),
    ("clocks alike, created after", SAME, -1, "an order created after the request"),
    ("known to 20 ms, clearly before", Span(-10, 10), 10, "cancelled"),
    ("known to 20 ms, perhaps after", Span(-10, 10), 9, "the clocks are known to 20 ms"),
    ("known to 20 ms, perhaps before", Span(-10, 10), -10, "the clocks are known to 20 ms"),
    ("known to 20 ms, clearly after", Span(-10, 10), -11, "an order created after the request"),
    ("Redis 5 s ahead, created before", Span(4_990, 5_010), 5_010, "cancelled"),
    ("Redis 5 s ahead, perhaps after", Span(4_990, 5_010), 5_009, "the clocks are known to 20 ms"),
    ("Redis 5 s ahead, created after", Span(4_990, 5_010), 4_989, "an order created after the request"),
    ("Redis 5 s behind, created before", Span(-5_010, -4_990), -4_990, "cancelled"),
    ("Redis 5 s behind, perhaps after", Span(-5_010, -4_990), -4_991, "the clocks are known to 20 ms"),
    ("Redis 5 s behind, created after", Span(-5_010, -4_990), -5_011, "an order created after the request"),
    ("not measured, created long before", None, 60_000, "the clocks are not measured"),
    ("not measured, seems created after", None, -60_000, "the clocks are not measured"),
    ("no time of creation", SAME, None, "it has no time of creation"),
]


@pytest.mark.parametrize(("ahead", "older_ms", "made"), [row[1:] for row in AGES], ids=[row[0] for row in AGES])
def test_only_an_order_from_before_the_request_is_hit(ahead: Span | None, older_ms: int | None, made: str) -> None:
    """An order found by client id is cancelled if it is proven to be older, else left alone with a reason."""
    meant_ms = T0 - 5_000
    created_ms = None if older_ms is None else meant_ms - older_ms
    played = play([state("NEW", created_ms), OK], by_client_id=True, age_ms=5_000, ahead=ahead)
    if made == "cancelled":
        assert (played.calls, played.kind) == ([Q, C], "cancelled")
    else:
        assert (played.calls, played.kind) == ([Q], "unknown")
        assert made in (played.stop.error or "")
        assert (played.stop.error or "").endswith(": left alone")


def _at_the_exchange(shift_ms: int) -> list[list[Answer]]:
    """Conversations as an exchange has them whose clock is ahead of Redis' by ``shift_ms``."""
    old, young = state("NEW", T0 - 60_000 + shift_ms), state("NEW", T0 + 300 + shift_ms)
    return [
        [OK],
        [GONE, old, OK],
        [TIMEOUT, old, OK],
        [TIMEOUT, young],
        [OVERLOAD, state("CANCELED", T0 - 60_000 + shift_ms)],
        [refusal(418, -1003, f"banned until {T0 + 130_000 + shift_ms}."), old, OK],
    ]


@pytest.mark.parametrize("by_client_id", [True, False])
@pytest.mark.parametrize("shift_ms", [-5_000, 5_000, 3_600_000])
def test_a_wrong_clock_of_the_exchange_changes_nothing(shift_ms: int, by_client_id: bool) -> None:
    """Seconds or an hour ahead or behind: while the offset is known, every call, delay and end is the same."""
    there = _at_the_exchange(shift_ms)
    for shifted, straight in zip(there, _at_the_exchange(0), strict=True):
        away = play(shifted, by_client_id=by_client_id, ahead=Span(-shift_ms, -shift_ms))
        here = play(straight, by_client_id=by_client_id)
        assert (away.calls, away.delays, away.stop) == (here.calls, here.delays, here.stop)


def test_the_last_attempt_resolves_a_client_id_that_grew_old() -> None:
    """The attempt that is kept for a query is used where the backoff makes the next call a query."""
    played = play([OVERLOAD, CANCELED], by_client_id=True, policy=Policy(max_attempts=2, backoff_base_ms=4_000))
    assert (played.calls, played.kind) == ([C, Q], "already_cancelled")


def test_a_look_up_that_is_refused_is_backed_off() -> None:
    """Before the first cancel too, an overloaded exchange is not asked in a tight loop."""
    assert play([OVERLOAD, NEW, OK], by_client_id=True, age_ms=5_000, roll=0.5).delays == [50, 0]


def test_by_algo_id_the_time_of_creation_is_not_asked() -> None:
    """An algo id is never reused, so an order by algo id is ours whatever its time says."""
    assert play([GONE, NEWER, OK]).kind == "cancelled"
