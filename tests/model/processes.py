"""Real `rq worker` processes with forked horses against the local exchange, killed or ended while others work.

They tell the model nothing: while they live it takes in what it sees in Redis, and holds it to the rules as far as that
goes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from redis import Redis
from rq.command import send_stop_job_command
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.serializers import JSONSerializer

from tests.model.holders import QUEUE
from tests.model.rq_steps import RQ
from tests.model.steps import OURS, Step
from tests.model.stock import OTHER_QUEUE
from tests.model.world import World
from tests.servers import ROOT, eventually, scrubbed
from worker.sandbox.control import ExchangeConfig, RunningExchange, start_exchange

#: The job function is imported ahead, so that a forked horse begins at once; all else is the command that people start.
_RQ = "import worker.task; from rq.cli import main; main()"
_KEY, _SECRET = "key-of-the-model", "secret-of-the-model"
#: How long a worker may take to start, and to leave after SIGTERM: it waits for its horse, s.
_START_S, _LEAVE_S = 30.0, 60.0
#: RQ's kinds of workers, the usual one more often.
_CLASSES = ("rq.Worker", "rq.Worker", "rq.SimpleWorker", "rq.worker.SpawnWorker", "rq.worker.HerokuWorker")
_LATENCIES_MS = (5, 50, 150)
#: Not what moves the index by two commands: a process may be in between.
_LEFT_OUT = ("wait", "claim", "grow old", "outlast")
_STEPS = tuple(step for step in OURS + RQ if step.may_nest and step.name not in _LEFT_OUT)


class Fleet:
    """Stock worker processes of one world, and the exchange that they talk to."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._exchange: RunningExchange | None = None
        self._workers: list[subprocess.Popen[bytes]] = []
        self._killed = False

    def close(self) -> None:
        """End them all."""
        for worker in self._workers:
            self._kill(worker)
        if self._exchange is not None:
            self._exchange.stop()

    def step(self, weight: float) -> Step:
        """A while with such workers, as something that can happen."""
        return Step("rq worker processes", weight, lambda _: self.work(), may_nest=False)

    def work(self) -> None:
        """Some workers come, work while other things happen, and are killed or leave."""
        world, chance = self._world, self._world.chance
        self._open_orders()
        self._killed = False
        with self._blind():
            for queues in chance.choice(([[QUEUE]], [[QUEUE, OTHER_QUEUE]], [[QUEUE], [QUEUE, OTHER_QUEUE]])):
                self._start(queues)
            for _ in range(chance.randint(2, 4)):
                self._others_work(chance.randint(20, 60))
                self._strike()
            while self._workers:
                self._leave(self._workers[0])
        world.count["whiles with rq worker processes"] += 1

    @contextlib.contextmanager
    def _blind(self) -> Iterator[None]:
        world = self._world
        world.check()
        world.model.rq_writes()
        world.model.is_blind = True
        yield
        if self._killed:
            world.left_behind.update(job.id for job in world.model.jobs.values() if job.done)
        world.check()
        world.model.is_blind = False

    def _open_orders(self) -> None:
        chance = self._world.chance
        if self._exchange is None:
            config = ExchangeConfig({"default": (_KEY, _SECRET)}, faults="some", seed=chance.randrange(1000))
            self._exchange = start_exchange(config)
        self._exchange.set_latency_ms(chance.choice(_LATENCIES_MS))
        self._world.algo_ids = [order.algo_id for order in self._exchange.add_orders(7)]

    def _start(self, queues: list[str]) -> None:
        world = self._world
        if self._exchange is None:
            raise TypeError("there is no exchange yet")
        environment = {
            "REDIS_URL": world.url,
            "BINANCE_BASE_URL": self._exchange.url,
            "BINANCE_API_KEY": _KEY,
            "BINANCE_API_SECRET": _SECRET,
            "LEASE_S": "1",
            "BACKOFF_BASE_MS": "10",
            "BACKOFF_CAP_MS": "1500",
            "NOT_FOUND_HORIZON_S": "1",
        }
        world.plain.delete(world.keys.suspended)  # it would not even start
        name = f"process{world.step}-{world.chance.randrange(10**6)}"
        options = ["--name", name, "--serializer", "json", "--url", world.url, "--quiet"]
        options += ["--worker-class", world.chance.choice(_CLASSES)]
        if world.chance.random() < 0.5:
            options.append("--with-scheduler")
        with tempfile.TemporaryFile() as log:
            worker = subprocess.Popen(
                [sys.executable, "-c", _RQ, "worker", *queues, *options],
                cwd=ROOT,
                env=scrubbed() | environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            self._workers.append(worker)
            try:
                eventually(lambda: world.plain.exists(world.keys.worker_prefix + name), _START_S)
            except AssertionError:
                log.seek(0)
                raise AssertionError(f"a stock worker does not start: {log.read().decode()[-2000:]}") from None

    def _others_work(self, steps: int) -> None:
        world = self._world
        for _ in range(steps):
            (step,) = world.chance.choices(_STEPS, [step.weight for step in _STEPS])
            step.take(world)
            time.sleep(world.chance.choice((0.002, 0.01, 0.04)))
            world.check()

    # -- how they end --

    def _strike(self) -> None:
        worker = self._world.chance.choice(self._workers) if self._workers else None
        if worker is None:
            return
        match self._world.chance.randrange(4):
            case 0:
                self._kill_horse(worker)
            case 1:
                self._kill(worker)
                self._workers.remove(worker)
                self._world.count["rq workers killed"] += 1
            case 2:
                self._leave(worker)
            case 3:
                self._stop_a_job()

    def _kill_horse(self, worker: subprocess.Popen[bytes]) -> None:
        for pid in _horses(worker.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self._killed = True
                self._world.count["horses of processes killed"] += 1

    def _kill(self, worker: subprocess.Popen[bytes]) -> None:
        """It and its horse at once, as by the kernel or a container's end."""
        self._killed = True
        for pid in (worker.pid, *_horses(worker.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        worker.wait(_LEAVE_S)

    def _leave(self, worker: subprocess.Popen[bytes]) -> None:
        """It is asked to leave, and waits for its horse."""
        worker.send_signal(signal.SIGTERM)
        ends_at = time.monotonic() + _LEAVE_S
        while worker.poll() is None:
            self._others_work(1)
            if time.monotonic() > ends_at:
                raise AssertionError("a stock worker does not leave")
        self._workers.remove(worker)
        self._world.count["rq workers that left"] += 1

    def _stop_a_job(self) -> None:
        """`rq.command.send_stop_job_command`: its horse is killed, and RQ calls it stopped."""
        world = self._world
        held = [job for job in world.model.jobs.values() if job.hold is not None and job.hold.is_foreign]
        if held:
            job = world.chance.choice(held)
            connection: Redis = world.raw
            with contextlib.suppress(InvalidJobOperation, NoSuchJobError):
                send_stop_job_command(connection, job.id, serializer=JSONSerializer)
                world.note(job.id, "is to be stopped")
                self._killed = True
                job.is_recalled = True
                world.count["jobs stopped"] += 1


def _horses(pid: int) -> list[int]:
    """Children of a worker that lead a process group of their own, as horses do and the scheduler does not."""
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [int(child) for child in found if _leads(int(child))]


def _leads(pid: int) -> bool:
    try:
        return os.getpgid(pid) == pid
    except ProcessLookupError:
        return False
