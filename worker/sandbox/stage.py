"""What a run of the sandbox, or `--serve`, happens on: a Redis, an exchange and workers, which end with the command.

Everything is on loopback. Times are scaled down so that bans, false "no such order" answers and late executions fit
into seconds; the faults of a run end long before the deadline, so that every order has a definite outcome to come to.
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import redis
from rq.worker import BaseWorker

from producer import CancelQueueError
from producer.message import DEFAULT_ACCOUNT
from producer.untrusted import MessageError
from worker.interrupts import Interrupted, Interrupts
from worker.sandbox.control import ControlError, ExchangeConfig, start_exchange
from worker.sandbox.faults import FaultTiming
from worker.sandbox.orders import SECOND_ACCOUNT
from worker.sandbox.show import note
from worker.sandbox.valkey import CannotStart, Valkey, kill, last_line, server_binary

EXIT_OK = 0
EXIT_FAILED = 1  # something in the report is wrong
EXIT_UNAVAILABLE = 69  # sysexits.h: a part could not be started, or died

#: A request may wait this long, s: for a backlog a little longer.
_DEADLINE_S = 60
_ORDERS_PER_DEADLINE_S = 50
#: How long workers may take to start, and to stop, s.
_START_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 15.0

#: recvWindow, ms: short, so that time-outs are, but with room for the whole crew to be answered by a busy machine.
_RECV_WINDOW_MS = 1_500
_RECV_WINDOW_MS_PER_REQUEST = 8
_LONGEST_RECV_WINDOW_MS = 10_000

#: The workers' settings: short pauses, so that a run shows in seconds what takes minutes in production.
_QUICK_SETTINGS = {
    "BACKOFF_BASE_MS": "20",
    "BACKOFF_CAP_MS": "500",
    "LEASE_S": "3",
    "NOT_FOUND_HORIZON_S": "30",  # every order exists: longer than all false answers in a row
    "WAF_PAUSE_S": "2",  # it doubles with each further block
    "SHUTDOWN_GRACE_S": "10",
    "LOG_LEVEL": "INFO",
}
#: The exchange's side of it.
TIMING = FaultTiming(
    forgotten_ms=1_000,
    finished_after_ms=500,
    child_id_lag_ms=30,
    child_lag_ms=60,
    retry_after_s=2,
    ban_s=3,
    firewall_ms=2_000,
    drip_interval_ms=30,
)
#: Pauses last two seconds and more, so that a worker that does not keep one is noticed: a run can bear a few.
_MAX_INCIDENTS = {"none": 0, "some": 2, "all": 3}
_LATENCY_MS = 5.0
_WEIGHT_LIMIT = 1_000_000  # limits are the incidents' affair


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line asks for; a port of 0 is any free one."""

    orders: int = 200
    workers: int = 2
    concurrency: int = 64
    faults: str = "some"
    seed: int = 1
    as_json: bool = False
    keep_logs: Path | None = None
    port: int = 0
    redis_port: int = 0

    @property
    def deadline_s(self) -> int:
        """How long each request may take."""
        return _DEADLINE_S + self.orders // _ORDERS_PER_DEADLINE_S

    @property
    def recv_window_ms(self) -> int:
        """How old a request may be at the exchange."""
        in_flight = self.workers * self.concurrency
        return min(max(_RECV_WINDOW_MS, _RECV_WINDOW_MS_PER_REQUEST * in_flight), _LONGEST_RECV_WINDOW_MS)


