"""The part of `check` that asks Redis: what it is, whether it keeps what it is told, whether a worker can work there.

What a worker does is rehearsed on keys that nobody else has and that are gone afterwards: what a server says of itself
may be forbidden to this user, or wrong.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from uuid import uuid4

import redis
from rq.command import PUBSUB_CHANNEL_TEMPLATE

from producer.keys import Keys, set_aside
from producer.redis_url import NotPrimary, NotSupported, code_of, passes, why
from producer.untrusted import clean_text
from worker.store import ANSWER_WITHIN_S

__all__ = ["Fault", "Finding", "look_at_redis", "shared_keys"]


class Fault(StrEnum):
    """Who has to act on a finding."""

    NONE = "ok"
    WARNING = "warning"  # a worker can work all the same
    UNREACHABLE = "unreachable"
    SETTINGS = "settings"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    what: str
    said: str
    fault: Fault = Fault.NONE


#: The oldest Redis that has all that the scripts need.
_OLDEST = (6, 2)
#: What the server says where it cannot be worked with, by a word of its error: what it means, and the way out.
_STATES = {
    "OOM": "it is full (maxmemory): nothing can be enqueued; raise maxmemory or remove what is not needed",
    "READONLY": "it is a read-only replica: REDIS_URL must lead to the primary (or to its Sentinels)",
    "MISCONF": "it cannot save to its disk and takes no writes: free its disk, see its log",
    "NOREPLICAS": "it takes no writes while it lacks replicas (min-replicas-to-write): bring them back",
    "MASTERDOWN": "it is a replica that has lost its primary: REDIS_URL must lead to the primary",
    "LOADING": "it is loading its data and cannot be asked yet: workers wait for it",
    "BUSY": "somebody's script has been running for too long: workers wait; SCRIPT KILL on the server ends it",
}
#: How servers say which right is missing, for a key or channel and for a command, also to a script.
_REACH = re.compile(r"\b(?:access|publish to)\b.*\b(key|channel)s?\b")
_NO_RIGHT = re.compile(r"no permissions?\b|can't run this command|NOPERM", re.IGNORECASE)
#: Carries each row out as the worker's scripts do; gives command, key and error of those that failed.
_REHEARSAL = """
local faults, at = {}, 1
while ARGV[at] do
  local last = at + tonumber(ARGV[at])
  local said = redis.pcall(unpack(ARGV, at + 1, last))
  if type(said) == 'table' and said.err then
    faults[#faults + 1] = ARGV[at + 1]
    faults[#faults + 1] = ARGV[at + 2] or ''
    faults[#faults + 1] = said.err
  end
  at = last + 1
end
return faults
"""


def look_at_redis(connection: redis.Redis, shown: str, queue: str) -> Iterator[Finding]:
    """What can be said of the server at the other end; ``shown`` is its address fit to be shown.

    A finding that is :attr:`Fault.UNREACHABLE` is the last one.
    """
    try:
        connection.ping()
        info = _info(connection)
    except redis.RedisError as error:
        yield Finding("redis", f"{shown} {_why_not(error)}", Fault.UNREACHABLE)
        return
    if _is_too_old(info):
        yield Finding("redis", f"{shown} is {_name(info)}: Redis 6.2 or later, or Valkey, is needed", Fault.UNREACHABLE)
        return
    yield Finding("redis", f"{shown} answers, {_name(info)}")
    keys = Keys(queue)
    if (problem := _rehearse(connection, keys)) is not None:
        yield Finding("redis work", problem, Fault.UNREACHABLE)
        return
    yield Finding("redis work", "scripts, blocking move, channels and streams work on throwaway keys")
    for warning in _warnings(info):
        yield Finding("redis", warning, Fault.WARNING)
    for damaged in _damaged(connection, keys):
        yield Finding("redis keys", damaged, Fault.WARNING)


def _why_not(error: redis.RedisError) -> str:
    if isinstance(error, redis.AuthenticationError | redis.exceptions.AuthorizationError):
        return "refused the login: set user and password in REDIS_URL"
    if (state := _state(error)) is not None:
        return f"cannot serve: {state}"
    if isinstance(error, NotPrimary | NotSupported):
        way_out = ": REDIS_URL must lead to the primary, or name its Sentinels" if isinstance(error, NotPrimary) else ""
        return f"cannot be used: {error}{way_out}"
    if passes(error):
        return f"does not answer within {ANSWER_WITHIN_S:g} s ({why(error)})"
    return f"cannot be used ({why(error)})"


def _state(error: redis.RedisError) -> str | None:
    """What a state of the server means, if an error tells of one."""
    return _STATES.get(code_of(error))


# ---- what it says of itself -----------------------------------------------------------------------------------------


def _info(connection: redis.Redis) -> Mapping[str, Any]:
    """All that INFO tells; nothing where this user may not ask, or nobody may.

    Raises:
        redis.RedisError: any other trouble.
    """
    try:
        told: Mapping[str, Any] = connection.info()
    except redis.ResponseError as error:
        if passes(error):
            raise
        return {}
    return told


def _name(info: Mapping[str, Any]) -> str:
    """Name and version; servers that are no Redis tell its version for compatibility, and their own beside it."""
    for name in ("valkey", "dragonfly", "keydb", "redict"):
        if version := info.get(f"{name}_version"):
            return f"{name.capitalize()} {clean_text(str(version), 40)}"
    version = info.get("redis_version")
    return f"Redis {clean_text(str(version), 40)}" if version else "of unknown version (INFO is not answered)"


def _is_too_old(info: Mapping[str, Any]) -> bool:
    version = str(info.get("redis_version", "")).split(".")
    return len(version) > 1 and all(map(str.isdigit, version[:2])) and tuple(map(int, version[:2])) < _OLDEST


def _warnings(info: Mapping[str, Any]) -> Iterator[str]:
    if not info:
        yield "INFO is not answered to this user: memory, eviction and persistence could not be looked at"
        return
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        yield (
            f"evicts keys when it is full (maxmemory-policy {clean_text(str(policy), 40)}): accepted cancels would "
            "vanish without a word; set maxmemory-policy noeviction"
        )
    if info.get("aof_enabled", 1) == 0:
        yield (
            "keeps no append-only file: what was enqueued since its last snapshot is lost when it dies; set appendonly "
            "yes (or use a managed server that persists)"
        )


# ---- a rehearsal ----------------------------------------------------------------------------------------------------


#: What a worker's scripts do, on keys like theirs.
_STEPS = """
HSET {job} field 1, HGET {job} field, HMGET {job} field other, HSTRLEN {job} field, HINCRBY {job} field 1,
HDEL {job} other, EXPIRE {job} 60, PERSIST {job}, TTL {job}, EXISTS {job}, TYPE {job}, RENAME {job} {job}:set-aside,
DEL {job}:set-aside, XADD {result} MAXLEN 10 * field 1, XREVRANGE {result} + -, SET {record} 1 EX 60, GET {record},
SETRANGE {record} 8 1, GETRANGE {record} 0 1, BITFIELD {record} INCRBY i64 #0 1,
ZADD {order} 1 member, ZSCORE {order} member, ZCARD {order}, ZCOUNT {order} -inf +inf, ZRANGE {order} 0 1,
ZRANGEBYSCORE {order} -inf +inf, ZREM {order} member,
SADD {worker} member, SRANDMEMBER {worker} 1, SSCAN {worker} 0, SCARD {worker}, SREM {worker} other, SPOP {worker},
HSET {gate} until_ms 0, PEXPIRE {gate} 60000,
RPUSH {worker} 1 2, LPUSH {worker} 3, LPOS {worker} 3, LLEN {worker}, LRANGE {worker} 0 1, LREM {worker} 1 2,
LPOP {worker}, DEL {job}, DEL {result}, DEL {record}, DEL {order}, DEL {worker}, DEL {gate}
"""


def _rows(keys: Keys, token: str) -> list[list[str]]:
    names = {
        "job": keys.job_prefix,
        "result": keys.result_prefix,
        "record": keys.outcome_prefix,
        "order": keys.order_prefix,
        "worker": keys.worker_prefix,
        "gate": keys.gate(""),
    }
    steps = _STEPS.format(**{name: prefix + token for name, prefix in names.items()})
    return [*(step.split() for step in steps.split(",")), *(["EXISTS", key] for key in shared_keys(keys))]


def shared_keys(keys: Keys) -> dict[str, str]:
    """The keys that all jobs share, with their types."""
    return {
        keys.waiting: "list",
        keys.claiming: "list",
        keys.intermediate: "list",
        keys.unfinished: "zset",
        keys.started: "zset",
        keys.scheduled: "zset",
        keys.finished: "zset",
        keys.failed: "zset",
        keys.canceled: "zset",
        keys.outcomes: "stream",
        keys.counts: "string",
        keys.minutes: "string",
        keys.suspects: "set",
        keys.queues: "set",
        keys.workers: "set",
        keys.queue_workers: "set",
        keys.gate("all"): "hash",
    }


def _rehearse(connection: redis.Redis, keys: Keys) -> str | None:
    """What a worker could not do here, with the way out; None: all of it works."""
    token = f"check-{uuid4().hex}"
    source, target = f"{keys.outcome_prefix}{token}", f"{keys.order_prefix}{token}"
    missing: list[str] = []

    def tried(command: str, *words: Any) -> Any:
        """What a command gives; a right that it lacks is noted."""
        try:
            return connection.execute_command(command, *words)
        except redis.exceptions.NoPermissionError as error:
            _note(missing, command, "", str(error))
            return None

    try:
        # The first thing that needs room: in a script it could hide behind what does not.
        tried("SET", source, "1", "EX", 60)
        words = [word for row in _rows(keys, token) for word in (str(len(row)), *row)]
        sha, found = tried("SCRIPT LOAD", _REHEARSAL), None
        with contextlib.suppress(redis.exceptions.NoScriptError):  # where the right to load it is what is missing
            found = tried("EVALSHA", sha or "", 0, *words)
        for command, key, said in zip(*[iter(found or ())] * 3, strict=True):
            _note(missing, command.decode(), key.decode("utf-8", "replace").replace(token, "*"), said.decode())
        tried("DEL", source, target)
        tried("RPUSH", source, "1")
        tried("BLMOVE", source, target, "LEFT", "RIGHT", 1)
        tried("DEL", source, target)
        if (deaf := _listen(connection, PUBSUB_CHANNEL_TEMPLATE % token, missing)) is not None:
            return deaf
    except redis.RedisError as error:
        return _state(error) or f"a rehearsal failed: {why(error)}"
    if not missing:
        return None
    lacking = ", ".join(dict.fromkeys(missing))
    return f"this user lacks rights that a worker needs: {lacking}; `python -m producer acl` prints all of them"


def _note(missing: list[str], command: str, key: str, said: str) -> None:
    """Note what a refused command lacks; what is no lack of rights is a state of the server.

    Raises:
        redis.ResponseError: that state.
    """
    reached = _REACH.search(said)
    if reached is not None:
        missing.append(f"{reached[1]} {key or '*'}")
    elif _NO_RIGHT.search(said):
        missing.append(f"command {command}")
    else:
        raise redis.ResponseError(said)


def _listen(connection: redis.Redis, channel: str, missing: list[str]) -> str | None:
    """Whether what is published is heard; a worker hears of RQ's commands so."""
    with connection.pubsub(ignore_subscribe_messages=True) as listener:
        try:
            listener.subscribe(channel)
            listener.get_message(timeout=ANSWER_WITHIN_S)
        except redis.exceptions.NoPermissionError as error:
            _note(missing, "SUBSCRIBE", "", str(error))
            return None
        connection.publish(channel, "1")
        ends_at_s = time.monotonic() + ANSWER_WITHIN_S
        while time.monotonic() < ends_at_s:
            if listener.get_message(timeout=0.1):
                return None
    return "what is published is not heard: is there a proxy before the server that knows no channels?"


def _damaged(connection: redis.Redis, keys: Keys) -> Iterator[str]:
    """Keys that have another type than they should."""
    expected = shared_keys(keys)
    try:
        with connection.pipeline(transaction=False) as pipeline:
            for key in expected:
                pipeline.type(key)
                pipeline.exists(set_aside(key))
            found = pipeline.execute(raise_on_error=False)
    except redis.RedisError:
        return
    for (key, kind), told, was_set_aside in zip(expected.items(), found[::2], found[1::2], strict=True):
        if isinstance(told, bytes) and told.decode() not in (kind, "none"):
            yield f"{key} is damaged: a {told.decode()} instead of a {kind}; a worker renames it to {set_aside(key)}"
        if was_set_aside == 1:
            yield f"{set_aside(key)} was damaged and set aside: look at it, then delete it"
