"""The composition root: settings in, ready-made parts out. Used by the worker, the stock task and `check` alike."""

from __future__ import annotations

import socket
from functools import partial

import redis

from worker.cancel import Canceller, policy_of
from worker.clock import ServerClock, SleepWatch
from worker.engine import Engine
from worker.exchange import Exchange
from worker.key_breaker import FAILURES, PROBE_EVERY_MS, KeyBreaker
from worker.rate_gate import Gate
from worker.redis_link import AsyncLink, Link, connect
from worker.settings import Settings
from worker.store import Store, Suspect
from worker.transport import Route, Transport


def lease_of(settings: Settings) -> float:
    """How long a lease is given for, s: an eighth less than LEASE_S.

    LEASE_S is about when a dead worker's job runs again. Peers look once a second, so the lease itself ends earlier.
    """
    return settings.lease_s * 7 / 8


def open_redis(settings: Settings) -> redis.Redis:
    """The worker's blocking client; it connects at its first command."""
    return connect(settings.redis_url, **settings.redis_options())


def open_exchange(settings: Settings, *, one_at_a_time: bool = False) -> tuple[Exchange, ServerClock]:
    """The client of the exchange and its clock, which is not measured yet; ``one_at_a_time``: for who has no loop."""
    route, clock = route_of(settings), ServerClock()
    transport: Transport
    if one_at_a_time:
        from worker.transport_requests import RequestsTransport

        transport = RequestsTransport(route)
    else:
        from worker.transport_asyncio import AsyncioTransport

        transport = AsyncioTransport(route, pool_size=settings.concurrency + 2)
    return Exchange(transport, recv_window_ms=settings.recv_window_ms, clock=clock), clock


def route_of(settings: Settings) -> Route:
    """The way to the exchange."""
    return Route(settings.base_url, egress_proxy_url=settings.egress_proxy_url, ca_file=settings.exchange_tls_ca)


def open_store(settings: Settings, holder: str, queue: str, *, gate_scope: str | None = None) -> Store:
    """The holder's view of the queue; ``gate_scope``: a gate of its own in place of the one that the settings say."""
    return Store(
        queue,
        holder,
        gate_scope=gate_scope or ("all" if settings.rate_limit_scope == "all" else socket.gethostname()),
        lease_ms=round(lease_of(settings) * 1000),
        deadline_ms=round(settings.deadline_s * 1000),
        outcome_ttl_s=settings.outcome_ttl_s,
        ledger_maxlen=settings.ledger_maxlen,
    )


def open_canceller(
    settings: Settings,
    exchange: Exchange,
    server_clock: ServerClock,
    store: Store,
    link: Link,
    holder: str,
    *,
    sends_late: bool = False,
) -> Canceller:
    """What carries a job out; ``sends_late`` as in :class:`Canceller`."""

    async def publish(pause_ms: int, reason: str, doubling: bool) -> int:
        return await link.ask(partial(store.close_gate, pause_ms, reason, doubling))

    async def ask_breaker(key: Suspect, what: str, word: str | bytes) -> tuple[int, str]:
        return await link.ask(partial(store.key, key, what, word, FAILURES, PROBE_EVERY_MS))

    return Canceller(
        exchange=exchange,
        server_clock=server_clock,
        redis_clock=store.clock,
        gate=Gate(publish),
        keys=KeyBreaker(ask_breaker, tries=not sends_late),  # a stock worker begins a process for each job
        policy=policy_of(settings),
        credential_for=settings.credential_for,
        holder=holder,
        sends_late=sends_late,
        flight=1 if sends_late else settings.concurrency,
    )


def open_engine(
    settings: Settings,
    exchange: Exchange,
    server_clock: ServerClock,
    store: Store,
    like: redis.Redis,
    holder: str,
    *,
    life_s: int,
    sleep: SleepWatch | None = None,
) -> Engine:
    """A loop's engine, on two links of its own to where ``like`` connects to."""
    claims, rest = AsyncLink(like), AsyncLink(like)
    canceller = open_canceller(settings, exchange, server_clock, store, rest, holder)
    lease_s = lease_of(settings)
    return Engine(settings.concurrency, store, (claims, rest), canceller, lease_s=lease_s, life_s=life_s, sleep=sleep)
