"""The command `sandbox` as people run it, in a directory for temporary files of its own, and what is left of it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.servers import ROOT, scrubbed

COMMAND = (sys.executable, "-m", "worker", "sandbox")
TIMEOUT_S = 40.0


def environment(directory: Path, **changes: str) -> dict[str, str]:
    """Settings of a person's, which must not reach the sandbox, and the directory."""
    foreign = {"REDIS_URL": "redis://127.0.0.1:1/0", "BINANCE_API_KEY": "a-persons-key", "LEASE_S": "wrong"}
    return scrubbed() | foreign | {"TMPDIR": str(directory)} | changes


@dataclass
class Sandbox:
    """The command while it runs."""

    process: subprocess.Popen[str]
    seen: set[int] = field(default_factory=set)

    def lines(self, count: int) -> list[str]:
        """The first lines of stdout, which come together."""
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], TIMEOUT_S)[0], "it says nothing"
        found = [self.process.stdout.readline() for _ in range(count)]
        assert all(found), "it has ended"
        return [line.rstrip("\n") for line in found]

    def place(self) -> dict[str, Any]:
        """What it prints with --serve and --json."""
        place: dict[str, Any] = json.loads(self.lines(1)[0])
        return place

    def ended(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr, once it has ended."""
        said, complaints = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, said, complaints

    def stop(self, how: signal.Signals) -> tuple[int, str]:
        """Exit code and stderr."""
        self.process.send_signal(how)
        code, _, complaints = self.ended()
        return code, complaints

    def parts(self, words: str = "") -> list[int]:
        """Its process and those that it has started, as far as they are there and their command line has these words;
        what was seen once is remembered."""
        self.seen.add(self.process.pid)
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):
                fields = dict(line.partition(":\t")[::2] for line in status.read_text("utf-8").splitlines())
                if int(fields["PPid"]) == self.process.pid:
                    self.seen.add(int(fields["Pid"]))
        return [number for number in sorted(self.seen) if _runs(number, words)]


def _runs(number: int, words: str) -> bool:
    with contextlib.suppress(OSError):
        status, command = (Path(f"/proc/{number}/{name}").read_text("utf-8") for name in ("status", "cmdline"))
        return "\nState:\tZ" not in status and words in command.replace("\0", " ")
    return False


@contextlib.contextmanager
def running(directory: Path, *options: str) -> Iterator[Sandbox]:
    """The command for the length of a block; whatever is left of it at the end is killed."""
    process = subprocess.Popen(
        [*COMMAND, *options],
        cwd=ROOT,
        env=environment(directory),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    sandbox = Sandbox(process)
    try:
        yield sandbox
    finally:
        for number in sandbox.parts():
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        process.communicate()
