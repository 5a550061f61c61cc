"""What a job's hash asks of RQ's clean-up (code to load, addresses to call): nothing of it happens in our worker."""

from __future__ import annotations

import pickle
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis
from rq import Callback
from rq.job import Job, JobStatus
from rq.webhook import Webhook

from producer import CancelClient, OutcomeKind
from producer.message import TASK
from tests.loopback import Peer, Server
from tests.servers import ROOT, RQ, WORKER, Peek, Valkey, Workers, eventually, scrubbed
from worker.sandbox.control import RunningExchange

#: RQ's command line without `--serializer json`: the queues that it hands in are of its default, pickle.
OURS_BY_RQ = (RQ, "worker", "-w", "worker.runner.CancelWorker", "cancels")


@dataclass(frozen=True)
class _Touch:
    """Makes a file when it is unpickled."""

    path: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@dataclass
class Bait:
    """An abandoned job of the started registry that makes a file, or calls a port of loopback, when it is taken."""

    directory: Path
    valkey: Valkey
    server: Server = field(default_factory=lambda: Server(Peer.wait_until_closed))

    def __post_init__(self) -> None:
        """A module that makes a file as soon as it is imported."""
        self._file = self.directory / "taken"
        code = f"import pathlib\npathlib.Path({str(self._file)!r}).touch()\ndef act(*_):\n    pass\n"
        (self.directory / "bait_of_a_test.py").write_text(code, "utf-8")

    def lay(self, connection: redis.Redis, kind: str) -> None:
        """Put the job where RQ looks for those whose worker has died."""
        options: dict[str, Any] = {}
        if kind == "callback and webhook":
            options["on_failure"] = Callback("bait_of_a_test.act")
            options["webhooks"] = [Webhook(f"{self.server.url}/", "failed", timeout=1)]
        options |= {"id": "bait", "origin": "cancels", "status": JobStatus.STARTED}
        job = Job.create(TASK, args=[{}], connection=connection, **options)
        job.save()
        if kind == "pickle":
            connection.hset(job.key, "meta", pickle.dumps(_Touch(self._file)))
        self.abandon(connection)

    def abandon(self, connection: redis.Redis) -> None:
        """Let its worker have died: what is done for it stands in the started registry, and has expired."""
        connection.zadd("rq:wip:cancels", {"bait:1": 1})

    def taken(self) -> bool:
        """Whether the file is there, or somebody has called."""
        return self._file.exists() or self.server.connections > 0

    def taken_by_rq_info(self, connection: redis.Redis) -> bool:
        """The same, after RQ's own clean-up in a process of RQ's: the bait is a good one."""
        self.abandon(connection)  # our worker has taken the entry away
        command = [RQ, "info", "--url", self.valkey.url]
        subprocess.run(command, cwd=ROOT, env=scrubbed() | {"PYTHONPATH": str(self.directory)}, timeout=30, check=False)
        return self.taken()


@pytest.fixture
def bait(valkey: Valkey, tmp_path: Path) -> Iterator[Bait]:
    """A bait that is not laid yet."""
    directory = tmp_path / "bait"
    directory.mkdir()
    made = Bait(directory, valkey)
    with made.server:
        yield made


def start_into_upkeep(workers: Workers, peek: Peek, command: tuple[str, ...], path: Path = ROOT) -> None:
    """Start a worker whose upkeep comes within a second: under a closed gate it has not measured the clock."""
    peek("HSET", peek.keys.gate("all"), "until_ms", peek.now_ms() + 2500)
    arguments = () if command is WORKER else ("--url", workers.environment["REDIS_URL"])
    workers.start(*arguments, command=command, PYTHONPATH=str(path))


def upkeep_is_over(exchange: RunningExchange) -> None:
    """Wait until the worker has done what it does before it keeps its connections warm."""
    eventually(lambda: exchange.stats().requests.get("GET /fapi/v1/time"), what="the upkeep goes on")


@pytest.mark.parametrize(
    ("command", "kind"),
    [(WORKER, "callback and webhook"), (OURS_BY_RQ, "pickle")],
    ids=["ours", "ours by RQ's command"],
)
def test_an_abandoned_job_makes_our_worker_do_nothing(
    command: tuple[str, ...],
    kind: str,
    bait: Bait,
    workers: Workers,
    client: CancelClient,
    exchange: RunningExchange,
    connection: redis.Redis,
) -> None:
    """No callback is loaded, no webhook called, nothing unpickled for a job that a dead worker left; cancels go on."""
    bait.lay(connection, kind)

    start_into_upkeep(workers, Peek(connection), command, bait.directory)
    upkeep_is_over(exchange)

    (order,) = exchange.add_orders(1)
    assert client.cancel(algo_id=order.algo_id).wait(30).kind is OutcomeKind.CANCELLED
    assert not bait.taken()
    assert connection.zcard("rq:wip:cancels") == 0
    assert bait.taken_by_rq_info(connection)


def test_what_rq_would_stumble_over_does_not_harm_the_worker(
    workers: Workers, client: CancelClient, exchange: RunningExchange, connection: redis.Redis
) -> None:
    """Entries of RQ's registries that nobody can read keep the worker neither from its upkeep nor from its cancels."""
    for entry in ("no-execution-id", b"\xff:x", "a:b:c"):
        connection.execute_command("ZADD", "rq:wip:cancels", 1, entry)
    connection.lpush("rq:queue:cancels:intermediate", b"\xff")

    start_into_upkeep(workers, Peek(connection), WORKER)
    upkeep_is_over(exchange)

    (order,) = exchange.add_orders(1)
    assert client.cancel(algo_id=order.algo_id).wait(30).kind is OutcomeKind.CANCELLED
    assert "Traceback" not in workers.all[0].output()
