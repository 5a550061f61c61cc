"""One job, from claim to outcome: decode, decide, send, decide again.

:class:`Canceller` is the seam between the queue and the domain. What an answer means and what follows is decided by
pure functions (:mod:`worker.classify`, :mod:`worker.decide`); here it is done. Our own worker carries many jobs at a
time, a stock RQ worker one step of one job, by the same code.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from producer.message import (
    WORKER_LOST,
    Attempt,
    Call,
    CancelRequest,
    OpenRequest,
    OutcomeKind,
    decode_call,
    decode_pin,
)
from producer.untrusted import MessageError
from worker import decide, log
from worker.child import Child
from worker.classify import GATED, STATUS_MEANS, Means, OrderRef, Ref, Reply, Verdict, child_of, classify
from worker.clock import RedisClock, ServerClock, local_ns, minus
from worker.daemon import wait_for
from worker.decide import (
    PASSED,
    Again,
    Case,
    Policy,
    Span,
    Stop,
    accepted_until_ms,
    bounded,
    looks_up_a_silence,
    next_number,
    silent_until_ms,
)
from worker.exchange import Answer, Exchange, Sent
from worker.hold import Held
from worker.job import CancelJob, history_of, refusal
from worker.key_breaker import KeyBreaker
from worker.listing import has_untold
from worker.rate_gate import Gate, LookUps, ms_to_next_minute
from worker.recovery import Recovery
from worker.settings import Settings
from worker.signing import Credential
from worker.store import Done, Lease, Release, Retry, Row

_NS_PER_MS = 1_000_000
#: When to look again whether the exchange tells its time, ms.
_UNMEASURED_MS = 1_000
_NOT_MEASURED = "the clocks are not measured, so the order's age is not known"
#: How often who waits for a turn looks at deadline and gate, s.
_TURN_S = 1.0
#: Late answers after which nothing more needs to be known of the order.
_ENDS = frozenset({Means.CONFIRMED, Means.ENDED, Means.LISTED, *STATUS_MEANS.values()}) - {Means.OPEN, Means.TRIGGERING}


def policy_of(settings: Settings) -> Policy:
    """The bounds of a request as the settings give them."""
    return Policy(
        max_attempts=settings.max_attempts,
        backoff_base_ms=settings.backoff_base_ms,
        backoff_cap_ms=settings.backoff_cap_ms,
        not_found_horizon_ms=round(settings.not_found_horizon_s * 1000),
        recv_window_ms=settings.recv_window_ms,
        waf_pause_ms=settings.waf_pause_s * 1000,
    )


@dataclass(eq=False)
class Canceller:
    """Carries jobs for one holder, all of them in one event loop.

    ``sends_late``: a call may have to wait for its connection after the last look whether it may go. Then no order is
    cancelled by its client id before it was looked up, however young the request is. ``flight``: so many jobs are
    carried at a time at the most.
    """

    exchange: Exchange
    server_clock: ServerClock
    redis_clock: RedisClock
    gate: Gate
    keys: KeyBreaker
    policy: Policy
    credential_for: Callable[[str], Credential | None]
    holder: str
    sends_late: bool = False
    flight: int = 1
    is_suspended: bool = field(default=False, init=False)  # whether `rq suspend` holds, as of the last look

    def __post_init__(self) -> None:
        self._look_ups = LookUps(self.flight)
        self.recovery = Recovery(self.flight)
        self._in_hand: set[CancelJob] = set()
        self._lingering = 0
        self._is_leaving = False
        self._calling = 0  # signed requests under way
        self._resynced_ns = 0
        self._resyncing = asyncio.Lock()

    async def carry(self, lease: Lease, hold: Held, request: CancelRequest | None = None) -> Row:
        """Carry a job as far as it goes without a delay; gives how its hold is to end.

        ``request`` spares the decoding where RQ has done it.
        """
        what, _, of = lease.fault.partition(" ")
        try:
            if of == "data":
                raise MessageError("its payload is larger than any request")
            request = request or decode_call(lease.data)
            if what == "number":
                raise MessageError(f"its field {of} is no whole number")
            if of == "c_pin":
                raise MessageError("its field c_pin is larger than any pin")
            job = self._take_up(lease, hold, request)
        except MessageError as error:
            return self._refused(lease, request, f"not a job of this queue: {error}")
        if job is None:
            return self._refused(lease, request, f"account {request.account!r} has no key in this worker")
        if what == "recalled":
            return self._done(job, job.recalled())
        if job.history and job.history[-1].msg == WORKER_LOST:
            lost = job.history[-1]
            log.warning("recovered", id=lease.id, n=lost.n, began_at_ms=lost.at_ms, **{"count#cancel.recovered": 1})
        self._in_hand.add(job)
        try:
            return await self._pursue(job)
        finally:
            self._in_hand.discard(job)

    def leave(self) -> None:
        """Let jobs wait here for answers alone: what has a delay goes back with it, what is to be looked up, too."""
        self._is_leaving = True
        for job in self._in_hand:
            job.news.set()

    async def resync(self, since_ns: int, hold: Held | None = None) -> None:
        """Measure the exchange's clock, once for all requests that were refused by the same old one.

        Where the exchange calls our time wrong, Redis tells by ``hold`` whose the jobs are by now.
        """
        async with self._resyncing:
            if self._resynced_ns <= since_ns:
                self.server_clock.doubt()
                if hold is not None:
                    await hold.renew()
                await self.exchange.sync_time(may_go=lambda: not self.gate.closed(self._now_ms()))
                self._resynced_ns = local_ns()
                await self.heed_refusal()

    async def heed_refusal(self) -> None:
        """A 429, 418, 403 or 451 to one of our unsigned calls closes the gate as any other does."""
        refusal, now_ms = self.exchange.take_refusal(), self._now_ms()
        if refusal is None:
            return
        if self.gate.close_for(classify(Call.QUERY, OrderRef(None), refusal), self.policy, now_ms, self._ahead()):
            await self.gate.share(now_ms)

    # -- one job --

    def _now_ms(self) -> int:
        return self.redis_clock.now_ms()

    def _latest_ms(self) -> int:
        """What Redis' clock shows at most: no request must be taken for a younger one than it is."""
        latest_ms = self.redis_clock.latest_ms()
        return self._now_ms() if latest_ms is None else latest_ms

    def _ahead(self) -> Span | None:
        return minus(self.redis_clock, self.server_clock)

    def _case(self, job: CancelJob) -> Case:
        """The request as a decision sees it."""
        return Case(
            by_client_id=job.algo_id is None,
            meant_at_ms=job.meant_at_ms,
            deadline_at_ms=job.lease.deadline_at_ms,
            policy=self.policy,
            ahead=self._ahead(),
            retried=job.lease.run > 1,
            sends_late=self.sends_late,
            strikes_until_ms=self._strikes_until_ms(job),
            cancels_child=job.lease.cancels_child,
            told_to=job.told_to,
        )

    def _strikes_until_ms(self, job: CancelJob) -> int:
        """See :class:`worker.decide.Case`: a cancel by client id is the first call of all, if it was made."""
        may_be = job.request.algo_id is None and job.lease.run == 1 and job.history
        first = job.history[0] if may_be else None
        if first is None or first.call is not Call.CANCEL or first.verdict != Means.UNCLEAR:
            return 0
        if job.strikes_until_ns:
            return self._latest_ms() + (job.strikes_until_ns - local_ns()) // _NS_PER_MS + 1
        return accepted_until_ms(first, self.policy)

    def _first_step(self, job: CancelJob) -> Stop | Again:
        return job.rules.first_step(self._case(job), job.history, self._latest_ms())

    async def _pursue(self, job: CancelJob) -> Row:
        step = self._first_step(job)
        while isinstance(step, Again) or await self._may_be_cleared_up(job, step):
            if isinstance(step, Stop):
                step = await self._settled(job) or (step if step.is_left_alone else self._first_step(job))
                continue
            delay_ms = step.delay_ms
            if delay_ms == 0 and not job.hold.is_valid():
                await job.hold.renew()
            is_held_back = False
            if delay_ms == 0 and self._may_send(job):
                if step.resync:
                    await self.resync(job.began_ns, job.hold)
                delay_ms = await self._held_back_ms(job, step)
                is_held_back = delay_ms > 0
            if (stop := self._instead(job, step, delay_ms, is_held_back=is_held_back)) is not None:
                step = stop
                continue
            if delay_ms > 0 and (left_ms := await self._lingered(job, delay_ms)) > 0:
                log.info("again", id=job.lease.id, call=step.call, delay_ms=left_ms, attempts=len(job.history))
                return Retry(job.lease, tuple(job.history), left_ms, job.pin())
            if delay_ms > 0 or job.late:
                step = await self._settled(job) or self._first_step(job)
                continue
            following = await self._made(job, step)
            if following is None:
                # The job goes back as it is. If somebody else has it by now, its lease sees to it.
                return Release(job.lease, tuple(job.history), job.pin())
            step = following
        return self._done(job, self._with_reason(job, step))

    def _instead(self, job: CancelJob, step: Again, delay_ms: int, *, is_held_back: bool) -> Stop | None:
        """The outcome of a request whose next call cannot go now, and would be waited for in vain.

        Who asks for a pause of the queue wants nothing new to be sent: what is overdue ends then, too.
        """
        if job.child is not None and job.is_only_told(step) and (delay_ms > 0 or not self._may_send(job)):
            return job.child.parent
        is_stuck = is_held_back or self.is_suspended or self.gate.closed(self._now_ms())
        if self._latest_ms() < job.lease.deadline_at_ms or not is_stuck:
            return None
        return job.rules.bound(self._case(job), job.history, self._latest_ms(), PASSED)

    def _done(self, job: CancelJob, stop: Stop) -> Done:
        requests = job.requests(stop)
        return Done(job.lease, job.outcome(stop, self._now_ms(), self.holder, requests), job.pin(), requests)

    def _refused(self, lease: Lease, request: CancelRequest | None, error: str) -> Done:
        return Done(lease, refusal(lease, request, self._latest_ms(), self._now_ms(), self.holder, error))

    async def _may_be_cleared_up(self, job: CancelJob, stop: Stop) -> bool:
        """Whether a late answer has come that may tell what else would be ``unknown`` for good; it is waited for."""
        if stop.kind is OutcomeKind.UNKNOWN and job.silent:
            await self._lingered(job, self.policy.recv_window_ms)
        return bool(job.late)

    async def _lingered(self, job: CancelJob, delay_ms: int) -> int:
        """Wait while an answer may still come, or a cancel strike; gives what is left, ms: that is waited in the queue.

        Few jobs do so at a time, that those of one account which is silent leave the slots to others.
        """
        left_ns = delay_ms * _NS_PER_MS
        if self._lingering >= self._look_ups.part and not self._is_leaving:
            return delay_ms
        ends_ns = local_ns() + left_ns
        self._lingering += 1
        try:
            while left_ns > 0 and not job.late and (job.silent if self._is_leaving else job.is_open()):
                await _news(job, left_ns / 1e9)
                left_ns = ends_ns - local_ns()
        finally:
            self._lingering -= 1
        return 0 if job.late else max(-(-left_ns // _NS_PER_MS), 0)

    def _take_up(self, lease: Lease, hold: Held, request: CancelRequest) -> CancelJob | None:
        credential = self.credential_for(request.account)
        if credential is None:
            return None
        history = history_of(lease, self._latest_ms())
        pin = None if isinstance(request, OpenRequest) else decode_pin(lease.pin)
        algo_id = pin.algo_id if pin and request.algo_id is None else request.algo_id
        symbol = pin.symbol if pin and request.symbol is None else request.symbol
        return CancelJob(lease, hold, request, credential, history, algo_id, symbol, pin is not None)

    async def _held_back_ms(self, job: CancelJob, step: Again) -> int:
        """How long the request has to wait for its key, for the budget or for the exchange's time, ms; 0: it may go.

        It is no attempt.
        """
        now_ms, wait_ms = self._now_ms(), 0
        used, server_ms = self.exchange.last_used_weight(), self.server_clock.now_ms()
        is_look_up = not step.call.cancels and looks_up_a_silence(job.history)
        has_room = self.gate.allows(step.call, used)
        if not has_room or (is_look_up and not self.gate.allows_look_up(used, server_ms // 60_000)):
            wait_ms = ms_to_next_minute(server_ms)
        elif (until_ms := await self.keys.wait_until_ms(job.credential, job.lease.key)) > 0:
            wait_ms = max(until_ms - now_ms, 1)
        if wait_ms == 0 and job.algo_id is None and not await self._knows_the_time():
            wait_ms = _UNMEASURED_MS
        # At its deadline at the latest it is looked at again, to be ended.
        return min(wait_ms, max(job.lease.deadline_at_ms - now_ms, 1))

    async def _knows_the_time(self) -> bool:
        """Whether the exchange's clock can be compared with ours: by client id an order's age must be known, and until
        when a cancel may be accepted."""
        if self._ahead() is None:
            await self.resync(local_ns() - _UNMEASURED_MS * 1_000_000)  # for all that wait for it
        return self._ahead() is not None

    def _with_reason(self, job: CancelJob, stop: Stop) -> Stop:
        """A request that its key kept waiting until the deadline was refused, for that reason; of one of which nothing
        was sent it is told what holds requests back now."""
        reason = self.keys.reason(job.credential)
        # A doubt that is a silence alone, and cannot strike any more, is none beside what the exchange says since then.
        is_doubted = not 0 < silent_until_ms(job.history, self.policy) <= self._latest_ms()
        kinds = (OutcomeKind.OVERDUE, OutcomeKind.GAVE_UP) if is_doubted else (OutcomeKind.UNKNOWN,)
        if stop.kind is OutcomeKind.OVERDUE and reason is None:
            return replace(stop, error=f"{stop.error}{self._held_back_by(job)}")
        if reason is None or stop.kind not in kinds or stop.is_left_alone:
            return stop
        return replace(
            stop, kind=OutcomeKind.REFUSED, error=f"held back until the deadline: the key is refused: {reason}"
        )

    def _held_back_by(self, job: CancelJob) -> str:
        if self.is_suspended:
            return "; the queue is suspended: `rq resume`"
        if self.gate.closed(self._now_ms()):
            return "; a pause of the exchange holds all back: `python -m producer status` tells why"
        is_untold = job.algo_id is None and self._ahead() is None
        return "; the exchange's time is not known, without which no order's age is" if is_untold else ""

    def _may_send(self, job: CancelJob) -> bool:
        return job.hold.is_valid() and not self.gate.closed(self._now_ms())

    def _may_go(self, job: CancelJob, step: Again) -> bool:
        """Asked right before the first byte: what had to wait (for a connection, a clock, Redis) is decided anew."""
        if not self._may_send(job):
            return False
        now = self._first_step(job)
        return isinstance(now, Again) and now.call == step.call

    async def _made(self, job: CancelJob, step: Again) -> Stop | Again | None:
        """Make the call of a step; None: nothing may be sent now.

        What only a silence asks for waits for its turn. Where most are silent, the exchange is slow for everybody:
        their answers are waited for, and few ask.
        """
        if not self._may_send(job):
            return None
        if step.call.cancels or not looks_up_a_silence(job.history):
            return await self._attempt(job, step)
        if self._is_leaving:  # what is in flight is finished; who comes next looks it up
            await self._lingered(job, self.policy.recv_window_ms)
            return self._first_step(job) if job.late else None
        while not self._look_ups.begin(sum(bool(each.silent) for each in self._in_hand), len(self._in_hand)):
            self._look_ups.waiting.append(job.news)
            await _news(job, _TURN_S)
            self._look_ups.waiting.remove(job.news)
            is_over = self._latest_ms() >= job.lease.deadline_at_ms
            if job.late or is_over or self._is_leaving or not self._may_send(job):
                return self._first_step(job)
        try:
            self.gate.note_look_up(self.server_clock.now_ms() // 60_000)
            return await self._attempt(job, step)
        finally:
            self._look_ups.end()

    async def _attempt(self, job: CancelJob, step: Again) -> Stop | Again:
        """Make one signed call, note it, and decide what follows."""
        n, ref = next_number(job.history), job.ref(step.call)
        sent = Sent(late=partial(self._came_late, job, n, step.call, ref))
        at_ms, job.began_ns = self._now_ms(), local_ns()
        self._calling += 1
        try:
            answer = await self.exchange.call(step.call, job.credential, ref, lambda: self._may_go(job, step), sent)
        finally:
            self._calling -= 1
        if answer is None:
            return self._first_step(job)
        if sent.is_open:
            job.silent.add(n)
        if step.call is Call.CANCEL and job.algo_id is None:
            job.strikes_until_ns = sent.accepted_until_ns
        took_ms = (local_ns() - job.began_ns) // _NS_PER_MS
        verdict = await self._comparable(job, classify(step.call, ref, answer))
        said = (verdict.http, verdict.code, verdict.msg, verdict.means.value)
        job.history.append(Attempt(n, at_ms, step.call, *said, took_ms))
        if verdict.means is not Means.CONFIRMED:
            _tell_attempt("attempt", job.lease.id, job.history[-1])
        await self._note_pauses(job.credential, verdict)
        late = await self._settled(job)
        return late if isinstance(late, Stop) else self._decided(job, step.call, verdict)

    def _decided(self, job: CancelJob, call: Call, verdict: Verdict) -> Stop | Again:
        rules = job.rules
        if job.child is not None and call.of_child:
            job.child.learn(verdict)
        elif job.child is not None:  # the order's own answer, which came late
            rules = decide
        decision = rules.next_step(self._case(job), job.history, verdict, self._latest_ms(), random.random())
        if not (isinstance(decision, Stop) and decision.kind is OutcomeKind.UNKNOWN):
            job.learn(verdict)  # an order that is left alone is not the one that was meant
        ref = child_of(verdict.order)
        if isinstance(decision, Stop) and decision.kind is OutcomeKind.TRIGGERED and ref is not None:
            job.child = job.child or Child(ref, decision)
            job.child.parent = decision
            decision = self._first_step(job)
        job.history[:] = bounded(job.history)
        return decision

    # -- answers that nobody waits for any more --

    def _came_late(self, job: CancelJob, n: int, call: Call, ref: Ref, answer: Answer) -> None:
        """Take in what came of a call that was silent; the job may have ended."""
        job.silent.discard(n)
        if isinstance(answer, Reply):
            verdict = classify(call, ref, answer)
            self.recovery.note(verdict.means)
            if verdict.means in GATED:
                self.gate.close_for(verdict, self.policy, self._now_ms(), self._ahead())
            job.late.append((n, call, verdict))
        job.news.set()

    async def _settled(self, job: CancelJob) -> Stop | Again | None:
        """Put late answers where their attempts stand; gives what follows from them, None: nothing new."""
        decision: Stop | Again | None = None
        while job.late and not isinstance(decision, Stop):
            n, call, verdict = job.late.popleft()
            if verdict.order is not None and job.algo_id not in (None, verdict.order.algo_id):
                continue  # found by client id, it is another order than the one that the id was found to mean
            verdict = await self._comparable(job, verdict)
            for at, silent in enumerate(job.history):
                if silent.n == n:
                    ms, means = max(self._now_ms() - silent.at_ms, silent.ms), verdict.means.value
                    told = replace(silent, http=verdict.http, code=verdict.code, msg=verdict.msg, verdict=means, ms=ms)
                    job.history[at] = told
                    _tell_attempt("late", job.lease.id, told)
            # Whether what a client id is found to mean is the order that was meant is decided.
            is_found = verdict.order is not None and job.algo_id is None
            if verdict.means in _ENDS or is_found or job.history[-1].n == n:
                decision = self._decided(job, call, verdict)
        return decision

    async def _comparable(self, job: CancelJob, verdict: Verdict) -> Verdict:
        """An answer about an order that was found by client id tells something only where its date can be compared.

        The clocks may have been doubted since the question was asked. Where they cannot be measured now, it is asked
        again later.
        """
        if verdict.means is Means.LISTED and has_untold(self._case(job), verdict) and self._may_send(job):
            # What was measured before has widened since; an order that is left alone may be one that was meant.
            await job.hold.renew()
            await self.exchange.sync_time(may_go=partial(self._may_send, job))
            await self.heed_refusal()
        if verdict.means is Means.CONFIRMED or verdict.order is None or job.algo_id is not None:
            return verdict
        is_known = self._ahead() is not None or (self._may_send(job) and await self._knows_the_time())
        return verdict if is_known else Verdict(Means.UNCLEAR, verdict.http, msg=_NOT_MEASURED)

    async def _note_pauses(self, credential: Credential, verdict: Verdict) -> None:
        """What an answer says about the address and the key, beside the order."""
        self.recovery.note(verdict.means)
        now_ms = self._now_ms()
        if verdict.means in GATED:
            is_news = self.gate.close_for(verdict, self.policy, now_ms, self._ahead())
        else:
            used = self.exchange.last_used_weight()
            is_news = self.gate.spend(used, self._calling, self.server_clock.now_ms(), now_ms)
        if is_news:
            await self.gate.share(now_ms)
        await self.keys.tell(credential, verdict)


async def _news(job: CancelJob, timeout_s: float) -> None:
    job.news.clear()
    await wait_for(job.news, timeout_s)


def _tell_attempt(event: str, job_id: str, attempt: Attempt) -> None:
    said = {name: value for name, value in attempt.as_dict().items() if name not in ("at_ms", "counted_before")}
    log.info(event, id=job_id, **said)
