"""Keys that all jobs share, replaced by somebody: set aside and named, at the cost of nobody's cancel."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property

import pytest
import redis

from producer import CancelClient, OutcomeKind
from tests.holders import OVERLOOKED_MS, SPOILED, Holder, OpenHolder, age, back, ended, ids, later, orders
from tests.servers import Peek, Workers, eventually
from worker.sandbox.control import RunningExchange
from worker.store import Row, Suspect


@dataclass
class Scene:
    """A queue, a holder of its jobs, and somebody who replaces its keys by such of another type."""

    client: CancelClient
    open_holder: OpenHolder
    connection: redis.Redis
    peek: Peek
    kind: str

    @cached_property
    def holder(self) -> Holder:
        """One of our workers."""
        return self.open_holder()

    def put(self, key: str) -> None:
        """Replace a key."""
        self.connection.delete(key)
        SPOILED[self._kind(key)](self.connection, key)

    def is_set_aside(self, key: str) -> bool:
        """Whether what somebody wrote stands under the name that tells, and another thing in its place."""
        kind = self._kind(key)
        return bool(self.peek("TYPE", f"{key}:set-aside") == kind != self.peek("TYPE", key))

    def _kind(self, key: str) -> str:
        return "set" if key == self.peek.keys.outcomes else self.kind


@pytest.fixture(params=["string", "stream"])
def scene(
    request: pytest.FixtureRequest,
    client: CancelClient,
    open_holder: OpenHolder,
    connection: redis.Redis,
    peek: Peek,
) -> Scene:
    """With types that none of these keys has."""
    return Scene(client, open_holder, connection, peek, request.param)


# ---- enqueueing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["waiting", "queues", "unfinished"])
def test_a_request_is_enqueued_whatever_stands_there(name: str, scene: Scene) -> None:
    """New requests, joined ones and retries are served, and those that waited are not lost."""
    holder = scene.holder
    failing = scene.client.cancel(algo_id=9)
    holder.complete(ended(holder.claim()[0], OutcomeKind.REFUSED))
    before = orders(scene.client, 2)
    key = getattr(scene.peek.keys, name)
    scene.put(key)

    (new,) = orders(scene.client, 1, first=3)
    joined = orders(scene.client, 2)

    assert scene.is_set_aside(key)
    assert [ticket.duplicate for ticket in (new, *joined)] == [False, True, True]
    assert sorted(ids(holder.claim())) == sorted(ticket.id for ticket in (*before, new))
    scene.put(key)
    assert scene.client.retry([failing.id]) == [failing.id]
    assert ids(holder.claim()) == [failing.id]


def test_a_strange_registry_of_failed_requests_keeps_nobody_back(scene: Scene) -> None:
    """Failed requests are looked for in it by requests and retries: they go on, and later failures are registered."""
    holder = scene.holder
    failing = scene.client.cancel(algo_id=9)
    holder.complete(ended(holder.claim()[0], OutcomeKind.REFUSED))
    scene.put(scene.peek.keys.failed)

    assert scene.client.retry([failing.id], missing_ok=True) == []
    assert scene.is_set_aside(scene.peek.keys.failed)
    scene.put(scene.peek.keys.failed)
    again = scene.client.cancel(algo_id=9)
    assert holder.complete(*(ended(lease, OutcomeKind.REFUSED) for lease in holder.claim())) == [1]
    assert scene.client.failed_ids() == [again.id]


# ---- claiming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["waiting", "claiming", "unfinished", "scheduled", "started"])
def test_a_claim_brings_the_others_whatever_stands_there(name: str, scene: Scene) -> None:
    """The key is named, all that waits is given, some of it by what else knows of it, and brought to its end."""
    waiting = [ticket.id for ticket in orders(scene.client, 3)]
    holder = scene.holder
    holder.complete(later(holder.claim(1)[0], 0))
    time.sleep(0.002)
    key = getattr(scene.peek.keys, name)
    scene.put(key)

    claimed = holder.claimed()
    holder.ask(holder.store.tidy(0, 0))
    age(scene.peek, OVERLOOKED_MS)
    again = holder.claimed()

    assert (claimed.damaged, again.damaged) == ((key,), ())
    assert scene.is_set_aside(key)
    leases = [*claimed.leases, *again.leases]
    assert sorted(ids(leases)) == sorted(waiting)
    assert holder.complete(*map(ended, leases)) == [1, 1, 1]
    assert holder.is_drained()


def test_a_claim_that_waits_at_a_strange_list_is_served_by_the_next_one(scene: Scene) -> None:
    """Where the server refuses the wait, what the claim brings counts: the key's name, and what else there is."""
    scene.put(scene.peek.keys.waiting)
    holder = scene.holder

    assert holder.claimed(wait=True).damaged == (scene.peek.keys.waiting,)

    (ticket,) = orders(scene.client, 1)
    assert ids(holder.claim(wait=True)) == [ticket.id]


