"""Other hosts' clocks as seen from here: proven bounds on this host's own clock, by arithmetic alone.

What another clock told proves one thing: it read that time between the question and its answer. So it is known within
bounds, which many answers narrow and drift widens. A single reading is not enough: an answer that is read late makes
the other clock seem to lag. Times of two clocks are compared by the bounds of their difference (:func:`minus`).

All moments given and returned in ns are :data:`local_ns`. Every class here may be shared between threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from worker.decide import Span

#: How fast two clocks may drift apart, millionths: two ordinary quartz clocks, 100 each.
DRIFT_PPM = 200
#: How far timestamps stay behind the estimate of the exchange's clock, ms: what drift makes of 25 s, and measured it is
#: more often. An uneven path needs no allowance: a slow way out, which makes the estimate run ahead, delays the
#: request by at least as much.
BEHIND_MS = 5
#: A wall clock that moved by more than this against a clock that does not count sleep tells of a sleep, ns.
MOVED_NS = 1_000_000_000

_NS_PER_MS = 1_000_000


def _wall_ms() -> int:
    return time.time_ns() // _NS_PER_MS


def _boot_clock() -> Callable[[], int] | None:
    """The clock that goes on while the host sleeps; Linux has one, and not in every sandbox."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    try:
        return None if clock is None or time.clock_gettime_ns(clock) < 0 else partial(time.clock_gettime_ns, clock)
    except OSError:
        return None


#: This host's own clock, ns since some moment: nobody sets it, and it counts sleep if :data:`COUNTS_SLEEP`.
local_ns: Callable[[], int] = _boot_clock() or time.monotonic_ns
COUNTS_SLEEP = local_ns is not time.monotonic_ns


class _Offset(NamedTuple):
    """Bounds of a remote clock minus the local one, ns, as they were at a local moment."""

    lo_ns: int
    hi_ns: int
    as_of_ns: int

    def at(self, local_ns: int) -> tuple[int, int]:
        drift_ns = _drift_ns(local_ns - self.as_of_ns)
        return self.lo_ns - drift_ns, self.hi_ns + drift_ns


def _both(one: _Offset, other: _Offset) -> _Offset | None:
    """What holds where both do; None: they cannot."""
    older, newer = (one, other) if one.as_of_ns <= other.as_of_ns else (other, one)
    lo_ns, hi_ns = older.at(newer.as_of_ns)
    lo_ns, hi_ns = max(lo_ns, newer.lo_ns), min(hi_ns, newer.hi_ns)
    return _Offset(lo_ns, hi_ns, newer.as_of_ns) if lo_ns <= hi_ns else None


