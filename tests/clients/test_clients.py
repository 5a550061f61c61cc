"""The official SDK, ccxt and python-binance drive the sandbox's exchange: it is the exchange that they know."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.caller import ACCOUNTS, KEY, SECRET, child_of
from tests.clients.libraries import Ccxt, Library, OfficialSdk, PythonBinance
from worker.sandbox.control import ExchangeConfig, RunningExchange, start_exchange

pytestmark = [
    pytest.mark.clients,
    pytest.mark.filterwarnings("ignore"),  # these libraries' own and their dependencies' are theirs to mend
]

STOP: dict[str, Any] = {
    "symbol": "BTCUSDT",
    "side": "SELL",
    "type": "STOP_MARKET",
    "quantity": "0.01",
    "triggerPrice": "50000",
}
TRAILING = {"symbol": "BTCUSDT", "side": "SELL", "type": "TRAILING_STOP_MARKET", "quantity": "0.01"}
CLOSING = {name: value for name, value in STOP.items() if name != "quantity"} | {"closePosition": "true"}


@pytest.fixture(autouse=True)
def _loopback_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that looks up its own host, or a proxy, fails its test."""
    looked_up = socket.getaddrinfo

    def on_loopback(host: Any, *details: Any, **more: Any) -> Any:
        assert host == "127.0.0.1", f"{host}: beyond loopback"
        return looked_up(host, *details, **more)

    monkeypatch.setattr(socket, "getaddrinfo", on_loopback)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")


@pytest.fixture(scope="module")
def shared_exchange() -> Iterator[RunningExchange]:
    """One exchange for all of them; `market` below hands it out empty."""
    with start_exchange(ExchangeConfig(accounts=ACCOUNTS)) as running:
        yield running


@pytest.fixture(scope="module", params=[OfficialSdk, Ccxt, PythonBinance], ids=lambda kind: kind.__name__)
def library(request: pytest.FixtureRequest, shared_exchange: RunningExchange) -> Iterator[Library]:
    """Each library in turn, pointed at the exchange by its own options."""
    made: Library = request.param(shared_exchange.url, KEY, SECRET)
    yield made
    made.close()


@pytest.fixture
def market(shared_exchange: RunningExchange) -> RunningExchange:
    """The exchange, empty."""
    shared_exchange.reset()
    return shared_exchange


@pytest.mark.parametrize(
    "terms",
    [
        STOP,
        STOP | {"type": "STOP", "price": "49900", "timeInForce": "GTC"},
        STOP | {"type": "TAKE_PROFIT", "triggerPrice": "70000", "price": "70100"},
        STOP | {"type": "TAKE_PROFIT_MARKET", "triggerPrice": "70000", "reduceOnly": "true"},
        TRAILING | {"callbackRate": "1.5"},
        TRAILING | {"callbackRate": "2", "activatePrice": "61000"},
        CLOSING,
        STOP | {"workingType": "MARK_PRICE", "priceProtect": "true", "newOrderRespType": "RESULT"},
    ],
    ids=lambda terms: "-".join(sorted(set(terms) - set(STOP) | {terms["type"]})),
)
def test_every_type_is_placed_seen_and_cancelled(
    market: RunningExchange, library: Library, terms: dict[str, Any]
) -> None:
    """An order that the library places rests in the book with its terms, is queried and listed, and is cancelled."""
    placed = library.place(**terms)
    new = library.words.get("NEW", "NEW")
    assert placed.status == new
    assert library.query(placed.algo_id) == placed
    assert library.open_orders("BTCUSDT") == [placed]
    library.cancel(placed.algo_id)
    entry = market.book()[int(placed.algo_id)]
    assert (entry.status, entry.deletes_effective, entry.order_type) == ("CANCELED", 1, terms["type"])
    assert library.open_orders("BTCUSDT") == []
    assert library.query(placed.algo_id).status == library.words.get("CANCELED", "CANCELED")
    assert [order.algo_id for order in library.all_orders("BTCUSDT")] == [placed.algo_id]


