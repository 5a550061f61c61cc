"""What an operator asks first: how much waits, for how long, who works on it, and what came of the last minute.

Reading it changes nothing in Redis, unlike RQ's own counts, which clean registries up on the way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from producer import latency
from producer.keys import Band, BreakerField, Keys, suspect_of
from producer.message import Outcome, OutcomeKind
from producer.protocol import Command, Conversation, entry_outcome, fields_of, good, is_wrong_type, stream_entries, text
from producer.untrusted import MAX_MSG_CHARS, MalformedMessage, clean_text
from producer.workers import (
    MAX_NAME_CHARS,
    WORKER_COLUMNS,
    WORKER_FIELDS,
    WorkerRow,
    number,
    raw_host,
    worker_cells,
    worker_rows,
)

#: The window of the figures about outcomes, s.
WINDOW_S = 60
#: Entries of the ledger read at most, newest first; in a busier minute the figures speak of these.
MAX_ENTRIES = 5000
#: Workers and suspected keys described at most.
_MAX_WORKERS = 500
_MAX_KEYS = 100
#: Held jobs that are compared with the schedule one by one; of more, only how many they can be is told.
_COMPARED_HELD = 10_000
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
_BREAKER_FIELDS = (BreakerField.FAILURES, BreakerField.REASON, BreakerField.SINCE_MS, BreakerField.PROBE_AT_MS)


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of a time, ms; None where nothing was measured. Nearest rank."""

    p50: int | None = None
    p99: int | None = None

    @classmethod
    def of(cls, values: Iterable[int | None]) -> Percentiles:
        """Those of ``values``, as far as they are known."""
        ranked = sorted(value for value in values if value is not None)
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
class Status:
    """One look at a queue; times are by Redis' clock."""

    queue: str
    at_ms: int
    queued: int = 0
    oldest_queued_s: float | None = None  # queue latency, from when it was due; None: nothing waits for a worker
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
    gated_s: float | None = None  # for how long the oldest has waited that nobody may send now (gate, suspension, key)

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
        waiting = ("queued", "oldest_queued_s", "gated_s")
        counts = ("in_flight", "to_be_taken_over", "scheduled", "failed", "suspended")
        told = asdict(self)
        return {
            **{name: told[name] for name in ("queue", "at_ms", *waiting, *counts)},
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
        which = "the oldest" if self.queued else "one is due"  # no claim has come by since
        oldest = "" if self.oldest_queued_s is None else f", {which} for {self.oldest_queued_s:.1f} s"
        counts = ", ".join(f"{count:,} {kind}" for kind, count in self.outcomes.items()) or "no outcomes"
        newest = f" (of the newest {MAX_ENTRIES:,})" if self.outcomes_partial else ""
        rows = [
            ("queue", self.queue + (", SUSPENDED (rq resume lifts it)" if self.suspended else "")),
            *(("DAMAGED", f"{key} is of the wrong type, what it tells is missing here") for key in self.damaged),
            ("queued", f"{self.queued:,}{oldest}"),
            *([("held back", f"for {self.gated_s:.1f} s, nobody may send it now")] if self.gated_s is not None else []),
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
    hosts = sorted({host for fields in details.workers if (host := raw_host(fields))})
    crowds = [suspect for suspect, _, held in details.keys if _is_compared(held, first.scheduled)]
    third = _third(keys, hosts, crowds)
    answers = (yield third) if third else []
    gate_fields = _without_damaged(third[: len(hosts)], answers[: len(hosts)], damaged)
    gates = [("all", details.gate), *zip(hosts, gate_fields, strict=True)]
    waiting = dict(zip(crowds, answers[len(hosts) :], strict=True))
    rows = tuple(worker_rows(keys, first.now_ms, first.worker_keys, details.workers, details.lives_ms))
    fresh = [row for row in rows if row.fresh]
    outcomes, kinds = _outcomes(details.entries)
    keys_refused = _refused_keys(first, details.keys, waiting)
    waits = _waits(first, details.there, gates, rows, keys_refused)
    return Status(
        queue=keys.queue,
        at_ms=first.now_ms,
        queued=max(first.queued, details.waiting),
        oldest_queued_s=waits.for_worker_s,
        gated_s=waits.gated_s,
        in_flight=details.in_flight,
        scheduled=max(first.scheduled, details.retries),
        failed=first.failed,
        suspended=first.suspended,
        # Whether a host has a gate of its own is its worker's setting; Redis knows only of those that were closed.
        gates=tuple(_gate(scope, fields, first.now_ms) for scope, fields in gates if fields or scope == "all"),
        keys=keys_refused,
        used_weight=max((row.used_weight for row in fresh if row.used_weight is not None), default=None),
        weight_limit=max((row.weight_limit for row in fresh if row.weight_limit is not None), default=None),
        outcomes=kinds,
        outcomes_partial=len(details.entries) == MAX_ENTRIES,
        enqueue_to_outcome=Percentiles.of([o.took_ms for o in outcomes]),
        enqueue_to_first_attempt=Percentiles.of([o.first_attempt_ms for o in outcomes]),
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
    answers = yield [*(("HMGET", key, *WORKER_FIELDS) for key in found), *(("PTTL", key) for key in found)]
    told = [[None] * len(WORKER_FIELDS) if isinstance(each, Exception) else each for each in answers]
    rows = worker_rows(keys, int(seconds) * 1000, found, told[: len(found)], told[len(found) :])
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
    waiting: latency.Heads
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
            *latency.commands(keys),
            ("SRANDMEMBER", keys.queue_workers, _MAX_WORKERS),
            ("SRANDMEMBER", keys.suspects, _MAX_KEYS),
            ("STRLEN", keys.counts),
            ("STRLEN", keys.minutes),
        ]

    @classmethod
    def of(cls, answers: list[Any]) -> _First:
        (seconds, micros), waiting, claiming, scheduled, failed, suspended, *heads, workers, suspects, _, _ = answers
        now_ms = int(seconds) * 1000 + int(micros) // 1000
        return cls(
            now_ms=now_ms,
            queued=waiting + claiming,
            scheduled=scheduled,
            failed=failed,
            suspended=bool(suspended),
            waiting=latency.Heads.of(heads, now_ms),
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
    there: Sequence[Any]  # whether there is a job, for each of those that wait
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
        commands += [("EXISTS", _key(keys.job_prefix, job_id)) for job_id in first.waiting.ids]
        commands += [("HMGET", key, *WORKER_FIELDS) for key in first.worker_keys]
        commands += [("PTTL", key) for key in first.worker_keys]
        commands += [("HMGET", _key(keys.breaker(""), print_), *_BREAKER_FIELDS) for _, print_ in first.suspects]
        commands += [("SCARD", _key(keys.held(""), print_)) for _, print_ in first.suspects]
        return commands

    @classmethod
    def of(cls, first: _First, answers: list[Any]) -> _Details:
        entries, gate, in_flight, expired, waiting, retries, *rest = answers
        there, rest = rest[: len(first.waiting.ids)], rest[len(first.waiting.ids) :]
        lives_at = len(first.worker_keys)
        breakers_at = lives_at + len(first.worker_keys)
        held_at = breakers_at + len(first.suspects)
        keys = zip(first.suspects, rest[breakers_at:held_at], rest[held_at:], strict=True)
        workers, lives_ms = rest[:lives_at], rest[lives_at:breakers_at]
        waiting -= there[: first.waiting.queued].count(0)
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
        since_ms, probe_at_ms = number(since), number(probe_at)
        refused.append(
            RefusedKey(
                account=shown(suspect[0]),
                failures=number(failures) or 0,
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


def shown(value: Any, limit: int = MAX_NAME_CHARS) -> str:
    """A word from Redis made fit to be shown, in one line of at most ``limit`` characters."""
    return clean_text(value, limit)


def _waits(
    first: _First,
    there: Sequence[Any],
    gates: Sequence[tuple[Any, Sequence[Any]]],
    rows: Sequence[WorkerRow],
    refused: Sequence[RefusedKey],
) -> latency.Waits:
    live = {row.host for row in rows if row.live}
    (_, shared_ms), *of_hosts = [(shown(scope), _until_ms(fields)) for scope, fields in gates]
    return latency.waits(
        (since for since, is_there in zip(first.waiting.since_ms, there, strict=True) if is_there),
        first.now_ms,
        closed_until_ms=max(shared_ms, min((until_ms for host, until_ms in of_hosts if host in live), default=0)),
        is_suspended=first.suspended,
        refused_s=[key.since_s or 0 for key in refused if key.open and key.held],
    )


def _until_ms(gate: Sequence[Any]) -> int:
    return number({text(name): value for name, value in fields_of(gate).items()}.get("until_ms")) or 0


def _gate(scope: Any, fields: Sequence[Any], now_ms: int) -> Gate:
    known = {text(name): value for name, value in fields_of(fields).items()}
    until_ms = number(known.get("until_ms")) or 0
    if until_ms <= now_ms:
        return Gate(shown(scope), open=True)
    reason, by = (None if known.get(name) is None else shown(known[name], MAX_MSG_CHARS) for name in ("reason", "by"))
    return Gate(shown(scope), False, (until_ms - now_ms) / 1000, until_ms, reason, by)


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
