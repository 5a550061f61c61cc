"""RQ's own workers beside ours on one queue: forked horses, SimpleWorker, several queues, with and without a scheduler;
their kills, their warm shutdowns, and what they pop that is not theirs to work on."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections import Counter
from typing import Any

import pytest

from producer import CancelClient, CancelRequest, OutcomeKind, Ticket
from producer.keys import FAILURE_TTL_S, RESULT_TTL_S
from producer.message import WORKER_LOST
from tests.orders import steps, under_way
from tests.servers import Peek, Worker, Workers, eventually, members
from worker.sandbox.control import RunningExchange
from worker.sandbox.faults import Fault

LEASE_S = 2.0
#: How long it takes at most until a look of a worker of ours puts right what RQ has overwritten, s.
TIDIED_S = 15.0
#: The ways in which people start RQ's own workers.
FORKED: tuple[str, ...] = ()
SCHEDULING = ("--with-scheduler",)
SIMPLE = ("-w", "rq.SimpleWorker")
SEVERAL = ("others",)


class Fleet:
    """Starts our workers and RQ's own; ``backoff_ms`` is the bound of each delay."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        workers.environment |= {"LEASE_S": "2", "CANCEL_DEADLINE_S": "60", "NOT_FOUND_HORIZON_S": "2"}
        self.environment = workers.environment

    def ours(self, *, concurrency: int = 64, backoff_ms: int = 100) -> Worker:
        """Start a worker of ours."""
        return self._workers.start(WORKER_CONCURRENCY=str(concurrency), **self._backoff(backoff_ms))

    def stock(self, *options: str, backoff_ms: int = 100) -> Worker:
        """Start one of RQ's."""
        return self._workers.start_stock(*options, **self._backoff(backoff_ms))

    @staticmethod
    def _backoff(ms: int) -> dict[str, Any]:
        return {"BACKOFF_BASE_MS": str(ms), "BACKOFF_CAP_MS": str(ms)}


def kill_horse(worker: Worker) -> None:
    """SIGKILL to the process that has the job, and none to its parent: unlike the scheduler it leads a group."""
    leader, horses = worker.process.pid, list[int]()
    for pid in members(leader):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            horses += [pid] if os.getpgid(pid) == pid != leader else []
    (horse,) = horses
    os.kill(horse, signal.SIGKILL)


