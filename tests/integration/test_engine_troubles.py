"""The engine in trouble: the gate closes under it, Redis refuses, breaks off or restarts, the clock is slow to tell.

Against a real Redis and an exchange that answers, or keeps silent, as each test says.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import redis

from producer import CancelClient, OutcomeKind, Ticket
from tests.engines import (
    BANNED,
    CLOCK_ERROR,
    HELD_S,
    OVERLOADED,
    TOO_MANY,
    Answerer,
    Asked,
    RunningEngine,
    Said,
    enqueued,
    well,
)
from tests.integration.conftest import Logged
from tests.loopback import certificate
from tests.orders import at_first_try, outcomes
from tests.servers import Peek, Valkey, eventually, running_valkey
from worker.transport_asyncio import OPENERS


def recorded_once(port: int, tickets: Iterable[Ticket], running: RunningEngine, logged: Logged) -> None:
    """See that each job's outcome stands once, was logged once, and none was taken for another's."""
    expected = dict.fromkeys((ticket.id for ticket in tickets), 1)
    with redis.Redis(port=port) as connection:
        assert Counter(outcome.id for outcome in Peek(connection).ledger()) == expected
    eventually(lambda: running.engine.in_hand == 0, what="each is told of")
    assert Counter(event["id"] for event in logged("outcome")) == expected
    assert running.engine.outcomes == len(expected)
    assert logged("fenced") == []
    assert logged("defect") == []


# ---- the gate -------------------------------------------------------------------------------------------------------


def test_after_a_429_nothing_leaves(
    valkey: Valkey, client: CancelClient, peek: Peek, tmp_path: Path, stack: ExitStack
) -> None:
    """Once a 429 was heard nothing more is sent, neither over connections that are being opened nor over those that
    fall free: what was not sent goes back to the queue."""
    ca_file, key_file = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ca_file, key_file)
    heard = threading.Event()

    def behave(asked: Asked) -> Said:
        if asked.algo_id == 1:
            eventually(lambda: len(server.asked) >= OPENERS)
        else:
            heard.wait(HELD_S)
        return TOO_MANY

    server = stack.enter_context(Answerer(behave, context, opened=OPENERS))
    stack.callback(heard.set)
    enqueued(client, 64)
    running = stack.enter_context(RunningEngine(valkey.url, server.url, 64, ca_file=ca_file))
    eventually(running.is_closed, what="the first 429 was heard")
    server.may_open.set()
    heard.set()

    eventually(lambda: running.engine.in_hand == 0, what="all jobs are handed back")
    assert server.count() == {"DELETE": OPENERS}
    assert len(peek.waiting()) + peek("ZCARD", peek.keys.scheduled) == 64


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
    running = stack.enter_context(RunningEngine(valkey.url, server.url, 16))
    eventually(running.is_closed, what="the 418 was heard")
    heard.set()

    eventually(lambda: running.engine.in_hand == 0, what="all jobs are handed back")
    assert server.count() == {"DELETE": 8, "time": 1}


def test_a_418_to_a_measurement_closes_the_gate(
    valkey: Valkey, client: CancelClient, peek: Peek, stack: ExitStack
) -> None:
    """A 418 to a measurement of the clock closes the gate for all workers, and those who waited for it send nothing."""

    def behave(asked: Asked) -> Said:
        if not asked.path.endswith("/time"):
            return CLOCK_ERROR
        eventually(lambda: server.count()["DELETE"] == 8)
        return BANNED

    server = stack.enter_context(Answerer(behave))
    enqueued(client, 8)
    running = stack.enter_context(RunningEngine(valkey.url, server.url, 16))

    eventually(running.is_closed, what="the gate is closed")
    eventually(lambda: running.engine.in_hand == 0, what="all jobs are handed back")
    assert server.count() == {"DELETE": 8, "time": 1}
    until_ms = int(peek("HGET", peek.keys.gate("all"), "until_ms"))
    assert 50_000 < until_ms - peek.now_ms() <= 61_000


# ---- a Redis that refuses -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InFlight:
    """Jobs whose requests were sent, and whose answers wait until they are let go."""

    valkey: Valkey
    connection: redis.Redis
    client: CancelClient
    running: RunningEngine
    tickets: list[Ticket]
    let_go: threading.Event


@contextlib.contextmanager
def in_flight(count: int, *options: str) -> Iterator[InFlight]:
    """A server of its own, with an engine that has sent so many requests."""
    let_go = threading.Event()

    def behave(asked: Asked) -> Said:
        let_go.wait(HELD_S)
        return well(asked)

    with ExitStack() as stack:
        valkey = stack.enter_context(running_valkey(*options))
        client = stack.enter_context(CancelClient.from_url(valkey.url))
        connection = stack.enter_context(redis.Redis(port=valkey.port))
        server = stack.enter_context(Answerer(behave))
        running = stack.enter_context(RunningEngine(valkey.url, server.url, 64))
        stack.callback(let_go.set)
        tickets = enqueued(client, count)
        eventually(lambda: len(server.asked) == count, what="all are sent")
        yield InFlight(valkey, connection, client, running, tickets, let_go)


def test_a_busy_server_costs_no_outcome(logged: Logged) -> None:
    """Outcomes that come up while the server is busy with a long script are recorded when it is not any more."""
    with (
        in_flight(5, "--appendonly", "no", "--lua-time-limit", "50") as world,
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
            world.let_go.set()
            eventually(lambda: world.running.engine.working_on == 0, what="all are answered")
            eventually(lambda: logged("redis"), what="the outcomes are refused")
            assert world.running.engine.in_hand == 5
        finally:
            world.connection.script_kill()
            thread.join()

        assert at_first_try(outcomes(world.client, world.tickets, 4))
        recorded_once(world.valkey.port, world.tickets, world.running, logged)


# ---- connections that break -----------------------------------------------------------------------------------------


def test_a_slow_measurement_holds_up_nobody_else(
    valkey: Valkey, client: CancelClient, connection: redis.Redis, stack: ExitStack, logged: Logged
) -> None:
    """While forty orders wait for a measurement of the clock that takes long, the engine connects to Redis anew and
    cancels other orders."""
    measured = threading.Event()

    def behave(asked: Asked) -> Said:
        if asked.path.endswith("/time"):
            measured.wait(HELD_S)
        elif asked.algo_id is not None and asked.algo_id <= 40 and not measured.is_set():
            return CLOCK_ERROR
        return well(asked)

    server = stack.enter_context(Answerer(behave))
    running = stack.enter_context(RunningEngine(valkey.url, server.url, 128, BINANCE_RECV_WINDOW_MS="60000"))
    stack.callback(measured.set)
    late = enqueued(client, 40)
    eventually(lambda: server.count() == {"DELETE": 40, "time": 1}, what="all wait for the clock")
    own = connection.client_id()
    for each in connection.client_list():
        if int(each["id"]) != own:
            connection.client_kill_filter(_id=each["id"])
    with CancelClient.from_url(valkey.url) as other:
        others = enqueued(other, 5, first=101)
        assert at_first_try(outcomes(other, others, 4))
        assert server.count()["time"] == 1
        assert not measured.is_set()
        measured.set()
        assert {outcome.kind for outcome in outcomes(other, late)} == {OutcomeKind.CANCELLED}
    recorded_once(valkey.port, late + others, running, logged)


def test_a_clock_that_is_not_told_is_asked_for_once_a_second(
    valkey: Valkey, client: CancelClient, stack: ExitStack
) -> None:
    """However many requests by client id wait for the exchange's time: each question costs the address weight."""
    server = stack.enter_context(Answerer(lambda asked: OVERLOADED if asked.path.endswith("/time") else well(asked)))
    began_s = time.monotonic()
    stack.enter_context(RunningEngine(valkey.url, server.url, 64))
    for number in range(30):
        client.cancel(client_algo_id=f"x{number}")
        time.sleep(0.03)
    eventually(lambda: server.count()["time"] >= 4, what="the time is asked for again")
    assert server.count()["time"] <= time.monotonic() - began_s + 2
    assert server.count()["DELETE"] == 0


