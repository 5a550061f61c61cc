"""The reckoning after a run with faults: what producers were promised, what the queue recorded, what the exchange saw.

Pure. The queue's part follows Jepsen's total-queue checker: every request that was acknowledged must come out, nothing
may come out that was not asked for, and nothing twice. The exchange's part holds each outcome against its own book.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from producer import OpenOutcome
from producer.message import WORKER_LOST, Attempt, Call, Outcome, OutcomeKind
from worker.sandbox.control import BookEntry
from worker.sandbox.edge import Incident
from worker.sandbox.report import child_differs

#: Kinds to which a request comes only if faults outlast its bounds.
UNDECIDED = (OutcomeKind.UNKNOWN, OutcomeKind.GAVE_UP, OutcomeKind.OVERDUE)
_STATUSES = {
    OutcomeKind.CANCELLED: ("CANCELED",),
    OutcomeKind.ALREADY_CANCELLED: ("CANCELED",),
    OutcomeKind.TRIGGERED: ("TRIGGERED", "FINISHED"),
    OutcomeKind.EXPIRED: ("EXPIRED",),
    OutcomeKind.REJECTED: ("REJECTED",),
}
#: By so much two times of one clock may differ by what is cut off of them, ms.
ROUNDED_MS = 1
#: From then on no request may come during a ban, ms after its first answer.
BAN_HEARD_MS = 1000
#: A server that was away is back for everybody so much later, ms: between two tries of a worker lies a second at most.
BACK_FOR_ALL_MS = 1000
#: The end of what is said of an order that bears the right client id and is not proven to be the one that was meant.
LEFT_ALONE = ": left alone"
#: ... because it is the newer one, or as good as that. (That nothing was measured is no reason.)
_NEWER = ("created after the request", "the clocks are known to")


@dataclass(frozen=True, slots=True)
class Ask:
    """One request in one call of a producer: what for, and the ticket's id if the call was acknowledged.

    ``order`` is an algo id or, where all open orders of a symbol were asked for, that symbol. Then ``by_ms`` is the
    moment, Redis' clock, after which nothing that is opened is meant any more; None: it is not known.
    """

    order: int | str
    id: str | None
    by_ms: int | None = None
    is_hasty: bool = False  # with a deadline that it may miss: whoever asked has it tried again then


@dataclass(frozen=True, slots=True)
class Kill:
    """A worker that got SIGKILL while it held jobs; the time is Redis' clock, ms."""

    at_ms: int
    held: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class KeyKind:
    """Keys of one kind that are left: how many, and how many of them have a time to live."""

    pattern: str
    count: int
    with_ttl: int


@dataclass(frozen=True, slots=True)
class QueueSide:
    """What became of the producers' requests. Requests are counted in calls, everything else in job ids."""

    attempted: int
    acknowledged: int
    ok: int
    lost: tuple[str, ...]
    unexpected: tuple[str, ...]
    recovered: int
    duplicated: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ExchangeSide:
    """What the exchange saw, and where an outcome says something else than its book."""

    orders: int
    deletes: int
    repeated_deletes: int
    harmful: tuple[str, ...]  # orders that nobody asked to cancel and that were touched
    differences: tuple[str, ...]
    kinds: Mapping[str, int] = field(default_factory=dict)
    left_alone: Mapping[str, int] = field(default_factory=dict)  # requests whose order's id was taken again, by reason
    hasty: int = 0  # undecided by a deadline that was meant to be short, and decided by another run or request
    listings: int = 0  # of all open orders of a symbol
    named: int = 0  # orders in them
    joined: int = 0  # ... whose request was there before
    spared: int = 0  # orders of their symbols that were opened later, and stay

    @property
    def undecided(self) -> int:
        """Outcomes of the kinds that faults which end before the deadline must not bring about."""
        undecided = sum(self.kinds.get(kind.value, 0) for kind in UNDECIDED)
        return undecided - sum(self.left_alone.values()) - self.hasty


