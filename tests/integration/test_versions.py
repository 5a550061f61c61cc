"""Version 0.1 and this one on one queue: each goes on with what the other has left, and side by side they agree."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import redis
from rq.job import Job
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer

from producer import CancelClient
from producer.message import WORKER_LOST
from tests.conftest import API_KEY, API_SECRET
from tests.orders import PROVEN_S
from tests.servers import ROOT, Peek, Valkey, Worker, Workers, eventually, scrubbed
from tests.strategy import Strategy
from worker.sandbox.control import RunningExchange
from worker.sandbox.faults import Fault

#: The last commit of version 0.1.
OLD_COMMIT = "b6f0422"
LEASE_S = 2.0
#: No worker gives up waiting for an answer before it is killed.
WAITS = {"LEASE_S": "2", "CANCEL_DEADLINE_S": "60", "BINANCE_RECV_WINDOW_MS": "30000"}
#: Keys that may live for ever: lists and registries, whose entries go; ledger and counts, whose length is bounded.
LASTING = {
    "cancels:counts",
    "rq:queues",
    "rq:workers",
    "rq:workers:cancels",
    "rq:finished:cancels",
    "rq:failed:cancels",
    "cancels:outcomes",
}


@pytest.fixture(scope="session")
def old_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of version 0.1, taken from the history of this checkout."""
    command = ["git", "archive", OLD_COMMIT, "producer", "worker", "pyproject.toml"]
    try:
        packages = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.decode().strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        why = f"version 0.1 (commit {OLD_COMMIT}) cannot be taken from the history of this checkout: {said}"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{why}; check out the whole history")
        pytest.skip(why)
    directory = tmp_path_factory.mktemp("version-0.1")
    with tarfile.open(fileobj=BytesIO(packages)) as archive:
        archive.extractall(directory, filter="data")
    return directory


@dataclass
class Side:
    """What one version is made of: where its code is, its workers, a strategy of its own."""

    name: str
    code: Path
    workers: Workers
    strategy: Strategy
    environment: dict[str, str] = field(repr=False)

    def start(self, *, concurrency: int = 64, backoff_ms: int = 4000) -> Worker:
        """Start a worker of this version, and wait until it works; ``backoff_ms`` is the bound of each delay."""
        backoff = str(backoff_ms)
        worker = self.workers.start(
            wait=False, WORKER_CONCURRENCY=str(concurrency), BACKOFF_BASE_MS=backoff, BACKOFF_CAP_MS=backoff
        )
        eventually(lambda: "event=started " in worker.output(), what=f"the {self.name} worker starts")
        return worker

    def status(self) -> dict[str, Any]:
        """What this version's command line says of the queue."""
        command = [sys.executable, "-m", "producer", "status", "--json"]
        done = subprocess.run(
            command, cwd=self.code, env=self.environment, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))


@pytest.fixture
def sides(old_code: Path, valkey: Valkey, exchange: RunningExchange, tmp_path: Path) -> Iterator[dict[str, Side]]:
    """Both versions, by name."""
    settings = WAITS | {"REDIS_URL": valkey.url, "BINANCE_BASE_URL": exchange.url}
    settings |= {"BINANCE_API_KEY": API_KEY, "BINANCE_API_SECRET": API_SECRET}
    found: dict[str, Side] = {}
    with ExitStack() as stack:
        for name, code in (("old", old_code), ("new", ROOT)):
            directory = tmp_path / name
            directory.mkdir()
            own = settings | {"PYTHONPATH": str(code)}
            workers = Workers(directory, own, code)
            stack.callback(workers.stop)
            strategy = stack.enter_context(Strategy(code, valkey.url, scrubbed()))
            assert Path(strategy.producer).parent.parent == code
            found[name] = Side(name, code, workers, strategy, scrubbed() | own)
        yield found


@pytest.fixture
def peek(connection: redis.Redis) -> Peek:
    """A look at the queue's keys."""
    return Peek(connection)


# ---- one version goes on with what the other has left ----------------------------------------------------------------


