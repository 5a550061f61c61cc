"""How long a worker waits before its next call about an order."""

from __future__ import annotations

import dataclasses

import pytest

from producer.message import Call
from tests.decisions import (
    ALGO_ID,
    CANCELED,
    CASE,
    CHALLENGE,
    COME_BACK,
    FORBIDDEN,
    GATEWAY,
    GONE,
    LIMITED,
    NEW,
    OK,
    OVERLOAD,
    RACE,
    REGION,
    SILENT,
    T0,
    TIMEOUT,
    TOOK_MS,
    TRIGGERING,
    Answer,
    C,
    attempt,
    play,
)
from worker.classify import SILENCE, Means, OrderRef, Reply, Verdict, classify
from worker.decide import (
    BLIND_CANCEL_MS,
    LAST_TRY_MS,
    Again,
    Case,
    Policy,
    Stop,
    backoff_ms,
    counted,
    looks_up_a_silence,
    next_step,
)

# ---- delays ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "delay_ms"), [(LIMITED, 3_000), (FORBIDDEN, 20_000), (CHALLENGE, 20_000), (REGION, 1_000)]
)
def test_a_closed_gate_costs_time_and_no_attempt(answer: Reply, delay_ms: int) -> None:
    """The delay is the pause that the exchange asked for, or the policy's; the attempt is not counted."""
    played = play([answer, OK], policy=Policy(waf_pause_ms=20_000, max_attempts=1))
    assert (played.delays, counted(played.history[:1]), played.kind) == ([delay_ms], 0, "cancelled")


def test_a_pause_beyond_the_deadline_ends_the_request_now() -> None:
    """Nothing is sent into a closed gate: a request whose deadline lies within the pause stops at once."""
    played = play([FORBIDDEN], policy=Policy(waf_pause_ms=300_000), deadline_s=300)
    assert played.now_ms == T0 + TOOK_MS
    assert played.stop.error == "the deadline comes before the next try; last: blocked <html>403</html>"


@pytest.mark.parametrize("answer", [COME_BACK, Reply(502, b"<html>", 7_000), Reply(404, b"", 7_000)])
def test_a_server_that_names_a_time_is_left_alone_until_then(answer: Reply) -> None:
    """Retry-After of a 503, or of any answer that closes no gate, holds for the order's next call."""
    for before in ([], [TIMEOUT]):
        assert play([*before, answer, NEW, OK], roll=0.0).delays[len(before)] == 7_000


def test_a_time_beyond_the_deadline_leaves_a_last_try() -> None:
    """A maintenance that is announced for longer than the deadline may end sooner: the cancel is tried once more."""
    played = play([COME_BACK, OK], deadline_s=5)
    assert (played.kind, played.delays) == ("cancelled", [5_000 - TOOK_MS - LAST_TRY_MS])


@pytest.mark.parametrize("first", [TIMEOUT, GONE, GATEWAY])
def test_the_first_query_does_not_wait(first: Answer) -> None:
    """What became of an unclear or refused cancel is asked at once."""
    assert play([first, CANCELED]).delays == [0]


@pytest.mark.parametrize(("roll", "delays"), [(0.0, [0, 15] * 2 + [0, 0]), (0.999, [19, 29] * 2 + [0, 3_196])])
def test_silence_is_followed_by_short_pauses_at_first(roll: float, delays: list[int]) -> None:
    """The look-up is spread by chance, an open order gets a moment; where silence goes on, a backoff is added."""
    assert play([SILENT, NEW, SILENT, NEW, SILENT, NEW, OK], roll=roll).delays == delays


def test_a_silence_is_told_from_an_answer_that_leaves_it_open() -> None:
    """Only what is asked because nothing came back is a look-up that waits its turn."""
    silent = dataclasses.replace(attempt(Means.UNCLEAR), msg=SILENCE)
    assert [looks_up_a_silence(history) for history in ([], [attempt(Means.UNCLEAR)], [silent])] == [False, False, True]


def test_an_id_is_free_only_when_no_cancel_by_it_may_strike() -> None:
    """A state that frees the client id is asked for once more then, and is the outcome; ours is ours all the same."""
    case = dataclasses.replace(CASE, strikes_until_ms=T0 + 900)
    for means, call, kind in (
        (Means.CONFIRMED, Call.CANCEL, "cancelled"),
        (Means.CANCELED, Call.QUERY, "cancelled"),
        (Means.TRIGGERED, Call.QUERY, "triggered"),
        (Means.EXPIRED, Call.QUERY, "expired"),
        (Means.REJECTED, Call.QUERY, "rejected"),
    ):
        history = [attempt(Means.UNCLEAR), attempt(means, call, T0 + 100, 2)]
        step = next_step(case, history, Verdict(means), T0 + 150, 0.5)
        assert step == Again(Call.QUERY, 750)
        stop = next_step(case, history, Verdict(means), T0 + 900, 0.5)
        assert isinstance(stop, Stop)
        assert stop.kind == kind
    settled = [attempt(Means.NO_SUCH_ORDER), attempt(Means.CONFIRMED, n=2), attempt(Means.CANCELED, Call.QUERY, n=3)]
    stop = next_step(CASE, settled, Verdict(Means.CANCELED), T0 + 900, 0.5)
    assert isinstance(stop, Stop)
    assert stop.kind == "cancelled"


