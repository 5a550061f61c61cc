"""The doubles of the clients: how they are scripted, what they remember, that they cannot drift from the clients."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from producer import (
    AsyncCancelClient,
    CancelClient,
    CancelRequest,
    InvalidRequest,
    Outcome,
    OutcomeKind,
    QueueUnavailable,
    WaitTimeout,
)
from producer.message import decode_outcome, may_be_live
from producer.testing import AsyncFakeCancelClient, FakeCancelClient
from tests.servers import eventually
from worker.classify import Means

#: What can become of an order; a listing is of many.
OF_AN_ORDER = [kind for kind in OutcomeKind if kind is not OutcomeKind.LISTED]
PAIRS = [(FakeCancelClient, CancelClient), (AsyncFakeCancelClient, AsyncCancelClient)]


@pytest.fixture
def fake() -> FakeCancelClient:
    """A double without a script."""
    return FakeCancelClient()


# ---- it is what it stands for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("double", "client"), PAIRS)
def test_signatures_are_the_same(double: type[Any], client: type[Any]) -> None:
    """Every public method of a client is there with the same parameters, defaults and types."""
    names = [name for name, value in inspect.getmembers(client, callable) if not name.startswith("_")]
    assert {"cancel", "cancel_many", "wait", "outcome", "outcomes", "retry", "status", "from_url", "close"} <= set(
        names
    )
    for name in [*names, "__enter__" if client is CancelClient else "__aenter__"]:
        assert inspect.signature(getattr(double, name)) == inspect.signature(getattr(client, name)), name
        assert inspect.iscoroutinefunction(getattr(double, name)) == inspect.iscoroutinefunction(getattr(client, name))


@pytest.mark.parametrize("kind", OF_AN_ORDER)
def test_records_are_plausible(fake: FakeCancelClient, kind: OutcomeKind) -> None:
    """Every kind makes a record that can be read back, with verdicts and errors as a worker gives them."""
    fake.will(kind=kind, after_s=1)
    outcome = fake.cancel(client_algo_id="stop-1").wait(1)

    assert decode_outcome(outcome.encode()) == outcome
    assert outcome.kind is kind
    assert outcome.may_be_live is may_be_live(kind, outcome.order_status)
    assert {attempt.verdict for attempt in outcome.attempts} <= {means.value for means in Means}
    assert (outcome.error is not None) == kind.failed
    assert "{" not in (outcome.error or "")
    assert outcome.enqueued_at_ms is not None
    assert outcome.finished_at_ms == outcome.enqueued_at_ms + 1000
    assert all(outcome.enqueued_at_ms <= attempt.at_ms < outcome.finished_at_ms for attempt in outcome.attempts)


# ---- scripts --------------------------------------------------------------------------------------------------------


def test_the_default_is_cancelled_at_once(fake: FakeCancelClient) -> None:
    """Without a word an order is cancelled within the call, and everything asked for is remembered."""
    ticket = fake.cancel(algo_id=7, symbol="BTCUSDT")

    assert ticket.wait(0).kind is OutcomeKind.CANCELLED
    assert fake.requests == [CancelRequest(7, symbol="BTCUSDT")]
    assert not fake.cancel(algo_id=7).duplicate


def test_what_is_said_of_an_order(fake: FakeCancelClient) -> None:
    """An order's script goes before its account's, and that before what is said of all."""
    fake.will(kind=OutcomeKind.EXPIRED)
    fake.will(kind=OutcomeKind.REFUSED, account="desk2")
    fake.will(kind=OutcomeKind.TRIGGERED, algo_id=7, actual_order_id="8886774", order_status="FINISHED")
    fake.will(kind=OutcomeKind.REJECTED, client_algo_id="stop-1")

    triggered = fake.cancel(algo_id=7).wait(0)
    assert (triggered.kind, triggered.actual_order_id, triggered.may_be_live) == ("triggered", "8886774", False)
    assert fake.cancel(algo_id=7, account="desk2").wait(0).kind is OutcomeKind.REFUSED
    assert fake.cancel(client_algo_id="stop-1").wait(0).kind is OutcomeKind.REJECTED
    assert fake.cancel(algo_id=9, client_algo_id="stop-1").wait(0).kind is OutcomeKind.REJECTED
    assert fake.cancel(algo_id=8).wait(0).kind is OutcomeKind.EXPIRED


def test_runs(fake: FakeCancelClient) -> None:
    """What is said for a number of runs holds for so many, and what was said before holds again."""
    fake.will(kind=OutcomeKind.GAVE_UP, algo_id=7, runs=2, error="no luck")
    ticket = fake.cancel(algo_id=7)
    kinds = [ticket.wait(0)]
    for _ in range(2):
        assert fake.retry([ticket.id]) == [ticket.id]
        kinds.append(ticket.wait(0))

    assert [(outcome.kind.value, outcome.run, outcome.error) for outcome in kinds] == [
        ("gave_up", 1, "no luck"),
        ("gave_up", 2, "no luck"),
        ("cancelled", 3, None),
    ]
    assert [outcome for _, outcome in fake.outcomes()] == kinds


DOUBLES = [FakeCancelClient, AsyncFakeCancelClient]
SECONDS = "must be from 0 to 3153600000"
COUNT = "must be a whole number, 1 or more, or left out"
CLEAN = "characters without control characters or blanks around it"

#: Kind, field, value, the rule that it breaks.
UNRECORDED = [
    ("cancelled", "order_status", "FINISHED", "with cancelled it is CANCELED"),
    ("triggered", "order_status", 7, "with triggered it is TRIGGERED or FINISHED"),
    ("not_found", "order_status", "NEW", "with not_found it is left out"),
    ("cancelled", "actual_order_id", "1", "no cancelled request has one"),
    ("triggered", "actual_order_id", 8886774, f"must be text of 1 to 40 {CLEAN}"),
    ("triggered", "actual_order_id", "", f"must be text of 1 to 40 {CLEAN}"),
    ("triggered", "actual_order_id", "8" * 41, f"must be text of 1 to 40 {CLEAN}"),
    ("cancelled", "symbol", "S" * 500, "must be text of 1 to 32 characters without control characters"),
    ("cancelled", "error", "none", "no cancelled request has one"),
    ("refused", "error", "e" * 4000, f"must be text of 1 to 400 {CLEAN}"),
    ("refused", "error", "two\nlines", f"must be text of 1 to 400 {CLEAN}"),
    ("refused", "error", "half a \udc00", f"must be text of 1 to 400 {CLEAN}"),
]
#: Field, value, the rule that it breaks: what only a script for runs to come has.
UNPLAYED = [
    ("after_s", -1, SECONDS),
    ("after_s", 1e300, SECONDS),
    ("after_s", "5", SECONDS),
    ("runs", 0, COUNT),
    ("runs", 1.5, COUNT),
    ("runs", True, COUNT),
]
#: Field, value, the rule that it breaks: what names an order.
UNNAMED = [
    ("account", "Desk 2!", "must match ^[a-z0-9][a-z0-9_-]{0,31}$"),
    ("algo_id", 0, "must be a whole number from 1 to 9223372036854775807"),
    ("client_algo_id", "a b", "must match ^[.A-Z:/a-z0-9_-]{1,36}$"),
]


def check_refusal(call: Callable[..., object], name: str, value: object, rule: str, **others: Any) -> None:
    """The call is refused by an error that names the field, the value and the rule."""
    with pytest.raises(InvalidRequest) as caught:
        call(**{name: value}, **others)
    assert (caught.value.field, caught.value.value) == (name, value)
    assert caught.value.rule.startswith(rule)
    assert str(caught.value).startswith(f"{name}=")
    assert rule in str(caught.value)


@pytest.mark.parametrize(("kind", "name", "value", "rule"), UNRECORDED)
def test_what_no_worker_records(fake: FakeCancelClient, kind: str, name: str, value: object, rule: str) -> None:
    """What no worker's record could say is refused when it is written or given by hand, and what was said before
    holds."""
    fake.will(kind=OutcomeKind.EXPIRED)
    check_refusal(fake.will, name, value, rule, kind=OutcomeKind(kind))
    assert fake.cancel(algo_id=7).wait(0).kind is OutcomeKind.EXPIRED

    fake.hold()
    ticket = fake.cancel(algo_id=7)
    check_refusal(fake.settle, name, value, rule, ticket_or_id=ticket, kind=OutcomeKind(kind))
    assert fake.outcome(ticket.id) is None
    assert fake.settle(ticket).kind is OutcomeKind.CANCELLED


@pytest.mark.parametrize("double", DOUBLES)
@pytest.mark.parametrize(("name", "value", "rule"), UNPLAYED)
def test_when_and_how_often_are_numbers(double: type[Any], name: str, value: object, rule: str) -> None:
    """A script for no moment, or for no number of runs, is refused when it is written and not when it is played."""
    check_refusal(double().will, name, value, rule, kind=OutcomeKind.CANCELLED)


@pytest.mark.parametrize("value", ["lost", None, 7, OutcomeKind.LISTED])
def test_kinds_that_are_not(fake: FakeCancelClient, value: object) -> None:
    """A kind that the contract does not have is refused, with those that it has."""
    fake.hold()
    ticket = fake.cancel(algo_id=7)
    rule = f"must be one of {', '.join(OF_AN_ORDER)}"
    check_refusal(fake.will, "kind", value, rule)
    check_refusal(fake.settle, "kind", value, rule, ticket_or_id=ticket)


@pytest.mark.parametrize(("name", "value", "rule"), UNNAMED)
def test_scripts_check_ids(fake: FakeCancelClient, name: str, value: object, rule: str) -> None:
    """A script for an order or an account that cannot exist would never be played."""
    check_refusal(fake.will, name, value, rule, kind=OutcomeKind.EXPIRED)
    check_refusal(fake.hold, name, value, rule)
    if name == "account":
        check_refusal(fake.hold, name, value, rule, algo_id=7)


@pytest.mark.parametrize("value", [0, -1, 1.5, math.inf, "1", True])
def test_outages_last_for_whole_calls(fake: FakeCancelClient, value: object) -> None:
    """An outage of no number of calls is refused, and there is none."""
    check_refusal(fake.unavailable, "calls", value, COUNT)

    assert fake.status().queued == 0


ANY_TEXT = st.text(max_size=50) | st.text(st.sampled_from("aZ9 \n\x00\ud800"), max_size=420)
ANY_NUMBER = st.integers() | st.floats() | st.booleans()


@given(
    options=st.fixed_dictionaries(
        {"kind": st.sampled_from(OutcomeKind)},
        optional={
            "account": st.just("default") | ANY_TEXT,
            "order_status": st.sampled_from(["NEW", "TRIGGERING", "FINISHED", "CANCELED"]) | ANY_TEXT,
            "actual_order_id": ANY_TEXT | ANY_NUMBER,
            "symbol": ANY_TEXT | ANY_NUMBER,
            "error": ANY_TEXT | ANY_NUMBER,
            "child_status": st.sampled_from(["NEW", "FILLED", "CANCELED"]) | ANY_TEXT,
            "child_executed_qty": ANY_TEXT | ANY_NUMBER,
            "after_s": ANY_NUMBER,
            "runs": ANY_NUMBER,
        },
    )
)
def test_what_is_accepted_can_be_read_back(options: dict[str, Any]) -> None:
    """Whatever a script says, either it is refused or a client can read the record that comes of it."""
    fake = FakeCancelClient()
    try:
        fake.will(**options)
    except InvalidRequest:
        return
    ticket = fake.cancel(client_algo_id="stop-1", tag="grid-7", account=options.get("account", "default"))
    outcome = ticket.wait()

    assert decode_outcome(outcome.encode()) == outcome
    assert outcome.kind is options["kind"]
    for name in ("symbol", "error", "actual_order_id", "order_status", "child_status", "child_executed_qty"):
        assert name not in options or getattr(outcome, name) == options[name]


def test_the_longest_that_is_accepted(fake: FakeCancelClient) -> None:
    """Values at their bounds are taken, and come back as they are."""
    long: dict[str, Any] = {"symbol": "S" * 32, "after_s": 100 * 365 * 86_400, "runs": 1}
    fake.will(kind=OutcomeKind.TRIGGERED, actual_order_id="8" * 40, account="a" * 32, **long)
    fake.will(kind=OutcomeKind.REFUSED, error="e" * 400, **long)
    refused = fake.cancel(algo_id=7).wait()
    triggered = fake.cancel(algo_id=7, account="a" * 32).wait()

    assert (refused.error, refused.symbol) == ("e" * 400, "S" * 32)
    assert (triggered.actual_order_id, triggered.symbol) == ("8" * 40, "S" * 32)
    assert all(decode_outcome(outcome.encode()) == outcome for outcome in (refused, triggered))


# ---- time -----------------------------------------------------------------------------------------------------------


def test_time_is_its_own(fake: FakeCancelClient) -> None:
    """Waiting moves the double's time and takes none: an outcome is there when it is due and not before."""
    began_s = time.monotonic()
    fake.will(kind=OutcomeKind.CANCELLED, after_s=3600)
    ticket = fake.cancel(algo_id=7)
    with pytest.raises(WaitTimeout):
        ticket.wait(3599)
    assert fake.outcome(ticket.id) is None
    assert fake.cancel(algo_id=7).duplicate
    assert ticket.wait(1).kind is OutcomeKind.CANCELLED

    second = fake.cancel(algo_id=7)
    fake.advance(3599.5)
    assert fake.outcome(second.id) is None
    fake.advance(0.5)
    assert fake.outcome(second.id) is not None
    assert fake.cancel(algo_id=7).wait(None).kind is OutcomeKind.CANCELLED
    assert time.monotonic() - began_s < 1