@dataclass
class Left:
    """A queue in every state that a version can leave it in. Lists of job ids."""

    held: list[str] = field(default_factory=list)  # by a worker that was killed
    scheduled: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    retried: list[str] = field(default_factory=list)  # among the failed ones
    waiting: list[str] = field(default_factory=list)
    by_client_id: list[str] = field(default_factory=list)
    overdue: list[str] = field(default_factory=list)
    canceled: list[str] = field(default_factory=list)  # through RQ

    def expected(self) -> dict[tuple[str, int], str]:
        """The outcome that each run of each request must have."""
        kinds = {(job_id, 1): "cancelled" for job_id in (*self.held, *self.scheduled, *self.waiting)}
        kinds |= {(job_id, 1): "cancelled" for job_id in self.by_client_id}
        kinds |= {(job_id, 1): "refused" for job_id in self.failed}
        kinds |= {(job_id, 2): "cancelled" for job_id in self.retried}
        kinds |= {(job_id, 1): "overdue" for job_id in self.overdue}
        return kinds | {(job_id, 1): "gave_up" for job_id in self.canceled}


class Stage:
    """Fills a queue by one version."""

    def __init__(self, side: Side, exchange: RunningExchange, connection: redis.Redis, peek: Peek) -> None:
        self.side, self.exchange, self.connection, self.peek = side, exchange, connection, peek
        self.left = Left()

    def ask(self, count: int, *faults: Fault, **options: Any) -> list[str]:
        """Have orders opened and asked to be cancelled by their algo ids; gives the jobs' ids."""
        orders = self.exchange.add_orders(count)
        for order in orders if faults else ():
            self.exchange.script_faults(order.algo_id, faults, repeat_last=Fault.UNAVAILABLE_503 in faults)
        return self.side.strategy.cancel(*({"algo_id": order.algo_id} | options for order in orders))

    def work_and_die(self) -> None:
        """A worker that leaves failed, scheduled and held jobs."""
        left, worker = self.left, self.side.start()
        left.failed = self.ask(4, Fault.DISABLED_2011)
        eventually(lambda: self.peek("ZCARD", self.peek.keys.failed) == 4, what="four have failed")
        self.exchange.set_latency_ms(4000)
        left.held = self.ask(3)
        eventually(lambda: self.exchange.stats().in_flight == 3, what="three are under way")
        self.exchange.set_latency_ms(0)
        left.scheduled = self.ask(4, Fault.UNAVAILABLE_503)
        eventually(
            lambda: all(self.peek.job(job_id)["status"] == "scheduled" for job_id in left.scheduled), what="backoff"
        )
        worker.stop(signal.SIGKILL)
        self.exchange.end_faults()
        assert self.peek("ZCARD", self.peek.keys.scheduled) > 0

    def enqueue(self) -> None:
        """Requests of every sort that nobody has begun."""
        left, strategy = self.left, self.side.strategy
        left.waiting = [*self.ask(4), *self.ask(2, urgent=True), *self.ask(2, deadline_s=50)]
        algo_id = self.exchange.add_orders(1)[0].algo_id
        first, second = strategy.cancel({"algo_id": algo_id}), strategy.cancel({"algo_id": algo_id, "urgent": True})
        assert first == second
        left.waiting += first
        left.overdue = self.ask(2, deadline_s=0.05)
        orders = self.exchange.add_orders(3)
        time.sleep(0.05)  # an order that could be younger than its request is left alone
        left.by_client_id = strategy.cancel(*({"client_algo_id": order.client_algo_id} for order in orders))

    def meddle(self, other: Strategy) -> None:
        """What people and crashes do to such a queue: one is retried by each, one canceled, one half claimed."""
        left = self.left
        left.retried = left.failed[:3]
        assert self.side.strategy.retry(left.failed[0]) == left.failed[:1]
        assert other.retry(left.failed[1]) == left.failed[1:2]
        FailedJobRegistry("cancels", self.connection, serializer=JSONSerializer).requeue(left.failed[2])
        keys = self.peek.keys
        assert self.peek("LMOVE", keys.waiting, keys.claiming, "LEFT", "RIGHT") in self.left.waiting

    def cancel_through_rq(self) -> None:
        """Two that a person takes back."""
        self.left.canceled = self.ask(2)
        for job_id in self.left.canceled:
            Job.fetch(job_id, self.connection, JSONSerializer).cancel()


def drained(peek: Peek, expected: dict[tuple[str, int], str]) -> None:
    """Every run of every request has come to its outcome, once, and nothing is left to do."""
    with contextlib.suppress(AssertionError):  # what is missing is told below
        eventually(lambda: len(peek.ledger()) >= len(expected))
    assert {(outcome.id, outcome.run): outcome.kind.value for outcome in peek.ledger()} == expected
    keys = peek.keys
    eventually(lambda: peek("EXISTS", keys.unfinished, keys.waiting, keys.claiming, keys.scheduled) == 0, what="empty")
    time.sleep(1.5)
    assert len(peek.ledger()) == len(expected)


