"""The picture for the README: latency of one cancel, and throughput over requests in flight."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.bench.figures import Results
from tests.bench.report import PROJECT, TITLES, by_load, number, per_s, percentile, pooled

_COLOURS: Mapping[str, str] = {
    "project": "#0b6e4f",
    "rq-simple": "#d1600a",
    "rq-worker": "#9c2c77",
    "floor": "#7a7a7a",
}


class MissingLibrary(RuntimeError):
    """matplotlib is not installed."""


def library() -> Any:
    """matplotlib's pyplot, drawing into files only.

    Raises:
        MissingLibrary: it is not installed.
    """
    try:
        # By name: the rest of the benchmark runs without it.
        importlib.import_module("matplotlib").use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise MissingLibrary("a plot needs matplotlib: pip install -e '.[bench]'") from error


def draw(results: Results, file: Path, where: str) -> None:
    """Write the PNG; ``where`` is a line about the machine."""
    pyplot = library()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    try:
        _latencies(left, results)
        _throughput(right, results)
        named = dict(zip(*reversed(right.get_legend_handles_labels()), strict=True))
        named |= dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
        if named:
            options = {"ncols": len(named), "fontsize": 8.5, "title": where, "title_fontsize": 8, "frameon": False}
            figure.legend(named.values(), named.keys(), loc="outside lower center", **options)
        for axes in (left, right):
            axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.7)
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, dpi=150, format="png")
    finally:
        pyplot.close(figure)


def _latencies(axes: Any, results: Results) -> None:
    for system, values in pooled(results.idle).items():
        ordered = sorted(values)
        shares = [100 * (n + 1) / len(ordered) for n in range(len(ordered))]
        width = 2.4 if system == PROJECT else 1.4
        axes.step(ordered, shares, where="post", color=_COLOURS[system], label=TITLES[system], linewidth=width)
        middle = percentile(values, 0.5)
        if middle is not None:
            # The leftmost curve is close to the next one.
            beside: dict[str, Any] = {"xytext": (-5, -4), "ha": "right"} if system == "floor" else {"xytext": (5, -4)}
            axes.annotate(f"{number(middle)} ms", (middle, 50), textcoords="offset points", fontsize=8, **beside)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(0, 101)
    axes.set_xlabel("ms from cancel() to the arrival of the DELETE (medians)")
    axes.set_ylabel("% of cancels")
    axes.set_title("Idle: one cancel at a time, exchange 5 ms away", fontsize=11)


def _throughput(axes: Any, results: Results) -> None:
    loads = by_load(results.burst)
    for system in TITLES:
        points = [(in_flight, per_s(bursts)) for (name, in_flight), bursts in loads.items() if name == system]
        known = [(in_flight, speed) for in_flight, speed in points if speed is not None]
        if known:
            axes.plot(*zip(*known, strict=True), "o-", color=_COLOURS[system], label=TITLES[system])
        for in_flight, speed in known if system == PROJECT else ():
            axes.annotate(f"{number(speed)}/s", (in_flight, speed), (7, -11), textcoords="offset points", fontsize=8)
    ticks = sorted({in_flight for _, in_flight in loads})
    if ticks:
        distance_s = next(iter(loads.values()))[0].exchange_ms / 1000
        bound = [in_flight / distance_s for in_flight in ticks]
        axes.plot(ticks, bound, ":", color="#999999", label="what the distance allows")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.margins(x=0.12)
    axes.set_xlabel("requests in flight")
    axes.set_ylabel("cancels per second")
    axes.set_title("Burst: exchange 50 ms away", fontsize=11)
