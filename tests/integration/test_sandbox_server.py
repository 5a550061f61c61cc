"""The local exchange over real sockets: security, limits, every fault's effect, connections, life as a child."""

from __future__ import annotations

import base64
import contextlib
import datetime
import gzip
import hmac
import http.client
import ipaddress
import json
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

from tests.servers import eventually
from worker.sandbox.control import ConfigError, ControlError, ExchangeConfig, RunningExchange, start_exchange
from worker.sandbox.faults import Call, Fault, FaultTiming
from worker.sandbox.signed import Refusal, check_time

KEY, SECRET = "key-of-the-tests", "secret-of-the-tests"
OTHER_KEY, OTHER_SECRET = "other-key-of-the-tests", "other-secret-of-the-tests"
DOCS_KEY = "dbefbc809e3e83c283a984c3a1459732ea7db1360ca80c5c2c8867408d28cc83"
DOCS_SECRET = "2b5eb11e18796d12d88f13dc27dbbd02c2cc51ff7059765ed9821957d82bb4d9"
DOCS_TIMESTAMP_MS = 1_591_702_613_943
ED25519_SEED = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
ED25519_KEY = "ed25519-key-of-the-tests"

ACCOUNTS = {"default": (KEY, SECRET)}
ALL_ACCOUNTS = ACCOUNTS | {
    "other": (OTHER_KEY, OTHER_SECRET),
    "docs": (DOCS_KEY, DOCS_SECRET),
    "ed25519": (
        ED25519_KEY,
        ed25519.Ed25519PrivateKey.from_private_bytes(ED25519_SEED)
        .public_key()
        .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        .decode(),
    ),
}
TIMING = FaultTiming(
    late_answer_ms=150,
    late_execution_ms=150,
    forgotten_ms=150,
    triggering_ms=60,
    finished_after_ms=60,
    retry_after_s=1,
    ban_s=1,
    firewall_ms=200,
    ban_after_ms=150,
    drip_interval_ms=1,
)
ALGO_ORDER = "/fapi/v1/algoOrder"
OPEN_ORDERS = "/fapi/v1/openAlgoOrders"


@dataclass
class Seen:
    """What a caller saw of one answer."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes
    elapsed_s: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> tuple[int, int, str]:
        return self.status, self.json["code"], self.json["msg"]


@dataclass
class Caller:
    """A plain client of one account over one connection, without any of the project's own code."""

    url: str
    key: str = KEY
    secret: str = SECRET
    timeout_s: float = 5.0
    source: str = "127.0.0.1"
    tls: ssl.SSLContext | None = None
    connection: http.client.HTTPConnection = field(init=False)

    def __post_init__(self) -> None:
        port = urlsplit(self.url).port or 0
        if self.tls is not None:
            self.connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=self.timeout_s, context=self.tls)
        else:
            self.connection = http.client.HTTPConnection(
                "127.0.0.1", port, timeout=self.timeout_s, source_address=(self.source, 0)
            )

    def send(self, method: str, target: str, headers: dict[str, str] | None = None, body: bytes | None = None) -> Seen:
        """Send exactly this and read the whole answer."""
        started_s = time.monotonic()
        self.connection.request(method, target, body, headers or {})
        response = self.connection.getresponse()
        return Seen(response.status, response.headers, response.read(), time.monotonic() - started_s)

    def query(self, ahead_ms: int = 0, **parameters: Any) -> str:
        """A signed query; its timestamp is so much ahead of the local clock."""
        parameters = {"recvWindow": 5000} | parameters | {"timestamp": int(time.time() * 1000) + ahead_ms}
        payload = urlencode(parameters, quote_via=quote, safe="")
        return f"{payload}&signature={hmac.new(self.secret.encode(), payload.encode(), 'sha256').hexdigest()}"

    def call(self, method: str, path: str = ALGO_ORDER, ahead_ms: int = 0, **parameters: Any) -> Seen:
        """A signed call."""
        return self.send(method, f"{path}?{self.query(ahead_ms, **parameters)}", {"X-MBX-APIKEY": self.key})

    def cancel(self, algo_id: int, **parameters: Any) -> Seen:
        return self.call("DELETE", algoId=algo_id, **parameters)

    def status(self, algo_id: int) -> str:
        return str(self.call("GET", algoId=algo_id).json["algoStatus"])


@pytest.fixture(scope="module")
def shared_exchange() -> Iterator[RunningExchange]:
    """One exchange for the module; `exchange_` below hands it out empty."""
    with start_exchange(ExchangeConfig(accounts=ALL_ACCOUNTS, timing=TIMING)) as running:
        yield running


@pytest.fixture
def market(shared_exchange: RunningExchange) -> RunningExchange:
    """The exchange, empty, with short times and no faults but scripted ones."""
    shared_exchange.reset()
    return shared_exchange


@pytest.fixture
def callers() -> Iterator[contextlib.ExitStack]:
    """Closes callers at the end of a test."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def caller(market: RunningExchange, callers: contextlib.ExitStack) -> Caller:
    """A client of the account `default`."""
    return opened(callers, Caller(market.url))


def opened(stack: contextlib.ExitStack, caller: Caller) -> Caller:
    stack.callback(caller.connection.close)
    return caller


def at_docs_time(market: RunningExchange) -> None:
    """Set the exchange's clock to the moment of the published samples."""
    market.set_clock_skew_ms(DOCS_TIMESTAMP_MS - int(time.time() * 1000))


# --- security ---------------------------------------------------------------------------------------------------------

IDS_OF_DOCS = "algoId=2146760&recvWindow=5000&timestamp=1591702613943"


