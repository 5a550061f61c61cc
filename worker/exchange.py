"""Calls to the exchange over HTTP; the only module that knows an HTTP client.

Pool, TLS, proxies and connecting are those of requests and urllib3. On a connection that stands, the request is
written in one piece and the answer read by :mod:`worker.http1`: sent their general way, it would cost three times as
much CPU.

Two questions decide how it is built. Can the exchange have seen the request? The moment before its first byte is
written is noted, after name look-up, connect, proxy tunnel and TLS handshake; no exception's class is taken for an
answer. And who gets to see the signature? Only the socket: the request is signed when it is written, and nothing that
requests or urllib3 keep, log or put into their exceptions has any part of it.

Nothing is sent twice, no redirect is followed, neither environment nor netrc is looked at, no cookie is kept.
"""

from __future__ import annotations

import base64
import contextlib
import json
import queue
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

from requests.adapters import HTTPAdapter
from requests.utils import DEFAULT_CA_BUNDLE_PATH
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection

from producer.message import Call
from worker.classify import Failure, OrderRef, Reply
from worker.clock import ServerClock
from worker.http1 import ResponseReader
from worker.signing import Credential, check_api_key, signed_query

__all__ = ["Exchange", "Pending", "UsedWeight"]

#: Most bytes of a body that are read. Answers to orders have a few hundred; the exchange's list of symbols has more,
#: but what is wanted of it stands at its beginning.
BODY_LIMIT = 64 * 1024
#: Longest Retry-After that is believed, ms: the longest ban is three days (exchange.md 3).
MAX_RETRY_AFTER_MS = 3 * 24 * 3600 * 1000
#: Connections kept beyond the callers' own, for the calls that keep others warm.
SPARE_CONNECTIONS = 4
#: Most bytes of one read: what a TLS record holds, so that no part of one is left where a look at the socket, before
#: its next use, would not find it.
READ_SIZE = 16 * 1024
#: Most bytes that one look at a socket takes, more than any answer has: a flood must not keep an event loop.
TURN_SIZE = 128 * 1024
#: A time-out this close to the right one is left as it is, seconds: setting one is a system call.
TIMEOUT_TOLERANCE_S = 0.002

#: What a socket that must not wait says instead; of TLS, a record can be incomplete.
_NOT_NOW = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

_METHODS = {Call.CANCEL: "DELETE", Call.QUERY: "GET"}
_ORDER_PATH = "/fapi/v1/algoOrder"
_TIME_PATH = "/fapi/v1/time"
_INFO_PATH = "/fapi/v1/exchangeInfo"
_PROXY_RULE = "the egress proxy must be http(s)://[user:password@]host[:port]"
_FIELDS = {"User-Agent": "algo-cancel-queue", "Accept": "application/json", "Accept-Encoding": "identity"}
_DEFAULT_PORTS = {"http": 80, "https": 443}
_VISIBLE_ASCII = re.compile(r"[!-~]*")
_SECONDS = re.compile(r"[0-9]+(\.[0-9]*)?")
_RATE_LIMITS = re.compile(rb'"rateLimits"\s*:\s*')
#: Statuses that concern every request of this address.
_GATE_STATUSES = frozenset({403, 418, 429})

Answer = Reply | Failure


# ---- one attempt ----------------------------------------------------------------------------------------------------


