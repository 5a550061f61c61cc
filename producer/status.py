"""What an operator asks first: how much waits, for how long, who works on it, and what came of the last minute.

Reading it changes nothing in Redis, unlike RQ's own counts, which clean registries up on the way.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rq.defaults import DEFAULT_WORKER_TTL
from rq.utils import utcparse

from producer.keys import Band, BreakerField, Keys, WorkerField, suspect_of
from producer.message import Outcome, OutcomeKind
from producer.protocol import Command, Conversation, entry_outcome, fields_of, good, is_wrong_type, stream_entries, text
from producer.untrusted import MAX_MSG_CHARS, MalformedMessage, clean_text

#: The window of the figures about outcomes, s.
WINDOW_S = 60
#: Entries of the ledger read at most, newest first; in a busier minute the figures speak of these.
MAX_ENTRIES = 5000
#: Waiting jobs looked at, those that wait longest: whoever deletes a job leaves its entry in the index for a while.
_HEAD = 100
#: Workers and suspected keys described at most.
_MAX_WORKERS = 500
_MAX_KEYS = 100
#: A worker of ours writes its figures each second; older ones speak of another minute's weight, s.
FRESH_S = 60.0
#: A worker of ours beats each second; one that is silent for longer than this is taken for dead, s.
LIVE_S = 10.0
#: With each beat RQ lets a worker's record live for so long; ours keep RQ's default, ms.
_BEAT_LIFE_MS = (DEFAULT_WORKER_TTL + 60) * 1000
#: Held jobs that are compared with the schedule one by one; of more, only how many they can be is told.
_COMPARED_HELD = 10_000
#: Longest name shown of a worker, host, account or scope, characters.
_MAX_NAME_CHARS = 80
_WORKER_FIELDS = (
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
#: Longest name shown of a key, characters.
_MAX_KEY_CHARS = 200
#: What stands for the answer about a key of the wrong type, by the command.
_NOTHING: Mapping[str, Any] = {
    **dict.fromkeys(("LLEN", "ZCARD", "ZCOUNT", "SCARD", "STRLEN"), 0),
    **dict.fromkeys(("LRANGE", "SRANDMEMBER", "XREVRANGE", "ZRANGEBYSCORE", "ZREVRANGE"), ()),
    "HGETALL": (),
    "GETRANGE": b"",
}
#: Scores of those that wait for a worker.
_WAITING = (int(Band.WAITING), f"({int(Band.RETRY)}")
_NUMBER = re.compile(r"-?[0-9]{1,18}")
_BREAKER_FIELDS = (BreakerField.FAILURES, BreakerField.REASON, BreakerField.SINCE_MS, BreakerField.PROBE_AT_MS)


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
class RefusedKey:
    """An account whose API key the exchange refused last; ``open``: its jobs wait, and one probe at a time is sent."""

    account: str
    failures: int  # refusals in a row
    open: bool
    since_s: float | None  # how long its jobs have been held back; None while they are not
    reason: str | None  # what the exchange said last
    probe_in_s: float | None  # until the next request may try the key; 0 when it is due, None while not open
    held: int  # jobs that wait for it; where there are more than 10,000, at most that many

    def __str__(self) -> str:
        reason = self.reason or "no reason given"
        if not self.open:
            times = "once" if self.failures == 1 else f"{self.failures:,} times in a row"
            return f"refused {times}, still tried: {reason}"
        since = span(self.since_s or 0)
        probe = f"in {span(self.probe_in_s)}" if self.probe_in_s else "is due"
        jobs = "1 job waits" if self.held == 1 else f"{self.held:,} jobs wait"
        return f"HELD BACK for {since}, {jobs}, next try {probe}: {reason}"


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


@dataclass(frozen=True, slots=True)
class Status:
    """One look at a queue; times are by Redis' clock."""

    queue: str
    at_ms: int
    queued: int = 0
    oldest_queued_s: float | None = None  # queue latency; None while nothing waits, or no worker has seen what does
    in_flight: int = 0  # that a worker holds under a lease which has not run out
    scheduled: int = 0
    failed: int = 0
    suspended: bool = False
    gates: tuple[Gate, ...] = ()
    keys: tuple[RefusedKey, ...] = ()  # none while every key is accepted
    used_weight: int | None = None  # the most that a live worker saw in the present minute; None where none tells
    weight_limit: int | None = None
    outcomes: Mapping[str, int] = field(default_factory=dict)  # kind to count, of the last minute
    outcomes_partial: bool = False  # more than MAX_ENTRIES came in the last minute
    enqueue_to_outcome: Percentiles = Percentiles()
    enqueue_to_first_attempt: Percentiles = Percentiles()
    workers: tuple[WorkerRow, ...] = ()
    to_be_taken_over: int = 0  # whose lease has run out: the next claim of any worker takes them over
    damaged: tuple[str, ...] = ()  # keys of the wrong type: what they should tell counts as nothing above
    workers_known: bool = True  # the set of the workers can be read

    @property
    def live_workers(self) -> int:
        """How many workers can be counted on."""
        return sum(row.live for row in self.workers)

    @property
    def unattended(self) -> bool:
        """Whether there is work and no live worker to do it, as far as anybody can tell."""
        waiting = self.queued or self.scheduled or self.in_flight or self.to_be_taken_over
        return bool(waiting) and not self.live_workers and self.workers_known

    def as_dict(self) -> dict[str, object]:
        """The status as the command line's ``--json`` prints it."""
        counts = ("queued", "oldest_queued_s", "in_flight", "to_be_taken_over", "scheduled", "failed", "suspended")
        told = asdict(self)
        return {
            **{name: told[name] for name in ("queue", "at_ms", *counts)},
            **{name: list(told[name]) for name in ("gates", "keys")},
            **{name: told[name] for name in ("used_weight", "weight_limit")},
            "outcomes_last_minute": told["outcomes"],
            "outcomes_partial": self.outcomes_partial,
            "latency_ms": {name: told[name] for name in ("enqueue_to_outcome", "enqueue_to_first_attempt")},
            "workers": [asdict(worker) | {"live": worker.live} for worker in self.workers],
            "damaged": list(self.damaged),
        }

    def lines(self) -> list[str]:
        """The status for people, aligned."""
        oldest = "" if self.oldest_queued_s is None else f", the oldest for {self.oldest_queued_s:.1f} s"
        counts = ", ".join(f"{count:,} {kind}" for kind, count in self.outcomes.items()) or "no outcomes"
        newest = f" (of the newest {MAX_ENTRIES:,})" if self.outcomes_partial else ""
        rows = [
            ("queue", self.queue + (", SUSPENDED (rq resume lifts it)" if self.suspended else "")),
            *(("DAMAGED", f"{key} is of the wrong type, what it tells is missing here") for key in self.damaged),
            ("queued", f"{self.queued:,}{oldest}"),
            ("in flight", f"{self.in_flight:,}"),
            *([("to take over", f"{self.to_be_taken_over:,}, their leases ran out")] if self.to_be_taken_over else []),
            ("scheduled", f"{self.scheduled:,}"),
            ("failed", f"{self.failed:,}"),
            *((f"gate {gate.scope}", str(gate)) for gate in self.gates),
            *((f"key {key.account}", str(key)) for key in self.keys),
            ("used weight", weight(self.used_weight, self.weight_limit)),
            ("last minute", counts + newest),
            ("first attempt", f"p50 / p99 {self.enqueue_to_first_attempt} after the enqueue"),
            ("outcome", f"p50 / p99 {self.enqueue_to_outcome} after the enqueue"),
            ("workers", self._worker_count()),
        ]
        return aligned(rows) + ["  " + line for line in self._worker_lines()]

    def _worker_count(self) -> str:
        if not self.workers_known:
            return "not known: their set is damaged"
        silent = len(self.workers) - self.live_workers
        count = f"{self.live_workers:,}" + (f" live, {silent:,} silent" if silent else "")
        return count + (": NO LIVE WORKER, and work is waiting" if self.unattended else "")

    def _worker_lines(self) -> list[str]:
        if not self.workers:
            return []
        return aligned([WORKER_COLUMNS, *(worker_cells(row) for row in self.workers)])


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


