"""A crew in trouble: the gate closes under it, Redis refuses or vanishes, clocks and threads cannot be had. Against a
real Redis and an exchange that answers, or keeps silent, as each test says."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self

import pytest
import redis

from producer import CancelClient, CancelRequest, OutcomeKind, Ticket
from tests.integration.test_crew import KEYS, OPENED_AT_ONCE, Hands, at_first_try, outcomes
from tests.integration.test_sandbox_server import certificate
from tests.servers import Peek, Valkey, Worker, Workers, end_server, eventually, free_port, running_valkey
from worker.store import Script

#: How long an answer of the exchange is held back at the most, s: no test hangs for good.
HELD_S = 8.0


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that the exchange has read."""

    method: str
    path: str
    algo_id: int | None


@dataclass(frozen=True, slots=True)
class Said:
    """An answer of the exchange."""

    status: HTTPStatus
    body: dict[str, Any]
    retry_after_s: int | None = None

    def wire(self) -> bytes:
        """It as HTTP/1.1."""
        body = json.dumps(self.body).encode()
        fields = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        if self.retry_after_s is not None:
            fields += f"Retry-After: {self.retry_after_s}\r\n"
        return f"HTTP/1.1 {self.status.value} {self.status.phrase}\r\n{fields}\r\n".encode() + body


CLOCK_ERROR = Said(HTTPStatus.BAD_REQUEST, {"code": -1021, "msg": "Timestamp outside of the recvWindow."})
OVERLOADED = Said(HTTPStatus.SERVICE_UNAVAILABLE, {"code": -1008, "msg": "Server is currently overloaded."})
TOO_MANY = Said(HTTPStatus.TOO_MANY_REQUESTS, {"code": -1003, "msg": "Too many requests."}, 60)
BANNED = Said(HTTPStatus.IM_A_TEAPOT, {"code": -1003, "msg": "Way too many requests; banned."}, 60)


