"""What became of requests over time, as plots: paths and words of which a template makes an SVG. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from producer.counts import Counts, Times
from producer.timeline import Interval
from producer.web.formatting import span, tone

#: Height of a drawing and width of one interval in it; a page stretches both.
HEIGHT, STEP = 100, 10
#: Classes of kinds from the ground up, and what a person calls them.
TONES = {"bad": "failed", "late": "triggered", "good": "off the book"}


@dataclass(frozen=True, slots=True)
class Plot:
    """A drawing: paths by the class that colours them, the marks of its height, top first, and what it shows."""

    title: str
    about: str
    legend: Mapping[str, str]  # class to words
    marks: Sequence[str]
    width: int
    paths: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Row:
    """One interval as a table tells it; times in ms, None where nothing was measured."""

    start_ms: int
    by_tone: Mapping[str, int]
    first_attempt: tuple[float | None, float | None]  # p50, p99
    outcome: tuple[float | None, float | None]


def rows_of(intervals: Sequence[Interval]) -> list[Row]:
    """The intervals, oldest first."""
    return [Row(each.start_ms, _by_tone(each.counts), *map(_quantiles, _times(each.counts))) for each in intervals]


def plots_of(intervals: Sequence[Interval], each: str, window: str) -> list[Plot]:
    """Outcomes, stacked, and the two latencies of a ``window`` of intervals that are ``each`` as long."""
    rows = rows_of(intervals)
    first, whole = (
        Times(tuple(map(sum, zip(*(times.buckets for times in all_of), strict=True))))
        for all_of in zip(*(_times(interval.counts) for interval in intervals), strict=True)
    )
    return [
        _outcomes(rows, each, window),
        _latency(rows, "the first attempt", lambda row: row.first_attempt, first, window),
        _latency(rows, "the outcome", lambda row: row.outcome, whole, window),
    ]


def _by_tone(counts: Counts) -> dict[str, int]:
    """How many of each class; what makes requests and is none about an order is left out."""
    return {name: sum(n for kind, n in counts.kinds.items() if tone(kind) == name) for name in TONES}


def _times(counts: Counts) -> tuple[Times, Times]:
    return counts.first_attempt, counts.outcome


def _quantiles(times: Times) -> tuple[float | None, float | None]:
    return times.quantile(0.5), times.quantile(0.99)


def _outcomes(rows: Sequence[Row], each: str, window: str) -> Plot:
    most = max(sum(row.by_tone.values()) for row in rows)
    top = _round_up(most)
    paths = dict.fromkeys(TONES, "")
    for n, row in enumerate(rows):
        y = float(HEIGHT)
        for name, count in row.by_tone.items():
            if count:
                y -= (height := HEIGHT * count / top)
                paths[name] += f"M{STEP * n + 1} {y:.2f}h{STEP - 2}v{height:.2f}h{2 - STEP}z"
    sums = {words: sum(row.by_tone[name] for row in rows) for name, words in TONES.items()}
    told = ", ".join(f"{count:,} {words}" for words, count in reversed(sums.items()))
    about = f"In the {window}: {told}; {most:,} at most in one interval."
    marks = [f"{top:,}", f"{top / 2:,g}", "0"]
    return Plot(f"Outcomes by {each}", about, TONES, marks, STEP * len(rows), paths)


def _latency(
    rows: Sequence[Row],
    until: str,
    pick: Callable[[Row], tuple[float | None, float | None]],
    all_of: Times,
    window: str,
) -> Plot:
    """On a scale of powers of ten, as far as these times need it."""
    known = [max(1.0, ms) for row in rows for ms in pick(row) if ms is not None]
    low = math.floor(math.log10(min(known, default=1)))
    high = max(low + 1, math.ceil(math.log10(max(known, default=1))))
    width = STEP * len(rows)

    def path(which: int) -> Iterator[str]:
        drawn = False
        for n, row in enumerate(rows):
            ms = pick(row)[which]
            if ms is not None:
                y = HEIGHT * (high - math.log10(max(1.0, ms))) / (high - low)
                yield f"{'V' if drawn else f'M{STEP * n} '}{y:.2f}h{STEP}"
            drawn = ms is not None

    lines = "".join(f"M0 {HEIGHT * n / (high - low):.2f}h{width}" for n in range(1, high - low))
    paths = {"grid": lines, "p99": "".join(path(1)), "p50": "".join(path(0))}
    p50, p99 = (None if ms is None else ms / 1000 for ms in _quantiles(all_of))
    about = f"In the {window}: p50 {span(p50)}, p99 {span(p99)}; the scale is logarithmic."
    marks = [span(10**power / 1000) for power in range(high, low - 1, -1)]
    return Plot(f"From the enqueue to {until}", about, {"p50": "p50", "p99": "p99"}, marks, width, paths)


def _round_up(most: int) -> int:
    """The least of 1, 2, 5, 10, 20, … that is not less."""
    size: int = 10 ** max(0, len(str(most)) - 1)
    return next(size * factor for factor in (1, 2, 5, 10) if size * factor >= most)