def weight(used: int | None, limit: int | None) -> str:
    """Used weight of the minute for people."""
    if used is None:
        return "-"
    return f"{used:,}" if not limit else f"{used:,} of {limit:,} ({100 * used // limit} %)"


def span(seconds: float) -> str:
    """A length of time for people: two digits say enough."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """The rows of a table as lines, columns two blanks apart."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))] if table else []
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def read_status(keys: Keys) -> Conversation[Status]:
    """Look at a queue in three round trips, however long the queue and its ledger are."""
    damaged: dict[str, None] = {}
    first = _First.of((yield from readable(_First.commands(keys), damaged)))
    details = _Details.of(first, (yield from readable(_Details.commands(keys, first), damaged)))
    hosts = sorted({host for fields in details.workers if (host := _raw_host(fields))})
    crowds = [suspect for suspect, _, held in details.keys if _is_compared(held, first.scheduled)]
    third = _third(keys, hosts, crowds)
    answers = (yield third) if third else []
    gate_fields = _without_damaged(third[: len(hosts)], answers[: len(hosts)], damaged)
    gates = [("all", details.gate), *zip(hosts, gate_fields, strict=True)]
    waiting = dict(zip(crowds, answers[len(hosts) :], strict=True))
    rows = tuple(_worker_rows(keys, first.now_ms, first.worker_keys, details.workers, details.lives_ms))
    fresh = [row for row in rows if row.fresh]
    outcomes, kinds = _outcomes(details.entries)
    timed = [outcome for outcome in outcomes if outcome.enqueued_at_ms is not None]
    return Status(
        queue=keys.queue,
        at_ms=first.now_ms,
        queued=max(first.queued, details.waiting),
        oldest_queued_s=_oldest_s(first, details.there),
        in_flight=details.in_flight,
        scheduled=max(first.scheduled, details.retries),
        failed=first.failed,
        suspended=first.suspended,
        # Whether a host has a gate of its own is its worker's setting; Redis knows only of those that were closed.
        gates=tuple(_gate(scope, fields, first.now_ms) for scope, fields in gates if fields or scope == "all"),
        keys=_refused_keys(first, details.keys, waiting),
        used_weight=max((row.used_weight for row in fresh if row.used_weight is not None), default=None),
        weight_limit=max((row.weight_limit for row in fresh if row.weight_limit is not None), default=None),
        outcomes=kinds,
        outcomes_partial=len(details.entries) == MAX_ENTRIES,
        enqueue_to_outcome=Percentiles.of([o.finished_at_ms - (o.enqueued_at_ms or 0) for o in timed]),
        enqueue_to_first_attempt=Percentiles.of(
            [o.attempts[0].at_ms - (o.enqueued_at_ms or 0) for o in timed if o.attempts]
        ),
        workers=rows,
        to_be_taken_over=details.expired,
        damaged=tuple(damaged),
        workers_known=shown(keys.queue_workers, _MAX_KEY_CHARS) not in damaged,
    )


