"""Worker processes against a real Redis and a real exchange: what is recorded, and what the exchange saw of it."""

from __future__ import annotations

import itertools
import json
import os
import re
import secrets
import signal
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from rq import Queue
from rq.job import Job
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer

from producer import CancelClient, CancelRequest, Outcome, OutcomeKind, Ticket
from producer.message import TASK, VERSION
from tests.conftest import API_KEY, API_SECRET
from tests.servers import Peek, Valkey, Worker, Workers, eventually, running_valkey
from worker.sandbox.control import ExchangeConfig, RunningExchange, start_exchange
from worker.sandbox.faults import Fault

NewFleet = Callable[..., Workers]


@pytest.fixture
def peek(connection: redis.Redis) -> Peek:
    """A look at the queue's keys."""
    return Peek(connection)


@pytest.fixture
def new_fleet(workers: Workers, tmp_path: Path) -> Iterator[NewFleet]:
    """Makes fleets of workers whose environment differs from the usual one."""
    made: list[Workers] = []

    def make(**environment: str) -> Workers:
        directory = tmp_path / f"fleet-{len(made)}"
        directory.mkdir()
        made.append(Workers(directory, workers.environment | environment))
        return made[-1]

    yield make
    for fleet in made:
        fleet.stop()


@pytest.fixture
def durable() -> Iterator[Valkey]:
    """A server that loses nothing when it is killed."""
    with running_valkey("--appendonly", "yes", "--appendfsync", "always") as server:
        yield server


def cancel_all(client: CancelClient, algo_ids: Iterable[int], **options: Any) -> list[Ticket]:
    """Enqueue a cancel of each order."""
    return client.cancel_many([CancelRequest(algo_id=algo_id, **options) for algo_id in algo_ids])


def opened(exchange: RunningExchange, count: int) -> list[int]:
    """Open orders; gives their algo ids."""
    return [order.algo_id for order in exchange.add_orders(count)]


def outcomes(client: CancelClient, tickets: Iterable[Ticket], timeout_s: float = 20) -> list[Outcome]:
    """Their outcomes, once all of them are there, in the tickets' order."""
    ids = [ticket.id for ticket in tickets]
    eventually(lambda: len(client.outcomes_of(ids)) == len(set(ids)), timeout_s, "all outcomes are there")
    found = client.outcomes_of(ids)
    return [found[job_id] for job_id in ids]


def steps(outcome: Outcome) -> list[str]:
    """The verdicts of its attempts."""
    return [attempt.verdict for attempt in outcome.attempts]


def events(worker: Worker, name: str) -> list[dict[str, str]]:
    """The worker's log lines of one event."""
    lines = (line for line in worker.output().splitlines() if f"event={name} " in f"{line} ")
    return [dict(re.findall(r'([\w#.]+)=("[^"]*"|\S+)', line)) for line in lines]


def once_each(peek: Peek, tickets: Iterable[Ticket]) -> bool:
    """Whether the ledger holds exactly one outcome of each of these and nothing else."""
    return Counter(outcome.id for outcome in peek.ledger()) == dict.fromkeys((ticket.id for ticket in tickets), 1)


def test_what_is_never_used_is_not_loaded(workers: Workers) -> None:
    """A worker does without the tables by which requests guesses encodings, and nothing is said of that."""
    worker = workers.start()

    assert "charset_normalizer" not in Path(f"/proc/{worker.process.pid}/maps").read_text("utf-8")
    assert "Warning" not in worker.output()


# ---- what is sent, what is recorded ---------------------------------------------------------------------------------


def test_a_cancel_costs_one_claim_and_one_settlement(
    workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek
) -> None:
    """Of an idle worker each cancel costs one call to claim and one to settle, beside those of each passing second."""
    workers.start()
    ids = opened(exchange, 41)
    assert client.cancel(algo_id=ids.pop()).wait(10).kind is OutcomeKind.CANCELLED
    peek("CONFIG", "RESETSTAT")
    began = time.monotonic()

    for algo_id in ids:
        assert client.cancel(algo_id=algo_id).wait(10).kind is OutcomeKind.CANCELLED

    calls = peek("INFO", "commandstats")["cmdstat_evalsha"]["calls"]
    assert len(ids) * 3 <= calls <= len(ids) * 3 + 3 * (time.monotonic() - began + 1)


def test_thousand_cancels(workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek) -> None:
    """Without faults each of a thousand requests costs exactly one DELETE and ends in exactly one outcome."""
    workers.start()
    ids = opened(exchange, 1000)

    tickets = cancel_all(client, ids)

    assert {outcome.kind for outcome in outcomes(client, tickets, 30)} == {OutcomeKind.CANCELLED}
    assert once_each(peek, tickets)
    book = exchange.book()
    assert {(book[i].status, book[i].deletes, book[i].deletes_effective, book[i].gets) for i in ids} == {
        ("CANCELED", 1, 1, 0)
    }
    assert sorted(outcome.algo_id or 0 for outcome in peek.ledger()) == ids
    assert exchange.stats().bad_signatures == 0


