"""The local exchange over real sockets: security, limits, every fault's effect, connections, life as a child."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from tests.caller import (
    ACCOUNTS,
    ALGO_ORDER,
    CHILD_ORDER,
    DOCS_KEY,
    DOCS_TIMESTAMP_MS,
    ED25519_KEY,
    KEY,
    OPEN_ORDERS,
    OTHER_KEY,
    OTHER_SECRET,
    TIMING,
    Caller,
    Seen,
    child_of,
)
from tests.loopback import certificate
from tests.servers import eventually
from worker.sandbox.control import ControlError, ExchangeConfig, RunningExchange, start_exchange
from worker.sandbox.faults import Fault

# --- security ---------------------------------------------------------------------------------------------------------

AT = "recvWindow=5000&timestamp=1591702613943"
SIGNED = "signature=023da8a4fc80b7c0bc74fb812354b920034c291bb9ae7aa4bdeda9d24d8a5dfa"
#: Of the key of RFC 8032.
ED25519 = "KvABC9DEzhzI6hFK8UVCIanj7GfqilBoMcSGOLU+If+jzblbRhwPxMO+Zyhoy8jbDM4itl9+ypyj5/AwC/PqAA=="


@pytest.mark.parametrize(
    ("key", "query", "code"),
    [
        (DOCS_KEY, f"algoId=2146760&{AT}&{SIGNED}", -2011),
        (
            DOCS_KEY,
            f"clientAlgoId=a%3Ab%2Fc.d_e-f&{AT}&signature=0403f70b1c057b29fac93ee371d790d9452506300378bea8fee62839d09e329d",
            -2011,
        ),
        (ED25519_KEY, f"algoId=2146760&{AT}&signature={quote(ED25519, safe='')}", -2011),
        (DOCS_KEY, f"algoId=2146760&{AT}&{SIGNED[:-1]}b", -1022),
        (DOCS_KEY, f"algoId=2146761&{AT}&{SIGNED}", -1022),
        (DOCS_KEY, f"recvWindow=5000&algoId=2146760&timestamp=1591702613943&{SIGNED}", -1022),
        (DOCS_KEY, f"algoId=2146760&recvWindow=5000&{SIGNED}&timestamp=1591702613943", -1022),
        (
            DOCS_KEY,
            f"clientAlgoId=a:b/c.d_e-f&{AT}&signature=f7143ff614272c305e9f2e16d0611d52d3088b49f0b5800d964f19a720d75fe5",
            -1022,
        ),
        (ED25519_KEY, f"algoId=2146760&{AT}&signature={ED25519}", -1022),
    ],
    ids=[
        *("algo id", "encoded client id", "Ed25519", "last digit", "other id", "other order", "not last"),
        *("not encoded", "bare plus"),
    ],
)
def test_signatures_are_checked(market: RunningExchange, caller: Caller, key: str, query: str, code: int) -> None:
    """The known signatures of published keys pass, and the order that they name is simply unknown; one changed byte,
    another order of parameters, a signature that is not last, and what is not encoded are refused."""
    market.set_clock_skew_ms(DOCS_TIMESTAMP_MS - int(time.time() * 1000))
    seen = caller.send("DELETE", f"{ALGO_ORDER}?{query}", {"x-mbx-apikey": key})
    says = "Unknown order sent." if code == -2011 else "Signature for this request is not valid."
    assert seen.error == (400, code, says)
    assert market.stats().bad_signatures == (code == -1022)


@pytest.mark.parametrize(
    ("key", "wanted"),
    [("", (401, -2014)), (None, (401, -2014)), ("unknown", (401, -2015)), (KEY.upper(), (401, -2015))],
)
def test_keys_are_checked(caller: Caller, key: str | None, wanted: tuple[int, int]) -> None:
    """A missing or empty key is malformed, an unknown one refused, and case matters."""
    seen = caller.send("DELETE", f"{ALGO_ORDER}?{caller.query(algoId=1)}", {} if key is None else {"X-MBX-APIKEY": key})
    assert seen.error[:2] == wanted


@pytest.mark.parametrize(
    ("parameters", "code"),
    [
        ({}, -1102),
        ({"algoId": "12x"}, -1100),
        ({"algoId": "-5"}, -1100),
        ({"algoId": 0}, -1100),
        ({"algoId": 2**63}, -1100),
        ({"clientAlgoId": "with space"}, -1100),
        ({"clientAlgoId": ""}, -1100),
        ({"clientAlgoId": "x" * 37}, -4015),
        ({"algoId": 1, "recvWindow": 60_001}, -1130),
        ({"algoId": 1, "recvWindow": 0}, -1130),
        ({"algoId": 1, "recvWindow": "soon"}, -1100),
    ],
)
def test_parameters_are_checked(caller: Caller, parameters: dict[str, Any], code: int) -> None:
    """No id, malformed ids and windows beyond a minute are refused with the parameter codes."""
    assert caller.call("DELETE", **parameters).error[:2] == (400, code)
    assert caller.call("GET", **parameters).error[:2] == (400, code)


@pytest.mark.parametrize(
    ("skew_ms", "refused"), [(-5_000, "ahead"), (-1_200, "ahead"), (-700, ""), (4_000, ""), (6_000, "outside")]
)
def test_the_window_follows_the_exchange_clock(
    market: RunningExchange, caller: Caller, skew_ms: int, refused: str
) -> None:
    """With the exchange's clock off, the same request is refused on the side that it is now on."""
    market.set_clock_skew_ms(skew_ms)
    server_ms = caller.send("GET", "/fapi/v1/time").json["serverTime"]
    assert abs(server_ms - skew_ms - time.time() * 1000) < 1_000
    status, code, msg = caller.cancel(1).error
    assert (status, code, refused in msg) == (400, -1021 if refused else -2011, True)