def test_time_does_not_run_backwards(fake: FakeCancelClient) -> None:
    """Neither by a negative step nor by one that is no number, and it never comes to its end."""
    for seconds in (-1, math.nan, math.inf, 1e300, "5"):
        check_refusal(fake.advance, "seconds", seconds, SECONDS)


def test_patience_without_end(fake: FakeCancelClient) -> None:
    """A wait of any length gives what is due, and leaves a time that a record can hold."""
    fake.will(kind=OutcomeKind.EXPIRED, after_s=60)
    assert fake.cancel(algo_id=7).wait(math.inf).kind is OutcomeKind.EXPIRED
    assert fake.cancel(algo_id=7).wait(1e300).kind is OutcomeKind.EXPIRED
    fake.hold(algo_id=8)
    ticket = fake.cancel(algo_id=8)
    with pytest.raises(WaitTimeout):
        ticket.wait(1e300)
    outcome = fake.settle(ticket)

    assert decode_outcome(outcome.encode()) == outcome


def test_outcomes_come_in_the_order_of_time(fake: FakeCancelClient) -> None:
    """The ledger is ordered by when outcomes were due; following it moves the time to each."""
    for number, after_s in ((1, 30), (2, 10), (3, 20)):
        fake.will(kind=OutcomeKind.CANCELLED, algo_id=number, after_s=after_s)
    fake.cancel_many(CancelRequest(number) for number in (1, 2, 3))
    assert list(fake.outcomes()) == []
    entries = fake.outcomes(follow=True)

    assert [next(entries)[1].algo_id for _ in range(3)] == [2, 3, 1]
    assert [outcome.algo_id for _, outcome in fake.outcomes()] == [2, 3, 1]


