"""Answers that stay away: what is waited for them, what is done then, and what they settle when they come after all.

An engine against an exchange of which the test says which answers come. An attempt may take 48 s here, so that what
happens at all within a test's time has not waited for its end.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import pytest

from producer import CancelClient, Outcome, OutcomeKind
from producer.keys import JobField
from producer.message import decode_attempts
from tests.engines import HELD_S, Answerer, Asked, RunningEngine, Said, enqueued, well
from tests.fault.proxy import Proxy
from tests.orders import cancel_all, outcomes
from tests.orders import opened as opened_orders
from tests.servers import Peek, Valkey, eventually
from worker.sandbox.control import RunningExchange

GONE = Said(HTTPStatus.BAD_REQUEST, {"code": -2011, "msg": "Unknown order sent."})
NOT_THERE = Said(HTTPStatus.BAD_REQUEST, {"code": -2013, "msg": "Order does not exist."})
BAD_KEY = Said(HTTPStatus.UNAUTHORIZED, {"code": -2015, "msg": "Invalid API-key, IP, or permissions for action."})
C, Q = "DELETE", "GET"


def state(asked: Asked, status: str, created_ms: int = 1_750_485_492_076) -> Said:
    """The answer to a query: the order in a state."""
    said = well(Asked(Q, asked.path, asked.algo_id or 1))
    order = {"clientAlgoId": "x", "algoStatus": status, "createTime": created_ms, "actualOrderId": "7"}
    return Said(said.status, said.body | order)


#: What is said to a call, of which so many of its kind came before; None: nothing until the end, or until it may speak.
Behave = Callable[[Asked, int], Said | None]


@dataclass
class Exchange:
    """Calls about orders are answered by ``behave``."""

    behave: Behave
    asked: list[Asked] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)  # what came, the calls for its time too
    late: Callable[[Asked], Said] = well
    may_speak: threading.Event = field(default_factory=threading.Event)
    engine: RunningEngine = field(init=False)  # that asks it

    def __call__(self, asked: Asked) -> Said:
        if asked.path.endswith(("/time", "/exchangeInfo")):
            return well(asked)
        earlier = self.count(asked.method)
        self.asked.append(asked)
        said = self.behave(asked, earlier)
        if said is None:
            self.may_speak.wait(HELD_S)
            said = self.late(asked)
        return said

    def count(self, method: str) -> int:
        """How many such calls came."""
        return sum(asked.method == method for asked in list(self.asked))

    def speak(self, late: Callable[[Asked], Said] = well) -> None:
        """Answer late what was not answered."""
        self.late = late
        self.may_speak.set()


Opened = Callable[..., Exchange]


@pytest.fixture
def opened(stack: ExitStack, valkey: Valkey) -> Opened:
    """Starts exchanges, each with an engine that has so many slots."""

    def start(behave: Behave, size: int = 4, *, window_ms: int = 60_000, **options: Any) -> Exchange:
        exchange = Exchange(behave)
        server = stack.enter_context(Answerer(exchange))
        exchange.heads = server.heads
        engine = RunningEngine(valkey.url, server.url, size, BINANCE_RECV_WINDOW_MS=str(window_ms), **options)
        exchange.engine = stack.enter_context(engine)
        stack.callback(exchange.may_speak.set)
        return exchange

    return start


def told(outcome: Outcome) -> list[tuple[str, str]]:
    """Call and verdict of each attempt."""
    return [(attempt.call, attempt.verdict) for attempt in outcome.attempts]


def test_what_is_not_answered_is_looked_up(client: CancelClient, opened: Opened) -> None:
    """A cancel whose answer stays away costs a second at the most: the order is read on another connection."""
    exchange = opened(lambda asked, _: None if asked.method == C else state(asked, "CANCELED"))
    outcome = enqueued(client, 1)[0].wait(25)
    assert (outcome.kind, told(outcome)) == (OutcomeKind.CANCELLED, [("cancel", "unclear"), ("query", "canceled")])
    assert outcome.attempts[0].msg == "no answer: TimeoutError"
    assert [asked.method for asked in exchange.asked] == [C, Q]


def test_an_open_order_is_cancelled_again(client: CancelClient, opened: Opened) -> None:
    """Where the silent cancel did nothing, the next one follows the look-up, and is not waited for in the queue."""
    opened(lambda asked, earlier: None if asked.method == C and not earlier else well(asked))
    outcome = enqueued(client, 1)[0].wait(25)
    assert told(outcome) == [("cancel", "unclear"), ("query", "open"), ("cancel", "confirmed")]


def test_late_success_ends_the_request(client: CancelClient, opened: Opened) -> None:
    """The answer of a silent cancel is not lost: it is the outcome, and stands where its attempt stands."""
    patient = {"NOT_FOUND_HORIZON_S": "600", "BACKOFF_CAP_MS": "600000"}
    exchange = opened(lambda asked, _: NOT_THERE if asked.method == Q else None, **patient)
    (ticket,) = enqueued(client, 1)
    eventually(lambda: exchange.count(Q), 25, "the order is looked up")
    exchange.speak()
    outcome = ticket.wait(25)
    assert (outcome.kind, told(outcome)[0]) == (OutcomeKind.CANCELLED, ("cancel", "confirmed"))
    assert exchange.count(C) == 1


@pytest.mark.parametrize(("answer", "kind"), [(NOT_THERE, OutcomeKind.NOT_FOUND), (BAD_KEY, OutcomeKind.REFUSED)])
@pytest.mark.parametrize("is_heard", [True, False])
def test_a_silence_is_settled(
    client: CancelClient, opened: Opened, answer: Said, kind: OutcomeKind, is_heard: bool
) -> None:
    """Once the silent cancel is known to have done nothing, by its late answer, or can be accepted no more, what the
    exchange says is believed: no doubt makes the outcome `unknown`."""
    options = {"window_ms": 60_000 if is_heard else 500, "NOT_FOUND_HORIZON_S": "0"}
    exchange = opened(lambda asked, _: answer if asked.method == Q else None, **options)
    (ticket,) = enqueued(client, 1)
    if is_heard:
        eventually(lambda: exchange.count(Q), 25, "the order is looked up")
        exchange.speak(lambda _: GONE if answer is NOT_THERE else BAD_KEY)
    outcome = ticket.wait(25)
    first, last = outcome.attempts[0], outcome.attempts[-1]
    assert outcome.kind is kind
    if is_heard:
        assert first.verdict == ("no_such_order" if answer is NOT_THERE else "key_refused")
    else:
        assert first.verdict == "unclear"
        assert last.at_ms >= first.at_ms + first.ms + 500


def test_silence_is_settled_while_its_key_is_refused(client: CancelClient, opened: Opened) -> None:
    """Who is held back until the deadline because the key is refused is told so, though one call got no answer."""
    opened(lambda asked, _: None if asked.method == C and asked.algo_id == 1 else BAD_KEY, 16, window_ms=500)
    silent = client.cancel(algo_id=1, deadline_s=4)
    for ticket in enqueued(client, 5, first=2):
        assert ticket.wait(25).kind is OutcomeKind.REFUSED
    outcome = silent.wait(25)
    assert outcome.kind is OutcomeKind.REFUSED
    assert told(outcome)[0] == ("cancel", "unclear")


def test_standing_loop_is_no_silence(client: CancelClient, opened: Opened) -> None:
    """Who stood still himself looks once more before he calls the exchange silent."""
    stands = threading.Event()

    def behave(asked: Asked, _: int) -> Said:
        if stands.is_set():
            exchange.engine.stand_still(1.5)
        return well(asked)

    exchange: Exchange = opened(behave, 1)
    assert enqueued(client, 1, first=2)[0].wait(25).kind is OutcomeKind.CANCELLED
    stands.set()
    assert told(enqueued(client, 1)[0].wait(25)) == [("cancel", "confirmed")]


def test_slow_for_everybody_is_waited_for(client: CancelClient, opened: Opened) -> None:
    """Where nobody is answered, few look their order up, and the first answers end the others' waiting."""

    def executed(asked: Asked) -> Said:
        return well(asked) if asked.method == C else state(asked, "CANCELED")

    exchange: Exchange = opened(lambda asked, _: executed(asked) if exchange.may_speak.is_set() else None, 64)
    tickets = enqueued(client, 64)
    eventually(lambda: exchange.count(Q) >= 4, 25, "some are looked up")
    asked = exchange.count(Q)
    exchange.speak(executed)
    assert {ticket.wait(25).kind for ticket in tickets} == {OutcomeKind.CANCELLED}
    assert asked <= 16
    assert exchange.count(C) == 64


