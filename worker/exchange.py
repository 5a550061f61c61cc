"""Calls to the exchange over HTTP; the only module that knows an HTTP client.

Two questions decide how it is built. Can the exchange have seen the request? The connection itself notes the moment
before the first byte of a request is written, after name look-up, connect, proxy tunnel and TLS handshake; no
exception's class is taken for an answer. And who gets to see the signature? Only the connection, which signs and
appends the query while it writes the request line: the URLs that requests and urllib3 keep, log and put into their
exceptions end at the path.

Nothing is sent twice, no redirect is followed, neither environment nor netrc is looked at, no cookie is kept.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import re
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, cast
from urllib.parse import SplitResult, unquote, urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from requests.utils import DEFAULT_CA_BUNDLE_PATH
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager, ProxyManager
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.response import BaseHTTPResponse

from worker.clock import ServerClock
from worker.signing import Credential, signed_query
from worker.verdict import Failure, OrderRef, Reply

__all__ = ["Exchange", "UsedWeight"]

#: Most bytes of a body that are read. Answers to orders have a few hundred; the exchange's list of symbols has more,
#: but what is wanted of it stands at its beginning.
BODY_LIMIT = 64 * 1024
#: Longest Retry-After that is believed, ms: the longest ban is three days (exchange.md 3).
MAX_RETRY_AFTER_MS = 3 * 24 * 3600 * 1000
#: Connections kept beyond the callers' own, for the calls that keep others warm.
SPARE_CONNECTIONS = 4

_ORDER_PATH = "/fapi/v1/algoOrder"
_TIME_PATH = "/fapi/v1/time"
_INFO_PATH = "/fapi/v1/exchangeInfo"
_PROXY_RULE = "the egress proxy must be http(s)://[user:password@]host[:port]"
_HEADERS = {"User-Agent": "algo-cancel-queue", "Accept": "application/json", "Accept-Encoding": "identity"}
_SECONDS = re.compile(r"[0-9]+(\.[0-9]*)?")
_RATE_LIMITS = re.compile(rb'"rateLimits"\s*:\s*')
#: Statuses that concern every request of this address.
_GATE_STATUSES = frozenset({403, 418, 429})

_log = logging.getLogger(__name__)

Query = Callable[[], str]
Answer = Reply | Failure


# ---- one attempt ----------------------------------------------------------------------------------------------------


class _Attempt:
    """How far one request has got, and how long it may still take."""

    def __init__(
        self, total_s: float, connect_s: float, query: Query | None, on_sent: Callable[[], None] | None
    ) -> None:
        now_s = time.monotonic()
        self.deadline_s = now_s + total_s
        # What is sent shall have time to be answered: a request that never left can be tried again without a doubt.
        self._connected_by_s = now_s + total_s / 2
        self._connect_s = connect_s
        self._connecting = True
        self._on_sent = on_sent
        self.query = query
        self.phase = "could not connect"
        self.seen = False
        self.sent_ns = 0
        self.connection: _PlainConnection | None = None

    def time_left_s(self) -> float:
        """How long the next wait for the network may take, seconds.

        Raises:
            TimeoutError: no time is left.
        """
        left_s = (self._connected_by_s if self._connecting else self.deadline_s) - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the attempt's time is used up")
        return min(left_s, self._connect_s) if self._connecting else left_s

    @property
    def connecting(self) -> bool:
        return self._connecting

    def connected(self) -> None:
        self._connecting = False
        self.phase = "not sent"
        self.time_left_s()

    def writing(self) -> None:
        self.seen = True
        self.phase = "sending broke off"
        self.sent_ns = time.monotonic_ns()

    def written(self) -> None:
        self.phase = "no answer"
        if self._on_sent is None:
            return
        try:
            self._on_sent()
        except Exception as error:  # noqa: BLE001 - the request is out: its answer matters more than the caller's hook
            _log.warning("on_sent_failed error=%s", type(error).__name__)

    def give_up_connection(self) -> None:
        # urllib3 has done it, except after an error that it takes for the pool's own.
        if self.connection is not None:
            with contextlib.suppress(OSError):
                self.connection.close()

    def failure(self, error: Exception, outer: BaseException | None) -> Failure:
        """``error`` as a failure that names classes only: its text may hold a URL. ``outer``: not of our making."""
        root: BaseException = error
        for _ in range(10):  # more layers than requests and urllib3 have; a cycle must not hold us
            inner = root.__cause__ or root.__context__
            if inner is None or inner is outer:
                break
            root = inner
        return Failure(self.seen, f"{self.phase}: {type(root).__name__}")


class _Current(threading.local):
    """The attempt that this thread is at work on: pooled connections and sockets serve one after the other."""

    attempt: _Attempt | None = None

    def swap(self, attempt: _Attempt | None) -> _Attempt | None:
        previous, self.attempt = self.attempt, attempt
        return previous


_current = _Current()


def _attempt() -> _Attempt:
    attempt = _current.attempt
    if attempt is None:
        raise RuntimeError("a connection was used outside of an attempt")
    return attempt


# ---- sockets and connections ----------------------------------------------------------------------------------------


class _BoundedSocket(socket.socket):
    """A socket whose every wait ends with the attempt.

    A time-out of its own would start anew with each read, so that a server which sends a byte now and then could hold
    a request for ever. Here each read gets only what is left.
    """

    def _bound(self) -> None:
        attempt = _current.attempt
        if attempt is not None:
            self.settimeout(attempt.time_left_s())

    def recv(self, *args: Any) -> bytes:
        self._bound()
        return super().recv(*args)

    def recv_into(self, *args: Any) -> int:
        self._bound()
        return super().recv_into(*args)

    def sendall(self, *args: Any) -> None:
        self._bound()
        super().sendall(*args)


class _BoundedTlsSocket(_BoundedSocket, ssl.SSLSocket):
    """The same for TLS; OpenSSL's own loops keep to one time-out for a whole record or handshake."""

    def do_handshake(self, block: bool = False) -> None:
        self._bound()
        super().do_handshake(block)