@pytest.mark.parametrize(("before", "after"), [("old", "new"), ("new", "old")])
def test_goes_on_with_what_the_other_left(
    before: str,
    after: str,
    sides: dict[str, Side],
    exchange: RunningExchange,
    connection: redis.Redis,
    peek: Peek,
) -> None:
    """Held, scheduled, failed, retried, waiting: whatever one version left, the other brings to one outcome each."""
    stage = Stage(sides[before], exchange, connection, peek)
    stage.work_and_die()
    stage.enqueue()
    stage.meddle(sides[after].strategy)
    if after == "new":  # version 0.1 has no outcome for them
        stage.cancel_through_rq()
    expected = stage.left.expected()
    sides[after].start()

    drained(peek, expected)

    recalled = {*stage.left.overdue, *stage.left.canceled}
    deletes = Counter(entry.deletes_effective for entry in exchange.book().values())
    assert deletes == {1: len({job_id for job_id, _ in expected}) - len(recalled) - 1, 0: len(recalled) + 1}
    assert {key for key in peek("KEYS", "*") if peek("TTL", key) == -1} <= LASTING
    read = [side.strategy.outcomes(job_id for job_id, _ in expected) for side in sides.values()]
    assert read[0] == read[1]
    ledgers = [side.strategy.ledger() for side in sides.values()]
    assert ledgers[0] == ledgers[1]
    assert len(ledgers[0]) == len(expected)


@pytest.mark.parametrize(("reader", "doer"), [("old", "new"), ("new", "old")])
def test_status_of_the_other(
    reader: str, doer: str, sides: dict[str, Side], exchange: RunningExchange, connection: redis.Redis, peek: Peek
) -> None:
    """`producer status` of one version reads a queue that the other serves: workers, failed, scheduled, in flight."""
    stage = Stage(sides[doer], exchange, connection, peek)
    sides[doer].start(concurrency=3, backoff_ms=60_000)
    stage.ask(1, Fault.DISABLED_2011)
    stage.ask(1, Fault.UNAVAILABLE_503)
    eventually(lambda: peek("ZCARD", peek.keys.failed) == 1, what="one has failed")
    in_a_while = peek.now_ms() / 1000 + 20
    eventually(lambda: peek("ZCOUNT", peek.keys.scheduled, in_a_while, "+inf") == 1, what="one waits for its next try")
    exchange.set_latency_ms(4000)
    stage.ask(5)
    eventually(lambda: exchange.stats().in_flight == 3, what="three are under way")

    def shown() -> dict[str, Any] | None:  # a worker tells of itself twice a second
        status = sides[reader].status()
        return status if any(worker["in_flight"] for worker in status["workers"]) else None

    status = eventually(shown, what="the worker and its load are shown")

    assert isinstance(status, dict)
    assert status["failed"] == 1
    assert min(status["scheduled"], status["in_flight"]) >= 1  # what is silent for long may wait for its next try
    assert sum(status[name] for name in ("scheduled", "queued", "in_flight")) >= 6
    assert [worker["live"] for worker in status["workers"]] == [True]
    assert status["outcomes_last_minute"] == {"refused": 1}


# ---- both at once ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dead", "heir"), [("old", "new"), ("new", "old")])
def test_recovery_by_the_other(
    dead: str, heir: str, sides: dict[str, Side], exchange: RunningExchange, connection: redis.Redis, peek: Peek
) -> None:
    """Jobs of a killed worker are taken up by one of the other version, as perhaps sent: within LEASE_S + 1.5 s, or
    1.5 s after that one has started."""
    stage = Stage(sides[dead], exchange, connection, peek)
    doomed = sides[dead].start()
    exchange.set_latency_ms(20_000)
    job_ids = stage.ask(5)
    eventually(lambda: exchange.stats().in_flight == 5, what="five are under way")
    time.sleep(random.Random(f"recovery {dead}").uniform(0.0, 0.3))  # its patience ends after a second
    doomed.stop(signal.SIGKILL)
    killed_ms = peek.now_ms()
    exchange.set_latency_ms(0)
    sides[heir].start()
    ready_ms = peek.now_ms()

    eventually(lambda: len(peek.ledger()) == 5, what="all have their outcomes")

    assert {outcome.id for outcome in peek.ledger()} == set(job_ids)
    for outcome in peek.ledger():
        lost, *later = outcome.attempts
        assert (outcome.kind, lost.msg, lost.verdict) == ("cancelled", WORKER_LOST, "unclear")
        assert later[0].at_ms - max(killed_ms + LEASE_S * 1000, ready_ms) <= 1500
    assert {entry.deletes for entry in exchange.book().values()} == {1}