@pytest.mark.parametrize(
    ("payload", "signature"),
    [
        (IDS_OF_DOCS, "023da8a4fc80b7c0bc74fb812354b920034c291bb9ae7aa4bdeda9d24d8a5dfa"),
        (IDS_OF_DOCS, "023DA8A4FC80B7C0BC74FB812354B920034C291BB9AE7AA4BDEDA9D24D8A5DFA"),
        (
            "clientAlgoId=6B2I9XVcJpCjqPAJ4YoFX7&recvWindow=5000&timestamp=1591702613943",
            "bbeaee11684e6e98be6dd578d6f102c343a40089ebb41eb439662b56d3da7b9a",
        ),
        (
            "clientAlgoId=a%3Ab%2Fc.d_e-f&recvWindow=5000&timestamp=1591702613943",
            "0403f70b1c057b29fac93ee371d790d9452506300378bea8fee62839d09e329d",
        ),
    ],
    ids=["algo id", "upper case", "client id", "encoded client id"],
)
def test_good_signatures_are_accepted(market: RunningExchange, caller: Caller, payload: str, signature: str) -> None:
    """The known signatures of the published key pass, and the order that they name is simply unknown."""
    at_docs_time(market)
    seen = caller.send("DELETE", f"{ALGO_ORDER}?{payload}&signature={signature}", {"x-mbx-apikey": DOCS_KEY})
    assert seen.error == (400, -2011, "Unknown order sent.")


@pytest.mark.parametrize(
    "query",
    [
        f"{IDS_OF_DOCS}&signature={'0' * 64}",
        f"{IDS_OF_DOCS}&signature=023da8a4fc80b7c0bc74fb812354b920034c291bb9ae7aa4bdeda9d24d8a5dfb",
        IDS_OF_DOCS.replace("2146760", "2146761")
        + "&signature=023da8a4fc80b7c0bc74fb812354b920034c291bb9ae7aa4bdeda9d24d8a5dfa",
        "recvWindow=5000&algoId=2146760&timestamp=1591702613943"
        + "&signature=023da8a4fc80b7c0bc74fb812354b920034c291bb9ae7aa4bdeda9d24d8a5dfa",
        "algoId=2146760&recvWindow=5000&signature=023da8a4fc80b7c0bc74fb812354b920034c291bb9ae7aa4bdeda9d24d8a5dfa"
        + "&timestamp=1591702613943",
        "clientAlgoId=a:b/c.d_e-f&recvWindow=5000&timestamp=1591702613943"
        + "&signature=f7143ff614272c305e9f2e16d0611d52d3088b49f0b5800d964f19a720d75fe5",
        "clientAlgoId=a%3Ab%2&recvWindow=5000&timestamp=1591702613943&signature=" + "0" * 64,
    ],
    ids=["zeros", "last digit", "other id", "other order", "not last", "not encoded", "bad escape"],
)
def test_bad_signatures_are_refused(market: RunningExchange, caller: Caller, query: str) -> None:
    """One changed byte, another order of parameters, a signature that is not last and un-encoded ids get -1022."""
    at_docs_time(market)
    seen = caller.send("DELETE", f"{ALGO_ORDER}?{query}", {"X-MBX-APIKEY": DOCS_KEY})
    assert seen.error == (400, -1022, "Signature for this request is not valid.")
    assert market.stats().bad_signatures == 1


def test_an_ed25519_signature_is_accepted(market: RunningExchange, caller: Caller) -> None:
    """The RFC 8032 key's signature passes when it is percent-encoded, and is refused when '+' stands bare."""
    at_docs_time(market)
    signature = "KvABC9DEzhzI6hFK8UVCIanj7GfqilBoMcSGOLU+If+jzblbRhwPxMO+Zyhoy8jbDM4itl9+ypyj5/AwC/PqAA=="
    headers = {"X-MBX-APIKEY": ED25519_KEY}
    good = caller.send("DELETE", f"{ALGO_ORDER}?{IDS_OF_DOCS}&signature={quote(signature, safe='')}", headers)
    bare = caller.send("DELETE", f"{ALGO_ORDER}?{IDS_OF_DOCS}&signature={signature}", headers)
    assert (good.error[1], bare.error[1]) == (-2011, -1022)


