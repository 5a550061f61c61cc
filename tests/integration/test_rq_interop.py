"""RQ's own eyes and hands on these jobs and workers: what it shows, what it leaves, what it can be told to do."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import redis
from rq import Queue, SimpleWorker
from rq.job import Job
from rq.registry import FailedJobRegistry, FinishedJobRegistry, StartedJobRegistry
from rq.serializers import JSONSerializer
from rq.timeouts import TimerDeathPenalty
from rq.worker import BaseWorker

from producer import CancelClient, CancelRequest, OutcomeKind
from producer.message import TASK, encode_request
from tests.conftest import API_KEY, API_SECRET
from tests.orders import under_way
from tests.servers import ROOT, RQ, Peek, Valkey, Workers, eventually, running_valkey, scrubbed
from worker import task
from worker.sandbox.control import ExchangeConfig, RunningExchange, start_exchange
from worker.sandbox.faults import Fault


@pytest.fixture
def queue(connection: redis.Redis) -> Queue:
    """The queue as RQ's users open it."""
    return Queue("cancels", connection=connection, serializer=JSONSerializer)


def rq(valkey: Valkey, *arguments: str, **environment: str) -> str:
    """Run RQ's command line; gives what it prints."""
    done = subprocess.run(
        [RQ, *arguments[:1], "--url", valkey.url, *arguments[1:]],
        cwd=ROOT,
        env=scrubbed() | environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)


def fetch(job_id: str, connection: redis.Redis) -> Job:
    """The job as RQ's users read it."""
    return Job.fetch(job_id, connection=connection, serializer=JSONSerializer)


# ---- while it works -------------------------------------------------------------------------------------------------


def test_job_under_way(
    workers: Workers, client: CancelClient, exchange: RunningExchange, connection: redis.Redis, queue: Queue
) -> None:
    """While its request is under way RQ shows the job as started, and by which worker."""
    workers.start()
    ticket = under_way(client, exchange)
    exchange.set_latency_ms(2000)  # for its look-up, too

    job = fetch(ticket.id, connection)
    (worker,) = BaseWorker.all(connection=connection, serializer=JSONSerializer)
    assert (job.get_status(), job.func_name, job.worker_name) == ("started", TASK, worker.name)
    assert job.args == [encode_request(ticket.request)]
    assert job.started_at is not None
    started = StartedJobRegistry(queue=queue)
    assert started.get_job_ids() == [ticket.id]
    assert job.id in started

    assert ticket.wait(30).kind is OutcomeKind.CANCELLED
    assert (started.get_job_ids(), fetch(ticket.id, connection).get_status()) == ([], "finished")


def test_rq_info(
    workers: Workers, client: CancelClient, exchange: RunningExchange, valkey: Valkey, connection: redis.Redis
) -> None:
    """`rq info` shows queue, jobs and worker, and its clean-up harms neither a job under way nor its outcome."""
    workers.start("--concurrency", "1")
    ticket = under_way(client, exchange, 4500)
    exchange.set_latency_ms(4500)  # for its look-up, too
    waiting = client.cancel(algo_id=exchange.add_orders(1)[0].algo_id)

    (worker,) = BaseWorker.all(connection=connection, serializer=JSONSerializer)
    eventually(lambda: connection.hget(worker.key, "state") == b"busy", what="it is busy")

    shown = rq(valkey, "info", "--raw")

    exchange.set_latency_ms(0)
    assert "queue cancels 1, 1 executing, 0 finished, 0 failed" in shown
    assert re.search(rf"^worker {re.escape(worker.name)} .* busy cancels\.", shown, re.MULTILINE), shown
    assert ticket.wait(30).kind is waiting.wait(30).kind is OutcomeKind.CANCELLED


# ---- what it leaves -------------------------------------------------------------------------------------------------

#: Fields of a job's hash that may differ from what RQ's own worker leaves, with the reason.
TOLERATED_JOB_FIELDS = {
    "created_at": "another moment",
    "enqueued_at": "another moment",
    "started_at": "another moment",
    "ended_at": "another moment",
    "last_heartbeat": "another moment",
    "data": "another order",
    "description": "another order",
    "origin": "another queue",
    "worker_name": "another worker",
    "retries_left": "a stock worker is kept from repeating a failed kind by 0; ours decides for itself",
}
TOLERATED_WORKER_FIELDS = {
    "birth": "another moment",
    "last_heartbeat": "another moment",
    "pid": "another process",
    "ip_address": "another connection",
    "queues": "another queue",
    "total_working_time": "another duration",
}
ONE_SIDED_WORKER_FIELDS = {
    "current_job": "RQ's worker has one job at a time, ours many",
    "death": "RQ's worker has left when it is looked at, ours still works",
    "shutdown_requested_date": "RQ notes it at a stop by signal",
}


