"""Speed: latency of one cancel, throughput and cost of a burst, the producer's calls."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Mapping, Sequence

import redis

from producer import CancelClient, CancelRequest
from tests.bench.common import (
    FAR_MS,
    NEAR_MS,
    Bench,
    Sent,
    Used,
    forget,
    lost_and_repeats,
    median_ping_ms,
    pace_s,
    ping_ms,
    put_in_turns,
    used,
    warm_up,
)
from tests.bench.figures import Burst, Calls, Idle, Results
from tests.bench.rig import Rig
from tests.bench.systems import PROJECT, Producer, Running, running, wait_recorded
from tests.bench.usage import PeakRss, until_quiet

_CANCEL_MANY_TIMES = 3
#: How many requests in flight the project's worker has when it is idle, and in the burst that all systems do.
COMMON_IN_FLIGHT = 64


def speed(bench: Bench, rig: Rig, results: Results, wanted: Collection[str]) -> None:
    """Idle latency of all systems by turns, then a burst for each."""
    forget(rig)
    with contextlib.ExitStack() as stack:
        stacks = [stack.enter_context(contextlib.ExitStack()) for _ in bench.systems]
        workers = _start(bench, rig, stacks)
        if "idle" in wanted:
            results.idle += idle(bench, rig, workers, bench.sizes.idle)
        for (worker, _), own in zip(workers, stacks, strict=True):
            if "burst" in wanted:
                results.burst.append(burst(bench, rig, worker))
            own.close()  # the next one's burst is to have the machine for itself
    if "burst" in wanted and PROJECT in bench.systems:
        for in_flight in sorted(set(bench.sizes.burst) - {COMMON_IN_FLIGHT}):
            forget(rig)
            with running(PROJECT, rig, in_flight) as worker:
                warm_up(bench, rig, worker)
                results.burst.append(burst(bench, rig, worker))


def far(bench: Bench, rig: Rig, results: Results) -> None:
    """Idle latency with Redis further away, from producer and worker alike."""
    forget(rig)
    with contextlib.ExitStack() as stack:
        workers = _start(bench, rig, [stack] * len(bench.systems), far=True)
        results.far += idle(bench, rig, workers, bench.sizes.far)


def _start(
    bench: Bench, rig: Rig, stacks: Sequence[contextlib.ExitStack], *, far: bool = False
) -> list[tuple[Running, float]]:
    """A worker of each system, warm, and how far apart cancels for it should be, s."""
    workers = [
        stack.enter_context(running(system, rig, COMMON_IN_FLIGHT, far=far))
        for system, stack in zip(bench.systems, stacks, strict=True)
    ]
    return [(worker, pace_s(worker.system, warm_up(bench, rig, worker))) for worker in workers]


def idle(
    bench: Bench,
    rig: Rig,
    workers: Sequence[tuple[Running, float]],
    counts: Mapping[str, int],
) -> list[Idle]:
    """Cancels one at a time, far enough apart that each one finds an idle worker and an idle machine."""
    rig.exchange.reset(delay_ms=NEAR_MS)
    before = [worker.producer.recorded() for worker, _ in workers]
    sent = put_in_turns(bench, workers, counts)
    rig.exchange.wait_for(sum(len(one.asked_ns) for one in sent.values()), bench.sizes.limit_s)
    figures = []
    for (worker, _), recorded in zip(workers, before, strict=True):
        figures.append(_idle(bench, rig, worker, sent[worker.system.name], recorded))
    bench.say(f"one at a time: {sum(len(one.latencies_ms) for one in figures)} cancels")
    return figures


def _idle(bench: Bench, rig: Rig, worker: Running, sent: Sent, recorded: int) -> Idle:
    producer, orders, arrivals = worker.producer, list(sent.asked_ns), rig.exchange.arrivals()
    wait_recorded(producer, recorded + len(orders), bench.sizes.limit_s)
    lost, repeats = lost_and_repeats(orders, arrivals)
    return Idle(
        system=worker.system.name,
        ping_ms=median_ping_ms(producer.redis),
        latencies_ms=sent.latencies_ms(arrivals),
        calls_ms=sent.calls_ms,
        lost=lost,
        unrecorded=producer.unrecorded(orders),
        repeats=repeats,
    )


def burst(bench: Bench, rig: Rig, worker: Running) -> Burst:
    """Many cancels at once, to an exchange that answers late."""
    is_project, sizes = worker.system is PROJECT, bench.sizes
    count = sizes.burst[worker.in_flight] if is_project else sizes.stock_burst[worker.system.name]
    rig.exchange.reset(delay_ms=FAR_MS)
    orders = bench.take(count)
    until_quiet(worker.pid)
    before = used(rig, worker)
    with PeakRss(worker.pid) as peak:
        began_ns = time.time_ns()
        worker.producer.put_many(orders)
        _finished(bench, rig, worker.producer, before.recorded + count, count)
    until_quiet(worker.pid)
    took = used(rig, worker).since(before)
    arrivals, state = rig.exchange.arrivals(), rig.exchange.state()
    last_ns = max((arrivals[order][0][0] for order in orders if order in arrivals), default=began_ns)
    lost, repeats = lost_and_repeats(orders, arrivals)
    seconds = (last_ns - began_ns) / 1e9
    bench.say(f"burst: {worker.system.title}, {worker.in_flight} in flight, {count} cancels in {seconds:.2f} s")
    return Burst(
        system=worker.system.name,
        in_flight=worker.in_flight,
        exchange_ms=FAR_MS,
        cancels=count,
        seconds=seconds,
        peak_in_flight=state["peak"],
        worker_cpu_ms=took.worker_cpu_ms,
        redis_cpu_ms=took.redis_cpu_ms,
        redis_commands=took.redis_commands,
        exchange_busy=_busy(took, seconds),
        peak_rss_mib=peak.mib,
        lost=lost,
        unrecorded=worker.producer.unrecorded(orders),
        repeats=repeats,
        bad=state["bad"],
    )


def _finished(bench: Bench, rig: Rig, producer: Producer, recorded: int, count: int) -> None:
    rig.exchange.wait_for(count, bench.sizes.limit_s)
    wait_recorded(producer, recorded, bench.sizes.limit_s)


def _busy(took: Used, seconds: float) -> float | None:
    return None if took.exchange_cpu_ms is None or not seconds else took.exchange_cpu_ms / 1000 / seconds


def calls(bench: Bench, rig: Rig) -> Calls:
    """The producer's calls and bare round trips by turns, over one library and the same server."""
    forget(rig)
    with (
        redis.Redis.from_url(rig.valkey.url, socket_timeout=10) as bare,
        CancelClient.from_url(rig.valkey.url, timeout_s=10) as client,
    ):
        client.cancel(algo_id=bench.take(1)[0])  # loads the script
        pings_ms, cancels_ms = [], []
        for order in bench.take(bench.sizes.pings):
            pings_ms.append(ping_ms(bare))
            began_ns = time.perf_counter_ns()
            client.cancel(algo_id=order)
            cancels_ms.append((time.perf_counter_ns() - began_ns) / 1e6)
        many_ms = []
        for _ in range(_CANCEL_MANY_TIMES):
            requests = [CancelRequest(algo_id=order) for order in bench.take(bench.sizes.many)]
            began_ns = time.perf_counter_ns()
            client.cancel_many(requests)
            many_ms.append((time.perf_counter_ns() - began_ns) / 1e6)
    forget(rig)
    bench.say(f"calls: {bench.sizes.pings} times cancel() and PING, {len(many_ms)} times cancel_many()")
    return Calls(pings_ms, cancels_ms, bench.sizes.many, many_ms)
