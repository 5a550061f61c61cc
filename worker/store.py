"""The worker's side of Redis: claim, settle, renew, gate. Each is one round trip and one script.

The scripts are the only place that writes RQ's keys by hand (`worker/scripts/*.lua`); everything else about RQ goes
through RQ. Nothing here decides about orders.
"""

from __future__ import annotations

import time
import zlib
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from hashlib import sha1
from importlib.resources import files
from typing import Any, Generic, TypeVar
from uuid import uuid4

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from rq.defaults import RQ_KEY_PREFIX

from producer.keys import Keys
from producer.message import MAX_PAYLOAD_BYTES, Attempt, Outcome, encode_attempts

#: No reply takes longer than this, s; a claim waits at most one second of it inside the server.
SOCKET_TIMEOUT_S = 3.0
#: How long a claim waits for a job, s.
CLAIM_WAIT_S = 1
#: Two are the event loop's (worker.line.Lines), one is RQ's for its commands (pub/sub), and one serves everything else:
#: renewals, heartbeats, the gate.
MAX_CONNECTIONS = 4
#: As in producer.protocol: life of RQ's hash and result, and of a pointer, s.
RESULT_TTL_S = 600
FAILURE_TTL_S = 7 * 86_400
POINTER_LIFE_S = 8 * 86_400


Words = tuple[Any, ...]


def connect(url: str, **options: Any) -> redis.Redis:
    """A client for a worker: few connections, and never a repeat of a command whose reply was lost (a repeated claim
    would leave the first one's jobs to the lease)."""
    return redis.Redis(connection_pool=redis.BlockingConnectionPool.from_url(url, **_pool_options(), **options))


def connect_like(connection: redis.Redis) -> redis.Redis:
    """The same for the address and credentials of another client (the one that RQ's command line made)."""
    pool = connection.connection_pool
    options = {**pool.connection_kwargs, **_pool_options()}
    for name in ("maint_notifications_config", "maint_notifications_pool_handler"):
        options.pop(name, None)  # bound to the other pool
    return redis.Redis(connection_pool=redis.BlockingConnectionPool(connection_class=pool.connection_class, **options))


def _pool_options() -> dict[str, Any]:
    return {
        "max_connections": MAX_CONNECTIONS,
        "timeout": SOCKET_TIMEOUT_S,
        "socket_timeout": SOCKET_TIMEOUT_S,
        "socket_connect_timeout": SOCKET_TIMEOUT_S,
        "socket_keepalive": True,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }


class RedisClock:
    """Redis' time between two answers of it: every worker then reads the same clock, whatever its host's says."""

    def __init__(self) -> None:
        self._offset_ms: float | None = None

    def observe(self, now_ms: int, asked_at_s: float | None = None) -> None:
        """Note an answer that has just arrived; one to a question of long ago (monotonic) is no news any more."""
        is_late = asked_at_s is not None and time.monotonic() - asked_at_s > SOCKET_TIMEOUT_S
        if self._offset_ms is None or not is_late:
            self._offset_ms = now_ms - time.monotonic_ns() / 1e6

    @property
    def measured(self) -> bool:
        """Whether there was an answer yet."""
        return self._offset_ms is not None

    def now_ms(self) -> int:
        """Now, ms since the epoch; the host's clock before the first answer."""
        if self._offset_ms is None:
            return time.time_ns() // 1_000_000
        return int(time.monotonic_ns() / 1e6 + self._offset_ms)


@dataclass(frozen=True, slots=True)
class Grant:
    """A job that was given to us, with the lease that says so."""

    id: str
    lease: str  # empty: a stock RQ worker runs it
    data: bytes | None  # None: larger than any request
    enqueued_at_ms: int
    deadline_at_ms: int
    run: int
    attempts: bytes
    pin: bytes
    raw_id: bytes = b""
    meant_at_ms: int = 0  # when the request was first made; a retry means the same order
    damaged: str = ""  # the field of ours in its hash that made no sense, and was taken away

    @property
    def key(self) -> str | bytes:
        """The id as Redis knows it: a stranger's need not be UTF-8."""
        return self.raw_id or self.id


@dataclass(frozen=True, slots=True)
class Claimed:
    """What a claim brought."""

    now_ms: int
    gate_until_ms: int  # 0: open
    suspended: bool
    grants: list[Grant]
    asked_at_s: float = field(default_factory=time.monotonic)  # no lease of these is older (monotonic)


