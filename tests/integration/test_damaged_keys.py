"""Keys that all jobs share, replaced by somebody: set aside and named, at the cost of nobody's cancel."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import redis

from producer import CancelClient, OutcomeKind
from tests.holders import OVERLOOKED_MS, SPOILED, OpenHolder, age, back, ended, ids, later, orders
from tests.servers import Peek, Workers, eventually
from worker.sandbox.control import RunningExchange
from worker.store import Row, Suspect

Spoil = Callable[[redis.Redis, str], object]
#: Types that none of these keys has.
STRANGE = pytest.mark.parametrize("spoil", [SPOILED["string"], SPOILED["stream"]], ids=["string", "stream"])


def put(spoil: Spoil, connection: redis.Redis, key: str) -> None:
    """Replace a key."""
    connection.delete(key)
    spoil(connection, key)


def is_set_aside(connection: redis.Redis, key: str, spoil: Spoil) -> bool:
    """Whether what somebody wrote stands under the name that tells, as he left it."""
    other = "strange"
    spoil(connection, other)
    kind = connection.type(other)
    connection.delete(other)
    return connection.type(f"{key}:set-aside") == kind and connection.type(key) != kind


# ---- enqueueing -----------------------------------------------------------------------------------------------------


@STRANGE
@pytest.mark.parametrize("name", ["waiting", "queues", "unfinished"])
def test_a_request_is_enqueued_whatever_stands_there(
    name: str,
    spoil: Spoil,
    client: CancelClient,
    open_holder: OpenHolder,
    connection: redis.Redis,
    peek: Peek,
) -> None:
    """New requests, joined ones and retries are served, and those that waited are not lost."""
    holder = open_holder()
    failing = client.cancel(algo_id=9)
    holder.complete(ended(holder.claim()[0], OutcomeKind.REFUSED))
    before = orders(client, 2)
    key = getattr(peek.keys, name)
    put(spoil, connection, key)

    (new,) = orders(client, 1, first=3)
    joined = orders(client, 2)

    assert is_set_aside(connection, key, spoil)
    assert [ticket.duplicate for ticket in (new, *joined)] == [False, True, True]
    assert sorted(ids(holder.claim())) == sorted(ticket.id for ticket in (*before, new))
    put(spoil, connection, key)
    assert client.retry([failing.id]) == [failing.id]
    assert ids(holder.claim()) == [failing.id]


@STRANGE
def test_a_strange_registry_of_failed_requests_keeps_nobody_back(
    spoil: Spoil, client: CancelClient, open_holder: OpenHolder, connection: redis.Redis, peek: Peek
) -> None:
    """Failed requests are looked for in it by requests and retries: they go on, and later failures are registered."""
    holder = open_holder()
    failing = client.cancel(algo_id=9)
    holder.complete(ended(holder.claim()[0], OutcomeKind.REFUSED))
    put(spoil, connection, peek.keys.failed)

    assert client.retry([failing.id], missing_ok=True) == []
    assert is_set_aside(connection, peek.keys.failed, spoil)
    put(spoil, connection, peek.keys.failed)
    again = client.cancel(algo_id=9)
    assert holder.complete(*(ended(lease, OutcomeKind.REFUSED) for lease in holder.claim())) == [1]
    assert client.failed_ids() == [again.id]


# ---- claiming -------------------------------------------------------------------------------------------------------


@STRANGE
@pytest.mark.parametrize("name", ["waiting", "claiming", "unfinished", "scheduled", "started"])
def test_a_claim_brings_the_others_whatever_stands_there(
    name: str,
    spoil: Spoil,
    client: CancelClient,
    open_holder: OpenHolder,
    connection: redis.Redis,
    peek: Peek,
) -> None:
    """The key is named, all that waits is given, some of it by what else knows of it, and brought to its end."""
    waiting = [ticket.id for ticket in orders(client, 3)]
    holder = open_holder()
    holder.complete(later(holder.claim(1)[0], 0))
    time.sleep(0.002)
    key = getattr(peek.keys, name)
    put(spoil, connection, key)

    claimed = holder.claimed()
    holder.ask(holder.store.tidy(0, 0))
    age(peek, OVERLOOKED_MS)
    again = holder.claimed()

    assert (claimed.damaged, again.damaged) == ((key,), ())
    assert is_set_aside(connection, key, spoil)
    leases = [*claimed.leases, *again.leases]
    assert sorted(ids(leases)) == sorted(waiting)
    assert holder.complete(*map(ended, leases)) == [1, 1, 1]
    assert holder.is_drained()


@STRANGE
def test_a_claim_that_waits_at_a_strange_list_is_served_by_the_next_one(
    spoil: Spoil, client: CancelClient, open_holder: OpenHolder, connection: redis.Redis, peek: Peek
) -> None:
    """Where the server refuses the wait, what the claim brings counts: the key's name, and what else there is."""
    put(spoil, connection, peek.keys.waiting)
    holder = open_holder()

    assert holder.claimed(wait=True).damaged == (peek.keys.waiting,)

    (ticket,) = orders(client, 1)
    assert ids(holder.claim(wait=True)) == [ticket.id]


