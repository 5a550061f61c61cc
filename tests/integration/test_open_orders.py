"""All open orders of a symbol: real workers, a real Valkey, a real exchange over HTTP."""

from __future__ import annotations

import time

import pytest

from producer import CancelClient
from tests.orders import PROVEN_S
from tests.servers import Workers
from worker.sandbox.control import RunningExchange


def opened(exchange: RunningExchange, count: int, symbol: str = "BTCUSDT") -> list[int]:
    """Orders that are provably older than what comes next."""
    ids = [order.algo_id for order in exchange.add_orders(count, symbol=symbol)] if count else []
    time.sleep(PROVEN_S)
    return ids


def statuses(exchange: RunningExchange, ids: list[int]) -> set[str]:
    """Their states in the book."""
    return {str(entry.status) for entry in exchange.book(ids).values()} if ids else set()


@pytest.mark.parametrize("count", [0, 1, 200])
def test_what_was_open_is_cancelled(
    workers: Workers, client: CancelClient, exchange: RunningExchange, count: int
) -> None:
    """Each order of the symbol that was open is cancelled and told; others' symbols, and what comes later, stay."""
    workers.start()
    ids, others = opened(exchange, count), opened(exchange, 3, "ETHUSDT")

    ticket = client.cancel_open("BTCUSDT")
    time.sleep(PROVEN_S)
    later = opened(exchange, 1)
    outcome = ticket.wait(60)

    assert outcome.kind == ("cancelled" if count else "listed")
    assert sorted(order.algo_id for order in outcome.orders) == sorted(ids)
    assert (outcome.may_be_live, outcome.off_the_book, outcome.left_alone) == (False, True, ())
    assert outcome.listings == 2
    assert statuses(exchange, ids) == ({"CANCELED"} if count else set())
    assert statuses(exchange, others + later) == {"NEW"}