#: Name, faults of the cancels, faults of the queries (the last one for ever), kind, verdicts (None: many).
ROWS: list[tuple[str, list[Fault | None], list[Fault | None], OutcomeKind, list[str] | None]] = [
    ("clean", [], [], OutcomeKind.CANCELLED, ["confirmed"]),
    ("no answer, done", [Fault.DROP_AFTER], [], OutcomeKind.CANCELLED, ["unclear", "canceled"]),
    ("reset, done", [Fault.RESET_AFTER], [], OutcomeKind.CANCELLED, ["unclear", "canceled"]),
    ("too late, done", [Fault.ANSWER_LATE], [], OutcomeKind.CANCELLED, ["unclear", "canceled"]),
    ("no answer, not done", [Fault.DROP_BEFORE], [], OutcomeKind.CANCELLED, ["unclear", "open", "confirmed"]),
    ("cut off, done", [Fault.BODY_CUT_EXECUTED], [], OutcomeKind.CANCELLED, ["unclear", "canceled"]),
    ("another order's answer", [Fault.WRONG_ID_200], [], OutcomeKind.CANCELLED, ["unclear", "open", "confirmed"]),
    ("200 in HTML, done", [Fault.HTML_200_EXECUTED], [], OutcomeKind.CANCELLED, ["unclear", "canceled"]),
    ("-1007, done", [Fault.TIMEOUT_1007_EXECUTED], [], OutcomeKind.CANCELLED, ["unclear", "canceled"]),
    ("503 unknown", [Fault.UNKNOWN_503], [], OutcomeKind.CANCELLED, ["unclear", "open", "confirmed"]),
    ("503 not done", [Fault.UNAVAILABLE_503] * 2, [], OutcomeKind.CANCELLED, ["busy", "busy", "confirmed"]),
    ("false -2011", [Fault.FALSE_2011], [], OutcomeKind.CANCELLED, ["no_such_order", "open", "confirmed"]),
    ("-2011, cancelled before", [Fault.CANCELLED_BEFORE], [], OutcomeKind.ALREADY_CANCELLED, None),
    ("-2011, triggered", [Fault.TRIGGERED_BEFORE], [], OutcomeKind.TRIGGERED, ["no_such_order", "triggered"]),
    ("-4117, triggers", [Fault.TRIGGER_4117], [], OutcomeKind.TRIGGERED, None),
    ("-2011, expired", [Fault.EXPIRED_BEFORE], [], OutcomeKind.EXPIRED, ["no_such_order", "expired"]),
    ("-2011, rejected", [Fault.REJECTED_BEFORE], [], OutcomeKind.REJECTED, ["no_such_order", "rejected"]),
    ("disabled", [Fault.DISABLED_2011], [], OutcomeKind.REFUSED, ["denied"]),
    ("refused after a doubt", [Fault.DROP_AFTER], [Fault.INACTIVE_4109], OutcomeKind.UNKNOWN, ["unclear", "denied"]),
    ("never answered", [Fault.DROP_BEFORE], [Fault.DROP_BEFORE], OutcomeKind.UNKNOWN, None),
    ("triggering for ever", [Fault.TRIGGER_STUCK], [], OutcomeKind.GAVE_UP, None),
    ("overloaded for ever", [Fault.UNAVAILABLE_503] * 50, [], OutcomeKind.GAVE_UP, None),
]


def test_verification_tells_what_became_of_each_order(
    workers: Workers, client: CancelClient, exchange: RunningExchange
) -> None:
    """Whatever the exchange answers, the outcome names what the order's state proves, with every attempt on record."""
    workers.start(BINANCE_RECV_WINDOW_MS="1000", BACKOFF_CAP_MS="100", CANCEL_MAX_ATTEMPTS="6")
    ids = opened(exchange, len(ROWS))
    for algo_id, (_, cancels, queries, _, _) in zip(ids, ROWS, strict=True):
        if cancels:
            exchange.script_faults(algo_id, cancels)
        if queries:
            exchange.script_faults(algo_id, queries, call="query", repeat_last=True)

    found = outcomes(client, cancel_all(client, ids))

    book = exchange.book()
    for (name, _, _, kind, verdicts), outcome in zip(ROWS, found, strict=True):
        entry = book[outcome.algo_id or 0]
        assert outcome.kind is kind, (name, outcome)
        assert verdicts in (None, steps(outcome)), (name, outcome)
        assert [attempt.n for attempt in outcome.attempts] == list(range(1, len(outcome.attempts) + 1)), name
        assert sorted(attempt.at_ms for attempt in outcome.attempts) == [a.at_ms for a in outcome.attempts], name
        calls = Counter(str(attempt.call) for attempt in outcome.attempts)
        assert (calls["cancel"], calls["query"]) == (entry.deletes, entry.gets), name
        assert outcome.may_be_live is (kind.failed or kind is OutcomeKind.TRIGGERED), name
        assert (outcome.error is None) is (not kind.failed), name
        assert (outcome.actual_order_id or "") == (entry.actual_order_id if kind is OutcomeKind.TRIGGERED else ""), name


def test_order_that_the_exchange_never_knew(workers: Workers, client: CancelClient) -> None:
    """An order that is unknown to the cancel is asked for until the horizon, and then not found: it may be live."""
    workers.start(NOT_FOUND_HORIZON_S="0.5", BACKOFF_CAP_MS="200")

    outcome = client.cancel(algo_id=7).wait(10)

    assert (outcome.kind, outcome.may_be_live) == (OutcomeKind.NOT_FOUND, True)
    assert set(steps(outcome)) == {"no_such_order"}
    first, *_, last = outcome.attempts
    assert (first.call, last.call) == ("cancel", "query")
    assert last.at_ms + last.ms + 1 - first.at_ms >= 500


def test_exchange_that_cannot_be_reached(new_fleet: NewFleet, client: CancelClient) -> None:
    """While nothing can be sent no attempt is in doubt: the bound ends it as given up, never as unknown."""
    fleet = new_fleet(BINANCE_BASE_URL="http://127.0.0.1:9", CANCEL_MAX_ATTEMPTS="3", BACKOFF_CAP_MS="100")
    fleet.start()

    outcome = client.cancel(algo_id=7).wait(10)

    assert (outcome.kind, steps(outcome)) == (OutcomeKind.GAVE_UP, ["not_sent"] * len(outcome.attempts))
    assert 1 < len(outcome.attempts) <= 3


def test_nothing_secret_leaves_the_worker(
    workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek, connection: redis.Redis
) -> None:
    """After every kind of trouble neither key, secret nor signature is in the log or anywhere in Redis."""
    worker = workers.start(LOG_LEVEL="DEBUG", BACKOFF_CAP_MS="100", BINANCE_RECV_WINDOW_MS="1000")
    ids = opened(exchange, 6)
    troubles = [Fault.DROP_AFTER, Fault.RESET_BEFORE, Fault.NOT_HTTP, Fault.KEY_2015, Fault.HUGE_BODY, Fault.DRIP]
    for algo_id, fault in zip(ids, troubles, strict=True):
        exchange.script_faults(algo_id, [fault])
    outcomes(client, cancel_all(client, ids))

    kept = (
        b"".join(connection.dump(key) or b"" for key in peek("KEYS", "*"))
        + json.dumps([outcome.as_dict() for outcome in peek.ledger()]).encode()
    )
    for secret in (API_SECRET, "signature="):
        assert secret not in worker.output()
        assert secret.encode() not in kept
    assert API_KEY not in worker.output()


# ---- client ids, accounts -------------------------------------------------------------------------------------------


