"""Stock RQ workers in this process: RQ's own code and the real job function, interrupted and killed at any round trip.

Two kinds: RQ's SimpleWorker, whose process runs the job itself, and its forking worker, whose horse and parent live and
die apart. Their exchange is a script of answers; the time of a call is when other things happen.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from unittest.mock import patch
from urllib.parse import parse_qs, urlsplit

import rq
from rq import Queue, SimpleWorker
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.utils import now, utcformat
from rq.worker import BaseWorker

import worker.task as task
from tests.model.holders import QUEUE, WatchedStore
from tests.model.interrupted import Killed, Life, open_for
from tests.model.steps import Step
from tests.model.world import World
from worker.clock import ServerClock, local_ns
from worker.exchange import Exchange
from worker.settings import Settings
from worker.transport import Failed, Raw, Request
from worker.wiring import lease_of

#: Share of the horses and of the parents that are killed, and the round trips after which that happens at the latest.
_KILLED, _TRIPS = 0.35, 30
#: Share of those that are told to leave before they begin.
_LEAVING = 0.1
_SIGKILL = 9
OTHER_QUEUE = "others"

#: What the exchange says to a DELETE or a GET, and how often.
_ANSWERS: tuple[tuple[int, int, dict[str, Any] | None], ...] = (
    (6, 200, {"code": "200", "msg": "success"}),
    (3, 400, {"code": -2011, "msg": "Unknown order sent."}),
    (3, 503, {"code": -1008, "msg": "Service Unavailable."}),
    (2, 400, {"code": -4164, "msg": "no such thing"}),
    (2, 401, {"code": -1002, "msg": "You are not authorized."}),
    (3, 0, None),  # no answer at all
)
_STATES = ("NEW", "CANCELED", "TRIGGERED", "FINISHED", "EXPIRED")


@dataclass(slots=True)
class ScriptedExchange:
    """A transport whose other end answers as chance has it."""

    world: World
    life: Life

    async def send(self, make: Callable[[], Request | None], patience_s: float) -> Raw | Failed | None:
        """See :class:`worker.transport.Transport`."""
        self.life.between()
        request = make()
        if request is None:
            return None
        sent_ns = local_ns()
        self.life.between()
        status, said = self._answer(request)
        if said is None:
            return Failed(True, "no answer")
        return Raw(status, {}, json.dumps(said).encode(), True, sent_ns, local_ns())

    def close(self) -> None:
        """Nothing is open."""

    def _answer(self, request: Request) -> tuple[int, Any]:
        chance, target = self.world.chance, urlsplit(request.target)
        if target.path.endswith("/time"):
            return 200, {"serverTime": time.time_ns() // 1_000_000}
        asked = parse_qs(target.query)
        if target.path.endswith("/openAlgoOrders") and chance.random() < 0.7:
            ids = chance.sample(self.world.algo_ids, chance.randint(0, 3))
            known = {"symbol": asked["symbol"][0], "algoStatus": "NEW", "createTime": 10**12}
            return 200, [known | {"algoId": algo_id, "clientAlgoId": f"x{algo_id}"} for algo_id in ids]
        order = {"algoId": int(asked.get("algoId", ["4711"])[0]), "clientAlgoId": asked.get("clientAlgoId", ["x"])[0]}
        if request.method == "GET" and chance.random() < 0.7:
            return 200, order | {
                "algoStatus": chance.choice(_STATES),
                "symbol": "BTCUSDT",
                "createTime": 10**12,
            }
        _, status, said = chance.choices(_ANSWERS, [row[0] for row in _ANSWERS])[0]
        if status == 200 and request.method == "GET":
            return 0, None
        return status, (order | said if status == 200 and said else said)


class Forking(rq.Worker):
    """RQ's forking worker; its horse runs here, by a connection and with a life of its own."""

    ride: Callable[[Job, Queue], int]
    _ended_with = 0

    def fork_work_horse(self, job: Job, queue: Queue) -> None:
        """Run the horse until it is through or dead."""
        self._ended_with = self.ride(job, queue)

    def wait_for_horse(self) -> tuple[int | None, int | None, Any]:
        """How it ended."""
        return 1, self._ended_with, None


@cache
def settings_for(url: str) -> Settings:
    """Those of the stock workers."""
    return Settings.from_env(
        {
            "REDIS_URL": url,
            "BINANCE_API_KEY": "key-of-the-model",
            "BINANCE_API_SECRET": "secret-of-the-model",
            "BINANCE_BASE_URL": "http://127.0.0.1:9",
            "LEASE_S": "1",
            "BACKOFF_BASE_MS": "10",
            "BACKOFF_CAP_MS": "1500",
            "NOT_FOUND_HORIZON_S": "1",
        }
    )


