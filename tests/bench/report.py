"""From raw figures to what people read: percentiles, ratios, tables. Pure.

Nothing here is an absolute claim: what counts are the ratios to what was measured beside it, in the same run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tests.bench.figures import Burst, Cost, Idle, Memory, Results

PROJECT = "project"
TITLES: Mapping[str, str] = {
    "project": "this project",
    "rq-simple": "RQ SimpleWorker",
    "rq-worker": "RQ Worker (forks)",
    "floor": "bare BLPOP + DELETE",
}
#: How long the exchange's official SDK waits for an answer before it gives up, ms, if it is told nothing else.
SDK_TIMEOUT_MS = 1000.0
#: What stands where nothing was measured.
NOTHING = "-"

Cell = str | int | float | None


# ---- numbers --------------------------------------------------------------------------------------------------------


def percentile(values: Iterable[float], share: float) -> float | None:
    """The smallest value that at least ``share`` (0 to 1) of the values do not exceed; None of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def median(values: Iterable[float | None]) -> float | None:
    """The median of what was measured; None if nothing was."""
    measured = [value for value in values if value is not None]
    return statistics.median(measured) if measured else None


def per(total: float | None, count: float) -> float | None:
    """``total`` divided among ``count``; None where either tells nothing."""
    return None if total is None or not count else total / count


def number(value: Cell) -> str:
    """A cell's text: three significant digits, but no digit before the point is ever dropped."""
    if value is None:
        return NOTHING
    if isinstance(value, str | int):
        return str(value)
    if not math.isfinite(value):
        return NOTHING
    digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 3)}f}"


@dataclass(frozen=True)
class Ratio:
    """The project's figure against another's; both in the same unit."""

    what: str
    to: str
    project: float
    other: float

    @property
    def value(self) -> float | None:
        """The one divided by the other; None for a division by nothing."""
        return self.project / self.other if self.other else None


# ---- the systems' figures, all rounds together ----------------------------------------------------------------------


def pooled(measured: Sequence[Idle]) -> dict[str, list[float]]:
    """Latencies by system, those of all rounds."""
    found: dict[str, list[float]] = {}
    for one in measured:
        found.setdefault(one.system, []).extend(one.latencies_ms)
    return found


def by_load(measured: Sequence[Burst]) -> dict[tuple[str, int], list[Burst]]:
    """Bursts by system and requests in flight."""
    found: dict[tuple[str, int], list[Burst]] = {}
    for one in measured:
        found.setdefault((one.system, one.in_flight), []).append(one)
    return {load: found[load] for load in sorted(found, key=lambda load: (list(TITLES).index(load[0]), load[1]))}


def per_s(bursts: Sequence[Burst]) -> float | None:
    """Cancels a second, the median of the rounds."""
    return median(per(one.cancels - one.lost, one.seconds) for one in bursts)


def _each(bursts: Sequence[Burst], total: Callable[[Burst], float | None]) -> float | None:
    return median(per(total(one), one.cancels) for one in bursts)


# ---- ratios ---------------------------------------------------------------------------------------------------------


def ratios(results: Results) -> list[Ratio]:
    """The project's figures against the others', against a bare round trip, and against an empty start."""
    found: list[Ratio] = []
    for name, measured in (("idle", results.idle), ("idle, Redis further away", results.far)):
        latencies = pooled(measured)
        for share in (0.5, 0.99):
            figures = {system: percentile(values, share) for system, values in latencies.items()}
            found += _against(f"{name}: p{share * 100:.0f} from cancel() to its DELETE", figures)
    found += [*_burst_ratios(results.burst), *_call_ratios(results), *_cost_ratios(results.cost)]
    return [*found, *_memory_ratios(results.memory), *_silence_ratios(results)]


def _against(what: str, figures: Mapping[str, float | None]) -> list[Ratio]:
    project = figures.get(PROJECT)
    if project is None:
        return []
    others = [(system, figures.get(system)) for system in TITLES if system != PROJECT]
    return [Ratio(what, TITLES[system], project, other) for system, other in others if other is not None]


def _burst_ratios(measured: Sequence[Burst]) -> list[Ratio]:
    loads = by_load(measured)
    stock = {system: bursts for (system, _), bursts in loads.items() if system != PROJECT}
    found = []
    for (system, in_flight), bursts in loads.items():
        if system == PROJECT:
            speeds = {name: per_s(others) for name, others in stock.items()} | {PROJECT: per_s(bursts)}
            found += _against(f"burst: cancels/s with {in_flight} in flight", speeds)
    common = loads.get((PROJECT, 64))
    if common:
        both = stock | {PROJECT: common}
        cpu = {name: _each(bursts, lambda one: one.worker_cpu_ms) for name, bursts in both.items()}
        memory = {name: median(one.peak_rss_mib for one in bursts) for name, bursts in both.items()}
        found += _against("burst: CPU of the worker per cancel", cpu)
        found += _against("burst: peak resident memory", memory)
    return found


