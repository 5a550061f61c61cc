"""Where everything stands in Redis: each key of ours and of RQ that is touched, and our fields of RQ's hashes.

Standard library only; it talks to nobody.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import IntEnum
from hashlib import sha1
from importlib.resources import files

from producer.message import DEFAULT_QUEUE, MAX_ID_BYTES, OutcomeKind

#: Life of RQ's hash and result, s: short once finished (the outcome record lives on), a week where a person must look.
RESULT_TTL_S = 600
FAILURE_TTL_S = 7 * 86_400
#: A pointer outlives any deadline; it is removed with the outcome, and left by a job that was deleted or has failed.
POINTER_LIFE_S = 8 * 86_400
#: No lease is longer, s: LEASE_S of a worker's settings.
MAX_LEASE_S = 300
#: RQ's clean-up requeues a job that has retries left and fails it otherwise; our own bounds decide, never RQ's.
ENDLESS_RETRIES = 1_000_000


class Band(IntEnum):
    """Where in the index jobs of one state stand; each is followed by a time in ms."""

    HELD = 0  # by the end of the lease
    WAITING = 10**13  # by since when
    RETRY = 2 * 10**13  # by when it is due
    END = 3 * 10**13


class Script:
    """A Lua script with the constants that it is made for, called by its hash once the server knows it.

    ``parts`` are files of a package's `scripts` folder, as `producer/enqueue.lua`. Each script begins with
    `producer/scripts/job.lua`: what all of them know of a job stands once.
    """

    def __init__(self, constants: Mapping[str, object], *parts: str) -> None:
        # A literal costs nothing at each call, a local that functions use does.
        tables = {name: value for name, value in constants.items() if isinstance(value, list | dict)}
        known = "".join(f"local {name} = {_lua(value)}\n" for name, value in tables.items())
        body = "".join(map(_text, ("producer/job.lua", *parts)))
        plain = {name: _lua(value) for name, value in constants.items() if name not in tables}
        self.source = known + re.sub(r"\b[A-Z][A-Z_]+\b", lambda found: plain.get(found[0], found[0]), body)
        self.sha = sha1(self.source.encode(), usedforsecurity=False).hexdigest()


def _text(part: str) -> str:
    package, _, name = part.partition("/")
    return files(package).joinpath("scripts", name).read_text("utf-8")


def _lua(value: object) -> str:
    """``value`` as a literal of Lua."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}={_lua(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "{" + ",".join(map(_lua, value)) + "}"
    if isinstance(value, int):
        return str(value).lower()
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03d}" for byte in str(value).encode())
    return '"' + "".join(plain) + '"'


class RqKeys:
    """RQ's own keys. ``rq`` is its prefix (RQ_KEY_PREFIX)."""

    def __init__(self, queue: str, rq: str) -> None:
        self.waiting = f"{rq}:queue:{queue}"  # list of job ids that wait for a worker
        self.queues = f"{rq}:queues"  # set in which RQ lists its queues
        self.job_prefix = f"{rq}:job:"  # job hashes, followed by the id
        self.result_prefix = f"{rq}:results:"  # result streams, followed by the id
        #: StartedJobRegistry: `id:execution` scored by when RQ's maintenance may take it for abandoned.
        self.started = f"{rq}:wip:{queue}"
        self.scheduled = f"{rq}:scheduled:{queue}"  # ScheduledJobRegistry: id scored by its due time, s
        self.finished = f"{rq}:finished:{queue}"  # FinishedJobRegistry: id scored by its expiry, s
        self.failed = f"{rq}:failed:{queue}"  # FailedJobRegistry: id scored by its expiry, s
        self.canceled = f"{rq}:canceled:{queue}"  # CanceledJobRegistry: id scored by when a person took it back, s
        #: List in which a stock RQ worker keeps an id until it has begun the job.
        self.intermediate = f"{self.waiting}:intermediate"
        self.workers = f"{rq}:workers"  # set of the keys of RQ's workers
        self.queue_workers = f"{rq}:workers:{queue}"  # the same for this queue alone
        self.worker_prefix = f"{rq}:worker:"  # worker hashes, followed by the worker's name
        self.suspended = f"{rq}:suspended"  # exists while `rq suspend` holds


