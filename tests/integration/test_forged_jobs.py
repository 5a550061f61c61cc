"""What a strategy's user can forge in Redis: it costs time, a run or a failure, and no outcome says what the exchange
does not.

A strategy must be able to write a job's hash, and Redis cannot keep the fields of one hash apart.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest
import redis

from producer import CancelClient, CancelRequest, OutcomeKind
from producer.keys import Band, Keys
from producer.message import MAX_ATTEMPT_N, Attempt, Call, OpenRequest, Pin, encode_attempts, encode_call
from producer.rights import acl_lines
from producer.untrusted import MalformedMessage
from tests.orders import PROVEN_S, events
from tests.servers import Peek, Valkey, Workers, eventually
from worker.sandbox.control import BookEntry, RunningExchange

KEYS = Keys()
GONE = {OutcomeKind.CANCELLED, OutcomeKind.ALREADY_CANCELLED, OutcomeKind.EXPIRED, OutcomeKind.REJECTED}
LONG_AGO_MS = 1_700_000_000_000


def history(*told: tuple[Call, str], count: int = 1) -> dict[str, str]:
    """A history in which the exchange gave these answers, long ago."""
    attempts = [
        Attempt(n, LONG_AGO_MS + n, call, 200, None, "", verdict, 5)
        for n, (call, verdict) in enumerate(told * count, 1)
    ]
    return {"c_attempts": encode_attempts(attempts)}


def numbered(n: int) -> dict[str, str]:
    """A history that ends with this number."""
    return {"c_attempts": encode_attempts([Attempt(n, LONG_AGO_MS, Call.QUERY, 200, None, "", "open", 5)])}


PAST = {"c_deadline_at_ms": str(LONG_AGO_MS), "c_asked_at_ms": str(LONG_AGO_MS)}
#: What is written over the hash of a request whose order is live, and what may be recorded of it; None: nothing.
FORGED: dict[str, tuple[dict[str, str], set[OutcomeKind | None]]] = {
    "a lease": ({"c_lease": "forged-1"}, {OutcomeKind.CANCELLED}),
    "an answer to a lease": ({"c_ended": "forged-1 1"}, {OutcomeKind.CANCELLED}),
    "a run": ({"c_run": "7"}, {OutcomeKind.CANCELLED}),
    "an end": ({"c_done": "cancelled"}, {None}),
    "a failed end": ({"c_done": "refused"}, {OutcomeKind.CANCELLED}),
    "an order": ({"c_order": "default:a:1"}, {OutcomeKind.CANCELLED}),
    "a child's fate": ({"c_on_trigger": "cancel_child"}, {OutcomeKind.CANCELLED}),
    "a cancel that worked": (history((Call.CANCEL, "confirmed")), {OutcomeKind.CANCELLED}),
    "one that worked, too late": (history((Call.CANCEL, "confirmed")) | PAST, {OutcomeKind.GAVE_UP}),
    "a state": (history((Call.QUERY, "canceled")), {OutcomeKind.CANCELLED}),
    "a state, too late": (history((Call.QUERY, "expired")) | PAST, {OutcomeKind.GAVE_UP}),
    "a trigger": (history((Call.QUERY, "triggered")), {OutcomeKind.CANCELLED}),
    "a trigger, too late": (history((Call.QUERY, "triggered")) | PAST, {OutcomeKind.GAVE_UP}),
    "a fill, too late": (history((Call.QUERY, "finished")) | PAST, {OutcomeKind.GAVE_UP}),
    "a child that has ended": (history((Call.QUERY_CHILD, "ended")) | PAST, {OutcomeKind.GAVE_UP}),
    "denials": (history((Call.QUERY, "no_such_order"), (Call.CANCEL, "no_such_order")), {OutcomeKind.CANCELLED}),
    "refusals": (history((Call.CANCEL, "denied")), {OutcomeKind.CANCELLED}),
    "doubts": (history((Call.CANCEL, "unclear")) | PAST, {OutcomeKind.UNKNOWN}),
    "too many attempts": (history((Call.QUERY, "open"), count=200), {OutcomeKind.GAVE_UP}),
    "a number that none can follow": (numbered(2**63 - 1), {OutcomeKind.REFUSED}),
    "the largest number": (numbered(MAX_ATTEMPT_N), {OutcomeKind.CANCELLED}),
    "a status": ({"status": "canceled"}, {OutcomeKind.GAVE_UP}),
    "nonsense": ({"c_run": "x", "c_due_at_ms": "y", "c_open_at_ms": "z"}, {OutcomeKind.REFUSED}),
    "a lost attempt": ({"c_open_at_ms": str(LONG_AGO_MS), "status": "started"}, {OutcomeKind.CANCELLED}),
    "a due time": ({"c_due_at_ms": str(LONG_AGO_MS), "status": "scheduled"}, {OutcomeKind.CANCELLED}),
}


@pytest.fixture
def forger(valkey: Valkey, connection: redis.Redis) -> Iterator[redis.Redis]:
    """A strategy's user: what it is refused, nobody who enqueues can forge."""
    is_old = str(connection.info()["redis_version"]).startswith("6.")
    line = next(line for line in acl_lines(KEYS, redis_6=is_old) if line.startswith("ACL SETUSER strategy "))
    connection.execute_command(*line.split())
    with redis.Redis(port=valkey.port, username="strategy", password="STRATEGY-PASSWORD") as forger:
        yield forger
    connection.execute_command("ACL", "DELUSER", "strategy")