def test_an_rsa_signature_is_accepted(callers: contextlib.ExitStack) -> None:
    """An account with an RSA key takes PKCS#1 v1.5 over SHA-256 of the query, and nothing else."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    exchange = callers.enter_context(start_exchange(ExchangeConfig(accounts={"rsa": ("rsa-key", pem)})))
    caller = opened(callers, Caller(exchange.url))
    payload = f"algoId={exchange.add_orders()[0].algo_id}&timestamp={int(time.time() * 1000)}"
    for text, wanted in ((payload + "0", 400), (payload, 200)):
        signature = base64.b64encode(key.sign(text.encode(), padding.PKCS1v15(), hashes.SHA256()))
        target = f"{ALGO_ORDER}?{payload}&signature={quote(signature, safe='')}"
        assert caller.send("DELETE", target, {"X-MBX-APIKEY": "rsa-key"}).status == wanted


def test_parameters_may_come_in_a_form_body(market: RunningExchange, caller: Caller) -> None:
    """A DELETE with a form body is signed over query and body together."""
    order = market.add_orders()[0]
    body = caller.query(algoId=order.algo_id).encode()
    headers = {"X-MBX-APIKEY": KEY, "Content-Type": "application/x-www-form-urlencoded"}
    assert caller.send("DELETE", ALGO_ORDER, headers, body).status == 200


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


def test_signature_and_timestamp_are_mandatory(caller: Caller) -> None:
    """Without a signature, or with a good one over no timestamp, the answer is -1102."""
    headers = {"X-MBX-APIKEY": KEY}
    for payload in ("algoId=1", ""):
        seen = caller.send("DELETE", f"{ALGO_ORDER}?{payload}", headers)
        assert (seen.error[1], "signature" in seen.error[2]) == (-1102, True)
    signature = hmac.new(SECRET.encode(), b"algoId=1", "sha256").hexdigest()
    seen = caller.send("DELETE", f"{ALGO_ORDER}?algoId=1&signature={signature}", headers)
    assert (seen.error[1], "timestamp" in seen.error[2]) == (-1102, True)


@pytest.mark.parametrize(
    ("timestamp", "refused"),
    [(999, ""), (1_000, "ahead"), (-5_000, ""), (-5_001, "outside"), (-5_000_000, "outside"), (5_000_000, "ahead")],
)
def test_the_window_has_exact_ends(timestamp: int, refused: str) -> None:
    """Accepted are timestamps less than 1,000 ms ahead and at most recvWindow behind, to the millisecond."""
    now_ms = 1_750_485_492_076
    parameters = {"timestamp": str(now_ms + timestamp), "recvWindow": "5000"}
    if not refused:
        check_time(parameters, now_ms)
        return
    with pytest.raises(Refusal) as caught:
        check_time(parameters, now_ms)
    assert refused in json.loads(caught.value.answer.body)["msg"]


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


def test_accounts_are_separate(market: RunningExchange, caller: Caller, callers: contextlib.ExitStack) -> None:
    """Another account's order is unknown by either id, to cancels and queries, and stays what it is."""
    order = market.add_orders(client_algo_ids=["stop:1/a"])[0]
    stranger = opened(callers, Caller(market.url, OTHER_KEY, OTHER_SECRET))
    for parameters in ({"algoId": order.algo_id}, {"clientAlgoId": order.client_algo_id}):
        assert stranger.call("DELETE", **parameters).error == (400, -2011, "Unknown order sent.")
        assert stranger.call("GET", **parameters).error == (400, -2013, "Order does not exist.")
    assert stranger.call("GET", OPEN_ORDERS).json == []
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
    assert abs(entry.delete_arrivals_ns[0] - time.time_ns()) < 5e9


def test_an_order_can_be_created_queried_and_listed(caller: Caller) -> None:
    """POST opens an order that GET and the open list show; a second one with its client id is -4116."""
    terms: dict[str, Any] = {"algoType": "CONDITIONAL", "symbol": "BNBUSDT", "side": "SELL", "type": "TAKE_PROFIT"}
    terms |= {"quantity": "0.01", "triggerPrice": "750.000", "clientAlgoId": "tp-1"}
    created = caller.call("POST", **terms).json
    assert (created["algoStatus"], created["clientAlgoId"], created["orderType"]) == ("NEW", "tp-1", "TAKE_PROFIT")
    assert "actualOrderId" not in created
    assert caller.call("POST", **terms).error == (400, -4116, "ClientOrderId is duplicated.")
    listed = caller.call("GET", OPEN_ORDERS, symbol="BNBUSDT").json
    assert [order["algoId"] for order in listed] == [created["algoId"]]
    assert caller.call("GET", OPEN_ORDERS, symbol="BTCUSDT").json == []
    shown = caller.call("GET", clientAlgoId="tp-1").json
    assert (shown["algoId"], shown["symbol"], shown["actualOrderId"]) == (created["algoId"], "BNBUSDT", "")


@pytest.mark.parametrize(
    ("wrong", "code"),
    [({"symbol": ""}, -1102), ({"side": "HOLD"}, -1117), ({"type": "LIMIT"}, -1116), ({"quantity": "0.0"}, -1130)],
)
def test_bad_terms_are_refused(caller: Caller, wrong: dict[str, str], code: int) -> None:
    """A new order needs a symbol, a side, a conditional type and positive numbers."""
    terms: dict[str, Any] = {"symbol": "BNBUSDT", "side": "SELL", "type": "STOP", "quantity": "1", "triggerPrice": "1"}
    assert caller.call("POST", **terms | wrong).error[:2] == (400, code)


def test_public_calls_answer(market: RunningExchange, caller: Caller) -> None:
    """Ping, the clock, the limits and unknown paths answer without a key."""
    assert caller.send("GET", "/fapi/v1/ping").json == {}
    limits = caller.send("GET", "/fapi/v1/exchangeInfo").json["rateLimits"]
    wanted = {"rateLimitType": "REQUEST_WEIGHT", "interval": "MINUTE", "intervalNum": 1, "limit": 2400}
    assert wanted in limits
    assert caller.send("DELETE", "/fapi/v1/order").error[:2] == (404, -5000)
    assert market.stats().requests["DELETE /fapi/v1/order"] == {"404": 1}


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


# --- faults -----------------------------------------------------------------------------------------------------------

