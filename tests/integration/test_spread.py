"""The script that ends a listing and makes the requests for its orders: all in one call, once, whatever is lost."""

from __future__ import annotations

from typing import Any

import pytest

from producer import CancelClient, CancelRequest, OutcomeKind
from producer.message import Attempt, Call, ListedOrder, Outcome, decode_attempts
from tests.holders import Holder, OpenHolder, ended, ids
from tests.servers import Peek
from worker.store import Done, Lease

PROPOSED = [f"{n:032x}" for n in range(1, 6)]


MADE = Attempt(1, 10**12, Call.LIST_OPEN, 200, None, "1 open", "listed", 5)


def spread(
    lease: Lease,
    algo_ids: list[int],
    proposed: list[str] | None = None,
    attempts: tuple[Attempt, ...] = (),
    **fields: Any,
) -> Done:
    """The end of a listing that found these orders."""
    job_ids = proposed or PROPOSED
    requests = tuple((job_ids[n], CancelRequest(algo_id=algo_id, **fields)) for n, algo_id in enumerate(algo_ids))
    named = tuple(ListedOrder(request.algo_id or 0, job_id) for job_id, request in requests)
    known: dict[str, Any] = {"orders": named, "tag": '"id":"1"', "attempts": attempts}
    return Done(lease, Outcome(lease.id, lease.run, OutcomeKind.LISTED, **known), "", requests)


def carried(client: CancelClient, listing: str) -> dict[int, str]:
    """Which job carries each order, as the record has it."""
    outcome = client.outcome(listing)
    assert outcome is not None
    assert (outcome.kind, outcome.tag) == (OutcomeKind.LISTED, '"id":"1"')
    return {order.algo_id: order.id for order in outcome.orders or ()}


def test_a_listing_ends_once_and_its_requests_are_made_once(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """The call repeated, as when its answer was lost, is answered alike and makes nothing more, even when the requests
    have ended by then; another holder's end of the same listing changes nothing."""
    ticket = client.cancel_open("BTCUSDT")
    (lease,) = holder.claim()

    assert holder.complete(spread(lease, [7, 8])) == [1]
    assert carried(client, ticket.id) == {7: PROPOSED[0], 8: PROPOSED[1]}
    assert (peek.waiting(), peek("ZCARD", peek.keys.started)) == (PROPOSED[:2], 0)
    assert holder.complete(spread(lease, [7, 8])) == [1]
    assert peek.waiting() == PROPOSED[:2]

    holder.complete(*map(ended, holder.claim()))
    assert holder.complete(spread(lease, [7, 8])) == [1]
    assert holder.claim() == []
    assert len(peek.ledger()) == 3
    assert holder.is_drained()


def test_a_lost_lease_makes_no_request(client: CancelClient, open_holder: OpenHolder, peek: Peek) -> None:
    """Who has lost the listing to another holder neither records nor enqueues anything."""
    ticket = client.cancel_open("BTCUSDT")
    dead, heir = open_holder("dead", lease_ms=1), open_holder("heir")
    (lost,) = dead.claim()
    leases: list[Lease] = []
    while not leases:
        leases = heir.claim()

    assert dead.complete(spread(lost, [7])) == [0]
    assert (peek.waiting(), peek.ledger()) == ([], [])
    assert heir.complete(spread(leases[0], [7], PROPOSED[1:])) == [1]
    assert carried(client, ticket.id) == {7: PROPOSED[1]}


def test_its_requests_join_what_is_under_way(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """An order that has an unfinished request keeps that one, with the later deadline, urgency and what is asked of a
    child; later requests join the jobs that were made."""
    client.cancel(algo_id=9)
    under_way = client.cancel(algo_id=7, deadline_s=5)
    listing = client.cancel_open("BTCUSDT", deadline_s=500, urgent=True, on_trigger="cancel_child")
    (lease,) = holder.claim(1)
    assert lease.id == listing.id

    assert holder.complete(spread(lease, [7, 8], urgent=True)) == [1]

    assert carried(client, listing.id) == {7: under_way.id, 8: PROPOSED[1]}
    leases = {each.id: each for each in holder.claim(2)}
    assert set(leases) == {under_way.id, PROPOSED[1]}
    assert {each.deadline_at_ms for each in leases.values()} == {lease.deadline_at_ms}
    assert all(each.cancels_child for each in leases.values())
    assert client.cancel(algo_id=8).id == PROPOSED[1]


@pytest.mark.parametrize("other", ['x","id":"1', "%1", "a b", "ö", "x" * 300, ""])
def test_an_odd_pointer_is_not_joined(client: CancelClient, holder: Holder, peek: Peek, other: str) -> None:
    """Only a plain id out of Redis gets into the record: else the order has a job of its own."""
    order = CancelRequest(algo_id=7).order_key
    peek("SET", peek.keys.order_prefix + order, other)
    peek("HSET", peek.keys.job_prefix + other, "status", "queued", "c_run", "1", "c_order", order)
    ticket = client.cancel_open("BTCUSDT")
    (lease,) = holder.claim()

    assert holder.complete(spread(lease, [7])) == [1]
    assert carried(client, ticket.id) == {7: PROPOSED[0]}


def test_a_listing_that_a_person_took_back_makes_no_request(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """Cancelled through RQ while it was in hand, it goes back to be ended, with what was done for it."""
    ticket = client.cancel_open("BTCUSDT")
    (lease,) = holder.claim()
    client.job(ticket).cancel()

    assert holder.complete(spread(lease, [7], attempts=(MADE,))) == [2]
    assert peek.ledger() == []
    (again,) = holder.claim()
    assert (again.fault, decode_attempts(again.attempts)) == ("recalled canceled", (MADE,))


def test_a_listing_whose_requests_cannot_be_made_does_not_end(
    client: CancelClient, open_holder: OpenHolder, peek: Peek
) -> None:
    """A worker whose user may not do what they need records nothing; whoever may ends it with its requests."""
    peek("ACL", "SETUSER", "poor", "on", "nopass", "~*", "&*", "+@all", "-sadd")
    client.cancel_open("BTCUSDT")
    holder, poor = open_holder(), open_holder("poor", connection={"username": "poor", "password": "any"})
    (lease,) = holder.claim()

    assert poor.complete(spread(lease, [7])) == [-1]
    assert (peek.ledger(), peek.waiting()) == ([], [])
    assert holder.complete(spread(lease, [7])) == [1]
    assert peek.waiting() == PROPOSED[:1]


def test_a_deleted_listing_ends_once(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """In hand when its hash was deleted, it is recorded with its requests all the same, once."""
    ticket = client.cancel_open("BTCUSDT")
    (lease,) = holder.claim()
    peek("DEL", peek.keys.job_prefix + ticket.id)

    assert holder.complete(spread(lease, [7])) == [1]
    assert carried(client, ticket.id) == {7: PROPOSED[0]}
    holder.complete(spread(lease, [7]))
    assert peek.waiting() == PROPOSED[:1]
    assert ids(holder.claim()) == PROPOSED[:1]


def test_listings_join_nobody(client: CancelClient, peek: Peek) -> None:
    """Two calls are two listings, each of its own moment; nothing points to them."""
    first, second = client.cancel_open("BTCUSDT"), client.cancel_open("BTCUSDT")

    assert first.id != second.id
    assert peek.waiting() == [first.id, second.id]
    assert peek("KEYS", f"{peek.keys.order_prefix}*") == []