class _Resolver:
    """Name look-ups with a bound, which the system's have not: callers wait no longer than they can.

    A look-up that outlasts its callers goes on alone, and later callers join it instead of starting another.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[tuple[str, int], Future[list[Any]]] = {}

    def lookup(self, host: str, port: int, timeout_s: float) -> list[Any]:
        """What ``socket.getaddrinfo`` returns for a TCP connection.

        Raises:
            OSError: the name has no address, or none was found in time (TimeoutError).
        """
        try:
            return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        except socket.gaierror:
            pass  # a name, not an address
        with self._lock:
            running = self._running.get((host, port))
            if running is None:
                running = self._running[host, port] = Future()
                self._start(host, port, running)
        return running.result(timeout_s)

    def _start(self, host: str, port: int, result: Future[list[Any]]) -> None:
        thread = threading.Thread(target=self._run, args=(host, port, result), name="resolver", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads: later callers must not wait for this one
            del self._running[host, port]
            raise

    def _run(self, host: str, port: int, result: Future[list[Any]]) -> None:
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except Exception as error:  # noqa: BLE001 - it is the callers' to handle
            self._forget(host, port)
            result.set_exception(error)
        else:
            self._forget(host, port)
            result.set_result(addresses)

    def _forget(self, host: str, port: int) -> None:
        with self._lock:
            del self._running[host, port]


_resolver = _Resolver()


def _connected_socket(attempt: _Attempt, kind: tuple[int, int, int], address: Any) -> socket.socket:
    sock = _BoundedSocket(*kind)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(attempt.time_left_s())
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


class _PlainConnection(HTTPConnection):
    """A connection that signs what it sends, and notes how far the attempt has got."""

    def _new_conn(self) -> socket.socket:
        attempt = _attempt()
        error = OSError("the name has no address")
        for family, kind, protocol, _, address in _resolver.lookup(self.host, self.port, attempt.time_left_s()):
            try:
                sock = _connected_socket(attempt, (family, kind, protocol), address)
            except OSError as failed:
                error = failed
            else:
                attempt.phase = "no tunnel through the proxy" if self.proxy else "no TLS session"
                return sock
        raise error

    def _tunnel(self) -> None:
        super()._tunnel()
        _attempt().phase = "no TLS session"

    def request(self, *args: Any, **kwargs: Any) -> None:
        # Left to http.client, a plain connection would connect within the first send.
        if self.sock is None:
            self.connect()
        attempt = _attempt()
        attempt.connection = self
        attempt.connected()
        super().request(*args, **kwargs)
        attempt.written()

    def putrequest(self, method: str, url: str, *args: Any, **kwargs: Any) -> None:
        query = _attempt().query
        super().putrequest(method, url if query is None else f"{url}?{query()}", *args, **kwargs)

    def send(self, data: Any) -> None:
        attempt = _attempt()
        if not attempt.connecting:  # else it is the CONNECT for the proxy
            attempt.writing()
        super().send(data)


class _TlsConnection(_PlainConnection, HTTPSConnection):
    """The same over TLS."""


class _PlainPool(HTTPConnectionPool):
    ConnectionCls = _PlainConnection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


# ---- requests' side -------------------------------------------------------------------------------------------------


class _Adapter(HTTPAdapter):
    """Sends to one host. What the general adapter works out anew for each request is worked out once."""

    def __init__(self, base: SplitResult, proxy: SplitResult | None, ca_file: str | None, pool_size: int) -> None:
        super().__init__(max_retries=0)
        tls = _tls_context(ca_file) if "https" in (base.scheme, proxy and proxy.scheme) else None
        if proxy is None:
            self.poolmanager = PoolManager(num_pools=1, maxsize=pool_size, ssl_context=tls)
        else:
            self.poolmanager = ProxyManager(
                f"{proxy.scheme}://{_host_and_port(proxy)}",
                num_pools=1,
                maxsize=pool_size,
                proxy_headers=_proxy_authorization(proxy),
                proxy_ssl_context=tls,
                ssl_context=tls,
            )
        self.poolmanager.pool_classes_by_scheme = {"http": _PlainPool, "https": _TlsPool}
        self._pool = self.poolmanager.connection_from_host(base.hostname, base.port, base.scheme)
        # A proxy is given the whole URL of a plain request, and a tunnel for anything else.
        self._cut = 0 if proxy is not None and base.scheme == "http" else len(f"{base.scheme}://{base.netloc}")

    def get_connection_with_tls_context(self, *_args: Any, **_kwargs: Any) -> HTTPConnectionPool:
        return cast(HTTPConnectionPool, self._pool)

    def cert_verify(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing to set: the pool's TLS context demands a certificate, and no argument can change that."""

    def request_url(self, request: requests.PreparedRequest, *_args: Any, **_kwargs: Any) -> str:
        return cast(str, request.url)[self._cut :]

    def build_response(self, req: requests.PreparedRequest, resp: BaseHTTPResponse) -> requests.Response:
        response = requests.Response()
        response.status_code = resp.status
        response.request = req
        response.raw = resp
        return response

    def close(self) -> None:
        self._pool.close()
        super().close()


