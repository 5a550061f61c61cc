"""The libraries that people place orders with, behind one interface of ours; each is used by its public calls alone.

Ids go in and out as text and terms are named as the exchange names them, so that one table of tests serves all three.
`errors` are what a library raises, by the exchange's code.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

TIMEOUT_S = 30
UNIFIED = {"BTCUSDT": "BTC/USDT:USDT", "ETHUSDT": "ETH/USDT:USDT", "NOSUCHUSDT": "NOSUCH/USDT:USDT"} | {
    "币安人生USDT": "币安人生/USDT:USDT"
}


class Order(NamedTuple):
    """What a library says of a conditional order, in the library's own words for its status."""

    algo_id: str
    client_algo_id: str
    status: str


class Child(NamedTuple):
    """What it says of a normal order."""

    order_id: str
    status: str
    executed: float


class OfficialSdk:
    """`binance-sdk-derivatives-trading-usds-futures`."""

    #: The library's words for the exchange's statuses, where it has its own.
    words: Mapping[str, str] = {}

    def __init__(self, url: str, key: str, secret: str) -> None:
        from binance_common.configuration import ConfigurationRestAPI
        from binance_common.errors import BadRequestError
        from binance_sdk_derivatives_trading_usds_futures.derivatives_trading_usds_futures import (
            DerivativesTradingUsdsFutures,
        )

        self.errors = dict.fromkeys((-2011, -2013, -2021, -4061, -4116, -1121, -1125), BadRequestError)
        timeout_ms = TIMEOUT_S * 1_000
        configuration = ConfigurationRestAPI(key, secret, base_path=url, timeout=timeout_ms, retries=0)
        self._api: Any = DerivativesTradingUsdsFutures(config_rest_api=configuration).rest_api

    def place(self, **terms: Any) -> Order:
        numbers = ("quantity", "price", "triggerPrice", "activatePrice", "callbackRate")
        named = {name: float(value) if name in numbers else value for name, value in terms.items()}
        snake = {re.sub("[A-Z]", lambda found: f"_{found[0].lower()}", name): named[name] for name in named}
        return self._order(self._api.new_algo_order(algo_type="CONDITIONAL", **snake).data())

    def query(self, algo_id: str) -> Order:
        return self._order(self._api.query_algo_order(algo_id=int(algo_id)).data())

    def open_orders(self, symbol: str) -> list[Order]:
        return [self._order(row) for row in self._api.current_all_algo_open_orders(symbol=symbol).data()]

    def all_orders(self, symbol: str) -> list[Order]:
        return [self._order(row) for row in self._api.query_all_algo_orders(symbol).data()]

    def cancel(self, algo_id: str) -> None:
        assert self._api.cancel_algo_order(algo_id=int(algo_id)).data().code == "200"

    def cancel_by_client_id(self, client_algo_id: str) -> None:
        assert self._api.cancel_algo_order(client_algo_id=client_algo_id).data().code == "200"

    def cancel_all(self, symbol: str) -> None:
        assert self._api.cancel_all_algo_open_orders(symbol).data().code == 200

    def child(self, order_id: str) -> Child:
        return self._child(self._api.query_order("BTCUSDT", order_id=int(order_id)).data())

    def cancel_child(self, order_id: str) -> Child:
        return self._child(self._api.cancel_order("BTCUSDT", order_id=int(order_id)).data())

    def open_children(self, symbol: str) -> list[Child]:
        return [self._child(row) for row in self._api.current_all_open_orders(symbol).data()]

    def is_hedged(self) -> bool:
        return bool(self._api.get_current_position_mode().data().dual_side_position)

    def set_hedged(self, on: bool) -> None:
        self._api.change_position_mode(str(on).lower())

    def mark_price(self, symbol: str) -> float:
        return float(self._api.mark_price(symbol).data().actual_instance.mark_price)

    def last_price(self, symbol: str) -> float:
        return float(self._api.symbol_price_ticker_v2(symbol).data().actual_instance.price)

    def positions(self, symbol: str) -> list[Any]:
        return list(self._api.position_information_v3(symbol=symbol).data())

    def steps(self, symbol: str) -> tuple[float, float]:
        (row,) = [row for row in self._api.exchange_information().data().symbols if row.symbol == symbol]
        filters = {each.filter_type: each for each in row.filters}
        return float(filters["PRICE_FILTER"].tick_size), float(filters["LOT_SIZE"].step_size)

    def open_listen_key(self) -> str:
        return str(self._api.start_user_data_stream().data().listen_key)

    def keep_listen_key(self, listen_key: str) -> None:
        self._api.keepalive_user_data_stream()

    def close_listen_key(self, listen_key: str) -> None:
        self._api.close_user_data_stream()

    def close(self) -> None:
        pass  # its session has no end of its own

    @staticmethod
    def _order(row: Any) -> Order:
        return Order(str(row.algo_id), row.client_algo_id, row.algo_status)

    @staticmethod
    def _child(row: Any) -> Child:
        return Child(str(row.order_id), row.status, float(row.executed_qty))


