"""What is said of all open orders of a symbol together, by the doubles: the clients on another wire."""

from __future__ import annotations

import asyncio
import itertools
import pickle
from typing import Any

import pytest

from producer import InvalidRequest, OpenOutcome, OutcomeKind, WaitTimeout
from producer.message import ListedOrder, OpenRequest, Outcome, decode_call, decode_outcome, encode_call
from producer.open_orders import OpenTicketFields, pursue
from producer.testing import AsyncFakeCancelClient, FakeCancelClient
from producer.untrusted import MessageError

#: From the worst to the best, by what becomes of an order.
BY_BADNESS = (
    *("unknown", "gave_up", "refused", "overdue", "not_found", "triggered", "expired", "rejected"),
    *("already_cancelled", "cancelled"),
)


@pytest.mark.parametrize(("worse", "better"), list(itertools.pairwise(BY_BADNESS)))
def test_the_worst_row_decides(worse: str, better: str) -> None:
    """Whatever the order of the rows, the worst kind is said of all; live is what any of them may be."""
    for first, second in ((worse, better), (better, worse)):
        fake = FakeCancelClient()
        fake.opened("BTCUSDT", 7, 8)
        fake.will(algo_id=7, kind=OutcomeKind(first))
        fake.will(algo_id=8, kind=OutcomeKind(second))

        outcome = fake.cancel_open("BTCUSDT").wait(5)

        assert outcome.kind == worse
        assert [(row.algo_id, row.kind) for row in outcome.orders] == [(7, first), (8, second)]
        assert outcome.may_be_live is any(row.may_be_live for row in outcome.orders)
        assert outcome.off_the_book is all(row.off_the_book for row in outcome.orders)


def test_nothing_seen_is_not_cancelled() -> None:
    """Without an order the kind is `listed`, nothing may be live, and the look was taken twice."""
    outcome = FakeCancelClient().cancel_open("BTCUSDT").wait(5)

    assert (outcome.kind, outcome.orders, outcome.may_be_live, outcome.listings) == ("listed", (), False, 2)
    assert outcome.off_the_book


def test_what_the_first_list_lagged_behind_is_waited_for() -> None:
    """The second look finds an order that the first did not show, and its request is waited for, too."""
    fake = FakeCancelClient()
    fake.opened("BTCUSDT", 7)
    fake.will(algo_id=7, kind=OutcomeKind.CANCELLED, after_s=10)
    ticket = fake.cancel_open("BTCUSDT", on_trigger="cancel_child", tag="t", urgent=True, deadline_s=30)
    fake.opened("BTCUSDT", 8)
    fake.will(algo_id=8, kind=OutcomeKind.ALREADY_CANCELLED, after_s=2)

    outcome = ticket.wait(60)

    assert (outcome.kind, [row.algo_id for row in outcome.orders]) == ("already_cancelled", [7, 8])
    asked = [request for request in fake.requests if not isinstance(request, OpenRequest)]
    assert {(each.on_trigger, each.tag, each.urgent, each.symbol) for each in asked} == {
        ("cancel_child", "t", True, "BTCUSDT")
    }
    first, second = (request for request in fake.requests if isinstance(request, OpenRequest))
    assert (first.before_ms, second.before_ms is not None) == (None, True)
    assert 19 < (second.deadline_s or 0) <= 20  # what the first list and its requests have left


def test_a_later_look_may_be_dated_earlier() -> None:
    """Redis' clock was set back between both looks: what they list is told, and nothing is damaged."""
    request = OpenRequest(symbol="BTCUSDT")
    listed: dict[str, Any] = {"kind": OutcomeKind.LISTED, "symbol": "BTCUSDT", "orders": ()}
    conversation = pursue(OpenTicketFields("first", request, False, asked_ms=10_000), "cancels")
    next(conversation)
    narrowed = conversation.send({"first": Outcome("first", 11_000, before_ms=10_000, **listed)})
    assert isinstance(narrowed, OpenRequest)
    conversation.send(OpenTicketFields("second", narrowed, False, asked_ms=7_000))

    with pytest.raises(StopIteration) as end:
        conversation.send({"second": Outcome("second", 8_000, before_ms=7_000, **listed)})

    assert (end.value.value.kind, end.value.value.error) == ("listed", None)