def test_accounts_are_separate(market: RunningExchange, caller: Caller, stack: ExitStack) -> None:
    """Another account's order, or child, is unknown by either id, to cancels and queries, and stays what it is."""
    order = market.add_orders(client_algo_ids=["stop:1/a"])[0]
    _, order_id = triggered(market)
    stranger = stack.enter_context(Caller(market.url, OTHER_KEY, OTHER_SECRET))
    for parameters in ({"algoId": order.algo_id}, {"clientAlgoId": order.client_algo_id}):
        assert stranger.call("DELETE", **parameters).error == (400, -2011, "Unknown order sent.")
        assert stranger.call("GET", **parameters).error == (400, -2013, "Order does not exist.")
    assert stranger.call("GET", OPEN_ORDERS).json == []
    assert stranger.call("GET", CHILD_ORDER, symbol="BTCUSDT", orderId=order_id).error[1] == -2013
    assert caller.status(order.algo_id) == "NEW"
    assert market.book()[order.algo_id].deletes == 0


# --- calls ------------------------------------------------------------------------------------------------------------


def test_a_cancel_answers_with_both_ids_and_the_string_200(market: RunningExchange, caller: Caller) -> None:
    """Success has exactly the documented fields; the second cancel is -2011 and the order shows CANCELED."""
    order = market.add_orders(client_algo_ids=["stop:1/a"])[0]
    assert caller.call("DELETE", clientAlgoId="stop:1/a").json == {
        "algoId": order.algo_id,
        "clientAlgoId": "stop:1/a",
        "code": "200",
        "msg": "success",
    }
    assert caller.cancel(order.algo_id).error == (400, -2011, "Unknown order sent.")
    assert caller.status(order.algo_id) == "CANCELED"
    entry = market.book()[order.algo_id]
    assert (entry.deletes, entry.deletes_effective, entry.gets) == (2, 1, 1)


def test_a_triggered_order_shows_its_course(market: RunningExchange, caller: Caller) -> None:
    """Queries see TRIGGERING, then TRIGGERED with a child order, then FINISHED; cancels are refused throughout."""
    order = market.add_orders()[0]
    market.trigger(order.algo_id, triggered_after_ms=60, finished_after_ms=60)
    assert caller.cancel(order.algo_id).error[1] == -2011
    seen: list[tuple[str, bool]] = []

    def finished() -> bool:
        shown = caller.call("GET", algoId=order.algo_id).json
        step = (shown["algoStatus"], bool(shown["actualOrderId"]))
        if step not in seen:
            seen.append(step)
        return bool(step[0] == "FINISHED")

    eventually(finished, what="FINISHED")
    assert seen == [("TRIGGERING", False), ("TRIGGERED", True), ("FINISHED", True)]
    assert caller.cancel(order.algo_id).error[1] == -2011


