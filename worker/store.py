"""The worker's side of Redis as values: what is sent for a claim, a completion, a beat, and what the answers mean.

Nothing here talks to anybody (:mod:`worker.redis_link` does) and nothing decides about orders. The scripts in
`worker/scripts` are the only writers of RQ's keys by hand; everything else about RQ goes through RQ.
"""

from __future__ import annotations

import zlib
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar
from uuid import uuid4

import redis
from rq.defaults import RQ_KEY_PREFIX

from producer.counts import LAYOUT, counted
from producer.job_fields import words_of_job
from producer.keys import FAILURE_TTL_S, RESULT_TTL_S, Keys, Script, WorkerField, suspect_of
from producer.message import MAX_ATTEMPTS_BYTES, Attempt, CancelRequest, Outcome, encode_attempts, encode_call
from producer.untrusted import MAX_PAYLOAD_BYTES
from worker.clock import RedisClock

__all__ = ["Beat", "Claimed", "Done", "Lease", "Release", "Request", "Retry", "Row", "Store", "Suspect"]

#: How long a claim waits for a job inside the server, s.
CLAIM_WAIT_S = 1
#: No reply takes longer than this, s; a claim waits at most one second of it.
ANSWER_WITHIN_S = 3.0
#: Most refused keys that are looked at.
MAX_SUSPECTS = 100
#: Words of a row (`worker/scripts/ending.lua`).
_ROW = 12
#: Comes in place of a longer one.
TOO_LARGE = b"?"
#: Our own idea of a lease's end stays so far before Redis', ms: what is sent until then has left by the end.
LEASE_MARGIN_MS = 250

T = TypeVar("T")
Words = tuple[Any, ...]


class Suspect(NamedTuple):
    """An API key of the exchange and an account that uses it; as one that is refused, in :attr:`Keys.suspects`."""

    account: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Stamps:
    """When a question was sent and when its answer was there (:func:`worker.clock.local_ns`)."""

    asked_ns: int
    answered_ns: int


@dataclass(frozen=True, slots=True)
class Request(Generic[T]):
    """Commands for one round trip, the last of which calls ``script``, and what their answers mean."""

    commands: tuple[Words, ...]
    script: Script | None
    read: Callable[[list[Any], Stamps], T]  # raises redis.RedisError: an answer was an error

    def anew(self) -> tuple[Words, Words]:
        """What is sent where the server did not have the script: the script, then its call alone."""
        if self.script is None:
            raise TypeError("no script is called")
        return ("SCRIPT", "LOAD", self.script.source), self.commands[-1]


@dataclass(frozen=True, slots=True)
class Lease:
    """A job in a holder's hands, with the token that says so."""

    key: bytes  # the id as Redis knows it: a stranger's need not be UTF-8
    token: str
    data: bytes
    enqueued_at_ms: int
    deadline_at_ms: int
    run: int
    attempts: bytes
    pin: bytes
    meant_at_ms: int  # when the request was first made; a retry means the same order
    until_ns: int  # our own idea of its end (worker.clock.local_ns)
    cancels_child: bool = False  # what a triggered order became is to be cancelled, too
    fault: str = ""  # why it cannot be read as it should: `number FIELD`, `size FIELD`, `recalled STATUS`

    @property
    def id(self) -> str:
        """The id for people and records."""
        return self.key.decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class Claimed:
    """What a claim brought."""

    now_ms: int
    gate_until_ms: int  # 0: open
    suspended: bool
    damaged: tuple[str, ...]  # keys that were set aside, entries that were dropped
    why_not: str  # why the one job that was asked for is not leased: settled, held, gone, scheduled, closed
    until_ms: int  # when it is due (scheduled) or its deadline (closed)
    leases: list[Lease]
    refused: redis.ResponseError | None = None  # why the server did not let us wait: it is full
    suspects: tuple[Suspect, ...] = ()  # of the one job that was asked for: keys of the exchange that are refused