def kill_all(worker: Worker) -> None:
    """SIGKILL to a worker and all that it has forked."""
    for pid in members(worker.process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    worker.process.wait()


def dismiss(worker: Worker) -> None:
    """SIGTERM, once: it must leave in peace."""
    assert worker.stop(signal.SIGTERM, timeout_s=20) == 0, worker.output()


@pytest.fixture
def fleet(workers: Workers) -> Fleet:
    """Workers of all sorts."""
    return Fleet(workers)


def entered_twice(client: CancelClient, exchange: RunningExchange, *faults: Fault) -> Ticket:
    """A request with a second entry in the queue, as an urgent one for the same order makes it."""
    algo_id = exchange.add_orders(1)[0].algo_id
    if faults:
        exchange.script_faults(algo_id, faults)
    ticket = client.cancel(algo_id=algo_id)
    assert client.cancel(algo_id=algo_id, urgent=True).id == ticket.id
    return ticket


def deletes(exchange: RunningExchange) -> list[int]:
    """DELETEs that the exchange has received, for each order."""
    return [entry.deletes for entry in exchange.book().values()]


def is_filed(peek: Peek, job_id: str, status: str) -> bool:
    """Whether RQ's record of a job that has ended is right: its status, a life, and the one registry that has it."""
    keys, is_failed = peek.keys, status == "failed"
    life_s = FAILURE_TTL_S if is_failed else RESULT_TTL_S
    right, wrong = (keys.failed, keys.finished) if is_failed else (keys.finished, keys.failed)
    return (
        peek.job(job_id)["status"] == status
        and 0 < peek("TTL", keys.job_prefix + job_id) <= life_s
        and peek("ZSCORE", right, job_id) is not None
        and peek("ZSCORE", wrong, job_id) is None
        and peek("ZSCORE", keys.scheduled, job_id) is None
        and peek("ZSCORE", keys.unfinished, job_id) is None
    )


# ---- what a stock worker pops that is not its own --------------------------------------------------------------------


def test_job_in_our_hands_is_left_alone(
    fleet: Fleet, client: CancelClient, exchange: RunningExchange, peek: Peek
) -> None:
    """A stock worker that pops a job of ours leaves it alone: one cancel, one outcome, RQ's record is right."""
    fleet.environment["BINANCE_RECV_WINDOW_MS"] = "20000"  # a worker waits no longer for an answer than this allows
    fleet.ours(concurrency=1)
    ticket = under_way(client, exchange, 6000)
    exchange.set_latency_ms(6000)  # for its look-up, too
    peek("LPUSH", peek.keys.waiting, ticket.id)  # as an urgent request does while it waits
    fleet.stock(*FORKED)
    eventually(lambda: peek.job(ticket.id)["status"] == "scheduled", what="it was popped and put away by RQ")

    outcome = ticket.wait(30)

    assert (outcome.kind, deletes(exchange)) == (OutcomeKind.CANCELLED, [1])
    eventually(lambda: is_filed(peek, ticket.id, "finished"), TIDIED_S, "RQ's record is right")
    time.sleep(1)
    assert is_filed(peek, ticket.id, "finished")
    assert len(peek.ledger()) == 1


@pytest.mark.parametrize("options", [SCHEDULING, SIMPLE], ids=["scheduling", "simple"])
def test_backoff_is_kept(
    options: tuple[str, ...], fleet: Fleet, client: CancelClient, exchange: RunningExchange, peek: Peek
) -> None:
    """A job in backoff that a stock worker pops by a second entry is not tried before its time, and then is."""
    order, keys = exchange.add_orders(1)[0], peek.keys
    exchange.script_faults(order.algo_id, [Fault.UNAVAILABLE_503], repeat_last=True)
    ticket = client.cancel(algo_id=order.algo_id)
    ours = fleet.ours(backoff_ms=12_000)

    def waits_long() -> bool:
        return int(peek.job(ticket.id).get("c_due_at_ms", 0)) > peek.now_ms() + 2000

    eventually(waits_long, what="it waits for its next try")
    ours.stop(signal.SIGKILL)
    exchange.end_faults()
    (tries,) = deletes(exchange)
    due_ms = peek.now_ms() + 8000
    peek("HSET", keys.job_prefix + ticket.id, "c_due_at_ms", due_ms)  # the time is drawn by lot
    peek("ZADD", keys.unfinished, 2 * 10**13 + due_ms, ticket.id)
    peek("ZADD", keys.scheduled, due_ms / 1000, ticket.id)
    peek("LPUSH", keys.waiting, ticket.id)
    fleet.stock(*options)
    eventually(lambda: not peek("EXISTS", keys.waiting, keys.intermediate, keys.started), what="it was popped")

    job = peek.job(ticket.id)
    assert (job["status"], int(job["c_due_at_ms"]), deletes(exchange)) == ("scheduled", due_ms, [tries])
    assert float(peek("ZSCORE", keys.scheduled, ticket.id)) >= due_ms // 1000  # RQ knows whole seconds only
    if "--with-scheduler" not in options:
        fleet.ours()
    outcome = ticket.wait(30)
    assert (outcome.kind, steps(outcome)) == (OutcomeKind.CANCELLED, ["busy"] * tries + ["confirmed"])
    assert outcome.attempts[-1].at_ms >= due_ms


@pytest.mark.parametrize(("options", "status"), [(FORKED, "failed"), (SIMPLE, "finished")], ids=["forked", "simple"])
def test_settled_job_stays_settled(
    options: tuple[str, ...], status: str, fleet: Fleet, client: CancelClient, exchange: RunningExchange, peek: Peek
) -> None:
    """A job that has ended and is popped through a second entry keeps its life, its status and its registry."""
    ticket = entered_twice(client, exchange, *([Fault.DISABLED_2011] if status == "failed" else []))
    fleet.stock(*options)

    kind = ticket.wait(30).kind

    assert kind.failed is (status == "failed")
    eventually(lambda: not peek.waiting() and peek("ZCARD", peek.keys.started) == 0, what="both entries are popped")
    assert is_filed(peek, ticket.id, status)
    assert (len(peek.ledger()), deletes(exchange)) == (1, [1])


# ---- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "whole"), [(FORKED, False), (SEVERAL, True)], ids=["horse", "all"])
def test_killed_in_a_call(
    options: tuple[str, ...], whole: bool, fleet: Fleet, client: CancelClient, exchange: RunningExchange, peek: Peek
) -> None:
    """A job of a killed horse, with or without its parent, goes on within LEASE_S + 1.5 s as perhaps sent, once."""
    stock = fleet.stock(*options)
    ticket = under_way(client, exchange)
    fleet.ours()
    (kill_all if whole else kill_horse)(stock)
    killed_ms = peek.now_ms()

    outcome = ticket.wait(30)

    assert outcome.kind is OutcomeKind.CANCELLED
    assert [attempt.msg == WORKER_LOST for attempt in outcome.attempts] == [True, False]
    assert outcome.attempts[1].at_ms - killed_ms <= (LEASE_S + 1.5) * 1000
    eventually(lambda: is_filed(peek, ticket.id, "finished"), TIDIED_S, "RQ's record is right")
    assert (len(peek.ledger()), deletes(exchange)) == (1, [1])


def test_stock_workers_alone_recover(fleet: Fleet, client: CancelClient, exchange: RunningExchange, peek: Peek) -> None:
    """Where all workers are stock ones, one with a scheduler, the job of a killed horse goes on with the next."""
    stock = fleet.stock(*SCHEDULING)
    ticket = under_way(client, exchange)
    kill_horse(stock)

    outcome = ticket.wait(30)

    assert (outcome.kind, steps(outcome)) == (OutcomeKind.CANCELLED, ["unclear", "canceled"])
    assert (len(peek.ledger()), deletes(exchange)) == (1, [1])


def test_next_job_brings_back_a_lost_one(
    fleet: Fleet, client: CancelClient, exchange: RunningExchange, peek: Peek
) -> None:
    """Where all workers are stock ones, the next job that one of them works on brings back what a killed one held."""
    doomed = fleet.stock(*FORKED)
    ticket = under_way(client, exchange)
    kill_all(doomed)
    fleet.stock(*FORKED)
    time.sleep(LEASE_S)

    other = client.cancel(algo_id=exchange.add_orders(1)[0].algo_id)

    assert other.wait(30).kind is OutcomeKind.CANCELLED
    assert steps(ticket.wait(30)) == ["unclear", "canceled"]
    assert deletes(exchange) == [1, 1]


# ---- warm shutdown ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "backoff_ms"), [(FORKED, 2900), (SCHEDULING, 60_000), (SIMPLE, 60_000)], ids=["short", "long", "simple"]
)
def test_leaves_while_a_job_is_in_backoff(
    backoff_ms: int,
    options: tuple[str, ...],
    fleet: Fleet,
    client: CancelClient,
    exchange: RunningExchange,
    peek: Peek,
) -> None:
    """Told to leave while a job waits for its next try, a stock worker does, and the job goes on with another."""
    stock = fleet.stock(*options, backoff_ms=backoff_ms)
    orders = exchange.add_orders(6)
    for order in orders:
        exchange.script_faults(order.algo_id, [Fault.UNAVAILABLE_503] * 3)
    tickets = client.cancel_many([CancelRequest(algo_id=order.algo_id) for order in orders])
    eventually(lambda: max(deletes(exchange)) > 0, what="one waits for its next try")

    dismiss(stock)

    asked = sum(deletes(exchange))
    time.sleep(1)
    assert sum(deletes(exchange)) == asked
    exchange.end_faults()
    for ticket in tickets:  # their times are drawn by lot
        if "c_due_at_ms" in peek.job(ticket.id):
            peek("HSET", peek.keys.job_prefix + ticket.id, "c_due_at_ms", peek.now_ms())
            peek("ZADD", peek.keys.unfinished, 2 * 10**13 + peek.now_ms(), ticket.id)
    fleet.ours()
    assert {ticket.wait(30).kind for ticket in tickets} == {OutcomeKind.CANCELLED}
    assert len(peek.ledger()) == len(tickets)


