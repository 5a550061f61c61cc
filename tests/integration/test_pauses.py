"""What stops a worker from sending, and what starts it again: the weight budget and a refused key."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from producer import CancelClient, CancelRequest, OutcomeKind
from producer.keys import Keys
from tests.conftest import API_KEY, API_SECRET
from tests.servers import Peek, Valkey, Workers, eventually
from worker.sandbox.control import ExchangeConfig, RunningExchange, start_exchange
from worker.sandbox.faults import Fault

#: The worker's own command line, with probes of a refused key each second and a half instead of each minute.
FAST_PROBES = "import worker.key_breaker as k; k.PROBE_EVERY_MS = 1500; from worker.__main__ import start; start()"
OTHER = ("another-key-of-the-tests", "another-secret-of-the-tests")


@pytest.fixture
def small_budget() -> Iterator[RunningExchange]:
    """An exchange that allows a weight of 120 a minute, and whose minute ends soon, yet not before the workers stand.

    Its last tenth has room for all that two workers can have in flight: neither counts the other's.
    """
    skew_ms = 47_000 - int(time.time() * 1000) % 60_000
    accounts = {"default": (API_KEY, API_SECRET)}
    config = ExchangeConfig(accounts=accounts, weight_limit_per_minute=120, clock_skew_ms=skew_ms)
    with start_exchange(config) as running:
        yield running


def _environment(valkey: Valkey, exchange: RunningExchange) -> dict[str, str]:
    return {
        "REDIS_URL": valkey.url,
        "BINANCE_BASE_URL": exchange.url,
        "BINANCE_API_KEY": API_KEY,
        "BINANCE_API_SECRET": API_SECRET,
        "BINANCE_DESK_API_KEY": OTHER[0],
        "BINANCE_DESK_API_SECRET": OTHER[1],
        "WORKER_CONCURRENCY": "4",
    }


def test_the_weight_limit_is_not_reached(
    valkey: Valkey, client: CancelClient, small_budget: RunningExchange, tmp_path: Path
) -> None:
    """Near the limit that exchangeInfo tells, everybody waits for the exchange's next minute; no 429 comes."""
    fleet = Workers(tmp_path, _environment(valkey, small_budget))
    try:
        orders = small_budget.add_orders(180)
        for _ in range(2):
            fleet.start()
        tickets = client.cancel_many(CancelRequest(algo_id=order.algo_id) for order in orders)
        outcomes = eventually(
            lambda: found if len(found := client.outcomes_of([t.id for t in tickets])) == len(tickets) else None,
            40,
            "all outcomes",
        )

        assert {outcome.kind for outcome in outcomes.values()} == {OutcomeKind.CANCELLED}  # type: ignore[attr-defined]
        stats = small_budget.stats()
        assert not [key for key in stats.requests if " 429" in key or " 418" in key]
        assert stats.peak_used_weight <= 120
    finally:
        fleet.stop()


def test_a_key_that_is_refused_is_left_in_peace(
    valkey: Valkey, client: CancelClient, connection: redis.Redis, tmp_path: Path
) -> None:
    """After five refusals of a key its jobs wait without an attempt, other accounts go on, one probe sets them free."""
    config = ExchangeConfig(accounts={"default": (API_KEY, API_SECRET), "desk": OTHER})
    with start_exchange(config) as exchange:
        fleet = Workers(tmp_path, _environment(valkey, exchange))
        try:
            fleet.start(command=(sys.executable, "-c", FAST_PROBES))
            refused = exchange.add_orders(5, account="default")
            for order in refused:
                exchange.script_faults(order.algo_id, [Fault.KEY_2015])
                assert client.cancel(algo_id=order.algo_id).wait(10).kind is OutcomeKind.REFUSED
            held = exchange.add_orders(20, account="default")
            tickets = client.cancel_many(CancelRequest(algo_id=order.algo_id) for order in held)
            desk = exchange.add_orders(1, account="desk")[0]
            assert client.cancel(algo_id=desk.algo_id, account="desk").wait(10).kind is OutcomeKind.CANCELLED
            assert connection.hget(Keys().breaker("default"), "reason")
            assert not client.outcomes_of([ticket.id for ticket in tickets])

            outcomes = [ticket.wait(15) for ticket in tickets]

            assert {outcome.kind for outcome in outcomes} == {OutcomeKind.CANCELLED}
            assert {len(outcome.attempts) for outcome in outcomes} == {1}
            assert not connection.exists(Keys().breaker("default"))
            assert not connection.exists(Keys().held("default"))
        finally:
            fleet.stop()


def test_a_key_that_stays_refused_ends_its_jobs_at_their_deadline(
    valkey: Valkey, client: CancelClient, tmp_path: Path
) -> None:
    """A job that waits for its key until the deadline ends as refused, with the key's reason and nothing sent."""
    with start_exchange(ExchangeConfig(accounts={"default": (API_KEY, API_SECRET)})) as exchange:
        fleet = Workers(tmp_path, _environment(valkey, exchange))
        try:
            fleet.start()
            for order in exchange.add_orders(5):
                exchange.script_faults(order.algo_id, [Fault.KEY_LOCKED_2017])
                client.cancel(algo_id=order.algo_id).wait(10)
            order = exchange.add_orders(1)[0]

            outcome = client.cancel(algo_id=order.algo_id, deadline_s=1.5).wait(10)

            assert (outcome.kind, outcome.attempts) == (OutcomeKind.REFUSED, ())
            assert "-2017" in (outcome.error or "")
            assert exchange.book()[order.algo_id].deletes == 0
        finally:
            fleet.stop()


def test_a_worker_that_stood_still_asks_redis_before_anything_is_sent(
    valkey: Valkey, connection: redis.Redis, workers: Workers, exchange: RunningExchange
) -> None:
    """Stopped before a ban and woken during it, a worker does not even keep its connections warm: it hears first."""
    peek = Peek(connection)
    gate = peek.keys.gate("all")
    peek("HSET", gate, "until_ms", peek.now_ms() + 5000)
    worker = workers.start()
    assert "clock_offset_ms" not in worker.output(), "it has not asked the exchange yet, and will as soon as it may"
    worker.process.send_signal(signal.SIGSTOP)
    eventually(
        lambda: peek.now_ms() > int(peek("HGET", gate, "until_ms")) + 500, what="the pause that it knows is over"
    )

    peek("HSET", gate, "until_ms", peek.now_ms() + 3000)
    exchange.start_incident(Fault.BANNED_418, duration_ms=2900)
    worker.process.send_signal(signal.SIGCONT)

    eventually(lambda: exchange.stats().requests, what="it asks when the ban is over")
    assert exchange.stats().requests_during_incidents == 0
