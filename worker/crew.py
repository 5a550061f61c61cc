"""Many requests in flight in one thread: an event loop claims, sends, reads the answers and settles.

Between a claim's answer and the DELETE stands nothing: the loop reads the one and writes the other. What no loop can
wait for (opening a connection, measuring a clock, telling Redis of a closed gate) is done by a few helper threads, and
the loop goes on with what comes of it. Settlements that come up together are written in one call (group commit), and
slots that are about to be free are claimed for beforehand.

Nothing here knows of signals or of RQ (:mod:`worker.runner`), nor of orders (:mod:`worker.cancel`).
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import redis

from worker import log
from worker.cancel import Ask, Canceller, Pursuit, Resync, Wish
from worker.exchange import Exchange
from worker.helpers import Helpers
from worker.line import Lines
from worker.rate_gate import Gate
from worker.sender import OPENERS, Sender
from worker.settler import Settler, where
from worker.store import CLAIM_WAIT_S, Claimed, Grant, Settlement, Store

T = TypeVar("T")

#: While the gate is closed or RQ suspended, the queue is looked at this often, s, without waiting at it.
_LOOK_S = 1.0
#: ... and the ramp behind a closed gate this often.
_RAMP_LOOK_S = 0.1
#: The part of a lease by which our own idea of its end stays behind Redis'.
_LEASE_MARGIN = 0.1
#: As many jobs are claimed ahead as were ended in this time, s: about so many slots will be free when the claim is
#: answered. None while nothing ends, so that no job lies here that another worker could send.
_AHEAD_S = 0.01
#: The part of all slots that is claimed ahead at the most.
_AHEAD_PART = 4
#: A job that was claimed ahead and found no slot for this long, s, is handed back.
_UNSTARTED_S = 0.1
#: ... or this long after that, s, if a claim was on its way then.
_LOOK_AGAIN_S = 0.01
#: Threads for what waits for Redis. Connecting to Redis, opening connections to the exchange and measuring its clock
#: have threads of their own, so that none of them ever waits behind another.
_ASIDES = 4


@dataclass(slots=True, eq=False)
class _Held:
    """A job in our hands."""

    grant: Grant
    good_until_s: float  # monotonic: the end of the lease as far as we know it
    given_at_s: float  # monotonic
    pursuit: Pursuit | None = None
    is_lost: bool = False
    is_settling: bool = False

    def lost(self) -> bool:
        # A process that was paused may wake up long after somebody else took the job, before it hears of that.
        return self.is_lost or time.monotonic() > self.good_until_s


class Crew:
    """``size`` requests in flight at the most. What has a leading underscore belongs to the loop's thread."""

    def __init__(
        self, size: int, lease_s: float, store: Store, canceller: Canceller, exchange: Exchange, gate: Gate
    ) -> None:
        self._size = size
        self._lease_s = lease_s
        self._store = store
        self._canceller = canceller
        self._exchange = exchange
        self._gate = gate
        self._thread = threading.Thread(target=self._live, name="cancel-loop", daemon=True)
        self._held: dict[str, _Held] = {}  # by lease: one job can come back while its last settlement is answered
        self._ready: deque[_Held] = deque()
        self._running = 0
        self._is_starting = False
        self._ended_at: deque[float] = deque(maxlen=max(size // _AHEAD_PART, 1))
        self._claiming = 0  # claims that are not answered yet
        self._is_leading = False  # a claim waits at the queue, or a look at it is due
        self._ramp_alarm: asyncio.TimerHandle | None = None
        self._unstarted_alarm: asyncio.TimerHandle | None = None
        self._retries: list[float] = []  # when they are due, monotonic
        self._retry_alarm: asyncio.TimerHandle | None = None
        self._is_due = False  # a retry fell due while all slots were taken
        self._suspended = False
        self._stopping = False
        self.outcomes = 0

    # -- from outside, in any thread --

    def start(self) -> None:
        """Take up the work."""
        self._loop = asyncio.SelectorEventLoop()
        self._loop.set_exception_handler(_report)
        self._asides = Helpers(_ASIDES, "cancel-aside")
        self._clock_helper = Helpers(1, "cancel-clock")
        connectors, openers = Helpers(2, "cancel-redis"), Helpers(OPENERS, "cancel-opener")
        self._lines = Lines(self._loop, self._store, partial(self._aside, connectors), self._redis_is_up)
        self._settler = Settler(self._loop, self._lines, self._store, self._told)
        self._sender = Sender(self._loop, self._exchange, partial(self._aside, openers))
        self._loop.call_soon(self._lines.open)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether its thread is; it never ends by itself."""
        return self._thread.is_alive()

    @property
    def refused(self) -> redis.AuthenticationError | None:
        """Why Redis does not let us in any more."""
        return self._lines.refused

    def held(self) -> list[tuple[str | bytes, str]]:
        """Id and lease of each job in our hands, for the renewal."""
        return [(held.grant.key, lease) for lease, held in list(self._held.items())]

    def renewed(self, asked_at_s: float, lost: set[str]) -> None:
        """Leases were prolonged at ``asked_at_s`` (monotonic), but for the ``lost`` ones: somebody else has those."""
        for lease, held in list(self._held.items()):
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
        return not self._held and not self._retries and not self._is_due

    def stop(self) -> None:
        """Claim nothing more; hand back at once what has not been started."""
        self._call(self._stop)

    def join(self, timeout_s: float) -> bool:
        """Wait for the requests in flight to be answered and settled; False if some were not in time.

        The loop ends with it.
        """
        ends_at = time.monotonic() + timeout_s
        while time.monotonic() < ends_at and (not self._stopping or self._held or self._claiming) and self.is_alive:
            time.sleep(0.01)
        done = not self._held
        self._call(self._loop.stop)
        self._thread.join(0.5)
        return done

    # -- the loop --

    def _live(self) -> None:
        self._loop.run_forever()
        self._lines.close()
        self._loop.close()

    def _call(self, what: Callable[..., object], *arguments: object) -> None:
        """Have something called in the loop, from any thread."""
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(what, *arguments)

    def _stop(self) -> None:
        self._stopping = True
        self._retries.clear()
        self._is_due = False
        self._hand_back_ready()

    def _aside(
        self, helpers: Helpers, work: Callable[[], T], then: Callable[[T | None, BaseException | None], None]
    ) -> None:
        """Do ``work`` in a thread that may wait, and go on with its result or its error in the loop."""

        def run() -> None:
            result, error = None, None
            try:
                result = work()
            except BaseException as raised:  # noqa: BLE001 - it is told in the loop
                error = raised
            self._call(then, result, error)

        try:
            helpers.run(run)
        except RuntimeError as error:
            self._loop.call_soon(then, None, error)

    # -- claiming --

    def _free(self) -> int:
        """Slots that a job can be started in."""
        return self._gate.ceiling(self._size, self._store.clock.now_ms()) - self._running

    def _room(self) -> int:
        """How many jobs may be claimed: as many as can be started or, when all slots are taken, as soon can be."""
        waiting = len(self._ready)
        if self._running < self._size:
            return self._free() - waiting
        ended, since_s = self._ended_at, time.monotonic() - _AHEAD_S
        while ended and ended[0] < since_s:
            ended.popleft()
        return min(len(ended), self._size // _AHEAD_PART) - waiting

    def _paused(self) -> bool:
        return self._suspended or self._gate.closed(self._store.clock.now_ms())

    def _redis_is_up(self) -> None:
        self._settler.flush()
        self._lead()

    def _lead(self) -> None:
        """See to it that a claim waits at the queue, if there is room for what comes."""
        if self._is_leading or self._stopping or not self._lines.are_up:
            return
        if self._lines.is_away and self._settler.busy:
            return  # after an outage outcomes go before claims
        if self._room() < 1:
            if self._running < self._size and self._ramp_alarm is None:  # a gate that has just opened makes room itself
                self._ramp_alarm = self._loop.call_later(_RAMP_LOOK_S, self._look_at_ramp)
            return
        self._is_leading = True
        if self._paused():
            self._loop.call_later(_LOOK_S, self._look)
        else:
            self._claim_at_queue()

    def _look_at_ramp(self) -> None:
        self._ramp_alarm = None
        self._start_ready()
        self._lead()

    def _look(self) -> None:
        """During a pause only overdue jobs are given. They need no request: the ramp after a pause is not for them."""
        self._is_leading = False
        if self._stopping or not self._lines.are_up:
            return
        self._is_leading = True
        if self._paused():
            self._claim(self._size - self._running - len(self._ready), is_leading=True, wait=False)
        else:
            self._claim_at_queue()

    def _claim_at_queue(self) -> None:
        # Ahead of a free slot only what is there already is taken: what is yet to come may find a worker that has one.
        self._claim(self._room(), is_leading=True, wait=self._running < self._size)

    def _claim(self, slots: int, *, is_leading: bool, wait: bool) -> None:
        request = self._store.claim_request(max(slots, 1), wait=wait, take_lost=self._lines.may_take_lost)
        ask = self._lines.ask_waiting if is_leading else self._lines.ask
        self._claiming += 1
        ask(request, partial(self._claim_answered, is_leading), partial(self._claim_failed, is_leading))

    def _claim_answered(self, is_leading: bool, claimed: Claimed) -> None:
        self._lines.worked()
        self._is_leading = self._is_leading and not is_leading
        try:
            self._claimed(claimed)
        finally:  # a defect must not leave the queue without anybody at it
            self._claiming -= 1
            if self._stopping:
                self._hand_back_ready()
            if claimed.grants or self._running < self._size:  # else whoever ends next leads
                self._lead()

    def _claim_failed(self, is_leading: bool, error: redis.RedisError) -> None:
        """What was claimed unheard comes back when its lease runs out."""
        self._claiming -= 1
        if self._stopping:
            self._hand_back_ready()
        self._is_leading = self._is_leading and not is_leading
        if self._lines.are_up:  # an answer; else there is a new claim when there is a connection again
            self._loop.call_later(self._lines.trouble(error), self._lead)

    def _claimed(self, claimed: Claimed) -> None:
        """Take what a claim brought into our hands."""
        self._suspended = claimed.suspended
        self._gate.observe(claimed.gate_until_ms)
        given_at_s, margin_s = time.monotonic(), _LEASE_MARGIN * self._lease_s
        # The server gave the leases within the wait before now, and what the answer's way took is a small part of them;
        # but a process that was paused at the queue reads of leases that have long been taken.
        if given_at_s - claimed.asked_at_s > CLAIM_WAIT_S + margin_s:
            given_at_s = claimed.asked_at_s
        new = [_Held(grant, given_at_s + self._lease_s - margin_s, given_at_s) for grant in claimed.grants]
        for held in new:
            self._held[held.grant.lease] = held
        self._ready.extend(new)
        self._start_ready()
        self._watch_unstarted()

    def _watch_unstarted(self) -> None:
        if self._ready and self._unstarted_alarm is None:
            due_s = self._ready[0].given_at_s + _UNSTARTED_S
            self._unstarted_alarm = self._loop.call_at(max(due_s, time.monotonic() + _LOOK_AGAIN_S), self._unstarted)

    def _unstarted(self) -> None:
        """Hand back what found no slot in time."""
        self._unstarted_alarm = None
        if self._ready and self._ready[0].given_at_s + _UNSTARTED_S <= time.monotonic():
            self._hand_back_ready()
        self._watch_unstarted()

    def _hand_back_ready(self) -> None:
        """Give back all that was not started: in its order, so together with what a claim on its way brings."""
        if not self._claiming:
            for held in self._ready:
                self._settle(held, Settlement(held.grant))
            self._ready.clear()

    # -- retries of ours: each starts on time, without a scheduler --

    def _retry_in(self, delay_ms: float) -> None:
        """A retry is due in so many ms; one ms more, so that Redis agrees that it is."""
        if not self._stopping:
            heapq.heappush(self._retries, time.monotonic() + max(delay_ms + 1, 0) / 1000)
            self._set_retry_alarm()

    def _set_retry_alarm(self) -> None:
        if self._retry_alarm is not None:
            self._retry_alarm.cancel()
        self._retry_alarm = self._loop.call_at(self._retries[0], self._claim_due) if self._retries else None

    def _claim_due(self) -> None:
        """Claim without waiting, beside the claim that waits at the queue."""
        now_s = time.monotonic()
        while self._retries and self._retries[0] <= now_s:
            heapq.heappop(self._retries)
        self._set_retry_alarm()
        # During a pause nobody claims; after it, and after an outage, whoever waits at the queue brings what is due.
        may_claim = not self._stopping and self._lines.can_ask
        self._is_due = may_claim and not self._gate.closed(self._store.clock.now_ms())
        self._claim_if_due()

    def _claim_if_due(self) -> None:
        if self._is_due and (free := self._free() - len(self._ready)) > 0:
            self._is_due = False
            self._claim(free, is_leading=False, wait=False)

    # -- pursuing --

    def _start_ready(self) -> None:
        """Start what is ready in the slots that are free. (A job that ends at once does not start the next one.)"""
        if self._is_starting or self._stopping:
            return
        self._is_starting = True
        try:
            while self._ready and self._free() > 0:
                held = self._ready.popleft()
                self._running += 1
                log.debug("claimed", id=held.grant.id, run=held.grant.run, lease=held.grant.lease)
                held.pursuit = self._canceller.pursue(held.grant, held)
                self._advance(held)
        finally:
            self._is_starting = False

    def _advance(self, held: _Held, came: object = None, error: BaseException | None = None) -> None:
        """Tell a pursuit what came of its last wish, and see to the next one."""
        pursuit = held.pursuit
        if pursuit is None:
            return  # it ended by a defect, and something of it was still under way
        try:
            self._fulfil(held, pursuit.send(came) if error is None else pursuit.throw(error))
        except StopIteration as ended:
            self._ended(held, ended.value)
        except Exception as defect:  # noqa: BLE001 - whatever it is, the loop lives
            # A defect is no answer: the lease brings the job back, and the attempt counts as unclear. What it says may
            # hold what must not be logged; where it stands may not.
            log.error("defect", id=held.grant.id, error=type(defect).__name__, where=where(defect))
            self._ended(held, None)

    def _fulfil(self, held: _Held, wish: Wish) -> None:
        if isinstance(wish, Ask):
            self._sender.send(wish, partial(self._may_go, held), partial(self._advance, held))
        elif isinstance(wish, Resync):
            self._aside(self._clock_helper, partial(self._canceller.resync, wish), partial(self._advance, held))
        else:
            self._aside(self._asides, wish, partial(self._advance, held))

    def _may_go(self, held: _Held) -> bool:
        return not held.lost() and not self._gate.closed(self._store.clock.now_ms())

    def _ended(self, held: _Held, settlement: Settlement | None) -> None:
        if held.pursuit is None:
            return  # a defect after its end
        self._running -= 1
        held.pursuit = None
        self._ended_at.append(time.monotonic())
        if settlement is None:
            self._held.pop(held.grant.lease, None)
        else:
            self._settle(held, settlement)
        self._start_ready()
        if self._is_due:
            self._claim_if_due()
        if not self._is_leading:
            self._loop.call_soon(self._lead)

    # -- settling --

    def _settle(self, held: _Held, settlement: Settlement) -> None:
        held.is_settling = True
        self._settler.add(settlement)

    def _told(self, settlement: Settlement, answer: int | None) -> None:
        self._held.pop(settlement.grant.lease, None)
        if answer is not None:
            self._tell(settlement, answer)
        if not self._is_leading:
            self._loop.call_soon(self._lead)

    def _tell(self, settlement: Settlement, answer: int) -> None:
        grant, outcome = settlement.grant, settlement.outcome
        if answer < 0:
            log.error("defect", id=grant.id, where="settle", error="its keys in Redis are damaged")
        elif answer == 0:
            log.warning("fenced", id=grant.id, kind=outcome.kind if outcome else None)
        elif outcome is None:
            if settlement.delay_ms is not None:
                self._retry_in(answer - self._store.clock.now_ms())
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


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:  # noqa: ARG001
    """A defect in a callback: the loop goes on."""
    error = context.get("exception")
    log.error("defect", where=where(error) if error else context.get("message"), error=type(error).__name__)
