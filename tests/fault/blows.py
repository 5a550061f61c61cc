"""What a chaos run does to the system, and when: a function of the seed alone."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from worker.sandbox.faults import Fault, FaultTiming

WORKERS = 3


class Kind(StrEnum):
    """Kinds of blows; they fall one after the other, while producers and the exchange's own faults go on."""

    KILL = "kill"  # SIGKILL of a worker that holds jobs; it is started again
    TERM = "term"  # SIGTERM, twice, to a worker's whole group; it is started again
    PAUSE = "pause"  # SIGSTOP of a worker for longer than a lease, then SIGCONT
    VALKEY_KILL = "valkey_kill"  # kill -9 of the server, which comes back with its append-only file
    VALKEY_PAUSE = "valkey_pause"  # SIGSTOP of the server, then SIGCONT
    RESET = "reset"  # all connections to the server are reset, several times
    RAIN = "rain"  # requests and replies to and from the server are lost at random
    HOLE = "hole"  # nothing passes between the server and anybody


#: One round: every kind at least once.
ROUND = (*Kind, Kind.KILL)


@dataclass(frozen=True, slots=True)
class Blow:
    """One of them: when it falls (s after the producers' start), on which worker, and how long it lasts, s."""

    at_s: float
    kind: Kind
    worker: int
    length_s: float


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
    lengths_s: Mapping[Kind, tuple[float, float]]  # least and most
    rests_s: Mapping[Kind, float]  # until the next blow
    restart_s: float  # between a worker's death and its successor's start
    drain_s: float  # patience at the end


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
    orders_per_s=28,
    lengths_s={
        Kind.KILL: (0, 0),
        Kind.TERM: (0, 0),
        Kind.PAUSE: (1.3, 2.0),
        Kind.VALKEY_KILL: (0.4, 1.2),
        Kind.VALKEY_PAUSE: (0.5, 1.5),
        Kind.RESET: (0.2, 0.4),
        Kind.RAIN: (1.0, 2.0),
        Kind.HOLE: (0.5, 1.5),
    },
    # A claim whose reply was lost leaves leases in nobody's hand: they must have run out before the next blow.
    rests_s=dict.fromkeys(Kind, 1.2) | {Kind.KILL: 2.6, Kind.TERM: 1.8},
    restart_s=0.3,
    drain_s=25,
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
    lengths_s={
        Kind.KILL: (0, 0),
        Kind.TERM: (0, 0),
        Kind.PAUSE: (9, 16),
        Kind.VALKEY_KILL: (2, 10),
        Kind.VALKEY_PAUSE: (2, 12),
        Kind.RESET: (1, 3),
        Kind.RAIN: (5, 10),
        Kind.HOLE: (2, 10),
    },
    rests_s=dict.fromkeys(Kind, 9.0) | {Kind.KILL: 14.0, Kind.TERM: 7.0},
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
        kinds = list(ROUND)
        dice.shuffle(kinds)
        for kind in kinds:
            length_s = round(dice.uniform(*scale.lengths_s[kind]), 3)
            if len(blows) >= len(ROUND) and at_s + length_s > duration_s:
                return blows
            blows.append(Blow(round(at_s, 3), kind, dice.randrange(WORKERS), length_s))
            at_s += length_s + scale.rests_s[kind]