def test_fresh_client_id_is_cancelled_directly(
    workers: Workers, client: CancelClient, exchange: RunningExchange
) -> None:
    """A request by client id that has just been made needs no look-up before its cancel."""
    workers.start()
    (order,) = exchange.add_orders(client_algo_ids=["stop-1"])

    outcome = client.cancel(client_algo_id="stop-1").wait(10)

    assert (outcome.kind, outcome.algo_id, steps(outcome)) == (OutcomeKind.CANCELLED, order.algo_id, ["confirmed"])


def test_old_client_id_is_resolved_before_its_cancel(
    workers: Workers, client: CancelClient, exchange: RunningExchange
) -> None:
    """A request by client id that waited for more than a second is first resolved to the order's algo id."""
    (order,) = exchange.add_orders(client_algo_ids=["stop-1"])
    ticket = client.cancel(client_algo_id="stop-1")
    time.sleep(1.1)
    workers.start()

    outcome = ticket.wait(10)

    assert (outcome.kind, outcome.algo_id, steps(outcome)) == (
        OutcomeKind.CANCELLED,
        order.algo_id,
        ["open", "confirmed"],
    )


def test_retry_goes_by_algo_id(workers: Workers, client: CancelClient, exchange: RunningExchange) -> None:
    """Once a client id is pinned to its order, a retry never touches another order that bears the same id by then."""
    (order,) = exchange.add_orders(client_algo_ids=["stop-1"])
    exchange.script_faults(order.algo_id, [Fault.UNAVAILABLE_503], repeat_last=True)
    ticket = client.cancel(client_algo_id="stop-1")
    time.sleep(1.1)
    workers.start(BACKOFF_BASE_MS="100", BACKOFF_CAP_MS="100")
    eventually(lambda: exchange.book()[order.algo_id].deletes >= 1, what="the first cancel is refused")

    exchange.cancel(order.algo_id)
    (namesake,) = exchange.add_orders(client_algo_ids=["stop-1"])
    exchange.end_faults()

    outcome = ticket.wait(10)
    assert (outcome.kind, outcome.algo_id) == (OutcomeKind.ALREADY_CANCELLED, order.algo_id)
    entry = exchange.book()[namesake.algo_id]
    assert (entry.status, entry.deletes) == ("NEW", 0)


def test_reused_client_id_is_never_hit(workers: Workers, client: CancelClient, exchange: RunningExchange) -> None:
    """When a cancel by client id is in doubt and a newer order bears that id, the newer one is left alone: unknown."""
    workers.start(BACKOFF_CAP_MS="100")
    (order,) = exchange.add_orders(client_algo_ids=["stop-1"])
    time.sleep(1.1)
    exchange.script_faults(order.algo_id, [Fault.DROP_BEFORE], repeat_last=True)
    exchange.script_faults(order.algo_id, [Fault.DROP_BEFORE], call="query", repeat_last=True)
    ticket = client.cancel(client_algo_id="stop-1")
    eventually(lambda: exchange.book()[order.algo_id].deletes == 1, what="the cancel is in doubt")
    time.sleep(1.1)
    exchange.cancel(order.algo_id)
    (namesake,) = exchange.add_orders(client_algo_ids=["stop-1"])

    outcome = ticket.wait(10)

    entry = exchange.book()[namesake.algo_id]
    assert (entry.status, entry.deletes) == ("NEW", 0)
    assert (outcome.kind, outcome.may_be_live) == (OutcomeKind.UNKNOWN, True)


def test_retry_by_client_id_leaves_a_newer_order_alone(
    workers: Workers, client: CancelClient, exchange: RunningExchange
) -> None:
    """A retried request means the order that had the client id when it was first made, not one that has it now."""
    (order,) = exchange.add_orders(client_algo_ids=["stop-1"])
    ticket = client.cancel(client_algo_id="stop-1", deadline_s=0.01)
    workers.start(NOT_FOUND_HORIZON_S="0.2")
    assert ticket.wait(10).kind is OutcomeKind.OVERDUE
    exchange.cancel(order.algo_id)
    time.sleep(1.1)
    (namesake,) = exchange.add_orders(client_algo_ids=["stop-1"])

    client.retry([ticket.id])

    outcome = ticket.wait(10)
    assert (outcome.kind, outcome.run) == (OutcomeKind.UNKNOWN, 2)
    assert "left alone" in (outcome.error or "")
    entry = exchange.book()[namesake.algo_id]
    assert (entry.status, entry.deletes) == ("NEW", 0)


def test_each_account_signs_with_its_own_key(new_fleet: NewFleet, client: CancelClient) -> None:
    """Requests are signed with the key of the account that they name; one that the worker lacks is refused by name."""
    accounts = {name: (f"key-{name}", f"secret-{name}") for name in ("default", "desk-a", "desk_b")}
    with start_exchange(ExchangeConfig(accounts=accounts)) as exchange:
        keys = {"BINANCE_BASE_URL": exchange.url}
        for name, prefix in {"default": "BINANCE", "desk-a": "BINANCE_DESK_A", "desk_b": "BINANCE_DESK_B"}.items():
            keys |= {f"{prefix}_API_KEY": accounts[name][0], f"{prefix}_API_SECRET": accounts[name][1]}
        new_fleet(**keys).start()
        tickets = [
            client.cancel(algo_id=exchange.add_orders(account=name)[0].algo_id, account=name) for name in accounts
        ]
        stranger = client.cancel(algo_id=tickets[0].request.algo_id, account="nobody")

        assert [outcome.kind for outcome in outcomes(client, tickets)] == [OutcomeKind.CANCELLED] * 3
        refused = stranger.wait(10)
        assert (refused.kind, refused.attempts, refused.account) == (OutcomeKind.REFUSED, (), "nobody")
        assert "'nobody'" in (refused.error or "")
        assert exchange.stats().bad_signatures == 0


# ---- retries, clock, gate -------------------------------------------------------------------------------------------


def test_retries_start_on_time(workers: Workers, client: CancelClient, exchange: RunningExchange) -> None:
    """Each retry starts when its delay is over, without a scheduler, though nothing else arrives on the queue."""
    worker = workers.start(BACKOFF_BASE_MS="100", BACKOFF_CAP_MS="400")
    ids = opened(exchange, 10)
    for algo_id in ids:
        exchange.script_faults(algo_id, [Fault.UNAVAILABLE_503] * 4)

    found = outcomes(client, cancel_all(client, ids))

    delays = {(event["id"], int(event["attempts"])): int(event["delay_ms"]) for event in events(worker, "again")}
    assert len(delays) > 20
    for outcome in found:
        assert steps(outcome) == [*["busy"] * 4, "confirmed"]
        for before, after in itertools.pairwise(outcome.attempts):
            delay_ms = delays.get((outcome.id, before.n), 0)  # one of less than a millisecond is no wait
            late_ms = after.at_ms - (before.at_ms + before.ms + delay_ms)
            assert -5 <= late_ms < 500, (late_ms, outcome)


