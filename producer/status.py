"""What an operator asks first: how much waits, for how long, who works on it, and what came of the last minute.

Reading it changes nothing in Redis, unlike RQ's own counts, which clean registries up on the way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from producer import latency
from producer.keys import Band, BreakerField, Keys, suspect_of
from producer.message import OutcomeKind
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
    gated_s: float | None = None  # for how long the oldest has waited that nobody may send now (gate, suspension, key)
    in_flight: int = 0  # that a worker holds under a lease which has not run out
    to_be_taken_over: int = 0  # whose lease has run out: the next claim of any worker takes them over
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

    @property
    def oldest_s(self) -> float | None:
        """For how long the oldest has waited, where that is worth a word: not of what is queued nowhere, as it fell due
        this moment."""
        return self.oldest_queued_s if self.queued or (self.oldest_queued_s or 0) >= 0.05 else None

    def as_dict(self) -> dict[str, object]:
        """The status as the command line's ``--json`` prints it."""
        told = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        del told["workers_known"]
        told["outcomes_last_minute"] = told.pop("outcomes")
        told["latency_ms"] = {name: told.pop(name) for name in ("enqueue_to_outcome", "enqueue_to_first_attempt")}
        for row, worker in zip(told["workers"], self.workers, strict=True):
            row["live"] = worker.live
        return told

    def lines(self) -> list[str]:
        """The status for people, aligned."""
        which = "the oldest" if self.queued else "one is due"  # no claim has come by since
        oldest = "" if self.oldest_s is None else f", {which} for {self.oldest_s:.1f} s"
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
    told = yield from _trip(_first(keys), damaged)
    now_ms = ms_of(told["time"][0])
    heads = latency.Heads.of(told["heads"], now_ms)
    # Names are kept as Redis gave them: keys are made of them.
    names, suspects = sorted(told["names"][0]), sorted(suspect_of(_bytes(each)) for each in told["suspects"][0])
    told |= yield from _trip(_second(keys, now_ms, heads, names, suspects), damaged)
    hosts = sorted({host for fields in told["workers"] if (host := raw_host(fields))})
    sizes = zip(suspects, told["held"], strict=True)
    crowds = [each for each, held in sizes if 0 < min(held, told["counts"][0]) <= _COMPARED_HELD]
    told |= yield from _trip(_third(keys, hosts, crowds), damaged)
    gates = _gates(["all", *hosts], told["gate"] + told["gates"], now_ms)
    rows = tuple(worker_rows(keys, now_ms, names, told["workers"], told["lives"]))
    refused = _refused_keys(now_ms, suspects, crowds, told)
    fresh = [row for row in rows if row.fresh]
    counts = _counts(told, heads)
    oldest_queued_s, gated_s = latency.waits(
        heads.still_waiting(told["there"], queued=counts["queued"]),
        now_ms,
        closed_until_ms=_closed_until_ms(gates, rows),
        is_suspended=bool(told["counts"][2]),
        refused_s=[key.since_s or 0 for key in refused if key.open and key.held],
    )
    return Status(
        queue=keys.queue,
        at_ms=now_ms,
        oldest_queued_s=oldest_queued_s,
        gated_s=gated_s,
        # Whether a host has a gate of its own is its worker's setting; Redis knows only of those that were closed.
        gates=tuple(gate for gate, until_ms in gates if until_ms is not None or gate.scope == "all"),
        keys=refused,
        used_weight=max((row.used_weight for row in fresh if row.used_weight is not None), default=None),
        weight_limit=max((row.weight_limit for row in fresh if row.weight_limit is not None), default=None),
        workers=rows,
        damaged=tuple(damaged),
        workers_known=shown(keys.queue_workers, _MAX_KEY_CHARS) not in damaged,
        **counts,
        **_last_minute(told["ledger"][0]),
    )


def ms_of(time: Sequence[Any]) -> int:
    """What TIME says, ms since the epoch."""
    return int(time[0]) * 1000 + int(time[1]) // 1000


def _closed_until_ms(gates: Sequence[tuple[Gate, int | None]], rows: Sequence[WorkerRow]) -> int:
    """Until when nobody can send, or could: while the shared gate is closed, or those of all live workers' hosts."""
    live = {row.host for row in rows if row.live}
    (_, shared_ms), *of_hosts = gates
    return max(shared_ms or 0, min((until_ms or 0 for gate, until_ms in of_hosts if gate.scope in live), default=0))


