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

from tests.caller import ALGO_ORDER, CHILD_ORDER, OPEN_ORDERS, Caller
from tests.servers import eventually
from worker.sandbox.control import ChildEntry, ControlError, RunningExchange
from worker.sandbox.faults import Call, Fault

#: What a client that waits 5 s sees of a DELETE: HTTP status and code, or what the network did. A fault whose name ends
#: in a code, and maybe in whether the cancel was executed, is the exchange's refusal with that code.
ON_CANCEL = {
    **dict.fromkeys(["drop_before", "drop_after", "execute_after_drop", "client_id_reused"], "closed"),
    **dict.fromkeys(["reset_before", "reset_after"], "reset"),
    **dict.fromkeys(["answer_late", "execute_late", "close_after_answer", "drip"], "200 code 200"),
    "body_cut": "cut",
    "huge_body": "200 huge",
    "gzip": "200 gzip code 200",
    "not_http": "not http",
    "empty_200": "200 empty",
    "html_200": "200 html",
    "no_code_200": "200 undecided",
    "wrong_id_200": "200 wrong id",
    "deep_json_200": "200 deep",
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
#: Where a query sees something else than a cancel.
ON_QUERY = {
    **dict.fromkeys(["answer_late", "close_after_answer", "drip"], "200 status NEW"),
    "gzip": "200 gzip status NEW",
    "unknown_status_200": "200 status PAUSED",
}
#: Where the order ends up when it is neither untouched nor cancelled by the request.
ENDS_AS = {
    **dict.fromkeys(["trigger_4117", "trigger_2011", "trigger_503", "triggered_before"], "FINISHED"),
    "trigger_stuck": "TRIGGERING",
    **dict.fromkeys(["trigger_rejected", "rejected_before"], "REJECTED"),
    "cancelled_before": "CANCELED",
    "expired_before": "EXPIRED",
}


def on_cancel(fault: Fault) -> str:
    """What a DELETE that meets the fault sees."""
    name = fault.removesuffix("_executed")
    return ON_CANCEL.get(name) or f"400 code -{name.rpartition('_')[2]}"


def observed(caller: Caller, method: str, algo_id: int, order_id: int | None = None, path: str = ALGO_ORDER) -> str:
    try:
        if order_id is None:
            seen = caller.call(method, path, algoId=algo_id)
        else:
            seen = caller.call(method, CHILD_ORDER, symbol="BTCUSDT", orderId=order_id)
    except http.client.RemoteDisconnected:
        return "closed"
    except ConnectionResetError:
        return "reset"
    except http.client.IncompleteRead:
        return "cut"
    except http.client.BadStatusLine:
        return "not http"
    return f"{seen.status} {described(seen.body, order_id or algo_id)}"


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


@pytest.mark.parametrize("fault", [fault for fault in Fault if Call.CANCEL in fault.spec.calls])
def test_a_cancel_meets_the_fault(market: RunningExchange, caller: Caller, fault: Fault) -> None:
    """The client sees what the fault stands for, and the book says whether the order was cancelled."""
    order = market.add_orders()[0]
    market.script_faults(order.algo_id, [fault])
    assert observed(caller, "DELETE", order.algo_id) == on_cancel(fault)
    wanted = ENDS_AS.get(fault, "CANCELED" if fault.spec.executes else "NEW")
    eventually(lambda: market.book()[order.algo_id].status == wanted, what=wanted)
    entry = market.book()[order.algo_id]
    assert (entry.deletes, entry.deletes_effective) == (1, int(fault.spec.executes))
    assert entry.faults == [fault]
    assert market.stats().faults_injected == {fault: 1}


@pytest.mark.parametrize("fault", [fault for fault in Fault if Call.QUERY in fault.spec.calls])
def test_a_query_meets_the_fault(market: RunningExchange, caller: Caller, fault: Fault) -> None:
    """A query sees the same answers, and whatever it sees, it changes nothing."""
    order = market.add_orders()[0]
    market.script_faults(order.algo_id, [fault], call="query")
    wanted = ON_QUERY.get(fault) or on_cancel(fault)
    assert observed(caller, "GET", order.algo_id) == wanted
    entry = market.book()[order.algo_id]
    assert (entry.status, entry.gets, entry.deletes_effective) == ("NEW", 1, 0)


ON_CHILD = {
    **dict.fromkeys(["answer_late", "execute_late", "close_after_answer", "drip"], "200 status CANCELED"),
    "gzip": "200 gzip status CANCELED",
    "partly_filled_before": "200 status CANCELED",
}
ON_CHILD_QUERY = {name: said.replace("CANCELED", "NEW") for name, said in ON_CHILD.items()}
CHILD_ENDS_AS = {
    "filled_before": "FILLED",
    "match_expired_before": "EXPIRED_IN_MATCH",
    "rejected_before": "REJECTED",
    "cancelled_before": "CANCELED",
    "expired_before": "EXPIRED",
}


@pytest.mark.parametrize("call", [Call.CANCEL_CHILD, Call.QUERY_CHILD])
@pytest.mark.parametrize("fault", list(Fault))
def test_a_childs_call_meets_the_fault(market: RunningExchange, caller: Caller, fault: Fault, call: Call) -> None:
    """What can go wrong with an order's calls can with its child's, and the book says what became of the child."""
    order = market.add_orders()[0]
    market.trigger(order.algo_id)
    if call not in fault.spec.calls:
        with pytest.raises(ControlError, match=f"is not a fault of a {call}"):
            market.script_faults(order.algo_id, [fault], call=call)
        return
    market.script_faults(order.algo_id, [fault], call=call)
    order_id = int(child_of(market, order.algo_id).order_id)
    seen = ON_CHILD if call.cancels else ON_CHILD_QUERY | {"unknown_status_200": "200 status PAUSED"}
    method = "DELETE" if call.cancels else "GET"
    assert observed(caller, method, order.algo_id, order_id) == seen.get(fault, on_cancel(fault))
    executes = fault.spec.executes and call.cancels
    wanted = "NEW" if not call.cancels else CHILD_ENDS_AS.get(fault, "CANCELED" if executes else "NEW")
    eventually(lambda: child_of(market, order.algo_id).status == wanted, what=wanted)
    child = child_of(market, order.algo_id)
    assert (child.deletes, child.gets, child.deletes_effective) == (call.cancels, not call.cancels, executes)
    assert child.executed_qty == {"filled_before": "0.01", "partly_filled_before": "0.005"}.get(fault, "0")
    assert market.book()[order.algo_id].faults == [fault]


@pytest.mark.parametrize("fault", [fault for fault in Fault if Call.LIST in fault.spec.calls])
def test_a_list_meets_the_fault(market: RunningExchange, caller: Caller, fault: Fault) -> None:
    """The list of open orders can go wrong as other reads do, once; then it is what it should be."""
    order = market.add_orders()[0]
    market.script_faults(0, [fault], call=Call.LIST)
    wanted = {
        **dict.fromkeys(["answer_late", "close_after_answer"], "200 list 1"),
        "gzip": "200 gzip list 1",
    }
    assert observed(caller, "GET", order.algo_id, path=OPEN_ORDERS) == wanted.get(fault, on_cancel(fault))
    caller.connection.close()  # what the fault left of it; the next call opens another
    if not fault.spec.gates:
        assert observed(caller, "GET", order.algo_id, path=OPEN_ORDERS) == "200 list 1"
    assert market.book()[order.algo_id].status == "NEW"


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
        ("move", {"move": "explode"}, "no move"),
        ("set", {"latency": 50}, "no setting 'latency'; there are account, "),
    ],
)
def test_senseless_controls_are_refused(
    market: RunningExchange, control: str, asked: dict[str, Any], said: str
) -> None:
    """A control call that makes no sense gets a text that says why, and nothing moves."""
    order = market.add_orders()[0]
    market.trigger(order.algo_id)
    told = asked | ({"algo_id": order.algo_id} if control == "move" else {})
    request = urllib.request.Request(f"{market.url}/_sandbox/{control}", json.dumps(told).encode())
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=20)
    assert refused.value.status == 400
    assert re.search(said, json.loads(refused.value.read())["error"])
    refused.value.close()
    assert child_of(market, order.algo_id).status == "NEW"


def child_of(market: RunningExchange, algo_id: int) -> ChildEntry:
    child = market.book([algo_id])[algo_id].child
    assert child is not None
    return child


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
    hasty = Caller(market.url, timeout_s=0.05)
    with contextlib.suppress(OSError):
        hasty.cancel(order.algo_id)
    hasty.connection.close()
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
    assert observed(caller, "DELETE", order.algo_id) == "closed"
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