def test_retry_that_falls_due_while_all_slots_are_taken(
    workers: Workers, client: CancelClient, exchange: RunningExchange
) -> None:
    """With one slot a retry that falls due during another request starts right after that one's answer."""
    workers.start("--concurrency", "1", BACKOFF_BASE_MS="300", BACKOFF_CAP_MS="300", BINANCE_RECV_WINDOW_MS="5000")
    exchange.set_latency_ms(500)
    for _ in range(5):  # a delay drawn close to nothing falls due before the slot is taken again
        one, two = opened(exchange, 2)
        exchange.script_faults(one, [Fault.UNAVAILABLE_503])
        first, second = outcomes(client, cancel_all(client, [one, two]))
        (only,) = second.attempts
        busy, retry = first.attempts
        if only.at_ms < retry.at_ms:
            break

    assert busy.at_ms < only.at_ms < retry.at_ms
    assert retry.at_ms - (only.at_ms + only.ms) < 400


@pytest.mark.parametrize("skew_ms", [5000, -5000])
def test_jump_of_the_exchanges_clock_costs_no_outcome(
    skew_ms: int, workers: Workers, client: CancelClient, exchange: RunningExchange
) -> None:
    """When the exchange's clock jumps, requests are signed anew by a fresh measurement, and later ones pay nothing."""
    workers.start(BINANCE_RECV_WINDOW_MS="3000")
    ids = opened(exchange, 21)
    assert steps(client.cancel(algo_id=ids[0]).wait(10)) == ["confirmed"]

    exchange.set_clock_skew_ms(skew_ms)
    found = outcomes(client, cancel_all(client, ids[1:11]))
    assert {outcome.kind for outcome in found} == {OutcomeKind.CANCELLED}
    assert any("clock" in steps(outcome) for outcome in found)

    later = outcomes(client, cancel_all(client, ids[11:]))
    assert {(outcome.kind, *steps(outcome)) for outcome in later} == {(OutcomeKind.CANCELLED, "confirmed")}
    assert exchange.stats().requests["GET /fapi/v1/time"]["200"] <= 4 * 3


def test_rate_limit_stops_every_worker(
    workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek
) -> None:
    """After a 429 no worker sends anything until Retry-After is over, one that starts meanwhile included."""
    fleet = [workers.start(CANCEL_MAX_ATTEMPTS="2", WORKER_CONCURRENCY="8") for _ in range(2)]
    exchange.set_latency_ms(20)
    ids = opened(exchange, 600)
    tickets = cancel_all(client, ids)
    eventually(lambda: len(peek.ledger()) > 50, what="both are at work")

    exchange.start_incident(Fault.LIMITED_429, duration_ms=3000)
    eventually(lambda: peek("EXISTS", peek.keys.gate("all")), 2, "the gate is closed in Redis")
    gate = dict(peek("HGETALL", peek.keys.gate("all")))
    assert int(gate["until_ms"]) > peek.now_ms() + 1000
    assert gate["reason"].startswith("429")
    late = workers.start()

    found = outcomes(client, tickets, 30)

    assert {outcome.kind for outcome in found} == {OutcomeKind.CANCELLED}
    assert once_each(peek, tickets)
    (incident,) = exchange.stats().incidents
    assert incident.requests_ms
    assert max(incident.requests_ms) < 1000
    limited = [outcome for outcome in found if "limited" in steps(outcome)]
    assert limited
    assert all(steps(outcome)[-1] == "confirmed" for outcome in limited)
    assert {worker.process.poll() for worker in [*fleet, late]} == {None}


def test_ban_outlives_the_workers(
    workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek
) -> None:
    """A gate that was closed before a restart holds for the new worker, and overdue requests end while it is closed."""
    exchange.start_incident(Fault.BANNED_418, duration_ms=4500)
    peek("HSET", peek.keys.gate("all"), "until_ms", peek.now_ms() + 4500)
    algo_id, *overdue_ids = opened(exchange, 51)
    ticket = client.cancel(algo_id=algo_id)
    overdue = cancel_all(client, overdue_ids, deadline_s=0.1)
    workers.start()

    assert {outcome.kind for outcome in outcomes(client, overdue, 4)} == {OutcomeKind.OVERDUE}
    assert peek.now_ms() < int(peek("HGET", peek.keys.gate("all"), "until_ms"))
    assert ticket.wait(10).kind is OutcomeKind.CANCELLED
    assert exchange.stats().requests_during_incidents == 0


# ---- strangers on the queue -----------------------------------------------------------------------------------------


def data_of(call: object) -> bytes:
    """A job's payload as RQ's JSON serializer writes it."""
    return zlib.compress(json.dumps(call).encode())


def strangers(marker: Path) -> dict[str, bytes]:
    """Payloads that are no cancel of this version, by what is wrong with them."""
    good = {"v": VERSION, "account": "default", "algo_id": 7}
    deep = b"[" * 10_000 + b"]" * 10_000
    return {
        "shell": data_of(["os.system", None, [f"touch {marker}"], {}]),
        "private": data_of(["worker.task._tools", None, [good], {}]),
        "method": data_of([TASK, "worker.task.Unfenced", [good], {}]),
        "huge": data_of([TASK, None, [{**good, "tag": secrets.token_hex(5_000_000)}], {}]),
        "bomb": data_of([TASK, None, [{**good, "tag": "x" * 50_000_000}], {}]),
        "deep": zlib.compress(f'["{TASK}",null,['.encode() + deep + b"],{}]"),
        "nan": zlib.compress(f'["{TASK}",null,[{{"v":1,"account":"default","algo_id":NaN}}],{{}}]'.encode()),
        "beyond-64-bits": data_of([TASK, None, [{**good, "algo_id": 2**63}], {}]),
        "text-for-number": data_of([TASK, None, [{**good, "algo_id": "7"}], {}]),
        "control-characters": data_of([TASK, None, [{**good, "tag": "a\nb"}], {}]),
        "no-order": data_of([TASK, None, [{"v": VERSION, "account": "default"}], {}]),
        "version": data_of([TASK, None, [{**good, "v": 2}], {}]),
        "field": data_of([TASK, None, [{**good, "price": 1}], {}]),
        "no-arguments": data_of([TASK, None, [], {}]),
        "two-arguments": data_of([TASK, None, [good, good], {}]),
        "by-name": data_of([TASK, None, [], {"request": good}]),
        "object": data_of({"func": TASK}),
        "not-json": b"\x00\xff not even compressed",
        "empty": b"",
    }