#: What a client that waits 5 s sees of a DELETE: HTTP status and code, or what the network did.
ON_CANCEL = {
    **dict.fromkeys(["drop_before", "drop_after", "execute_after_drop", "client_id_reused"], "closed"),
    **dict.fromkeys(["reset_before", "reset_after"], "reset"),
    **dict.fromkeys(["answer_late", "execute_late", "close_after_answer", "drip"], "200 code 200"),
    **dict.fromkeys(["body_cut", "body_cut_executed"], "cut"),
    "huge_body": "200 huge",
    "gzip": "200 gzip code 200",
    "not_http": "not http",
    **dict.fromkeys(["empty_200", "empty_200_executed"], "200 empty"),
    **dict.fromkeys(["html_200", "html_200_executed"], "200 html"),
    **dict.fromkeys(["no_code_200", "no_code_200_executed"], "200 undecided"),
    **dict.fromkeys(["wrong_id_200", "wrong_id_200_executed"], "200 wrong id"),
    "deep_json_200": "200 deep",
    "redirect_302": "302 empty",
    "challenge_202": "202 empty",
    "forbidden_403": "403 html",
    "banned_418": "418 code -1003",
    "limited_429": "429 code -1003",
    "limited_1003": "400 code -1003",
    **dict.fromkeys(["timeout_408", "timeout_408_executed"], "408 code -1007"),
    **dict.fromkeys(["html_500", "html_500_executed"], "500 html"),
    **dict.fromkeys(["retry_500", "retry_500_executed"], "500 code -1000"),
    **dict.fromkeys(["bad_gateway_502", "bad_gateway_502_executed"], "502 html"),
    **dict.fromkeys(["gateway_timeout_504", "gateway_timeout_504_executed"], "504 html"),
    **dict.fromkeys(["unknown_503", "unknown_503_executed", "execute_after_503", "trigger_503"], "503 code -1000"),
    **dict.fromkeys(["unavailable_503", "internal_503"], "503 code -1001"),
    "throttled_503": "503 code -1008",
    "retry_after_503": "503 code -1001",
    "maintenance_2011": "400 code -2011",
    "key_id_2008": "401 code -2008",
    **dict.fromkeys(["unknown_1000", "unknown_1000_executed"], "400 code -1000"),
    "disconnected_1001": "400 code -1001",
    **dict.fromkeys(["disconnected_1001_unknown", "disconnected_1001_unknown_executed"], "400 code -1001"),
    **dict.fromkeys(["unexpected_1006", "unexpected_1006_executed"], "400 code -1006"),
    **dict.fromkeys(["timeout_1007", "timeout_1007_executed"], "400 code -1007"),
    "throttled_1008": "400 code -1008",
    **dict.fromkeys(["message_1010", "message_1010_executed"], "400 code -1010"),
    "too_many_orders_1015": "400 code -1015",
    "shutting_down_1016": "400 code -1016",
    **dict.fromkeys(["ahead_1021", "outside_1021"], "400 code -1021"),
    "window_5028": "400 code -5028",
    "algo_20124": "400 code -20124",
    **dict.fromkeys(["unlisted_code", "unlisted_code_executed"], "400 code -7999"),
    **dict.fromkeys(["false_2011", "other_text_2011", "forgotten", "late_book", "trigger_2011"], "400 code -2011"),
    **dict.fromkeys(["trigger_rejected", "trigger_stuck", "triggered_before"], "400 code -2011"),
    **dict.fromkeys(["cancelled_before", "expired_before", "rejected_before"], "400 code -2011"),
    "not_found_2013": "400 code -2013",
    **dict.fromkeys(["false_4117", "trigger_4117"], "400 code -4117"),
    "path_404": "404 html",
    "method_405": "405 html",
    "region_451": "451 code 0",
    "unauthorized_1002": "401 code -1002",
    "ip_1004": "400 code -1004",
    "invalid_1013": "400 code -1013",
    "unsupported_1020": "400 code -1020",
    "signature_1022": "400 code -1022",
    "not_found_1099": "400 code -1099",
    "characters_1100": "400 code -1100",
    "missing_1102": "400 code -1102",
    **dict.fromkeys(["disabled_2011", "account_2011", "symbol_2011", "restricted_2011"], "400 code -2011"),
    "key_format_2014": "401 code -2014",
    "key_2015": "401 code -2015",
    "key_locked_2017": "401 code -2017",
    "client_id_4015": "400 code -4015",
    "key_type_4056": "400 code -4056",
    "method_4084": "400 code -4084",
    "inactive_4109": "400 code -4109",
    "quantitative_4400": "400 code -4400",
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


def observed(caller: Caller, method: str, algo_id: int) -> str:
    try:
        seen = caller.call(method, algoId=algo_id)
    except http.client.RemoteDisconnected:
        return "closed"
    except ConnectionResetError:
        return "reset"
    except http.client.IncompleteRead:
        return "cut"
    except http.client.BadStatusLine:
        return "not http"
    return f"{seen.status} {described(seen.body, algo_id)}"


def described(body: bytes, algo_id: int) -> str:
    if not body:
        return "empty"
    if body.startswith(b"<html"):
        return "html"
    if body.startswith(b"\x1f\x8b"):
        return f"gzip {described(gzip.decompress(body), algo_id)}"
    try:
        answer = json.loads(body)
    except RecursionError:
        return "deep"
    if len(body) > 64 * 1024:
        return "huge"
    if answer.get("algoId", algo_id) != algo_id:
        return "wrong id"
    if "algoStatus" in answer:
        return f"status {answer['algoStatus']}"
    return f"code {answer['code']}" if "code" in answer else "undecided"


@pytest.mark.parametrize("fault", [fault for fault in Fault if Call.CANCEL in fault.spec.calls])
def test_a_cancel_meets_the_fault(market: RunningExchange, caller: Caller, fault: Fault) -> None:
    """The client sees what the fault stands for, and the book says whether the order was cancelled."""
    order = market.add_orders()[0]
    market.script_faults(order.algo_id, [fault])
    assert observed(caller, "DELETE", order.algo_id) == ON_CANCEL[fault]
    wanted = ENDS_AS.get(fault, "CANCELED" if fault.spec.executes else "NEW")
    eventually(lambda: market.book()[order.algo_id].status == wanted, 2, wanted)
    entry = market.book()[order.algo_id]
    assert (entry.deletes, entry.deletes_effective) == (1, int(fault.spec.executes))
    assert entry.faults == [fault]
    assert market.stats().faults_injected == {fault: 1}


@pytest.mark.parametrize("fault", [fault for fault in Fault if Call.QUERY in fault.spec.calls])
def test_a_query_meets_the_fault(market: RunningExchange, caller: Caller, fault: Fault) -> None:
    """A query sees the same answers, and whatever it sees, it changes nothing."""
    order = market.add_orders()[0]
    market.script_faults(order.algo_id, [fault], call="query")
    wanted = ON_QUERY.get(fault) or ON_CANCEL[fault]
    assert observed(caller, "GET", order.algo_id) == wanted
    entry = market.book()[order.algo_id]
    assert (entry.status, entry.gets, entry.deletes_effective) == ("NEW", 1, 0)


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
            eventually(partial(was_deleted, market, order.algo_id), 2, "the DELETE arrives")
            assert market.book()[order.algo_id].status == before
            assert answer.result().status == 200
            assert answer.result().elapsed_s >= 0.15


@pytest.mark.parametrize("fault", [Fault.EXECUTE_AFTER_503, Fault.EXECUTE_AFTER_DROP, Fault.EXECUTE_LATE])
def test_a_cancel_can_strike_after_the_client_has_left(
    market: RunningExchange, callers: contextlib.ExitStack, fault: Fault
) -> None:
    """An order is NEW to whoever looks at once, and cancelled later, with the client gone long since."""
    order = market.add_orders()[0]
    market.script_faults(order.algo_id, [fault])
    hasty = opened(callers, Caller(market.url, timeout_s=0.05))
    with contextlib.suppress(OSError):
        hasty.cancel(order.algo_id)
    hasty.connection.close()
    assert market.book()[order.algo_id].status == "NEW"
    eventually(lambda: market.book()[order.algo_id].status == "CANCELED", 2, "cancelled late")


def test_a_dripped_answer_outlasts_a_time_out_between_bytes(
    market: RunningExchange, callers: contextlib.ExitStack
) -> None:
    """A time-out that each byte resets never fires, although the whole answer takes much longer."""
    order = market.add_orders()[0]
    market.script_faults(order.algo_id, [Fault.DRIP])
    patient = opened(callers, Caller(market.url, timeout_s=0.15))
    assert patient.cancel(order.algo_id).elapsed_s > 0.15


def test_a_forgotten_order_comes_back(market: RunningExchange, caller: Caller) -> None:
    """For a while cancels get -2011 and queries -2013; then the order is there, NEW, and can be cancelled."""
    order = market.add_orders()[0]
    market.script_faults(order.algo_id, [Fault.FORGOTTEN])
    assert caller.cancel(order.algo_id).error[1] == -2011
    assert caller.call("GET", algoId=order.algo_id).error == (400, -2013, "Order does not exist.")
    assert caller.call("GET", OPEN_ORDERS, symbol="BTCUSDT").json == []
    eventually(lambda: caller.call("GET", algoId=order.algo_id).status == 200, 2, "visible again")
    assert caller.cancel(order.algo_id).json["code"] == "200"


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


def test_a_redirect_that_is_followed_shows(market: RunningExchange, caller: Caller) -> None:
    """The redirect leads to a path that nobody else asks for."""
    order = market.add_orders()[0]
    market.script_faults(order.algo_id, [Fault.REDIRECT_302])
    location = caller.cancel(order.algo_id).headers["Location"]
    assert caller.send("DELETE", location).status == 404
    assert market.stats().requests[f"DELETE {location}"] == {"404": 1}


def seeded_faults(order_of_calls: int, seed: int) -> list[list[str]]:
    config = ExchangeConfig(
        accounts=ACCOUNTS, faults="some", seed=seed, fault_rate=0.6, incidents=(), timing=TIMING.scaled(0.1)
    )
    with start_exchange(config) as exchange:
        orders = exchange.add_orders(30)
        for order in orders[::order_of_calls]:
            caller = Caller(exchange.url)
            for method in ("DELETE", "GET"):
                observed(caller, method, order.algo_id)
                caller.connection.close()
        return [exchange.book()[order.algo_id].faults for order in orders]


def test_a_seed_replays() -> None:
    """Two runs with one seed give every order the same faults though it is asked in another sequence; seeds differ."""
    first, backwards, other = seeded_faults(1, 7), seeded_faults(-1, 7), seeded_faults(1, 8)
    assert first == backwards != other
    assert sum(map(bool, first)) > 10


def test_faults_end_by_themselves(callers: contextlib.ExitStack) -> None:
    """After `faults_for_ms` nothing is injected any more."""
    config = ExchangeConfig(accounts=ACCOUNTS, faults="all", fault_rate=1.0, faults_for_ms=0)
    exchange = callers.enter_context(start_exchange(config))
    caller = opened(callers, Caller(exchange.url))
    assert all(caller.cancel(order.algo_id).status == 200 for order in exchange.add_orders(60))
    assert exchange.stats().faults_injected == {}


# --- limits and incidents ---------------------------------------------------------------------------------------------


def early_in_a_minute(exchange: RunningExchange) -> int:
    """Set the exchange's clock to ten seconds past a minute, so that no minute ends during a test."""
    skew_ms = 10_000 - int(time.time() * 1000) % 60_000
    exchange.set_clock_skew_ms(skew_ms)
    return skew_ms


def test_weight_is_counted_on_every_answer(market: RunningExchange, caller: Caller) -> None:
    """Each answer tells the minute's weight: 1 a call, 40 for all symbols, 0 to create; the next minute starts anew."""
    skew_ms = early_in_a_minute(market)
    order = market.add_orders()[0]
    answers = [
        caller.call("DELETE", ahead_ms=skew_ms, algoId=order.algo_id),
        caller.call("DELETE", ahead_ms=skew_ms, algoId=order.algo_id),
        caller.send("GET", "/fapi/v1/ping"),
        caller.send("GET", "/nowhere"),
        caller.call("GET", OPEN_ORDERS, ahead_ms=skew_ms, symbol="BTCUSDT"),
        caller.call("GET", OPEN_ORDERS, ahead_ms=skew_ms),
        caller.call("POST", ahead_ms=skew_ms),
    ]
    used = [int(answer.headers["X-MBX-USED-WEIGHT-1M"]) for answer in answers]
    assert used == [1, 2, 3, 4, 5, 45, 45]
    assert (market.stats().used_weight, market.stats().peak_used_weight) == (45, 45)
    market.set_clock_skew_ms(skew_ms + 60_000)
    assert caller.send("GET", "/fapi/v1/ping").headers["x-mbx-used-weight-1m"] == "1"


def test_beyond_the_limit_comes_429_and_then_a_ban(callers: contextlib.ExitStack) -> None:
    """The request beyond the limit gets 429 until the minute ends; going on turns it into 418 with the ban's end."""
    config = ExchangeConfig(accounts=ACCOUNTS, weight_limit_per_minute=5, timing=TIMING)
    exchange = callers.enter_context(start_exchange(config))
    skew_ms = early_in_a_minute(exchange)
    caller = opened(callers, Caller(exchange.url))
    assert [caller.send("GET", "/fapi/v1/ping").status for _ in range(7)] == [200] * 5 + [429] * 2
    limited = caller.send("GET", "/fapi/v1/time")
    assert 40 <= int(limited.headers["Retry-After"]) <= 50
    assert limited.error[1] == -1003

    banned = eventually(lambda: (seen := caller.send("GET", "/fapi/v1/ping")).status == 418 and seen, 2, "a ban")
    assert isinstance(banned, Seen)
    until_ms = int(banned.error[2].split("banned until ")[1].split(".")[0])
    assert 0 < until_ms - (time.time() * 1000 + skew_ms) <= 1_000
    assert banned.headers["Retry-After"] == "1"
    incidents = exchange.stats().incidents
    assert [incident.fault for incident in incidents] == ["limited_429", "banned_418"]
    assert len(incidents[0].requests_ms) >= 3


@pytest.mark.parametrize("fault", [fault for fault in Fault if fault.spec.gates])
def test_an_incident_stops_the_whole_ip_for_a_while(
    market: RunningExchange, caller: Caller, callers: contextlib.ExitStack, fault: Fault
) -> None:
    """Every call from the IP gets the incident's answer and is counted; other IPs go on; then it is over."""
    order = market.add_orders()[0]
    market.script_faults(order.algo_id, [fault])
    first = caller.cancel(order.algo_id)
    second = caller.send("GET", "/fapi/v1/time")
    assert first.status == second.status
    elsewhere = opened(callers, Caller(market.url, source="127.0.0.2"))
    assert elsewhere.send("GET", "/fapi/v1/time").status == 200
    (incident,) = market.stats().incidents
    assert (incident.fault, incident.peer, len(incident.requests_ms)) == (fault, "127.0.0.1", 1)
    assert 0 <= incident.requests_ms[0] < incident.duration_ms
    eventually(lambda: time.time() * 1000 > incident.started_ms + incident.duration_ms, 3, "the incident ends")
    assert caller.cancel(order.algo_id).status == 200
    assert market.stats().requests_during_incidents == 1


def test_incident_answers_are_recognizable(market: RunningExchange, caller: Caller) -> None:
    """The challenge has its header and no body, the block is the firewall's HTML; neither tells a weight."""
    market.start_incident(Fault.CHALLENGE_202)
    challenge = caller.send("GET", "/fapi/v1/time")
    assert (challenge.status, challenge.headers["x-amzn-waf-action"], challenge.body) == (202, "challenge", b"")
    market.reset()
    market.start_incident(Fault.FORBIDDEN_403, duration_ms=60_000)
    block = caller.send("GET", "/fapi/v1/time")
    assert (block.status, block.headers["Content-Type"], block.headers["X-MBX-USED-WEIGHT-1M"]) == (
        403,
        "text/html",
        None,
    )
    assert market.stats().incidents[0].duration_ms == 60_000


# --- connections ------------------------------------------------------------------------------------------------------


def test_a_connection_is_kept_alive(market: RunningExchange, caller: Caller) -> None:
    """Many requests use one connection; which DELETEs came on a fresh one is known."""
    orders = market.add_orders(5)
    for order in orders:
        assert caller.cancel(order.algo_id).status == 200
    stats = market.stats()
    assert (stats.connections_opened, stats.deletes_on_fresh_connections) == (1, 1)
    assert stats.requests == {f"DELETE {ALGO_ORDER}": {"200": 5}}


def test_a_connection_is_closed_when_asked(caller: Caller) -> None:
    """`Connection: close` ends the connection after the answer."""
    raw = raw_connection(caller.url)
    with raw:
        raw.sendall(b"GET /fapi/v1/ping HTTP/1.1\r\nHost: x\r\nCONNECTION: Close\r\n\r\n")
        assert read_all(raw).endswith(b"{}")


def raw_connection(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), timeout=5)


