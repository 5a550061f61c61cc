"""What people and RQ's own tools do to a queue, each by RQ's own code, with other things going on in between."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import redis
from rq import Queue
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.job import Job
from rq.registry import FailedJobRegistry, StartedJobRegistry, clean_registries
from rq.scheduler import RQScheduler
from rq.serializers import JSONSerializer

from tests.model.holders import QUEUE
from tests.model.interrupted import Killed, Life, open_for
from tests.model.rules import FAILED
from tests.model.rules import Job as ModelJob
from tests.model.steps import Step
from tests.model.world import World

#: Part of the visits of RQ's tools that end by a kill, and their round trips at the most.
_KILLED, _TRIPS = 0.1, 12
#: How long after it started a dead stock worker's job is taken for abandoned, s.
_ABANDONED_S = 600


@contextmanager
def visit(world: World, name: str) -> Iterator[redis.Redis]:
    """A process that does something through RQ, and may die at it."""
    trips = world.chance.randint(1, _TRIPS) if world.chance.random() < _KILLED else None
    connection = open_for(Life(world, trips), world)
    world.model.rq_writes()
    try:
        yield connection
        world.count[name] += 1
    except Killed:
        world.count[f"{name}, killed"] += 1
    except (InvalidJobOperation, NoSuchJobError, redis.exceptions.NoScriptError) as error:
        world.count[f"{name}, {type(error).__name__}"] += 1
    finally:
        connection.close()
        if name != "Job.cancel":
            world.model.rq_writes()


def _queue(connection: redis.Redis) -> Queue:
    return Queue(QUEUE, connection=connection, serializer=JSONSerializer)


def _failed(connection: redis.Redis) -> FailedJobRegistry:
    return FailedJobRegistry(QUEUE, connection=connection, serializer=JSONSerializer)


@contextmanager
def _leaving_failed(world: World, job_id: str) -> Iterator[None]:
    """Meanwhile its entry is taken off the registry, whichever run's it is."""
    model = world.model
    if (job := model.jobs.get(job_id)) is not None and job.done in FAILED:
        job.left_failed = True
    model.leaving[job_id] += 1
    try:
        yield
    finally:
        model.leaving[job_id] -= 1


def requeue(world: World) -> None:
    """`rq requeue ID`."""
    failed = [job_id for job_id, _ in world.scores(world.keys.failed)]
    if failed:
        with visit(world, "rq requeue") as connection:
            _requeue(world, connection, world.chance.choice(failed))


def requeue_all(world: World) -> None:
    """`rq requeue --all`."""
    with visit(world, "rq requeue --all") as connection:
        for job_id in _failed(connection).get_job_ids():
            try:
                _requeue(world, connection, job_id)
            except (InvalidJobOperation, NoSuchJobError):
                world.count["rq requeue refused"] += 1


def _requeue(world: World, connection: redis.Redis, job_id: str) -> None:
    world.note(job_id, "rq requeue begins")
    registry = _failed(connection)
    job = Job.fetch(job_id, connection=connection, serializer=JSONSerializer)
    with _leaving_failed(world, job_id):
        registry.requeue(job)
    world.note(job_id, "rq requeue is through")


def _one_of(world: World, *, only_open: bool = False) -> str | None:
    jobs = [job for job in world.model.jobs.values() if not job.is_expired and not (only_open and job.done)]
    return world.chance.choice(jobs).id if jobs else None


def cancel(world: World) -> None:
    """A person cancels a job through RQ."""
    job_id = _one_of(world)
    if job_id is None:
        return
    with visit(world, "Job.cancel") as connection:
        job = Job.fetch(job_id, connection=connection, serializer=JSONSerializer)
        world.note(job_id, "Job.cancel begins")
        known = world.model.jobs.get(job_id)
        _may_be_recalled(known)
        try:
            with _leaving_failed(world, job_id):
                job.cancel()
        finally:
            _may_be_recalled(known)  # it had failed, and somebody else has had it run again since
        world.note(job_id, "Job.cancel is through")
        if known is not None:
            known.is_surely_recalled = known.is_recalled and world.depth == 0


