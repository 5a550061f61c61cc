"""Fixtures of the tests that drive scripts, worker processes, or the exchange client against little servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import redis
from flask.testing import FlaskClient

from producer import CancelClient
from producer.web.app import create_app
from tests.caller import ACCOUNTS, TIMING, Caller
from tests.holders import Holder, OpenHolder
from tests.loopback import Authority
from tests.processes import child, pipe  # noqa: F401 - fixtures
from tests.rehearsing import demo, relay  # noqa: F401 - fixtures of the rehearsals
from tests.servers import Peek, Valkey, Workers, running_valkey
from tests.ways import WAYS, Bench
from tests.webpages import TOKEN
from worker.sandbox.control import ExchangeConfig, RunningExchange, start_exchange


@pytest.fixture
def peek(connection: redis.Redis) -> Peek:
    """A look at the queue's keys."""
    return Peek(connection)


@pytest.fixture
def full(connection: redis.Redis) -> Iterator[Callable[[], object]]:
    """Makes the server refuse whatever grows; it has room again after the test."""
    yield lambda: connection.config_set("maxmemory", 1)
    connection.config_set("maxmemory", 0)


@pytest.fixture
def open_holder(valkey: Valkey) -> Iterator[OpenHolder]:
    """Makes holders of jobs."""
    holders: list[Holder] = []

    def make(name: str = "w", *, lease_ms: int = 60_000, **options: Any) -> Holder:
        port = options.pop("port", valkey.port)
        holders.append(Holder(port, name, lease_ms=lease_ms, **options))
        return holders[-1]

    yield make
    for holder in holders:
        holder.close()


@pytest.fixture
def holder(open_holder: OpenHolder) -> Holder:
    """A worker of ours, as the scripts know it."""
    return open_holder()


@pytest.fixture(params=WAYS)
def bench(request: pytest.FixtureRequest, authority: Authority) -> Iterator[Bench]:
    """Its clients use the one transport and the other: the rules are the same."""
    with closing(Bench(request.param, authority)) as one:
        yield one


@pytest.fixture
def loop_bench(authority: Authority) -> Iterator[Bench]:
    """For what only the worker's transport promises."""
    with closing(Bench("asyncio", authority)) as one:
        yield one


@pytest.fixture
def requests_bench(authority: Authority) -> Iterator[Bench]:
    """For what only the other one does."""
    with closing(Bench("requests", authority)) as one:
        yield one


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority that clients are told to trust."""
    return Authority(tmp_path_factory.mktemp("ca"), "authority")


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Another one."""
    return Authority(tmp_path_factory.mktemp("ca"), "stranger")


# ---- worker processes ------------------------------------------------------------------------------------------------


NewFleet = Callable[..., Workers]


@pytest.fixture
def new_fleet(workers: Workers, tmp_path: Path) -> Iterator[NewFleet]:
    """Makes fleets of workers whose environment differs from the usual one."""
    made: list[Workers] = []

    def make(**environment: str) -> Workers:
        directory = tmp_path / f"fleet-{len(made)}"
        directory.mkdir()
        made.append(Workers(directory, workers.environment | environment))
        return made[-1]

    yield make
    for fleet in made:
        fleet.stop()


@pytest.fixture
def durable() -> Iterator[Valkey]:
    """A server that loses nothing when it is killed."""
    with running_valkey("--appendonly", "yes", "--appendfsync", "always") as server:
        yield server


# ---- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture
def reader(client: CancelClient) -> Iterator[FlaskClient]:
    """The pages without a token."""
    with create_app(client).test_client() as pages:
        yield pages


@pytest.fixture
def operator(client: CancelClient) -> Iterator[FlaskClient]:
    """The pages with a token, logged in."""
    with create_app(client, TOKEN).test_client() as pages:
        assert pages.post("/login", data={"token": TOKEN}).status_code == 303
        yield pages


# ---- engines ---------------------------------------------------------------------------------------------------------


Logged = Callable[[str], list[dict[str, Any]]]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What a test opens in the midst of it."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Logged:
    """The fields of what this process' engines have logged under a name."""
    caplog.set_level("INFO", "cancel")
    return lambda name: [vars(record)["fields"] for record in list(caplog.records) if record.msg == name]


@pytest.fixture(scope="session")
def shared_exchange() -> Iterator[RunningExchange]:
    """One exchange for all tests of the sandbox; `market` below hands it out empty."""
    with start_exchange(ExchangeConfig(accounts=ACCOUNTS, timing=TIMING)) as running:
        yield running


@pytest.fixture
def market(shared_exchange: RunningExchange) -> RunningExchange:
    """The exchange, empty, without faults but scripted ones."""
    shared_exchange.reset()
    return shared_exchange


@pytest.fixture
def caller(market: RunningExchange) -> Iterator[Caller]:
    """A client of it on one connection."""
    with Caller(market.url) as caller:
        yield caller