def read_all(raw: socket.socket) -> bytes:
    data = b""
    while chunk := raw.recv(65_536):
        data += chunk
    return data


def test_pipelined_requests_are_answered_in_order(market: RunningExchange, caller: Caller) -> None:
    """Requests sent at once, the slow one first, get their answers in the order they were sent."""
    orders = market.add_orders(20)
    market.script_faults(orders[0].algo_id, [Fault.ANSWER_LATE])
    requests = [
        f"DELETE {ALGO_ORDER}?{caller.query(algoId=order.algo_id)} HTTP/1.1\r\nhost: x\r\nx-MBX-apikey: {KEY}\r\n\r\n"
        for order in orders
    ]
    last = "GET /fapi/v1/ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with raw_connection(market.url) as raw:
        raw.sendall(("".join(requests) + last).encode())
        answers = read_all(raw)
    ids = [int(part.split(b",")[0]) for part in answers.split(b'"algoId":')[1:]]
    assert ids == [order.algo_id for order in orders]
    assert market.stats().orders_by_status == {"CANCELED": 20}


def test_a_request_may_come_in_pieces(market: RunningExchange) -> None:
    """A request that trickles in, body and all, is served once it is complete."""
    body = b'{"clock_skew_ms":0}'
    request = b"POST /_sandbox/set HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    with raw_connection(market.url) as raw:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in request + body:
            raw.sendall(bytes([byte]))
        assert read_all(raw).startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET /\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", b"501"),
        (b"POST / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n", b"413"),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 20_000, b"431"),
    ],
)
def test_what_is_no_request_is_refused(market: RunningExchange, sent: bytes, status: bytes) -> None:
    """Bytes that cannot be read as a request get an answer that says why, and the connection is closed."""
    with raw_connection(market.url) as raw:
        raw.sendall(sent)
        assert read_all(raw).startswith(b"HTTP/1.1 " + status)
    assert market.stats().in_flight == 0


