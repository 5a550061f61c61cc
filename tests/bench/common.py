"""What the measurements share: sizes, order ids, warming up, paced cancels, what was used meanwhile."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import redis

from tests.bench.rig import Arrival, Rig
from tests.bench.systems import Running, System
from tests.bench.usage import cpu_s

#: How late the exchange answers, ms: one nearby for latency, one far away for bursts.
NEAR_MS, FAR_MS = 5.0, 50.0
#: How far away Redis is where it is not on the same machine, ms.
REDIS_ONE_WAY_MS = 0.5


@dataclass(frozen=True)
class Sizes:
    """How much is measured. Stock workers get fewer cancels: they would take minutes."""

    warm_up: int
    paced_s: float  # how long cancels are asked for one at a time at the most
    idle: Mapping[str, int]
    far: Mapping[str, int]
    burst: Mapping[int, int]  # the project's cancels by requests in flight
    stock_burst: Mapping[str, int]
    pings: int
    many: int
    waiting: int  # jobs on the queue, and entries of each registry, of a full Redis
    window: int  # cancels over which the cost is taken
    memory_step: int
    memory_steps: int
    memory_ledger: int
    closes_after_s: float
    warm_s: str  # "": as the worker does it by itself
    retries: Mapping[str, int]
    silences: int
    forgets_after_s: float  # as a firewall does
    calm_s: float
    warm_behind_s: str  # as warm_s
    limit_s: float  # how long what does not come is waited for


@dataclass(frozen=True)
class Bench:
    """One run."""

    sizes: Sizes
    systems: Sequence[System]
    say: Callable[[str], None]
    _orders: itertools.count[int] = field(default_factory=lambda: itertools.count(10**15))

    def take(self, count: int) -> list[int]:
        """Ids of orders that no cancel was asked for yet."""
        return [next(self._orders) for _ in range(count)]


@dataclass(frozen=True)
class Sent:
    """Cancels that were asked for one at a time."""

    asked_ns: dict[int, int]
    calls_ms: list[float]

    def latencies_ms(self, arrivals: Mapping[int, list[Arrival]]) -> list[float]:
        """From each call to the first arrival; without those that did not arrive."""
        return [(arrivals[order][0][0] - ns) / 1e6 for order, ns in self.asked_ns.items() if order in arrivals]


def put_paced(running: Running, orders: Sequence[int], pace_s: float) -> Sent:
    """Ask for the cancels one by one, about ``pace_s`` apart."""
    sent = Sent({}, [])
    for order in orders:
        _put(running, order, pace_s, sent)
    return sent


def put_in_turns(bench: Bench, workers: Sequence[tuple[Running, float]], counts: Mapping[str, int]) -> dict[str, Sent]:
    """Ask several systems, each with its pace in s: its cancels are spread over the whole time, so that whatever else
    the machine does meets all of them alike. Stops early when it takes too long."""
    by_name = {running.system.name: (running, pace) for running, pace in workers}
    sent = {name: Sent({}, []) for name in by_name}
    ends_at = time.monotonic() + bench.sizes.paced_s
    for name in turns({name: counts[name] for name in by_name}):
        if time.monotonic() > ends_at:
            break
        running, pace = by_name[name]
        _put(running, bench.take(1)[0], pace, sent[name])
    return sent


def turns(counts: Mapping[str, int]) -> list[str]:
    """Each name so many times, evenly spread."""
    places = [((n + 0.5) / count, name) for name, count in counts.items() for n in range(count)]
    return [name for _, name in sorted(places)]


def _put(running: Running, order: int, pace_s: float, sent: Sent) -> None:
    began_ns = sent.asked_ns[order] = time.time_ns()
    running.producer.put(order)
    took_ns = time.time_ns() - began_ns
    sent.calls_ms.append(took_ns / 1e6)
    # A fifth more or less, so that no beat of the worker's is met again and again.
    time.sleep(max(0.0, pace_s * random.uniform(0.8, 1.2) - took_ns / 1e9))


def warm_up(bench: Bench, rig: Rig, running: Running) -> list[float]:
    """Let a fresh worker do a few cancels; gives their latencies in ms.

    Raises:
        RuntimeError: they did not reach the exchange.
    """
    count = bench.sizes.warm_up
    rig.exchange.reset(delay_ms=NEAR_MS)
    first, *others = bench.take(1 + count)
    running.producer.put(first)
    started = rig.exchange.wait_for(1, 30)
    sent = put_paced(running, others, running.system.pace_s)
    if not (started and rig.exchange.wait_for(1 + count, 30)):
        raise RuntimeError(f"{running.system.title} does not work; it printed:\n{running.worker.output()[-2000:]}")
    return sent.latencies_ms(rig.exchange.arrivals())


def pace_s(system: System, warm_ms: Sequence[float]) -> float:
    """How far apart cancels are, s, so that each one finds an idle worker on a slow machine too."""
    return max(system.pace_s, 2 * (statistics.median(warm_ms) + NEAR_MS) / 1000)


def lost_and_repeats(orders: Sequence[int], arrivals: Mapping[int, list[Arrival]]) -> tuple[int, int]:
    """How many cancels did not arrive, and how many arrivals there were beyond the first."""
    came = [len(arrivals.get(order, ())) for order in orders]
    return came.count(0), sum(max(count - 1, 0) for count in came)


def forget(rig: Rig) -> None:
    """Empty Redis and its statistics."""
    rig.redis.flushall()
    rig.redis.config_resetstat()


@dataclass(frozen=True)
class Used:
    """What had been used up to a moment; the difference of two is what a stretch took."""

    at_s: float
    worker_cpu_ms: float | None
    exchange_cpu_ms: float | None
    redis_cpu_ms: float
    redis_commands: int
    recorded: int

    def since(self, before: Used) -> Used:
        """What was used between two moments."""
        return Used(
            self.at_s - before.at_s,
            _difference(self.worker_cpu_ms, before.worker_cpu_ms),
            _difference(self.exchange_cpu_ms, before.exchange_cpu_ms),
            self.redis_cpu_ms - before.redis_cpu_ms,
            self.redis_commands - before.redis_commands,
            self.recorded - before.recorded,
        )


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def used(rig: Rig, running: Running) -> Used:
    """What has been used up to now."""
    with rig.redis.pipeline(transaction=True) as pipeline:
        pipeline.info("cpu")
        pipeline.info("commandstats")
        cpu, commands = pipeline.execute()
    return Used(
        time.perf_counter(),
        _ms(cpu_s(running.pid)),
        _ms(cpu_s(rig.exchange.pid)),
        1000 * (float(cpu["used_cpu_user"]) + float(cpu["used_cpu_sys"])),
        sum(int(row["calls"]) for row in commands.values()),
        running.producer.recorded(),
    )


def median_ping_ms(client: redis.Redis, count: int = 50) -> float:
    """Median round trip of a bare PING."""
    return statistics.median(ping_ms(client) for _ in range(count))


def ping_ms(client: redis.Redis) -> float:
    """One round trip."""
    began = time.perf_counter_ns()
    client.ping()
    return (time.perf_counter_ns() - began) / 1e6