def test_a_stop_waits_for_what_is_in_flight(client: CancelClient, opened: Opened) -> None:
    """A worker that leaves looks nothing up any more; the answer of a silent call is waited for like any other."""
    exchange = opened(lambda asked, _: None)
    tickets = enqueued(client, 4)
    eventually(lambda: exchange.count(C) == 4, 25, "all are under way")
    exchange.engine.stop()
    time.sleep(1.5)  # they are silent by now
    exchange.speak()
    assert [told(ticket.wait(25)) for ticket in tickets] == [[("cancel", "confirmed")]] * 4


@pytest.mark.parametrize("size", [1, 16])
def test_a_stop_hands_back_what_stays_silent(client: CancelClient, opened: Opened, peek: Peek, size: int) -> None:
    """When the attempt's time is over, the job goes back with its history, and who comes next looks the order up."""
    exchange = opened(lambda asked, _: None, size, window_ms=2_500)
    (ticket,) = enqueued(client, 1)
    eventually(lambda: exchange.count(C), 25, "it is under way")
    exchange.engine.stop()
    eventually(exchange.engine.has_ended, 20, "it has ended")
    history = decode_attempts(peek("HGET", peek.keys.job_prefix + ticket.id, JobField.ATTEMPTS))
    assert [(attempt.call, attempt.verdict) for attempt in history] == [("cancel", "unclear")]
    opened(lambda asked, _: state(asked, "CANCELED"), name="other")
    assert told(ticket.wait(25)) == [("cancel", "unclear"), ("query", "canceled")]


