"""What every system is measured on: one Valkey, one exchange, a proxy that puts Redis further away. All on loopback."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import redis

from tests.loopback import certificate
from tests.servers import ROOT, Valkey, running_valkey, scrubbed

ACCOUNT = {"BINANCE_API_KEY": "key-of-the-benchmark", "BINANCE_API_SECRET": "secret-of-the-benchmark"}

#: When a cancel came, ns since the epoch, and over which connection.
Arrival = tuple[int, int]


@contextlib.contextmanager
def _process(*command: str) -> Iterator[tuple[int, str]]:
    """A Python module of ours as a process: its id and the line that it prints when it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command], cwd=ROOT, env=scrubbed() | ACCOUNT, stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stdout is not None
            if not (line := process.stdout.readline()):
                raise RuntimeError(f"{command[0]} did not start")
            yield process.pid, line
        finally:
            process.kill()


@dataclass(frozen=True)
class Exchange:
    """A running :mod:`tests.bench.exchange`."""

    pid: int
    port: int
    control: int
    ca_file: str = ""  # of TLS

    @property
    def url(self) -> str:
        """Where workers send cancels to."""
        return f"{'https' if self.ca_file else 'http'}://127.0.0.1:{self.port}"

    def reset(self, *, delay_ms: float, refuses_first: bool = False) -> None:
        """Forget all arrivals, and answer ``delay_ms`` late from now on.

        ``refuses_first``: the first cancel of each order gets a 503 that says that nothing was done.
        """
        self._call("POST", f"/reset?delay_ms={delay_ms}&refuses_first={int(refuses_first)}")

    def state(self) -> dict[str, int]:
        """Counts: asked, again, bad, peak, connections."""
        return dict(self._call("GET", "/state"))

    def arrivals(self) -> dict[int, list[Arrival]]:
        """Every cancel that came since the reset, by order."""
        shown: dict[str, list[list[int]]] = self._call("GET", "/arrivals")
        return {int(algo_id): [(ns, connection) for ns, connection in came] for algo_id, came in shown.items()}

    def handshakes(self) -> list[int]:
        """When each connection was ready, ns since the epoch, by its number."""
        return list(self._call("GET", "/handshakes"))

    def wait_for(self, orders: int, limit_s: float, *, again: bool = False) -> bool:
        """Wait until a cancel (``again``: a second one) of so many orders has come; False if not within ``limit_s``."""
        ends_at = time.monotonic() + limit_s
        while self.state()["again" if again else "asked"] < orders:
            if time.monotonic() > ends_at:
                return False
            time.sleep(0.02)
        return True

    def _call(self, method: str, target: str) -> Any:
        with contextlib.closing(HTTPConnection("127.0.0.1", self.control, timeout=30)) as connection:
            connection.request(method, target)
            return json.load(connection.getresponse())


@dataclass(frozen=True)
class Rig:
    """The servers of one run."""

    valkey: Valkey
    redis: redis.Redis  # straight to the server, for whoever measures
    exchange: Exchange
    far_url: str  # Redis, further away; where that is not wanted, where it is
    directory: Path

    def environment(self, far: bool) -> dict[str, str]:
        """What a worker is told."""
        url = self.far_url if far else self.valkey.url
        return {**ACCOUNT, "REDIS_URL": url, "BINANCE_BASE_URL": self.exchange.url}


@contextlib.contextmanager
def open_rig(redis_one_way_ms: float = 0, *, tls: bool = False, closes_after_s: float = 0) -> Iterator[Rig]:
    """Start the servers for the length of a block."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="bench-")))
        valkey = stack.enter_context(running_valkey("--appendonly", "no"))
        client = stack.enter_context(redis.Redis(port=valkey.port))
        files = certificate(directory) if tls else ()
        pid, line = stack.enter_context(_process("tests.bench.exchange", str(closes_after_s), *files))
        ports: Mapping[str, int] = json.loads(line)
        far_url = valkey.url
        if redis_one_way_ms:
            far = stack.enter_context(_process("tests.bench.distance", str(valkey.port), str(redis_one_way_ms)))
            far_url = f"redis://127.0.0.1:{int(far[1])}/0"
        yield Rig(valkey, client, Exchange(pid, ports["port"], ports["control"], *files[:1]), far_url, directory)
