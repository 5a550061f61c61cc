"""Many requests in flight on threads: one waits at the queue, the others send, and whoever is free settles.

Leader and followers. The thread that claimed a job sends it itself, and another takes its place at the queue once the
bytes are on the wire: no hand-over stands between the claim and the DELETE. Finished threads leave their settlement in
a common heap; one of them writes the whole heap in one call while the others go on (group commit).

Nothing here knows of signals or of RQ (:mod:`worker.runner`), nor of orders (:mod:`worker.canceller`).
"""

from __future__ import annotations

import heapq
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import redis

from worker import log
from worker.canceller import Canceller
from worker.gate import Gate
from worker.store import CLAIM_WAIT_S, Claimed, Grant, Settlement, Store

#: While the gate is closed or RQ suspended, the queue is looked at this often, s, without waiting at it.
_LOOK_S = 1.0
#: First and longest wait while Redis is away, s; between them exponential with full jitter.
_AWAY_FIRST_S, _AWAY_LONGEST_S = 0.05, 1.0
#: After Redis came back, others' expired leases are left alone this long, s: their holders settle first.
_SETTLE_FIRST_S = 2.0
#: What a server says of itself and not of a row; Redis 6.2 wraps it in an error of the script.
_SERVER_SAYS = re.compile(r"\b(OOM|READONLY|MISCONF|NOREPLICAS|MASTERDOWN)\b")
#: The part of a lease by which our own idea of its end stays behind Redis'.
_LEASE_MARGIN = 0.1


@dataclass(slots=True)
class _Held:
    """A job in our hands; what its sender asks of it."""

    grant: Grant
    crew: Crew
    good_until_s: float  # monotonic: the end of the lease as far as we know it
    is_lost: bool = False
    is_settling: bool = False

    def lost(self) -> bool:
        # A process that was paused may wake up long after somebody else took the job, before it hears of that.
        return self.is_lost or time.monotonic() > self.good_until_s

    def sent(self) -> None:
        self.crew.promote()


