"""Whether anybody sent for a job that was not his any more: every request at the exchange held against the attempts.

Pure. What can be known exactly:

- A request is told by the exchange with the time of its arrival, by the clock of this machine, which is Redis' clock.
- An attempt is told by the outcome's record with its begin (Redis' clock) and its length. It was recorded under the
  lease that was good at the time: a holder that had lost the job could not record it. One attempt is one request at the
  most, so it accounts for one of its kind that arrived while it lasted; one whose request never left, for none.
  A worker notes what Redis' clock shows at least. One that has just started knows it by a single answer: where that
  was held up, by a server that was stopped or a network that let nothing pass, the begin is noted as much too early.
- A lost hold is told there too: ``worker lost`` begins with the claim and ends with the moment, inside a script, in
  which somebody else took the lease away. What the old holder sent until then is its right, and in flight for another
  0.2 s at the most.

What no attempt and no lost hold accounts for was sent without a lease. A worker that was stopped while it held jobs,
lost them, and goes on shows here if it sends: the attempt that it makes cannot be recorded by anybody. That the new
holder's own attempt stands for it is ruled out as long as that one reached the exchange as well, for there are two
requests then. It is not looked at who sent it, as any process may have sent what is accounted for; the connection is
told for the search in the logs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from producer.message import WORKER_LOST, Attempt, Call, Outcome
from worker.sandbox.control import Arrival

#: How long after a lease was taken away a request of its holder may still arrive, ms: it was on its way.
IN_FLIGHT_MS = 200
#: How much earlier than noted a request may have come, ms: by what is cut off of times, and no more.
EARLY_MS = 10
#: ... and how much later than the noted end: by how late a worker has read an answer of Redis on a busy machine.
LATE_MS = 250
#: So much later than Redis was away a worker may still know its clock by an answer from that time alone, ms.
_UNTIL_HEARD_MS = 2_000

Away = Sequence[tuple[float, float]]

#: The verdict of an attempt whose request has not left, not even in part.
_NOT_SENT = "not_sent"


@dataclass(slots=True, eq=False)
class _Span:
    """A time in which requests for an order may have come: of an attempt, or of a hold that was lost."""

    from_ms: float
    to_ms: float
    method: str = ""  # any
    is_used: bool = False

    def fits(self, arrival: Arrival) -> bool:
        at_ms = arrival.at_ns / 1e6
        return self.method in ("", arrival.method) and self.from_ms <= at_ms <= self.to_ms


def sent_without_lease(
    records: Iterable[Outcome], arrivals: Iterable[Arrival], order_of: Mapping[str, int], away_ms: Away = ()
) -> list[str]:
    """Requests that no attempt in ``records`` and no lost hold accounts for, each in words.

    ``order_of`` a client id is the algo id of the order that was asked for by it; ``away_ms``: from when to when Redis'
    answers were held up, by its clock.
    """
    attempts: dict[int | None, list[_Span]] = defaultdict(list)
    holds: dict[int | None, list[_Span]] = defaultdict(list)
    for record in records:
        order = record.algo_id or order_of.get(record.client_algo_id or "")
        attempts[order] += [_of(attempt, away_ms) for attempt in record.history() if _was_sent(attempt)]
        holds[order] += [_lost(attempt) for attempt in record.history() if attempt.msg == WORKER_LOST]
    found = []
    for arrival in sorted(arrivals, key=lambda each: each.at_ns):
        order = arrival.algo_id or order_of.get(arrival.client_algo_id or "")
        own = [span for span in attempts[order] if not span.is_used and span.fits(arrival)]
        if own:  # the one that ends first: what comes later has the others
            min(own, key=lambda span: span.to_ms).is_used = True
        elif not any(span.fits(arrival) for span in holds[order]):
            found.append(_told(arrival, order, holds[order]))
    return found


def lost_holds(records: Iterable[Outcome]) -> int:
    """How often a lease was taken away from somebody."""
    return sum(attempt.msg == WORKER_LOST for record in records for attempt in record.history())


def _was_sent(attempt: Attempt) -> bool:
    return attempt.msg != WORKER_LOST and attempt.verdict != _NOT_SENT and isinstance(attempt.call, Call)


def _of(attempt: Attempt, away_ms: Away) -> _Span:
    held_up_ms = [to - since for since, to in away_ms if since - EARLY_MS <= attempt.at_ms <= to + _UNTIL_HEARD_MS]
    to_ms = attempt.at_ms + attempt.ms + max(held_up_ms, default=0) + LATE_MS
    return _Span(attempt.at_ms - EARLY_MS, to_ms, "DELETE" if Call(attempt.call).cancels else "GET")


def _lost(attempt: Attempt) -> _Span:
    return _Span(attempt.at_ms - EARLY_MS, attempt.at_ms + attempt.ms + IN_FLIGHT_MS)


def _told(arrival: Arrival, order: int | None, holds: Sequence[_Span]) -> str:
    at_ms = arrival.at_ns / 1e6
    lost_ms = max((span.to_ms - IN_FLIGHT_MS for span in holds if span.to_ms < at_ms), default=None)
    since = "no lease was lost before" if lost_ms is None else f"{at_ms - lost_ms:.0f} ms after a lease was lost"
    signed = f"signed {at_ms - arrival.signed_ms:.0f} ms before it came"
    return f"order {order}: {arrival.method} at {at_ms:.0f} from port {arrival.port}, {since}, {signed}"