class Ccxt:
    """ccxt's `binanceusdm`."""

    words: Mapping[str, str] = {
        **{"NEW": "open", "PARTIALLY_FILLED": "open", "FILLED": "closed", "TRIGGERED": "closed", "FINISHED": "closed"},
        **{"CANCELED": "canceled", "EXPIRED": "expired", "REJECTED": "rejected"},
    }

    def __init__(self, url: str, key: str, secret: str) -> None:
        import ccxt

        self.errors: Mapping[int, type[Exception]] = {
            -2011: ccxt.OrderNotFound,
            -2013: ccxt.OrderNotFound,
            -2021: ccxt.ExchangeError,
            -4061: ccxt.ExchangeError,
            -4116: ccxt.ExchangeError,
            -1121: ccxt.BadSymbol,
            -1125: ccxt.AuthenticationError,
        }
        paths = ("fapiPublic", "fapiPrivate", "fapiPublicV2", "fapiPrivateV2", "fapiPublicV3", "fapiPrivateV3")
        versions = {name: f"{url}/fapi/v{name[-1] if 'V' in name else 1}" for name in paths}
        options = {"fetchMarkets": {"types": ["linear"]}, "fetchCurrencies": False}
        self._api: Any = ccxt.binanceusdm(
            {"apiKey": key, "secret": secret, "timeout": TIMEOUT_S * 1_000, "enableRateLimit": False}
            | {"urls": {"api": versions}, "options": options}
        )
        self._api.load_markets()

    def place(self, **terms: Any) -> Order:
        kind, amount = terms.pop("type"), float(terms.pop("quantity", 0))
        unified = "limit" if kind in ("STOP", "TAKE_PROFIT") else "market"
        symbol, side, price = UNIFIED[terms.pop("symbol")], terms.pop("side").lower(), terms.pop("price", None)
        trigger = terms.pop("triggerPrice", None)
        renamed = {"callbackRate": "trailingPercent", "activatePrice": "trailingTriggerPrice"}
        params = {renamed.get(name, name): value == "true" or value for name, value in terms.items()}
        if trigger is not None:
            params["takeProfitPrice" if kind.startswith("TAKE") else "stopLossPrice"] = trigger
        return self._order(self._api.create_order(symbol, unified, side, amount, price, params))

    def query(self, algo_id: str) -> Order:
        return self._order(self._api.fetch_order(algo_id, UNIFIED["BTCUSDT"], {"trigger": True}))

    def open_orders(self, symbol: str) -> list[Order]:
        rows = self._api.fetch_open_orders(UNIFIED[symbol], params={"trigger": True})
        return [self._order(row) for row in rows]

    def all_orders(self, symbol: str) -> list[Order]:
        return [self._order(row) for row in self._api.fetch_orders(UNIFIED[symbol], params={"trigger": True})]

    def cancel(self, algo_id: str) -> None:
        assert self._api.cancel_order(algo_id, UNIFIED["BTCUSDT"], {"trigger": True})["id"] == algo_id

    def cancel_by_client_id(self, client_algo_id: str) -> None:
        self._api.cancel_order("", UNIFIED["BTCUSDT"], {"trigger": True, "clientAlgoId": client_algo_id})

    def cancel_all(self, symbol: str) -> None:
        self._api.cancel_all_orders(UNIFIED[symbol], {"trigger": True})

    def child(self, order_id: str) -> Child:
        return self._child(self._api.fetch_order(order_id, UNIFIED["BTCUSDT"]))

    def cancel_child(self, order_id: str) -> Child:
        return self._child(self._api.cancel_order(order_id, UNIFIED["BTCUSDT"]))

    def open_children(self, symbol: str) -> list[Child]:
        return [self._child(row) for row in self._api.fetch_open_orders(UNIFIED[symbol])]

    def is_hedged(self) -> bool:
        return bool(self._api.fetch_position_mode()["hedged"])

    def set_hedged(self, on: bool) -> None:
        self._api.set_position_mode(on)

    def mark_price(self, symbol: str) -> float:
        return float(self._api.fetch_mark_price(UNIFIED[symbol])["markPrice"])

    def last_price(self, symbol: str) -> float:
        return float(self._api.fetch_ticker(UNIFIED[symbol])["last"])

    def positions(self, symbol: str) -> list[Any]:
        return list(self._api.fetch_positions([UNIFIED[symbol]]))

    def steps(self, symbol: str) -> tuple[float, float]:
        precision = self._api.market(UNIFIED[symbol])["precision"]
        return float(precision["price"]), float(precision["amount"])

    def open_listen_key(self) -> str:
        return str(self._api.fapiPrivatePostListenKey()["listenKey"])

    def keep_listen_key(self, listen_key: str) -> None:
        self._api.fapiPrivatePutListenKey()

    def close_listen_key(self, listen_key: str) -> None:
        self._api.fapiPrivateDeleteListenKey()

    def close(self) -> None:
        self._api.close()

    @staticmethod
    def _order(row: Any) -> Order:
        return Order(row["id"], row["clientOrderId"], row["status"])

    @staticmethod
    def _child(row: Any) -> Child:
        return Child(row["id"], row["status"], float(row["filled"]))


