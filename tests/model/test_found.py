"""What the driver has found, each kind once and without chance."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
from rq import SimpleWorker
from rq.job import Job
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer

from producer import CancelRequest, OutcomeKind, UnknownRequest
from tests.model.holders import QUEUE, Hand
from tests.model.steps import attempts, claim_by, complete_all, done, expire_hold, tidy
from tests.model.stock import Visit, settings_for
from tests.model.world import World
from tests.servers import Valkey
from worker.store import Release, Retry


@pytest.fixture
def world(valkey: Valkey) -> Iterator[World]:
    """A queue with one request on it."""
    world = World(valkey.port, Random(0))
    world.enqueue([CancelRequest(algo_id=1)])
    yield world
    world.close()


def the_job(world: World) -> str:
    """The id of the one request."""
    (job_id,) = world.model.jobs
    return job_id


def take(world: World) -> Hand:
    """A holder of ours takes the one job, for a minute."""
    assert claim_by(world, world.stores[-1], 1) == 1
    return world.hands[-1]


def end(world: World, hand: Hand, kind: OutcomeKind) -> None:
    """It ends so."""
    hand.sent = done(world, hand, kind, 0)
    complete_all(world, hand.store, [hand])
    world.check()


def fetch(world: World) -> Job:
    """RQ's copy of the one job."""
    return Job.fetch(the_job(world), connection=world.raw, serializer=JSONSerializer)


def say_failed(world: World) -> None:
    """RQ files the one job as failed, as it does for a horse that was killed when no retry is left."""
    job = fetch(world)
    world.plain.hset(job.key, "status", "failed")
    world.plain.expire(job.key, 600)
    world.plain.zadd(world.keys.failed, {job.id: 4e9})


def test_a_retry_of_what_rq_alone_calls_failed_starts_no_run(world: World) -> None:
    """A request whose job RQ calls failed while somebody works on it goes on in its run when it is retried, and lasts;
    its holder's outcome counts."""
    hand = take(world)
    say_failed(world)

    assert world.client.retry([hand.lease.id]) == [hand.lease.id]

    assert world.client.failed_ids() == []
    assert world.plain.ttl(world.keys.job_prefix + hand.lease.id) == -1
    end(world, hand, OutcomeKind.CANCELLED)
    assert world.model.jobs[hand.lease.id].outcomes == {1: "cancelled"}


def test_what_ended_well_is_not_retried_whatever_rq_calls_it(world: World) -> None:
    """A cancelled order's request is not among those that can be retried though RQ files its job as failed."""
    hand = take(world)
    end(world, hand, OutcomeKind.CANCELLED)
    say_failed(world)

    with pytest.raises(UnknownRequest):
        world.client.retry([hand.lease.id])
    world.check()


@pytest.mark.parametrize("how", ["an entry", "a look"])
@pytest.mark.parametrize("kind", [OutcomeKind.CANCELLED, OutcomeKind.GAVE_UP])
def test_what_a_stock_worker_died_with_after_its_end_runs_out_again(world: World, kind: OutcomeKind, how: str) -> None:
    """A stock worker pops an ended job and dies: when a worker of ours meets an entry of it, or looks after the queue,
    the job shows its end and runs out in its time again."""
    hand = take(world)
    end(world, hand, kind)
    job = fetch(world)
    with world.raw.pipeline() as pipeline:
        job.prepare_for_execution("stock", pipeline=pipeline)
        pipeline.persist(job.key)
        pipeline.execute()
    if how == "an entry":
        world.plain.lpush(world.keys.waiting, job.id)
        assert claim_by(world, world.stores[-1], 1) == 0
    else:
        world.plain.zadd(world.keys.started, {f"{job.id}:execution": world.now_ms() / 1000 + 60})
        tidy(world)

    world.check()
    assert job.get_status(refresh=True).value == ("failed" if kind.failed else "finished")


def test_of_two_failed_jobs_of_an_order_that_are_requeued_the_first_one_begun_is_joined(world: World) -> None:
    """Two requests for one order have failed one after the other, and a third went well; RQ puts the later one back
    first, and a worker begins both: the next request joins that one."""
    for kind in (OutcomeKind.REFUSED, OutcomeKind.REFUSED, OutcomeKind.CANCELLED):
        world.enqueue([CancelRequest(algo_id=1)])
        end(world, take(world), kind)
    earlier, later, _ = world.model.jobs
    for job_id in (later, earlier):
        FailedJobRegistry(QUEUE, connection=world.raw, serializer=JSONSerializer).requeue(job_id)
        world.model.jobs[job_id].left_failed = True
    assert claim_by(world, world.stores[-1], 2) == 2

    world.check()
    assert world.client.cancel(algo_id=1).id == later


def test_what_rq_saves_over_a_deleted_job_is_not_sent_for_again(world: World) -> None:
    """A person deletes an ended request's job while RQ holds a copy of it and saves it: nobody is given it, and its
    outcome stays the only one."""
    job = fetch(world)
    hand = take(world)
    end(world, hand, OutcomeKind.CANCELLED)
    fetch(world).delete()
    world.model.jobs[job.id].is_deleted = True
    job.save()
    world.plain.lpush(world.keys.waiting, job.id)

    assert claim_by(world, world.stores[-1], 1) == 0
    assert world.plain.ttl(job.key) > 0


@pytest.mark.parametrize("how", ["retry", "release", "death"])
def test_what_a_person_took_back_stays_so_whatever_its_holder_does(world: World, how: str) -> None:
    """A job that is cancelled through RQ while somebody holds it is next given as taken back, and never to be sent."""
    hand = take(world)
    fetch(world).cancel()
    job = world.model.jobs[hand.lease.id]
    job.is_recalled = job.is_surely_recalled = True
    if how == "death":
        expire_hold(world, hand.lease.id)
    else:
        row = Retry(hand.lease, attempts(1), 0) if how == "retry" else Release(hand.lease)
        world.link.ask_now(hand.store.complete([row]))
    for _ in range(2):  # also by who is given it, and dies
        again = take(world)
        assert again.lease.fault == "recalled canceled"
        expire_hold(world, again.lease.id)
    world.check()


def test_a_stock_worker_does_not_finish_what_somebody_else_holds(world: World) -> None:
    """A stock worker is paused in a call, a worker of ours takes the job over, the call is answered: RQ is told to come
    back later, so the job neither looks finished nor runs out, and it ends once."""
    job_id, taken = the_job(world), list[Hand]()

    def meanwhile() -> None:
        hold = world.model.jobs[job_id].hold
        if hold is not None and not taken:
            expire_hold(world, job_id)
            taken.append(take(world))

    world.meanwhile = meanwhile
    Visit(world, settings_for(world.url), [QUEUE], killed=0).work(SimpleWorker)
    world.meanwhile = lambda: None

    world.check()
    assert world.plain.ttl(world.keys.job_prefix + job_id) == -1
    end(world, taken[0], OutcomeKind.CANCELLED)
    assert world.model.jobs[job_id].outcomes == {1: "cancelled"}
