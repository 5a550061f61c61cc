"""The local exchange's calls beside those about one order: lists, bulk cancels, new orders, prices, modes, keys.

Weights are the documented ones [D][S]. Pure but for what a call changes in the exchange's state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from worker.sandbox.book import AlgoStatus, Child, DuplicateClientId, Order
from worker.sandbox.faults import NO_SUCH_ORDER
from worker.sandbox.market import ORDER_TYPES, SYMBOLS
from worker.sandbox.signed import Refusal, integer, known_symbol, mandatory, read_child
from worker.sandbox.terms import read_terms

if TYPE_CHECKING:
    from worker.sandbox.server import ExchangeServer

_Target = TypeVar("_Target", Order, Child)

DAY_MS = 86_400_000
WINDOW_MS = 7 * DAY_MS  # the longest between startTime and endTime, and what is looked through without them
LIMIT, MAX_LIMIT = 500, 1_000  # of rows in a list; the twin of portfolio margin documents them (exchange.md 1.2)
MAX_OPEN = 200  # open conditional orders of an account (exchange.md 1.1)
OPEN_ALGO_ORDERS = "/fapi/v1/openAlgoOrders"
ALL_CANCELLED = {"code": 200, "msg": "The operation of cancel all open order is done."}


@dataclass(frozen=True, slots=True)
class Asked:
    """A call, its key and signature found right where it needs them."""

    exchange: ExchangeServer
    account: str  # empty where no key is needed
    said: dict[str, str]
    now_ms: int  # local time

    @property
    def server_ms(self) -> int:
        """Exchange time."""
        return self.now_ms + self.exchange.book.clock_skew_ms

    @property
    def dual(self) -> bool:
        """Whether the account is in hedge mode."""
        return self.exchange.dual.get(self.account, False)

    def orders(self) -> list[Order]:
        """The account's orders of the symbol, or of all when none was named, oldest first, as far as lists show them.

        Raises:
            Refusal: no such symbol.
        """
        symbol = known_symbol(self.said) if "symbol" in self.said else None
        return [
            order
            for order in self.exchange.book.orders(self.now_ms)
            if order.account == self.account
            and symbol in (None, order.terms.symbol)
            and not order.is_hidden(self.now_ms)
        ]

    def children(self) -> list[Child]:
        """The children of those orders, as far as lists show them."""
        found = [order.child for order in self.orders() if order.child is not None]
        return [child for child in found if not child.is_hidden(self.now_ms)]


class Security(Enum):
    """What a call needs."""

    PUBLIC = auto()
    KEYED = auto()  # an API key alone
    SIGNED = auto()


PUBLIC, KEYED, SIGNED = Security


class Endpoint(NamedTuple):
    """A call: what answers it, and what it costs with and without a symbol."""

    answer: Callable[[Asked], object]
    security: Security = SIGNED
    weight: int = 1
    weight_of_all: int | None = None  # None: the same


def _create(asked: Asked) -> object:
    symbol = known_symbol(asked.said)
    price = asked.exchange.prices[symbol]
    terms = read_terms(asked.said, dual=asked.dual, price=price, server_ms=asked.server_ms)
    opened = [order for order in asked.exchange.book.orders(asked.now_ms) if order.account == asked.account]
    if sum(order.status is AlgoStatus.NEW for order in opened) >= MAX_OPEN:
        raise Refusal.of(-4045, "Reach max stop order limit.")  # the limit is documented, its code UNCONFIRMED
    try:
        order = asked.exchange.open_order(asked.account, terms, asked.now_ms)
    except DuplicateClientId:
        raise Refusal.of(-4116, "ClientOrderId is duplicated.") from None
    order.sees(price)
    unknown_yet = ("actualOrderId", "actualPrice", "actualType", "actualQty", "tpOrderType")
    shown = {name: value for name, value in order.as_query_answer().items() if name not in unknown_yet}
    return shown | {"activatePrice": terms.activate_price, "callbackRate": terms.callback_rate}


def _normal_order(asked: Asked) -> object:
    known_symbol(asked.said)
    if mandatory(asked.said, "type") in ORDER_TYPES:
        text = "Order type not supported for this endpoint. Please use the Algo Order API endpoints instead."
        raise Refusal.of(-4120, text)
    raise Refusal.of(-1020, "This operation is not supported.")  # by the sandbox: nothing is traded here


def _open_algo_orders(asked: Asked) -> object:
    old_fields = dict.fromkeys(("tpTriggerPrice", "tpPrice", "slTriggerPrice", "slPrice"), "0.000")
    wanted = integer("algoId", asked.said.get("algoId", "0"))
    return [
        order.as_query_answer() | old_fields
        for order in asked.orders()
        if order.status is AlgoStatus.NEW
        and wanted in (0, order.algo_id)
        and order.create_time_ms + asked.exchange.list_lag_ms <= asked.server_ms
    ]


def _all_algo_orders(asked: Asked) -> object:
    mandatory(asked.said, "symbol")
    first = integer("algoId", asked.said.get("algoId", "0"))
    orders = [order for order in asked.orders() if order.algo_id >= first]
    return [order.as_query_answer() for order in _within(asked, orders)]


def _all_orders(asked: Asked) -> object:
    mandatory(asked.said, "symbol")
    first = integer("orderId", asked.said.get("orderId", "0"))
    children = [child for child in asked.children() if child.order_id >= first]
    return [child.as_query_answer() for child in _within(asked, children)]


def _within(asked: Asked, targets: list[_Target]) -> list[_Target]:
    """The newest of those that were made in the window that the call names, by default in the last seven days."""
    times = {name: integer(name, asked.said[name]) for name in ("startTime", "endTime") if name in asked.said}
    end_ms = times.get("endTime", times["startTime"] + WINDOW_MS if "startTime" in times else asked.server_ms)
    start_ms = times.get("startTime", end_ms - WINDOW_MS)
    if start_ms > end_ms:
        raise Refusal.of(-1023, "Start time is greater than end time.")
    if end_ms - start_ms > WINDOW_MS:
        raise Refusal.of(-1127, "Lookup interval is too big. More than 168 hours between startTime and endTime.")
    limit = integer("limit", asked.said.get("limit", str(LIMIT)))
    if not 1 <= limit <= MAX_LIMIT:
        raise Refusal.of(-1130, "Invalid data sent for parameter 'limit'.")
    return [target for target in targets if start_ms <= target.create_time_ms <= end_ms][-limit:]


def _cancel_all(asked: Asked) -> object:
    # By nobody's single DELETE: the book counts them as cancelled by somebody else.
    mandatory(asked.said, "symbol")
    for order in asked.orders():
        asked.exchange.book.end(order, "CANCELED", asked.now_ms)
    return ALL_CANCELLED


def _cancel_all_children(asked: Asked) -> object:
    mandatory(asked.said, "symbol")
    for child in asked.children():
        asked.exchange.book.end(child, "CANCELED", asked.now_ms)
    return ALL_CANCELLED


def _set_mode(asked: Asked) -> object:
    wanted = mandatory(asked.said, "dualSidePosition").lower()
    if wanted not in ("true", "false"):
        raise Refusal.of(-1130, "Invalid data sent for parameter 'dualSidePosition'.")
    if (wanted == "true") == asked.dual:
        raise Refusal.of(-4059, "No need to change position side.")
    if any(order.status is AlgoStatus.NEW for order in asked.orders()):
        raise Refusal.of(-4067, "Position side cannot be changed if there exists open orders.")
    asked.exchange.dual[asked.account] = wanted == "true"
    return {"code": 200, "msg": "success"}


def _for_symbols(asked: Asked, shown: Callable[[str], dict[str, object]]) -> object:
    return shown(known_symbol(asked.said)) if "symbol" in asked.said else [shown(name) for name in SYMBOLS]


def _premium_index(asked: Asked) -> object:
    def shown(name: str) -> dict[str, object]:
        price = f"{asked.exchange.prices[name]:.8f}"
        return {
            "symbol": name,
            "markPrice": price,
            "indexPrice": price,
            "estimatedSettlePrice": price,
            "lastFundingRate": "0.00010000",
            "interestRate": "0.00010000",
            "nextFundingTime": (asked.server_ms // (DAY_MS // 3) + 1) * (DAY_MS // 3),
            "time": asked.server_ms,
        }

    return _for_symbols(asked, shown)


def _ticker(asked: Asked, prices: tuple[str, ...], **rest: object) -> object:
    """A ticker in which these fields are the price: nothing is traded here, so it is first, last, highest and best."""

    def shown(name: str) -> dict[str, object]:
        return {"symbol": name} | dict.fromkeys(prices, str(asked.exchange.prices[name])) | rest

    return _for_symbols(asked, shown)


def _day_ticker(asked: Asked) -> object:
    prices = ("weightedAvgPrice", "lastPrice", "openPrice", "highPrice", "lowPrice")
    nothing = dict.fromkeys(("priceChange", "priceChangePercent", "lastQty", "volume", "quoteVolume"), "0")
    times = {"openTime": asked.server_ms - DAY_MS, "closeTime": asked.server_ms}
    return _ticker(asked, prices, **nothing, **times, firstId=0, lastId=0, count=0)


def _open_order(asked: Asked) -> object:
    symbol, name = read_child(asked.said)
    child = asked.exchange.book.find_child(asked.account, symbol, name, asked.now_ms)
    if child is None or child.is_hidden(asked.now_ms) or not child.status.live:
        raise Refusal(NO_SUCH_ORDER)
    return child.as_query_answer()


def _exchange_info(asked: Asked) -> object:
    limits = [
        ("REQUEST_WEIGHT", "MINUTE", 1, asked.exchange.config.weight_limit_per_minute),
        ("ORDERS", "MINUTE", 1, 1_200),
        ("ORDERS", "SECOND", 10, 300),
    ]
    names = ("rateLimitType", "interval", "intervalNum", "limit")
    return {
        "timezone": "UTC",
        # This answer's time has been seen five days old; a client must not set its clock by it.
        "serverTime": asked.now_ms - 5 * DAY_MS,
        "futuresType": "U_MARGINED",
        "rateLimits": [dict(zip(names, limit, strict=True)) for limit in limits],
        "exchangeFilters": [],
        "assets": [],
        "symbols": [symbol.shown(name) for name, symbol in SYMBOLS.items()],
    }


def _listen_key(asked: Asked) -> object:
    key = asked.exchange.listen_keys.setdefault(asked.account, f"listen-{asked.account}-{asked.now_ms}")
    return {"listenKey": key}


def _kept_listen_key(asked: Asked) -> object:
    if asked.account not in asked.exchange.listen_keys:
        raise Refusal.of(-1125, "This listenKey does not exist.")
    return {"listenKey": asked.exchange.listen_keys[asked.account]}


def _closed_listen_key(asked: Asked) -> object:
    asked.exchange.listen_keys.pop(asked.account, None)
    return {}


ENDPOINTS: dict[tuple[str, str], Endpoint] = {
    # python-binance calls the spot exchange's when it is made.
    **dict.fromkeys([("GET", "/fapi/v1/ping"), ("GET", "/api/v3/ping")], Endpoint(lambda _: {}, PUBLIC)),
    **dict.fromkeys(
        [("GET", "/fapi/v1/time"), ("GET", "/api/v3/time")],
        Endpoint(lambda asked: {"serverTime": asked.server_ms}, PUBLIC),
    ),
    ("GET", "/fapi/v1/exchangeInfo"): Endpoint(_exchange_info, PUBLIC),
    ("GET", "/fapi/v1/premiumIndex"): Endpoint(_premium_index, PUBLIC, 1, 10),
    **dict.fromkeys(
        [("GET", "/fapi/v1/ticker/price"), ("GET", "/fapi/v2/ticker/price")],
        Endpoint(lambda asked: _ticker(asked, ("price",), time=asked.server_ms), PUBLIC, 1, 2),
    ),
    ("GET", "/fapi/v1/ticker/24hr"): Endpoint(_day_ticker, PUBLIC, 1, 40),
    ("GET", "/fapi/v1/ticker/bookTicker"): Endpoint(
        lambda asked: _ticker(asked, ("bidPrice", "askPrice"), bidQty="1", askQty="1", time=asked.server_ms),
        PUBLIC,
        2,
        5,
    ),
    ("POST", "/fapi/v1/algoOrder"): Endpoint(_create, SIGNED, 0),
    ("GET", OPEN_ALGO_ORDERS): Endpoint(_open_algo_orders, SIGNED, 1, 40),
    ("GET", "/fapi/v1/allAlgoOrders"): Endpoint(_all_algo_orders, SIGNED, 5),
    ("DELETE", "/fapi/v1/algoOpenOrders"): Endpoint(_cancel_all),
    ("POST", "/fapi/v1/order"): Endpoint(_normal_order, SIGNED, 0),
    ("GET", "/fapi/v1/openOrder"): Endpoint(_open_order),
    ("GET", "/fapi/v1/openOrders"): Endpoint(
        lambda asked: [child.as_query_answer() for child in asked.children() if child.status.live], SIGNED, 1, 40
    ),
    ("GET", "/fapi/v1/allOrders"): Endpoint(_all_orders, SIGNED, 5),
    ("DELETE", "/fapi/v1/allOpenOrders"): Endpoint(_cancel_all_children),
    # There are no positions; ccxt reads the brackets on its way to them.
    **dict.fromkeys(
        [("GET", f"/fapi/{path}") for path in ("v2/positionRisk", "v3/positionRisk", "v1/leverageBracket")],
        Endpoint(lambda _: [], SIGNED, 5),
    ),
    ("GET", "/fapi/v1/positionSide/dual"): Endpoint(lambda asked: {"dualSidePosition": asked.dual}, SIGNED, 30),
    ("POST", "/fapi/v1/positionSide/dual"): Endpoint(_set_mode),
    ("POST", "/fapi/v1/listenKey"): Endpoint(_listen_key, KEYED),
    ("PUT", "/fapi/v1/listenKey"): Endpoint(_kept_listen_key, KEYED),
    ("DELETE", "/fapi/v1/listenKey"): Endpoint(_closed_listen_key, KEYED),
}
