"""The local exchange: a loopback HTTP server that treats conditional orders as Binance USD-M Futures does.

`python -m worker.sandbox.server` reads one JSON object (`ExchangeConfig`) from a line of stdin, prints `{"url": ...}`
on a line of stdout, and serves until SIGTERM, SIGINT or the end of stdin, so that it dies with its parent. Rules and
texts: exchange.md 1.2 to 1.4, 2, 3 and 4; where those leave a choice, a comment says which one was made.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import gzip
import hmac
import json
import re
import signal
import socket
import ssl
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from http import HTTPStatus
from os import read
from typing import cast
from urllib.parse import unquote

from worker.sandbox import control
from worker.sandbox.arrivals import Arrivals
from worker.sandbox.book import DuplicateClientId, Order, OrderBook, OrderTerms
from worker.sandbox.control import ConfigError, ExchangeConfig
from worker.sandbox.faults import (
    BAD_SIGNATURE,
    CLOCK_AHEAD,
    CLOCK_OUTSIDE,
    FAULT_SETS,
    KEY_FORMAT,
    KEY_REFUSED,
    NO_SUCH_ORDER,
    UNKNOWN_ORDER,
    Answer,
    Call,
    Delivery,
    Effect,
    Fault,
    FaultPlan,
    FaultSet,
    FaultSpec,
    FaultTiming,
)

EXIT_OK = 0
EXIT_BAD_CONFIG = 78

HOST = "127.0.0.1"
ALGO_ORDER = "/fapi/v1/algoOrder"
OPEN_ALGO_ORDERS = "/fapi/v1/openAlgoOrders"

MAX_HEAD_BYTES = 16 * 1024
MAX_BODY_BYTES = 16 * 1024 * 1024
MAX_LABELS = 200

DEFAULT_RECV_WINDOW_MS = 5_000
MAX_RECV_WINDOW_MS = 60_000
MAX_ALGO_ID = 2**63 - 1

#: What a query may consist of once names and values are percent-encoded as RFC 3986 says.
_ENCODED = re.compile(rb"(?:(?:[\w.~-]++|%[0-9A-Fa-f]{2})++=(?:[\w.~-]++|%[0-9A-Fa-f]{2})*+(?:&|$))++")
_SILENT = frozenset({Delivery.CLOSED, Delivery.RESET, Delivery.NOT_HTTP})
_CLIENT_ALGO_ID = re.compile(r"[.A-Z:/a-z0-9_-]{1,36}")
_DECIMAL = re.compile(r"(?=.*[1-9])[0-9]{1,20}(\.[0-9]{1,20})?")
_ORDER_TYPES = frozenset({"STOP", "STOP_MARKET", "TAKE_PROFIT", "TAKE_PROFIT_MARKET", "TRAILING_STOP_MARKET"})


class Refusal(Exception):
    """The exchange refuses a request before it looks at any order."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer

    @classmethod
    def of(cls, code: int, msg: str) -> Refusal:
        """A refusal with status 400."""
        return cls(Answer.error(400, code, msg))


# --- one connection ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Request:
    """One HTTP request as it was received; header names are lower case."""

    method: str
    path: str
    query: bytes
    headers: dict[bytes, bytes]
    body: bytes
    arrival_ns: int
    peer: str
    port: int
    on_fresh_connection: bool

    @property
    def label(self) -> str:
        """What the request is counted under."""
        return f"{self.method} {self.path[:80]}"


@dataclass(slots=True)
class Reply:
    """An answer, how it travels and when. `resume` makes the real reply when the delay is over."""

    answer: Answer
    delivery: Delivery = Delivery.WHOLE
    delay_ms: float = 0.0
    used_weight: int | None = None
    resume: Callable[[], Reply] | None = None

    def head(self) -> bytes:
        """Status line and headers, with the length that the body should have."""
        answer = self.answer
        lines = [
            f"HTTP/1.1 {answer.status} {_reason(answer.status)}",
            f"Content-Type: {answer.content_type}",
            f"Content-Length: {len(answer.body)}",
        ]
        if self.used_weight is not None and not answer.from_edge:
            lines.append(f"X-MBX-USED-WEIGHT-1M: {self.used_weight}")
        lines.extend(f"{name}: {value}" for name, value in answer.headers)
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


