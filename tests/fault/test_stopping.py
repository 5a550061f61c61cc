"""SIGTERM, SIGINT, suspension and RQ's shutdown command: nothing more is claimed, what is in flight is finished, what
was not started is back at the front at once, no attempt is counted, and the process leaves in time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future

import pytest
from rq.command import send_shutdown_command

from producer import CancelClient, CancelRequest, Ticket
from producer.message import OutcomeKind
from tests.fault.conftest import Scenes, Stage, name_of, wait_for_line
from tests.servers import ROOT, Peek, Valkey, Worker, Workers, eventually, scrubbed
from worker.sandbox.control import RunningExchange
from worker.sandbox.faults import Fault

SCENES = Scenes()
GRACE_S = 20
#: A wait at the queue that has begun must end (1 s), and RQ's thread for commands with its own look (1 s).
IDLE_EXIT_S = 3.0


class Scenery:
    """A queue, an exchange that takes its time, and workers."""

    def __init__(self, stage: Stage) -> None:
        stage.scenery = self
        self.valkey: Valkey = stage.valkey()
        self.exchange: RunningExchange = stage.exchange()
        self.client: CancelClient = stage.client(self.valkey.url)
        self.connection = stage.direct(self.valkey)
        self.peek = Peek(self.connection)
        self.fleet: Workers = stage.fleet(self.valkey.url, self.exchange)
        self._settings = dict(self.fleet.environment)

    @classmethod
    def on(cls, stage: Stage, latency_ms: float = 0.0, **settings: str) -> Scenery:
        """The row's scenery with an empty queue and book; the answers' delay and the next workers' settings are new."""
        scenery: Scenery = stage.scenery or cls(stage)
        scenery.connection.flushall()
        scenery.exchange.reset()
        scenery.exchange.set_latency_ms(latency_ms)
        scenery.fleet.environment = {**scenery._settings, "SHUTDOWN_GRACE_S": str(GRACE_S), **settings}
        return scenery

    def ask(self, count: int) -> list[Ticket]:
        """Open orders and ask for their cancels."""
        orders = self.exchange.add_orders(count)
        return self.client.cancel_many([CancelRequest(algo_id=order.algo_id) for order in orders])

    def wait_for_requests(self, count: int) -> None:
        """Wait until so many requests are in flight at the exchange."""
        eventually(lambda: self.exchange.stats().in_flight >= count, what=f"{count} requests in flight")

    def done(self) -> set[str]:
        """Ids that have an outcome."""
        return {outcome.id for outcome in self.peek.ledger()}

    def left(self, tickets: list[Ticket]) -> None:
        """Those of ``tickets`` that are not done wait in their order, and nothing says that they were ever tried."""
        done = self.done()
        rest = [ticket.id for ticket in tickets if ticket.id not in done]
        assert self.peek.waiting() == rest
        assert self.peek.held() == []
        assert all("c_attempts" not in self.peek.job(job_id) for job_id in rest)
        assert all(len(outcome.attempts) == 1 for outcome in self.peek.ledger())

    def finish(self, tickets: list[Ticket]) -> None:
        """Let a new worker do the rest; each order gets one outcome, after one attempt, by one DELETE."""
        self.exchange.set_latency_ms(0)
        worker = self.fleet.start("--burst", wait=False)
        assert worker.process.wait(20) == 0, worker.output()
        ledger = self.peek.ledger()
        assert sorted(outcome.id for outcome in ledger) == sorted(ticket.id for ticket in tickets)
        assert {(outcome.kind, len(outcome.attempts)) for outcome in ledger} == {(OutcomeKind.CANCELLED, 1)}
        assert {entry.deletes for entry in self.exchange.book().values()} == {1}


def leave(worker: Worker, within_s: float) -> float:
    """Wait for the process to end by itself with exit code 0; gives how long it took, s."""
    began = time.monotonic()
    assert worker.process.wait(within_s) == 0, worker.output()
    return time.monotonic() - began


@SCENES.add
def idle_workers_leave_soon(stage: Stage) -> None:
    """Idle, a worker leaves on SIGTERM within the second that it may be waiting at the queue, and RQ forgets it."""
    scenery = Scenery.on(stage)
    worker = scenery.fleet.start()
    worker.process.send_signal(signal.SIGTERM)
    leave(worker, IDLE_EXIT_S)
    assert scenery.peek("SCARD", "rq:workers") == 0
    assert "event=stopped" in worker.output()