def well(asked: Asked) -> Said:
    """What an exchange without faults says."""
    if asked.path.endswith("/time"):
        return Said(HTTPStatus.OK, {"serverTime": time.time_ns() // 1_000_000})
    if asked.path.endswith("/exchangeInfo"):
        return Said(HTTPStatus.OK, {})
    order: dict[str, Any] = {"algoId": asked.algo_id, "clientAlgoId": "x"}
    if asked.method == "GET":
        return Said(HTTPStatus.OK, {**order, "symbol": "BTCUSDT", "algoStatus": "NEW", "actualOrderId": ""})
    return Said(HTTPStatus.OK, {**order, "code": "200", "msg": "success"})


class Answerer:
    """An exchange that answers each request as ``behave`` says, in a thread for each connection.

    The first ``opened`` connections are opened at once, all others when ``may_open`` is set (with TLS alone).
    """

    def __init__(
        self, behave: Callable[[Asked], Said] = well, tls: ssl.SSLContext | None = None, opened: int = 0
    ) -> None:
        self._behave = behave
        self._tls = tls
        self._opened = opened
        self.may_open = threading.Event()
        self.asked: list[Asked] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        scheme = "https" if tls else "http"
        self.url = f"{scheme}://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self.may_open.set()
        end_server(self._listener, self._sockets, self._threads)

    def count(self) -> Counter[str]:
        """How many requests of each kind came: by their method, or as `time`."""
        return Counter("time" if asked.path.endswith("/time") else asked.method for asked in list(self.asked))

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._threads.append(threading.Thread(target=self._serve, args=(client, len(self._threads))))
                self._threads[-1].start()

    def _serve(self, client: socket.socket, number: int) -> None:
        try:
            if self._tls is not None:
                if number > self._opened:
                    self.may_open.wait(HELD_S)
                client = self._tls.wrap_socket(client, server_side=True)
        except OSError:
            client.close()
            return
        self._sockets.append(client)
        with contextlib.suppress(OSError), client.makefile("rb") as lines:
            while words := lines.readline().decode().split():
                while lines.readline() not in (b"\r\n", b""):
                    pass
                path, _, query = words[1].partition("?")
                algo_id = re.search(r"algoId=(\d+)", query)
                asked = Asked(words[0], path, int(algo_id[1]) if algo_id else None)
                self.asked.append(asked)
                client.sendall(self._behave(asked).wire())


class Relay:
    """Between a crew and Redis: it can swallow what comes behind a settlement, as if the answer had been lost."""

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._settle = Script("settle.lua").sha.encode()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._is_armed = False
        self._unheard: list[str] = []

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        end_server(self._listener, self._sockets, self._threads)

    def swallow_one(self) -> str:
        """Swallow the answer of the next settlement; gives the connection's address as Redis knows it."""
        count, self._is_armed = len(self._unheard), True
        eventually(lambda: len(self._unheard) > count, 5, "a settlement was carried out unheard")
        return self._unheard[-1]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._upstream))
                self._sockets += (client, server)
                mute = threading.Event()
                for pair in ((client, server, mute, False), (server, client, mute, True)):
                    self._threads.append(threading.Thread(target=self._carry, args=pair))
                    self._threads[-1].start()

    def _carry(self, source: socket.socket, target: socket.socket, mute: threading.Event, is_answer: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
                if is_answer and mute.is_set():
                    host, port = source.getsockname()
                    self._unheard.append(f"{host}:{port}")
                    continue
                if not is_answer and self._is_armed and self._settle in data:
                    self._is_armed = False
                    mute.set()
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What a test opens in the midst of it."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def events(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[dict[str, Any]]]:
    """The fields of what this process' crews have logged under a name."""
    caplog.set_level("INFO", "cancel")
    return lambda name: [vars(record)["fields"] for record in list(caplog.records) if record.msg == name]


Events = Callable[[str], list[dict[str, Any]]]


def enqueued(client: CancelClient, count: int, first: int = 1) -> list[Ticket]:
    """New jobs."""
    return client.cancel_many(CancelRequest(algo_id=first + i) for i in range(count))


def recorded_once(port: int, tickets: Iterable[Ticket], hands: Hands, events: Events) -> None:
    """See that each job's outcome stands once, was logged once, and none was taken for another's."""
    expected = dict.fromkeys((ticket.id for ticket in tickets), 1)
    with redis.Redis(port=port) as connection:
        assert Counter(outcome.id for outcome in Peek(connection).ledger()) == expected
    eventually(lambda: hands.crew.in_flight() == 0, what="each is told of")
    assert Counter(event["id"] for event in events("outcome")) == expected
    assert hands.crew.outcomes == len(expected)
    assert events("fenced") == []
    assert events("defect") == []


def connections_since(connection: redis.Redis, before: int = 0) -> int:
    """How many connections the server took since that many."""
    return int(connection.info("stats")["total_connections_received"]) - before


def scripts_called(connection: redis.Redis) -> int:
    """How many scripts the server was asked to run."""
    return int(connection.info("commandstats")["cmdstat_evalsha"]["calls"])


# ---- the gate -------------------------------------------------------------------------------------------------------


def test_after_a_429_nothing_leaves(valkey: Valkey, client: CancelClient, tmp_path: Path, stack: ExitStack) -> None:
    """Once a 429 was heard nothing more is sent, neither over connections that are being opened nor over those that
    fall free: what was not sent goes back to the queue."""
    ca_file, key_file = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ca_file, key_file)
    heard = threading.Event()

    def behave(asked: Asked) -> Said:
        if asked.algo_id == 1:
            eventually(lambda: len(server.asked) >= OPENED_AT_ONCE)
        else:
            heard.wait(HELD_S)
        return TOO_MANY

    server = stack.enter_context(Answerer(behave, context, opened=OPENED_AT_ONCE))
    stack.callback(heard.set)
    enqueued(client, 64)
    hands = stack.enter_context(Hands(valkey.url, server.url, 64, ca_file=ca_file))
    eventually(hands.is_closed, what="the first 429 was heard")
    server.may_open.set()
    heard.set()

    eventually(lambda: hands.crew.in_flight() == 0, what="all jobs are handed back")
    assert server.count() == {"DELETE": OPENED_AT_ONCE}
    with redis.Redis(port=valkey.port) as connection:
        assert connection.llen("rq:queue:cancels") + connection.zcard("rq:scheduled:cancels") == 64


