"""What a worker does about all open orders of a symbol, step by step: answers in, calls and the outcome out."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from producer.message import WORKER_LOST, Attempt, Call, OutcomeKind
from tests import decisions
from tests.decisions import (
    BAD_KEY,
    CHALLENGE,
    GATEWAY,
    LATE_CLOCK,
    LIMITED,
    NO_CONNECTION,
    NOT_THERE,
    OVERLOAD,
    POLICY,
    SILENT,
    T0,
    TIMEOUT,
    UNKNOWN_ERROR,
    Answer,
    refusal,
)
from worker import listing
from worker.classify import MAX_LISTED, Means, Reply, SymbolRef, Verdict, classify
from worker.decide import Case, Span, Stop
from worker.listing import has_untold

CASE = Case(False, T0, T0 + 60_000, ahead=Span(-5, 5))


def order(algo_id: int, created_ms: int | None = T0 - 60_000, symbol: str = "BTCUSDT") -> dict[str, Any]:
    """An order as a list shows it."""
    return {"algoId": algo_id, "symbol": symbol, "algoStatus": "NEW", "createTime": created_ms}


def told(*orders: object, **how: Any) -> Reply:
    """A list of open orders."""
    return Reply(200, json.dumps(orders).encode(), **how)


def verdict_of(answer: Answer) -> Verdict:
    """What an answer means."""
    return classify(Call.LIST_OPEN, SymbolRef("BTCUSDT"), answer)


def play(answers: list[Answer], deadline_s: float = 60, **known: Any) -> tuple[Stop, list[int]]:
    """The end, and the delays before each further call; the last answer comes for ever."""
    how = {"ahead": CASE.ahead, **known}
    played = decisions.play(answers, rules=listing, ref=SymbolRef("BTCUSDT"), deadline_s=deadline_s, **how)
    assert set(played.calls) == {"list_open"}
    assert played.history[-1].at_ms < T0 + deadline_s * 1000
    return played.stop, played.delays


#: What is answered first, before the list: each is asked again, and so is what no list of the symbol proves.
AGAIN: list[tuple[str, Answer, Means]] = [
    ("silence", SILENT, Means.UNCLEAR),
    ("time-out", TIMEOUT, Means.UNCLEAR),
    ("no connection", NO_CONNECTION, Means.NOT_SENT),
    ("gateway", GATEWAY, Means.UNCLEAR),
    ("unknown error", UNKNOWN_ERROR, Means.UNCLEAR),
    ("overload", OVERLOAD, Means.BUSY),
    ("clock", LATE_CLOCK, Means.CLOCK),
    ("too many", LIMITED, Means.LIMITED),
    ("no such order", NOT_THERE, Means.NO_SUCH_ORDER),
    ("an object", Reply(200, b'{"algoId":1,"symbol":"BTCUSDT"}'), Means.UNCLEAR),
    ("cut off", told(order(1), truncated=True), Means.UNCLEAR),
    ("empty body", Reply(200, b""), Means.UNCLEAR),
    ("202 with a list", Reply(202, b"[]"), Means.UNCLEAR),
    ("another symbol's", told(order(1), order(2, symbol="ETHUSDT")), Means.UNCLEAR),
    ("without an id", told(order(1), {"symbol": "BTCUSDT"}), Means.UNCLEAR),
    ("not an order", told(order(1), 7), Means.UNCLEAR),
    ("an id below 1", told(order(0)), Means.UNCLEAR),
    ("too many orders", told(*(order(1 + i) for i in range(MAX_LISTED + 1))), Means.UNCLEAR),
]


@pytest.mark.parametrize(("answer", "means"), [row[1:] for row in AGAIN], ids=[row[0] for row in AGAIN])
def test_a_list_that_was_not_told_is_asked_for_again(answer: Answer, means: Means) -> None:
    """Whatever comes in place of a list of the symbol's orders, it is asked for again until the deadline; then it is
    `gave_up`, and never `unknown`: a read leaves no doubt."""
    assert verdict_of(answer).means is means
    stop, _ = play([answer, told(order(7))])
    assert (stop.kind, [each.algo_id for each in stop.orders or ()]) == (OutcomeKind.LISTED, [7])

    stop, delays = play([answer])
    assert (stop.kind, stop.orders) == (OutcomeKind.GAVE_UP, None)
    assert stop.error is not None
    assert "not known" in stop.error
    assert max(delays) > 0


@pytest.mark.parametrize("answer", [refusal(400, -1121, "Invalid symbol."), BAD_KEY], ids=["symbol", "key"])
def test_a_refusal_ends_it(answer: Answer) -> None:
    """What repeating cannot change is refused at once, with the exchange's words."""
    stop, delays = play([answer])

    assert (stop.kind, delays) == (OutcomeKind.REFUSED, [])
    assert str(verdict_of(answer).code) in (stop.error or "")


def test_what_was_created_later_is_not_meant() -> None:
    """An order is meant if it is proven older than the request, and one that may be either is left alone and named."""
    lists = told(order(1, T0 - 5), order(2, T0 - 4), order(3, T0 + 5), order(4, T0 + 6), order(5, None))

    stop, _ = play([lists])

    assert [each.algo_id for each in stop.orders or ()] == [1]
    assert stop.left_alone == (2, 3, 5)


def test_without_clocks_nothing_is_concluded() -> None:
    """While the clocks are not measured no list is believed."""
    stop, _ = play([told(order(1))], ahead=None)

    assert (stop.kind, stop.orders) == (OutcomeKind.GAVE_UP, None)


def test_too_late_or_lost() -> None:
    """Past the deadline it is overdue if nothing was sent; a lost worker's listing leaves no doubt either."""
    late = replace(CASE, deadline_at_ms=T0)
    lost = Attempt(1, T0 - 10, Call.CANCEL, None, None, WORKER_LOST, Means.UNCLEAR.value, 10)

    for history, kind in (([], OutcomeKind.OVERDUE), ([lost], OutcomeKind.GAVE_UP)):
        step = listing.first_step(late, history, T0)
        assert isinstance(step, Stop)
        assert step.kind is kind


def test_a_pause_is_not_cut_short() -> None:
    """A pause that the exchange asks for is kept, and a list that it would come too late for is given up."""
    _, delays = play([LIMITED, told()])
    assert delays == [3_000]

    stop, delays = play([CHALLENGE, told()])
    assert (stop.kind, delays) == (OutcomeKind.GAVE_UP, [])


def test_attempts_are_bounded() -> None:
    """What was answered unclearly so often as the settings allow is given up before the deadline."""
    stop, delays = play([GATEWAY], deadline_s=7 * 86_400)

    assert (stop.kind, len(delays)) == (OutcomeKind.GAVE_UP, POLICY.max_attempts - 1)
    assert f"{POLICY.max_attempts} counted attempts" in (stop.error or "")


@pytest.mark.parametrize(
    ("created_ms", "ahead", "is_untold"),
    [(T0, Span(-5, 5), True), (T0 - 5, Span(-5, 5), False), (T0 + 6, Span(-5, 5), False), (T0 - 60_000, None, True)],
)
def test_what_a_better_clock_might_tell(created_ms: int, ahead: Span | None, is_untold: bool) -> None:
    """The clocks are measured anew where they tell of an order neither that it is older nor that it is younger."""
    case = replace(CASE, ahead=ahead)

    assert has_untold(case, verdict_of(told(order(1, created_ms)))) is is_untold
    assert not has_untold(case, verdict_of(told()))