def is_served(keys: Keys) -> Conversation[bool | None]:
    """Whether a live worker serves a queue; None where nobody can tell."""
    (seconds, _), found = yield [("TIME",), ("SRANDMEMBER", keys.queue_workers, _MAX_WORKERS)]
    if isinstance(found, Exception):
        return None
    if not found:
        return False
    answers = yield [*(("HMGET", key, *_WORKER_FIELDS) for key in found), *(("PTTL", key) for key in found)]
    told = [[None] * len(_WORKER_FIELDS) if isinstance(each, Exception) else each for each in answers]
    rows = _worker_rows(keys, int(seconds) * 1000, found, told[: len(found)], told[len(found) :])
    return any(row.live for row in rows)


def readable(commands: list[Command], damaged: dict[str, None]) -> Conversation[list[Any]]:
    """One round trip whose keys of the wrong type count as empty; they are added to ``damaged``."""
    return _without_damaged(commands, (yield commands), damaged)


def _without_damaged(commands: Sequence[Command], answers: Sequence[Any], damaged: dict[str, None]) -> list[Any]:
    """The answers, nothing in the place of those about keys of the wrong type, which are added to ``damaged``.

    An operator looks because something is wrong: one such key may not hide all the rest. Any other error is raised.
    """
    told = []
    for (name, *words), answer in zip(commands, answers, strict=True):
        if is_wrong_type(answer):
            damaged[shown(words[0], _MAX_KEY_CHARS)] = None
            answer = [None] * (len(words) - 1) if name == "HMGET" else _NOTHING[name]
        told.append(answer)
    return good(told)