# ---- by hand --------------------------------------------------------------------------------------------------------


def test_held_and_settled(fake: FakeCancelClient) -> None:
    """A held request has no outcome, is joined by others, and gets the outcome that it is given, once."""
    fake.hold(algo_id=7)
    ticket, other = fake.cancel(algo_id=7), fake.cancel(algo_id=7)
    with pytest.raises(WaitTimeout):
        ticket.wait(60)
    assert other.duplicate
    assert fake.cancel(algo_id=8).wait(0).off_the_book
    outcome = fake.settle(ticket, OutcomeKind.TRIGGERED, actual_order_id="1", symbol="ETHUSDT")

    assert other.wait(0) == outcome
    assert (outcome.kind, outcome.actual_order_id, outcome.symbol) == ("triggered", "1", "ETHUSDT")
    with pytest.raises(ValueError, match="already"):
        fake.settle(ticket.id)
    with pytest.raises(ValueError, match="no request of this double"):
        fake.settle("nobody-knows")


def test_an_outcome_that_is_due_can_be_settled_sooner(fake: FakeCancelClient) -> None:
    """What was to come later does not come a second time."""
    fake.will(kind=OutcomeKind.CANCELLED, after_s=10)
    ticket = fake.cancel(algo_id=7)
    fake.settle(ticket, OutcomeKind.GAVE_UP)
    fake.retry([ticket.id])
    fake.settle(ticket, OutcomeKind.EXPIRED)
    fake.advance(60)

    assert [outcome.kind.value for _, outcome in fake.outcomes()] == ["gave_up", "expired"]


