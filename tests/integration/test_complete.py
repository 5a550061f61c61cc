"""Completions: outcomes, retries and jobs that are handed back, one rule at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import redis

from producer import CancelClient
from producer.message import OutcomeKind, decode_attempts
from tests.holders import DEAD, SPOILED, Holder, OpenHolder, age, back, ended, ids, later, orders, tried
from tests.servers import Peek
from worker.store import Lease, Row

# ---- outcomes -------------------------------------------------------------------------------------------------------


def test_an_outcome_is_in_the_record_and_in_the_ledger(
    client: CancelClient, open_holder: OpenHolder, peek: Peek
) -> None:
    """A recorded outcome can be read by its id for its time, and stands in the ledger as the same object."""
    ticket = client.cancel(algo_id=1)
    holder = open_holder(outcome_ttl_s=77)
    (lease,) = holder.claim()
    row = ended(lease, attempts=(tried(1, "confirmed"),), algo_id=1, tag="täg")

    holder.complete(row)

    assert client.outcome(ticket.id) == row.outcome == peek.ledger()[0]
    assert 70 < peek("TTL", peek.keys.outcome_prefix + ticket.id) <= 77
    assert holder.ask(holder.store.recorded(ticket.id)) == row.outcome.encode().encode()
    assert "c_attempts" not in peek.job(ticket.id)


def test_no_worker_is_called_back_to_life(client: CancelClient, open_holder: OpenHolder, peek: Peek) -> None:
    """A worker's hash that has expired is not made anew with counters alone: RQ could not read it."""
    client.cancel(algo_id=1)
    holder = open_holder("gone")
    (lease,) = holder.claim()

    assert holder.complete(ended(lease)) == [1]

    assert peek("KEYS", "rq:worker:*") == []


