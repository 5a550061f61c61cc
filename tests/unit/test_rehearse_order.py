"""The order of a rehearsal: far from the market, within the symbol's rules, and reducing only."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.message import Outcome, OutcomeKind
from worker.classify import Means
from worker.rehearse_order import Unusable, far_stop, mark_price, rules_of, verdict


def info(**changes: str) -> dict[str, Any]:
    """What exchangeInfo says of a symbol."""
    told = {"tickSize": "0.10", "minPrice": "556.80", "stepSize": "0.001", "minQty": "0.001", "maxQty": "120"}
    told |= {"notional": "100"} | changes
    kinds = ("PRICE_FILTER", "LOT_SIZE", "MARKET_LOT_SIZE", "MIN_NOTIONAL")
    return {
        "symbols": [
            {"symbol": "XUSDT", "status": "TRADING", "filters": [{"filterType": kind, **told} for kind in kinds]}
        ]
    }


@pytest.mark.parametrize(
    ("changes", "mark", "quantity", "price"),
    [
        ({}, "86421.37", "0.003", "43210.6"),
        ({"notional": "0"}, "86421.37", "0.001", "43210.6"),
        ({"tickSize": "1"}, "86421.37", "0.003", "43210"),
        ({"tickSize": "0.25", "minPrice": "0"}, "10.6", "19.048", "5.25"),
        ({"stepSize": "1", "minQty": "1"}, "2000", "1", "1000"),
        ({"stepSize": "10", "minQty": "5", "minPrice": "0.00001", "tickSize": "0.00001"}, "90", "10", "45"),
        ({"minPrice": "600", "tickSize": "7"}, "1000", "0.167", "602"),
        (
            {"minPrice": "0.0000001", "tickSize": "0.0000001", "maxQty": "999999999999"},
            "0.0000002",
            "1000000000",
            "0.0000001",
        ),
    ],
)
def test_it_is_rounded_to_tick_and_step(changes: dict[str, str], mark: str, quantity: str, price: str) -> None:
    """About half the mark price, and the least quantity that the notional value and the symbol allow."""
    rules = rules_of(info(**changes), "XUSDT")
    assert rules is not None

    stop = far_stop(rules, Decimal(mark), is_hedged=False)

    assert (stop.quantity, stop.trigger_price) == (quantity, price)


@given(
    mark=st.decimals("0.00001", "10000000", places=8),
    tick=st.sampled_from(["0.00001", "0.0005", "0.01", "0.1", "0.25", "1", "5"]),
    step=st.sampled_from(["0.00001", "0.001", "0.1", "1", "100"]),
    notional=st.sampled_from(["0", "5", "20", "100", "1000.5"]),
)
def test_it_keeps_the_rules_of_any_symbol(mark: Decimal, tick: str, step: str, notional: str) -> None:
    """Whatever tick, step and notional are, the order keeps to them, far below the market, or there is none."""
    changes = {"tickSize": tick, "minPrice": tick, "stepSize": step, "minQty": step, "maxQty": "1000000000"}
    rules = rules_of(info(**changes, notional=notional), "XUSDT")
    assert rules is not None
    try:
        stop = far_stop(rules, mark, is_hedged=False)
    except Unusable:
        assert mark < 2 * Decimal(tick) or mark * Decimal("1000000000") < 4 * Decimal(notional)
        return
    price, quantity = Decimal(stop.trigger_price), Decimal(stop.quantity)
    assert 0 < price <= mark * Decimal("0.8")
    assert quantity > 0
    assert price % Decimal(tick) == 0
    assert quantity % Decimal(step) == 0
    assert price * quantity >= Decimal(notional)


@pytest.mark.parametrize(
    ("told", "says"),
    [
        (None, "lists no symbols"),
        ([], "lists no symbols"),
        ({"symbols": "x"}, "lists no symbols"),
        (info(tickSize="0"), "tickSize is '0'"),
        (info(tickSize="1e5"), "tickSize is '1e5', not a decimal"),
        (info(stepSize="9" * 400), "stepSize is '999"),
        ({"symbols": [{"symbol": "XUSDT", "status": "TRADING"}]}, "has no filter PRICE_FILTER"),
        ({"symbols": [{"symbol": "XUSDT", "status": "\x1b[2J"}]}, "not TRADING"),
    ],
)
def test_odd_rules_are_named(told: Any, says: str) -> None:
    """What cannot be used is quoted, within bounds and fit for a terminal."""
    with pytest.raises(Unusable) as caught:
        rules_of(told, "XUSDT")

    assert says in str(caught.value)
    assert len(str(caught.value)) < 200
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("changes", "mark", "says"),
    [
        ({"minPrice": "900"}, "1000", "takes no price far below its mark price 1000"),
        ({"tickSize": "1000"}, "1000", "takes no price far below its mark price 1000"),
        ({"maxQty": "0.001", "notional": "5000"}, "2000", "takes no quantity"),
    ],
)
def test_rules_that_leave_no_order_are_named(changes: dict[str, str], mark: str, says: str) -> None:
    """Where every order would be near the market, or too large, none is placed."""
    rules = rules_of(info(**changes), "XUSDT")
    assert rules is not None

    with pytest.raises(Unusable, match=says):
        far_stop(rules, Decimal(mark), is_hedged=False)


@pytest.mark.parametrize("told", [None, [], {"symbol": "YUSDT", "markPrice": "1"}, {"symbol": "XUSDT"}])
def test_a_mark_price_is_that_of_the_symbol(told: Any) -> None:
    """No price is taken from an answer about something else."""
    with pytest.raises(Unusable):
        mark_price(told, "XUSDT")


@pytest.mark.parametrize(
    ("kind", "state", "word"),
    [
        (OutcomeKind.CANCELLED, Means.CANCELED, "passed"),
        (OutcomeKind.CANCELLED, Means.OPEN, "failed"),
        (OutcomeKind.CANCELLED, Means.NO_SUCH_ORDER, "failed"),
        (OutcomeKind.CANCELLED, Means.EXPIRED, "failed"),
        (OutcomeKind.ALREADY_CANCELLED, Means.CANCELED, "inconclusive"),
        (OutcomeKind.ALREADY_CANCELLED, Means.OPEN, "failed"),
        (OutcomeKind.EXPIRED, Means.EXPIRED, "inconclusive"),
        (OutcomeKind.GAVE_UP, Means.TRIGGERING, "inconclusive"),
        (OutcomeKind.TRIGGERED, Means.TRIGGERED, "failed"),
        (OutcomeKind.TRIGGERED, Means.FINISHED, "failed"),
        (OutcomeKind.NOT_FOUND, Means.NO_SUCH_ORDER, "failed"),
        (OutcomeKind.UNKNOWN, Means.CANCELED, "failed"),
        (None, Means.CANCELED, "failed"),
    ],
)
def test_only_a_proof_passes(kind: OutcomeKind | None, state: Means, word: str) -> None:
    """An outcome alone proves nothing: a rehearsal has passed where a query shows what the outcome says."""
    outcome = None if kind is None else Outcome("id", 1, kind)

    assert verdict(outcome, state, state.value.upper(), 1.0)[0] == word
