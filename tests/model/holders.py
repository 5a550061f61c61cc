"""Holders whose every answer is told to the model: our workers' and a stock worker's view of the queue alike."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from tests.model.rules import Model
from worker.clock import local_ns
from worker.store import Beat, Claimed, Completed, Done, Lease, Release, Request, Row, Stamps, Store, is_alone

T = TypeVar("T")
QUEUE = "cancels"
DEADLINE_MS = 300_000
_OPTIONS: Mapping[str, Any] = {
    **{"gate_scope": "all", "deadline_ms": DEADLINE_MS},
    **{"outcome_ttl_s": 3600, "ledger_maxlen": 10_000_000},
}


class Witness(Protocol):
    """Who is told."""

    model: Model

    def now_ms(self) -> int:
        """Redis' time."""
        ...

    def note(self, job_id: str, text: str) -> None:
        """Keep what happened to a job."""
        ...

    def check(self) -> None:
        """Look at what stands in Redis."""
        ...


@dataclass(slots=True)
class Hand:
    """A lease in the hands of a holder of the driver's, and what its holder did with it."""

    store: WatchedStore
    lease: Lease
    is_dead: bool = False  # its holder died, or never heard of it
    sent: Row | None = None  # completed so, and to be repeated


class WatchedStore(Store):
    """A :class:`Store` that tells a witness what it was answered."""

    def __init__(self, witness: Witness, holder: str, lease_ms: int) -> None:
        super().__init__(QUEUE, holder, lease_ms=lease_ms, **_OPTIONS)
        self.holder = holder
        self.lease_ms = lease_ms
        self._witness = witness

    def claim(
        self,
        slots: int,
        *,
        wait: bool,
        bring_back: bool = True,
        take_lost: bool = True,
        look_closely: bool = False,
    ) -> Request[Claimed]:
        """See :meth:`Store.claim`."""
        request = super().claim(slots, wait=wait, bring_back=bring_back, take_lost=take_lost, look_closely=look_closely)
        return _watched(request, lambda claimed: self._claimed_up_to(slots, claimed))

    def claim_one(self, job_id: str) -> Request[Claimed]:
        """See :meth:`Store.claim_one`."""
        return _watched(super().claim_one(job_id), lambda claimed: self._claimed_the_one(job_id, claimed))

    def complete(self, rows: Sequence[Row]) -> Request[Completed]:
        """See :meth:`Store.complete`."""
        return _watched(super().complete(rows), lambda completed: self._completed_rows(rows, completed))

    def beat(self, held: Sequence[Lease], figures: Mapping[str, Any] | None, life_s: int) -> Request[Beat]:
        """See :meth:`Store.beat`."""
        asked_ms = self._witness.now_ms()
        return _watched(super().beat(held, figures, life_s), lambda beat: self._beaten_by(held, asked_ms, beat))

    def _claimed_up_to(self, slots: int, claimed: Claimed) -> None:
        if len(claimed.leases) > slots:
            raise self._witness.model.finding(4, claimed.leases[0].id, f"is given with more than {slots - 1} others")
        if len({lease.id for lease in claimed.leases}) < len(claimed.leases):
            raise self._witness.model.finding(4, claimed.leases[0].id, "is given in a claim that gives a job twice")
        is_paused = claimed.suspended or claimed.gate_until_ms > 0
        self._leased(claimed, is_paused=is_paused)

    def _claimed_the_one(self, job_id: str, claimed: Claimed) -> None:
        self._witness.note(job_id, f"{self.holder} asks for it: {claimed.why_not or 'given'}")
        self._leased(claimed, is_paused=claimed.gate_until_ms > 0)
        if not claimed.leases:
            self._witness.check()  # a failed job that RQ was told to run again has begun its run all the same

    def _leased(self, claimed: Claimed, *, is_paused: bool) -> None:
        for lease in claimed.leases:
            said = f"run {lease.run}, lease {lease.token}, attempts {lease.attempts.count(b'{')}, {lease.fault or 'ok'}"
            self._witness.note(lease.id, f"given to {self.holder} for {self.lease_ms} ms: {said}")
            if is_paused and claimed.now_ms < lease.deadline_at_ms and not lease.fault.startswith("recalled"):
                raise self._witness.model.finding(11, lease.id, "is given during a pause")
            if lease.until_ns > local_ns() + self.lease_ms * 1_000_000:
                raise self._witness.model.finding(4, lease.id, "is believed to be held for longer than it is")
            self._witness.model.leased(lease, claimed.now_ms, self.lease_ms)

    def _completed_rows(self, rows: Sequence[Row], completed: Completed) -> None:
        now_ms = self._witness.now_ms()
        for row, answer in zip(rows, completed.answers, strict=True):
            self._witness.note(row.lease.id, f"{self.holder} ends {row.lease.token} by {_what(row)} -> {answer}")
            self._witness.model.completed(row, answer, now_ms)
        if any(map(is_alone, rows)):
            self._witness.check()  # which jobs carry its requests stands in the record

    def _beaten_by(self, held: Sequence[Lease], asked_ms: int, beat: Beat) -> None:
        model = self._witness.model
        if held and beat.renewed_until_ns > local_ns() + self.lease_ms * 1_000_000:
            raise model.finding(4, held[0].id, "is believed to be renewed for longer than it is")
        if threading.current_thread() is not threading.main_thread():
            held = [lease for lease in held if lease.token not in beat.lost]  # losing is found by whoever takes it
        for lease in held:
            if lease.token in beat.lost:
                self._witness.note(lease.id, f"{self.holder} is told that {lease.token} is lost")
                model.not_renewed(lease.id, lease.token, self._witness.now_ms())
            else:
                model.renewed(lease.id, lease.token, asked_ms + self.lease_ms)


def _watched(request: Request[T], told: Callable[[T], None]) -> Request[T]:
    def read(answers: list[Any], stamps: Stamps) -> T:
        said = request.read(answers, stamps)
        told(said)
        return said

    return replace(request, read=read)


def _what(row: Row) -> str:
    if isinstance(row, Done):
        return f"done {row.outcome.kind.value}, {len(row.requests)} requests"
    if isinstance(row, Release):
        return f"release, attempts {'as they were' if row.attempts is None else len(row.attempts)}"
    return f"retry in {row.delay_ms} ms, attempts {len(row.attempts)}"
