"""Claims of workers: which jobs they are given, in which order, and what they are told with them."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import redis
from rq import Queue
from rq.serializers import JSONSerializer

from producer import CancelClient, CancelRequest
from producer.keys import Band
from producer.message import TASK, OutcomeKind, decode_attempts, decode_call, encode_request
from tests.holders import DEAD, DEADLINE_MS, NUMBERS, Holder, OpenHolder, back, band, ended, ids, later, orders, tried
from tests.servers import Peek, eventually
from worker.store import ANSWER_WITHIN_S, TOO_LARGE


def test_a_lease_carries_the_request_and_its_default_deadline(client: CancelClient, open_holder: OpenHolder) -> None:
    """A claimed job comes with its payload, run 1, no attempts, and the worker's deadline where it names none."""
    ticket = client.cancel(algo_id=7, symbol="BTCUSDT", tag="t")

    (lease,) = open_holder(deadline_ms=1234).claim()

    assert (lease.id, lease.run, lease.attempts, lease.pin, lease.fault) == (ticket.id, 1, b"", b"", "")
    assert decode_call(lease.data) == ticket.request
    assert lease.deadline_at_ms == lease.enqueued_at_ms + 1234
    assert lease.meant_at_ms == lease.enqueued_at_ms


def test_own_deadline_of_a_request_holds(client: CancelClient, open_holder: OpenHolder) -> None:
    """A request's own deadline wins over the worker's default, be it shorter or longer."""
    client.cancel(algo_id=1, deadline_s=2)
    client.cancel(algo_id=2, deadline_s=20)

    short, long = open_holder(deadline_ms=10_000).claim()

    assert short.deadline_at_ms - short.enqueued_at_ms == 2000
    assert long.deadline_at_ms - long.enqueued_at_ms == 20_000


def test_a_job_is_given_once(client: CancelClient, open_holder: OpenHolder) -> None:
    """Two workers never hold the same job, no job is left behind, and no two leases have one token."""
    tickets = orders(client, 30)
    one, other = open_holder("one"), open_holder("other")

    leases = [lease for _ in range(4) for holder in (one, other) for lease in holder.claim(4)]

    assert sorted(ids(leases)) == sorted(ticket.id for ticket in tickets)
    assert len({lease.token for lease in leases}) == 30