@dataclass(frozen=True, slots=True)
class Beat:
    """What a beat brought."""

    gate_until_ms: int | None  # None: Redis has no record of the gate
    suspended: bool
    is_unknown: bool  # RQ does not know this worker (any more)
    damaged: tuple[str, ...]
    lost: frozenset[str]  # tokens of leases that somebody else has taken
    renewed_until_ns: int  # the new end of all others that were named
    suspects: tuple[Suspect, ...]  # keys of the exchange that are refused


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a job: its outcome. ``requests`` are put on the queue by the same call, each with the id that its job
    gets where it does not join another's."""

    lease: Lease
    outcome: Outcome
    pin: str = ""
    requests: tuple[tuple[str, CancelRequest], ...] = ()

    def words(self) -> Words:
        """The row of complete.lua."""
        outcome, lease = self.outcome, self.lease
        failed = outcome.kind.failed
        by_deadline = outcome.kind in ("overdue", "gave_up", "unknown")
        leaves_child = outcome.kind == "triggered" and not lease.cancels_child
        said = f"{outcome.kind.value}: {outcome.error}".encode()
        # RQ keeps a failure's text compressed, a return value as its serializer writes it (rq.results.Result).
        result = b64encode(zlib.compress(said) if failed else b'"%s"' % outcome.kind.value.encode())
        may_go_on = by_deadline or leaves_child or self.requests  # as what is asked for has changed meanwhile
        attempts = encode_attempts(outcome.history()) if may_go_on else ""
        decided_by = lease.deadline_at_ms if by_deadline else ""
        said_of = (outcome.encode(), outcome.kind.value, result, decided_by)
        leaves = "1" if leaves_child else ""
        return _row("done", lease, *said_of, attempts, self.pin, leaves, counted(outcome))

    def request_words(self) -> Words:
        """The rows of place.lua: what the request of the job was given goes on to those that it makes."""
        deadline, child = f"@{self.lease.deadline_at_ms}", "1" if self.lease.cancels_child else ""
        rows = (
            (job_id, each.order_key, encode_call(each), each.describe(), deadline, "1" if each.urgent else "", child)
            for job_id, each in self.requests
        )
        return tuple(word for row in rows for word in row)


@dataclass(frozen=True, slots=True)
class Retry:
    """Another try later."""

    lease: Lease
    attempts: tuple[Attempt, ...]
    delay_ms: int
    pin: str = ""

    def words(self) -> Words:
        """The row of complete.lua."""
        return _row("retry", self.lease, encode_attempts(self.attempts), self.pin, self.delay_ms)


@dataclass(frozen=True, slots=True)
class Release:
    """A job handed back for anybody to claim."""

    lease: Lease
    attempts: tuple[Attempt, ...] | None = None  # None: nothing was tried
    pin: str = ""

    def words(self) -> Words:
        """The row of complete.lua."""
        attempts = "" if self.attempts is None else encode_attempts(self.attempts)
        return _row("release", self.lease, attempts, self.pin)


#: How a hold ends.
Row = Done | Retry | Release


def is_alone(row: Row) -> bool:
    """Whether it is written by a call of its own: it makes requests."""
    return isinstance(row, Done) and bool(row.requests)


def _row(what: str, lease: Lease, *words: Any) -> Words:
    """A row of ending.lua: as many words for each end."""
    return (what, lease.key, lease.token, lease.run, *words, *("",) * (_ROW - 4 - len(words)))


@dataclass(frozen=True, slots=True)
class Completed:
    """What a completion came to, for each row: 0 not ours any more, 1 done, 2 not recorded because the deadline by
    which it was decided has moved, -1 the job's keys are damaged; for a retry its due time in ms."""

    answers: list[int]
    damaged: tuple[str, ...]


