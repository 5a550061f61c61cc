"""`python -m worker check`: is everything that a worker needs there, and does the exchange accept its keys?

Sends nothing that could change an order: the exchange's time, its limits, and for each account one signed query for an
order that cannot exist.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import redis

from producer.message import MAX_ALGO_ID, Call
from producer.redis_url import why
from worker.classify import Means, OrderRef, classify
from worker.clock import ServerClock
from worker.exchange import Exchange
from worker.settings import Settings
from worker.signing import Credential
from worker.store import ANSWER_WITHIN_S
from worker.wiring import open_exchange, open_redis

#: An id that no order has: the largest that the field can hold.
_NO_ORDER = OrderRef(MAX_ALGO_ID)


class Fault(StrEnum):
    """Who has to act on a failed check."""

    NONE = "ok"
    UNREACHABLE = "unreachable"
    SETTINGS = "settings"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    what: str
    said: str
    fault: Fault = Fault.NONE


def check(settings: Settings) -> Iterator[Finding]:
    """Look at one thing after the other; each finding is given as soon as it is known."""
    yield Finding("settings", f"queue {settings.queue}, {len(settings.credentials)} account(s)")
    yield _redis(settings)
    exchange, clock = open_exchange(settings, one_at_a_time=True)
    try:
        time = _time(settings, exchange, clock)
        yield time
        if time.fault is not Fault.NONE:
            return
        limit = asyncio.run(exchange.weight_limit())
        yield Finding("limits", f"{limit} weight a minute" if limit else "not told by the exchange; 2400 is assumed")
        for account, credential in sorted(settings.credentials.items()):
            yield _key(account, credential, exchange)
    finally:
        exchange.close()


def _redis(settings: Settings) -> Finding:
    shown = settings.display_redis_url
    connection = open_redis(settings)
    try:
        info: dict[str, object] = connection.info("server")
    except redis.AuthenticationError:
        return Finding("redis", f"{shown} refused the login", Fault.UNREACHABLE)
    except (redis.ConnectionError, redis.TimeoutError) as error:
        return Finding(
            "redis",
            f"{shown} does not answer within {ANSWER_WITHIN_S:g} s ({why(error)})",
            Fault.UNREACHABLE,
        )
    finally:
        connection.close()
    return Finding("redis", f"{shown} answers, {info.get('server_name', 'redis')} {info.get('redis_version')}")


def _time(settings: Settings, exchange: Exchange, clock: ServerClock) -> Finding:
    if asyncio.run(exchange.sync_time()):
        return Finding(
            "exchange", f"{settings.base_url} answers; its clock is {clock.offset_ms:+d} ms from this host's"
        )
    return Finding("exchange", f"{settings.base_url} does not tell its time", Fault.UNREACHABLE)


def _key(account: str, credential: Credential, exchange: Exchange) -> Finding:
    what = f"key of {account}"
    answer = asyncio.run(exchange.call(Call.QUERY, credential, _NO_ORDER))
    assert answer is not None  # nothing kept it from going
    verdict = classify(Call.QUERY, _NO_ORDER, answer)
    said = " ".join(str(part) for part in (verdict.http, verdict.code, verdict.msg) if part not in (None, ""))
    if verdict.means is Means.NO_SUCH_ORDER:
        return Finding(what, f"accepted ({credential.kind}, …{credential.api_key[-4:]})")
    if verdict.means in (Means.KEY_REFUSED, Means.DENIED):
        return Finding(what, f"refused: {said}", Fault.SETTINGS)
    return Finding(what, f"not answered as expected: {verdict.means} {said}", Fault.UNREACHABLE)
