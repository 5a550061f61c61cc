"""The workers of a queue, as RQ registers them and as they tell of themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rq.defaults import DEFAULT_WORKER_TTL
from rq.utils import utcparse

from producer.keys import Keys, WorkerField
from producer.protocol import text
from producer.untrusted import clean_text

#: A worker of ours writes its figures each second; older ones speak of another minute's weight, s.
FRESH_S = 60.0
#: A worker of ours beats each second; one that is silent for longer than this is taken for dead, s.
LIVE_S = 10.0
#: With each beat RQ lets a worker's record live for so long; ours keep RQ's default, ms.
_BEAT_LIFE_MS = (DEFAULT_WORKER_TTL + 60) * 1000
#: Longest name shown of a worker, host, account or scope, characters.
MAX_NAME_CHARS = 80
_NUMBER = re.compile(r"-?[0-9]{1,18}")
#: What :func:`worker_rows` has to know of each.
WORKER_FIELDS = (
    "hostname",
    "pid",
    "state",
    "successful_job_count",
    "failed_job_count",
    "last_heartbeat",
    "death",
    WorkerField.IN_FLIGHT,
    WorkerField.CONCURRENCY,
    WorkerField.CLOCK_OFFSET_MS,
    WorkerField.USED_WEIGHT,
    WorkerField.WEIGHT_LIMIT,
)


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A worker as RQ registers it, and what it says of itself; a stock RQ worker says nothing."""

    name: str
    host: str
    pid: int | None
    state: str
    ok: int  # jobs that finished
    failed: int  # jobs that ended in a failed kind
    heartbeat_age_s: float | None
    in_flight: int | None = None  # requests, of at most `concurrency`
    concurrency: int | None = None
    clock_offset_ms: int | None = None  # the exchange's clock minus the host's; None until it is measured
    used_weight: int | None = None  # of the exchange's present minute, for its egress address
    weight_limit: int | None = None

    @property
    def fresh(self) -> bool:
        """Whether its figures are of the last minute."""
        return self.heartbeat_age_s is not None and self.heartbeat_age_s <= FRESH_S

    @property
    def live(self) -> bool:
        """Whether it can be counted on.

        One of ours that has been silent for :data:`LIVE_S` is dead, stopped or cut off. A stock RQ worker is silent for
        minutes while it waits; RQ lets its record run out when it has been for too long.
        """
        return self.concurrency is None or (self.heartbeat_age_s is not None and self.heartbeat_age_s <= LIVE_S)

    @property
    def heartbeat(self) -> str:
        """How long ago it gave its last sign of life, for people."""
        age = None if self.heartbeat_age_s is None else f"{self.heartbeat_age_s:.0f} s"
        if self.live:
            return "-" if age is None else f"{age} ago"
        return "silent" if age is None else f"silent for {age}"


#: Heads of what :func:`worker_cells` gives.
WORKER_COLUMNS = ("name", "host", "pid", "state", "in flight", "ok", "failed", "clock", "weight", "heartbeat")


def worker_cells(row: WorkerRow) -> tuple[str, ...]:
    """A worker for people, under :data:`WORKER_COLUMNS`."""
    limit = "" if row.concurrency is None else f" of {row.concurrency}"
    return (
        row.name,
        row.host,
        "-" if row.pid is None else str(row.pid),
        row.state,
        "-" if row.in_flight is None else f"{row.in_flight}{limit}",
        f"{row.ok:,}",
        f"{row.failed:,}",
        "-" if row.clock_offset_ms is None else f"{row.clock_offset_ms:+,} ms",
        "-" if row.used_weight is None else f"{row.used_weight:,}",
        row.heartbeat,
    )


def number(value: Any) -> int | None:
    """A whole number of 64 bits, None where there is none."""
    digits = "" if value is None else text(value)
    return int(digits) if _NUMBER.fullmatch(digits) else None


def stamp_s(value: Any) -> float | None:
    """A time as RQ writes it, by the clock of the host that wrote it, s since the epoch."""
    try:
        return utcparse(text(value)).timestamp() if value else None
    except (ValueError, OverflowError):
        return None


def raw_host(fields: Sequence[Any]) -> Any:
    """The host of a live worker, as Redis gave it; None of a dead one."""
    host, heartbeat, death = fields[0], fields[5], fields[6]
    return host if heartbeat and not death else None


def _silent_s(now_ms: int, heartbeat: Any, is_ours: bool, life_ms: Any) -> float | None:
    """How long ago a worker's last beat was.

    RQ stamps it by the host's clock, which may be off by more than a beat; what a record of ours has left to live tells
    it by Redis' clock.
    """
    if is_ours and 0 < life_ms <= _BEAT_LIFE_MS:
        return float(_BEAT_LIFE_MS - life_ms) / 1000
    beat_s = stamp_s(heartbeat)
    return None if beat_s is None else max(0.0, now_ms / 1000 - beat_s)


def worker_rows(
    keys: Keys, now_ms: int, names: Sequence[Any], workers: Sequence[Any], lives_ms: Sequence[Any]
) -> Iterator[WorkerRow]:
    for key, fields, life_ms in zip(names, workers, lives_ms, strict=True):
        host, pid, state, ok, failed, heartbeat, death, *figures = fields
        if not heartbeat or death:  # a killed worker's hash runs out, and its key stays in the set for a while
            continue
        numbers = [number(figure) for figure in figures]
        yield WorkerRow(
            _shown(text(key).removeprefix(keys.worker_prefix)),
            _shown(host or "?"),
            number(pid),
            _shown(state or "?"),
            number(ok) or 0,
            number(failed) or 0,
            _silent_s(now_ms, heartbeat, numbers[1] is not None, life_ms),
            *numbers,
        )


def _shown(value: Any) -> str:
    return clean_text(value, MAX_NAME_CHARS)