class Keys(RqKeys):
    """Every Redis key that the project touches, for one queue."""

    def __init__(self, queue: str = DEFAULT_QUEUE, rq: str = "rq") -> None:
        super().__init__(queue, rq)
        self.queue = queue
        self.rq = rq
        self.claiming = f"{queue}:claiming"  # list in which an id stands between the blocking move and the claim
        #: The index: sorted set of all unfinished ids by when to look at them next, in the bands of :class:`Band`. Its
        #: name is older than it: held jobs stand in it as they did in the set of leases of version 0.1, so that workers
        #: of both versions side by side take over each other's jobs.
        self.unfinished = f"{queue}:leases"
        self.outcomes = f"{queue}:outcomes"  # the ledger: a stream with one entry for each outcome
        self.counts = f"{queue}:counts"  # string of all that was ever counted of outcomes, see :mod:`producer.counts`
        #: String with a ring of what ``counts`` was at the first outcome of each minute that had one.
        self.minutes = f"{queue}:minutes"
        self.outcome_prefix = f"{queue}:outcome:"  # outcome records, followed by the id
        #: Written to wait until what was written before it is in the append-only file; lives for seconds.
        self.durable = f"{queue}:durable"
        #: Pointers from an order to its open job, followed by :attr:`CancelRequest.order_key`; by algo id alone.
        self.order_prefix = f"{queue}:order:"
        #: Set of the accounts whose key was refused since one of theirs was last accepted, see :func:`suspect_of`.
        self.suspects = f"{queue}:keys"

    def breaker(self, fingerprint: str) -> str:
        """Hash that says that the API key with this fingerprint is refused, and since when."""
        return f"{self.queue}:key:{fingerprint}"

    def held(self, fingerprint: str) -> str:
        """Set of the jobs that wait for that key to be accepted again."""
        return f"{self.queue}:held:{fingerprint}"

    def lua(self) -> dict[str, object]:
        """The constants of every script: keys, and how long things live."""
        return {
            "WAITING": self.waiting,
            "QUEUES": self.queues,
            "JOB_PREFIX": self.job_prefix,
            "UNFINISHED": self.unfinished,
            "SCHEDULED": self.scheduled,
            "FAILED": self.failed,
            "COUNTS": self.counts,
            "MINUTES": self.minutes,
            "ORDER_PREFIX": self.order_prefix,
            "OUTCOME_PREFIX": self.outcome_prefix,
            "POINTER_LIFE_S": POINTER_LIFE_S,
            "MAX_LEASE_MS": MAX_LEASE_S * 1000,
            "ENDLESS_RETRIES": ENDLESS_RETRIES,
            "MAX_ID_BYTES": MAX_ID_BYTES,
            "WAITING_BAND": int(Band.WAITING),
            "RETRY_BAND": int(Band.RETRY),
            "FAILED_KINDS": {kind.value: True for kind in OutcomeKind if kind.failed},
        }

    @staticmethod
    def gate(scope: str) -> str:
        """The shared pause of one egress address: ``all``, or the host name of a worker that has its own."""
        return f"gate:{scope}"


def set_aside(key: str) -> str:
    """Where a key goes that all jobs share and that has another type than it should."""
    return f"{key}:set-aside"


_SUSPECT = re.compile(rb"(.*) ([0-9a-f]{16})", re.DOTALL)


def suspect_of(member: bytes) -> tuple[bytes, bytes]:
    """Account and fingerprint that a member of :attr:`Keys.suspects` names; for what is none of ours, twice itself."""
    shape = _SUSPECT.fullmatch(member)
    return (shape[1], shape[2]) if shape else (member, member)


class JobField:
    """Our own fields of RQ's job hash; RQ keeps fields that it does not know. The scripts spell them out."""

    ENQUEUED_AT_MS = "c_enqueued_at_ms"
    MEANT_AT_MS = "c_meant_at_ms"  # of a new run: when the request was first made
    ASKED_AT_MS = "c_asked_at_ms"  # when a request last left its deadline to the worker
    DEADLINE_AT_MS = "c_deadline_at_ms"  # the latest deadline that a request gave
    RUN = "c_run"
    ORDER = "c_order"  # the order's key, to find its pointer; absent where it has none
    URGENT = "c_urgent"
    ON_TRIGGER = "c_on_trigger"  # cancel_child, if a request wants that
    ATTEMPTS = "c_attempts"
    PIN = "c_pin"  # what was learned of the order: algo id, symbol
    LEASE = "c_lease"
    OPEN_AT_MS = "c_open_at_ms"  # since when an attempt may be out
    DUE_AT_MS = "c_due_at_ms"  # when the next try is due
    DONE = "c_done"  # this run's outcome: its kind
    ENDED = "c_ended"  # the last lease that was ended, and how: a repeat is answered alike


class BreakerField:
    """Fields of the hash that :meth:`Keys.breaker` names."""

    FAILURES = "failures"  # refusals in a row
    REASON = "reason"  # what the exchange said last
    SINCE_MS = "since_ms"  # when it opened; it is not open without this
    PROBE_AT_MS = "probe_at_ms"  # when the next request may try the key


class WorkerField:
    """Our own fields of RQ's worker hash, written at each heartbeat."""

    BEAT_AT_MS = "c_beat_at_ms"  # Redis' clock; its event loop moved then
    CONCURRENCY = "c_concurrency"
    IN_FLIGHT = "c_in_flight"
    CLOCK_OFFSET_MS = "c_clock_offset_ms"  # the exchange's clock minus the host's; absent while it is not measured
    USED_WEIGHT = "c_used_weight"  # of the present minute, for its egress address
    WEIGHT_LIMIT = "c_weight_limit"
