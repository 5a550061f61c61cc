"""The function that every job names, as a stock `rq worker` runs it: a few steps of a cancel for each run."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
import threading
from collections.abc import Iterator
from functools import cache, partial

import redis
import rq
from rq import get_current_job
from rq.job import Job

from producer.message import TASK, CancelRequest, decode_outcome, decode_request
from producer.untrusted import MessageError
from worker import log
from worker.clock import ServerClock, local_ns
from worker.engine import tell_damaged, tell_outcome
from worker.exchange import Exchange
from worker.hold import Held, Trust
from worker.redis_link import BlockingLink, connect
from worker.secrecy import keep_memory_private
from worker.settings import Settings
from worker.store import Claimed, Done, Lease, Release, Request, Retry, Row
from worker.wiring import lease_of, open_canceller, open_exchange, open_store

#: RQ's bound on retries; ours are attempts and deadline.
_ENDLESS = 1_000_000_000
#: A wait up to this long, s, is waited for here; RQ's retries know whole seconds only.
_SHORT_WAIT_S = 3.0
#: All steps of one run of the job together, s: RQ kills a process that is at it for a minute longer than a job's
#: time-out, and after a shutdown it waits for it.
_RUN_S = 20.0
#: When to look again at a job that somebody else has in hand, s.
_HELD_S = 5
#: How often Redis is asked for the gate, and whether RQ's worker was told to leave, while a step is at work, s.
_LOOK_S = 0.5


class CancelFailed(Exception):
    """Raised for an outcome of a failed kind, so that RQ files the job as failed."""


def cancel_algo_order(request: object) -> object:
    """Carry a cancel on in a stock RQ worker.

    Gives the outcome's kind, or RQ's Retry where it goes on later. The job is leased, completed and released as in our
    own worker, so whoever else works on the queue leaves it alone meanwhile.

    Raises:
        CancelFailed: the outcome is of a failed kind.
    """
    job = get_current_job()
    if job is None:
        raise RuntimeError(
            f"{TASK} runs inside an RQ worker; to cancel an order, enqueue it with producer.CancelClient"
        )
    _disarm_rqs_alarm()
    # RQ's connection waits for minutes, repeats what got no answer, and is used in RQ's signal handlers.
    connection = connect(job.connection)
    try:
        return asyncio.run(_StockRun(job, request, connection).run())
    finally:
        connection.connection_pool.disconnect()


def _disarm_rqs_alarm() -> None:
    """RQ would break off a call at the exchange after a minute, whatever became of it; each step here is bounded."""
    if threading.current_thread() is threading.main_thread():
        signal.setitimer(signal.ITIMER_REAL, 0)


class _StockRun:
    """One run of the job function."""

    def __init__(self, job: Job, request: object, connection: redis.Redis) -> None:
        self._job = job
        self._request = request
        settings, exchange, self._server_clock = _exchange()
        self._exchange = exchange
        self._lease_s = lease_of(settings)
        self._holder = job.worker_name or socket.gethostname()
        self._store = open_store(settings, self._holder, job.origin)
        self._link = BlockingLink(connection)
        parts = (settings, exchange, self._server_clock, self._store, self._link, self._holder)
        self._canceller = open_canceller(*parts, sends_late=True)
        self._gate = self._canceller.gate
        self._trust = Trust(self._store.clock)

    async def run(self) -> object:
        ends_ns = local_ns() + round(_RUN_S * 1e9)
        while True:
            asked_ns = local_ns()
            claimed = await self._link.ask(lambda: self._store.claim_one(self._job.id))
            tell_damaged(claimed.damaged)
            self._gate.observe(claimed.gate_until_ms)
            self._canceller.keys.know(claimed.suspects)
            if not claimed.leases:
                return await self._instead(claimed)
            row = await self._carry(claimed.leases[0], asked_ns)
            completed = await self._link.ask(partial(self._store.complete, [row]))
            tell_damaged(completed.damaged)
            answer = completed.answers[0]
            if isinstance(row, Done) and answer == 1:
                tell_outcome(row)
                return await self._ended()
            # Where it was not ours any more, the next claim tells what became of it.
            delay_ms = self._delay_ms(row, answer)
            if delay_ms > _SHORT_WAIT_S * 1000 or local_ns() > ends_ns or not await self._waited(delay_ms):
                return _later(delay_ms)

    async def _waited(self, delay_ms: int) -> bool:
        """Wait so long; False, and at once, if RQ's worker was told to leave."""
        ends_ns = local_ns() + delay_ms * 1_000_000
        while not await self._link.ask(self._is_leaving):
            left_s = (ends_ns - local_ns()) / 1e9
            if left_s <= 0:
                return True
            await asyncio.sleep(min(left_s, _LOOK_S))
        return False

    def _is_leaving(self) -> Request[bool]:
        return self._store.shutdown_asked(self._holder)

    def _delay_ms(self, row: Row, answer: int) -> int:
        now_ms = self._store.clock.now_ms()
        if isinstance(row, Retry):
            return max(answer - now_ms + 1, 0)
        if isinstance(row, Release) and self._gate.closed(now_ms):
            return min(self._gate.until_ms, row.lease.deadline_at_ms) - now_ms
        return 0

    async def _instead(self, claimed: Claimed) -> object:
        """What RQ is told of a job that is not to be worked on now."""
        if claimed.why_not == "settled":
            return await self._ended()
        if claimed.why_not == "scheduled":
            return _later(claimed.until_ms - claimed.now_ms)
        if claimed.why_not == "closed":
            return _later(min(claimed.gate_until_ms, claimed.until_ms) - claimed.now_ms)
        return _later(_HELD_S * 1000) if claimed.why_not == "held" else "gone"

    async def _carry(self, lease: Lease, asked_ns: int) -> Row:
        async def ask() -> None:
            self._trust.doubt()
            self._ask_whose(held)

        held = Held(lease, asked_ns, self._trust, ask)
        with self._renewing(held):
            if not self._server_clock.measured and not self._gate.closed(self._store.clock.now_ms()):
                await self._exchange.ask_time()
            return await self._canceller.carry(lease, held, _decoded(self._request))

    @contextlib.contextmanager
    def _renewing(self, held: Held) -> Iterator[None]:
        """Keep the lease and hear of a closed gate while a step is at work: in a thread, as the step is waited for."""
        ended = threading.Event()
        thread = threading.Thread(target=self._renew, args=(held, ended), name="renewal", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _renew(self, held: Held, ended: threading.Event) -> None:
        # Within bounds: a step that takes longer than this is one that stands still, and is taken over.
        ends_ns = local_ns() + round(2 * _RUN_S * 1e9)
        while local_ns() < ends_ns and not ended.wait(min(self._lease_s / 4, _LOOK_S)):
            self._ask_whose(held)

    def _ask_whose(self, held: Held) -> None:
        """Renew the lease, if it is still ours; no answer leaves it as it is. Who is to leave sends nothing more."""
        asked_ns = local_ns()
        try:
            is_leaving = self._link.ask_now(self._is_leaving())
            beat = self._link.ask_now(self._store.beat([held.lease], None, 1))
        except redis.RedisError as error:
            log.debug("renewal", error=type(error).__name__)
            return
        held.is_over = is_leaving or held.lease.token in beat.lost
        held.renewed(asked_ns, beat.renewed_until_ns)
        self._gate.told(beat.gate_until_ms, self._store.clock.now_ms(), asked_ns)

    async def _ended(self) -> str:
        record = await self._link.ask(lambda: self._store.recorded(self._job.id))
        if record is None:  # older than OUTCOME_TTL_S
            return "settled"
        outcome = decode_outcome(record)
        if outcome.kind.failed:
            self._job.retries_left = 0  # else RQ would run it again
            raise CancelFailed(f"{outcome.kind.value}: {outcome.error}")
        return outcome.kind.value


def _decoded(request: object) -> CancelRequest | None:
    """What RQ has decoded already; None where it makes no sense: decoded anew, it is refused for its reason."""
    try:
        return decode_request(request)
    except MessageError:
        return None


def _later(delay_ms: int) -> rq.Retry:
    """RQ waits whole seconds, and is to come back at all."""
    return rq.Retry(max=_ENDLESS, interval=max(math.ceil(delay_ms / 1000), 0))


@cache
def _exchange() -> tuple[Settings, Exchange, ServerClock]:
    """One for a process; RQ's default worker class has a process for each job."""
    settings = Settings.from_env()
    # RQ's horses end without the interpreter's farewell.
    log.configure_unless_done(settings.log_level, settings.log_format, wait_for_each=True)
    keep_memory_private()
    exchange, clock = open_exchange(settings, one_at_a_time=True)
    return settings, exchange, clock