@dataclass(frozen=True, slots=True)
class _First:
    """The first round trip: what needs no other answer. Names are kept as Redis gave them: keys are made of them."""

    now_ms: int
    queued: int  # entries of RQ's list and registry: more than jobs where entries are double or left over
    scheduled: int
    failed: int
    suspended: bool
    head: list[tuple[Any, float]]  # ids that the index knows to wait, and since when, ms
    worker_keys: list[Any]
    suspects: list[tuple[bytes, bytes]]  # account and fingerprint of keys that are refused

    @staticmethod
    def commands(keys: Keys) -> list[Command]:
        return [
            ("TIME",),
            ("LLEN", keys.waiting),
            ("LLEN", keys.claiming),
            ("ZCARD", keys.scheduled),
            ("ZCARD", keys.failed),
            ("EXISTS", keys.suspended),
            ("ZRANGEBYSCORE", keys.unfinished, *_WAITING, "WITHSCORES", "LIMIT", 0, _HEAD),
            ("SRANDMEMBER", keys.queue_workers, _MAX_WORKERS),
            ("SRANDMEMBER", keys.suspects, _MAX_KEYS),
            ("STRLEN", keys.counts),
            ("STRLEN", keys.minutes),
        ]

    @classmethod
    def of(cls, answers: list[Any]) -> _First:
        (seconds, micros), waiting, claiming, scheduled, failed, suspended, head, workers, suspects, *_ = answers
        return cls(
            now_ms=int(seconds) * 1000 + int(micros) // 1000,
            queued=waiting + claiming,
            scheduled=scheduled,
            failed=failed,
            suspended=bool(suspended),
            head=[(job_id, float(score) - Band.WAITING) for job_id, score in zip(head[::2], head[1::2], strict=True)],
            worker_keys=sorted(workers),
            suspects=sorted(suspect_of(_bytes(member)) for member in suspects),
        )


@dataclass(frozen=True, slots=True)
class _Details:
    """The second: the last minute, the shared gate, the index of unfinished jobs, workers, and keys under suspicion."""

    entries: Sequence[Any]
    gate: Sequence[Any]
    in_flight: int
    expired: int
    waiting: int
    retries: int
    there: Sequence[Any]  # whether there is a job, for each of the head
    workers: Sequence[Sequence[Any]]
    lives_ms: Sequence[Any]  # how long the workers' records still live
    # account and fingerprint of a key, its breaker, size of its set of held jobs
    keys: Sequence[tuple[tuple[bytes, bytes], Sequence[Any], int]]

    @staticmethod
    def commands(keys: Keys, first: _First) -> list[Command]:
        since_ms = first.now_ms - WINDOW_S * 1000
        commands: list[Command] = [
            ("XREVRANGE", keys.outcomes, "+", since_ms, "COUNT", MAX_ENTRIES),
            ("HGETALL", keys.gate("all")),
            # A lease ends with its millisecond, as the claim has it.
            ("ZCOUNT", keys.unfinished, f"({first.now_ms}", f"({int(Band.WAITING)}"),
            ("ZCOUNT", keys.unfinished, "-inf", first.now_ms),
            ("ZCOUNT", keys.unfinished, *_WAITING),
            ("ZCOUNT", keys.unfinished, int(Band.RETRY), f"({int(Band.END)}"),
        ]
        commands += [("EXISTS", _key(keys.job_prefix, job_id)) for job_id, _ in first.head]
        commands += [("HMGET", key, *_WORKER_FIELDS) for key in first.worker_keys]
        commands += [("PTTL", key) for key in first.worker_keys]
        commands += [("HMGET", _key(keys.breaker(""), print_), *_BREAKER_FIELDS) for _, print_ in first.suspects]
        commands += [("SCARD", _key(keys.held(""), print_)) for _, print_ in first.suspects]
        return commands

    @classmethod
    def of(cls, first: _First, answers: list[Any]) -> _Details:
        entries, gate, in_flight, expired, waiting, retries, *rest = answers
        there, rest = rest[: len(first.head)], rest[len(first.head) :]
        lives_at = len(first.worker_keys)
        breakers_at = lives_at + len(first.worker_keys)
        held_at = breakers_at + len(first.suspects)
        keys = zip(first.suspects, rest[breakers_at:held_at], rest[held_at:], strict=True)
        workers, lives_ms = rest[:lives_at], rest[lives_at:breakers_at]
        waiting -= there.count(0)
        return cls(entries, gate, in_flight, expired, waiting, retries, there, workers, lives_ms, list(keys))


def _third(keys: Keys, hosts: Sequence[Any], suspects: Sequence[tuple[bytes, bytes]]) -> list[Command]:
    """Gates of the workers' hosts, and how many held jobs are still to come."""
    commands: list[Command] = [("HGETALL", _key(keys.gate(""), host)) for host in hosts]
    return commands + [("ZINTERCARD", 2, _key(keys.held(""), print_), keys.scheduled) for _, print_ in suspects]


def _is_compared(held: int, scheduled: int) -> bool:
    return 0 < min(held, scheduled) <= _COMPARED_HELD


