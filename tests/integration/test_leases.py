"""Leases: who has a job in hand, who may end a hold, and what a repeat or an old holder is told."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import redis

from producer import CancelClient, OutcomeKind
from producer.keys import Band
from producer.message import Call, decode_attempts
from tests.holders import DEAD, Holder, OpenHolder, back, ended, ids, later, orders, requeue, tried
from tests.servers import Peek, eventually
from worker.store import Row


def test_a_lost_lease_is_taken_and_its_attempt_noted(client: CancelClient, open_holder: OpenHolder, peek: Peek) -> None:
    """A job whose holder fell silent is given again, with the attempt that may have been sent at the end, numbered."""
    ticket = client.cancel(algo_id=1)
    first = open_holder("first", lease_ms=DEAD)
    (lease,) = first.claim()
    first.complete(later(lease, 0, tried(1), tried(2)))
    held_from = peek.now_ms()
    first.claim()
    time.sleep(0.01)

    (taken,) = open_holder("second").claim()

    assert taken.id == ticket.id
    *before, lost = decode_attempts(taken.attempts)
    assert before == [tried(1), tried(2)]
    assert (lost.n, lost.call, lost.verdict, lost.http, lost.code) == (3, Call.CANCEL, "unclear", None, None)
    assert held_from <= lost.at_ms <= peek.now_ms()


def test_a_lost_lease_leaves_no_trace_of_its_holder(client: CancelClient, open_holder: OpenHolder, peek: Peek) -> None:
    """After a take-over RQ's registry of started jobs shows the new hold alone."""
    ticket = client.cancel(algo_id=1)
    open_holder("first", lease_ms=DEAD).claim()
    time.sleep(0.01)

    (new,) = open_holder("second").claim()

    assert peek("ZRANGE", peek.keys.started, 0, -1) == [f"{ticket.id}:{new.token}"]
    assert (peek.job(ticket.id)["worker_name"], peek.job(ticket.id)["c_lease"]) == ("second", new.token)


@pytest.mark.parametrize("status", ["queued", "scheduled", "failed", "finished"])
def test_a_lost_job_comes_back_whatever_rq_wrote_beside(
    status: str, client: CancelClient, open_holder: OpenHolder, connection: redis.Redis, peek: Peek
) -> None:
    """RQ's clean-up or a stock worker may have filed a job that ours held and lost: it comes back, in doubt."""
    (ticket,) = orders(client, 1)
    open_holder("ours", lease_ms=DEAD).claim()
    connection.hset(peek.keys.job_prefix + ticket.id, "status", status)
    connection.expire(peek.keys.job_prefix + ticket.id, 600)
    time.sleep(0.01)

    (lease,) = open_holder("other").claim()

    assert lease.id == ticket.id
    assert [attempt.msg for attempt in decode_attempts(lease.attempts)] == ["worker lost"]
    assert peek("TTL", peek.keys.job_prefix + ticket.id) == -1


def test_a_live_lease_is_not_taken(client: CancelClient, open_holder: OpenHolder, peek: Peek) -> None:
    """Nobody takes a job whose holder prolongs its lease, also where it would have run out meanwhile."""
    client.cancel(algo_id=1)
    holder, other = open_holder("holder"), open_holder("other")
    (lease,) = holder.claim()

    for _ in range(3):
        assert other.claim() == []
        peek("ZADD", peek.keys.unfinished, peek.now_ms() - 1, lease.id)
        assert holder.beat(lease).lost == frozenset()


def test_no_lease_lasts_for_ever(client: CancelClient, open_holder: OpenHolder, peek: Peek) -> None:
    """An end that no lease can have (the server's clock was set back, or somebody wrote it) begins anew: a holder that
    lives renews it, and the job of one that does not is taken over."""
    (ticket,), holder = orders(client, 1), open_holder(lease_ms=300)
    holder.claim()
    peek("ZADD", peek.keys.unfinished, Band.WAITING - 1, ticket.id)
    assert holder.claim() == []

    holder.ask(holder.store.tidy(0, 0))

    eventually(lambda: ids(holder.claim()) == [ticket.id], 20, "it is taken over")


def test_leases_are_left_alone_on_request(client: CancelClient, open_holder: OpenHolder) -> None:
    """A worker that has just come back from an outage can claim without taking others' jobs."""
    client.cancel(algo_id=1)
    open_holder("first", lease_ms=DEAD).claim()
    time.sleep(0.01)
    other = open_holder("other")

    assert other.claim(take_lost=False) == []
    assert len(other.claim()) == 1


def test_a_lease_is_lost_when_taken_not_when_time_passes(
    client: CancelClient, open_holder: OpenHolder, peek: Peek
) -> None:
    """A holder that is late, but before anybody else, still records its outcome."""
    client.cancel(algo_id=1)
    holder = open_holder(lease_ms=DEAD)
    (lease,) = holder.claim()
    time.sleep(0.02)

    assert holder.beat(lease).lost == frozenset()
    time.sleep(0.02)
    assert holder.complete(ended(lease)) == [1]
    assert len(peek.ledger()) == 1