class Begun(IntEnum):
    """What a stock worker finds when it begins a step."""

    FREE = 0
    SETTLED = 1  # this run has its outcome
    HELD = 2  # a worker of ours has the job in hand


@dataclass(frozen=True, slots=True)
class Settlement:
    """The end of one hold: an outcome, another try later, or the job handed back."""

    grant: Grant
    outcome: Outcome | None = None
    attempts: tuple[Attempt, ...] | None = None  # None: nothing was tried
    pin: str = ""
    delay_ms: int | None = None  # None without an outcome: handed back

    def words(self) -> list[Any]:
        """The row of settle.lua."""
        outcome, grant = self.outcome, self.grant
        if outcome is None:
            attempts = "" if self.attempts is None else encode_attempts(self.attempts)
            if self.delay_ms is None:
                return ["back", grant.key, grant.lease, attempts, self.pin, "", "", "", ""]
            return ["again", grant.key, grant.lease, attempts, self.pin, self.delay_ms, "", "", ""]
        failed = outcome.kind.failed
        by_deadline = outcome.kind in ("overdue", "gave_up", "unknown")
        said = f"{outcome.kind.value}: {outcome.error}".encode()
        # RQ keeps a failure's text compressed, a return value as its serializer writes it (rq.results.Result).
        result = b64encode(zlib.compress(said) if failed else b'"%s"' % outcome.kind.value.encode())
        return [
            "done",
            grant.key,
            grant.lease,
            outcome.encode(),
            "1" if failed else "0",
            result,
            grant.deadline_at_ms if by_deadline else "",
            encode_attempts(outcome.attempts) if by_deadline else "",
            self.pin,
        ]


class Script:
    """A script of `worker/scripts`, with the parts that all of them share."""

    def __init__(self, name: str) -> None:
        folder = files("worker").joinpath("scripts")
        self.source = folder.joinpath("common.lua").read_text("utf-8") + folder.joinpath(name).read_text("utf-8")
        self.sha = sha1(self.source.encode(), usedforsecurity=False).hexdigest()


_CLAIM = Script("claim.lua")
_SETTLE = Script("settle.lua")
_RENEW = Script("renew.lua")
_GATE = Script("gate.lua")
_KEY = Script("key.lua")
_BEGIN = Script("begin.lua")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Request(Generic[T]):
    """Commands for one round trip, the last of which calls ``script``, and what their answers mean.

    :meth:`Store.ask` makes the round trip in the caller's thread, :class:`worker.line.Line` in an event loop.
    """

    commands: tuple[Words, ...]
    script: Script
    read: Callable[[list[Any]], T]  # raises redis.RedisError: an answer was an error

    def anew(self) -> tuple[Words, Words]:
        """What is sent where the server did not have the script: the script, then its call alone."""
        return ("SCRIPT", "LOAD", self.script.source), self.commands[-1]