def test_another_thread_settles(fake: FakeCancelClient) -> None:
    """Without a time-out a waiting thread, or one that follows the ledger, waits until another one settles."""
    fake.hold()
    ticket = fake.cancel(algo_id=7)
    seen: list[Outcome] = []

    def follow() -> None:
        with pytest.raises(InvalidRequest, match="it is closed"):
            seen.extend(outcome for _, outcome in fake.outcomes(follow=True))

    threads = [threading.Thread(target=lambda: seen.append(ticket.wait())), threading.Thread(target=follow)]
    for thread in threads:
        thread.start()
    outcome = fake.settle(ticket)
    eventually(lambda: seen == [outcome, outcome], what="both have seen it")
    fake.close()
    for thread in threads:
        thread.join(10)

    assert not any(thread.is_alive() for thread in threads)


def test_another_task_settles() -> None:
    """The same for tasks, one of which is cancelled while it waits."""

    async def main() -> None:
        async with AsyncFakeCancelClient() as fake:
            fake.hold()
            ticket = await fake.cancel(algo_id=7)
            seen: list[str] = []

            async def follow() -> None:
                async for _, outcome in fake.outcomes(follow=True):
                    seen.append(outcome.id)

            waiting = asyncio.create_task(ticket.wait())
            impatient = asyncio.create_task(ticket.wait())
            following = asyncio.create_task(follow())
            with pytest.raises(WaitTimeout):
                await ticket.wait(60)
            impatient.cancel()
            outcome = fake.settle(ticket)
            async with asyncio.timeout(10):
                assert await waiting == outcome
                with pytest.raises(asyncio.CancelledError):
                    await impatient
                await fake.close()
                with pytest.raises(InvalidRequest, match="it is closed"):
                    await following
            assert seen == [ticket.id]

    asyncio.run(main())


