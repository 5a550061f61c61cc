"""How long everybody on an address keeps quiet after a refusal that asks for it."""

from __future__ import annotations

import json

import pytest

from producer.message import Call
from worker.classify import Means, OrderRef, Reply, Verdict, classify
from worker.decide import Policy, Span, pause_ms

#: Redis' clock and the exchange's are one and the same.
SAME = Span(0, 0)
BY_ALGO_ID = OrderRef(2146760)
BAN = "Way too many requests; IP(203.0.113.9) banned until 1750485612076. Please use the websocket for live updates."
CLOUDFRONT = b"<!DOCTYPE HTML><HTML><HEAD><TITLE>ERROR: The request could not be satisfied</TITLE></HEAD></HTML>"


def refusal(code: int, msg: str = "") -> bytes:
    """The body of an error answer."""
    return json.dumps({"code": code, "msg": msg}).encode()


NOW = 1750485492076


@pytest.mark.parametrize(
    ("answer", "expected_ms"),
    [
        (Reply(429, b"", retry_after_ms=35_000), 35_000),
        (Reply(429, b""), 10_000),
        (Reply(418, b""), 120_000),
        (Reply(418, refusal(-1003, BAN)), 120_000),
        (Reply(418, refusal(-1003, BAN), retry_after_ms=35_000), 120_000),
        (Reply(418, refusal(-1003, BAN), retry_after_ms=200_000), 200_000),
        (Reply(400, refusal(-1003, BAN)), 120_000),
        (Reply(429, refusal(-1003, "banned until 17504856120760")), 10_000),
        (Reply(429, refusal(-1003, "banned until further notice")), 10_000),
        (Reply(403, CLOUDFRONT), 300_000),
        (Reply(403, CLOUDFRONT, retry_after_ms=1), 300_000),
        (Reply(202, b"", challenge=True), 300_000),
        (Reply(451, CLOUDFRONT), 1_000),
        (Reply(451, CLOUDFRONT, retry_after_ms=7_000), 7_000),
    ],
    ids=[
        "Retry-After",
        "429 without either",
        "418 without either",
        "ban epoch",
        "ban epoch later than Retry-After",
        "Retry-After later than ban epoch",
        "ban told by a 400",
        "fourteen digits are no epoch",
        "no digits are no epoch",
        "403",
        "403 with Retry-After",
        "challenge",
        "451",
        "451 with Retry-After",
    ],
)
def test_how_long_the_address_pauses(answer: Reply, expected_ms: int) -> None:
    """The later of Retry-After and the ban's end holds; without either, the documented least."""
    assert pause_ms(classify(Call.CANCEL, BY_ALGO_ID, answer), Policy(), NOW, SAME) == expected_ms


def test_a_pause_is_never_negative() -> None:
    """A ban that is over by our clock asks for no time in the past."""
    assert pause_ms(Verdict(Means.LIMITED, 418, banned_until_ms=NOW - 5000), Policy(), NOW, SAME) >= 0


def test_the_firewalls_pause_is_the_policys() -> None:
    """How long a block by the firewall is waited out is a setting."""
    assert pause_ms(Verdict(Means.BLOCKED, 403), Policy(waf_pause_ms=7), NOW, SAME) == 7


def test_no_pause_is_shorter_than_a_second() -> None:
    """A 429 that asks for no pause, and a ban that has just ended, still keep everybody quiet for a second."""
    now_ms = 1_750_485_492_076

    pauses = [
        pause_ms(Verdict(Means.LIMITED, 429, retry_after_ms=0), Policy(), now_ms, SAME),
        pause_ms(Verdict(Means.LIMITED, 418, banned_until_ms=now_ms - 5), Policy(), now_ms, SAME),
    ]

    assert pauses == [1000, 1000]


def banned(until_ms: int, retry_after_ms: int | None = None) -> Verdict:
    """A 418 whose text names the ban's end by the exchange's clock."""
    answer = Reply(418, refusal(-1003, f"IP banned until {until_ms}."), retry_after_ms)
    return classify(Call.CANCEL, BY_ALGO_ID, answer)


@pytest.mark.parametrize(
    ("ahead", "waited_ms"), [(Span(0, 0), 3_000), (Span(5_000, 5_000), 8_000), (Span(-7_000, -1_000), 2_000)]
)
def test_a_bans_end_is_translated(ahead: Span, waited_ms: int) -> None:
    """The end that the exchange names by its clock is waited for by Redis' clock, to the last moment that it can be."""
    assert pause_ms(banned(NOW + 3_000), Policy(), NOW, ahead) == waited_ms


@pytest.mark.parametrize(
    ("verdict", "waited_ms"),
    [
        (banned(NOW + 3_000), 120_000),
        (banned(NOW - 3_600_000), 120_000),
        (banned(NOW + 3_600_000), 3_600_000),
        (banned(NOW - 3_600_000, 35_000), 35_000),
        (banned(NOW + 90_000, 35_000), 90_000),
    ],
    ids=["a short ban", "an end in the past", "a long ban", "Retry-After, an end in the past", "a later end"],
)
def test_an_end_by_an_unknown_clock_makes_no_pause_shorter(verdict: Verdict, waited_ms: int) -> None:
    """While nobody knows how far the clocks are apart, a ban lasts at least as long as one without a named end."""
    assert pause_ms(verdict, Policy(), NOW, None) == waited_ms


@pytest.mark.parametrize("ahead", [None, SAME, Span(10**12, 10**12)])
@pytest.mark.parametrize("verdict", [banned(9_999_999_999_999), banned(9_999_999_999_999, 3_000), banned(NOW, 10**15)])
def test_no_pause_is_longer_than_the_longest_ban(verdict: Verdict, ahead: Span | None) -> None:
    """Whatever an answer says, the gate of all workers opens within three days: then the exchange is asked again."""
    assert pause_ms(verdict, Policy(), NOW, ahead) == 3 * 24 * 3_600_000
