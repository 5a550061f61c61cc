"""The index of unfinished jobs: what a crash or RQ took off every list is found, by a later request or without one."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import redis
from rq import Queue
from rq.serializers import JSONSerializer

from producer import CancelClient, CancelRequest, OutcomeKind
from producer.keys import Band
from producer.message import TASK, encode_request
from tests.holders import (
    DEAD,
    OVERLOOKED_BUSY_MS,
    OVERLOOKED_MS,
    Holder,
    OpenHolder,
    age,
    back,
    band,
    ended,
    ids,
    later,
    orders,
    tried,
)
from tests.servers import Peek, Workers, eventually
from worker.sandbox.control import RunningExchange

Lose = Callable[[redis.Redis, str], object]


def removed(connection: redis.Redis, job_id: str) -> None:
    """Take a job off RQ's list as RQ's users can."""
    Queue("cancels", connection=connection, serializer=JSONSerializer).remove(job_id)


def unlisted(connection: redis.Redis, job_id: str) -> None:
    """Delete the whole list."""
    connection.delete("rq:queue:cancels")


def popped(connection: redis.Redis, job_id: str) -> None:
    """Pop it and die, as a stock worker does that listens to two queues."""
    assert connection.lpop("rq:queue:cancels") == job_id.encode()


LOST: dict[str, Lose] = {"removed": removed, "list deleted": unlisted, "popped": popped}


# ---- a job that stands nowhere --------------------------------------------------------------------------------------


@pytest.mark.parametrize("urgent", [False, True])
@pytest.mark.parametrize("lose", LOST.values(), ids=LOST)
def test_a_later_request_finds_it(
    lose: Lose, urgent: bool, client: CancelClient, holder: Holder, connection: redis.Redis
) -> None:
    """A request that joins a job which stands on no list puts it there: at once somebody is given it."""
    (ticket,) = orders(client, 1)
    lose(connection, ticket.id)

    joined = client.cancel(algo_id=1, urgent=urgent)

    assert (joined.id, joined.duplicate) == (ticket.id, True)
    assert ids(holder.claim()) == [ticket.id]


@pytest.mark.parametrize("lose", LOST.values(), ids=LOST)
def test_an_idle_queue_gives_it_without_one(
    lose: Lose, client: CancelClient, holder: Holder, connection: redis.Redis, peek: Peek
) -> None:
    """When nothing else waits, a job that has waited for five seconds is given though it stands on no list."""
    (ticket,) = orders(client, 1)
    lose(connection, ticket.id)
    assert holder.claim() == []

    age(peek, OVERLOOKED_MS - 1000)
    assert holder.claim() == []
    age(peek, 1000)
    assert ids(holder.claim()) == [ticket.id]


def test_a_queue_that_is_never_empty_gives_it_too(
    client: CancelClient, holder: Holder, connection: redis.Redis, peek: Peek
) -> None:
    """A look that is close brings what has waited for half a minute, in an eighth of the slots; the rest goes on."""
    tickets = [ticket.id for ticket in orders(client, 4)]
    for job_id in tickets[:3]:
        removed(connection, job_id)
    age(peek, OVERLOOKED_BUSY_MS)
    behind = [ticket.id for ticket in orders(client, 40, first=100)]

    assert not set(tickets[:3]) & set(ids(holder.claim(8)))
    given = ids(holder.claim(8, look_closely=True))

    assert len(set(given) & set(tickets[:3])) == 1
    assert len(set(given) & set(behind)) == 7


def test_a_real_worker_finds_it(
    client: CancelClient, workers: Workers, exchange: RunningExchange, connection: redis.Redis
) -> None:
    """A request that RQ's user took off the list is cancelled by an idle worker some seconds later, unasked."""
    (order,) = exchange.add_orders(1)
    ticket = client.cancel(algo_id=order.algo_id)
    removed(connection, ticket.id)
    workers.start()

    assert ticket.wait(30).kind is OutcomeKind.CANCELLED


