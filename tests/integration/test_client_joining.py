"""Which requests share a job, and what the shared job is worth to each of them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from rq import Queue
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from producer import CancelClient, CancelRequest, OutcomeKind
from producer.keys import JobField, Keys
from tests.servers import Workers
from tests.strategies import field, now_ms
from worker.sandbox.control import RunningExchange

KEYS = Keys()


def test_the_later_deadline_holds(client: CancelClient, connection: redis.Redis) -> None:
    """A joining request can prolong the deadline and never shorten it."""
    ticket = client.cancel(algo_id=17, deadline_s=10)
    short = field(connection, ticket, JobField.DEADLINE_AT_MS)
    client.cancel(algo_id=17, deadline_s=100)
    long = field(connection, ticket, JobField.DEADLINE_AT_MS)
    client.cancel(algo_id=17, deadline_s=50)

    assert short == pytest.approx(now_ms(connection) + 10_000, abs=2000)
    assert long == pytest.approx(now_ms(connection) + 100_000, abs=2000)
    assert field(connection, ticket, JobField.DEADLINE_AT_MS) == long


def test_a_joining_request_prolongs_a_deadline_that_would_have_passed(client: CancelClient, workers: Workers) -> None:
    """The worker pursues the request for as long as the one that waits longest wants, its own default included."""
    tickets = [client.cancel(algo_id=17, deadline_s=0.001), client.cancel(algo_id=18, deadline_s=0.001)]
    client.cancel(algo_id=17)
    workers.start(NOT_FOUND_HORIZON_S="0")

    assert [ticket.wait(10).kind for ticket in tickets] == [OutcomeKind.NOT_FOUND, OutcomeKind.OVERDUE]


def test_urgent_goes_first_and_is_applied_to_the_open_job(
    client: CancelClient, workers: Workers, exchange: RunningExchange
) -> None:
    """An urgent request, and one that an urgent request joins, are sent before what waited already."""
    first, joined, last, urgent = (order.algo_id for order in exchange.add_orders(4))
    tickets = client.cancel_many(CancelRequest(algo_id=algo_id) for algo_id in (first, joined, last))
    assert client.cancel(algo_id=joined, urgent=True).id == tickets[1].id
    tickets.append(client.cancel(algo_id=urgent, urgent=True))

    workers.start(WORKER_CONCURRENCY="1")

    assert [ticket.wait(10).kind for ticket in tickets] == [OutcomeKind.CANCELLED] * 4
    sent = [each.algo_id for each in exchange.arrivals() if each.method == "DELETE"]
    assert sent == [urgent, joined, first, last]


def test_they_share_it_whatever_finishes_meanwhile(
    client: CancelClient, workers: Workers, exchange: RunningExchange
) -> None:
    """However fast workers are, and although one call is several round trips, one order gets one job and one DELETE."""
    orders = [order.algo_id for order in exchange.add_orders(200)]
    workers.start()

    tickets = client.cancel_many(CancelRequest(algo_id=algo_id) for algo_id in orders * 6)

    assert len({ticket.id for ticket in tickets}) == len(orders)
    assert [tickets[i].id for i in range(200)] == [tickets[i].id for i in range(200, 400)]
    assert {ticket.wait(20).kind for ticket in tickets[:200]} == {OutcomeKind.CANCELLED}
    assert {entry.deletes for entry in exchange.book().values()} == {1}


def _deleted(connection: redis.Redis, job: Job) -> None:
    job.delete()


def _emptied(connection: redis.Redis, job: Job) -> None:
    assert Queue(KEYS.queue, connection=connection, serializer=JSONSerializer).empty() == 1  # what `rq empty` calls


def _cancelled(connection: redis.Redis, job: Job) -> None:
    job.cancel()


def _stopped(connection: redis.Redis, job: Job) -> None:
    job.set_status(JobStatus.STOPPED)
    connection.lrem(KEYS.waiting, 0, job.id)


@pytest.mark.parametrize("remove", [_deleted, _emptied, _cancelled, _stopped])
def test_a_job_that_a_person_removed_is_not_joined(
    client: CancelClient, connection: redis.Redis, remove: Callable[[redis.Redis, Job], None]
) -> None:
    """After Job.delete, rq empty, Job.cancel or a stop the next request for the order starts a job of its own, which
    the one after it joins."""
    first = client.cancel(algo_id=17)
    remove(connection, client.job(first))

    second = client.cancel(algo_id=17)

    assert second.id != first.id
    assert not second.duplicate
    assert client.cancel(algo_id=17).id == second.id
    assert connection.lrange(KEYS.waiting, 0, -1) == [second.id.encode()]


def test_threads_that_ask_at_once_share_one_job(client: CancelClient, connection: redis.Redis) -> None:
    """One client serves many threads, and of requests for one order exactly one makes the job."""
    with ThreadPoolExecutor(8) as pool:
        tickets = list(pool.map(lambda _: client.cancel(algo_id=17), range(64)))

    assert len({ticket.id for ticket in tickets}) == 1
    assert sum(not ticket.duplicate for ticket in tickets) == 1
    assert connection.llen(KEYS.waiting) == 1