@pytest.fixture
def fleet(workers: Workers) -> Workers:
    """Workers whose leases end soon."""
    workers.environment |= {"LEASE_S": "2", "BACKOFF_CAP_MS": "200"}
    return workers


def is_true(kind: OutcomeKind, order: BookEntry) -> bool:
    """Whether an outcome says no more of an order than the exchange's book."""
    if kind in GONE:
        return order.status == "CANCELED"
    return kind is not OutcomeKind.TRIGGERED and kind.failed


def test_no_forged_field_makes_a_false_outcome(
    client: CancelClient, exchange: RunningExchange, fleet: Workers, forger: redis.Redis, peek: Peek
) -> None:
    """Whatever is written over jobs, and wherever the index says that they stand: what is recorded of an order is what
    the exchange told whoever records it."""
    orders = exchange.add_orders(len(FORGED) + 3)
    tickets = client.cancel_many([CancelRequest(order.algo_id) for order in orders])
    for ticket, (fields, _) in zip(tickets, FORGED.values(), strict=False):
        for name, value in fields.items():
            forger.hset(KEYS.job_prefix + ticket.id, name, value)
    scores = (1, Band.HELD + peek.now_ms() + 500, Band.RETRY + peek.now_ms() + 500)
    moved = tickets[len(FORGED) :]
    for ticket, score in zip(moved, scores, strict=True):
        forger.zadd(KEYS.unfinished, {ticket.id: score})
    fleet.start()

    expected = dict(zip([ticket.id for ticket in tickets], [kinds for _, kinds in FORGED.values()], strict=False))
    expected |= {ticket.id: {OutcomeKind.CANCELLED} for ticket in moved}
    lasting = [job_id for job_id, kinds in expected.items() if None not in kinds]
    eventually(lambda: {each.id for each in peek.ledger()} >= set(lasting), 60, "all others have an outcome")
    book = exchange.book()
    for outcome in peek.ledger():
        assert outcome.kind in expected[outcome.id], (outcome, list(FORGED)[list(expected).index(outcome.id)])
        assert is_true(outcome.kind, book[outcome.algo_id or 0]), outcome
    assert sorted(outcome.id for outcome in peek.ledger()) == sorted(lasting)


@pytest.mark.parametrize("forged", ["c_lease", "c_run", "c_done", "c_ended"])
def test_forging_under_a_holder_costs_it_the_job_and_records_once(
    forged: str, client: CancelClient, exchange: RunningExchange, fleet: Workers, forger: redis.Redis, peek: Peek
) -> None:
    """While the cancel is at the exchange: its holder records nothing of a lease that is another by now, even where its
    answer is forged, too; whoever takes the job over records what the exchange says then, once."""
    fleet.start()
    (order,) = exchange.add_orders(1)
    exchange.set_latency_ms(1500)
    ticket = client.cancel(algo_id=order.algo_id)
    key = KEYS.job_prefix + ticket.id
    eventually(lambda: exchange.book()[order.algo_id].deletes, what="the cancel is there")
    lease = peek("HGET", key, "c_lease")
    forgery = {"c_lease": "forged-1", "c_run": "2", "c_done": "expired", "c_ended": f"{lease} 1"}
    forger.hset(key, forged, forgery[forged])
    if forged == "c_ended":
        forger.hset(key, "c_lease", "forged-1")
    exchange.set_latency_ms(0)

    assert ticket.wait(60).kind is OutcomeKind.CANCELLED
    assert [outcome.id for outcome in peek.ledger()] == [ticket.id]
    assert exchange.book()[order.algo_id].status == "CANCELED"


