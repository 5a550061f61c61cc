"""The scripts by which workers share a queue, one rule at a time: Stores play the workers, the server is real."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

import pytest
import redis
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rq import Queue
from rq.job import Job
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer
from rq.utils import utcformat

from producer import CancelClient, CancelRequest, Ticket
from producer.message import (
    MAX_ALGO_ID,
    TASK,
    Attempt,
    Call,
    Outcome,
    OutcomeKind,
    decode_attempts,
    decode_call,
    encode_request,
)
from tests.servers import Peek, TurnCounter, Valkey, eventually
from worker.store import Begun, Grant, Settlement, Store, connect

OpenStore = Callable[..., Store]

#: A lease that runs out at once: its holder is as good as dead.
DEAD = 1
DEADLINE_MS = 300_000


@pytest.fixture
def open_store(valkey: Valkey) -> Iterator[OpenStore]:
    """Makes Stores, each the view of another worker."""
    connections: list[redis.Redis] = []

    def make(worker: str = "w", *, lease_ms: int = 60_000, port: int = valkey.port, **options: Any) -> Store:
        connections.append(connect(f"redis://127.0.0.1:{port}/0"))
        given = {"gate_scope": "all", "deadline_ms": DEADLINE_MS, "outcome_ttl_s": 3600, "ledger_maxlen": 20_000}
        return Store(connections[-1], "cancels", worker, lease_ms=lease_ms, **{**given, **options})

    yield make
    for connection in connections:
        connection.connection_pool.disconnect()


@pytest.fixture
def peek(connection: redis.Redis) -> Peek:
    """A look at the queue's keys."""
    return Peek(connection)


def claim(store: Store, slots: int = 10, *, take_lost: bool = True) -> list[Grant]:
    """What one claim gives that does not wait."""
    return store.claim(slots, wait=False, take_lost=take_lost).grants


def tried(n: int, verdict: str = "unclear") -> Attempt:
    """An attempt as a worker notes it."""
    return Attempt(n, 1_700_000_000_000 + n, Call.CANCEL, 503, -1000, "said “so”", verdict, 7)


def ended(grant: Grant, kind: OutcomeKind = OutcomeKind.CANCELLED, worker: str = "w", **known: Any) -> Settlement:
    """The settlement that records an outcome."""
    outcome = Outcome(grant.id, grant.run, kind, finished_at_ms=1, worker=worker, error="why", **known)
    return Settlement(grant, outcome=outcome)


def ids(grants: list[Grant]) -> list[str]:
    """Their ids, in order."""
    return [grant.id for grant in grants]


def orders(client: CancelClient, count: int, first: int = 1, **options: Any) -> list[Ticket]:
    """Enqueue cancels of so many orders."""
    return client.cancel_many([CancelRequest(algo_id=first + i, **options) for i in range(count)])


# ---- claim ----------------------------------------------------------------------------------------------------------


def test_grant_carries_the_request_and_its_default_deadline(client: CancelClient, open_store: OpenStore) -> None:
    """A claimed job comes with its payload, run 1, no attempts, and the worker's deadline where it names none."""
    ticket = client.cancel(algo_id=7, symbol="BTCUSDT", tag="t")

    (grant,) = claim(open_store(deadline_ms=1234))

    assert (grant.id, grant.run, grant.attempts, grant.pin) == (ticket.id, 1, b"", b"")
    assert decode_call(grant.data or b"") == ticket.request
    assert grant.deadline_at_ms == grant.enqueued_at_ms + 1234


def test_own_deadline_of_a_request_holds(client: CancelClient, open_store: OpenStore) -> None:
    """A request's own deadline wins over the worker's default, be it shorter or longer."""
    client.cancel(algo_id=1, deadline_s=2)
    client.cancel(algo_id=2, deadline_s=20)

    short, long = claim(open_store(deadline_ms=10_000))

    assert short.deadline_at_ms - short.enqueued_at_ms == 2000
    assert long.deadline_at_ms - long.enqueued_at_ms == 20_000


def test_job_is_given_once(client: CancelClient, open_store: OpenStore) -> None:
    """Two workers never hold the same job, and no job is left behind."""
    tickets = orders(client, 30)
    one, other = open_store("one"), open_store("other")

    given = [ids(claim(store, 4)) for _ in range(4) for store in (one, other)]

    assert sorted(itertools.chain(*given)) == sorted(ticket.id for ticket in tickets)