def test_latency_lies_between_execution_and_answer(market: RunningExchange, callers: contextlib.ExitStack) -> None:
    """Requests in flight overlap, each takes the latency, and the orders are cancelled on arrival."""
    market.set_latency_ms(200)
    orders = market.add_orders(20)
    clients = [opened(callers, Caller(market.url)) for _ in orders]
    with ThreadPoolExecutor(len(orders)) as pool:
        answers = [pool.submit(client.cancel, order.algo_id) for client, order in zip(clients, orders, strict=True)]
        eventually(lambda: market.stats().orders_by_status == {"CANCELED": 20}, 2, "all cancelled")
        assert all(answer.result().elapsed_s >= 0.2 for answer in answers)
    stats = market.stats()
    assert (stats.peak_in_flight, stats.in_flight) == (20, 0)


def test_idle_connections_are_closed(callers: contextlib.ExitStack) -> None:
    """A connection without a request is closed after the idle time, one that is owed an answer is not."""
    timing = FaultTiming(late_answer_ms=300)
    config = ExchangeConfig(accounts=ACCOUNTS, idle_close_s=0.1, timing=timing)
    exchange = callers.enter_context(start_exchange(config))
    order = exchange.add_orders()[0]
    exchange.script_faults(order.algo_id, [Fault.ANSWER_LATE])
    caller = opened(callers, Caller(exchange.url))
    assert caller.cancel(order.algo_id).elapsed_s >= 0.3
    started_s = time.monotonic()
    assert caller.connection.sock.recv(1) == b""
    assert 0.05 < time.monotonic() - started_s < 2