class Crew:
    """``size`` requests in flight at the most, on at most two threads more than that."""

    def __init__(self, size: int, lease_s: float, store: Store, canceller: Canceller, gate: Gate) -> None:
        self._size = size
        self._lease_s = lease_s
        self._store = store
        self._canceller = canceller
        self._gate = gate
        self._turn = threading.Condition()
        self._ready: deque[_Held] = deque()
        self._held: dict[str, _Held] = {}  # by lease: one job can come back while its last settlement is answered
        self._running = 0
        self._idle = 0
        self._threads: list[threading.Thread] = []
        self._leading = False
        self._is_due = False  # a retry fell due while all slots were taken
        self._stopping = False
        self._suspended = False
        self._heap: deque[Settlement] = deque()
        self._settling = threading.Lock()
        self._abandon = threading.Event()
        self._retries = _Retries(self._claim_due)
        self._redis_back_at = 0.0
        self._redis_away = False
        self.outcomes = 0
        self.refused: redis.AuthenticationError | None = None  # Redis does not know our password any more

    # -- from outside --

    def start(self) -> None:
        """Take up the work."""
        self._retries.start()
        with self._turn:
            self._hire()

    def held(self) -> list[tuple[str | bytes, str]]:
        """Id and lease of each job in our hands, for the renewal."""
        with self._turn:
            return [(held.grant.key, lease) for lease, held in self._held.items()]

    def renewed(self, asked_at_s: float, lost: set[str]) -> None:
        """Leases were prolonged at ``asked_at_s`` (monotonic), but for the ``lost`` ones: somebody else has those."""
        with self._turn:
            for lease, held in self._held.items():
                if lease not in lost:
                    held.good_until_s = max(held.good_until_s, asked_at_s + self._lease_s)
                elif not held.is_settling and not held.is_lost:  # else it may have been settled just now
                    held.is_lost = True
                    log.warning("lease_lost", id=held.grant.id)

    def in_flight(self) -> int:
        """Jobs in our hands."""
        return len(self._held)

    def working_on(self) -> int:
        """Jobs that were not answered yet: those in our hands but for the ones that are being settled."""
        return self._running + len(self._ready)

    def suspend(self, suspended: bool) -> None:
        """What the last look at Redis said of `rq suspend`."""
        self._suspended = suspended

    def idle(self) -> bool:
        """Whether nothing is in our hands and no retry of ours is due later."""
        with self._turn:
            return not self._held and not self._heap and not self._retries

    def stop(self) -> None:
        """Claim nothing more; hand back at once what has not been started."""
        with self._turn:
            self._stopping = True
            unstarted, self._ready = list(self._ready), deque()
            self._turn.notify_all()
        self._retries.stop()
        self._heap.extend(Settlement(held.grant) for held in unstarted)
        # Not in this thread: while Redis is away it would wait for it longer than the grace.
        threading.Thread(target=self._drain, name="cancel-handback", daemon=True).start()

    def join(self, timeout_s: float) -> bool:
        """Wait for the requests in flight to be answered and settled; False if some were not in time."""
        ends_at = time.monotonic() + timeout_s
        while time.monotonic() < ends_at:
            with self._turn:
                if not self._held and not self._heap and not self._leading:
                    break
            time.sleep(0.01)
        done = not self._held
        self._abandon.set()
        return done

    # -- the threads --

    def _hire(self) -> None:
        """One more thread (the caller holds the turn). They are made when first needed: most queues are quiet."""
        thread = threading.Thread(target=self._live, name=f"cancel-{len(self._threads)}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _wake(self, wanted: int) -> None:
        """Get ``wanted`` threads going (the caller holds the turn)."""
        at_hand = min(wanted, self._idle)
        if at_hand:
            self._turn.notify(at_hand)
        for _ in range(min(wanted - at_hand, self._size + 1 - len(self._threads))):
            self._hire()

    def promote(self) -> None:
        """Let another thread take the place at the queue, if it is empty."""
        if self._leading:  # looked at again under the lock; a glance is enough for most requests of a burst
            return
        with self._turn:
            if not self._leading and not self._stopping and self._free() > 0:
                self._wake(1)

    def _free(self) -> int:
        ceiling = self._gate.ceiling(self._size, self._store.clock.now_ms())
        return ceiling - self._running - len(self._ready)

    def _live(self) -> None:
        while (held := self._next()) is not None:
            settlement = None
            log.debug("claimed", id=held.grant.id, run=held.grant.run, lease=held.grant.lease)
            try:
                settlement = self._canceller.work(held.grant, held)
            except Exception as error:  # noqa: BLE001 - whatever it is, the thread lives
                # A defect is no answer: the lease brings the job back, and the attempt counts as unclear. What it says
                # may hold what must not be logged; where it stands may not.
                log.error("defect", id=held.grant.id, error=type(error).__name__, where=_where(error))
            with self._turn:
                self._running -= 1
                held.is_settling = True
                if settlement is None:
                    self._held.pop(held.grant.lease, None)
            if settlement is not None:
                self._settle(settlement)

    def _next(self) -> _Held | None:
        """The next job for this thread, from those claimed or from the queue; None when it is time to go."""
        while True:
            with self._turn:
                while not (self._ready and self._running < self._size):
                    if self._stopping:
                        return None
                    if self._free() > 0 and (self._is_due or not self._leading):
                        due, self._is_due = self._is_due, False
                        self._leading = self._leading or not due
                        break
                    self._idle += 1
                    self._turn.wait()
                    self._idle -= 1
                else:
                    self._running += 1
                    return self._ready.popleft()
            claimed = self._guarded(self._claim_at_once if due else self._lead)
            with self._turn:
                self._leading = self._leading and due
                self._accept(claimed)
                # One job: this thread sends it, and the next leader is called when its bytes are out (see `promote`).
                if len(self._ready) > 1:
                    self._wake(len(self._ready))

    def _lead(self) -> Claimed | None:
        """Wait at the queue, for a second at the most."""
        if self._paused():
            self._abandon.wait(_LOOK_S)
        if self._stopping:
            return None
        pause = self._paused()
        # During a pause only overdue jobs are given. They need no request: the ramp after a pause is not for them.
        slots = self._size - self._running - len(self._ready) if pause else self._free()
        return self._claim(max(slots, 1), wait=not pause)

    def _paused(self) -> bool:
        return self._suspended or self._gate.closed(self._store.clock.now_ms())

    def _claim_at_once(self) -> Claimed | None:
        return self._claim(max(self._free(), 1), wait=False)

    def _claim(self, slots: int, *, wait: bool) -> Claimed | None:
        try:
            take_lost = not self._redis_away and time.monotonic() >= self._redis_back_at
            claimed = self._store.claim(slots, wait=wait, take_lost=take_lost)
        except redis.RedisError as error:
            self._away(error)
            return None
        self._back()
        self._suspended = claimed.suspended
        self._gate.observe(claimed.gate_until_ms)
        return claimed

    def _guarded(self, claim: Callable[[], Claimed | None]) -> Claimed | None:
        """A defect in claiming must not leave the queue without anybody at it."""
        try:
            return claim()
        except Exception as error:  # noqa: BLE001 - as above
            log.error("defect", where=_where(error), error=type(error).__name__)
            self._abandon.wait(_LOOK_S)
            return None

    def _accept(self, claimed: Claimed | None) -> None:
        """Take what a claim brought into our hands (the caller holds the turn)."""
        if claimed is None:
            return
        grants, given_at_s, margin_s = claimed.grants, time.monotonic(), _LEASE_MARGIN * self._lease_s
        # The server gave the leases within the wait before now, and what the answer's way took is a small part of them;
        # but a process that was paused at the queue reads of leases that have long been taken.
        if given_at_s - claimed.asked_at_s > CLAIM_WAIT_S + margin_s:
            given_at_s = claimed.asked_at_s
        good_until_s = given_at_s + self._lease_s - margin_s
        for grant in grants:
            self._held[grant.lease] = held = _Held(grant, self, good_until_s)
            if self._stopping:
                self._heap.append(Settlement(grant))
            else:
                self._ready.append(held)
        if grants and self._stopping:
            threading.Thread(target=self._drain, name="cancel-handback", daemon=True).start()

    def _claim_due(self) -> None:
        """A retry of ours is due: claim without waiting, beside the thread that waits at the queue."""
        with self._turn:
            free = self._free()
            if self._stopping or self._gate.closed(self._store.clock.now_ms()):
                return  # after the pause whoever leads claims it
            self._is_due = free < 1
            if self._is_due:
                return  # whoever is free next claims it
        claimed = self._guarded(self._claim_at_once)
        with self._turn:
            self._accept(claimed)
            self._wake(len(self._ready))

    # -- settling --

    def _settle(self, settlement: Settlement) -> None:
        self._heap.append(settlement)
        self._drain()

    def _drain(self) -> None:
        """Write the heap, unless another thread is at it already; that one then writes ours too."""
        while self._heap and not self._abandon.is_set() and self._settling.acquire(blocking=False):
            try:
                group = [self._heap.popleft() for _ in range(min(len(self._heap), 256))]
                if group:
                    self._write(group)
            finally:
                self._settling.release()

    def _write(self, group: list[Settlement]) -> None:
        answers = self._answers(group)
        with self._turn:
            if not self._abandon.is_set():
                for settlement in group:
                    self._held.pop(settlement.grant.lease, None)
        for settlement, answer in zip(group, answers, strict=True):
            self._tell(settlement, answer)

    def _answers(self, group: list[Settlement]) -> list[int | None]:
        attempt = 0
        while not self._abandon.is_set():
            try:
                return list(self._store.settle(group))
            except redis.RedisError as error:
                if type(error) is redis.ResponseError and not _SERVER_SAYS.search(
                    str(error)
                ):  # not for being away, read-only, loading or out of memory
                    return self._one_by_one(group, str(error))
                # The outcomes are kept until they are written; a repeat of a write that had worked changes nothing.
                self._away(error, attempt)
                attempt += 1
            except Exception as error:  # noqa: BLE001 - nor may what cannot be written at all
                return self._one_by_one(group, f"{type(error).__name__} in {_where(error)}")
        return [None] * len(group)

    def _one_by_one(self, group: list[Settlement], said: str) -> list[int | None]:
        """One row must not hold up the others; its own job comes back when its lease runs out."""
        if len(group) > 1:
            return [answer for settlement in group for answer in self._answers([settlement])]
        log.error("defect", id=group[0].grant.id, where="settle", error=said)
        return [None]

    def _tell(self, settlement: Settlement, answer: int | None) -> None:
        grant, outcome = settlement.grant, settlement.outcome
        if answer is None:
            return
        if answer < 0:
            log.error("defect", id=grant.id, where="settle", error="its keys in Redis are damaged")
        elif answer == 0:
            log.warning("fenced", id=grant.id, kind=outcome.kind if outcome else None)
        elif outcome is None:
            if settlement.delay_ms is not None:
                self._retries.add(answer - self._store.clock.now_ms())
        elif answer == 2:
            log.info("deadline_moved", id=grant.id, kind=outcome.kind)
        else:
            self.outcomes += 1
            first_ms = outcome.attempts[0].at_ms - grant.enqueued_at_ms if outcome.attempts else None
            log.info(
                "outcome",
                id=outcome.id,
                kind=outcome.kind,
                account=outcome.account,
                algo_id=outcome.algo_id,
                client_algo_id=outcome.client_algo_id,
                attempts=len(outcome.attempts),
                error=outcome.error,
                **{
                    "measure#cancel.first_ms": first_ms,
                    "measure#cancel.outcome_ms": outcome.finished_at_ms - grant.enqueued_at_ms,
                    "count#cancel.outcomes": 1,
                },
            )

    # -- Redis away --

    def _away(self, error: redis.RedisError, attempt: int = 3) -> None:
        if isinstance(error, redis.AuthenticationError):
            self.refused = error
        if not self._redis_away:
            self._redis_away = True
            log.error("redis", state="away", error=type(error).__name__)
        longest_s = min(_AWAY_FIRST_S * 2 ** min(attempt, 10), _AWAY_LONGEST_S)
        self._abandon.wait(longest_s * (0.5 + random.random() / 2))

    def _back(self) -> None:
        if self._redis_away:
            self._redis_away = False
            self._redis_back_at = time.monotonic() + _SETTLE_FIRST_S
            log.info("redis", state="back")


def _where(error: BaseException) -> str:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}" if frame is not None else "?"


class _Retries:
    """When our own retries are due, so that each starts on time without a scheduler."""

    def __init__(self, claim: Callable[[], None]) -> None:
        self._claim = claim
        self._due: list[float] = []
        self._changed = threading.Condition()
        self._stopping = False

    def __bool__(self) -> bool:
        return bool(self._due)

    def start(self) -> None:
        threading.Thread(target=self._live, name="cancel-retries", daemon=True).start()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._due.clear()
            self._changed.notify()

    def add(self, in_ms: float) -> None:
        """A retry is due in so many ms; one ms more, so that Redis agrees that it is."""
        due_at = time.monotonic() + max(in_ms + 1, 0) / 1000
        with self._changed:
            if not self._stopping:
                heapq.heappush(self._due, due_at)
                if self._due[0] == due_at:
                    self._changed.notify()

    def _live(self) -> None:
        while True:
            with self._changed:
                while not self._due or self._due[0] > time.monotonic():
                    if self._stopping:
                        return
                    self._changed.wait(self._due[0] - time.monotonic() if self._due else None)
                now = time.monotonic()
                while self._due and self._due[0] <= now:
                    heapq.heappop(self._due)
            self._claim()
