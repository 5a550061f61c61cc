"""`python -m worker rehearse` against real servers: an order is placed, cancelled and gone, or it is said why not."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis

from tests.conftest import API_KEY, API_SECRET
from tests.loopback import Peer, Server, http_answer
from tests.servers import ROOT, Valkey, eventually, free_port, python, scrubbed
from worker.sandbox.control import BookEntry, RunningExchange

ORDER, TIME = "/fapi/v1/algoOrder", "/fapi/v1/time"
MODE, OPEN_ORDERS = "/fapi/v1/positionSide/dual", "/fapi/v1/openAlgoOrders"
INFO, MARK = "/fapi/v1/exchangeInfo", "/fapi/v1/premiumIndex"
NAME = re.compile(r"acq-rehearsal-[0-9a-f]{16}")
FILTERS = [
    {"filterType": "PRICE_FILTER", "minPrice": "556.80", "maxPrice": "4529764", "tickSize": "0.10"},
    {"filterType": "LOT_SIZE", "minQty": "0.001", "maxQty": "1000", "stepSize": "0.001"},
    {"filterType": "MARKET_LOT_SIZE", "minQty": "0.001", "maxQty": "120", "stepSize": "0.001"},
    {"filterType": "MIN_NOTIONAL", "notional": "100"},
]
SYMBOL = {"symbol": "BTCUSDT", "status": "TRADING", "filters": FILTERS}

Hook = Callable[[], bytes | None]


def said(body: object, status: str = "200 OK") -> bytes:
    """An answer of the exchange."""
    return http_answer(json.dumps(body).encode(), status, Content_Type="application/json")


def refusal(code: int, msg: str = "No.", status: str = "400 Bad Request") -> bytes:
    """A refusal of the exchange."""
    return said({"code": code, "msg": msg}, status)


@dataclass
class Relay:
    """Stands in front of the exchange; a hook may do something before a request goes on, or answer in its place."""

    exchange: RunningExchange
    hooks: dict[tuple[str, str], Hook] = field(default_factory=dict)

    def __post_init__(self) -> None:
        port = int(self.exchange.url.rpartition(":")[2])
        self.server = Server(lambda peer: self._serve(peer, port))
        self.answer("GET", MODE, said({"dualSidePosition": False}))
        self.answer("GET", MARK, said({"symbol": "BTCUSDT", "markPrice": "86421.37000000"}))
        self.answer("GET", INFO, said({"symbols": [SYMBOL]}))

    def answer(self, method: str, path: str, answer: bytes) -> None:
        """Answer each such request so."""
        self.hooks[method, path] = lambda: answer

    def before(self, method: str, path: str, do: Callable[[], object]) -> None:
        """Do something once before the first such request goes on."""
        done: list[object] = []
        self.hooks[method, path] = lambda: None if done else done.append(do())

    def asked(self, method: str) -> list[str]:
        """The targets of all such requests."""
        heads = [head.decode().split(" ", 2) for head in list(self.server.heads)]
        return [target for verb, target, _ in heads if verb == method]

    def the_order(self) -> BookEntry:
        """The one order that was placed."""
        (entry,) = self.exchange.book().values()
        return entry

    def _serve(self, peer: Peer, port: int) -> None:
        onward = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            while head := peer.read_head().decode():
                line, *fields = head.split("\r\n")
                method, target, _ = line.split(" ", 2)
                hook = self.hooks.get((method, target.partition("?")[0]))
                if (answer := hook and hook()) is not None:
                    peer.send(answer)
                    continue
                onward.request(method, target, headers=dict(line.split(": ", 1) for line in fields))
                response = onward.getresponse()
                peer.send(http_answer(response.read(), f"{response.status} {response.reason}"))
        finally:
            onward.close()


@pytest.fixture
def relay(exchange: RunningExchange) -> Iterator[Relay]:
    """Between the rehearsal and the local exchange."""
    relay = Relay(exchange)
    yield relay
    relay.server.close()


@pytest.fixture
def settings(valkey: Valkey, relay: Relay) -> dict[str, str]:
    """With which everything is in order."""
    return {
        "REDIS_URL": valkey.url,
        "BINANCE_BASE_URL": relay.server.url,
        "BINANCE_API_KEY": API_KEY,
        "BINANCE_API_SECRET": API_SECRET,
    }


def rehearse(settings: dict[str, str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command; none of them holds a key, a secret or a signature."""
    done = python("-m", "worker", "rehearse", *words, **settings)
    for text in (done.stdout, done.stderr):
        assert API_SECRET not in text
        assert API_KEY not in text
        assert not re.search(r"signature=[0-9a-f]|timestamp=|Traceback", text)
    return done.returncode, done.stdout, done.stderr


def test_an_order_is_placed_cancelled_and_gone(
    settings: dict[str, str], relay: Relay, connection: redis.Redis
) -> None:
    """Each request and answer is shown, the cancel is a worker's DELETE, and neither order nor key is left."""
    code, out, err = rehearse(settings)

    assert (code, err) == (0, ""), out
    entry = relay.the_order()
    assert NAME.fullmatch(entry.client_algo_id)
    assert (entry.status, entry.deletes_effective) == ("CANCELED", 1)
    assert connection.dbsize() == 0
    lines = out.splitlines()
    assert lines[-1] == "passed: the order was placed, cancelled through the queue, and is gone"
    assert any(re.fullmatch(rf"#\d+ > DELETE {ORDER} algoId={entry.algo_id}", line) for line in lines)
    assert any(re.match(r"#\d+ < 200 .*\"code\": ?\"200\"", line) for line in lines)
    assert any("outcome: cancelled" in line for line in lines)
    placed = next(line for line in lines if "> POST" in line)
    assert "quantity=0.003 triggerPrice=43210.6 workingType=MARK_PRICE reduceOnly=true" in placed
    assert "side=SELL type=STOP_MARKET" in placed
    (head,) = [head.lower() for head in relay.server.heads if head.startswith(b"POST ")]
    assert b"content-length: 0" in head