class _Attempt:
    """How far one request has got, and how long it may still take."""

    def __init__(
        self,
        total_s: float,
        connect_s: float,
        request: Callable[[], bytes],
    ) -> None:
        now_s = time.monotonic()
        self.deadline_s = now_s + total_s
        # What is sent shall have time to be answered: a request that never left can be tried again without a doubt.
        self._connected_by_s = now_s + total_s / 2
        self._connect_s = connect_s
        self._connecting = True
        self._request = request
        self.phase = "could not connect"
        self.seen = False
        self.sent_ns = 0
        self.connection: HTTPConnection | None = None
        self.answer = ResponseReader(BODY_LIMIT)

    def time_left_s(self) -> float:
        """How long the next wait for the network may take, seconds.

        Raises:
            TimeoutError: no time is left.
        """
        left_s = (self._connected_by_s if self._connecting else self.deadline_s) - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the attempt's time is used up")
        return min(left_s, self._connect_s) if self._connecting else left_s

    def send(self, connection: HTTPConnection) -> None:
        """Sign and write the request, now that there is a connection.

        Raises:
            OSError: it could not be written, or no time is left for it.
            Exception: it could not be signed.
        """
        self._connecting = False
        self.phase = "not sent"
        self.time_left_s()
        self._write(connection.sock)
        self.phase = "no answer"

    def _write(self, sock: socket.socket) -> None:
        # In a frame of its own, so that no signature is among the variables that a later error's traceback shows.
        request = self._request()
        self.seen = True
        self.phase = "sending broke off"
        self.sent_ns = time.monotonic_ns()
        sock.sendall(request)

    def close_connection(self) -> None:
        if self.connection is not None:
            with contextlib.suppress(OSError):
                self.connection.close()

    def failure(self, error: Exception, outer: BaseException | None) -> Failure:
        """``error`` as a failure that names classes only: its text may hold a URL. ``outer``: not of our making."""
        root: BaseException = error
        for _ in range(10):  # more layers than urllib3 has; a cycle must not hold us
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
            left_s, timeout_s = attempt.time_left_s(), self.gettimeout()
            if timeout_s is None or abs(timeout_s - left_s) > TIMEOUT_TOLERANCE_S:
                self.settimeout(left_s)

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


def _some(sock: socket.socket) -> bytes:
    """What the socket gives, b"" at its end; urllib3's TLS within TLS says 0 if there was no good-bye."""
    return sock.recv(READ_SIZE) or b""


def _holds_unread(sock: socket.socket) -> bool:
    """Whether something was read ahead, where a look at the socket does not find it: by urllib3's TLS within TLS."""
    incoming: ssl.MemoryBIO | None = getattr(sock, "incoming", None)
    return incoming is not None and incoming.pending > 0


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
    """A connection that notes how far the attempt has got while it is made."""

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


class _TlsConnection(_PlainConnection, HTTPSConnection):
    """The same over TLS."""


class _IdleConnections(queue.LifoQueue[Any]):
    """The idle connections of a pool, the one used last first; None stands for one that was not made yet.

    Never waiting, it needs none of its parent's locks: a list's own steps are atomic, and cost a tenth.
    """

    def get(self, block: bool = False, timeout: float | None = None) -> Any:  # noqa: ARG002
        try:
            return self.queue.pop()
        except IndexError:
            raise queue.Empty from None

    def put(self, item: Any, block: bool = False, timeout: float | None = None) -> None:  # noqa: ARG002
        if len(self.queue) >= self.maxsize:
            raise queue.Full
        self.queue.append(item)


class _PlainPool(HTTPConnectionPool):
    ConnectionCls = _PlainConnection
    QueueCls = _IdleConnections


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection
    QueueCls = _IdleConnections


# ---- requests' side -------------------------------------------------------------------------------------------------


class _Adapter(HTTPAdapter):
    """The connections to one host, as requests' adapter makes them; its own way of sending is not used."""

    def __init__(self, base: SplitResult, proxy: SplitResult | None, ca_file: str | None, pool_size: int) -> None:
        super().__init__(pool_connections=1, pool_maxsize=pool_size)
        self._login = _proxy_authorization(proxy)
        tls = _tls_context(ca_file) if "https" in (base.scheme, proxy and proxy.scheme) else None
        if proxy is None:
            self.init_poolmanager(1, pool_size, ssl_context=tls)
            manager = self.poolmanager
        else:
            url = f"{proxy.scheme}://{_host_and_port(proxy)}"
            manager = self.proxy_manager_for(url, proxy_ssl_context=tls, ssl_context=tls)
        manager.pool_classes_by_scheme = {"http": _PlainPool, "https": _TlsPool}
        self._pool: HTTPConnectionPool = manager.connection_from_host(base.hostname, base.port, base.scheme)
        self._tunnels = proxy is not None and base.scheme == "https"

    def proxy_headers(self, proxy: str) -> dict[str, str]:  # noqa: ARG002 - there is one proxy
        return self._login

    # urllib3 lends a connection without sending on it under these private names only, and a tunnel likewise; a test
    # watches them.

    def take(self) -> HTTPConnection:
        """The connection used last of those that are idle and still stand, or one that is not connected yet.

        Raises:
            urllib3.exceptions.ClosedPoolError: after :meth:`close`.
        """
        return cast(HTTPConnection, self._pool._get_conn())

    def connect(self, connection: HTTPConnection) -> None:
        if self._tunnels:
            self._pool._prepare_proxy(connection)
        else:
            connection.connect()

    def give_back(self, connection: HTTPConnection) -> None:
        self._pool._put_conn(connection)

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
    if base.query or base.fragment or "@" in base.netloc or not _VISIBLE_ASCII.fullmatch(base_url):
        raise ValueError(rule)
    return base