class Store:
    """One worker's view of one queue. Each method makes one round trip on a connection of the pool, in any thread; the
    requests that an event loop sends itself are made by that loop's thread alone."""

    def __init__(
        self,
        connection: redis.Redis,
        queue: str,
        worker: str,
        *,
        gate_scope: str,
        lease_ms: int,
        deadline_ms: int,
        outcome_ttl_s: int,
        ledger_maxlen: int,
    ) -> None:
        self.keys = keys = Keys(queue, RQ_KEY_PREFIX)
        self.clock = RedisClock()
        self._pool = connection.connection_pool
        self._gate = keys.gate(gate_scope)
        self._worker = worker
        self._lease_ms = lease_ms
        self._deadline_ms = deadline_ms
        self._claims = 0
        executions = f"{keys.worker_prefix}{worker}:executions"
        prefixes: Words = (keys.job_prefix, keys.execution_prefix, keys.executions_prefix, keys.order_prefix)
        prefixes = (*prefixes, keys.outcome_prefix)
        self._claim_keys: Words = (
            keys.waiting,
            keys.claiming,
            keys.leases,
            keys.scheduled,
            keys.started,
            keys.suspended,
        )
        self._claim_keys = (*self._claim_keys, self._gate, executions)
        self._claim_words = (*prefixes, keys.worker_prefix, worker)
        self._execution = f"{uuid4().hex[:12]}-"
        self._settle_keys: Words = (keys.waiting, keys.leases, keys.scheduled, keys.started, keys.finished, keys.failed)
        self._settle_keys = (*self._settle_keys, keys.outcomes, keys.worker_prefix + worker, executions)
        self._settle_words: Words = (*prefixes, keys.result_prefix, worker, outcome_ttl_s, ledger_maxlen)
        self._settle_words = (*self._settle_words, RESULT_TTL_S, FAILURE_TTL_S, deadline_ms)

    def claim(self, slots: int, *, wait: bool, take_lost: bool = True) -> Claimed:
        """Take up to ``slots`` jobs, waiting up to :data:`CLAIM_WAIT_S` for the first one if ``wait``.

        Raises:
            redis.RedisError: no answer; what was claimed unseen comes back when its lease runs out.
        """
        return self.ask(self.claim_request(slots, wait=wait, take_lost=take_lost))

    def claim_request(self, slots: int, *, wait: bool, take_lost: bool = True) -> Request[Claimed]:
        """See :meth:`claim`. It is to be sent at once: the server is told when the asker stops waiting."""
        number, self._claims = self._claims, self._claims + slots
        words: Words = (slots, self._lease_ms, self._deadline_ms, self._execution, number)
        gives_up_at_ms = self.clock.now_ms() + round(SOCKET_TIMEOUT_S * 1000) if self.clock.measured else 0
        words = (*self._claim_words, *words, MAX_PAYLOAD_BYTES, int(take_lost), POINTER_LIFE_S, gives_up_at_ms)
        script = _evalsha(_CLAIM, self._claim_keys, words)
        move = ("BLMOVE", self.keys.waiting, self.keys.claiming, "LEFT", "RIGHT", CLAIM_WAIT_S)
        return Request((move, script) if wait else (script,), _CLAIM, partial(self._claimed, time.monotonic()))

    def _claimed(self, asked_at_s: float, answers: list[Any]) -> Claimed:
        moved, answer = answers[0], answers[-1]
        _raise(answer)
        self.clock.observe(int(answer[0]), asked_at_s)
        grants = [_grant(row) for row in answer[3:]]
        if not grants:
            _raise(moved)  # a full server refuses the wait but not the claim: the next one must not follow at once
        return Claimed(int(answer[0]), int(answer[1]), answer[2] == 1, grants, asked_at_s)

    def settle(self, settlements: Sequence[Settlement]) -> list[int]:
        """Settle a group. For each: 0 if the lease was no longer ours, 1, or for another try its due time in ms.

        2 for an outcome means that it was not recorded: the deadline by which it was decided has moved meanwhile.
        -1: the keys of the job are damaged.

        Raises:
            redis.RedisError: no answer; calling again with the same rows does no harm.
        """
        return self.ask(self.settle_request(settlements))

    def settle_request(self, settlements: Sequence[Settlement]) -> Request[list[int]]:
        """See :meth:`settle`."""
        words = (word for settlement in settlements for word in settlement.words())
        script = _evalsha(_SETTLE, self._settle_keys, (*self._settle_words, *words))
        return Request((script,), _SETTLE, _settled)

    def ask(self, request: Request[T]) -> T:
        """Make the round trip of ``request``.

        Raises:
            redis.RedisError: no answer, or one that is an error.
        """
        answers = self.roundtrip(*request.commands)
        if isinstance(answers[-1], redis.exceptions.NoScriptError):
            answers[-1] = self.roundtrip(*request.anew())[1]
        return request.read(answers)

    def renew(self, held: Sequence[tuple[str | bytes, str]]) -> tuple[set[str], int | None, bool]:
        """Prolong the leases of ``held`` (id, lease); gives the lost ones, the gate's end if Redis has a record of
        one, and suspension."""
        words = (word for pair in held for word in pair)
        script = _evalsha(_RENEW, (self.keys.leases,), (self.keys.job_prefix, self._lease_ms, *words))
        look = (("HGET", self._gate, "until_ms"), ("EXISTS", self.keys.suspended))
        return self.ask(Request((*look, script), _RENEW, _renewed))

    def close_gate(self, pause_ms: int, reason: str, doubling: bool) -> int:
        """Close the shared gate for at least ``pause_ms``; gives its end, ms by Redis' clock.

        ``doubling``: twice as long as the last time, if that was within an hour.
        """
        script = _evalsha(_GATE, (self._gate,), (pause_ms, reason, self._worker, int(doubling)))
        return int(self.ask(Request((script,), _GATE, _first)))

    def key(self, account: str, what: str, word: str, failures: int, probe_every_ms: int) -> int:
        """See :class:`worker.key_breaker.KeyStore`."""
        keys = (self.keys.breaker(account), self.keys.held(account), self.keys.scheduled, self.keys.suspects)
        script = _evalsha(_KEY, keys, (what, failures, probe_every_ms, word, account))
        return int(self.ask(Request((script,), _KEY, _first)))

    def begin(self, job_id: str) -> tuple[Claimed, Begun]:
        """Note that a stock RQ worker runs one step of ``job_id``; gives it as a grant without its payload."""
        keys = self.keys
        script = _evalsha(
            _BEGIN,
            (keys.job_prefix + job_id, self._gate, keys.outcome_prefix + job_id, keys.leases),
            (job_id, self._deadline_ms, keys.order_prefix, POINTER_LIFE_S),
        )
        row = self.ask(Request((script,), _BEGIN, _first))
        self.clock.observe(int(row[0]))
        grant = Grant(
            job_id,
            "",
            b"",
            int(row[2]),
            int(row[3]),
            int(row[4]),
            row[5],
            row[6],
            meant_at_ms=int(row[9]),
            damaged=row[8].decode(),
        )
        return Claimed(int(row[0]), int(row[1]), False, [grant]), Begun(row[7])

    def recorded(self, job_id: str) -> bytes | None:
        """The outcome record of ``job_id``, if there is one."""
        record = self.roundtrip(("GET", self.keys.outcome_prefix + job_id))[0]
        _raise(record)
        return record  # type: ignore[no-any-return]

    def drained(self) -> bool:
        """Whether nothing is left to do: no job waits, is due later, or is in anybody's hand."""
        keys = self.keys
        counts = self.roundtrip(
            ("LLEN", keys.waiting), ("LLEN", keys.claiming), ("ZCARD", keys.scheduled), ("ZCARD", keys.leases)
        )
        _raise(*counts)
        return not any(counts)

    def roundtrip(self, *commands: Words) -> list[Any]:
        """Send commands in one write, read their answers; an error answer stands in its place.

        Raises:
            redis.ConnectionError, redis.TimeoutError: the connection broke; what ran is not known.
        """
        connection: Any = self._pool.get_connection()
        try:
            return _exchange(connection, commands)
        finally:
            self._pool.release(connection)

    def connect(self) -> Any:
        """A connection of the pool for :class:`worker.line.Line`, open and logged in.

        Raises:
            redis.RedisError: there is none to be had.
        """
        return self._pool.get_connection()

    def release(self, connection: Any) -> None:
        """Close one of those; the pool may open another in its place."""
        connection.disconnect()
        self._pool.release(connection)


