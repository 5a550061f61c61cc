"""The doubles of `producer.testing` do what the clients do: every rule here holds for both clients and both doubles.

The clients run against a real server, a real worker and the local exchange.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from rq.exceptions import NoSuchJobError

from producer import (
    AsyncCancelClient,
    CancelClient,
    CancelRequest,
    InvalidRequest,
    NotDurable,
    OutcomeKind,
    QueueUnavailable,
    UnknownRequest,
    WaitTimeout,
)
from producer.testing import AsyncFakeCancelClient, FakeCancelClient
from tests.fault.proxy import Proxy
from tests.servers import Valkey, Workers
from tests.strategies import Talk
from worker.sandbox.control import RunningExchange


@dataclass
class Real:
    """A client, and the worker and the exchange behind it."""

    client: Any
    workers: Workers
    exchange: RunningExchange
    proxy: Proxy

    def order(self, becomes: OutcomeKind = OutcomeKind.CANCELLED, status: str | None = None) -> CancelRequest:
        """An order at the local exchange, in that state."""
        if becomes is OutcomeKind.NOT_FOUND:
            return CancelRequest(999)
        if becomes is OutcomeKind.REFUSED:
            return CancelRequest(7, account="nobody")
        (placed,) = self.exchange.add_orders(1)
        match becomes:
            case OutcomeKind.TRIGGERED:
                self.exchange.trigger(placed.algo_id, finished_after_ms=0 if status == "FINISHED" else None)
            case OutcomeKind.EXPIRED:
                self.exchange.expire(placed.algo_id)
            case OutcomeKind.REJECTED:
                self.exchange.reject(placed.algo_id)
            case OutcomeKind.ALREADY_CANCELLED:
                self.exchange.cancel(placed.algo_id)
        return CancelRequest(placed.algo_id, deadline_s=0.001 if becomes is OutcomeKind.OVERDUE else None)

    def work(self) -> None:
        """Start a worker."""
        self.workers.start(NOT_FOUND_HORIZON_S="0.2", BACKOFF_CAP_MS="100")

    def lose(self) -> None:
        """The client's connections lead to a port where nobody listens."""
        self.proxy.down()

    def forget(self) -> None:
        """The server of the tests has no append-only file."""


@dataclass
class Double:
    """A double, which is told the same as these."""

    client: Any
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(2_000_000_000_000_000))
    plan: list[tuple[CancelRequest, OutcomeKind, str | None]] = field(default_factory=list)
    working: bool = False

    def __post_init__(self) -> None:
        """Nobody works yet."""
        self.client.hold()

    def order(self, becomes: OutcomeKind = OutcomeKind.CANCELLED, status: str | None = None) -> CancelRequest:
        """An order that will have become this."""
        request = CancelRequest(next(self.numbers), account="nobody" if becomes is OutcomeKind.REFUSED else "default")
        self.plan.append((request, becomes, status))
        if self.working:
            self._tell(request, becomes, status)
        return request

    def work(self) -> None:
        """Settle what is held, and say what becomes of the rest."""
        kinds = {request.order_key: (kind, status) for request, kind, status in self.plan}
        for job_id, job in list(self.client._play._jobs.items()):
            kind, status = kinds.get(job.request.order_key, (OutcomeKind.CANCELLED, None))
            self.client.settle(job_id, kind, order_status=status)
        self.client.will(kind=OutcomeKind.CANCELLED)
        for request, kind, status in self.plan:
            self._tell(request, kind, status)
        self.working = True

    def _tell(self, request: CancelRequest, kind: OutcomeKind, status: str | None) -> None:
        self.client.will(algo_id=request.algo_id, account=request.account, kind=kind, order_status=status)

    def lose(self) -> None:
        """From now on."""
        self.client.unavailable()

    def forget(self) -> None:
        """From now on."""
        self.client.not_durable()