def test_strangers_are_refused(
    workers: Workers,
    client: CancelClient,
    exchange: RunningExchange,
    peek: Peek,
    connection: redis.Redis,
    tmp_path: Path,
) -> None:
    """Any job but a cancel of this version ends in one refused outcome; nothing of it runs, and the worker goes on."""
    marker = tmp_path / "was-here"
    worker = workers.start()
    plain, pickled = (Queue("cancels", connection=connection, serializer=s) for s in (JSONSerializer, None))
    expected = {pickled.enqueue("os.system", f"touch {marker}").id}
    expected.add(pickled.enqueue(TASK, {"v": VERSION, "account": "default", "algo_id": 7}).id)
    for name, data in strangers(marker).items():
        job = plain.create_job(TASK, args=({},), job_id=name)
        job.save()
        connection.hset(job.key, mapping={"data": data, "status": "queued"})
        connection.rpush(plain.key, job.id)
        expected.add(job.id)
    connection.hset("rq:job:no-fields-of-rq", "x", "y")
    connection.rpush(plain.key, "no-fields-of-rq", "deleted-before")
    expected.add("no-fields-of-rq")

    eventually(lambda: len(peek.ledger()) >= len(expected), what="every stranger has its outcome")
    (algo_id,) = opened(exchange, 1)
    assert client.cancel(algo_id=algo_id).wait(10).kind is OutcomeKind.CANCELLED

    ledger = [outcome for outcome in peek.ledger() if outcome.kind is not OutcomeKind.CANCELLED]
    assert Counter(outcome.id for outcome in ledger) == dict.fromkeys(expected, 1)
    assert {(o.kind, o.may_be_live, o.attempts, o.algo_id) for o in ledger} == {(OutcomeKind.REFUSED, None, (), None)}
    assert all(outcome.error and len(outcome.error) < 400 for outcome in ledger)
    assert not marker.exists()
    assert worker.process.poll() is None
    assert "Traceback" not in worker.output()
    assert exchange.stats().requests["DELETE /fapi/v1/algoOrder"] == {"200": 1}
    failed = FailedJobRegistry("cancels", connection=connection, serializer=JSONSerializer)
    assert set(failed.get_job_ids()) == expected
    assert Job.fetch("shell", connection=connection, serializer=JSONSerializer).get_status() == "failed"


def test_ids_that_rq_would_not_make(
    workers: Workers, peek: Peek, connection: redis.Redis, client: CancelClient, exchange: RunningExchange
) -> None:
    """A job whose id holds a colon or is no text at all is refused once, and does not stay in anybody's hand."""
    worker = workers.start(LEASE_S="1")
    for job_id in (b"a:b", b"\xff\xfe", b"a b\n"):
        connection.hset(b"rq:job:" + job_id, mapping={"status": "queued", "data": b"x"})
        connection.rpush("rq:queue:cancels", job_id)
    eventually(lambda: len(peek.ledger()) == 3, what="all are refused")
    time.sleep(1.5)  # longer than the lease: whatever was not settled would come back

    assert peek.kinds() == {"refused": 3}
    assert peek("ZCARD", peek.keys.leases) == 0
    (algo_id,) = opened(exchange, 1)
    assert client.cancel(algo_id=algo_id).wait(10).kind is OutcomeKind.CANCELLED
    assert "Traceback" not in worker.output()


def test_plain_rq_enqueue_is_accepted(
    workers: Workers, client: CancelClient, exchange: RunningExchange, connection: redis.Redis
) -> None:
    """A program that knows RQ alone can enqueue a cancel by the function's name."""
    workers.start()
    (algo_id,) = opened(exchange, 1)
    queue = Queue("cancels", connection=connection, serializer=JSONSerializer)

    job = queue.enqueue("worker.task.cancel_algo_order", {"v": 1, "account": "default", "algo_id": algo_id})

    assert client.wait(job.id, 10).kind is OutcomeKind.CANCELLED
    assert job.get_status() == "finished"
    assert job.return_value(refresh=True) == "cancelled"


# ---- deadlines ------------------------------------------------------------------------------------------------------


def test_overdue_request_is_never_sent(workers: Workers, client: CancelClient, exchange: RunningExchange) -> None:
    """A request whose deadline passed on the queue is recorded as overdue without a request to the exchange."""
    ids = opened(exchange, 20)
    tickets = cancel_all(client, ids, deadline_s=0.05)
    time.sleep(0.1)
    workers.start()

    found = outcomes(client, tickets)

    assert {(outcome.kind, outcome.attempts, outcome.may_be_live) for outcome in found} == {
        (OutcomeKind.OVERDUE, (), True)
    }
    assert {(entry.deletes, entry.gets) for entry in exchange.book().values()} == {(0, 0)}


def test_later_deadline_of_two_requests_holds(
    workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek
) -> None:
    """Two requests for one order share a job and the later deadline, whichever came first."""
    ids = opened(exchange, 2)
    early = [client.cancel(algo_id=ids[0], deadline_s=0.2), client.cancel(algo_id=ids[1], deadline_s=60)]
    late = [client.cancel(algo_id=ids[0], deadline_s=60), client.cancel(algo_id=ids[1], deadline_s=0.2)]
    assert [ticket.id for ticket in early] == [ticket.id for ticket in late]
    time.sleep(0.3)
    workers.start()

    assert [outcome.kind for outcome in outcomes(client, [*early, *late])] == [OutcomeKind.CANCELLED] * 4
    assert once_each(peek, early)


def test_deadline_ends_the_retries(workers: Workers, client: CancelClient, exchange: RunningExchange) -> None:
    """A request whose retries do not help ends at its own deadline, not much later."""
    workers.start(BACKOFF_CAP_MS="200")
    (algo_id,) = opened(exchange, 1)
    exchange.script_faults(algo_id, [Fault.UNAVAILABLE_503], repeat_last=True)

    outcome = client.cancel(algo_id=algo_id, deadline_s=1.5).wait(10)

    assert outcome.kind is OutcomeKind.GAVE_UP
    assert outcome.finished_at_ms - (outcome.enqueued_at_ms or 0) < 2500


