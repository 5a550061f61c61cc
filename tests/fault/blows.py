"""What a chaos run does to the system, and when: a function of the seed alone."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from worker.sandbox.faults import Fault, FaultTiming


class Make(StrEnum):
    """Kinds of workers."""

    OURS = "ours"
    UNREAD = "unread"  # ours, with a stdout that is a full pipe which nobody reads
    FORKING = "forking"  # RQ's default: a process for each job
    SIMPLE = "simple"  # RQ's SimpleWorker: one process

    @property
    def is_stock(self) -> bool:
        """Whether it is RQ's own."""
        return self in (Make.FORKING, Make.SIMPLE)


#: The workers of a run, for the whole run.
MAKES = (Make.OURS, Make.OURS, Make.UNREAD, Make.FORKING, Make.SIMPLE)
UNREAD = MAKES.index(Make.UNREAD)


class Kind(StrEnum):
    """Kinds of blows; they fall one after the other, while producers and the exchange's own faults go on."""

    KILL = "kill"  # SIGKILL of a worker that holds jobs; it is started again
    KILL_HORSE = "kill_horse"  # SIGKILL of the process that RQ's worker forked for a job, in the middle of it
    KILL_FAMILY = "kill_family"  # ... and of its parent with it
    TERM = "term"  # SIGTERM: to one of ours twice, and to its whole group; to RQ's once; it is started again
    PAUSE = "pause"  # SIGSTOP of a worker that holds jobs for longer than a lease, then SIGCONT
    VALKEY_KILL = "valkey_kill"  # kill -9 of the server, which comes back with its append-only file
    VALKEY_PAUSE = "valkey_pause"  # SIGSTOP of the server, then SIGCONT
    FAILOVER = "failover"  # the replica becomes the primary; the old server stays up, and so do connections to it
    RESET = "reset"  # all connections to the server are reset, several times
    RAIN = "rain"  # requests and replies to and from the server are lost at random
    HOLE = "hole"  # nothing passes between the server and anybody
    INFO = "info"  # `rq info`, for whose clean-up whatever has begun was abandoned long ago
    REQUEUE = "requeue"  # `rq requeue --all`
    SUSPEND = "suspend"  # `rq suspend`, and then `rq resume`
    SILENCES = "silences"  # requests to the exchange, or its answers, get lost, and no connection breaks
    FORGOTTEN = "forgotten flows"  # all connections to the exchange are forgotten on their way, and nobody is told
    CLOCK = "clock"  # the exchange's clock is set; once in a run


#: Blows that take the server away from everybody.
ON_REDIS = (Kind.VALKEY_KILL, Kind.VALKEY_PAUSE, Kind.FAILOVER, Kind.RESET, Kind.RAIN, Kind.HOLE)
#: Which workers a blow may fall on.
_ALL = tuple(range(len(MAKES)))
_FORKING = (MAKES.index(Make.FORKING),)
TARGETS: Mapping[Kind, Sequence[int]] = {
    Kind.KILL: [number for number, make in enumerate(MAKES) if make is not Make.FORKING],
    Kind.KILL_HORSE: _FORKING,
    Kind.KILL_FAMILY: _FORKING,
    Kind.TERM: _ALL,
    Kind.PAUSE: [number for number in _ALL for _ in range(1 if MAKES[number].is_stock else 3)],  # ours hold many jobs
}
_SLOW = (*TARGETS, Kind.FAILOVER, Kind.INFO, Kind.REQUEUE, Kind.SUSPEND)
#: One round: every kind, what shows most twice. The clock is set in the first one alone.
ROUND: Sequence[Kind] = (*(kind for kind in Kind if kind is not Kind.CLOCK), Kind.KILL, Kind.PAUSE)


@dataclass(frozen=True, slots=True)
class Blow:
    """One of them: when it falls (s after the producers' start), on which worker, and how long it lasts, s."""

    at_s: float
    kind: Kind
    worker: int
    length_s: float


@dataclass(frozen=True, slots=True)
class Clock:
    """How far the exchange's clock is ahead of the host's, ms: at first, and once it was set."""

    first_ms: int
    then_ms: int

    @property
    def goes_forward(self) -> bool:
        """Whether it is set to a later time."""
        return self.then_ms > self.first_ms


@dataclass(frozen=True, slots=True)
class Scale:
    """A run's waits: the workers' settings, the exchange's, and the blows'."""

    name: str
    settings: Mapping[str, str]
    timing: FaultTiming
    incidents: tuple[Fault, ...] | None
    max_incidents: int
    latency_ms: float
    weight_limit: int
    orders_per_s: float
    lengths_s: Mapping[Kind, tuple[float, float]]  # least and most; none where it is over at once
    rests_s: Mapping[Kind, float]  # until the next blow
    strike_s: float  # what a blow takes until it falls: a worker to be caught, a command to start
    patience_s: float  # for a worker to be caught with a job in its hands
    restart_s: float  # between a worker's death and its successor's start
    drain_s: float  # patience at the end


_AT_ONCE = dict.fromkeys(Kind, (0.0, 0.0))

