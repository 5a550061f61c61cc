"""A queue of a rehearsal's own, with a worker of its own on it, and nothing of either left behind.

The queue's name is the order's client id, so that whoever finds one of the two knows the other. As long as a
rehearsal lives it listens to a channel of that name: what nobody listens to was left by one that was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from uuid import uuid4

import redis

from producer import AsyncCancelClient, Outcome
from producer.keys import JobField, Keys, suspect_of
from producer.message import MAX_ID_BYTES
from producer.redis_url import Address, passes
from worker.check_redis import shared_keys
from worker.clock import ServerClock
from worker.engine import Engine
from worker.exchange import Exchange
from worker.settings import Settings
from worker.store import ANSWER_WITHIN_S
from worker.transport import Transport
from worker.wiring import open_engine, open_redis, open_store

__all__ = ["NAME", "OwnQueue", "cancelled"]

#: Names of rehearsals: of their queues, and of their orders.
NAME = re.compile(r"acq-rehearsal-[0-9a-f]{16}")
#: How long Redis keeps what a killed rehearsal has left, s.
_LEFT_FOR_S = 3_600
#: How long a cancel is worth pursuing, s: shorter than the demo exchange leaves a stop alone (exchange.md 5).
_DEADLINE_S = 30.0
#: How long after its deadline an outcome is waited for, s.
_PATIENCE_S = 10.0
#: How often the outcome is looked for, and leases are renewed, s.
_LOOK_S, _BEAT_S = 0.1, 0.5
#: How long the worker may take to end, s.
_END_S = 5.0
#: The worker's requests in flight.
_FLIGHT = 4
#: Most jobs that are looked for (a rehearsal has one), and most queues of a Redis.
_MOST, _MOST_QUEUES = 100, 10_000


class OwnQueue:
    """The queue of one rehearsal. Methods raise redis.RedisError where Redis does not answer, or refuses."""

    def __init__(self, settings: Settings) -> None:
        self.name = f"acq-rehearsal-{uuid4().hex[:16]}"
        #: The way to the Redis that it stands in.
        self.connection = open_redis(settings)
        self._sign_of_life = self.connection.pubsub(ignore_subscribe_messages=True)

    def open(self) -> None:
        """Be known to live."""
        self._sign_of_life.subscribe(_channel(self.name))
        self._sign_of_life.get_message(timeout=_END_S)

    def lives(self, name: str) -> bool:
        """Whether another rehearsal of this name works on this Redis."""
        ((_, listeners),) = self.connection.pubsub_numsub(_channel(name))
        return int(listeners) > 0

    def left_behind(self) -> list[str]:
        """Queues of rehearsals that were killed."""
        queues = self._asked("SRANDMEMBER", Keys().queues, _MOST_QUEUES) or []
        names = (queue.decode("utf-8", "replace").removeprefix(Keys("").waiting) for queue in queues)
        return [name for name in names if NAME.fullmatch(name) and name != self.name and not self.lives(name)]

    def remove(self, name: str) -> None:
        """Remove a queue, with all that belongs to it."""
        keys = Keys(name)
        self.connection.delete(*self._keys_of(keys))
        self.connection.srem(keys.queues, keys.waiting)  # last: by this it is found

    def close(self) -> None:
        """Remove the queue, and part with Redis."""
        try:
            self.remove(self.name)
        finally:
            self._sign_of_life.close()
            self.connection.close()

    def make_mortal(self) -> None:
        """Have Redis drop all of it some time, should nobody remove it."""
        with self.connection.pipeline(transaction=False) as pipeline:
            for key in self._keys_of(Keys(self.name)):
                pipeline.expire(key, _LEFT_FOR_S)
            pipeline.execute()

    def _keys_of(self, keys: Keys) -> list[Any]:
        ids = {*self._ids("ZRANGE", keys.unfinished, keys.scheduled, keys.finished, keys.failed, keys.canceled)}
        ids |= {*self._ids("LRANGE", keys.waiting, keys.claiming, keys.intermediate)}
        of_jobs: list[bytes] = []
        for each in ids:
            told = self._asked("HMGET", keys.job_prefix.encode() + each, "origin", JobField.ORDER) or [None, None]
            if told[0] in (keys.queue.encode(), None):  # whatever somebody wrote there, another queue's job stays
                prefixes = (keys.job_prefix, keys.result_prefix, keys.outcome_prefix)
                of_jobs += [prefix.encode() + each for prefix in prefixes]
                of_jobs.append(keys.order_prefix.encode() + (told[1] or b""))
        suspects = self._asked("SRANDMEMBER", keys.suspects, _MOST) or []
        prints = [suspect_of(member)[1].decode("utf-8", "replace") for member in suspects]
        others = {keys.queues, keys.workers, keys.gate("all")}
        shared = {*shared_keys(keys), keys.durable, keys.gate(keys.queue)} - others
        return [*shared, *map(keys.breaker, prints), *map(keys.held, prints), *of_jobs]

    def _ids(self, command: str, *keys: str) -> Iterator[bytes]:
        for key in keys:
            members = self._asked(command, key, 0, _MOST) or []
            yield from (member for member in members if isinstance(member, bytes) and len(member) <= MAX_ID_BYTES)

    def _asked(self, *words: Any) -> Any:
        """An answer; None where a key has another type than it should."""
        try:
            return self.connection.execute_command(*words)
        except redis.ResponseError as error:
            if passes(error):
                raise
            return None


async def cancelled(
    algo_id: int,
    account: str,
    settings: Settings,
    queue: OwnQueue,
    transport: Transport,
    clock: ServerClock,
    check: Callable[[], None],
) -> Outcome | None:
    """Cancel an order as a strategy does, by a worker's engine on the queue: all of a worker but its registration with
    RQ. None: no outcome came, though the deadline has passed.

    ``check`` is asked again and again whether to go on; what it raises ends the wait.

    Raises:
        CancelQueueError: Redis does not answer, or refuses.
    """
    deadline_s = min(settings.deadline_s, _DEADLINE_S)
    settings = replace(settings, concurrency=_FLIGHT, deadline_s=deadline_s, outcome_ttl_s=_LEFT_FOR_S)
    store = open_store(settings, queue.name, queue.name, gate_scope=queue.name)
    exchange = Exchange(transport, recv_window_ms=settings.recv_window_ms, clock=clock)
    engine = open_engine(settings, exchange, clock, store, queue.connection, queue.name, life_s=_LEFT_FOR_S)
    like = Address.of(queue.connection).async_client(ANSWER_WITHIN_S)
    working, beating = asyncio.create_task(engine.run()), asyncio.create_task(_beat(engine))
    try:
        async with AsyncCancelClient(like, queue.name) as client:
            ticket = await client.cancel(algo_id=algo_id, account=account, deadline_s=deadline_s)
            ends_at_s = time.monotonic() + deadline_s + _PATIENCE_S
            while (outcome := await client.outcome(ticket)) is None and time.monotonic() < ends_at_s:
                check()
                queue.make_mortal()
                await asyncio.sleep(_LOOK_S)
            queue.make_mortal()
            return outcome
    finally:
        engine.stop()
        await asyncio.wait([working], timeout=_END_S)
        for task in (working, beating):
            task.cancel()
        exchange.close()


async def _beat(engine: Engine) -> None:
    while True:
        with contextlib.suppress(redis.RedisError):
            await engine.beat(None)
        await asyncio.sleep(_BEAT_S)


def _channel(name: str) -> str:
    return Keys(name).outcome_prefix + name