def test_a_busy_worker_finds_it(
    client: CancelClient, workers: Workers, exchange: RunningExchange, connection: redis.Redis, peek: Peek
) -> None:
    """Nor is it forgotten where so much comes in that the list is never empty."""
    (order,) = exchange.add_orders(1)
    ticket = client.cancel(algo_id=order.algo_id)
    removed(connection, ticket.id)
    age(peek, OVERLOOKED_BUSY_MS)
    exchange.set_latency_ms(150)
    client.cancel_many(CancelRequest(algo_id=one.algo_id) for one in exchange.add_orders(400))
    workers.start(WORKER_CONCURRENCY="8")

    assert ticket.wait(30).kind is OutcomeKind.CANCELLED
    assert peek("LLEN", peek.keys.waiting) > 0


# ---- each state is found again --------------------------------------------------------------------------------------


def test_a_held_job_that_the_index_forgot_is_found(client: CancelClient, open_holder: OpenHolder, peek: Peek) -> None:
    """Where the index lost a dead worker's hold, a later request makes it known again: it is taken over in time."""
    (ticket,) = orders(client, 1)
    open_holder("dead").claim()
    peek("ZREM", peek.keys.unfinished, ticket.id)
    before = peek.now_ms()

    assert client.cancel(algo_id=1).duplicate

    ends_ms = float(peek("ZSCORE", peek.keys.unfinished, ticket.id))
    assert before + 50_000 < ends_ms < before + 70_000
    other = open_holder("other")
    assert other.claim() == []
    peek("ZADD", peek.keys.unfinished, before - 1, ticket.id)
    assert ids(other.claim()) == [ticket.id]


def test_an_entry_of_such_a_job_does_not_give_it_away(
    client: CancelClient, open_holder: OpenHolder, peek: Peek
) -> None:
    """Where the index lost a hold, an entry on the list gives the job to nobody; from then on its lease counts anew."""
    (ticket,) = orders(client, 1)
    holder = open_holder("holder")
    (lease,) = holder.claim()
    peek("ZREM", peek.keys.unfinished, ticket.id)
    peek("RPUSH", peek.keys.waiting, ticket.id)

    assert open_holder("other", lease_ms=50).claim() == []
    assert band(peek, ticket.id) is Band.HELD
    assert holder.complete(ended(lease)) == [1]


@pytest.mark.parametrize("wrong", [Band.RETRY, Band.WAITING])
def test_a_held_job_in_a_wrong_place_of_the_index(
    wrong: Band, client: CancelClient, open_holder: OpenHolder, peek: Peek
) -> None:
    """A dead worker's job that the index has among waiting or scheduled ones is taken over a lease later."""
    (ticket,) = orders(client, 1)
    open_holder("dead").claim()
    peek("ZADD", peek.keys.unfinished, int(wrong) + peek.now_ms() - OVERLOOKED_MS - 1, ticket.id)
    other = open_holder("other", lease_ms=100)

    assert other.claim() == []

    assert band(peek, ticket.id) is Band.HELD
    time.sleep(0.11)
    assert ids(other.claim()) == [ticket.id]