class Story(Talk):
    """Calls a client in its world."""

    def __init__(self, world: Real | Double, runner: asyncio.Runner) -> None:
        super().__init__(world.client, runner)
        self.world = world


@pytest.fixture(params=["client", "async client", "double", "async double"])
def talk(request: pytest.FixtureRequest) -> Iterator[Story]:
    """Both clients and both doubles."""
    with contextlib.ExitStack() as stack:
        world: Real | Double
        if request.param == "double":
            world = Double(FakeCancelClient())
        elif request.param == "async double":
            world = Double(AsyncFakeCancelClient())
        else:
            valkey: Valkey = request.getfixturevalue("valkey")
            sort = CancelClient if request.param == "client" else AsyncCancelClient
            proxy = stack.enter_context(Proxy(valkey.port))
            client = sort.from_url(proxy.redis_url)
            world = Real(client, request.getfixturevalue("workers"), request.getfixturevalue("exchange"), proxy)
        talk = Story(world, stack.enter_context(asyncio.Runner()))
        yield talk
        talk.close()


#: Kind, state given, may be live, state recorded, verdicts of the attempts (repeats left out), how the error begins.
RECORDS = [
    (OutcomeKind.CANCELLED, None, False, "CANCELED", ["confirmed"], None),
    (OutcomeKind.ALREADY_CANCELLED, None, False, "CANCELED", ["no_such_order", "canceled"], None),
    (OutcomeKind.TRIGGERED, None, True, "TRIGGERED", ["no_such_order", "triggered"], None),
    (OutcomeKind.TRIGGERED, "FINISHED", False, "FINISHED", ["no_such_order", "finished"], None),
    (OutcomeKind.EXPIRED, None, False, "EXPIRED", ["no_such_order", "expired"], None),
    (OutcomeKind.REJECTED, None, False, "REJECTED", ["no_such_order", "rejected"], None),
    (OutcomeKind.NOT_FOUND, None, True, None, ["no_such_order"], "unknown to the exchange: 400 -2013"),
    (OutcomeKind.OVERDUE, None, True, None, [], "the deadline passed before anything was sent"),
]


def test_records(talk: Story) -> None:
    """Each kind of outcome says the same of the order, and tells the same attempts."""
    requests = [talk.world.order(kind, status) for kind, status, *_ in RECORDS]
    tickets = talk.cancel_many(requests)
    talk.world.work()

    for ticket, (kind, _, live, recorded, verdicts, error) in zip(tickets, RECORDS, strict=True):
        outcome = talk.wait_for(ticket)
        assert (outcome.kind, outcome.may_be_live, outcome.order_status) == (kind, live, recorded)
        assert (outcome.id, outcome.run, outcome.algo_id) == (ticket.id, 1, ticket.request.algo_id)
        assert [name for name, _ in itertools.groupby(a.verdict for a in outcome.attempts)] == verdicts
        assert [attempt.n for attempt in outcome.attempts] == list(range(1, len(outcome.attempts) + 1))
        assert (outcome.error or "").startswith(error or "")
        assert (outcome.error is None) == (error is None)
        assert (outcome.actual_order_id is not None) == (kind is OutcomeKind.TRIGGERED)
        found = kind.off_the_book or kind is OutcomeKind.TRIGGERED
        assert (outcome.symbol is not None) == (found and kind is not OutcomeKind.CANCELLED)
        assert outcome.enqueued_at_ms is not None
        times = [outcome.enqueued_at_ms, *(attempt.at_ms for attempt in outcome.attempts), outcome.finished_at_ms]
        assert times == sorted(times)


def test_what_a_request_says_is_carried_over(talk: Story) -> None:
    """Symbol, tag and account come back in the outcome, and the algo id of an order that was asked for by client id."""
    tickets = talk.cancel_many([talk.world.order()])
    talk.world.work()
    talk.wait_for(tickets[0])
    asked = talk.world.order()
    ticket = talk.cancel(algo_id=asked.algo_id, symbol="ETHUSDT", tag="grid-7", urgent=True, deadline_s=60)
    outcome = talk.wait_for(ticket)

    assert (outcome.symbol, outcome.tag, outcome.account) == ("ETHUSDT", "grid-7", "default")
    assert ticket.as_dict() == {
        "id": ticket.id,
        "algo_id": asked.algo_id,
        "client_algo_id": None,
        "account": "default",
        "duplicate": False,
    }


