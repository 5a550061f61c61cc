"""What the enqueue script makes of a request: a job of its own, or a place in another's."""

from __future__ import annotations

from typing import Any

import pytest
import redis

from producer import CancelClient, CancelRequest, OutcomeKind
from producer.keys import Band, JobField
from producer.protocol import Wire, rows
from tests.holders import DEADLINE_MS, Holder, OpenHolder, band, ended, later, orders, requeue
from tests.servers import Peek


def test_a_new_job_is_whole(client: CancelClient, peek: Peek) -> None:
    """A request stands on RQ's list, in the index and behind its order's pointer, and its times are whole numbers."""
    before = peek.now_ms()
    ticket = client.cancel(algo_id=7, deadline_s=604_800)
    after = peek.now_ms()

    assert peek.waiting() == [ticket.id]
    assert before <= float(peek("ZSCORE", peek.keys.unfinished, ticket.id)) - Band.WAITING <= after
    assert peek("GET", "cancels:order:default:a:7") == ticket.id
    assert 0 < peek("TTL", "cancels:order:default:a:7") <= 8 * 86_400
    ours = {name: value for name, value in peek.job(ticket.id).items() if name.startswith("c_")}
    assert ours.keys() == {JobField.ENQUEUED_AT_MS, JobField.DEADLINE_AT_MS, JobField.RUN, JobField.ORDER}
    assert before <= int(ours[JobField.ENQUEUED_AT_MS]) <= after
    assert int(ours[JobField.DEADLINE_AT_MS]) == int(ours[JobField.ENQUEUED_AT_MS]) + 604_800_000
    assert (ours[JobField.RUN], ours[JobField.ORDER]) == ("1", "default:a:7")
    assert peek("SMEMBERS", peek.keys.queues) == [peek.keys.waiting]


def test_large_numbers_stay_whole_in_every_field(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """Times in our fields are plain whole numbers, never in scientific notation, whoever wrote them."""
    client.cancel(algo_id=1, deadline_s=604_800)
    (lease,) = holder.claim()
    fields = peek.job(lease.id)
    holder.complete(later(lease, 600_000_000))
    fields |= peek.job(lease.id)

    for name in ("c_enqueued_at_ms", "c_deadline_at_ms", "c_open_at_ms", "c_due_at_ms"):
        assert (fields[name].isdigit(), len(fields[name])) == (True, 13), (name, fields[name])


@pytest.mark.parametrize("state", ["waiting", "held", "scheduled"])
def test_a_request_joins_an_unfinished_job_in_each_state(
    state: str, client: CancelClient, holder: Holder, peek: Peek
) -> None:
    """Whether it waits, is in somebody's hand or waits for its next try: the job is shared, and prolonged."""
    (ticket,) = orders(client, 1, deadline_s=1)
    if state != "waiting":
        (lease,) = holder.claim()
        if state == "scheduled":
            holder.complete(later(lease, 60_000))
    before = band(peek, ticket.id)

    joined = client.cancel(algo_id=1, deadline_s=100, urgent=True)

    assert (joined.id, joined.duplicate) == (ticket.id, True)
    assert band(peek, ticket.id) is before
    fields = peek.job(ticket.id)
    assert int(fields[JobField.DEADLINE_AT_MS]) > int(fields[JobField.ENQUEUED_AT_MS]) + 99_000
    assert fields[JobField.URGENT] == "1"


def test_a_join_that_names_no_deadline_has_the_workers(client: CancelClient, holder: Holder) -> None:
    """A request that leaves its deadline to the worker has all of the worker's time, whatever the job's was before."""
    client.cancel(algo_id=1, deadline_s=1)
    assert client.cancel(algo_id=1).duplicate

    (lease,) = holder.claim()

    assert lease.deadline_at_ms >= lease.enqueued_at_ms + DEADLINE_MS


def test_joining_adds_no_second_entry(client: CancelClient, peek: Peek) -> None:
    """Requests that join a waiting job leave the list as it is; an urgent one adds an entry at its front."""
    tickets = [ticket.id for ticket in orders(client, 3)]
    orders(client, 3)
    assert peek.waiting() == tickets

    client.cancel(algo_id=3, urgent=True)

    assert peek.waiting() == [tickets[2], *tickets]


@pytest.mark.parametrize("status", ["canceled", "stopped"])
def test_a_job_that_a_person_took_back_is_not_joined(status: str, client: CancelClient, peek: Peek) -> None:
    """A request for the order of a canceled or stopped job starts a job of its own, which the next one joins."""
    first = client.cancel(algo_id=1)
    peek("HSET", peek.keys.job_prefix + first.id, "status", status)

    second = client.cancel(algo_id=1)

    assert (second.id != first.id, second.duplicate) == (True, False)
    assert client.cancel(algo_id=1).id == second.id


def test_a_pointer_that_leads_elsewhere_is_not_followed(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """A pointer that leads to an ended job or that of another order, as somebody wrote it, or to none, swallows no
    request."""
    ticket = client.cancel(algo_id=1)
    holder.complete(ended(holder.claim()[0], OutcomeKind.UNKNOWN))
    other = client.cancel(algo_id=2)
    for leads_to in (ticket.id, other.id, "nobody", "", "x" * 300, b"\xff\xfe"):
        peek("SET", "cancels:order:default:a:1", leads_to)

        fresh = client.cancel(algo_id=1)

        assert (fresh.id in (ticket.id, other.id), fresh.duplicate) == (False, False)
        assert peek("GET", "cancels:order:default:a:1") == fresh.id
        assert client.cancel(algo_id=1).duplicate


def test_a_requeued_job_is_joined_before_anybody_claims_it(
    client: CancelClient, holder: Holder, connection: redis.Redis, peek: Peek
) -> None:
    """Once RQ has put a failed job back, the next request for its order shares it: a new run with a new deadline."""
    ticket = client.cancel(algo_id=1, deadline_s=1)
    holder.complete(ended(holder.claim()[0], OutcomeKind.OVERDUE))
    requeue(connection, ticket.id)

    joined = client.cancel(algo_id=1, deadline_s=50)

    assert (joined.id, joined.duplicate) == (ticket.id, True)
    (lease,) = holder.claim()
    assert (lease.id, lease.run, lease.attempts) == (ticket.id, 2, b"")
    assert lease.deadline_at_ms > peek.now_ms() + 49_000
    assert holder.complete(ended(lease)) == [1]
    assert peek("KEYS", f"{peek.keys.order_prefix}*") == []


# ---- repeats --------------------------------------------------------------------------------------------------------


def test_a_call_that_is_sent_again_makes_nothing(
    client: CancelClient, open_holder: OpenHolder, connection: redis.Redis, peek: Peek
) -> None:
    """Its words, with the same ids, are answered as at first and make no job: while its jobs wait, when they have
    ended, and when no more than the records of their outcomes is left."""
    ((batch,),) = rows([CancelRequest(algo_id=7), CancelRequest(algo_id=7), *[CancelRequest(None, "c")] * 2])
    wire, holder = Wire("cancels"), open_holder()

    def call() -> Any:
        return connection.eval(wire.enqueue_script.source, 0, *wire._enqueue_words(batch))[1:]

    first, jobs = call(), connection.keys("rq:job:*")
    assert call() == first
    assert (len(peek.waiting()), sorted(connection.keys("rq:job:*"))) == (2, sorted(jobs))
    assert holder.complete(*map(ended, holder.claim())) == [1, 1]
    assert call() == first
    assert (peek.waiting(), len(peek.ledger())) == ([], 2)
    connection.delete(*jobs)
    assert call() == first
    assert holder.claim() == []