def test_a_beat_tells_what_is_lost_and_what_is_closed(
    client: CancelClient, open_holder: OpenHolder, peek: Peek
) -> None:
    """One beat brings the leases that others took, the gate's end, and whether RQ is suspended."""
    orders(client, 2)
    first, second = open_holder("first"), open_holder("second")
    (kept,) = first.claim(1)
    (lost,) = open_holder("first", lease_ms=DEAD).claim(1)
    time.sleep(0.01)
    second.claim(1)
    until_ms = second.close_gate(5000)
    peek("SET", peek.keys.suspended, "1")

    beat = first.beat(lost, kept)
    assert (beat.lost, beat.gate_until_ms, beat.suspended) == (frozenset({lost.token}), until_ms, True)
    assert beat.renewed_until_ns > kept.until_ns
    peek("DEL", peek.keys.suspended, peek.keys.gate("all"))
    beat = first.beat()
    assert (beat.lost, beat.gate_until_ms, beat.suspended) == (frozenset(), None, False)


def test_a_beat_costs_no_lease_for_a_neighbour(
    client: CancelClient, holder: Holder, connection: redis.Redis, peek: Peek
) -> None:
    """One held job whose key was replaced is told as lost; all others are prolonged."""
    orders(client, 3)
    leases = holder.claim()
    connection.set(peek.keys.job_prefix + leases[1].id, "x")
    for lease in leases:
        peek("ZADD", peek.keys.unfinished, 5, lease.id)

    assert holder.beat(*leases).lost == {leases[1].token}

    scores = [float(peek("ZSCORE", peek.keys.unfinished, lease.id)) for lease in leases]
    assert [score > 5 for score in scores] == [True, False, True]


