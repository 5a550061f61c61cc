"""`python -m tests.bench`: measure the project beside stock RQ and a bare floor, in one run on this machine.

Everything runs on loopback, in processes of its own: a Valkey, an exchange that checks signatures, a proxy that puts
Redis further away, one worker at a time. Progress goes to stderr, tables to stdout. Figures of different machines, or
of one machine at different times, do not compare; the ratios of one run do.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.bench import behaviour, endurance, measures, plot, silences
from tests.bench.common import REDIS_ONE_WAY_MS, Bench, Sizes
from tests.bench.figures import Results
from tests.bench.report import tables
from tests.bench.rig import Rig, open_rig
from tests.bench.systems import PROJECT, SYSTEMS

EX_OK, EX_LOST, EX_USAGE, EX_FAILED, EX_INTERRUPTED = 0, 1, 2, 3, 130
MEASURES = {
    "idle": "latency of one cancel, exchange 5 ms away",
    "far": "the same with Redis further away",
    "burst": "cancels/s, CPU and memory, exchange 50 ms away",
    "calls": "cancel() and cancel_many() against a bare PING",
    "cost": "cost per cancel with much on the queue, in ledger and registries",
    "cold": "first cancel after a pause, exchange over TLS that closes idle connections",
    "retries": "start of retries against when they were due",
    "memory": "memory of worker and Redis over many cancels",
    "silence": "outcomes while 5 % of all answers never come",
    "calm": "a burst after a calm, behind a firewall that forgets flows that are still",
}

QUICK = Sizes(
    warm_up=5,
    paced_s=4.5,
    idle={"project": 50, "rq-simple": 25, "rq-worker": 5, "floor": 50},
    far={"project": 50, "rq-simple": 20, "rq-worker": 3, "floor": 50},
    burst={1: 20, 8: 150, 64: 600, 256: 600},
    stock_burst={"rq-simple": 20, "rq-worker": 8, "floor": 20},
    pings=200,
    many=2000,
    waiting=10_000,
    window=600,
    memory_step=1000,
    memory_steps=3,
    memory_ledger=500,
    closes_after_s=3.0,
    warm_s="1.25",
    retries={"project": 100},
    silences=150,
    forgets_after_s=2.0,
    calm_s=5.0,
    warm_behind_s="1.5",
    limit_s=20.0,
)
FULL = Sizes(
    warm_up=20,
    paced_s=60.0,
    idle={"project": 300, "rq-simple": 200, "rq-worker": 60, "floor": 300},
    far={"project": 300, "rq-simple": 150, "rq-worker": 50, "floor": 300},
    burst={1: 100, 8: 1000, 64: 2000, 256: 2000},
    stock_burst={"rq-simple": 150, "rq-worker": 60, "floor": 150},
    pings=1000,
    many=2000,
    waiting=100_000,
    window=3000,
    memory_step=10_000,
    memory_steps=20,
    memory_ledger=20_000,
    closes_after_s=60.0,
    warm_s="",
    retries={"project": 400, "rq-simple": 10},
    silences=300,
    forgets_after_s=20.0,
    calm_s=50.0,
    warm_behind_s="",
    limit_s=60.0,
)


def _options(arguments: list[str]) -> argparse.Namespace:
    names = [system.name for system in SYSTEMS]
    shown = "\n".join(f"  {name:<10}{what}" for name, what in MEASURES.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"measurements:\n{shown}\nsystems:\n  {' '.join(names)}\n"
        "exit codes: 0 measured, 1 a cancel was lost (no DELETE, or no record), 2 bad usage, 3 not measured",
    )
    parser.add_argument("--quick", action="store_true", help="less of everything: under a minute")
    parser.add_argument("--plot", metavar="FILE.png", type=Path, help="draw idle latency and throughput (matplotlib)")
    parser.add_argument("--only", metavar="NAME", nargs="+", default=[], help="these measurements, systems, or both")
    given = parser.parse_args(arguments)
    if unknown := set(given.only) - MEASURES.keys() - set(names):
        parser.error(f"--only: no such measurement or system: {', '.join(sorted(unknown))}")
    return given


def measure(wanted: Collection[str], bench: Bench, rig: Rig) -> Results:
    """Take the measurements that were asked for."""
    results, has_project = Results(), PROJECT in bench.systems
    if {"idle", "burst"} & set(wanted):
        measures.speed(bench, rig, results, wanted)
    if "far" in wanted:
        measures.far(bench, rig, results)
    if "cost" in wanted and has_project:
        results.cost += [endurance.cost(bench, rig, full) for full in (False, True)]
    if "silence" in wanted and has_project:
        results.silence.append(silences.silences(bench, rig))
    if "calm" in wanted and has_project:
        results.calm.append(silences.after_calm(bench, rig))
    if "calls" in wanted and has_project:
        results.calls.append(measures.calls(bench, rig))
    with _long_pause(bench, results, wanted):
        if "retries" in wanted:
            chosen = [system for system in bench.systems if system.name in bench.sizes.retries]
            results.retries += [behaviour.retries(bench, rig, system) for system in chosen]
        if "memory" in wanted and has_project:
            results.memory.append(endurance.memory(bench, rig))
    return results


@contextlib.contextmanager
def _long_pause(bench: Bench, results: Results, wanted: Collection[str]) -> Iterator[None]:
    """The first cancel after a pause: the pause lasts while the block runs, and longer if need be."""
    if "cold" not in wanted:
        yield
        return
    with ThreadPoolExecutor(1) as pool:
        pausing = threading.Event()
        cold = pool.submit(behaviour.first_after_idle, bench, pausing)
        while not (pausing.wait(0.1) or cold.done()):
            pass
        yield
        results.cold += cold.result()


def _progress() -> Callable[[str], None]:
    began = time.monotonic()

    def say(line: str) -> None:
        sys.stderr.write(f"{time.monotonic() - began:6.1f} s  {line}\n")
        sys.stderr.flush()

    return say


def run(options: argparse.Namespace) -> int:
    """Measure and report; gives the exit code."""
    if options.plot is not None:
        plot.library()
    began = time.monotonic()
    wanted = [name for name in MEASURES if name in options.only] or list(MEASURES)
    systems = [system for system in SYSTEMS if system.name in options.only] or list(SYSTEMS)
    bench = Bench(QUICK if options.quick else FULL, systems, _progress())
    with open_rig(REDIS_ONE_WAY_MS) as rig:
        server = rig.redis.info("server")
        results = measure(wanted, bench, rig)
    name = f"{server.get('server_name', 'redis')} {server.get('valkey_version', server.get('redis_version'))}"
    where = f"{len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, {name}"
    remark = "Stock workers do fewer cancels; p99 of less than 100 is their max."
    lost = [f"LOST  {line}" for line in results.losses()]
    lines = [f"{where}, {time.monotonic() - began:.1f} s. {remark}", *lost]
    print(*(f"{table.text()}\n" for table in tables(results)), *lines, sep="\n")  # noqa: T201
    if options.plot is not None:
        plot.draw(results, options.plot, where)
    return EX_LOST if lost else EX_OK


def main(arguments: list[str]) -> int:
    """Run the command; gives the exit code."""
    options = _options(arguments)
    try:
        return run(options)
    except plot.MissingLibrary as error:
        sys.stderr.write(f"error: {error}\n")
        return EX_USAGE
    except (RuntimeError, AssertionError) as error:
        sys.stderr.write(f"error: {error}\n")
        return EX_FAILED
    except KeyboardInterrupt:
        return EX_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
