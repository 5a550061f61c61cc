"""The local exchange keeps when requests about orders came, and tells of the orders that are asked for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest

from tests.integration.test_sandbox_server import ACCOUNTS, Caller
from worker.sandbox.arrivals import MAX_ARRIVALS, Arrivals
from worker.sandbox.control import ExchangeConfig, RunningExchange, start_exchange
from worker.sandbox.faults import Fault

#: The exchange's clock minus this machine's, ms.
AHEAD_MS = 5_000


@pytest.fixture
def market() -> Iterator[RunningExchange]:
    """An exchange whose clock is apart."""
    with start_exchange(ExchangeConfig(accounts=ACCOUNTS, clock_skew_ms=AHEAD_MS)) as running:
        yield running


@pytest.fixture
def caller(market: RunningExchange) -> Iterator[Caller]:
    """A client on one connection."""
    caller = Caller(market.url)
    with contextlib.closing(caller.connection):
        yield caller


def test_requests_about_orders_are_kept_as_they_came(market: RunningExchange, caller: Caller) -> None:
    """Each with its times, its connection and the id that it named; one that the exchange refuses, too."""
    (order,) = market.add_orders(1)
    before_ns = time.time_ns()
    caller.call("GET", ahead_ms=AHEAD_MS, clientAlgoId=order.client_algo_id)
    market.start_incident(Fault.LIMITED_429, duration_ms=60_000)
    assert caller.call("DELETE", ahead_ms=AHEAD_MS, algoId=order.algo_id).status == 429

    asked, cancelled = market.arrivals()

    assert (asked.method, asked.algo_id, asked.client_algo_id) == ("GET", None, order.client_algo_id)
    assert (cancelled.method, cancelled.algo_id, cancelled.client_algo_id) == ("DELETE", order.algo_id, None)
    assert before_ns <= asked.at_ns <= cancelled.at_ns <= time.time_ns()
    assert before_ns // 1_000_000 <= asked.signed_ms <= asked.at_ns / 1e6
    assert asked.port == cancelled.port == caller.connection.sock.getsockname()[1]


def test_nothing_else_is_kept(market: RunningExchange, caller: Caller) -> None:
    """Neither what is about no order, nor what makes no sense; and after a reset nothing at all."""
    caller.send("GET", "/fapi/v1/time")
    caller.send("GET", "/fapi/v1/algoOrder?algoId=x&timestamp=1")
    caller.send("GET", "/fapi/v1/algoOrder?algoId=1&algoId=2")
    assert market.arrivals() == []
    caller.cancel(1)
    assert len(market.arrivals()) == 1
    market.reset()
    assert market.arrivals() == []


def test_the_oldest_go() -> None:
    """An exchange that runs for days does not fill the memory."""
    arrivals = Arrivals()
    for number in range(MAX_ARRIVALS + 2):
        arrivals.note(number, "GET", 1, {"algoId": str(number)}, 0)
    kept = [arrival.algo_id for arrival in arrivals]
    assert (len(kept), kept[0], kept[-1]) == (MAX_ARRIVALS, 2, MAX_ARRIVALS + 1)


def test_single_orders_can_be_looked_at(market: RunningExchange) -> None:
    """A strategy that waits for some orders need not read the whole book; what does not exist is left out."""
    first, second, _ = market.add_orders(3)
    market.cancel(second.algo_id)
    book = market.book([second.algo_id, 1, first.algo_id])
    assert {algo_id: entry.status for algo_id, entry in book.items()} == {
        first.algo_id: "NEW",
        second.algo_id: "CANCELED",
    }
    assert market.book([]) == {}
    assert len(market.book()) == 3