def _variables(keys: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """The workers' variables for these API keys and secrets, by account."""
    found: dict[str, str] = {}
    for account, key in keys.items():
        prefix = "BINANCE" if account == DEFAULT_ACCOUNT else f"BINANCE_{account.upper()}"
        found |= zip((f"{prefix}_API_KEY", f"{prefix}_API_SECRET"), key, strict=True)
    return found


@dataclass(slots=True)
class Fleet:
    """The worker processes; their output goes to files."""

    logs: Path
    environment: Mapping[str, str] = field(repr=False)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, count: int, redis_port: int, interrupts: Interrupts) -> None:
        """Start workers and wait until RQ knows all of them.

        Raises:
            CannotStart: one has ended, or they took too long.
            Interrupted: a signal asked for the end.
        """
        for number in range(count):
            with self._log(number).open("wb") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "worker"],
                        cwd=Path(__file__).resolve().parents[2],
                        env=self.environment,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        ends_at = time.monotonic() + _START_TIMEOUT_S
        with redis.Redis(port=redis_port, socket_timeout=5) as connection:
            while BaseWorker.count(connection=connection) < count:
                interrupts.check()
                self.check()
                if time.monotonic() > ends_at:
                    raise CannotStart(f"the workers did not start within {_START_TIMEOUT_S:g} s")
                time.sleep(0.02)

    def _log(self, number: int) -> Path:
        return self.logs / f"worker-{number + 1}.log"

    def alive(self) -> bool:
        """Whether any still runs."""
        return any(process.poll() is None for process in self.processes)

    def check(self) -> None:
        """Raises CannotStart if one has ended."""
        for number, process in enumerate(self.processes):
            if (code := process.poll()) is not None:
                said = last_line(self._log(number))
                raise CannotStart(f"worker {number + 1} ended by itself with exit code {code}: {said}")

    def stop(self) -> list[int]:
        """Have all of them end what they are at; their exit codes."""
        for process in self.processes:
            process.terminate()
        ends_at = time.monotonic() + _STOP_TIMEOUT_S
        for process in self.processes:
            try:
                process.wait(max(ends_at - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                kill(process)
        return [process.returncode for process in self.processes]

    def kill(self) -> None:
        """End what still runs."""
        for process in self.processes:
            kill(process)


class Stage:
    """Redis, exchange and workers of one command: there once opened, until ``parts`` are closed."""

    def __init__(
        self, options: Options, binary: str, environment: Mapping[str, str], logs: Path, interrupts: Interrupts
    ) -> None:
        self.options, self.interrupts = options, interrupts
        self.parts = ExitStack()
        self._binary, self._environment, self._logs = binary, environment, logs

    def open(self, settings: Mapping[str, str], *, faults_for_ms: int | None = None) -> None:
        """Start all of it; ``settings`` are what the workers are told beside the usual.

        Raises:
            CannotStart, ControlError: a part does not start.
            Interrupted: a signal asked for the end.
        """
        options, enter = self.options, self.parts.enter_context
        # Known to this exchange and its workers, and worth nothing elsewhere.
        keys = {name: (secrets.token_hex(16), secrets.token_hex(32)) for name in (DEFAULT_ACCOUNT, SECOND_ACCOUNT)}
        self.variables = _variables(keys)
        data = Path(enter(tempfile.TemporaryDirectory(prefix="cancel-sandbox-")))
        self.valkey = enter(Valkey(self._binary, data, options.redis_port))
        self.exchange = enter(start_exchange(self._exchange_config(keys, faults_for_ms)))
        usual = {
            **_QUICK_SETTINGS,
            **self.variables,
            "REDIS_URL": self.valkey.url,
            "BINANCE_BASE_URL": self.exchange.url,
            "BINANCE_RECV_WINDOW_MS": str(options.recv_window_ms),
            "WORKER_CONCURRENCY": str(options.concurrency),
        }
        self.fleet = Fleet(self._logs, {**self._environment, **usual, **settings})
        self.parts.callback(self.fleet.kill)
        self.fleet.start(options.workers, self.valkey.port, self.interrupts)

    def _exchange_config(self, keys: Mapping[str, tuple[str, str]], faults_for_ms: int | None) -> ExchangeConfig:
        options, window_ms = self.options, self.options.recv_window_ms
        return ExchangeConfig(
            keys,
            faults=options.faults,
            seed=options.seed,
            # A client waits for 0.8 x recvWindow, and what is late comes after that.
            timing=replace(TIMING, late_answer_ms=window_ms + 1_000, late_execution_ms=round(0.9 * window_ms)),
            max_incidents=_MAX_INCIDENTS[options.faults],
            faults_for_ms=faults_for_ms,
            weight_limit_per_minute=_WEIGHT_LIMIT,
            latency_ms=_LATENCY_MS,
            port=options.port,
        )


def supervised(
    options: Options,
    server: str | None,
    environment: Mapping[str, str],
    body: Callable[[Stage], int],
    *,
    ends_well: int = 0,
) -> int:
    """Run ``body`` with a stage that is not open yet; gives the exit code.

    ``server`` names a Redis server to run instead of the embedded one. ``environment`` is what the workers get beside
    their settings; it must hold none of those. Logs are kept where it was asked for, and where something went wrong.
    ``ends_well`` is a signal that is no interruption, if any.
    """
    with Interrupts() as interrupts:
        logs, keep = None, options.keep_logs is not None
        try:
            binary = server_binary(server)
            logs = _log_directory(options)
            stage = Stage(options, binary, environment, logs, interrupts)
            with stage.parts:
                code = body(stage)
            keep = keep or code != EXIT_OK
        except Interrupted:
            note("stopped" if ends_well else "interrupted: everything is stopped")
            code = EXIT_OK if interrupts.received == ends_well else interrupts.exit_code
        except (CannotStart, ControlError, CancelQueueError, redis.RedisError, MessageError) as error:
            keep = True
            note(f"error: {str(error) or type(error).__name__}")
            code = EXIT_FAILED if isinstance(error, MessageError) else EXIT_UNAVAILABLE
        finally:
            if logs is not None and keep and any(logs.iterdir()):
                note(f"the workers' logs are in {logs}")
            elif logs is not None and options.keep_logs is None:
                shutil.rmtree(logs, ignore_errors=True)
    return code


def _log_directory(options: Options) -> Path:
    if options.keep_logs is None:
        return Path(tempfile.mkdtemp(prefix="cancel-sandbox-logs-"))
    try:
        options.keep_logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotStart(f"--keep-logs {options.keep_logs}: {error.strerror}") from None
    return options.keep_logs.resolve()