def _host_and_port(url: SplitResult) -> str:
    return url.netloc.rpartition("@")[2]


def _host_field(url: SplitResult) -> str:
    host = f"[{url.hostname}]" if ":" in str(url.hostname) else str(url.hostname)
    return host if url.port in (None, _DEFAULT_PORTS[url.scheme]) else f"{host}:{url.port}"


def _proxy_authorization(proxy: SplitResult | None) -> dict[str, str]:
    """Kept apart from the proxy's URL, so that the password is in nothing that may be shown."""
    if proxy is None or proxy.username is None:
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
    :class:`~worker.classify.Failure`, whose ``seen`` says whether a byte of the request may have left.

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
        # A proxy is given the whole URL of a plain request, and a tunnel for anything else.
        whole_url = proxy is not None and base.scheme == "http"
        self._prefix = base.geturl() if whole_url else base.path
        self._fields = {"Host": _host_field(base), **_FIELDS, **(_proxy_authorization(proxy) if whole_url else {})}
        self._recv_window_ms = recv_window_ms
        self._clock = clock
        self._connect_s = connect_timeout_s
        self._total_s = 0.8 * recv_window_ms / 1000 if total_timeout_s is None else total_timeout_s
        self._adapter = _Adapter(base, proxy, ca_file, pool_size + SPARE_CONNECTIONS)
        self._heads: dict[tuple[str, str, str | None], tuple[str, str]] = {}
        self._lock = threading.Lock()
        self._sent = 0
        self._refusal: Reply | None = None
        self.used_weight: UsedWeight | None = None

    def cancel(self, credential: Credential, ref: OrderRef) -> Answer:
        """``DELETE /fapi/v1/algoOrder`` for ``ref``, by its algo id if there is one (exchange.md 1.2; weight 1)."""
        return self._ask(self._signed(Call.CANCEL, credential, ref))

    def query(self, credential: Credential, ref: OrderRef) -> Answer:
        """``GET /fapi/v1/algoOrder`` for ``ref``, by its algo id if there is one (exchange.md 1.2; weight 1)."""
        return self._ask(self._signed(Call.QUERY, credential, ref))

    def prepare(self, call: Call, credential: Credential, ref: OrderRef) -> Pending:
        """The same for an event loop: a call that is made in steps, none of which waits. Its time begins now."""
        return Pending(self, self._signed(call, credential, ref))

    def sync_time(self, samples: int = 3, may_go: Callable[[], bool] | None = None) -> bool:
        """Ask for the exchange's time ``samples`` times, one after the other; whether the clock learned anything.

        Stops at the first call without a good answer, and when ``may_go`` says so. Weight: one for each call.
        """
        learned = False
        for _ in range(samples):
            if (may_go is not None and not may_go()) or self._ask_time(1) == 0:
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

    def _signed(self, call: Call, credential: Credential, ref: OrderRef) -> _Attempt:
        def request() -> bytes:
            target, rest = self._head(_METHODS[call], _ORDER_PATH, credential.api_key)
            query = signed_query(_id_of(ref), credential, self._clock.now_ms(), self._recv_window_ms)
            return f"{target}?{query}{rest}".encode("ascii")

        return _Attempt(self._total_s, self._connect_s, request)

    def _ask(self, attempt: _Attempt) -> Answer:
        return self._open(attempt) or self._read(attempt)

    def _unsigned(self, path: str) -> Answer:
        attempt = self._unsigned_attempt(path)
        return self._open(attempt) or self._read_unsigned(attempt)

    def _unsigned_attempt(self, path: str) -> _Attempt:
        return _Attempt(self._total_s, self._connect_s, lambda: "".join(self._head("GET", path)).encode("ascii"))

    def _ask_time(self, connections: int) -> int:
        opened = []
        for _ in range(connections):
            attempt = self._unsigned_attempt(_TIME_PATH)
            if self._open(attempt) is not None:
                break
            # Unread, an answer keeps its connection from the next call.
            opened.append((attempt, time.monotonic_ns()))
        return sum([self._read_time(*one) for one in opened])

    def _read_time(self, attempt: _Attempt, received_ns: int) -> bool:
        reply = self._read_unsigned(attempt)
        server_time_ms = _server_time_ms(reply.body) if reply.http == 200 else None
        if server_time_ms is None:
            return False
        self._clock.add_sample(attempt.sent_ns, received_ns, server_time_ms)
        return True

    def _read_unsigned(self, attempt: _Attempt) -> Reply:
        reply = self._read(attempt)
        if reply.http in _GATE_STATUSES or reply.challenge:
            with self._lock:
                self._refusal = reply
        return reply

    # -- one exchange of request and answer

    def _open(self, attempt: _Attempt) -> Failure | None:
        """Send the request and read the answer's head, with what came along with it; None if that went well."""
        outer_error = sys.exception()
        outer_attempt = _current.swap(attempt)
        try:
            self._take(attempt)
            self._connect(attempt)
            connection = cast(HTTPConnection, attempt.connection)
            attempt.send(connection)
            while not attempt.answer.status:
                attempt.answer.feed(_some(connection.sock))
        except Exception as error:  # noqa: BLE001 - whatever it was, a cancel in doubt must be recorded as one
            return self._failed(attempt, error, outer_error)
        except BaseException:
            self._count(attempt)
            attempt.close_connection()
            raise
        finally:
            _current.swap(outer_attempt)
        return None

    def _take(self, attempt: _Attempt) -> bool:
        """Borrow a connection; whether it stands already."""
        if attempt.connection is None or attempt.connection.is_closed:
            # One that is not connected is not worth keeping: another may have fallen free meanwhile.
            attempt.connection = self._adapter.take()
        return not attempt.connection.is_closed

    def _connect(self, attempt: _Attempt) -> None:
        connection = cast(HTTPConnection, attempt.connection)
        if connection.is_closed:
            self._adapter.connect(connection)

    def _read(self, attempt: _Attempt) -> Reply:
        """Read the rest of the body. One that breaks off is marked: status and Retry-After count all the same."""
        answer, connection = attempt.answer, cast(HTTPConnection, attempt.connection)
        outer_attempt = _current.swap(attempt)
        try:
            while not answer.ended:
                answer.feed(_some(connection.sock))
        except Exception:  # noqa: BLE001, S110 - cut off or out of time: the caller learns that it is not whole
            pass
        finally:
            _current.swap(outer_attempt)
            self._give_back(attempt)
        return self._replied(attempt)

    def _give_back(self, attempt: _Attempt) -> None:
        """Part with the attempt's connection, which serves the next one if nothing of this one can still come."""
        connection = attempt.connection
        if connection and (not attempt.seen or (attempt.answer.reusable and not _holds_unread(connection.sock))):
            self._adapter.give_back(connection)
        else:
            attempt.close_connection()

    def _count(self, attempt: _Attempt) -> None:
        if attempt.seen:
            with self._lock:
                self._sent += 1

    def _failed(self, attempt: _Attempt, error: Exception, outer: BaseException | None) -> Failure:
        self._count(attempt)
        attempt.close_connection()
        return attempt.failure(error, outer)

    def _replied(self, attempt: _Attempt) -> Reply:
        answer = attempt.answer
        self._count(attempt)
        self._note_weight(attempt, answer.headers.get("x-mbx-used-weight-1m"))
        return Reply(
            http=answer.status,
            body=answer.body,
            retry_after_ms=self._retry_after_ms(answer.headers.get("retry-after")),
            challenge=answer.headers.get("x-amzn-waf-action", "").lower() == "challenge",
            truncated=not answer.whole,
        )

    def _head(self, method: str, path: str, api_key: str | None = None) -> tuple[str, str]:
        """A request's head, the same for all of its kind, in two parts: a query goes between them."""
        head = self._heads.get((method, path, api_key))
        if head is None:
            fields = self._fields if api_key is None else {**self._fields, "X-MBX-APIKEY": check_api_key(api_key)}
            lines = [" HTTP/1.1", *[f"{name}: {value}" for name, value in fields.items()], "", ""]
            head = self._heads[method, path, api_key] = (f"{method} {self._prefix}{path}", "\r\n".join(lines))
        return head

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


