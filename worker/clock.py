"""The exchange's time, kept on this host's monotonic clock: arithmetic alone, no I/O.

A signed request is refused if its timestamp is older than recvWindow or 1,000 ms ahead of the exchange's clock
(exchange.md 2). The wall clock of a rented host can be wrong and can jump; the monotonic one does neither.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

#: How far timestamps stay behind the estimate, ms: what two ordinary quartz clocks (100 ppm each) drift apart in the
#: 25 s between two measurements. An uneven path needs no allowance: a slow way out, which makes the estimate run
#: ahead, delays the request by at least as much.
BEHIND_MS = 5
#: How many samples compete to be the best.
KEPT_SAMPLES = 8
#: A sample this much older than the newest one is dropped, s: by then drift outweighs a short round trip.
RECENT_S = 120
#: Two samples contradict each other if they are further apart than both round trips explain, ms: beyond that lie the
#: exchange's whole milliseconds and the drift within ``RECENT_S``.
CONTRADICTION_MS = 25

_NS_PER_MS = 1_000_000


def _wall_ms() -> int:
    return time.time_ns() // _NS_PER_MS


@dataclass(frozen=True, slots=True)
class _Sample:
    offset_ns: int  # the exchange's time since the epoch minus the monotonic clock
    round_trip_ns: int
    received_ns: int  # monotonic

    def contradicts(self, other: _Sample) -> bool:
        # Each offset is right to half its round trip.
        explained_ns = (self.round_trip_ns + other.round_trip_ns) // 2 + CONTRADICTION_MS * _NS_PER_MS
        return abs(self.offset_ns - other.offset_ns) > explained_ns


class ServerClock:
    """The exchange's clock as seen from here; safe to share between threads.

    Until the first sample, and after :meth:`drop_samples` until the next, it is the host's wall clock.
    """

    def __init__(self, mono_ns: Callable[[], int] = time.monotonic_ns, wall_ms: Callable[[], int] = _wall_ms) -> None:
        self._mono_ns = mono_ns
        self._wall_ms = wall_ms
        self._lock = threading.Lock()
        self._samples: tuple[_Sample, ...] = ()  # oldest first
        self._best: _Sample | None = None  # read without the lock: one reference, replaced as a whole

    def add_sample(self, sent_mono_ns: int, received_mono_ns: int, server_time_ms: int) -> None:
        """Take in one answer of ``GET /fapi/v1/time``: when it was asked and answered here, and what it said.

        The offset is taken at the middle of the round trip, and the shortest round trip of the recent samples wins.
        Older samples that cannot be true if this one is (a clock was set, or this host slept) are forgotten.

        Raises:
            ValueError: the answer came before the question.
        """
        if received_mono_ns < sent_mono_ns:
            raise ValueError("a sample was received before it was sent")
        middle_ns = (sent_mono_ns + received_mono_ns) // 2
        new = _Sample(server_time_ms * _NS_PER_MS - middle_ns, received_mono_ns - sent_mono_ns, received_mono_ns)
        oldest_ns = received_mono_ns - RECENT_S * 1000 * _NS_PER_MS
        with self._lock:
            kept = [old for old in self._samples if old.received_ns >= oldest_ns and not old.contradicts(new)]
            self._samples = (*kept, new)[-KEPT_SAMPLES:]
            self._best = min(reversed(self._samples), key=lambda sample: sample.round_trip_ns)

    def drop_samples(self) -> None:
        """Forget everything measured: the exchange refused a timestamp, so some of it is wrong."""
        with self._lock:
            self._samples = ()
            self._best = None

    def now_ms(self) -> int:
        """The exchange's time for a timestamp, ms since the epoch: :data:`BEHIND_MS` before the estimate."""
        best = self._best
        if best is None:
            return self._wall_ms()
        return (self._mono_ns() + best.offset_ns) // _NS_PER_MS - BEHIND_MS

    @property
    def measured(self) -> bool:
        """Whether :meth:`now_ms` rests on a sample."""
        return self._best is not None

    @property
    def offset_ms(self) -> int:
        """How far the exchange's clock is ahead of the host's wall clock, ms; 0 while nothing is measured."""
        best = self._best
        return 0 if best is None else (self._mono_ns() + best.offset_ns) // _NS_PER_MS - self._wall_ms()

    @property
    def age_s(self) -> float | None:
        """Seconds since the newest sample, None while there is none."""
        samples = self._samples
        return (self._mono_ns() - samples[-1].received_ns) / 1e9 if samples else None


def local_ns() -> int:
    return time.monotonic_ns()


class RedisClock:
    measured = False
    def observe(self, a: int, b: int, now_ms: int) -> None:
        self.measured = True
        self.off = now_ms * 1_000_000 - b
        self.hi = now_ms * 1_000_000 + 1_000_000 - a
    def now_ms(self) -> int:
        return (local_ns() + self.off) // 1_000_000 if self.measured else time.time_ns() // 1_000_000
    def local_at_earliest(self, ms: int) -> int:
        return ms * 1_000_000 - self.hi
