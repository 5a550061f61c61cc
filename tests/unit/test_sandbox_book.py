"""The local exchange's book: states, client ids and what counts as an effective cancel."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.sandbox.book import FIRST_ALGO_ID, MAX_ARRIVALS, AlgoStatus, DuplicateClientId, Order, OrderBook, OrderTerms

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


def test_a_new_order_rests_under_a_sixteen_digit_id() -> None:
    """Ids look like production's: 16 digits, above 2^50, growing."""
    book = OrderBook()
    first, second = opened(book), opened(book)
    assert first.status is AlgoStatus.NEW
    assert first.algo_id == FIRST_ALGO_ID
    assert len(str(first.algo_id)) == 16
    assert 2**50 < first.algo_id < second.algo_id < 2**53


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


def test_a_cancel_takes_effect_once() -> None:
    """The second cancel of an order does nothing and is not counted as effective."""
    book = OrderBook()
    order = opened(book)
    assert book.cancel(order, NOW_MS)
    assert not book.cancel(order, NOW_MS + 1)
    assert (order.status, order.deletes_effective, order.update_time_ms) == (AlgoStatus.CANCELED, 1, NOW_MS)


def test_a_cancel_by_somebody_else_is_not_an_effective_request() -> None:
    """An order that its owner cancelled by hand shows CANCELED without an effective DELETE."""
    book = OrderBook()
    order = opened(book)
    assert book.cancel(order, NOW_MS, by_request=False)
    assert (order.status, order.deletes_effective) == (AlgoStatus.CANCELED, 0)


def test_a_trigger_runs_its_course_as_time_passes() -> None:
    """TRIGGERING has no child order, TRIGGERED names one, FINISHED keeps it, each from its own time on."""
    book = OrderBook()
    order = opened(book)
    assert book.trigger(order, NOW_MS, triggered_after_ms=10, finished_after_ms=100)
    seen = []
    for after_ms in (0, 9, 10, 109, 110):
        current = found(book, order, NOW_MS + after_ms)
        seen.append((current.status.value, bool(current.actual_order_id), current.update_time_ms - NOW_MS))
    assert seen == [
        ("TRIGGERING", False, 0),
        ("TRIGGERING", False, 0),
        ("TRIGGERED", True, 10),
        ("TRIGGERED", True, 10),
        ("FINISHED", True, 110),
    ]
    assert order.trigger_time_ms == NOW_MS


def test_a_trigger_can_be_seen_for_the_first_time_when_it_is_over() -> None:
    """Nobody needs to look in between: the states are reached in order whenever the order is next looked at."""
    book = OrderBook()
    order = opened(book)
    book.trigger(order, NOW_MS, triggered_after_ms=10, finished_after_ms=100)
    late = found(book, order, NOW_MS + 60_000)
    assert (late.status, late.update_time_ms) == (AlgoStatus.FINISHED, NOW_MS + 110)
    assert late.actual_order_id


def test_a_trigger_can_stay_triggered_get_stuck_or_be_rejected() -> None:
    """Without a finish the child order stays, without an end it hangs, and the engine may refuse it."""
    book = OrderBook()
    stays, stuck, refused = opened(book), opened(book), opened(book)
    book.trigger(stays, NOW_MS)
    book.trigger(stuck, NOW_MS, triggered_after_ms=None, finished_after_ms=5)
    book.trigger(refused, NOW_MS, triggered_after_ms=10, rejected=True)
    later = NOW_MS + 86_400_000
    assert found(book, stays, later).status is AlgoStatus.TRIGGERED
    assert found(book, stuck, later).status is AlgoStatus.TRIGGERING
    assert found(book, refused, later).status is AlgoStatus.REJECTED
    assert not refused.actual_order_id


def test_child_orders_have_ids_of_their_own() -> None:
    """Two triggered orders become two different normal orders."""
    book = OrderBook()
    orders = [opened(book), opened(book)]
    for order in orders:
        book.trigger(order, NOW_MS)
    assert len({order.actual_order_id for order in orders}) == 2


@pytest.mark.parametrize(
    "leave",
    [
        lambda book, order: book.cancel(order, NOW_MS),
        lambda book, order: book.expire(order, NOW_MS),
        lambda book, order: book.reject(order, NOW_MS),
        lambda book, order: book.trigger(order, NOW_MS, triggered_after_ms=50),
    ],
    ids=["cancelled", "expired", "rejected", "triggering"],
)
def test_an_order_leaves_new_once(leave: Callable[[OrderBook, Order], bool]) -> None:
    """Whatever ended NEW, no cancel, expiry or trigger changes the order afterwards."""
    book = OrderBook()
    order = opened(book)
    assert leave(book, order)
    status = order.status
    assert not book.cancel(order, NOW_MS)
    assert not book.expire(order, NOW_MS)
    assert not book.trigger(order, NOW_MS)
    assert order.status is status


