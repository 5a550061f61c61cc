"""Worker processes while Redis comes late, goes away, comes back, or loses everything."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from producer import CancelClient, OutcomeKind
from tests.fault.proxy import Proxy
from tests.integration.conftest import NewFleet
from tests.orders import at_first_try, cancel_all, events, opened, outcomes, stayed_in_hand
from tests.servers import Peek, Valkey, Worker, Workers, eventually, running_valkey
from worker.sandbox.control import RunningExchange
from worker.sandbox.faults import Fault


def test_stop_while_redis_was_never_there(new_fleet: NewFleet, tmp_path: Path) -> None:
    """A worker that waits for a Redis that never comes still leaves with 0 when it is told to."""
    worker = new_fleet(REDIS_URL=Valkey(tmp_path).url, SHUTDOWN_GRACE_S="5").start(wait=False)
    eventually(lambda: events(worker, "redis"), 15, "it says that Redis is away")
    began = time.monotonic()

    assert worker.stop() == 0
    assert time.monotonic() - began < 5
    assert "Traceback" not in worker.output()
    assert events(worker, "started") == []


def test_stop_with_unstarted_jobs_while_redis_is_away(
    durable: Valkey, new_fleet: NewFleet, exchange: RunningExchange
) -> None:
    """Jobs that were claimed and not begun do not keep a worker that has no Redis to hand them back to."""
    fleet = new_fleet(REDIS_URL=durable.url, LEASE_S="1", SHUTDOWN_GRACE_S="4", WORKER_CONCURRENCY="1")
    worker = fleet.start(BACKOFF_BASE_MS="1500", BACKOFF_CAP_MS="1500")
    with CancelClient.from_url(durable.url) as client, redis.Redis(port=durable.port) as connection:
        one, two = opened(exchange, 2)
        exchange.script_faults(one, [Fault.UNAVAILABLE_503])
        tickets = cancel_all(client, [one])
        eventually(lambda: events(worker, "again"), what="the first try was refused")
        exchange.set_latency_ms(1500)
        eventually(lambda: exchange.book()[one].deletes == 2, what="the only slot is taken by the retry")
        tickets += cancel_all(client, [two])
        peek = Peek(connection)
        eventually(lambda: peek.job(tickets[1].id)["status"] == "started", 1.3, "the next job is claimed already")
        durable.stop(signal.SIGKILL)
        began = time.monotonic()

        assert worker.stop() == 0
        assert time.monotonic() - began < 4.5
        durable.start()
        exchange.set_latency_ms(0)
        fleet.start()
        assert {outcome.kind for outcome in outcomes(client, tickets)} == {OutcomeKind.CANCELLED}


def test_leases_are_renewed_while_a_registration_hangs(
    workers: Workers, client: CancelClient, exchange: RunningExchange, connection: redis.Redis, valkey: Valkey
) -> None:
    """A worker that RQ has forgotten keeps the jobs in its hands, however long it takes to make itself known again."""
    with Proxy(valkey.port) as proxy:
        workers.start(REDIS_URL=proxy.redis_url, LEASE_S="1")
        exchange.set_latency_ms(3000)
        (ticket,) = cancel_all(client, opened(exchange, 1))
        eventually(lambda: exchange.stats().in_flight == 1, what="it is under way")
        proxy.opens_after_s = 8.0  # for new connections
        connection.delete(*connection.smembers("rq:workers"))

        assert stayed_in_hand(ticket.wait(20))
        proxy.opens_after_s = 0.0
        eventually(lambda: connection.exists(*connection.smembers("rq:workers")), 20, "RQ knows it again")


def test_redis_at_a_socket_of_this_host(new_fleet: NewFleet, exchange: RunningExchange, tmp_path: Path) -> None:
    """`unix:///path` leads a worker to Redis as well as an address does."""
    path = tmp_path / "redis.sock"
    with running_valkey("--unixsocket", str(path)) as server, CancelClient.from_url(server.url) as client:
        worker = new_fleet(REDIS_URL=f"unix://{path}").start()
        (ticket,) = cancel_all(client, opened(exchange, 1))

        assert ticket.wait(10).kind is OutcomeKind.CANCELLED
        assert worker.stop() == 0
        assert "Traceback" not in worker.output()


# ---- a server that is full ------------------------------------------------------------------------------------------


def test_jobs_of_a_dead_worker_are_taken_over_on_a_full_server(
    workers: Workers, client: CancelClient, exchange: RunningExchange, full: Callable[[], object]
) -> None:
    """That new requests are refused keeps nobody from finishing what was accepted."""
    exchange.set_latency_ms(30_000)
    dead = workers.start(LEASE_S="2")
    tickets = cancel_all(client, opened(exchange, 3))
    eventually(lambda: exchange.stats().in_flight == 3, what="all are under way")
    exchange.set_latency_ms(0)
    other = workers.start(LEASE_S="2")
    full()
    eventually(lambda: events(other, "redis"), what="it was not let wait")
    dead.stop(signal.SIGKILL)

    assert {outcome.kind for outcome in outcomes(client, tickets, 10)} == {OutcomeKind.CANCELLED}
    assert [event["state"] for event in events(other, "redis")] == ["full"]


def test_a_full_server_is_drained_by_a_new_worker(
    workers: Workers,
    client: CancelClient,
    exchange: RunningExchange,
    connection: redis.Redis,
    full: Callable[[], object],
) -> None:
    """A worker that starts then does what waits, and RQ knows it as soon as there is room."""
    tickets = cancel_all(client, opened(exchange, 3))
    full()
    worker = workers.start()

    assert {outcome.kind for outcome in outcomes(client, tickets, 5)} == {OutcomeKind.CANCELLED}
    connection.config_set("maxmemory", 0)
    eventually(lambda: connection.scard("rq:workers") == 1, 5, "it is registered")
    (name,) = connection.smembers("rq:workers")
    assert connection.hget(name, "queues") == b"cancels"
    assert worker.stop() == 0


# ---- a server that closes idle connections --------------------------------------------------------------------------


@pytest.fixture
def impatient(workers: Workers) -> Iterator[Valkey]:
    """A server for the workers that closes connections on which nothing was asked for two seconds."""
    with running_valkey("--appendonly", "no", "--timeout", "2") as server:
        workers.environment["REDIS_URL"] = server.url
        yield server


def assert_untroubled(worker: Worker, seconds: float) -> None:
    """See that the worker does not speak of Redis for so long."""
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at:
        said = [line for line in worker.output().splitlines() if "event=redis " in line or "event=defect" in line]
        assert said == []
        time.sleep(0.1)


def test_a_server_that_closes_idle_connections(impatient: Valkey, workers: Workers, exchange: RunningExchange) -> None:
    """No connection that matters is ever idle for long: waiting or slowly at work, the worker loses none."""
    worker = workers.start()
    assert_untroubled(worker, 4)
    with CancelClient.from_url(impatient.url) as client:
        for _ in range(6):
            assert at_first_try(outcomes(client, cancel_all(client, opened(exchange, 1))))
            assert_untroubled(worker, 0.5)
    assert worker.stop() == 0
    assert "event=farewell" not in worker.output()


def test_a_server_that_closes_idle_connections_while_nothing_is_claimed(impatient: Valkey, workers: Workers) -> None:
    """While RQ is suspended a worker still looks by both connections of its loop, and loses neither."""
    with redis.Redis(port=impatient.port) as connection:
        connection.config_set("timeout", 3)
        connection.set("rq:suspended", 1)
    assert_untroubled(workers.start(), 5.5)