@contextmanager
def _task(world: World, settings: Settings, life: Life) -> Iterator[None]:
    """The job function with a watched store and a scripted exchange; what it waits for is short."""
    clock = ServerClock()
    exchange = Exchange(ScriptedExchange(world, life), recv_window_ms=settings.recv_window_ms, clock=clock)

    def open_store(_: Settings, holder: str, queue: str) -> WatchedStore:
        return WatchedStore(world, holder, round(lease_of(settings) * 1000))

    with (
        patch.object(task, "_exchange", lambda: (settings, exchange, clock)),
        patch.object(task, "open_store", open_store),
        patch.object(task, "_SHORT_WAIT_S", 0.03),
        patch.object(task, "_HELD_S", 1),
        patch.object(task, "_RUN_S", 0.5),
    ):
        yield


class Visit:
    """One stock worker that takes one job."""

    def __init__(self, world: World, settings: Settings, queues: list[str], killed: float = _KILLED) -> None:
        self._world = world
        self._settings = settings
        self._queues = queues
        self._killed = killed
        self._name = f"stock{world.step}-{world.chance.randrange(10**6)}"
        self._popped = ""
        self._is_whole = True  # nothing of it was killed

    def work(self, kind: type[SimpleWorker] | type[Forking]) -> None:
        """Be born, take one job, and go."""
        life = self._life()
        self._world.model.rq_writes()
        try:
            with self._worker(kind, life) as it, _task(self._world, self._settings, life):
                if isinstance(it, Forking):
                    it.ride = partial(self._ride, it)
                self._work(it)
        except Killed:
            self._is_whole = False
            self._world.count["stock workers killed"] += 1
        finally:
            self._goes()

    @contextmanager
    def _worker(self, kind: type[BaseWorker], life: Life, **options: Any) -> Iterator[BaseWorker]:
        connection = open_for(life, self._world)
        try:
            yield kind(self._queues, name=self._name, connection=connection, serializer=JSONSerializer, **options)
        finally:
            connection.close()

    def _work(self, it: BaseWorker) -> None:
        it.register_birth()
        if self._world.chance.random() < 0.2:
            it.run_maintenance_tasks()
        popped = it.dequeue_job_and_maintain_ttl(None)
        if popped is not None:
            self._pops(popped[0].id)
            if self._world.chance.random() < _LEAVING:
                self._world.plain.hset(it.key, "shutdown_requested_date", utcformat(now()))
            it.execute_job(*popped)
            it.heartbeat()
        it.register_death()

    def _ride(self, parent: Forking, job: Job, queue: Queue) -> int:
        life, world = self._life(), self._world
        try:
            with (
                self._worker(rq.Worker, life, prepare_for_work=False) as horse,
                _task(world, self._settings, life),
            ):
                own = copy.copy(job)
                own.connection = horse.connection
                own_queue = Queue(queue.name, connection=horse.connection, serializer=JSONSerializer)
                horse.perform_job(own, own_queue, copy.copy(next(iter(parent.executions.values()))))
                return 0
        except Killed:
            self._is_whole = False
            world.note(job.id, f"{self._name}'s horse is killed")
            world.count["horses killed"] += 1
            return _SIGKILL

    def _life(self) -> Life:
        chance = self._world.chance
        return Life(self._world, chance.randint(0, _TRIPS) if chance.random() < self._killed else None)

    def _pops(self, job_id: str) -> None:
        self._popped = job_id
        self._world.in_rqs_hands[job_id] += 1
        self._world.note(job_id, f"is popped by {self._name} on {', '.join(self._queues)}")

    def _goes(self) -> None:
        world, job_id = self._world, self._popped
        if not job_id:
            return
        world.in_rqs_hands[job_id] -= 1
        if not self._is_whole:
            world.left_behind.add(job_id)
        world.note(job_id, f"{self._name} is {'through' if self._is_whole else 'dead, or its horse is'}")
        world.count["jobs popped by stock workers"] += 1


def _steps(world: World, kind: type[SimpleWorker] | type[Forking]) -> None:
    queues = [QUEUE] if world.chance.random() < 0.6 else [QUEUE, OTHER_QUEUE]
    Visit(world, settings_for(world.url), queues).work(kind)


def simple(world: World) -> None:
    """RQ's SimpleWorker takes a job."""
    _steps(world, SimpleWorker)


def forking(world: World) -> None:
    """RQ's forking worker takes a job."""
    _steps(world, Forking)


STOCK = (Step(4, simple, may_nest=False), Step(5, forking, may_nest=False))
