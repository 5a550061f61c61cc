"""A stock `rq worker --with-scheduler` on the same queue: the same outcomes as with ours, only slower."""

from __future__ import annotations

from collections import Counter

import redis
from rq import Queue
from rq.job import Job
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer

from producer import CancelClient, CancelRequest, OutcomeKind
from producer.message import TASK
from tests.conftest import API_KEY, API_SECRET
from tests.orders import steps
from tests.servers import Peek, Workers, eventually
from worker.sandbox.control import RunningExchange
from worker.sandbox.faults import Fault
from worker.signing import Credential


def status(job_id: str, connection: redis.Redis) -> str:
    """RQ's word for the job."""
    return Job.fetch(job_id, connection=connection, serializer=JSONSerializer).get_status().value


#: Name, faults of the cancel, and then what both workers must make of it.
ROWS: list[tuple[str, list[Fault | None], OutcomeKind, list[str]]] = [
    ("clean", [], OutcomeKind.CANCELLED, ["confirmed"]),
    ("cancelled before", [Fault.CANCELLED_BEFORE], OutcomeKind.ALREADY_CANCELLED, ["no_such_order", "canceled"]),
    ("triggered", [Fault.TRIGGERED_BEFORE], OutcomeKind.TRIGGERED, ["no_such_order", "triggered"]),
    ("no answer", [Fault.DROP_AFTER], OutcomeKind.CANCELLED, ["unclear", "canceled"]),
    ("overload", [Fault.UNAVAILABLE_503], OutcomeKind.CANCELLED, ["busy", "confirmed"]),
    ("disabled", [Fault.DISABLED_2011], OutcomeKind.REFUSED, ["denied"]),
]
FOREIGN = {"v": 99, "what": "nothing of ours"}


def test_same_outcomes_as_ours(
    workers: Workers,
    client: CancelClient,
    exchange: RunningExchange,
    connection: redis.Redis,
    peek: Peek,
) -> None:
    """Success, race, doubt, retry, refusal and foreign payload come to the same outcome with either kind of worker."""
    foreign = Queue("cancels", connection=connection, serializer=JSONSerializer)
    seen: dict[str, list[tuple[object, ...]]] = {}
    for worker in ("ours", "stock"):
        ids = [order.algo_id for order in exchange.add_orders(len(ROWS))]
        for algo_id, (_, faults, _, _) in zip(ids, ROWS, strict=True):
            if faults:
                exchange.script_faults(algo_id, faults)
        tickets = client.cancel_many([CancelRequest(algo_id=algo_id, tag="t") for algo_id in ids])
        stranger = foreign.enqueue(TASK, FOREIGN)
        process = workers.start() if worker == "ours" else workers.start_stock("--with-scheduler")
        found = {job_id: client.wait(job_id, 40) for job_id in (*(ticket.id for ticket in tickets), stranger.id)}
        eventually(lambda: peek("ZCARD", peek.keys.started) == 0, what="RQ has finished too")
        process.stop()
        seen[worker] = [
            (o.kind, steps(o), o.may_be_live, o.order_status, o.account, o.tag, o.error, o.run)
            for o in (found[ticket.id] for ticket in tickets)
        ]
        refused = found[stranger.id]
        seen[worker].append((refused.kind, refused.attempts, refused.may_be_live, refused.error))
        statuses = [status(job_id, connection) for job_id in found]
        assert Counter(statuses) == {"finished": 5, "failed": 2}, worker

    assert [row[:2] for row in seen["ours"][:-1]] == [(kind, verdicts) for _, _, kind, verdicts in ROWS]
    assert seen["stock"] == seen["ours"]
    assert Counter(Counter(outcome.id for outcome in peek.ledger()).values()) == {1: 14}
    assert len(FailedJobRegistry("cancels", connection=connection, serializer=JSONSerializer)) == 4


def test_closed_gate_is_respected(
    workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek
) -> None:
    """A stock worker sends nothing while the gate is closed, not even for the time, and counts no attempt for it. A 429
    that it meets closes the gate for every worker."""
    peek("HSET", peek.keys.gate("all"), "until_ms", peek.now_ms() + 4000)
    exchange.start_incident(Fault.LIMITED_429, duration_ms=3900)
    one, two = (order.algo_id for order in exchange.add_orders(2))
    ticket, overdue = client.cancel(algo_id=one), client.cancel(algo_id=two, deadline_s=1)
    workers.start_stock("--with-scheduler")

    assert overdue.wait(30).kind is OutcomeKind.OVERDUE
    outcome = ticket.wait(30)
    assert (outcome.kind, steps(outcome)) == (OutcomeKind.CANCELLED, ["confirmed"])
    assert exchange.stats().requests_during_incidents == 0

    exchange.start_incident(Fault.LIMITED_429, duration_ms=2500)
    ticket = client.cancel(algo_id=exchange.add_orders(1)[0].algo_id)
    eventually(lambda: int(peek("HGET", peek.keys.gate("all"), "until_ms")) > peek.now_ms(), what="it is closed again")
    assert ticket.wait(30).kind is OutcomeKind.CANCELLED


def test_refused_key_is_left_in_peace(
    workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek
) -> None:
    """Each job of a stock worker is a new process: what it is told of a refused key keeps the next ones waiting."""
    print_ = Credential.from_secret("default", API_KEY, API_SECRET).fingerprint
    *ids, young = (order.algo_id for order in exchange.add_orders(8))
    for algo_id in ids[:5]:
        exchange.script_faults(algo_id, [Fault.KEY_2015])
    stock = workers.start_stock("--with-scheduler")
    for algo_id in ids[:5]:
        assert client.cancel(algo_id=algo_id).wait(40).kind is OutcomeKind.REFUSED
    held = [client.cancel(algo_id=algo_id) for algo_id in ids[5:]]
    eventually(lambda: peek("SCARD", peek.keys.held(print_)) == 2, 40, "they wait")
    assert sum(exchange.book()[algo_id].deletes for algo_id in ids[5:]) == 0

    stock.stop()
    workers.start()
    assert client.cancel(algo_id=young).wait(30).kind is OutcomeKind.CANCELLED
    assert [ticket.wait(30).kind for ticket in held] == [OutcomeKind.CANCELLED] * 2
    assert client.status().keys == ()


def test_gate_closed_meanwhile_is_respected(
    workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek
) -> None:
    """A stock worker that waits for an answer hears that the gate was closed meanwhile: its next question waits."""
    workers.start_stock("--with-scheduler")
    exchange.set_latency_ms(1500)
    order = exchange.add_orders(1)[0]
    exchange.script_faults(order.algo_id, [Fault.UNKNOWN_503])
    ticket = client.cancel(algo_id=order.algo_id)
    eventually(lambda: exchange.book()[order.algo_id].deletes == 1, what="the request is under way")
    opens_ms = peek.now_ms() + 4000
    peek("HSET", peek.keys.gate("all"), "until_ms", opens_ms)

    outcome = ticket.wait(30)

    assert steps(outcome) == ["unclear", "open", "confirmed"]
    assert min(each.at_ns / 1e6 for each in exchange.arrivals() if each.method == "GET") >= opens_ms