def test_a_beat_prolongs_thousands(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """However many jobs are in one hand, because their completions were held up, one beat prolongs all of them."""
    orders(client, 5000)
    leases = [lease for _ in range(10) for lease in holder.claim(500)]
    peek("DEL", peek.keys.unfinished)

    assert holder.beat(*leases, *(replace(lease, token="x") for lease in leases)).lost == {"x"}

    assert peek("ZCARD", peek.keys.unfinished) == 5000


def test_a_beat_keeps_a_held_job_alive(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """RQ may give a held job an end; the next beat takes it back."""
    orders(client, 1)
    (lease,) = holder.claim()
    peek("EXPIRE", peek.keys.job_prefix + lease.id, 600)

    holder.beat(lease)

    assert peek("TTL", peek.keys.job_prefix + lease.id) == -1


# ---- who may end a hold ---------------------------------------------------------------------------------------------


def test_the_outcome_of_a_lost_lease_changes_nothing(client: CancelClient, open_holder: OpenHolder, peek: Peek) -> None:
    """Whatever a worker says whose job was taken, the new holder's outcome is the one that is recorded."""
    client.cancel(algo_id=1)
    first, second = open_holder("first", lease_ms=DEAD), open_holder("second")
    (old,) = first.claim()
    time.sleep(0.01)
    (new,) = second.claim()
    before = peek.job(new.id)

    late: list[Row] = [ended(old), later(old, 5, tried(1)), back(old)]
    assert first.complete(*late) == [0, 0, 0]
    assert peek.job(new.id) == before
    assert second.complete(ended(new, worker="second")) == [1]
    assert first.complete(*late) == [0, 0, 0]
    assert [outcome.worker for outcome in peek.ledger()] == ["second"]


@pytest.mark.parametrize("by", ["retry", "requeue"])
def test_the_outcome_of_an_old_run_changes_nothing(
    by: str, client: CancelClient, holder: Holder, connection: redis.Redis, peek: Peek
) -> None:
    """Once a new run has begun, neither lease nor number of the run before ends anything, nor is it a repeat."""
    ticket = client.cancel(algo_id=1)
    (old,) = holder.claim()
    row = ended(old, OutcomeKind.UNKNOWN)
    assert holder.complete(row) == [1]
    if by == "retry":
        client.retry([ticket.id])
        assert holder.complete(row, back(old)) == [0, 0]
    else:
        requeue(connection, ticket.id)
    (new,) = holder.claim()
    before = peek.job(ticket.id)

    late: list[Row] = [row, ended(old), later(old), back(old), ended(replace(new, run=1)), ended(replace(old, run=2))]
    assert holder.complete(*late) == [0] * len(late)
    assert peek.job(ticket.id) == before
    assert holder.complete(ended(new)) == [1]
    assert [(outcome.run, outcome.kind.value) for outcome in peek.ledger()] == [(1, "unknown"), (2, "cancelled")]


# ---- repeats --------------------------------------------------------------------------------------------------------


def test_a_repeated_completion_changes_nothing(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """A completion whose answer was lost can be repeated: it is answered as the first time, each outcome stands once,
    each retry is scheduled once."""
    orders(client, 3)
    one, two, three = holder.claim()
    group: list[Row] = [ended(one), later(two, 50_000, tried(1)), back(three)]
    answers = holder.complete(*group)

    def all_of_it() -> list[Any]:
        jobs = [peek.job(lease.id) for lease in (one, two, three)]
        scheduled = peek("ZRANGE", peek.keys.scheduled, 0, -1, "WITHSCORES")
        index = peek("ZRANGE", peek.keys.unfinished, 0, -1, "WITHSCORES")
        results = peek("XLEN", peek.keys.result_prefix + one.id)
        record = peek("GET", peek.keys.outcome_prefix + one.id)
        return [jobs, scheduled, index, record, results, peek.ledger(), peek.waiting()]

    before = all_of_it()
    assert (answers[0], answers[2], len(peek.ledger())) == (1, 1, 1)
    for _ in range(2):
        assert holder.complete(*group) == answers
        assert all_of_it() == before


def test_a_lease_that_was_ended_is_ended(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """Whatever else is said of an ended lease is answered as its end was, and changes nothing."""
    orders(client, 2)
    one, two = holder.claim()
    done, due_ms = holder.complete(ended(one), later(two, 50_000, tried(1)))
    before = [peek.job(lease.id) for lease in (one, two)]

    others: list[Row] = [ended(one, OutcomeKind.UNKNOWN), later(one), back(one), ended(two), later(two, 1), back(two)]
    assert holder.complete(*others) == [done] * 3 + [due_ms] * 3
    assert [peek.job(lease.id) for lease in (one, two)] == before
    assert [outcome.kind for outcome in peek.ledger()] == [OutcomeKind.CANCELLED]


def test_a_repeat_takes_a_retry_from_nobody(client: CancelClient, open_holder: OpenHolder, peek: Peek) -> None:
    """A retry that is repeated when its job is in another's hand already takes nothing away from that one."""
    orders(client, 1)
    holder, other = open_holder(), open_holder("other")
    (lease,) = holder.claim()
    row = later(lease, 0, tried(1))
    answers = holder.complete(row)
    (taken,) = other.claim()
    before = peek.job(lease.id)

    assert holder.complete(row) == answers
    assert peek.job(lease.id) == before
    assert peek("ZCARD", peek.keys.scheduled) == 0
    assert other.complete(ended(taken)) == [1]
    assert holder.complete(row) == [0]  # two holds ago


def test_a_job_that_is_handed_back_twice(client: CancelClient, open_holder: OpenHolder, peek: Peek) -> None:
    """Handed back again, as the first answer was lost, a job is on the queue once, and its lease was not lost."""
    (ticket,) = orders(client, 1)
    holder, other = open_holder(), open_holder("other")
    (lease,) = holder.claim()
    for _ in range(2):
        assert holder.complete(back(lease)) == [1]
        assert peek.waiting() == [ticket.id]
    (taken,) = other.claim()
    assert holder.complete(back(lease)) == [1]
    assert peek.waiting() == []
    assert other.complete(ended(taken)) == [1]


def test_an_undone_decision_is_told_alike_again(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """An overdue end that a later deadline undid is, repeated, undone still: the job waits once."""
    client.cancel(algo_id=1, deadline_s=1)
    (lease,) = holder.claim()
    client.cancel(algo_id=1, deadline_s=60)
    row = ended(lease, OutcomeKind.OVERDUE)

    assert holder.complete(row) == holder.complete(row) == [2]
    assert peek.waiting() == [lease.id]
    assert ids(holder.claim()) == [lease.id]


# ---- a stock worker holds by the same lease -------------------------------------------------------------------------


def test_a_stock_worker_and_ours_hold_by_one_lease(client: CancelClient, open_holder: OpenHolder, peek: Peek) -> None:
    """What a stock worker has in hand ours are not given, and the other way about; who lost it records nothing."""
    one, two = orders(client, 2)
    ours, stock = open_holder("ours"), open_holder("stock")
    (mine,) = ours.claim(1)
    (its,) = stock.claim_one(two.id).leases

    assert (stock.claim_one(one.id).leases, stock.claim_one(one.id).why_not) == ([], "held")
    assert ours.claim() == []
    for taker, old in ((ours, its), (stock, mine)):
        peek("ZADD", peek.keys.unfinished, 5, old.id)
        if taker is stock:
            (new,) = stock.claim_one(old.id).leases
        else:
            (new,) = [lease for lease in ours.claim() if lease.id == old.id]
        assert [attempt.msg for attempt in decode_attempts(new.attempts)] == ["worker lost"]
        assert (ours if taker is stock else stock).complete(ended(old)) == [0]
        assert taker.complete(ended(new, worker=taker.name)) == [1]
    assert [outcome.worker for outcome in peek.ledger()] == ["ours", "stock"]
    assert ours.is_drained()