@pytest.mark.parametrize("name", ["unfinished", "finished"])
def test_a_stock_workers_claim_too(name: str, scene: Scene) -> None:
    """A stock worker is given the job that it popped, and what RQ's popping overwrote is put right."""
    (ticket, over) = orders(scene.client, 2)
    stock = scene.open_holder("stock")
    assert stock.complete(ended(stock.claim_one(over.id).leases[0])) == [1]
    key = getattr(scene.peek.keys, name)
    scene.put(key)
    scene.connection.hset(scene.peek.keys.job_prefix + over.id, "status", "started")

    one = stock.claim_one(over.id)
    other = stock.claim_one(ticket.id)

    assert (one.why_not, one.damaged, other.damaged) == ("settled", (key,), ())
    assert scene.peek("ZRANGE", scene.peek.keys.finished, 0, -1) == [over.id]
    assert ids(other.leases) == [ticket.id]
    assert scene.is_set_aside(key)


# ---- completing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["waiting", "unfinished", "scheduled", "started", "finished", "failed", "outcomes"])
def test_a_completion_is_whole_whatever_stands_there(name: str, scene: Scene) -> None:
    """Outcomes of both sorts, a retry and what is handed back: each row is carried out, and the key is named."""
    good, bad, again, returned = orders(scene.client, 4)
    holder = scene.holder
    leases = holder.claim()
    key = getattr(scene.peek.keys, name)
    scene.put(key)

    rows: list[Row] = [ended(leases[0]), ended(leases[1], OutcomeKind.REFUSED), later(leases[2]), back(leases[3])]
    completed = holder.completed(rows)

    assert completed.damaged == (key,)
    assert scene.is_set_aside(key)
    assert (completed.answers[:2], completed.answers[2] > 1, completed.answers[3]) == ([1, 1], True, 1)
    assert [outcome.id for outcome in scene.peek.ledger()] == [good.id, bad.id]
    assert set(scene.client.outcomes_of([good.id, bad.id])) == {good.id, bad.id}
    assert scene.peek("ZRANGE", scene.peek.keys.finished, 0, -1) == [good.id]
    assert scene.peek("ZRANGE", scene.peek.keys.failed, 0, -1) == [bad.id]
    assert scene.peek("ZRANGE", scene.peek.keys.scheduled, 0, -1) == [again.id]
    assert scene.peek("ZRANGE", scene.peek.keys.unfinished, 0, -1) == [returned.id, again.id]
    assert scene.peek.waiting() == [returned.id]
    assert holder.completed(rows).answers == completed.answers


@pytest.mark.parametrize("name", ["unfinished", "worker"])
def test_a_beat_prolongs_whatever_stands_there(name: str, scene: Scene) -> None:
    """Leases are prolonged and the key is named, so that a worker goes on, and is registered anew if need be."""
    orders(scene.client, 2)
    holder = scene.holder
    leases = holder.claim()
    key = "rq:worker:w" if name == "worker" else scene.peek.keys.unfinished
    scene.put(key)

    beat = holder.ask(holder.store.beat(leases, {"state": "busy"}, 60))

    assert (beat.damaged, beat.lost, beat.is_unknown) == ((key,), frozenset(), True)
    assert scene.is_set_aside(key)
    assert sorted(scene.peek("ZRANGE", scene.peek.keys.unfinished, 0, -1)) == sorted(ids(leases))
    assert scene.open_holder("other").claim() == []