# ---- stop, crash, pause ---------------------------------------------------------------------------------------------


def test_sigterm_under_load(workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek) -> None:
    """A worker that is told to stop, even twice, leaves in time; another goes on, and nobody pays an attempt for it."""
    first = workers.start(WORKER_CONCURRENCY="16", SHUTDOWN_GRACE_S="10")
    exchange.set_latency_ms(100)
    ids = opened(exchange, 300)
    tickets = cancel_all(client, ids)
    eventually(lambda: len(peek.ledger()) > 20, what="it is at work")

    began = time.monotonic()
    first.process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    assert first.stop(signal.SIGTERM) == 0
    assert time.monotonic() - began < 5
    assert 20 < len(peek.ledger()) < 300
    assert peek("ZCARD", peek.keys.leases) == 0
    workers.start()

    found = outcomes(client, tickets)
    assert {(outcome.kind, *steps(outcome)) for outcome in found} == {(OutcomeKind.CANCELLED, "confirmed")}
    assert once_each(peek, tickets)
    assert {entry.deletes for entry in exchange.book().values()} == {1}
    assert len({outcome.worker for outcome in found}) == 2


def test_request_in_flight_is_finished_before_leaving(
    workers: Workers, client: CancelClient, exchange: RunningExchange
) -> None:
    """A stop waits for the answers that are under way and records them."""
    worker = workers.start()
    exchange.set_latency_ms(700)
    (algo_id,) = opened(exchange, 1)
    ticket = client.cancel(algo_id=algo_id)
    eventually(lambda: exchange.book()[algo_id].deletes == 1, what="the request is under way")

    assert worker.stop() == 0

    outcome = client.outcome(ticket.id)
    assert outcome is not None
    assert (outcome.kind, steps(outcome)) == (OutcomeKind.CANCELLED, ["confirmed"])


def test_sigkill_under_load(workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek) -> None:
    """The jobs of a killed worker are taken over within a lease and 1.5 s; each still ends in one outcome."""
    victim = workers.start(LEASE_S="1", WORKER_CONCURRENCY="16")
    survivor = workers.start(LEASE_S="1", WORKER_CONCURRENCY="16")
    exchange.set_latency_ms(250)
    tickets = cancel_all(client, opened(exchange, 200))
    eventually(lambda: len(peek.ledger()) > 40, what="both are at work")

    killed_ms = peek.now_ms()
    victim.stop(signal.SIGKILL)
    (name,) = (event["worker"] for event in events(victim, "started"))
    orphans = [entry.split(":")[0] for entry in peek("SMEMBERS", f"rq:worker:{name}:executions")]
    assert orphans

    found = {outcome.id: outcome for outcome in outcomes(client, tickets, 30)}
    assert once_each(peek, tickets)
    assert {outcome.kind for outcome in found.values()} == {OutcomeKind.CANCELLED}
    for orphan in orphans:
        lost, *after = found[orphan].attempts
        assert (lost.verdict, lost.msg) == ("unclear", "worker lost")
        assert after[0].at_ms - killed_ms <= 1000 + 1500
    assert {event["id"] for event in events(survivor, "recovered")} >= set(orphans)
    assert {entry.deletes_effective for entry in exchange.book().values()} == {1}


def test_sigkill_of_the_only_worker(
    workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek
) -> None:
    """A worker that is killed and started again, twice in the middle of its work, loses nothing and doubles nothing."""
    exchange.set_latency_ms(50)
    tickets = cancel_all(client, opened(exchange, 200))
    for done in (30, 90):
        worker = workers.start(LEASE_S="1", WORKER_CONCURRENCY="8")
        eventually(lambda done=done: len(peek.ledger()) > done, what="it is at work")  # type: ignore[misc]
        worker.stop(signal.SIGKILL)
    workers.start(LEASE_S="1")

    assert {outcome.kind for outcome in outcomes(client, tickets, 30)} == {OutcomeKind.CANCELLED}
    assert once_each(peek, tickets)
    assert {entry.deletes_effective for entry in exchange.book().values()} == {1}


def test_paused_worker_is_fenced(workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek) -> None:
    """A worker that slept past its lease cannot record the outcome that another has recorded meanwhile."""
    sleeper = workers.start(LEASE_S="1")
    exchange.set_latency_ms(500)
    ids = opened(exchange, 8)
    tickets = cancel_all(client, ids)
    eventually(lambda: sum(entry.deletes for entry in exchange.book().values()) == 8, what="all are under way")
    sleeper.process.send_signal(signal.SIGSTOP)
    exchange.set_latency_ms(0)
    other = workers.start(LEASE_S="1")
    (name,) = (event["worker"] for event in events(other, "started"))

    found = outcomes(client, tickets)
    before = peek.ledger()
    sleeper.process.send_signal(signal.SIGCONT)

    lost = {ticket.id for ticket in tickets}
    eventually(lambda: {event["id"] for event in events(sleeper, "fenced")} == lost, what="its outcomes are refused")

    assert {(outcome.kind, outcome.worker) for outcome in found} == {(OutcomeKind.CANCELLED, name)}
    assert peek.ledger() == before
    assert once_each(peek, tickets)
    (algo_id,) = opened(exchange, 1)
    other.stop()
    assert client.cancel(algo_id=algo_id).wait(10).kind is OutcomeKind.CANCELLED  # the sleeper works again


def test_woken_worker_sends_nothing_for_a_lost_job(
    workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek
) -> None:
    """A worker that slept past its lease in the middle of a pursuit does not go on with it."""
    sleeper = workers.start(LEASE_S="1")
    (algo_id,) = opened(exchange, 1)
    exchange.script_faults(algo_id, [Fault.UNKNOWN_503_EXECUTED])
    exchange.set_latency_ms(500)
    ticket = client.cancel(algo_id=algo_id)
    eventually(lambda: exchange.book()[algo_id].deletes == 1, what="the cancel is under way")
    sleeper.process.send_signal(signal.SIGSTOP)
    exchange.set_latency_ms(0)
    workers.start(LEASE_S="1")
    assert ticket.wait(10).kind is OutcomeKind.CANCELLED
    seen = exchange.book()[algo_id]

    sleeper.process.send_signal(signal.SIGCONT)
    time.sleep(1)

    assert exchange.book()[algo_id] == seen
    assert once_each(peek, [ticket])