# ---- after an outage of the exchange --------------------------------------------------------------------------------

#: Of many jobs that back off by this, ms, some wait for longer than a test does.
LONG = "60000"


def test_one_success_after_an_outage_wakes_the_others(valkey: Valkey, client: CancelClient, stack: ExitStack) -> None:
    """Jobs that wait out a long backoff because the exchange did nothing for anybody go when it does again."""
    is_away = threading.Event()
    is_away.set()
    server = stack.enter_context(Answerer(lambda asked: OVERLOADED if is_away.is_set() else well(asked)))
    stack.enter_context(RunningEngine(valkey.url, server.url, 16, BACKOFF_BASE_MS=LONG, BACKOFF_CAP_MS=LONG))
    tickets = enqueued(client, 40)
    eventually(lambda: server.count()["DELETE"] >= 40, 25, "all have failed")
    time.sleep(1.1)  # what is shorter is no outage
    is_away.clear()
    tickets += enqueued(client, 1, first=101)

    found = outcomes(client, tickets, 25)

    assert {outcome.kind for outcome in found} == {OutcomeKind.CANCELLED}


def test_waking_stops_at_the_next_failure(valkey: Valkey, client: CancelClient, stack: ExitStack) -> None:
    """One success that was chance does not send all of them into an exchange that is still away."""
    server = stack.enter_context(Answerer(lambda asked: well(asked) if asked.algo_id == 101 else OVERLOADED))
    stack.enter_context(RunningEngine(valkey.url, server.url, 64, BACKOFF_BASE_MS=LONG, BACKOFF_CAP_MS=LONG))
    late = enqueued(client, 60)
    eventually(lambda: server.count()["DELETE"] >= 60, 25, "all have failed")
    time.sleep(1.1)
    before = server.count()["DELETE"]
    assert outcomes(client, enqueued(client, 1, first=101), 25)[0].kind is OutcomeKind.CANCELLED
    eventually(lambda: server.count()["DELETE"] > before + 1, 25, "one is woken")
    time.sleep(0.5)

    assert server.count()["DELETE"] < before + 30
    assert not client.outcomes_of(ticket.id for ticket in late)
