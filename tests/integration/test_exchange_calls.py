"""Calls to the exchange over either transport: what goes over the wire, and what an answer tells beside its body."""

from __future__ import annotations

import asyncio
import base64
import email.utils
import gzip
import hashlib
import hmac
import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from producer.message import Call
from tests.environments import pem
from tests.loopback import DONE, Behaviour, Peer, answering, free_port, http_answer, query_of
from tests.servers import eventually
from tests.ways import API_KEY, REF, SECRET, Bench, passed, replied
from worker.classify import Means, OrderRef, Reply, SymbolRef, classify
from worker.clock import BEHIND_MS, ServerClock
from worker.decide import MAX_PAUSE_MS
from worker.signing import Credential

# ---- on the wire ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ref", "pair"),
    [
        (OrderRef(None, "a:b/c.d_e-f"), "clientAlgoId=a%3Ab%2Fc.d_e-f"),
        (OrderRef(None, "..%2F/../x"), "clientAlgoId=..%252F%2F..%2Fx"),
        (OrderRef(9223372036854775807), "algoId=9223372036854775807"),
        (REF, "algoId=2146760"),
    ],
)
@pytest.mark.parametrize(("call", "method"), [(Call.CANCEL, "DELETE"), (Call.QUERY, "GET")])
def test_signed_bytes_are_the_sent_bytes(bench: Bench, call: Call, method: str, ref: OrderRef, pair: str) -> None:
    """The request line holds, byte for byte, the encoded string that was signed, and the signature last."""
    server, client = bench.to(answering(http_answer(DONE + b"\n")))
    assert client.ask(ref, call) == Reply(http=200, body=DONE + b"\n")
    head = server.heads[0].decode("ascii")
    line = re.fullmatch(
        method + r" /fapi/v1/algoOrder\?((?:algoId|clientAlgoId)=[^&]+&recvWindow=5000&timestamp=\d{13})"
        r"&signature=([0-9a-f]{64}) HTTP/1\.1",
        head.split("\r\n")[0],
    )
    assert line is not None
    assert line[1].startswith(pair + "&")
    assert line[2] == hmac.new(SECRET.encode(), line[1].encode(), hashlib.sha256).hexdigest()


def test_base64_signature_is_sent_encoded(bench: Bench) -> None:
    """An Ed25519 signature arrives with its base64 percent-encoded once, and verifies against the rest of the query."""
    key = ed25519.Ed25519PrivateKey.generate()
    server, client = bench.to(answering(http_answer()))
    client.ask(credential=Credential.from_private_key("default", API_KEY, pem(key)))
    payload, _, signature = query_of(server.heads[0]).partition("&signature=")
    assert re.fullmatch(r"[A-Za-z0-9%]+", signature)
    key.public_key().verify(base64.b64decode(unquote(signature), validate=True), payload.encode())


def test_headers_are_few_and_there_is_no_body(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only the expected headers are sent: no cookie, no login from a netrc, nothing that the environment suggests."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password hunter2\n")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("NO_PROXY", "")
    server, client = bench.to(answering(http_answer(Set_Cookie="session=1; Path=/")))
    for _ in range(2):
        assert replied(client.ask()).http == 200
    assert sorted(server.heads[1].decode().split("\r\n")[1:]) == [
        "Accept-Encoding: identity",
        "Accept: application/json",
        f"Host: 127.0.0.1:{server.port}",
        "User-Agent: algo-cancel-queue",
        f"X-MBX-APIKEY: {API_KEY}",
    ]


def test_each_attempt_has_its_own_timestamp_and_signature(bench: Bench) -> None:
    """Two attempts for one order never share a signature."""
    ticks = iter(range(1_760_000_000_000, 1_760_000_001_000))
    server, client = bench.to(answering(http_answer()), clock=ServerClock(wall_ms=lambda: next(ticks)))
    for _ in range(3):
        client.ask()
    queries = [query_of(head) for head in server.heads]
    assert len({re.search(r"timestamp=(\d+)", query)[1] for query in queries}) == 3  # type: ignore[index]
    assert len({query.partition("&signature=")[2] for query in queries}) == 3


def shaking_hands(bench: Bench, meanwhile: Callable[[], object]) -> Behaviour:
    """Something happens while a connection is opened."""

    def behave(peer: Peer) -> None:
        meanwhile()
        with bench.tls().wrap_socket(peer.sock, server_side=True) as peer.sock:
            answering(http_answer())(peer)

    return behave


def test_timestamp_is_taken_after_the_handshake(loop_bench: Bench) -> None:
    """The time that connecting takes does not age the timestamp: it is read when the request is written."""
    wall = [1_760_000_000_000]
    behaviour = shaking_hands(loop_bench, lambda: wall.append(1_760_000_004_000))
    server, client = loop_bench.over_tls(behaviour, clock=ServerClock(wall_ms=lambda: wall[-1]))
    assert replied(client.ask()).http == 200
    assert b"timestamp=1760000004000&" in server.heads[0]