def _call_ratios(results: Results) -> list[Ratio]:
    found = []
    for one in results.calls:
        call, ping = percentile(one.cancel_ms, 0.5), percentile(one.ping_ms, 0.5)
        if call is not None and ping is not None:
            found.append(Ratio("cancel() p50", "a bare PING", call, ping))
    return found


def _cost_ratios(measured: Sequence[Cost]) -> list[Ratio]:
    totals: dict[str, Callable[[Cost], float | None]] = {
        "CPU of the worker": lambda one: one.worker_cpu_ms,
        "CPU of Redis": lambda one: one.redis_cpu_ms,
        "Redis commands": lambda one: one.redis_commands,
    }
    found = []
    for what, total in totals.items():
        full, empty = (median(per(total(o), o.cancels) for o in measured if o.full is state) for state in (True, False))
        if full is not None and empty is not None:
            found.append(Ratio(f"full queue, ledger and registries: {what} per cancel", "an empty start", full, empty))
    return found


def _memory_ratios(measured: Sequence[Memory]) -> list[Ratio]:
    found = []
    for one in measured:
        half, last = one.steps[(len(one.steps) - 1) // 2], one.steps[-1]
        halfway = f"after {half.cancels}"
        if half.rss_mib is not None and last.rss_mib is not None:
            found.append(
                Ratio(f"memory of the worker after {last.cancels} cancels", halfway, last.rss_mib, half.rss_mib)
            )
        found.append(Ratio(f"memory of Redis after {last.cancels} cancels", halfway, last.redis_mib, half.redis_mib))
    return found


def _silence_ratios(results: Results) -> list[Ratio]:
    found = []
    for one in results.silence:
        what = f"slowest of {len(one.outcomes_ms)} outcomes, {one.part:.0%} of answers never come"
        found.append(Ratio(what, "the official SDK's time-out", max(one.outcomes_ms, default=0), SDK_TIMEOUT_MS))
    for calm in results.calm:
        what = f"slowest of a burst after {calm.calm_s:.0f} s behind a firewall that forgets"
        found.append(Ratio(what, "before it", max(calm.after_ms, default=0), max(calm.before_ms, default=0)))
    return found


# ---- tables ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Rows under a title; the first column is words, the others are figures."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[Cell, ...]]

    def text(self) -> str:
        """As aligned plain text."""
        cells = [self.header, *(tuple(number(cell) for cell in row) for row in self.rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(self.header))]
        lines = []
        for first, *others in cells:
            figures = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
            lines.append("  ".join([first.ljust(widths[0]), *figures]).rstrip())
        return "\n".join([self.title, "-" * max(len(self.title), *map(len, lines)), *lines])


def tables(results: Results) -> list[Table]:
    """Everything that was measured, a table for each kind; nothing for what was not."""
    made = [
        _idle_table("Idle latency: from the call of cancel() to the arrival of its DELETE, ms", results.idle),
        _idle_table(_far_title(results.far), results.far),
        _burst_table(results),
        _call_table(results),
        _cost_table(results.cost),
        _cold_table(results),
        _retry_table(results),
        _memory_table(results),
        _silence_table(results),
        _ratio_table(ratios(results)),
        _further_ratio_table(ratios(results)),
    ]
    return [table for table in made if table.rows]


def _far_title(measured: Sequence[Idle]) -> str:
    ping = median(one.ping_ms for one in measured)
    return f"The same with Redis further away (a bare PING takes {number(ping)} ms), ms"


def _idle_table(title: str, measured: Sequence[Idle]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for system, values in pooled(measured).items():
        own = [one for one in measured if one.system == system]
        calls = percentile((call for one in own for call in one.calls_ms), 0.5)
        shares = (percentile(values, share) for share in (0.5, 0.9, 0.99, 1))
        lost, repeats = sum(one.lost + one.unrecorded for one in own), sum(one.repeats for one in own)
        rows.append((TITLES[system], len(values), *shares, calls, lost, repeats))
    return Table(title, ("", "cancels", "p50", "p90", "p99", "max", "the call", "lost", "repeated"), rows)


def _burst_table(results: Results) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for (system, in_flight), bursts in by_load(results.burst).items():
        rows.append(
            (
                TITLES[system],
                in_flight,
                sum(one.cancels for one in bursts),
                per_s(bursts),
                max(one.peak_in_flight for one in bursts),
                _each(bursts, lambda one: one.worker_cpu_ms),
                _each(bursts, lambda one: one.redis_cpu_ms),
                _each(bursts, lambda one: one.redis_commands),
                median(one.peak_rss_mib for one in bursts),
                percentile((100 * one.exchange_busy for one in bursts if one.exchange_busy is not None), 1),
                sum(one.lost + one.unrecorded + one.bad for one in bursts),
                sum(one.repeats for one in bursts),
            )
        )
    header = ("in flight", "cancels", "per s", "seen", "CPU ms", "Redis ms", "commands", "MiB", "exch. %")
    title = "Burst, exchange 50 ms away (per cancel; exch. %: how busy the exchange was)"
    return Table(title, ("", *header, "lost", "repeated"), rows)


def _call_table(results: Results) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for one in results.calls:
        for what, values in (
            ("bare PING", one.ping_ms),
            ("cancel()", one.cancel_ms),
            (f"cancel_many() of {one.many}", one.cancel_many_ms),
        ):
            rows.append((what, len(values), percentile(values, 0.5), percentile(values, 0.99)))
    return Table("The producer's calls, nobody at the queue, ms", ("", "calls", "p50", "p99"), rows)


def _cost_table(measured: Sequence[Cost]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for one in measured:
        what = "full" if one.full else "empty start"
        each = [per(total, one.cancels) for total in (one.worker_cpu_ms, one.redis_cpu_ms, one.redis_commands)]
        speed = per(one.cancels, one.seconds)
        rows.append((what, one.waiting, one.registered, one.ledger, one.cancels, speed, *each, one.repeats))
    header = ("waiting", "in registries", "ledger", "cancels", "per s", "CPU ms", "Redis ms", "commands", "repeated")
    return Table("Cost of a cancel with much on the queue and behind it", ("", *header), rows)


def _cold_table(results: Results) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (
            TITLES[one.system],
            one.closes_after_s,
            one.idle_s,
            one.handshakes,
            one.latency_ms,
            percentile(one.warm_ms, 0.5),
        )
        for one in results.cold
    ]
    header = ("", "closes idle after s", "idle s", "handshakes before the DELETE", "latency ms", "p50 before ms")
    return Table("First cancel after a pause, exchange over TLS", header, rows)


def _retry_table(results: Results) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for one in results.retries:
        shares = (percentile(one.late_ms, share) for share in (0.5, 0.99, 1))
        early = sum(late < 0 for late in one.late_ms)
        delay = percentile(one.delays_ms, 0.5)
        rows.append((TITLES[one.system], one.orders, delay, *shares, early, one.at_once, one.lost, one.repeats))
    header = ("orders", "pause p50", "late p50", "late p99", "late max", "early", "at once", "lost", "repeated")
    return Table("Retries: the second DELETE against when it was due, ms", ("", *header), rows)


def _memory_table(results: Results) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for one in results.memory:
        for step in one.steps:
            figures = (step.rss_mib, step.redis_mib, step.lasting_keys, step.expiring_bytes / 1024)
            rows.append((f"after {step.cancels} cancels", *figures))
    header = ("", "worker MiB", "Redis MiB", "keys", "KiB that expire, per cancel")
    return Table("Memory over many cancels (Redis: without what expires by itself)", header, rows)


def _silence_table(results: Results) -> Table:
    measured: list[tuple[str, Sequence[float], int]] = []
    for one in results.silence:
        measured.append((f"{one.silent} answers never came ({one.part:.0%} of all)", one.outcomes_ms, one.lost))
    for calm in results.calm:
        forgets = f"a firewall that forgets after {calm.forgets_after_s:.0f} s"
        measured.append((f"a burst behind {forgets}", calm.before_ms, 0))
        measured.append((f"the same after {calm.calm_s:.0f} s of calm", calm.after_ms, calm.lost))
    rows: list[tuple[Cell, ...]] = [
        (what, len(values), *(percentile(values, share) for share in (0.5, 0.99, 1)), lost)
        for what, values, lost in measured
    ]
    title = f"What stays away: from request to outcome, ms (the official SDK gives up after {SDK_TIMEOUT_MS:.0f})"
    return Table(title, ("", "cancels", "p50", "p99", "max", "lost"), rows)


def _ratio_table(found: Sequence[Ratio]) -> Table:
    """Ratios to the other systems, a row for each figure."""
    others = [TITLES[system] for system in TITLES if system != PROJECT]
    values = {(one.what, one.to): one.value for one in found}
    own = {one.what: one.project for one in found if one.to in others}
    rows: list[tuple[Cell, ...]] = [(what, own[what], *(values.get((what, to)) for to in others)) for what in own]
    return Table("This project, and as ratio to each of the others, same run", ("", PROJECT, *others), rows)


def _further_ratio_table(found: Sequence[Ratio]) -> Table:
    """Ratios to something else."""
    others = set(TITLES.values())
    rows: list[tuple[Cell, ...]] = [
        (f"{one.what} to {one.to}", one.project, one.other, one.value) for one in found if one.to not in others
    ]
    return Table("Further ratios, same run", ("", PROJECT, "other", "ratio"), rows)