def test_orders_are_moved_by_hand(market: RunningExchange, caller: Caller) -> None:
    """Control calls cancel, expire and reject an order, once, and say so when it is too late or unknown."""
    orders = market.add_orders(3)
    for order, move, status in zip(
        orders, (market.cancel, market.expire, market.reject), ("CANCELED", "EXPIRED", "REJECTED"), strict=True
    ):
        move(order.algo_id)
        assert caller.status(order.algo_id) == status
        with pytest.raises(ControlError, match=status):
            move(order.algo_id)
    with pytest.raises(ControlError, match="no order 1"):
        market.expire(1)


def triggered(market: RunningExchange, **times: int) -> tuple[int, str]:
    """Algo id and child's id of an order that has triggered; its child rests."""
    order = market.add_orders()[0]
    market.trigger(order.algo_id, **times)
    child = child_of(market, order.algo_id)
    return order.algo_id, child.order_id


def test_a_child_is_queried_and_cancelled(market: RunningExchange, caller: Caller) -> None:
    """The order that a trigger made answers to symbol and orderId; a cancel of it answers the order, without a code."""
    algo_id, order_id = triggered(market)
    assert caller.call("GET", algoId=algo_id).json["actualOrderId"] == order_id
    shown = caller.call("GET", CHILD_ORDER, symbol="BTCUSDT", orderId=order_id).json
    assert (str(shown["orderId"]), shown["status"], shown["type"]) == (order_id, "NEW", "MARKET")
    market.fill(algo_id, "0.003", "9000")
    market.fill(algo_id, "0.001", "9400")
    by_name: dict[str, Any] = {"symbol": "BTCUSDT", "origClientOrderId": shown["clientOrderId"]}
    shown = caller.call("GET", CHILD_ORDER, **by_name).json
    assert (shown["status"], shown["executedQty"], shown["avgPrice"]) == ("PARTIALLY_FILLED", "0.004", "9100.00000")
    answer = caller.call("DELETE", CHILD_ORDER, **by_name).json
    assert (answer["status"], answer["executedQty"], "code" in answer) == ("CANCELED", "0.004", False)
    again = caller.call("DELETE", CHILD_ORDER, symbol="BTCUSDT", orderId=order_id)
    assert again.error == (400, -2011, "Unknown order sent.")
    assert caller.status(algo_id) == "FINISHED"
    child = child_of(market, algo_id)
    assert (child.status, child.executed_qty, child.avg_price) == ("CANCELED", "0.004", "9100.00000")
    assert (child.deletes, child.deletes_effective, child.gets) == (2, 1, 2)


@pytest.mark.parametrize(
    ("named", "code"),
    [
        ({"symbol": "BTCUSDT", "orderId": 5}, None),
        ({"symbol": "ETHUSDT"}, None),
        ({"symbol": ""}, -1102),
        ({"orderId": "x"}, -1100),
        ({"orderId": ""}, -1102),
    ],
)
def test_a_child_has_to_be_named_rightly(
    market: RunningExchange, caller: Caller, named: dict[str, Any], code: int | None
) -> None:
    """An unknown id and another symbol are no such order; without symbol or id the request is refused."""
    algo_id, order_id = triggered(market)
    parameters = {"symbol": "BTCUSDT", "orderId": order_id} | named
    if parameters["orderId"] == "":
        del parameters["orderId"]
    assert caller.call("GET", CHILD_ORDER, **parameters).error[1] == (code or -2013)
    assert caller.call("DELETE", CHILD_ORDER, **parameters).error[1] == (code or -2011)
    child = child_of(market, algo_id)
    assert (child.status, child.deletes) == ("NEW", 0)


def test_a_child_lags_behind(market: RunningExchange, caller: Caller) -> None:
    """For a while after TRIGGERED the order names no child, and calls do not find the one that is there."""
    algo_id, order_id = triggered(market, id_after_ms=60_000, child_after_ms=60_000)
    shown = caller.call("GET", algoId=algo_id).json
    assert (shown["algoStatus"], shown["actualOrderId"]) == ("TRIGGERED", "")
    for method, code in (("GET", -2013), ("DELETE", -2011)):
        assert caller.call(method, CHILD_ORDER, symbol="BTCUSDT", orderId=order_id).error[1] == code
    algo_id, order_id = triggered(market, id_after_ms=50, child_after_ms=50)
    eventually(lambda: caller.call("GET", algoId=algo_id).json["actualOrderId"] == order_id, what="its name")
    asked: dict[str, Any] = {"symbol": "BTCUSDT", "orderId": order_id}
    eventually(lambda: caller.call("GET", CHILD_ORDER, **asked).status == 200, what="the child")


