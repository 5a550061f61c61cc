"""What was measured: every raw figure, nothing derived."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Idle:
    """One cancel at a time on an idle system."""

    system: str
    ping_ms: float  # median round trip to Redis as the producer has it
    latencies_ms: list[float]  # from the call that asks for the cancel to the arrival of its DELETE
    calls_ms: list[float]  # the call alone
    lost: int
    unrecorded: int
    repeats: int


@dataclass(frozen=True)
class Burst:
    """Many cancels put on the queue at once."""

    system: str
    in_flight: int  # requests in flight that the worker may have
    exchange_ms: float
    cancels: int
    seconds: float  # from the call that asks for them to the arrival of the last DELETE
    peak_in_flight: int
    worker_cpu_ms: float | None  # of all of them, as is the next
    redis_cpu_ms: float
    redis_commands: int  # those inside scripts too
    exchange_busy: float | None  # share of a core that the exchange used
    peak_rss_mib: float | None
    lost: int
    unrecorded: int
    repeats: int
    bad: int


@dataclass(frozen=True)
class Cost:
    """A stretch out of the middle of working off a queue."""

    full: bool  # with many jobs waiting, a full ledger and full registries
    waiting: int
    registered: int  # entries of each registry and outcome records
    ledger: int
    cancels: int
    seconds: float
    worker_cpu_ms: float | None  # of all of them, as are the next two
    redis_cpu_ms: float
    redis_commands: int
    repeats: int


@dataclass(frozen=True)
class Calls:
    """The producer's calls against a bare round trip, one after the other, nobody at the queue."""

    ping_ms: list[float]
    cancel_ms: list[float]
    many: int
    cancel_many_ms: list[float]


@dataclass(frozen=True)
class FirstAfterIdle:
    """One cancel after a long pause, to an exchange over TLS that closes idle connections."""

    system: str
    closes_after_s: float
    idle_s: float
    handshakes: int  # that ended between the call and the arrival of the DELETE
    latency_ms: float
    warm_ms: list[float]  # latencies right before the pause
    lost: int
    unrecorded: int


@dataclass(frozen=True)
class Retries:
    """How late a cancel that was refused once was sent again."""

    system: str
    orders: int
    delays_ms: list[float]  # from the first DELETE to when the second was due
    late_ms: list[float]  # from when it was due, by the scheduled registry's score, to its arrival
    at_once: int  # sent again without having stood in the registry: the pause was nothing
    lost: int  # not sent, or not sent again
    unrecorded: int
    repeats: int  # sent more than once again


@dataclass(frozen=True)
class MemoryStep:
    """After so many cancels, everything settled."""

    cancels: int
    rss_mib: float | None
    lasting_keys: int
    redis_mib: float  # without what goes with time
    expiring_bytes: float  # per cancel


@dataclass(frozen=True)
class Memory:
    """One worker over many cancels."""

    steps: list[MemoryStep]
    lost: int
    unrecorded: int
    repeats: int


@dataclass(frozen=True)
class Silences:
    """Cancels one at a time while a part of all answers never comes."""

    part: float
    silent: int  # so many did not
    outcomes_ms: list[float]  # from the request to its outcome
    lost: int
    unrecorded: int
    repeats: int


@dataclass(frozen=True)
class AfterCalm:
    """A burst before and after a calm, behind a firewall that forgets flows that are still."""

    forgets_after_s: float
    calm_s: float
    before_ms: list[float]  # from request to outcome
    after_ms: list[float]
    lost: int
    unrecorded: int


@dataclass
class Results:
    """All of one run."""

    idle: list[Idle] = field(default_factory=list)
    far: list[Idle] = field(default_factory=list)
    burst: list[Burst] = field(default_factory=list)
    cost: list[Cost] = field(default_factory=list)
    calls: list[Calls] = field(default_factory=list)
    cold: list[FirstAfterIdle] = field(default_factory=list)
    retries: list[Retries] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    silence: list[Silences] = field(default_factory=list)
    calm: list[AfterCalm] = field(default_factory=list)

    def losses(self) -> list[str]:
        """One line for each measurement that has lost something: a cancel without its DELETE or without its record."""
        found = []
        for name, measured in vars(self).items():
            for one in measured:
                lost, unrecorded = getattr(one, "lost", 0), getattr(one, "unrecorded", 0)
                if lost or unrecorded:
                    who = getattr(one, "system", "project")
                    found.append(f"{name}, {who}: {lost} cancels without a DELETE, {unrecorded} without a record")
        return found