def _constants(keys: Keys) -> dict[str, object]:
    """What the worker's scripts know, whoever calls them."""
    return (
        keys.lua()
        | LAYOUT
        | {
            "CLAIMING": keys.claiming,
            "STARTED": keys.started,
            "FINISHED": keys.finished,
            "CANCELED": keys.canceled,
            "SUSPENDED": keys.suspended,
            "INTERMEDIATE": keys.intermediate,
            "WORKERS": keys.workers,
            "QUEUE_WORKERS": keys.queue_workers,
            "OUTCOMES": keys.outcomes,
            "RESULT_PREFIX": keys.result_prefix,
            "SUSPECTS": keys.suspects,
            "BEAT_AT_MS": WorkerField.BEAT_AT_MS,
            "BREAKER_PREFIX": keys.breaker(""),
            "HELD_PREFIX": keys.held(""),
            "RESULT_TTL_S": RESULT_TTL_S,
            "FAILURE_TTL_S": FAILURE_TTL_S,
            "MAX_DATA_BYTES": MAX_PAYLOAD_BYTES,
            "MAX_ATTEMPTS_BYTES": MAX_ATTEMPTS_BYTES,
        }
    )


class Store:
    """One holder's view of one queue. ``lease_ms`` is how long a lease lasts without a beat, ``deadline_ms`` how long a
    request is pursued that leaves it to the worker."""

    def __init__(
        self,
        queue: str,
        holder: str,
        *,
        gate_scope: str,
        lease_ms: int,
        deadline_ms: int,
        outcome_ttl_s: int,
        ledger_maxlen: int,
    ) -> None:
        self.keys = keys = Keys(queue, RQ_KEY_PREFIX)
        self.clock = RedisClock()
        self._holder = holder
        self._worker_key = keys.worker_prefix + holder
        self._gate = keys.gate(gate_scope)
        self._lease_ns = (lease_ms - min(LEASE_MARGIN_MS, lease_ms // 10)) * 1_000_000
        self._token = f"{uuid4().hex[:12]}-"
        self._claims = 0
        constants = _constants(keys) | {
            "GATE": self._gate,
            "LEASE_MS": lease_ms,
            "DEADLINE_MS": deadline_ms,
            "OUTCOME_TTL_S": outcome_ttl_s,
            "LEDGER_MAXLEN": ledger_maxlen,
        }
        names = ("claim", "complete", "beat", "gate", "key", "tidy", "wake")
        before = {"complete": ("worker/ending.lua",)}
        self._scripts = {
            name: Script(constants, "worker/common.lua", *before.get(name, ()), f"worker/{name}.lua") for name in names
        }
        parts = ("worker/common.lua", "producer/place.lua", "worker/ending.lua", "worker/spread.lua")
        self._scripts["spread"] = Script(constants | words_of_job(queue), *parts)

    def _call(self, name: str, *words: Any) -> Words:
        return ("EVALSHA", self._scripts[name].sha, 0, *words)

    def _request(self, name: str, words: Words, read: Callable[[list[Any], Stamps], T]) -> Request[T]:
        return Request((self._call(name, *words),), self._scripts[name], read)

    # -- claiming --

    def claim(
        self,
        slots: int,
        *,
        wait: bool,
        bring_back: bool = True,
        take_lost: bool = True,
        look_closely: bool = False,
    ) -> Request[Claimed]:
        """Take up to ``slots`` jobs, waiting up to :data:`CLAIM_WAIT_S` for the first one if ``wait``.

        ``bring_back``: retries that are due, too, and with ``take_lost`` jobs whose lease has run out;
        ``look_closely``: also such as stand in no list although the queue is not empty. To be sent at once: the server
        is told when the asker stops waiting. Without an answer, what was claimed unseen comes back when its lease runs
        out.
        """
        number, self._claims = self._claims, self._claims + slots
        gives_up_at_ms = self.clock.now_ms() + round(ANSWER_WITHIN_S * 1000) if self.clock.measured else 0
        flags = (int(bring_back), int(take_lost), int(look_closely))
        script = self._call("claim", self._holder, slots, self._token, number, *flags, gives_up_at_ms)
        move = ("BLMOVE", self.keys.waiting, self.keys.claiming, "LEFT", "RIGHT", CLAIM_WAIT_S)
        return Request((move, script) if wait else (script,), self._scripts["claim"], self._claimed)

    def claim_one(self, job_id: str) -> Request[Claimed]:
        """Take the job that a stock RQ worker has popped, if it is free."""
        number, self._claims = self._claims, self._claims + 1
        script = self._call("claim", self._holder, 1, self._token, number, 0, 1, 0, 0, job_id)
        look = ("SRANDMEMBER", self.keys.suspects, MAX_SUSPECTS)
        return Request((look, script), self._scripts["claim"], self._claimed_one)

    def _claimed_one(self, answers: list[Any], stamps: Stamps) -> Claimed:
        suspects = () if isinstance(answers[0], redis.RedisError) else _suspects(answers[0])
        return replace(self._claimed(answers[1:], stamps), suspects=suspects)

    def _claimed(self, answers: list[Any], stamps: Stamps) -> Claimed:
        moved, answer = answers[0], answers[-1]
        _raise(answer)
        # Taken apart before the clock learns from it: an answer that makes no sense must not set it.
        now_ms, gate, suspended, damaged, said, *rows = answer
        why_not, _, until = said.decode().partition(" ")
        told = (int(now_ms), int(gate), suspended == 1, _names(damaged), why_not, int(until or 0))
        until_ns = self._lease_from(told[0], stamps)
        leases = [_lease(row, until_ns) for row in rows]
        # A full server refuses the wait but not the claim. (What refused it for its type is damaged, and set aside.)
        refused = moved if isinstance(moved, redis.ResponseError) and not damaged else None
        return Claimed(*told, leases, refused)

    def _lease_from(self, now_ms: int, stamps: Stamps) -> int:
        """The end of a lease given when Redis' clock said ``now_ms``: counted from the earliest moment that can be."""
        self.clock.observe(stamps.asked_ns, stamps.answered_ns, now_ms)
        earliest_ns, _ = self.clock.moments(now_ms) or (stamps.asked_ns, None)
        return max(stamps.asked_ns, earliest_ns) + self._lease_ns

    # -- what follows a claim --

    def complete(self, rows: Sequence[Row]) -> Request[Completed]:
        """End holds; to be repeated with the same rows where no answer came: that does no harm. What makes requests
        is a call of its own."""
        if any(map(is_alone, rows)):
            (row,) = rows
            assert isinstance(row, Done)
            words = (self._holder, *row.words(), *row.request_words())
            return self._request("spread", words, partial(_completed, 1))
        rest = (word for row in rows for word in row.words())
        return self._request("complete", (self._holder, *rest), partial(_completed, len(rows)))

    def beat(self, held: Sequence[Lease], figures: Mapping[str, Any] | None, life_s: int) -> Request[Beat]:
        """Prolong leases and, with ``figures``, tell RQ and people that this worker lives for another ``life_s``."""
        fields = [word for field in (figures or {}).items() for word in field]
        leases = (word for lease in held for word in (lease.key, lease.token))
        return self._request("beat", (self._worker_key, life_s, len(fields), *fields, *leases), self._beaten)

    def _beaten(self, answers: list[Any], stamps: Stamps) -> Beat:
        _raise(*answers)
        now_ms, gate, suspended, is_unknown, damaged, lost, suspects = answers[0]
        return Beat(
            gate_until_ms=int(gate) if gate.isdigit() else None,
            suspended=suspended == 1,
            is_unknown=is_unknown == 1,
            damaged=_names(damaged),
            lost=frozenset(token.decode() for token in lost),
            renewed_until_ns=self._lease_from(int(now_ms), stamps),
            suspects=_suspects(suspects),
        )

    def tidy(self, cursor: int, position: int) -> Request[tuple[int, int, tuple[str, ...]]]:
        """One step of what RQ's maintenance would do; gives the next ``cursor`` and ``position``."""
        return self._request("tidy", (cursor, position), _tidied)

    def wake(self, jobs: Sequence[tuple[bytes, int]]) -> Request[tuple[str, ...]]:
        """Let jobs that are due later, each with when, be due now; gives keys that were set aside."""
        words = (word for job in jobs for word in job)
        return self._request("wake", tuple(words), lambda answers, _: _names(_good(answers)[0]))

    # -- what concerns more than one job --

    def close_gate(self, pause_ms: int, reason: str, doubling: bool) -> Request[int]:
        """Close the shared gate for at least ``pause_ms``; gives its end, ms by Redis' clock.

        ``doubling``: twice as long as the last time, if that was within an hour.
        """
        return self._request("gate", (pause_ms, reason, self._holder, int(doubling)), _number)

    def key(
        self, suspect: Suspect, what: str, word: str | bytes, failures: int, probe_every_ms: int
    ) -> Request[tuple[int, str]]:
        """The breaker of a key: tell of an answer (`failed`, `answered`) or `ask` to send (`try`: for the first time in
        this process); gives when to ask again, ms, or 0, and why."""
        words = (what, suspect.account, suspect.fingerprint, failures, probe_every_ms, word)
        return self._request("key", words, _probe_at)

    def recorded(self, job_id: str) -> Request[bytes | None]:
        """The outcome record of a job, if there is one."""
        return Request((("GET", self.keys.outcome_prefix + job_id),), None, _first)

    def is_drained(self) -> Request[bool]:
        """Whether nothing is left to do: no job waits, is due later, or is in anybody's hand."""
        keys = self.keys
        counts = (
            ("LLEN", keys.waiting),
            ("LLEN", keys.claiming),
            ("ZCARD", keys.scheduled),
            ("ZCARD", keys.unfinished),
        )
        return Request(counts, None, lambda answers, _: not any(_good(answers)))

    def shutdown_asked(self, worker: str) -> Request[bool]:
        """Whether RQ's worker of that name was told to leave."""
        command = ("HEXISTS", self.keys.worker_prefix + worker, "shutdown_requested_date")
        return Request((command,), None, lambda answers, _: bool(_good(answers)[0]))


def _good(answers: list[Any]) -> list[Any]:
    _raise(*answers)
    return answers


def _first(answers: list[Any], _: Stamps) -> Any:
    return _good(answers)[0]


def _number(answers: list[Any], _: Stamps) -> int:
    return int(_good(answers)[0])


def _probe_at(answers: list[Any], _: Stamps) -> tuple[int, str]:
    at_ms, _, reason = _good(answers)[0].partition(b" ")
    return int(at_ms), reason.decode("utf-8", "replace")


def _suspects(members: Sequence[bytes]) -> tuple[Suspect, ...]:
    named = (suspect_of(member) for member in members)
    return tuple(
        Suspect(account.decode("utf-8", "replace"), print_.decode("utf-8", "replace")) for account, print_ in named
    )


def _completed(count: int, answers: list[Any], _: Stamps) -> Completed:
    damaged, *rows = _good(answers)[0]
    if len(rows) != count:
        raise ValueError("not one answer for each row")
    return Completed([int(row) for row in rows], _names(damaged))


def _tidied(answers: list[Any], _: Stamps) -> tuple[int, int, tuple[str, ...]]:
    cursor, position, damaged = _good(answers)[0]
    return int(cursor), int(position), _names(damaged)


def _names(words: Sequence[bytes]) -> tuple[str, ...]:
    return tuple(word.decode("utf-8", "replace") for word in words)


def _raise(*answers: Any) -> None:
    for answer in answers:
        if isinstance(answer, redis.RedisError):
            raise answer


def _lease(row: list[Any], until_ns: int) -> Lease:
    key, token, data, enqueued_at, deadline_at, run, attempts, pin, fault, meant_at, cancels_child = row
    return Lease(
        key=key,
        token=token.decode(),
        data=data,
        enqueued_at_ms=int(enqueued_at),
        deadline_at_ms=int(deadline_at),
        run=int(run),
        attempts=attempts,
        pin=pin,
        meant_at_ms=int(meant_at),
        until_ns=until_ns,
        cancels_child=cancels_child == b"1",
        fault=fault.decode(),
    )