def test_a_claim_keeps_to_its_slots_and_to_the_order(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """Jobs are given first come, first served, urgent ones before, and never more than there are slots."""
    slow = [ticket.id for ticket in orders(client, 4)]
    urgent = client.cancel(algo_id=99, urgent=True).id

    given = ids(holder.claim(3))

    assert given == [urgent, *slow[:2]]
    assert peek.waiting() == slow[2:]


def test_a_claim_waits_for_the_first_job(client: CancelClient, open_holder: OpenHolder) -> None:
    """A claim at an empty queue waits about a second; the job that ends a wait brings others along."""
    began, holder = time.monotonic(), open_holder()

    assert holder.claim(5, wait=True) == []
    assert time.monotonic() - began > 0.8
    tickets = orders(client, 3)
    assert ids(holder.claim(5, wait=True)) == [ticket.id for ticket in tickets]


def test_a_claim_that_comes_late_takes_nothing(client: CancelClient, open_holder: OpenHolder, peek: Peek) -> None:
    """What a claim would give whose answer nobody waits for any more stays for the others."""
    late, other = open_holder("late"), open_holder("other")
    late.claim()  # it knows the server's time
    request = late.store.claim(5, wait=False)
    ticket = client.cancel(algo_id=1)
    time.sleep(ANSWER_WITHIN_S + 0.05)

    assert late.ask(request).leases == []
    assert peek.waiting() == [ticket.id]
    assert ids(other.claim()) == [ticket.id]


# ---- an entry of the list is a hint ---------------------------------------------------------------------------------


def test_an_entry_of_a_held_job_gives_it_to_nobody(client: CancelClient, open_holder: OpenHolder, peek: Peek) -> None:
    """However often a job that somebody holds stands on the list, nobody else gets it."""
    ticket = client.cancel(algo_id=1)
    holder, other = open_holder("holder"), open_holder("other")
    holder.claim()
    client.cancel(algo_id=1, urgent=True)
    peek("LPUSH", peek.keys.waiting, ticket.id, ticket.id)

    assert other.claim() == holder.claim() == []
    assert peek.waiting() == []


@pytest.mark.parametrize("kind", [OutcomeKind.CANCELLED, OutcomeKind.UNKNOWN])
def test_an_entry_of_an_ended_job_is_dropped(
    kind: OutcomeKind, client: CancelClient, holder: Holder, peek: Peek
) -> None:
    """A list entry of a job that has its outcome gives nothing, and leaves the outcome alone."""
    client.cancel(algo_id=1)
    (lease,) = holder.claim()
    holder.complete(ended(lease, kind))
    before = peek.job(lease.id)
    peek("RPUSH", peek.keys.waiting, lease.id)

    assert holder.claim() == []
    assert peek.job(lease.id) == before
    assert len(peek.ledger()) == 1


def test_an_entry_of_a_scheduled_job_waits_for_its_time(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """A retry that is due later is not given early because its id stands on the list, whatever RQ says of it."""
    client.cancel(algo_id=1)
    (lease,) = holder.claim()
    holder.complete(later(lease, 60_000, tried(1)))
    for status in ("scheduled", "queued", "started"):
        peek("HSET", peek.keys.job_prefix + lease.id, "status", status)
        peek("ZREM", peek.keys.scheduled, lease.id)
        peek("ZREM", peek.keys.unfinished, lease.id)
        peek("RPUSH", peek.keys.waiting, lease.id)

        assert holder.claim() == []
        assert band(peek, lease.id) is Band.RETRY


@pytest.mark.parametrize("status", ["failed", "started", "deferred", "finished"])
def test_a_job_without_outcome_and_lease_waits_whatever_rq_says(
    status: str, client: CancelClient, holder: Holder, peek: Peek
) -> None:
    """RQ's clean-up may call a job failed that nobody has worked on: a worker takes it all the same, for good."""
    ticket = client.cancel(algo_id=1)
    peek("HSET", peek.keys.job_prefix + ticket.id, "status", status)
    peek("EXPIRE", peek.keys.job_prefix + ticket.id, 600)

    assert ids(holder.claim()) == [ticket.id]
    assert peek("TTL", peek.keys.job_prefix + ticket.id) == -1


def test_a_deleted_job_leaves_nothing(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """An id whose job was deleted is dropped, and its hash is not called back to life."""
    ticket = client.cancel(algo_id=1)
    peek("DEL", peek.keys.job_prefix + ticket.id)

    assert holder.claim() == []
    assert peek.job(ticket.id) == {}
    assert holder.is_drained()


def test_what_a_broken_claim_moved_goes_back_to_the_front(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """Ids that a broken claim moved away are given first, in their order."""
    tickets = [ticket.id for ticket in orders(client, 4)]
    for _ in range(2):
        peek("LMOVE", peek.keys.waiting, peek.keys.claiming, "LEFT", "RIGHT")

    assert ids(holder.claim()) == tickets
    assert peek("EXISTS", peek.keys.claiming) == 0


# ---- jobs of others -------------------------------------------------------------------------------------------------


def test_a_plain_rq_job_gets_its_times_at_the_first_claim(connection: redis.Redis, holder: Holder, peek: Peek) -> None:
    """A job that another program enqueued through RQ counts from the moment it is first seen."""
    queue = Queue("cancels", connection=connection, serializer=JSONSerializer)
    job = queue.enqueue(TASK, encode_request(CancelRequest(algo_id=5)))
    before = peek.now_ms()

    (lease,) = holder.claim()

    assert lease.id == job.id
    assert before <= lease.enqueued_at_ms <= peek.now_ms()
    assert lease.deadline_at_ms == lease.enqueued_at_ms + DEADLINE_MS


def test_a_hash_without_a_status_is_given(holder: Holder, peek: Peek) -> None:
    """A waiting hash that lacks even RQ's own fields is somebody's mistake: it is given, so that it gets an outcome."""
    peek("HSET", peek.keys.job_prefix + "odd", "x", "y")
    peek("RPUSH", peek.keys.waiting, "odd")

    (lease,) = holder.claim()

    assert (lease.id, lease.data) == ("odd", b"")
    assert holder.complete(ended(lease, OutcomeKind.REFUSED)) == [1]
    assert holder.claim() == []


@pytest.mark.parametrize("odd_id", [b"\xff\xfe\x80", b"a:b", "ü mlaut".encode(), b"", b"{x}\r\n", b"x" * 256])
def test_any_id_gets_its_outcome(odd_id: bytes, holder: Holder, peek: Peek, connection: redis.Redis) -> None:
    """An id that RQ would not make is brought to its end like any other, whatever bytes it holds."""
    connection.hset(peek.keys.job_prefix.encode() + odd_id, "status", "queued")
    connection.rpush(peek.keys.waiting, odd_id)

    (lease,) = holder.claim()

    assert holder.complete(ended(lease, OutcomeKind.REFUSED)) == [1]
    assert connection.hget(peek.keys.job_prefix.encode() + odd_id, "status") == b"failed"
    assert len(peek.ledger()) == 1
    assert holder.is_drained()


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [b"abc", b"", b"1.5", b"inf", b"\xff", b"9" * 400])
def test_a_damaged_number_is_named(
    name: str, value: bytes, client: CancelClient, holder: Holder, connection: redis.Redis, peek: Peek
) -> None:
    """A field of ours that holds no whole number costs neighbours nothing, and the worker learns which one it is."""
    damaged, sound = orders(client, 2)
    connection.hset(peek.keys.job_prefix + damaged.id, name, value)

    leases = holder.claim()

    assert [(lease.id, lease.fault) for lease in leases] == [(damaged.id, f"number {name}"), (sound.id, "")]
    assert holder.complete(*(ended(lease, OutcomeKind.REFUSED) for lease in leases)) == [1, 1]


@pytest.mark.parametrize("run", ["007", "-0", "-7"])
def test_a_number_of_a_run_in_another_spelling(
    run: str, client: CancelClient, holder: Holder, connection: redis.Redis, peek: Peek
) -> None:
    """Whoever is given such a job can bring it to its end: else it would be given for ever."""
    (ticket,) = orders(client, 1)
    connection.hset(peek.keys.job_prefix + ticket.id, "c_run", run)

    (lease,) = holder.claim()

    assert lease.run == int(run)
    assert holder.complete(ended(lease)) == [1]


# ---- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "put"),
    [
        ("waiting", ("LPUSH",)),
        ("claiming", ("RPUSH",)),
        ("unfinished", ("ZADD", 1)),
        ("unfinished", ("ZADD", int(Band.WAITING))),
        ("unfinished", ("ZADD", int(Band.RETRY))),
    ],
)
def test_an_endless_id_costs_itself_alone(
    place: str, put: tuple[Any, ...], client: CancelClient, holder: Holder, peek: Peek
) -> None:
    """What is too long for an id is dropped unread wherever it stands, with its first letters as its name."""
    key, (command, *score) = getattr(peek.keys, place), put
    (ticket,) = orders(client, 1)
    peek(command, key, *score, b"h" * 5_000_000)

    claimed = holder.claimed()

    assert ids(claimed.leases) == [ticket.id]
    assert {(name[:9], len(name)) for name in claimed.damaged} <= {("hhhhhhhhh", 256)}
    holder.complete(ended(claimed.leases[0]))
    assert holder.claim() == []
    assert holder.is_drained()
    assert not client.cancel(algo_id=1).duplicate


@pytest.mark.parametrize(
    ("name", "size", "fault"),
    [
        ("c_attempts", 5_000_000, ""),
        ("data", 5_000_000, "size data"),
        ("data", 64 * 1024 + 1, "size data"),
        ("c_pin", 5_000_000, "size c_pin"),
    ],
)
def test_a_field_that_is_too_large_is_not_read(
    name: str, size: int, fault: str, client: CancelClient, holder: Holder, connection: redis.Redis, peek: Peek
) -> None:
    """The job comes without the field, and told of, so that it gets an outcome; its neighbours come as ever."""
    large, neighbour = orders(client, 2)
    connection.hset(peek.keys.job_prefix + large.id, name, b"[" * size)

    one, other = holder.claim()

    assert (one.id, one.fault, max(map(len, (one.data, one.attempts, one.pin))) < 1000) == (large.id, fault, True)
    assert one.attempts == (TOO_LARGE if name == "c_attempts" else b"")
    assert (other.id, other.fault, decode_call(other.data)) == (neighbour.id, "", neighbour.request)
    assert holder.complete(ended(one, OutcomeKind.UNKNOWN), ended(other)) == [1, 1]
    assert peek("HEXISTS", peek.keys.job_prefix + large.id, "c_attempts") == 0


def test_large_histories_are_given_a_few_at_a_time(
    client: CancelClient, open_holder: OpenHolder, connection: redis.Redis, peek: Peek
) -> None:
    """No answer grows without bound, however many jobs have a history that is just within its own; none is lost."""
    tickets = [ticket.id for ticket in orders(client, 40)]
    for job_id in tickets:
        connection.hset(peek.keys.job_prefix + job_id, "c_attempts", b"[" * 500_000)
    holder, given = open_holder(), list[list[str]]()
    while len(given) < 10 and sum(map(len, given)) < len(tickets):
        given.append(ids(holder.claim(64)))

    assert [job_id for part in given for job_id in part] == tickets
    assert max(map(len, given)) < 12


def test_a_lost_job_with_an_endless_history_comes_back(
    client: CancelClient, open_holder: OpenHolder, connection: redis.Redis, peek: Peek
) -> None:
    """To a history that is too large to be read nothing is added, and the job is given as every lost one."""
    (ticket,) = orders(client, 1)
    open_holder("dead", lease_ms=DEAD).claim()
    connection.hset(peek.keys.job_prefix + ticket.id, "c_attempts", b"x" * 5_000_000)
    time.sleep(0.01)

    (lease,) = open_holder("other").claim()

    assert (lease.id, lease.attempts) == (ticket.id, TOO_LARGE)
    assert peek("HSTRLEN", peek.keys.job_prefix + ticket.id, "c_attempts") == 5_000_000


def test_a_lost_job_with_a_history_that_is_none_comes_back(
    client: CancelClient, open_holder: OpenHolder, connection: redis.Redis, peek: Peek
) -> None:
    """The number of the lost attempt is looked for once, not from each letter: a whole server would stand still."""
    (ticket,) = orders(client, 1)
    open_holder("dead", lease_ms=DEAD).claim()
    connection.hset(peek.keys.job_prefix + ticket.id, "c_attempts", b"x" * 100_000)
    time.sleep(0.01)

    (lease,) = open_holder("other").claim()

    assert (lease.id, lease.attempts[:100_010]) == (ticket.id, b"x" * 100_000 + b',{"n":1,"a')


# ---- many at once: bounded ------------------------------------------------------------------------------------------


def test_due_retries_come_back_a_hundred_at_a_time(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """However many retries are due at once, one call brings back a hundred of them at the most, oldest first."""
    orders(client, 250)
    leases = holder.claim(250)
    for group in (leases[:1], leases[1:]):
        holder.complete(*(later(lease, 0, tried(1)) for lease in group))
        time.sleep(0.005)

    assert ids(holder.claim(1)) == [leases[0].id]
    assert peek("ZCARD", peek.keys.scheduled) == 150
    rest = [lease for _ in range(3) for lease in holder.claim(250)]
    assert sorted(ids(rest)) == sorted(ids(leases[1:]))


def test_lost_leases_come_back_a_hundred_at_a_time(client: CancelClient, open_holder: OpenHolder) -> None:
    """However many leases a dead worker left, one call takes a hundred of them at the most."""
    orders(client, 250)
    lost = open_holder("dead", lease_ms=DEAD).claim(250)
    time.sleep(0.01)
    holder = open_holder("next")

    taken = holder.claim(250)

    assert len(taken) == 100
    taken += itertools.chain(*(holder.claim(250) for _ in range(2)))
    assert sorted(ids(taken)) == sorted(ids(lost))


def test_a_retry_starts_when_it_is_due(client: CancelClient, holder: Holder, peek: Peek) -> None:
    """A retry is not given before its time and at once after it, with attempts, pin, run and deadline as they were."""
    client.cancel(client_algo_id="c1")
    (lease,) = holder.claim()
    (due_ms,) = holder.complete(later(lease, 1500, tried(1), pin='{"algo_id":5}'))

    assert holder.claim() == []
    eventually(lambda: peek.now_ms() > due_ms, what="the retry is due")
    (retry,) = holder.claim()
    assert (decode_attempts(retry.attempts), retry.pin) == ((tried(1),), b'{"algo_id":5}')
    assert (retry.run, retry.enqueued_at_ms, retry.deadline_at_ms) == (1, lease.enqueued_at_ms, lease.deadline_at_ms)
    assert "c_due_at_ms" not in peek.job(lease.id)
    assert holder.complete(back(retry)) == [1]
    assert ids(holder.claim()) == [lease.id]


def test_a_full_server_refuses_the_wait_and_not_the_claim(
    client: CancelClient, holder: Holder, connection: redis.Redis
) -> None:
    """The worker learns why it was not let wait, so that it does not ask without end, and is given what there is."""
    assert holder.claim() == []  # from now on the server knows the script
    (ticket,) = orders(client, 1)
    connection.config_set("maxmemory", 1)
    try:
        claimed = holder.claimed(wait=True)
        assert ids(claimed.leases) == [ticket.id]
        assert isinstance(claimed.refused, redis.exceptions.OutOfMemoryError)
        assert isinstance(holder.claimed(wait=True).refused, redis.exceptions.OutOfMemoryError)
    finally:
        connection.config_set("maxmemory", 0)
