"""All open orders of a symbol: real workers, a real Valkey, a real exchange over HTTP."""

from __future__ import annotations

import json
import re
import signal
import time
from typing import Any

import pytest
import redis

from producer import CancelClient, InvalidRequest, OpenOutcome, OutcomeKind, UnknownRequest, WaitTimeout
from tests.orders import PROVEN_S
from tests.servers import Peek, Valkey, Workers, eventually, python, stopped
from worker.sandbox.control import RunningExchange
from worker.sandbox.faults import Fault

LIST_CALL = "GET /fapi/v1/openAlgoOrders"


def opened(exchange: RunningExchange, count: int, symbol: str = "BTCUSDT", **how: Any) -> list[int]:
    """Orders that are provably older than what comes next."""
    ids = [order.algo_id for order in exchange.add_orders(count, symbol=symbol, **how)] if count else []
    time.sleep(PROVEN_S)
    return ids


def statuses(exchange: RunningExchange, ids: list[int]) -> set[str]:
    """Their states in the book."""
    return {str(entry.status) for entry in exchange.book(ids).values()} if ids else set()


def agrees(exchange: RunningExchange, outcome: OpenOutcome, before: list[int], later: list[int]) -> None:
    """Each order that was open is off the book or told as one that may be live; none that came later was touched."""
    book, rows = exchange.book(), {order.algo_id: order for order in outcome.orders}
    for algo_id in before:
        is_gone = book[algo_id].status in ("CANCELED", "EXPIRED", "REJECTED")
        assert algo_id in rows, outcome
        assert is_gone or rows[algo_id].may_be_live, (algo_id, book[algo_id], rows[algo_id])
        assert rows[algo_id].may_be_live or is_gone or book[algo_id].child is not None
    assert not set(rows) & set(later)
    assert {book[algo_id].deletes for algo_id in later} <= {0}
    assert outcome.may_be_live == any(row.may_be_live for row in rows.values()) or outcome.left_alone


@pytest.mark.parametrize("count", [0, 1, 200])
def test_what_was_open_is_cancelled(
    workers: Workers, client: CancelClient, exchange: RunningExchange, count: int
) -> None:
    """Each order of the symbol that was open is cancelled and told; other symbols, and what comes later, stay."""
    workers.start()
    ids, others = opened(exchange, count), opened(exchange, 3, "ETHUSDT")

    ticket = client.cancel_open("BTCUSDT", tag="desk")
    time.sleep(PROVEN_S)
    later = opened(exchange, 1)
    outcome = ticket.wait(60)

    assert outcome.kind == ("cancelled" if count else "listed")
    assert sorted(order.algo_id for order in outcome.orders) == sorted(ids)
    assert (outcome.may_be_live, outcome.off_the_book, outcome.left_alone) == (False, True, ())
    assert outcome.listings == 2
    assert statuses(exchange, ids) == ({"CANCELED"} if count else set())
    assert statuses(exchange, others + later) == {"NEW"}
    found = client.outcomes_of(order.id for order in outcome.orders)
    assert {(each.symbol, each.tag) for each in found.values()} <= {("BTCUSDT", "desk")}
    assert ticket.wait(60) == outcome


def test_a_symbol_that_the_exchange_does_not_know_is_refused(workers: Workers, client: CancelClient) -> None:
    """It is no symbol without open orders: the outcome says the exchange's words, and that nothing is known."""
    workers.start()

    outcome = client.cancel_open("NOSUCHUSDT").wait(30)

    assert (outcome.kind, outcome.orders, outcome.may_be_live) == ("refused", (), True)
    assert "Invalid symbol." in str(outcome.error)


def test_a_worker_killed_between_list_and_completion(
    valkey: Valkey, workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek
) -> None:
    """Killed when the orders were listed and nothing was recorded, or its last words were lost, it leaves a listing
    that the next worker does once more, for the moment of the request."""
    victim = workers.start(LEASE_S="2")
    before = opened(exchange, 3)
    exchange.set_latency_ms(400)
    ticket = client.cancel_open("BTCUSDT")
    time.sleep(PROVEN_S)
    later = opened(exchange, 1)
    eventually(lambda: LIST_CALL in exchange.stats().requests, what="the listing has come")
    with stopped(valkey):
        time.sleep(0.8)  # the answer comes while Redis hears nobody
        victim.process.send_signal(signal.SIGKILL)
        victim.process.wait()
    exchange.set_latency_ms(0)
    workers.start(LEASE_S="2")

    outcome = ticket.wait(60)

    assert outcome.kind is OutcomeKind.CANCELLED
    agrees(exchange, outcome, before, later)
    assert [each.id for each in peek.ledger()].count(ticket.id) == 1
    assert {entry.deletes for entry in exchange.book(before).values()} == {1}


