"""Many requests in flight in one loop: how many connections are opened at once, what is claimed ahead, what holds up
whom. Against a real Redis and the local exchange."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import pytest
import redis
from worker.crew import Crew

from producer import CancelClient, CancelRequest, Outcome, OutcomeKind, Ticket
from tests.conftest import API_KEY, API_SECRET
from tests.fault.proxy import Proxy
from tests.integration.test_sandbox_server import certificate
from tests.servers import Peek, Valkey, Worker, Workers, end_server, eventually, running_valkey
from worker.clock import ServerClock
from worker.exchange import Exchange
from worker.sandbox.control import RunningExchange
from worker.settings import Settings
from worker.store import Claimed
from worker.wiring import lease_of, open_canceller, open_redis, open_store

#: Connections that a worker opens at the same time at the most.
OPENED_AT_ONCE = 8
#: How long connecting may take before it is given up, s.
CONNECT_S = 1.0


class Front:
    """A relay in front of the exchange: it can be slow with handshakes, hold answers back, and stop accepting."""

    def __init__(self, exchange: RunningExchange, tls: ssl.SSLContext | None = None, handshake_s: float = 0.0) -> None:
        self._upstream = urlsplit(exchange.url).port
        self._tls = tls
        self._handshake_s = handshake_s
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._lock = threading.Lock()
        self._opening = 0
        self.most_opening = 0
        self.opened = 0
        self.answers_pass = threading.Event()
        self.answers_pass.set()
        self._deaf = False
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._accepting = self._start(self._accept)

    @property
    def url(self) -> str:
        """The exchange by way of here."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.answers_pass.set()
        end_server(self._listener, self._sockets, self._threads)

    def go_deaf(self) -> None:
        """Accept nothing more: the kernel's queue is full, and who connects hears nothing at all."""
        self._deaf = True
        self._listener.listen(0)
        self._call()
        self._accepting.join()  # by that call: it took it off the kernel's queue
        while self._call():
            pass

    def hear(self) -> None:
        """Accept again."""
        self._deaf = False
        self._listener.listen(128)
        self._accepting = self._start(self._accept)

    def _call(self) -> bool:
        """Connect, and say nothing; whether that went well."""
        caller = socket.socket()
        self._sockets.append(caller)
        caller.setblocking(False)
        caller.connect_ex(self._listener.getsockname())
        return bool(select.select([], [caller], [], 0.1)[1])

    def _start(self, work: Any, *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=work, args=arguments)
        self._threads.append(thread)
        thread.start()
        return thread

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while not self._deaf:
                client, _ = self._listener.accept()
                self._start(self._meet, client)

    def _meet(self, client: socket.socket) -> None:
        with self._lock:
            self._opening += 1
            self.opened += 1
            self.most_opening = max(self.most_opening, self._opening)
        time.sleep(self._handshake_s)
        with self._lock:  # before the last word of the handshake: whoever has it may open the next connection
            self._opening -= 1
        try:
            client = self._tls.wrap_socket(client, server_side=True) if self._tls else client
            server = socket.create_connection(("127.0.0.1", self._upstream))
        except OSError:
            client.close()
            return
        self._sockets += (client, server)
        self._start(self._carry, client, server, False)
        self._carry(server, client, True)

    def _carry(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if is_answer:
                    self.answers_pass.wait()
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Hands:
    """A crew in the test's own process, put together as a worker's is, without the worker's upkeep."""

    def __init__(
        self,
        redis_url: str,
        exchange_url: str,
        size: int,
        name: str = "hands",
        ca_file: str = "",
        kind: type[Crew] = Crew,
        **variables: str,
    ) -> None:
        variables = {"REDIS_URL": redis_url, **KEYS, "WORKER_CONCURRENCY": str(size), **variables}
        settings = Settings.from_env(variables)
        self._redis = open_redis(settings)
        store = open_store(self._redis, settings, name, "cancels")
        clock = ServerClock()
        self.exchange = Exchange(
            exchange_url,
            recv_window_ms=settings.recv_window_ms,
            clock=clock,
            pool_size=size + 2,
            connect_timeout_s=CONNECT_S,
            ca_file=ca_file or None,
        )
        self.now_ms = store.clock.now_ms
        canceller, self.gate = open_canceller(settings, self.exchange, clock, store, name)
        self.crew = kind(size, lease_of(settings), store, canceller, self.exchange, self.gate)

    def is_closed(self) -> bool:
        """Whether its gate is closed, as far as it knows."""
        return self.gate.closed(self.now_ms())

    def __enter__(self) -> Self:
        self.crew.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.crew.stop()
        self.crew.join(10)
        self.exchange.close()
        self._redis.close()


KEYS = {"BINANCE_API_KEY": API_KEY, "BINANCE_API_SECRET": API_SECRET}


@pytest.fixture
def peek(connection: redis.Redis) -> Peek:
    """A look at the queue's keys."""
    return Peek(connection)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What a test opens in the midst of it."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def tls(tmp_path: Path) -> tuple[ssl.SSLContext, str]:
    """A server's side of TLS, and the file that vouches for it."""
    ca_file, key_file = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ca_file, key_file)
    return context, ca_file


