"""The local exchange's book: states, client ids and what counts as an effective cancel."""

from __future__ import annotations

from decimal import Decimal
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.sandbox.book import AlgoStatus, Course, Order, OrderBook, OrderTerms

NOW_MS = 1_750_485_492_076

QUERY_FIELDS = {
    *("algoId", "clientAlgoId", "algoType", "orderType", "symbol", "side", "positionSide", "timeInForce", "quantity"),
    *("algoStatus", "actualOrderId", "actualPrice", "actualType", "actualQty", "triggerPrice", "price"),
    *("icebergQuantity", "tpOrderType", "selfTradePreventionMode", "workingType", "priceMatch", "closePosition"),
    *("priceProtect", "reduceOnly", "createTime", "updateTime", "triggerTime", "goodTillDate"),
}


def opened(book: OrderBook, client_algo_id: str = "", account: str = "default", now_ms: int = NOW_MS) -> Order:
    return book.add(account, OrderTerms(client_algo_id=client_algo_id), now_ms)


def found(book: OrderBook, order: Order, now_ms: int) -> Order:
    again = book.find(order.account, now_ms, algo_id=order.algo_id)
    assert again is order
    return again


def test_a_query_answer_has_the_documented_fields() -> None:
    """GET shows exactly the fields of the documented sample, with the order's own values."""
    book = OrderBook()
    terms = OrderTerms("BNBUSDT", "BUY", "TAKE_PROFIT", "0.01", "750.000", "6B2I9XVcJpCjqPAJ4YoFX7")
    order = book.add("default", terms, NOW_MS)
    assert book.cancel(order, NOW_MS + 5)
    shown = order.as_query_answer()
    assert set(shown) == QUERY_FIELDS
    wanted = {
        "algoId": order.algo_id,
        "clientAlgoId": "6B2I9XVcJpCjqPAJ4YoFX7",
        "algoType": "CONDITIONAL",
        "orderType": "TAKE_PROFIT",
        "symbol": "BNBUSDT",
        "side": "BUY",
        "algoStatus": "CANCELED",
        "actualOrderId": "",
        "actualType": "LIMIT",
        "triggerPrice": "750.000",
        "createTime": NOW_MS,
        "updateTime": NOW_MS + 5,
        "triggerTime": 0,
    }
    assert {name: shown[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("order_type", "kind", "price"), [("STOP_MARKET", "MARKET", "0"), ("TAKE_PROFIT", "LIMIT", "749.000")]
)
def test_a_triggered_order_has_a_child(order_type: str, kind: str, price: str) -> None:
    """From TRIGGERED on a normal order stands in the book: LIMIT for the types with a price, MARKET for the others."""
    book = OrderBook()
    terms = OrderTerms("BNBUSDT", "BUY", order_type, "0.01", "750.000", price="749.000")
    order = book.add("default", terms, NOW_MS)
    book.trigger(order, NOW_MS, Course(10))
    assert found(book, order, NOW_MS + 9).child is None
    child = found(book, order, NOW_MS + 10).child
    assert child is not None
    assert book.find_child("default", "BNBUSDT", child.order_id, NOW_MS + 10) is child
    assert book.find_child("default", "BNBUSDT", child.client_order_id, NOW_MS + 10) is child
    assert book.find_child("default", "BTCUSDT", child.order_id, NOW_MS + 10) is None
    assert book.find_child("other", "BNBUSDT", child.order_id, NOW_MS + 10) is None
    wanted = {
        "orderId": child.order_id,
        "status": "NEW",
        "type": kind,
        "price": price,
        "origQty": "0.01",
        "executedQty": "0",
        "cumQty": "0",
        "side": "BUY",
        "updateTime": NOW_MS + 10,
    }
    shown = child.as_cancel_answer()
    assert {name: shown[name] for name in wanted} == wanted
    assert "code" not in shown
    queried = child.as_query_answer()
    assert (queried["avgPrice"], queried["time"]) == ("0.00000", NOW_MS + 10)


def test_a_child_is_filled_in_parts_and_its_end_is_its_parents() -> None:
    """Executed quantity and mean price follow the fills; the parent is FINISHED when the child ends, not before."""
    book = OrderBook()
    order = opened(book)
    book.trigger(order, NOW_MS, Course())
    child = order.child
    assert child is not None
    assert book.fill(child, NOW_MS + 1, "0.004", "100")
    assert (child.status, child.executed_qty, order.status) == ("PARTIALLY_FILLED", Decimal("0.004"), "TRIGGERED")
    with pytest.raises(ValueError, match="left to fill"):
        book.fill(child, NOW_MS + 1, "0.007")
    assert book.fill(child, NOW_MS + 2, price="200")
    shown = child.as_query_answer()
    assert (shown["status"], shown["executedQty"], shown["avgPrice"]) == ("FILLED", "0.01", "160.00000")
    assert (order.status, order.update_time_ms) == (AlgoStatus.FINISHED, NOW_MS + 2)
    assert not book.cancel(child, NOW_MS + 3)
    assert not book.fill(child, NOW_MS + 3)


MOVES = st.sampled_from(["cancel", "CANCELED", "EXPIRED", "REJECTED", "trigger", "stick", "refuse", "look"])


@given(st.lists(st.tuples(MOVES, st.integers(0, 30)), max_size=25))
def test_an_order_is_cancelled_at_most_once_and_never_after_triggering(moves: list[tuple[str, int]]) -> None:
    """In any history at most one cancel takes effect, only on a NEW order, and final states stay."""
    book, now_ms = OrderBook(), NOW_MS
    order = opened(book)
    passed = [order.status]
    for move, elapsed_ms in moves:
        now_ms += elapsed_ms
        before = found(book, order, now_ms).status
        effective = order.deletes_effective
        applied = _apply(book, order, move, now_ms)
        passed += [before, found(book, order, now_ms).status]
        assert order.deletes_effective - effective == (move == "cancel" and applied)
        assert not applied or before is AlgoStatus.NEW or (move, before) == ("REJECTED", AlgoStatus.TRIGGERING)
    assert order.deletes_effective <= 1
    steps = [pair for pair in pairwise(passed) if pair[0] is not pair[1]]
    assert all(after in FOLLOWERS[before] for before, after in steps)


FOLLOWERS = {
    AlgoStatus.NEW: set(AlgoStatus) - {AlgoStatus.NEW},
    AlgoStatus.TRIGGERING: {AlgoStatus.TRIGGERED, AlgoStatus.FINISHED, AlgoStatus.REJECTED},
    AlgoStatus.TRIGGERED: {AlgoStatus.FINISHED},
    AlgoStatus.FINISHED: set(),
    AlgoStatus.CANCELED: set(),
    AlgoStatus.EXPIRED: set(),
    AlgoStatus.REJECTED: set(),
}


def _apply(book: OrderBook, order: Order, move: str, now_ms: int) -> bool:
    match move:
        case "cancel":
            return book.cancel(order, now_ms)
        case "look":
            return False
        case "CANCELED" | "EXPIRED" | "REJECTED":
            return book.end(order, move, now_ms)
    courses = {"trigger": Course(10, finished_after_ms=20), "stick": Course(None), "refuse": Course(10, rejected=True)}
    return book.trigger(order, now_ms, courses[move])
