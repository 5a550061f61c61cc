"""Keys of another type where an order's open job is noted: they cost nobody a cancel, now or later."""

from __future__ import annotations

import pytest
import redis
from rq import Queue
from rq.job import Job
from rq.registry import FailedJobRegistry, FinishedJobRegistry
from rq.serializers import JSONSerializer

from producer import CancelClient, CancelRequest, OutcomeKind, Ticket
from tests.holders import SPOILED
from tests.servers import Peek, Workers, eventually
from worker.sandbox.control import RunningExchange

#: Every type of key that is no text.
TYPES = sorted(SPOILED.keys() - {"string"})


@pytest.fixture
def queue(connection: redis.Redis) -> Queue:
    """The queue as RQ's users open it."""
    return Queue("cancels", connection=connection, serializer=JSONSerializer)


def pointer(request: CancelRequest) -> str:
    """Where the open job of an order is noted."""
    return f"cancels:order:{request.order_key}"


def ask(client: CancelClient, algo_ids: list[int]) -> list[Ticket]:
    """Enqueue cancels in one call."""
    return client.cancel_many([CancelRequest(algo_id=algo_id) for algo_id in algo_ids])


def refused(client: CancelClient, workers: Workers) -> Ticket:
    """A request that has failed, as no worker has its account."""
    ticket = client.cancel(algo_id=50, account="nobody")
    worker = workers.start()
    assert ticket.wait(30).kind is OutcomeKind.REFUSED
    worker.stop()
    return ticket


def test_spoiled_pointers_cost_no_cancel(
    workers: Workers, client: CancelClient, exchange: RunningExchange, connection: redis.Redis
) -> None:
    """Of orders in one call all are cancelled, whatever key stands where they are noted, and so are later calls."""
    ids = [order.algo_id for order in exchange.add_orders(len(TYPES) + 1)]
    for kind, algo_id in zip(TYPES, ids, strict=False):
        SPOILED[kind](connection, pointer(CancelRequest(algo_id=algo_id)))

    tickets = ask(client, ids)

    assert not any(ticket.duplicate for ticket in tickets)
    workers.start()
    assert {ticket.wait(30).kind for ticket in tickets} == {OutcomeKind.CANCELLED}
    again = ask(client, ids)
    assert not {ticket.id for ticket in again} & {ticket.id for ticket in tickets}
    assert {ticket.wait(30).kind for ticket in again} == {OutcomeKind.ALREADY_CANCELLED}
    assert {entry.deletes_effective for entry in exchange.book().values()} == {1}


def test_pointers_spoiled_meanwhile_cost_no_outcome(
    workers: Workers, client: CancelClient, exchange: RunningExchange, connection: redis.Redis, queue: Queue
) -> None:
    """A request whose pointer was replaced ends as any other does, for RQ too, and the next one is served."""
    ids = [order.algo_id for order in exchange.add_orders(len(TYPES))]
    tickets = ask(client, ids)
    for kind, ticket in zip(TYPES, tickets, strict=True):
        connection.delete(pointer(ticket.request))
        SPOILED[kind](connection, pointer(ticket.request))
    worker = workers.start()

    assert {ticket.wait(30).kind for ticket in tickets} == {OutcomeKind.CANCELLED}

    for ticket in tickets:
        job = Job.fetch(ticket.id, connection=connection, serializer=JSONSerializer)
        assert (job.get_status(), job.return_value()) == ("finished", "cancelled")
        assert 0 < connection.ttl(job.key) <= 600
    assert set(FinishedJobRegistry(queue=queue).get_job_ids()) == {ticket.id for ticket in tickets}
    assert {ticket.wait(30).kind for ticket in ask(client, ids)} == {OutcomeKind.ALREADY_CANCELLED}
    assert "damaged" not in worker.output()


def test_a_retry_takes_the_place_of_a_spoiled_pointer(
    workers: Workers, client: CancelClient, connection: redis.Redis
) -> None:
    """A retried request is joined by the next one for its order, whatever key stood where it is noted."""
    ticket = refused(client, workers)
    connection.delete(pointer(ticket.request))
    SPOILED["set"](connection, pointer(ticket.request))

    assert client.retry([ticket.id]) == [ticket.id]

    joined = client.cancel(algo_id=50, account="nobody")
    assert (joined.id, joined.duplicate) == (ticket.id, True)


def test_a_requeued_job_takes_it_too(
    workers: Workers, client: CancelClient, connection: redis.Redis, queue: Queue, peek: Peek
) -> None:
    """The same holds for a run that RQ's requeue began."""
    ticket = refused(client, workers)
    connection.delete(pointer(ticket.request))
    SPOILED["list"](connection, pointer(ticket.request))

    FailedJobRegistry(queue=queue).requeue(ticket.id)
    workers.start()

    eventually(lambda: [outcome.run for outcome in peek.ledger()] == [1, 2], what="the second run has its outcome")
    assert peek("GET", pointer(ticket.request)) == ticket.id
