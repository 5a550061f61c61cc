"""A bare exchange for measuring: checks the signature of every cancel and notes when it came.

`python -m tests.bench.exchange [CLOSES_AFTER_S [CERTIFICATE KEY]]` prints one line of JSON, its ports: "port" is the
exchange (TLS if there is a certificate; it closes connections that were idle for CLOSES_AFTER_S, 0: never), "control"
is for whoever measures:

    POST /reset?delay_ms=&refuses_first=1    forget all arrivals; how to answer from now on
    GET /state       counts; "asked" is the number of orders of which a cancel has come, "again" of those with another
    GET /arrivals    {"<algo id>": [[ns since the epoch, number of the connection], ...]}
    GET /handshakes  ns since the epoch at which each connection was ready, by number

The secret is BINANCE_API_SECRET in the environment. What it answers: exchange.md 1.3 and 4.1.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import ssl
import sys
import time
from collections.abc import Callable
from typing import cast
from urllib.parse import parse_qsl

from tests.bench.signing import CANCEL_PATH, RECV_WINDOW_MS

HOST = "127.0.0.1"
_BAD_SIGNATURE = (400, {"code": -1022, "msg": "Signature for this request is not valid."})
_BUSY = (503, {"code": -1001, "msg": "Service Unavailable."})
_NO_PATH = (404, {"code": -5000, "msg": "Path is invalid"})
#: So large that no worker ever pauses for it: what is measured is the worker, not the exchange's patience.
_WEIGHT_LIMIT = 10**9
_INFO = {
    "rateLimits": [
        {"rateLimitType": "REQUEST_WEIGHT", "interval": "MINUTE", "intervalNum": 1, "limit": _WEIGHT_LIMIT},
    ]
}

_HEAD = b"HTTP/1.1 %d -\r\nContent-Type: application/json\r\nX-MBX-USED-WEIGHT-1M: 1\r\nContent-Length: %d\r\n\r\n"

Answer = tuple[int, object]


class Market:
    """What has come, and how it is answered."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._handshakes: list[int] = []
        self._in_flight = self._peak = 0
        self._reset({})

    def connected(self) -> int:
        """Note a new connection; gives its number."""
        self._handshakes.append(time.time_ns())
        return len(self._handshakes) - 1

    def answered(self) -> None:
        """A cancel's answer is out."""
        self._in_flight -= 1

    def request(self, method: str, target: str, came_ns: int, connection: int) -> tuple[Answer, float, bool]:
        """The answer to a strategy's or worker's request, after how many s it goes out, and whether it is a cancel."""
        path, _, query = target.partition("?")
        if path == CANCEL_PATH and method == "DELETE":
            self._in_flight += 1
            self._peak = max(self._peak, self._in_flight)
            return self._cancel(query, came_ns, connection), self._delay_s, True
        return self._other(method, path, query, came_ns), 0.0, False

    def control(self, target: str) -> Answer:
        """The answer to whoever measures."""
        path, _, query = target.partition("?")
        if path == "/reset":
            return 200, self._reset(dict(parse_qsl(query)))
        shown = {"/state": self._state(), "/arrivals": self._arrivals, "/handshakes": self._handshakes}
        return (200, shown[path]) if path in shown else _NO_PATH

    def _reset(self, asked: dict[str, str]) -> object:
        self._arrivals: dict[str, list[tuple[int, int]]] = {}
        self._delay_s = float(asked.get("delay_ms", 0)) / 1000
        self._refuses_first = asked.get("refuses_first") == "1"
        self._again, self._bad, self._peak = 0, 0, self._in_flight
        return {}

    def _state(self) -> object:
        return {
            "asked": len(self._arrivals),
            "again": self._again,
            "bad": self._bad,
            "peak": self._peak,
            "connections": len(self._handshakes),
        }

    def _signed(self, query: str, came_ns: int) -> dict[str, str] | None:
        """The parameters, unless signature or timestamp are not good."""
        payload, _, signature = query.rpartition("&signature=")
        parameters = dict(parse_qsl(payload))
        good = hmac.compare_digest(hmac.digest(self._secret, payload.encode(), "sha256").hex(), signature)
        age_ms = came_ns / 1e6 - int(parameters.get("timestamp", 0))
        if good and -1000 < age_ms <= RECV_WINDOW_MS:
            return parameters
        self._bad += 1
        return None

    def _cancel(self, query: str, came_ns: int, connection: int) -> Answer:
        parameters = self._signed(query, came_ns)
        if parameters is None:
            return _BAD_SIGNATURE
        algo_id = parameters.get("algoId", "0")
        came = self._arrivals.setdefault(algo_id, [])
        came.append((came_ns, connection))
        self._again += len(came) == 2
        if self._refuses_first and len(came) == 1:
            return _BUSY
        return 200, {"algoId": int(algo_id), "clientAlgoId": f"c{algo_id}", "code": "200", "msg": "success"}

    def _other(self, method: str, path: str, query: str, came_ns: int) -> Answer:
        if path == "/fapi/v1/time":
            return 200, {"serverTime": came_ns // 1_000_000}
        if path == "/fapi/v1/exchangeInfo":
            return 200, _INFO
        if path == CANCEL_PATH and method == "GET":
            parameters = self._signed(query, came_ns)
            return _BAD_SIGNATURE if parameters is None else self._query(parameters.get("algoId", "0"))
        return _NO_PATH

    def _query(self, algo_id: str) -> Answer:
        executed = len(self._arrivals.get(algo_id, ())) > self._refuses_first
        status = "CANCELED" if executed else "NEW"
        about = {"clientAlgoId": f"c{algo_id}", "symbol": "BTCUSDT", "algoStatus": status, "actualOrderId": ""}
        return 200, {"algoId": int(algo_id), **about, "createTime": 1750485492076, "updateTime": 1750485492076}


class Connection(asyncio.Protocol):
    """One connection: takes requests apart, sends answers when they are due, and hangs up on the idle."""

    def __init__(self, market: Market, is_control: bool, closes_after_s: float) -> None:
        self._market = market
        self._is_control = is_control
        self._closes_after_s = closes_after_s
        self._buffer = b""
        self._number = -1
        self._loop = asyncio.get_running_loop()
        self._touched_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """With TLS this comes after the handshake."""
        self._transport = cast(asyncio.Transport, transport)
        if not self._is_control:
            self._number = self._market.connected()
        if self._closes_after_s:
            self._touched_s = self._loop.time()
            self._timer = self._loop.call_later(self._closes_after_s, self._close_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is there any more."""
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Serve every request that is whole."""
        came_ns = time.time_ns()
        self._touched_s = self._loop.time()
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head, length = self._buffer[:end], 0
            if (at := head.lower().find(b"content-length:")) >= 0:
                length = int(head[at + 15 :].split(b"\r\n", 1)[0])
            if len(self._buffer) < end + 4 + length:
                return
            self._buffer = self._buffer[end + 4 + length :]
            method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
            self._serve(method, target, came_ns)

    def _serve(self, method: str, target: str, came_ns: int) -> None:
        if self._is_control:
            return self._write(self._market.control(target))
        answer, delay_s, is_cancel = self._market.request(method, target, came_ns, self._number)
        done: Callable[[Answer], None] = self._answer_cancel if is_cancel else self._write
        if delay_s:
            self._loop.call_later(delay_s, done, answer)
        else:
            done(answer)
        return None

    def _answer_cancel(self, answer: Answer) -> None:
        self._market.answered()
        self._write(answer)

    def _write(self, answer: Answer) -> None:
        status, value = answer
        body = json.dumps(value).encode()
        self._touched_s = self._loop.time()
        self._transport.write(_HEAD % (status, len(body)) + body)

    def _close_if_idle(self) -> None:
        left_s = self._touched_s + self._closes_after_s - self._loop.time()
        if left_s <= 0:
            self._transport.close()
        else:
            self._timer = self._loop.call_later(left_s, self._close_if_idle)


async def serve(secret: bytes, closes_after_s: float, tls: ssl.SSLContext | None) -> None:
    """Serve on two ports of loopback until killed."""
    loop = asyncio.get_running_loop()
    market = Market(secret)
    server = await loop.create_server(lambda: Connection(market, False, closes_after_s), HOST, 0, backlog=1024, ssl=tls)
    control = await loop.create_server(lambda: Connection(market, True, 0), HOST, 0)
    ports = {"port": server.sockets[0].getsockname()[1], "control": control.sockets[0].getsockname()[1]}
    sys.stdout.write(json.dumps(ports) + "\n")
    sys.stdout.flush()
    await server.serve_forever()


def main(arguments: list[str]) -> None:
    """Read the command line."""
    closes_after_s = float(arguments[0]) if arguments else 0.0
    tls = None
    if len(arguments) > 1:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(arguments[1], arguments[2])
    asyncio.run(serve(os.environ["BINANCE_API_SECRET"].encode(), closes_after_s, tls))


if __name__ == "__main__":
    main(sys.argv[1:])