@STRANGE
@pytest.mark.parametrize("name", ["unfinished", "finished"])
def test_a_stock_workers_claim_too(
    name: str,
    spoil: Spoil,
    client: CancelClient,
    open_holder: OpenHolder,
    connection: redis.Redis,
    peek: Peek,
) -> None:
    """A stock worker is given the job that it popped, and what RQ's popping overwrote is put right."""
    (ticket, over) = orders(client, 2)
    stock = open_holder("stock")
    assert stock.complete(ended(stock.claim_one(over.id).leases[0])) == [1]
    key = getattr(peek.keys, name)
    put(spoil, connection, key)
    connection.hset(peek.keys.job_prefix + over.id, "status", "started")

    one = stock.claim_one(over.id)
    other = stock.claim_one(ticket.id)

    assert (one.why_not, one.damaged, other.damaged) == ("settled", (key,), ())
    assert peek("ZRANGE", peek.keys.finished, 0, -1) == [over.id]
    assert ids(other.leases) == [ticket.id]
    assert is_set_aside(connection, key, spoil)


# ---- completing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", [SPOILED["string"], SPOILED["set"]], ids=["string", "set"])
@pytest.mark.parametrize("name", ["waiting", "unfinished", "scheduled", "started", "finished", "failed", "outcomes"])
def test_a_completion_is_whole_whatever_stands_there(
    name: str,
    spoil: Spoil,
    client: CancelClient,
    open_holder: OpenHolder,
    connection: redis.Redis,
    peek: Peek,
) -> None:
    """Outcomes of both sorts, a retry and what is handed back: each row is carried out, and the key is named."""
    good, bad, again, returned = orders(client, 4)
    holder = open_holder()
    leases = holder.claim()
    key = getattr(peek.keys, name)
    put(spoil, connection, key)

    rows: list[Row] = [ended(leases[0]), ended(leases[1], OutcomeKind.REFUSED), later(leases[2]), back(leases[3])]
    completed = holder.completed(rows)

    assert completed.damaged == (key,)
    assert is_set_aside(connection, key, spoil)
    assert (completed.answers[:2], completed.answers[2] > 1, completed.answers[3]) == ([1, 1], True, 1)
    assert [outcome.id for outcome in peek.ledger()] == [good.id, bad.id]
    assert set(client.outcomes_of([good.id, bad.id])) == {good.id, bad.id}
    assert peek("ZRANGE", peek.keys.finished, 0, -1) == [good.id]
    assert peek("ZRANGE", peek.keys.failed, 0, -1) == [bad.id]
    assert peek("ZRANGE", peek.keys.scheduled, 0, -1) == [again.id]
    assert peek("ZRANGE", peek.keys.unfinished, 0, -1) == [returned.id, again.id]
    assert peek.waiting() == [returned.id]
    assert holder.completed(rows).answers == completed.answers


@STRANGE
@pytest.mark.parametrize("name", ["unfinished", "worker"])
def test_a_beat_prolongs_whatever_stands_there(
    name: str,
    spoil: Spoil,
    client: CancelClient,
    open_holder: OpenHolder,
    connection: redis.Redis,
    peek: Peek,
) -> None:
    """Leases are prolonged and the key is named, so that a worker goes on, and is registered anew if need be."""
    orders(client, 2)
    holder = open_holder()
    leases = holder.claim()
    key = "rq:worker:w" if name == "worker" else peek.keys.unfinished
    put(spoil, connection, key)

    beat = holder.ask(holder.store.beat(leases, {"state": "busy"}, 60))

    assert (beat.damaged, beat.lost, beat.is_unknown) == ((key,), frozenset(), True)
    assert is_set_aside(connection, key, spoil)
    assert sorted(peek("ZRANGE", peek.keys.unfinished, 0, -1)) == sorted(ids(leases))
    assert open_holder("other").claim() == []


# ---- all else -------------------------------------------------------------------------------------------------------


