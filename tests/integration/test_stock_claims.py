"""Leases for a stock RQ worker: it asks for the one job that RQ has popped, and is told why it is not given it."""

from __future__ import annotations

from typing import Any

import pytest
import redis

from producer import CancelClient, OutcomeKind
from producer.keys import Band
from producer.message import decode_attempts, decode_call
from tests.holders import NUMBERS, Holder, OpenHolder, back, band, ended, later, orders, tried
from tests.servers import Peek, eventually


@pytest.fixture
def stock(open_holder: OpenHolder) -> Holder:
    """A stock RQ worker."""
    return open_holder("stock")


def pop(connection: redis.Redis, job_id: str) -> None:
    """What RQ's popping does to a job: it says that it is started, and that it never ends."""
    key = f"rq:job:{job_id}"
    connection.hset(key, mapping={"status": "started", "worker_name": "stock"})
    connection.persist(key)


def test_it_is_given_the_job_that_it_popped(
    client: CancelClient, stock: Holder, connection: redis.Redis, peek: Peek
) -> None:
    """Its lease is that of any holder, and RQ's own entry among the started ones is left as it is."""
    one, other = orders(client, 2)
    pop(connection, other.id)
    connection.zadd(peek.keys.started, {f"{other.id}:rqs-own": 4e9})

    (lease,) = stock.claim_one(other.id).leases

    assert (lease.id, lease.run, lease.fault, decode_call(lease.data)) == (other.id, 1, "", other.request)
    assert band(peek, other.id) is Band.HELD
    assert peek("ZRANGE", peek.keys.started, 0, -1) == [f"{other.id}:rqs-own"]
    assert peek.job(other.id)["c_lease"] == lease.token
    assert one.id in peek.waiting()


def test_a_held_job_is_left_to_its_holder(
    client: CancelClient, open_holder: OpenHolder, stock: Holder, peek: Peek, connection: redis.Redis
) -> None:
    """It is told that ours has the job in hand; no attempt is noted for its asking."""
    ticket = client.cancel(algo_id=1)
    ours = open_holder("ours")
    (held,) = ours.claim()
    pop(connection, ticket.id)

    claimed = stock.claim_one(ticket.id)

    assert (claimed.leases, claimed.why_not) == ([], "held")
    assert ours.complete(later(held, 0, tried(1)))[0] > 1
    (lease,) = stock.claim_one(ticket.id).leases
    assert decode_attempts(lease.attempts) == (tried(1),)


@pytest.mark.parametrize("value", [b"abc", b"", b"9" * 400])
def test_a_damaged_job_in_our_hand_is_left_to_it(
    value: bytes, client: CancelClient, open_holder: OpenHolder, stock: Holder, connection: redis.Redis, peek: Peek
) -> None:
    """What ours has in hand is left to it whatever the job's fields hold, and left to it to find the damage."""
    ticket = client.cancel(algo_id=1)
    ours = open_holder("ours")
    (held,) = ours.claim()
    job = peek.keys.job_prefix + ticket.id
    sound: dict[Any, Any] = connection.hgetall(job)

    for damaged in [*((name,) for name in NUMBERS), (*NUMBERS, "c_attempts", "c_pin", "c_order")]:
        fields = sound | {name.encode(): value for name in damaged}
        connection.delete(job)
        connection.hset(job, mapping=fields)
        assert stock.claim_one(ticket.id).why_not == "held", damaged
        assert connection.hgetall(job) == fields

    connection.hset(job, mapping=sound)
    connection.hset(job, "c_deadline_at_ms", value)
    assert ours.complete(back(held)) == [1]
    (lease,) = stock.claim_one(ticket.id).leases
    assert lease.fault == "number c_deadline_at_ms"


@pytest.mark.parametrize("kind", [OutcomeKind.CANCELLED, OutcomeKind.UNKNOWN])
def test_an_ended_job_is_put_right(
    kind: OutcomeKind, client: CancelClient, open_holder: OpenHolder, stock: Holder, connection: redis.Redis, peek: Peek
) -> None:
    """Popped through a second entry, an ended job is what it was: RQ shows its end, and it runs out in its time."""
    ticket = client.cancel(algo_id=1)
    ours = open_holder("ours")
    assert ours.complete(ended(ours.claim()[0], kind)) == [1]
    before = peek.job(ticket.id)
    registry, life_s = (peek.keys.failed, 604_800) if kind.failed else (peek.keys.finished, 600)
    entry = peek("ZRANGE", registry, 0, -1, "WITHSCORES")
    pop(connection, ticket.id)

    claimed = stock.claim_one(ticket.id)

    assert (claimed.leases, claimed.why_not) == ([], "settled")
    assert peek.job(ticket.id) == before | {"worker_name": "stock"}
    assert life_s - 10 < peek("TTL", peek.keys.job_prefix + ticket.id) <= life_s
    assert peek("ZRANGE", registry, 0, -1, "WITHSCORES") == entry
    assert len(peek.ledger()) == 1


