"""The local exchange's book: states, client ids and what counts as an effective cancel."""

from __future__ import annotations

from itertools import pairwise

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


MOVES = st.sampled_from(["cancel", "CANCELED", "EXPIRED", "REJECTED", "trigger", "stick", "refuse", "look"])


@given(st.lists(st.tuples(MOVES, st.integers(0, 30)), max_size=25))
def test_an_order_is_cancelled_at_most_once_and_never_after_triggering(moves: list[tuple[str, int]]) -> None:
    """In any history at most one cancel takes effect, only on a NEW order, and final states stay."""
    book, now_ms = OrderBook(), NOW_MS
    order = book.add("default", OrderTerms(), NOW_MS)
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
