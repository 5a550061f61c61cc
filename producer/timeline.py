"""What became of requests in the last hour or day, interval by interval, read from the counts of a queue.

:mod:`producer.counts` says what stands in Redis, and how much of it is read at most, whatever somebody wrote there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

from producer.counts import MINUTES_KEPT, SIZE, Counts, minute_of
from producer.keys import Keys
from producer.protocol import Command, Conversation
from producer.status import ms_of, readable

#: Most minutes that one reading covers.
MAX_MINUTES = 1440


@dataclass(frozen=True, slots=True)
class Interval:
    """What was counted from one moment to the next interval's."""

    start_ms: int  # Redis' clock
    counts: Counts


@dataclass(frozen=True, slots=True)
class Timeline:
    """The counts of all time, and those of the last intervals, oldest first; the last one is not over yet."""

    at_ms: int
    total: Counts
    intervals: tuple[Interval, ...]


def read_counts(keys: Keys) -> Conversation[Counts]:
    """The counts of all time, in one round trip; zeros where nothing was counted, or a key of another type stands."""
    (numbers,) = yield from readable([_counts(keys)], {})
    return Counts.of(numbers)


def read_timeline(keys: Keys, minutes: int = 60, step: int = 1) -> Conversation[Timeline]:
    """What was counted in the last ``minutes``, in intervals of ``step`` minutes, in two round trips.

    Intervals begin at multiples of their length, so that a later reading shows the same ones. A day is two thirds of a
    megabyte to read: whoever shows it often keeps it for a while.

    Raises:
        ValueError: more than :data:`MAX_MINUTES`, or no whole steps.
    """
    if not 0 < step <= minutes <= MAX_MINUTES or minutes % step:
        raise ValueError(f"minutes={minutes}, step={step}: at most {MAX_MINUTES} minutes, in whole steps")
    (time,) = yield from readable([("TIME",)], {})
    last = int(time[0]) // 60
    starts = range(last // step * step - minutes + step, last + 1, step)
    wanted = range(starts.start, last + 2)  # a server that took over may be a minute behind what was counted
    spans = _spans(wanted)
    ring = [("GETRANGE", keys.minutes, SIZE * at, SIZE * (at + count) - 1) for at, count in spans]
    numbers, *parts = yield from readable([_counts(keys), *ring], {})
    states = b"".join(part.ljust(SIZE * count, b"\0") for part, (_, count) in zip(parts, spans, strict=True))
    begun = {minute: states[SIZE * n : SIZE * (n + 1)] for n, minute in enumerate(wanted)}
    begun = {minute: state for minute, state in begun.items() if minute_of(state) == minute}
    counts = _between(begun, numbers, starts)
    intervals = (Interval(60_000 * start, each) for start, each in zip(starts, counts, strict=True))
    return Timeline(ms_of(time), Counts.of(numbers), tuple(intervals))


def _counts(keys: Keys) -> Command:
    return ("GETRANGE", keys.counts, 0, SIZE - 1)


def _spans(minutes: range) -> list[tuple[int, int]]:
    """Where these minutes stand in the ring: from which place on, and how many."""
    at = minutes.start % MINUTES_KEPT
    before_the_seam = min(len(minutes), MINUTES_KEPT - at)
    spans = [(at, before_the_seam), (0, len(minutes) - before_the_seam)]
    return [(at, count) for at, count in spans if count]


def _between(begun: Mapping[int, bytes], numbers: bytes, starts: range) -> list[Counts]:
    """What was counted in each interval. A minute that is not among those ``begun`` had no outcome."""
    known, states = list(begun), [*begun.values(), numbers]
    found = []
    for start in starts:
        first, after = (bisect_left(known, minute) for minute in (start, start + starts.step))
        found.append(Counts.of(states[after], states[first]) if first < after else Counts.of(b""))
    return found