@pytest.mark.parametrize(
    ("order_type", "status", "child"),
    [("STOP_MARKET", "FINISHED", ("MARKET", "0")), ("TAKE_PROFIT", "TRIGGERED", ("LIMIT", "8990.0"))],
)
def test_left_to_itself_a_market_child_fills_and_a_limit_child_rests(
    market: RunningExchange, caller: Caller, order_type: str, status: str, child: tuple[str, str]
) -> None:
    """The control that triggers, without a word about times, does as the exchange is known to do."""
    order = market.add_orders(order_type=order_type, price="8990.0")[0]
    request = urllib.request.Request(
        f"{market.url}/_sandbox/move", json.dumps({"algo_id": order.algo_id, "move": "trigger"}).encode()
    )
    urllib.request.urlopen(request, timeout=20).close()
    assert market.book()[order.algo_id].status == status
    order_id = child_of(market, order.algo_id).order_id
    shown = caller.call("GET", CHILD_ORDER, symbol="BTCUSDT", orderId=order_id).json
    assert (shown["type"], shown["price"]) == child


@pytest.mark.parametrize("status", ["CANCELED", "EXPIRED", "EXPIRED_IN_MATCH", "REJECTED"])
def test_a_child_is_ended_by_hand(market: RunningExchange, caller: Caller, status: str) -> None:
    """The control ends a live child as somebody else would, once; the end is none of the requests'."""
    algo_id, order_id = triggered(market)
    market.end_child(algo_id, status)
    assert caller.call("GET", CHILD_ORDER, symbol="BTCUSDT", orderId=order_id).json["status"] == status
    child = child_of(market, algo_id)
    assert child.deletes_effective == 0
    for move in (market.end_child, market.fill):
        with pytest.raises(ControlError, match="FINISHED: too late"):
            move(algo_id)
    with pytest.raises(ControlError, match="it has no child"):
        market.fill(market.add_orders()[0].algo_id)


# --- limits and incidents ---------------------------------------------------------------------------------------------


def early_in_a_minute(exchange: RunningExchange) -> int:
    """Set the exchange's clock to ten seconds past a minute, so that no minute ends during a test."""
    skew_ms = 10_000 - int(time.time() * 1000) % 60_000
    exchange.set_clock_skew_ms(skew_ms)
    return skew_ms


def test_weight_is_counted_on_every_answer(market: RunningExchange, caller: Caller) -> None:
    """Each answer tells the minute's weight, to which each call adds its own; the next minute starts anew."""
    skew_ms = early_in_a_minute(market)
    order = market.add_orders()[0]
    symbol = {"symbol": "BTCUSDT"}
    calls: list[tuple[str, str, dict[str, Any], int]] = [
        ("DELETE", ALGO_ORDER, {"algoId": order.algo_id}, 1),
        ("DELETE", ALGO_ORDER, {"algoId": order.algo_id}, 1),
        ("POST", ALGO_ORDER, {}, 0),
        ("GET", "/fapi/v1/ping", {}, 1),
        ("GET", "/nowhere", {}, 1),
        ("GET", OPEN_ORDERS, symbol, 1),
        ("GET", OPEN_ORDERS, {}, 40),
        ("GET", "/fapi/v1/allAlgoOrders", symbol, 5),
        ("GET", "/fapi/v1/openOrders", symbol, 1),
        ("GET", "/fapi/v1/openOrders", {}, 40),
        ("GET", "/fapi/v1/positionSide/dual", {}, 30),
        ("GET", "/fapi/v1/premiumIndex", symbol, 1),
        ("GET", "/fapi/v1/premiumIndex", {}, 10),
    ]
    used = 0
    for method, path, asked, weight in calls:
        used += weight
        answer = caller.call(method, path, ahead_ms=skew_ms, **asked)
        assert answer.headers["X-MBX-USED-WEIGHT-1M"] == str(used), path
    assert (market.stats().used_weight, market.stats().peak_used_weight) == (used, used)
    market.set_clock_skew_ms(skew_ms + 60_000)
    assert caller.send("GET", "/fapi/v1/ping").headers["x-mbx-used-weight-1m"] == "1"


