"""Requests by client id alone: it may mean another order by the next call, so no call joins an earlier one's job."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import redis
from rq import Queue
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer

from producer import CancelClient, CancelRequest, OutcomeKind, QueueUnavailable
from producer.keys import JobField
from tests.engines import Parts, RunningEngine
from tests.orders import PROVEN_S
from tests.servers import Peek, Valkey, Workers, eventually, stopped
from worker.exchange import Answer
from worker.sandbox.control import PlacedOrder, RunningExchange
from worker.sandbox.faults import Fault

X = "stop-1"
#: Where an order's open job is noted, by a client id as former versions did.
POINTER = f"cancels:order:default:c:{X}"


def pointers(peek: Peek) -> list[str]:
    """Orders whose open job is noted."""
    return list(peek("KEYS", "cancels:order:*"))


def opened(exchange: RunningExchange) -> PlacedOrder:
    """Open an order under the client id, long enough before any request that it is proven to be meant by it."""
    (order,) = exchange.add_orders(client_algo_ids=[X])
    time.sleep(PROVEN_S)
    return order


def as_formerly(peek: Peek, job_id: str) -> None:
    """Make of a request by client id what a client of a former version would have made of it."""
    peek("HSET", peek.keys.job_prefix + job_id, JobField.ORDER, f"default:c:{X}")
    peek("SET", POINTER, job_id)


# ---- whose outcome it is --------------------------------------------------------------------------------------------


def test_a_reopened_order_is_not_told_the_end_of_the_one_before(
    workers: Workers, client: CancelClient, exchange: RunningExchange
) -> None:
    """A is cancelled and its answer late; B is opened under A's client id and no longer wanted: B is cancelled too."""
    workers.start()
    a = opened(exchange)
    exchange.set_latency_ms(1500)
    first = client.cancel(client_algo_id=X)
    eventually(lambda: exchange.book()[a.algo_id].status == "CANCELED", what="the exchange has cancelled A")
    b = opened(exchange)
    second = client.cancel(client_algo_id=X)

    outcomes = [first.wait(10), second.wait(10)]

    assert (second.id != first.id, second.duplicate) == (True, False)
    assert [(outcome.kind, outcome.client_algo_id) for outcome in outcomes] == [(OutcomeKind.CANCELLED, X)] * 2
    book = exchange.book()
    assert [(book[order.algo_id].status, book[order.algo_id].deletes) for order in (a, b)] == [("CANCELED", 1)] * 2


def test_rqs_simple_worker_looks_before_it_cancels(
    workers: Workers, client: CancelClient, exchange: RunningExchange
) -> None:
    """However soon it has the job in hand: its connection may take long to open, and the id change hands meanwhile."""
    workers.start_stock("-w", "rq.SimpleWorker")
    opened(exchange)
    first = client.cancel(client_algo_id=X).wait(10)
    opened(exchange)

    outcomes = [first, client.cancel(client_algo_id=X).wait(10)]

    assert [[(attempt.call, attempt.verdict) for attempt in outcome.attempts] for outcome in outcomes] == [
        [("query", "open"), ("cancel", "confirmed")]
    ] * 2


def test_a_second_request_for_one_order_learns_that_it_is_gone(
    workers: Workers, client: CancelClient, exchange: RunningExchange
) -> None:
    """Where the client id means the same order still, its second request ends as already cancelled."""
    order = opened(exchange)
    tickets = [client.cancel(client_algo_id=X) for _ in range(2)]
    workers.start(WORKER_CONCURRENCY="1")

    kinds = [ticket.wait(10).kind for ticket in tickets]

    assert kinds == [OutcomeKind.CANCELLED, OutcomeKind.ALREADY_CANCELLED]
    assert exchange.book()[order.algo_id].deletes_effective == 1


def test_one_call_makes_one_job(workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek) -> None:
    """Inside one call requests for one client id share a ticket, an account's apart, and the later deadline holds."""
    order = opened(exchange)
    short, other = CancelRequest(None, X, deadline_s=0.001), CancelRequest(None, X, account="other")

    tickets = client.cancel_many([short, CancelRequest(order.algo_id), other, CancelRequest(None, X, deadline_s=60)])

    assert [ticket.duplicate for ticket in tickets] == [False, False, False, True]
    assert tickets[3].id == tickets[0].id
    assert len({ticket.id for ticket in tickets}) == len(peek.waiting()) == 3
    time.sleep(0.01)
    workers.start(WORKER_CONCURRENCY="1")
    assert tickets[0].wait(10).kind is OutcomeKind.CANCELLED
    assert tickets[1].wait(10).kind is OutcomeKind.ALREADY_CANCELLED


def test_a_clock_that_is_being_measured_is_waited_for(
    workers: Workers, client: CancelClient, exchange: RunningExchange
) -> None:
    """An order is found by its client id while the worker measures the exchange's clock anew: it is not left alone."""
    workers.start()
    sought, refused = exchange.add_orders(8), exchange.add_orders(1)
    for order in sought:
        exchange.script_faults(order.algo_id, [Fault.INTERNAL_503])  # then the worker looks for it
    exchange.script_faults(refused[0].algo_id, [Fault.AHEAD_1021])  # then it measures
    time.sleep(1)
    exchange.set_latency_ms(400)

    tickets = client.cancel_many(CancelRequest(None, order.client_algo_id) for order in sought)
    time.sleep(0.3)  # refused while the others' questions are out
    tickets.append(client.cancel(algo_id=refused[0].algo_id))

    assert {ticket.wait(20).kind for ticket in tickets} == {OutcomeKind.CANCELLED}


