"""Worker processes against a real Redis and a real exchange: what is sent, and what is recorded of it."""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from pathlib import Path

import redis

from producer import CancelClient, OutcomeKind
from tests.integration.conftest import NewFleet
from tests.orders import PROVEN_S, cancel_all, once_each, opened, outcomes, steps
from tests.servers import WORKER, Peek, Valkey, Worker, Workers, eventually
from worker.sandbox.control import ExchangeConfig, RunningExchange, start_exchange
from worker.sandbox.faults import Fault


def test_what_is_never_used_is_not_loaded(workers: Workers) -> None:
    """A worker does without the tables by which requests guesses encodings, and nothing is said of that."""
    worker = workers.start(command=WORKER)

    assert "charset_normalizer" not in Path(f"/proc/{worker.process.pid}/maps").read_text("utf-8")
    assert "Warning" not in worker.output()


def test_a_cancel_costs_one_claim_and_one_completion(
    workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek
) -> None:
    """Of an idle worker each cancel costs one claim and one completion, beside what each second costs."""
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


EDGE_SAID = ["busy", "busy", "confirmed"]
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
    ("overloaded fifty times", [Fault.UNAVAILABLE_503] * 50, [], OutcomeKind.CANCELLED, ["busy"] * 50 + ["confirmed"]),
    ("404 and 405 of an edge", [Fault.PATH_404, Fault.METHOD_405], [], OutcomeKind.CANCELLED, EDGE_SAID),
    ("401 of an edge", [Fault.LOGIN_401] * 2, [], OutcomeKind.CANCELLED, EDGE_SAID),
    ("404 to a query", [Fault.DROP_AFTER], [Fault.PATH_404, None], OutcomeKind.CANCELLED, None),
    ("maintenance", [Fault.MAINTENANCE_2011] * 2, [], OutcomeKind.CANCELLED, EDGE_SAID),
    ("-2008", [Fault.KEY_ID_2008], [], OutcomeKind.REFUSED, ["key_refused"]),
    ("compressed", [Fault.GZIP], [], OutcomeKind.CANCELLED, ["confirmed"]),
    ("a late book", [Fault.LATE_BOOK], [], OutcomeKind.CANCELLED, None),
    ("overload that names a time", [Fault.RETRY_AFTER_503], [], OutcomeKind.CANCELLED, ["busy", "confirmed"]),
]


def test_verification_tells_what_became_of_each_order(
    workers: Workers, client: CancelClient, exchange: RunningExchange
) -> None:
    """Whatever the exchange answers, the outcome names what the order's state proves, with every attempt on record."""
    workers.start(BINANCE_RECV_WINDOW_MS="1000", BACKOFF_CAP_MS="100", CANCEL_MAX_ATTEMPTS="6", NOT_FOUND_HORIZON_S="1")
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
    """An order that is unknown to two cancels and to every query until the horizon is not found: it may be live."""
    workers.start(NOT_FOUND_HORIZON_S="0.5", BACKOFF_CAP_MS="200")

    outcome = client.cancel(algo_id=7).wait(10)

    assert (outcome.kind, outcome.may_be_live) == (OutcomeKind.NOT_FOUND, True)
    assert set(steps(outcome)) == {"no_such_order"}
    first, *_, again, last = outcome.attempts
    assert (first.call, again.call, last.call) == ("cancel", "cancel", "query")
    assert again.at_ms + 1 - first.at_ms >= 500


def test_region_that_the_edge_refuses(workers: Workers, client: CancelClient, exchange: RunningExchange) -> None:
    """A 451 is the edge's word about the address: everybody waits a second and looks again."""
    workers.start(CANCEL_MAX_ATTEMPTS="1")
    (algo_id,) = opened(exchange, 1)
    exchange.script_faults(algo_id, [Fault.REGION_451] * 2)

    outcome = client.cancel(algo_id=algo_id).wait(20)

    assert steps(outcome) == ["blocked", "blocked", "confirmed"]
    times_ms = [attempt.at_ms for attempt in outcome.attempts]
    assert all(later - earlier >= 1_000 for earlier, later in itertools.pairwise(times_ms))


def test_fresh_client_id_is_cancelled_directly(
    workers: Workers, client: CancelClient, exchange: RunningExchange
) -> None:
    """A request by client id that has just been made needs no look-up before its cancel."""
    workers.start()
    (order,) = exchange.add_orders(client_algo_ids=["stop-1"])

    outcome = client.cancel(client_algo_id="stop-1").wait(10)

    assert (outcome.kind, outcome.algo_id, steps(outcome)) == (OutcomeKind.CANCELLED, order.algo_id, ["confirmed"])


def test_retry_goes_by_algo_id(workers: Workers, client: CancelClient, exchange: RunningExchange) -> None:
    """Once a client id is pinned to its order, a retry never touches another order that bears the same id by then."""
    (order,) = exchange.add_orders(client_algo_ids=["stop-1"])
    time.sleep(PROVEN_S)
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


def test_retry_by_client_id_leaves_a_newer_order_alone(
    workers: Workers, client: CancelClient, exchange: RunningExchange
) -> None:
    """A retried request means the order that had the client id when it was first made, not one that has it now."""
    (order,) = exchange.add_orders(client_algo_ids=["stop-1"])
    time.sleep(PROVEN_S)
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