def test_burst_leaves_when_all_is_done(
    workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek
) -> None:
    """With --burst a worker works off queue and retries, then leaves with 0."""
    ids = opened(exchange, 30)
    for algo_id in ids[:5]:
        exchange.script_faults(algo_id, [Fault.UNAVAILABLE_503] * 3)
    tickets = cancel_all(client, ids)

    worker = workers.start("--burst", wait=False)

    assert worker.process.wait(20) == 0
    assert once_each(peek, tickets)
    assert peek.kinds() == {"cancelled": 30}


def test_burst_waits_for_the_leases_of_the_dead(
    workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek
) -> None:
    """With --burst a worker stays until a dead one's jobs have come back and are done."""
    victim = workers.start(LEASE_S="1")
    exchange.set_latency_ms(1000)
    (algo_id,) = opened(exchange, 1)
    ticket = client.cancel(algo_id=algo_id)
    eventually(lambda: exchange.book()[algo_id].deletes == 1, what="the request is under way")
    victim.stop(signal.SIGKILL)
    exchange.set_latency_ms(0)

    worker = workers.start("--burst", wait=False)

    assert worker.process.wait(20) == 0
    assert once_each(peek, [ticket])


def test_ctrl_c(workers: Workers, client: CancelClient, exchange: RunningExchange) -> None:
    """One Ctrl-C stops in order with 0; a second one leaves at once with 130 and says what it left behind."""
    calm, hasty = workers.start(LEASE_S="1"), workers.start(LEASE_S="1")
    assert calm.stop(signal.SIGINT) == 0
    exchange.set_latency_ms(3000)
    (algo_id,) = opened(exchange, 1)
    ticket = client.cancel(algo_id=algo_id)
    eventually(lambda: exchange.book()[algo_id].deletes == 1, what="the request is under way")

    hasty.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    began = time.monotonic()
    assert hasty.stop(signal.SIGINT) == 130
    assert time.monotonic() - began < 1
    assert "1 jobs in flight" in hasty.output()
    assert "Traceback" not in hasty.output()
    exchange.set_latency_ms(0)
    workers.start(LEASE_S="1")
    assert ticket.wait(10).kind is OutcomeKind.CANCELLED


# ---- bad starts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("WORKER_CONCURRENCY", "0"),
        ("LEASE_S", "soon"),
        ("CANCEL_QUEUE", "a,b"),
        ("BINANCE_BASE_URL", "http://example.com"),
        ("BINANCE_DESK_A_API_KEY", "key-without-its-secret"),
    ],
)
def test_bad_setting_stops_the_start(variable: str, value: str, workers: Workers) -> None:
    """A bad setting ends the start with 78 and a line that names the variable, and no traceback."""
    worker = workers.start(wait=False, command=(), **{variable: value})

    assert worker.process.wait(10) == 78
    assert variable in worker.output()
    assert "Traceback" not in worker.output()


def test_refused_login(new_fleet: NewFleet) -> None:
    """A login that Redis refuses ends the worker with 69, at the start and in the middle of its work."""
    with running_valkey("--requirepass", "right") as server:
        wrong = new_fleet(REDIS_URL=f"redis://:wrong-password@127.0.0.1:{server.port}/0").start(wait=False)
        none = new_fleet(REDIS_URL=server.url).start(wait=False)
        working = new_fleet(REDIS_URL=f"redis://:right@127.0.0.1:{server.port}/0")
        worker = working.start(wait=False)
        with redis.Redis(port=server.port, password="right") as connection:
            eventually(lambda: connection.scard("rq:workers"), 20, "the good one works")
            connection.config_set("requirepass", "other")
            for kind in ("normal", "pubsub"):
                connection.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
            assert worker.process.wait(15) == 69
        assert (wrong.process.wait(15), none.process.wait(15)) == (69, 69)
        for each in (wrong, none, worker):
            assert "Traceback" not in each.output()
            assert not {"wrong-password", "right@", ":right"} & set(re.split(r"[\s\"]", each.output()))
            assert "wrong-password" not in each.output()


def test_redis_comes_after_the_worker(new_fleet: NewFleet, exchange: RunningExchange, tmp_path: Path) -> None:
    """A worker that finds no Redis says so once, keeps trying, and works as soon as there is one."""
    server = Valkey(tmp_path)
    worker = new_fleet(REDIS_URL=server.url).start(wait=False)
    eventually(lambda: events(worker, "redis"), 15, "it says that Redis is away")
    time.sleep(1.6)
    assert worker.process.poll() is None
    assert [event["state"] for event in events(worker, "redis")] == ["away"]

    server.start()
    try:
        with CancelClient.from_url(server.url) as client:
            (algo_id,) = opened(exchange, 1)
            assert client.cancel(algo_id=algo_id).wait(10).kind is OutcomeKind.CANCELLED
        assert worker.stop() == 0
        assert "Traceback" not in worker.output()
    finally:
        server.stop(signal.SIGKILL)


def test_stop_while_redis_was_never_there(new_fleet: NewFleet, tmp_path: Path) -> None:
    """A worker that waits for a Redis that never comes still leaves with 0 when it is told to."""
    worker = new_fleet(REDIS_URL=Valkey(tmp_path).url, SHUTDOWN_GRACE_S="5").start(wait=False)
    eventually(lambda: events(worker, "redis"), 15, "it says that Redis is away")
    began = time.monotonic()

    assert worker.stop() == 0
    assert time.monotonic() - began < 5
    assert "Traceback" not in worker.output()
    assert events(worker, "started") == []


# ---- Redis goes and comes -------------------------------------------------------------------------------------------


def killed_for(server: Valkey, seconds: float) -> None:
    """Kill the server, and start it again on what it had written."""
    server.stop(signal.SIGKILL)
    time.sleep(seconds)
    server.start()