def test_a_list_that_is_not_answered_is_asked_for_again(
    workers: Workers, client: CancelClient, exchange: RunningExchange
) -> None:
    """A silent exchange, and one that calls our clock wrong, cost the listing time and nothing else: it leaves no
    doubt, and means the orders of its own moment."""
    workers.start(BINANCE_RECV_WINDOW_MS="1000")
    before = opened(exchange, 3)
    exchange.process.send_signal(signal.SIGSTOP)
    ticket = client.cancel_open("BTCUSDT")
    time.sleep(2)  # longer than an attempt may take
    exchange.process.send_signal(signal.SIGCONT)
    exchange.set_clock_skew_ms(5_000)
    later = opened(exchange, 2)

    outcome = ticket.wait(60)

    listing = client.outcome(ticket)
    assert listing is not None
    assert (listing.kind, {attempt.call for attempt in listing.attempts}) == (OutcomeKind.LISTED, {"list_open"})
    assert "unclear" in {attempt.verdict for attempt in listing.attempts}
    assert outcome.kind is OutcomeKind.CANCELLED
    agrees(exchange, outcome, before, later)


def test_a_retry_of_a_failed_listing_means_the_same_moment(
    workers: Workers, client: CancelClient, exchange: RunningExchange
) -> None:
    """Behind a closed gate it fails, and nothing was listed; a retry leaves alone what was opened since."""
    workers.start()
    before = opened(exchange, 2)
    exchange.start_incident(Fault.LIMITED_429, duration_ms=3_000)
    ticket = client.cancel_open("BTCUSDT", deadline_s=1)

    failed = ticket.wait(60)

    assert failed.kind in (OutcomeKind.GAVE_UP, OutcomeKind.OVERDUE)
    assert (failed.may_be_live, failed.off_the_book, failed.orders, failed.listings) == (True, False, (), 1)
    assert failed.error
    later = opened(exchange, 2)
    assert statuses(exchange, before + later) == {"NEW"}
    time.sleep(3)
    assert client.retry([ticket]) == [ticket.id]
    outcome = ticket.wait(60)
    agrees(exchange, outcome, before, later)
    assert statuses(exchange, before) <= {"CANCELED", "NEW"}


def test_what_triggers_meanwhile_is_told(workers: Workers, client: CancelClient, exchange: RunningExchange) -> None:
    """The worst row decides, and each order is told as that of any other request."""
    workers.start()
    resting, gone = opened(exchange, 2, order_type="STOP", price="9000")
    exchange.script_faults(resting, [Fault.TRIGGERED_BEFORE])

    outcome = client.cancel_open("BTCUSDT").wait(60)

    rows = {order.algo_id: order for order in outcome.orders}
    assert (outcome.kind, outcome.may_be_live, outcome.off_the_book) == (OutcomeKind.TRIGGERED, True, False)
    assert rows[gone].kind is OutcomeKind.CANCELLED
    assert (rows[resting].kind, rows[resting].may_be_live) == (OutcomeKind.TRIGGERED, True)
    assert rows[resting].actual_order_id


def test_a_stock_worker_does_it_too(workers: Workers, client: CancelClient, exchange: RunningExchange) -> None:
    """`rq worker` lists the orders and cancels each, as ours does."""
    workers.start_stock()
    before = opened(exchange, 3)

    outcome = client.cancel_open("BTCUSDT").wait(120)

    assert outcome.kind is OutcomeKind.CANCELLED
    agrees(exchange, outcome, before, [])


def test_an_account_that_no_worker_has_is_refused(workers: Workers, client: CancelClient) -> None:
    """Nothing is known of its orders then."""
    workers.start()

    outcome = client.cancel_open("BTCUSDT", account="nobody").wait(30)

    assert (outcome.kind, outcome.may_be_live, outcome.off_the_book) == (OutcomeKind.REFUSED, True, False)
    assert "nobody" in (outcome.error or "")


