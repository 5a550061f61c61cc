"""What stays the same however much there is: cost per cancel with full structures, memory over many cancels."""

from __future__ import annotations

import time
from collections.abc import Sequence

import redis

from producer.keys import Keys
from producer.message import Outcome, OutcomeKind
from tests.bench.common import FAR_MS, NEAR_MS, Bench, Used, forget, lost_and_repeats, used, warm_up
from tests.bench.figures import Cost, Memory, MemoryStep
from tests.bench.rig import Rig
from tests.bench.systems import PROJECT, PROJECT_QUEUE, ProjectProducer, Running, running, wait_recorded
from tests.bench.usage import rss_mib, until_quiet

#: Cancels before the stretch that is measured, and so many more behind it than are in flight.
_LEAD, _TAIL = 300, 300
_CHUNK = 1000
_LEDGER_MAXLEN = 20_000  # the worker's default
_KEYS = Keys(PROJECT_QUEUE)


# ---- cost -----------------------------------------------------------------------------------------------------------


def cost(bench: Bench, rig: Rig, full: bool) -> Cost:
    """What each of a stretch of cancels costs, out of the middle of working off a queue."""
    forget(rig)
    sizes = bench.sizes
    waiting = sizes.waiting if full else _LEAD + sizes.window + _TAIL
    registered = sizes.waiting if full else 0
    if full:
        bench.say(f"cost: putting {waiting} jobs on the queue, {registered} entries into each registry")
        seed_records(rig.redis, registered, _LEDGER_MAXLEN)
    rig.exchange.reset(delay_ms=FAR_MS)
    producer = ProjectProducer(rig.valkey.url, PROJECT_QUEUE)
    try:
        producer.put_many(bench.take(waiting))
    finally:
        producer.close()
    with running(PROJECT, rig) as worker:
        took = _stretch(rig, worker, sizes.window, sizes.limit_s)
        repeats = sum(len(came) - 1 for came in rig.exchange.arrivals().values())
    forget(rig)
    bench.say(f"cost: {took.recorded} cancels, {'full' if full else 'empty'} at the start")
    return Cost(
        full=full,
        waiting=waiting,
        registered=registered,
        ledger=_LEDGER_MAXLEN if full else 0,
        cancels=took.recorded,
        seconds=took.at_s,
        worker_cpu_ms=took.worker_cpu_ms,
        redis_cpu_ms=took.redis_cpu_ms,
        redis_commands=took.redis_commands,
        repeats=repeats,
    )


def _stretch(rig: Rig, worker: Running, window: int, limit_s: float) -> Used:
    """What was used between two moments, ``window`` recorded outcomes apart.

    Raises:
        RuntimeError: so many outcomes did not come.
    """
    first = worker.producer.recorded()
    if not wait_recorded(worker.producer, first + _LEAD, limit_s):
        raise RuntimeError("the worker records nothing")
    before = used(rig, worker)
    if not wait_recorded(worker.producer, before.recorded + window, limit_s):
        raise RuntimeError("the worker has stopped recording")
    return used(rig, worker).since(before)


def seed_records(client: redis.Redis, count: int, ledger: int) -> None:
    """Fill ledger, outcome records and registries as ``count`` earlier jobs would have left them.

    A tenth more of the finished ones stand there expired, as they do while nobody looks at a registry.
    """
    now_s = int(time.time())
    for start in range(0, count, _CHUNK):
        with client.pipeline(transaction=False) as pipeline:
            _seed_chunk(pipeline, range(start, min(start + _CHUNK, count)), now_s)
            pipeline.execute()
    expired = {f"expired-{n}": now_s - 1 for n in range(count // 10)}
    if expired:
        client.zadd(_KEYS.finished, expired)
    record = _record("ledger")
    for start in range(0, ledger, _CHUNK):
        with client.pipeline(transaction=False) as pipeline:
            for _ in range(min(_CHUNK, ledger - start)):
                pipeline.xadd(_KEYS.outcomes, {"outcome": record})
            pipeline.execute()


def _seed_chunk(pipeline: redis.client.Pipeline, numbers: Sequence[int], now_s: int) -> None:
    ids = [f"seeded-{n}" for n in numbers]
    pipeline.zadd(_KEYS.finished, dict.fromkeys(ids, now_s + 600))
    pipeline.zadd(_KEYS.failed, dict.fromkeys(ids, now_s + 7 * 86_400))
    pipeline.zadd(_KEYS.scheduled, dict.fromkeys(ids, now_s + 3600))
    pipeline.zadd(_KEYS.started, {f"{job_id}:execution": now_s + 86_400 for job_id in ids})
    for job_id in ids:
        pipeline.set(_KEYS.outcome_prefix + job_id, _record(job_id), ex=86_400)


def _record(job_id: str) -> str:
    return Outcome(id=job_id, run=1, kind=OutcomeKind.CANCELLED, account="default", algo_id=10**15).encode()


# ---- memory ---------------------------------------------------------------------------------------------------------


def memory(bench: Bench, rig: Rig) -> Memory:
    """One worker over many cancels. What expires by itself is removed after each step: minutes need not be waited."""
    forget(rig)
    sizes, steps = bench.sizes, list[MemoryStep]()
    lost = unrecorded = repeats = done = 0
    with running(PROJECT, rig, environment={"LEDGER_MAXLEN": str(sizes.memory_ledger)}) as worker:
        warm_up(bench, rig, worker)
        for _ in range(sizes.memory_steps):
            orders = bench.take(sizes.memory_step)
            rig.exchange.reset(delay_ms=NEAR_MS)
            recorded = worker.producer.recorded()
            worker.producer.put_many(orders)
            rig.exchange.wait_for(len(orders), sizes.limit_s)
            wait_recorded(worker.producer, recorded + len(orders), sizes.limit_s)
            step_lost, step_repeats = lost_and_repeats(orders, rig.exchange.arrivals())
            lost, repeats = lost + step_lost, repeats + step_repeats
            unrecorded += worker.producer.unrecorded(orders)
            worker.producer.jobs.clear()
            done += len(orders)
            steps.append(_memory_step(rig.redis, worker, done, len(orders)))
            shown = "?" if steps[-1].rss_mib is None else f"{steps[-1].rss_mib:.1f}"
            bench.say(f"memory: {done} cancels, worker {shown} MiB, Redis {steps[-1].redis_mib:.1f} MiB")
    return Memory(steps, lost, unrecorded, repeats)


def _memory_step(client: redis.Redis, worker: Running, done: int, count: int) -> MemoryStep:
    until_quiet(worker.pid)
    before = int(client.info("memory")["used_memory"])
    expire(client)
    after = int(client.info("memory")["used_memory"])
    return MemoryStep(
        cancels=done,
        rss_mib=rss_mib(worker.pid),
        lasting_keys=client.dbsize(),
        redis_mib=after / 2**20,
        expiring_bytes=(before - after) / count,
    )


def expire(client: redis.Redis) -> None:
    """Do at once what time does: remove jobs, results and outcome records that carry an expiry, and what registries
    hold of them; those without an expiry stay, and so does everything else."""
    for prefix in (_KEYS.job_prefix, _KEYS.result_prefix, _KEYS.outcome_prefix):
        names = list(client.scan_iter(f"{prefix}*", _CHUNK))
        with client.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.ttl(name)
            expiring = [name for name, life_s in zip(names, pipeline.execute(), strict=True) if life_s >= 0]
        if expiring:
            client.delete(*expiring)
    for registry in (_KEYS.finished, _KEYS.failed):
        client.zremrangebyscore(registry, "-inf", "+inf")
