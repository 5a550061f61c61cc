"""The function that every job names, as a stock `rq worker` runs it: one step of a cancel for each run of the job."""

from __future__ import annotations

import math
import socket
import time
from dataclasses import replace
from functools import cache

from rq import Retry, get_current_job
from rq.job import Job

from producer.message import TASK, MessageError, decode_outcome, decode_request
from worker.cancel import Canceller
from worker.clock import ServerClock
from worker.exchange import Exchange
from worker.rate_gate import Gate
from worker.settings import Settings
from worker.store import Begun, Claimed, Store
from worker.wiring import open_canceller, open_exchange, open_store

#: RQ's bound on retries; ours are attempts and deadline.
_ENDLESS = 1_000_000_000
#: How long a step waits for a worker of ours that has its job in hand, s: most answers come within it.
_HELD_S = 5.0


class CancelFailed(Exception):
    """Raised for an outcome of a failed kind, so that RQ files the job as failed."""


class Unfenced:
    """The hold of a stock RQ worker, which has no lease."""

    def lost(self) -> bool:
        """Never, as far as anybody can tell."""
        return False


def cancel_algo_order(request: object) -> object:
    """Run one step of a cancel in a stock RQ worker.

    Gives the outcome's kind, or RQ's Retry where another step is to follow; the outcome is recorded as our own worker
    records it, and the first one of a run stands.

    Raises:
        CancelFailed: the outcome is of a failed kind.
    """
    job = get_current_job()
    if job is None:
        raise RuntimeError(
            f"{TASK} runs inside an RQ worker; to cancel an order, enqueue it with producer.CancelClient"
        )
    store, gate, canceller = _tools(job)
    claimed, found = _begin(job, store)
    if found is Begun.SETTLED:
        return _ended(job, store)
    if found is Begun.HELD:
        return _retry(1)
    gate.observe(claimed.gate_until_ms)
    now_ms, deadline_at_ms = store.clock.now_ms(), claimed.grants[0].deadline_at_ms
    if gate.closed(now_ms) and now_ms < deadline_at_ms:
        return _retry(min(gate.until_ms, deadline_at_ms) - now_ms)
    if now_ms < deadline_at_ms:
        _measure_clock()
    try:
        decoded = decode_request(request)
        settlement = canceller.work(claimed.grants[0], Unfenced(), decoded)
    except MessageError:
        # Decoded anew there, for the reason of the refusal.
        settlement = canceller.work(replace(claimed.grants[0], data=job.data), Unfenced())
    (answer,) = store.settle([settlement])
    if settlement.outcome is None or answer == 2:
        return _retry(settlement.delay_ms or 0)
    return _ended(job, store)


def _begin(job: Job, store: Store) -> tuple[Claimed, Begun]:
    """Begin a step; while a worker of ours has the job in hand, wait for its end, which RQ is then told of."""
    ends_at = time.monotonic() + _HELD_S
    while (begun := store.begin(job.id))[1] is Begun.HELD and time.monotonic() < ends_at:
        time.sleep(0.1)
    return begun


def _retry(delay_ms: int) -> Retry:
    """RQ waits whole seconds."""
    return Retry(max=_ENDLESS, interval=math.ceil(max(delay_ms, 0) / 1000))


def _ended(job: Job, store: Store) -> str:
    record = store.recorded(job.id)
    if record is None:  # older than OUTCOME_TTL_S
        return "settled"
    outcome = decode_outcome(record)
    if outcome.kind.failed:
        job.retries_left = 0  # else RQ would run it again
        raise CancelFailed(f"{outcome.kind.value}: {outcome.error}")
    return outcome.kind.value


@cache
def _exchange() -> tuple[Settings, Exchange, ServerClock]:
    """One for a process; RQ's default worker class has a process for each job."""
    settings = Settings.from_env()
    exchange, clock = open_exchange(settings)
    return settings, exchange, clock


def _measure_clock() -> None:
    """Once for a process, and not before the gate was looked at: it is a request like any other."""
    _, exchange, clock = _exchange()
    if not clock.measured:
        exchange.sync_time(samples=1)


def _tools(job: Job) -> tuple[Store, Gate, Canceller]:
    settings, exchange, clock = _exchange()
    worker = job.worker_name or socket.gethostname()
    store = open_store(job.connection, settings, worker, job.origin)
    canceller, gate = open_canceller(settings, exchange, clock, store, worker)
    return store, gate, canceller