def test_going_is_asked_when_the_connection_stands(loop_bench: Bench) -> None:
    """Whatever closes while a connection is opened keeps the call back: the question comes last."""
    closed: list[bool] = []
    server, client = loop_bench.over_tls(shaking_hands(loop_bench, lambda: closed.append(True)))
    assert client.run(client.asking(may_go=lambda: not closed)) is None
    assert (server.connections, server.heads) == (1, [])


def test_call_that_may_not_go_is_not_sent(bench: Bench) -> None:
    """What may not go (any more) when it would be written is neither signed nor sent, and costs no connection."""
    server, client = bench.to(answering(http_answer()))
    for sent in range(2):
        assert client.run(client.asking(may_go=lambda: False)) is None
        assert not client.run(client.exchange.sync_time(may_go=lambda: False))
        assert len(server.heads) == sent
        assert replied(client.ask()).http == 200
    assert server.connections == 1


#: What the exchange shows of an order (exchange.md 1.3), and most of what it does not need to.
SHOWN = {"symbol": "币安USDT", "algoStatus": "NEW", "createTime": 1750514941540}


@pytest.mark.parametrize(
    ("size", "coding", "means", "count"),
    [(650, "", Means.LISTED, 200), (650, "gzip", Means.LISTED, 200), (6_000, "", Means.UNCLEAR, 0)],
)
def test_a_list_of_200_orders_is_read_whole(bench: Bench, size: int, coding: str, means: Means, count: int) -> None:
    """200 open orders, the most that the exchange allows, are more than other answers may hold; what is longer than any
    list may be tells nothing. The symbol goes out percent-encoded."""
    orders = [SHOWN | {"algoId": 1 + n, "clientAlgoId": f"id-{n}", "rest": "x" * size} for n in range(200)]
    body = json.dumps(orders).encode()
    assert len(body) > 128 * 1024
    server, client = bench.to(answering(http_answer(gzip.compress(body) if coding else body, Content_Encoding=coding)))
    ref = SymbolRef("币安USDT")
    verdict = classify(Call.LIST_OPEN, ref, client.ask(ref, Call.LIST_OPEN))
    assert (verdict.means, len(verdict.orders)) == (means, count)
    assert server.heads[0].startswith(b"GET /fapi/v1/openAlgoOrders?symbol=%E5%B8%81%E5%AE%89USDT&recvWindow=")


# ---- what an answer tells beside its body ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "expected_ms"),
    [
        ("35", 35_000),
        (" 35 ", 35_000),
        ("0", 0),
        ("1.5", 1_500),
        ("60, 60", 60_000),
        ("5,60.5, 7", 60_500),
        ("5, soon", None),
        ("9" * 400, MAX_PAUSE_MS),
        ("604800", MAX_PAUSE_MS),
        ("-5", None),
        ("soon", None),
        ("", None),
        ("0x10", None),
        ("1e9", None),
        ("Fri, 99 Foo 2026 99:99:99 GMT", None),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", MAX_PAUSE_MS),
    ],
)
def test_retry_after(bench: Bench, header: str, expected_ms: int | None) -> None:
    """Seconds and dates become milliseconds within bounds; anything else is as if it were not there."""
    _, client = bench.to(answering(http_answer(b"{}", "429 Too Many Requests", Retry_After=header)))
    assert replied(client.ask()).retry_after_ms == expected_ms


@pytest.mark.parametrize("zone", ["GMT", "-0000", "+0000"])
def test_retry_after_a_date_counts_by_the_exchanges_clock(bench: Bench, zone: str) -> None:
    """A date is the exchange's: it is measured against its clock, however wrong the host's is."""
    clock = ServerClock(wall_ms=lambda: 0)
    exchange_s = 1_760_000_000
    date = email.utils.formatdate(exchange_s + 90).replace("-0000", zone)
    _, client = bench.to(answering(http_answer(b"{}", "418 Banned", Retry_After=date)), clock=clock)
    now_ns = time.monotonic_ns()
    clock.observe(now_ns, now_ns, exchange_s * 1000)
    answer = replied(client.ask())
    assert answer.retry_after_ms is not None
    assert 85_000 <= answer.retry_after_ms <= 90_000 + BEHIND_MS


@pytest.mark.parametrize(("action", "challenge"), [("challenge", True), ("CHALLENGE", True), ("captcha", False)])
def test_challenge_of_the_firewall(bench: Bench, action: str, challenge: bool) -> None:
    """The header alone marks the firewall's challenge; its body is empty."""
    _, client = bench.to(answering(http_answer(b"", "202 Accepted", x_amzn_waf_action=action)))
    assert client.ask() == Reply(http=202, body=b"", challenge=challenge)


