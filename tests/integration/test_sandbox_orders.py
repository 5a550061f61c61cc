"""The local exchange's other calls: what may be placed and is echoed, lists, bulk cancels, prices, modes, keys."""

from __future__ import annotations

import hmac
import time
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.caller import ALGO_ORDER, CHILD_ORDER, KEY, OPEN_ORDERS, SECRET, Caller, child_of
from worker.sandbox.control import ControlError, RunningExchange

ALL_ORDERS = "/fapi/v1/allAlgoOrders"
MODE = "/fapi/v1/positionSide/dual"
LISTEN_KEY = "/fapi/v1/listenKey"
#: A stop that nothing is wrong with; prices start at 60000 for BTCUSDT.
STOP: dict[str, Any] = {
    "algoType": "CONDITIONAL",
    "symbol": "BTCUSDT",
    "side": "SELL",
    "type": "STOP_MARKET",
    "quantity": "0.010",
    "triggerPrice": "50000.1",
}
TRAILING = STOP | {"type": "TRAILING_STOP_MARKET", "callbackRate": "1.5", "triggerPrice": None}
LIMITED = STOP | {"type": "STOP", "price": "49900"}
CLOSING = STOP | {"closePosition": "true", "quantity": None}


def sent(terms: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in terms.items() if value is not None}


GOOD_TILL_MS = (int(time.time()) + 3_600) * 1_000


@pytest.mark.parametrize(
    "terms",
    [
        STOP,
        STOP | {"side": "BUY", "triggerPrice": "70000", "workingType": "MARK_PRICE", "priceProtect": "true"},
        STOP | {"type": "TAKE_PROFIT_MARKET", "triggerPrice": "70000", "reduceOnly": "true"},
        LIMITED,
        STOP | {"type": "TAKE_PROFIT", "triggerPrice": "70000", "priceMatch": "QUEUE_5"},
        LIMITED | {"timeInForce": "GTD", "goodTillDate": GOOD_TILL_MS, "selfTradePreventionMode": "EXPIRE_BOTH"},
        CLOSING,
        CLOSING | {"side": "BUY", "type": "TAKE_PROFIT_MARKET"},
        TRAILING,
        TRAILING | {"activatePrice": "61000", "clientAlgoId": "trail:1/a"},
        STOP | {"symbol": "币安人生USDT", "triggerPrice": "0.1000100", "quantity": "100"},
    ],
)
def test_terms_are_taken_and_echoed_as_they_were_sent(caller: Caller, terms: dict[str, Any]) -> None:
    """Every conditional type is opened, and its answer, its query and the list show what was sent."""
    answer = caller.call("POST", **sent(terms)).json
    shown = {
        {"type": "orderType"}.get(name, name): {"true": True}.get(value, value) for name, value in sent(terms).items()
    }
    assert {name: answer[name] for name in shown} == shown
    query = caller.call("GET", algoId=answer["algoId"]).json
    assert {name: query.get(name) for name in shown if name in query} == {n: shown[n] for n in shown if n in query}
    assert (answer["algoStatus"], query["actualOrderId"]) == ("NEW", "")
    (listed,) = caller.call("GET", OPEN_ORDERS, symbol=terms["symbol"]).json
    assert {name: value for name, value in listed.items() if name in query} == query
    assert answer["quantity"] == (terms["quantity"] or "0")


