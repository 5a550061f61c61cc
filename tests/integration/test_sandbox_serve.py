"""`python -m worker sandbox --serve` as people run it: a strategy of theirs finds a Redis, an exchange and workers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from producer import CancelClient, OutcomeKind
from tests.caller import OPEN_ORDERS, Caller
from tests.sandboxes import Sandbox, running
from tests.servers import eventually, free_port, python


def serving(directory: Path, *options: str) -> contextlib.AbstractContextManager[Sandbox]:
    """The command for the length of a block."""
    return running(directory, "--serve", "--workers", "1", "--faults", "none", *options)


def ask(url: str, asked: object) -> Any:
    """A control call, as the printed lines say."""
    request = urllib.request.Request(url, json.dumps(asked).encode())
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def test_a_strategy_works_with_it(tmp_path: Path) -> None:
    """The printed URLs lead to a queue that is served and an exchange with the printed orders; more can be opened."""
    with serving(tmp_path, "--orders", "3", "--json") as sandbox:
        place = sandbox.place()
        ids = [order["algo_id"] for order in place["orders"]]
        with Caller(place["binance_base_url"], place["binance_api_key"], place["binance_api_secret"]) as own:
            assert [order["algoId"] for order in own.call("GET", OPEN_ORDERS).json] == sorted(ids)
        (more,) = ask(place["control_url"] + "orders", {"orders": [{"symbol": "BTCUSDT", "client_algo_id": ""}]})
        ask(place["control_url"] + "move", {"algo_id": ids[1], "move": "expire"})
        with CancelClient.from_url(place["redis_url"]) as client:
            kinds = [client.cancel(algo_id=algo_id).wait(30).kind for algo_id in (*ids, more[0], 999)]
        code, said = sandbox.stop(signal.SIGTERM)

    kind = OutcomeKind.CANCELLED
    assert place["binance_api_secret"] not in said
    assert kinds == [kind, OutcomeKind.EXPIRED, kind, kind, OutcomeKind.NOT_FOUND]
    assert (code, said) == (0, "sandbox: stopped\n")


def test_a_shell_can_evaluate_it(tmp_path: Path) -> None:
    """Without --json it prints variables and comments, in which a shell finds all it needs."""
    with serving(tmp_path, "--orders", "2", "--seed", "7") as sandbox:
        lines = sandbox.lines(11)
        script = "\n".join([*lines, 'echo "$REDIS_URL $BINANCE_BASE_URL $BINANCE_API_KEY $BINANCE_API_SECRET"'])
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=20, check=True)
        redis_url, base_url, key, secret = done.stdout.split()
        with Caller(base_url, key, secret) as caller:
            assert len(caller.call("GET", OPEN_ORDERS).json) == 2
        with CancelClient.from_url(redis_url) as client:
            assert len(client.status().workers) == 1
        numbers = [int(word) for word in lines[5].partition(":")[2].split()]
        with urllib.request.urlopen(urllib.request.Request(f"{base_url}/_sandbox/book"), timeout=10) as answer:
            assert [order["algo_id"] for order in json.load(answer)] == numbers
        assert len(numbers) == 2
        assert all(line.startswith(("export ", "# ")) for line in lines)


def test_its_secret_goes_to_stdout_alone(tmp_path: Path) -> None:
    """Neither Redis, nor the workers' logs, nor any process' command line has the key that is printed."""
    logs = tmp_path / "logs"
    with serving(tmp_path, "--orders", "1", "--json", "--keep-logs", str(logs)) as sandbox:
        place = sandbox.place()
        with CancelClient.from_url(place["redis_url"]) as client:
            client.cancel(algo_id=place["orders"][0]["algo_id"]).wait(30)
        with redis.Redis.from_url(place["redis_url"]) as connection:
            stored = [connection.dump(key) or b"" for key in connection.scan_iter()]
        told = [Path(f"/proc/{number}/cmdline").read_bytes() for number in sandbox.parts()]
        sandbox.stop(signal.SIGTERM)
    written = [path.read_bytes() for path in logs.iterdir()]
    assert stored
    assert written
    for name in ("binance_api_key", "binance_api_secret"):
        assert not any(place[name].encode() in text for text in (*stored, *told, *written))


def test_its_help_names_the_controls() -> None:
    """--help says how orders are triggered, filled and broken, and what agreement with the sandbox does not prove."""
    done = python("-m", "worker", "sandbox", "--serve", "--help")
    for word in ("trigger", "fill", "expire", "reject", "end_child", "mark_price", "child_after_ms", "proves nothing"):
        assert word in done.stdout


@pytest.fixture
def _hangup() -> Iterator[None]:
    """Under nohup SIGHUP is ignored, and processes inherit that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("_hangup")
@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_nothing_is_left_behind(tmp_path: Path, how: signal.Signals, code: int) -> None:
    """However it is stopped, its processes and its files are gone, and the exit code says how."""
    with serving(tmp_path, "--orders", "1", "--json") as sandbox:
        sandbox.place()
        assert len(sandbox.parts()) == 4  # itself, Redis, the exchange, a worker
        assert list(tmp_path.iterdir()) != []
        assert sandbox.stop(how) == (code, "sandbox: stopped\n")
        eventually(lambda: not sandbox.parts(), what="no process is left")
        assert list(tmp_path.iterdir()) == []


def test_ports_can_be_chosen(tmp_path: Path) -> None:
    """A strategy's configuration can stay as it is from one day to the next."""
    port, redis_port = free_port(), free_port()
    with serving(tmp_path, "--orders", "1", "--json", "--port", str(port), "--redis-port", str(redis_port)) as sandbox:
        place = sandbox.place()
        assert place["binance_base_url"] == f"http://127.0.0.1:{port}"
        assert place["redis_url"] == f"redis://127.0.0.1:{redis_port}/0"
        with serving(tmp_path, "--port", str(port)) as second:
            code, _, said = second.ended()
            assert code == 69
            assert f"port {port}" in said
            assert "error: " in said


def test_a_part_that_dies_ends_it(tmp_path: Path) -> None:
    """A strategy is not left with half of its surroundings: the command ends and says what is missing."""
    with serving(tmp_path, "--orders", "1", "--json") as sandbox:
        place = sandbox.place()
        (server,) = sandbox.parts(f"127.0.0.1:{place['redis_url'].rpartition(':')[2].removesuffix('/0')}")
        os.kill(server, signal.SIGKILL)
        code, _, said = sandbox.ended()

        assert code == 69
        assert "ended by itself with exit code -9" in said
        eventually(lambda: not sandbox.parts(), what="no process is left")