def test_a_scheduled_job_is_put_right(
    client: CancelClient, open_holder: OpenHolder, stock: Holder, connection: redis.Redis, peek: Peek
) -> None:
    """Popped before it is due, a retry keeps its backoff: RQ shows it as scheduled for the same moment."""
    ticket = client.cancel(algo_id=1)
    ours = open_holder("ours")
    (due_ms,) = ours.complete(later(ours.claim()[0], 60_000, tried(1)))
    pop(connection, ticket.id)
    peek("ZREM", peek.keys.scheduled, ticket.id)

    claimed = stock.claim_one(ticket.id)

    assert (claimed.leases, claimed.why_not, claimed.until_ms) == ([], "scheduled", due_ms)
    assert peek.job(ticket.id)["status"] == "scheduled"
    assert abs(float(peek("ZSCORE", peek.keys.scheduled, ticket.id)) * 1000 - due_ms) < 2
    assert band(peek, ticket.id) is Band.RETRY


@pytest.mark.parametrize(("deadline_s", "until_ms"), [(60.0, 2000), (1.5, 1500)], ids=["the pause", "its deadline"])
def test_a_job_that_was_popped_during_a_pause_comes_back(
    client: CancelClient, open_holder: OpenHolder, stock: Holder, peek: Peek, deadline_s: float, until_ms: int
) -> None:
    """It stands in no list any more: whoever claims when the pause or its deadline has passed is given it at once."""
    ticket = client.cancel(algo_id=1, deadline_s=deadline_s)
    ours, began_ms = open_holder("ours"), peek.now_ms()
    peek("HSET", peek.keys.gate("all"), "until_ms", began_ms + 2000)
    peek("LPOP", peek.keys.waiting)

    assert stock.claim_one(ticket.id).why_not == "closed"

    assert ours.claim() == []
    eventually(lambda: peek.now_ms() > began_ms + until_ms, what="the end")
    assert [lease.id for lease in ours.claim()] == [ticket.id]


@pytest.mark.parametrize("job_id", ["nobody", "", "x" * 300])
def test_a_job_that_is_gone(job_id: str, stock: Holder, peek: Peek) -> None:
    """A job that was deleted since, or never was, is told as such and leaves nothing."""
    claimed = stock.claim_one(job_id)

    assert (claimed.leases, claimed.why_not) == ([], "gone")
    assert peek("KEYS", "*") == []


def test_a_step_that_never_ended_is_a_doubt(client: CancelClient, stock: Holder, peek: Peek) -> None:
    """A step is noted before it is sent: where nobody comes back from it, it counts as perhaps sent."""
    ticket = client.cancel(algo_id=1)
    began = stock.claim_one(ticket.id)
    peek("ZADD", peek.keys.unfinished, began.now_ms - 1, ticket.id)

    (lease,) = stock.claim_one(ticket.id).leases

    (lost,) = decode_attempts(lease.attempts)
    assert (lost.n, lost.verdict, lost.at_ms) == (1, "unclear", began.now_ms)


def test_a_step_that_version_0_1_began_is_a_doubt(
    client: CancelClient, open_holder: OpenHolder, connection: redis.Redis
) -> None:
    """A stock worker of that version noted when it began, without a lease: whoever gets the job knows of it."""
    ticket = client.cancel(algo_id=1)
    connection.hset(f"rq:job:{ticket.id}", "c_open_at_ms", 1_700_000_000_123)

    (lease,) = open_holder("ours").claim()

    (lost,) = decode_attempts(lease.attempts)
    assert (lost.verdict, lost.at_ms) == ("unclear", 1_700_000_000_123)


def test_under_a_closed_gate_it_is_told_until_when(client: CancelClient, stock: Holder, peek: Peek) -> None:
    """A stock worker that finds the gate closed is told so, nothing is counted, and an overdue job is given anyhow."""
    ticket, overdue = client.cancel(algo_id=1, deadline_s=100), client.cancel(algo_id=2, deadline_s=0.001)
    until_ms = stock.close_gate(60_000)

    for _ in range(2):
        claimed = stock.claim_one(ticket.id)
        assert (claimed.leases, claimed.gate_until_ms, claimed.why_not) == ([], until_ms, "closed")
        assert abs(claimed.until_ms - claimed.now_ms - 100_000) < 2000
    assert [lease.id for lease in stock.claim_one(overdue.id).leases] == [overdue.id]
    peek("DEL", peek.keys.gate("all"))
    (lease,) = stock.claim_one(ticket.id).leases
    assert lease.attempts == b""