def test_after_a_418_no_clock_is_measured(valkey: Valkey, client: CancelClient, stack: ExitStack) -> None:
    """While the clock is measured for those whom it failed, another's 418 stops the measurement, and none is sent
    anew."""
    measuring, heard = threading.Event(), threading.Event()

    def behave(asked: Asked) -> Said:
        if asked.path.endswith("/time"):
            measuring.set()
            heard.wait(HELD_S)
            return well(asked)
        if asked.algo_id == 7:
            measuring.wait(HELD_S)
            eventually(lambda: server.count()["DELETE"] == 8)
            return BANNED
        return CLOCK_ERROR

    server = stack.enter_context(Answerer(behave))
    stack.callback(heard.set)
    enqueued(client, 8)
    hands = stack.enter_context(Hands(valkey.url, server.url, 16))
    eventually(hands.is_closed, what="the 418 was heard")
    heard.set()

    eventually(lambda: hands.crew.in_flight() == 0, what="all jobs are handed back")
    assert server.count() == {"DELETE": 8, "time": 1}


def test_a_418_to_a_measurement_closes_the_gate(valkey: Valkey, client: CancelClient, stack: ExitStack) -> None:
    """A 418 to a measurement of the clock closes the gate for all workers, and those who waited for it send nothing."""

    def behave(asked: Asked) -> Said:
        if not asked.path.endswith("/time"):
            return CLOCK_ERROR
        eventually(lambda: server.count()["DELETE"] == 8)
        return BANNED

    server = stack.enter_context(Answerer(behave))
    enqueued(client, 8)
    hands = stack.enter_context(Hands(valkey.url, server.url, 16))

    eventually(hands.is_closed, what="the gate is closed")
    eventually(lambda: hands.crew.in_flight() == 0, what="all jobs are handed back")
    assert server.count() == {"DELETE": 8, "time": 1}
    with redis.Redis(port=valkey.port) as connection:
        peek = Peek(connection)
        until_ms = int(peek("HGET", peek.keys.gate("all"), "until_ms"))
        assert 50_000 < until_ms - peek.now_ms() <= 61_000


# ---- a Redis that refuses -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Held:
    """Jobs whose requests were sent, and whose answers wait until they are let go."""

    valkey: Valkey
    connection: redis.Redis
    client: CancelClient
    hands: Hands
    tickets: list[Ticket]
    let_go: threading.Event


@contextlib.contextmanager
def held(count: int, *options: str) -> Iterator[Held]:
    """A server of its own, with a crew that has sent so many requests."""
    let_go = threading.Event()

    def behave(asked: Asked) -> Said:
        let_go.wait(HELD_S)
        return well(asked)

    with ExitStack() as stack:
        valkey = stack.enter_context(running_valkey(*options))
        client = stack.enter_context(CancelClient.from_url(valkey.url))
        connection = stack.enter_context(redis.Redis(port=valkey.port))
        server = stack.enter_context(Answerer(behave))
        hands = stack.enter_context(Hands(valkey.url, server.url, 64))
        stack.callback(let_go.set)
        tickets = enqueued(client, count)
        eventually(lambda: len(server.asked) == count, what="all are sent")
        yield Held(valkey, connection, client, hands, tickets, let_go)


