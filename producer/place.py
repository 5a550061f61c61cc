"""Where a client's connections lead, and how one is made: from a URL, or from a connection that a caller brought.

The caller's own is only read: its pool bounds, repeats and decodes as its owner wants, which a client must not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import redis
import redis.asyncio as aio
import redis.asyncio.sentinel
import redis.sentinel
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from producer.protocol import TIMEOUT_S
from producer.redis_url import FORMS, Address, BadRedisUrl
from producer.untrusted import InvalidRequest, not_a

#: Connections of redis-py that can be replaced by ours, which find the primary and know when it is none any more.
_STANDARD = (
    redis.Connection,
    redis.SSLConnection,
    redis.UnixDomainSocketConnection,
    redis.sentinel.SentinelManagedConnection,
    redis.sentinel.SentinelManagedSSLConnection,
    aio.Connection,
    aio.SSLConnection,
    aio.UnixDomainSocketConnection,
    redis.asyncio.sentinel.SentinelManagedConnection,
    redis.asyncio.sentinel.SentinelManagedSSLConnection,
)
#: Options of a caller's pool that bound, repeat or decode, or are bound to that pool.
_THEIRS = frozenset(
    {
        "retry_on_timeout",
        "retry_on_error",
        "health_check_interval",
        "encoding",
        "encoding_errors",
        "maint_notifications_config",
        "maint_notifications_pool_handler",
    }
)


@dataclass(frozen=True, slots=True)
class Place:
    """``address`` is fit to be shown; ``timeout_s`` is how long a call may take."""

    address: str
    timeout_s: float
    make: Callable[[], Any]  # a connection that is not opened yet

    @classmethod
    def of(cls, client: redis.Redis | aio.Redis, wanted: type, other: type, other_client: str) -> Place:
        """That of a connection of redis-py which is ``wanted``.

        Raises:
            InvalidRequest: it is another thing, or has options that no connection takes.
        """
        _check(client, wanted, other, other_client)
        is_async = wanted is aio.Redis
        pool: Any = client.connection_pool
        timeout_s = float(pool.connection_kwargs.get("socket_timeout") or TIMEOUT_S)
        ours = Address.of(client)
        if pool.connection_class in _STANDARD and not pool.connection_kwargs.get("redis_connect_func"):
            pool = (ours.async_client(timeout_s) if is_async else ours.client(timeout_s)).connection_pool
        options = {name: value for name, value in pool.connection_kwargs.items() if name not in _THEIRS}
        options |= {"protocol": 2, "decode_responses": False}
        if is_async:
            # Every wait is bounded from outside.
            options |= {"retry": AsyncRetry(NoBackoff(), 0), "socket_timeout": None}
            options["socket_connect_timeout"] = timeout_s
        else:
            options["retry"] = Retry(NoBackoff(), 0)
        place = cls(ours.shown, timeout_s, lambda: pool.connection_class(**options))
        try:
            place.make()
        except (TypeError, ValueError, redis.RedisError) as error:
            raise InvalidRequest("options", sorted(options), f"{type(error).__name__}: {error}") from None
        return place


def _check(connection: Any, wanted: type, other: type, other_client: str) -> None:
    if isinstance(connection, wanted) and hasattr(connection, "connection_pool"):
        return
    cure = f"give a {wanted.__module__.rpartition('.')[0]}.{wanted.__name__}, or use from_url"
    if isinstance(connection, other):
        cure = f"use {other_client} with it"
    name = f"{type(connection).__module__}.{type(connection).__qualname__}"
    raise InvalidRequest("connection", name, f"must be a connection to one Redis, not {name}: {cure}")


def checked_url(url: object) -> Address:
    """What a URL says; the error shows nothing of it, since a password may stand anywhere.

    Raises:
        InvalidRequest: it leads to no Redis.
    """
    if not isinstance(url, str):
        raise InvalidRequest("url", url, f"must be {FORMS}{not_a(url, str, 'give text')}")
    try:
        return Address.parse(url)
    except BadRedisUrl as error:
        reason = f"; {error}" if str(error) else ""
        raise InvalidRequest("url", "...", f"must be {FORMS}{reason}") from None
