"""Worker processes and time: retries, clocks that jump, pauses of the whole address, deadlines."""

from __future__ import annotations

import itertools

from producer import CancelClient, OutcomeKind
from tests.orders import cancel_all, events, once_each, opened, outcomes, steps
from tests.servers import Peek, Workers, eventually
from worker.sandbox.control import RunningExchange
from worker.sandbox.faults import Fault


def test_retries_start_on_time(workers: Workers, client: CancelClient, exchange: RunningExchange) -> None:
    """Each retry starts when its delay is over, without a scheduler, though nothing else arrives on the queue."""
    worker = workers.start(BACKOFF_BASE_MS="100", BACKOFF_CAP_MS="400")
    ids = opened(exchange, 10)
    for algo_id in ids:
        exchange.script_faults(algo_id, [Fault.UNAVAILABLE_503] * 4)

    found = outcomes(client, cancel_all(client, ids))

    delays = {(event["id"], int(event["attempts"])): int(event["delay_ms"]) for event in events(worker, "again")}
    assert len(delays) > 20
    for outcome in found:
        assert steps(outcome) == [*["busy"] * 4, "confirmed"]
        for before, after in itertools.pairwise(outcome.attempts):
            delay_ms = delays.get((outcome.id, before.n), 0)  # one of less than a millisecond is no wait
            late_ms = after.at_ms - (before.at_ms + before.ms + delay_ms)
            assert -5 <= late_ms < 500, (late_ms, outcome)


def test_retry_that_falls_due_while_all_slots_are_taken(
    workers: Workers, client: CancelClient, exchange: RunningExchange
) -> None:
    """With one slot a retry that falls due during another request starts right after that one's answer."""
    workers.start("--concurrency", "1", BACKOFF_BASE_MS="300", BACKOFF_CAP_MS="300", BINANCE_RECV_WINDOW_MS="5000")
    exchange.set_latency_ms(500)
    for _ in range(5):  # a delay drawn close to nothing falls due before the slot is taken again
        one, two = opened(exchange, 2)
        exchange.script_faults(one, [Fault.UNAVAILABLE_503])
        first, second = outcomes(client, cancel_all(client, [one, two]))
        (only,) = second.attempts
        busy, retry = first.attempts
        if only.at_ms < retry.at_ms:
            break

    assert busy.at_ms < only.at_ms < retry.at_ms
    assert retry.at_ms - (only.at_ms + only.ms) < 400


def test_rate_limit_stops_every_worker(
    workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek
) -> None:
    """After a 429 no worker sends anything until Retry-After is over, one that starts meanwhile included."""
    fleet = [workers.start(CANCEL_MAX_ATTEMPTS="2", WORKER_CONCURRENCY="8") for _ in range(2)]
    exchange.set_latency_ms(20)
    ids = opened(exchange, 600)
    tickets = cancel_all(client, ids)
    eventually(lambda: len(peek.ledger()) > 50, what="both are at work")

    exchange.start_incident(Fault.LIMITED_429, duration_ms=3000)
    eventually(lambda: peek("EXISTS", peek.keys.gate("all")), 2, "the gate is closed in Redis")
    gate = dict(peek("HGETALL", peek.keys.gate("all")))
    assert int(gate["until_ms"]) > peek.now_ms() + 1000
    assert gate["reason"].startswith("429")
    late = workers.start()

    found = outcomes(client, tickets, 30)

    assert {outcome.kind for outcome in found} == {OutcomeKind.CANCELLED}
    assert once_each(peek, tickets)
    (incident,) = exchange.stats().incidents
    assert incident.requests_ms
    assert max(incident.requests_ms) < 1000
    limited = [outcome for outcome in found if "limited" in steps(outcome)]
    assert limited
    assert all(steps(outcome)[-1] == "confirmed" for outcome in limited)
    assert {worker.process.poll() for worker in [*fleet, late]} == {None}


def test_ban_outlives_the_workers(
    workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek
) -> None:
    """A gate that was closed before a restart holds for the new worker, and overdue requests end while it is closed."""
    exchange.start_incident(Fault.BANNED_418, duration_ms=4500)
    peek("HSET", peek.keys.gate("all"), "until_ms", peek.now_ms() + 4500)
    algo_id, *overdue_ids = opened(exchange, 51)
    ticket = client.cancel(algo_id=algo_id)
    overdue = cancel_all(client, overdue_ids, deadline_s=0.1)
    workers.start()

    assert {outcome.kind for outcome in outcomes(client, overdue, 4)} == {OutcomeKind.OVERDUE}
    assert peek.now_ms() < int(peek("HGET", peek.keys.gate("all"), "until_ms"))
    assert ticket.wait(10).kind is OutcomeKind.CANCELLED
    assert exchange.stats().requests_during_incidents == 0
