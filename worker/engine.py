"""The worker's event loop: claims jobs, carries each in a task of its own, completes together what ends together.

Nothing here knows of signals or of RQ (:mod:`worker.runner`), nor of orders (:mod:`worker.cancel`).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import redis

from producer.redis_url import passes, why
from worker import log
from worker.cancel import Canceller
from worker.clock import SleepWatch, local_ns
from worker.daemon import wait_for
from worker.hold import Held, Trust
from worker.redis_link import AsyncLink, Outage, is_about_rows
from worker.store import Claimed, Done, Release, Retry, Row, Store, is_alone

__all__ = ["Engine", "tell_damaged", "tell_outcome"]

_NS_PER_S = 1_000_000_000
#: While the gate is closed or RQ suspended, the queue is looked at this often, s, without waiting at it; a queue that
#: is never empty is looked at as often for jobs that stand in no list.
_LOOK_S = 1.0
#: Others' retries, and the jobs of the dead, are looked for this often, s, at the most.
_BRING_BACK_S = 0.1
#: ... and the ramp behind a closed gate this often.
_RAMP_LOOK_S = 0.1
#: As many jobs are claimed ahead as were ended in this time, s: about so many slots will be free when the claim is
#: answered. None while nothing ends, so that no job lies here that another worker could send.
_AHEAD_S = 0.01
#: The part of all slots that is claimed ahead at the most.
_AHEAD_PART = 4
#: A job that was claimed ahead and found no slot for this long, s, is handed back.
_UNSTARTED_S = 0.1
#: Most rows of one completion.
_GROUP = 256
#: Two completions are so far apart at the least, s: what ends meanwhile shares one, and a busy Redis has less to do.
_APART_S = 0.002
#: First and longest wait while Redis is away, s; between them exponential with jitter.
_AWAY_FIRST_S, _AWAY_LONGEST_S = 0.05, 1.0
#: After Redis came back, or its clock stepped, others' expired leases are left alone this long, s: their holders
#: complete first.
_COMPLETE_FIRST_S = 2.0


class Engine:
    """``size`` requests in flight at the most. ``lease_s`` is how long a lease lasts, ``life_s`` how long RQ believes
    in a worker without a beat. Belongs to the loop that runs it."""

    def __init__(
        self,
        size: int,
        store: Store,
        links: tuple[AsyncLink, AsyncLink],
        canceller: Canceller,
        *,
        lease_s: float,
        life_s: int,
        sleep: SleepWatch | None = None,
    ) -> None:
        self._size, self._lease_s, self._life_s = size, lease_s, life_s
        self._store, self.canceller, self._gate = store, canceller, canceller.gate
        self._claims, self.rest = links  # one for the claim that waits at the queue, one for all else
        self._trust = Trust(store.clock, sleep)
        self._held: dict[str, Held] = {}  # by token: a job can come back while its last completion is answered
        self._ready: deque[Held] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._running = 0
        self._ended_at_ns: deque[int] = deque(maxlen=max(size // _AHEAD_PART, 1))
        self._claims_out = 0
        self._retries = 0  # that are due later
        self._brought_back_ns = self._looked_closely_ns = 0
        self._renewed_ns = self._asked_whose_ns = 0
        self._renewing = asyncio.Lock()
        self._outbox: deque[Row] = deque()
        self._room_changed, self._due, self._to_complete = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._let_go, self._stopping = asyncio.Event(), asyncio.Event()
        self._is_full = False
        self._outage = Outage()
        self._troubles, self._back_ns = 0, 0
        self.refused: redis.AuthenticationError | None = None  # Redis does not know our password any more
        self.failed = self.finished = 0  # outcomes of each sort
        self.working_s = 0.0  # from claim to outcome, added up over all jobs

    # -- for the runner --

    @property
    def in_hand(self) -> int:
        """Jobs in our hands."""
        return len(self._held)

    @property
    def working_on(self) -> int:
        """Jobs that were not answered yet: those in our hands but for the ones that are being completed."""
        return self._running + len(self._ready)

    @property
    def outcomes(self) -> int:
        """Outcomes recorded."""
        return self.failed + self.finished

    def is_idle(self) -> bool:
        """Whether nothing is in our hands and no retry of ours is due later."""
        return not self._held and not self._retries and not self._due.is_set()

    def stop(self) -> None:
        """Claim nothing more; hand back at once what has not been started."""
        self._stopping.set()
        self._room_changed.set()
        self.canceller.leave()
        self._hand_back_ready()

    async def run(self) -> None:
        """Work until told to stop and everything in hand is completed.

        To be cancelled when that takes too long: the leases bring back what is left.
        """
        steps = (self._complete, self._claim_due, self._wake)
        helpers = [asyncio.create_task(self._for_ever(step, lambda: False)) for step in steps]
        try:
            await self._for_ever(self._claim_next, self._stopping.is_set)
            self._hand_back_ready()
            while self._held or self._claims_out:
                self._let_go.clear()
                await self._let_go.wait()
        finally:
            for task in (*helpers, *self._tasks):
                task.cancel()
            for link in (self._claims, self.rest):
                await link.close()

    async def beat(self, figures: Mapping[str, Any] | None) -> bool:
        """Renew the leases of all jobs in hand when that is due, tell RQ that we live, learn of gate and suspension.

        Gives whether RQ does not know this worker (any more).

        Raises:
            redis.RedisError: no answer.
        """
        since_ns, asked_ns = self._trust.since_ns(), local_ns()
        # Not at each beat: what is renewed all the time is taken over a whole lease after its holder's death.
        is_due = self._renewed_ns < since_ns or asked_ns >= self._renewed_ns + self._lease_s / 4 * _NS_PER_S
        held = list(self._held.values()) if is_due else []
        leases = [each.lease for each in held]
        beat = await self.rest.ask(lambda: self._store.beat(leases, figures, self._life_s))
        tell_damaged(beat.damaged)
        if is_due:
            self._renewed_ns = asked_ns
        for each in held:
            if each.lease.token not in beat.lost:
                each.renewed(asked_ns, beat.renewed_until_ns)
            elif not each.is_ending and not each.is_over:  # else it may have been completed just now
                each.is_over = True
                log.warning("lease_lost", id=each.lease.id)
        now_ms = self._store.clock.now_ms()
        self._gate.told(beat.gate_until_ms, now_ms, asked_ns)
        self.canceller.is_suspended = beat.suspended
        self.canceller.keys.know(beat.suspects)
        await self._gate.share(now_ms)
        return beat.is_unknown

    async def _renew(self) -> None:
        """Renew all leases now, none of which is trusted before; for all who ask at the same time once, whatever comes
        of that."""
        wanted_ns = local_ns()
        async with self._renewing:
            if self._asked_whose_ns < wanted_ns:
                self._asked_whose_ns = local_ns()
                self._trust.doubt()
                with contextlib.suppress(redis.RedisError):
                    await self.beat(None)

    # -- steps that repeat --

    async def _for_ever(self, step: Callable[[], Coroutine[Any, Any, None]], is_over: Callable[[], bool]) -> None:
        """Repeat a step. What goes wrong with Redis makes a pause; a defect is told, and it goes on."""
        while not is_over():
            try:
                await step()
            except redis.RedisError as error:
                if passes(error):
                    for link in (self._claims, self.rest):
                        await link.drop_if_idle()
                await self._pause(self._trouble(error))
            except Exception as defect:  # noqa: BLE001 - whatever it is, the loop lives
                log.defect(defect)
                await self._pause(_LOOK_S)

    async def _pause(self, seconds: float) -> None:
        """Wait, but not beyond a stop."""
        if self._stopping.is_set():
            await asyncio.sleep(min(seconds, _AWAY_LONGEST_S))
        else:
            await wait_for(self._stopping, seconds)

    # -- claiming --

    def _free(self) -> int:
        """Slots that a job can be started in."""
        return self._gate.ceiling(self._size, self._store.clock.now_ms()) - self._running

    def _room(self) -> int:
        """How many jobs may be claimed: as many as can be started or, when all slots are taken, as soon can be."""
        if self._running < self._size:
            return self._free() - len(self._ready)
        since_ns, ended = local_ns() - _AHEAD_S * _NS_PER_S, self._ended_at_ns
        while ended and ended[0] < since_ns:
            ended.popleft()
        ahead = min(len(ended), self._size // _AHEAD_PART)
        room = ahead - len(self._ready)
        return room if 2 * room >= ahead else 0  # in halves: one by one they would cost Redis a call each

    def _is_paused(self) -> bool:
        return self.canceller.is_suspended or self._gate.closed(self._store.clock.now_ms())

    async def _claim_next(self) -> None:
        """One claim, as soon as there is room for what comes."""
        if self._outage.is_on and self._to_complete.is_set():  # after an outage outcomes go before claims
            await self._pause(_AWAY_FIRST_S)
            return
        self._room_changed.clear()
        if (room := self._room()) < 1:
            await wait_for(self._room_changed, _RAMP_LOOK_S if self._running < self._size else _LOOK_S)
            self._start_ready()
        elif not self._is_paused():
            # Ahead of a free slot only what is there already is taken: what comes later may find a worker that has one.
            await self._claim(self._claims, room, wait=self._running < self._size)
        else:
            await self._pause(_LOOK_S)
            if self._is_paused() and not self._stopping.is_set():
                # Overdue jobs are given even then. They need no request: the ramp after a pause is not for them.
                await self._claim(self._claims, self._size - self._running - len(self._ready), wait=False)

    async def _claim_due(self) -> None:
        """Retries of ours start on time: claimed without waiting, beside the claim that waits at the queue."""
        await self._due.wait()
        if self._is_paused() or self._outage.is_on or self._stopping.is_set():
            self._due.clear()  # whoever waits at the queue brings what is due
        elif (free := self._free() - len(self._ready)) > 0:
            self._due.clear()
            await self._claim(self.rest, free, wait=False)
        else:
            self._room_changed.clear()
            await wait_for(self._room_changed, _LOOK_S)

    async def _wake(self) -> None:
        """After an outage of the exchange jobs do not wait out their backoff: more and more of them are due at once."""
        await self.canceller.recovery.is_over.wait()
        if not (self._is_paused() or self._outage.is_on or self._stopping.is_set()):
            jobs = self.canceller.recovery.next_ones(self._free() - len(self._ready))
            if jobs:
                tell_damaged(await self.rest.ask(lambda: self._store.wake(jobs)))
                self._due.set()
        await asyncio.sleep(_RAMP_LOOK_S)

    async def _claim(self, link: AsyncLink, slots: int, *, wait: bool) -> None:
        now_ns = local_ns()
        came_back_ns = max(self._back_ns, self._trust.stepped_ns())
        may_take_lost = not self._outage.is_on and now_ns >= came_back_ns + _COMPLETE_FIRST_S * _NS_PER_S
        look_closely = now_ns >= self._looked_closely_ns + _LOOK_S * _NS_PER_S
        if look_closely:
            self._looked_closely_ns = now_ns
        bring_back = link is self.rest or now_ns >= self._brought_back_ns + _BRING_BACK_S * _NS_PER_S
        if bring_back:
            self._brought_back_ns = now_ns
        self._claims_out += 1
        try:
            looks = {"bring_back": bring_back, "take_lost": may_take_lost, "look_closely": look_closely}
            claimed = await link.ask(lambda: self._store.claim(max(slots, 1), wait=wait, **looks))
            self._worked()
            self._take(claimed, now_ns)
        finally:
            self._claims_out -= 1
            self._let_go.set()
            if self._stopping.is_set():
                self._hand_back_ready()
        if wait:
            await self._heed_full(claimed)

    def _take(self, claimed: Claimed, asked_ns: int) -> None:
        """Take what a claim brought into our hands."""
        tell_damaged(claimed.damaged)
        self.canceller.is_suspended = claimed.suspended
        self._gate.observe(claimed.gate_until_ms)
        for lease in claimed.leases:
            held = Held(lease, asked_ns, self._trust, self._renew)
            self._held[lease.token] = held
            self._ready.append(held)
        self._start_ready()
        if self._ready:
            asyncio.get_running_loop().call_later(_UNSTARTED_S, self._hand_back_unstarted)

    def _hand_back_unstarted(self) -> None:
        """Hand back what found no slot in time."""
        if self._ready and self._ready[0].claimed_ns + _UNSTARTED_S * _NS_PER_S <= local_ns():
            self._hand_back_ready()
            if self._ready:  # a claim is on its way
                asyncio.get_running_loop().call_later(0.01, self._hand_back_unstarted)

    def _hand_back_ready(self) -> None:
        """Give back all that was not started: in its order, so together with what a claim on its way brings."""
        if not self._claims_out:
            for held in self._ready:
                self._end(held, Release(held.lease))
            self._ready.clear()

    # -- jobs --

    def _start_ready(self) -> None:
        """Start what is ready in the slots that are free."""
        while self._ready and self._free() > 0 and not self._stopping.is_set():
            held = self._ready.popleft()
            self._running += 1
            log.debug("claimed", id=held.lease.id, run=held.lease.run, lease=held.lease.token)
            task = asyncio.create_task(self._carry(held))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(self, held: Held) -> None:
        try:
            self._end(held, await self.canceller.carry(held.lease, held))
        except Exception as defect:  # noqa: BLE001 - whatever it is, the loop lives
            # A defect is no answer: the lease brings the job back, and the attempt counts as unclear.
            log.defect(defect, id=held.lease.id)
            self._held.pop(held.lease.token, None)
            self._let_go.set()
        self._running -= 1
        self._ended_at_ns.append(local_ns())
        self._start_ready()
        self._room_changed.set()

    def _end(self, held: Held, row: Row) -> None:
        held.is_ending = True
        self._outbox.append(row)
        self._to_complete.set()

    # -- completing --

    async def _complete(self) -> None:
        """Write what came up together in one call (group commit); a repeat of a write that worked changes nothing."""
        await self._to_complete.wait()
        group = [self._outbox.popleft()]
        while self._outbox and len(group) < _GROUP and not (is_alone(group[0]) or is_alone(self._outbox[0])):
            group.append(self._outbox.popleft())
        try:
            await self._write(group)
        except redis.RedisError:
            self._outbox.extendleft(reversed(group))
            raise
        finally:
            if not self._outbox:
                self._to_complete.clear()
        await asyncio.sleep(_APART_S)

    async def _write(self, group: list[Row]) -> None:
        try:
            completed = await self.rest.ask(lambda: self._store.complete(group))
        except Exception as error:
            if isinstance(error, redis.RedisError) and not is_about_rows(error):
                raise
            await self._write_one_by_one(group, error)
            return
        self._worked()
        tell_damaged(completed.damaged)
        for row, answer in zip(group, completed.answers, strict=True):
            self._written(row, answer)

    async def _write_one_by_one(self, group: list[Row], error: Exception) -> None:
        """What cannot be written at all must not hold up the others; its job comes back when its lease runs out."""
        if len(group) > 1:
            for row in group:
                await self._write([row])
            return
        said = str(error) if is_about_rows(error) else f"{type(error).__name__} in {log.where(error)}"
        log.error("defect", id=group[0].lease.id, where="complete", error=said)
        self._written(group[0], None)

    def _written(self, row: Row, answer: int | None) -> None:
        held = self._held.pop(row.lease.token, None)
        if held is None:  # it was written before something went wrong with another one of its group
            return
        self.working_s += (local_ns() - held.claimed_ns) / _NS_PER_S
        if answer is not None:
            self._tell(row, answer)
        self._let_go.set()
        self._room_changed.set()

    def _tell(self, row: Row, answer: int) -> None:
        kind = row.outcome.kind if isinstance(row, Done) else None
        if answer < 0:
            reason = "its keys in Redis are damaged, or may not be written by this user"
            log.error("defect", id=row.lease.id, where="complete", error=reason)
        elif answer == 0:
            log.warning("fenced", id=row.lease.id, kind=kind)
        elif isinstance(row, Retry):
            self._retry_at(answer)
            if row.attempts:
                self.canceller.recovery.wait(row.lease.key, row.attempts[-1].verdict, answer)
        elif isinstance(row, Done) and answer == 2:
            log.info("deadline_moved", id=row.lease.id, kind=kind)
        elif isinstance(row, Done):
            self.failed += row.outcome.kind.failed
            self.finished += not row.outcome.kind.failed
            tell_outcome(row)

    def _retry_at(self, due_ms: int) -> None:
        """A retry of ours; one ms later, so that Redis agrees that it is due."""
        if not self._stopping.is_set():
            self._retries += 1
            delay_ms = max(due_ms - self._store.clock.now_ms() + 1, 0)
            asyncio.get_running_loop().call_later(delay_ms / 1000, self._fall_due)

    def _fall_due(self) -> None:
        self._retries -= 1
        self._due.set()

    # -- Redis away and back --

    async def _heed_full(self, claimed: Claimed) -> None:
        """A full server serves claims and completions, but lets nobody wait: the next claim must not follow at once."""
        was_full, self._is_full = self._is_full, claimed.refused is not None
        if claimed.refused is not None and not was_full:
            log.error("redis", state="full", error=why(claimed.refused))
        if self._is_full and not claimed.leases:
            await self._pause(_LOOK_S)

    def _worked(self) -> None:
        """Note that Redis did what it was asked."""
        self._troubles = 0
        if self._outage.end():
            self._back_ns = local_ns()

    def _trouble(self, error: BaseException) -> float:
        """Note that it did not; gives how long to leave it alone, s."""
        if isinstance(error, redis.AuthenticationError):
            self.refused = error
        self._outage.note(error)
        longest_s = min(_AWAY_FIRST_S * (1 << min(self._troubles, 10)), _AWAY_LONGEST_S)
        self._troubles += 1
        return longest_s * (0.5 + random.random() / 2)


def tell_damaged(names: tuple[str, ...]) -> None:
    """Log keys that a script has set aside."""
    for name in names:
        log.error("damaged", key=name, reason="of another type than it should have, or too long: set aside")


def tell_outcome(row: Done) -> None:
    """Log what became of a request."""
    outcome = row.outcome
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
            "measure#cancel.first_ms": outcome.first_attempt_ms,
            "measure#cancel.outcome_ms": outcome.took_ms,
            "count#cancel.outcomes": 1,
        },
    )
