"""A worker that was paused longer than its lease does no harm when it wakes: one outcome, and no request after the
lease was taken."""

from __future__ import annotations

import signal
import time

import pytest
import redis

from producer import CancelClient, Ticket
from producer.message import OutcomeKind
from tests.fault.conftest import FAST, LEASE_S, environment, name_of
from tests.servers import Peek, Valkey, Worker, Workers, eventually
from worker.sandbox.control import RunningExchange
from worker.sandbox.faults import Fault

#: How long a woken worker is watched for requests that it must not send, s: longer than its looks at Redis.
WATCHED_S = 1.5


@pytest.fixture(autouse=True)
def _scaled(workers: Workers, valkey: Valkey, exchange: RunningExchange) -> None:
    workers.environment.update(environment(valkey.url, exchange.url))


def pause(worker: Worker) -> None:
    """Stop the process as a suspended host would."""
    worker.process.send_signal(signal.SIGSTOP)
    eventually(lambda: state(worker) == "T", what="the process stands still")


def wake(worker: Worker) -> None:
    """Let it go on."""
    worker.process.send_signal(signal.SIGCONT)


def state(worker: Worker) -> str:
    """The process' state as the kernel names it; T is stopped."""
    with open(f"/proc/{worker.process.pid}/stat") as stat:
        return stat.read().rpartition(") ")[2][0]


def requests(exchange: RunningExchange, algo_id: int) -> tuple[int, int]:
    """DELETEs and GETs that the exchange has got for an order."""
    entry = exchange.book()[algo_id]
    return entry.deletes, entry.gets


def watch(exchange: RunningExchange, algo_id: int, expected: tuple[int, int]) -> None:
    """See that no more requests come for a while."""
    ends_at = time.monotonic() + WATCHED_S
    while time.monotonic() < ends_at:
        assert requests(exchange, algo_id) == expected
        time.sleep(0.05)


def records(connection: redis.Redis, ticket: Ticket) -> list[str]:
    """Who recorded an outcome for the ticket."""
    return [outcome.worker for outcome in Peek(connection).ledger() if outcome.id == ticket.id]


def test_an_answer_read_after_the_lease_is_not_recorded(
    workers: Workers, client: CancelClient, connection: redis.Redis, exchange: RunningExchange
) -> None:
    """Paused between its DELETE and the answer, the first worker's outcome is refused: the peer's stands alone."""
    exchange.set_latency_ms(500)
    paused = workers.start()
    order = exchange.add_orders()[0]
    ticket = client.cancel(algo_id=order.algo_id)
    eventually(lambda: requests(exchange, order.algo_id)[0] == 1, what="the DELETE arrives")
    pause(paused)
    peer = workers.start()
    outcome = ticket.wait(10)
    assert outcome.kind is OutcomeKind.CANCELLED
    assert [attempt.msg for attempt in outcome.attempts] == ["worker lost", "CANCELED"]
    seen = requests(exchange, order.algo_id)
    wake(paused)
    eventually(lambda: "event=fenced" in paused.output(), 5, "the late outcome is refused")
    watch(exchange, order.algo_id, seen)
    assert records(connection, ticket) == [name_of(peer)]
    assert exchange.book()[order.algo_id].deletes_effective == 1


@pytest.mark.parametrize("fault", [Fault.UNKNOWN_503, Fault.AHEAD_1021])
def test_no_request_follows_an_answer_that_calls_for_one(
    workers: Workers, client: CancelClient, connection: redis.Redis, exchange: RunningExchange, fault: Fault
) -> None:
    """An answer that asks for another call at once is read too late: the woken worker sends nothing more."""
    exchange.set_latency_ms(500)
    paused = workers.start()
    order = exchange.add_orders()[0]
    exchange.script_faults(order.algo_id, [fault])
    ticket = client.cancel(algo_id=order.algo_id)
    eventually(lambda: requests(exchange, order.algo_id)[0] == 1, what="the DELETE arrives")
    pause(paused)
    exchange.set_latency_ms(0)
    peer = workers.start()
    assert ticket.wait(10).kind is OutcomeKind.CANCELLED
    seen = requests(exchange, order.algo_id)
    wake(paused)
    watch(exchange, order.algo_id, seen)
    assert records(connection, ticket) == [name_of(peer)]


def test_a_claim_that_is_read_after_its_lease_sends_nothing(
    workers: Workers, client: CancelClient, connection: redis.Redis, exchange: RunningExchange
) -> None:
    """Redis hands a job to a worker that stands still at the queue; it wakes when somebody else has done the job."""
    paused = workers.start()
    order = exchange.add_orders()[0]
    peek = Peek(connection)
    for _ in range(10):
        pause(paused)
        ticket = client.cancel(algo_id=order.algo_id)
        if not peek.waiting():
            break
        # It stood still between two waits, when nobody is at the queue: once more.
        wake(paused)
        ticket.wait(5)
        order = exchange.add_orders()[0]
    assert peek.job(ticket.id)["worker_name"] == name_of(paused)
    began = time.monotonic()
    peer = workers.start()
    assert ticket.wait(10).kind is OutcomeKind.CANCELLED
    eventually(lambda: time.monotonic() - began > LEASE_S)
    seen = requests(exchange, order.algo_id)
    wake(paused)
    watch(exchange, order.algo_id, seen)
    assert records(connection, ticket) == [name_of(peer)]


def test_a_worker_that_was_cut_off_from_redis_sends_nothing_more(
    workers: Workers, client: CancelClient, connection: redis.Redis, exchange: RunningExchange
) -> None:
    """A worker whose leases cannot be renewed stops sending by its own clock, before it hears that they are gone."""
    assert FAST["LEASE_S"] == "1"
