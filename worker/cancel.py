"""One job, from its payload to its settlement: decode, decide, send, decide again.

:class:`Canceller` is the seam between the queue and the domain. A job's pursuit is a generator that says what it wants
done and goes on with what came of it: a call, or something else that has to wait. So our own worker pursues many jobs
in one thread (:mod:`worker.crew`), a stock `rq worker` one step at a time (:mod:`worker.task`), by the same code.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar, cast

from producer.message import (
    WORKER_LOST,
    Attempt,
    Call,
    CancelRequest,
    MessageError,
    Outcome,
    OutcomeKind,
    Pin,
    decode_attempts,
    decode_call,
    decode_pin,
    may_be_live,
)
from worker import log
from worker.classify import GATED, Failure, Means, OrderRef, Reply, Verdict, classify
from worker.clock import ServerClock
from worker.decide import Again, Case, Policy, Stop, as_known, first_step, next_step
from worker.exchange import Exchange
from worker.key_breaker import KeyBreaker
from worker.rate_gate import Gate, ms_to_next_minute
from worker.settings import Settings
from worker.signing import Credential
from worker.store import Grant, Settlement

T = TypeVar("T")


class Hold(Protocol):
    """What a job's holder knows while it is being worked on."""

    def lost(self) -> bool:
        """Whether somebody else has the job by now: then nothing more may be sent for it."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A signed call that is to be made. Its answer is to be sent into the pursuit, or None if nothing was sent because
    the job was lost or the gate closed while a connection was opened."""

    call: Call
    credential: Credential
    ref: OrderRef


@dataclass(frozen=True, slots=True)
class Resync:
    """The exchange's clock is to be measured anew, unless it was since that moment (monotonic):
    :meth:`Canceller.resync`. One at a time, as all that were refused by one clock ask for one measurement."""

    since_ns: int


#: What a pursuit wants done: a call, a measurement, or something that may wait for Redis, whose result is to be sent
#: into the pursuit.
Wish = Ask | Resync | Callable[[], object]
#: Gives wishes, takes what came of them, ends with the job's settlement.
Pursuit = Generator[Wish, Any, Settlement]


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


@dataclass(slots=True)
class _Matter:
    """One request while it is being worked on."""

    grant: Grant
    request: CancelRequest
    credential: Credential
    history: list[Attempt]
    algo_id: int | None
    symbol: str | None
    pinned: bool
    began_ns: int = 0  # the last attempt, monotonic

    def facts(self) -> Case:
        return Case(
            self.algo_id is None, self.grant.meant_at_ms or self.grant.enqueued_at_ms, self.grant.deadline_at_ms
        )

    def ref(self) -> OrderRef:
        return OrderRef(self.algo_id, self.request.client_algo_id)

    def learn(self, verdict: Verdict) -> None:
        """Keep what an answer told about the order: its algo id, so that a reused client id is never hit."""
        if verdict.order is not None:
            self.pinned = self.pinned or self.algo_id is None
            self.algo_id = verdict.order.algo_id
            self.symbol = self.symbol or verdict.order.symbol

    def pin(self) -> str:
        return Pin(self.algo_id, self.symbol).encode() if self.pinned and self.algo_id is not None else ""