def _tls_context(ca_file: str | None) -> ssl.SSLContext:
    # Not ssl.create_default_context: that one lets the environment name a file for the session keys.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # demands a certificate, and that it names the host
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(ca_file or DEFAULT_CA_BUNDLE_PATH)
    context.sslsocket_class = _BoundedTlsSocket
    return context


def _split(url: str, rule: str) -> SplitResult:
    """Take ``url`` apart; ``rule`` is what it must be, said without the URL, which may hold a password."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    except ValueError:
        pass  # its text may quote a part of the URL
    raise ValueError(rule)


def _split_base(base_url: str) -> SplitResult:
    rule = "the exchange's base URL must be http(s)://host[:port][/path]"
    base = _split(base_url.rstrip("/"), rule)
    if base.query or base.fragment or "@" in base.netloc:
        raise ValueError(rule)
    return base


def _host_and_port(url: SplitResult) -> str:
    return url.netloc.rpartition("@")[2]


def _proxy_authorization(proxy: SplitResult) -> dict[str, str]:
    """Kept apart from the proxy's URL, so that the password is in nothing that may be shown."""
    if proxy.username is None:
        return {}
    login = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"}


# ---- the client -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UsedWeight:
    """What X-MBX-USED-WEIGHT-1M said last."""

    weight: int
    minute: int  # of the exchange's clock since the epoch, in which the request was sent
    seen_mono_s: float  # monotonic time of the answer, seconds