def test_the_pointer_ends_with_the_outcome(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """The pointer of an order's open job goes with its outcome, so that the next request starts a fresh job."""
    ticket = client.cancel(algo_id=1)
    pointer = peek.keys.order_prefix + ticket.request.order_key
    assert peek("GET", pointer) == ticket.id
    (lease,) = holder.claim()

    holder.complete(ended(lease))

    assert peek("GET", pointer) is None
    fresh = client.cancel(algo_id=1)
    assert (fresh.id != ticket.id, fresh.duplicate) == (True, False)


def test_the_pointer_to_a_failed_job_leads_nobody_astray(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """It stays, as RQ may put the job back; until then a request for its order starts a fresh job, which takes it."""
    ticket = client.cancel(algo_id=1)
    holder.complete(ended(holder.claim()[0], OutcomeKind.UNKNOWN))
    assert peek("GET", peek.keys.order_prefix + ticket.request.order_key) == ticket.id

    fresh = client.cancel(algo_id=1)

    assert (fresh.id != ticket.id, fresh.duplicate) == (True, False)
    assert client.cancel(algo_id=1).id == fresh.id


def test_the_pointer_of_another_job_is_left_alone(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """An outcome takes away only the pointer that points to its own job."""
    ticket = client.cancel(algo_id=1)
    pointer = peek.keys.order_prefix + ticket.request.order_key
    (lease,) = holder.claim()
    peek("SET", pointer, "somebody-else")

    holder.complete(ended(lease))

    assert peek("GET", pointer) == "somebody-else"


# ---- retries, and what is handed back -------------------------------------------------------------------------------


def test_a_retry_is_due_with_a_fraction_of_a_second(
    client: CancelClient, holder: Holder, connection: redis.Redis, peek: Peek
) -> None:
    """A retry stands in RQ's scheduled registry under its due time, and RQ counts it."""
    ticket = client.cancel(algo_id=1)
    (lease,) = holder.claim()
    before = peek.now_ms()

    (due_ms,) = holder.complete(later(lease, 250, tried(1)))

    scheduled: Any = connection.zrange(peek.keys.scheduled, 0, -1, withscores=True)
    ((job_id, score),) = scheduled
    assert job_id == ticket.id.encode()
    assert before + 250 <= due_ms <= peek.now_ms() + 250
    assert abs(float(score) * 1000 - due_ms) < 2
    assert (peek.job(ticket.id)["status"], peek.job(ticket.id)["number_of_retries"]) == ("scheduled", "1")


def test_a_handed_back_job_is_first_and_untried(client: CancelClient, open_holder: OpenHolder, peek: Peek) -> None:
    """A job that was handed back stands at the front, with no attempt counted for the hold."""
    tickets = [ticket.id for ticket in orders(client, 3)]
    holder = open_holder()
    (lease,) = holder.claim(1)

    assert holder.complete(back(lease)) == [1]

    assert peek.waiting() == tickets
    assert peek.job(lease.id)["status"] == "queued"
    (again,) = open_holder("other").claim(1)
    assert (again.id, again.attempts, again.run) == (lease.id, b"", 1)


def test_jobs_handed_back_together_keep_their_order(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """A worker that hands several jobs back leaves the queue as it found it."""
    tickets = [ticket.id for ticket in orders(client, 5)]

    holder.complete(*map(back, holder.claim(3)))

    assert peek.waiting() == tickets


def test_a_handed_back_job_keeps_what_was_tried(client: CancelClient, holder: Holder) -> None:
    """A job that is handed back in the middle of its attempts keeps them, and what is known of its order."""
    client.cancel(algo_id=1)
    (lease,) = holder.claim()

    holder.complete(replace(back(lease), attempts=(tried(1),), pin='{"algo_id":1}'))

    (again,) = holder.claim()
    assert (decode_attempts(again.attempts), again.pin) == ((tried(1),), b'{"algo_id":1}')
    holder.complete(back(again))
    (third,) = holder.claim()
    assert (third.attempts, third.pin) == (again.attempts, again.pin)


# ---- decided by a deadline that has moved ---------------------------------------------------------------------------


@pytest.fixture
def prolonged(client: CancelClient, open_holder: OpenHolder) -> tuple[Holder, Lease]:
    """A job that was claimed with a deadline of 1 s and has got one of 60 s since."""
    ticket = client.cancel(algo_id=1, deadline_s=1)
    holder = open_holder()
    (lease,) = holder.claim()
    assert client.cancel(algo_id=1, deadline_s=60).id == ticket.id
    return holder, lease


@pytest.mark.parametrize("kind", [OutcomeKind.OVERDUE, OutcomeKind.GAVE_UP, OutcomeKind.UNKNOWN])
def test_a_later_deadline_undoes_a_decision_by_the_earlier_one(
    kind: OutcomeKind, prolonged: tuple[Holder, Lease], peek: Peek
) -> None:
    """A job that would end by its deadline goes on until the later one, with all that was tried, and its worker learns
    that no outcome was recorded."""
    holder, lease = prolonged

    assert holder.complete(ended(lease, kind, attempts=(tried(1),), pin='{"algo_id":1}')) == [2]

    assert peek.ledger() == []
    (again,) = holder.claim()
    assert again.deadline_at_ms > lease.deadline_at_ms + 50_000
    assert (decode_attempts(again.attempts), again.pin) == ((tried(1),), b'{"algo_id":1}')
    assert holder.complete(ended(again)) == [1]
    assert [outcome.kind for outcome in peek.ledger()] == [OutcomeKind.CANCELLED]


@pytest.mark.parametrize("kind", [OutcomeKind.CANCELLED, OutcomeKind.NOT_FOUND, OutcomeKind.REFUSED])
def test_a_deadline_does_not_undo_what_the_exchange_said(
    kind: OutcomeKind, prolonged: tuple[Holder, Lease], peek: Peek
) -> None:
    """A later deadline matters only where a deadline decided: what the exchange said is recorded all the same."""
    holder, lease = prolonged

    assert holder.complete(ended(lease, kind)) == [1]
    assert [outcome.kind for outcome in peek.ledger()] == [kind]


def test_a_wish_for_the_child_undoes_a_decision_to_leave_it(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """A triggered order's job goes on where its child is only told of while a later request wants it cancelled."""
    ticket = client.cancel(algo_id=1)
    (lease,) = holder.claim()
    assert client.cancel(algo_id=1, on_trigger="cancel_child").id == ticket.id

    assert holder.complete(ended(lease, OutcomeKind.TRIGGERED, attempts=(tried(1),))) == [2]

    (again,) = holder.claim()
    assert (again.cancels_child, decode_attempts(again.attempts)) == (True, (tried(1),))
    assert holder.complete(ended(again, OutcomeKind.TRIGGERED)) == [1]
    assert [outcome.kind for outcome in peek.ledger()] == [OutcomeKind.TRIGGERED]


# ---- jobs that somebody deleted -------------------------------------------------------------------------------------


def test_a_job_deleted_while_it_is_held_has_its_outcome(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """Deleting a job that is being worked on takes back nothing: what was done is recorded, once."""
    ticket = client.cancel(algo_id=1)
    (lease,) = holder.claim()
    client.job(ticket).delete()

    for _ in range(2):
        assert holder.complete(ended(lease)) == [1]

    outcome = client.outcome(ticket.id)
    assert outcome is not None
    assert peek.ledger() == [outcome]
    assert peek.job(ticket.id) == {}
    assert (holder.claim(), holder.is_drained()) == ([], True)
    assert peek("ZCARD", peek.keys.started) == 0


def test_a_deleted_job_is_neither_tried_again_nor_given(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """A retry of a deleted job and one that is handed back are told that it is gone; another outcome comes too late."""
    tickets = orders(client, 3)
    one, two, three = holder.claim()
    for ticket in tickets:
        client.job(ticket).delete()
    assert holder.complete(ended(one)) == [1]

    assert holder.complete(later(two, 0), back(three), ended(one, OutcomeKind.UNKNOWN)) == [0, 0, 0]

    assert [outcome.kind for outcome in peek.ledger()] == [OutcomeKind.CANCELLED]
    assert peek("KEYS", f"{peek.keys.job_prefix}*") == []
    assert holder.claim() == []


def test_a_deleted_job_that_nobody_holds_gets_no_outcome_late(
    client: CancelClient, open_holder: OpenHolder, peek: Peek
) -> None:
    """Once the index has forgotten a deleted job, its former holder cannot bring it back into the ledger."""
    (ticket,) = orders(client, 1)
    first = open_holder(lease_ms=DEAD)
    (lease,) = first.claim()
    client.job(ticket).delete()
    time.sleep(0.01)
    assert open_holder("other").claim() == []

    assert first.complete(ended(lease)) == [0]
    assert peek.ledger() == []


# ---- one row, all or nothing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(SPOILED.keys() - {"hash"}))
def test_one_spoiled_job_costs_no_other(
    kind: str, client: CancelClient, holder: Holder, connection: redis.Redis, peek: Peek
) -> None:
    """In a group with a job whose key was replaced all outcomes are filed, its own too, and what goes back waits."""
    tickets = orders(client, 4)
    returned, failing, broken, good = holder.claim()
    connection.delete(peek.keys.job_prefix + broken.id)
    SPOILED[kind](connection, peek.keys.job_prefix + broken.id)

    rows: list[Row] = [back(returned), ended(failing, OutcomeKind.REFUSED), ended(broken), ended(good)]
    completed = holder.completed(rows)

    assert (completed.answers, completed.damaged) == ([1, 1, 1, 1], ())
    assert peek.waiting() == [tickets[0].id]
    assert peek("ZRANGE", peek.keys.failed, 0, -1) == [tickets[1].id]
    assert [outcome.id for outcome in peek.ledger()] == [failing.id, broken.id, good.id]
    assert peek("ZRANGE", peek.keys.unfinished, 0, -1) == [returned.id]


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_what_rq_keeps_of_a_result_is_not_worth_an_outcome(
    spoil: Callable[[redis.Redis, str], object],
    client: CancelClient,
    holder: Holder,
    connection: redis.Redis,
    peek: Peek,
) -> None:
    """Another key where RQ's result, the record or a counter stands costs nothing of the outcome."""
    (ticket,) = orders(client, 1)
    spoil(connection, peek.keys.result_prefix + ticket.id)
    spoil(connection, peek.keys.outcome_prefix + ticket.id)
    connection.hset("rq:worker:w", mapping={"successful_job_count": "many", "total_working_time": "x"})
    connection.hset(peek.keys.job_prefix + ticket.id, "number_of_retries", "x")
    assert holder.complete(later(holder.claim()[0], 0))[0] > 1
    time.sleep(0.002)

    assert holder.complete(ended(holder.claim()[0])) == [1]

    outcome = client.outcome(ticket.id)
    assert outcome is not None
    assert peek.ledger() == [outcome]
    assert peek("ZRANGE", peek.keys.finished, 0, -1) == [ticket.id]
    assert 0 < peek("TTL", peek.keys.job_prefix + ticket.id) <= 600


def test_a_ledger_that_takes_no_entry_any_more(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """A ledger whose last id is the largest there is goes aside under a name that tells, and outcomes go on."""
    orders(client, 2)
    peek("XADD", peek.keys.outcomes, f"{2**64 - 1}-{2**64 - 1}", "outcome", "{}")

    completed = holder.completed([ended(lease) for lease in holder.claim()])

    assert completed.answers == [1, 1]
    assert completed.damaged == (peek.keys.outcomes,)
    assert len(peek.ledger()) == len(list(client.outcomes())) == 2
    assert peek("XLEN", f"{peek.keys.outcomes}:set-aside") == 1


def test_a_user_without_the_ledger_ends_nothing_by_half(
    client: CancelClient, open_holder: OpenHolder, connection: redis.Redis, peek: Peek
) -> None:
    """Who may not write the ledger is told that the row failed; with the right again it is written once, and whole."""
    orders(client, 1)
    connection.acl_setuser("half", enabled=True, nopass=True, keys=["*"], channels=["*"], commands=["+@all", "-xadd"])
    holder = open_holder(connection={"username": "half", "password": "x"})
    (lease,) = holder.claim()

    assert holder.complete(ended(lease)) == [-1]
    assert (client.outcome(lease.id), peek.ledger(), peek.job(lease.id).get("c_done")) == (None, [], None)

    connection.acl_setuser("half", commands=["+xadd"])
    assert holder.complete(ended(lease), ended(lease)) == [1, 1]
    assert [outcome.id for outcome in peek.ledger()] == [lease.id]
    connection.acl_deluser("half")


# ---- a server that is full ------------------------------------------------------------------------------------------


def test_a_full_server_takes_outcomes(
    client: CancelClient, holder: Holder, peek: Peek, full: Callable[[], object]
) -> None:
    """What was done is recorded, and leases are prolonged, also while the server refuses new requests."""
    tickets = orders(client, 3)
    one, two, three = holder.claim()
    full()

    assert holder.beat(one).lost == frozenset()
    answers = holder.complete(ended(one), later(two), back(three))
    assert (answers[0], answers[1] > 1, answers[2]) == (1, True, 1)
    assert [outcome.id for outcome in peek.ledger()] == [tickets[0].id]


def test_a_full_server_gives_jobs_whole_or_not_at_all(
    client: CancelClient, holder: Holder, peek: Peek, full: Callable[[], object]
) -> None:
    """A claim at a full server loses no job, with the gate open or closed: it is given, or waits still."""
    tickets = [ticket.id for ticket in orders(client, 2)]
    overdue = client.cancel(algo_id=50, deadline_s=0.001).id
    holder.close_gate(300)
    full()
    time.sleep(0.01)

    given = ids(holder.claim())
    time.sleep(0.3)
    given += ids(holder.claim())

    age(peek, 60_000)
    assert sorted({*given, *peek.waiting()}) == sorted([*tickets, overdue])
    assert len(given) == len(set(given))
    assert peek("ZCARD", peek.keys.unfinished) == 3