def queue_side(asks: Sequence[Ask], records: Sequence[Outcome], order_of: Mapping[str, int]) -> QueueSide:
    """Judge the ledger's ``records`` against the producers' ``asks``; ``order_of`` a client id is its algo id."""
    promised = {ask.id for ask in asks if ask.id is not None} | {job_id for _, job_id in _named(records)}
    in_doubt = {ask.order for ask in asks if ask.id is None}
    recorded = {record.id for record in records}
    strangers = [record for record in records if record.id not in promised]
    unexpected = {record.id for record in strangers if order_named(record, order_of) not in in_doubt}
    runs = Counter((record.id, record.run) for record in records)
    return QueueSide(
        attempted=len(asks),
        acknowledged=sum(ask.id is not None for ask in asks),
        ok=len(promised & recorded),
        lost=tuple(sorted(promised - recorded)),
        unexpected=tuple(sorted(unexpected)),
        recovered=len({record.id for record in strangers} - unexpected),
        duplicated=tuple(sorted(f"{job_id} run {run}" for (job_id, run), count in runs.items() if count > 1)),
    )


def exchange_side(
    asks: Sequence[Ask],
    records: Sequence[Outcome],
    book: Mapping[int, BookEntry],
    order_of: Mapping[str, int],
    reopened: Collection[int] = (),
    opened_ms: Mapping[int, int] = MappingProxyType({}),
    told: Mapping[str, OpenOutcome] = MappingProxyType({}),
) -> ExchangeSide:
    """Judge the ledger's ``records`` against the exchange's own ``book``.

    ``order_of`` a client id is the order that was asked for by it; those in ``reopened`` have lost theirs to an order
    that was opened when they were CANCELED. ``opened_ms``: when orders of the symbols were opened that are listed,
    Redis' clock; ``told``: what a listing's strategy was told in the end, by its id.
    """
    named = _named(records)
    asked = {ask.order for ask in asks} | {algo_id for algo_id, _ in named}
    by_order: dict[int | str | None, list[Outcome]] = defaultdict(list)
    for record in records:
        by_order[order_named(record, order_of)].append(record)
    listings = [record for record in records if record.kind is OutcomeKind.LISTED]
    differences = []
    for listing in listings:
        is_told_gone = listing.id in told and not told[listing.id].may_be_live
        found = _misread(listing, asks, book, opened_ms, () if is_told_gone else listing.left_alone)
        differences += [f"{listing.id} {said}" for said in found]
    job_orders = {record.id: order for order, of_order in by_order.items() for record in of_order}
    differences += [f"{i} is named for order {a}" for a, i in named if job_orders.get(i, a) != a]
    for algo_id, of_order in by_order.items():
        if isinstance(algo_id, str):
            continue
        entry = book.get(algo_id) if algo_id is not None else None
        for record in of_order:
            said = difference(record, entry, is_alone=len(of_order) == 1)
            if said is not None:
                differences.append(f"{record.id} order {algo_id}: {said}")
    bystanders = [entry for algo_id, entry in book.items() if algo_id not in asked]
    touched = [entry for entry in bystanders if entry.deletes or entry.status != "NEW"]
    return ExchangeSide(
        orders=len(asked),
        deletes=sum(entry.deletes for entry in book.values()),
        repeated_deletes=sum(max(entry.deletes - 1, 0) for entry in book.values()),
        harmful=tuple(f"{entry.algo_id} {entry.status} {entry.deletes} DELETEs" for entry in touched),
        differences=tuple(differences),
        kinds=dict(Counter(record.kind.value for record in records)),
        left_alone=left_alone(records, book, order_of, reopened),
        hasty=_in_haste(asks, records),
        listings=len(listings),
        named=len(named),
        joined=len({job_id for _, job_id in named} & {ask.id for ask in asks}),
        spared=sum(book[algo_id].status == "NEW" for algo_id in opened_ms),
    )


def _named(records: Iterable[Outcome]) -> set[tuple[int, str]]:
    """The orders that listings name, each with the id of its request."""
    return {(order.algo_id, order.id) for record in records for order in record.orders or ()}