class Pending:
    """One signed call of an event loop (:meth:`Exchange.prepare`).

    First :meth:`begin`; if no connection stood, :meth:`connect` in a thread that may wait and :meth:`begin` again;
    then :meth:`receive` whenever :attr:`fileno` has something to read, or :meth:`expire` when :attr:`deadline_s` has
    come. Each gives the call's answer as soon as there is one, and :meth:`drop` ends a call that has not begun. As with
    :class:`Exchange`, nothing raises.
    """

    __slots__ = ("_attempt", "_exchange", "deadline_s", "sent")

    def __init__(self, exchange: Exchange, attempt: _Attempt) -> None:
        self._exchange = exchange
        self._attempt = attempt
        self.deadline_s = attempt.deadline_s  # monotonic
        self.sent = False  # once true, `fileno` is to be watched

    @property
    def fileno(self) -> int:
        """The connection's file descriptor, as long as there was no answer."""
        return self._sock().fileno()

    def _sock(self) -> socket.socket:
        return cast(HTTPConnection, self._attempt.connection).sock

    def begin(self) -> Failure | None:
        """Send the request if a connection stands."""
        attempt, outer_error = self._attempt, sys.exception()
        try:
            attempt.time_left_s()
            if self._exchange._take(attempt):
                sock = self._sock()
                if sock.gettimeout() != 0:
                    sock.settimeout(0)  # TLS within TLS knows no setblocking
                # A request is smaller than an idle connection's buffer. Were it not taken whole, it would be in doubt.
                attempt.send(cast(HTTPConnection, attempt.connection))
                self.sent = True
        except Exception as error:  # noqa: BLE001 - as in Exchange._open
            return self._exchange._failed(attempt, error, outer_error)
        return None

    def connect(self) -> Failure | None:
        """Open the connection, waiting for it."""
        outer_error = sys.exception()
        outer_attempt = _current.swap(self._attempt)
        try:
            self._exchange._connect(self._attempt)
        except Exception as error:  # noqa: BLE001 - as in Exchange._open
            return self._exchange._failed(self._attempt, error, outer_error)
        finally:
            _current.swap(outer_attempt)
        return None

    def receive(self) -> Answer | None:
        """Take in what the socket has, a turn's worth at the most: then it is still readable."""
        answer, sock, outer_error, taken = self._attempt.answer, self._sock(), sys.exception(), 0
        try:
            while not answer.ended:
                if taken > TURN_SIZE:
                    return None
                data = _some(sock)
                taken += len(data)
                answer.feed(data)
        except _NOT_NOW:
            return None
        except Exception as error:  # noqa: BLE001 - as in Exchange._open and _read
            return self._ended(error, outer_error)
        return self._ended()

    def expire(self) -> Answer:
        """The answer, or what there is of it, at the end of its time."""
        # A process that was paused may hear of the time first, with the answer unread.
        answer = self.receive() if self.sent else None
        return answer or self._ended(TimeoutError("the attempt's time is used up"))

    def drop(self) -> None:
        """Part with the connection: nothing was sent, and nothing shall be."""
        self._exchange._give_back(self._attempt)

    def abandon(self) -> None:
        """Close the connection: nobody waits for its answer any more."""
        self._attempt.close_connection()

    def _ended(self, error: Exception | None = None, outer: BaseException | None = None) -> Answer:
        if error is not None and not self._attempt.answer.status:
            return self._exchange._failed(self._attempt, error, outer)
        self._exchange._give_back(self._attempt)
        return self._exchange._replied(self._attempt)


def _id_of(ref: OrderRef) -> list[tuple[str, str | int]]:
    if ref.algo_id is not None:
        return [("algoId", ref.algo_id)]
    if ref.client_algo_id is not None:
        return [("clientAlgoId", ref.client_algo_id)]
    raise ValueError("an order is named by its algo id or its client algo id")


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
