"""What a run of the sandbox came to: every outcome held against the exchange's own book, and the run's figures.

Pure: no clock, no sockets, no processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from enum import StrEnum
from functools import cached_property

from producer.message import CHILD_ENDED, WORKER_LOST, Call, Outcome, OutcomeKind
from worker.classify import Means
from worker.sandbox.book import AlgoStatus
from worker.sandbox.control import BookEntry, ChildEntry, ExchangeStats
from worker.sandbox.faults import Fault

#: Every worker knows of a pause this long after it began, ms: the gate is cached for a second at most.
PAUSE_KNOWN_MS = 1_000
#: Orders that are shown with their history when something is wrong.
SHOWN_ORDERS = 10

#: Kinds that no fault of a seeded set leads to: those faults end long before the deadline, and every order exists.
FAILING = frozenset(kind for kind in OutcomeKind if kind.failed)

_ANY = frozenset(AlgoStatus)
#: What the book may say of an order, by the kind of an outcome that is true.
_BOOK_SAYS: dict[OutcomeKind, frozenset[AlgoStatus]] = {
    OutcomeKind.CANCELLED: frozenset({AlgoStatus.CANCELED}),
    OutcomeKind.ALREADY_CANCELLED: frozenset({AlgoStatus.CANCELED}),
    OutcomeKind.TRIGGERED: frozenset({AlgoStatus.TRIGGERED, AlgoStatus.FINISHED}),
    OutcomeKind.EXPIRED: frozenset({AlgoStatus.EXPIRED}),
    OutcomeKind.REJECTED: frozenset({AlgoStatus.REJECTED}),
    OutcomeKind.NOT_FOUND: frozenset(),
    OutcomeKind.REFUSED: _ANY - {AlgoStatus.CANCELED},
    OutcomeKind.OVERDUE: _ANY - {AlgoStatus.CANCELED},
    OutcomeKind.GAVE_UP: _ANY - {AlgoStatus.CANCELED},
    OutcomeKind.UNKNOWN: _ANY,  # it claims nothing
}


@dataclass(frozen=True, slots=True)
class Asked:
    """A job: what was enqueued for one request or for several that share it, and the order that was meant."""

    id: str
    algo_id: int


class Rule(StrEnum):
    """The ways in which records and book can differ."""

    NO_OUTCOME = "no_outcome"  # a request has none
    RECORDED_TWICE = "recorded_twice"  # the ledger has two for one id and run
    NOT_ASKED = "not_asked"  # an outcome of a request that nobody made
    OTHER_ORDER = "other_order"  # the outcome is about another order than the one that was meant
    BOOK_STATUS = "book_status"  # the book shows the order in a state that the kind rules out
    CHILD_ORDER = "child_order"  # the live order is another than the outcome says
    CHILD_STATE = "child_state"  # what became of it, or whose cancel that was, is not what the book has
    DELETES = "deletes"  # whose cancel it was, ours or somebody else's, is not what the book counted
    NEWER_ORDER_HIT = "newer_order_hit"  # a cancel reached an order that took over the client id


@dataclass(frozen=True, slots=True, order=True)
class Difference:
    """One thing that records and book tell differently."""

    id: str  # of the request; empty where it is about an order that nobody asked to cancel
    rule: Rule
    algo_id: int | None
    said: str


def differences(
    asked: Iterable[Asked], outcomes: Iterable[Outcome], book: Iterable[BookEntry]
) -> tuple[Difference, ...]:
    """All differences, each once, in an order that does not depend on the order of the arguments' items."""
    meant = {request.id: request.algo_id for request in asked}
    entries = {entry.algo_id: entry for entry in book}
    recorded = list(outcomes)
    requests_of = Counter(meant.values())
    found: set[Difference] = set()
    for (job_id, run), times in Counter((outcome.id, outcome.run) for outcome in recorded).items():
        if times > 1:
            said = f"{times} outcomes of run {run}"
            found.add(Difference(job_id, Rule.RECORDED_TWICE, meant.get(job_id), said))
    for job_id in meant.keys() - {outcome.id for outcome in recorded}:
        found.add(Difference(job_id, Rule.NO_OUTCOME, meant[job_id], "no outcome was recorded"))
    for outcome in recorded:
        algo_id = meant.get(outcome.id)
        if algo_id is None:
            found.add(Difference(outcome.id, Rule.NOT_ASKED, outcome.algo_id, f"{outcome.kind}, but nobody asked"))
            continue
        told = _against_book(outcome, algo_id, entries.get(algo_id), shared=requests_of[algo_id] > 1)
        found.update(Difference(outcome.id, rule, algo_id, said) for rule, said in told)
    for entry in entries.values():
        if entry.decoy and (entry.deletes or entry.status != AlgoStatus.NEW):
            said = f"{entry.deletes} DELETEs, now {entry.status}: it was opened later, under a client id in use"
            found.add(Difference("", Rule.NEWER_ORDER_HIT, entry.algo_id, said))
    return tuple(sorted(found))


