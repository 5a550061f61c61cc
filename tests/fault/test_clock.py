"""The exchange's clock stands apart from the host's, or jumps while requests are in flight: no outcome suffers."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from producer import CancelClient, CancelRequest, Outcome, OutcomeKind, Ticket
from tests.fault.conftest import Scenes, Stage
from tests.servers import eventually
from worker.sandbox.control import RunningExchange

#: How far apart, ms: beyond what the receive window of 5 s forgives, in either direction.
APART_MS = 5_500
CONCURRENCY, LATENCY_MS = 8, 100
WORKERS = 2
SCENES = Scenes()


class Market:
    """Two workers on an exchange whose clock can be set."""

    def __init__(self, stage: Stage, skew_ms: int = 0) -> None:
        valkey = stage.valkey()
        self.exchange: RunningExchange = stage.exchange(LATENCY_MS)
        self.exchange.set_clock_skew_ms(skew_ms)
        self.client: CancelClient = stage.client(valkey.url)
        fleet = stage.fleet(valkey.url, self.exchange, WORKER_CONCURRENCY=str(CONCURRENCY))
        for _ in range(WORKERS):
            fleet.start()

    def ask(self, count: int) -> list[Ticket]:
        """Have so many orders cancelled."""
        orders = self.exchange.add_orders(count)
        return self.client.cancel_many(CancelRequest(algo_id=order.algo_id) for order in orders)

    def outcomes(self, tickets: list[Ticket]) -> list[Outcome]:
        """Of all of them."""
        ids = [ticket.id for ticket in tickets]
        eventually(lambda: len(self.client.outcomes_of(ids)) == len(ids), 30, "all outcomes")
        return list(self.client.outcomes_of(ids).values())

    def recorded(self, tickets: list[Ticket]) -> int:
        """How many have ended."""
        return len(self.client.outcomes_of([ticket.id for ticket in tickets]))


def clock_errors(outcomes: list[Outcome]) -> int:
    """Requests that the exchange refused for their timestamp."""
    return sum(attempt.verdict == "clock" for outcome in outcomes for attempt in outcome.attempts)


def apart_from_the_start(stage: Stage, skew_ms: int) -> None:
    """No request is refused for its timestamp: each worker has measured the exchange's clock before its first."""
    outcomes = (market := Market(stage, skew_ms)).outcomes(market.ask(50))
    assert {outcome.kind for outcome in outcomes} == {OutcomeKind.CANCELLED}
    assert clock_errors(outcomes) == 0


def jumps_under_load(stage: Stage, by_ms: int) -> None:
    """A jump costs the requests that are under way, once each; every order ends as cancelled all the same."""
    market = Market(stage)
    tickets = market.ask(300)
    eventually(lambda: market.recorded(tickets) >= 60, 20, "work is under way")
    market.exchange.set_clock_skew_ms(by_ms)
    outcomes = market.outcomes(tickets)
    assert {outcome.kind for outcome in outcomes} == {OutcomeKind.CANCELLED}
    # Those in flight, and those that were about to be sent when the first of them came back.
    assert 1 <= clock_errors(outcomes) <= 2 * WORKERS * CONCURRENCY
    later = market.outcomes(market.ask(50))
    assert clock_errors(later) == 0


@SCENES.add
def the_exchange_is_ahead(stage: Stage) -> None:
    """A host whose clock is behind."""
    apart_from_the_start(stage, APART_MS)


@SCENES.add
def the_exchange_is_behind(stage: Stage) -> None:
    """A host whose clock is ahead."""
    apart_from_the_start(stage, -APART_MS)


@SCENES.add
def the_exchange_jumps_ahead(stage: Stage) -> None:
    """As a host's clock that is set back."""
    jumps_under_load(stage, APART_MS)


@SCENES.add
def the_exchange_jumps_back(stage: Stage) -> None:
    """As a host's clock that is set forward."""
    jumps_under_load(stage, -APART_MS)


@pytest.mark.parametrize("name", SCENES)
def test_clock(played: dict[str, Future[None]], name: str) -> None:
    """Each scene above shows its rule."""
    played[name].result()