# ---- all else -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("waiting", "unfinished", "scheduled", "started", "finished", "failed"),
        *("intermediate", "workers", "queue_workers"),
    ],
)
def test_a_look_after_the_queue_goes_on_whatever_stands_there(name: str, scene: Scene) -> None:
    """RQ's own keys are set aside and named as well, and the rest is tidied."""
    key = getattr(scene.peek.keys, name)
    expired = scene.peek.keys.failed if name == "finished" else scene.peek.keys.finished
    scene.peek("ZADD", expired, 1, "old")
    for workers in (scene.peek.keys.workers, scene.peek.keys.queue_workers):
        scene.peek("SADD", workers, "rq:worker:dead")
    scene.put(key)
    holder = scene.holder

    assert holder.ask(holder.store.tidy(0, 0)) == (0, 0, (key,))

    assert scene.is_set_aside(key)
    assert scene.peek("ZCARD", expired) == 0
    assert holder.ask(holder.store.tidy(0, 0)) == (0, 0, ())


def test_the_gate_closes_whatever_stands_there(scene: Scene) -> None:
    """A gate's key that is none closes nothing, and a pause is kept all the same."""
    orders(scene.client, 2)
    holder = scene.holder
    key = scene.peek.keys.gate("all")
    scene.put(key)
    assert len(holder.claim(1)) == 1
    assert holder.beat().gate_until_ms is None

    until_ms = holder.close_gate(60_000)

    assert scene.is_set_aside(key)
    claimed = holder.claimed()
    assert (claimed.leases, claimed.gate_until_ms) == ([], until_ms)
    assert holder.beat().gate_until_ms == until_ms


@pytest.mark.parametrize("which", ["breaker", "held", "suspects"])
def test_the_breaker_of_a_key_works_whatever_stands_there(which: str, scene: Scene) -> None:
    """It opens, keeps jobs waiting and closes again."""
    keys, holder = scene.peek.keys, scene.holder
    suspect = Suspect("default", "0123456789abcdef")
    key = keys.suspects if which == "suspects" else getattr(keys, which)(suspect.fingerprint)

    def tell(what: str, word: str) -> int:
        if (which, what) in (("breaker", "failed"), ("held", "ask"), ("suspects", "failed"), ("suspects", "answered")):
            scene.put(key)
        return holder.ask(holder.store.key(suspect, what, word, 1, 60_000))[0]

    until_ms = tell("failed", "401")
    assert until_ms > scene.peek.now_ms()
    assert tell("ask", "job") == until_ms
    assert scene.is_set_aside(key)
    assert scene.peek("SMEMBERS", keys.held(suspect.fingerprint)) == ["job"]
    assert tell("answered", "") == 0
    assert scene.peek("EXISTS", keys.breaker(suspect.fingerprint)) == 0


@pytest.mark.parametrize("scene", ["string"], indirect=True)
def test_a_real_worker_tells_of_it_and_goes_on(scene: Scene, workers: Workers, exchange: RunningExchange) -> None:
    """What RQ's registration stumbles over keeps nobody from work; whoever runs a worker reads in its log which keys
    were set aside, and requests go on to be cancelled."""
    keys = scene.peek.keys
    before = (keys.workers, keys.queue_workers)
    for key in before:
        scene.put(key)
    worker = workers.start()
    assert scene.client.cancel(algo_id=1, account="nobody").wait(30).kind is OutcomeKind.REFUSED
    eventually(lambda: all(scene.is_set_aside(key) for key in before), what="they are set aside")
    eventually(lambda: {scene.peek("TYPE", key) for key in before} == {"set"}, what="RQ knows the worker")
    assert "event=unregistered " in worker.output()

    def is_told(*names: str) -> bool:
        return all(f"event=damaged key={name} " in worker.output() for name in names)

    found = (keys.waiting, keys.unfinished)
    for key in (*found, keys.outcomes):
        scene.put(key)
    eventually(lambda: is_told(*before, *found), what="they are told")
    (order,) = exchange.add_orders(1)
    assert scene.client.cancel(algo_id=order.algo_id).wait(30).kind is OutcomeKind.CANCELLED
    eventually(lambda: is_told(keys.outcomes), what="it is told with the first outcome")
    assert worker.stop() == 0
