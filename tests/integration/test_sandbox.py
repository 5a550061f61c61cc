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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.servers import ROOT, eventually, python, scrubbed

TIMEOUT_S = 40.0


@dataclass
class Shell:
    """Where the command runs: with a temporary directory of its own, and settings that must not reach its workers."""

    directory: Path

    def environment(self, changes: Mapping[str, str]) -> dict[str, str]:
        foreign = {"REDIS_URL": "redis://127.0.0.1:1/0", "BINANCE_API_KEY": "a-persons-key", "LEASE_S": "wrong"}
        return {**scrubbed(), **foreign, "TMPDIR": str(self.directory), **changes}

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "worker", "sandbox", *arguments]

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return python(*self.command(*arguments)[1:], **self.environment(environment))

    @contextlib.contextmanager
    def running(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """The command while it runs, leader of its process group as in a terminal."""
        process = subprocess.Popen(
            self.command(*arguments),
            cwd=ROOT,
            env=self.environment({}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
            process.communicate(timeout=TIMEOUT_S)

    def logged(self) -> str:
        """What the workers have logged so far."""
        logs = self.directory.glob("cancel-sandbox-logs-*/worker-*.log")
        return "".join(log.read_text() for log in sorted(logs))

    def started(self, workers: int = 2) -> list[dict[str, str]]:
        """What each worker said at its start, once all of them have."""

        def said() -> list[dict[str, str]]:
            lines = [line for line in self.logged().splitlines() if "event=started" in line]
            return [dict(re.findall(r"(\w+)=(\S+)", line)) for line in lines] if len(lines) == workers else []

        found = eventually(said, what="the workers say that they started")
        assert isinstance(found, list)
        return found


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def listens(url: str) -> bool:
    parts = urlsplit(url)
    with contextlib.suppress(OSError), socket.create_connection((parts.hostname, parts.port), timeout=1):
        return True
    return False


def test_all_faults_and_still_as_in_the_book(shell: Shell) -> None:
    """Whatever goes wrong on the way, every order ends in the outcome that the exchange's own book confirms."""
    done = shell.run("--orders", "60", "--faults", "all", "--seed", "3", "--json")
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
    assert list(shell.directory.iterdir()) == []


def test_without_a_terminal_there_are_plain_lines(shell: Shell, tmp_path: Path) -> None:
    """Elsewhere than on a terminal progress is plain lines on stderr, tables are plain text, and logs stay if asked."""
    done = shell.run("--orders", "20", "--faults", "none", "--workers", "1", "--keep-logs", str(tmp_path / "logs"))
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert all(line.startswith("sandbox: ") for line in lines)
    assert re.search(r"s  \d+ of \d+ outcomes: cancelled \d+", lines[-3])
    assert "\x1b" not in done.stdout + done.stderr
    assert re.search(r"cancelled +20 +20 +0\n", done.stdout)
    assert "ok: all" in done.stdout
    assert "event=outcome" in (tmp_path / "logs" / "worker-1.log").read_text()
    assert [path.name for path in shell.directory.iterdir()] == ["logs"]


def test_a_terminal_shows_a_bar(shell: Shell) -> None:
    """On a terminal progress is one live line with a bar, and the report has its tables."""
    ours, theirs = pty.openpty()
    shown = b""
    try:
        process = subprocess.Popen(
            shell.command("--orders", "20", "--faults", "none", "--workers", "1"),
            cwd=ROOT,
            env=shell.environment({"TERM": "xterm", "COLUMNS": "120"}),
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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing_behind(shell: Shell, number: signal.Signals, code: int) -> None:
    """Ctrl-C in the middle of it ends every process and removes every file, at once."""
    with shell.running("--orders", "2000", "--faults", "all") as process:
        workers = shell.started()
        assert all(alive(int(worker["pid"])) for worker in workers)
        assert listens(workers[0]["exchange"])
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == code
    assert "interrupted: everything is stopped" in errors
    assert "Traceback" not in errors
    assert not any(alive(int(worker["pid"])) for worker in workers)
    assert not listens(workers[0]["redis"])
    assert not listens(workers[0]["exchange"])
    assert list(shell.directory.iterdir()) == []


def test_a_killed_worker_fails_the_run_but_no_order(shell: Shell) -> None:
    """A worker that is killed loses no order to the other one; the run is failed, and its logs are kept and named."""
    with shell.running("--orders", "49", "--faults", "some", "--json") as process:
        workers = shell.started()
        eventually(lambda: "event=attempt" in shell.logged(), what="the first attempts")
        os.kill(int(workers[0]["pid"]), signal.SIGKILL)
        output, errors = process.communicate(timeout=TIMEOUT_S)
    report = json.loads(output)
    assert process.returncode == 1
    assert f"worker {report['exit_codes'].index(-9) + 1} ended with exit code -9" in report["problems"]
    assert report["differences"] == []
    assert "sandbox: FAILED: worker" in errors
    kept = re.search(r"the workers' logs are in (\S+)", errors)
    assert kept is not None
    assert len(list(Path(kept[1]).glob("worker-*.log"))) == 2


@pytest.mark.parametrize("arguments", [("--faults", "most"), ("--orders", "0"), ("--port", "8000")])
def test_bad_usage(shell: Shell, arguments: tuple[str, str]) -> None:
    """A wrong value, or a port without --serve, is refused by the option's name before anything starts."""
    done = shell.run(*arguments)
    assert done.returncode == 2
    assert arguments[0] in done.stderr
    assert list(shell.directory.iterdir()) == []


def test_what_cannot_start_is_said_in_one_line(shell: Shell, tmp_path: Path) -> None:
    """A server that is not there, cannot be run, or ends at once: exit 69 and one line that names it."""
    broken = tmp_path / "broken"
    broken.write_text("no program")
    broken.chmod(0o755)
    for server in ("/nonexistent/valkey-server", str(broken), sys.executable):
        done = shell.run(VALKEY_SERVER=server)
        assert done.returncode == 69
        assert [line for line in done.stderr.splitlines() if "error: " in line and server in line]
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
        assert [path.name for path in tmp_path.iterdir()] == ["broken"]
