"""Worker processes that stand still, or are held up: nobody reads their stdout, their loop hangs, Redis or the exchange
say nothing at their start."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from producer import CancelClient, OutcomeKind
from tests.engines import CLOCK_ERROR, Answerer, Asked, clock, enqueued, every, well
from tests.fault.conftest import name_of
from tests.fault.proxy import Proxy
from tests.integration.conftest import NewFleet
from tests.loopback import Peer, Server
from tests.orders import cancel_all, events, once_each, opened, outcomes, steps
from tests.processes import Pipe
from tests.servers import Peek, Valkey, Worker, Workers, eventually, running_valkey, stopped
from worker.sandbox.control import RunningExchange

#: How long a stop may take that has nothing to wait for, s: RQ's thread for commands looks once a second.
SOON_S = 3.0


# ---- nobody reads ---------------------------------------------------------------------------------------------------


def test_a_worker_that_nobody_reads_goes_on(
    workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek, pipe: Pipe
) -> None:
    """A worker whose stdout is a full pipe serves its queue, keeps its leases from a peer, and leaves with 0."""
    pipe.fill()
    mute = workers.start(LOG_LEVEL="DEBUG", LEASE_S="1", wait=False, stdout=pipe.writer)
    eventually(lambda: peek("SCARD", "rq:workers") == 1, 20, "it works")
    assert {outcome.kind for outcome in outcomes(client, cancel_all(client, opened(exchange, 500)))} == {
        OutcomeKind.CANCELLED
    }
    exchange.set_latency_ms(3000)
    slow = cancel_all(client, opened(exchange, 8))
    eventually(lambda: len(peek.held()) == 8, what="all are under way")
    exchange.set_latency_ms(0)
    workers.start(LEASE_S="1")  # it would take over whatever is not renewed

    found = outcomes(client, slow)
    assert {(outcome.kind, steps(outcome)[-1]) for outcome in found} <= {
        (OutcomeKind.CANCELLED, "confirmed"),  # or the look-up was faster
        (OutcomeKind.CANCELLED, "canceled"),
    }
    assert len({outcome.worker for outcome in found}) == 1
    assert mute.stop() == 0
    assert mute.output() == ""  # its errors


# ---- a loop that hangs ----------------------------------------------------------------------------------------------

#: The worker's own command line; its loop hangs right behind its first DELETE, and its watchdog looks more often.
HANGING = """
import asyncio, time
import worker.runner, worker.transport_asyncio
from worker.__main__ import start
worker.runner._STUCK_LOOKS, worker.runner._STUCK_LOOK_S = 8, 0.25
send = worker.transport_asyncio.AsyncioTransport.send
async def hanging(self, make, patience_s):
    def noted():
        request = make()
        if request is not None and request.method == "DELETE":
            asyncio.get_running_loop().call_soon(time.sleep, 3600)
        return request
    return await send(self, noted, patience_s)