def test_requests_for_one_order_share_a_job(talk: Story) -> None:
    """While a request is open another for its order joins it, and after its outcome one starts anew."""
    asked, other = talk.world.order(), talk.world.order()
    first = talk.cancel(algo_id=asked.algo_id, tag="first")
    second = talk.cancel(algo_id=asked.algo_id, tag="second", client_algo_id="not-looked-at")
    elsewhere = talk.cancel(algo_id=other.algo_id)
    by_client_id = talk.cancel(client_algo_id="not-looked-at")

    assert [each.duplicate for each in (first, second, elsewhere, by_client_id)] == [False, True, False, False]
    assert second.id == first.id
    assert len({first.id, elsewhere.id, by_client_id.id}) == 3
    talk.world.work()
    assert talk.wait_for(first) == talk.wait_for(second)
    assert talk.wait_for(first).tag == "first"
    again = talk.cancel(algo_id=asked.algo_id)
    assert again.id != first.id
    assert not again.duplicate


def test_requests_by_client_id_alone_share_no_job(talk: Story) -> None:
    """A client id may mean another order by the next call, which joins no earlier job; inside one call they share."""
    first = talk.cancel(client_algo_id="stop-1")
    second, other, again = talk.cancel_many(CancelRequest(None, name) for name in ("stop-1", "stop-2", "stop-1"))
    with_algo_id = talk.cancel(client_algo_id="stop-1", algo_id=talk.world.order().algo_id)

    assert [ticket.duplicate for ticket in (first, second, other, again, with_algo_id)] == [False] * 3 + [True, False]
    assert again.id == second.id
    assert len({ticket.id for ticket in (first, second, other, with_algo_id)}) == 4


def test_one_call_shares_too(talk: Story) -> None:
    """Requests for one order inside one call share a ticket, and tickets come in the order of the requests."""
    talk.world.work()
    asked, other = talk.world.order(), talk.world.order()
    tickets = talk.cancel_many(iter([asked, other, asked, CancelRequest(asked.algo_id, account="nobody")]))

    assert [ticket.request.algo_id for ticket in tickets] == [each.algo_id for each in (asked, other, asked, asked)]
    assert [ticket.duplicate for ticket in tickets] == [False, False, True, False]
    assert tickets[0].id == tickets[2].id != tickets[3].id
    assert talk.cancel_many([]) == []


def test_waiting(talk: Story) -> None:
    """A wait that was not long enough says so, and the same ticket can be waited for again."""
    ticket = talk.cancel(algo_id=talk.world.order().algo_id)
    with pytest.raises(WaitTimeout, match=f"no outcome of {ticket.id} within 0.05 s; the request goes on"):
        talk.wait_for(ticket, 0.05)
    assert talk.outcome(ticket.id) is None
    talk.world.work()

    assert talk.wait_for(ticket, None) == talk.outcome(ticket.id) == talk.wait(ticket, 0) == talk.outcome(ticket)


def test_waiting_for_nothing(talk: Story) -> None:
    """Whoever waits for what nobody knows is told so at once, however long it would have waited."""
    with pytest.raises(UnknownRequest, match="nobody-knows is not among the requests") as caught:
        talk.wait("nobody-knows")
    assert caught.value.job_ids == ("nobody-knows",)
    assert talk.outcome("nobody-knows") is None