class QuietWorker(SimpleWorker):
    """RQ's worker as it is, in this process: signals and time-outs belong to the test runner."""

    death_penalty_class = TimerDeathPenalty

    def _install_signal_handlers(self) -> None:
        """None here."""


@dataclass
class Pair:
    """The same two jobs, one that succeeds and one that fails, once with our worker and once with RQ's."""

    connection: redis.Redis
    ours: Peek
    theirs: Peek
    worker: str  # ours
    jobs: dict[str, tuple[str, str]]  # success or failure to the ids, ours and theirs

    def hashes(self, what: str) -> tuple[dict[str, str], dict[str, str]]:
        """Both hashes of the job as RQ reads them."""
        ours, theirs = (
            peek.job(job_id) for peek, job_id in zip((self.ours, self.theirs), self.jobs[what], strict=True)
        )
        return read_by_rq(ours), read_by_rq(theirs)


def read_by_rq(fields: dict[str, str]) -> dict[str, str]:
    """Fields that RQ knows; to it one that is absent is empty."""
    return {name: value for name, value in fields.items() if value and not name.startswith("c_")}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Runs them, on a server of their own."""
    accounts = {"default": (API_KEY, API_SECRET)}
    with (
        running_valkey() as server,
        start_exchange(ExchangeConfig(accounts=accounts)) as exchange,
        pytest.MonkeyPatch.context() as patch,
        redis.Redis(port=server.port) as connection,
    ):
        keys = {"BINANCE_API_KEY": API_KEY, "BINANCE_API_SECRET": API_SECRET}
        environment = {"REDIS_URL": server.url, "BINANCE_BASE_URL": exchange.url, **keys}
        fleet = Workers(tmp_path_factory.mktemp("pair"), environment)
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            fleet.start()
            yield worked_by_both(server, exchange, connection)
        finally:
            fleet.stop()
            task._exchange()[1].close()
            task._exchange.cache_clear()


def worked_by_both(server: Valkey, exchange: RunningExchange, connection: redis.Redis) -> Pair:
    """One job that succeeds and one that fails, for each of the two kinds of worker."""
    ids = [order.algo_id for order in exchange.add_orders(4)]
    for algo_id in (ids[1], ids[3]):
        exchange.script_faults(algo_id, [Fault.DISABLED_2011])
    (worker,) = BaseWorker.all(connection=connection, serializer=JSONSerializer)
    pairs = []
    for name, some in (("cancels", ids[:2]), ("theirs", ids[2:])):
        with CancelClient.from_url(server.url, queue=name) as client:
            tickets = client.cancel_many([CancelRequest(algo_id=algo_id) for algo_id in some])
            if name == "theirs":
                queue = Queue(name, connection=connection, serializer=JSONSerializer)
                stock = QuietWorker([queue], connection=connection, serializer=JSONSerializer, name="stock")
                stock.work(burst=True, logging_level="CRITICAL")
            assert [ticket.wait(30).kind.value for ticket in tickets] == ["cancelled", "refused"]
            pairs.append([ticket.id for ticket in tickets])
    jobs = dict(zip(("success", "failure"), zip(*pairs, strict=True), strict=True))
    return Pair(connection, Peek(connection), Peek(connection, "theirs"), worker.name, jobs)


@pytest.mark.parametrize("what", ["success", "failure"])
def test_job_hash_is_as_rq_leaves_it(what: str, pair: Pair) -> None:
    """After its end a job's hash has the fields and values that RQ's own worker leaves for the same function."""
    ours, theirs = pair.hashes(what)

    assert ours.keys() == theirs.keys()
    differing = {name for name in ours if name in theirs and ours[name] != theirs[name]}
    assert differing <= TOLERATED_JOB_FIELDS.keys(), {name: (ours[name], theirs[name]) for name in differing}
    stamp = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
    for name in ("started_at", "ended_at", "last_heartbeat"):
        assert stamp.fullmatch(ours[name]), (name, ours[name])
        assert stamp.fullmatch(theirs[name]), (name, theirs[name])


def test_registries_are_as_rq_leaves_them(pair: Pair) -> None:
    """Finished and failed jobs stand in RQ's registries, and nothing stays in those of queued, started or due jobs."""
    for name, side in (("cancels", 0), ("theirs", 1)):
        queue = Queue(name, connection=pair.connection, serializer=JSONSerializer)
        assert FinishedJobRegistry(queue=queue).get_job_ids() == [pair.jobs["success"][side]]
        assert FailedJobRegistry(queue=queue).get_job_ids() == [pair.jobs["failure"][side]]
        assert (queue.get_job_ids(), queue.started_job_registry.get_job_ids()) == ([], [])
        assert (queue.scheduled_job_registry.get_job_ids(), queue.deferred_job_registry.get_job_ids()) == ([], [])
        for job_id in (pair.jobs["success"][side], pair.jobs["failure"][side]):
            assert pair.ours("EXISTS", f"rq:executions:{job_id}") == 0
            assert pair.ours("KEYS", f"rq:execution:{job_id}:*") == []