def weighing(*answers: bytes) -> tuple[Behaviour, list[int], ServerClock]:
    """Such answers, and the clock of the exchange, ms, as it is told."""
    wall = [1_760_000_000_000]
    return answering(*answers), wall, ServerClock(wall_ms=lambda: wall[0])


def test_used_weight_is_noted_from_every_answer(bench: Bench) -> None:
    """Refusals tell the weight too; garbage does not overwrite it, and with the minute it is over."""
    behaviour, wall, clock = weighing(
        http_answer(x_mbx_used_weight_1m="7"),
        http_answer(b"{}", "400 Bad Request", X_MBX_USED_WEIGHT_1M="2399"),
        http_answer(x_mbx_used_weight_1m="many"),
        http_answer(x_mbx_used_weight_1m="12, 12"),
        http_answer(),
    )
    _, client = bench.to(behaviour, clock=clock)
    weights = [client.exchange.last_used_weight()]
    for _ in range(5):
        client.ask()
        weights.append(client.exchange.last_used_weight())
    assert weights == [0, 7, 2399, 2399, 12, 12]
    wall[0] += 60_000
    assert client.exchange.last_used_weight() == 0


def test_weight_noted_by_a_wrong_clock_is_replaced(bench: Bench) -> None:
    """When a clock that ran ahead is put right, the next answer's weight counts at once."""
    behaviour, wall, clock = weighing(http_answer(x_mbx_used_weight_1m="2000"), http_answer(x_mbx_used_weight_1m="4"))
    _, client = bench.to(behaviour, clock=clock)
    client.ask()
    wall[0] -= 3_600_000
    client.ask()
    assert client.exchange.last_used_weight() == 4


def test_late_weight_belongs_to_the_minute_of_its_request(loop_bench: Bench) -> None:
    """An answer that arrives after the minute has turned does not fill the new one, nor hide a newer answer."""
    minute_ms = 1_760_000_040_000
    started_ns = time.monotonic_ns()

    def wall_ms() -> int:  # the minute turns soon after the start
        return minute_ms - 300 + (time.monotonic_ns() - started_ns) // 1_000_000

    newer = threading.Event()
    answered = threading.Event()

    def behave(peer: Peer) -> None:
        while head := peer.read_head():
            if head.startswith(b"DELETE"):
                eventually(lambda: wall_ms() > minute_ms + 20)
                answered.set()
                assert newer.wait(5)
            peer.send(http_answer(x_mbx_used_weight_1m="2300" if head.startswith(b"DELETE") else "3"))

    _, client = loop_bench.to(behave, clock=ServerClock(wall_ms=wall_ms))

    async def both() -> None:
        late = asyncio.create_task(client.asking())
        await passed(answered.is_set)
        await client.asking(call=Call.QUERY)
        newer.set()
        await late

    client.run(both())
    assert client.exchange.last_used_weight() == 3


# ---- time, warmth, limits -------------------------------------------------------------------------------------------


def time_answer(server_time_ms: object) -> bytes:
    return http_answer(json.dumps({"serverTime": server_time_ms}).encode())