def test_waiting_for_many(talk: Story) -> None:
    """A wait for many tells what ended and what stands, each with what a wait for it alone would have raised."""
    good, bad, other = talk.cancel_many(
        [talk.world.order(), talk.world.order(OutcomeKind.REFUSED), talk.world.order(OutcomeKind.EXPIRED)]
    )
    ended, standing = talk.wait_many([good, "nobody-knows", bad.id], 0.05)
    assert ended == {}
    assert {job_id: type(error) for job_id, error in standing.items()} == {
        good.id: WaitTimeout,
        "nobody-knows": UnknownRequest,
        bad.id: WaitTimeout,
    }
    talk.world.work()

    waited = talk.wait_many((ticket for ticket in (good, bad, other)), 30)
    assert (waited.standing, list(waited.ended)) == ({}, [good.id, bad.id, other.id])
    assert [outcome.kind.value for outcome in waited.ended.values()] == ["cancelled", "refused", "expired"]
    assert talk.wait_many([]) == ({}, {})


def test_a_closed_client_says_so(talk: Story) -> None:
    """Whoever goes on with a closed client is told, instead of silently getting a new connection."""
    ticket = talk.cancel(algo_id=talk.world.order().algo_id)
    talk.close()
    calls: list[Callable[[], object]] = [
        lambda: talk.cancel(algo_id=1),
        lambda: talk.outcome(ticket),
        lambda: talk.ledger(),
        lambda: talk.wait_for(ticket),
        lambda: talk.wait_many([ticket]),
        lambda: talk.retry([ticket.id]),
        lambda: talk.status(),
    ]
    for call in calls:
        with pytest.raises(InvalidRequest, match="it is closed: make a new one"):
            call()
    talk.close()


def test_tickets_travel(talk: Story) -> None:
    """A ticket can be pickled; its copy says what it lacks, and a client takes it as it takes the ticket."""
    ticket = talk.cancel(algo_id=talk.world.order().algo_id)
    travelled = pickle.loads(pickle.dumps(ticket))

    assert travelled == ticket
    assert copy.deepcopy(ticket) is ticket
    with pytest.raises(InvalidRequest, match=r"use client\.wait\(ticket\)"):
        talk.wait_for(travelled)
    talk.world.work()
    assert talk.wait(travelled, 10) == talk.wait_for(ticket)


def test_looking(talk: Story) -> None:
    """Outcomes, RQ's statuses and the queue's figures before and after."""
    good, bad = talk.cancel_many([talk.world.order(), talk.world.order(OutcomeKind.REFUSED)])
    ids = [good.id, bad.id, "nobody-knows"]
    assert talk.statuses(ids) == ["queued", "queued", None]
    assert talk.outcomes_of(ids) == {}
    assert (talk.status().queued, talk.status().failed) == (2, 0)
    talk.world.work()
    kinds = {ticket.id: talk.wait_for(ticket).kind for ticket in (good, bad)}

    assert kinds == {good.id: OutcomeKind.CANCELLED, bad.id: OutcomeKind.REFUSED}
    assert {name: outcome.kind for name, outcome in talk.outcomes_of(ids).items()} == kinds
    assert talk.statuses(ids) == ["finished", "failed", None]
    seen = talk.status()
    assert (seen.queue, seen.queued, seen.oldest_queued_s, seen.failed) == ("cancels", 0, None, 1)
    assert dict(seen.outcomes) == {"cancelled": 1, "refused": 1}
    assert seen.enqueue_to_outcome.p50 >= seen.enqueue_to_first_attempt.p50 >= 0


def test_ledger(talk: Story) -> None:
    """The ledger gives each outcome once, oldest first, from any place in it on; following goes on to new ones."""
    talk.world.work()
    assert talk.ledger() == talk.ledger("$") == []
    tickets = [talk.cancel(algo_id=talk.world.order().algo_id) for _ in range(3)]
    by_id = {ticket.id: talk.wait_for(ticket) for ticket in tickets}
    entries = talk.ledger()

    assert {outcome.id: outcome for _, outcome in entries} == by_id
    assert len(entries) == 3
    assert talk.ledger(entries[0][0]) == entries[1:]
    assert talk.ledger(entries[-1][0]) == talk.ledger("$") == []
    assert talk.ledger(entries[0][0].partition("-")[0], most=1) != []
    assert talk.ledger(follow=True, most=3) == entries