def _misread(
    listing: Outcome,
    asks: Sequence[Ask],
    book: Mapping[int, BookEntry],
    opened_ms: Mapping[int, int],
    may_stay: Collection[int],
) -> list[str]:
    """What is wrong with a listing: it must mean the moment of its call, in any run, and name what was open then, and
    nothing that was opened later. ``may_stay``: what it could not tell from later ones."""
    before_ms, found = listing.before_ms or 0, []
    for ask in asks:
        if ask.id == listing.id and ask.by_ms is not None and before_ms > ask.by_ms:
            found.append(f"means a moment {before_ms - ask.by_ms} ms after it was asked for")
    named = {order.algo_id for order in listing.orders or ()}
    for algo_id in sorted(named):
        if algo_id not in opened_ms or book[algo_id].symbol != listing.symbol:
            found.append(f"names order {algo_id}, which is not of its symbol")
        elif (late_ms := opened_ms[algo_id] - before_ms) > ROUNDED_MS:
            found.append(f"names order {algo_id}, opened {late_ms} ms after the request")
    for algo_id in opened_ms.keys() - named - set(may_stay):
        entry = book[algo_id]
        was_open = entry.symbol == listing.symbol and opened_ms[algo_id] < before_ms - ROUNDED_MS
        if was_open and entry.status == "NEW":  # as at the end, so at any time before
            found.append(f"says nothing of order {algo_id}, which was open")
    return found


def _in_haste(asks: Sequence[Ask], records: Sequence[Outcome]) -> int:
    """Undecided outcomes of requests with a short deadline, and of those that they made: what they were about was
    decided all the same, or nobody could have it tried again, as the call failed and told no id."""
    acknowledged, untold = {ask.id for ask in asks}, {ask.order for ask in asks if ask.is_hasty and ask.id is None}
    hasty = {ask.id for ask in asks if ask.is_hasty}
    lost = {record.id for record in records if record.id not in acknowledged and order_named(record, {}) in untold}
    hasty |= {job_id for _, job_id in _named(record for record in records if record.id in hasty)}
    lost |= {job_id for _, job_id in _named(record for record in records if record.id in lost)}
    decided = {record.algo_id or record.id for record in records if record.kind not in UNDECIDED}
    undecided = [record for record in records if record.kind in UNDECIDED]
    return sum(each.id in lost or (each.id in hasty and (each.algo_id or each.id) in decided) for each in undecided)


def left_alone(
    records: Iterable[Outcome], book: Mapping[int, BookEntry], order_of: Mapping[str, int], reopened: Collection[int]
) -> dict[str, int]:
    """Outcomes that are ``unknown`` for a good reason, counted by what they say.

    The order was cancelled, nobody told the worker so, and its client id, all that the request knows of it, is another
    order's by now. Only where the cancel's answer was unclear, or where somebody else, such as another request for the
    same order, was first. A later run of the same request comes to the same end.
    """
    records = sorted(records, key=lambda each: each.run)
    jobs: dict[int | str | None, set[str]] = defaultdict(set)
    for record in records:
        jobs[order_named(record, order_of)].add(record.id)
    excused: set[str] = set()
    reasons: Counter[str] = Counter()
    for record in records:
        error, order = record.error or "", order_named(record, order_of)
        is_said = record.kind is OutcomeKind.UNKNOWN and error.endswith(LEFT_ALONE) and any(n in error for n in _NEWER)
        if not is_said or record.algo_id is not None or not isinstance(order, int) or order not in reopened:
            continue
        if book[order].status == "CANCELED" and _is_untold(record, book[order], is_alone=len(jobs[order]) == 1):
            excused.add(record.id)
        reasons[re.sub(r"\d+", "N", error.removesuffix(LEFT_ALONE))] += record.id in excused
    return dict(+reasons)


def _is_untold(record: Outcome, entry: BookEntry, *, is_alone: bool) -> bool:
    """Whether nobody told the worker that the order is gone. ``is_alone``: no other request was about it."""
    cancels = [attempt.verdict for attempt in record.attempts if attempt.call is Call.CANCEL]
    was_late = cancels[-1:] == ["no_such_order"] and not entry.deletes_effective
    return not is_alone or was_late or "unclear" in cancels


def order_named(record: Outcome, order_of: Mapping[str, int]) -> int | str | None:
    """The algo id of the order that a record is about; of a listing the symbol."""
    if record.algo_id is not None:
        return record.algo_id
    return order_of.get(record.client_algo_id) if record.client_algo_id is not None else record.symbol


