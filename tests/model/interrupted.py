"""A connection for RQ's own code: other things happen between its round trips, and its process may die there."""

from __future__ import annotations

import threading
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.model.world import World


class Killed(BaseException):
    """The process that used the connection is gone: nothing of it runs any more."""


class Life:
    """One process' life, as long as it lasts. ``trips``: after so many round trips it is killed; None: it is not."""

    def __init__(self, world: World, trips: int | None) -> None:
        self.is_over = False
        self._world = world
        self._trips = trips

    def between(self) -> None:
        """Called before each round trip: the process may die here, else other things may happen.

        Raises:
            Killed: it died here or before.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        if self._trips is not None:
            self._trips -= 1
            self.is_over = self.is_over or self._trips < 0
        if self.is_over:
            raise Killed
        self._world.meanwhile()


#: What redis-py says of itself: it tidies up in finalizers, on a new connection if need be, and thus in the middle of
#: anything that this process does.
_OF_REDIS_PY = (b"UNWATCH", b"HELLO", b"SETINFO", b"MAINT_NOTIFICATIONS")


class Interrupted(redis.Connection):
    """A connection of a process with such a life."""

    def __init__(self, *, life: Life, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self.life = life

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """Let other things happen first."""
        sent = b"".join(command)
        if not any(word in sent for word in _OF_REDIS_PY):
            self.life.between()
        elif self.life.is_over:
            raise redis.ConnectionError("it is dead") if b"UNWATCH" in sent else Killed
        super().send_packed_command(command, check_health)  # type: ignore[no-untyped-call]


def open_for(life: Life, world: World) -> redis.Redis:
    """A client whose connections share a life."""
    port = world.raw.connection_pool.connection_kwargs["port"]
    pool = redis.ConnectionPool(
        connection_class=Interrupted,
        life=life,
        port=port,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=10,
    )
    return redis.Redis.from_pool(pool)  # closes its connections with itself