def let_go_and_be_refused(held: Held) -> None:
    """Let the exchange answer, and wait until the server has refused to record the outcomes."""
    held.let_go.set()
    eventually(lambda: held.hands.crew.working_on() == 0, what="all are answered")
    eventually(lambda: held.hands.crew._settler._is_resting, what="the outcomes are refused")
    assert held.hands.crew.in_flight() == len(held.tickets)


def test_a_busy_server_costs_no_outcome(events: Events) -> None:
    """Outcomes that come up while the server is busy with a long script are recorded when it is not any more."""
    with (
        held(5, "--appendonly", "no", "--lua-time-limit", "50") as world,
        redis.Redis(port=world.valkey.port, socket_timeout=20) as other,
    ):

        def keep_busy() -> None:
            with contextlib.suppress(redis.ResponseError):  # it is killed
                other.eval("while true do end", 0)

        def is_busy() -> bool:
            try:
                return not world.connection.ping()
            except redis.ResponseError as error:
                return "BUSY" in str(error)

        thread = threading.Thread(target=keep_busy)
        thread.start()
        try:
            eventually(is_busy, what="the script runs")
            let_go_and_be_refused(world)
        finally:
            world.connection.script_kill()
            thread.join()

        assert at_first_try(outcomes(world.client, world.tickets, 2))
        recorded_once(world.valkey.port, world.tickets, world.hands, events)


def test_a_read_only_server_costs_no_outcome(events: Events) -> None:
    """Outcomes that a server refuses that is read-only for a time are recorded later, without connecting anew for
    each refusal."""
    with held(16, "--appendonly", "no") as world:
        world.connection.execute_command("REPLICAOF", "127.0.0.1", free_port())
        before = connections_since(world.connection)
        let_go_and_be_refused(world)
        asked = scripts_called(world.connection)
        eventually(lambda: scripts_called(world.connection) >= asked + 4, what="it refuses some more")
        # The claim that waits is sent away with its connection; what is refused after that keeps its own.
        assert connections_since(world.connection, before) <= 2
        world.connection.execute_command("REPLICAOF", "NO", "ONE")

        assert at_first_try(outcomes(world.client, world.tickets, 3))
        recorded_once(world.valkey.port, world.tickets, world.hands, events)


def test_a_full_server_takes_outcomes(stack: ExitStack, events: Events) -> None:
    """A server without memory gives and settles the jobs that it has, and its refusals break no connection."""
    valkey = stack.enter_context(running_valkey("--appendonly", "no"))
    client = stack.enter_context(CancelClient.from_url(valkey.url))
    connection = stack.enter_context(redis.Redis(port=valkey.port))
    server = stack.enter_context(Answerer())
    tickets = enqueued(client, 60)
    connection.config_set("maxmemory", "1mb")
    before = connections_since(connection)
    hands = stack.enter_context(Hands(valkey.url, server.url, 16))

    assert at_first_try(outcomes(client, tickets))
    asked = scripts_called(connection)
    eventually(lambda: scripts_called(connection) >= asked + 3, what="it is asked for more jobs")
    with pytest.raises(redis.OutOfMemoryError):
        connection.set("one", "more")
    assert connections_since(connection, before) == 2
    recorded_once(valkey.port, tickets, hands, events)


# ---- connections that break -----------------------------------------------------------------------------------------