def _may_be_recalled(job: ModelJob | None) -> None:
    if job is not None and not job.done:
        job.is_recalled = True


def delete(world: World) -> None:
    """A person deletes a job through RQ."""
    job_id = _one_of(world)
    if job_id is None:
        return
    with visit(world, "Job.delete") as connection:
        job = Job.fetch(job_id, connection=connection, serializer=JSONSerializer)
        world.note(job_id, "Job.delete begins")
        world.model.jobs[job_id].is_deleted = True
        job.delete()
        world.note(job_id, "Job.delete is through")


def remove(world: World) -> None:
    """A person takes a job off the list."""
    job_id = _one_of(world, only_open=True)
    if job_id is not None:
        with visit(world, "Queue.remove") as connection:
            while _queue(connection).remove(job_id):
                world.note(job_id, "is taken off the list")


def empty(world: World) -> None:
    """`rq empty`: the hashes of all that stands in the list are deleted."""
    world.deleting += 1
    with visit(world, "Queue.empty") as connection:
        _queue(connection).empty()
    world.check()
    world.deleting -= 1


def clean(world: World) -> None:
    """`rq info`, or a stock worker's maintenance."""
    with visit(world, "clean_registries") as connection:
        clean_registries(_queue(connection))


def clean_late(world: World) -> None:
    """The same, long after: what dead stock workers left is taken for abandoned."""
    with visit(world, "clean_registries, long after") as connection:
        registry = StartedJobRegistry(QUEUE, connection=connection, serializer=JSONSerializer)
        registry.cleanup(timestamp=time.time() + _ABANDONED_S)


def schedule(world: World) -> None:
    """A tick of RQ's scheduler: it fetches jobs, and saves them later."""
    with visit(world, "ticks of RQ's scheduler") as connection:
        scheduler = RQScheduler([QUEUE], connection=connection, serializer=JSONSerializer, logging_level="CRITICAL")
        scheduler.prepare_registries([QUEUE])
        scheduler.enqueue_scheduled_jobs()


def save_stale(world: World) -> None:
    """Somebody's copy of a job is saved over it, late."""
    job_id = _one_of(world)
    if job_id is None:
        return
    with visit(world, "stale copies saved") as connection:
        job = Job.fetch(job_id, connection=connection, serializer=JSONSerializer)
        world.meanwhile()
        job.save(include_meta=False)
        world.note(job_id, f"a copy of it is saved: {job.get_status(refresh=False)}")


def linger(world: World) -> None:
    """What dead stock workers left is there for long: ids between the list and themselves, and RQ's lock."""
    queue = Queue(QUEUE, connection=world.raw)
    intermediate = queue.intermediate_queue
    queue.release_maintenance_lock()
    for job_id in intermediate.get_job_ids():
        world.plain.set(intermediate.get_first_seen_key(job_id), time.time() - _ABANDONED_S, ex=86_400)
        world.count["ids that linger"] += 1


def push_again(world: World) -> None:
    """An id comes into the list once more, as after a crash of RQ."""
    ended = [job.id for job in world.model.jobs.values() if job.done and not job.is_expired and not job.is_deleted]
    job_id = world.chance.choice(ended) if ended and world.chance.random() < 0.6 else _one_of(world)
    if job_id is not None:
        world.plain.lpush(world.keys.waiting, job_id)
        world.note(job_id, "comes into the list once more")
        world.count["ids pushed again"] += 1


RQ = (
    Step(1.5, requeue),
    Step(0.2, requeue_all),
    Step(0.5, cancel),
    Step(0.5, delete),
    Step(0.7, remove),
    Step(0.4, clean),
    Step(0.4, clean_late),
    Step(1.5, schedule),
    Step(0.5, save_stale),
    Step(1, linger),
    Step(3, push_again),
    Step(0.08, empty, may_nest=False),
)
