"""Jobs that wait because the exchange did not do anything for anybody, and who of them may go when it does again."""

from __future__ import annotations

import asyncio

from worker.classify import GATED, Means
from worker.clock import local_ns
from worker.rate_gate import RAMP_MS

__all__ = ["Recovery"]

#: So many calls in a row without a single one that the exchange dealt with, for so long, ns: it is away for everybody.
WIDE, LONG_NS = 5, 1_000_000_000
#: So many jobs are remembered at the most; others wait out their backoff.
MOST = 10_000
#: What a call meets while the exchange, or the way to it, is away.
_FAILURES = frozenset({Means.NOT_SENT, Means.BUSY, Means.UNCLEAR})


class Recovery:
    """Of one worker with ``size`` slots. ``is_over`` is set while jobs are to be woken (:meth:`next_ones`)."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._failures = 0  # since the last call that was dealt with
        self._since_ns = 0
        self._waiting: dict[bytes, int] = {}
        self._over_ns = 0
        self.is_over = asyncio.Event()

    def note(self, means: Means) -> None:
        """Take in what a call met. One that is dealt with ends an outage; one that fails, the waking."""
        if means in _FAILURES:
            if self._failures == 0 and not self.is_over.is_set():
                self._since_ns = local_ns()
            self._failures = WIDE if self.is_over.is_set() else self._failures + 1
            self.is_over.clear()
        elif means not in GATED:
            if self._failures >= WIDE and local_ns() - self._since_ns >= LONG_NS:
                self._over_ns = local_ns()
                self.is_over.set()
            elif not self.is_over.is_set():
                self._waiting.clear()
            self._failures = 0

    def wait(self, job: bytes, verdict: str, due_ms: int) -> None:
        """Take in that a job waits until ``due_ms`` (Redis' clock), and what its last call met."""
        if self._failures and verdict in _FAILURES and len(self._waiting) < MOST:
            self._waiting[job] = due_ms

    def next_ones(self, free: int) -> list[tuple[bytes, int]]:
        """Jobs to be woken now for ``free`` slots, each with when it was due: few at first, as behind a closed gate."""
        since_ms = (local_ns() - self._over_ns) // 1_000_000
        count = min(free, max(1, self._size * since_ms // RAMP_MS))
        found = [(job, self._waiting.pop(job)) for job in list(self._waiting)[: max(count, 0)]]
        if not self._waiting:
            self.is_over.clear()
        return found