@STRANGE
@pytest.mark.parametrize(
    "name",
    [
        *("waiting", "unfinished", "scheduled", "started", "finished", "failed"),
        *("intermediate", "workers", "queue_workers"),
    ],
)
def test_a_look_after_the_queue_goes_on_whatever_stands_there(
    name: str,
    spoil: Spoil,
    client: CancelClient,
    open_holder: OpenHolder,
    connection: redis.Redis,
    peek: Peek,
) -> None:
    """RQ's own keys are set aside and named as well, and the rest is tidied."""
    key = getattr(peek.keys, name)
    expired = peek.keys.failed if name == "finished" else peek.keys.finished
    peek("ZADD", expired, 1, "old")
    for workers in (peek.keys.workers, peek.keys.queue_workers):
        peek("SADD", workers, "rq:worker:dead")
    put(spoil, connection, key)
    holder = open_holder()

    assert holder.ask(holder.store.tidy(0, 0)) == (0, 0, (key,))

    assert is_set_aside(connection, key, spoil)
    assert peek("ZCARD", expired) == 0
    assert holder.ask(holder.store.tidy(0, 0)) == (0, 0, ())


@STRANGE
def test_the_gate_closes_whatever_stands_there(
    spoil: Spoil, client: CancelClient, open_holder: OpenHolder, connection: redis.Redis, peek: Peek
) -> None:
    """A gate's key that is none closes nothing, and a pause is kept all the same."""
    orders(client, 2)
    holder = open_holder()
    key = peek.keys.gate("all")
    put(spoil, connection, key)
    assert len(holder.claim(1)) == 1
    assert holder.beat().gate_until_ms is None

    until_ms = holder.close_gate(60_000)

    assert is_set_aside(connection, key, spoil)
    claimed = holder.claimed()
    assert (claimed.leases, claimed.gate_until_ms) == ([], until_ms)
    assert holder.beat().gate_until_ms == until_ms


@STRANGE
@pytest.mark.parametrize("which", ["breaker", "held", "suspects"])
def test_the_breaker_of_a_key_works_whatever_stands_there(
    which: str, spoil: Spoil, open_holder: OpenHolder, connection: redis.Redis, peek: Peek
) -> None:
    """It opens, keeps jobs waiting and closes again."""
    keys, holder = peek.keys, open_holder()
    suspect = Suspect("default", "0123456789abcdef")
    key = keys.suspects if which == "suspects" else getattr(keys, which)(suspect.fingerprint)

    def tell(what: str, word: str) -> int:
        if (which, what) in (("breaker", "failed"), ("held", "ask"), ("suspects", "failed"), ("suspects", "answered")):
            put(spoil, connection, key)
        return holder.ask(holder.store.key(suspect, what, word, 1, 60_000))[0]

    until_ms = tell("failed", "401")
    assert until_ms > peek.now_ms()
    assert tell("ask", "job") == until_ms
    assert is_set_aside(connection, key, spoil)
    assert peek("SMEMBERS", keys.held(suspect.fingerprint)) == ["job"]
    assert tell("answered", "") == 0
    assert peek("EXISTS", keys.breaker(suspect.fingerprint)) == 0


def test_a_real_worker_tells_of_it_and_goes_on(
    workers: Workers,
    client: CancelClient,
    exchange: RunningExchange,
    connection: redis.Redis,
    peek: Peek,
) -> None:
    """What RQ's registration stumbles over keeps nobody from work; whoever runs a worker reads in its log which keys
    were set aside, and requests go on to be cancelled."""
    keys, spoil = peek.keys, SPOILED["string"]
    before = (keys.workers, keys.queue_workers)
    for key in before:
        put(spoil, connection, key)
    worker = workers.start()
    assert client.cancel(algo_id=1, account="nobody").wait(30).kind is OutcomeKind.REFUSED
    eventually(lambda: all(is_set_aside(connection, key, spoil) for key in before), what="they are set aside")
    eventually(lambda: {peek("TYPE", key) for key in before} == {"set"}, what="RQ knows the worker")
    assert "event=unregistered " in worker.output()

    def is_told(*names: str) -> bool:
        return all(f"event=damaged key={name} " in worker.output() for name in names)

    found = (keys.waiting, keys.unfinished)
    for key in (*found, keys.outcomes):
        put(spoil, connection, key)
    eventually(lambda: is_told(*before, *found), what="they are told")
    (order,) = exchange.add_orders(1)
    assert client.cancel(algo_id=order.algo_id).wait(30).kind is OutcomeKind.CANCELLED
    eventually(lambda: is_told(keys.outcomes), what="it is told with the first outcome")
    assert worker.stop() == 0