def ask(client: CancelClient, exchange: RunningExchange, count: int) -> list[Ticket]:
    """Ask for the cancels of fresh orders."""
    return client.cancel_many(CancelRequest(algo_id=order.algo_id) for order in exchange.add_orders(count))


def outcomes(client: CancelClient, tickets: Iterable[Ticket], timeout_s: float = 15) -> list[Outcome]:
    """Their outcomes, once all of them are there."""
    ids = [ticket.id for ticket in tickets]
    eventually(lambda: len(client.outcomes_of(ids)) == len(ids), timeout_s, "all outcomes")
    return list(client.outcomes_of(ids).values())


def at_first_try(found: Iterable[Outcome]) -> bool:
    """Whether each was cancelled by its only attempt."""
    said = {(outcome.kind, *(attempt.verdict for attempt in outcome.attempts)) for outcome in found}
    return said == {(OutcomeKind.CANCELLED, "confirmed")}


# ---- connections to the exchange ------------------------------------------------------------------------------------


@pytest.mark.parametrize("speaks_tls", [True, False])
def test_a_burst_opens_few_connections_at_once(
    valkey: Valkey,
    client: CancelClient,
    exchange: RunningExchange,
    tls: tuple[ssl.SSLContext, str],
    stack: ExitStack,
    speaks_tls: bool,
) -> None:
    """A cold burst of 64 opens eight connections at a time, and no order pays for that with an attempt."""
    context, ca_file = tls
    tickets = ask(client, exchange, 128)
    exchange.set_latency_ms(20)
    front = stack.enter_context(Front(exchange, context if speaks_tls else None, 0.1 if speaks_tls else 0.0))
    stack.enter_context(Hands(valkey.url, front.url, 64, ca_file=ca_file))

    assert at_first_try(outcomes(client, tickets))
    assert front.most_opening <= OPENED_AT_ONCE
    assert front.opened <= 64
    if speaks_tls:
        assert front.most_opening == OPENED_AT_ONCE