class _Malformed(Exception):
    """The bytes are no request that this server reads; `status` says why."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Connection(asyncio.Protocol):
    """One client connection: requests are served one after another, so that pipelined ones get answers in order."""

    def __init__(self, exchange: ExchangeServer, drip_interval_ms: int) -> None:
        self._exchange = exchange
        self._drip_interval_s = drip_interval_ms / 1_000
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._current: Request | None = None
        self._serving = False
        self._lost = False
        self._keep_alive = True
        self._requests = 0
        self._timer: asyncio.TimerHandle | None = None
        self._peer, self._port = "?", 0
        self.last_active_s = self._loop.time()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = cast(asyncio.Transport, transport)
        self._peer, self._port = (transport.get_extra_info("peername") or ("?", 0))[:2]
        self._exchange.connections.add(self)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        self._buffer += data
        self.last_active_s = self._loop.time()
        if self._current is None:
            self._serve()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Called by asyncio. What the request still has to do to its order is done all the same."""
        self._lost = True
        self._exchange.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        self._end()

    def close_if_idle(self, idle_s: float) -> None:
        """Close the connection without notice when nothing has come for so long and no answer is owed."""
        if self._current is None and self._loop.time() - self.last_active_s >= idle_s:
            self._transport.close()

    def abort(self) -> None:
        """Close the connection now."""
        self._transport.abort()

    def _serve(self) -> None:
        # A loop, not recursion: a thousand pipelined requests would be as many frames.
        self._serving = True
        try:
            while self._current is None and not self._transport.is_closing():
                request = self._parse()
                if request is None:
                    return
                self._current = request
                self._requests += 1
                self._dispatch(self._exchange.handle(request))
        except _Malformed as error:
            self._transport.write(Reply(Answer(error.status)).head())
            self._transport.close()
        finally:
            self._serving = False

    def _parse(self) -> Request | None:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise _Malformed(431)
            return None
        request_line, *header_lines = bytes(self._buffer[:end]).split(b"\r\n")
        headers = {}
        for line in header_lines:
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip()
        if b"transfer-encoding" in headers:
            raise _Malformed(501)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            raise _Malformed(413 if length.isdigit() else 400)
        stop = end + 4 + int(length)
        if len(self._buffer) < stop:
            return None
        body = bytes(self._buffer[end + 4 : stop])
        del self._buffer[:stop]
        return self._request(request_line, headers, body)

    def _request(self, request_line: bytes, headers: dict[bytes, bytes], body: bytes) -> Request:
        parts = request_line.split(b" ")
        if len(parts) != 3 or not parts[2].startswith(b"HTTP/1."):
            raise _Malformed(400)
        path, _, query = parts[1].partition(b"?")
        connection = headers.get(b"connection", b"").lower()
        self._keep_alive = connection == b"keep-alive" if parts[2] == b"HTTP/1.0" else connection != b"close"
        return Request(
            parts[0].decode("latin-1"),
            path.decode("latin-1"),
            query,
            headers,
            body,
            time.time_ns(),
            self._peer,
            self._port,
            on_fresh_connection=self._requests == 0,
        )

    def _dispatch(self, reply: Reply) -> None:
        if reply.delay_ms <= 0:
            self._resume(reply)
        elif reply.resume is not None:
            # Not kept in _timer: the order is cancelled even when the client has gone by then.
            self._loop.call_later(reply.delay_ms / 1_000, self._resume, reply)
        else:
            self._timer = self._loop.call_later(reply.delay_ms / 1_000, self._deliver, reply)

    def _resume(self, reply: Reply) -> None:
        self._deliver(reply if reply.resume is None else reply.resume())

    def _deliver(self, reply: Reply) -> None:
        if self._lost:
            return
        head, body = reply.head(), reply.answer.body
        match reply.delivery:
            case Delivery.CLOSED:
                self._transport.close()
            case Delivery.RESET:
                self._reset()
            case Delivery.CUT_SHORT:
                self._transport.write(head + body[: len(body) // 2])
                self._transport.close()
            case Delivery.NOT_HTTP:
                self._transport.write(b"\x15\x03\x03 this is no HTTP\r\n\r\n")
                self._transport.close()
            case Delivery.DRIPPED:
                self._drip(head + body, 0)
            case _:
                self._transport.write(head + body)
                self._finish(close=reply.delivery is Delivery.THEN_CLOSED)

    def _drip(self, data: bytes, sent: int) -> None:
        if sent == len(data):
            self._finish(close=False)
            return
        self._transport.write(data[sent : sent + 1])
        self._timer = self._loop.call_later(self._drip_interval_s, self._drip, data, sent + 1)

    def _reset(self) -> None:
        # Lingering for zero seconds makes the kernel send RST instead of FIN.
        raw = self._transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def _finish(self, *, close: bool) -> None:
        self._end()
        self.last_active_s = self._loop.time()
        if close or not self._keep_alive:
            self._transport.close()
        elif not self._serving:
            self._serve()

    def _end(self) -> None:
        if self._current is not None:
            self._exchange.request_ended(self._current)
            self._current = None


def _reason(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"


# --- who may do what --------------------------------------------------------------------------------------------------


class Account:
    """An API key and the way to check its signatures."""

    def __init__(self, name: str, secret_or_public_key: str) -> None:
        """Raises ConfigError for a public key that cannot be read or is of an unknown kind."""
        self.name = name
        checker = _public_key_check if secret_or_public_key.startswith("-----BEGIN ") else _hmac_check
        self._check = checker(name, secret_or_public_key.encode())

    def signed(self, payload: bytes, signature: str) -> bool:
        """Whether this account's key made the signature of exactly these bytes."""
        return self._check(payload, signature)


def _hmac_check(_name: str, secret: bytes) -> Callable[[bytes, str], bool]:
    def check(payload: bytes, signature: str) -> bool:
        wanted = hmac.digest(secret, payload, "sha256").hex()
        return hmac.compare_digest(wanted.encode(), signature.lower().encode())

    return check


def _public_key_check(name: str, pem: bytes) -> Callable[[bytes, str], bool]:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(pem)
    except ValueError:
        raise ConfigError(f"accounts: the key of {name} is no public key") from None
    if not isinstance(key, rsa.RSAPublicKey | ed25519.Ed25519PublicKey):
        raise ConfigError(f"accounts: the key of {name} is neither RSA nor Ed25519")

    def check(payload: bytes, signature: str) -> bool:
        try:
            raw = base64.b64decode(signature, validate=True)
            if isinstance(key, rsa.RSAPublicKey):
                key.verify(raw, payload, padding.PKCS1v15(), SHA256())
            else:
                key.verify(raw, payload)
        except (InvalidSignature, binascii.Error):
            return False
        return True

    return check


def _split_signature(request: Request) -> tuple[bytes, bytes]:
    """The signed bytes, which are the query and then the body, and the signature that ends the query or the body."""
    query, body = request.query, request.body
    if body and b"&signature=" in query:
        query, _, signature = query.rpartition(b"&signature=")
        return query + body, signature
    payload, _, signature = (query + body).rpartition(b"&signature=")
    return payload, signature


def _parameters(request: Request) -> dict[str, str]:
    """Parameters of body and query; where both have one, the query's holds."""
    parameters: dict[str, str] = {}
    for part in (request.body, request.query):
        pairs = [pair.partition(b"=") for pair in part.split(b"&") if pair]
        try:
            decoded = {_text(name): _text(value) for name, _, value in pairs}
        except UnicodeDecodeError:
            raise Refusal.of(-1100, "Illegal characters found in a parameter.") from None
        if len(decoded) != len(pairs):
            raise Refusal.of(-1101, "Duplicate values for a parameter detected.")
        parameters |= decoded
    return parameters


def _text(raw: bytes) -> str:
    return unquote(raw, errors="strict") if b"%" in raw else raw.decode("ascii")


def _mandatory(parameters: dict[str, str], name: str) -> str:
    value = parameters.get(name, "")
    if not value:
        raise Refusal.of(-1102, f"Mandatory parameter '{name}' was not sent, was empty/null, or malformed.")
    return value


def _integer(name: str, value: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) <= 20):
        raise Refusal.of(-1100, f"Illegal characters found in parameter '{name}'; legal range is '^[0-9]{{1,20}}$'.")
    return int(value)


def check_time(parameters: dict[str, str], server_ms: int) -> None:
    """Refuse a timestamp that is ahead of the exchange's clock or outside its window (exchange.md 2).

    Raises:
        Refusal: -1021 with one of its two texts, or -1102, -1100 or -1130 for parameters that are missing or wrong.
    """
    timestamp = _integer("timestamp", _mandatory(parameters, "timestamp"))
    window_ms = _integer("recvWindow", parameters.get("recvWindow", str(DEFAULT_RECV_WINDOW_MS)))
    if not 1 <= window_ms <= MAX_RECV_WINDOW_MS:
        raise Refusal.of(-1130, "Invalid data sent for parameter 'recvWindow'.")
    if timestamp >= server_ms + 1_000:
        raise Refusal(CLOCK_AHEAD)
    if server_ms - timestamp > window_ms:
        raise Refusal(CLOCK_OUTSIDE)


def _client_algo_id(value: str) -> str:
    if len(value) > 36:
        raise Refusal.of(-4015, "Client order id length should be less than 36 chars.")
    if not _CLIENT_ALGO_ID.fullmatch(value):
        raise Refusal.of(-1100, "Illegal characters found in parameter 'clientAlgoId'.")
    return value


def _order_ids(parameters: dict[str, str]) -> tuple[int | None, str | None]:
    """The ids that name an order. Which one wins when both are sent is not documented: here it is algoId."""
    algo_id = client_algo_id = None
    if "algoId" in parameters:
        algo_id = _integer("algoId", parameters["algoId"])
        if not 1 <= algo_id <= MAX_ALGO_ID:
            raise Refusal.of(-1100, "Illegal characters found in parameter 'algoId'.")
    if "clientAlgoId" in parameters:
        client_algo_id = _client_algo_id(parameters["clientAlgoId"])
    if algo_id is None and client_algo_id is None:
        raise Refusal.of(-1102, "Param 'algoId' or 'clientAlgoId' must be sent, but both were empty/null!")
    return algo_id, client_algo_id


def _terms(parameters: dict[str, str]) -> OrderTerms:
    symbol, side, order_type = (_mandatory(parameters, name) for name in ("symbol", "side", "type"))
    if side not in {"BUY", "SELL"}:
        raise Refusal.of(-1117, "Invalid side.")
    if order_type not in _ORDER_TYPES:
        raise Refusal.of(-1116, "Invalid orderType.")
    quantity, trigger_price = (_mandatory(parameters, name) for name in ("quantity", "triggerPrice"))
    if not (_DECIMAL.fullmatch(quantity) and _DECIMAL.fullmatch(trigger_price)):
        raise Refusal.of(-1130, "Invalid data sent for parameter 'quantity' or 'triggerPrice'.")
    client_algo_id = _client_algo_id(parameters["clientAlgoId"]) if "clientAlgoId" in parameters else ""
    return OrderTerms(symbol, side, order_type, quantity, trigger_price, client_algo_id)


# --- limits per IP ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Incident:
    fault: Fault
    peer: str
    started_ms: int
    until_ms: int
    requests_ms: list[int] = field(default_factory=list)


class Edge:
    """Weight counting, rate limits, bans and firewall blocks, for each client IP."""

    def __init__(self, limit_per_minute: int, timing: FaultTiming) -> None:
        self.limit_per_minute = limit_per_minute
        self.peak_used_weight = 0
        self.incidents: list[_Incident] = []
        self._timing = timing
        self._current: dict[str, _Incident] = {}
        self._used: dict[str, tuple[int, int]] = {}  # minute of exchange time, weight in it

    def used_weight(self, peer: str, server_ms: int) -> int:
        """The IP's weight in the current minute of exchange time."""
        minute, used = self._used.get(peer, (0, 0))
        return used if minute == server_ms // 60_000 else 0

    def most_used_weight(self, server_ms: int) -> int:
        """The weight of the busiest IP."""
        return max((self.used_weight(peer, server_ms) for peer in self._used), default=0)

    def admit(self, peer: str, now_ms: int, server_ms: int, weight: int) -> _Incident | None:
        """Count the request; the incident that refuses it, or None when it may pass."""
        used = self.used_weight(peer, server_ms) + weight
        self._used[peer] = (server_ms // 60_000, used)
        self.peak_used_weight = max(self.peak_used_weight, used)
        incident = self._current.get(peer)
        if incident is not None and now_ms < incident.until_ms:
            since_ms = now_ms - incident.started_ms
            incident.requests_ms.append(since_ms)
            if incident.fault is Fault.LIMITED_429 and since_ms >= self._timing.ban_after_ms:
                return self.start(peer, Fault.BANNED_418, now_ms)
            return incident
        if used > self.limit_per_minute:
            return self.start(peer, Fault.LIMITED_429, now_ms, 60_000 - server_ms % 60_000)
        return None

    def start(self, peer: str, fault: Fault, now_ms: int, duration_ms: int | None = None) -> _Incident:
        """Refuse everything from the IP from now on for so long, by default as long as such incidents last."""
        duration_ms = self._timing.incident_ms(fault) if duration_ms is None else duration_ms
        incident = _Incident(fault, peer, now_ms, now_ms + duration_ms)
        self.incidents.append(incident)
        self._current[peer] = incident
        return incident

    def answer(self, incident: _Incident, now_ms: int, skew_ms: int) -> Answer:
        """What the IP is told now; times in texts are exchange time."""
        answer = incident.fault.spec.answer or Answer(503)
        if incident.fault is Fault.LIMITED_429:
            text = f"Too many requests; current limit of IP({incident.peer}) is {self.limit_per_minute} per minute."
        elif incident.fault is Fault.BANNED_418:
            until_ms = incident.until_ms + skew_ms
            text = (
                f"Way too many requests; IP({incident.peer}) banned until {until_ms}. Use the websocket to avoid bans."
            )
        else:
            return answer
        body = json.dumps({"code": -1003, "msg": text}).encode()
        retry_after_s = max(1, -(-(incident.until_ms - now_ms) // 1_000))
        return Answer(answer.status, body, headers=(("Retry-After", str(retry_after_s)),))


# --- the exchange -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Tally:
    requests: dict[str, Counter[str]] = field(default_factory=dict)
    bad_signatures: int = 0
    connections_opened: int = 0
    deletes_on_fresh_connections: int = 0
    peak_in_flight: int = 0

    def count(self, label: str, reply: Reply) -> None:
        if label not in self.requests and len(self.requests) >= MAX_LABELS:
            label = "other"
        silent = reply.delivery is not Delivery.WHOLE and reply.delivery in _SILENT
        self.requests.setdefault(label, Counter())["none" if silent else str(reply.answer.status)] += 1


class ExchangeServer:
    """The exchange: start it inside a running event loop, and close it there."""

    def __init__(self, config: ExchangeConfig) -> None:
        """Raises ConfigError for keys and certificates that cannot be used."""
        self.config = config
        self.connections: set[Connection] = set()
        self.in_flight = 0
        self.url = ""
        self._accounts = {api_key: Account(name, secret) for name, (api_key, secret) in config.accounts.items()}
        self._tls = _tls_context(config)
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self.book = OrderBook()
        self._routes: dict[tuple[str, str], Callable[[Request, int], Reply]] = {
            ("DELETE", ALGO_ORDER): self._cancel,
            ("GET", ALGO_ORDER): self._query,
            ("POST", ALGO_ORDER): self._create,
            ("GET", OPEN_ALGO_ORDERS): self._open_orders,
            ("GET", "/fapi/v1/time"): self._time,
            ("GET", "/fapi/v1/ping"): self._ping,
            ("GET", "/fapi/v1/exchangeInfo"): self._exchange_info,
        }
        self.reset()

    def reset(self) -> None:
        """Empty the book and all counters and take the configuration's settings again. Algo ids are not given twice."""
        config = self.config
        self.latency_ms = config.latency_ms
        self.book = OrderBook(first_algo_id=self.book.next_algo_id, clock_skew_ms=config.clock_skew_ms)
        self.edge = Edge(config.weight_limit_per_minute, config.timing)
        self.tally = _Tally()
        self.arrivals: Arrivals = Arrivals()
        fault_set = FAULT_SETS[config.faults]
        if config.incidents is not None:
            fault_set = FaultSet(fault_set.faults, tuple(Fault(name) for name in config.incidents))
        self.plan = FaultPlan(
            fault_set,
            config.seed,
            config.fault_rate,
            config.max_faults_per_order,
            config.max_incidents,
            None if config.faults_for_ms is None else self.local_ms() + config.faults_for_ms,
        )

    async def start(self) -> None:
        """Listen on loopback; `url` says where.

        Raises:
            OSError: the port is taken.
        """
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Connection(self, self.config.timing.drip_interval_ms),
            HOST,
            self.config.port,
            backlog=1_024,
            ssl=self._tls,
        )
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"{'http' if self._tls is None else 'https'}://{HOST}:{port}"
        self._sweep()

    async def close(self) -> None:
        """Stop listening and drop every connection."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.abort()
        await asyncio.sleep(0)  # the transports close their sockets in the next turn of the loop

    def local_ms(self) -> int:
        """Local time in milliseconds since the epoch; exchange time is `book.clock_skew_ms` later."""
        return time.time_ns() // 1_000_000

    def handle(self, request: Request) -> Reply:
        """The reply to one request; `request_ended` must follow when it has been delivered or the client is gone."""
        if request.path.startswith(control.PREFIX):
            return Reply(control.answer(self, request.method, request.path, request.body))
        self.in_flight += 1
        tally = self.tally
        tally.connections_opened += request.on_fresh_connection
        tally.peak_in_flight = max(tally.peak_in_flight, self.in_flight)
        self._note(request)
        reply = self._reply(request)
        tally.count(request.label, reply)
        return self._stamped(request, reply)

    def _note(self, request: Request) -> None:
        if request.path == ALGO_ORDER and request.method in ("DELETE", "GET"):
            with suppress(Refusal, ValueError):
                said = _parameters(request)
                skew_ms = self.book.clock_skew_ms
                self.arrivals.note(request.arrival_ns, request.method, request.port, said, skew_ms)

    def request_ended(self, request: Request) -> None:
        """A request that `handle` was given is over."""
        self.in_flight -= not request.path.startswith(control.PREFIX)

    def open_order(self, account: str, terms: OrderTerms, now_ms: int) -> Order:
        """Open an order and tell the fault plan of it.

        Raises:
            DuplicateClientId: an open order of the account has this client id.
        """
        order = self.book.add(account, terms, now_ms)
        self.plan.admit([order.algo_id])
        return order

    def statistics(self) -> dict[str, object]:
        """The fields of `control.ExchangeStats`."""
        tally, now_ms = self.tally, self.local_ms()
        incidents = [
            {
                "fault": incident.fault,
                "peer": incident.peer,
                "started_ms": incident.started_ms,
                "duration_ms": incident.until_ms - incident.started_ms,
                "requests_ms": incident.requests_ms,
            }
            for incident in self.edge.incidents
        ]
        return {
            "requests": tally.requests,
            "bad_signatures": tally.bad_signatures,
            "connections_opened": tally.connections_opened,
            "deletes_on_fresh_connections": tally.deletes_on_fresh_connections,
            "peak_in_flight": tally.peak_in_flight,
            "in_flight": self.in_flight,
            "used_weight": self.edge.most_used_weight(now_ms + self.book.clock_skew_ms),
            "peak_used_weight": self.edge.peak_used_weight,
            "orders_by_status": Counter(order.status for order in self.book.orders(now_ms)),
            "faults_injected": self.plan.injected,
            "incidents": incidents,
        }

    def _reply(self, request: Request) -> Reply:
        now_ms = self.local_ms()
        skew_ms = self.book.clock_skew_ms
        incident = self.edge.admit(request.peer, now_ms, now_ms + skew_ms, _weight(request))
        if incident is not None:
            return Reply(self.edge.answer(incident, now_ms, skew_ms))
        route = self._routes.get((request.method, request.path))
        if route is None:
            text = f"Path {request.path}, Method {request.method} is invalid"
            return Reply(Answer.error(404, -5000, text))
        try:
            return route(request, now_ms)
        except Refusal as refusal:
            return Reply(refusal.answer)

    def _stamped(self, request: Request, reply: Reply) -> Reply:
        reply.used_weight = self.edge.used_weight(request.peer, self.local_ms() + self.book.clock_skew_ms)
        reply.delay_ms += self.latency_ms
        return reply

    def _authenticated(self, request: Request, now_ms: int) -> tuple[Account, dict[str, str]]:
        api_key = request.headers.get(b"x-mbx-apikey", b"").decode("latin-1")
        if not api_key:
            raise Refusal(KEY_FORMAT)
        account = self._accounts.get(api_key)
        if account is None:
            raise Refusal(KEY_REFUSED)
        payload, signature = _split_signature(request)
        if not payload or not signature:
            raise Refusal.of(-1102, "Mandatory parameter 'signature' was not sent, was empty/null, or malformed.")
        parts = [part for part in (request.query, request.body) if part]
        well_formed = b"&" not in signature and all(map(_ENCODED.fullmatch, parts))
        if not well_formed or not account.signed(payload, unquote(signature, errors="replace")):
            self.tally.bad_signatures += 1
            raise Refusal(BAD_SIGNATURE)
        parameters = _parameters(request)
        check_time(parameters, now_ms + self.book.clock_skew_ms)
        return account, parameters

    def _cancel(self, request: Request, now_ms: int) -> Reply:
        self.tally.deletes_on_fresh_connections += request.on_fresh_connection
        return self._about_order(Call.CANCEL, request, now_ms)

    def _query(self, request: Request, now_ms: int) -> Reply:
        return self._about_order(Call.QUERY, request, now_ms)

    def _about_order(self, call: Call, request: Request, now_ms: int) -> Reply:
        account, parameters = self._authenticated(request, now_ms)
        algo_id, client_algo_id = _order_ids(parameters)
        order = self.book.find(account.name, now_ms, algo_id=algo_id, client_algo_id=client_algo_id)
        if order is not None and call is Call.CANCEL:
            order.note_delete(request.arrival_ns)
            order.unseen = False
        elif order is not None:
            order.gets += 1
        if order is None or order.unseen or order.is_hidden(now_ms):
            return Reply(UNKNOWN_ORDER if call is Call.CANCEL else NO_SUCH_ORDER)
        fault = self.plan.meet(order.algo_id, call, now_ms, by_client_id=algo_id is None)
        if fault is None:
            return Reply(self._own_answer(call, order, Effect.CANCEL, now_ms))
        if fault.spec.gates:
            incident = self.edge.start(request.peer, fault, now_ms)
            return Reply(self.edge.answer(incident, now_ms, self.book.clock_skew_ms))
        return self._faulty(call, order, fault.spec, now_ms)

    def _faulty(self, call: Call, order: Order, spec: FaultSpec, now_ms: int) -> Reply:
        timing = self.config.timing
        if spec.delivery is Delivery.HELD:
            held = Reply(UNKNOWN_ORDER, delay_ms=timing.late_execution_ms)
            held.resume = lambda: self._held(call, order, held)
            return held
        own = self._own_answer(call, order, spec.effect, now_ms)
        answer = spec.answer or _twisted(own, spec.delivery, timing.huge_body_bytes)
        if spec.delivery is Delivery.COMPRESSED:
            answer = replace(answer, body=gzip.compress(answer.body), headers=(("Content-Encoding", "gzip"),))
        return Reply(answer, spec.delivery, timing.late_answer_ms if spec.delivery is Delivery.LATE else 0.0)

    def _held(self, call: Call, order: Order, held: Reply) -> Reply:
        answer = self._own_answer(call, order, Effect.CANCEL, self.local_ms())
        return Reply(answer, used_weight=held.used_weight)

    def _own_answer(self, call: Call, order: Order, effect: Effect, now_ms: int) -> Answer:
        """The exchange's true answer after the effect; with no effect on a cancel, the success that it was not."""
        if call is Call.QUERY:
            return Answer.of(order.as_query_answer())
        done = self._cancel_with(order, effect, now_ms)
        if not done:
            return UNKNOWN_ORDER
        return Answer.of(
            {"algoId": order.algo_id, "clientAlgoId": order.client_algo_id, "code": "200", "msg": "success"}
        )

    def _cancel_with(self, order: Order, effect: Effect, now_ms: int) -> bool:
        book, timing = self.book, self.config.timing
        match effect:
            case Effect.NONE:
                return True
            case Effect.CANCEL:
                return book.cancel(order, now_ms)
            case Effect.CANCEL_LATER:
                delay_s = timing.late_execution_ms / 1_000
                asyncio.get_running_loop().call_later(delay_s, lambda: book.cancel(order, self.local_ms()))
            case Effect.CANCEL_AND_REUSE_CLIENT_ID:
                if book.cancel(order, now_ms):
                    terms = OrderTerms(order.terms.symbol, client_algo_id=order.client_algo_id)
                    # A millisecond later: a client that pins ids by time can tell the two apart.
                    book.add(order.account, terms, now_ms + 1, decoy=True)
            case Effect.SOMEBODY_CANCELS:
                book.cancel(order, now_ms, by_request=False)
            case Effect.EXPIRE:
                book.expire(order, now_ms)
            case Effect.REJECT:
                book.reject(order, now_ms)
            case Effect.HIDE:
                order.unseen = True
            case Effect.FORGET:
                book.forget(order, now_ms + timing.forgotten_ms)
            case _:
                self._trigger_with(order, effect, now_ms)
        return False

    def _trigger_with(self, order: Order, effect: Effect, now_ms: int) -> None:
        timing = self.config.timing
        after_ms: int | None = timing.triggering_ms
        if effect is Effect.TRIGGER_AT_ONCE:
            after_ms = 0
        elif effect is Effect.TRIGGER_STUCK:
            after_ms = None
        self.book.trigger(
            order,
            now_ms,
            triggered_after_ms=after_ms,
            finished_after_ms=timing.finished_after_ms,
            rejected=effect is Effect.TRIGGER_REJECTED,
        )

    def _create(self, request: Request, now_ms: int) -> Reply:
        account, parameters = self._authenticated(request, now_ms)
        try:
            order = self.open_order(account.name, _terms(parameters), now_ms)
        except DuplicateClientId:
            raise Refusal.of(-4116, "ClientOrderId is duplicated.") from None
        unknown_yet = ("actualOrderId", "actualPrice", "actualType", "actualQty", "tpOrderType")
        shown = {name: value for name, value in order.as_query_answer().items() if name not in unknown_yet}
        return Reply(Answer.of(shown | {"activatePrice": "", "callbackRate": ""}))

    def _open_orders(self, request: Request, now_ms: int) -> Reply:
        account, parameters = self._authenticated(request, now_ms)
        orders = self.book.open_orders(account.name, now_ms, parameters.get("symbol"))
        old_fields = dict.fromkeys(("tpTriggerPrice", "tpPrice", "slTriggerPrice", "slPrice"), "0.000")
        return Reply(Answer.of([order.as_query_answer() | old_fields for order in orders]))

    def _time(self, _: Request, now_ms: int) -> Reply:
        return Reply(Answer.of({"serverTime": now_ms + self.book.clock_skew_ms}))

    def _ping(self, _request: Request, _now_ms: int) -> Reply:
        return Reply(Answer.of({}))

    def _exchange_info(self, _: Request, now_ms: int) -> Reply:
        limits = [
            ("REQUEST_WEIGHT", "MINUTE", 1, self.config.weight_limit_per_minute),
            ("ORDERS", "MINUTE", 1, 1_200),
            ("ORDERS", "SECOND", 10, 300),
        ]
        names = ("rateLimitType", "interval", "intervalNum", "limit")
        # This answer's time has been seen five days old; a client must not set its clock by it.
        stale_ms = now_ms - 5 * 86_400_000
        return Reply(
            Answer.of(
                {
                    "timezone": "UTC",
                    "serverTime": stale_ms,
                    "futuresType": "U_MARGINED",
                    "rateLimits": [dict(zip(names, limit, strict=True)) for limit in limits],
                    "exchangeFilters": [],
                    "assets": [],
                    "symbols": [],
                }
            )
        )

    def _sweep(self) -> None:
        idle_s = self.config.idle_close_s
        for connection in list(self.connections):
            connection.close_if_idle(idle_s)
        self._sweeper = asyncio.get_running_loop().call_later(min(max(idle_s / 10, 0.02), 1.0), self._sweep)


def _weight(request: Request) -> int:
    if request.path == OPEN_ALGO_ORDERS and b"symbol=" not in request.query:
        return 40
    return 0 if request.method == "POST" and request.path == ALGO_ORDER else 1


def _twisted(answer: Answer, delivery: Delivery, huge_body_bytes: int) -> Answer:
    """The exchange's own answer, with the one thing wrong that the delivery stands for."""
    if answer.status != HTTPStatus.OK:
        return answer
    shown = json.loads(answer.body)
    match delivery:
        case Delivery.HUGE:
            shown["padding"] = "x" * huge_body_bytes
        case Delivery.WRONG_ID:
            shown |= {"algoId": shown["algoId"] + 1, "clientAlgoId": "somebody-elses"}
        case Delivery.UNDECIDED:
            shown.pop("code", None)
            shown.pop("algoStatus", None)
        case Delivery.UNKNOWN_STATUS:
            shown["algoStatus"] = "PAUSED"
        case _:
            return answer
    return Answer.of(shown)


def _tls_context(config: ExchangeConfig) -> ssl.SSLContext | None:
    if not config.tls_cert_path:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.tls_cert_path, config.tls_key_path)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"tls_cert_path or tls_key_path: cannot be used ({type(error).__name__})") from error
    return context


# --- the process ------------------------------------------------------------------------------------------------------


def _watch_stdin(ended: Callable[[], object]) -> None:
    # A bare read on the descriptor: a thread that waits inside sys.stdin holds a lock that exiting needs.
    while read(0, 65_536):
        pass
    ended()


async def _serve(exchange: ExchangeServer) -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    await exchange.start()
    sys.stdout.write(json.dumps({"url": exchange.url}) + "\n")
    sys.stdout.flush()
    stop = partial(loop.call_soon_threadsafe, stopped.set)
    threading.Thread(target=_watch_stdin, args=(stop,), name="stdin", daemon=True).start()
    await stopped.wait()
    await exchange.close()


def main() -> int:
    """Serve as the module's text says; the exit code is 0, or 78 when the configuration cannot be used."""
    try:
        exchange = ExchangeServer(ExchangeConfig.from_json(sys.stdin.buffer.readline()))
    except ConfigError as error:
        sys.stderr.write(f"local exchange: {error}\n")
        return EXIT_BAD_CONFIG
    try:
        asyncio.run(_serve(exchange))
    except OSError as error:
        sys.stderr.write(f"local exchange: port {exchange.config.port}: {error.strerror}\n")
        return EXIT_BAD_CONFIG
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