def difference(record: Outcome, entry: BookEntry | None, *, is_alone: bool) -> str | None:
    """Where an outcome contradicts the book, or None. ``is_alone``: no other job was about the same order."""
    if entry is None:
        return f"{record.kind} for an order that the exchange does not know"
    if record.kind in UNDECIDED:
        return None  # counted, and no contradiction to anything
    if record.kind not in _STATUSES:
        return f"{record.kind} ({record.error}), but the order was there and the key was good"
    if entry.status not in _STATUSES[record.kind]:
        return f"{record.kind}, but the book says {entry.status}"
    if record.kind is OutcomeKind.TRIGGERED and record.actual_order_id != entry.actual_order_id:
        return f"triggered as {record.actual_order_id}, but the book says {entry.actual_order_id}"
    if said := child_differs(record, entry.child, shared=not is_alone):
        return said
    unclear = any(a.call is Call.CANCEL and a.verdict == "unclear" for a in record.attempts)
    if record.kind is OutcomeKind.CANCELLED and not entry.deletes_effective and not unclear:
        return "cancelled by us, but the book says by somebody else"
    if record.kind is OutcomeKind.ALREADY_CANCELLED and entry.deletes_effective and is_alone:
        return "already cancelled, but the book says by us"
    if record.kind.off_the_book and record.may_be_live is not False:
        return f"{record.kind}, but may_be_live is {record.may_be_live}"
    return None


def recoveries_ms(kills: Iterable[Kill], records: Iterable[Outcome]) -> list[int]:
    """For each job that a killed worker held: ms from the kill to the next request for it, shortest first.

    Jobs that needed none, because their outcome had been recorded, are left out.
    """
    attempts: dict[str, list[Attempt]] = defaultdict(list)
    for record in records:  # of every run
        attempts[record.id] += record.history()
    found = []
    for kill in kills:
        for job_id in kill.held:
            later = [a.at_ms for a in attempts[job_id] if a.msg != WORKER_LOST and a.at_ms >= kill.at_ms]
            if later:
                found.append(min(later) - kill.at_ms)
    return sorted(found)


def requests_during_bans(incidents: Iterable[Incident], away: Sequence[tuple[float, float]] = ()) -> int:
    """Requests that came when everybody could have heard of the ban.

    ``away``: when Redis, by which one worker tells the others, was away, ms by this machine's clock.
    """
    found = 0
    for incident in incidents:
        heard_ms = _heard_ms(incident.started_ms, away)
        found += sum(incident.started_ms + since_ms > heard_ms for since_ms in incident.requests_ms)
    return found


def _heard_ms(started_ms: float, away: Sequence[tuple[float, float]]) -> float:
    told_ms = started_ms
    for from_ms, to_ms in sorted(away):
        if from_ms <= told_ms + BAN_HEARD_MS:  # else everybody had heard of it by then
            told_ms = max(told_ms, to_ms + BACK_FOR_ALL_MS)
    return told_ms + BAN_HEARD_MS


_PARTS = (
    (re.compile(r"^(rq:worker:)[^:]+"), r"\1*"),  # a worker's name
    (re.compile(r"^([^:]+:order:).+"), r"\1*"),  # an order
    (re.compile(r"[0-9a-f]{32}(:[0-9a-f]{32})?"), "*"),  # a job's id, and its execution's
)


def pattern_of(key: str) -> str:
    """A key with what differs from job to job, order to order and worker to worker left out."""
    for part, stand_in in _PARTS:
        key = part.sub(stand_in, key)
    return key


def key_kinds(keys: Iterable[tuple[str, bool]]) -> list[KeyKind]:
    """Keys, each with whether it has a time to live, counted by kind."""
    counts: Counter[str] = Counter()
    with_ttl: Counter[str] = Counter()
    for key, has_ttl in keys:
        counts[pattern_of(key)] += 1
        with_ttl[pattern_of(key)] += has_ttl
    return [KeyKind(pattern, count, with_ttl[pattern]) for pattern, count in sorted(counts.items())]