def test_sync_time_measures_the_exchanges_clock(bench: Bench) -> None:
    """After asking, the clock shows the exchange's time, though the host's is hours off."""
    ahead_ms = 7_200_000

    def behave(peer: Peer) -> None:
        while peer.read_head():
            peer.send(time_answer(time.time_ns() // 1_000_000 + ahead_ms))

    clock = ServerClock()
    server, client = bench.to(behave, clock=clock)
    assert client.run(client.exchange.sync_time())
    assert [head.split(b"\r\n")[0] for head in server.heads] == [b"GET /fapi/v1/time HTTP/1.1"] * 3
    assert b"APIKEY" not in server.heads[0].upper()
    assert clock.measured
    assert abs(clock.offset_ms - ahead_ms) <= 20
    assert -BEHIND_MS - 20 <= clock.now_ms() - ahead_ms - time.time_ns() // 1_000_000 <= 20


def test_time_needed_to_connect_does_not_spoil_the_sample(loop_bench: Bench) -> None:
    """The round trip begins when the request is written, not when the connection is asked for."""
    slow_s = 0.3
    tls = loop_bench.tls()

    def behave(peer: Peer) -> None:
        threading.Event().wait(slow_s)
        with tls.wrap_socket(peer.sock, server_side=True) as peer.sock:
            peer.read_head()
            peer.send(time_answer(time.time_ns() // 1_000_000))

    clock = ServerClock()
    _, client = loop_bench.over_tls(behave, clock=clock)
    assert replied(client.run(client.exchange.ask_time())).http == 200
    # Counted from the start, half of the slow part would be taken for an offset.
    assert abs(clock.offset_ms) < slow_s * 1000 / 4


def test_sync_time_without_the_exchange(bench: Bench) -> None:
    """Without a connection the clock stays as it was."""
    clock = ServerClock()
    client = bench.client(f"http://127.0.0.1:{free_port()}", clock)
    assert (
        client.run(client.exchange.sync_time()),
        client.run(client.exchange.keep_warm()),
        client.run(client.exchange.weight_limit()),
    ) == (False, 0, None)
    assert not clock.measured


def test_keep_warm_uses_different_connections(loop_bench: Bench) -> None:
    """Two connections are in use at once, are those that cancels get, and the clock learns from both."""
    together = threading.Barrier(2)

    def behave(peer: Peer) -> None:
        peer.read_head()
        peer.send(time_answer(1_760_000_000_000)[:-1])  # held open: not whole until both were asked
        together.wait(5)
        peer.send(b"}")
        while head := peer.read_head():
            peer.send(time_answer(1_760_000_000_000) if b"/time" in head else http_answer())

    clock = ServerClock()
    server, client = loop_bench.to(behave, clock=clock)
    assert client.run(client.exchange.keep_warm()) == 2
    assert sorted(server.used) == [1, 2]
    assert clock.measured
    assert client.run(client.exchange.keep_warm()) == 2
    assert sorted(server.used) == [1, 1, 2, 2]
    assert replied(client.ask()).http == 200
    assert server.connections == 2


@pytest.mark.parametrize(
    ("answer", "http"),
    [
        (http_answer(b"{}", "418 Banned", Retry_After="120"), 418),
        (http_answer(b"{}", "429 Too Many", Retry_After="3"), 429),
        (http_answer(b"<html>", "403 Forbidden"), 403),
        (http_answer(b"", "202 Accepted", x_amzn_waf_action="challenge"), 202),
    ],
)
def test_refusal_of_an_unsigned_call_is_kept_for_the_gate(bench: Bench, answer: bytes, http: int) -> None:
    """A ban that only a keep-warm call met is not overlooked: it is handed over once, and calls stop at the first."""
    server, client = bench.to(answering(answer))
    exchange = client.exchange
    for call in (exchange.sync_time, lambda: exchange.keep_warm(1), exchange.weight_limit):
        assert not client.run(call())
        refusal = client.exchange.take_refusal()
        assert refusal is not None
        assert refusal.http == http
        assert classify(Call.QUERY, REF, refusal).means in (Means.LIMITED, Means.BLOCKED)
        assert client.exchange.take_refusal() is None
    assert len(server.heads) == 3


LIMITS = [
    {"rateLimitType": "ORDERS", "interval": "MINUTE", "intervalNum": 1, "limit": 1200},
    {"rateLimitType": "REQUEST_WEIGHT", "interval": "SECOND", "intervalNum": 10, "limit": 300},
    {"rateLimitType": "REQUEST_WEIGHT", "interval": "MINUTE", "intervalNum": 1, "limit": 6000},
]


@pytest.mark.parametrize("symbols", [0, 3_000])
def test_weight_limit(bench: Bench, symbols: int) -> None:
    """The limit for a minute is found, also where the list of symbols is too long to be read."""
    body = {"timezone": "UTC", "rateLimits": LIMITS, "symbols": [{"symbol": f"COIN{n}USDT"} for n in range(symbols)]}
    server, client = bench.to(answering(http_answer(json.dumps(body, indent=1).encode())))
    assert client.run(client.exchange.weight_limit()) == 6000
    assert server.heads[0].startswith(b"GET /fapi/v1/exchangeInfo HTTP/1.1\r\n")


def limits(*rows: object) -> bytes:
    """An answer with these limits."""
    return json.dumps({"rateLimits": rows}).encode()


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{}", b"[]", b"null", b"[" * 60_000, b"\xff\xfe"),
        *(b'{"serverTime":%b}' % told for told in (b'"1760000000000"', b"true", b"1760000000", b"1760000000000000")),
        b'{"serverTime":1760000000000',
        *(b'{"rateLimits":%b' % told for told in (b"", b"5}", b"[1]}", b"[" * 60_000)),
        *(limits({"rateLimitType": "REQUEST_WEIGHT"}), limits(*LIMITS[:2])),
        *(limits({**LIMITS[2], "limit": limit}) for limit in (0, -1, "6000", True)),
    ],
)
def test_time_and_weight_limit_are_unknown_rather_than_wrong(bench: Bench, body: bytes) -> None:
    """An answer that does not say them teaches nothing, and nothing is raised."""
    clock = ServerClock()
    server, client = bench.to(answering(http_answer(body)), clock=clock)
    assert not client.run(client.exchange.sync_time())
    assert not clock.measured
    assert client.run(client.exchange.weight_limit()) is None
    assert len(server.heads) == 2
    assert client.exchange.take_refusal() is None
