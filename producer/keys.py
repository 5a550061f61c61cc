"""Where everything stands in Redis: each key of ours and of RQ that is touched, and our fields of RQ's hashes.

Standard library only; it talks to nobody.
"""

from __future__ import annotations

from dataclasses import dataclass

from producer.message import DEFAULT_QUEUE


@dataclass(frozen=True, slots=True)
class Keys:
    """Every Redis key that the project touches, for one queue. ``rq`` is RQ's prefix (its RQ_KEY_PREFIX)."""

    queue: str = DEFAULT_QUEUE
    rq: str = "rq"

    # RQ's own
    @property
    def waiting(self) -> str:
        """List of job ids that wait for a worker."""
        return f"{self.rq}:queue:{self.queue}"

    @property
    def queues(self) -> str:
        """Set in which RQ lists its queues."""
        return f"{self.rq}:queues"

    @property
    def job_prefix(self) -> str:
        """Job hashes, followed by the id."""
        return f"{self.rq}:job:"

    @property
    def started(self) -> str:
        """StartedJobRegistry: `id:execution` scored by when RQ's maintenance may take it for abandoned."""
        return f"{self.rq}:wip:{self.queue}"

    @property
    def scheduled(self) -> str:
        """ScheduledJobRegistry: id scored by its due time in seconds."""
        return f"{self.rq}:scheduled:{self.queue}"

    @property
    def finished(self) -> str:
        """FinishedJobRegistry: id scored by its expiry in seconds."""
        return f"{self.rq}:finished:{self.queue}"

    @property
    def failed(self) -> str:
        """FailedJobRegistry: id scored by its expiry in seconds."""
        return f"{self.rq}:failed:{self.queue}"

    @property
    def result_prefix(self) -> str:
        """RQ's result streams, followed by the id."""
        return f"{self.rq}:results:"

    @property
    def execution_prefix(self) -> str:
        """Execution hashes, followed by `id:execution`."""
        return f"{self.rq}:execution:"

    @property
    def executions_prefix(self) -> str:
        """ExecutionRegistry of a job, followed by the id."""
        return f"{self.rq}:executions:"

    @property
    def worker_prefix(self) -> str:
        """Worker hashes, followed by the worker's name."""
        return f"{self.rq}:worker:"

    @property
    def suspended(self) -> str:
        """Exists while `rq suspend` holds."""
        return f"{self.rq}:suspended"

    # ours
    @property
    def claiming(self) -> str:
        """List in which an id stands between the blocking move and the claim."""
        return f"{self.queue}:claiming"

    @property
    def leases(self) -> str:
        """Sorted set of claimed ids, scored by the lease's end in ms."""
        return f"{self.queue}:leases"

    @property
    def outcomes(self) -> str:
        """The ledger: a stream with one entry for each outcome."""
        return f"{self.queue}:outcomes"

    @property
    def outcome_prefix(self) -> str:
        """Outcome records and the channels that announce them, followed by the id."""
        return f"{self.queue}:outcome:"

    @property
    def order_prefix(self) -> str:
        """Pointers from an order to its open job, followed by :attr:`CancelRequest.order_key`; by algo id alone."""
        return f"{self.queue}:order:"

    @property
    def suspects(self) -> str:
        """Set of the accounts whose key was refused since it was last accepted; each has a :meth:`breaker`."""
        return f"{self.queue}:keys"

    def breaker(self, account: str) -> str:
        """Hash that says that the key of ``account`` is refused, and since when; there only while it is suspected."""
        return f"{self.queue}:key:{account}"

    def held(self, account: str) -> str:
        """Set of the jobs that wait for the key of ``account`` to be accepted again."""
        return f"{self.queue}:held:{account}"

    @staticmethod
    def gate(scope: str) -> str:
        """The shared pause of one egress address: ``all``, or the host name of a worker that has its own."""
        return f"gate:{scope}"


class JobField:
    """Our own fields of RQ's job hash; RQ keeps fields that it does not know. The scripts spell them out."""

    ENQUEUED_AT_MS = "c_enqueued_at_ms"
    MEANT_AT_MS = "c_meant_at_ms"  # of a new run: when the request was first made
    ASKED_AT_MS = "c_asked_at_ms"  # when a request last left its deadline to the worker
    DEADLINE_AT_MS = "c_deadline_at_ms"  # the latest deadline that a request gave
    RUN = "c_run"
    ORDER = "c_order"  # the order's key, to find its pointer; absent where it has none
    URGENT = "c_urgent"
    ATTEMPTS = "c_attempts"
    PIN = "c_pin"  # what was learned of the order: algo id, symbol
    LEASE = "c_lease"
    OPEN_AT_MS = "c_open_at_ms"  # since when an attempt may be out
    DONE = "c_done"  # this run has its outcome


class BreakerField:
    """Fields of the hash that :meth:`Keys.breaker` names."""

    FAILURES = "failures"  # refusals in a row
    REASON = "reason"  # what the exchange said last
    SINCE_MS = "since_ms"  # when it opened; it is not open without this
    PROBE_AT_MS = "probe_at_ms"  # when the next request may try the key


class WorkerField:
    """Our own fields of RQ's worker hash, written at each heartbeat."""

    CONCURRENCY = "c_concurrency"
    IN_FLIGHT = "c_in_flight"
    CLOCK_OFFSET_MS = "c_clock_offset_ms"  # the exchange's clock minus the host's; absent while it is not measured
    USED_WEIGHT = "c_used_weight"  # of the present minute, for its egress address
    WEIGHT_LIMIT = "c_weight_limit"
