"""Requests that a person took back through RQ: they get an outcome, and nothing more is sent for them."""

from __future__ import annotations

import pytest
import redis
from rq.command import send_stop_job_command
from rq.serializers import JSONSerializer

from producer import CancelClient, OutcomeKind, Ticket
from tests.servers import Peek, Workers, eventually
from worker.sandbox.control import RunningExchange
from worker.sandbox.faults import Fault


def is_status(client: CancelClient, ticket: Ticket, status: str) -> None:
    """Wait until RQ says so."""
    eventually(lambda: client.statuses([ticket.id]) == [status], what=status)


def test_canceled_before_anything_was_sent(workers: Workers, client: CancelClient, exchange: RunningExchange) -> None:
    """`Job.cancel` of a waiting request ends it as given up: its order was not touched, and waiters learn it."""
    (order,) = exchange.add_orders(1)
    ticket = client.cancel(algo_id=order.algo_id, tag="t")
    client.job(ticket).cancel()
    worker = workers.start()

    outcome = ticket.wait(30)

    assert (outcome.kind, outcome.attempts, outcome.may_be_live, outcome.tag) == (OutcomeKind.GAVE_UP, (), True, "t")
    assert outcome.error == "the job was canceled through RQ"
    assert exchange.book()[order.algo_id].deletes == 0
    eventually(lambda: f"event=recalled id={ticket.id} status=canceled" in worker.output(), what="the log tells")
    assert [ended for _, ended in client.outcomes()] == [outcome]
    assert client.failed_ids() == [ticket.id]
    assert not client.cancel(algo_id=order.algo_id).duplicate


@pytest.mark.parametrize(("fault", "kind"), [(Fault.UNAVAILABLE_503, "gave_up"), (Fault.DROP_BEFORE, "unknown")])
def test_canceled_between_two_attempts(
    fault: Fault, kind: str, workers: Workers, client: CancelClient, exchange: RunningExchange
) -> None:
    """While it waits for its next try: given up where nothing can have worked, unknown where an attempt may have."""
    workers.start(BACKOFF_BASE_MS="3000", BACKOFF_CAP_MS="3000")
    (order,) = exchange.add_orders(1)
    exchange.script_faults(order.algo_id, [fault], repeat_last=True)
    ticket = client.cancel(algo_id=order.algo_id)
    is_status(client, ticket, "scheduled")

    client.job(ticket).cancel()
    outcome = ticket.wait(30)

    assert (outcome.kind, outcome.may_be_live) == (kind, True)
    assert len(outcome.attempts) >= 1
    assert outcome.error == "the job was canceled through RQ"
    sent = sum(attempt.call == "cancel" for attempt in outcome.attempts)
    assert (exchange.book()[order.algo_id].status, exchange.book()[order.algo_id].deletes) == ("NEW", sent)


def test_canceled_while_its_request_is_under_way(
    workers: Workers, client: CancelClient, exchange: RunningExchange
) -> None:
    """What is under way cannot be taken back: the answer of the exchange is the outcome."""
    workers.start()
    exchange.set_latency_ms(700)
    (order,) = exchange.add_orders(1)
    ticket = client.cancel(algo_id=order.algo_id)
    eventually(lambda: exchange.book()[order.algo_id].deletes == 1, what="it is under way")

    client.job(ticket).cancel()

    assert ticket.wait(30).kind is OutcomeKind.CANCELLED
    assert client.statuses([ticket.id]) == ["finished"]


def test_stopped_in_a_stock_worker(
    workers: Workers,
    client: CancelClient,
    exchange: RunningExchange,
    connection: redis.Redis,
    peek: Peek,
) -> None:
    """RQ's stop command kills a stock worker's process in the middle of a request: the next worker of ours records
    that nobody knows whether it worked, and sends nothing more."""
    stock = workers.start_stock(LEASE_S="2")
    (order,) = exchange.add_orders(1)
    exchange.set_latency_ms(10_000)
    ticket = client.cancel(algo_id=order.algo_id)
    eventually(lambda: exchange.book()[order.algo_id].deletes == 1, what="it is under way")

    send_stop_job_command(connection, ticket.id, serializer=JSONSerializer)
    is_status(client, ticket, "stopped")
    stock.stop()
    exchange.set_latency_ms(0)
    workers.start(LEASE_S="2")
    outcome = ticket.wait(30)

    assert (outcome.kind, outcome.error) == (OutcomeKind.UNKNOWN, "the job was stopped through RQ")
    assert [attempt.msg for attempt in outcome.attempts] == ["worker lost"]
    assert exchange.book()[order.algo_id].deletes == 1
    assert len(peek.ledger()) == 1