class Canceller:
    """Pursues requests on one exchange for one worker, all of them in one thread."""

    def __init__(
        self,
        *,
        exchange: Exchange,
        clock: ServerClock,
        gate: Gate,
        keys: KeyBreaker,
        policy: Policy,
        credential_for: Callable[[str], Credential | None],
        now_ms: Callable[[], int],
        worker: str,
    ) -> None:
        self._exchange = exchange
        self._clock = clock
        self._gate = gate
        self._policy = policy
        self._credential_for = credential_for
        self._now_ms = now_ms
        self._worker = worker
        self._keys = keys
        self._calling = 0  # requests under way: a pursuit is in one thread's hand
        self._resynced_ns = 0

    def work(self, grant: Grant, hold: Hold, request: CancelRequest | None = None) -> Settlement:
        """Pursue a job in this thread, waiting for each thing that has to be waited for. See :meth:`pursue`."""
        pursuit = self.pursue(grant, hold, request)
        came: object = None
        while True:
            try:
                wish = pursuit.send(came)
            except StopIteration as ended:
                return cast(Settlement, ended.value)
            if isinstance(wish, Resync):
                self.resync(wish)
                came = None
            elif not isinstance(wish, Ask):
                came = wish()
            elif wish.call is Call.CANCEL:
                came = self._exchange.cancel(wish.credential, wish.ref)
            else:
                came = self._exchange.query(wish.credential, wish.ref)

    def resync(self, wish: Resync) -> None:
        """Measure the exchange's clock, once for all requests that were refused by the same old one."""
        if self._resynced_ns <= wish.since_ns:
            self._clock.drop_samples()
            self._exchange.sync_time(may_go=lambda: not self._gate.closed(self._now_ms()))
            self._resynced_ns = time.monotonic_ns()
            self.heed_refusal()

    def heed_refusal(self) -> None:
        """A 429, 418 or 403 to one of our unsigned calls closes the gate as any other does."""
        refusal, now_ms = self._exchange.take_refusal(), self._now_ms()
        if refusal is None:
            return
        if self._gate.close_for(classify(Call.QUERY, OrderRef(None), refusal), self._policy, now_ms):
            self._gate.share(now_ms)

    def pursue(self, grant: Grant, hold: Hold, request: CancelRequest | None = None) -> Pursuit:
        """Carry a job as far as it goes without a delay.

        ``request`` spares the decoding where RQ has done it.
        """
        try:
            case = self._take_up(grant, request)
        except MessageError as error:
            return self._refuse(grant, _if_legible(grant, request), f"not a job of this queue: {error}")
        if case is None:
            request = request or decode_call(grant.data or b"")
            return self._refuse(grant, request, f"account {request.account!r} has no key in this worker")
        if case.history and case.history[-1].msg == WORKER_LOST:
            lost = case.history[-1]
            log.warning("recovered", id=grant.id, n=lost.n, began_at_ms=lost.at_ms, **{"count#cancel.recovered": 1})
        step = first_step(case.facts(), case.history, self._policy, self._now_ms())
        while isinstance(step, Again) and step.delay_ms == 0:
            if step.resync:
                yield Resync(case.began_ns)
            if (held_ms := (yield from self._held_back_ms(case, step))) > 0:
                return self._again(case, held_ms)
            # Nothing may be sent: the job goes back as it is. If somebody else has it by now, the fence sees to it.
            if hold.lost() or self._gate.closed(self._now_ms()):
                return Settlement(grant, attempts=tuple(case.history), pin=case.pin())
            step = yield from self._attempt(case, step)
        if isinstance(step, Again):
            log.info("again", id=grant.id, call=step.call, delay_ms=step.delay_ms, attempts=len(case.history))
            return self._again(case, step.delay_ms)
        return Settlement(grant, outcome=self._outcome(case, self._with_key_reason(case, step)), pin=case.pin())

    def _take_up(self, grant: Grant, request: CancelRequest | None) -> _Matter | None:
        if request is None:
            if grant.data is None:
                raise MessageError("its payload is larger than any request")
            request = decode_call(grant.data)
        if grant.damaged:
            raise MessageError(f"its field {grant.damaged} is no whole number")
        credential = self._credential_for(request.account)
        if credential is None:
            return None
        history = as_known(decode_attempts(grant.attempts))
        pin = decode_pin(grant.pin)
        algo_id = pin.algo_id if pin and request.algo_id is None else request.algo_id
        symbol = pin.symbol if pin and request.symbol is None else request.symbol
        return _Matter(grant, request, credential, history, algo_id, symbol, pin is not None)

    @staticmethod
    def _again(case: _Matter, delay_ms: int) -> Settlement:
        return Settlement(case.grant, attempts=tuple(case.history), pin=case.pin(), delay_ms=delay_ms)

    def _held_back_ms(self, case: _Matter, step: Again) -> Generator[Wish, Any, int]:
        """How long the request has to wait for its key or for the budget, ms; it is no attempt. 0: it may go."""
        now_ms, account = self._now_ms(), case.request.account
        wait_ms = 0
        if not self._gate.allows(step.call, self._exchange.last_used_weight()):
            wait_ms = ms_to_next_minute(self._clock.now_ms())
        elif self._keys.reason(account) is not None:
            until_ms = yield from _wait_for(partial(self._keys.wait_until_ms, account, case.grant.id))
            wait_ms = max(until_ms - now_ms, 1) if until_ms > 0 else 0
        # At its deadline at the latest it is looked at again, to be ended.
        return min(wait_ms, max(case.grant.deadline_at_ms - now_ms, 1))

    def _with_key_reason(self, case: _Matter, stop: Stop) -> Stop:
        """A request that its key kept waiting until the deadline was refused, for that reason."""
        reason = self._keys.reason(case.request.account)
        if reason is None or stop.kind not in (OutcomeKind.OVERDUE, OutcomeKind.GAVE_UP):
            return stop
        return replace(
            stop, kind=OutcomeKind.REFUSED, error=f"held back until the deadline: the key is refused: {reason}"
        )

    def _attempt(self, case: _Matter, step: Again) -> Generator[Wish, Any, Stop | Again]:
        """Make one signed call, note it, and decide what follows."""
        at_ms = self._now_ms()
        case.began_ns = time.monotonic_ns()
        facts = case.facts()
        self._calling += 1
        try:
            answer: Reply | Failure | None = yield Ask(step.call, case.credential, case.ref())
        finally:
            self._calling -= 1
        if answer is None:
            return replace(step, resync=False)
        took_ms = (time.monotonic_ns() - case.began_ns) // 1_000_000
        verdict = classify(step.call, case.ref(), answer)
        n = len(case.history) + 1
        case.history.append(
            Attempt(n, at_ms, step.call, verdict.http, verdict.code, verdict.msg, verdict.means.value, took_ms)
        )
        if verdict.means is not Means.CONFIRMED:
            log.info(
                "attempt",
                id=case.grant.id,
                n=n,
                call=step.call,
                verdict=verdict.means,
                http=verdict.http,
                code=verdict.code,
                msg=verdict.msg,
                ms=took_ms,
            )
        now_ms = self._now_ms()
        yield from self._note(case.request.account, verdict, now_ms)
        decision = next_step(facts, case.history, verdict, self._policy, now_ms, random.random())
        if not (isinstance(decision, Stop) and decision.kind is OutcomeKind.UNKNOWN):
            case.learn(verdict)  # an order that is left alone is not the one that was meant
        return decision

    def _note(self, account: str, verdict: Verdict, now_ms: int) -> Generator[Wish, Any, None]:
        """What an answer says about the address and the key, beside the order."""
        if verdict.means in GATED:
            is_news = self._gate.close_for(verdict, self._policy, now_ms)
        else:
            used = self._exchange.last_used_weight()
            is_news = self._gate.spend(used, self._calling, self._clock.now_ms(), now_ms)
        if is_news:
            yield partial(self._gate.share, now_ms)
        if self._keys.concerns(account, verdict):
            yield partial(self._keys.tell, account, verdict)

    def _outcome(self, case: _Matter, stop: Stop) -> Outcome:
        request, grant = case.request, case.grant
        return Outcome(
            id=grant.id,
            run=grant.run,
            kind=stop.kind,
            account=request.account,
            algo_id=case.algo_id,
            client_algo_id=request.client_algo_id,
            symbol=case.symbol,
            tag=request.tag,
            may_be_live=may_be_live(stop.kind, stop.order_status),
            order_status=stop.order_status,
            actual_order_id=stop.actual_order_id,
            attempts=tuple(case.history),
            enqueued_at_ms=grant.enqueued_at_ms,
            finished_at_ms=self._now_ms(),
            worker=self._worker,
            error=stop.error,
        )

    def _refuse(self, grant: Grant, request: CancelRequest | None, error: str) -> Settlement:
        """The outcome of a job that this worker can do nothing for; nothing is known of a foreign job's order."""
        log.warning("refused", id=grant.id, error=error)
        attempts: Sequence[Attempt] = ()
        known: dict[str, Any] = {}
        if request is not None:
            with contextlib.suppress(MessageError):
                attempts = decode_attempts(grant.attempts)
            known = {"account": request.account, "algo_id": request.algo_id, "may_be_live": True}
            known |= {"client_algo_id": request.client_algo_id, "symbol": request.symbol, "tag": request.tag}
        in_doubt = any(attempt.verdict == Means.UNCLEAR for attempt in attempts)
        outcome = Outcome(
            id=grant.id,
            run=grant.run,
            kind=OutcomeKind.UNKNOWN if in_doubt else OutcomeKind.REFUSED,
            attempts=tuple(attempts),
            enqueued_at_ms=grant.enqueued_at_ms,
            finished_at_ms=self._now_ms(),
            worker=self._worker,
            error=error,
            **known,
        )
        return Settlement(grant, outcome=outcome)


def _wait_for(work: Callable[[], T]) -> Generator[Wish, Any, T]:
    came: T = yield work
    return came


def _if_legible(grant: Grant, request: CancelRequest | None) -> CancelRequest | None:
    """What a damaged job asks for, if that much can be read."""
    with contextlib.suppress(MessageError):
        return request or decode_call(grant.data or b"")
    return None