def _against_book(
    outcome: Outcome, algo_id: int, entry: BookEntry | None, *, shared: bool
) -> Iterable[tuple[Rule, str]]:
    """What is wrong with one outcome; ``shared``: another request was about the same order."""
    if outcome.algo_id not in (None, algo_id):
        yield Rule.OTHER_ORDER, f"the outcome names order {outcome.algo_id}"
    if entry is None:
        if outcome.kind not in FAILING:
            yield Rule.BOOK_STATUS, f"outcome {outcome.kind}, but the book has no such order"
        return
    if entry.status not in _BOOK_SAYS[outcome.kind]:
        yield Rule.BOOK_STATUS, f"outcome {outcome.kind}, book {entry.status}"
    if outcome.kind is OutcomeKind.TRIGGERED and outcome.actual_order_id != entry.actual_order_id:
        yield Rule.CHILD_ORDER, f"outcome says {outcome.actual_order_id}, book {entry.actual_order_id or None}"
    if said := child_differs(outcome, entry.child, shared=shared):
        yield Rule.CHILD_STATE, said
    if not _deletes_agree(outcome, entry, shared):
        yield Rule.DELETES, f"outcome {outcome.kind}, DELETEs with an effect: {entry.deletes_effective}"


def child_differs(outcome: Outcome, child: ChildEntry | None, *, shared: bool) -> str:
    """Where an outcome contradicts the book about the child of a triggered order; empty: nowhere. ``shared``: another
    job was about the same order."""
    calls = [a for a in outcome.history() if a.call is Call.CANCEL_CHILD or a.msg == WORKER_LOST]
    if child is None:
        return "it tells of a child, but there is none" if outcome.child_status else ""
    if child.deletes and not calls and not shared and outcome.run == 1:
        return f"{child.deletes} DELETEs of a child that nobody wanted cancelled"
    is_wanted = any(attempt.call is Call.CANCEL_CHILD for attempt in calls)
    if outcome.kind is OutcomeKind.TRIGGERED and is_wanted and child.status not in CHILD_ENDED:
        return f"its child was to be cancelled, and is {child.status}"
    if outcome.child_status not in CHILD_ENDED:
        return ""
    if outcome.child_status != child.status:
        return f"its child is told as {outcome.child_status}, book {child.status}"
    if outcome.child_executed_qty is not None and Decimal(outcome.child_executed_qty) != Decimal(child.executed_qty):
        return f"executed is told as {outcome.child_executed_qty}, book {child.executed_qty}"
    if outcome.child_cancelled is False and child.deletes_effective and not shared:
        return "its child is told as not cancelled by us, but the book says so"
    is_unclear = any(attempt.verdict == Means.UNCLEAR for attempt in calls)
    is_unproven = outcome.child_cancelled and not child.deletes_effective and not is_unclear
    return "its child is told as cancelled by us, but the book says by somebody else" if is_unproven else ""


def _deletes_agree(outcome: Outcome, entry: BookEntry, shared: bool) -> bool:
    effective = entry.deletes_effective
    if outcome.kind is OutcomeKind.CANCELLED and effective != 1:
        # After an unclear attempt nobody can tell whose cancel it was: the contract takes it for ours.
        unclear = any(a.call is Call.CANCEL and a.verdict == Means.UNCLEAR for a in outcome.attempts)
        return effective == 0 and unclear and Fault.CANCELLED_BEFORE in entry.faults
    if outcome.kind is OutcomeKind.ALREADY_CANCELLED and not shared:
        return effective == 0
    return effective <= 1


