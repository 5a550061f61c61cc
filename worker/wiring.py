"""The composition root: settings in, ready-made parts out. Used by the worker, the stock task and `check` alike."""

from __future__ import annotations

import socket

import redis

from worker.cancel import Canceller, policy_of
from worker.clock import ServerClock
from worker.exchange import Exchange
from worker.key_breaker import KeyBreaker
from worker.rate_gate import Gate
from worker.settings import Settings
from worker.store import Store, connect


def lease_of(settings: Settings) -> float:
    """How long a lease is given for, s: an eighth less than LEASE_S.

    LEASE_S is about when a dead worker's job runs again. Peers look once a second, so the lease itself ends earlier.
    """
    return settings.lease_s * 7 / 8


def open_redis(settings: Settings) -> redis.Redis:
    """The worker's client; it connects at its first command."""
    return connect(settings.redis_url, **settings.redis_options())


def open_exchange(settings: Settings) -> tuple[Exchange, ServerClock]:
    """The client of the exchange and its clock, which is not measured yet."""
    clock = ServerClock()
    exchange = Exchange(
        settings.base_url,
        recv_window_ms=settings.recv_window_ms,
        clock=clock,
        pool_size=settings.concurrency + 2,
        egress_proxy_url=settings.egress_proxy_url,
    )
    return exchange, clock


def open_store(connection: redis.Redis, settings: Settings, worker: str, queue: str) -> Store:
    """The worker's view of the queue."""
    return Store(
        connection,
        queue,
        worker,
        gate_scope="all" if settings.rate_limit_scope == "all" else socket.gethostname(),
        lease_ms=round(lease_of(settings) * 1000),
        deadline_ms=round(settings.deadline_s * 1000),
        outcome_ttl_s=settings.outcome_ttl_s,
        ledger_maxlen=settings.ledger_maxlen,
    )


def open_canceller(
    settings: Settings, exchange: Exchange, clock: ServerClock, store: Store, worker: str
) -> tuple[Canceller, Gate]:
    """What carries a job out, and the gate that it looks at."""
    gate = Gate(store.close_gate)
    canceller = Canceller(
        exchange=exchange,
        clock=clock,
        gate=gate,
        keys=KeyBreaker(store),
        policy=policy_of(settings),
        credential_for=settings.credential_for,
        now_ms=store.clock.now_ms,
        worker=worker,
    )
    return canceller, gate