def _drift_ns(apart_ns: int) -> int:
    """The most that two clocks can have drifted apart in a time measured by either, rounded up."""
    return -(-abs(apart_ns) * DRIFT_PPM // (1_000_000 - DRIFT_PPM))


class _RemoteClock:
    """A remote clock by what is known of its offset (remote minus local), and the host's wall clock while nothing is.

    All samples together are one pair of bounds, as all of them widen alike.
    """

    def __init__(self, local: Callable[[], int] = local_ns, wall_ms: Callable[[], int] = _wall_ms) -> None:
        self._local_ns = local
        self._wall_ms = wall_ms
        self._lock = threading.Lock()
        self._offset: _Offset | None = None  # read without the lock: one reference, replaced as a whole
        self._doubted_ns: int | None = None
        self.steps = 0  # how often an answer could not be true together with the earlier ones

    def observe(self, asked_ns: int, answered_ns: int, remote_ms: int) -> None:
        """Take in one answer: when it was asked and answered here, and the remote time in it, cut to whole ms.

        If it cannot be true together with the earlier ones (a clock was set, another server took over, this host
        slept uncounted), the samples answered before are forgotten. One that was asked before a doubt proves nothing:
        it may have been read before whatever gave rise to that.
        """
        remote_ns = remote_ms * _NS_PER_MS
        # The lower bound needs no drift: whatever the clocks gained on each other since the remote one was read is
        # less than the time that passed.
        hi_ns = remote_ns + _NS_PER_MS - asked_ns + _drift_ns(answered_ns - asked_ns)
        new = _Offset(remote_ns - answered_ns, hi_ns, answered_ns)
        with self._lock:
            if self._doubted_ns is not None and asked_ns < self._doubted_ns:
                return
            if self._offset is None or self._doubted_ns is not None:
                self._offset = new
            elif (both := _both(self._offset, new)) is not None:
                self._offset = both
            else:
                self._offset = max(self._offset, new, key=lambda offset: offset.as_of_ns)
                self.steps += 1
            self._doubted_ns = None

    def doubt(self) -> None:
        """Nothing measured so far is proven any more: some of it is wrong, or was another server's."""
        with self._lock:
            self._doubted_ns = self._local_ns()

    @property
    def measured(self) -> bool:
        """Whether there is a sample that nobody doubts."""
        return self._offset is not None and self._doubted_ns is None

    def bounds(self) -> tuple[int, int] | None:
        """Least and greatest offset now, ns; None while nothing is proven."""
        return self._bounds_at(self._local_ns())

    def _bounds_at(self, now_ns: int) -> tuple[int, int] | None:
        return self._last_at(now_ns) if self.measured else None

    def _last_at(self, now_ns: int) -> tuple[int, int] | None:
        """The bounds as far as they were ever measured, doubted or not."""
        offset = self._offset
        return None if offset is None else offset.at(now_ns)

    def moments(self, remote_ms: int) -> tuple[int, int] | None:
        """Between which local moments the clock read (or will read) ``remote_ms``, ns; None: not measured."""
        offset = self._offset
        if offset is None:
            return None
        earliest_ns = remote_ms * _NS_PER_MS - offset.hi_ns
        latest_ns = (remote_ms + 1) * _NS_PER_MS - offset.lo_ns
        return (
            earliest_ns - _drift_ns(earliest_ns - offset.as_of_ns),
            latest_ns + _drift_ns(latest_ns - offset.as_of_ns),
        )


class ServerClock(_RemoteClock):
    """The exchange's clock, for timestamps.

    Until the first sample it is the host's wall clock. After :meth:`doubt` a timestamp is made as before until the next
    sample, which then counts alone; meanwhile nothing is compared with it.
    """

    def now_ms(self) -> int:
        """The exchange's time for a timestamp, ms since the epoch: :data:`BEHIND_MS` before the middle of the bounds.

        It is off by at most half of the quickest round trip, and by what drift added since.
        """
        now_ms = self._middle_ms()
        return self._wall_ms() if now_ms is None else now_ms - BEHIND_MS

    @property
    def offset_ms(self) -> int:
        """How far the exchange's clock is ahead of the host's wall clock, ms; 0 while nothing is measured."""
        now_ms = self._middle_ms()
        return 0 if now_ms is None else now_ms - self._wall_ms()

    def _middle_ms(self) -> int | None:
        now_ns = self._local_ns()
        offset = self._last_at(now_ns)
        return None if offset is None else (now_ns + sum(offset) // 2) // _NS_PER_MS


class RedisClock(_RemoteClock):
    """Redis' clock as a worker knows it.

    A claim that waited inside the server says little of the upper bound; a renewal or a heartbeat does.
    """

    def now_ms(self) -> int:
        """Redis' time at least, ms since the epoch; the host's wall clock while nothing is proven.

        Not the middle: a claim waits inside the server before it answers, so that its answer is much closer to the
        end of its trip.
        """
        now_ns = self._local_ns()
        offset = self._bounds_at(now_ns)
        return self._wall_ms() if offset is None else (now_ns + offset[0]) // _NS_PER_MS

    def latest_ms(self) -> int | None:
        """What Redis' clock shows now at most, ms; None while nothing is proven."""
        now_ns = self._local_ns()
        offset = self._bounds_at(now_ns)
        return None if offset is None else -(-(now_ns + offset[1]) // _NS_PER_MS)


def minus(redis: RedisClock, exchange: ServerClock) -> Span | None:
    """Bounds of Redis' clock minus the exchange's now, ms; None while either is not measured.

    They hold for a time that the exchange tells in whole ms, as it does in createTime: it is up to 1 ms later.
    """
    ours, theirs = redis.bounds(), exchange.bounds()
    if ours is None or theirs is None:
        return None
    lo_ns, hi_ns = ours[0] - theirs[1], ours[1] - theirs[0]
    return Span(lo_ns // _NS_PER_MS, -(-hi_ns // _NS_PER_MS) + 1)


class SleepWatch:
    """Tells a host that slept from one that did not, where :data:`local_ns` cannot count sleep.

    There the wall clock alone shows it. Somebody who set the clock looks the same: who holds leases renews them before
    the next send, which is right after a sleep and harmless else. Where sleep is counted, the wall clock is not asked.
    """

    def __init__(
        self,
        counts_sleep: bool = COUNTS_SLEEP,
        local: Callable[[], int] = local_ns,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._counts_sleep = counts_sleep
        self._local_ns = local
        self._wall_ns = wall_ns
        self._apart_ns = wall_ns() - local()

    def moved(self) -> bool:
        """Whether the wall clock moved by more than :data:`MOVED_NS` since this was last true (small moves add up)."""
        if self._counts_sleep:
            return False
        apart_ns = self._wall_ns() - self._local_ns()
        if abs(apart_ns - self._apart_ns) <= MOVED_NS:
            return False
        self._apart_ns = apart_ns
        return True
