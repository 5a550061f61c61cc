"""What the enqueue script makes of a request: a job of its own, or a place in another's."""

from __future__ import annotations

import pytest
import redis

from producer import CancelClient, CancelRequest, OutcomeKind
from producer.keys import Band, JobField
from producer.protocol import Wire, rows
from tests.holders import OpenHolder, band, ended, ids, later, orders, requeue
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


def test_large_numbers_stay_whole_in_every_field(client: CancelClient, open_holder: OpenHolder, peek: Peek) -> None:
    """Times in our fields are plain whole numbers, never in scientific notation, whoever wrote them."""
    client.cancel(algo_id=1, deadline_s=604_800)
    holder = open_holder()
    (lease,) = holder.claim()
    fields = peek.job(lease.id)
    holder.complete(later(lease, 600_000_000))
    fields |= peek.job(lease.id)

    for name in ("c_enqueued_at_ms", "c_deadline_at_ms", "c_open_at_ms", "c_due_at_ms"):
        assert (fields[name].isdigit(), len(fields[name])) == (True, 13), (name, fields[name])


@pytest.mark.parametrize("state", ["waiting", "held", "scheduled"])
def test_a_request_joins_an_unfinished_job_in_each_state(
    state: str, client: CancelClient, open_holder: OpenHolder, peek: Peek
) -> None:
    """Whether it waits, is in somebody's hand or waits for its next try: the job is shared, and prolonged."""
    (ticket,) = orders(client, 1, deadline_s=1)
    holder = open_holder()
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


def test_joining_adds_no_second_entry(client: CancelClient, peek: Peek) -> None:
    """Requests that join a waiting job leave the list as it is; an urgent one adds an entry at its front."""
    tickets = [ticket.id for ticket in orders(client, 3)]
    orders(client, 3)
    assert peek.waiting() == tickets

    client.cancel(algo_id=3, urgent=True)

    assert peek.waiting() == [tickets[2], *tickets]


def test_a_pointer_that_leads_elsewhere_is_not_followed(
    client: CancelClient, open_holder: OpenHolder, peek: Peek
) -> None:
    """A pointer that leads to an ended job or that of another order, as somebody wrote it, or to none, swallows no
    request."""
    ticket = client.cancel(algo_id=1)
    holder = open_holder()
    holder.complete(ended(holder.claim()[0], OutcomeKind.UNKNOWN))
    other = client.cancel(algo_id=2)
    for leads_to in (ticket.id, other.id, "nobody", "", "x" * 300, b"\xff\xfe"):
        peek("SET", "cancels:order:default:a:1", leads_to)

        fresh = client.cancel(algo_id=1)

        assert (fresh.id in (ticket.id, other.id), fresh.duplicate) == (False, False)
        assert peek("GET", "cancels:order:default:a:1") == fresh.id
        assert client.cancel(algo_id=1).duplicate


def test_a_requeued_job_is_joined_before_anybody_claims_it(
    client: CancelClient, open_holder: OpenHolder, connection: redis.Redis, peek: Peek
) -> None:
    """Once RQ has put a failed job back, the next request for its order shares it: a new run with a new deadline."""
    ticket = client.cancel(algo_id=1, deadline_s=1)
    holder = open_holder()
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


def test_a_repeat_after_the_outcome_gives_no_row_a_new_job(
    client: CancelClient, open_holder: OpenHolder, connection: redis.Redis, peek: Peek
) -> None:
    """Two requests for one order, enqueued, finished, and enqueued again with the same ids, make no second job."""
    ((batch,),) = rows([CancelRequest(algo_id=7), CancelRequest(algo_id=7)])
    wire = Wire("cancels")
    words = wire._enqueue_words(batch)
    first = connection.eval(wire.enqueue_script.source, 0, *words)
    holder = open_holder()
    assert holder.complete(*map(ended, holder.claim())) == [1]

    again = connection.eval(wire.enqueue_script.source, 0, *words)

    assert again[1:] == first[1:]
    assert peek.waiting() == []
    assert len(peek.ledger()) == 1


def test_a_repeat_after_the_job_ran_out_gives_no_new_one_either(
    client: CancelClient, open_holder: OpenHolder, connection: redis.Redis, peek: Peek
) -> None:
    """Nor is one made where only the record of the outcome is left."""
    ((batch,),) = rows([CancelRequest(algo_id=7)])
    wire = Wire("cancels")
    words = wire._enqueue_words(batch)
    (_, job_id, _) = first = connection.eval(wire.enqueue_script.source, 0, *words)
    holder = open_holder()
    holder.complete(*map(ended, holder.claim()))
    connection.delete(peek.keys.job_prefix.encode() + job_id)

    assert connection.eval(wire.enqueue_script.source, 0, *words)[1:] == first[1:]
    assert ids(holder.claim()) == []


def test_a_repeat_while_it_waits_joins_nothing_and_makes_nothing(client: CancelClient, connection: redis.Redis) -> None:
    """Made again with the same ids at once, requests are answered as before, and each stands on the list once."""
    ((batch,),) = rows([CancelRequest(algo_id=7), CancelRequest(None, "c"), CancelRequest(None, "c")])
    wire = Wire("cancels")
    words = wire._enqueue_words(batch)
    first = connection.eval(wire.enqueue_script.source, 0, *words)
    jobs = set(connection.keys("rq:job:*"))

    assert connection.eval(wire.enqueue_script.source, 0, *words)[1:] == first[1:]
    assert connection.llen("rq:queue:cancels") == 2
    assert set(connection.keys("rq:job:*")) == jobs
