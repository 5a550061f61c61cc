"""The engine in trouble: the gate closes under it, Redis refuses, breaks off or restarts, the clock is slow to tell.

Against a real Redis and an exchange that answers, or keeps silent, as each test says.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import redis

from producer import CancelClient, OutcomeKind, Ticket
from tests.engines import (
    BANNED,
    CLOCK_ERROR,
    OVERLOADED,
    TOO_MANY,
    Answerer,
    Asked,
    RunningEngine,
    Said,
    clock,
    enqueued,
    every,
    well,
)
from tests.integration.conftest import Logged
from tests.loopback import certificate
from tests.orders import at_first_try, outcomes
from tests.servers import Peek, Valkey, busy_with_a_script, eventually, running_valkey
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

    def behave(asked: Asked) -> Said:
        eventually(lambda: len(server.asked) >= OPENERS)
        return TOO_MANY

    server = stack.enter_context(Answerer(behave, lambda asked: asked.algo_id != 1, context, opened=OPENERS))
    enqueued(client, 64)
    running = stack.enter_context(RunningEngine(valkey.url, server.url, 64, ca_file=ca_file))
    eventually(running.is_closed, what="the first 429 was heard")
    server.may_open.set()
    server.may_answer.set()

    eventually(lambda: running.engine.in_hand == 0, what="all jobs are handed back")
    assert server.count() == {"DELETE": OPENERS}
    assert len(peek.waiting()) + peek("ZCARD", peek.keys.scheduled) == 64


def test_after_a_418_no_clock_is_measured(valkey: Valkey, client: CancelClient, stack: ExitStack) -> None:
    """While the clock is measured for those whom it failed, another's 418 stops the measurement, and none is sent
    anew."""

    def behave(asked: Asked) -> Said:
        if asked.algo_id == 7:
            eventually(lambda: server.count() == {"DELETE": 8, "time": 1})
            return BANNED
        return well(asked) if clock(asked) else CLOCK_ERROR

    server = stack.enter_context(Answerer(behave, clock))
    enqueued(client, 8)
    running = stack.enter_context(RunningEngine(valkey.url, server.url, 16))
    eventually(running.is_closed, what="the 418 was heard")
    server.may_answer.set()

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


def test_a_busy_server_costs_no_outcome(stack: ExitStack, logged: Logged) -> None:
    """Outcomes that come up while the server is busy with a long script are recorded when it is not any more."""
    valkey = stack.enter_context(running_valkey("--appendonly", "no"))
    client = stack.enter_context(CancelClient.from_url(valkey.url))
    connection = stack.enter_context(redis.Redis(port=valkey.port, socket_timeout=20))
    server = stack.enter_context(Answerer(holds=every))
    running = stack.enter_context(RunningEngine(valkey.url, server.url, 64))
    tickets = enqueued(client, 5)
    eventually(lambda: len(server.asked) == 5, what="all are sent")

    with busy_with_a_script(connection):
        server.may_answer.set()
        eventually(lambda: running.engine.working_on == 0, what="all are answered")
        eventually(lambda: logged("redis"), what="the outcomes are refused")
        assert running.engine.in_hand == 5

    assert at_first_try(outcomes(client, tickets, 4))
    recorded_once(valkey.port, tickets, running, logged)


# ---- connections that break -----------------------------------------------------------------------------------------


def test_a_slow_measurement_holds_up_nobody_else(
    valkey: Valkey, client: CancelClient, connection: redis.Redis, stack: ExitStack, logged: Logged
) -> None:
    """While forty orders wait for a measurement of the clock that takes long, the engine connects to Redis anew and
    cancels other orders."""

    def behave(asked: Asked) -> Said:
        is_late = asked.algo_id is not None and asked.algo_id <= 40 and not server.may_answer.is_set()
        return CLOCK_ERROR if is_late else well(asked)

    server = stack.enter_context(Answerer(behave, clock))
    running = stack.enter_context(RunningEngine(valkey.url, server.url, 128, BINANCE_RECV_WINDOW_MS="60000"))
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
        server.may_answer.set()
        assert {outcome.kind for outcome in outcomes(other, late)} == {OutcomeKind.CANCELLED}
    recorded_once(valkey.port, late + others, running, logged)


def test_a_clock_that_is_not_told_is_asked_for_once_a_second(
    valkey: Valkey, client: CancelClient, stack: ExitStack
) -> None:
    """However many requests by client id wait for the exchange's time: each question costs the address weight."""
    server = stack.enter_context(Answerer(lambda asked: OVERLOADED if asked.path.endswith("/time") else well(asked)))
    began_s = time.monotonic()
    stack.enter_context(RunningEngine(valkey.url, server.url, 64))
    short = client.cancel(client_algo_id="x", deadline_s=2)
    for number in range(30):
        client.cancel(client_algo_id=f"x{number}")
        time.sleep(0.03)
    eventually(lambda: server.count()["time"] >= 4, what="the time is asked for again")
    assert server.count()["time"] <= time.monotonic() - began_s + 2
    assert server.count()["DELETE"] == 0
    assert "the exchange's time is not known" in (short.wait(20).error or "")


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
