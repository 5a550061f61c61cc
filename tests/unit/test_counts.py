"""What an outcome adds to the counts, and what the numbers in Redis tell, whatever stands there."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.counts import BUCKETS_MS, POSITIONS, SIZE, Counts, Times, counted
from producer.message import Attempt, Call, Outcome, OutcomeKind
from tests.messages import PROFILE

AT_MS = 1_763_800_000_000
TIMES = st.none() | st.integers(0, 10**6) | st.integers(-(2**63), 2**63 - 1)


def outcome(kind: OutcomeKind, first_ms: int | None = None, took_ms: int | None = None) -> Outcome:
    """One that was first tried and that ended so long after its enqueue."""
    attempts = () if first_ms is None else (Attempt(1, AT_MS + first_ms, Call.CANCEL, 200, 200, "", "confirmed", 5),)
    enqueued_at_ms = None if took_ms is None else AT_MS
    return Outcome(
        "x", 1, kind, attempts=attempts, enqueued_at_ms=enqueued_at_ms, finished_at_ms=AT_MS + (took_ms or 0)
    )


def added(*outcomes: Outcome) -> bytes:
    """The counts after these outcomes, as the script keeps them."""
    numbers = [0] * POSITIONS
    for each in outcomes:
        words = counted(each).split()
        for position, number in zip(words[::2], words[1::2], strict=True):
            numbers[int(position)] += int(number)
    return struct.pack(f">{POSITIONS}q", *numbers)


@PROFILE
@given(st.lists(st.tuples(st.sampled_from(OutcomeKind), TIMES, TIMES), max_size=8))
def test_counts_tell_what_was_added(rows: list[tuple[OutcomeKind, int | None, int | None]]) -> None:
    """Each outcome counts once under its kind, and once in each time that is known, however wrong the clocks are."""
    told = Counts.of(added(*(outcome(*row) for row in rows)))

    kinds = [kind for kind, _, _ in rows]
    assert told.kinds == {kind: kinds.count(kind) for kind in OutcomeKind}
    assert told.count == len(rows)
    for times, known in (
        (told.outcome, [took for _, _, took in rows if took is not None]),
        (told.first_attempt, [first for _, first, took in rows if took is not None and first is not None]),
    ):
        within = [min(max(0, ms), 10**12) for ms in known]
        assert (times.count, times.sum_ms) == (len(within), sum(within))
        assert [sum(times.buckets[: n + 1]) for n in range(len(BUCKETS_MS))] == [
            sum(ms <= bound for ms in within) for bound in BUCKETS_MS
        ]


def test_positions_stay_where_they_are() -> None:
    """Workers of several versions add to the same numbers: a kind is only ever added, at the end."""
    places = {kind: int(counted(outcome(kind)).split()[0]) for kind in OutcomeKind}

    kinds = "cancelled already_cancelled triggered expired rejected not_found refused overdue gave_up unknown listed"
    assert places == {kind: n for n, kind in enumerate(kinds.split(), 1)}
    assert counted(outcome(OutcomeKind.CANCELLED, 2, 10**7)) == "1 1 18 1 35 2 53 1 54 10000000"
    assert max(places.values()) < 17
    assert SIZE == 448


@pytest.mark.parametrize(
    ("took_ms", "part", "expected"),
    [
        ([], 0.5, None),
        ([3], 0.5, 3.75),
        ([3], 1, 5),
        ([3] * 99 + [80], 0.5, 2.5 + 2.5 * 50 / 99),
        ([3] * 99 + [80], 0.99, 5),
        ([3] * 99 + [80], 1, 100),
        ([0, 0], 0.99, 0.99),
        ([10**6], 0.5, 300_000),
        ([80, 10**6], 0.99, 300_000),
        ([3, 80], 0, 2.5),
    ],
)
def test_quantiles_lie_in_their_bucket(took_ms: list[int], part: float, expected: float | None) -> None:
    """A quantile lies where Prometheus has it: inside the bucket, and at the last bound for all that took longer."""
    told = Counts.of(added(*(outcome(OutcomeKind.CANCELLED, took_ms=ms) for ms in took_ms)))

    assert told.outcome.quantile(part) == (None if expected is None else pytest.approx(expected))


@PROFILE
@given(st.binary(max_size=2 * SIZE), st.binary(max_size=2 * SIZE))
def test_whatever_stands_there_is_told_as_counts(numbers: bytes, before: bytes) -> None:
    """Numbers that nobody of ours wrote, too few, too many or negative, give counts that are none below zero."""
    told = Counts.of(numbers, before)

    assert min(*told.kinds.values(), *told.outcome.buckets, *told.first_attempt.buckets, told.outcome.sum_ms) >= 0
    assert told.since_ms >= 0
    assert told.outcome.quantile(0.99) is None or told.outcome.count


@PROFILE
@given(st.binary(max_size=SIZE), st.binary(max_size=SIZE))
def test_counts_never_fall(numbers: bytes, before: bytes) -> None:
    """Of an earlier state of the same counts, the later one holds; counts that began at another time are others."""
    same = before.ljust(SIZE, b"\0")[-8:]
    last, one = Counts.of(before.ljust(SIZE, b"\0")), Counts.of(numbers.ljust(SIZE - 8, b"\0")[: SIZE - 8] + same)
    later = one.after(last)

    assert one.after(None) == one
    assert Counts.of(b"").after(last).kinds == last.kinds
    assert all(later.kinds[kind] == max(one.kinds[kind], last.kinds[kind]) for kind in OutcomeKind)
    assert later.outcome.count >= max(one.outcome.count, last.outcome.count)
    assert later.first_attempt.sum_ms == max(one.first_attempt.sum_ms, last.first_attempt.sum_ms)
    anew = replace(one, since_ms=last.since_ms + 1)
    assert anew.after(last) == anew


def test_the_difference_of_two_moments_is_what_came_between() -> None:
    """Counts of a while are those of its end without those of its beginning; a beginning of other counts takes none."""
    early, late = outcome(OutcomeKind.REFUSED, 1, 9), outcome(OutcomeKind.CANCELLED, 2, 30)

    between = Counts.of(added(early, late), added(early))

    assert between == Counts.of(added(late))
    assert Counts.of(b"", added(early)) == Counts.of(b"")
    assert Times().quantile(0.5) is None
