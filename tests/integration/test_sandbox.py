"""`python -m worker sandbox` as people run it: the real command, real processes, everything on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.sandboxes import COMMAND, TIMEOUT_S, environment, running
from tests.servers import ROOT, eventually, python


def run(directory: Path, *options: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """The command to its end."""
    return python(*COMMAND[1:], *options, **environment(directory, **changes))


def test_all_faults_and_still_as_in_the_book(tmp_path: Path) -> None:
    """Whatever goes wrong on the way, every order ends in the outcome that the exchange's own book confirms."""
    done = run(tmp_path, "--orders", "60", "--faults", "all", "--seed", "3", "--json")
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert report["ok"] is True
    assert (report["orders"], report["faults"], report["seed"]) == (60, "all", 3)
    assert 60 <= report["jobs"] <= report["requests"]
    assert sum(report["outcomes"].values()) == report["jobs"]
    assert set(report["outcomes"]) <= {"cancelled", "already_cancelled", "triggered", "expired", "rejected"}
    assert report["differences"] == report["problems"] == report["offending"] == []
    assert report["late_requests_during_pauses"] == 0
    assert sum(report["faults_injected"].values()) > 20
    assert report["attempts"]["total"] > report["jobs"]
    assert report["exit_codes"] == [0, 0]
    assert list(tmp_path.iterdir()) == []


def test_without_a_terminal_there_are_plain_lines(tmp_path: Path) -> None:
    """Elsewhere than on a terminal progress is plain lines on stderr, tables are plain text, and logs stay if asked."""
    done = run(tmp_path, "--orders", "20", "--faults", "none", "--workers", "1", "--keep-logs", str(tmp_path / "logs"))
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert all(line.startswith("sandbox: ") for line in lines)
    assert re.search(r"s  \d+ of \d+ outcomes: cancelled \d+", lines[-3])
    assert "\x1b" not in done.stdout + done.stderr
    assert re.search(r"cancelled +20 +20 +0\n", done.stdout)
    assert "ok: all" in done.stdout
    assert "event=outcome" in (tmp_path / "logs" / "worker-1.log").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_a_terminal_shows_a_bar(tmp_path: Path) -> None:
    """On a terminal progress is one live line with a bar, and the report has its tables."""
    ours, theirs = pty.openpty()
    shown = b""
    try:
        process = subprocess.Popen(
            [*COMMAND, "--orders", "20", "--faults", "none", "--workers", "1"],
            cwd=ROOT,
            env=environment(tmp_path, TERM="xterm", COLUMNS="120"),
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        with contextlib.suppress(OSError):  # the other end was closed
            while block := os.read(ours, 65_536):
                shown += block
        assert process.wait(TIMEOUT_S) == 0
    finally:
        os.close(ours)
    text = shown.decode()
    assert "\x1b[" in text
    assert "━" in text
    assert re.search(r"(\d+)/\1\b.*cancelled 20", text)
    assert "ok: all" in text


def logged(directory: Path) -> str:
    """What the workers have logged so far."""
    return "".join(log.read_text() for log in sorted(directory.glob("cancel-sandbox-logs-*/worker-*.log")))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing_behind(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """Ctrl-C in the middle of it ends every process and removes every file, at once."""
    with running(tmp_path, "--orders", "2000", "--faults", "all") as sandbox:
        eventually(lambda: logged(tmp_path).count("event=started") == 2, what="the workers start")
        assert len(sandbox.parts()) == 5  # itself, Redis, the exchange, two workers
        assert sandbox.stop(number)[0] == code
        assert sandbox.parts() == []
    assert list(tmp_path.iterdir()) == []


def test_a_killed_worker_fails_the_run_but_no_order(tmp_path: Path) -> None:
    """A worker that is killed loses no order to the other one; the run is failed, and its logs are kept and named."""
    with running(tmp_path, "--orders", "49", "--faults", "some", "--json") as sandbox:
        eventually(lambda: "event=attempt" in logged(tmp_path), what="the first attempts")
        os.kill(sandbox.parts(" -m worker ")[-1], signal.SIGKILL)
        code, output, errors = sandbox.ended()
    report = json.loads(output)
    assert code == 1
    assert f"worker {report['exit_codes'].index(-9) + 1} ended with exit code -9" in report["problems"]
    assert report["differences"] == []
    assert "sandbox: FAILED: worker" in errors
    kept = re.search(r"the workers' logs are in (\S+)", errors)
    assert kept is not None
    assert len(list(Path(kept[1]).glob("worker-*.log"))) == 2


@pytest.mark.parametrize("arguments", [("--faults", "most"), ("--orders", "0"), ("--port", "8000")])
def test_bad_usage(tmp_path: Path, arguments: tuple[str, str]) -> None:
    """A wrong value, or a port without --serve, is refused by the option's name before anything starts."""
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert arguments[0] in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_start_is_said_in_one_line(tmp_path: Path) -> None:
    """A server that is not there, cannot be run, or ends at once: exit 69 and one line that names it."""
    broken = tmp_path / "broken"
    broken.write_text("no program")
    broken.chmod(0o755)
    for server in ("/nonexistent/valkey-server", str(broken), sys.executable):
        done = run(tmp_path, VALKEY_SERVER=server)
        assert done.returncode == 69
        assert [line for line in done.stderr.splitlines() if "error: " in line and server in line]
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
        assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("option", ["--port", "--redis-port"])
def test_a_port_that_is_taken_is_named(option: str, tmp_path: Path) -> None:
    """Which port is another's, and that nothing was started, is said in one line."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run(tmp_path, "--serve", "--orders", "1", option, port)
    assert done.returncode == 69
    assert f"port {port}" in done.stderr
    assert "in use" in done.stderr
    assert "Traceback" not in done.stderr