def test_a_time_out_says_what_stands() -> None:
    """Rows that have no outcome yet are named, what has one is in `so_far`, and nothing is called off the book."""
    fake = FakeCancelClient()
    fake.opened("BTCUSDT", 7, 8)
    fake.hold(algo_id=8)
    ticket = fake.cancel_open("BTCUSDT")

    with pytest.raises(WaitTimeout, match=r"1 of 2 orders \(8.*BTCUSDT") as told:
        ticket.wait(3)

    seen = told.value.so_far
    assert isinstance(seen, OpenOutcome)
    assert (seen.kind, seen.may_be_live, seen.off_the_book) == (None, True, False)
    assert [(row.algo_id, row.kind) for row in seen.orders] == [(7, "cancelled"), (8, None)]
    fake.settle(seen.orders[1].id)
    assert ticket.wait(3).kind == "cancelled"


def test_the_asyncio_double_does_it_alike() -> None:
    """And it joins what is under way."""

    async def main() -> tuple[OpenOutcome, str]:
        fake = AsyncFakeCancelClient()
        fake.opened("BTCUSDT", 7)
        fake.will(algo_id=7, kind=OutcomeKind.CANCELLED, after_s=5)
        under_way = await fake.cancel(algo_id=7)
        return await (await fake.cancel_open("BTCUSDT")).wait(60), under_way.id

    outcome, under_way = asyncio.run(main())

    assert (outcome.kind, [row.id for row in outcome.orders]) == ("cancelled", [under_way])


def test_tickets_travel_and_records_are_read() -> None:
    """A ticket can be pickled, and a listing's request is read back as it was written."""
    ticket = FakeCancelClient().cancel_open("BTCUSDT", deadline_s=5)

    copy = pickle.loads(pickle.dumps(ticket))

    assert (copy, copy.request) == (ticket, ticket.request)
    assert ticket.as_dict() == {"id": ticket.id, "symbol": "BTCUSDT", "account": "default"}
    for request in (OpenRequest(symbol="币安USDT", before_ms=7, urgent=True, tag="t"), OpenRequest(symbol="A")):
        assert decode_call(encode_call(request)) == request


@pytest.mark.parametrize(
    "fields",
    [
        '"cancel_open":"BTC USDT"',
        '"cancel_open":""',
        '"cancel_open":null',
        '"cancel_open":7',
        '"cancel_open":"A","algo_id":7',
        '"cancel_open":"A","symbol":"A"',
        '"cancel_open":"A","before_ms":-1',
        '"cancel_open":"A","before_ms":1e3',
        '"cancel_open":"A","before_ms":true',
        '"cancel_open":"A","more":1',
        '"before_ms":1,"algo_id":7',
    ],
)
def test_an_odd_listing_is_no_request(fields: str) -> None:
    """What breaks a rule, or is of another kind, is refused and never guessed at."""
    call = '["worker.task.cancel_algo_order",null,[{"v":1,"account":"default",' + fields + "}],{}]"

    with pytest.raises(MessageError):
        decode_call(call.encode())


@pytest.mark.parametrize("seen", [{}, {"orders": 1}, {"left_alone": 1}])
def test_a_listings_own_outcome_says_nothing_of_its_orders(seen: dict[str, int]) -> None:
    """It never says that all is off the book: each order's own request does, and a list may lag behind."""
    orders = (ListedOrder(7, "x"),) * seen.get("orders", 0)
    outcome = Outcome("i", 1, OutcomeKind.LISTED, orders=orders, left_alone=(8,) * seen.get("left_alone", 0))

    assert not outcome.off_the_book
    assert decode_outcome(outcome.encode()) == outcome


def test_a_listing_is_of_no_order() -> None:
    """An id beside the symbol is refused: it would say that one order is meant."""
    with pytest.raises(InvalidRequest, match="algo_id"):
        OpenRequest(symbol="BTCUSDT", algo_id=7)
    assert "BTCUSDT" in OpenRequest(symbol="BTCUSDT").describe()


def test_a_symbol_is_checked_at_every_door() -> None:
    """Wrong input names the field, and the double takes no other than the client does."""
    fake = FakeCancelClient()
    for wrong in ("", " ", "A B", "A\n", "A\x00", "A" * 33, None, 5):
        for door in (fake.cancel_open, fake.opened):
            with pytest.raises(InvalidRequest, match="symbol"):
                door(wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="kind"):
        fake.will(kind=OutcomeKind.LISTED)
