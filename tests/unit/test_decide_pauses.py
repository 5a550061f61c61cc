"""How long everybody on an address keeps quiet after a refusal that asks for it."""

from __future__ import annotations

import pytest

from producer.message import Call
from tests.decisions import ALGO_ID, CHALLENGE, FORBIDDEN, REGION, SAME, Answer, refusal
from worker.classify import OrderRef, Reply, classify
from worker.decide import Policy, Span, pause_ms

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