@pytest.mark.parametrize("options", [FORKED, SIMPLE], ids=["forked", "simple"])
def test_leaves_after_the_answer(
    options: tuple[str, ...], fleet: Fleet, client: CancelClient, exchange: RunningExchange, peek: Peek
) -> None:
    """Told to leave while a call is in flight, a stock worker takes its answer, records it, and goes."""
    stock = fleet.stock(*options)
    ticket = under_way(client, exchange, 2000)

    dismiss(stock)

    outcome = client.outcome(ticket.id)
    assert outcome is not None
    assert (outcome.kind, steps(outcome)) == (OutcomeKind.CANCELLED, ["confirmed"])
    assert is_filed(peek, ticket.id, "finished")


# ---- time ------------------------------------------------------------------------------------------------------------


def test_backoff_blocks_nobody(fleet: Fleet, client: CancelClient, exchange: RunningExchange) -> None:
    """While one order is answered 503 again and again, the same stock worker cancels the others."""
    stubborn = exchange.add_orders(1)[0]
    exchange.script_faults(stubborn.algo_id, [Fault.UNAVAILABLE_503], repeat_last=True)
    ticket = client.cancel(algo_id=stubborn.algo_id)
    fleet.stock(*SIMPLE, backoff_ms=60_000)
    eventually(lambda: exchange.book()[stubborn.algo_id].deletes == 1, what="it is being tried")

    others = client.cancel_many([CancelRequest(algo_id=order.algo_id) for order in exchange.add_orders(5)])

    assert {other.wait(30).kind for other in others} == {OutcomeKind.CANCELLED}
    assert client.outcome(ticket.id) is None


