"""Holders of jobs, played by tests: a Store on a connection of its own, one request after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import redis
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer

from producer import CancelClient, CancelRequest, Ticket
from producer.keys import Band
from producer.message import Attempt, Call, Outcome, OutcomeKind
from tests.servers import Peek
from worker.redis_link import BlockingLink
from worker.store import Beat, Claimed, Completed, Done, Lease, Release, Request, Retry, Row, Store

T = TypeVar("T")

#: A lease that runs out at once, ms: its holder is as good as dead.
DEAD = 1
DEADLINE_MS = 300_000
#: A job that waits for so long while the queue is empty stands in no list, ms; and while it is not empty.
OVERLOOKED_MS, OVERLOOKED_BUSY_MS = 5_000, 30_000
#: Fields of ours that hold a whole number.
NUMBERS = (
    *("c_enqueued_at_ms", "c_asked_at_ms", "c_deadline_at_ms", "c_run", "c_open_at_ms", "c_meant_at_ms"),
    "c_due_at_ms",
)


class Holder:
    """One holder's view of the queue `cancels`; ``options`` are those of the Store."""

    def __init__(self, port: int, name: str = "w", *, lease_ms: int = 60_000, **options: Any) -> None:
        self.name = name
        # As patient as no worker is: what these tests say must not hang on how busy the machine is.
        self.connection = redis.Redis(port=port, socket_timeout=30, protocol=2, **options.pop("connection", {}))
        given = {"gate_scope": "all", "deadline_ms": DEADLINE_MS, "outcome_ttl_s": 3600, "ledger_maxlen": 20_000}
        self.store = Store("cancels", name, lease_ms=lease_ms, **{**given, **options})
        self._link = BlockingLink(self.connection)

    def ask(self, request: Request[T]) -> T:
        """One round trip."""
        return self._link.ask_now(request)

    def claimed(
        self, slots: int = 10, *, wait: bool = False, take_lost: bool = True, look_closely: bool = False
    ) -> Claimed:
        """What one claim brings."""
        return self.ask(self.store.claim(slots, wait=wait, take_lost=take_lost, look_closely=look_closely))

    def claim(self, slots: int = 10, **options: bool) -> list[Lease]:
        """The leases alone."""
        return self.claimed(slots, **options).leases

    def claim_one(self, job_id: str) -> Claimed:
        """What a stock RQ worker is told that has popped this job."""
        return self.ask(self.store.claim_one(job_id))

    def completed(self, rows: Sequence[Row]) -> Completed:
        """What one completion comes to."""
        return self.ask(self.store.complete(rows))

    def complete(self, *rows: Row) -> list[int]:
        """The answers alone."""
        return self.completed(rows).answers

    def beat(self, *leases: Lease) -> Beat:
        """Prolong leases."""
        return self.ask(self.store.beat(leases, None, 60))

    def close_gate(self, pause_ms: int, reason: str = "429", doubling: bool = False) -> int:
        """Close the gate."""
        return self.ask(self.store.close_gate(pause_ms, reason, doubling))

    def is_drained(self) -> bool:
        """Whether nothing is left to do."""
        return self.ask(self.store.is_drained())

    def close(self) -> None:
        """Part with the server."""
        self.connection.connection_pool.disconnect()


class OpenHolder(Protocol):
    """Makes holders, each another one."""

    def __call__(self, name: str = "w", *, lease_ms: int = 60_000, **options: Any) -> Holder: ...


def tried(n: int, verdict: str = "unclear") -> Attempt:
    """An attempt as a worker notes it."""
    return Attempt(n, 1_700_000_000_000 + n, Call.CANCEL, 503, -1000, "said “so”", verdict, 7)


def ended(lease: Lease, kind: OutcomeKind = OutcomeKind.CANCELLED, *, worker: str = "w", **known: Any) -> Done:
    """The end of a job."""
    pin = known.pop("pin", "")
    return Done(lease, Outcome(lease.id, lease.run, kind, finished_at_ms=1, worker=worker, error="why", **known), pin)


def later(lease: Lease, delay_ms: int = 50_000, *attempts: Attempt, pin: str = "") -> Retry:
    """Another try."""
    return Retry(lease, attempts, delay_ms, pin)


def back(lease: Lease) -> Release:
    """A job that goes back untried."""
    return Release(lease)


def ids(leases: Sequence[Lease]) -> list[str]:
    """Their jobs' ids, in order."""
    return [lease.id for lease in leases]


def orders(client: CancelClient, count: int, first: int = 1, **options: Any) -> list[Ticket]:
    """Enqueue cancels of so many orders."""
    return client.cancel_many([CancelRequest(algo_id=first + i, **options) for i in range(count)])


def age(peek: Peek, by_ms: int) -> None:
    """Have all waiting jobs wait for so much longer, as the index has it."""
    waiting = peek("ZRANGEBYSCORE", peek.keys.unfinished, int(Band.WAITING), f"({int(Band.RETRY)}")
    for job_id in waiting:
        peek("ZINCRBY", peek.keys.unfinished, -by_ms, job_id)


def band(peek: Peek, job_id: str) -> Band | None:
    """How the index knows a job; None: not at all."""
    score = peek("ZSCORE", peek.keys.unfinished, job_id)
    return None if score is None else max(each for each in Band if each <= float(score))


def requeue(connection: redis.Redis, job_id: str) -> None:
    """Put a failed job back as RQ's users do."""
    FailedJobRegistry("cancels", connection=connection, serializer=JSONSerializer).requeue(job_id)


#: Every type of key that can stand where another one should.
SPOILED: dict[str, Callable[[redis.Redis, str], object]] = {
    "string": lambda connection, key: connection.set(key, "x"),
    "list": lambda connection, key: connection.rpush(key, "x"),
    "hash": lambda connection, key: connection.hset(key, "x", "y"),
    "set": lambda connection, key: connection.sadd(key, "x"),
    "sorted set": lambda connection, key: connection.zadd(key, {"x": 1}),
    "stream": lambda connection, key: connection.xadd(key, {"x": "y"}),
}
