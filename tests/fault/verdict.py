"""What a chaos run came to: the figures, what is wrong with them, and the table that shows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

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
    blows: Mapping[str, int]  # by kind
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
    recoveries_ms: Mapping[str, float]  # from a SIGKILL to the next request for a job that was in hand
    exits_s: Mapping[str, float]  # from a SIGTERM to the process' end
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


def times(measured: Sequence[float]) -> dict[str, float]:
    """How many there are, the one in the middle, and the longest."""
    return {"count": len(measured)} | ({"p50": median(measured), "max": max(measured)} if measured else {})


def table(run: Reckoning) -> str:
    """All figures for people, each under its name; the last line says whether anything is wrong."""
    problems = run.problems()
    said = f"FAILED: {'; '.join(problems)}" if problems else "nothing lost, nothing twice, nothing wrong"
    return "".join(f"{line}\n" for line in (*_rows(asdict(run)), "", said))


def _rows(figures: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for name, value in figures.items():
        label = f"{indent}{name.replace('_', ' ')}"
        if isinstance(value, Mapping):
            yield label
            yield from _rows(value, f"{indent}  ")
        elif isinstance(value, tuple):
            yield f"{label:<34} {len(value):>8}"
            yield from (f"{indent}    {item}" for item in value[:_SHOWN])
        else:
            yield f"{label:<34} {value:>8}"