def test_an_open_order_is_cancelled_again_after_a_backoff() -> None:
    """A cancel that was refused although the order is open is not repeated in a tight loop."""
    played = play([GONE, NEW, GONE, NEW, OK], roll=0.5)
    assert played.delays == [0, 100, 0, 400]


@pytest.mark.parametrize("roll", [0.0, 0.999])
def test_a_triggering_order_is_polled_fast_then_slower(roll: float) -> None:
    """A trigger takes about ten milliseconds; one that takes longer is asked about ever less often, up to the cap."""
    policy = Policy(max_attempts=40, backoff_cap_ms=1_000)
    played = play([RACE, TRIGGERING], roll=roll, policy=policy, deadline_s=3600)
    most = [10, 20, 40, 80, 160, 320, 640, *[1_000] * 32]
    assert played.delays == [int(full * (0.5 + roll / 2)) for full in most]


def test_backoff_doubles_up_to_its_cap_with_full_jitter() -> None:
    """The delay is uniform from nothing to a doubling ceiling, so that workers do not strike together."""
    policy = Policy(backoff_base_ms=100, backoff_cap_ms=1_000)
    assert [backoff_ms(n, policy, 0.999) for n in (1, 2, 3, 4, 5, 60, 10_000)] == [99, 199, 399, 799, 999, 999, 999]
    assert [backoff_ms(n, policy, 0.0) for n in (1, 5, 60)] == [0, 0, 0]


@pytest.mark.parametrize(("left_ms", "goes_on"), [(3_001, True), (3_000, False), (2_999, False)])
def test_a_pause_must_end_before_the_deadline(left_ms: int, goes_on: bool) -> None:
    """A pause that ends just when the deadline comes leaves no time to send anything."""
    case = Case(by_client_id=False, meant_at_ms=T0, deadline_at_ms=T0 + left_ms)
    verdict = classify(Call.CANCEL, OrderRef(ALGO_ID), LIMITED)
    step = next_step(case, [attempt(Means.LIMITED)], verdict, T0, 0.5)
    assert isinstance(step, Again) is goes_on


#: Backs off for longer than the deadline.
SLOW = Policy(backoff_base_ms=60_000, backoff_cap_ms=60_000)


@pytest.mark.parametrize(("left_ms", "delay_ms"), [(1_500, 500), (1_001, 1), (1_000, None), (1, None)])
def test_there_is_a_last_try_only_with_time_for_its_answer(left_ms: int, delay_ms: int | None) -> None:
    """The last try starts a second before the deadline; a request with less than that left is over."""
    case = Case(by_client_id=False, meant_at_ms=T0, deadline_at_ms=T0 + left_ms, policy=SLOW)
    verdict = classify(Call.CANCEL, OrderRef(ALGO_ID), OVERLOAD)
    step = next_step(case, [attempt(Means.BUSY)], verdict, T0, 0.5)
    assert (step.delay_ms if isinstance(step, Again) else None) == delay_ms


def test_the_defaults_are_the_documented_ones() -> None:
    """Who sets nothing gets the documented bounds."""
    assert dataclasses.astuple(Policy()) == (200, 100, 15_000, 10_000, 5_000, 300_000)
    assert (BLIND_CANCEL_MS, LAST_TRY_MS) == (100, 1_000)


def test_after_the_last_try_it_gives_up() -> None:
    """A backoff that would end past the deadline is cut, so that there is time for one more answer; what follows that
    try is the outcome, before the deadline."""
    assert play([OVERLOAD, OK], policy=SLOW, deadline_s=10, roll=0.9).kind == "cancelled"
    played = play([OVERLOAD], policy=SLOW, deadline_s=10, roll=0.9)
    assert (played.calls, played.history[-1].at_ms) == ([C, C], T0 + 10_000 - LAST_TRY_MS)
    assert played.now_ms < T0 + 10_000
    assert played.stop.error == (
        "the deadline comes before the next try; last: busy Request throttled by system-level protection."
    )
