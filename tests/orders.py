"""Orders that tests have cancelled, and what became of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from producer import CancelClient, CancelRequest, Outcome, OutcomeKind, Ticket
from tests.servers import Peek, Worker, eventually
from worker.sandbox.control import RunningExchange

#: After so long an order is proven to be from before a request, on a busy machine too.
PROVEN_S = 0.03


def cancel_all(client: CancelClient, algo_ids: Iterable[int], **options: Any) -> list[Ticket]:
    """Enqueue a cancel of each order."""
    return client.cancel_many([CancelRequest(algo_id=algo_id, **options) for algo_id in algo_ids])


def opened(exchange: RunningExchange, count: int) -> list[int]:
    """Open orders; gives their algo ids."""
    return [order.algo_id for order in exchange.add_orders(count)]


def under_way(client: CancelClient, exchange: RunningExchange, latency_ms: int = 4000) -> Ticket:
    """A request that the exchange has received, and answers late; others are answered at once."""
    exchange.set_latency_ms(latency_ms)
    (algo_id,) = opened(exchange, 1)
    ticket = client.cancel(algo_id=algo_id)
    eventually(lambda: exchange.book()[algo_id].deletes == 1, what="the request is under way")
    exchange.set_latency_ms(0)
    return ticket


def outcomes(client: CancelClient, tickets: Iterable[Ticket], timeout_s: float = 20) -> list[Outcome]:
    """Their outcomes, once all of them are there, in the tickets' order."""
    ids = [ticket.id for ticket in tickets]
    eventually(lambda: len(client.outcomes_of(ids)) == len(set(ids)), timeout_s, "all outcomes are there")
    found = client.outcomes_of(ids)
    return [found[job_id] for job_id in ids]


def steps(outcome: Outcome) -> list[str]:
    """The verdicts of its attempts."""
    return [attempt.verdict for attempt in outcome.attempts]


def at_first_try(found: Iterable[Outcome]) -> bool:
    """Whether each was cancelled by its only attempt."""
    return {(outcome.kind, *steps(outcome)) for outcome in found} == {(OutcomeKind.CANCELLED, "confirmed")}


def stayed_in_hand(outcome: Outcome) -> bool:
    """Whether its order was cancelled by whoever took the job first, however often that one had to look."""
    return outcome.kind is OutcomeKind.CANCELLED and "worker lost" not in {each.msg for each in outcome.attempts}


def events(worker: Worker, name: str) -> list[dict[str, str]]:
    """The worker's log lines of one event."""
    lines = (line for line in worker.output().splitlines() if f"event={name} " in f"{line} ")
    return [dict(re.findall(r'([\w#.]+)=("[^"]*"|\S+)', line)) for line in lines]


def once_each(peek: Peek, tickets: Iterable[Ticket]) -> bool:
    """Whether the ledger holds exactly one outcome of each of these and nothing else."""
    return Counter(outcome.id for outcome in peek.ledger()) == dict.fromkeys((ticket.id for ticket in tickets), 1)
