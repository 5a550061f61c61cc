"""What the fault tests share: scaled waits, servers that can be hurt, proxies, and looks from outside."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.conftest import API_KEY, API_SECRET
from tests.fault.proxy import Proxy
from tests.servers import Valkey, Worker, Workers, eventually, running_valkey
from worker.sandbox.control import RunningExchange

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


@pytest.fixture
def durable() -> Iterator[Valkey]:
    """A server of the test's own that has every acknowledged write on its disk, and so may be killed."""
    with running_valkey("--appendonly", "yes", "--appendfsync", "always") as server:
        yield server


@pytest.fixture
def proxy(durable: Valkey) -> Iterator[Proxy]:
    """A proxy in front of it."""
    with Proxy(durable.port) as proxy:
        yield proxy


@pytest.fixture
def direct(durable: Valkey) -> Iterator[redis.Redis]:
    """A connection that goes around the proxy."""
    with redis.Redis(port=durable.port) as client:
        yield client


@pytest.fixture
def fleet(proxy: Proxy, exchange: RunningExchange, tmp_path: Path) -> Iterator[Workers]:
    """Starts workers that reach their Redis through the proxy, with the waits scaled."""
    workers = Workers(tmp_path, environment(proxy.redis_url, exchange.url))
    try:
        yield workers
    finally:
        proxy.close()  # workers that are cut off must not hold up the end
        workers.stop()


def environment(redis_url: str, exchange_url: str) -> dict[str, str]:
    """The settings of a worker on these two."""
    keys = {"BINANCE_API_KEY": API_KEY, "BINANCE_API_SECRET": API_SECRET}
    return {**FAST, **keys, "REDIS_URL": redis_url, "BINANCE_BASE_URL": exchange_url}


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


def cpu_share(pid: int, over_s: float) -> float:
    """How much of one core a process uses, watched for so long."""
    before, began = cpu_s(pid), time.monotonic()
    eventually(lambda: time.monotonic() - began >= over_s, over_s + 5)
    return (cpu_s(pid) - before) / (time.monotonic() - began)
