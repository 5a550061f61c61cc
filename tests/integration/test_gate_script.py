"""The shared pause of an address, and RQ's suspension: what claims give meanwhile."""

from __future__ import annotations

import time

import pytest
import redis

from producer import CancelClient, CancelRequest
from tests.holders import OVERLOOKED_BUSY_MS, Holder, OpenHolder, age, ids, later, orders
from tests.servers import Peek, eventually
from worker.store import Suspect

SUSPECT = Suspect("default", "0123456789abcdef")


def test_a_closed_gate_gives_nothing(client: CancelClient, open_holder: OpenHolder, peek: Peek) -> None:
    """While the gate is closed jobs stay where they are, however long they wait, and every claim tells until when."""
    tickets = [ticket.id for ticket in orders(client, 3)]
    one, other = open_holder("one"), open_holder("other")
    until_ms = one.close_gate(60_000)
    age(peek, OVERLOOKED_BUSY_MS)

    claimed = other.claimed(5, look_closely=True)

    assert (claimed.leases, claimed.gate_until_ms) == ([], until_ms)
    assert other.claim(5, wait=True) == []
    assert peek.waiting() == tickets


def test_the_gate_opens_by_itself(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """When the gate's time is over, claims give again and say that it is open."""
    client.cancel(algo_id=1)
    until_ms = holder.close_gate(1500)
    assert holder.claim() == []
    eventually(lambda: peek.now_ms() > until_ms, what="its time is over")

    claimed = holder.claimed()

    assert (len(claimed.leases), claimed.gate_until_ms) == (1, 0)


def test_the_later_end_of_the_gate_holds(open_holder: OpenHolder, peek: Peek) -> None:
    """A shorter pause never opens a gate that somebody closed for longer; why and by whom stays readable."""
    one, other = open_holder("one"), open_holder("other")
    until_ms = one.close_gate(60_000, "418 banned")

    assert other.close_gate(1000) == until_ms
    assert dict(peek("HGETALL", peek.keys.gate("all"))).items() >= {"reason": "418 banned", "by": "one"}.items()
    assert one.close_gate(90_000, "418 again") >= until_ms + 29_000
    assert 3_600_000 < peek("PTTL", peek.keys.gate("all")) <= 3_690_000


def test_a_full_server_closes_the_gate(open_holder: OpenHolder, connection: redis.Redis) -> None:
    """A ban reaches everybody on the address, and a refused key those who use it, also while the server is full."""
    one, other = open_holder("one"), open_holder("other")
    connection.config_set("maxmemory", 1)
    try:
        until_ms = one.close_gate(60_000, "418 banned")
        probe_at_ms, _ = one.ask(one.store.key(SUSPECT, "failed", "401", 1, 60_000))
        assert other.beat().gate_until_ms == until_ms
        assert other.beat().suspects == (SUSPECT,)
        assert other.ask(other.store.key(SUSPECT, "ask", "job", 1, 60_000)) == (probe_at_ms, "401")
    finally:
        connection.config_set("maxmemory", 0)


def test_what_waited_for_its_key_goes_on_when_it_is_accepted(client: CancelClient, open_holder: OpenHolder) -> None:
    """Jobs that were put off for a refused key are given as soon as any request with it is accepted, to a stock worker
    that pops one too."""
    one, two = orders(client, 2)
    holder, stock = open_holder(), open_holder("stock")
    holder.complete(*(later(lease, 60_000) for lease in holder.claim()))
    for what, word in (("failed", "401"), ("ask", one.id), ("ask", two.id)):
        holder.ask(holder.store.key(SUSPECT, what, word, 1, 60_000))
    assert (holder.claim(), stock.claim_one(two.id).why_not) == ([], "scheduled")

    holder.ask(holder.store.key(SUSPECT, "answered", "", 1, 60_000))

    assert ids(stock.claim_one(two.id).leases) == [two.id]
    assert ids(holder.claim()) == [one.id]


@pytest.mark.parametrize("until_ms", ["9" * 5000, "9" * 17, "abc", ""])
def test_an_end_of_the_gate_that_is_none(until_ms: str, client: CancelClient, holder: Holder, peek: Peek) -> None:
    """Whatever stands in place of the gate's end, beats go on, and beats and claims agree that the gate is open."""
    orders(client, 1)
    peek("HSET", peek.keys.gate("all"), "until_ms", until_ms)

    assert holder.beat().gate_until_ms is None
    claimed = holder.claimed()
    assert (len(claimed.leases), claimed.gate_until_ms) == (1, 0)


def test_a_doubling_pause(holder: Holder, peek: Peek) -> None:
    """A firewall's block that comes again after its pause lasts twice as long; those during the pause are one."""
    holder.close_gate(60, "403", True)
    until_ms = holder.close_gate(60, "403", True)
    assert until_ms <= peek.now_ms() + 60
    eventually(lambda: peek.now_ms() > until_ms, what="the pause is over")

    now_ms = peek.now_ms()
    assert holder.close_gate(60, "403", True) >= now_ms + 120


@pytest.mark.parametrize("pause", ["gate", "suspension"])
def test_an_overdue_job_is_given_even_during_a_pause(
    pause: str, client: CancelClient, holder: Holder, peek: Peek
) -> None:
    """A request whose deadline has passed needs nothing sent: it is given so that its outcome comes on time."""
    (early,) = orders(client, 1)
    overdue = client.cancel(algo_id=50, deadline_s=0.001)
    (late,) = orders(client, 1, first=60)
    if pause == "gate":
        holder.close_gate(60_000)
    else:
        peek("SET", peek.keys.suspended, "1")
    time.sleep(0.005)

    assert ids(holder.claim()) == [overdue.id]
    assert peek.waiting() == [early.id, late.id]


@pytest.mark.parametrize("status", ["canceled", "stopped"])
def test_a_job_that_was_taken_back_is_given_even_during_a_pause(
    status: str, client: CancelClient, holder: Holder, peek: Peek
) -> None:
    """Nor does the outcome of a job that somebody took back through RQ need anything sent."""
    ticket, other = orders(client, 2)
    peek("HSET", peek.keys.job_prefix + ticket.id, "status", status)
    holder.close_gate(60_000)

    (lease,) = holder.claim()

    assert (lease.id, lease.fault) == (ticket.id, f"recalled {status}")
    assert peek.waiting() == [other.id]


def test_overdue_jobs_behind_a_long_queue_are_given_during_a_pause(
    client: CancelClient, holder: Holder, peek: Peek
) -> None:
    """Each look of a pause goes through another stretch of the queue, so that an overdue job deep in it is found."""
    orders(client, 1200)
    overdue = client.cancel_many(CancelRequest(algo_id=5000 + i, deadline_s=0.001) for i in range(3))
    waiting = set(peek.waiting())
    holder.close_gate(60_000)

    given: list[str] = []

    def look() -> bool:
        given.extend(ids(holder.claim()))
        return len(given) >= 3

    eventually(look, what="the overdue jobs are given")

    assert sorted(given) == sorted(ticket.id for ticket in overdue)
    assert set(peek.waiting()) == waiting - set(given)
    assert len(peek.waiting()) == 1200


def test_suspension_gives_nothing(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """While RQ is suspended jobs stay on the queue in their order; afterwards they are given."""
    tickets = [ticket.id for ticket in orders(client, 3)]
    peek("SET", peek.keys.suspended, "1")

    claimed = holder.claimed(2, wait=True)
    assert (claimed.leases, claimed.suspended) == ([], True)
    assert peek.waiting() == tickets

    peek("DEL", peek.keys.suspended)
    claimed = holder.claimed(9, wait=True)
    assert (ids(claimed.leases), claimed.suspended) == (tickets, False)
