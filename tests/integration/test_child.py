"""The child of a triggered order: what is told of it, and what cancels it. Real workers, a real exchange over HTTP."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from producer import CancelClient, CancelRequest, Outcome, OutcomeKind
from producer.message import OnTrigger
from tests.orders import outcomes
from tests.servers import Peek, Workers, eventually
from worker.sandbox.control import ChildEntry, RunningExchange
from worker.sandbox.faults import Fault

CHILD, REPORT = OnTrigger.CANCEL_CHILD, OnTrigger.REPORT
#: Bounds that let a test see the end of what never ends.
QUICK: dict[str, Any] = {"BINANCE_RECV_WINDOW_MS": "1000", "BACKOFF_CAP_MS": "100", "NOT_FOUND_HORIZON_S": "1"}


@dataclass(frozen=True)
class Case:
    """A triggered order whose child rests, and what is to be recorded of it."""

    name: str
    kind: str
    child_status: str | None
    cancelled: bool | None
    on_trigger: OnTrigger = CHILD
    cancels: list[Fault | None] = field(default_factory=list)  # met by the child's DELETEs
    queries: list[Fault | None] = field(default_factory=list)  # met by its GETs
    filled: str | None = None  # so much of it, before the request
    ended: str | None = None  # so it ended, before the request
    deadline_s: float | None = None
    times: dict[str, int] = field(default_factory=dict)
    executed: str | None = "0"
    deletes: int | None = None  # of the child; None: any number
    is_off_the_book: bool = False

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("reported", "triggered", "NEW", None, REPORT, deletes=0),
    Case("reported, partly filled", "triggered", "PARTIALLY_FILLED", None, REPORT, filled="0.004", executed="0.004"),
    Case("reported, filled", "triggered", "FILLED", False, REPORT, filled="0.01", executed="0.01", deletes=0),
    Case("reported, cancelled", "triggered", "CANCELED", False, REPORT, ended="CANCELED", is_off_the_book=True),
    Case("reported, not told", "triggered", None, None, REPORT, queries=[Fault.DROP_BEFORE], executed=None),
    Case("reported, not there yet", "triggered", None, None, REPORT, times={"child_after_ms": 60_000}, executed=None),
    Case("reported, named late", "triggered", "NEW", None, REPORT, times={"id_after_ms": 60}, deletes=0),
    Case("cancelled", "triggered", "CANCELED", True, deletes=1, is_off_the_book=True),
    Case("filled before", "triggered", "FILLED", False, filled="0.01", executed="0.01", deletes=0),
    Case("filled at the last moment", "triggered", "FILLED", False, cancels=[Fault.FILLED_BEFORE], executed="0.01"),
    Case("partly filled", "triggered", "CANCELED", True, filled="0.004", executed="0.004", deletes=1),
    Case(
        "partly filled meanwhile",
        "triggered",
        "CANCELED",
        True,
        cancels=[Fault.PARTLY_FILLED_BEFORE],
        executed="0.005",
        deletes=1,
    ),
    Case("expired", "triggered", "EXPIRED", False, ended="EXPIRED", deletes=0, is_off_the_book=True),
    Case("expired in match", "triggered", "EXPIRED_IN_MATCH", False, cancels=[Fault.MATCH_EXPIRED_BEFORE], deletes=1),
    Case("rejected", "triggered", "REJECTED", False, ended="REJECTED", deletes=0, is_off_the_book=True),
    Case("cancelled by others", "triggered", "CANCELED", False, cancels=[Fault.CANCELLED_BEFORE], deletes=1),
    Case("answer lost, done", "triggered", "CANCELED", True, cancels=[Fault.DROP_AFTER], deletes=1),
    Case("answer lost, not done", "triggered", "CANCELED", True, cancels=[Fault.DROP_BEFORE], deletes=2),
    Case("never answered, done", "triggered", "CANCELED", True, cancels=[Fault.ANSWER_LATE], deletes=1),
    Case("wrong order's answer", "triggered", "CANCELED", True, cancels=[Fault.WRONG_ID_200], deletes=2),
    Case("false -2011", "triggered", "CANCELED", True, cancels=[Fault.FALSE_2011], deletes=2),
    Case("state unknown to us", "triggered", "CANCELED", True, queries=[Fault.UNKNOWN_STATUS_200], deletes=1),
    Case("not there yet", "triggered", "CANCELED", True, times={"child_after_ms": 300}, deletes=1),
    Case("named late", "triggered", "CANCELED", True, times={"id_after_ms": 1_000}, deletes=1),
    Case("never there", "gave_up", None, None, times={"child_after_ms": 600_000}, executed=None, deletes=0),
    Case("never named", "gave_up", None, None, times={"id_after_ms": 600_000}, executed=None, deletes=0, deadline_s=2),
    Case("not allowed", "refused", "NEW", None, cancels=[Fault.DISABLED_2011], deletes=1),
]


def child_of(exchange: RunningExchange, algo_id: int) -> ChildEntry:
    """The child as the book has it."""
    child = exchange.book([algo_id])[algo_id].child
    assert child is not None
    return child


def triggered(exchange: RunningExchange, case: Case) -> int:
    """An order that has triggered as the case says."""
    algo_id = exchange.add_orders(order_type="STOP", price="9000")[0].algo_id
    exchange.trigger(algo_id, **case.times)
    if case.filled:
        exchange.fill(algo_id, case.filled, "9100")
    if case.ended:
        exchange.end_child(algo_id, case.ended)
    for call, faults in (("cancel_child", case.cancels), ("query_child", case.queries)):
        if faults:
            exchange.script_faults(algo_id, faults, call=call)
    return algo_id


def agrees(case: Case, outcome: Outcome, child: ChildEntry) -> None:
    """The record says what the book has, and nothing more."""
    assert outcome.kind == case.kind, (case.name, outcome)
    told = (outcome.child_status, outcome.child_cancelled)
    assert told == (case.child_status, case.cancelled) or outcome.kind != "triggered", (case.name, outcome)
    assert outcome.child_executed_qty == case.executed, (case.name, outcome)
    assert outcome.child_status in (None, child.status), case.name
    assert case.deletes in (None, child.deletes), (case.name, child)
    if outcome.child_executed_qty not in (None, "0"):
        assert float(outcome.child_avg_price or 0) == float(child.avg_price), (case.name, outcome)
    assert outcome.may_be_live is (
        outcome.child_status not in ("FILLED", "CANCELED", "EXPIRED", "EXPIRED_IN_MATCH", "REJECTED")
    )
    is_gone = outcome.child_status in ("CANCELED", "EXPIRED", "EXPIRED_IN_MATCH", "REJECTED") and case.executed == "0"
    assert outcome.off_the_book is is_gone, case.name
    assert not any(attempt.call in ("cancel_child", "query_child") for attempt in outcome.attempts)


def test_a_child_is_told_and_cancelled_as_the_book_has_it(
    workers: Workers, client: CancelClient, exchange: RunningExchange
) -> None:
    """Whatever became of the child and whatever is answered about it, the record is true, and a child is cancelled only
    where that was asked for; a child that may be live is never told as gone."""
    workers.start(**QUICK)
    ids = [triggered(exchange, case) for case in CASES]
    requests = [
        CancelRequest(algo_id=algo_id, on_trigger=case.on_trigger, deadline_s=case.deadline_s)
        for algo_id, case in zip(ids, CASES, strict=True)
    ]

    found = outcomes(client, client.cancel_many(requests), 40)

    for algo_id, case, outcome in zip(ids, CASES, found, strict=True):
        agrees(case, outcome, child_of(exchange, algo_id))


def test_a_failed_request_goes_on_with_the_child(
    workers: Workers, client: CancelClient, exchange: RunningExchange
) -> None:
    """A retry of a request whose child could not be cancelled cancels the child."""
    workers.start(**QUICK)
    algo_id = triggered(exchange, Case("", "", None, None, cancels=[Fault.DISABLED_2011]))
    ticket = client.cancel(algo_id=algo_id, on_trigger="cancel_child")
    assert ticket.wait(20).kind is OutcomeKind.REFUSED

    client.retry([ticket.id])

    outcome = ticket.wait(20)
    assert (outcome.kind, outcome.child_cancelled) == (OutcomeKind.TRIGGERED, True), outcome
    assert child_of(exchange, algo_id).status == "CANCELED"


@pytest.mark.parametrize("first", [REPORT, CHILD])
def test_who_joins_may_want_the_child_cancelled(
    workers: Workers, client: CancelClient, exchange: RunningExchange, first: OnTrigger
) -> None:
    """Of requests that share a job one that wants the child cancelled wins over those that do not, also while the order
    is in hand."""
    exchange.set_latency_ms(300)
    algo_id = triggered(exchange, Case("", "", None, None))
    workers.start()
    ticket = client.cancel(algo_id=algo_id, on_trigger=first)
    eventually(lambda: exchange.book([algo_id])[algo_id].gets == 1, 20, "the worker has it in hand")

    joined = client.cancel(algo_id=algo_id, on_trigger=CHILD if first is REPORT else REPORT)

    assert joined.id == ticket.id
    outcome = joined.wait(20)
    assert (outcome.kind, outcome.child_cancelled, outcome.run) == (OutcomeKind.TRIGGERED, True, 1)
    assert child_of(exchange, algo_id).status == "CANCELED"


def test_a_child_that_is_seen_at_the_deadline_is_cancelled_once(
    workers: Workers, client: CancelClient, exchange: RunningExchange
) -> None:
    """However late a child shows, it gets a cancel and a look at what came of it."""
    workers.start(**QUICK)
    algo_id = exchange.add_orders(order_type="STOP", price="9000")[0].algo_id
    exchange.trigger(algo_id, triggered_after_ms=1_900)
    exchange.script_faults(algo_id, [Fault.DROP_AFTER], call="cancel_child")

    outcome = client.cancel(algo_id=algo_id, on_trigger="cancel_child", deadline_s=2).wait(20)

    assert (outcome.kind, outcome.child_status, outcome.child_cancelled) == ("triggered", "CANCELED", True)
    assert child_of(exchange, algo_id).deletes == 1


def test_a_child_that_stays_is_named(workers: Workers, client: CancelClient, exchange: RunningExchange) -> None:
    """What ends at its deadline with a child that nothing cancels tells which order that is."""
    workers.start()
    algo_id = exchange.add_orders(order_type="STOP", price="9000")[0].algo_id
    exchange.trigger(algo_id)
    exchange.script_faults(algo_id, [Fault.BAD_GATEWAY_502] * 200, call="cancel_child")

    outcome = client.cancel(algo_id=algo_id, on_trigger="cancel_child", deadline_s=3).wait(30)

    assert (outcome.kind.failed, outcome.order_status) == (True, "TRIGGERED")
    assert outcome.actual_order_id == str(child_of(exchange, algo_id).order_id)
    assert (outcome.child_status, outcome.child_executed_qty) == ("NEW", "0")
    assert "child" in (outcome.error or "")


@pytest.mark.parametrize("call", ["cancel_child", "query_child"])
def test_a_worker_that_is_killed_leaves_the_child_to_the_next(
    workers: Workers, client: CancelClient, exchange: RunningExchange, peek: Peek, call: str
) -> None:
    """A worker killed between its calls about a child costs a lease; the next one looks, and cancels what is live."""
    silence = Fault.EXECUTE_LATE if call == "cancel_child" else Fault.DROP_BEFORE
    algo_id = triggered(exchange, Case("", "", None, None))
    exchange.script_faults(algo_id, [silence], call=call)
    exchange.set_latency_ms(200)
    first = workers.start(LEASE_S="5")
    ticket = client.cancel(algo_id=algo_id, on_trigger="cancel_child")

    def is_asked() -> bool:
        child = child_of(exchange, algo_id)
        return (child.deletes if call == "cancel_child" else child.gets) > 0

    eventually(is_asked, 20, "the call is out")
    first.stop(signal.SIGKILL)
    workers.start(LEASE_S="5")

    outcome = ticket.wait(30)
    assert (outcome.kind, outcome.child_status) == ("triggered", "CANCELED")
    assert outcome.child_cancelled in (True, None)  # whose cancel it was is not known where the first one's was lost
    assert [each.id for each in peek.ledger()] == [ticket.id]


def test_an_order_that_triggers_under_the_cancel_takes_its_child_with_it(
    workers: Workers, client: CancelClient, exchange: RunningExchange
) -> None:
    """Triggers at every moment (while the request waits, between the cancel and its answer, just after) leave no live
    child behind, and what was cancelled before it could trigger has none."""
    moments = (None, 0, 1, 3, 10, 30, 100, 300)
    ids = [exchange.add_orders(order_type="STOP", price="9000")[0].algo_id for _ in moments * 4]
    exchange.set_latency_ms(20)
    for algo_id, after_ms in zip(ids, moments * 4, strict=True):
        if after_ms is not None:
            exchange.trigger(
                algo_id, triggered_after_ms=after_ms, child_after_ms=after_ms % 7, id_after_ms=after_ms % 5
            )
    tickets = client.cancel_many([CancelRequest(algo_id=algo_id, on_trigger="cancel_child") for algo_id in ids])
    time.sleep(0.05)
    workers.start()

    found = outcomes(client, tickets, 30)

    book = exchange.book(ids)
    for algo_id, outcome in zip(ids, found, strict=True):
        child = book[algo_id].child
        if child is None:
            assert (outcome.kind, book[algo_id].status) == (OutcomeKind.CANCELLED, "CANCELED")
        else:
            told = (outcome.kind, outcome.child_status, outcome.actual_order_id, outcome.child_cancelled)
            assert told == (OutcomeKind.TRIGGERED, "CANCELED", child.order_id, True)
            assert child.status == "CANCELED"