def is_served(keys: Keys) -> Conversation[bool | None]:
    """Whether a live worker serves a queue; None where nobody can tell."""
    time, found = yield [("TIME",), ("SRANDMEMBER", keys.queue_workers, _MAX_WORKERS)]
    if isinstance(found, Exception):
        return None
    if not found:
        return False
    answers = yield [*(("HMGET", key, *WORKER_FIELDS) for key in found), *(("PTTL", key) for key in found)]
    told = [[None] * len(WORKER_FIELDS) if isinstance(each, Exception) else each for each in answers]
    rows = worker_rows(keys, ms_of(time), found, told[: len(found)], told[len(found) :])
    return any(row.live for row in rows)


#: Redis knows it since 7.0.
_COMPARISON = "ZINTERCARD"


def readable(commands: list[Command], damaged: dict[str, None]) -> Conversation[list[Any]]:
    """One round trip whose keys of the wrong type count as empty; they are added to ``damaged``."""
    return _without_damaged(commands, (yield commands), damaged)


def _without_damaged(commands: Sequence[Command], answers: Sequence[Any], damaged: dict[str, None]) -> list[Any]:
    """The answers, nothing in the place of those about keys of the wrong type, which are added to ``damaged``.

    An operator looks because something is wrong: one such key may not hide all the rest, nor may a comparison that the
    server does not know, or that its user may not make. Any other error is raised.
    """
    told = []
    for (name, *words), answer in zip(commands, answers, strict=True):
        if name == _COMPARISON and isinstance(answer, Exception):
            answer = None
        elif is_wrong_type(answer):
            damaged[shown(words[0], _MAX_KEY_CHARS)] = None
            answer = [None] * (len(words) - 1) if name == "HMGET" else _NOTHING[name]
        told.append(answer)
    return good(told)


def _trip(groups: Mapping[str, Sequence[Command]], damaged: dict[str, None]) -> Conversation[dict[str, list[Any]]]:
    """One round trip, and its answers by what they are for."""
    answers = iter((yield from readable([each for group in groups.values() for each in group], damaged)))
    return {name: list(islice(answers, len(group))) for name, group in groups.items()}


def _first(keys: Keys) -> dict[str, list[Command]]:
    """What needs no other answer."""
    return {
        "time": [("TIME",)],
        "lists": [("LLEN", keys.waiting), ("LLEN", keys.claiming)],
        "counts": [("ZCARD", keys.scheduled), ("ZCARD", keys.failed), ("EXISTS", keys.suspended)],
        "heads": latency.commands(keys),
        "names": [("SRANDMEMBER", keys.queue_workers, _MAX_WORKERS)],
        "suspects": [("SRANDMEMBER", keys.suspects, _MAX_KEYS)],
        "sizes": [("STRLEN", keys.counts), ("STRLEN", keys.minutes)],  # whether they are damaged
    }


def _second(
    keys: Keys, now_ms: int, heads: latency.Heads, names: Sequence[Any], suspects: Sequence[tuple[bytes, bytes]]
) -> dict[str, list[Command]]:
    """The last minute, the shared gate, the index of unfinished jobs, workers, and keys under suspicion."""
    prints = [print_ for _, print_ in suspects]
    return {
        "ledger": [("XREVRANGE", keys.outcomes, "+", now_ms - WINDOW_S * 1000, "COUNT", MAX_ENTRIES)],
        "gate": [("HGETALL", keys.gate("all"))],
        "index": [
            # A lease ends with its millisecond, as the claim has it.
            ("ZCOUNT", keys.unfinished, f"({now_ms}", f"({int(Band.WAITING)}"),
            ("ZCOUNT", keys.unfinished, "-inf", now_ms),
            ("ZCOUNT", keys.unfinished, int(Band.WAITING), f"({int(Band.RETRY)}"),
            ("ZCOUNT", keys.unfinished, int(Band.RETRY), f"({int(Band.END)}"),
        ],
        "there": [("EXISTS", _key(keys.job_prefix, job_id)) for job_id in heads.ids],
        "workers": [("HMGET", key, *WORKER_FIELDS) for key in names],
        "lives": [("PTTL", key) for key in names],
        "breakers": [("HMGET", _key(keys.breaker(""), each), *_BREAKER_FIELDS) for each in prints],
        "held": [("SCARD", _key(keys.held(""), each)) for each in prints],
    }