def test_a_connection_that_breaks_again_and_again(
    valkey: Valkey, client: CancelClient, connection: redis.Redis, stack: ExitStack, events: Events
) -> None:
    """Under load one of the connections to Redis is killed again and again, with settlements carried out unheard: each
    outcome is recorded once and told once, and nobody takes it for another worker's."""
    count, kills, tried = 1000, 8, set[int]()

    def behave(asked: Asked) -> Said:
        time.sleep(0.02)
        if asked.method == "DELETE" and (asked.algo_id or 0) % 4 == 0 and asked.algo_id not in tried:
            tried.add(asked.algo_id or 0)
            return OVERLOADED
        return well(asked)

    server = stack.enter_context(Answerer(behave))
    relay = stack.enter_context(Relay(valkey.port))
    tickets = enqueued(client, count)
    hands = stack.enter_context(Hands(relay.url, server.url, 16, LEASE_S="1", BACKOFF_CAP_MS="100"))
    for n in range(kills):
        eventually(lambda n=n: connection.xlen("cancels:outcomes") > n * count // 10)  # type: ignore[misc]
        address = relay.swallow_one()
        assert connection.client_kill_filter(addr=address) == 1

    found = outcomes(client, tickets, 20)
    assert {outcome.kind for outcome in found} == {OutcomeKind.CANCELLED}
    recorded_once(valkey.port, tickets, hands, events)


def test_held_outcomes_go_before_a_claim_waits(events: Events) -> None:
    """When Redis is back after a restart, the outcomes that were held are recorded before a claim waits for jobs."""
    with held(3, "--appendonly", "yes", "--appendfsync", "always") as world:
        world.valkey.stop(signal.SIGKILL)
        world.let_go.set()
        eventually(lambda: world.hands.crew.working_on() == 0, what="all are answered")
        assert world.hands.crew.in_flight() == 3
        world.valkey.start()
        eventually(lambda: len(world.connection.client_list()) > 1, what="the crew connects")
        back_at_s = time.monotonic()

        eventually(lambda: world.connection.xlen("cancels:outcomes") == 3, what="the outcomes are recorded")
        assert time.monotonic() - back_at_s < 0.5
        recorded_once(world.valkey.port, world.tickets, world.hands, events)


# ---- clocks and threads ---------------------------------------------------------------------------------------------


def test_a_slow_measurement_holds_up_nobody_else(
    valkey: Valkey, client: CancelClient, connection: redis.Redis, stack: ExitStack, events: Events
) -> None:
    """While forty orders wait for a measurement of the clock that takes long, the crew connects to Redis anew and
    cancels other orders."""
    measured = threading.Event()

    def behave(asked: Asked) -> Said:
        if asked.path.endswith("/time"):
            measured.wait(HELD_S)
        elif asked.algo_id is not None and asked.algo_id <= 40 and not measured.is_set():
            return CLOCK_ERROR
        return well(asked)

    server = stack.enter_context(Answerer(behave))
    hands = stack.enter_context(Hands(valkey.url, server.url, 128))
    stack.callback(measured.set)
    late = enqueued(client, 40)
    eventually(lambda: server.count() == {"DELETE": 40, "time": 1}, what="all wait for the clock")
    own = connection.client_id()
    lines = [each["id"] for each in connection.client_list() if int(each["id"]) != own]
    for each in lines:
        connection.client_kill_filter(_id=each)
    with CancelClient.from_url(valkey.url) as other:
        others = enqueued(other, 5, first=101)
        assert at_first_try(outcomes(other, others, 2))
        assert server.count()["time"] == 1
        assert not measured.is_set()
        measured.set()
        assert {outcome.kind for outcome in outcomes(other, late)} == {OutcomeKind.CANCELLED}
    recorded_once(valkey.port, late + others, hands, events)


@pytest.fixture
def no_more(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], pytest.MonkeyPatch]:
    """Lets no thread start whose name begins so, until it is undone."""
    start = threading.Thread.start

    def forbid(prefix: str) -> pytest.MonkeyPatch:
        def start_unless_forbidden(thread: threading.Thread) -> None:
            if thread.name.startswith(prefix):
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", start_unless_forbidden)
        return monkeypatch

    return forbid


NoMore = Callable[[str], pytest.MonkeyPatch]


