"""Fixtures: nothing of the project's settings leaks in, and every server is a real one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from hypothesis import settings

from producer import CancelClient
from tests.examples import examples
from tests.servers import Valkey, Workers, eventually, running_valkey, scrubbed
from worker.sandbox.control import ExchangeConfig, RunningExchange, start_exchange

# A runner in the background may have Ctrl-C ignored, and every process that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("here", examples(100))
settings.load_profile("here")

API_KEY = "sandbox-key-of-the-tests"
API_SECRET = "sandbox-secret-of-the-tests"


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in set(os.environ) - set(scrubbed()):
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def _valkey_process() -> Iterator[Valkey]:
    with running_valkey("--appendonly", "no") as server:
        yield server


@pytest.fixture
def valkey(_valkey_process: Valkey) -> Valkey:
    """A real server, empty at the start of each test."""
    with redis.Redis(port=_valkey_process.port) as client:
        client.flushall()
    return _valkey_process


@pytest.fixture
def connection(valkey: Valkey) -> Iterator[redis.Redis]:
    """A plain connection to it, to look at keys."""
    with redis.Redis(port=valkey.port) as client:
        yield client


@pytest.fixture
def client(valkey: Valkey) -> Iterator[CancelClient]:
    """The producers' client on it."""
    with CancelClient.from_url(valkey.url) as client:
        yield client


@pytest.fixture(scope="session")
def _exchange_process() -> Iterator[RunningExchange]:
    with start_exchange(ExchangeConfig(accounts={"default": (API_KEY, API_SECRET)})) as running:
        yield running


@pytest.fixture
def exchange(_exchange_process: RunningExchange) -> RunningExchange:
    """A local exchange that knows the account `default` of the tests, injects no fault of its own, and is empty."""
    _exchange_process.reset()
    eventually(lambda: _exchange_process.stats().in_flight == 0, what="nobody's request is left")
    return _exchange_process


@pytest.fixture
def workers(valkey: Valkey, exchange: RunningExchange, tmp_path: Path) -> Iterator[Workers]:
    """Starts worker processes on that server and exchange."""
    fleet = Workers(
        tmp_path,
        {
            "REDIS_URL": valkey.url,
            "BINANCE_BASE_URL": exchange.url,
            "BINANCE_API_KEY": API_KEY,
            "BINANCE_API_SECRET": API_SECRET,
        },
    )
    try:
        yield fleet
    finally:
        fleet.stop()