def test_retry(talk: Story) -> None:
    """Only what failed can be retried: with an unknown id among them nothing is, unless that is said to be fine."""
    talk.world.work()
    good, bad = talk.cancel_many([talk.world.order(), talk.world.order(OutcomeKind.REFUSED)])
    assert talk.wait_for(good).kind is OutcomeKind.CANCELLED
    assert talk.wait_for(bad).run == 1
    assert talk.failed_ids() == [bad.id]
    with pytest.raises(UnknownRequest, match=f"x, {good.id} are not among the failed requests of queue") as caught:
        talk.retry([bad.id, "x", good.id])
    assert caught.value.job_ids == ("x", good.id)
    assert talk.failed_ids() == [bad.id]

    assert talk.retry([bad.id, good.id, bad.id], missing_ok=True) == [bad.id]
    outcome = talk.wait_for(bad)
    assert (outcome.kind, outcome.run, outcome.id) == (OutcomeKind.REFUSED, 2, bad.id)
    assert talk.retry([]) == []


def test_not_durable(talk: Story) -> None:
    """Where a server cannot promise durability, the error carries the tickets, and the requests are on the queue."""
    talk.world.forget()
    assert talk.cancel(algo_id=1).id  # who asks for no promise is told nothing
    with pytest.raises(NotDurable, match="enqueued, but") as caught:
        talk.cancel_many(requests := [talk.world.order(), talk.world.order()], durable=True)

    assert [ticket.request for ticket in caught.value.tickets] == requests
    assert talk.status().queued == 3
    talk.world.work()
    assert all(talk.wait_for(ticket).off_the_book for ticket in caught.value.tickets)


def test_unavailable(talk: Story) -> None:
    """Without a server every call raises the one error that says so."""
    ticket = talk.cancel(algo_id=talk.world.order().algo_id)
    talk.world.lose()
    calls: list[Callable[[], object]] = [
        lambda: talk.cancel(algo_id=1),
        lambda: talk.cancel_many([CancelRequest(1)]),
        lambda: talk.outcome(ticket.id),
        lambda: talk.outcomes_of([ticket.id]),
        lambda: talk.ledger(),
        lambda: talk.ledger("$"),
        lambda: talk.wait_for(ticket, 1),
        lambda: talk.retry([ticket.id]),
        lambda: talk.failed_ids(),
        lambda: talk.statuses([ticket.id]),
        lambda: talk.status(),
    ]
    for call in calls:
        with pytest.raises(QueueUnavailable, match="Redis did not answer"):
            call()
    assert type(talk.wait_many([ticket], 1).standing[ticket.id]) is QueueUnavailable


def test_as_a_context(talk: Story) -> None:
    """Both work as context managers that give the client itself."""
    client = talk.world.client
    if hasattr(client, "__aenter__"):

        async def use() -> bool:
            async with client as same:
                return same is client

        assert talk.end(use())
    else:
        with client as same:
            assert same is client


def test_rq_job(talk: Story) -> None:
    """The synchronous client shows RQ's job of a request."""
    if not isinstance(talk.world.client, CancelClient):
        assert not hasattr(talk.world.client, "job")
        return
    asked = talk.world.order()
    ticket = talk.cancel(algo_id=asked.algo_id)
    job = talk.job(ticket)

    assert (job.id, job.origin, job.func_name) == (ticket.id, "cancels", "worker.task.cancel_algo_order")
    assert job.args == [{"v": 1, "account": "default", "algo_id": asked.algo_id}]
    assert job.description == f"cancel algo_id={asked.algo_id} account=default"
    assert talk.job(ticket.id).id == ticket.id
    with pytest.raises(NoSuchJobError):
        talk.job("nobody-knows")