def test_a_forged_pin_leads_to_no_other_orders_outcome(
    client: CancelClient, exchange: RunningExchange, fleet: Workers, forger: redis.Redis, peek: Peek
) -> None:
    """What a client id is said to mean is held against the id that the exchange's answers bear."""
    meant, other = exchange.add_orders(2)
    created_ms = exchange.book()[meant.algo_id].create_time_ms
    eventually(lambda: peek.now_ms() > created_ms + PROVEN_S * 1000)
    ticket = client.cancel(client_algo_id=meant.client_algo_id, deadline_s=2)
    forger.hset(KEYS.job_prefix + ticket.id, "c_pin", Pin(other.algo_id).encode())
    fleet.start()

    outcome = ticket.wait(60)
    assert outcome.kind is OutcomeKind.UNKNOWN
    assert exchange.book()[meant.algo_id].status == "NEW"


def test_a_request_that_was_led_to_another_orders_job_is_told_so(
    client: CancelClient, exchange: RunningExchange, fleet: Workers, forger: redis.Redis
) -> None:
    """A forged pointer, or a payload that was changed: the outcome is about another order, and nobody's who asked."""
    first, second, third = exchange.add_orders(3)
    changed = client.cancel(algo_id=first.algo_id)
    forger.hset(KEYS.job_prefix + changed.id, "data", encode_call(CancelRequest(second.algo_id)))
    request = CancelRequest(third.algo_id)
    forger.hset(KEYS.job_prefix + changed.id, "c_order", request.order_key)
    forger.set(KEYS.order_prefix + request.order_key, changed.id)
    joined = client.cancel_many([request])[0]
    assert joined.id == changed.id
    worker = fleet.start()

    for ticket in (changed, joined):
        with pytest.raises(MalformedMessage, match="about another order"):
            ticket.wait(60)
    eventually(lambda: [event["kind"] for event in events(worker, "outcome")] == ["cancelled"], 20, "it is told once")
    assert {exchange.book()[order.algo_id].status for order in (first, third)} == {"NEW"}


@pytest.mark.parametrize("forged", ["c_meant_at_ms", "c_enqueued_at_ms", "data"])
def test_a_listing_of_another_moment_says_nothing_of_what_is_open(
    forged: str, client: CancelClient, exchange: RunningExchange, fleet: Workers, forger: redis.Redis, peek: Peek
) -> None:
    """Whoever says that a listing was asked for long ago has it leave out all that was opened since: it is no word
    about what was open when it was asked."""
    exchange.add_orders(1)
    ticket = client.cancel_open("BTCUSDT")
    earlier = encode_call(OpenRequest(symbol="BTCUSDT", before_ms=LONG_AGO_MS)) if forged == "data" else LONG_AGO_MS
    forger.hset(KEYS.job_prefix + ticket.id, forged, earlier)
    fleet.start()

    with pytest.raises(MalformedMessage, match="before it was asked for"):
        ticket.wait(60)
    assert pickle.loads(pickle.dumps(ticket)).asked_ms == ticket.asked_ms > LONG_AGO_MS


def test_a_client_id_that_was_led_to_another_order_is_told_so(
    client: CancelClient, exchange: RunningExchange, fleet: Workers, forger: redis.Redis, peek: Peek
) -> None:
    """A payload that names another algo id beside the client id that was asked for: the record bears the client id that
    the exchange knows of the order, and so it is another order's."""
    meant, other = exchange.add_orders(2)
    ticket = client.cancel(client_algo_id=meant.client_algo_id)
    payload = encode_call(CancelRequest(other.algo_id, client_algo_id=meant.client_algo_id))
    forger.hset(KEYS.job_prefix + ticket.id, "data", payload)
    fleet.start()

    with pytest.raises(MalformedMessage, match="about another order"):
        ticket.wait(60)
    assert exchange.book()[meant.algo_id].status == "NEW"
