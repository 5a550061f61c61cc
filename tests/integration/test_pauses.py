"""What stops a worker from sending, and what starts it again: the weight budget and a refused key."""

from __future__ import annotations

import http.client
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis

from producer import CancelClient, OutcomeKind, Ticket
from producer.keys import Keys
from producer.message import Attempt, Call, encode_attempts
from tests.conftest import API_KEY, API_SECRET
from tests.integration.conftest import NewFleet
from tests.orders import cancel_all, opened
from tests.servers import Peek, Workers, eventually
from worker.sandbox.control import ExchangeConfig, RunningExchange, start_exchange
from worker.sandbox.faults import Fault
from worker.signing import Credential

#: The worker's own command line, with probes of a refused key each second and a half instead of each minute.
FAST_PROBES = "import worker.key_breaker as k; k.PROBE_EVERY_MS = 1500; from worker.__main__ import start; start()"
PRINT = Credential.from_secret("default", API_KEY, API_SECRET).fingerprint
OTHER = ("another-key-of-the-tests", "another-secret-of-the-tests")


DESK = {"BINANCE_DESK_API_KEY": OTHER[0], "BINANCE_DESK_API_SECRET": OTHER[1]}
FleetOn = Callable[..., Workers]


@pytest.fixture
def fleet_on(new_fleet: NewFleet) -> FleetOn:
    """Makes a fleet on an exchange of the test's own."""
    return lambda exchange, **more: new_fleet(BINANCE_BASE_URL=exchange.url, WORKER_CONCURRENCY="4", **more)


def exchange_with(**config: Any) -> AbstractContextManager[RunningExchange]:
    """An exchange of the test's own that knows both accounts."""
    return start_exchange(ExchangeConfig(accounts={"default": (API_KEY, API_SECRET), "desk": OTHER}, **config))


@pytest.fixture
def market() -> Iterator[RunningExchange]:
    """One."""
    with exchange_with() as running:
        yield running


def refuse(market: RunningExchange, client: CancelClient, fault: Fault = Fault.KEY_2015) -> None:
    """Have the key of the first account refused as often as its breaker takes."""
    for algo_id in opened(market, 5):
        market.script_faults(algo_id, [fault])
        assert client.cancel(algo_id=algo_id).wait(20).kind is OutcomeKind.REFUSED


def test_the_weight_limit_is_not_reached(client: CancelClient, fleet_on: FleetOn) -> None:
    """Near the limit that exchangeInfo tells, everybody waits for the exchange's next minute; no 429 comes."""
    # Its minute ends soon, yet not before the workers stand. The last tenth of its weight has room for all that two
    # workers can have in flight: neither counts the other's.
    skew_ms = 47_000 - int(time.time() * 1000) % 60_000
    with exchange_with(weight_limit_per_minute=120, clock_skew_ms=skew_ms) as market:
        fleet = fleet_on(market)
        orders = opened(market, 180)
        for _ in range(2):
            fleet.start()
        ended, standing = client.wait_many(cancel_all(client, orders), timeout_s=40)
        assert ({outcome.kind for outcome in ended.values()}, standing) == ({OutcomeKind.CANCELLED}, {})
        stats = market.stats()
        assert not [key for key in stats.requests if " 429" in key or " 418" in key]
        assert stats.peak_used_weight <= 120


def test_what_a_neighbour_leaves_of_the_weight_is_used(client: CancelClient, fleet_on: FleetOn) -> None:
    """At nine tenths of the limit, used by another program on the address, cancels go on down to a small reserve."""
    begins_now_ms = -(int(time.time() * 1000) % 60_000)
    with exchange_with(weight_limit_per_minute=600, clock_skew_ms=begins_now_ms) as market:
        worker = fleet_on(market, **DESK).start()
        neighbour = http.client.HTTPConnection(urlsplit(market.url).netloc)
        while market.stats().used_weight < 545:
            neighbour.request("GET", "/fapi/v1/time")
            neighbour.getresponse().read()
        neighbour.close()
        outcomes = [ticket.wait(30) for ticket in cancel_all(client, opened(market, 30))]
        assert {outcome.kind for outcome in outcomes} == {OutcomeKind.CANCELLED}
        assert "event=gate" not in worker.output(), "they waited for the exchange's next minute"
        assert market.stats().peak_used_weight <= 600