def certificate(directory: Path) -> tuple[str, str]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    cert_path, key_path = directory / "cert.pem", directory / "key.pem"
    cert_path.write_bytes(signed.public_bytes(Encoding.PEM))
    key_path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return str(cert_path), str(key_path)


def test_it_speaks_tls(tmp_path: Path, callers: contextlib.ExitStack) -> None:
    """With a certificate the exchange and its control calls are served over TLS, faults of the connection included."""
    cert_path, key_path = certificate(tmp_path)
    config = ExchangeConfig(accounts=ACCOUNTS, tls_cert_path=cert_path, tls_key_path=key_path)
    exchange = callers.enter_context(start_exchange(config))
    assert exchange.url.startswith("https://127.0.0.1:")
    good, dropped, reset = exchange.add_orders(3)
    exchange.script_faults(dropped.algo_id, [Fault.DROP_AFTER])
    exchange.script_faults(reset.algo_id, [Fault.RESET_AFTER])
    caller = opened(callers, Caller(exchange.url, tls=ssl.create_default_context(cafile=cert_path)))
    assert caller.cancel(good.algo_id).status == 200
    assert observed(caller, "DELETE", dropped.algo_id) == "closed"
    caller.connection.close()
    # Python's TLS client reports a reset and an end without goodbye alike.
    assert observed(caller, "DELETE", reset.algo_id) in {"closed", "reset"}
    assert exchange.stats().orders_by_status == {"CANCELED": 3}


# --- the process ------------------------------------------------------------------------------------------------------


def test_many_orders_are_opened_in_one_call(market: RunningExchange) -> None:
    """Ten thousand orders take well under a second, and each has an id of its own."""
    started_s = time.monotonic()
    orders = market.add_orders(10_000)
    assert time.monotonic() - started_s < 1
    assert len({order.algo_id for order in orders}) == 10_000
    assert market.stats().orders_by_status == {"NEW": 10_000}


