"""How many outcomes there were, and how long they took: counts that never fall, kept by whoever records an outcome.

All counts of a queue stand in one string (:attr:`producer.keys.Keys.counts`): whole numbers of 64 bits, as Redis'
BITFIELD writes them. What stands at which position is known here alone; the script adds what it is told. A ring beside
it holds the counts as they were before the first outcome of each minute that had one. Standard library only; it talks
to nobody.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from struct import Struct

from producer.message import Outcome, OutcomeKind

#: Upper bounds of the buckets, ms; one more bucket holds what took longer.
BUCKETS_MS = (1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000, 120_000, 300_000)
#: Longest time that is counted, ms: clocks may be wrong.
_LONGEST_MS = 10**12

# Positions. Workers of several versions write them: none is ever moved.
# The first one is the minute, since the epoch, of the last outcome.
_KINDS = 1  # by the order of OutcomeKind, with room for further ones
_FIRST_ATTEMPT = 17
_OUTCOME = 36
_SINCE = 55  # when counting began, ms since the epoch
POSITIONS = 56
SIZE = 8 * POSITIONS
#: Minutes that the ring holds: a day, and what a reader that is late may still ask for.
MINUTES_KEPT = 1500
#: What the script must know of this.
LAYOUT: dict[str, object] = {"MINUTES_KEPT": MINUTES_KEPT, "POSITIONS": POSITIONS, "SINCE": _SINCE}

_NUMBERS = Struct(f">{POSITIONS}q")


def counted(outcome: Outcome) -> str:
    """What an outcome adds to the counts: positions, each followed by a number."""
    added = {_KINDS + _POSITIONS_OF[outcome.kind]: 1}
    for at, ms in ((_FIRST_ATTEMPT, outcome.first_attempt_ms), (_OUTCOME, outcome.took_ms)):
        if ms is not None:
            ms = min(ms, _LONGEST_MS)
            added |= {at + bisect_left(BUCKETS_MS, ms): 1, at + len(BUCKETS_MS) + 1: ms}
    return " ".join(f"{position} {number}" for position, number in added.items())


_POSITIONS_OF = {kind: n for n, kind in enumerate(OutcomeKind)}


@dataclass(frozen=True, slots=True)
class Times:
    """How long something took."""

    buckets: tuple[int, ...] = (0,) * (len(BUCKETS_MS) + 1)  # how many by :data:`BUCKETS_MS`, then what took longer
    sum_ms: int = 0

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self.buckets)

    def after(self, last: Times) -> Times:
        """See :meth:`Counts.after`."""
        buckets = tuple(map(max, self.buckets, last.buckets))
        return Times(buckets, max(self.sum_ms, last.sum_ms))

    def quantile(self, part: float) -> float | None:
        """The time, ms, within which a ``part`` (0 to 1) of them was done, None where there were none.

        Where in its bucket it lies is not known: evenly spread is assumed, as Prometheus does; at most the last bound.
        """
        rank, before = part * self.count, 0
        if not self.count:
            return None
        for bucket, upto in enumerate(accumulate(self.buckets[:-1])):
            if upto >= rank and upto > before:
                lower = BUCKETS_MS[bucket - 1] if bucket else 0
                return lower + (BUCKETS_MS[bucket] - lower) * (rank - before) / (upto - before)
            before = upto
        return BUCKETS_MS[-1]


@dataclass(frozen=True, slots=True)
class Counts:
    """Outcomes by kind, and how long they took from the enqueue: of all time, or of a while."""

    kinds: Mapping[OutcomeKind, int]  # all kinds
    first_attempt: Times = Times()
    outcome: Times = Times()
    since_ms: int = 0  # when counting began; 0: it has not

    @classmethod
    def of(cls, numbers: bytes, before: bytes = b"") -> Counts:
        """What came to ``numbers`` since ``before``, both as they stand in Redis, where anything may stand."""
        since, now = _unpacked(before), _unpacked(numbers)
        new = [max(0, one - other) for one, other in zip(now, since, strict=True)]
        return cls(
            {kind: new[_KINDS + n] for kind, n in _POSITIONS_OF.items()},
            _times(new[_FIRST_ATTEMPT:_OUTCOME]),
            _times(new[_OUTCOME:_SINCE]),
            max(0, now[_SINCE]),
        )

    def after(self, last: Counts | None) -> Counts:
        """What is known once this was read after ``last``: counts never fall, though a server that took over may hold
        an earlier state of them. What began at another time has nothing to do with it.
        """
        if last is None or self.since_ms not in (0, last.since_ms):
            return self
        kinds = {kind: max(count, last.kinds[kind]) for kind, count in self.kinds.items()}
        first_attempt, outcome = self.first_attempt.after(last.first_attempt), self.outcome.after(last.outcome)
        return Counts(kinds, first_attempt, outcome, last.since_ms)

    @property
    def count(self) -> int:
        """How many outcomes there were."""
        return sum(self.kinds.values())


def minute_of(numbers: bytes) -> int:
    """The minute, since the epoch, of which counts as they stand in Redis are."""
    return int.from_bytes(numbers[:8], "big", signed=True)


def _unpacked(numbers: bytes) -> tuple[int, ...]:
    return _NUMBERS.unpack(numbers[:SIZE].ljust(SIZE, b"\0"))


def _times(numbers: list[int]) -> Times:
    return Times(tuple(numbers[:-1]), numbers[-1])
