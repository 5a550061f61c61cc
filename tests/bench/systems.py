"""The systems that are compared: how each one's worker is started, and how cancels are put on its queue."""

from __future__ import annotations

import contextlib
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import redis
from rq import Queue
from rq import Retry as RqRetry
from rq.registry import FinishedJobRegistry

from producer import CancelClient, CancelRequest
from producer.keys import Keys
from tests.bench import floor
from tests.bench.report import TITLES
from tests.bench.rig import Rig
from tests.servers import WORKER, Worker, Workers

PROJECT_QUEUE = "cancels"
_CALL_LIMIT_S = 10.0


class Producer(ABC):
    """A strategy's side. ``jobs`` says which job carries an order; ``retries`` where retries wait for their time."""

    def __init__(self, url: str, queue: str) -> None:
        self.redis = redis.Redis.from_url(url, socket_timeout=_CALL_LIMIT_S)
        self.jobs: dict[int, str] = {}
        self.retries = Keys(queue).scheduled

    @abstractmethod
    def put(self, order: int) -> None:
        """Ask for one cancel."""

    @abstractmethod
    def put_many(self, orders: Sequence[int]) -> None:
        """Ask for many, as fast as the system lets one."""

    @abstractmethod
    def recorded(self) -> int:
        """How many cancels have their record, ever; -1 where none is made."""

    @abstractmethod
    def unrecorded(self, orders: Sequence[int]) -> int:
        """How many of these have no record, or one that says anything but success."""

    def close(self) -> None:
        """Give the connections back."""
        self.redis.close()


class ProjectProducer(Producer):
    """Through the project's client."""

    def __init__(self, url: str, queue: str) -> None:
        super().__init__(url, queue)
        self.client = CancelClient.from_url(url, queue, timeout_s=_CALL_LIMIT_S)

    def put(self, order: int) -> None:
        self.jobs[order] = self.client.cancel(algo_id=order).id

    def put_many(self, orders: Sequence[int]) -> None:
        tickets = self.client.cancel_many([CancelRequest(algo_id=order) for order in orders])
        self.jobs |= {order: ticket.id for order, ticket in zip(orders, tickets, strict=True)}

    def recorded(self) -> int:
        try:
            return int(self.redis.xinfo_stream(self.client.keys.outcomes)["entries-added"])
        except redis.ResponseError:
            return 0  # no ledger yet

    def unrecorded(self, orders: Sequence[int]) -> int:
        outcomes = self.client.outcomes_of(self.jobs[order] for order in orders)
        return len(orders) - sum(outcome.off_the_book for outcome in outcomes.values())

    def close(self) -> None:
        self.client.close()
        super().close()


class RqProducer(Producer):
    """Through RQ's own queue."""

    def __init__(self, url: str, queue: str) -> None:
        super().__init__(url, queue)
        self._queue = Queue(queue, connection=self.redis, serializer="json")
        self._finished = FinishedJobRegistry(queue=self._queue)
        self._retry = RqRetry(max=3, interval=[1, 2, 4])

    def put(self, order: int) -> None:
        self.jobs[order] = self._queue.enqueue("tests.bench.rq_job.cancel", order, retry=self._retry).id

    def put_many(self, orders: Sequence[int]) -> None:
        data = [Queue.prepare_data("tests.bench.rq_job.cancel", (order,), retry=self._retry) for order in orders]
        jobs = self._queue.enqueue_many(data)
        self.jobs |= {order: job.id for order, job in zip(orders, jobs, strict=True)}

    def recorded(self) -> int:
        return int(self.redis.zcard(self._finished.key))

    def unrecorded(self, orders: Sequence[int]) -> int:
        finished = set(self._finished.get_job_ids(cleanup=False))
        return sum(self.jobs[order] not in finished for order in orders)


class FloorProducer(Producer):
    """A bare push."""

    def put(self, order: int) -> None:
        self.redis.rpush(floor.LIST, order)

    def put_many(self, orders: Sequence[int]) -> None:
        self.redis.rpush(floor.LIST, *orders)

    def recorded(self) -> int:
        return -1

    def unrecorded(self, orders: Sequence[int]) -> int:
        return 0


@dataclass(frozen=True)
class System:
    """One of those that are compared."""

    name: str
    queue: str  # its own: nothing of one system stands in another's way
    command: tuple[str, ...]
    producer: Callable[[str, str], Producer]
    most_in_flight: int
    pace_s: float  # between two cancels, so that each one finds an idle worker

    @property
    def title(self) -> str:
        """As people read it."""
        return TITLES[self.name]


def _stock(worker_class: str, queue: str) -> tuple[str, ...]:
    # Without its scheduler stock RQ would not retry at all.
    options = ("--serializer", "json", "--worker-class", worker_class, "--with-scheduler", "--quiet")
    return (sys.executable, "-m", "rq.cli", "worker", queue, *options)


PROJECT = System("project", PROJECT_QUEUE, (), ProjectProducer, 512, 0.03)
RQ_SIMPLE = System("rq-simple", "simple", _stock("rq.SimpleWorker", "simple"), RqProducer, 1, 0.03)
RQ_WORKER = System("rq-worker", "forking", _stock("rq.Worker", "forking"), RqProducer, 1, 0.12)
FLOOR = System("floor", floor.LIST, (sys.executable, "-m", "tests.bench.floor"), FloorProducer, 1, 0.03)
SYSTEMS = (PROJECT, RQ_SIMPLE, RQ_WORKER, FLOOR)


@dataclass(frozen=True)
class Running:
    """A system at work: its worker process, and a way to its queue."""

    system: System
    worker: Worker
    in_flight: int
    producer: Producer

    @property
    def pid(self) -> int:
        """Of the worker's process."""
        return self.worker.process.pid


@contextlib.contextmanager
def running(
    system: System, rig: Rig, in_flight: int = 64, *, far: bool = False, environment: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """A worker of ``system`` for the length of a block; it need not have joined its queue when the block begins.

    ``environment`` goes to the worker beside what every worker is told.
    """
    in_flight = min(in_flight, system.most_in_flight)
    url = rig.far_url if far else rig.valkey.url
    fleet = Workers(Path(mkdtemp(dir=rig.directory)), rig.environment(far))
    producer = system.producer(url, system.queue)
    try:
        # RQ's command line has a name of its own for the address.
        options: dict[str, Any] = {"WORKER_CONCURRENCY": str(in_flight), "RQ_REDIS_URL": url, **(environment or {})}
        worker = fleet.start(command=system.command or WORKER, wait=False, **options)
        yield Running(system, worker, in_flight, producer)
    finally:
        producer.close()
        fleet.stop()


def wait_recorded(producer: Producer, count: int, limit_s: float) -> bool:
    """Wait until ``count`` cancels have their record; False if some have not within ``limit_s``."""
    ends_at = time.monotonic() + limit_s
    while -1 < producer.recorded() < count:
        if time.monotonic() > ends_at:
            return False
        time.sleep(0.02)
    return True