def _refused_keys(
    first: _First,
    found: Sequence[tuple[tuple[bytes, bytes], Sequence[Any], int]],
    waiting: Mapping[tuple[bytes, bytes], Any],
) -> tuple[RefusedKey, ...]:
    """Those whose breaker is still there, open ones first, and one for each account.

    A held job that reached its deadline stays in the set until the key is accepted; a server before 7.0 cannot compare
    the set with the schedule, and a large set is not compared.
    """
    refused = []
    for suspect, (failures, reason, since, probe_at), held in found:
        if failures is None and reason is None and since is None:
            continue
        counted = waiting.get(suspect)
        since_ms, probe_at_ms = _number(since), _number(probe_at)
        refused.append(
            RefusedKey(
                account=shown(suspect[0]),
                failures=_number(failures) or 0,
                open=since_ms is not None,
                since_s=None if since_ms is None else max(0, first.now_ms - since_ms) / 1000,
                reason=None if reason is None else shown(reason, MAX_MSG_CHARS),
                probe_in_s=None if since_ms is None else max(0, (probe_at_ms or 0) - first.now_ms) / 1000,
                held=counted if isinstance(counted, int) else min(held, first.scheduled),
            )
        )
    refused.sort(key=lambda key: (not key.open, key.account))
    first_of = {key.account: key for key in reversed(refused)}
    return tuple(key for key in refused if first_of[key.account] is key)


def _key(prefix: str, name: Any) -> Any:
    """A key made of a name that came from Redis, whatever bytes it is made of."""
    return prefix.encode() + name if isinstance(name, bytes) else prefix + name


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogateescape")


def shown(value: Any, limit: int = _MAX_NAME_CHARS) -> str:
    """A word from Redis made fit to be shown, in one line of at most ``limit`` characters."""
    return clean_text(value, limit)


def _number(value: Any) -> int | None:
    """A whole number of 64 bits, None where there is none."""
    digits = "" if value is None else text(value)
    return int(digits) if _NUMBER.fullmatch(digits) else None


def _oldest_s(first: _First, there: Sequence[Any]) -> float | None:
    """For how long the one that waits longest has waited for a worker."""
    since_ms = next((since for (_, since), is_there in zip(first.head, there, strict=True) if is_there), None)
    return None if since_ms is None else max(0.0, first.now_ms - since_ms) / 1000


def _stamp_s(value: Any) -> float | None:
    """A time as RQ writes it, s since the epoch."""
    try:
        return utcparse(text(value)).timestamp() if value else None
    except (ValueError, OverflowError):
        return None


def _gate(scope: Any, fields: Sequence[Any], now_ms: int) -> Gate:
    known = {text(name): value for name, value in fields_of(fields).items()}
    until_ms = _number(known.get("until_ms")) or 0
    if until_ms <= now_ms:
        return Gate(shown(scope), open=True)
    reason, by = (None if known.get(name) is None else shown(known[name], MAX_MSG_CHARS) for name in ("reason", "by"))
    return Gate(shown(scope), False, (until_ms - now_ms) / 1000, until_ms, reason, by)


def _raw_host(fields: Sequence[Any]) -> Any:
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
    beat_s = _stamp_s(heartbeat)
    return None if beat_s is None else max(0.0, now_ms / 1000 - beat_s)


def _worker_rows(
    keys: Keys, now_ms: int, names: Sequence[Any], workers: Sequence[Any], lives_ms: Sequence[Any]
) -> Iterator[WorkerRow]:
    for key, fields, life_ms in zip(names, workers, lives_ms, strict=True):
        host, pid, state, ok, failed, heartbeat, death, *figures = fields
        if not heartbeat or death:  # a killed worker's hash runs out, and its key stays in the set for a while
            continue
        numbers = [_number(figure) for figure in figures]
        yield WorkerRow(
            shown(text(key).removeprefix(keys.worker_prefix)),
            shown(host or "?"),
            _number(pid),
            shown(state or "?"),
            _number(ok) or 0,
            _number(failed) or 0,
            _silent_s(now_ms, heartbeat, numbers[1] is not None, life_ms),
            *numbers,
        )


def _outcomes(entries: Sequence[Any]) -> tuple[list[Outcome], dict[str, int]]:
    """The outcomes and how many of each kind, in the order of the kinds; what cannot be read is counted as that."""
    outcomes, unreadable = [], 0
    for entry_id, fields in stream_entries(entries):
        try:
            outcomes.append(entry_outcome(entry_id, fields))
        except MalformedMessage:
            unreadable += 1
    counted = Counter(outcome.kind for outcome in outcomes)
    kinds = {kind.value: counted[kind] for kind in OutcomeKind if counted[kind]}
    return outcomes, kinds | ({"unreadable": unreadable} if unreadable else {})
