"""`python -m worker check` against real servers: what is there is said to be, and what is not is named."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import API_KEY, API_SECRET
from tests.servers import ROOT, Valkey, free_port, running_valkey, scrubbed
from worker.__main__ import EX_CONFIG, EX_OK, EX_UNAVAILABLE
from worker.sandbox.control import RunningExchange
from worker.sandbox.faults import Fault


@pytest.fixture
def environment(valkey: Valkey, exchange: RunningExchange) -> dict[str, str]:
    """Settings with which everything is in order."""
    return scrubbed() | {
        "REDIS_URL": valkey.url,
        "BINANCE_BASE_URL": exchange.url,
        "BINANCE_API_KEY": API_KEY,
        "BINANCE_API_SECRET": API_SECRET,
    }


def check(environment: dict[str, str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    command = [sys.executable, "-m", "worker", "check"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


def test_everything_is_there(environment: dict[str, str], exchange: RunningExchange) -> None:
    """With Redis, exchange and key in order each is said to be, the exit code is 0, and no order was touched."""
    order = exchange.add_orders(1)[0]

    code, said, complaints = check(environment)

    assert (code, complaints) == (EX_OK, "")
    assert [line.split()[0] for line in said.splitlines()] == ["ok"] * 5
    assert "2400 weight a minute" in said
    assert API_SECRET not in said
    entry = exchange.book()[order.algo_id]
    assert (entry.status, entry.deletes) == ("NEW", 0)


def test_a_refused_key_is_a_bad_setting(environment: dict[str, str]) -> None:
    """A key that the exchange does not know is named with the exchange's words; the exit code is that of settings."""
    code, said, _ = check(environment | {"BINANCE_API_KEY": "nobody-knows-this-key"})

    assert code == EX_CONFIG
    assert "FAILED  key of default" in said
    assert "-2015" in said


def test_a_key_that_gets_no_clear_answer_is_not_called_good(
    environment: dict[str, str], exchange: RunningExchange
) -> None:
    """While the exchange refuses everybody, the key is neither accepted nor refused."""
    exchange.start_incident(Fault.LIMITED_429, duration_ms=60_000)

    code, said, _ = check(environment)

    assert code == EX_UNAVAILABLE
    assert "FAILED  exchange" in said


def test_redis_that_is_not_there_is_one_line(environment: dict[str, str]) -> None:
    """An unreachable Redis is said in one line with its address, not in a traceback."""
    port = free_port()

    code, said, complaints = check(environment | {"REDIS_URL": f"redis://:hunter2@127.0.0.1:{port}/0"})

    assert (code, complaints) == (EX_UNAVAILABLE, "")
    assert f"127.0.0.1:{port}" in said
    assert "hunter2" not in said


def test_redis_that_refuses_the_login_is_said(environment: dict[str, str]) -> None:
    """A wrong password is told apart from a server that is away, and not repeated."""
    with running_valkey("--requirepass", "right") as server:
        code, said, _ = check(environment | {"REDIS_URL": f"redis://:wrong-one@127.0.0.1:{server.port}/0"})

    assert code == EX_UNAVAILABLE
    assert "refused the login" in said
    assert "wrong-one" not in said


def test_an_exchange_that_is_not_there_is_said(environment: dict[str, str]) -> None:
    """Without the exchange's time nothing else of it is asked, and the exit code says unreachable."""
    code, said, _ = check(environment | {"BINANCE_BASE_URL": f"http://127.0.0.1:{free_port()}"})

    assert code == EX_UNAVAILABLE
    assert "does not tell its time" in said
    assert "key of" not in said