def test_a_connection_that_hangs_holds_up_nobody_else(
    valkey: Valkey, client: CancelClient, exchange: RunningExchange, stack: ExitStack
) -> None:
    """While one connection cannot be opened, orders go out over those that stand; its own order is tried again."""
    front = stack.enter_context(Front(exchange))
    hands = stack.enter_context(Hands(valkey.url, front.url, 4))
    assert hands.exchange.keep_warm(2) == 2
    front.go_deaf()
    exchange.set_latency_ms(100)
    began_s = time.monotonic()
    first = ask(client, exchange, 3)
    eventually(lambda: len(client.outcomes_of(ticket.id for ticket in first)) == 2, CONNECT_S / 2)
    exchange.set_latency_ms(0)
    for _ in range(10):
        assert at_first_try(outcomes(client, ask(client, exchange, 1), CONNECT_S / 2))
    assert time.monotonic() - began_s < CONNECT_S
    assert len(client.outcomes_of(ticket.id for ticket in first)) == 2
    front.hear()

    assert {outcome.kind for outcome in outcomes(client, first)} == {OutcomeKind.CANCELLED}
    assert {entry.deletes for entry in exchange.book().values()} == {1}


def test_who_waits_to_open_a_connection_takes_one_that_falls_free(
    valkey: Valkey, client: CancelClient, exchange: RunningExchange, stack: ExitStack
) -> None:
    """While as many connections as may be opened at once all hang, the other orders go out over those that stand."""
    front = stack.enter_context(Front(exchange))
    hands = stack.enter_context(Hands(valkey.url, front.url, 16))
    assert hands.exchange.keep_warm(2) == 2
    front.go_deaf()
    exchange.set_latency_ms(50)
    tickets = ask(client, exchange, 2 + OPENED_AT_ONCE + 4)
    ids = [ticket.id for ticket in tickets]

    eventually(lambda: len(client.outcomes_of(ids)) >= 6, CONNECT_S * 0.7, "all but those that hang")
    front.hear()
    assert {outcome.kind for outcome in outcomes(client, tickets)} == {OutcomeKind.CANCELLED}


# ---- claimed ahead --------------------------------------------------------------------------------------------------


class Hasty(Crew):
    """Claims three jobs ahead as soon as all its slots are taken, once."""

    has_claimed_ahead = False

    def _room(self) -> int:
        return 3 if self._running == self._size and not self.has_claimed_ahead else super()._room()

    def _claimed(self, claimed: Claimed) -> None:
        super()._claimed(claimed)
        self.has_claimed_ahead = self.has_claimed_ahead or bool(self._ready)


def test_what_was_claimed_ahead_goes_back_when_the_exchange_stalls(
    valkey: Valkey, client: CancelClient, exchange: RunningExchange, stack: ExitStack
) -> None:
    """A job that was claimed for a slot that does not fall free is soon handed back, unsent, and another sends it."""
    front = stack.enter_context(Front(exchange))
    front.answers_pass.clear()
    tickets = ask(client, exchange, 100)
    ids = [ticket.id for ticket in tickets]
    stalled = stack.enter_context(Hands(valkey.url, front.url, 16, "stalled", kind=Hasty)).crew
    assert isinstance(stalled, Hasty)
    eventually(lambda: stalled.has_claimed_ahead, what="it has claimed ahead")
    stack.enter_context(Hands(valkey.url, exchange.url, 64, "other"))

    eventually(lambda: stalled.working_on() == 16, 1, "what was not sent is handed back")
    eventually(lambda: len(client.outcomes_of(ids)) == 100 - 16, 3, "the other has sent the rest")
    assert len(client.outcomes_of(ids)) == 100 - 16
    front.answers_pass.set()
    found = outcomes(client, tickets)
    assert at_first_try(found)
    assert [outcome.worker for outcome in found].count("stalled") == 16
    assert {entry.deletes for entry in exchange.book().values()} == {1}


def test_one_at_a_time(workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek) -> None:
    """With one slot the orders are sent one after the other, and none is taken that another worker could send."""
    exchange.set_latency_ms(250)
    algo_ids = [order.algo_id for order in exchange.add_orders(5)]
    tickets = client.cancel_many(CancelRequest(algo_id=algo_id) for algo_id in algo_ids)
    workers.start(WORKER_CONCURRENCY="1")
    for n, ticket in enumerate(tickets):
        eventually(lambda n=n: exchange.book()[algo_ids[n]].deletes == 1, what="it is sent")  # type: ignore[misc]
        for _ in range(20):
            held, waiting = peek("ZRANGE", peek.keys.leases, 0, -1), peek.waiting()
            if client.outcome(ticket.id) is not None:
                break  # perhaps between those two looks
            assert held == [ticket.id]
            assert waiting == [later.id for later in tickets[n + 1 :]]
            time.sleep(0.005)

    assert at_first_try(outcomes(client, tickets))
    assert exchange.stats().peak_in_flight == 1


