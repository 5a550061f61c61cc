"""The benchmark's arithmetic: percentiles, ratios, tables, and what counts as lost."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.common import turns
from tests.bench.figures import Burst, Calls, Capacity, Cost, Idle, Memory, MemoryStep, Results, Retries
from tests.bench.report import Ratio, Table, by_load, median, number, per, per_s, percentile, pooled, ratios, tables

SOME = st.lists(st.floats(0, 1e6, allow_nan=False), min_size=1)


def an_idle(system: str, *latencies_ms: float, lost: int = 0, unrecorded: int = 0) -> Idle:
    """A measurement with these latencies."""
    return Idle(system, 0, 0.1, list(latencies_ms), [0.2] * len(latencies_ms), lost, unrecorded, 0)


def a_burst(
    system: str, in_flight: int, cancels: int, seconds: float, cpu_ms: float | None = 100.0, lost: int = 0
) -> Burst:
    """A burst that took so long."""
    return Burst(
        system=system,
        in_flight=in_flight,
        exchange_ms=50,
        cancels=cancels,
        seconds=seconds,
        put_many_ms=1,
        peak_in_flight=in_flight,
        worker_cpu_ms=cpu_ms,
        redis_cpu_ms=50,
        redis_commands=1000,
        exchange_busy=0.1,
        peak_rss_mib=40,
        lost=lost,
        unrecorded=0,
        repeats=0,
        bad=0,
    )


def a_cost(full: bool, cpu_ms: float | None) -> Cost:
    """A stretch of 100 cancels."""
    return Cost(full, 1000, 1000, 20_000, 100, 1.0, cpu_ms, 20, 3000, 0)


@pytest.mark.parametrize(
    ("share", "value"), [(0.0, 1), (0.01, 1), (0.5, 50), (0.505, 51), (0.99, 99), (0.991, 100), (1, 100)]
)
def test_percentile_is_a_measured_value(share: float, value: float) -> None:
    """The nearest rank: of 1 to 100 the median is 50 and the 99th percentile 99, nothing in between is made up."""
    assert percentile(range(100, 0, -1), share) == value


@given(SOME, st.floats(0, 1))
def test_percentile_covers_its_share(values: list[float], share: float) -> None:
    """At least the share of the values does not exceed the percentile, and it is one of them."""
    found = percentile(values, share)

    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9


def test_nothing_measured_is_nothing_said() -> None:
    """Figures that could not be taken stay empty instead of becoming a number."""
    assert percentile([], 0.5) is None
    assert median([None, None]) is None
    assert per(None, 10) is None
    assert per(5, 0) is None
    assert number(None) == number(float("nan")) == "-"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.00512, "0.005"), (0.0512, "0.051"), (1.234, "1.23"), (12.34, "12.3"), (1234.6, "1235"), (7, "7")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    """Three significant digits, never fewer before the point, never more than three behind it."""
    assert number(value) == text


def test_rounds_are_pooled() -> None:
    """Latencies of all rounds count together; of a burst's rounds the median speed holds, lost cancels left out."""
    assert pooled([an_idle("floor", 1, 2), an_idle("project", 3), an_idle("floor", 4)]) == {
        "floor": [1, 2, 4],
        "project": [3],
    }
    assert per_s([a_burst("project", 64, 100, 1), a_burst("project", 64, 100, 4), a_burst("project", 64, 100, 2)]) == 50
    assert per_s([a_burst("project", 64, 100, 1, lost=40)]) == 60


def test_loads_are_in_order() -> None:
    """The project comes first, by requests in flight, then those that it is compared with."""
    bursts = [a_burst("floor", 1, 1, 1), a_burst("project", 256, 1, 1), a_burst("project", 8, 1, 1)]

    assert list(by_load(bursts)) == [("project", 8), ("project", 256), ("floor", 1)]


