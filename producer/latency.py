"""For how long requests have waited for a worker, told apart from those that nobody may send now.

A request waits from when it was due: at its enqueue, at the time of its next try, or when its holder's lease ran out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from producer.keys import Band, Keys
from producer.protocol import Command

#: Requests of one band that are looked at, those that were due first: whoever deletes a job leaves its entry in the
#: index for a while.
_HEAD = 100
_BANDS = ((Band.WAITING, Band.RETRY), (Band.RETRY, Band.END), (Band.HELD, Band.WAITING))


def commands(keys: Keys) -> list[Command]:
    """Asks for those of each band of the index that come first."""
    return [
        ("ZRANGEBYSCORE", keys.unfinished, int(low), f"({int(high)}", "WITHSCORES", "LIMIT", 0, _HEAD)
        for low, high in _BANDS
    ]


@dataclass(frozen=True, slots=True)
class Heads:
    """Requests that wait, those of each band that were due first."""

    ids: Sequence[Any]
    since_ms: Sequence[float]
    queued: int  # how many of them, the first ones, are in the queue; no claim has come by since the others were due

    @classmethod
    def of(cls, answers: Sequence[Sequence[Any]], now_ms: int) -> Heads:
        """What the answers to :func:`commands` tell."""
        bands = [
            [(job_id, float(score) - low) for job_id, score in zip(answer[::2], answer[1::2], strict=True)]
            for (low, _), answer in zip(_BANDS, answers, strict=True)
        ]
        rows = bands[0] + [row for band in bands[1:] for row in band if row[1] <= now_ms]
        return cls([job_id for job_id, _ in rows], [since_ms for _, since_ms in rows], len(bands[0]))

    def still_waiting(self, there: Sequence[int], *, queued: int) -> list[float]:
        """Since when each waits that was there at a later look, when so many were in the queue."""
        waiting = zip(self.since_ms, there, strict=True)
        return [since_ms for n, (since_ms, is_there) in enumerate(waiting) if is_there and (queued or n >= self.queued)]


def waits(
    since_ms: Iterable[float], now_ms: int, *, closed_until_ms: int, is_suspended: bool, refused_s: Iterable[float]
) -> tuple[float | None, float | None]:
    """How long the request has waited for a worker that was due first, s, and how long one that nobody may send: the
    gate is closed, the queue suspended, or its key refused. None where none waits.

    ``since_ms``: since when each waits. ``closed_until_ms``: when the gate opens, or opened last; what waited behind
    it has waited for a worker from then on. ``refused_s``: for how long keys are held back for which requests wait.
    """
    oldest_ms = min(since_ms, default=None)
    gated_s = list(refused_s)
    for_worker_s = None
    if oldest_ms is not None:
        if is_suspended or now_ms < closed_until_ms:
            gated_s.append(max(0.0, now_ms - oldest_ms) / 1000)
        else:
            for_worker_s = max(0.0, now_ms - max(oldest_ms, closed_until_ms)) / 1000
    return for_worker_s, max(gated_s, default=None)