def _third(keys: Keys, hosts: Sequence[Any], suspects: Sequence[tuple[bytes, bytes]]) -> dict[str, list[Command]]:
    """Gates of the workers' hosts, and how many held jobs are still to come."""
    return {
        "gates": [("HGETALL", _key(keys.gate(""), host)) for host in hosts],
        "crowds": [(_COMPARISON, 2, _key(keys.held(""), print_), keys.scheduled) for _, print_ in suspects],
    }


def _counts(told: Mapping[str, list[Any]], heads: latency.Heads) -> dict[str, Any]:
    scheduled, failed, suspended = told["counts"]
    in_flight, expired, waiting, retries = told["index"]
    return {
        # RQ's lists and registry hold more than jobs where entries are double or left over.
        "queued": max(sum(told["lists"]), waiting - told["there"][: heads.queued].count(0)),
        "scheduled": max(scheduled, retries),
        "in_flight": in_flight,
        "to_be_taken_over": expired,
        "failed": failed,
        "suspended": bool(suspended),
    }


def _refused_keys(
    now_ms: int, suspects: Sequence[tuple[bytes, bytes]], crowds: Sequence[Any], told: Mapping[str, list[Any]]
) -> tuple[RefusedKey, ...]:
    """Those whose breaker is still there, open ones first, and one for each account.

    A held job that reached its deadline stays in the set until the key is accepted; a server before 7.0 cannot compare
    the set with the schedule, and a large set is not compared.
    """
    compared = dict(zip(crowds, told["crowds"], strict=True))
    refused = []
    for suspect, (failures, reason, since, probe_at), held in zip(
        suspects, told["breakers"], told["held"], strict=True
    ):
        if failures is None and reason is None and since is None:
            continue
        counted = compared.get(suspect)
        since_ms, probe_at_ms = number(since), number(probe_at)
        refused.append(
            RefusedKey(
                account=shown(suspect[0]),
                failures=number(failures) or 0,
                open=since_ms is not None,
                since_s=None if since_ms is None else max(0, now_ms - since_ms) / 1000,
                reason=None if reason is None else shown(reason, MAX_MSG_CHARS),
                probe_in_s=None if since_ms is None else max(0, (probe_at_ms or 0) - now_ms) / 1000,
                held=min(held, told["counts"][0]) if counted is None else counted,
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


def _gates(scopes: Sequence[Any], answers: Sequence[Any], now_ms: int) -> list[tuple[Gate, int | None]]:
    """The gates of these, each with until when it is closed, or was last; None of those that never were."""
    gates: list[tuple[Gate, int | None]] = []
    for scope, answer in zip(scopes, answers, strict=True):
        known = {text(name): value for name, value in fields_of(answer).items()}
        until_ms = number(known.get("until_ms")) or 0
        gate = Gate(shown(scope), open=True)
        if until_ms > now_ms:
            reason, by = (shown(known[name], MAX_MSG_CHARS) if name in known else None for name in ("reason", "by"))
            gate = Gate(shown(scope), False, (until_ms - now_ms) / 1000, until_ms, reason, by)
        gates.append((gate, until_ms if known else None))
    return gates


def _last_minute(entries: Sequence[Any]) -> dict[str, Any]:
    """Kinds are told in their order; what cannot be read is counted as that."""
    outcomes, unreadable = [], 0
    for entry_id, fields in stream_entries(entries):
        try:
            outcomes.append(entry_outcome(entry_id, fields))
        except MalformedMessage:
            unreadable += 1
    counted = Counter(outcome.kind for outcome in outcomes)
    kinds = {kind.value: counted[kind] for kind in OutcomeKind if counted[kind]}
    return {
        "outcomes": kinds | ({"unreadable": unreadable} if unreadable else {}),
        "outcomes_partial": len(entries) == MAX_ENTRIES,
        "enqueue_to_outcome": Percentiles.of(outcome.took_ms for outcome in outcomes),
        "enqueue_to_first_attempt": Percentiles.of(outcome.first_attempt_ms for outcome in outcomes),
    }