@pytest.mark.parametrize(
    ("terms", "code"),
    [
        *[(STOP | {name: None}, -1102) for name in ("algoType", "symbol", "side", "type", "quantity", "triggerPrice")],
        (LIMITED | {"price": None}, -1102),
        (TRAILING | {"callbackRate": None}, -1102),
        (LIMITED | {"timeInForce": "GTD"}, -1102),
        (STOP | {"symbol": "NOSUCHUSDT"}, -1121),
        (STOP | {"side": "LONG"}, -1117),
        (STOP | {"type": "LIMIT"}, -1116),
        (LIMITED | {"timeInForce": "DAY"}, -1115),
        (STOP | {"quantity": "1e-3"}, -1100),
        (STOP | {"quantity": "0"}, -4003),
        (STOP | {"quantity": "0.0101"}, -1111),
        (STOP | {"symbol": "SOLUSDT", "triggerPrice": "100.0010"}, -4014),
        (STOP | {"triggerPrice": "50000.05"}, -4014),
        (STOP | {"symbol": "SOLUSDT", "triggerPrice": "100", "quantity": "0.01"}, -4164),
        (STOP | {"positionSide": "LONG"}, -4061),
        (STOP | {"positionSide": "UP"}, -4060),
        (CLOSING | {"quantity": "0.01"}, -4137),
        (CLOSING | {"reduceOnly": "true"}, -1106),
        (CLOSING | {"type": "STOP", "price": "49900"}, -1106),
        (STOP | {"priceMatch": "QUEUE"}, -1106),
        (LIMITED | {"priceMatch": "QUEUE"}, -1106),
        (STOP | {"reduceOnly": "perhaps"}, -1130),
        (TRAILING | {"callbackRate": "20.1"}, -1130),
        (LIMITED | {"timeInForce": "GTD", "goodTillDate": GOOD_TILL_MS // 2}, -1130),
        (STOP | {"triggerPrice": "60000"}, -2021),
        (STOP | {"side": "BUY", "triggerPrice": "60000"}, -2021),
        (STOP | {"type": "TAKE_PROFIT_MARKET", "triggerPrice": "59999.9"}, -2021),
        (LIMITED | {"side": "BUY", "type": "TAKE_PROFIT", "triggerPrice": "60000.1"}, -2021),
        (TRAILING | {"activatePrice": "60000"}, -2021),
        (TRAILING | {"side": "BUY", "activatePrice": "60000"}, -2021),
        (STOP | {"clientAlgoId": "x" * 37}, -4015),
    ],
)
def test_terms_that_cannot_be_are_refused(
    market: RunningExchange, caller: Caller, terms: dict[str, Any], code: int
) -> None:
    """What is missing, unknown, too fine, too small, contradictory or met already is refused, and nothing is opened."""
    assert caller.call("POST", **sent(terms)).error[:2] == (400, code)
    assert market.book() == {}


def test_a_client_id_is_given_once_among_open_orders(caller: Caller) -> None:
    """A second order under it is refused until the first has ended."""
    first = caller.call("POST", **STOP, clientAlgoId="stop-1").json
    assert caller.call("POST", **STOP, clientAlgoId="stop-1").error[1] == -4116
    caller.cancel(first["algoId"])
    assert caller.call("POST", **STOP, clientAlgoId="stop-1").status == 200


def test_an_account_has_at_most_200_open_orders(market: RunningExchange, caller: Caller) -> None:
    """The 201st is refused; one less, and it is taken."""
    orders = market.add_orders(200)
    assert caller.call("POST", **STOP).error[1] == -4045
    caller.cancel(orders[0].algo_id)
    assert caller.call("POST", **STOP).status == 200


def test_parameters_may_stand_in_the_body(caller: Caller) -> None:
    """The signature is over query and body together, for DELETE too; so python-binance sends them."""

    def call(method: str, query: dict[str, Any], body: dict[str, Any]) -> Any:
        parts = urlencode(query), urlencode(body | {"timestamp": int(time.time() * 1_000)})
        signature = hmac.new(SECRET.encode(), "".join(parts).encode(), "sha256").hexdigest()
        signed = f"{parts[1]}&signature={signature}".encode()
        return caller.send(method, f"{ALGO_ORDER}?{parts[0]}", {"X-MBX-APIKEY": KEY}, signed).json

    opened = call("POST", {}, STOP)
    assert call("POST", {"symbol": "BTCUSDT"}, STOP | {"symbol": "ETHUSDT"})["symbol"] == "BTCUSDT"
    assert call("DELETE", {}, {"algoId": opened["algoId"]})["code"] == "200"


def test_the_old_endpoint_sends_conditional_orders_away(caller: Caller) -> None:
    """POST /fapi/v1/order refuses them by the code that names the new endpoint."""
    assert caller.call("POST", CHILD_ORDER, symbol="BTCUSDT", type="STOP_MARKET").error[1] == -4120
    assert caller.call("POST", CHILD_ORDER, symbol="BTCUSDT", type="LIMIT").error[1] == -1020


def test_lists_show_what_they_are_for(market: RunningExchange, caller: Caller) -> None:
    """Open lists show what rests, of one symbol or of all; the others show all of a symbol, from an id, in a window."""
    first, second, third = (order.algo_id for order in market.add_orders(3))
    (other,) = market.add_orders(symbol="ETHUSDT")
    market.expire(first)
    market.trigger(second)

    def ids(path: str, **asked: Any) -> list[int]:
        return [row["algoId"] if "algoId" in row else row["orderId"] for row in caller.call("GET", path, **asked).json]

    assert ids(OPEN_ORDERS, symbol="BTCUSDT") == [third]
    assert ids(OPEN_ORDERS) == [third, other.algo_id]
    assert ids(OPEN_ORDERS, algoId=third, algoType="CONDITIONAL") == [third]
    assert caller.call("GET", OPEN_ORDERS, symbol="NOSUCHUSDT").error[1] == -1121
    assert ids(ALL_ORDERS, symbol="BTCUSDT") == [first, second, third]
    assert ids(ALL_ORDERS, symbol="BTCUSDT", algoId=second) == [second, third]
    assert ids(ALL_ORDERS, symbol="BTCUSDT", limit=1) == [third]
    now_ms = int(time.time() * 1_000)
    assert ids(ALL_ORDERS, symbol="BTCUSDT", endTime=now_ms - 60_000) == []
    assert ids(ALL_ORDERS, symbol="BTCUSDT", startTime=now_ms - 60_000) == [first, second, third]
    for asked, code in (({"startTime": 5, "endTime": 4}, -1023), ({"startTime": 5, "endTime": now_ms}, -1127)):
        assert caller.call("GET", ALL_ORDERS, symbol="BTCUSDT", **asked).error[1] == code
    assert caller.call("GET", ALL_ORDERS).error[1] == -1102

    child = child_of(market, second)
    assert ids("/fapi/v1/openOrders", symbol="BTCUSDT") == [int(child.order_id)]
    market.fill(second)
    assert ids("/fapi/v1/openOrders") == []
    assert ids("/fapi/v1/allOrders", symbol="BTCUSDT") == [int(child.order_id)]


def test_all_orders_of_a_symbol_are_cancelled_at_once(market: RunningExchange, caller: Caller) -> None:
    """The bulk cancels end what rests on the symbol, conditional orders or children, and answer an integer 200."""
    for bulk in ("/fapi/v1/algoOpenOrders", "/fapi/v1/allOpenOrders"):
        assert caller.call("DELETE", bulk).error[1] == -1102
    orders = [order.algo_id for order in market.add_orders(3)]
    (other,) = market.add_orders(symbol="ETHUSDT")
    market.trigger(orders[0])
    assert caller.call("DELETE", "/fapi/v1/algoOpenOrders", symbol="BTCUSDT").json["code"] == 200
    assert [market.book()[n].status for n in (*orders, other.algo_id)] == ["TRIGGERED", "CANCELED", "CANCELED", "NEW"]
    assert caller.call("DELETE", "/fapi/v1/allOpenOrders", symbol="BTCUSDT").json["code"] == 200
    assert (market.book()[orders[0]].status, child_of(market, orders[0]).status) == ("FINISHED", "CANCELED")


def test_the_position_mode_rules_the_position_side(market: RunningExchange, caller: Caller) -> None:
    """In hedge mode a side must be named and reduceOnly must not; the mode changes only while nothing is open."""
    assert caller.call("GET", MODE).json == {"dualSidePosition": False}
    assert caller.call("POST", MODE, dualSidePosition="false").error[1] == -4059
    assert caller.call("POST", MODE, dualSidePosition="true").json == {"code": 200, "msg": "success"}
    assert caller.call("GET", MODE).json == {"dualSidePosition": True}
    assert caller.call("POST", **STOP).error[1] == -4061
    long = STOP | {"positionSide": "LONG"}
    assert caller.call("POST", **long, reduceOnly="true").error[1] == -1106
    assert caller.call("POST", **sent(CLOSING | {"positionSide": "SHORT"})).error[1] == -2022
    assert caller.call("POST", **long).json["positionSide"] == "LONG"
    assert caller.call("POST", MODE, dualSidePosition="false").error[1] == -4067
    market.set_hedge_mode(False)
    assert caller.call("GET", MODE).json == {"dualSidePosition": False}


def test_a_price_triggers_what_waits_for_it(market: RunningExchange, caller: Caller) -> None:
    """Setting a price starts the trigger of stops, targets and activated trailing orders; prices are shown as set."""
    names: dict[str, dict[str, Any]] = {
        "stop": STOP,
        "target": LIMITED | {"type": "TAKE_PROFIT", "side": "BUY", "triggerPrice": "50000"},
        "above": STOP | {"side": "BUY", "triggerPrice": "70000"},
        "trail": TRAILING | {"callbackRate": "10"},
        "later": TRAILING | {"callbackRate": "10", "activatePrice": "66000"},
    }
    ids = {name: caller.call("POST", **sent(terms)).json["algoId"] for name, terms in names.items()}
    resting = {"NEW"}

    def triggered() -> set[str]:
        return {name for name, algo_id in ids.items() if caller.status(algo_id) not in resting}

    market.set_mark_price("BTCUSDT", "65000")
    market.set_mark_price("BTCUSDT", "58500.1")
    assert triggered() == set()
    market.set_mark_price("BTCUSDT", "58500")  # 10 % below the best since it was opened
    assert triggered() == {"trail"}
    market.set_mark_price("BTCUSDT", "50000")
    assert triggered() == {"trail", "stop", "target"}
    assert caller.call("GET", "/fapi/v1/premiumIndex", symbol="BTCUSDT").json["markPrice"] == "50000.00000000"
    assert caller.call("GET", "/fapi/v1/ticker/price", symbol="BTCUSDT").json["price"] == "50000"
    market.set_mark_price("BTCUSDT", "69000")
    market.set_mark_price("BTCUSDT", "62000")
    assert triggered() == {"trail", "stop", "target", "later"}
    for symbol, price in (("NOSUCHUSDT", "1"), ("BTCUSDT", "-1"), ("BTCUSDT", "0"), ("BTCUSDT", "nan")):
        with pytest.raises(ControlError, match="a price above 0"):
            market.set_mark_price(symbol, price)


def test_symbols_are_listed_with_their_filters(caller: Caller) -> None:
    """exchangeInfo tells tick, step, smallest quantity and notional of each symbol, and the conditional types."""
    symbols = {row["symbol"]: row for row in caller.send("GET", "/fapi/v1/exchangeInfo").json["symbols"]}
    filters = {row["filterType"]: row for row in symbols["BTCUSDT"]["filters"]}
    assert filters["PRICE_FILTER"]["tickSize"] == "0.10"
    assert (filters["LOT_SIZE"]["stepSize"], filters["LOT_SIZE"]["minQty"]) == ("0.001", "0.001")
    assert filters["MIN_NOTIONAL"]["notional"] == "50"
    assert "TRAILING_STOP_MARKET" in symbols["ETHUSDT"]["orderTypes"]


def test_a_listen_key_lives_until_it_is_closed(caller: Caller) -> None:
    """An API key alone opens, keeps and closes it; without one there is nothing to keep."""

    def call(method: str, headers: dict[str, str]) -> Any:
        return caller.send(method, LISTEN_KEY, headers).json

    key = {"X-MBX-APIKEY": KEY}
    assert call("PUT", key)["code"] == -1125
    assert call("POST", {})["code"] == -2014
    opened = call("POST", key)
    assert opened["listenKey"]
    assert call("POST", key) == call("PUT", key) == opened
    assert call("DELETE", key) == {}
    assert call("PUT", key)["code"] == -1125