def test_claim_keeps_to_its_slots_and_to_the_order(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """Jobs are given first come, first served, urgent ones before, and never more than there are slots."""
    slow = [ticket.id for ticket in orders(client, 4)]
    urgent = client.cancel(algo_id=99, urgent=True).id

    given = ids(claim(open_store(), 3))

    assert given == [urgent, *slow[:2]]
    assert peek.waiting() == slow[2:]


def test_claim_waits_for_the_first_job(client: CancelClient, open_store: OpenStore) -> None:
    """A claim at an empty queue waits about a second for a job, and gives none if none comes."""
    store = open_store()
    began = time.monotonic()

    assert store.claim(5, wait=True).grants == []
    assert 0.8 < time.monotonic() - began < 2.5


def test_claim_takes_more_than_the_job_it_waited_for(client: CancelClient, open_store: OpenStore) -> None:
    """The job that ended the wait is the first one given, and others come along."""
    tickets = orders(client, 3)

    assert ids(open_store().claim(5, wait=True).grants) == [ticket.id for ticket in tickets]


def test_entry_of_a_held_job_is_only_a_hint(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """A second list entry of a job that somebody holds gives it to nobody."""
    ticket = client.cancel(algo_id=1)
    holder, other = open_store("holder"), open_store("other")
    claim(holder)
    client.cancel(algo_id=1, urgent=True)
    peek("LPUSH", peek.keys.waiting, ticket.id, ticket.id)

    assert claim(other) == claim(holder) == []
    assert peek.waiting() == []


def test_double_entry_gives_the_job_once(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """An urgent repeat of a waiting request adds an entry, not a second hold."""
    ticket = client.cancel(algo_id=1)
    again = client.cancel(algo_id=1, urgent=True)
    assert peek.waiting() == [ticket.id, ticket.id]

    assert again.duplicate
    assert ids(claim(open_store())) == [ticket.id]


@pytest.mark.parametrize("kind", [OutcomeKind.CANCELLED, OutcomeKind.UNKNOWN])
def test_entry_of_a_settled_job_is_dropped(
    kind: OutcomeKind, client: CancelClient, open_store: OpenStore, peek: Peek
) -> None:
    """A list entry of a job that has its outcome gives nothing, and leaves the outcome alone."""
    client.cancel(algo_id=1)
    store = open_store()
    (grant,) = claim(store)
    store.settle([ended(grant, kind)])
    before = peek.job(grant.id)
    peek("RPUSH", peek.keys.waiting, grant.id)

    assert claim(store) == []
    assert peek.job(grant.id) == before
    assert len(peek.ledger()) == 1


def test_entry_of_a_scheduled_job_waits_for_its_time(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """A retry that is due later is not given early because its id stands on the list."""
    client.cancel(algo_id=1)
    store = open_store()
    (grant,) = claim(store)
    store.settle([Settlement(grant, attempts=(tried(1),), delay_ms=60_000)])
    peek("RPUSH", peek.keys.waiting, grant.id)

    assert claim(store) == []
    assert peek.job(grant.id)["status"] == "scheduled"


def test_deleted_job_leaves_nothing(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """An id whose job was deleted is dropped, and its hash is not called back to life."""
    ticket = client.cancel(algo_id=1)
    peek("DEL", peek.keys.job_prefix + ticket.id)

    assert claim(open_store()) == []
    assert peek.job(ticket.id) == {}
    assert peek("ZCARD", peek.keys.leases) == 0


def test_job_deleted_while_it_is_held_has_no_outcome(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """Deleting a job that is being worked on makes its settlement void."""
    ticket = client.cancel(algo_id=1)
    store = open_store(lease_ms=DEAD)
    (grant,) = claim(store)
    client.job(ticket).delete()

    assert store.settle([ended(grant)]) == [0]
    assert claim(store) == []
    assert peek.ledger() == []
    assert peek.job(ticket.id) == {}
    assert peek("ZCARD", peek.keys.leases) == 0


def test_claiming_list_goes_back_to_the_front(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """Ids that a broken claim moved away are given first, in their order."""
    tickets = [ticket.id for ticket in orders(client, 4)]
    for _ in range(2):
        peek("LMOVE", peek.keys.waiting, peek.keys.claiming, "LEFT", "RIGHT")

    assert ids(claim(open_store())) == tickets
    assert peek("EXISTS", peek.keys.claiming) == 0


def test_job_of_a_stock_worker_is_left_to_it(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """A job that a stock RQ worker is running is not given; once its execution has run out, it is."""
    ticket = client.cancel(algo_id=1)
    keys = peek.keys
    peek("HSET", keys.job_prefix + ticket.id, "status", "started")
    peek("ZADD", keys.executions_prefix + ticket.id, peek.now_ms() // 1000 + 60, "e")

    assert claim(open_store()) == []

    peek("ZADD", keys.executions_prefix + ticket.id, peek.now_ms() // 1000 - 1, "e")
    peek("RPUSH", keys.waiting, ticket.id)
    assert ids(claim(open_store())) == [ticket.id]


def test_plain_rq_job_gets_its_times_at_the_first_claim(valkey: Valkey, open_store: OpenStore, peek: Peek) -> None:
    """A job that another program enqueued through RQ counts from the moment it is first seen."""
    with redis.Redis(port=valkey.port) as connection:
        queue = Queue("cancels", connection=connection, serializer=JSONSerializer)
        job = queue.enqueue(TASK, encode_request(CancelRequest(algo_id=5)))
    before = peek.now_ms()

    (grant,) = claim(open_store())

    assert grant.id == job.id
    assert before <= grant.enqueued_at_ms <= peek.now_ms()
    assert grant.deadline_at_ms == grant.enqueued_at_ms + DEADLINE_MS


def test_hash_without_a_status_is_given(open_store: OpenStore, peek: Peek) -> None:
    """A waiting hash that lacks even RQ's own fields is somebody's mistake: it is given, so that it gets an outcome."""
    peek("HSET", peek.keys.job_prefix + "odd", "x", "y")
    peek("RPUSH", peek.keys.waiting, "odd")
    store = open_store()

    (grant,) = claim(store)

    assert (grant.id, grant.data or b"") == ("odd", b"")
    assert store.settle([ended(grant, OutcomeKind.REFUSED)]) == [1]
    assert claim(store) == []


@pytest.mark.parametrize("odd_id", [b"\xff\xfe\x80", b"a:b", "ü mlaut".encode(), b"", b"{x}\r\n"])
def test_any_id_is_settled(odd_id: bytes, open_store: OpenStore, peek: Peek, connection: redis.Redis) -> None:
    """An id that RQ would not make is settled like any other, whatever bytes it holds."""
    connection.hset(peek.keys.job_prefix.encode() + odd_id, "status", "queued")
    connection.rpush(peek.keys.waiting, odd_id)
    store = open_store()

    (grant,) = claim(store)

    assert store.settle([ended(grant, OutcomeKind.REFUSED)]) == [1]
    assert connection.hget(peek.keys.job_prefix.encode() + odd_id, "status") == b"failed"
    assert len(peek.ledger()) == 1
    assert store.drained()


# ---- leases ---------------------------------------------------------------------------------------------------------


def test_lost_lease_is_taken_and_its_attempt_noted(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """A job whose holder fell silent is given again, with the attempt that may have been sent at the end, numbered."""
    ticket = client.cancel(algo_id=1)
    first = open_store("first", lease_ms=DEAD)
    (grant,) = claim(first)
    first.settle([Settlement(grant, attempts=(tried(1), tried(2)), delay_ms=0)])
    held_from = peek.now_ms()
    claim(first)
    time.sleep(0.01)

    (taken,) = claim(open_store("second"))

    assert taken.id == ticket.id
    *before, lost = decode_attempts(taken.attempts)
    assert before == [tried(1), tried(2)]
    assert (lost.n, lost.call, lost.verdict, lost.http, lost.code) == (3, Call.CANCEL, "unclear", None, None)
    assert held_from <= lost.at_ms <= peek.now_ms()


def test_lost_lease_leaves_no_trace_of_its_holder(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """After a take-over RQ's registries show the new execution alone."""
    ticket = client.cancel(algo_id=1)
    (old,) = claim(open_store("first", lease_ms=DEAD))
    time.sleep(0.01)

    (new,) = claim(open_store("second"))

    assert peek("ZRANGE", peek.keys.started, 0, -1) == [f"{ticket.id}:{new.lease}"]
    assert peek("ZRANGE", peek.keys.executions_prefix + ticket.id, 0, -1) == [new.lease]
    assert peek("EXISTS", f"{peek.keys.execution_prefix}{ticket.id}:{old.lease}") == 0
    assert peek("SMEMBERS", "rq:worker:first:executions") == []
    assert peek("SMEMBERS", "rq:worker:second:executions") == [f"{ticket.id}:{new.lease}"]


def test_live_lease_is_not_taken(client: CancelClient, open_store: OpenStore) -> None:
    """Nobody takes a job whose holder renews its lease in time."""
    client.cancel(algo_id=1)
    holder, other = open_store("holder", lease_ms=300), open_store("other")
    (grant,) = claim(holder)

    for _ in range(6):
        time.sleep(0.1)
        assert holder.renew([(grant.id, grant.lease)])[0] == set()
        assert claim(other) == []


def test_leases_are_left_alone_on_request(client: CancelClient, open_store: OpenStore) -> None:
    """A worker that has just come back from an outage can claim without taking others' jobs."""
    client.cancel(algo_id=1)
    claim(open_store("first", lease_ms=DEAD))
    time.sleep(0.01)
    other = open_store("other")

    assert claim(other, take_lost=False) == []
    assert len(claim(other)) == 1


def test_outcome_after_a_take_over_is_refused(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """The outcome of a worker whose job was taken changes nothing; the new holder's is the one that is recorded."""
    client.cancel(algo_id=1)
    first, second = open_store("first", lease_ms=DEAD), open_store("second")
    (old,) = claim(first)
    time.sleep(0.01)
    (new,) = claim(second)
    before = peek.job(new.id)

    late = [ended(old), Settlement(old, attempts=(tried(1),), delay_ms=5), Settlement(old)]
    assert first.settle(late) == [0, 0, 0]
    assert peek.job(new.id) == before
    assert second.settle([ended(new, worker="second")]) == [1]
    assert first.settle(late) == [0, 0, 0]
    assert [outcome.worker for outcome in peek.ledger()] == ["second"]


def test_lease_is_lost_when_taken_not_when_time_passes(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """A holder that is late, but before anybody else, still records its outcome."""
    client.cancel(algo_id=1)
    store = open_store(lease_ms=DEAD)
    (grant,) = claim(store)
    time.sleep(0.02)

    assert store.renew([(grant.id, grant.lease)])[0] == set()
    time.sleep(0.02)
    assert store.settle([ended(grant)]) == [1]
    assert len(peek.ledger()) == 1


def test_renewal_tells_what_is_lost_and_what_is_closed(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """One renewal brings the leases that others took, the gate's end, and whether RQ is suspended."""
    orders(client, 2)
    first, second = open_store("first"), open_store("second")
    (kept,) = claim(first, 1)
    (lost,) = claim(open_store("first", lease_ms=DEAD), 1)
    time.sleep(0.01)
    claim(second, 1)
    until_ms = second.close_gate(5000, "429", False)
    peek("SET", peek.keys.suspended, "1")

    assert first.renew([(lost.id, lost.lease), (kept.id, kept.lease)]) == ({lost.lease}, until_ms, True)
    peek("DEL", peek.keys.suspended, peek.keys.gate("all"))
    assert first.renew([]) == (set(), None, False)


def test_repeated_settlement_changes_nothing(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """A settlement whose answer was lost can be repeated: it is answered as the first time, each outcome stands once,
    each retry is scheduled once."""
    orders(client, 2)
    store = open_store()
    one, two = claim(store)
    group = [ended(one), Settlement(two, attempts=(tried(1),), delay_ms=50_000)]
    done, due_ms = store.settle(group)

    def all_of_it() -> list[Any]:
        scheduled = peek("ZRANGE", peek.keys.scheduled, 0, -1, "WITHSCORES")
        record = peek("GET", peek.keys.outcome_prefix + one.id)
        results = peek("XLEN", peek.keys.result_prefix + one.id)
        return [peek.job(one.id), peek.job(two.id), scheduled, record, results, peek.ledger()]

    before = all_of_it()
    for _ in range(2):
        again, again_due_ms = store.settle(group)
        assert (done, again) == (1, 1)
        assert abs(again_due_ms - due_ms) <= 1  # Redis keeps it as a fraction of a second
        assert all_of_it() == before
    assert len(peek.ledger()) == 1


def test_another_settlement_of_a_lost_lease_is_refused(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """Only the very same settlement is a repeat: another outcome, or a retry with other attempts, is told that the
    lease is lost."""
    orders(client, 2)
    store = open_store()
    one, two = claim(store)
    store.settle([ended(one), Settlement(two, attempts=(tried(1),), delay_ms=50_000)])

    others = [
        ended(one, OutcomeKind.UNKNOWN),
        ended(one, worker="another"),
        Settlement(one, attempts=(tried(1),), delay_ms=50_000),
        ended(two),
        Settlement(two, attempts=(tried(1), tried(2)), delay_ms=50_000),
    ]
    assert store.settle(others) == [0] * len(others)
    assert [outcome.kind for outcome in peek.ledger()] == [OutcomeKind.CANCELLED]


def test_a_repeat_takes_a_retry_from_nobody(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """A retry that is repeated when its job is in another's hand already takes nothing away from that one."""
    orders(client, 1)
    store, other = open_store(), open_store("other")
    (grant,) = claim(store)
    settlement = Settlement(grant, attempts=(tried(1),), delay_ms=0)
    store.settle([settlement])
    (taken,) = claim(other)
    before = peek.job(grant.id)

    now_ms = peek.now_ms()
    assert now_ms <= store.settle([settlement])[0] <= peek.now_ms()  # it was written: there is nothing to wait for
    assert peek.job(grant.id) == before
    assert peek("ZCARD", peek.keys.scheduled) == 0
    assert other.settle([ended(taken)]) == [1]


def test_a_job_that_is_handed_back_twice(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """Handed back again, as the first answer was lost, a job is on the queue once, and its lease was not lost."""
    (ticket,) = orders(client, 1)
    store = open_store()
    (grant,) = claim(store)
    for settlement in (Settlement(grant), Settlement(grant)):
        assert store.settle([settlement]) == [1]
        assert peek.waiting() == [ticket.id]
    (taken,) = claim(open_store("other"))
    assert store.settle([Settlement(grant)]) == [0]
    assert open_store("other").settle([ended(taken)]) == [1]


# ---- settle ---------------------------------------------------------------------------------------------------------


def test_outcome_is_in_the_record_and_in_the_ledger(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """A recorded outcome can be read by its id for its time, and stands in the ledger as the same object."""
    ticket = client.cancel(algo_id=1)
    store = open_store(outcome_ttl_s=77)
    (grant,) = claim(store)
    settlement = ended(grant, attempts=(tried(1, "confirmed"),), algo_id=1, tag="täg")

    store.settle([settlement])

    assert client.outcome(ticket.id) == settlement.outcome == peek.ledger()[0]
    assert 70 < peek("TTL", peek.keys.outcome_prefix + ticket.id) <= 77
    assert store.recorded(ticket.id) == (settlement.outcome.encode().encode() if settlement.outcome else None)
    assert "c_attempts" not in peek.job(ticket.id)


def test_retry_is_due_with_a_fraction_of_a_second(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """A retry stands in RQ's scheduled registry under its due time, keeps its attempts and pin, and comes when due."""
    ticket = client.cancel(client_algo_id="c1")
    store = open_store()
    (grant,) = claim(store)
    before = peek.now_ms()

    (due_ms,) = store.settle([Settlement(grant, attempts=(tried(1),), pin='{"algo_id":5}', delay_ms=250)])

    ((job_id, score),) = peek("ZRANGE", peek.keys.scheduled, 0, -1, "WITHSCORES")
    assert job_id == ticket.id
    assert before + 250 <= due_ms <= peek.now_ms() + 250
    assert abs(float(score) * 1000 - due_ms) < 2
    assert (peek.job(ticket.id)["status"], peek.job(ticket.id)["number_of_retries"]) == ("scheduled", "1")
    assert claim(store) == []
    eventually(lambda: peek.now_ms() > due_ms, what="the retry is due")
    (retry,) = claim(store)
    assert (decode_attempts(retry.attempts), json.loads(retry.pin)) == ((tried(1),), {"algo_id": 5})
    assert (retry.run, retry.enqueued_at_ms, retry.deadline_at_ms) == (1, grant.enqueued_at_ms, grant.deadline_at_ms)


def test_handed_back_job_is_first_and_untried(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """A job that was handed back stands at the front, with no attempt counted for the hold."""
    tickets = [ticket.id for ticket in orders(client, 3)]
    store = open_store()
    (grant,) = claim(store, 1)

    assert store.settle([Settlement(grant)]) == [1]

    assert peek.waiting() == tickets
    assert peek.job(grant.id)["status"] == "queued"
    (again,) = claim(open_store("other"), 1)
    assert (again.id, again.attempts, again.run) == (grant.id, b"", 1)


def test_jobs_handed_back_together_keep_their_order(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """A worker that hands several jobs back leaves the queue as it found it."""
    tickets = [ticket.id for ticket in orders(client, 5)]
    store = open_store()

    store.settle([Settlement(grant) for grant in claim(store, 3)])

    assert peek.waiting() == tickets


def test_handed_back_job_keeps_what_was_tried(client: CancelClient, open_store: OpenStore) -> None:
    """A job that is handed back in the middle of its attempts keeps them."""
    client.cancel(algo_id=1)
    store = open_store()
    (grant,) = claim(store)

    store.settle([Settlement(grant, attempts=(tried(1),), pin='{"algo_id":1}')])

    (again,) = claim(store)
    assert (decode_attempts(again.attempts), again.pin) == ((tried(1),), b'{"algo_id":1}')


def test_later_deadline_undoes_a_decision_by_the_earlier_one(
    client: CancelClient, open_store: OpenStore, peek: Peek
) -> None:
    """An overdue job whose order was asked for again meanwhile is not recorded: it goes on until the later deadline."""
    ticket = client.cancel(algo_id=1, deadline_s=1)
    store = open_store()
    (grant,) = claim(store)
    assert client.cancel(algo_id=1, deadline_s=60).id == ticket.id

    store.settle([ended(grant, OutcomeKind.OVERDUE)])

    assert peek.ledger() == []
    (again,) = claim(store)
    assert again.deadline_at_ms > grant.deadline_at_ms + 50_000
    store.settle([ended(again)])
    assert [outcome.kind for outcome in peek.ledger()] == [OutcomeKind.CANCELLED]


def test_undone_decision_keeps_the_attempts_behind_it(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """What was tried before a decision that a later deadline undoes is not forgotten: an unclear attempt stays."""
    client.cancel(algo_id=1, deadline_s=1)
    store = open_store()
    (grant,) = claim(store)
    client.cancel(algo_id=1, deadline_s=60)
    undone = replace(ended(grant, OutcomeKind.UNKNOWN, attempts=(tried(1),)), pin='{"algo_id":1}')

    store.settle([undone])

    assert peek.ledger() == []
    (again,) = claim(store)
    assert (decode_attempts(again.attempts), again.pin) == ((tried(1),), b'{"algo_id":1}')


def test_undone_decision_is_told_apart(client: CancelClient, open_store: OpenStore) -> None:
    """The worker learns that its decision was undone, so that it reports no outcome that nobody recorded."""
    client.cancel(algo_id=1, deadline_s=1)
    store = open_store()
    (grant,) = claim(store)
    client.cancel(algo_id=1, deadline_s=60)

    assert store.settle([ended(grant, OutcomeKind.GAVE_UP)]) == [2]


def test_deadline_does_not_undo_what_the_exchange_said(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """A later deadline matters only where a deadline decided: a confirmed cancel is recorded all the same."""
    client.cancel(algo_id=1, deadline_s=1)
    store = open_store()
    (grant,) = claim(store)
    client.cancel(algo_id=1, deadline_s=60)

    assert store.settle([ended(grant)]) == [1]
    assert [outcome.kind for outcome in peek.ledger()] == [OutcomeKind.CANCELLED]


def test_counters_of_the_worker(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """RQ's counters in the worker's hash grow with its outcomes, and with nothing else."""
    peek("HSET", "rq:worker:w", "birth", "x")
    orders(client, 5)
    store = open_store("w")
    a, b, c, d, e = claim(store)
    time.sleep(0.02)

    failed, again, back = ended(c, OutcomeKind.REFUSED), Settlement(d, attempts=(), delay_ms=9000), Settlement(e)
    store.settle([ended(a), ended(b), failed, again, back])

    worker = plain_hash(peek, "rq:worker:w")
    assert (worker["successful_job_count"], worker["failed_job_count"]) == ("2", "1")
    assert 0.06 <= float(worker["total_working_time"]) < 5


def test_expired_worker_is_not_called_back(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """A worker's hash that has expired is not made anew with counters alone: RQ could not read it."""
    client.cancel(algo_id=1)
    store = open_store("gone")
    (grant,) = claim(store)

    store.settle([ended(grant)])

    assert peek("EXISTS", "rq:worker:gone") == 0


def test_registries_are_trimmed_in_steps(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """Each settlement removes a few expired entries of RQ's registries, more than it adds, and never many."""
    past = peek.now_ms() // 1000 - 10
    for registry in (peek.keys.finished, peek.keys.failed):
        peek("ZADD", registry, *itertools.chain(*((past, f"old{i}") for i in range(200))))
    orders(client, 20)
    store = open_store()
    sizes = []
    for grant in claim(store, 20):
        store.settle([ended(grant)])
        sizes.append(peek("ZCARD", peek.keys.finished))

    steps = [before - after for before, after in itertools.pairwise([200, *sizes])]
    assert all(1 <= step <= 10 for step in steps), steps
    assert peek("ZCARD", peek.keys.failed) < 200


def test_pointer_ends_with_the_outcome(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """The pointer of an order's open job goes with its outcome, so that the next request starts a fresh job."""
    ticket = client.cancel(algo_id=1)
    pointer = peek.keys.order_prefix + ticket.request.order_key
    assert peek("GET", pointer) == ticket.id
    store = open_store()
    (grant,) = claim(store)

    store.settle([ended(grant)])

    assert peek("GET", pointer) is None
    fresh = client.cancel(algo_id=1)
    assert (fresh.id != ticket.id, fresh.duplicate) == (True, False)


def test_pointer_of_another_job_is_left_alone(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """An outcome takes away only the pointer that points to its own job."""
    ticket = client.cancel(algo_id=1)
    pointer = peek.keys.order_prefix + ticket.request.order_key
    store = open_store()
    (grant,) = claim(store)
    peek("SET", pointer, "somebody-else")

    store.settle([ended(grant)])

    assert peek("GET", pointer) == "somebody-else"


# ---- due, lost: bounded ---------------------------------------------------------------------------------------------


def test_due_retries_come_back_a_hundred_at_a_time(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """However many retries are due at once, one call brings back a hundred of them at the most, oldest first."""
    orders(client, 250)
    store = open_store()
    grants = claim(store, 250)
    for group in (grants[:1], grants[1:]):
        store.settle([Settlement(grant, attempts=(tried(1),), delay_ms=0) for grant in group])
        time.sleep(0.005)

    assert ids(claim(store, 1)) == [grants[0].id]
    assert peek("ZCARD", peek.keys.scheduled) == 150
    rest = [grant for _ in range(3) for grant in claim(store, 250)]
    assert sorted(ids(rest)) == sorted(ids(grants[1:]))


def test_lost_leases_come_back_a_hundred_at_a_time(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """However many leases a dead worker left, one call takes a hundred of them at the most."""
    orders(client, 250)
    grants = claim(open_store("dead", lease_ms=DEAD), 250)
    time.sleep(0.01)
    store = open_store("next")

    taken = claim(store, 250)

    assert len(taken) == 100
    taken += [grant for _ in range(2) for grant in claim(store, 250)]
    assert sorted(ids(taken)) == sorted(ids(grants))


# ---- gate and suspension --------------------------------------------------------------------------------------------


def test_closed_gate_gives_nothing(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """While the gate is closed jobs stay where they are, and every claim tells until when."""
    tickets = [ticket.id for ticket in orders(client, 3)]
    one, other = open_store("one"), open_store("other")
    until_ms = one.close_gate(60_000, "429 too many", False)

    claimed = other.claim(5, wait=False)

    assert (claimed.grants, claimed.gate_until_ms) == ([], until_ms)
    assert other.claim(5, wait=True).grants == []
    assert peek.waiting() == tickets


def test_gate_opens_by_itself(client: CancelClient, open_store: OpenStore) -> None:
    """When the gate's time is over, claims give again and say that it is open."""
    client.cancel(algo_id=1)
    store = open_store()
    store.close_gate(50, "x", False)
    assert claim(store) == []
    time.sleep(0.06)

    claimed = store.claim(5, wait=False)

    assert (len(claimed.grants), claimed.gate_until_ms) == (1, 0)


def test_later_end_of_the_gate_holds(open_store: OpenStore, peek: Peek) -> None:
    """A shorter pause never opens a gate that somebody closed for longer; why and by whom stays readable."""
    one, other = open_store("one"), open_store("other")
    until_ms = one.close_gate(60_000, "418 banned", False)

    assert other.close_gate(1000, "429", False) == until_ms
    assert plain_hash(peek, peek.keys.gate("all")).items() >= {"reason": "418 banned", "by": "one"}.items()
    assert one.close_gate(90_000, "418 again", False) >= until_ms + 29_000
    assert 3_600_000 < peek("PTTL", peek.keys.gate("all")) <= 3_690_000


def test_doubling_pause(open_store: OpenStore, peek: Peek) -> None:
    """A firewall's block that comes again after its pause lasts twice as long; those during the pause are one."""
    store = open_store()
    store.close_gate(60, "403", True)
    until_ms = store.close_gate(60, "403", True)
    assert until_ms <= peek.now_ms() + 60
    eventually(lambda: peek.now_ms() > until_ms, what="the pause is over")

    now_ms = peek.now_ms()
    assert store.close_gate(60, "403", True) >= now_ms + 120


@pytest.mark.parametrize("pause", ["gate", "suspension"])
def test_overdue_job_is_given_even_during_a_pause(
    pause: str, client: CancelClient, open_store: OpenStore, peek: Peek
) -> None:
    """A request whose deadline has passed needs nothing sent: it is given so that its outcome comes on time."""
    (early,) = orders(client, 1)
    overdue = client.cancel(algo_id=50, deadline_s=0.001)
    (late,) = orders(client, 1, first=60)
    store = open_store()
    if pause == "gate":
        store.close_gate(60_000, "x", False)
    else:
        peek("SET", peek.keys.suspended, "1")
    time.sleep(0.005)

    assert ids(claim(store)) == [overdue.id]
    assert peek.waiting() == [early.id, late.id]


def test_overdue_jobs_behind_a_long_queue_are_given_during_a_pause(
    client: CancelClient, open_store: OpenStore, peek: Peek
) -> None:
    """Each look of a pause goes through another stretch of the queue, so that an overdue job deep in it is found."""
    orders(client, 1200)
    overdue = client.cancel_many(CancelRequest(algo_id=5000 + i, deadline_s=0.001) for i in range(3))
    waiting = set(peek.waiting())
    store = open_store()
    store.close_gate(60_000, "x", False)

    given: list[str] = []

    def look() -> bool:
        given.extend(ids(claim(store)))
        return len(given) >= 3

    eventually(look, 20, "the overdue jobs are given")

    assert sorted(given) == sorted(ticket.id for ticket in overdue)
    assert set(peek.waiting()) == waiting - set(given)
    assert len(peek.waiting()) == 1200


def test_suspension_gives_nothing(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """While RQ is suspended jobs stay on the queue in their order; afterwards they are given."""
    tickets = [ticket.id for ticket in orders(client, 3)]
    store = open_store()
    peek("SET", peek.keys.suspended, "1")

    claimed = store.claim(2, wait=True)
    assert (claimed.grants, claimed.suspended) == ([], True)
    assert peek.waiting() == tickets

    peek("DEL", peek.keys.suspended)
    claimed = store.claim(9, wait=True)
    assert (ids(claimed.grants), claimed.suspended) == (tickets, False)


# ---- runs -----------------------------------------------------------------------------------------------------------


def requeue(connection: redis.Redis, job_id: str) -> None:
    """Put a failed job back as RQ's users do."""
    FailedJobRegistry("cancels", connection=connection, serializer=JSONSerializer).requeue(job_id)


def test_requeued_job_starts_a_new_run(
    client: CancelClient, open_store: OpenStore, peek: Peek, connection: redis.Redis
) -> None:
    """RQ's requeue of a failed job is a new run: fresh deadline and history, and an outcome of its own."""
    ticket = client.cancel(algo_id=1, deadline_s=5)
    store = open_store()
    (first,) = claim(store)
    store.settle([ended(first, OutcomeKind.GAVE_UP, attempts=(tried(1),))])
    time.sleep(0.01)
    requeue(connection, ticket.id)

    (second,) = claim(store)

    assert (second.id, second.run, second.attempts) == (ticket.id, 2, b"")
    assert second.enqueued_at_ms > first.enqueued_at_ms
    assert second.deadline_at_ms == second.enqueued_at_ms + DEADLINE_MS
    assert client.outcome(ticket.id) is None
    assert peek("TTL", peek.keys.job_prefix + ticket.id) == -1
    assert client.cancel(algo_id=1).id == ticket.id  # the pointer is back
    assert store.settle([ended(second)]) == [1]
    assert [(outcome.run, outcome.kind.value) for outcome in peek.ledger()] == [(1, "gave_up"), (2, "cancelled")]


def test_new_run_leaves_the_pointer_of_a_newer_job(
    client: CancelClient, open_store: OpenStore, peek: Peek, connection: redis.Redis
) -> None:
    """A requeued job does not take the place of the job that its order got meanwhile."""
    ticket = client.cancel(algo_id=1)
    store = open_store()
    (grant,) = claim(store)
    store.settle([ended(grant, OutcomeKind.GAVE_UP)])
    newer = client.cancel(algo_id=1)
    requeue(connection, ticket.id)

    assert sorted(ids(claim(store))) == sorted([ticket.id, newer.id])
    assert peek("GET", peek.keys.order_prefix + ticket.request.order_key) == newer.id


# ---- servers that refuse, keys that are damaged ---------------------------------------------------------------------


@pytest.fixture
def full(connection: redis.Redis) -> Iterator[Callable[[], object]]:
    """Makes the server refuse whatever grows; it has room again after the test."""
    yield lambda: connection.config_set("maxmemory", 1)
    connection.config_set("maxmemory", 0)


def test_a_full_server_keeps_an_overdue_job_of_a_pause(
    client: CancelClient, open_store: OpenStore, peek: Peek, connection: redis.Redis, full: Callable[[], object]
) -> None:
    """While the gate is closed and the server is full, an overdue job stays on the queue or is given, never neither."""
    overdue = client.cancel(algo_id=1, deadline_s=0.001)
    store = open_store()
    store.close_gate(60_000, "x", False)
    claim(store, 1)  # the script is known, and the job handed back
    full()
    time.sleep(0.01)

    given = ids(claim(store))

    assert given == [overdue.id] or peek.waiting() == [overdue.id] or peek("ZSCORE", peek.keys.leases, overdue.id)


def test_a_full_server_takes_outcomes(
    client: CancelClient, open_store: OpenStore, peek: Peek, full: Callable[[], object]
) -> None:
    """What was done is recorded, and leases are prolonged, also while the server refuses new requests."""
    (ticket,) = orders(client, 1)
    store = open_store()
    (grant,) = claim(store)
    full()

    assert store.renew([(grant.id, grant.lease)])[0] == set()
    assert store.settle([ended(grant)]) == [1]
    assert [outcome.id for outcome in peek.ledger()] == [ticket.id]


def test_one_damaged_row_costs_no_other(
    client: CancelClient, open_store: OpenStore, peek: Peek, connection: redis.Redis
) -> None:
    """In a group with a job whose key was replaced, outcomes are filed, and what is handed back stands on the queue."""
    tickets = orders(client, 4)
    store = open_store()
    back, failing, broken, good = claim(store)
    connection.set(peek.keys.job_prefix + broken.id, "x")

    rows = [Settlement(back), ended(failing, OutcomeKind.REFUSED), ended(broken), ended(good)]
    assert store.settle(rows) == [1, 1, -1, 1]

    assert peek.waiting() == [tickets[0].id]
    assert peek("ZRANGE", peek.keys.failed, 0, -1) == [tickets[1].id]
    assert [outcome.id for outcome in peek.ledger()] == [failing.id, good.id]
    assert peek("ZRANGE", peek.keys.leases, 0, -1) == [broken.id]


@pytest.mark.parametrize("status", ["queued", "scheduled"])
def test_a_lost_job_comes_back_whatever_a_stock_worker_wrote_beside(
    status: str, client: CancelClient, open_store: OpenStore, connection: redis.Redis, peek: Peek
) -> None:
    """A stock worker may have put off a job that ours held and lost: it comes back, with the attempt in doubt."""
    (ticket,) = orders(client, 1)
    claim(open_store("ours", lease_ms=DEAD))
    connection.hset(peek.keys.job_prefix + ticket.id, "status", status)
    time.sleep(0.01)

    (grant,) = claim(open_store("other"))

    assert grant.id == ticket.id
    assert [attempt.msg for attempt in decode_attempts(grant.attempts)] == ["worker lost"]


def test_a_retry_means_the_order_of_the_first_asking(
    client: CancelClient, open_store: OpenStore, connection: redis.Redis
) -> None:
    """A new run counts its time anew, and still knows when the request was first made: a client id can be reused."""
    ticket = client.cancel(client_algo_id="stop-1")
    store = open_store()
    first_ms = 0
    for run in (1, 2, 3):
        (grant,) = claim(store)
        first_ms = first_ms or grant.enqueued_at_ms
        assert (grant.run, grant.meant_at_ms) == (run, first_ms)
        assert (grant.enqueued_at_ms > first_ms) == (run > 1)
        assert store.settle([ended(grant, OutcomeKind.OVERDUE)]) == [1]
        time.sleep(0.005)
        if run == 1:
            assert client.retry([ticket.id]) == [ticket.id]
        else:
            requeue(connection, ticket.id)


# ---- a stock worker's step ------------------------------------------------------------------------------------------


def test_step_of_a_stock_worker_is_noted_before_it_is_sent(client: CancelClient, open_store: OpenStore) -> None:
    """A step that was begun and never ended counts as an attempt that may have been sent."""
    ticket = client.cancel(algo_id=1)
    store = open_store("stock")
    first, found = store.begin(ticket.id)
    assert (first.grants[0].attempts, first.gate_until_ms, found) == (b"", 0, Begun.FREE)

    second, found = store.begin(ticket.id)

    (lost,) = decode_attempts(second.grants[0].attempts)
    assert (lost.n, lost.verdict, found) == (1, "unclear", Begun.FREE)


def test_step_of_a_stock_worker_keeps_its_attempts(client: CancelClient, open_store: OpenStore) -> None:
    """What one step tried is what the next one starts from."""
    ticket = client.cancel(algo_id=1)
    store = open_store("stock")
    begun, _ = store.begin(ticket.id)

    assert store.settle([Settlement(begun.grants[0], attempts=(tried(1),), pin='{"algo_id":1}', delay_ms=5)]) == [1]

    grant = store.begin(ticket.id)[0].grants[0]
    assert (decode_attempts(grant.attempts), grant.pin) == ((tried(1),), b'{"algo_id":1}')


def test_first_outcome_of_a_stock_workers_run_stands(
    client: CancelClient, open_store: OpenStore, peek: Peek, connection: redis.Redis
) -> None:
    """Of two stock workers that run the same job the first one's outcome is recorded; a requeue starts a new run."""
    ticket = client.cancel(algo_id=1)
    one, other = open_store("one"), open_store("other")
    first, second = one.begin(ticket.id)[0].grants[0], other.begin(ticket.id)[0].grants[0]

    assert one.settle([ended(first, OutcomeKind.UNKNOWN, worker="one")]) == [1]
    assert other.settle([ended(second, worker="other")]) == [0]
    assert [outcome.worker for outcome in peek.ledger()] == ["one"]
    assert one.begin(ticket.id)[1] is Begun.SETTLED

    job = Job.fetch(ticket.id, connection=connection, serializer=JSONSerializer)
    FailedJobRegistry("cancels", connection=connection, serializer=JSONSerializer).add(job, ttl=600)
    requeue(connection, ticket.id)
    begun, found = one.begin(ticket.id)
    assert (begun.grants[0].run, found) == (2, Begun.FREE)


def test_later_deadline_undoes_a_stock_workers_decision_too(
    client: CancelClient, open_store: OpenStore, peek: Peek
) -> None:
    """A stock worker's overdue step is not recorded when the order was asked for again meanwhile."""
    ticket = client.cancel(algo_id=1, deadline_s=1)
    store = open_store("stock")
    grant = store.begin(ticket.id)[0].grants[0]
    client.cancel(algo_id=1, deadline_s=60)

    assert store.settle([ended(grant, OutcomeKind.UNKNOWN, attempts=(tried(1),))]) == [2]

    assert peek.ledger() == []
    again, found = store.begin(ticket.id)
    assert (decode_attempts(again.grants[0].attempts), found) == ((tried(1),), Begun.FREE)


def test_open_step_of_a_stock_worker_is_a_doubt_for_ours(client: CancelClient, open_store: OpenStore) -> None:
    """A step that a stock worker began and never ended is on record when one of ours gets the job."""
    ticket = client.cancel(algo_id=1)
    began = open_store("stock").begin(ticket.id)[0]

    (grant,) = claim(open_store("ours"))

    (lost,) = decode_attempts(grant.attempts)
    assert (lost.n, lost.verdict, lost.at_ms) == (1, "unclear", began.now_ms)


def test_outcome_of_a_stock_worker_beside_ours_stands(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """When a stock worker began a job before one of ours was given it, the first outcome of the two is the only one."""
    ticket = client.cancel(algo_id=1)
    ours, stock = open_store("ours"), open_store("stock")
    begun = stock.begin(ticket.id)[0].grants[0]
    (held,) = claim(ours)

    assert stock.settle([ended(begun, worker="stock")]) == [1]
    assert ours.settle([ended(held, OutcomeKind.ALREADY_CANCELLED, worker="ours")]) == [0]
    assert [outcome.worker for outcome in peek.ledger()] == ["stock"]
    assert ours.drained()


def test_step_of_a_job_in_our_hand_is_not_taken(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """A stock worker that meets a second entry of a job learns that ours has it, which notes no attempt; later, not."""
    ticket = client.cancel(algo_id=1)
    ours, stock = open_store("ours"), open_store("stock")
    (held,) = claim(ours)

    assert stock.begin(ticket.id)[1] is Begun.HELD
    assert ours.settle([Settlement(held, attempts=(tried(1),), delay_ms=60_000)])[0] > 1
    begun, found = stock.begin(ticket.id)
    assert (decode_attempts(begun.grants[0].attempts), found) == ((tried(1),), Begun.FREE)


#: Fields of ours that hold a whole number.
NUMBERS = ("c_enqueued_at_ms", "c_asked_at_ms", "c_deadline_at_ms", "c_run", "c_open_at_ms", "c_meant_at_ms")


@pytest.mark.parametrize("value", [b"abc", b"", b"1.5", b"nan", b"inf", b"\xff", b"9" * 400])
def test_step_of_a_damaged_job_in_our_hand_is_not_taken(
    value: bytes, client: CancelClient, open_store: OpenStore, connection: redis.Redis, peek: Peek
) -> None:
    """What ours has in hand is left to it whatever the job's fields hold, and left to it to find the damage."""
    ticket = client.cancel(algo_id=1)
    ours, stock = open_store("ours"), open_store("stock")
    (held,) = claim(ours)
    job = peek.keys.job_prefix + ticket.id
    sound: dict[Any, Any] = connection.hgetall(job)

    for damaged in [*((name,) for name in NUMBERS), (*NUMBERS, "c_attempts", "c_pin", "c_order")]:
        fields = sound | {name.encode(): value for name in damaged}
        connection.delete(job)
        connection.hset(job, mapping=fields)
        assert stock.begin(ticket.id)[1] is Begun.HELD, damaged
        assert connection.hgetall(job) == fields

    assert ours.settle([Settlement(held)]) == [1]
    begun, found = stock.begin(ticket.id)
    assert (begun.grants[0].damaged in NUMBERS, found) == (True, Begun.FREE)


@pytest.mark.parametrize(("ended_at", "found"), [("2025-11-22T10:30:42.000000Z", Begun.SETTLED), ("", Begun.HELD)])
def test_outcome_beside_a_damaged_hold(
    ended_at: str, found: Begun, client: CancelClient, open_store: OpenStore, connection: redis.Redis, peek: Peek
) -> None:
    """A run that was recorded beside ours is over, and one that RQ put back begins anew, with damaged fields too."""
    ticket = client.cancel(algo_id=1)
    claim(open_store("ours"))
    damage: dict[Any, Any] = {**dict.fromkeys(NUMBERS, "abc"), "c_done": "1", "ended_at": ended_at}
    connection.hset(peek.keys.job_prefix + ticket.id, mapping=damage)

    assert open_store("stock").begin(ticket.id)[1] is found
    assert peek.job(ticket.id)["c_run"] == ("abc" if found is Begun.SETTLED else "2")


def test_step_under_a_closed_gate_is_no_attempt(client: CancelClient, open_store: OpenStore) -> None:
    """A stock worker that finds the gate closed is told so, and nothing is counted."""
    ticket = client.cancel(algo_id=1)
    store = open_store("stock")
    until_ms = store.close_gate(60_000, "x", False)

    for _ in range(2):
        begun, _ = store.begin(ticket.id)
        assert (begun.gate_until_ms, begun.grants[0].attempts) == (until_ms, b"")


# ---- numbers and times ----------------------------------------------------------------------------------------------


def test_large_ids_stay_whole(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """An id beyond 2^53 comes out of queue, record and ledger as it went in."""
    wanted = [MAX_ALGO_ID, 2**53 + 1, 9_007_199_254_740_993]
    tickets = client.cancel_many([CancelRequest(algo_id=wanted[0]), CancelRequest(algo_id=wanted[1])])
    store = open_store()

    for grant in claim(store):
        request = decode_call(grant.data or b"")
        store.settle([ended(grant, algo_id=request.algo_id, actual_order_id=str(2**63))])

    assert [outcome.algo_id for outcome in peek.ledger()] == wanted[:2]
    assert [outcome.algo_id for outcome in map(client.outcome, (t.id for t in tickets)) if outcome] == wanted[:2]


def test_times_are_whole_milliseconds(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """Times in our fields are plain whole numbers, never in scientific notation."""
    client.cancel(algo_id=1, deadline_s=604_800)
    store = open_store()
    claim(store)
    fields = peek.job(peek("ZRANGE", peek.keys.leases, 0, -1)[0])

    for name in ("c_enqueued_at_ms", "c_deadline_at_ms", "c_open_at_ms"):
        assert fields[name].isdigit(), (name, fields[name])
        assert len(fields[name]) == 13


COMMON = files("worker").joinpath("scripts/common.lua").read_text("utf-8")


@pytest.fixture(scope="module")
def rq_time(_valkey_process: Valkey) -> Iterator[Callable[[int, int], str]]:
    """The scripts' spelling of a moment: seconds since the epoch and microseconds."""
    with redis.Redis(port=_valkey_process.port, decode_responses=True) as connection:
        spell = connection.register_script(COMMON + "return rq_time(tonumber(ARGV[1]), tonumber(ARGV[2]))")
        yield lambda seconds, micros: str(spell(args=[seconds, micros]))


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 4_102_444_799), st.integers(0, 999_999))
@example(0, 0)
@example(951_782_400, 0)  # 2000-02-29
@example(951_868_799, 999_999)
@example(1_709_164_800, 1)  # 2024-02-29
@example(4_107_542_399, 0)  # the last second before 2100-03-01, a year without a leap day
@example(1_735_689_599, 999_999)  # the last moment of 2024
def test_rq_time_is_spelt_as_rq_spells_it(rq_time: Callable[[int, int], str], seconds: int, micros: int) -> None:
    """The scripts write any moment as rq.utils.utcformat writes it."""
    moment = datetime.fromtimestamp(seconds, UTC).replace(microsecond=micros)

    assert rq_time(seconds, micros) == utcformat(moment)


def test_stamps_are_of_now(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """What RQ shows as start and end of a job is the moment at which it happened."""
    ticket = client.cancel(algo_id=1)
    store = open_store()
    before = utcformat(datetime.now(UTC))
    (grant,) = claim(store)
    store.settle([ended(grant)])
    after = utcformat(datetime.now(UTC))

    fields = peek.job(ticket.id)
    assert before[:19] <= fields["started_at"][:19] <= fields["ended_at"][:19] <= after[:19]
    assert fields["started_at"] <= fields["ended_at"]


# ---- cost -----------------------------------------------------------------------------------------------------------


def test_scripts_survive_a_flush(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """A server that has forgotten the scripts gets them again, and no call is lost or doubled."""
    tickets = [ticket.id for ticket in orders(client, 3)]
    store = open_store()

    def forgotten() -> Store:
        peek("SCRIPT", "FLUSH")
        return store

    waited = forgotten().claim(1, wait=True).grants
    given = waited + forgotten().claim(1, wait=False).grants
    assert ids(given) == tickets[:2]
    assert forgotten().renew([(grant.id, grant.lease) for grant in given])[0] == set()
    assert forgotten().settle([ended(grant) for grant in given]) == [1, 1]
    assert forgotten().close_gate(5, "x", False) > 0
    assert forgotten().begin(tickets[2])[0].grants[0].id == tickets[2]
    assert len(peek.ledger()) == 2


def test_round_trips(valkey: Valkey, client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """Waiting and claiming are one round trip, and so is settling fifty outcomes, renewing, and closing the gate."""
    orders(client, 60)
    with TurnCounter(valkey.port) as counter:
        store = open_store(port=counter.port)
        store.claim(1, wait=True)  # connects, loads the script
        store.settle([])
        store.renew([])
        store.close_gate(0, "x", False)
        before = counter.turns

        grants = store.claim(50, wait=True).grants
        assert (len(grants), counter.turns - before) == (50, 1)
        store.renew([(grant.id, grant.lease) for grant in grants])
        assert counter.turns - before == 2
        store.settle([ended(grant) for grant in grants])
        assert counter.turns - before == 3
        store.close_gate(0, "x", False)
        assert counter.turns - before == 4


def test_commands_of_a_claim_and_a_settlement(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """A claim sends one blocking move and one script, a settlement of fifty one script: nothing for each job."""
    orders(client, 51)
    store = open_store()
    claim(store, 1)
    store.settle([])
    peek("CONFIG", "RESETSTAT")

    grants = store.claim(50, wait=True).grants
    store.settle([ended(grant) for grant in grants])

    stats = peek("INFO", "commandstats")
    calls = {name.removeprefix("cmdstat_"): stat["calls"] for name, stat in stats.items()}
    assert (calls["blmove"], calls["evalsha"], len(grants)) == (1, 2, 50)
    # What the scripts run inside the server for one job, from the claim to the outcome.
    inside = sum(
        count for name, count in calls.items() if name not in ("blmove", "evalsha", "config|resetstat", "info")
    )
    assert inside / 50 < 20


def test_drained_queue_leaves_a_constant_number_of_keys(
    client: CancelClient, open_store: OpenStore, peek: Peek
) -> None:
    """After 500 jobs nothing stays for ever that was not there after the first: what they leave carries a lifetime."""
    peek("HSET", "rq:worker:w", "birth", "x")
    peek("EXPIRE", "rq:worker:w", 60)
    store = open_store("w")

    def drain(count: int, first: int) -> set[str]:
        orders(client, count, first)
        while grants := claim(store, 64):
            failing = [grant for i, grant in enumerate(grants) if i % 3 == 0]
            kinds = [OutcomeKind.REFUSED if grant in failing else OutcomeKind.CANCELLED for grant in grants]
            store.settle([ended(grant, kind) for grant, kind in zip(grants, kinds, strict=True)])
        return {key for key in peek("KEYS", "*") if peek("TTL", key) == -1}

    once = drain(1, 1)
    once |= drain(1, 2)  # one of each kind

    assert drain(500, 1000) <= once | {peek.keys.failed, peek.keys.finished}
    assert once <= {"rq:queues", peek.keys.failed, peek.keys.finished, peek.keys.outcomes}
    assert store.drained()


def test_drained_sees_every_place(client: CancelClient, open_store: OpenStore, peek: Peek) -> None:
    """A queue is drained only when no job waits, is on its way, is due later or is in anybody's hand."""
    store = open_store()
    assert store.drained()
    client.cancel(algo_id=1)
    assert not store.drained()
    (grant,) = claim(store)
    assert not store.drained()
    store.settle([Settlement(grant, attempts=(), delay_ms=1)])
    assert not store.drained()
    time.sleep(0.005)
    (grant,) = claim(store)
    store.settle([ended(grant)])
    assert store.drained()
    peek("RPUSH", peek.keys.claiming, "x")
    assert not store.drained()


def plain_hash(peek: Peek, key: str) -> dict[str, str]:
    """Any hash."""
    return dict(peek("HGETALL", key))