def test_a_scheduled_job_that_the_index_forgot_is_found(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """A retry that stands in neither registry nor index is put in its place by a later request, and not given early."""
    (ticket,) = orders(client, 1)
    (due_ms,) = holder.complete(later(holder.claim()[0], 1500, tried(1)))
    peek("DEL", peek.keys.unfinished, peek.keys.scheduled)

    assert client.cancel(algo_id=1, urgent=True).duplicate

    assert band(peek, ticket.id) is Band.RETRY
    assert holder.claim() == []
    eventually(lambda: peek.now_ms() > due_ms, what="it is due")
    assert ids(holder.claim()) == [ticket.id]


def test_the_index_tells_each_state(client: CancelClient, open_holder: OpenHolder, peek: Peek) -> None:
    """An unfinished job stands in the band of its state with its time, and leaves the index with its outcome."""
    before = peek.now_ms()
    (ticket,) = orders(client, 1)
    holder = open_holder(lease_ms=60_000)

    def at() -> Any:
        score = peek("ZSCORE", peek.keys.unfinished, ticket.id)
        known = band(peek, ticket.id)
        return known, int(float(score)) - int(known or 0)

    assert at() == (Band.WAITING, pytest.approx(before, abs=1000))
    (lease,) = holder.claim()
    assert at() == (Band.HELD, pytest.approx(peek.now_ms() + 60_000, abs=1000))
    (due_ms,) = holder.complete(later(lease, 40))
    assert at() == (Band.RETRY, due_ms)
    time.sleep(0.05)
    (lease,) = holder.claim()
    holder.complete(back(lease))
    assert at() == (Band.WAITING, pytest.approx(peek.now_ms(), abs=1000))
    (lease,) = holder.claim()
    time.sleep(0.02)
    holder.beat(lease)
    assert at() == (Band.HELD, pytest.approx(peek.now_ms() + 60_000, abs=1000))
    holder.complete(ended(lease))
    assert band(peek, ticket.id) is None


# ---- what only RQ's lists know --------------------------------------------------------------------------------------


def tidied(holder: Holder) -> None:
    """Look until all has been looked at."""
    cursor = position = 0
    while True:
        cursor, position, _ = holder.ask(holder.store.tidy(cursor, position))
        if cursor == position == 0:
            return


def test_what_rq_enqueued_gets_into_the_index(
    connection: redis.Redis, holder: Holder, peek: Peek, client: CancelClient
) -> None:
    """Jobs that another program put on the list or into RQ's schedule are known after a look: then none is lost."""
    queue = Queue("cancels", connection=connection, serializer=JSONSerializer)
    listed = [queue.enqueue(TASK, encode_request(CancelRequest(algo_id=5))).id for _ in range(450)]
    due = queue.enqueue_in(timedelta(hours=1), TASK, encode_request(CancelRequest(algo_id=6)))
    between = queue.create_job(TASK, args=(encode_request(CancelRequest(algo_id=7)),))
    between.save()
    connection.rpush(peek.keys.intermediate, between.id)
    assert peek("ZCARD", peek.keys.unfinished) == 0

    tidied(holder)

    assert {band(peek, job_id) for job_id in [*listed, between.id]} == {Band.WAITING}
    assert band(peek, due.id) is Band.RETRY
    assert (client.status().queued, client.status().scheduled) == (451, 1)
    unlisted(connection, "")
    age(peek, OVERLOOKED_MS)
    assert sorted(ids(holder.claim(1000))) == sorted([*listed, between.id])


def test_an_unfinished_job_does_not_run_out(client: CancelClient, open_holder: OpenHolder, peek: Peek) -> None:
    """RQ may give a job an end late, for a run before this one: a look, or a later request, takes it back."""
    one, other = orders(client, 2)
    for ticket in (one, other):
        peek("EXPIRE", peek.keys.job_prefix + ticket.id, 600)

    client.cancel(algo_id=2)
    assert [peek("TTL", peek.keys.job_prefix + ticket.id) for ticket in (one, other)] == [600, -1]
    tidied(open_holder())
    assert peek("TTL", peek.keys.job_prefix + one.id) == -1


def test_jobs_that_ended_are_not_adopted(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """An entry of an ended, a deleted or an endless id brings nothing into the index, and leaves RQ's schedule."""
    (ticket,) = orders(client, 1)
    holder.complete(ended(holder.claim()[0]))
    for name in (ticket.id, "nobody", "x" * 300):
        peek("RPUSH", peek.keys.waiting, name)
        peek("ZADD", peek.keys.scheduled, 4e9, name)

    tidied(holder)

    assert peek("ZCARD", peek.keys.unfinished) == 0
    assert peek("ZRANGE", peek.keys.scheduled, 0, -1) == []


def test_a_hold_that_the_index_forgot_is_adopted_as_one(
    client: CancelClient, open_holder: OpenHolder, peek: Peek
) -> None:
    """A job that somebody holds and that stands on RQ's list comes into the index as a held one."""
    (ticket,) = orders(client, 1)
    open_holder("dead", lease_ms=DEAD).claim()
    peek("DEL", peek.keys.unfinished)
    peek("RPUSH", peek.keys.waiting, ticket.id)

    tidied(open_holder())

    assert band(peek, ticket.id) is Band.HELD


def test_what_a_stock_worker_popped_and_never_began_goes_back(
    client: CancelClient, holder: Holder, peek: Peek, connection: redis.Redis
) -> None:
    """An id between RQ's list and a stock worker leaves that place after a minute, and its job is given."""
    fresh, old = orders(client, 2)
    unlisted(connection, "")
    peek("RPUSH", peek.keys.intermediate, fresh.id, old.id)
    peek("ZINCRBY", peek.keys.unfinished, -61_000, old.id)

    tidied(holder)

    assert peek("LRANGE", peek.keys.intermediate, 0, -1) == [fresh.id]
    assert ids(holder.claim()) == [old.id]


def test_registries_are_trimmed_in_steps(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """A look removes expired entries of RQ's registries, never many at once, never a job and nothing that lasts."""
    (ticket,) = orders(client, 1)
    holder.complete(ended(holder.claim()[0], OutcomeKind.REFUSED))
    now_s, keys = peek.now_ms() // 1000, peek.keys
    for registry in (keys.finished, keys.failed, keys.started):
        for i in range(300):
            peek("ZADD", registry, now_s - 10, f"old{i}")
        peek("ZADD", registry, now_s + 60, "young")
    peek("HSET", keys.job_prefix + "old1", "status", "failed")

    holder.ask(holder.store.tidy(0, 0))

    left = [peek("ZCARD", registry) for registry in (keys.finished, keys.failed, keys.started)]
    assert left == [101, 102, 101]
    holder.ask(holder.store.tidy(0, 0))
    assert peek("ZRANGE", keys.failed, 0, -1) == ["young", ticket.id]
    assert peek("ZRANGE", keys.finished, 0, -1) == peek("ZRANGE", keys.started, 0, -1) == ["young"]
    assert peek.job("old1") == {"status": "failed"}


def test_dead_workers_leave_rqs_sets(open_holder: OpenHolder, peek: Peek) -> None:
    """Names of killed workers leave RQ's two sets once their records have run out; the living stay."""
    names = [f"rq:worker:dead{i}" for i in range(120)] + ["rq:worker:alive"]
    for key in (peek.keys.workers, peek.keys.queue_workers):
        peek("SADD", key, *names)
    peek("HSET", "rq:worker:alive", "birth", "x")

    tidied(open_holder())

    assert peek("SMEMBERS", peek.keys.workers) == peek("SMEMBERS", peek.keys.queue_workers) == ["rq:worker:alive"]


# ---- a retry that is brought forward --------------------------------------------------------------------------------


def test_only_what_waits_as_it_did_is_woken(client: CancelClient, open_holder: OpenHolder, peek: Peek) -> None:
    """After an outage a retry is due at once; one that is due at another time by now, or in work again, is let be."""
    woken, moved, held = orders(client, 3)
    holder, other = open_holder(), open_holder("other")
    leases = holder.claim()
    first_ms, second_ms, third_ms = holder.complete(*(later(lease, 60_000) for lease in leases))
    peek("ZADD", peek.keys.unfinished, int(Band.RETRY), held.id)  # its time came early
    peek("HSET", peek.keys.job_prefix + held.id, "c_due_at_ms", 1)
    (lease,) = other.claim()
    peek("HSET", peek.keys.job_prefix + held.id, "c_due_at_ms", third_ms)

    known = [(leases[0].key, first_ms), (leases[1].key, second_ms + 1), (leases[2].key, third_ms)]
    assert holder.ask(holder.store.wake(known)) == ()

    assert (lease.id, band(peek, held.id), band(peek, moved.id)) == (held.id, Band.HELD, Band.RETRY)
    assert int(peek.job(woken.id)["c_due_at_ms"]) <= peek.now_ms() < int(peek.job(moved.id)["c_due_at_ms"])
    assert ids(holder.claim()) == [woken.id]
    assert other.complete(ended(lease)) == [1]