def test_waiting_for_what_stands(client: CancelClient, workers: Workers, exchange: RunningExchange) -> None:
    """The time-out says what stands and what is known; the same ticket can be waited for again, makes no further
    listings, and other waits refuse it clearly."""
    before = opened(exchange, 2)
    ticket = client.cancel_open("BTCUSDT")

    with pytest.raises(WaitTimeout, match=r"list of open orders of BTCUSDT stands.*NO LIVE WORKER") as told:
        ticket.wait(0)
    assert (told.value.so_far.kind, told.value.so_far.may_be_live, told.value.is_served) == (None, True, False)
    with pytest.raises(InvalidRequest, match="wait for it alone"):
        client.wait_many([ticket])  # type: ignore[list-item]
    workers.start()
    outcome = eventually(lambda: _ended(client, ticket), 60)
    assert isinstance(outcome, OpenOutcome)
    agrees(exchange, outcome, before, [])
    assert exchange.stats().requests[LIST_CALL] == {"200": 2}
    client._redis.delete(client.keys.outcome_prefix + ticket.id, client.keys.job_prefix + ticket.id)
    with pytest.raises(UnknownRequest):
        ticket.wait(5)


def _ended(client: CancelClient, ticket: object) -> OpenOutcome | None:
    try:
        return client.wait(ticket, 0)  # type: ignore[call-overload, no-any-return]
    except WaitTimeout:
        return None


def test_the_command_line_prints_one_object(
    valkey: Valkey, workers: Workers, exchange: RunningExchange, client: CancelClient
) -> None:
    """--json gives one object with a row for each order; where none was seen nothing is called cancelled. Later
    `outcome` of its id follows the orders that were listed."""
    asked = ("-m", "producer", "cancel-open", "--symbol", "BTCUSDT", "--redis-url", valkey.url)
    waiting = python(*asked, "--wait", "0", "--json")
    assert (waiting.returncode, json.loads(waiting.stdout)["kind"]) == (3, None)
    bare = python(*asked)
    assert (bare.returncode, len(bare.stdout.split())) == (0, 1)
    assert "removes protection" in bare.stderr
    workers.start()
    eventually(lambda: client.outcome(bare.stdout.strip()))
    before = opened(exchange, 2)

    done = python(*asked, "--wait", "30", "--json")

    told = json.loads(done.stdout)
    assert (done.returncode, told["kind"], told["may_be_live"]) == (0, "cancelled", False)
    names = {"algo_id", "id", "kind", "order_status", "actual_order_id", "may_be_live", "off_the_book"}
    assert [set(row) for row in told["orders"]] == [names, names]
    assert sorted(row["algo_id"] for row in told["orders"]) == sorted(before)
    look = ("-m", "producer", "outcome", "--redis-url", valkey.url, told["id"])
    seen = python(*look, "--json")
    later = json.loads(seen.stdout)
    assert (later["kind"], later["may_be_live"], later["off_the_book"]) == ("listed", True, False)
    assert later["orders"] == told["orders"]
    assert (seen.returncode, "a list may lag" in seen.stderr) == (1, True)
    shown = python(*look)
    first, *rows = (re.split(r" {2,}", line) for line in shown.stdout.splitlines())
    assert (shown.returncode, first[2:4]) == (1, ["listed", "MAY BE LIVE"])
    assert sorted(row[1:4] for row in rows) == [[f"algo_id={each}", "cancelled", "not live"] for each in sorted(before)]
    client.job(told["orders"][0]["id"]).delete()
    with redis.Redis.from_url(valkey.url) as connection:
        connection.delete(client.keys.outcome_prefix + told["orders"][0]["id"])
    gone = python(*look)
    assert (gone.returncode, "MAY BE LIVE" in gone.stdout.splitlines()[0]) == (1, True)
    nothing = python(*asked, "--wait", "30")
    assert (nothing.returncode, "0 orders seen" in nothing.stdout) == (0, True)
    assert "cancelled" not in nothing.stdout
    empty = python("-m", "producer", "cancel-open", "--symbol", "", "--redis-url", valkey.url)
    assert (empty.returncode, "symbol=''" in empty.stderr) == (2, True)