class PythonBinance:
    """python-binance, which puts parameters into the body."""

    words: Mapping[str, str] = {}

    def __init__(self, url: str, key: str, secret: str) -> None:
        from binance.client import Client
        from binance.exceptions import BinanceAPIException

        self.errors = dict.fromkeys((-2011, -2013, -2021, -4061, -4116, -1121, -1125), BinanceAPIException)

        class Local(Client):  # type: ignore[misc]
            API_URL = f"{url}/api"
            FUTURES_URL = f"{url}/fapi"

        # It takes the thread's event loop, or makes one that nobody closes.
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        self._api: Any = Local(key, secret, {"timeout": TIMEOUT_S})

    def place(self, **terms: Any) -> Order:
        return self._order(self._api.futures_create_order(**terms))

    def query(self, algo_id: str) -> Order:
        return self._order(self._api.futures_get_order(symbol="BTCUSDT", algoId=algo_id))

    def open_orders(self, symbol: str) -> list[Order]:
        return [self._order(row) for row in self._api.futures_get_open_orders(symbol=symbol, conditional=True)]

    def all_orders(self, symbol: str) -> list[Order]:
        return [self._order(row) for row in self._api.futures_get_all_orders(symbol=symbol, conditional=True)]

    def cancel(self, algo_id: str) -> None:
        assert self._api.futures_cancel_order(symbol="BTCUSDT", algoId=algo_id)["code"] == "200"

    def cancel_by_client_id(self, client_algo_id: str) -> None:
        self._api.futures_cancel_order(symbol="BTCUSDT", clientAlgoId=client_algo_id)

    def cancel_all(self, symbol: str) -> None:
        assert self._api.futures_cancel_all_open_orders(symbol=symbol, conditional=True)["code"] == 200

    def child(self, order_id: str) -> Child:
        return self._child(self._api.futures_get_order(symbol="BTCUSDT", orderId=order_id))

    def cancel_child(self, order_id: str) -> Child:
        return self._child(self._api.futures_cancel_order(symbol="BTCUSDT", orderId=order_id))

    def open_children(self, symbol: str) -> list[Child]:
        return [self._child(row) for row in self._api.futures_get_open_orders(symbol=symbol)]

    def is_hedged(self) -> bool:
        return bool(self._api.futures_get_position_mode()["dualSidePosition"])

    def set_hedged(self, on: bool) -> None:
        self._api.futures_change_position_mode(dualSidePosition=on)

    def mark_price(self, symbol: str) -> float:
        return float(self._api.futures_mark_price(symbol=symbol)["markPrice"])

    def last_price(self, symbol: str) -> float:
        return float(self._api.futures_symbol_ticker(symbol=symbol)["price"])

    def positions(self, symbol: str) -> list[Any]:
        return list(self._api.futures_position_information(symbol=symbol))

    def steps(self, symbol: str) -> tuple[float, float]:
        (row,) = [row for row in self._api.futures_exchange_info()["symbols"] if row["symbol"] == symbol]
        filters = {each["filterType"]: each for each in row["filters"]}
        return float(filters["PRICE_FILTER"]["tickSize"]), float(filters["LOT_SIZE"]["stepSize"])

    def open_listen_key(self) -> str:
        return str(self._api.futures_stream_get_listen_key())

    def keep_listen_key(self, listen_key: str) -> None:
        self._api.futures_stream_keepalive(listen_key)

    def close_listen_key(self, listen_key: str) -> None:
        self._api.futures_stream_close(listen_key)

    def close(self) -> None:
        self._api.close_connection()
        self._loop.close()
        asyncio.set_event_loop(None)

    @staticmethod
    def _order(row: Any) -> Order:
        return Order(str(row["algoId"]), row["clientAlgoId"], row["algoStatus"])

    @staticmethod
    def _child(row: Any) -> Child:
        return Child(str(row["orderId"]), row["status"], float(row["executedQty"]))


Library = OfficialSdk | Ccxt | PythonBinance
