"""Workers over a real failover: the old server stays up as a replica, and nobody closes a connection."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import redis
from rq.command import send_shutdown_command

from producer import CancelClient, OutcomeKind, QueueUnavailable, Ticket
from tests.failover import Pair, Sentinel, direct, role, running_pair, running_sentinel
from tests.fault.proxy import Proxy
from tests.integration.conftest import NewFleet
from tests.integration.test_redis_reached import through
from tests.orders import cancel_all, events, once_each, opened, outcomes, stayed_in_hand
from tests.servers import Peek, Valkey, Worker, Workers, eventually, free_port, plain
from worker.sandbox.control import RunningExchange
from worker.sandbox.faults import Fault


class Address:
    """Where a pair's primary is reached: after a failover by new connections alone."""

    def __init__(self, pair: Pair, proxy: Proxy) -> None:
        self.pair, self._proxy = pair, proxy
        self.url = proxy.redis_url

    def fail_over(self) -> None:
        """Be managed."""
        self._proxy.target_port = self.pair.replica.port
        self.pair.fail_over()

    def deafen(self) -> None:
        """The old server follows nobody that is there: what it serves and publishes is over."""
        with direct(self.pair.replica) as old:
            old.execute_command("REPLICAOF", "127.0.0.1", free_port())


@pytest.fixture
def place() -> Iterator[Address]:
    """A pair behind one address."""
    with running_pair() as pair, Proxy(pair.primary.port) as proxy:
        yield Address(pair, proxy)


@pytest.fixture
def fleet(new_fleet: NewFleet, place: Address) -> Workers:
    """Workers that find Redis there."""
    return new_fleet(REDIS_URL=place.url)


def listeners(connection: redis.Redis) -> set[str]:
    """Ids of the connections that listen to a channel."""
    return {client["id"] for client in connection.client_list(_type="pubsub") if client["sub"] != "0"}


def worker_keys(server: Valkey) -> set[str]:
    """Whom RQ knows there."""
    with direct(server) as client:
        return set(plain(client.smembers("rq:workers")))


def assert_well(worker: Worker) -> None:
    """It has left in peace, and told of one outage at the most."""
    assert worker.stop() == 0
    assert "Traceback" not in worker.output()
    assert "event=farewell" not in worker.output()
    assert "event=defect" not in worker.output()


@pytest.mark.parametrize("is_suspended", [True, False], ids=["while it does not wait at the queue", "while it waits"])
def test_a_server_that_stays_up_as_a_replica_is_left(
    fleet: Workers, place: Address, exchange: RunningExchange, is_suspended: bool
) -> None:
    """A worker goes over to the new primary: RQ knows it there, it serves the queue there, hears what RQ publishes
    there, and takes its leave there."""
    with direct(place.pair.primary) as old:
        worker = fleet.start()
        if is_suspended:
            old.set("rq:suspended", 1)
            eventually(
                lambda: b"suspended" in old.hmget(*worker_keys(place.pair.primary), "state"), 20, "it is suspended"
            )
    place.fail_over()
    with direct(place.pair.primary) as new, CancelClient.from_url(place.url) as client:
        new.delete("rq:suspended", *worker_keys(place.pair.primary), "rq:workers")  # as if that had never reached it
        (ticket,) = cancel_all(client, opened(exchange, 1))
        assert ticket.wait(30).kind is OutcomeKind.CANCELLED
        eventually(lambda: worker_keys(place.pair.primary), 20, "it is registered")
        place.deafen()
        (key,) = worker_keys(place.pair.primary)
        name = key.removeprefix("rq:worker:")
        eventually(lambda: new.pubsub_numsub(f"rq:pubsub:{name}")[0][1], 30, "it listens there")
        send_shutdown_command(new, name)
        assert worker.process.wait(20) == 0
    assert worker_keys(place.pair.primary) == set()
    assert_well(worker)


def test_what_is_under_way_stays_where_it_is(fleet: Workers, place: Address, exchange: RunningExchange) -> None:
    """A failover costs no job its lease and no request its outcome."""
    workers = [fleet.start(WORKER_CONCURRENCY="4") for _ in range(2)]
    with CancelClient.from_url(place.url, timeout_s=10) as client:
        exchange.set_latency_ms(3000)
        tickets = cancel_all(client, opened(exchange, 8))
        eventually(lambda: exchange.stats().in_flight == 8, 20, "all are under way")
        exchange.set_latency_ms(20)
        place.fail_over()
        tickets += cancel_all(client, opened(exchange, 100))
        found = outcomes(client, tickets, 40)
    with direct(place.pair.primary) as new:
        assert once_each(Peek(new), tickets)
    assert all(map(stayed_in_hand, found))
    assert {entry.deletes_effective for entry in exchange.book().values()} == {1}
    for worker in workers:
        assert_well(worker)