@pytest.mark.parametrize("options", [FORKED, SIMPLE], ids=["forked", "simple"])
def test_rqs_alarm_breaks_off_no_call(
    options: tuple[str, ...], fleet: Fleet, client: CancelClient, exchange: RunningExchange, peek: Peek
) -> None:
    """A call that takes longer than the time-out that RQ has for the job is not broken off in the middle."""
    exchange.set_latency_ms(2500)
    ticket = client.cancel(algo_id=exchange.add_orders(1)[0].algo_id)
    peek("HSET", peek.keys.job_prefix + ticket.id, "timeout", 1)
    fleet.stock(*options)

    outcome = ticket.wait(30)

    assert (outcome.kind, steps(outcome), deletes(exchange)) == (OutcomeKind.CANCELLED, ["confirmed"], [1])


# ---- all of them at once ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [FORKED, SIMPLE], ids=["forked", "simple"])
def test_each_outcome_is_told(
    options: tuple[str, ...], fleet: Fleet, client: CancelClient, exchange: RunningExchange
) -> None:
    """What becomes of a request stands in a stock worker's output, one whole line each, as in ours."""
    tickets = client.cancel_many([CancelRequest(algo_id=order.algo_id) for order in exchange.add_orders(4)])
    stock = fleet.stock(*options)
    for ticket in tickets:
        ticket.wait(30)
    pattern = re.compile(r"^at=\S+ level=info event=outcome id=(\S+) kind=cancelled .*$", re.MULTILINE)

    eventually(lambda: len(pattern.findall(stock.output())) >= len(tickets), what="all are told")

    time.sleep(0.5)
    assert Counter(pattern.findall(stock.output())) == Counter(ticket.id for ticket in tickets)