def test_worker_hash_is_as_rq_leaves_it(pair: Pair) -> None:
    """Our worker's hash has the fields of RQ's, some figures of our own beside them, and counts the same jobs."""
    key = f"rq:worker:{pair.worker}"
    eventually(lambda: pair.ours("HGET", key, "failed_job_count") == "1", what="it has told of its jobs")
    ours, theirs = (dict(pair.ours("HGETALL", f"rq:worker:{name}")) for name in (pair.worker, "stock"))
    ours = {name: value for name, value in ours.items() if not name.startswith("c_")}

    assert ours.keys() - ONE_SIDED_WORKER_FIELDS.keys() == theirs.keys() - ONE_SIDED_WORKER_FIELDS.keys()
    differing = {name for name in ours if name in theirs and ours[name] != theirs[name]}
    assert differing <= TOLERATED_WORKER_FIELDS.keys(), {name: (ours[name], theirs[name]) for name in differing}
    assert (ours["successful_job_count"], ours["failed_job_count"]) == ("1", "1")
    assert 0 < float(ours["total_working_time"]) < 60


# ---- what RQ can do with it -----------------------------------------------------------------------------------------


def test_requeue_starts_a_new_run(
    workers: Workers,
    client: CancelClient,
    exchange: RunningExchange,
    connection: redis.Redis,
    queue: Queue,
    valkey: Valkey,
    peek: Peek,
) -> None:
    """A failed request that RQ requeues runs again from the start: run 2, a new deadline, one more ledger entry."""
    workers.start()
    algo_id = exchange.add_orders(1)[0].algo_id
    exchange.script_faults(algo_id, [Fault.DISABLED_2011])
    ticket = client.cancel(algo_id=algo_id, deadline_s=20, tag="t")
    first = ticket.wait(30)
    assert (first.kind, first.run) == (OutcomeKind.REFUSED, 1)

    rq(valkey, "requeue", "--queue", "cancels", "--serializer", "json", ticket.id)

    eventually(lambda: len(peek.ledger()) == 2, what="the second run has its outcome")
    second = peek.ledger()[1]
    assert (second.id, second.run, second.kind, second.tag) == (ticket.id, 2, OutcomeKind.CANCELLED, "t")
    assert [attempt.n for attempt in second.attempts] == [1]
    assert (second.enqueued_at_ms or 0) > first.finished_at_ms - 1
    assert client.outcome(ticket.id) == second
    job = fetch(ticket.id, connection)
    result = job.latest_result()
    assert result is not None
    assert (job.get_status(), result.return_value) == ("finished", "cancelled")
    assert FailedJobRegistry(queue=queue).get_job_ids() == []


def test_plain_rq_enqueue_is_accepted(
    workers: Workers, client: CancelClient, exchange: RunningExchange, connection: redis.Redis
) -> None:
    """A program that knows RQ alone can enqueue a cancel by the function's name."""
    workers.start()
    algo_id = exchange.add_orders(1)[0].algo_id
    queue = Queue("cancels", connection=connection, serializer=JSONSerializer)

    job = queue.enqueue("worker.task.cancel_algo_order", {"v": 1, "account": "default", "algo_id": algo_id})

    assert client.wait(job.id, 10).kind is OutcomeKind.CANCELLED
    assert job.get_status() == "finished"
    assert job.return_value(refresh=True) == "cancelled"


def test_rqs_command_line_starts_our_worker(
    workers: Workers, client: CancelClient, exchange: RunningExchange, valkey: Valkey, connection: redis.Redis
) -> None:
    """`rq worker -w worker.runner.CancelWorker` starts ours, with its concurrency and its clean stop."""
    worker = workers.start_stock("-w", "worker.runner.CancelWorker")
    exchange.set_latency_ms(300)
    ids = [order.algo_id for order in exchange.add_orders(30)]

    tickets = client.cancel_many([CancelRequest(algo_id=algo_id) for algo_id in ids])

    assert {ticket.wait(30).kind for ticket in tickets} == {OutcomeKind.CANCELLED}
    assert exchange.stats().peak_in_flight > 5
    assert worker.stop() == 0
    assert "Traceback" not in worker.output()
    for secret in (API_KEY, API_SECRET):
        assert secret not in worker.output()
    assert connection.scard("rq:workers") == 0
