"""`python -m worker sandbox`: a Redis, an exchange, real workers and a producer, and then the reckoning.

Everything runs on loopback, in processes that end with the run. Times are scaled down so that bans, false "no such
order" answers and late executions fit into seconds; the faults end long before the deadline, so that every order has a
definite outcome to come to.
"""

from __future__ import annotations

import json
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Self

import redis
from rq.worker import BaseWorker

from producer import CancelClient, CancelQueueError, Outcome, Ticket
from producer.message import DEFAULT_ACCOUNT
from producer.untrusted import MessageError
from worker.sandbox.control import ControlError, ExchangeConfig, RunningExchange, start_exchange
from worker.sandbox.faults import FaultTiming
from worker.sandbox.orders import SECOND_ACCOUNT, Twice, Wanted, plan
from worker.sandbox.report import Asked, Report
from worker.sandbox.show import Progress, Snapshot, note, progress, show
from worker.sandbox.valkey import CannotStart, Valkey, kill, last_line, server_binary

EXIT_OK = 0
EXIT_FAILED = 1  # something in the report is wrong
EXIT_UNAVAILABLE = 69  # sysexits.h: a part could not be started, or died

#: A request may wait this long, s: for a backlog a little longer.
_DEADLINE_S = 60
_ORDERS_PER_DEADLINE_S = 50
#: How long workers may take to start, and outcomes to come after the last deadline, s.
_START_TIMEOUT_S = 20.0
_PATIENCE_S = 10.0
_STOP_TIMEOUT_S = 15.0
#: Requests enqueued by one call.
_BATCH = 40

#: recvWindow, ms: short, so that time-outs are, but with room for the whole crew to be answered by a busy machine.
_RECV_WINDOW_MS = 1_500
_RECV_WINDOW_MS_PER_REQUEST = 8
_LONGEST_RECV_WINDOW_MS = 10_000