def test_many_that_end_at_once(
    workers: Workers, client: CancelClient, connection: redis.Redis, exchange: RunningExchange
) -> None:
    """Hundreds of jobs of one claim that need no request end one after another, and the worker goes on."""
    tickets = client.cancel_many(CancelRequest(algo_id=n + 1, account="nobody") for n in range(512))
    worker = workers.start(WORKER_CONCURRENCY="512")
    found = outcomes(client, tickets)

    assert {outcome.kind for outcome in found} == {OutcomeKind.REFUSED}
    assert len({connection.hget(f"rq:job:{ticket.id}", "started_at") for ticket in tickets}) == 1  # in one claim
    assert at_first_try(outcomes(client, ask(client, exchange, 3)))
    assert "event=defect" not in worker.output()
    assert worker.stop() == 0


# ---- connections to Redis -------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(workers: Workers) -> Iterator[Valkey]:
    """A server for the workers that closes connections on which nothing was asked for two seconds."""
    with running_valkey("--appendonly", "no", "--timeout", "2") as server:
        workers.environment["REDIS_URL"] = server.url
        yield server


def assert_untroubled(worker: Worker, seconds: float) -> None:
    """See that the worker does not speak of Redis for so long."""
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at:
        said = [line for line in worker.output().splitlines() if "event=redis " in line or "event=defect" in line]
        assert said == []
        time.sleep(0.1)


def test_a_server_that_closes_idle_connections(impatient: Valkey, workers: Workers, exchange: RunningExchange) -> None:
    """Neither of the two connections is ever idle for long: waiting or slowly at work, the worker loses none."""
    worker = workers.start()
    assert_untroubled(worker, 4)
    with CancelClient.from_url(impatient.url) as client:
        for _ in range(6):
            assert at_first_try(outcomes(client, ask(client, exchange, 1)))
            assert_untroubled(worker, 0.5)


def test_a_server_that_closes_idle_connections_while_nothing_is_claimed(impatient: Valkey, workers: Workers) -> None:
    """While RQ is suspended a worker looks by both connections in turn, and loses none either."""
    with redis.Redis(port=impatient.port) as connection:
        connection.config_set("timeout", 3)
        connection.set("rq:suspended", 1)
    assert_untroubled(workers.start(), 5.5)


# ---- leaving --------------------------------------------------------------------------------------------------------


class Greedy(Crew):
    """Claims ahead without end, and stops by itself when it has jobs ahead and a claim for more is on its way."""

    def _room(self) -> int:
        return super()._room() if self._running < self._size else 3

    def _lead(self) -> None:
        super()._lead()
        if self._ready and self._claiming:
            self._stop()


def test_what_a_stop_hands_back_keeps_its_order(
    valkey: Valkey, client: CancelClient, exchange: RunningExchange, peek: Peek, stack: ExitStack
) -> None:
    """Jobs that were claimed and not sent stand in their order again after a stop, those of a claim on its way too."""
    proxy = stack.enter_context(Proxy(valkey.port))
    proxy.latency(20, peek.keys.claiming.encode())
    exchange.set_latency_ms(300)
    tickets = ask(client, exchange, 60)
    with Hands(proxy.redis_url, exchange.url, 4, kind=Greedy):
        eventually(lambda: len(peek.ledger()) == 4, what="those in flight have ended")

    assert peek.waiting() == [ticket.id for ticket in tickets[4:]]