# ---- trouble --------------------------------------------------------------------------------------------------------


def test_outages(fake: FakeCancelClient) -> None:
    """An outage lasts for so many calls or until its end; a call whose answer was lost is found done by its repeat."""
    fake.hold()
    fake.unavailable(1)
    with pytest.raises(QueueUnavailable):
        fake.cancel(algo_id=7)
    assert fake.requests == []
    fake.unavailable(1, carried_out=True)
    with pytest.raises(QueueUnavailable):
        fake.cancel(algo_id=7)
    assert fake.cancel(algo_id=7).duplicate
    fake.unavailable()
    for _ in range(3):
        with pytest.raises(QueueUnavailable):
            fake.status()
    fake.available()
    assert fake.status().queued == 1


def test_outage_of_a_call_by_client_id(fake: FakeCancelClient) -> None:
    """A repeat by client id alone, of a request or beside a retried one, is a request of its own."""
    fake.hold()
    fake.unavailable(1, carried_out=True)
    with pytest.raises(QueueUnavailable):
        fake.cancel(client_algo_id="stop-1")
    again = fake.cancel(client_algo_id="stop-1")
    assert (again.duplicate, fake.status().queued) == (False, 2)
    fake.settle(again, OutcomeKind.GAVE_UP)
    assert fake.retry([again.id]) == [again.id]

    assert not fake.cancel(client_algo_id="stop-1").duplicate


def test_retry_whose_answer_was_lost(fake: FakeCancelClient) -> None:
    """A retry that was carried out is not repeated: the request is no longer among the failed ones."""
    fake.will(kind=OutcomeKind.OVERDUE, runs=1)
    ticket = fake.cancel(algo_id=7)
    fake.unavailable(1, carried_out=True)
    with pytest.raises(QueueUnavailable):
        fake.retry([ticket.id])

    assert fake.retry([ticket.id], missing_ok=True) == []
    assert ticket.wait(0).run == 2


def test_rq_job_leads_nowhere(fake: FakeCancelClient) -> None:
    """RQ's job of a double reaches no Redis, not even one that happens to listen where the default is."""
    with pytest.raises(redis.ConnectionError, match="a double has no Redis"):
        fake.job(fake.cancel(algo_id=7)).refresh()