@SCENES.after(idle_workers_leave_soon)
def again_and_again_until_the_end(stage: Stage) -> None:
    """SIGTERM that comes while the process is taking itself apart does not turn its exit code into a failure."""
    scenery = Scenery.on(stage)
    for worker in [scenery.fleet.start() for _ in range(2)]:
        ends_at = time.monotonic() + IDLE_EXIT_S
        while worker.process.poll() is None and time.monotonic() < ends_at:
            worker.process.send_signal(signal.SIGTERM)
            time.sleep(0.0002)
        assert worker.process.returncode == 0, worker.output()
        assert "Traceback" not in worker.output()


@SCENES.add
def under_load_nothing_is_lost_or_counted(stage: Stage) -> None:
    """With hundreds waiting, requests in flight are finished, the rest waits in its order, nothing is counted."""
    scenery = Scenery.on(stage, latency_ms=60, WORKER_CONCURRENCY="8")
    worker = scenery.fleet.start()
    tickets = scenery.ask(300)
    eventually(lambda: len(scenery.done()) > 40, what="some are done")
    worker.process.send_signal(signal.SIGTERM)
    leave(worker, IDLE_EXIT_S)
    scenery.left(tickets)
    scenery.finish(tickets)


@SCENES.add
def twice_and_to_the_whole_group(stage: Stage) -> None:
    """A second and a third SIGTERM to all processes, as platforms send them, change nothing; it awaits slow answers."""
    scenery = Scenery.on(stage, latency_ms=3000, WORKER_CONCURRENCY="4")
    worker = scenery.fleet.start()
    tickets = scenery.ask(6)
    scenery.wait_for_requests(4)
    for _ in range(3):
        os.killpg(worker.process.pid, signal.SIGTERM)
        time.sleep(0.3)
    leave(worker, GRACE_S)
    assert len(scenery.done()) == 4
    scenery.left(tickets)


@SCENES.after(twice_and_to_the_whole_group)
def sigint_is_the_same(stage: Stage) -> None:
    """A person's Ctrl-C lets requests in flight finish and leaves the rest in its order."""
    scenery = Scenery.on(stage, latency_ms=1000, WORKER_CONCURRENCY="2")
    worker = scenery.fleet.start()
    tickets = scenery.ask(4)
    scenery.wait_for_requests(2)
    worker.process.send_signal(signal.SIGINT)
    leave(worker, IDLE_EXIT_S)
    assert len(scenery.done()) == 2
    scenery.left(tickets)


@SCENES.add
def unstarted_jobs_go_back_at_once(stage: Stage) -> None:
    """A job that comes while the worker is stopping is at the front again while a slow request still holds it up."""
    scenery = Scenery.on(stage, latency_ms=2000)
    worker = scenery.fleet.start()
    tickets = scenery.ask(1)
    scenery.wait_for_requests(1)
    worker.process.send_signal(signal.SIGTERM)
    wait_for_line(worker, "event=stopping")
    tickets += scenery.ask(3)
    later = [ticket.id for ticket in tickets[1:]]
    eventually(lambda: scenery.peek.waiting() == later, 1, "they are back, in their order")
    assert worker.process.poll() is None
    leave(worker, GRACE_S)
    scenery.left(tickets)
    scenery.finish(tickets)


@SCENES.after(unstarted_jobs_go_back_at_once)
def a_retry_that_waits_is_left_to_others(stage: Stage) -> None:
    """A stopping worker does not wait for its retries: they stay scheduled, and the next worker makes them."""
    scenery = Scenery.on(stage, BACKOFF_BASE_MS="5000", BACKOFF_CAP_MS="5000")
    worker = scenery.fleet.start()
    order = scenery.exchange.add_orders()[0]
    scenery.exchange.script_faults(order.algo_id, [Fault.INTERNAL_503])
    ticket = scenery.client.cancel(algo_id=order.algo_id)
    eventually(lambda: scenery.peek("ZCARD", scenery.peek.keys.scheduled) == 1, what="the retry is scheduled")
    worker.process.send_signal(signal.SIGTERM)
    leave(worker, IDLE_EXIT_S)
    # Drawn short, it may have been made before the stop, or be due and back on the queue.
    stands = [*scenery.peek("ZRANGE", scenery.peek.keys.scheduled, 0, -1), *scenery.peek.waiting(), *scenery.done()]
    assert stands == [ticket.id]
    scenery.fleet.start("--burst", wait=False)
    assert [attempt.verdict for attempt in ticket.wait(10).attempts] == ["busy", "confirmed"]


