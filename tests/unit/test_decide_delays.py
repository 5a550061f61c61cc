"""How long a worker waits before its next call about an order, and everybody on an address after a refusal."""

from __future__ import annotations

import dataclasses

import pytest

from producer.message import Call
from tests.decisions import (
    ALGO_ID,
    BAD_KEY,
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
    SAME,
    SILENT,
    T0,
    TIMEOUT,
    TOOK_MS,
    TRIGGERING,
    WINDOW_MS,
    Answer,
    C,
    attempt,
    play,
    refusal,
)
from worker.classify import SILENCE, Means, OrderRef, Reply, Verdict, classify
from worker.decide import (
    BLIND_CANCEL_MS,
    LAST_TRY_MS,
    Again,
    Case,
    Policy,
    Span,
    Stop,
    backoff_ms,
    counted,
    looks_up_a_silence,
    next_step,
    pause_ms,
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


def test_a_refusal_after_a_silence_is_asked_for_again_when_that_cannot_strike() -> None:
    """Until then it would be believed of no call."""
    played = play([SILENT, BAD_KEY], roll=0.0)
    assert (played.delays, played.history[-1].at_ms) == ([0, WINDOW_MS - 2 * TOOK_MS], T0 + WINDOW_MS)


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


# ---- pauses of the whole address ------------------------------------------------------------------------------------

NOW = 1750485492076
FORBIDDEN_FOR_A_MOMENT, REGION_FOR_SECONDS = (Reply(http, b"<html>", retry_after_ms=7_000) for http in (403, 451))


def banned(for_ms: int, retry_after_ms: int | None = None, http: int = 418) -> Reply:
    """A ban whose text names its end by the exchange's clock."""
    said = f"Way too many requests; IP(203.0.113.9) banned until {NOW + for_ms}. Please use the websocket."
    return refusal(http, -1003, said, retry_after_ms)


#: words, answer, Redis' clock minus the exchange's, the pause in ms.
ROWS: list[tuple[str, Answer, Span | None, int]] = [
    ("Retry-After", refusal(429, -1003, "", 35_000), SAME, 35_000),
    ("429 without either", Reply(429, b""), SAME, 10_000),
    ("418 without either", Reply(418, b""), SAME, 120_000),
    ("ban epoch", banned(30_000), SAME, 30_000),
    ("ban epoch later than Retry-After", banned(120_000, 35_000), SAME, 120_000),
    ("Retry-After later than ban epoch", banned(120_000, 200_000), SAME, 200_000),
    ("ban told by a 400", banned(120_000, http=400), SAME, 120_000),
    ("fourteen digits are no epoch", refusal(429, -1003, "banned until 17504856120760"), SAME, 10_000),
    ("no digits are no epoch", refusal(429, -1003, "banned until further notice"), SAME, 10_000),
    ("403", FORBIDDEN, SAME, 7),
    ("403 with Retry-After", FORBIDDEN_FOR_A_MOMENT, SAME, 7),
    ("challenge", CHALLENGE, SAME, 7),
    ("451", REGION, SAME, 1_000),
    ("451 with Retry-After", REGION_FOR_SECONDS, SAME, 7_000),
    ("no pause is shorter than a second", refusal(429, -1003, "", 0), SAME, 1_000),
    ("... nor that of a ban that has just ended", banned(-5), SAME, 1_000),
    # the end that the exchange names by its clock is waited for by Redis' clock, to the last moment that it can be
    ("Redis' clock is ahead", banned(3_000), Span(5_000, 5_000), 8_000),
    ("Redis' clock is behind", banned(3_000), Span(-7_000, -1_000), 2_000),
    # while nobody knows how far the clocks are apart, a ban lasts at least as long as one without a named end
    ("a short ban", banned(3_000), None, 120_000),
    ("an end in the past", banned(-3_600_000), None, 120_000),
    ("a long ban", banned(3_600_000), None, 3_600_000),
    ("Retry-After, an end in the past", banned(-3_600_000, 35_000), None, 35_000),
    ("a later end", banned(90_000, 35_000), None, 90_000),
]


@pytest.mark.parametrize(("answer", "ahead", "expected_ms"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_how_long_the_address_pauses(answer: Answer, ahead: Span | None, expected_ms: int) -> None:
    """The later of Retry-After and the ban's end holds; without either, the documented least. How long a block by the
    firewall is waited out is a setting."""
    assert pause_ms(classify(Call.CANCEL, OrderRef(ALGO_ID), answer), Policy(waf_pause_ms=7), NOW, ahead) == expected_ms


@pytest.mark.parametrize("ahead", [None, SAME, Span(10**12, 10**12)])
@pytest.mark.parametrize(
    ("until_ms", "retry_after_ms"), [(9_999_999_999_999, None), (9_999_999_999_999, 3_000), (NOW, 10**15)]
)
def test_no_pause_is_longer_than_the_longest_ban(until_ms: int, retry_after_ms: int | None, ahead: Span | None) -> None:
    """Whatever an answer says, the gate of all workers opens within three days: then the exchange is asked again."""
    verdict = classify(Call.CANCEL, OrderRef(ALGO_ID), banned(until_ms - NOW, retry_after_ms))
    assert pause_ms(verdict, Policy(), NOW, ahead) == 3 * 24 * 3_600_000