def test_a_key_that_is_refused_is_left_in_peace(
    client: CancelClient, connection: redis.Redis, market: RunningExchange, fleet_on: FleetOn
) -> None:
    """After five refusals of a key its jobs wait without an attempt, other accounts go on, one probe sets them free."""
    fleet_on(market, **DESK).start(command=(sys.executable, "-c", FAST_PROBES))
    refuse(market, client)
    tickets = cancel_all(client, opened(market, 20))
    (order,) = market.add_orders(1, account="desk")
    desk = client.cancel(algo_id=order.algo_id, account="desk")
    assert desk.wait(10).kind is OutcomeKind.CANCELLED
    assert connection.hget(Keys().breaker(PRINT), "reason")
    assert not client.outcomes_of([ticket.id for ticket in tickets])

    outcomes = [ticket.wait(15) for ticket in tickets]

    assert {(outcome.kind, len(outcome.attempts)) for outcome in outcomes} == {(OutcomeKind.CANCELLED, 1)}
    assert not connection.exists(Keys().breaker(PRINT), Keys().held(PRINT), Keys().suspects)


@pytest.mark.parametrize("mended", ["at the exchange", "with a new key", "under another name"])
def test_a_mended_key_is_known_to_be_well_after_a_restart(
    mended: str, client: CancelClient, connection: redis.Redis, market: RunningExchange, fleet_on: FleetOn
) -> None:
    """Whichever way it was mended, the first accepted call of a new worker ends the refusal and sets the jobs free."""
    later = "default"
    fleet = fleet_on(market)
    first, second = dict(fleet.environment), dict(fleet.environment)
    if mended == "with a new key":
        first |= {"BINANCE_API_KEY": "a-key-that-was-deleted"}
    if mended == "under another name":
        later = "renamed"
        second |= {"BINANCE_RENAMED_API_KEY": API_KEY, "BINANCE_RENAMED_API_SECRET": API_SECRET}
        del second["BINANCE_API_KEY"], second["BINANCE_API_SECRET"]
    fleet.environment = first
    old = fleet.start()
    refuse(market, client)
    waiting, young = opened(market, 2)
    held = client.cancel(algo_id=waiting)
    eventually(lambda: [(k.account, k.held) for k in client.status().keys] == [("default", 1)], 20, "it waits")
    old.stop()
    assert API_KEY not in dump(connection)

    fleet.environment = second
    fleet.start()

    assert client.cancel(algo_id=young, account=later).wait(20).kind is OutcomeKind.CANCELLED
    eventually(lambda: not client.status().keys, 20, "nobody is told of a refused key any more")
    assert (held.wait(20).kind is OutcomeKind.CANCELLED) is (later == "default")


def dump(connection: redis.Redis) -> str:
    """All that stands in Redis, as far as its keys can be dumped."""
    return repr([(key, connection.dump(key)) for key in connection.scan_iter()])


def test_a_refused_key_holds_back_whoever_learns_of_it(
    client: CancelClient, connection: redis.Redis, workers: Workers, exchange: RunningExchange
) -> None:
    """A worker that is started while a key is refused sends one request to see, and no job is lost for it."""
    peek = Peek(connection)
    peek("HSET", peek.keys.breaker(PRINT), "failures", 5, "reason", "401 -2015 no", "since_ms", 1)
    peek("HSET", peek.keys.breaker(PRINT), "probe_at_ms", peek.now_ms() + 600_000)
    peek("SADD", peek.keys.suspects, f"default {PRINT}")
    orders = opened(exchange, 20)
    for algo_id in orders:
        exchange.script_faults(algo_id, [Fault.KEY_2015])
    workers.start()

    tickets = cancel_all(client, orders)

    eventually(lambda: client.status().keys and client.status().keys[0].held == 19, 20, "the others wait")
    ids = [ticket.id for ticket in tickets]
    eventually(lambda: client.outcomes_of(ids), 20, "the request that was sent to see has ended")
    (refused,) = client.outcomes_of(ids).values()
    assert (refused.kind, len(refused.attempts)) == (OutcomeKind.REFUSED, 1)
    assert sum(entry.deletes for entry in exchange.book().values()) == 1


def test_a_key_that_stays_refused_ends_its_jobs_at_their_deadline(
    client: CancelClient, market: RunningExchange, fleet_on: FleetOn
) -> None:
    """A job that waits for its key until the deadline ends as refused, with the key's reason and nothing sent."""
    fleet_on(market, **DESK).start()
    refuse(market, client, Fault.KEY_LOCKED_2017)
    (order,) = market.add_orders(1)

    outcome = client.cancel(algo_id=order.algo_id, deadline_s=1.5).wait(10)

    assert (outcome.kind, outcome.attempts) == (OutcomeKind.REFUSED, ())
    assert "-2017" in (outcome.error or "")
    assert market.book()[order.algo_id].deletes == 0