class Exchange:
    """The exchange's REST API as far as cancelling needs it; one connection pool, safe to share between threads.

    No method raises for anything that the network, the exchange or a library does: a call that was not answered is a
    :class:`~worker.verdict.Failure`, whose ``seen`` says whether a byte of the request may have left.

    ``base_url`` holds scheme, host and, where needed, port and a path. ``connect_timeout_s`` bounds each step of
    connecting (name, each address, tunnel, handshake); all of them together may take half of ``total_timeout_s``,
    which bounds the whole attempt and is 0.8 x ``recv_window_ms`` unless given. ``ca_file`` replaces the authorities
    that certificates are checked against; that they are checked cannot be changed.

    Raises:
        ValueError: ``base_url`` or ``egress_proxy_url`` is not of the form it must have.
    """

    def __init__(
        self,
        base_url: str,
        *,
        recv_window_ms: int,
        clock: ServerClock,
        pool_size: int = 64,
        egress_proxy_url: str | None = None,
        connect_timeout_s: float = 1.0,
        total_timeout_s: float | None = None,
        ca_file: str | None = None,
    ) -> None:
        base = _split_base(base_url)
        proxy = _split(egress_proxy_url, _PROXY_RULE) if egress_proxy_url else None
        self._prefix = base.geturl()
        self._recv_window_ms = recv_window_ms
        self._clock = clock
        self._connect_s = connect_timeout_s
        self._total_s = 0.8 * recv_window_ms / 1000 if total_timeout_s is None else total_timeout_s
        self._timeouts = (self._connect_s, self._total_s)  # the sockets' own bounds are tighter
        self._adapter = _Adapter(base, proxy, ca_file, pool_size + SPARE_CONNECTIONS)
        self._prepared: dict[tuple[str, str, str | None], requests.PreparedRequest] = {}
        self._lock = threading.Lock()
        self._sent = 0
        self._refusal: Reply | None = None
        self.used_weight: UsedWeight | None = None

    def cancel(self, credential: Credential, ref: OrderRef, on_sent: Callable[[], None] | None = None) -> Answer:
        """``DELETE /fapi/v1/algoOrder`` for ``ref``, by its algo id if there is one (exchange.md 1.2; weight 1).

        ``on_sent`` is called in this thread when the request is written and before its answer is awaited.
        """
        return self._signed("DELETE", credential, ref, on_sent)

    def query(self, credential: Credential, ref: OrderRef, on_sent: Callable[[], None] | None = None) -> Answer:
        """``GET /fapi/v1/algoOrder`` for ``ref``, by its algo id if there is one (exchange.md 1.2; weight 1)."""
        return self._signed("GET", credential, ref, on_sent)

    def sync_time(self, samples: int = 3) -> bool:
        """Ask for the exchange's time ``samples`` times, one after the other; whether the clock learned anything.

        Stops at the first call without a good answer. Weight: one for each call.
        """
        learned = False
        for _ in range(samples):
            if self._ask_time(1) == 0:
                break
            learned = True
        return learned

    def keep_warm(self, connections: int = 2) -> int:
        """Use as many different connections for ``GET /fapi/v1/time``, opening what is missing; how many answered.

        They are the most recently used ones, hence those that the next cancels will get. Feeds the clock. Weight: one
        for each connection.
        """
        return self._ask_time(connections)

    def weight_limit(self) -> int | None:
        """The weight that an address may use in a minute, from ``GET /fapi/v1/exchangeInfo``; None if unknown."""
        answer = self._unsigned(_INFO_PATH)
        return _minute_limit(answer.body) if isinstance(answer, Reply) and answer.http == 200 else None

    def last_used_weight(self) -> int:
        """The weight used in the present minute of the exchange's clock, as far as an answer told."""
        used = self.used_weight
        return used.weight if used is not None and used.minute == self._clock.now_ms() // 60_000 else 0

    def take_refusal(self) -> Reply | None:
        """The latest 403, 418, 429 or challenge that one of the unsigned calls got, once: it closes the gate too."""
        with self._lock:
            refusal, self._refusal = self._refusal, None
        return refusal

    @property
    def requests_sent(self) -> int:
        """How many requests of any kind have left or may have left, in part at least, since the start."""
        return self._sent

    def close(self) -> None:
        """Close all idle connections; those in use are closed when their call ends, and later calls fail unsent."""
        self._adapter.close()

    # -- calls

    def _signed(self, method: str, credential: Credential, ref: OrderRef, on_sent: Callable[[], None] | None) -> Answer:
        def query() -> str:
            return signed_query(_id_of(ref), credential, self._clock.now_ms(), self._recv_window_ms)

        attempt = _Attempt(self._total_s, self._connect_s, query, on_sent)
        opened = self._open(attempt, method, _ORDER_PATH, credential.api_key)
        return opened if isinstance(opened, Failure) else self._read(attempt, opened)

    def _unsigned(self, path: str) -> Answer:
        attempt = _Attempt(self._total_s, self._connect_s, None, None)
        opened = self._open(attempt, "GET", path)
        return opened if isinstance(opened, Failure) else self._read_unsigned(attempt, opened)

    def _ask_time(self, connections: int) -> int:
        opened = []
        for _ in range(connections):
            attempt = _Attempt(self._total_s, self._connect_s, None, None)
            response = self._open(attempt, "GET", _TIME_PATH)
            if isinstance(response, Failure):
                break
            # Unread, an answer keeps its connection from the next call.
            opened.append((attempt, response, time.monotonic_ns()))
        return sum([self._read_time(*one) for one in opened])

    def _read_time(self, attempt: _Attempt, response: BaseHTTPResponse, received_ns: int) -> bool:
        reply = self._read_unsigned(attempt, response)
        server_time_ms = _server_time_ms(reply.body) if reply.http == 200 else None
        if server_time_ms is None:
            return False
        self._clock.add_sample(attempt.sent_ns, received_ns, server_time_ms)
        return True

    def _read_unsigned(self, attempt: _Attempt, response: BaseHTTPResponse) -> Reply:
        reply = self._read(attempt, response)
        if reply.http in _GATE_STATUSES or reply.challenge:
            with self._lock:
                self._refusal = reply
        return reply

    # -- one exchange of request and answer

    def _open(
        self, attempt: _Attempt, method: str, path: str, api_key: str | None = None
    ) -> BaseHTTPResponse | Failure:
        """Send the request and read the answer's head."""
        outer_error = sys.exception()
        outer_attempt = _current.swap(attempt)
        try:
            response = self._adapter.send(self._prepare(method, path, api_key), stream=True, timeout=self._timeouts)
        except Exception as error:  # noqa: BLE001 - whatever it was, a cancel in doubt must be recorded as one
            attempt.give_up_connection()
            return attempt.failure(error, outer_error)
        finally:
            _current.swap(outer_attempt)
            if attempt.seen:
                with self._lock:
                    self._sent += 1
        raw = cast(BaseHTTPResponse, response.raw)
        self._note_weight(attempt, raw.headers.get("x-mbx-used-weight-1m"))
        return raw

    def _read(self, attempt: _Attempt, raw: BaseHTTPResponse) -> Reply:
        """Read the body. One that breaks off is marked: status and Retry-After count all the same."""
        if raw.status < 200:
            _abandon(raw)  # the true answer is still to come, and must not be taken for the next request's
        body, whole = b"", False
        outer_attempt = _current.swap(attempt)
        try:
            body, whole = _read_body(raw)
        finally:
            _current.swap(outer_attempt)
            if not whole:
                _abandon(raw)
            raw.release_conn()
        headers = raw.headers
        return Reply(
            http=raw.status,
            body=body,
            retry_after_ms=self._retry_after_ms(headers.get("retry-after")),
            challenge=headers.get("x-amzn-waf-action", "").lower() == "challenge",
            truncated=not whole,
        )

    def _prepare(self, method: str, path: str, api_key: str | None) -> requests.PreparedRequest:
        prepared = self._prepared.get((method, path, api_key))
        if prepared is None:
            prepared = requests.PreparedRequest()
            prepared.method = method
            prepared.url = self._prefix + path
            headers = _HEADERS if api_key is None else {**_HEADERS, "X-MBX-APIKEY": api_key}
            prepared.headers = CaseInsensitiveDict(headers)
            self._prepared[method, path, api_key] = prepared
        return prepared

    def _note_weight(self, attempt: _Attempt, header: str | None) -> None:
        if header is None or not header.isascii() or not header.isdigit() or len(header) > 9:
            return
        # By the minute of sending: a late answer to a request of the last minute must not fill the new one.
        now_ms = self._clock.now_ms()
        minute = (now_ms - (time.monotonic_ns() - attempt.sent_ns) // 1_000_000) // 60_000
        last = self.used_weight
        # A minute that is still to come was noted by a clock that has been put right since.
        if last is None or not minute < last.minute <= now_ms // 60_000:
            self.used_weight = UsedWeight(int(header), minute, time.monotonic())

    def _retry_after_ms(self, header: str | None) -> int | None:
        """Retry-After in either form, ms from now; None if absent or neither."""
        if header is None:
            return None
        text = header.strip()
        if _SECONDS.fullmatch(text):
            return min(round(float(text[:20]) * 1000), MAX_RETRY_AFTER_MS)
        try:
            until = parsedate_to_datetime(text)
            until = until if until.tzinfo else until.replace(tzinfo=UTC)  # "-0000" is UTC too
            asked_ms = int(until.timestamp() * 1000) - self._clock.now_ms()
        except (ValueError, TypeError, OverflowError):
            return None
        return min(max(asked_ms, 0), MAX_RETRY_AFTER_MS)


def _id_of(ref: OrderRef) -> list[tuple[str, str | int]]:
    if ref.algo_id is not None:
        return [("algoId", ref.algo_id)]
    if ref.client_algo_id is not None:
        return [("clientAlgoId", ref.client_algo_id)]
    raise ValueError("an order is named by its algo id or its client algo id")


def _abandon(raw: BaseHTTPResponse) -> None:
    with contextlib.suppress(OSError):
        raw.close()  # and its connection


def _read_body(raw: BaseHTTPResponse) -> tuple[bytes, bool]:
    """As much of the body as there is, at most BODY_LIMIT bytes, and whether that is all of it."""
    body = b""
    try:
        while chunk := raw.read(BODY_LIMIT + 1 - len(body), decode_content=False):
            body += chunk
            if len(body) > BODY_LIMIT:
                return body[:BODY_LIMIT], False
    except Exception:  # noqa: BLE001 - cut off, reset, out of time: the caller learns that it is not whole
        return body, False
    return body, True


def _server_time_ms(body: bytes) -> int | None:
    try:
        value = json.loads(body)["serverTime"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    # Milliseconds of this century, not seconds or microseconds.
    return value if type(value) is int and 10**12 <= value < 5 * 10**12 else None


def _minute_limit(body: bytes) -> int | None:
    """REQUEST_WEIGHT for one minute. The body may break off after its first part, in which the limits stand."""
    found = _RATE_LIMITS.search(body)
    if found is None:
        return None
    try:
        limits, _ = json.JSONDecoder().raw_decode(body[found.end() :].decode("utf-8", "replace"))
        for limit in limits:
            kind = (limit["rateLimitType"], limit["interval"], limit["intervalNum"])
            if kind == ("REQUEST_WEIGHT", "MINUTE", 1) and type(limit["limit"]) is int and limit["limit"] > 0:
                return limit["limit"]
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    return None