def test_bad_control_calls_are_refused(market: RunningExchange, caller: Caller) -> None:
    """A control call that makes no sense is an error with its reason, and the exchange goes on."""
    with pytest.raises(ControlError, match="no account 'nobody'"):
        market.add_orders(account="nobody")
    with pytest.raises(ControlError, match="DuplicateClientId"):
        market.add_orders(client_algo_ids=["a", "a"])
    with pytest.raises(ControlError, match="does not stop an IP"):
        market.start_incident(Fault.DROP_AFTER)
    assert caller.send("GET", "/_sandbox/nothing").status == 404
    assert caller.send("GET", "/_sandbox/stats", body=b"no json").status == 400
    assert market.stats().requests == {}


def test_reset_starts_over(market: RunningExchange, caller: Caller) -> None:
    """Book, counters, scripts, incidents, clock and latency are as at the start; ids are not given twice."""
    order = market.add_orders()[0]
    market.script_faults(order.algo_id, [Fault.LIMITED_429])
    caller.cancel(order.algo_id)
    market.set_clock_skew_ms(99_000)
    market.set_latency_ms(99_000)
    market.reset()
    assert market.book() == {}
    assert caller.cancel(order.algo_id).error[1] == -2011
    stats = market.stats()
    assert (stats.requests, stats.incidents, stats.faults_injected) == ({f"DELETE {ALGO_ORDER}": {"400": 1}}, [], {})
    assert market.add_orders()[0].algo_id > order.algo_id


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
            assert process.wait(5) == 0
        assert process.stderr.read() == b""


def test_it_dies_with_its_parent() -> None:
    """When the process that started the exchange is killed, nobody listens on its port any more."""
    code = (
        "from worker.sandbox.control import ExchangeConfig, start_exchange\n"
        "exchange = start_exchange(ExchangeConfig(accounts={'a': ('k', 's')}))\n"
        "print(exchange.url, flush=True)\n"
        "input()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[2],
    )
    with parent:
        assert parent.stdout is not None
        url = parent.stdout.readline().decode().strip()
        raw_connection(url).close()
        parent.kill()
        parent.wait(5)

        def nobody_listens() -> bool:
            try:
                raw_connection(url).close()
            except ConnectionRefusedError:
                return True
            except ConnectionResetError:  # it was just ending
                return False
            return False

        eventually(nobody_listens, 5, "the exchange is gone")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ("no json", "not JSON"),
        ("[]", "JSON object"),
        ("{}", "accounts"),
        ('{"accounts":{"a":["k"]}}', "accounts"),
        ('{"accounts":{"a":["k","-----BEGIN PUBLIC KEY-----\\nsecret\\n"]}}', "accounts"),
        ('{"accounts":{"a":["k","secret"],"b":["k","secret"]}}', "accounts"),
        ('{"accounts":{"a":["k","secret"]},"sead":1}', "sead"),
        ('{"accounts":{"a":["k","secret"]},"seed":"1"}', "seed"),
        ('{"accounts":{"a":["k","secret"]},"faults":"many"}', "faults"),
        ('{"accounts":{"a":["k","secret"]},"fault_rate":2}', "fault_rate"),
        ('{"accounts":{"a":["k","secret"]},"latency_ms":-1}', "latency_ms"),
        ('{"accounts":{"a":["k","secret"]},"idle_close_s":0}', "idle_close_s"),
        ('{"accounts":{"a":["k","secret"]},"incidents":["drop_after"]}', "incidents"),
        ('{"accounts":{"a":["k","secret"]},"timing":{"ban_s":0}}', "ban_s"),
        ('{"accounts":{"a":["k","secret"]},"tls_cert_path":"/nowhere"}', "tls_key_path"),
        ('{"accounts":{"a":["k","secret"]},"tls_cert_path":"/no","tls_key_path":"/no"}', "tls_cert_path"),
    ],
)
def test_a_bad_configuration_is_named(config: str, named: str) -> None:
    """A configuration that cannot be used is refused by a text that names the field and shows no secret."""
    from worker.sandbox.server import ExchangeServer

    with pytest.raises(ConfigError, match=named) as caught:
        ExchangeServer(ExchangeConfig.from_json(config))
    assert "secret" not in str(caught.value).replace("a secret or public key", "")


def test_a_bad_configuration_ends_the_process() -> None:
    """The process says why on one line of stderr and exits with 78; its starter gets an error instead of a URL."""
    with serve('{"accounts":{"a":["k","secret"]},"faults":"many"}') as process:
        out, err = process.communicate(timeout=10)
        assert (process.returncode, out) == (78, b"")
        assert err.count(b"\n") == 1
        assert b"faults" in err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = ExchangeConfig(accounts=ACCOUNTS, port=taken.getsockname()[1])
        with pytest.raises(ControlError, match="did not start"):
            start_exchange(config)


def test_a_configuration_survives_its_journey() -> None:
    """What is written for the child is what it reads, and the secret is not in its text for people."""
    config = ExchangeConfig(
        accounts=ALL_ACCOUNTS, faults="all", incidents=("limited_429",), timing=TIMING, faults_for_ms=5
    )
    assert ExchangeConfig.from_json(config.to_json()) == config
    assert SECRET not in repr(config)


def test_a_stopped_exchange_answers_no_more() -> None:
    """After `stop`, which may be repeated, control calls fail with an error of their own."""
    exchange = start_exchange(ExchangeConfig(accounts=ACCOUNTS))
    exchange.stop()
    exchange.stop()
    assert exchange.process.returncode == 0
    with pytest.raises(ControlError, match="did not answer stats"):
        exchange.stats()
