"""Processes whose streams are ours: files, or a pipe that takes as much as a test lets it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.servers import ROOT, scrubbed


class Child:
    """A process with its streams in files, or in a pipe of ours."""

    def __init__(self, directory: Path, command: list[str], stdout: int | None, **environment: str) -> None:
        self._output, self._errors = directory / "stdout", directory / "stderr"
        # Unbuffered, what a test prints would not wait in sys.stdout.
        given = {name: value for name, value in scrubbed().items() if name != "PYTHONUNBUFFERED"} | environment
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=given,
                stdout=output if stdout is None else stdout,
                stderr=errors,
                start_new_session=True,
            )

    def output(self) -> str:
        """What it has written to stdout, where that is no pipe."""
        return self._output.read_text("utf-8")

    def errors(self) -> str:
        """What it has written to stderr."""
        return self._errors.read_text("utf-8")

    def stop(self) -> int:
        """SIGTERM; gives the exit code, which must be there in time."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(10)

    def ends_with(self, code: int) -> None:
        """See that it ends by itself, so."""
        assert self.process.wait(30) == code, self.errors()


NewChild = Callable[..., Child]


@pytest.fixture
def child(tmp_path: Path) -> Iterator[NewChild]:
    """Starts processes, and ends what is left of them."""
    made: list[Child] = []

    def start(command: list[str], stdout: int | None = None, **environment: str) -> Child:
        directory = tmp_path / f"child-{len(made)}"
        directory.mkdir()
        made.append(Child(directory, command, stdout, **environment))
        return made[-1]

    yield start
    for each in made:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(each.process.pid, signal.SIGKILL)
        each.process.wait()


class Pipe:
    """A pipe for a child's stdout."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def fill(self) -> None:
        """Leave no room in it, so that the next write waits."""
        os.set_blocking(self.writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(self.writer, b"." * 4095 + b"\n")
        os.set_blocking(self.writer, True)

    def read_slowly(self, seconds: float) -> str:
        """Read less than a busy child writes; gives what was read."""
        data, ends_at_s = b"", time.monotonic() + seconds
        while time.monotonic() < ends_at_s or not data.endswith(b"\n"):
            data += os.read(self.reader, 1024 if time.monotonic() < ends_at_s else 1)
            time.sleep(0.001)
        return data.decode("utf-8")

    def read_all(self) -> str:
        """What is written into it until its last writer has ended."""
        self.close_writer()
        with os.fdopen(os.dup(self.reader), "rb") as file:
            return file.read().decode("utf-8")

    def close_writer(self) -> None:
        """Let go of our own end."""
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1

    def close_reader(self) -> None:
        """Be a reader that has left."""
        if self.reader >= 0:
            os.close(self.reader)
            self.reader = -1


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """A pipe, closed in the end."""
    made = Pipe()
    yield made
    made.close_writer()
    made.close_reader()


def python(text: str, *arguments: str) -> list[str]:
    """The command that runs a program."""
    return [sys.executable, "-c", text, *arguments]


def logging_program(text: str, *arguments: str) -> list[str]:
    """... one that has set up its log."""
    return python(f'import os, sys, time\nfrom worker import log\nlog.configure("INFO", "logfmt")\n{text}', *arguments)


def redirected(streams: str, command: list[str]) -> list[str]:
    """The same command with its streams as a shell makes them."""
    return ["sh", "-c", f'exec "$@" {streams}', "sh", *command]
