"""`python -m producer` as a real process: commands that end, and servers that run until they are told to end."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any, Self

from tests.servers import ROOT, scrubbed


class Shell:
    """Runs the command line with REDIS_URL set, as an operator's shell has it."""

    def __init__(self, url: str) -> None:
        self.environment = scrubbed() | {"REDIS_URL": url}

    def command(self, *arguments: str) -> list[str]:
        """The words of a call; a warning in it is an error."""
        return [sys.executable, "-W", "error", "-m", "producer", *arguments]

    def __call__(self, *arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        """Run to the end."""
        return subprocess.run(
            self.command(*arguments),
            input=stdin,
            cwd=ROOT,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=30,
        )

    @contextlib.contextmanager
    def running(
        self, *arguments: str, stderr: Any = subprocess.PIPE, **environment: str
    ) -> Iterator[subprocess.Popen[str]]:
        """Start it, and end it if the test does not."""
        settings = self.environment | environment
        with subprocess.Popen(
            self.command(*arguments), cwd=ROOT, env=settings, stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as process:
            try:
                yield process
            finally:
                process.kill()


def one_line(stderr: str) -> str:
    """All that was said: one line, and no traceback."""
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    return lines[0]


class Served:
    """A server of the command line, on a port of its own, from the moment on in which it listens."""

    command = ""

    def __init__(self, redis_url: str, *arguments: str, stderr: int | None = None, **environment: str) -> None:
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(self._said)
        given = (self.command, "--port", "0", *arguments)
        self._process = Shell(redis_url).running(*given, stderr=self._said if stderr is None else stderr, **environment)
        self.url = ""

    def __enter__(self) -> Self:
        self.process = self._stack.enter_context(self._process)
        assert self.process.stdout is not None
        watchdog = threading.Timer(20, self.process.kill)
        watchdog.start()
        line = self.process.stdout.readline()
        watchdog.cancel()
        found = re.search(r"queue cancels on (http://\S+)", line)
        if found is None:
            self.process.wait(30)
            raise AssertionError(line + self.stderr())
        self.url = found[1].rstrip("/")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.split(":")[2].partition("/")[0])

    def stderr(self) -> str:
        """What it has complained about."""
        self._said.seek(0)
        return self._said.read()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Signal it; gives exit code and what it had to complain about."""
        self.process.send_signal(how)
        return self.process.wait(30), self.stderr()