def test_burst_on_forgotten_connections(valkey: Valkey, client: CancelClient, exchange: RunningExchange) -> None:
    """When all flows to the exchange have been forgotten in a calm, the next burst waits for none of them."""
    with (
        Proxy(urlsplit(exchange.url).port or 0) as firewall,
        RunningEngine(valkey.url, firewall.http_url, 32, BINANCE_RECV_WINDOW_MS="60000"),
    ):
        for _ in range(2):
            tickets = cancel_all(client, opened_orders(exchange, 60))
            assert {found.kind for found in outcomes(client, tickets, 25)} == {OutcomeKind.CANCELLED}
            firewall.forget_flows()


# ---- by client id ---------------------------------------------------------------------------------------------------

#: The order that bears the client id.
NAMED = Asked(C, "", 7)


def newer() -> Said:
    """Another order under the id."""
    return state(NAMED, "NEW", time.time_ns() // 1_000_000 + 3_600_000)


def window(exchange: Exchange) -> tuple[int, int]:
    """Timestamp and recvWindow of the cancel, ms."""
    cancel = next(head for head in exchange.heads if head.startswith(b"DELETE"))
    query = re.search(rb"recvWindow=(\d+)&timestamp=(\d+)", cancel)
    assert query is not None
    return int(query[2]), int(query[1])


@pytest.mark.parametrize("breaks", [True, False])
def test_client_id_is_not_called_free_while_a_cancel_may_strike(
    client: CancelClient, opened: Opened, breaks: bool
) -> None:
    """A cancel by client id is accepted no longer than it is waited for, and until then nobody is told that the order
    is gone: whoever opened another one under the id would lose it."""

    def behave(asked: Asked, _: int) -> Said | None:
        if asked.method == Q:
            return state(NAMED, "CANCELED")
        if breaks:
            raise OSError
        return None

    exchange = opened(behave, window_ms=5_000, measures=True)
    outcome = client.cancel(client_algo_id="x").wait(25)
    while outcome.attempts[0].call != "cancel":  # it was claimed too late for that
        outcome = client.cancel(client_algo_id="x").wait(25)
    assert (outcome.kind, outcome.attempts[0].verdict) == (OutcomeKind.CANCELLED, "unclear")
    timestamp_ms, window_ms = window(exchange)
    assert window_ms <= 1_000
    assert outcome.finished_at_ms >= timestamp_ms + window_ms


def test_another_order_under_the_id_is_waited_out(client: CancelClient, opened: Opened) -> None:
    """Where the id is another order's by now, the silent cancel's own answer is what tells, if it comes."""
    exchange = opened(lambda asked, _: None if asked.method == C else newer(), measures=True)
    while not exchange.count(C):  # else it was claimed too late for that
        looked_up, ticket = exchange.count(Q), client.cancel(client_algo_id="x")
        eventually(lambda: exchange.count(Q) > looked_up, 25, "the order is looked up")  # noqa: B023
    exchange.speak(lambda _: well(NAMED))
    outcome = ticket.wait(25)
    assert (outcome.kind, outcome.algo_id) == (OutcomeKind.CANCELLED, 7)
    assert exchange.count(C) == 1


def test_late_answer_about_another_order_is_no_news_of_the_one_meant(client: CancelClient, opened: Opened) -> None:
    """A late answer to a look-up by client id is held to the same rule: a newer order is left alone."""
    ticket = client.cancel(client_algo_id="x")
    time.sleep(0.2)  # so that it is looked up first
    exchange = opened(lambda asked, earlier: NOT_THERE if earlier else None, measures=True, NOT_FOUND_HORIZON_S="600")
    eventually(lambda: exchange.count(Q) > 1, 25, "it is looked up again")
    exchange.speak(lambda _: newer())
    outcome = ticket.wait(25)
    assert (outcome.kind, outcome.algo_id, exchange.count(C)) == (OutcomeKind.UNKNOWN, None, 0)
    assert (outcome.error or "").endswith("left alone")