def test_the_engine_can_reject_a_triggering_order() -> None:
    """REJECTED can follow TRIGGERING, and then nothing follows."""
    book = OrderBook()
    order = opened(book)
    book.trigger(order, NOW_MS, triggered_after_ms=10)
    assert book.reject(order, NOW_MS + 5)
    assert found(book, order, NOW_MS + 20).status is AlgoStatus.REJECTED


def test_a_client_id_is_unique_among_open_orders_only() -> None:
    """A client id is refused while an order that bears it is NEW or TRIGGERING, and free afterwards."""
    book = OrderBook()
    first = opened(book, "stop-1")
    with pytest.raises(DuplicateClientId):
        opened(book, "stop-1")
    book.trigger(first, NOW_MS, triggered_after_ms=10)
    with pytest.raises(DuplicateClientId):
        opened(book, "stop-1", now_ms=NOW_MS + 9)
    second = opened(book, "stop-1", now_ms=NOW_MS + 10)
    assert second.algo_id != first.algo_id


def test_a_client_id_finds_the_newest_order_that_bears_it() -> None:
    """After reuse the client id means the newer order, and the older one is found by its algo id alone."""
    book = OrderBook()
    first = opened(book, "stop-1")
    book.cancel(first, NOW_MS)
    second = opened(book, "stop-1", now_ms=NOW_MS + 1)
    assert book.find("default", NOW_MS + 2, client_algo_id="stop-1") is second
    assert book.find("default", NOW_MS + 2, algo_id=first.algo_id) is first


def test_an_algo_id_wins_over_a_client_id() -> None:
    """Where the two ids name different orders, the algo id decides."""
    book = OrderBook()
    first, second = opened(book, "a"), opened(book, "b")
    assert book.find("default", NOW_MS, algo_id=first.algo_id, client_algo_id=second.client_algo_id) is first


def test_accounts_do_not_see_each_other() -> None:
    """Neither id finds another account's order, and both accounts may use one client id."""
    book = OrderBook()
    mine, yours = opened(book, "stop-1", "mine"), opened(book, "stop-1", "yours")
    assert book.find("mine", NOW_MS, algo_id=yours.algo_id) is None
    assert book.find("mine", NOW_MS, client_algo_id="stop-1") is mine
    assert book.open_orders("yours", NOW_MS) == [yours]


def test_open_orders_are_new_not_forgotten_and_of_the_symbol() -> None:
    """The open list leaves out what has left NEW, what is forgotten for now, and other symbols."""
    book = OrderBook()
    kept, cancelled, forgotten = opened(book), opened(book), opened(book)
    other = book.add("default", OrderTerms("ETHUSDT"), NOW_MS)
    book.cancel(cancelled, NOW_MS)
    book.forget(forgotten, NOW_MS + 100)
    assert book.open_orders("default", NOW_MS) == [kept, other]
    assert book.open_orders("default", NOW_MS, "BTCUSDT") == [kept]
    assert book.open_orders("default", NOW_MS + 100, "BTCUSDT") == [kept, forgotten]


def test_exchange_times_follow_the_skewed_clock() -> None:
    """Times that an order shows are exchange time, while its course follows local time."""
    book = OrderBook(clock_skew_ms=-5_000)
    order = opened(book)
    book.trigger(order, NOW_MS, triggered_after_ms=10)
    book.clock_skew_ms = 5_000
    assert found(book, order, NOW_MS + 9).status is AlgoStatus.TRIGGERING
    assert found(book, order, NOW_MS + 10).status is AlgoStatus.TRIGGERED
    assert (order.create_time_ms, order.update_time_ms) == (NOW_MS - 5_000, NOW_MS + 5_010)


def test_arrivals_are_counted_in_full_and_kept_in_part() -> None:
    """Every DELETE counts; only the first arrival times are kept, so that a hammered order costs no memory."""
    order = opened(OrderBook())
    for arrival_ns in range(MAX_ARRIVALS + 10):
        order.note_delete(arrival_ns)
    assert order.deletes == MAX_ARRIVALS + 10
    assert order.delete_arrivals_ns == list(range(MAX_ARRIVALS))


MOVES = st.sampled_from(
    ["cancel", "cancel_by_hand", "expire", "reject", "trigger", "stick", "refuse", "forget", "look"]
)


@settings(max_examples=100, deadline=None)
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
        assert not applied or before is AlgoStatus.NEW or (move, before) == ("reject", AlgoStatus.TRIGGERING)
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
        case "cancel_by_hand":
            return book.cancel(order, now_ms, by_request=False)
        case "expire":
            return book.expire(order, now_ms)
        case "reject":
            return book.reject(order, now_ms)
        case "trigger":
            return book.trigger(order, now_ms, triggered_after_ms=10, finished_after_ms=20)
        case "stick":
            return book.trigger(order, now_ms, triggered_after_ms=None)
        case "refuse":
            return book.trigger(order, now_ms, triggered_after_ms=10, rejected=True)
        case "forget":
            book.forget(order, now_ms + 15)
    return False
