"""A failed request runs once more only on purpose: by our retry, or by RQ's requeue; and which outcome counts then."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
import redis
from rq import Queue
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from producer import AsyncCancelClient, CancelClient, OutcomeKind, WaitTimeout
from tests.holders import DEADLINE_MS, Holder, OpenHolder, ended, ids, orders, requeue, tried
from tests.servers import Peek, Valkey

FAILED = [kind for kind in OutcomeKind if kind.failed]


def retried(client: CancelClient, connection: redis.Redis, job_id: str) -> None:
    """By the client: from then on its job lasts, and stands in the index."""
    assert client.retry([job_id]) == [job_id]
    assert connection.ttl(client.keys.job_prefix + job_id) == -1
    assert connection.zscore(client.keys.unfinished, job_id)


def requeued(client: CancelClient, connection: redis.Redis, job_id: str) -> None:
    """By RQ."""
    requeue(connection, job_id)


Restart = Callable[[CancelClient, redis.Redis, str], None]
both_ways = pytest.mark.parametrize("restart", [retried, requeued])


def fails(client: CancelClient, holder: Holder, kind: OutcomeKind = OutcomeKind.GAVE_UP) -> str:
    """A request that ended in a failed kind; gives its id."""
    ticket = client.cancel(algo_id=1, deadline_s=5)
    (lease,) = holder.claim()
    assert holder.complete(ended(lease, kind, attempts=(tried(1),))) == [1]
    return ticket.id


# ---- a new run ------------------------------------------------------------------------------------------------------


@both_ways
def test_a_new_run_begins_anew(
    restart: Restart, client: CancelClient, holder: Holder, connection: redis.Redis, peek: Peek
) -> None:
    """A new run has a fresh deadline, a fresh history, all retries that RQ counts, and an outcome of its own."""
    job_id = fails(client, holder)
    connection.hset(peek.keys.job_prefix + job_id, "retries_left", 0)  # as RQ leaves it behind a stock worker
    time.sleep(0.01)
    before = peek.now_ms()
    restart(client, connection, job_id)

    (second,) = holder.claim()

    assert (second.id, second.run, second.attempts, second.fault) == (job_id, 2, b"", "")
    assert second.enqueued_at_ms >= before
    assert second.deadline_at_ms == second.enqueued_at_ms + DEADLINE_MS
    assert client.outcome(job_id) is None
    assert peek("TTL", peek.keys.job_prefix + job_id) == -1
    assert int(peek.job(job_id)["retries_left"]) == 1_000_000
    assert client.cancel(algo_id=1).id == job_id
    assert holder.complete(ended(second)) == [1]
    assert [(outcome.run, outcome.kind.value) for outcome in peek.ledger()] == [(1, "gave_up"), (2, "cancelled")]
    assert client.failed_ids() == []
    assert holder.is_drained()


@pytest.mark.parametrize("kind", FAILED)
@both_ways
def test_each_failed_kind_can_be_restarted(
    restart: Restart, kind: OutcomeKind, client: CancelClient, holder: Holder, connection: redis.Redis
) -> None:
    """Whatever failed kind it was, and as often as somebody likes."""
    job_id = fails(client, holder, kind)
    for run in (2, 3):
        restart(client, connection, job_id)
        (lease,) = holder.claim()
        assert (lease.id, lease.run) == (job_id, run)
        assert holder.complete(ended(lease, kind)) == [1]


def test_a_retry_means_the_order_of_the_first_asking(
    client: CancelClient, holder: Holder, connection: redis.Redis
) -> None:
    """A new run counts its time anew, and still knows when the request was first made: a client id can be reused."""
    ticket = client.cancel(client_algo_id="stop-1")
    first_ms = 0
    for run in (1, 2, 3):
        (lease,) = holder.claim()
        first_ms = first_ms or lease.enqueued_at_ms
        assert (lease.run, lease.meant_at_ms) == (run, first_ms)
        assert (lease.enqueued_at_ms > first_ms) == (run > 1)
        assert holder.complete(ended(lease, OutcomeKind.OVERDUE)) == [1]
        time.sleep(0.005)
        (retried if run == 1 else requeued)(client, connection, ticket.id)


@both_ways
def test_a_new_run_leaves_the_pointer_of_an_open_job(
    restart: Restart, client: CancelClient, holder: Holder, connection: redis.Redis, peek: Peek
) -> None:
    """It does not take the place of the job that its order got meanwhile; once that has ended too, it does."""
    job_id = fails(client, holder)
    newer = client.cancel(algo_id=1)
    restart(client, connection, job_id)

    leases = holder.claim()

    assert sorted(ids(leases)) == sorted([job_id, newer.id])
    assert client.cancel(algo_id=1).id == newer.id
    assert holder.complete(*(ended(lease, OutcomeKind.NOT_FOUND) for lease in leases)) == [1, 1]
    restart(client, connection, job_id)
    assert ids(holder.claim()) == [job_id]
    assert client.cancel(algo_id=1).id == job_id


@pytest.mark.parametrize("has_record", [True, False])
def test_a_job_that_version_0_1_ended_can_be_restarted(
    has_record: bool, client: CancelClient, holder: Holder, connection: redis.Redis, peek: Peek
) -> None:
    """That version noted no more than that there was an outcome; its record, or none any more, tells that it failed."""
    job_id = fails(client, holder)
    peek("HSET", peek.keys.job_prefix + job_id, "c_done", "1")
    peek("HDEL", peek.keys.job_prefix + job_id, "c_ended")
    if not has_record:
        peek("DEL", peek.keys.outcome_prefix + job_id)
    requeue(connection, job_id)

    (lease,) = holder.claim()
    assert (lease.id, lease.run) == (job_id, 2)


# ---- what starts none -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [OutcomeKind.CANCELLED, *FAILED])
@pytest.mark.parametrize("done", ["", "1"], ids=["", "by version 0.1"])
def test_a_late_copy_of_rqs_starts_none(
    done: str, kind: OutcomeKind, client: CancelClient, open_holder: OpenHolder, connection: redis.Redis, peek: Peek
) -> None:
    """RQ's scheduler may save its copy of a job, `queued` and without an end, over one that has ended, and list it:
    nobody asked for another run, so nobody gets the job, and its outcome stays."""
    ticket = client.cancel(algo_id=1)
    holder = open_holder()
    (lease,) = holder.claim()
    queue = Queue("cancels", connection=connection, serializer=JSONSerializer)
    copy = Job.fetch(ticket.id, connection=connection, serializer=JSONSerializer)
    holder.complete(ended(lease, kind))
    if done:
        peek("HSET", peek.keys.job_prefix + ticket.id, "c_done", done)
    outcome = client.outcome(ticket.id)
    assert outcome is not None

    copy.set_status(JobStatus.QUEUED)
    copy.save()
    queue.push_job_id(ticket.id)

    assert client.outcome(ticket.id) == client.wait(ticket.id, 1) == outcome
    assert holder.claim() == []
    queue.push_job_id(ticket.id)
    stock = open_holder("stock")
    assert (stock.claim_one(ticket.id).leases, stock.claim_one(ticket.id).why_not) == ([], "settled")
    assert client.outcome(ticket.id) == outcome
    assert peek.ledger() == [outcome]
    fresh = client.cancel(algo_id=1)
    assert (fresh.id != ticket.id, fresh.duplicate) == (True, False)


# ---- which outcome counts -------------------------------------------------------------------------------------------


def test_the_outcome_of_the_run_before_is_none_of_the_next_one(
    client: CancelClient, holder: Holder, connection: redis.Redis, valkey: Valkey, peek: Peek
) -> None:
    """From RQ's requeue on there is no outcome until the new run has one, though the old record stands till a claim."""
    job_id, other = fails(client, holder), orders(client, 1, first=2)[0]
    holder.complete(ended(holder.claim()[0], OutcomeKind.REFUSED))
    assert client.outcome(job_id) is not None
    requeue(connection, job_id)
    assert peek("EXISTS", peek.keys.outcome_prefix + job_id) == 1

    async def looked() -> None:
        async with AsyncCancelClient.from_url(valkey.url) as mine:
            assert await mine.outcome(job_id) is None
            assert list(await mine.outcomes_of([job_id, other.id, "nobody"])) == [other.id]
            with pytest.raises(WaitTimeout):
                await mine.wait(job_id, 0.05)

    asyncio.run(looked())
    assert client.outcome(job_id) is None
    assert list(client.outcomes_of([job_id, other.id, "nobody"])) == [other.id]
    with pytest.raises(WaitTimeout):
        client.wait(job_id, 0.05)

    holder.complete(*map(ended, holder.claim()))
    second = client.wait(job_id, 5)
    assert (second.run, second.kind) == (2, OutcomeKind.CANCELLED)
    assert client.outcomes_of([job_id])[job_id] == second