@pytest.mark.parametrize("skew_ms", [-5000, 5000])
def test_the_exchanges_clock_may_be_any(
    skew_ms: int, workers: Workers, client: CancelClient, exchange: RunningExchange
) -> None:
    """Whatever the exchange's clock shows, an order from before the request is cancelled, and none from after it."""
    exchange.set_clock_skew_ms(skew_ms)
    meant = opened(exchange)
    ticket = client.cancel(client_algo_id=X)
    time.sleep(0.15)  # from now on it is looked for
    workers.start()
    assert ticket.wait(10).kind is OutcomeKind.CANCELLED
    workers.stop()

    ticket = client.cancel(client_algo_id=X)
    time.sleep(0.15)
    newer = opened(exchange)
    workers.start()

    assert ticket.wait(10).kind is OutcomeKind.UNKNOWN
    book = exchange.book()
    assert [(book[order.algo_id].status, book[order.algo_id].deletes) for order in (meant, newer)] == [
        ("CANCELED", 1),
        ("NEW", 0),
    ]


def test_a_call_that_had_to_wait_is_decided_anew(
    client: CancelClient, exchange: RunningExchange, valkey: Valkey
) -> None:
    """A cancel by client id that waits for a connection until it is old looks first whom the id means by then."""
    older = opened(exchange)
    newer: list[PlacedOrder] = []

    def change(parts: Parts) -> None:
        call = parts.exchange.call

        async def waits(*given: Any) -> Answer | None:
            if not newer:
                exchange.cancel(older.algo_id)
                newer.append(opened(exchange))
                await asyncio.sleep(0.15)
            return await call(*given)

        vars(parts.exchange)["call"] = waits

    with RunningEngine(valkey.url, exchange.url, 4, change=change):
        time.sleep(0.2)
        outcome = client.cancel(client_algo_id=X).wait(10)

    entry = exchange.book()[newer[0].algo_id]
    assert (outcome.kind, entry.status, entry.deletes) == (OutcomeKind.UNKNOWN, "NEW", 0)


# ---- nothing points to them -----------------------------------------------------------------------------------------


def test_nothing_points_to_such_a_job(workers: Workers, client: CancelClient, peek: Peek) -> None:
    """Neither a request by client id alone, nor its retry, nor RQ's requeue notes its job for others to join."""
    ticket = client.cancel(client_algo_id=X, account="nobody")
    assert pointers(peek) == []
    worker = workers.start()
    assert ticket.wait(10).kind is OutcomeKind.REFUSED
    worker.stop()

    assert client.retry([ticket.id]) == [ticket.id]

    assert pointers(peek) == []
    again = client.cancel(client_algo_id=X, account="nobody")
    assert (again.id != ticket.id, again.duplicate) == (True, False)


# ---- jobs of former versions, which are noted -----------------------------------------------------------------------


def test_a_former_job_is_not_joined_and_takes_its_pointer_along(
    workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek
) -> None:
    """An open job of a former version is not joined by its client id, and its end removes its pointer."""
    opened(exchange)
    former = client.cancel(client_algo_id=X)
    as_formerly(peek, former.id)

    ticket = client.cancel(client_algo_id=X)

    assert (ticket.id != former.id, ticket.duplicate) == (True, False)
    assert peek("GET", POINTER) == former.id
    workers.start(WORKER_CONCURRENCY="1")
    assert [former.wait(10).kind, ticket.wait(10).kind] == [OutcomeKind.CANCELLED, OutcomeKind.ALREADY_CANCELLED]
    assert pointers(peek) == []


@pytest.mark.parametrize("by", ["retry", "requeue"])
def test_a_new_run_of_a_former_job_is_not_noted_any_more(
    by: str, workers: Workers, client: CancelClient, exchange: RunningExchange, connection: redis.Redis, peek: Peek
) -> None:
    """Neither a retry nor RQ's requeue of a job of a former version makes it joinable by its client id again."""
    order = opened(exchange)
    ticket = client.cancel(client_algo_id=X, deadline_s=0.001)
    as_formerly(peek, ticket.id)
    time.sleep(0.01)
    workers.start()
    assert ticket.wait(10).kind is OutcomeKind.OVERDUE
    exchange.set_latency_ms(1500)

    if by == "retry":
        client.retry([ticket.id])
    else:
        queue = Queue("cancels", connection=connection, serializer=JSONSerializer)
        FailedJobRegistry(queue=queue).requeue(ticket.id)
    eventually(lambda: exchange.book()[order.algo_id].deletes == 1, what="the new run is under way")

    assert pointers(peek) == []


# ---- repeats --------------------------------------------------------------------------------------------------------


def test_a_callers_repeat_does_no_harm(
    valkey: Valkey, workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek
) -> None:
    """A call that failed although it was carried out is made again: a second job, which finds the order gone."""
    order = opened(exchange)
    with CancelClient.from_url(valkey.url, timeout_s=0.3) as mine:
        mine.cancel(algo_id=1)  # connected, and the script is known
        with stopped(valkey), pytest.raises(QueueUnavailable):
            mine.cancel(client_algo_id=X)
        eventually(lambda: len(peek.waiting()) == 2, what="it was carried out")
        lost = peek.waiting()[1]

        ticket = mine.cancel(client_algo_id=X)

    assert (ticket.id != lost, ticket.duplicate) == (True, False)
    workers.start(WORKER_CONCURRENCY="1", NOT_FOUND_HORIZON_S="0")
    assert client.wait(lost, 10).kind is OutcomeKind.CANCELLED
    assert client.wait(ticket, 10).kind is OutcomeKind.ALREADY_CANCELLED
    assert exchange.book()[order.algo_id].deletes_effective == 1
