"""Many requests in flight in one thread: an event loop claims, sends, reads the answers and settles.

Between a claim's answer and the DELETE stands nothing: the loop reads the one and writes the other. What no loop can
wait for (opening a connection, measuring a clock, telling Redis of a closed gate) is done by a few helper threads, and
the loop goes on with what comes of it. Settlements that come up together are written in one call (group commit), and
slots that are about to be free are claimed for beforehand.

Nothing here knows of signals or of RQ (:mod:`worker.runner`), nor of orders (:mod:`worker.canceller`).
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import redis

from worker import log
from worker.canceller import Ask, Canceller, Pursuit, Wish
from worker.exchange import Exchange, Pending
from worker.gate import Gate
from worker.line import Line
from worker.store import CLAIM_WAIT_S, Claimed, Grant, Settlement, Store
from worker.verdict import Failure, Reply

T = TypeVar("T")

#: While the gate is closed or RQ suspended, the queue is looked at this often, s, without waiting at it.
_LOOK_S = 1.0
#: ... and the ramp behind a closed gate this often.
_RAMP_LOOK_S = 0.1
#: First and longest wait while Redis is away, s; between them exponential with jitter.
_AWAY_FIRST_S, _AWAY_LONGEST_S = 0.05, 1.0
#: After Redis came back, others' expired leases are left alone this long, s: their holders settle first.
_SETTLE_FIRST_S = 2.0
#: What a server says of itself and not of a row; Redis 6.2 wraps it in an error of the script.
_SERVER_SAYS = re.compile(r"\b(OOM|READONLY|MISCONF|NOREPLICAS|MASTERDOWN)\b")
#: The part of a lease by which our own idea of its end stays behind Redis'.
_LEASE_MARGIN = 0.1
#: Connections opened at once at the most: a burst finds few open, and no exchange likes 64 handshakes in one moment.
_OPENERS = 8
#: Threads for everything else that waits.
_ASIDES = 8
#: As many jobs are claimed ahead as were ended in this time, s: about so many slots will be free when the claim is
#: answered. None while nothing ends, so that no job lies here that another worker could send.
_AHEAD_S = 0.01
#: The part of all slots that is claimed ahead at the most.
_AHEAD_PART = 4
#: A job that was claimed ahead and found no slot for this long, s, is handed back.
_UNSTARTED_S = 0.1
#: Most settlements of one call.
_GROUP = 256


@dataclass(slots=True, eq=False)
class _Held:
    """A job in our hands."""

    grant: Grant
    good_until_s: float  # monotonic: the end of the lease as far as we know it
    given_at_s: float  # monotonic
    pursuit: Pursuit | None = None
    pending: Pending | None = None  # the call that is being made
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
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._live, name="cancel-loop", daemon=True)
        self._helpers = ThreadPoolExecutor(_OPENERS + _ASIDES, thread_name_prefix="cancel-aside")
        self._held: dict[str, _Held] = {}  # by lease: one job can come back while its last settlement is answered
        self._ready: deque[_Held] = deque()
        self._running = 0
        self._starting = False
        self._ended_at: deque[float] = deque(maxlen=max(size // _AHEAD_PART, 1))
        self._unopened: deque[_Held] = deque()
        self._opening = 0
        self._sending_unopened = False
        self._heap: deque[Settlement] = deque()
        self._alone: deque[Settlement] = deque()  # of a group that could not be written as one
        self._writing: list[Settlement] = []
        self._flush_is_planned = False
        self._leading = False
        self._look_alarm: asyncio.TimerHandle | None = None
        self._ramp_alarm: asyncio.TimerHandle | None = None
        self._retries: list[float] = []  # when they are due, monotonic
        self._retry_alarm: asyncio.TimerHandle | None = None
        self._is_due = False  # a retry fell due while all slots were taken
        self._lines: tuple[Line, Line] | None = None
        self._waiting_line = 0  # of the two the one that waits, or waited last, at the queue
        self._away_attempts = 0
        self._redis_away = False
        self._redis_back_at = 0.0
        self._suspended = False
        self._stopping = False
        self._abandon = threading.Event()
        self.outcomes = 0
        self.refused: redis.AuthenticationError | None = None  # Redis does not know our password any more

    # -- from outside, in any thread --

    def start(self) -> None:
        """Take up the work."""
        self._loop = asyncio.SelectorEventLoop()
        self._loop.set_exception_handler(_report)
        self._loop.call_soon(self._reach_redis)
        self._thread.start()

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
        self._loop.call_soon_threadsafe(self._stop)

    def join(self, timeout_s: float) -> bool:
        """Wait for the requests in flight to be answered and settled; False if some were not in time.

        The loop ends with it.
        """
        ends_at = time.monotonic() + timeout_s
        while time.monotonic() < ends_at and (not self._stopping or self._held or self._leading):
            time.sleep(0.01)
        done = not self._held
        self._abandon.set()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._helpers.shutdown(wait=False, cancel_futures=True)
        self._thread.join(1)
        return done

    # -- the loop --

    def _live(self) -> None:
        self._loop.run_forever()
        self._part_with_lines()
        self._loop.close()

    def _stop(self) -> None:
        self._stopping = True
        self._retries.clear()
        self._is_due = False
        self._hand_back(self._ready)
        self._ready.clear()

    def _aside(self, work: Callable[[], T], then: Callable[[T | None, BaseException | None], None]) -> None:
        """Do ``work`` in a thread that may wait, and go on with its result or its error in the loop."""

        def ended(future: Future[T]) -> None:
            if not future.cancelled():
                error = future.exception()
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    self._loop.call_soon_threadsafe(then, None if error else future.result(), error)

        if not self._abandon.is_set():
            self._helpers.submit(work).add_done_callback(ended)

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

    def _lead(self) -> None:
        """See to it that a claim waits at the queue, if there is room for what comes."""
        if self._leading or self._stopping or self._lines is None:
            return
        if self._room() < 1:
            if self._running < self._size and self._ramp_alarm is None:  # a gate that has just opened makes room itself
                self._ramp_alarm = self._loop.call_later(_RAMP_LOOK_S, self._look_at_ramp)
            return
        self._leading = True
        if self._paused():
            self._look_alarm = self._loop.call_later(_LOOK_S, self._look)
        else:
            self._claim_at_queue()

    def _look_at_ramp(self) -> None:
        self._ramp_alarm = None
        self._start_ready()
        self._lead()

    def _look(self) -> None:
        """During a pause only overdue jobs are given. They need no request: the ramp after a pause is not for them."""
        self._look_alarm = None
        if self._stopping:
            self._leading = False
        elif self._paused():
            self._claim_leading(max(self._size - self._running - len(self._ready), 1), wait=False)
        else:
            self._claim_at_queue()

    def _claim_at_queue(self) -> None:
        # Ahead of a free slot only what is there already is taken: what is yet to come may find a worker that has one.
        self._claim_leading(max(self._room(), 1), wait=self._running < self._size)

    def _claim_leading(self, slots: int, *, wait: bool) -> None:
        # In turn, so that neither connection is ever idle for so long that the server closes it.
        self._waiting_line = 1 - self._waiting_line
        self._claim(self._waiting_line, slots, self._claimed_leading, wait=wait)

    def _claim(self, line: int, slots: int, then: Callable[[Claimed], None], *, wait: bool) -> None:
        take_lost = not self._redis_away and time.monotonic() >= self._redis_back_at
        request = self._store.claim_request(slots, wait=wait, take_lost=take_lost)
        if self._lines is not None:
            self._lines[line].ask(request, then, self._trouble)

    def _claimed_leading(self, claimed: Claimed) -> None:
        self._leading = False
        try:
            self._claimed(claimed)
        finally:  # a defect must not leave the queue without anybody at it
            if claimed.grants or self._running < self._size:  # else whoever ends next leads
                self._lead()

    def _claimed(self, claimed: Claimed) -> None:
        """Take what a claim brought into our hands."""
        self._back()
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
        if self._stopping:
            self._hand_back(new)
            return
        self._ready.extend(new)
        self._start_ready()
        if self._ready:
            self._loop.call_later(_UNSTARTED_S, self._hand_back_unstarted)

    def _hand_back_unstarted(self) -> None:
        since_s = time.monotonic() - _UNSTARTED_S
        unstarted = [held for held in self._ready if held.given_at_s < since_s and held.pursuit is None]
        for held in unstarted:
            self._ready.remove(held)
        self._hand_back(unstarted)

    def _hand_back(self, unstarted: Sequence[_Held] | deque[_Held]) -> None:
        for held in unstarted:
            self._settle(held, Settlement(held.grant))

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
        self._is_due = not (self._stopping or self._lines is None or self._gate.closed(self._store.clock.now_ms()))
        self._claim_if_due()

    def _claim_if_due(self) -> None:
        if self._is_due and (free := self._free() - len(self._ready)) > 0:
            self._is_due = False
            self._claim(1 - self._waiting_line, free, self._claimed, wait=False)

    # -- pursuing --

    def _start_ready(self) -> None:
        """Start what is ready in the slots that are free. (A job that ends at once does not start the next one.)"""
        if self._starting:
            return
        self._starting = True
        try:
            while self._ready and self._free() > 0:
                held = self._ready.popleft()
                self._running += 1
                log.debug("claimed", id=held.grant.id, run=held.grant.run, lease=held.grant.lease)
                held.pursuit = self._canceller.pursue(held.grant, held)
                self._advance(held)
        finally:
            self._starting = False

    def _advance(self, held: _Held, came: object = None, error: BaseException | None = None) -> None:
        """Tell a pursuit what came of its last wish, and see to the next one."""
        pursuit = held.pursuit
        assert pursuit is not None
        try:
            self._fulfil(held, pursuit.send(came) if error is None else pursuit.throw(error))
        except StopIteration as ended:
            self._ended(held, ended.value)
        except Exception as defect:  # noqa: BLE001 - whatever it is, the loop lives
            # A defect is no answer: the lease brings the job back, and the attempt counts as unclear. What it says may
            # hold what must not be logged; where it stands may not.
            log.error("defect", id=held.grant.id, error=type(defect).__name__, where=_where(defect))
            self._ended(held, None)

    def _fulfil(self, held: _Held, wish: Wish) -> None:
        if isinstance(wish, Ask):
            held.pending = self._exchange.prepare(wish.call, wish.credential, wish.ref)
            self._send(held, held.pending)
        else:
            self._aside(wish, partial(self._advance, held))

    def _ended(self, held: _Held, settlement: Settlement | None) -> None:
        if held.pursuit is None:
            return
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
        if not self._leading:
            self._loop.call_soon(self._lead)

    # -- calls to the exchange --

    def _send(self, held: _Held, pending: Pending) -> None:
        failure = pending.begin()
        if failure is not None:
            self._answered(held, failure)
        elif pending.sent:
            expiry = self._loop.call_at(pending.deadline_s, self._expire, held, pending)
            self._loop.add_reader(pending.fileno, self._receive, held, pending, expiry)
        elif self._opening < _OPENERS:
            self._open(held, pending)
        else:
            self._unopened.append(held)

    def _open(self, held: _Held, pending: Pending) -> None:
        self._opening += 1
        self._aside(pending.connect, partial(self._opened, held, pending))

    def _opened(self, held: _Held, pending: Pending, failure: Failure | None, error: BaseException | None) -> None:
        self._opening -= 1
        if error is not None:
            self._advance(held, error=error)
        elif failure is not None:
            self._answered(held, failure)
        elif held.lost() or self._gate.closed(self._store.clock.now_ms()):
            pending.drop()
            self._advance(held, None)
        else:
            self._send(held, pending)
        self._send_unopened()

    def _send_unopened(self) -> None:
        """A connection is free, or a place among those who open one. (A call that fails at once does not send the next
        one.)"""
        if self._sending_unopened:
            return
        self._sending_unopened = True
        try:
            while self._unopened:
                held = self._unopened.popleft()
                if held.pending is not None:
                    self._send(held, held.pending)
                if self._unopened and self._unopened[-1] is held:  # there is neither
                    self._unopened.rotate(1)
                    return
        finally:
            self._sending_unopened = False

    def _receive(self, held: _Held, pending: Pending, expiry: asyncio.TimerHandle) -> None:
        fileno = pending.fileno
        answer = pending.receive()
        if answer is not None:
            self._loop.remove_reader(fileno)
            expiry.cancel()
            self._answered(held, answer)

    def _expire(self, held: _Held, pending: Pending) -> None:
        self._loop.remove_reader(pending.fileno)
        self._answered(held, pending.expire())

    def _answered(self, held: _Held, answer: Reply | Failure) -> None:
        held.pending = None
        if self._unopened:
            self._send_unopened()  # first: who comes now shall not take the connection that fell free
        self._advance(held, answer)

    # -- settling --

    def _settle(self, held: _Held, settlement: Settlement) -> None:
        held.is_settling = True
        self._heap.append(settlement)
        self._plan_flush()

    def _plan_flush(self) -> None:
        if not self._flush_is_planned and not self._writing:
            self._flush_is_planned = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Write what is on the heap; what comes up meanwhile is written when that is answered."""
        self._flush_is_planned = False
        if self._writing or self._lines is None or not (self._heap or self._alone):
            return
        if self._alone:
            group = [self._alone.popleft()]
        else:
            group = [self._heap.popleft() for _ in range(min(len(self._heap), _GROUP))]
        try:
            request = self._store.settle_request(group)
        except Exception as error:  # noqa: BLE001 - what cannot be written at all must not hold up the others
            self._one_by_one(group, f"{type(error).__name__} in {_where(error)}")
            return
        self._writing = group
        # Never behind a claim that waits.
        self._lines[1 - self._waiting_line].ask(request, partial(self._settled, group), partial(self._refused, group))

    def _settled(self, group: list[Settlement], answers: list[int]) -> None:
        self._back()
        self._writing = []
        self._part_with(group)
        self._plan_flush()
        for settlement, answer in zip(group, answers, strict=True):
            self._tell(settlement, answer)

    def _refused(self, group: list[Settlement], error: redis.RedisError) -> None:
        said = str(error)
        if type(error) is redis.ResponseError and not _SERVER_SAYS.search(said):
            self._one_by_one(group, said)
        else:  # it is away, read-only, loading or out of memory
            self._trouble(error)

    def _one_by_one(self, group: list[Settlement], said: str) -> None:
        """One row must not hold up the others; its own job comes back when its lease runs out."""
        if len(group) > 1:
            self._alone.extend(group)
        else:
            log.error("defect", id=group[0].grant.id, where="settle", error=said)
            self._part_with(group)
        self._writing = []
        self._plan_flush()

    def _part_with(self, group: list[Settlement]) -> None:
        for settlement in group:
            self._held.pop(settlement.grant.lease, None)

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

    # -- Redis away --

    def _trouble(self, error: redis.RedisError) -> None:
        """A line broke, or the server refuses: open both anew, after a while. Outcomes are kept until they are written,
        and a repeat of a write that had worked changes nothing; what was claimed unheard comes back by its lease."""
        if self._lines is None:
            return
        self._part_with_lines()
        self._leading = False
        if self._look_alarm is not None:
            self._look_alarm.cancel()
        self._heap.extendleft(reversed(self._writing))
        self._writing = []
        self._wait_for_redis(error)

    def _wait_for_redis(self, error: BaseException) -> None:
        if isinstance(error, redis.AuthenticationError):
            self.refused = error
        if not self._redis_away:
            self._redis_away = True
            log.error("redis", state="away", error=type(error).__name__)
        longest_s = min(_AWAY_FIRST_S * 2 ** min(self._away_attempts, 10), _AWAY_LONGEST_S)
        self._away_attempts += 1
        self._loop.call_later(longest_s * (0.5 + random.random() / 2), self._reach_redis)

    def _reach_redis(self) -> None:
        self._aside(self._connect, self._connected)

    def _connect(self) -> list[Any]:
        opened: list[Any] = []
        try:
            opened.append(self._store.connect())
            opened.append(self._store.connect())
        except BaseException:
            for connection in opened:
                self._store.release(connection)
            raise
        return opened

    def _connected(self, opened: list[Any] | None, error: BaseException | None) -> None:
        if opened is None:
            self._wait_for_redis(error or redis.ConnectionError())
            return
        one, other = (Line(self._loop, connection, self._trouble) for connection in opened)
        self._lines = (one, other)
        self._flush()
        self._lead()

    def _part_with_lines(self) -> None:
        lines, self._lines = self._lines, None
        for line in lines or ():
            line.close()
            self._store.release(line.connection)

    def _back(self) -> None:
        self._away_attempts = 0
        if self._redis_away:
            self._redis_away = False
            self._redis_back_at = time.monotonic() + _SETTLE_FIRST_S
            log.info("redis", state="back")


def _where(error: BaseException) -> str:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}" if frame is not None else "?"


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:  # noqa: ARG001
    """A defect in a callback: the loop goes on."""
    error = context.get("exception")
    log.error("defect", where=_where(error) if error else context.get("message"), error=type(error).__name__)