def seen_triggered(connection: redis.Redis, ticket: Ticket) -> None:
    """Put into a job what a worker writes that saw its order triggered, and has asked no more since."""
    now_ms = Peek(connection).now_ms()
    cancel = Attempt(1, now_ms - 50, Call.CANCEL, 400, -2011, "Unknown order sent.", "no_such_order", 3)
    query = Attempt(2, now_ms - 40, Call.QUERY, 200, None, "TRIGGERED", "triggered", 3)
    connection.hset(Peek(connection).keys.job_prefix + ticket.id, "c_attempts", encode_attempts([cancel, query]))


@pytest.mark.parametrize("on_trigger", ["report", "cancel_child"])
def test_nothing_is_sent_for_what_is_overdue_while_the_queue_is_suspended(
    on_trigger: str, client: CancelClient, connection: redis.Redis, workers: Workers, exchange: RunningExchange
) -> None:
    """An operator's pause is kept at the deadline, too: neither a look nor a cancel of a child leaves."""
    connection.set(Keys().suspended, 1)
    (order,) = exchange.add_orders(1)
    exchange.trigger(order.algo_id)
    workers.start()

    ticket = client.cancel(algo_id=order.algo_id, deadline_s=0.5, on_trigger=on_trigger)
    seen_triggered(connection, ticket)

    assert (ticket.wait(20).kind, ticket.wait(20).order_status) == (OutcomeKind.GAVE_UP, "TRIGGERED")
    entry = exchange.book()[order.algo_id]
    assert entry.child is not None
    assert (entry.gets, entry.child.gets, entry.child.deletes) == (0, 0, 0)


@pytest.mark.parametrize(
    ("pause", "told"), [("suspended", "the queue is suspended"), ("gate", "a pause of the exchange holds all back")]
)
def test_what_is_overdue_says_what_held_it_back(
    pause: str, told: str, client: CancelClient, peek: Peek, workers: Workers
) -> None:
    """Who reads that nothing was sent need not look for the reason."""
    if pause == "gate":
        peek("HSET", peek.keys.gate("all"), "until_ms", peek.now_ms() + 60_000)
    else:
        peek("SET", peek.keys.suspended, 1)
    workers.start()

    outcome = client.cancel(algo_id=1, deadline_s=0.5).wait(20)

    assert outcome.kind is OutcomeKind.OVERDUE
    assert told in (outcome.error or "")


def test_what_is_held_back_at_its_deadline_ends_then(
    client: CancelClient, connection: redis.Redis, market: RunningExchange, fleet_on: FleetOn
) -> None:
    """A look that its key keeps waiting is not tried over and over once the deadline has passed."""
    worker = fleet_on(market, **DESK).start()
    (order,) = market.add_orders(1)
    market.trigger(order.algo_id, id_after_ms=120_000)
    refuse(market, client, Fault.KEY_LOCKED_2017)
    connection.set(Keys().suspended, 1)
    eventually(lambda: client.status().suspended, what="it is suspended")
    ticket = client.cancel(algo_id=order.algo_id, deadline_s=2)
    seen_triggered(connection, ticket)
    connection.delete(Keys().suspended)

    assert ticket.wait(20).order_status == "TRIGGERED"
    assert worker.output().count(f"event=again id={ticket.id}") < 20


def test_a_worker_that_stood_still_asks_redis_before_anything_is_sent(
    connection: redis.Redis, workers: Workers, exchange: RunningExchange
) -> None:
    """Stopped before a ban and woken during it, a worker does not even keep its connections warm: it hears first."""
    peek = Peek(connection)
    gate = peek.keys.gate("all")
    peek("HSET", gate, "until_ms", peek.now_ms() + 5000)
    worker = workers.start()
    assert "clock_offset_ms" not in worker.output(), "it has not asked the exchange yet, and will as soon as it may"
    worker.process.send_signal(signal.SIGSTOP)
    eventually(
        lambda: peek.now_ms() > int(peek("HGET", gate, "until_ms")) + 500, what="the pause that it knows is over"
    )

    peek("HSET", gate, "until_ms", peek.now_ms() + 3000)
    exchange.start_incident(Fault.BANNED_418, duration_ms=2900)
    worker.process.send_signal(signal.SIGCONT)

    eventually(lambda: exchange.stats().requests, what="it asks when the ban is over")
    assert exchange.stats().requests_during_incidents == 0