def test_ratios_are_to_what_was_measured_beside() -> None:
    """Each ratio is the project's figure divided by the other's, of the same run."""
    results = Results(
        idle=[an_idle("project", 2, 2, 2), an_idle("rq-simple", 8, 8, 8), an_idle("floor", 1, 1, 1)],
        burst=[a_burst("project", 64, 1000, 1), a_burst("rq-simple", 1, 20, 1, cpu_ms=40)],
        calls=[Calls([0.1, 0.1, 0.1], [0.25, 0.25, 0.25], 2000, [50])],
        cost=[a_cost(False, 50), a_cost(True, 55)],
    )

    found = {(ratio.what.partition(":")[0], ratio.to): ratio.value for ratio in ratios(results)}
    exact = {(ratio.what, ratio.to): ratio.value for ratio in ratios(results)}

    assert found["idle", "RQ SimpleWorker"] == 0.25
    assert found["idle", "bare BLPOP + DELETE"] == 2
    assert exact["burst: cancels/s with 64 in flight", "RQ SimpleWorker"] == 50
    assert exact["burst: CPU of the worker per cancel", "RQ SimpleWorker"] == pytest.approx(0.1 / 2)
    assert exact["cancel() p50", "a bare PING"] == pytest.approx(2.5)
    cpu = "full queue, ledger and registries: CPU of the worker per cancel"
    assert exact[cpu, "an empty start"] == pytest.approx(1.1)


def test_memory_is_held_against_half_of_the_way() -> None:
    """Growth at the beginning is not held against a worker: its second half is."""
    steps = [MemoryStep(n * 10, 40.0 + n, 30, 5, 2.0, 6000) for n in range(1, 5)]

    found = ratios(Results(memory=[Memory(100, steps, 0, 0, 0)]))

    assert [(ratio.project, ratio.other, ratio.to) for ratio in found] == [(44, 42, "after 20"), (2, 2, "after 20")]


def test_without_the_project_there_is_no_ratio() -> None:
    """Others are not compared among themselves; a figure that could not be taken makes no ratio."""
    assert ratios(Results(idle=[an_idle("rq-simple", 8), an_idle("floor", 1)])) == []
    assert ratios(Results(cost=[a_cost(False, None), a_cost(True, 1)]))[0].what.endswith("CPU of Redis per cancel")
    assert Ratio("", "", 1, 0).value is None


def test_tables_are_aligned() -> None:
    """Words to the left, figures to the right, all rows of one width."""
    table = Table("Title", ("", "long header", "x"), [("a", 1.5, None), ("longer name", 123456, "words")])

    assert table.text().splitlines() == [
        "Title",
        "-------------------------------",
        "             long header      x",
        "a                   1.50      -",
        "longer name       123456  words",
    ]


def test_only_what_was_measured_is_shown() -> None:
    """No table stands there empty."""
    assert tables(Results()) == []
    results = Results(
        capacity=[Capacity(5000)],
        idle=[an_idle("project", 1.0)],
        burst=[a_burst("project", 64, 100, 1, cpu_ms=None)],
        retries=[Retries("project", 2, [50], [1.5], 1, 0, 0, 0)],
        memory=[Memory(100, [MemoryStep(10, None, 30, 5, 2.0, 6000)], 0, 0, 0)],
    )

    shown = "\n\n".join(table.text() for table in tables(results))

    assert [table.title.partition(":")[0].partition(",")[0] for table in tables(results)] == [
        "Idle latency",
        "Burst",
        "Retries",
        "Memory over many cancels (Redis",
        "Further ratios",
    ]
    assert "5000/s" in shown
    assert "this project" in shown


def test_losses_are_named() -> None:
    """A cancel without its DELETE or without its record is told, by measurement and system."""
    results = Results(idle=[an_idle("project", 1.0), an_idle("floor", 1.0, lost=2, unrecorded=1)])

    assert results.losses() == ["idle, floor: 2 cancels without a DELETE, 1 without a record"]
    assert Results(idle=[an_idle("project", 1.0)]).losses() == []


def test_turns_are_spread() -> None:
    """Each system gets its number of turns, spread over the whole time."""
    assert turns({"a": 4, "b": 2}) == ["a", "b", "a", "a", "b", "a"]
    assert sorted(turns({"a": 7, "b": 3, "c": 0})) == ["a"] * 7 + ["b"] * 3


def test_results_are_json() -> None:
    """Every figure can be written down."""
    results = Results(idle=[an_idle("project", 1.0)], burst=[a_burst("project", 64, 1, 1, cpu_ms=None)])

    assert json.loads(json.dumps(asdict(results), allow_nan=False))["idle"][0]["latencies_ms"] == [1.0]