#: The workers' settings: short pauses, so that a run shows in seconds what takes minutes in production.
QUICK_SETTINGS = {
    "BACKOFF_BASE_MS": "20",
    "BACKOFF_CAP_MS": "500",
    "LEASE_S": "3",
    "NOT_FOUND_HORIZON_S": "30",  # every order exists: longer than all false answers in a row
    "WAF_PAUSE_S": "2",  # it doubles with each further block
    "SHUTDOWN_GRACE_S": "10",
    "LOG_LEVEL": "INFO",
}
#: The exchange's side of it.
_TIMING = FaultTiming(
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
MAX_INCIDENTS = {"none": 0, "some": 2, "all": 3}
LATENCY_MS = 5.0
WEIGHT_LIMIT = 1_000_000  # limits are the incidents' affair


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line asks for."""

    orders: int = 200
    workers: int = 2
    concurrency: int = 64
    faults: str = "some"
    seed: int = 1
    as_json: bool = False
    keep_logs: Path | None = None

    @property
    def deadline_s(self) -> int:
        """How long each request may take."""
        return _DEADLINE_S + self.orders // _ORDERS_PER_DEADLINE_S

    @property
    def recv_window_ms(self) -> int:
        """How old a request may be at the exchange."""
        in_flight = self.workers * self.concurrency
        return min(max(_RECV_WINDOW_MS, _RECV_WINDOW_MS_PER_REQUEST * in_flight), _LONGEST_RECV_WINDOW_MS)

    @property
    def timing(self) -> FaultTiming:
        """How long faults last: a client waits for 0.8 x recvWindow, and what is late comes after that."""
        window_ms = self.recv_window_ms
        return replace(_TIMING, late_answer_ms=window_ms + 1_000, late_execution_ms=round(0.9 * window_ms))


# --- keys -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, repr=False)
class RunKeys:
    """Keys made for one run: what checks them, for the exchange, and the workers' variables."""

    accounts: dict[str, tuple[str, str]]
    variables: dict[str, str]

    @classmethod
    def make(cls) -> Self:
        """An HMAC key for the first account, an Ed25519 key for the second where cryptography is installed."""
        api_key, secret = secrets.token_hex(16), secrets.token_hex(32)
        second_key = secrets.token_hex(16)
        verifier, variable, private = _second_secret()
        return cls(
            {DEFAULT_ACCOUNT: (api_key, secret), SECOND_ACCOUNT: (second_key, verifier)},
            {
                "BINANCE_API_KEY": api_key,
                "BINANCE_API_SECRET": secret,
                f"BINANCE_{SECOND_ACCOUNT.upper()}_API_KEY": second_key,
                variable: private,
            },
        )


def _second_secret() -> tuple[str, str, str]:
    """What checks the second account's signatures, and the variable that holds what makes them."""
    prefix = f"BINANCE_{SECOND_ACCOUNT.upper()}"
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ImportError:
        secret = secrets.token_hex(32)
        return secret, f"{prefix}_API_SECRET", secret
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return public.decode(), f"{prefix}_PRIVATE_KEY", private.decode()


# --- being stopped ----------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """A signal asked for the end."""


class Interrupts:
    """Notes the signals that ask for the end. They are looked at between steps: none may come between the start of a
    process and the note of it, or that process would be left behind."""

    def __init__(self) -> None:
        self._received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._received = number

    @property
    def received(self) -> int | None:
        """The last signal that came."""
        return self._received

    @property
    def exit_code(self) -> int:
        """As shells tell the death by this signal: 130 for Ctrl-C."""
        return 128 + (self._received or signal.SIGINT)

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self._received is not None:
            raise Interrupted


# --- the parts --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Fleet:
    """The worker processes; their output goes to files."""

    logs: Path
    environment: Mapping[str, str] = field(repr=False)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> None:
        """Start one more."""
        with self.log(len(self.processes)).open("wb") as log:
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

    def log(self, number: int) -> Path:
        """The log of the worker with this index."""
        return self.logs / f"worker-{number + 1}.log"

    def alive(self) -> bool:
        """Whether any still runs."""
        return any(process.poll() is None for process in self.processes)

    def check(self) -> None:
        """Raises CannotStart if one has ended."""
        for number, process in enumerate(self.processes):
            if (code := process.poll()) is not None:
                said = last_line(self.log(number))
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


def start_workers(fleet: Fleet, count: int, valkey: Valkey, interrupts: Interrupts) -> None:
    """Start workers and wait until RQ knows all of them.

    Raises:
        CannotStart: one has ended, or they took too long.
        Interrupted: a signal asked for the end.
    """
    for _ in range(count):
        fleet.start()
    ends_at = time.monotonic() + _START_TIMEOUT_S
    with redis.Redis(port=valkey.port, socket_timeout=5) as connection:
        while BaseWorker.count(connection=connection) < count:
            interrupts.check()
            fleet.check()
            if time.monotonic() > ends_at:
                raise CannotStart(f"the workers did not start within {_START_TIMEOUT_S:g} s")
            time.sleep(0.02)


def exchange_config(options: Options, keys: RunKeys, **more: Any) -> ExchangeConfig:
    """The exchange of a run or of `--serve`; ``more`` are other fields."""
    return ExchangeConfig(
        keys.accounts,
        faults=options.faults,
        seed=options.seed,
        timing=options.timing,
        max_incidents=MAX_INCIDENTS[options.faults],
        weight_limit_per_minute=WEIGHT_LIMIT,
        latency_ms=LATENCY_MS,
        **more,
    )


def worker_settings(options: Options, keys: RunKeys, valkey: Valkey, exchange: RunningExchange) -> dict[str, str]:
    """The variables of its workers."""
    return {
        **QUICK_SETTINGS,
        **keys.variables,
        "REDIS_URL": valkey.url,
        "BINANCE_BASE_URL": exchange.url,
        "BINANCE_RECV_WINDOW_MS": str(options.recv_window_ms),
        "WORKER_CONCURRENCY": str(options.concurrency),
    }


class _Run:
    """One run, from the first process to the report."""

    def __init__(self, options: Options, logs: Path, screen: Progress, interrupts: Interrupts) -> None:
        self._options = options
        self._logs = logs
        self._screen = screen
        self._interrupts = interrupts
        self._requests = 0
        self._asked: dict[str, Asked] = {}
        self._outcomes: list[Outcome] = []
        self._done: Counter[str] = Counter()
        self._position = "0-0"
        self._began_s = 0.0
        self._shown_s = 0.0

    def __call__(self, binary: str, environment: Mapping[str, str], parts: ExitStack) -> Report:
        """Run; what was started is left to ``parts`` to stop."""
        began_s = time.monotonic()
        self._screen.say("starting Redis, the exchange and the workers")
        keys = RunKeys.make()
        data = Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="cancel-sandbox-")))
        valkey = parts.enter_context(Valkey(binary, data))
        self._exchange = parts.enter_context(
            start_exchange(exchange_config(self._options, keys, faults_for_ms=self._options.deadline_s * 1_000 // 3))
        )
        deadline_s, ledger = self._options.deadline_s, max(4 * self._options.orders, 1_000)
        bounds = {"CANCEL_DEADLINE_S": str(deadline_s), "LEDGER_MAXLEN": str(ledger)}
        settings = worker_settings(self._options, keys, valkey, self._exchange)
        self._fleet = Fleet(self._logs, {**environment, **settings, **bounds})
        parts.callback(self._fleet.kill)
        start_workers(self._fleet, self._options.workers, valkey, self._interrupts)
        self._client = parts.enter_context(CancelClient.from_url(valkey.url, timeout_s=10.0))
        self._exchange.reset()  # the faults' time begins now
        self._enqueue(self._open_orders())
        self._follow()
        self._screen.say("stopping the workers")
        exit_codes = self._fleet.stop()
        self._read_ledger()
        return self._report(exit_codes, time.monotonic() - began_s)

    def _open_orders(self) -> list[tuple[Wanted, int]]:
        """The orders of the plan with the ids that the exchange gave them."""
        self._screen.say("opening orders")
        groups: dict[tuple[str, str, str], list[Wanted]] = {}
        for wanted in plan(self._options.orders, self._options.seed):
            groups.setdefault((wanted.account, wanted.symbol, wanted.order_type), []).append(wanted)
        opened = []
        for (account, symbol, order_type), group in sorted(groups.items()):
            names = [wanted.client_algo_id for wanted in group]
            # Longer than what is not known of the clocks: of a younger order nobody can tell whether a request by
            # client id meant it.
            placed = self._exchange.add_orders(
                account=account, symbol=symbol, client_algo_ids=names, age_ms=60_000, order_type=order_type
            )
            opened += [(wanted, order.algo_id) for wanted, order in zip(group, placed, strict=True)]
        for wanted, algo_id in opened:
            if wanted.triggered and self._options.faults != "none":
                rests = wanted.order_type == "STOP"
                self._exchange.trigger(algo_id, finished_after_ms=None if rests else _TIMING.finished_after_ms)
        random.Random(self._options.seed).shuffle(opened)
        return opened

    def _enqueue(self, opened: Sequence[tuple[Wanted, int]]) -> None:
        self._screen.say("cancelling")
        self._began_s = time.monotonic()
        for first in range(0, len(opened), _BATCH):
            group = opened[first : first + _BATCH]
            together = [(wanted, algo_id) for wanted, algo_id in group if not wanted.alone]
            together += [(wanted, algo_id) for wanted, algo_id in together if wanted.twice is Twice.AT_ONCE]
            tickets = self._client.cancel_many(wanted.request(algo_id) for wanted, algo_id in together)
            for ticket, (_, algo_id) in zip(tickets, together, strict=True):
                self._note(ticket, algo_id)
            for wanted, algo_id in group:
                if wanted.alone:
                    self._ask_alone(wanted, algo_id)
            self._look()
        for wanted, algo_id in opened:
            if wanted.twice is Twice.LATER:
                self._ask_alone(wanted, algo_id)

    def _ask_alone(self, wanted: Wanted, algo_id: int) -> None:
        request = wanted.request(algo_id)
        ticket = self._client.cancel(
            algo_id=request.algo_id,
            client_algo_id=request.client_algo_id,
            account=request.account,
            deadline_s=self._options.deadline_s,
            urgent=request.urgent,
            symbol=request.symbol,
            tag=request.tag,
            on_trigger=request.on_trigger,
        )
        self._note(ticket, algo_id)

    def _note(self, ticket: Ticket, algo_id: int) -> None:
        self._requests += 1
        self._asked[ticket.id] = Asked(ticket.id, algo_id)  # requests for one order may share a ticket

    def _follow(self) -> None:
        """Wait until every request has its outcome, or until none can be expected any more."""
        ends_at = time.monotonic() + self._options.deadline_s + _PATIENCE_S
        while len(self._done) < len(self._asked) and self._fleet.alive() and time.monotonic() < ends_at:
            self._look()
            time.sleep(0.05)
        self._look(at_once=True)

    def _look(self, *, at_once: bool = False) -> None:
        self._interrupts.check()
        self._read_ledger()
        now_s = time.monotonic()
        if at_once or now_s - self._shown_s >= self._screen.every_s:
            self._shown_s = now_s
            kinds = Counter(outcome.kind for outcome in self._outcomes)
            answers = self._exchange.stats().requests.values()
            requests = sum(sum(by_status.values()) for by_status in answers)
            self._screen.show(Snapshot(len(self._asked), kinds, requests, now_s - self._began_s))

    def _read_ledger(self) -> None:
        for position, outcome in self._client.outcomes(self._position):
            self._position = position
            self._outcomes.append(outcome)
            self._done[outcome.id] += 1

    def _report(self, exit_codes: Sequence[int], wall_s: float) -> Report:
        options = self._options
        return Report(
            orders=options.orders,
            workers=options.workers,
            concurrency=options.concurrency,
            faults=options.faults,
            seed=options.seed,
            requests=self._requests,
            asked=list(self._asked.values()),
            outcomes=self._outcomes,
            book=list(self._exchange.book().values()),
            stats=self._exchange.stats(),
            exit_codes=exit_codes,
            wall_s=wall_s,
        )


# --- the command ------------------------------------------------------------------------------------------------------


def run(options: Options, server: str | None, environment: Mapping[str, str]) -> int:
    """Run the sandbox and print its report; gives the exit code.

    ``server`` names a Redis server to run instead of the embedded one. ``environment`` is what the workers get beside
    their settings; it must hold none of those.
    """

    def body(binary: str, logs: Path, interrupts: Interrupts, parts: ExitStack) -> int:
        with parts, progress() as screen:
            report = _Run(options, logs, screen, interrupts)(binary, environment, parts)
        _print(report, options)
        return EXIT_OK if report.ok else EXIT_FAILED

    return supervised(options, server, body)


def supervised(
    options: Options, server: str | None, body: Callable[[str, Path, Interrupts, ExitStack], int], *, ends_well: int = 0
) -> int:
    """Run ``body`` with a server's binary, a directory for logs, the signals, and a stack that stops what it started.

    Gives the exit code; logs are kept where it was asked for, and where something went wrong. ``ends_well`` is a signal
    that is no interruption, if any.
    """
    with Interrupts() as interrupts:
        logs, keep = None, options.keep_logs is not None
        try:
            binary = server_binary(server)
            logs = log_directory(options)
            with ExitStack() as parts:
                code = body(binary, logs, interrupts, parts)
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


def log_directory(options: Options) -> Path:
    """Where the workers' logs go. Raises CannotStart when it cannot be made."""
    if options.keep_logs is None:
        return Path(tempfile.mkdtemp(prefix="cancel-sandbox-logs-"))
    try:
        options.keep_logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotStart(f"--keep-logs {options.keep_logs}: {error.strerror}") from None
    return options.keep_logs.resolve()


def _print(report: Report, options: Options) -> None:
    if not options.as_json:
        show(report)
        return
    sys.stdout.write(json.dumps(report.as_dict(), ensure_ascii=False) + "\n")
    for problem in report.problems:
        note(f"FAILED: {problem}")
