"""The benchmark works: its servers do what they say, and a short run measures, reports, and loses nothing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest
import redis

from tests.bench.behaviour import Monitor
from tests.bench.common import median_ping_ms
from tests.bench.endurance import expire, seed_records
from tests.bench.figures import Idle, Results
from tests.bench.plot import draw
from tests.bench.rig import ACCOUNT, Exchange, Rig, open_rig
from tests.bench.signing import signed_target
from tests.bench.systems import PROJECT_QUEUE
from tests.servers import ROOT, Peek, eventually

SECRET = ACCOUNT["BINANCE_API_SECRET"].encode()


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """The benchmark's servers, Redis 4 ms away both ways together."""
    with open_rig(2.0) as running:
        yield running


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    command = [sys.executable, "-m", "tests.bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def send(exchange: Exchange, method: str, target: str) -> int:
    """One request to the exchange; its status."""
    connection = HTTPConnection("127.0.0.1", exchange.port, timeout=10)
    try:
        connection.request(method, target)
        return connection.getresponse().status
    finally:
        connection.close()


def test_a_short_run_measures_and_reports() -> None:
    """Two systems, two measurements: exit code 0, one JSON object on stdout, tables on stderr, nothing lost."""
    done = bench("--quick", "--only", "idle", "calls", "project", "floor", "--json", "-")

    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["losses"] == []
    assert {one["system"] for one in record["results"]["idle"]} == {"project", "floor"}
    for one in record["results"]["idle"]:
        assert one["latencies_ms"]
        assert min(one["latencies_ms"]) > 0
        assert len(one["latencies_ms"]) == len(one["calls_ms"])
        assert one["repeats"] == 0
    assert record["results"]["burst"] == record["results"]["memory"] == []
    assert {ratio["to"] for ratio in record["ratios"]} == {"bare BLPOP + DELETE", "a bare PING"}
    assert record["environment"]["cores"] >= 1
    assert "Idle latency" in done.stderr
    assert "bare BLPOP + DELETE" in done.stderr


def test_a_plot_is_drawn_or_refused(tmp_path: Path) -> None:
    """With matplotlib there is a PNG; without it the command says, before it measures anything, what to install."""
    file = tmp_path / "plot.png"
    idle = Idle("project", 0, 0.1, [1.0, 2.0], [0.1, 0.1], 0, 0, 0)

    if importlib.util.find_spec("matplotlib") is None:
        done = bench("--quick", "--plot", str(file))
        assert done.returncode == 2
        assert "[bench]" in done.stderr
    else:
        draw(Results(idle=[idle]), file, "a machine")
        assert file.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_name_is_refused() -> None:
    """A name that is neither measurement nor system is named, with exit code 2."""
    done = bench("--only", "idle", "nonsense")

    assert done.returncode == 2
    assert "nonsense" in done.stderr


def test_the_exchange_checks_signatures_and_notes_arrivals(rig: Rig) -> None:
    """A cancel with a wrong signature is refused and counted; a right one is noted with its time, each time."""
    rig.exchange.reset(delay_ms=0)
    began_ns = time.time_ns()

    assert send(rig.exchange, "DELETE", signed_target(1, b"another secret")) == 400
    assert rig.exchange.state()["bad"] == 1
    assert [send(rig.exchange, "DELETE", signed_target(2, SECRET)) for _ in range(2)] == [200, 200]

    arrivals = rig.exchange.arrivals()
    assert list(arrivals) == [2]
    assert began_ns < arrivals[2][0][0] < arrivals[2][1][0] < time.time_ns()
    assert rig.exchange.wait_for(1, 1, again=True)
    assert not rig.exchange.wait_for(2, 0.05)


def test_the_exchange_answers_as_it_was_told(rig: Rig) -> None:
    """It can refuse each order's first cancel, and answer late: one order later than the others."""
    rig.exchange.reset(delay_ms=20, refuses_first=True, slow=4, slow_ms=200)

    took_ms = []
    for order, expected in ((3, 503), (3, 200), (4, 503), (4, 200)):
        began = time.monotonic()
        assert send(rig.exchange, "DELETE", signed_target(order, SECRET)) == expected
        took_ms.append(1000 * (time.monotonic() - began))

    assert min(took_ms) >= 19
    assert took_ms[3] >= 199


def test_redis_is_as_far_away_as_was_asked(rig: Rig) -> None:
    """The proxy adds its distance to each way, and not a multiple of it."""
    with redis.Redis.from_url(rig.far_url) as far:
        assert 4.0 <= median_ping_ms(far) < 20.0
    assert median_ping_ms(rig.redis) < 4.0


def test_due_times_are_read_from_what_the_server_executes(rig: Rig) -> None:
    """The first score of a job in the registry is taken, also if a script wrote it."""
    script = "redis.call('ZADD', KEYS[1], ARGV[1], 'job')"
    with Monitor(rig.valkey.port) as monitor:
        rig.redis.eval(script, 1, "registry", "1700000000.250000")
        rig.redis.zadd("registry", {"job": 1800000000}, xx=True)
        rig.redis.zadd("another", {"stranger": 1})

    assert monitor.scheduled("registry") == {"job": 1700000000.25}


def test_seeds_look_like_earlier_jobs_and_go_with_time(rig: Rig) -> None:
    """Ledger and registries are as full as was asked; what carries an expiry, and only that, can be expired at once."""
    rig.redis.flushall()
    peek = Peek(rig.redis, PROJECT_QUEUE)

    seed_records(rig.redis, 1500, 100)

    assert len(peek.ledger()) == 100
    assert peek("ZCARD", peek.keys.failed) == peek("ZCARD", peek.keys.scheduled) == 1500
    assert peek("ZCARD", peek.keys.finished) == 1650
    assert expire(rig.redis) == 1500
    assert eventually(lambda: peek("DBSIZE") == 3)  # ledger, retries, jobs in somebody's hand
