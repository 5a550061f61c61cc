"""What a chaos run came to: the figures, what is wrong with them, and the table that shows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

from tests.fault.ledger import ExchangeSide, KeyKind, QueueSide

#: Items of a list that the table shows.
_SHOWN = 10
#: Of so many requests each worker has had some.
_ENOUGH_FOR_ALL = 200


@dataclass(frozen=True, slots=True)
class Reckoning:
    """All figures of a run."""

    scale: str
    seed: int
    seconds: float
    drained_s: float
    blows: tuple[str, ...]
    exchange_faults: int
    replies_lost: int
    resets: int
    silences: int  # requests to the exchange that got no answer, and no end of their connection
    flows_forgotten: int  # connections to the exchange on which nothing passed any more
    queue: QueueSide
    miscounted: bool  # the counts of outcomes by kind are not those of the ledger
    exchange: ExchangeSide
    incidents: int
    requests_during_bans: int
    leases_lost: int
    sent_without_lease: tuple[str, ...]
    reopened: int  # client ids that were taken again when their order was off the book
    unread: int  # outcomes recorded by the worker whose output nobody reads
    recoveries_ms: tuple[int, ...]  # shortest first
    exits_s: tuple[float, ...]
    consumed_by_restarts: int
    walked_out: tuple[str, ...]
    stock_ends: tuple[str, ...]  # of RQ's own workers, which may end when Redis is lost
    keys: tuple[KeyKind, ...]

    def problems(self) -> list[str]:
        """What makes the run a failure, one line each; none: it is a success."""
        queue, exchange = self.queue, self.exchange
        found = [
            ("lost", len(queue.lost)),
            ("unexpected", len(queue.unexpected)),
            ("duplicated outcomes", len(queue.duplicated)),
            ("counts that are not the ledger's", int(self.miscounted)),
            ("orders touched that nobody asked about", len(exchange.harmful)),
            ("differences from the exchange's book", len(exchange.differences)),
            ("unknown, gave_up or overdue", exchange.undecided),
            ("requests during bans", self.requests_during_bans),
            ("requests sent for a lost lease", len(self.sent_without_lease)),
            ("attempts consumed by restarts", self.consumed_by_restarts),
            ("workers that ended unasked", len(self.walked_out)),
            ("worker that stood still because nobody reads its output", int(self._stood_still())),
        ]
        return [f"{count} {name}" for name, count in found if count]

    def _stood_still(self) -> bool:
        return not self.unread and self.queue.ok >= _ENOUGH_FOR_ALL

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self) | {"problems": self.problems(), "undecided": self.exchange.undecided}


def table(run: Reckoning) -> str:
    """The figures for people."""
    lines = [*_head(run), *_queue(run.queue), *_exchange(run), *_stops(run), "", "keys left after the drain"]
    width = max(len(kind.pattern) for kind in run.keys) if run.keys else 0
    for kind in run.keys:
        lives = "all with a time to live" if kind.with_ttl == kind.count else f"{kind.with_ttl} with a time to live"
        lines.append(f"  {kind.pattern:<{width}}  {kind.count:>6}  {lives}")
    problems = run.problems()
    lines += ["", "FAILED: " + "; ".join(problems) if problems else "nothing lost, nothing twice, nothing wrong"]
    return "\n".join(lines) + "\n"


def _head(run: Reckoning) -> list[str]:
    blows = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(run.blows).items()))
    return [
        f"seed {run.seed}, scale {run.scale}: {run.exchange.orders} orders in {run.seconds:.1f} s,"
        f" drained {run.drained_s:.1f} s after the last fault",
        f"blows: {blows}",
        f"exchange's faults: {run.exchange_faults}; connections reset: {run.resets}; replies lost: {run.replies_lost}",
        f"calls to the exchange without an answer: {run.silences}; its connections forgotten: {run.flows_forgotten}",
    ]


def _queue(side: QueueSide) -> list[str]:
    return [
        "",
        "queue",
        _row("attempted", side.attempted),
        _row("acknowledged", side.acknowledged),
        _row("ok", side.ok),
        *_listed("lost", side.lost),
        *_listed("unexpected", side.unexpected),
        _row("recovered", side.recovered),
        *_listed("duplicated outcomes", side.duplicated),
    ]


def _exchange(run: Reckoning) -> list[str]:
    side, reasons = run.exchange, run.exchange.left_alone
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(side.kinds.items()))
    return [
        "",
        "exchange",
        _row("orders asked about", side.orders),
        _row("DELETEs", side.deletes),
        _row("repeated DELETEs", side.repeated_deletes, "all harmless" if not side.harmful else "not all harmless"),
        *_listed("orders touched unasked", side.harmful),
        *_listed("differences from the book", side.differences),
        _row("undecided", side.undecided, "unknown, gave_up, overdue"),
        _row("hasty", side.hasty, "undecided by a short deadline, and decided by another run"),
        _row("listings", side.listings, _listed_orders(side)),
        _row("left alone", sum(reasons.values()), f"their client ids are others' now; {run.reopened} were taken again"),
        *[f"      {count} {reason}" for reason, count in sorted(reasons.items())],
        _row("requests during bans", run.requests_during_bans, f"{run.incidents} bans"),
        *_listed("sent for a lost lease", run.sent_without_lease, f"{run.leases_lost} leases were lost"),
        f"  outcomes: {kinds}",
    ]


def _listed_orders(side: ExchangeSide) -> str:
    named = f"they name {side.named} orders, {side.joined} of them asked for one by one as well"
    return f"{named}; {side.spared} stay that were opened later"


def _stops(run: Reckoning) -> list[str]:
    times = run.recoveries_ms
    recovered = f"p50 {median(times) / 1000:.2f} s, max {times[-1] / 1000:.2f} s" if times else "none held a job"
    return [
        "",
        "stops",
        _row("SIGKILL to next request", len(times), recovered),
        _row("SIGTERM to exit", len(run.exits_s), f"max {max(run.exits_s, default=0):.2f} s"),
        _row("attempts consumed by restarts", run.consumed_by_restarts),
        *_listed("workers that ended unasked", run.walked_out),
        *_listed("RQ's workers that ended", run.stock_ends, "as they may"),
        _row("outcomes by the unread worker", run.unread),
    ]


def _row(name: str, count: int, remark: str = "") -> str:
    return f"  {name:<30}{count:>8}  {remark}".rstrip()


def _listed(name: str, items: Sequence[str], remark: str = "") -> list[str]:
    more = [f"      and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else []
    return [_row(name, len(items), remark), *(f"      {item}" for item in items[:_SHOWN]), *more]
