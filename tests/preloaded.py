"""Starts `python -m worker` again and again in a fifth of its time: by forking a process that has imported libraries.

Of the project itself nothing is imported before the fork, so the command's own start is all there. What its interpreter
does before that (PYTHON* variables, `-W`, the word of `ps`) is another's: tests of that start a process of their own.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
#: What a worker imports that is not ours and takes long.
LIBRARIES = (
    *("asyncio", "ssl", "click", "certifi", "hiredis", "redis.asyncio", "rq.worker", "rq.command"),
    "cryptography.hazmat.primitives.serialization",
)
_MOST_BYTES = 1 << 20
_FDS = os.sysconf("SC_OPEN_MAX")


class Forked:
    """A process that was started so, with what tests use of `subprocess.Popen`."""

    def __init__(self, told: IO[bytes]) -> None:
        self._told = told  # two lines: its id when it has begun, its exit code when it has ended
        self.pid = int(told.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        if self.returncode is None and select.select([self._told], [], [], 0)[0]:
            self.returncode = int(self._told.readline())
            self._told.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once there is one.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        if self.returncode is None and not select.select([self._told], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("python -m", timeout or 0)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, how: signal.Signals) -> None:
        """Signal it, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, how)


def start(module: str, arguments: Sequence[str], environment: Mapping[str, str], stdout: int, stderr: int) -> Forked:
    """Start `python -m MODULE` in a session of its own, with nothing to read."""
    reader, writer = os.pipe()
    try:
        socket.send_fds(
            _forker(), [json.dumps([module, arguments, dict(environment)]).encode()], [stdout, stderr, writer]
        )
    finally:
        os.close(writer)
    return Forked(os.fdopen(reader, "rb", buffering=0))


@cache
def _forker() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-m", "tests.preloaded", str(theirs.fileno())]
        process = subprocess.Popen(
            command, cwd=ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
    atexit.register(process.wait)
    atexit.register(ours.close)
    return ours


# ---- in the process that forks ---------------------------------------------------------------------------------------


def main(orders: socket.socket) -> str:
    """Fork for each order, until nobody is left to give one; returns in each child, with its module."""
    # requests is imported by the worker as it wants it to be.
    for name in LIBRARIES:
        __import__(name)
    while True:
        said, fds, _, _ = socket.recv_fds(orders, _MOST_BYTES, 3)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not said:
            sys.exit()
        if os.fork() == 0:
            orders.close()
            module, arguments, environment = json.loads(said)
            _begin(environment, *fds)
            sys.argv = [module, *arguments]
            return str(module)
        for fd in fds:
            os.close(fd)


def _begin(environment: dict[str, str], stdout: int, stderr: int, told: int) -> None:
    """Become the command; a process waits for its end, as its parent."""
    if (pid := os.fork()) != 0:
        os.write(told, b"%d\n" % pid)
        for first, end in ((0, told), (told + 1, _FDS)):
            os.closerange(first, end)
        _, status = os.waitpid(pid, 0)
        os.write(told, b"%d\n" % os.waitstatus_to_exitcode(status))
        os._exit(0)
    os.setsid()
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.closerange(3, _FDS)
    for name, fd, errors in (("stdout", 1, "strict"), ("stderr", 2, "backslashreplace")):
        # The stream that is there knows what can be done with another file.
        stream = os.fdopen(fd, "w", closefd=False, errors=errors)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()


if __name__ == "__main__":
    runpy.run_module(main(socket.socket(fileno=int(sys.argv[1]))), run_name="__main__", alter_sys=True)