QUICK = Scale(
    name="quick",
    settings={
        "LEASE_S": "1",
        "BINANCE_RECV_WINDOW_MS": "1500",
        "BACKOFF_BASE_MS": "20",
        "BACKOFF_CAP_MS": "500",
        "NOT_FOUND_HORIZON_S": "30",  # longer than all blows in a row: every order exists
        "WAF_PAUSE_S": "1",
        "SHUTDOWN_GRACE_S": "10",
        "CANCEL_DEADLINE_S": "120",
        "WORKER_CONCURRENCY": "16",
    },
    timing=FaultTiming(
        late_answer_ms=2_000,
        late_execution_ms=800,
        forgotten_ms=800,
        finished_after_ms=500,
        retry_after_s=1,
        ban_s=2,
        firewall_ms=800,
        drip_interval_ms=20,
    ),
    incidents=None,
    max_incidents=3,
    latency_ms=60,
    weight_limit=1_000_000,  # the budget has tests of its own
    orders_per_s=20,
    lengths_s=_AT_ONCE
    | {
        Kind.PAUSE: (1.3, 2.0),
        Kind.VALKEY_KILL: (0.4, 1.2),
        Kind.VALKEY_PAUSE: (0.5, 1.5),
        Kind.FAILOVER: (0.2, 0.8),
        Kind.RESET: (0.2, 0.4),
        Kind.RAIN: (1.0, 2.0),
        Kind.HOLE: (0.5, 1.5),
        Kind.SUSPEND: (0.3, 1.0),
        Kind.SILENCES: (1.5, 3.0),
    },
    # A claim whose reply was lost leaves leases in nobody's hand: they must have run out before the next blow.
    rests_s=dict.fromkeys(Kind, 1.2)
    | {Kind.KILL: 2.6, Kind.KILL_HORSE: 2.6, Kind.KILL_FAMILY: 2.6, Kind.TERM: 1.8}
    | dict.fromkeys((Kind.INFO, Kind.REQUEUE, Kind.CLOCK, Kind.SILENCES, Kind.FORGOTTEN), 0.5),
    strike_s=1.0,
    patience_s=4.0,
    restart_s=0.3,
    drain_s=40,
)

#: The workers' defaults. Fault kinds that pause everybody for minutes would leave the run with nothing but them.
FULL = Scale(
    name="full",
    settings={},
    timing=FaultTiming(retry_after_s=3, ban_s=6),
    incidents=(Fault.LIMITED_429, Fault.BANNED_418, Fault.LIMITED_1003),
    max_incidents=8,
    latency_ms=80,
    weight_limit=6_000,
    orders_per_s=14,
    lengths_s=_AT_ONCE
    | {
        Kind.PAUSE: (9, 16),
        Kind.VALKEY_KILL: (2, 10),
        Kind.VALKEY_PAUSE: (2, 12),
        Kind.FAILOVER: (1, 6),
        Kind.RESET: (1, 3),
        Kind.RAIN: (5, 10),
        Kind.HOLE: (2, 10),
        Kind.SUSPEND: (1, 5),
        Kind.SILENCES: (5, 10),
    },
    rests_s=dict.fromkeys(Kind, 9.0)
    | {Kind.KILL: 14.0, Kind.KILL_HORSE: 14.0, Kind.KILL_FAMILY: 14.0, Kind.TERM: 7.0}
    | dict.fromkeys((Kind.INFO, Kind.REQUEUE, Kind.CLOCK, Kind.SILENCES, Kind.FORGOTTEN), 2.0),
    strike_s=3.0,
    patience_s=15.0,
    restart_s=2.0,
    drain_s=180,
)
SCALES = {scale.name: scale for scale in (QUICK, FULL)}


def schedule(seed: int, scale: Scale, duration_s: float) -> list[Blow]:
    """The blows of a run that produces for ``duration_s``: rounds in which each kind falls, in an order by the seed.

    The first round is always whole.
    """
    dice = random.Random(f"blows {seed}")
    blows: list[Blow] = []
    at_s = scale.rests_s[Kind.RESET]
    while True:
        for kind in _round(dice, is_first=not blows):
            length_s = round(dice.uniform(*scale.lengths_s[kind]), 3)
            if len(blows) > len(ROUND) and at_s + length_s > duration_s:
                return blows
            blows.append(Blow(round(at_s, 3), kind, dice.choice(TARGETS.get(kind, _ALL)), length_s))
            at_s += length_s + scale.rests_s[kind] + (scale.strike_s if kind in _SLOW else 0)


def _round(dice: random.Random, *, is_first: bool) -> list[Kind]:
    kinds: list[Kind] = list(ROUND)
    dice.shuffle(kinds)
    if is_first:  # in its second half, so that there was work before
        kinds.insert(dice.randrange(len(kinds) // 2, len(kinds)), Kind.CLOCK)
    return kinds


def clock(seed: int) -> Clock:
    """The exchange's clock in a run.

    It is never set by less than a timestamp may be ahead of it, with a second to spare: by so little a client cannot
    notice it, and a time that the exchange tells would be mistaken by as much.
    """
    dice = random.Random(f"clock {seed}")
    first_ms = dice.choice((-1, 1)) * dice.randint(2_000, 6_000)
    return Clock(first_ms, first_ms + dice.choice((-1, 1)) * dice.randint(2_500, 6_000))