def test_one_is_cancelled_by_its_client_id_and_the_rest_at_once(market: RunningExchange, library: Library) -> None:
    """A client's own id names its order; the bulk cancel ends the others of the symbol and no more."""
    first = library.place(**STOP, clientAlgoId="stop-1")
    library.place(**STOP, clientAlgoId="stop-2")
    elsewhere = library.place(**STOP | {"symbol": "ETHUSDT", "triggerPrice": "2500"})
    assert first.client_algo_id == "stop-1"
    library.cancel_by_client_id("stop-1")
    library.cancel_all("BTCUSDT")
    assert library.open_orders("BTCUSDT") == []
    assert library.open_orders("ETHUSDT") == [elsewhere]
    assert sorted(entry.status for entry in market.book().values()) == ["CANCELED", "CANCELED", "NEW"]


def test_a_symbol_of_other_letters_is_one_too(market: RunningExchange, library: Library) -> None:
    """Such symbols are listed and percent-encoded; an order on one is placed, listed, and cancelled with the rest."""
    symbol = "币安人生USDT"
    placed = library.place(**STOP | {"symbol": symbol, "triggerPrice": "0.1", "quantity": "100"})
    assert library.open_orders(symbol) == [placed]
    library.cancel_all(symbol)
    assert [entry.status for entry in market.book().values()] == ["CANCELED"]


def test_a_triggered_orders_child_is_queried_and_cancelled(market: RunningExchange, library: Library) -> None:
    """What a trigger made is a normal order to the library: partly filled, listed as open, cancelled, and gone."""
    placed = library.place(**STOP | {"type": "STOP", "price": "49900"})
    market.trigger(int(placed.algo_id))
    child = child_of(market, int(placed.algo_id))
    market.fill(int(placed.algo_id), "0.004")
    seen = library.child(child.order_id)
    partly = library.words.get("PARTIALLY_FILLED", "PARTIALLY_FILLED")
    assert seen == (child.order_id, partly, 0.004)
    assert library.open_children("BTCUSDT") == [seen]
    assert library.cancel_child(child.order_id) == (child.order_id, library.words.get("CANCELED", "CANCELED"), 0.004)
    assert library.open_children("BTCUSDT") == []
    assert library.query(placed.algo_id).status == library.words.get("FINISHED", "FINISHED")
    with pytest.raises(library.errors[-2011]):
        library.cancel_child(child.order_id)


def test_refusals_are_what_the_library_makes_of_them(market: RunningExchange, library: Library) -> None:
    """Unknown orders, a condition that is met, the wrong position side and a taken id raise the library's errors."""
    placed = library.place(**STOP, clientAlgoId="stop-1")
    library.cancel(placed.algo_id)
    with pytest.raises(library.errors[-2011], match="Unknown order sent"):
        library.cancel(placed.algo_id)
    with pytest.raises(library.errors[-2013], match="Order does not exist"):
        library.query("999")
    with pytest.raises(library.errors[-2021], match="immediately trigger"):
        library.place(**STOP | {"triggerPrice": "61000"})
    with pytest.raises(library.errors[-4061], match="position side"):
        library.place(**STOP, positionSide="LONG")
    with pytest.raises(library.errors[-1121]):
        library.place(**STOP | {"symbol": "NOSUCHUSDT"})
    library.place(**STOP, clientAlgoId="stop-1")
    with pytest.raises(library.errors[-4116], match="duplicated"):
        library.place(**STOP, clientAlgoId="stop-1")


def test_what_a_library_asks_for_on_its_way_is_there(market: RunningExchange, library: Library) -> None:
    """Symbols with tick and step, prices, positions and the position mode are read, and the mode is changed."""
    assert library.steps("BTCUSDT") == (0.1, 0.001)
    market.set_mark_price("BTCUSDT", "61234.5")
    assert library.mark_price("BTCUSDT") == library.last_price("BTCUSDT") == 61234.5
    assert library.positions("BTCUSDT") == []
    assert not library.is_hedged()
    library.set_hedged(True)
    assert library.is_hedged()
    assert library.place(**STOP, positionSide="LONG").status == library.words.get("NEW", "NEW")


def test_a_listen_key_is_opened_kept_and_closed(market: RunningExchange, library: Library) -> None:
    """The key for a stream of one's own data lives until it is closed; keeping one that is gone fails."""
    listen_key = library.open_listen_key()
    assert listen_key
    library.keep_listen_key(listen_key)
    library.close_listen_key(listen_key)
    with pytest.raises(library.errors[-1125], match="listenKey does not exist"):
        library.keep_listen_key(listen_key)
