"""The users of Redis that worker/docs/operating.md describes: each can do its part, and no more."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from producer import CancelClient, CancelRequest, OutcomeKind
from producer.web.app import create_app
from tests.conftest import API_KEY, API_SECRET
from tests.exporting import exporting
from tests.orders import PROVEN_S, opened
from tests.servers import ROOT, Valkey, Workers, running_valkey
from worker.sandbox.control import RunningExchange
from worker.sandbox.faults import Fault

LINES = re.findall(r"^ACL SETUSER (\w+) (.*)$", (ROOT / "worker/docs/operating.md").read_text("utf-8"), re.MULTILINE)


@pytest.fixture
def guarded() -> Iterator[Valkey]:
    """A server with these users, on which nobody else may do anything."""
    with running_valkey("--appendonly", "yes") as server:
        with redis.Redis(port=server.port) as connection:
            for name, rights in LINES:
                connection.execute_command("ACL", "SETUSER", name, *rights.split())
        yield server


def url_of(server: Valkey, name: str) -> str:
    """The server's URL with the login of a user."""
    return server.url.replace("//", f"//{name}:{name.upper()}-PASSWORD@")


def denied(server: Valkey) -> list[str]:
    """What was refused so far for want of a right."""
    with redis.Redis(port=server.port) as connection:
        log = connection.execute_command("ACL", "LOG")
    return [f"{entry['username']}: {entry['reason']} {entry['object']}" for entry in log]


def test_each_user_can_do_its_part(guarded: Valkey, exchange: RunningExchange, tmp_path: Path) -> None:
    """Worker, strategy, reader and operator live through an order's life, a retry, a pause and a cancel of all that is
    open without one refusal."""
    assert {name for name, _ in LINES} == {"worker", "strategy", "operator", "reader"}
    environment = {
        "REDIS_URL": url_of(guarded, "worker"),
        "BINANCE_BASE_URL": exchange.url,
        "BINANCE_API_KEY": API_KEY,
        "BINANCE_API_SECRET": API_SECRET,
        "BACKOFF_CAP_MS": "200",
    }
    fleet = Workers(tmp_path, environment)
    try:
        worker = fleet.start()
        with CancelClient.from_url(url_of(guarded, "strategy")) as strategy:
            good, late, bad = opened(exchange, 3)
            exchange.script_faults(late, [Fault.UNAVAILABLE_503, Fault.LIMITED_1003])
            exchange.script_faults(bad, [Fault.INVALID_1013, Fault.KEY_2015])
            assert strategy.cancel(algo_id=good, durable=True).wait(20).kind is OutcomeKind.CANCELLED
            tickets = strategy.cancel_many([CancelRequest(algo_id=late), CancelRequest(algo_id=bad)])
            assert [ticket.wait(30).kind for ticket in tickets] == [OutcomeKind.CANCELLED, OutcomeKind.REFUSED]
            assert len(list(strategy.outcomes())) == 3
            with CancelClient.from_url(url_of(guarded, "operator")) as operator:
                for kind in (OutcomeKind.REFUSED, OutcomeKind.CANCELLED):  # the first time by its key
                    assert operator.retry([tickets[1]]) == [tickets[1].id]
                    assert tickets[1].wait(20).kind is kind
            opened(exchange, 1)
            time.sleep(PROVEN_S)
            assert strategy.cancel_open("BTCUSDT").wait(30).kind is OutcomeKind.CANCELLED
        with CancelClient.from_url(url_of(guarded, "reader")) as reader:
            assert (reader.status().live_workers, reader.status().damaged) == (1, ())
            assert len(list(reader.outcomes())) == 8  # two of them listings
            with create_app(reader).test_client() as pages:
                assert {pages.get(path).status_code for path in ("/", "/failed", f"/search?q={good}")} == {200}
        with exporting(url_of(guarded, "reader")) as exporter:
            assert exporter.scrape()["cancel_up", ()] == 1
        worker.stop()
        health = fleet.start("health", wait=False)
        assert health.process.wait(20) == 1
    finally:
        fleet.stop()

    assert denied(guarded) == []


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("reader", ("SET", "cancels:outcome:x", "1")),
        ("reader", ("DEL", "rq:queue:cancels")),
        ("reader", ("HSET", "gate:all", "until_ms", "0")),
        ("strategy", ("HSET", "gate:all", "until_ms", "0")),
        ("strategy", ("GET", "somebody-elses")),
        ("operator", ("FLUSHALL",)),
        ("worker", ("CONFIG", "GET", "requirepass")),
        ("worker", ("KEYS", "*")),
        ("worker", ("SET", "somebody-elses", "1")),
    ],
)
def test_no_user_can_do_more(name: str, command: tuple[str, ...], guarded: Valkey) -> None:
    """What is not its part is refused."""
    with (
        redis.Redis.from_url(url_of(guarded, name)) as connection,
        pytest.raises(redis.exceptions.NoPermissionError),
    ):
        connection.execute_command(*command)


def test_a_check_is_content_with_the_workers_user(guarded: Valkey, exchange: RunningExchange, tmp_path: Path) -> None:
    """Without INFO there is a warning, and nothing else is missing."""
    environment = {
        "REDIS_URL": url_of(guarded, "worker"),
        "BINANCE_BASE_URL": exchange.url,
        "BINANCE_API_KEY": API_KEY,
        "BINANCE_API_SECRET": API_SECRET,
    }
    fleet = Workers(tmp_path, environment)
    try:
        done = fleet.start(command=(sys.executable, "-m", "worker", "check"), wait=False)
        assert done.process.wait(60) == 0, done.output()
        assert "FAILED" not in done.output()
    finally:
        fleet.stop()