def test_no_thread_to_open_a_connection(
    valkey: Valkey, client: CancelClient, stack: ExitStack, no_more: NoMore, events: Events
) -> None:
    """While no thread can be had that opens a connection, the calls fail unsent, and are made later."""
    server = stack.enter_context(Answerer())
    forbidden = no_more("cancel-opener")
    hands = stack.enter_context(Hands(valkey.url, server.url, 4, BACKOFF_CAP_MS="100"))
    tickets = enqueued(client, 6)
    eventually(lambda: {event["id"] for event in events("again")} == {ticket.id for ticket in tickets})
    assert server.asked == []
    forbidden.undo()

    found = outcomes(client, tickets)
    assert {outcome.kind for outcome in found} == {OutcomeKind.CANCELLED}
    assert {outcome.attempts[0].msg for outcome in found} == {"could not connect: RuntimeError"}
    assert server.count() == {"DELETE": 6}
    recorded_once(valkey.port, tickets, hands, events)


def test_no_thread_to_reach_redis(
    valkey: Valkey, client: CancelClient, stack: ExitStack, no_more: NoMore, events: Events
) -> None:
    """While no thread can be had that connects to Redis, the crew tries again, and works as soon as it can."""
    server = stack.enter_context(Answerer())
    forbidden = no_more("cancel-redis")
    hands = stack.enter_context(Hands(valkey.url, server.url, 4))
    tickets = enqueued(client, 6)
    eventually(lambda: events("redis"), what="it says so")
    assert hands.crew.is_alive
    assert hands.crew.refused is None
    forbidden.undo()

    assert at_first_try(outcomes(client, tickets))
    recorded_once(valkey.port, tickets, hands, events)


# ---- leaving --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Callable[[Valkey, Answerer], Worker]]:
    """Starts a worker process that has four seconds to leave."""
    fleets: list[Workers] = []

    def start(valkey: Valkey, server: Answerer) -> Worker:
        addresses = {"REDIS_URL": valkey.url, "BINANCE_BASE_URL": server.url}
        fleets.append(Workers(tmp_path, {**KEYS, **addresses, "SHUTDOWN_GRACE_S": "4"}))
        return fleets[-1].start()

    yield start
    for each in fleets:
        each.stop()


def leaves_in_time(worker: Worker) -> None:
    """See that a signal ends it within its four seconds, by itself."""
    began_s = time.monotonic()
    assert worker.stop(timeout_s=10) == 0
    assert time.monotonic() - began_s <= 4
    assert "event=stopped" in worker.output()
    assert "Traceback" not in worker.output()


def test_leaving_while_the_clock_is_measured(
    valkey: Valkey, client: CancelClient, stack: ExitStack, fleet: Callable[[Valkey, Answerer], Worker]
) -> None:
    """A worker whose orders wait for the exchange's clock leaves within its grace."""
    started, measuring, answers = threading.Event(), threading.Event(), threading.Event()

    def behave(asked: Asked) -> Said:
        if started.is_set() and asked.path.endswith("/time"):
            measuring.set()
            answers.wait(HELD_S)
        return CLOCK_ERROR if asked.algo_id is not None else well(asked)

    server = stack.enter_context(Answerer(behave))
    stack.callback(answers.set)
    worker = fleet(valkey, server)
    started.set()
    enqueued(client, 4)
    assert measuring.wait(10)

    leaves_in_time(worker)


def test_leaving_while_redis_stands_still(stack: ExitStack, fleet: Callable[[Valkey, Answerer], Worker]) -> None:
    """A worker whose Redis stands still leaves within its grace, though it cannot record what was answered."""
    answers = threading.Event()

    def behave(asked: Asked) -> Said:
        if asked.algo_id is not None:
            answers.wait(HELD_S)
        return well(asked)

    valkey = stack.enter_context(running_valkey("--appendonly", "no"))
    client = stack.enter_context(CancelClient.from_url(valkey.url))
    server = stack.enter_context(Answerer(behave))
    stack.callback(answers.set)
    worker = fleet(valkey, server)
    enqueued(client, 4)
    eventually(lambda: server.count()["DELETE"] == 4, what="all are sent")
    assert valkey.process is not None
    valkey.process.send_signal(signal.SIGSTOP)
    stack.callback(valkey.process.send_signal, signal.SIGCONT)
    answers.set()

    leaves_in_time(worker)
