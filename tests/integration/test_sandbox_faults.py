"""Every fault of the local exchange over real sockets: what its caller sees, and what becomes of the order."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import re
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from producer.message import Call
from tests.caller import ALGO_ORDER, CHILD_ORDER, OPEN_ORDERS, Caller, child_of
from tests.servers import eventually
from worker.sandbox.control import BookEntry, ChildEntry, ControlError, RunningExchange
from worker.sandbox.faults import Fault

#: What a client that waits 5 s sees: HTTP status and code, or what the network did; "own" stands for the exchange's own
#: answer to the call. A fault whose name ends in a code, and maybe in "executed", is a refusal with that code.
SEEN = {
    **dict.fromkeys(["drop_before", "drop_after", "execute_after_drop", "client_id_reused"], "closed"),
    **dict.fromkeys(["reset_before", "reset_after"], "reset"),
    **dict.fromkeys(["answer_late", "execute_late", "close_after_answer", "drip", "partly_filled_before"], "200 own"),
    "body_cut": "cut",
    "huge_body": "200 huge",
    "gzip": "200 gzip own",
    "not_http": "not http",
    "empty_200": "200 empty",
    "html_200": "200 html",
    "no_code_200": "200 undecided",
    "wrong_id_200": "200 wrong id",
    "deep_json_200": "200 deep",
    "unknown_status_200": "200 status PAUSED",
    "redirect_302": "302 empty",
    "challenge_202": "202 empty",
    "forbidden_403": "403 html",
    "banned_418": "418 code -1003",
    "limited_429": "429 code -1003",
    "timeout_408": "408 code -1007",
    "html_500": "500 html",
    "retry_500": "500 code -1000",
    "bad_gateway_502": "502 html",
    "gateway_timeout_504": "504 html",
    **dict.fromkeys(["unknown_503", "execute_after_503", "trigger_503"], "503 code -1000"),
    **dict.fromkeys(["unavailable_503", "internal_503", "retry_after_503"], "503 code -1001"),
    "throttled_503": "503 code -1008",
    "disconnected_1001_unknown": "400 code -1001",
    "unlisted_code": "400 code -7999",
    **dict.fromkeys(["forgotten", "late_book", "trigger_rejected", "trigger_stuck"], "400 code -2011"),
    **{
        f"{how}_before": "400 code -2011"
        for how in ("triggered", "cancelled", "expired", "rejected", "filled", "match_expired")
    },
    "login_401": "401 html",
    "path_404": "404 html",
    "method_405": "405 html",
    "region_451": "451 code 0",
    "unauthorized_1002": "401 code -1002",
    **{what: f"401 code -{what[-4:]}" for what in ("key_id_2008", "key_format_2014", "key_2015", "key_locked_2017")},
}
OWN = {
    Call.CANCEL: "code 200",
    Call.QUERY: "status NEW",
    Call.CANCEL_CHILD: "status CANCELED",
    Call.QUERY_CHILD: "status NEW",
    Call.LIST_OPEN: "list 1",
}
#: Where the order or the child ends up when a DELETE leaves it neither untouched nor cancelled by the request.
ENDS_AS = {
    **dict.fromkeys(["trigger_4117", "trigger_2011", "trigger_503", "triggered_before"], "FINISHED"),
    "trigger_stuck": "TRIGGERING",
    **dict.fromkeys(["trigger_rejected", "rejected_before"], "REJECTED"),
    "cancelled_before": "CANCELED",
    "expired_before": "EXPIRED",
    "filled_before": "FILLED",
    "match_expired_before": "EXPIRED_IN_MATCH",
}


def seen_of(fault: Fault, call: Call) -> str:
    """What the caller sees."""
    name = fault.removesuffix("_executed")
    return SEEN.get(name, f"400 code -{name.rpartition('_')[2]}").replace("own", OWN[call])


def observed(caller: Caller, call: Call, algo_id: int, order_id: str = "") -> str:
    method, path = "DELETE" if call.cancels else "GET", OPEN_ORDERS if call is Call.LIST_OPEN else ALGO_ORDER
    try:
        if call.of_child:
            seen = caller.call(method, CHILD_ORDER, symbol="BTCUSDT", orderId=order_id)
        else:
            seen = caller.call(method, path, algoId=algo_id)
    except http.client.RemoteDisconnected:
        return "closed"
    except ConnectionResetError:
        return "reset"
    except http.client.IncompleteRead:
        return "cut"
    except http.client.BadStatusLine:
        return "not http"
    return f"{seen.status} {described(seen.body, int(order_id or algo_id))}"


def described(body: bytes, named: int) -> str:
    if not body:
        return "empty"
    if body.startswith(b"<html"):
        return "html"
    if body.startswith(b"\x1f\x8b"):
        return f"gzip {described(gzip.decompress(body), named)}"
    try:
        answer = json.loads(body)
    except RecursionError:
        return "deep"
    if len(body) > 64 * 1024:
        return "huge"
    if isinstance(answer, list):
        return f"list {len(answer)}"
    if answer.get("algoId", answer.get("orderId", named)) != named:
        return "wrong id"
    if "algoStatus" in answer or "status" in answer:
        return f"status {answer.get('algoStatus') or answer['status']}"
    return f"code {answer['code']}" if "code" in answer else "undecided"


@pytest.mark.parametrize(("fault", "call"), [(fault, call) for fault in Fault for call in sorted(fault.spec.calls)])
def test_a_call_meets_the_fault(market: RunningExchange, caller: Caller, fault: Fault, call: Call) -> None:
    """The client sees what the fault stands for, and the book says what became of the order, or of its child."""
    order = market.add_orders()[0]
    if call.of_child:
        market.trigger(order.algo_id)

    def target() -> BookEntry | ChildEntry:
        entry = market.book([order.algo_id])[order.algo_id]
        return child_of(market, order.algo_id) if call.of_child else entry

    order_id = child_of(market, order.algo_id).order_id if call.of_child else ""
    market.script_faults(order.algo_id, [fault], call=call)
    assert observed(caller, call, order.algo_id, order_id) == seen_of(fault, call)
    executes = call.cancels and fault.spec.executes
    wanted = ENDS_AS.get(fault, "CANCELED" if executes else "NEW") if call.cancels else "NEW"
    eventually(lambda: target().status == wanted, what=wanted)
    counted, is_list = target(), call is Call.LIST_OPEN
    asked = (int(call.cancels), int(not (call.cancels or is_list)), int(executes))
    assert (counted.deletes, counted.gets, counted.deletes_effective) == asked
    assert isinstance(counted, BookEntry) or counted.executed_qty == EXECUTED.get(fault, "0")
    assert market.book()[order.algo_id].faults == ([] if is_list else [fault])
    assert market.stats().faults_injected == {fault: 1}
    caller.connection.close()  # what the fault left of it; the next call opens another
    if is_list and not fault.spec.gates:
        assert observed(caller, call, order.algo_id) == "200 list 1"


EXECUTED = {"filled_before": "0.01", "partly_filled_before": "0.005"}


def test_a_list_lags_behind(market: RunningExchange, caller: Caller) -> None:
    """With a lag an order that has just been opened is queried and cancelled, and stands in no list for a while."""
    market.set_list_lag_ms(60_000)
    market.add_orders(age_ms=60_000)
    (younger,) = market.add_orders()
    assert caller.status(younger.algo_id) == "NEW"
    assert len(caller.call("GET", OPEN_ORDERS, symbol="BTCUSDT").json) == 1
    market.set_list_lag_ms(0)
    assert len(caller.call("GET", OPEN_ORDERS, symbol="BTCUSDT").json) == 2


@pytest.mark.parametrize(
    ("control", "asked", "said"),
    [
        ("move", {"move": "fill", "quantity": "much"}, "InvalidOperation|ConversionSyntax"),
        ("move", {"move": "fill", "quantity": "0.02"}, "0.01 of 0.01 are left"),
        ("move", {"move": "fill", "quantity": "NaN"}, "InvalidOperation"),
        ("move", {"move": "end_child", "status": "NEW"}, "NEW ends nothing"),
        ("move", {"move": "end_child", "status": "GONE"}, "GONE"),
        ("move", {"move": "explode"}, "no move 'explode'; there are trigger, "),
        ("move", {"move": "cancel", "status": "EXPIRED"}, "cancel takes no 'status'; it takes nothing"),
        ("move", {"move": "trigger", "after_ms": 5}, "trigger takes no 'after_ms'; it takes child_after_ms, "),
        ("set", {"latency": 50}, "set takes no 'latency'; it takes account, "),
        ("orders", {"orders": [], "age": 5, "acount": "x"}, "orders takes no 'acount', 'age'; it takes account, "),
        ("orders", {"orders": [{"type": "STOP"}]}, "'type'"),
        ("orders", {}, "'orders'"),
        ("script", {"faults": [None], "repeat": True}, "script takes no 'repeat'; it takes algo_id, "),
        ("incident", {"fault": "limited_429", "duration_s": 5}, "incident takes no 'duration_s'; it takes duration_ms"),
        ("reset", {"all": True}, "reset takes no 'all'; it takes nothing"),
    ],
)
def test_senseless_controls_are_refused(
    market: RunningExchange, control: str, asked: dict[str, Any], said: str
) -> None:
    """A control call that makes no sense, or names what it does not take, gets a text that says why, and nothing
    moves."""
    order = market.add_orders()[0]
    market.trigger(order.algo_id)
    told = asked | ({"algo_id": order.algo_id} if control in ("move", "script") else {})
    request = urllib.request.Request(f"{market.url}/_sandbox/{control}", json.dumps(told).encode())
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=20)
    assert refused.value.status == 400
    assert re.search(said, json.loads(refused.value.read())["error"])
    refused.value.close()
    assert child_of(market, order.algo_id).status == "NEW"


def was_deleted(market: RunningExchange, algo_id: int) -> bool:
    return market.book()[algo_id].deletes > 0


def test_late_answers_come_late(market: RunningExchange, caller: Caller) -> None:
    """A late answer is late by the configured time although the order was cancelled at once."""
    late, held = market.add_orders(2)
    market.script_faults(late.algo_id, [Fault.ANSWER_LATE])
    market.script_faults(held.algo_id, [Fault.EXECUTE_LATE])
    with ThreadPoolExecutor(1) as pool:
        for order, before in ((late, "CANCELED"), (held, "NEW")):
            answer = pool.submit(caller.cancel, order.algo_id)
            eventually(partial(was_deleted, market, order.algo_id), what="the DELETE arrives")
            assert market.book()[order.algo_id].status == before
            assert answer.result().status == 200
            assert answer.result().elapsed_s >= 0.15


@pytest.mark.parametrize("fault", [Fault.EXECUTE_AFTER_503, Fault.EXECUTE_AFTER_DROP, Fault.EXECUTE_LATE])
def test_a_cancel_can_strike_after_the_client_has_left(market: RunningExchange, fault: Fault) -> None:
    """An order is NEW to whoever looks at once, and cancelled later, with the client gone long since."""
    order = market.add_orders()[0]
    market.script_faults(order.algo_id, [fault])
    with contextlib.suppress(OSError), Caller(market.url, timeout_s=0.05) as hasty:
        hasty.cancel(order.algo_id)
    assert market.book()[order.algo_id].status == "NEW"
    eventually(lambda: market.book()[order.algo_id].status == "CANCELED", what="cancelled late")


def test_a_forgotten_order_comes_back(market: RunningExchange, caller: Caller) -> None:
    """For a while cancels get -2011 and queries -2013; then the order is there, NEW, and can be cancelled."""
    order = market.add_orders()[0]
    market.script_faults(order.algo_id, [Fault.FORGOTTEN])
    assert caller.cancel(order.algo_id).error[1] == -2011
    assert caller.call("GET", algoId=order.algo_id).error == (400, -2013, "Order does not exist.")
    assert caller.call("GET", OPEN_ORDERS, symbol="BTCUSDT").json == []
    eventually(lambda: caller.call("GET", algoId=order.algo_id).status == 200, what="visible again")
    assert caller.cancel(order.algo_id).json["code"] == "200"


def test_requests_about_orders_are_kept_as_they_came(market: RunningExchange, caller: Caller) -> None:
    """Each with its times, its connection and the id that it named; one that the exchange refuses, too."""
    (order,) = market.add_orders(1)
    before_ns = time.time_ns()
    caller.call("GET", clientAlgoId=order.client_algo_id)
    market.start_incident(Fault.LIMITED_429, duration_ms=60_000)
    assert caller.cancel(order.algo_id).status == 429

    asked, cancelled = market.arrivals()

    assert (asked.method, asked.algo_id, asked.client_algo_id) == ("GET", None, order.client_algo_id)
    assert (cancelled.method, cancelled.algo_id, cancelled.client_algo_id) == ("DELETE", order.algo_id, None)
    assert before_ns <= asked.at_ns <= cancelled.at_ns <= time.time_ns()
    assert before_ns // 1_000_000 <= asked.signed_ms <= asked.at_ns / 1e6
    assert asked.port == cancelled.port == caller.connection.sock.getsockname()[1]


def test_a_late_book_has_the_order_for_a_second_delete(market: RunningExchange, caller: Caller) -> None:
    """No query sees the order until a DELETE comes again, and that one works."""
    order = market.add_orders()[0]
    market.script_faults(order.algo_id, [Fault.LATE_BOOK])
    assert caller.cancel(order.algo_id).error[1] == -2011
    for _ in range(2):
        assert caller.call("GET", algoId=order.algo_id).error[1] == -2013
    assert caller.cancel(order.algo_id).json["code"] == "200"
    assert caller.status(order.algo_id) == "CANCELED"


def test_a_reused_client_id_names_a_newer_order(market: RunningExchange, caller: Caller) -> None:
    """The old order is cancelled without an answer, and its client id now means a newer one that nobody meant."""
    order = market.add_orders(client_algo_ids=["stop-1"])[0]
    market.script_faults(order.algo_id, [Fault.CLIENT_ID_REUSED])
    assert observed(caller, Call.CANCEL, order.algo_id) == "closed"
    newer = caller.call("GET", clientAlgoId="stop-1").json
    assert newer["algoId"] != order.algo_id
    assert newer["createTime"] > market.book()[order.algo_id].create_time_ms
    assert (market.book()[newer["algoId"]].decoy, market.book()[order.algo_id].status) == (True, "CANCELED")


def test_scripts_are_consumed_and_can_repeat(market: RunningExchange, caller: Caller) -> None:
    """Scripted faults come in their order, the last one for ever if so asked, until faults are ended."""
    order = market.add_orders()[0]
    market.script_faults(order.algo_id, ["false_2011", None, "unknown_503"], call="cancel", repeat_last=True)
    statuses = [caller.cancel(order.algo_id).status for _ in range(4)]
    assert statuses == [400, 200, 503, 503]
    market.end_faults()
    assert caller.cancel(order.algo_id).error[1] == -2011
    with pytest.raises(ControlError, match="drop_after is not a fault of a query"):
        market.script_faults(order.algo_id, [Fault.DROP_AFTER], call="query")
    with pytest.raises(ControlError, match="no_such_fault"):
        market.script_faults(order.algo_id, ["no_such_fault"])