def test_old_stock_worker_is_left_at_work(
    sides: dict[str, Side], exchange: RunningExchange, connection: redis.Redis, peek: Peek
) -> None:
    """A job that a stock worker with version 0.1's code has in hand, without a lease, is not taken from it."""
    sides["old"].workers.start_stock()
    exchange.set_latency_ms(7000)
    (job_id,) = Stage(sides["new"], exchange, connection, peek).ask(1)
    eventually(lambda: [entry.deletes for entry in exchange.book().values()] == [1], what="it is under way")
    exchange.set_latency_ms(0)
    sides["new"].start()

    outcome = sides["new"].strategy.waited_for(job_id)

    assert [attempt["verdict"] for attempt in outcome["attempts"]] == ["confirmed"]
    assert [(entry.deletes, entry.gets) for entry in exchange.book().values()] == [(1, 0)]


@pytest.mark.parametrize("worker", ["old", "new"])
def test_a_triggered_order_between_versions(worker: str, sides: dict[str, Side], exchange: RunningExchange) -> None:
    """Both versions' strategies read what either worker records of a triggered order. The old one leaves a child alone,
    and says that it may be live; the new one tells what became of it, and cancels it where that is asked for."""
    for entry in exchange.add_orders(2, order_type="STOP", price="9000"):
        exchange.trigger(entry.algo_id)
    plain, wanted = sorted(exchange.book())
    sides[worker].start()

    (by_old,) = sides["old"].strategy.cancel({"algo_id": plain})
    (by_new,) = sides["new"].strategy.cancel({"algo_id": wanted, "on_trigger": "cancel_child"})

    is_new = worker == "new"
    for reader in sides.values():
        for job_id, is_wanted in ((by_old, False), (by_new, True)):
            outcome = reader.strategy.waited_for(job_id)
            assert outcome["kind"] == "triggered"
            assert outcome["may_be_live"] is not (is_new and is_wanted)
            if reader.name == "new" and is_new:
                assert outcome["child_status"] == ("CANCELED" if is_wanted else "NEW")
    children = [entry.child.status for _, entry in sorted(exchange.book().items()) if entry.child]
    assert children == ["NEW", "CANCELED" if is_new else "NEW"]


def test_open_orders_of_a_symbol_between_versions(
    sides: dict[str, Side], exchange: RunningExchange, valkey: Valkey
) -> None:
    """A worker of 0.1 refuses to list them and touches none; a worker of this version joins what 0.1 has asked for, and
    0.1 reads what became of each order."""
    ids = [order.algo_id for order in exchange.add_orders(2)]
    time.sleep(PROVEN_S)
    old = sides["old"].start()
    with CancelClient.from_url(valkey.url) as client:
        refused = client.cancel_open("BTCUSDT").wait(60)
        assert (refused.kind, refused.may_be_live, refused.orders) == ("refused", True, ())
        assert "unknown field" in (refused.error or "")
        assert {entry.status for entry in exchange.book(ids).values()} == {"NEW"}
        old.stop()
        exchange.script_faults(ids[0], [Fault.UNAVAILABLE_503], repeat_last=True)
        (under_way,) = sides["old"].strategy.cancel({"algo_id": ids[0]})
        sides["new"].start()
        eventually(lambda: exchange.book(ids[:1])[ids[0]].deletes, what="it is under way")
        ticket = client.cancel_open("BTCUSDT")
        eventually(lambda: client.outcome(ticket), what="they are listed")
        exchange.end_faults()

        outcome = ticket.wait(60)

    rows = {order.algo_id: order.id for order in outcome.orders}
    assert (outcome.kind, set(rows)) == ("cancelled", set(ids))
    assert rows[ids[0]] == under_way
    read = sides["old"].strategy.outcomes(rows.values())
    assert {record["kind"] for record in read.values()} == {"cancelled"}
    assert len(read) == len(ids)
