"""Who may do what in Redis: a user for each part of the system with no more rights than it needs, as lines for its ACL.

The commands are those of the scripts and conversations, the keys those of :class:`producer.keys.Keys`: tests hold both
against the code, and run every part under its user. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from producer.keys import Keys, set_aside


class Role(StrEnum):
    """A user of Redis."""

    STRATEGY = "strategy"  # enqueues, waits, follows the ledger; can write no outcome, gate or breaker
    READER = "reader"  # status, exporter, the page without a token
    OPERATOR = "operator"  # what both of these may; retries failed requests, opens a gate
    WORKER = "worker"  # `python -m worker`, `check`, `health`
    STOCK = "stock"  # a stock `rq worker` of this queue, and RQ's own tools: all that RQ keeps in this Redis
    REHEARSAL = "rehearsal"  # `python -m worker rehearse`, whatever the queue


@dataclass(frozen=True, slots=True)
class Grant:
    """Commands, as an ACL names them, that may be used on these keys and on no others."""

    keys: tuple[str, ...]
    commands: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rights:
    """All that a user may do: ``commands`` on keys that it only ``reads`` or ``owns``, and what its grants add."""

    commands: tuple[str, ...]
    reads: tuple[str, ...] = ()
    owns: tuple[str, ...] = ()
    grants: tuple[Grant, ...] = ()
    channels: tuple[str, ...] = ()

    def line(self, name: str, *, redis_6: bool) -> str:
        """The line for a user of this name."""
        words = ["reset", "resetchannels", "on", f">{name.upper()}-PASSWORD", *(f"&{each}" for each in self.channels)]
        if redis_6:
            keys = [*self.reads, *self.owns, *(key for grant in self.grants for key in grant.keys)]
            commands = [*self.commands, *_CLIENT_OF_6, *(each for grant in self.grants for each in grant.commands)]
            words += [*dict.fromkeys(f"~{key}" for key in keys), *commands]
        else:
            words += [*(f"%R~{key}" for key in self.reads), *(f"~{key}" for key in self.owns), *self.commands]
            words.append(_NO_TRACKING)
            for grant in self.grants:
                words.append(f"({' '.join([*(f'~{key}' for key in grant.keys), *grant.commands])})")
        return f"ACL SETUSER {name} {' '.join(words)}"


#: To greet, choose a database, wait for the disk, and read the values of keys. By category, as no server takes a line
#: that names what only newer ones know; without what is dangerous, and without what tells the names of others' keys.
_BASE = ("+@connection", "+@read", "-@dangerous", "-@keyspace", "+exists", "+type", "+ttl", "+pttl", "+select", "+time")
_SCRIPTS = ("+eval", "+evalsha")
#: Redis 6.2 calls all of CLIENT dangerous; every library tells its name by it.
_CLIENT_OF_6 = ("+client|setinfo", "+client|setname", "+client|info", "+client|maint_notifications")
#: CLIENT TRACKING tells the names of all keys that anybody writes. On Redis 6.2 it is dangerous, as all of CLIENT.
_NO_TRACKING = "-client|tracking"
_WORKS = (*_SCRIPTS, "+script|load", "+publish", "+subscribe", "+unsubscribe", "+multi", "+exec", "+discard", "+info")
_WORKERS_WRITES = (
    *("+del", "+expire", "+pexpire", "+persist", "+rename", "+hset", "+hdel", "+hincrby", "+set", "+xadd"),
    *("+lpush", "+rpush", "+lpop", "+lrem", "+blmove", "+sadd", "+srem", "+spop", "+zadd", "+zrem"),
    *("+bitfield", "+setrange"),
)


def acl_lines(keys: Keys, *, redis_6: bool = False) -> list[str]:
    """A line for each :class:`Role`, with a word in the place of its password.

    ``redis_6``: for Redis 6.2, which can neither allow to read a key and not to write it, nor a command on some keys
    alone: there a user may use each of its commands on each of its keys.
    """
    return [_RIGHTS[role](keys).line(role, redis_6=redis_6) for role in Role]


def _strategy(keys: Keys) -> Rights:
    jobs, orders, records = f"{keys.job_prefix}*", f"{keys.order_prefix}*", f"{keys.outcome_prefix}*"
    states = (keys.waiting, keys.scheduled, keys.failed, keys.unfinished)
    workers = (keys.queue_workers, f"{keys.worker_prefix}*")
    grants = (
        Grant((jobs,), ("+hset", "+hdel", "+persist")),
        Grant((keys.waiting,), ("+lpush", "+rpush")),
        Grant((keys.unfinished,), ("+zadd",)),
        Grant((keys.queues,), ("+sadd",)),
        Grant((orders, keys.durable), ("+set",)),
    )
    return Rights((*_BASE, *_SCRIPTS), reads=(jobs, *states, orders, records, keys.outcomes, *workers), grants=grants)


def _reader(keys: Keys) -> Rights:
    states = (keys.waiting, keys.scheduled, keys.failed, keys.suspended)
    jobs = (f"{keys.job_prefix}*", f"{keys.result_prefix}*")
    workers = (keys.queue_workers, f"{keys.worker_prefix}*")
    return Rights(_BASE, reads=(*states, *jobs, *workers, f"{keys.queue}:*", keys.gate("*")))


def _operator(keys: Keys) -> Rights:
    mine = _strategy(keys)
    grants = (*mine.grants, Grant((keys.failed,), ("+zrem",)), Grant((keys.gate("*"),), ("+hset",)))
    return replace(mine, reads=_reader(keys).reads, grants=grants)


def _worker(keys: Keys) -> Rights:
    registries = (keys.started, keys.scheduled, keys.finished, keys.failed, keys.canceled)
    shared = (keys.waiting, keys.intermediate, *registries, keys.queues, keys.workers, keys.queue_workers)
    own = (f"{keys.job_prefix}*", f"{keys.result_prefix}*", f"{keys.worker_prefix}*", f"{keys.queue}:*", keys.gate("*"))
    return Rights(
        (*_BASE, *_WORKS, *_WORKERS_WRITES),
        reads=(keys.suspended,),
        owns=(*shared, set_aside(f"{keys.rq}:*"), *own),
        channels=(f"{keys.rq}:pubsub:*",),
    )


def _stock(keys: Keys) -> Rights:
    commands = (*_BASE, "+@write", "-@dangerous", *_WORKS, "+script|exists", "+watch", "+unwatch")
    owns = (f"{keys.rq}:*", f"{keys.queue}:*", keys.gate("*"))
    return replace(_worker(keys), commands=commands, reads=(), owns=owns)


def _rehearsal(keys: Keys) -> Rights:
    own = Keys("acq-rehearsal-*", keys.rq)  # each has a queue of its own, and a channel that says that it lives
    mine = _worker(own)
    channels = (f"{own.outcome_prefix}*", *mine.channels)
    return replace(mine, commands=(*mine.commands, "+pubsub|numsub"), channels=channels)


_RIGHTS = {
    Role.STRATEGY: _strategy,
    Role.READER: _reader,
    Role.OPERATOR: _operator,
    Role.WORKER: _worker,
    Role.STOCK: _stock,
    Role.REHEARSAL: _rehearsal,
}
