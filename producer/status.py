"""What an operator asks first: how much waits, for how long, who works on it, and what came of the last minute.

Reading it changes nothing in Redis, unlike RQ's own counts, which clean registries up on the way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rq.utils import utcparse
from rq.worker_registration import WORKERS_BY_QUEUE_KEY

from producer.message import JobField, Keys, MalformedMessage, Outcome, OutcomeKind
from producer.wire import Command, Conversation, entry_outcome, good, text

#: The window of the figures about outcomes, s.
WINDOW_S = 60
#: Entries of the ledger read at most, newest first; in a busier minute the figures speak of these.
MAX_ENTRIES = 5000
#: Ids looked at, at the front of the queue, for the oldest one: retries and urgent requests stand before older ones.
_HEAD = 100
#: Workers described at most.
_MAX_WORKERS = 500
_WORKER_FIELDS = (
    "hostname",
    "pid",
    "state",
    "successful_job_count",
    "failed_job_count",
    "last_heartbeat",
    "death",
)


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of a time, ms; None where nothing was measured. Nearest rank."""

    p50: int | None = None
    p99: int | None = None

    @classmethod
    def of(cls, values: Sequence[int]) -> Percentiles:
        """Those of ``values``."""
        ranked = sorted(values)
        if not ranked:
            return cls()
        return cls(*(ranked[max(0, -(-len(ranked) * percent // 100) - 1)] for percent in (50, 99)))

    def __str__(self) -> str:
        return "-" if self.p50 is None else f"{self.p50} / {self.p99} ms"


@dataclass(frozen=True, slots=True)
class Gate:
    """The shared pause of one egress address."""

    scope: str  # `all`, or the host whose worker has an address of its own
    open: bool
    closed_for_s: float | None = None  # from now
    until_ms: int | None = None
    reason: str | None = None
    by: str | None = None

    def __str__(self) -> str:
        if self.open:
            return "open"
        return f"CLOSED for {self.closed_for_s:.1f} s: {self.reason or 'no reason given'} (by {self.by or '?'})"


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A live worker as RQ registers it."""

    name: str
    host: str
    pid: int | None
    state: str
    ok: int  # jobs that finished
    failed: int  # jobs that ended in a failed kind
    heartbeat_age_s: float | None


@dataclass(frozen=True, slots=True)
class Status:
    """One look at a queue; times are by Redis' clock."""

    queue: str
    at_ms: int
    queued: int
    oldest_queued_s: float | None  # queue latency; None while nothing waits
    in_flight: int
    scheduled: int
    failed: int
    suspended: bool
    gates: tuple[Gate, ...]
    outcomes: Mapping[str, int]  # kind to count, of the last minute
    outcomes_partial: bool  # more than MAX_ENTRIES came in the last minute
    enqueue_to_outcome: Percentiles
    enqueue_to_first_attempt: Percentiles
    workers: tuple[WorkerRow, ...]

    def as_dict(self) -> dict[str, object]:
        """The status as the command line's ``--json`` prints it."""
        return {
            "queue": self.queue,
            "at_ms": self.at_ms,
            "queued": self.queued,
            "oldest_queued_s": self.oldest_queued_s,
            "in_flight": self.in_flight,
            "scheduled": self.scheduled,
            "failed": self.failed,
            "suspended": self.suspended,
            "gates": [asdict(gate) for gate in self.gates],
            "outcomes_last_minute": dict(self.outcomes),
            "outcomes_partial": self.outcomes_partial,
            "latency_ms": {
                "enqueue_to_outcome": asdict(self.enqueue_to_outcome),
                "enqueue_to_first_attempt": asdict(self.enqueue_to_first_attempt),
            },
            "workers": [asdict(worker) for worker in self.workers],
        }

    def lines(self) -> list[str]:
        """The status for people, aligned."""
        oldest = "" if self.oldest_queued_s is None else f", the oldest for {self.oldest_queued_s:.1f} s"
        counts = ", ".join(f"{count:,} {kind}" for kind, count in self.outcomes.items()) or "no outcomes"
        newest = f" (of the newest {MAX_ENTRIES:,})" if self.outcomes_partial else ""
        rows = [
            ("queue", self.queue + (", SUSPENDED (rq resume lifts it)" if self.suspended else "")),
            ("queued", f"{self.queued:,}{oldest}"),
            ("in flight", f"{self.in_flight:,}"),
            ("scheduled", f"{self.scheduled:,}"),
            ("failed", f"{self.failed:,}"),
            *((f"gate {gate.scope}", str(gate)) for gate in self.gates),
            ("last minute", counts + newest),
            ("first attempt", f"p50 / p99 {self.enqueue_to_first_attempt} after the enqueue"),
            ("outcome", f"p50 / p99 {self.enqueue_to_outcome} after the enqueue"),
            ("workers", f"{len(self.workers):,}"),
        ]
        return aligned(rows) + ["  " + line for line in self._worker_lines()]

    def _worker_lines(self) -> list[str]:
        if not self.workers:
            return []
        table = [("name", "host", "pid", "state", "ok", "failed", "heartbeat")]
        for row in self.workers:
            age = "-" if row.heartbeat_age_s is None else f"{row.heartbeat_age_s:.0f} s ago"
            pid = "-" if row.pid is None else str(row.pid)
            table.append((row.name, row.host, pid, row.state, f"{row.ok:,}", f"{row.failed:,}", age))
        return aligned(table)


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """The rows of a table as lines, columns two blanks apart."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))] if table else []
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def read_status(keys: Keys) -> Conversation[Status]:
    """Look at a queue in three round trips, however long the queue and its ledger are."""
    first = _First.of((yield _First.commands(keys)))
    entries, gate, *rest = good((yield _details(keys, first)))
    states, workers = rest[: len(first.head)], rest[len(first.head) :]
    rows = _worker_rows(keys, first, workers)
    hosts = sorted({row.host for row in rows})
    gates = [("all", gate)]
    if hosts:
        gates += zip(hosts, good((yield [("HGETALL", keys.gate(host)) for host in hosts])), strict=True)
    outcomes, kinds = _outcomes(entries)
    timed = [outcome for outcome in outcomes if outcome.enqueued_at_ms is not None]
    return Status(
        queue=keys.queue,
        at_ms=first.now_ms,
        queued=first.queued,
        oldest_queued_s=_oldest_s(first.now_ms, states),
        in_flight=first.in_flight,
        scheduled=first.scheduled,
        failed=first.failed,
        suspended=first.suspended,
        # Whether a host has a gate of its own is its worker's setting; Redis knows only of those that were closed.
        gates=tuple(_gate(scope, fields, first.now_ms) for scope, fields in gates if fields or scope == "all"),
        outcomes=kinds,
        outcomes_partial=len(entries) == MAX_ENTRIES,
        enqueue_to_outcome=Percentiles.of([o.finished_at_ms - (o.enqueued_at_ms or 0) for o in timed]),
        enqueue_to_first_attempt=Percentiles.of(
            [o.attempts[0].at_ms - (o.enqueued_at_ms or 0) for o in timed if o.attempts]
        ),
        workers=tuple(rows),
    )


@dataclass(frozen=True, slots=True)
class _First:
    """The first round trip: what needs no other answer."""

    now_ms: int
    queued: int
    in_flight: int
    scheduled: int
    failed: int
    suspended: bool
    head: list[str]
    worker_keys: list[str]

    @staticmethod
    def commands(keys: Keys) -> list[Command]:
        return [
            ("TIME",),
            ("LLEN", keys.waiting),
            ("LLEN", keys.claiming),
            ("ZCARD", keys.leases),
            ("ZCARD", keys.scheduled),
            ("ZCARD", keys.failed),
            ("EXISTS", keys.suspended),
            ("LRANGE", keys.claiming, 0, _HEAD - 1),
            ("LRANGE", keys.waiting, 0, _HEAD - 1),
            ("SRANDMEMBER", WORKERS_BY_QUEUE_KEY % keys.queue, _MAX_WORKERS),
        ]

    @classmethod
    def of(cls, answers: list[Any]) -> _First:
        (seconds, micros), waiting, claiming, in_flight, scheduled, failed, suspended, *lists = good(answers)
        at_claim, at_head, workers = ([text(item) for item in items] for items in lists)
        return cls(
            now_ms=int(seconds) * 1000 + int(micros) // 1000,
            queued=waiting + claiming,
            in_flight=in_flight,
            scheduled=scheduled,
            failed=failed,
            suspended=bool(suspended),
            head=at_claim + at_head,
            worker_keys=sorted(workers),
        )


def _details(keys: Keys, first: _First) -> list[Command]:
    """Entries of the last minute, the shared gate, states of the jobs at the head, and workers' hashes."""
    job_fields = ("status", JobField.ENQUEUED_AT_MS, "enqueued_at")
    since_ms = first.now_ms - WINDOW_S * 1000
    commands: list[Command] = [("XREVRANGE", keys.outcomes, "+", since_ms, "COUNT", MAX_ENTRIES)]
    commands.append(("HGETALL", keys.gate("all")))
    commands += [("HMGET", keys.job_prefix + job_id, *job_fields) for job_id in first.head]
    commands += [("HMGET", key, *_WORKER_FIELDS) for key in first.worker_keys]
    return commands


def _oldest_s(now_ms: int, states: Sequence[Sequence[Any]]) -> float | None:
    """Age of the oldest job that waits; entries of jobs that were deleted or taken meanwhile are hints gone stale."""
    ages_ms = [now_ms - at_ms for state in states if (at_ms := _queued_at_ms(*state)) is not None]
    return max(0, *ages_ms) / 1000 if ages_ms else None


def _queued_at_ms(status: Any, at_ms: Any, enqueued_at: Any) -> int | None:
    if status is None or text(status) != "queued":
        return None
    if at_ms is not None:
        return int(at_ms)
    # Somebody else's job, which no worker has seen yet: RQ wrote its own stamp, by the clock of its host.
    return int(utcparse(text(enqueued_at)).timestamp() * 1000) if enqueued_at else None


def _gate(scope: str, fields: Mapping[Any, Any], now_ms: int) -> Gate:
    known = {text(name): text(value) for name, value in fields.items()}
    until_ms = int(known.get("until_ms", 0))
    if until_ms <= now_ms:
        return Gate(scope, open=True)
    return Gate(scope, False, (until_ms - now_ms) / 1000, until_ms, known.get("reason"), known.get("by"))


def _worker_rows(keys: Keys, first: _First, hashes: Sequence[Sequence[Any]]) -> list[WorkerRow]:
    rows = []
    for key, fields in zip(first.worker_keys, hashes, strict=True):
        host, pid, state, ok, failed, heartbeat, death = (None if f is None else text(f) for f in fields)
        if heartbeat and not death:  # a killed worker's hash runs out, and its key stays in the set for a while
            age_s = max(0.0, first.now_ms / 1000 - utcparse(heartbeat).timestamp())
            name = key.removeprefix(keys.worker_prefix)
            rows.append(
                WorkerRow(
                    name, host or "?", int(pid) if pid else None, state or "?", int(ok or 0), int(failed or 0), age_s
                )
            )
    return rows


def _outcomes(entries: Sequence[Any]) -> tuple[list[Outcome], dict[str, int]]:
    """The outcomes and how many of each kind, in the order of the kinds; what cannot be read is counted as that."""
    outcomes, unreadable = [], 0
    for entry_id, fields in entries:
        try:
            outcomes.append(entry_outcome(text(entry_id), fields))
        except MalformedMessage:
            unreadable += 1
    counted = Counter(outcome.kind for outcome in outcomes)
    kinds = {kind.value: counted[kind] for kind in OutcomeKind if counted[kind]}
    return outcomes, kinds | ({"unreadable": unreadable} if unreadable else {})