def test_redis_restarts_under_load(durable: Valkey, new_fleet: NewFleet, exchange: RunningExchange) -> None:
    """When a Redis with an append-only file is killed and comes back, workers live on and each request ends once."""
    fleet = new_fleet(REDIS_URL=durable.url, LEASE_S="2", WORKER_CONCURRENCY="16")
    pair = [fleet.start() for _ in range(2)]
    exchange.set_latency_ms(50)
    with CancelClient.from_url(durable.url) as client, redis.Redis(port=durable.port) as connection:
        peek = Peek(connection)
        tickets = cancel_all(client, opened(exchange, 600))
        eventually(lambda: len(peek.ledger()) > 60, what="they are at work")
        killed_for(durable, 0.7)

        found = outcomes(client, tickets, 30)
        assert {outcome.kind for outcome in found} == {OutcomeKind.CANCELLED}
        assert once_each(peek, tickets)
        assert {entry.deletes_effective for entry in exchange.book().values()} == {1}
        assert [worker.process.poll() for worker in pair] == [None, None]
        for worker in pair:
            assert worker.stop() == 0
            assert [event["state"] for event in events(worker, "redis")] == ["away", "back"]
            assert "Traceback" not in worker.output()


def test_outage_longer_than_the_lease_sends_nothing_twice(
    durable: Valkey, new_fleet: NewFleet, exchange: RunningExchange
) -> None:
    """After an outage holders settle first: a lease that ran out meanwhile is nobody's to take for two seconds."""
    fleet = new_fleet(REDIS_URL=durable.url, LEASE_S="2")
    for _ in range(2):
        fleet.start()
    exchange.set_latency_ms(3000)
    with CancelClient.from_url(durable.url) as client, redis.Redis(port=durable.port) as connection:
        tickets = cancel_all(client, opened(exchange, 40))
        eventually(lambda: sum(entry.deletes for entry in exchange.book().values()) == 40, what="all are under way")
        killed_for(durable, 2.1)
        tickets += cancel_all(client, opened(exchange, 10))  # who claims these may see the leases that ran out

        found = outcomes(client, tickets, 30)
        assert {(outcome.kind, *steps(outcome)) for outcome in found} == {(OutcomeKind.CANCELLED, "confirmed")}
        assert once_each(Peek(connection), tickets)
        assert {entry.deletes for entry in exchange.book().values()} == {1}


def test_stop_while_redis_is_away(durable: Valkey, new_fleet: NewFleet, exchange: RunningExchange) -> None:
    """A worker that is told to stop during an outage leaves within its grace, whatever it still holds."""
    worker = new_fleet(REDIS_URL=durable.url, LEASE_S="1", SHUTDOWN_GRACE_S="4", WORKER_CONCURRENCY="2").start()
    exchange.set_latency_ms(400)
    with CancelClient.from_url(durable.url) as client, redis.Redis(port=durable.port) as connection:
        tickets = cancel_all(client, opened(exchange, 20))
        eventually(lambda: len(Peek(connection).ledger()) > 2, what="it is at work")
        durable.stop(signal.SIGKILL)
        began = time.monotonic()
        assert worker.stop() == 0
        assert time.monotonic() - began < 4.5
        assert "Traceback" not in worker.output()
        durable.start()
        new_fleet(REDIS_URL=durable.url, LEASE_S="1").start()
        assert {outcome.kind for outcome in outcomes(client, tickets)} == {OutcomeKind.CANCELLED}
        assert once_each(Peek(connection), tickets)


def test_stop_with_unstarted_jobs_while_redis_is_away(
    durable: Valkey, new_fleet: NewFleet, exchange: RunningExchange
) -> None:
    """Jobs that were claimed and not begun do not keep a worker that has no Redis to hand them back to."""
    fleet = new_fleet(REDIS_URL=durable.url, LEASE_S="1", SHUTDOWN_GRACE_S="4", WORKER_CONCURRENCY="1")
    worker = fleet.start(BACKOFF_BASE_MS="1500", BACKOFF_CAP_MS="1500")
    with CancelClient.from_url(durable.url) as client, redis.Redis(port=durable.port) as connection:
        one, two = opened(exchange, 2)
        exchange.script_faults(one, [Fault.UNAVAILABLE_503])
        tickets = cancel_all(client, [one])
        eventually(lambda: events(worker, "again"), what="the first try was refused")
        exchange.set_latency_ms(1500)
        eventually(lambda: exchange.book()[one].deletes == 2, what="the only slot is taken by the retry")
        tickets += cancel_all(client, [two])
        peek = Peek(connection)
        eventually(lambda: peek.job(tickets[1].id)["status"] == "started", 1.3, "the next job is claimed already")
        durable.stop(signal.SIGKILL)
        began = time.monotonic()

        assert worker.stop() == 0
        assert time.monotonic() - began < 4.5
        durable.start()
        exchange.set_latency_ms(0)
        fleet.start()
        assert {outcome.kind for outcome in outcomes(client, tickets)} == {OutcomeKind.CANCELLED}


def test_emptied_redis_is_served_again(
    workers: Workers, client: CancelClient, exchange: RunningExchange, connection: redis.Redis
) -> None:
    """A worker whose Redis lost all its data registers again and serves what is enqueued from then on."""
    worker = workers.start(LEASE_S="1")
    connection.flushall()
    (algo_id,) = opened(exchange, 1)

    assert client.cancel(algo_id=algo_id).wait(10).kind is OutcomeKind.CANCELLED
    eventually(lambda: connection.scard("rq:workers") == 1, 5, "it is registered again")
    assert worker.stop() == 0


def test_two_queues_do_not_meet(
    workers: Workers, valkey: Valkey, client: CancelClient, exchange: RunningExchange
) -> None:
    """A worker serves its own queue alone, under the keys of that queue."""
    workers.start("--queue", "desk-a")
    one, two = opened(exchange, 2)
    with CancelClient.from_url(valkey.url, queue="desk-a") as other:
        foreign = client.cancel(algo_id=one)
        assert other.cancel(algo_id=two).wait(10).kind is OutcomeKind.CANCELLED
        assert client.outcome(foreign.id) is None
        assert [outcome.algo_id for _, outcome in other.outcomes()] == [two]
        assert list(client.outcomes()) == []


def test_idle_worker_costs_next_to_nothing(workers: Workers, connection: redis.Redis) -> None:
    """A worker without work sends Redis a handful of commands a second and uses little of a core."""
    worker = workers.start()
    before, began = cpu_s(worker), time.monotonic()
    connection.config_resetstat()
    time.sleep(1.5)
    commands = connection.info("stats")["total_commands_processed"]
    seconds = time.monotonic() - began
    assert commands / seconds < 40
    assert (cpu_s(worker) - before) / seconds < 0.2


def cpu_s(worker: Worker) -> float:
    """Processor time that the process has used, s."""
    fields = Path(f"/proc/{worker.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