@pytest.mark.parametrize("when", ["before", "after", "before, and it was not replicated"])
def test_a_ban_lives_on_at_the_new_primary(
    fleet: Workers, place: Address, exchange: RunningExchange, when: str
) -> None:
    """Nobody sends anything during a ban that one worker heard of, whichever server was told: a worker that starts
    after the failover neither."""
    first = fleet.start()
    if when == "after":
        place.fail_over()
    with CancelClient.from_url(place.url, timeout_s=10) as client:
        exchange.start_incident(Fault.BANNED_418, duration_ms=12_000)
        (ticket,) = cancel_all(client, opened(exchange, 1))
        eventually(lambda: events(first, "gate"), 20, "the ban was heard of")
        if when != "after":
            place.fail_over()
        with direct(place.pair.primary) as new:
            if when.endswith("not replicated"):
                new.delete("gate:all")
            eventually(lambda: new.exists("gate:all"), 10, "the new primary knows of the ban")
            assert int(new.hget("gate:all", "until_ms") or 0) > Peek(new).now_ms()
        first.stop(signal.SIGKILL)
        second = fleet.start()
        assert ticket.wait(40).kind is OutcomeKind.CANCELLED
    (incident,) = exchange.stats().incidents
    assert len(incident.requests_ms) == 1  # the one that it began with
    assert_well(second)


def test_the_step_of_a_stock_worker_is_completed_at_the_new_primary(
    fleet: Workers, place: Address, exchange: RunningExchange
) -> None:
    """What a stock `rq worker` has under way is recorded by its step, whatever becomes of RQ's own connection."""
    fleet.start_stock("-w", "rq.SimpleWorker")
    with CancelClient.from_url(place.url, timeout_s=10) as client:
        exchange.set_latency_ms(3000)
        (ticket,) = cancel_all(client, opened(exchange, 1))
        eventually(lambda: exchange.stats().in_flight == 1, 30, "it is under way")
        exchange.set_latency_ms(20)
        place.fail_over()
        assert stayed_in_hand(ticket.wait(40))


#: The worker's own command line, with a channel that is probed more often.
PROBING = """
import worker.redis_link
from worker.__main__ import start
worker.redis_link.PROBE_EVERY_S = 1.0
start()
"""


def test_a_channel_that_was_forgotten_on_the_way_is_opened_anew(
    new_fleet: NewFleet, valkey: Valkey, connection: redis.Redis
) -> None:
    """A connection that only hears, and would never notice that it leads nowhere, is probed: RQ's commands arrive."""
    with Proxy(valkey.port) as proxy:
        worker = new_fleet(REDIS_URL=proxy.redis_url).start(command=(sys.executable, "-c", PROBING))
        before = listeners(connection)
        proxy.forget_flows()
        (worker_name,) = worker_keys(valkey)
        name = worker_name.removeprefix("rq:worker:")
        eventually(lambda: listeners(connection) - before, 30, "it listens once more")
        send_shutdown_command(connection, name)
        assert worker.process.wait(20) == 0


def test_connections_are_kept_alive(new_fleet: NewFleet, valkey: Valkey) -> None:
    """Each connection of a worker and of a client says so now and then that it lives (TCP keepalive)."""
    worker = new_fleet().start()
    with CancelClient.from_url(valkey.url) as client:
        client.statuses(["x"])
        for pid in (os.getpid(), worker.process.pid):
            eventually(partial(are_kept_alive, pid, valkey.port), 20, "all wait for their next keepalive")
    assert_well(worker)


def are_kept_alive(pid: int, port: int) -> bool:
    """Whether the next thing that happens at a process' connections to a port is a keepalive (2 in proc(5))."""
    owned = set[str]()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            owned.add(str(fd.readlink()))
    rows = (line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:])
    timers = [
        row[5].partition(":")[0]
        for row in rows
        if row[2].endswith(f":{port:04X}") and row[3] == "01" and f"socket:[{row[9]}]" in owned
    ]
    return set(timers) == {"02"}


@pytest.fixture
def watched() -> Iterator[Sentinel]:
    """A pair with a Sentinel."""
    with running_pair() as pair, running_sentinel(pair) as sentinel:
        yield sentinel


def asked_until_it_works(client: CancelClient, algo_ids: list[int]) -> list[Ticket]:
    """Repeat a call until it is acknowledged, as its error says that one may."""
    tickets = list[Ticket]()

    def is_asked() -> bool:
        with contextlib.suppress(QueueUnavailable):
            tickets.extend(cancel_all(client, algo_ids))
        return bool(tickets)

    eventually(is_asked, 30, "the requests are taken")
    return tickets


@pytest.mark.parametrize("is_killed", [False, True], ids=["asked for", "after its death"])
def test_a_failover_by_sentinels(
    new_fleet: NewFleet, watched: Sentinel, exchange: RunningExchange, is_killed: bool
) -> None:
    """Worker and clients follow the Sentinels to the new primary, whether the old one is dead or stays up."""
    url, pair = through(watched), watched.pair
    worker = new_fleet(REDIS_URL=url).start()
    with CancelClient.from_url(url) as client, direct(pair.replica) as new:
        assert cancel_all(client, opened(exchange, 1))[0].wait(20).kind is OutcomeKind.CANCELLED
        pair.in_step()
        if is_killed:
            pair.primary.stop(signal.SIGKILL)
        else:
            watched.fail_over()
        # A Sentinel promotes the one first, and only then tells the other, which would take requests until it is told.
        roles = ("master", "away" if is_killed else "slave")
        eventually(lambda: (role(pair.replica), role(pair.primary)) == roles, 60, "the replica is promoted")
        (ticket,) = asked_until_it_works(client, opened(exchange, 1))
        assert ticket.wait(30).kind is OutcomeKind.CANCELLED
        assert new.exists(f"rq:job:{ticket.id}")
        eventually(lambda: new.scard("rq:workers") == 1, 20, "RQ knows it there")
    assert_well(worker)
    assert f"redis={url}" in worker.output()
