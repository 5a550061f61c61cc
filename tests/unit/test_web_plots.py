"""The plots of the operators' page: what is drawn of intervals, and what is said of it."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest

from producer.counts import BUCKETS_MS, Counts, Times
from producer.message import OutcomeKind
from producer.timeline import Interval
from producer.web.plots import HEIGHT, STEP, plots_of, rows_of


def times(**of_bucket: int) -> Times:
    """So many in each bucket, by its upper bound in ms."""
    buckets = [0] * (len(BUCKETS_MS) + 1)
    for name, count in of_bucket.items():
        buckets[BUCKETS_MS.index(int(name[1:]))] = count
    return Times(tuple(buckets))


def interval(n: int, kinds: Mapping[OutcomeKind, int], took: Times | None = None) -> Interval:
    """The n-th minute."""
    return Interval(60_000 * n, Counts(dict.fromkeys(OutcomeKind, 0) | dict(kinds), took or Times(), took or Times()))


CALM = interval(0, {})
BUSY = interval(
    1,
    {
        OutcomeKind.CANCELLED: 5,
        OutcomeKind.EXPIRED: 1,
        OutcomeKind.TRIGGERED: 2,
        OutcomeKind.REFUSED: 1,
        OutcomeKind.LISTED: 9,
    },
    times(_100=9),
)
QUIET = interval(2, {OutcomeKind.CANCELLED: 1}, times(_10000=1))


def numbers(path: str) -> list[float]:
    """Those of a path."""
    return [float(number) for number in re.findall(r"-?[\d.]+", path)]


def test_outcomes_are_stacked_by_what_became_of_the_order() -> None:
    """Failed ones on the ground, triggered ones above, those off the book on top; requests for lists are no outcome."""
    plot, *_ = plots_of([CALM, BUSY, QUIET], "minute", "last hour")

    assert plot.marks == ["10", "5", "0"]
    assert numbers(plot.paths["bad"]) == [STEP + 1, 90, STEP - 2, 10, 2 - STEP]
    assert numbers(plot.paths["late"]) == [STEP + 1, 70, STEP - 2, 20, 2 - STEP]
    assert numbers(plot.paths["good"])[:4] == [STEP + 1, 10, STEP - 2, 60]
    assert plot.about == "In the last hour: 7 off the book, 2 triggered, 1 failed; 9 at most in one interval."


def test_latencies_are_drawn_on_powers_of_ten_with_gaps() -> None:
    """Where nothing was measured there is no line; the whole window's quantiles are told in words."""
    _, first, _ = plots_of([BUSY, CALM, QUIET], "minute", "last hour")

    assert first.marks == ["10.0 s", "1.0 s", "100 ms", "10 ms"]
    assert first.paths["p50"].count("M") == 2
    assert first.paths["grid"].count("M") == 2
    assert first.about == "In the last hour: p50 78 ms, p99 9.5 s; the scale is logarithmic."


@pytest.mark.parametrize(
    "intervals", [[CALM], [CALM, CALM], [interval(0, {OutcomeKind.CANCELLED: 10**15}, Times((0,) * 17 + (3,)))]]
)
def test_nothing_and_too_much_can_be_drawn(intervals: list[Interval]) -> None:
    """Whatever stands in the counts, every number of a path lies in the drawing."""
    for plot in plots_of(intervals, "minute", "last day"):
        for path in plot.paths.values():
            assert all(abs(number) <= max(HEIGHT, plot.width) for number in numbers(path))
        assert len(plot.marks) >= 2


def test_rows_tell_what_is_drawn() -> None:
    """The table has the same figures."""
    calm, busy, _ = rows_of([CALM, BUSY, QUIET])

    assert (calm.by_tone, calm.first_attempt) == ({"bad": 0, "late": 0, "good": 0}, (None, None))
    assert busy.by_tone == {"bad": 1, "late": 2, "good": 6}
    assert busy.outcome[0] == pytest.approx(75, abs=5)