def test_a_record_that_was_read_before_the_next_run_ended_is_no_outcome(
    client: CancelClient, open_holder: OpenHolder, peek: Peek
) -> None:
    """Record and job are not read in one moment: where the job has ended in a later run, the record counts no more."""
    job_id = fails(client, open_holder())
    assert client.outcome(job_id) is not None
    peek("HSET", peek.keys.job_prefix + job_id, "c_run", "2")

    assert client.outcome(job_id) is None
    with pytest.raises(WaitTimeout):
        client.wait(job_id, 0.05)


@pytest.mark.parametrize("remove", [Job.delete, Job.cancel])
def test_a_failed_job_that_somebody_removed_keeps_its_outcome(
    remove: Callable[[Job], object], client: CancelClient, open_holder: OpenHolder
) -> None:
    """Deleted or cancelled in RQ, it has left the failed ones and is not put back: its outcome can be read still."""
    job_id = fails(client, open_holder())
    outcome = client.outcome(job_id)

    remove(client.job(job_id))

    assert outcome is not None
    assert client.failed_ids() == []
    assert client.outcome(job_id) == client.outcomes_of([job_id])[job_id] == outcome


def test_odd_keys_do_not_keep_an_outcome_back(
    client: CancelClient, open_holder: OpenHolder, connection: redis.Redis, peek: Peek
) -> None:
    """Where job or registry is of another type, what the record says counts."""
    job_id = fails(client, open_holder())
    outcome = client.outcome(job_id)
    peek("HSET", peek.keys.job_prefix + job_id, "status", "queued")
    connection.set(peek.keys.failed, "x")
    assert client.outcome(job_id) == outcome
    connection.delete(peek.keys.failed)
    connection.set(peek.keys.job_prefix + job_id, "x")
    assert client.outcome(job_id) == outcome