worker.transport_asyncio.AsyncioTransport.send = hanging
start()
"""


def test_a_loop_that_hangs_ends_its_process_and_its_jobs_go_to_a_peer(
    workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek
) -> None:
    """A worker that stands still ends with 70 and says where it stood; a peer has taken its jobs over long before."""
    hanging = workers.start(command=(sys.executable, "-c", HANGING), LEASE_S="1")
    tickets = cancel_all(client, opened(exchange, 5))
    eventually(lambda: sum(entry.deletes for entry in exchange.book().values()), what="the first one is sent")
    peer = workers.start(LEASE_S="1")

    found = outcomes(client, tickets)
    assert {(outcome.kind, outcome.worker) for outcome in found} == {(OutcomeKind.CANCELLED, name_of(peer))}
    assert {outcome.attempts[0].msg for outcome in found} == {"worker lost"}
    assert once_each(peek, tickets)
    assert hanging.process.wait(10) == 70
    assert "event=defect where=loop" in hanging.output()
    assert "event=stands thread=MainThread" in hanging.output()
    assert peer.process.poll() is None


# ---- a stop in the middle of the start ------------------------------------------------------------------------------


@pytest.fixture
def silent() -> Iterator[Server]:
    """Who connects here is connected, and hears nothing."""
    with Server(Peer.wait_until_closed) as server:
        yield server


def leaves_soon(worker: Worker, how: signal.Signals, within_s: float = SOON_S) -> None:
    """See that a signal ends it in order."""
    began = time.monotonic()
    assert worker.stop(how) == 0
    assert time.monotonic() - began < within_s
    assert "Traceback" not in worker.output()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_while_redis_says_nothing(how: signal.Signals, new_fleet: NewFleet, silent: Server) -> None:
    """A worker that has only just connected to a Redis which says nothing leaves when it is told to."""
    worker = new_fleet(REDIS_URL=f"redis://127.0.0.1:{silent.port}/0").start(wait=False)
    eventually(lambda: silent.connections, 20, "it has connected")
    leaves_soon(worker, how)
    assert events(worker, "started") == []


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP])
def test_a_stop_while_the_exchange_says_nothing(
    how: signal.Signals, new_fleet: NewFleet, silent: Server, peek: Peek
) -> None:
    """A worker that asks a silent exchange for its time leaves when it is told to, and RQ forgets it."""
    worker = new_fleet(BINANCE_BASE_URL=silent.url).start(wait=False)
    eventually(lambda: silent.connections, 20, "it has connected")
    leaves_soon(worker, how)
    assert peek("SCARD", "rq:workers") == 0


def test_a_stop_while_it_joins_leaves_nothing_of_it_in_rq(new_fleet: NewFleet, valkey: Valkey, peek: Peek) -> None:
    """A worker that is told to stop in the middle of its registration is forgotten by RQ all the same."""
    with Proxy(valkey.port) as proxy:
        proxy.latency(250)
        worker = new_fleet(REDIS_URL=proxy.redis_url).start(wait=False)
        eventually(lambda: peek("SCARD", "rq:workers"), 20, "RQ knows it")
        leaves_soon(worker, signal.SIGTERM)
    assert peek("SCARD", "rq:workers") == 0


def test_a_stop_while_the_clock_is_measured(new_fleet: NewFleet, client: CancelClient, stack: ExitStack) -> None:
    """A worker whose orders wait for the exchange's clock leaves within its grace."""
    has_started, measuring = threading.Event(), threading.Event()

    def holds(asked: Asked) -> bool:
        if has_started.is_set() and clock(asked):
            measuring.set()
        return measuring.is_set() and clock(asked)

    server = stack.enter_context(Answerer(lambda asked: CLOCK_ERROR if every(asked) else well(asked), holds))
    worker = new_fleet(BINANCE_BASE_URL=server.url, SHUTDOWN_GRACE_S="4").start()
    has_started.set()
    enqueued(client, 4)
    assert measuring.wait(10)

    leaves_soon(worker, signal.SIGTERM, within_s=4)
    assert "event=stopped" in worker.output()


def test_a_stop_while_redis_stands_still(new_fleet: NewFleet, stack: ExitStack) -> None:
    """A worker whose Redis stands still leaves within its grace, though it cannot record what was answered."""
    valkey = stack.enter_context(running_valkey("--appendonly", "no"))
    client = stack.enter_context(CancelClient.from_url(valkey.url))
    server = stack.enter_context(Answerer(holds=every))
    worker = new_fleet(REDIS_URL=valkey.url, BINANCE_BASE_URL=server.url, SHUTDOWN_GRACE_S="4").start()
    enqueued(client, 4)
    eventually(lambda: server.count()["DELETE"] == 4, what="all are sent")
    with stopped(valkey):
        server.may_answer.set()
        leaves_soon(worker, signal.SIGTERM, within_s=4)
    assert "event=stopped" in worker.output()


# ---- signals with jobs in hand --------------------------------------------------------------------------------------


def test_a_terminal_that_is_closed_stops_in_order(
    workers: Workers, client: CancelClient, exchange: RunningExchange
) -> None:
    """SIGHUP is a stop like any other: answers under way are waited for and recorded."""
    worker = workers.start()
    exchange.set_latency_ms(700)
    (algo_id,) = opened(exchange, 1)
    ticket = client.cancel(algo_id=algo_id)
    eventually(lambda: exchange.book()[algo_id].deletes == 1, what="the request is under way")

    assert worker.stop(signal.SIGHUP) == 0

    outcome = client.outcome(ticket.id)
    assert outcome is not None
    assert steps(outcome) == ["confirmed"]