def test_beyond_the_limit_comes_429_and_then_a_ban(stack: ExitStack) -> None:
    """The request beyond the limit gets 429 until the minute ends; going on turns it into 418 with the ban's end."""
    config = ExchangeConfig(accounts=ACCOUNTS, weight_limit_per_minute=5, timing=TIMING)
    exchange = stack.enter_context(start_exchange(config))
    skew_ms = early_in_a_minute(exchange)
    caller = stack.enter_context(Caller(exchange.url))
    assert [caller.send("GET", "/fapi/v1/ping").status for _ in range(7)] == [200] * 5 + [429] * 2
    limited = caller.send("GET", "/fapi/v1/time")
    assert 40 <= int(limited.headers["Retry-After"]) <= 50
    assert limited.error[1] == -1003

    banned = eventually(lambda: (seen := caller.send("GET", "/fapi/v1/ping")).status == 418 and seen, what="a ban")
    assert isinstance(banned, Seen)
    until_ms = int(banned.error[2].split("banned until ")[1].split(".")[0])
    assert 0 < until_ms - (time.time() * 1000 + skew_ms) <= 1_000
    assert banned.headers["Retry-After"] == "1"
    incidents = exchange.stats().incidents
    assert [incident.fault for incident in incidents] == ["limited_429", "banned_418"]
    assert len(incidents[0].requests_ms) >= 3


@pytest.mark.parametrize("fault", [fault for fault in Fault if fault.spec.gates])
def test_an_incident_stops_the_whole_ip_for_a_while(
    market: RunningExchange, caller: Caller, stack: ExitStack, fault: Fault
) -> None:
    """Every call from the IP gets the incident's answer and is counted; other IPs go on; then it is over."""
    order = market.add_orders()[0]
    market.script_faults(order.algo_id, [fault])
    first = caller.cancel(order.algo_id)
    second = caller.send("GET", "/fapi/v1/time")
    assert first.status == second.status
    elsewhere = stack.enter_context(Caller(market.url, source="127.0.0.2"))
    assert elsewhere.send("GET", "/fapi/v1/time").status == 200
    (incident,) = market.stats().incidents
    assert (incident.fault, incident.peer, len(incident.requests_ms)) == (fault, "127.0.0.1", 1)
    assert 0 <= incident.requests_ms[0] < incident.duration_ms
    eventually(lambda: time.time() * 1000 > incident.started_ms + incident.duration_ms, what="the incident ends")
    assert caller.cancel(order.algo_id).status == 200
    assert market.stats().requests_during_incidents == 1


# --- connections ------------------------------------------------------------------------------------------------------


def raw_connection(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), timeout=5)


def test_it_speaks_tls(tmp_path: Path, stack: ExitStack) -> None:
    """With a certificate the exchange and its control calls are served over TLS, faults of the connection included."""
    cert_path, key_path = certificate(tmp_path)
    config = ExchangeConfig(accounts=ACCOUNTS, tls_cert_path=cert_path, tls_key_path=key_path)
    exchange = stack.enter_context(start_exchange(config))
    assert exchange.url.startswith("https://127.0.0.1:")
    good, dropped, reset = exchange.add_orders(3)
    exchange.script_faults(dropped.algo_id, [Fault.DROP_AFTER])
    exchange.script_faults(reset.algo_id, [Fault.RESET_AFTER])
    caller = stack.enter_context(Caller(exchange.url, tls=ssl.create_default_context(cafile=cert_path)))
    assert caller.cancel(good.algo_id).status == 200
    with pytest.raises(http.client.RemoteDisconnected):
        caller.cancel(dropped.algo_id)
    caller.connection.close()
    with pytest.raises(ConnectionResetError):  # or an end without goodbye, which is one for Python's TLS client
        caller.cancel(reset.algo_id)
    assert exchange.stats().orders_by_status == {"CANCELED": 3}


# --- the process ------------------------------------------------------------------------------------------------------


def serve(config: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", "worker.sandbox.server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert process.stdin is not None
    process.stdin.write(config.encode() + b"\n")
    process.stdin.flush()
    return process


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, None], ids=["SIGTERM", "SIGINT", "end of stdin"])
def test_it_ends_when_told(how: signal.Signals | None) -> None:
    """A signal or the end of stdin ends the process with exit code 0 and nothing on stderr."""
    with serve(ExchangeConfig(accounts=ACCOUNTS).to_json()) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        url = json.loads(process.stdout.readline())["url"]
        with raw_connection(url):  # an open connection does not hold it up
            if how is None:
                process.stdin.close()
            else:
                process.send_signal(how)
            assert process.wait(30) == 0
        assert process.stderr.read() == b""