def _first(answers: list[Any]) -> Any:
    _raise(answers[0])
    return answers[0]


def _renewed(answers: list[Any]) -> tuple[set[str], int | None, bool]:
    _raise(*answers)
    gate, suspended, lost = answers
    return {lease.decode() for lease in lost}, _whole(gate), suspended == 1


def _settled(answers: list[Any]) -> list[int]:
    return [int(row) for row in _first(answers)]


def _evalsha(script: Script, keys: Words, words: Words) -> Words:
    return ("EVALSHA", script.sha, len(keys), *keys, *words)


def _exchange(connection: Any, commands: Sequence[Words]) -> list[Any]:
    try:
        connection.send_packed_command(connection.pack_commands(commands))
        return [_answer(connection) for _ in commands]
    except BaseException:
        connection.disconnect()
        raise


def _answer(connection: Any) -> Any:
    try:
        return connection.read_response()
    except redis.ResponseError as error:
        return error


def _whole(word: bytes | None) -> int | None:
    """A whole number, or None where somebody wrote something else."""
    return int(word) if word is not None and word.isdigit() else None


def _raise(*answers: Any) -> None:
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer


def _grant(row: list[Any]) -> Grant:
    job_id, lease, data, enqueued_at, deadline_at, run, attempts, pin, damaged, meant_at = row
    return Grant(
        id=job_id.decode("utf-8", "replace"),
        lease=lease.decode(),
        data=data,
        enqueued_at_ms=int(enqueued_at),
        deadline_at_ms=int(deadline_at),
        run=int(run),
        attempts=attempts,
        pin=pin,
        raw_id=job_id,
        damaged=damaged.decode(),
        meant_at_ms=int(meant_at),
    )