@SCENES.add
def a_request_slower_than_the_grace_is_left_behind(stage: Stage) -> None:
    """The grace holds whatever the exchange does; the job comes back with its attempt as unclear."""
    scenery = Scenery.on(stage, latency_ms=2500, SHUTDOWN_GRACE_S="4")
    worker = scenery.fleet.start()
    tickets = scenery.ask(2)
    scenery.wait_for_requests(2)
    worker.process.send_signal(signal.SIGTERM)
    leave(worker, 4)
    assert "left=2" in worker.output()
    scenery.exchange.set_latency_ms(0)
    scenery.fleet.start("--burst", wait=False)
    for ticket in tickets:
        outcome = ticket.wait(10)
        assert outcome.kind is OutcomeKind.CANCELLED
        assert outcome.attempts[0].msg == "worker lost"


@SCENES.after(a_request_slower_than_the_grace_is_left_behind)
def a_second_sigint_leaves_at_once(stage: Stage) -> None:
    """The second Ctrl-C waits for nothing: exit code 130, and a line that says how many jobs it left; they return."""
    scenery = Scenery.on(stage, latency_ms=2000)
    worker = scenery.fleet.start()
    tickets = scenery.ask(2)
    scenery.wait_for_requests(2)
    worker.process.send_signal(signal.SIGINT)
    wait_for_line(worker, "event=stopping")
    worker.process.send_signal(signal.SIGINT)
    assert worker.process.wait(1) == 130
    assert "event=left_at_once in_flight=2 " in worker.output()
    scenery.exchange.set_latency_ms(0)
    scenery.fleet.start("--burst", wait=False)
    assert {ticket.wait(10).kind for ticket in tickets} == {OutcomeKind.CANCELLED}


@SCENES.add
def suspended_and_resumed(stage: Stage) -> None:
    """While `rq suspend` holds nothing is started, what is in flight or overdue ends; `rq resume` goes on soon."""
    scenery = Scenery.on(stage, latency_ms=1500)
    worker = scenery.fleet.start()
    first = scenery.ask(1)
    scenery.wait_for_requests(1)
    rq(scenery, "suspend")
    eventually(lambda: scenery.peek("HGET", f"rq:worker:{name_of(worker)}", "state") == "suspended", 3)
    second = scenery.ask(3)
    overdue = scenery.client.cancel(algo_id=scenery.exchange.add_orders()[0].algo_id, deadline_s=0.1)
    assert overdue.wait(20).kind is OutcomeKind.OVERDUE
    assert first[0].wait(5).kind is OutcomeKind.CANCELLED
    time.sleep(1.2)
    assert [entry.deletes for entry in scenery.exchange.book().values()] == [1, 0, 0, 0, 0]
    assert scenery.peek.waiting() == [ticket.id for ticket in second]
    rq(scenery, "resume")
    eventually(lambda: scenery.exchange.stats().in_flight == 3, what="the rest is sent")
    assert {ticket.wait(5).kind for ticket in second} == {OutcomeKind.CANCELLED}
    worker.process.send_signal(signal.SIGTERM)
    leave(worker, IDLE_EXIT_S)


@SCENES.after(suspended_and_resumed)
def rqs_shutdown_command(stage: Stage) -> None:
    """RQ's shutdown command, also sent twice, stops the worker that it names as SIGTERM would, and no other."""
    scenery = Scenery.on(stage, latency_ms=1000)
    named, other = scenery.fleet.start(), scenery.fleet.start()
    tickets = scenery.ask(6)
    scenery.wait_for_requests(6)
    for _ in range(2):
        send_shutdown_command(scenery.connection, name_of(named))
    leave(named, IDLE_EXIT_S)
    assert other.process.poll() is None
    for ticket in tickets:
        assert [attempt.verdict for attempt in ticket.wait(5).attempts] == ["confirmed"]


def rq(scenery: Scenery, command: str) -> None:
    """Run RQ's own command line."""
    arguments = [sys.executable, "-m", "rq.cli", command, "-u", scenery.valkey.url]
    ended = subprocess.run(arguments, cwd=ROOT, env=scrubbed(), check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("name", SCENES)
def test_stopping(played: dict[str, Future[None]], name: str) -> None:
    """Each scene above shows its rule."""
    played[name].result()
