"""What the fault tests share: scaled waits, stages with servers that can be hurt, and looks from outside.

Most of a fault's time is waiting: for a lease to run out, for a server to come back. So a module plays all of its
scenes at the same time, each on servers or queues of its own, and each test then asks how its scene ended.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from producer import CancelClient
from tests.conftest import API_KEY, API_SECRET
from tests.fault.proxy import Proxy
from tests.servers import Valkey, Worker, Workers, eventually, running_valkey
from worker.sandbox.control import ExchangeConfig, RunningExchange, start_exchange
from worker.settings import Settings
from worker.store import Request, Store
from worker.wiring import open_store

T = TypeVar("T")

#: Waits scaled down from the defaults, so that a lease can run out many times in a test run.
LEASE_S = 1.0
#: How long after a holder's death its jobs may stay where they are (design.md 6), s.
TAKEN_OVER_S = LEASE_S + 1.5
FAST = {
    "LEASE_S": "1",
    "BACKOFF_BASE_MS": "50",
    "BACKOFF_CAP_MS": "500",
    "NOT_FOUND_HORIZON_S": "2",
    "CANCEL_DEADLINE_S": "60",
}
#: Writes that were acknowledged are on the disk: the server may be killed.
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")


class Stage:
    """Where one scene is played; everything on it ends with the scene."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = ExitStack()
        self.scenery: Any = None  # what an earlier scene of the row has built

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def enter(self, thing: AbstractContextManager[T]) -> T:
        """Keep something open until the end of the scene."""
        return self._stack.enter_context(thing)

    def valkey(self, *options: str) -> Valkey:
        """A server of the scene's own."""
        return self.enter(running_valkey(*(options or DURABLE)))

    def proxy(self, valkey: Valkey) -> Proxy:
        """A proxy in front of it."""
        return self.enter(Proxy(valkey.port))

    def exchange(self, latency_ms: float = 0.0) -> RunningExchange:
        """An exchange of the scene's own, without faults of its own."""
        accounts = {"default": (API_KEY, API_SECRET)}
        return self.enter(start_exchange(ExchangeConfig(accounts, latency_ms=latency_ms)))

    def fleet(self, redis_url: str, exchange: RunningExchange, **settings: str) -> Workers:
        """Starts workers on these two, with the waits scaled."""
        directory = self._directory / f"fleet-{len(list(self._directory.iterdir()))}"
        directory.mkdir()
        workers = Workers(directory, environment(redis_url, exchange.url) | settings)
        self._stack.callback(workers.stop)
        return workers

    def client(self, redis_url: str, queue: str = "cancels", timeout_s: float = 2.0) -> CancelClient:
        """A producers' client."""
        return self.enter(CancelClient.from_url(redis_url, queue, timeout_s=timeout_s))

    def direct(self, valkey: Valkey) -> redis.Redis:
        """A connection that goes around every proxy."""
        connection: redis.Redis = redis.Redis(port=valkey.port, retry=Retry(NoBackoff(), 0))
        self._stack.callback(connection.close)
        return connection


Scene: TypeAlias = Callable[[Stage], None]


class Scenes(dict[str, Scene]):
    """A module's scenes by name. Each is a function whose docstring says the rule that it shows."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[str, list[str]] = {}  # by the name of the first scene

    def add(self, scene: Scene) -> Scene:
        """Decorator: a scene on a stage of its own."""
        return self._note(scene, scene)

    def after(self, first: Scene) -> Callable[[Scene], Scene]:
        """Decorator: a scene on the stage of ``first``, when what is noted for it before has been played."""
        return lambda scene: self._note(scene, first)

    def play(self, directory: Path) -> dict[str, Future[None]]:
        """Play all of them; gives how each ended."""
        ends: dict[str, Future[None]] = {name: Future() for name in self}

        def play_row(names: list[str]) -> None:
            place = directory / names[0]
            place.mkdir()
            with Stage(place) as stage:
                for name in names:
                    try:
                        ends[name].set_result(self[name](stage))
                    except BaseException as error:  # noqa: BLE001 - its test raises it
                        ends[name].set_exception(error)

        with ThreadPoolExecutor(len(self._rows)) as pool:
            for row in [pool.submit(play_row, names) for names in self._rows.values()]:
                row.result()
        return ends

    def _note(self, scene: Scene, first: Scene) -> Scene:
        self[scene.__name__] = scene
        self._rows.setdefault(first.__name__, []).append(scene.__name__)
        return scene


@pytest.fixture(scope="module")
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[None]]:
    """How the scenes of the module (its ``SCENES``) ended."""
    scenes: Scenes = request.module.SCENES
    return scenes.play(tmp_path_factory.mktemp(request.module.__name__.rpartition(".")[2]))


def environment(redis_url: str, exchange_url: str) -> dict[str, str]:
    """The settings of a worker on these two."""
    keys = {"BINANCE_API_KEY": API_KEY, "BINANCE_API_SECRET": API_SECRET}
    return {**FAST, **keys, "REDIS_URL": redis_url, "BINANCE_BASE_URL": exchange_url}


def store_like(settings: Mapping[str, str]) -> Store:
    """A store that calls the same scripts as the workers with these settings: settings are put into the scripts."""
    return open_store(Settings.from_env(settings), "a-test", "cancels")


def mark_of(request: Request[Any]) -> bytes:
    """What a request is known by on its way."""
    assert request.script is not None
    return request.script.sha.encode()


def wait_for_line(worker: Worker, text: str, timeout_s: float = 20.0) -> None:
    """Wait until the worker has printed ``text``."""
    eventually(
        lambda: text in worker.output() or worker.process.poll() is not None, timeout_s, f"{text!r} in {worker.log}"
    )
    assert text in worker.output(), worker.output()


def name_of(worker: Worker) -> str:
    """The worker's name in RQ, from its own log."""
    found = re.search(r"event=started worker=(\S+)", worker.output())
    assert found is not None, worker.output()
    return found[1]


def is_running(worker: Worker) -> bool:
    """Whether the process has not ended."""
    return worker.process.poll() is None


def cpu_s(pid: int) -> float:
    """CPU time that a process has used so far, all threads, user and system, seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def state(pid: int) -> str:
    """A process' state as the kernel names it; T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(") ")[2][0]