@dataclass(frozen=True)
class Report:
    """A finished run: what was asked for, what was recorded, what the exchange saw."""

    orders: int
    workers: int
    concurrency: int
    faults: str
    seed: int
    requests: int  # that were enqueued, some of them for the same order
    asked: Sequence[Asked]
    outcomes: Sequence[Outcome]
    book: Sequence[BookEntry]
    stats: ExchangeStats
    exit_codes: Sequence[int]  # of the workers
    wall_s: float

    @cached_property
    def differences(self) -> tuple[Difference, ...]:
        """See `differences`."""
        return differences(self.asked, self.outcomes, self.book)

    @cached_property
    def kinds(self) -> dict[OutcomeKind, tuple[int, int]]:
        """For each kind that occurred: how many outcomes, and how many of them the book contradicts."""
        contradicted = {difference.id for difference in self.differences}
        every = Counter(outcome.kind for outcome in self.outcomes)
        wrong = Counter(outcome.kind for outcome in self.outcomes if outcome.id in contradicted)
        return {kind: (every[kind], wrong[kind]) for kind in OutcomeKind if every[kind]}

    @property
    def late_requests(self) -> int:
        """Requests that came during a pause when every worker should have known of it."""
        return sum(at_ms > PAUSE_KNOWN_MS for incident in self.stats.incidents for at_ms in incident.requests_ms)

    @cached_property
    def problems(self) -> tuple[str, ...]:
        """Why the run failed, a line each; empty for a good one."""
        found = []
        if self.differences:
            rules = Counter(difference.rule for difference in self.differences)
            found.append("different from the exchange's book: " + counts(rules))
        failing = {kind: count for kind, (count, _) in self.kinds.items() if kind in FAILING}
        if failing:
            found.append(f"outcomes that no fault of this run explains: {counts(failing)}")
        if self.late_requests:
            found.append(f"requests more than {PAUSE_KNOWN_MS} ms into a pause: {self.late_requests}")
        if self.stats.bad_signatures:
            found.append(f"requests with a bad signature: {self.stats.bad_signatures}")
        for number, code in enumerate(self.exit_codes, 1):
            if code != 0:
                found.append(f"worker {number} ended with exit code {code}")
        return tuple(found)

    @property
    def ok(self) -> bool:
        """Whether nothing was wrong."""
        return not self.problems

    @cached_property
    def attempts(self) -> dict[str, float]:
        """Signed calls: in total, most for one request, mean for a request."""
        lengths = [len(outcome.history()) for outcome in self.outcomes]
        mean = sum(lengths) / len(lengths) if lengths else 0.0
        return {"total": sum(lengths), "max": max(lengths, default=0), "mean": round(mean, 2)}

    @cached_property
    def latency_ms(self) -> dict[str, dict[str, int | None]]:
        """From enqueueing to the first request, and to the outcome, ms by Redis' clock."""
        timed = [outcome for outcome in self.outcomes if outcome.enqueued_at_ms is not None]
        first = [o.attempts[0].at_ms - (o.enqueued_at_ms or 0) for o in timed if o.attempts]
        last = [o.finished_at_ms - (o.enqueued_at_ms or 0) for o in timed]
        return {
            name: {"p50": percentile(values, 50), "p99": percentile(values, 99)}
            for name, values in (("first_request", first), ("outcome", last))
        }

    @cached_property
    def offending(self) -> list[dict[str, object]]:
        """The first few requests and orders with a problem, each with all that is known of it."""
        said: dict[tuple[str, int | None], list[str]] = {}
        for difference in self.differences:
            line = f"{difference.rule}: {difference.said}"
            said.setdefault((difference.id, difference.algo_id), []).append(line)
        meant = {request.id: request.algo_id for request in self.asked}
        recorded = sorted(self.outcomes, key=lambda outcome: (outcome.id, outcome.run, outcome.encode()))
        for outcome in recorded:
            if outcome.kind in FAILING:
                said.setdefault((outcome.id, meant.get(outcome.id)), []).append(f"{outcome.kind}: {outcome.error}")
        entries = {entry.algo_id: entry for entry in self.book}
        return [
            {
                "id": job_id,
                "algo_id": algo_id,
                "problems": lines,
                "outcomes": [outcome.as_dict() for outcome in recorded if outcome.id == job_id],
                "book": asdict(entries[algo_id]) if algo_id in entries else None,
            }
            for (job_id, algo_id), lines in list(said.items())[:SHOWN_ORDERS]
        ]

    def as_dict(self) -> dict[str, object]:
        """The report as `--json` prints it."""
        stats = self.stats
        return {
            "ok": self.ok,
            "problems": list(self.problems),
            "orders": self.orders,
            "workers": self.workers,
            "concurrency": self.concurrency,
            "faults": self.faults,
            "seed": self.seed,
            "requests": self.requests,
            "jobs": len(self.asked),
            "outcomes": {kind.value: count for kind, (count, _) in self.kinds.items()},
            "differences": [asdict(difference) for difference in self.differences],
            "offending": self.offending,
            "attempts": self.attempts,
            "latency_ms": self.latency_ms,
            "exchange_requests": stats.requests,
            "requests_during_pauses": stats.requests_during_incidents,
            "late_requests_during_pauses": self.late_requests,
            "pauses": Counter(incident.fault for incident in stats.incidents),
            "peak_used_weight": stats.peak_used_weight,
            "peak_in_flight": stats.peak_in_flight,
            "faults_injected": stats.faults_injected,
            "exit_codes": list(self.exit_codes),
            "wall_s": round(self.wall_s, 2),
        }


def percentile(values: Iterable[int], percent: int) -> int | None:
    """The smallest value that at least ``percent`` of all do not exceed; None where there are none."""
    ordered = sorted(values)
    return ordered[max(-(-len(ordered) * percent // 100), 1) - 1] if ordered else None


def counts(counted: dict[OutcomeKind, int] | Counter[Rule] | dict[str, int]) -> str:
    """`name n` for each, the most frequent first."""
    return ", ".join(f"{name} {count}" for name, count in sorted(counted.items(), key=lambda pair: (-pair[1], pair[0])))
