"""What every way to the exchange shares: requests, answers, failures, and the rules for URLs, proxies and TLS.

A transport sends one request on one connection and never sends it again. It follows no redirect, keeps no cookie, and
looks at neither environment nor netrc. A request is signed when it is about to be written, and nothing that a
transport shows, no repr, no exception and no log, has any part of it.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import SplitResult, unquote, urlsplit

import certifi

__all__ = [
    "BODY_LIMIT",
    "FIELDS",
    "IDLE_BOUND_S",
    "Failed",
    "Place",
    "Raw",
    "Request",
    "Route",
    "Transport",
    "decoded",
    "named",
]

#: Most bytes of a body that are read. Answers to orders have a few hundred; the exchange's list of symbols has more,
#: but what is wanted of it stands at its beginning.
BODY_LIMIT = 64 * 1024
#: How long a connection may be unused and still be trusted, s: a little more than the time between two calls that keep
#: connections warm. Firewalls and load balancers forget a flow that is still in silence, and what is sent then is
#: never answered.
IDLE_BOUND_S = 17.0
#: What every request says of its sender.
FIELDS = {"User-Agent": "algo-cancel-queue", "Accept": "application/json", "Accept-Encoding": "identity"}

#: zlib's sign for "a zlib or a gzip header, whichever is there", and for no header at all.
_ANY_HEADER, _NO_HEADER = 32 + zlib.MAX_WBITS, -zlib.MAX_WBITS
_CODINGS = {"gzip": (_ANY_HEADER,), "x-gzip": (_ANY_HEADER,), "deflate": (_ANY_HEADER, _NO_HEADER)}


# ---- a request and what becomes of it -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """One request without a body. ``target`` is path and query, ``fields`` are those of its own beside :data:`FIELDS`.

    Both are sent as they are: whoever makes a request has seen to it that they hold visible ASCII alone.

    ``patience_s`` is how long its answer is waited for, counted from when it is written; None: until the attempt's
    end. ``body_limit``: most bytes of the answer's body that are read.
    """

    method: str
    target: str = field(repr=False)
    fields: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    patience_s: float | None = field(default=None, repr=False)
    body_limit: int = field(default=BODY_LIMIT, repr=False)


@dataclass(frozen=True, slots=True)
class Raw:
    """An answer whose head has come.

    ``headers`` has lower-case names, values of a repeated one joined by ", ". ``body`` is decoded and within
    the request's limit, and ``whole`` says whether that is all of it. ``sent_ns`` and ``received_ns`` (monotonic)
    enclose the moment at which the exchange dealt with the request.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    whole: bool
    sent_ns: int
    received_ns: int


@dataclass(frozen=True, slots=True)
class Failed:
    """No answer. ``seen``: a byte of the request may have left; False is a proof that none has.

    ``reason`` says how far it got and names the class of an error, never its text. ``late`` is done with what comes of
    the request after its patience, by the attempt's end, where the transport can wait for that beside other calls.
    """

    seen: bool
    reason: str
    late: asyncio.Future[Raw | Failed] | None = None


class Transport(Protocol):
    """A way to send requests to one exchange."""

    async def send(self, make: Callable[[], Request | None], patience_s: float) -> Raw | Failed | None:
        """Send one request and read its answer, within ``patience_s`` in all and half of it until it is written.

        An answer that the request has no patience for may still come (:attr:`Failed.late`): the connection stays open
        for it until ``patience_s`` are over.

        ``make`` is called when there is a connection to write to, right before the first byte: it looks whether the
        request may still go, and signs. It returns None if it may not: then nothing was sent, and None is returned.

        Raises nothing that network, exchange or libraries cause, nor what ``make`` raises: all that is a
        :class:`Failed`. Cancelling it ends the call, and leaves open whether the exchange has seen it.
        """
        ...

    def close(self) -> None:
        """Close what is idle; what is in use is closed when its call ends, and later calls fail unsent."""
        ...


def named(phase: str, error: BaseException) -> str:
    """A reason for :class:`Failed`: how far it got and the class of the error, whose text may hold a URL."""
    return f"{phase}: {type(error).__name__}"


def decoded(headers: Mapping[str, str], body: bytes, whole: bool, limit: int) -> tuple[bytes, bool]:
    """The body without its content codings, and whether that is all of it.

    Proxies compress though ``identity`` was asked for. What cannot be decoded, or not within ``limit`` bytes, is
    not whole; in the place of a body of an unknown coding stand words that say so.
    """
    codings = [coding.strip().lower() for coding in headers.get("content-encoding", "").split(",")]
    for coding in reversed(codings):
        if coding in ("", "identity") or not body:
            continue
        if coding not in _CODINGS:
            return f"its body is coded as {coding}, which cannot be read: a proxy on the way does that".encode(), whole
        tried = [_inflated(header, body, limit) for header in _CODINGS[coding]]
        body, is_all = next((found for found in tried if found is not None), (b"", False))
        whole = whole and is_all
    return body, whole


def _inflated(header: int, body: bytes, limit: int) -> tuple[bytes, bool] | None:
    """What there is of a body, of one or several members (RFC 1952, 2.2), and whether that is all; None: it is not of
    this kind."""
    text, rest = b"", body
    while rest and len(text) <= limit:
        decoder = zlib.decompressobj(header)
        try:
            text += decoder.decompress(rest, limit + 1 - len(text))
        except zlib.error:
            return (text, False) if text else None
        if not decoder.eof:
            return text[:limit], False
        rest = decoder.unused_data
    return text[:limit], len(text) <= limit


# ---- the way --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """A server to connect to; ``secure``: by TLS."""

    host: str
    port: int
    secure: bool

    @classmethod
    def of(cls, url: SplitResult) -> Place:
        """Where a URL leads."""
        secure = url.scheme == "https"
        return cls(str(url.hostname), url.port or (443 if secure else 80), secure)

    @property
    def authority(self) -> str:
        """``host:port``, as CONNECT wants it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Route:
    """Where requests go, and by which way.

    All three are as :mod:`worker.settings` lets them pass: ``base_url`` holds scheme, host and, where needed, port, and
    is https beside a proxy. ``egress_proxy_url`` may hold a login. A proxy is asked for a tunnel and sees neither key
    nor signature. ``ca_file`` replaces the authorities that certificates are checked against; that they are checked
    cannot be changed.
    """

    def __init__(self, base_url: str, *, egress_proxy_url: str | None = None, ca_file: str | None = None) -> None:
        base = urlsplit(base_url)
        proxy = urlsplit(egress_proxy_url) if egress_proxy_url else None
        self.base_url = base_url
        self.exchange = Place.of(base)
        self.proxy = Place.of(proxy) if proxy else None
        #: The login for the proxy, kept apart from its URL so that nothing which may be shown has the password.
        self.proxy_fields = _proxy_fields(proxy) if proxy else {}
        self.ca_file = ca_file or certifi.where()
        self.tls = _tls_context(self.ca_file) if "https" in (base.scheme, proxy and proxy.scheme) else None
        fields = {"Host": base.netloc, **FIELDS}
        self._head = "".join([" HTTP/1.1\r\n", *[f"{name}: {value}\r\n" for name, value in fields.items()]])

    def encode(self, request: Request) -> bytes:
        """The bytes of a request on a connection to the exchange.

        Raises:
            UnicodeEncodeError: it holds characters beyond ASCII.
        """
        own = "".join([f"{name}: {value}\r\n" for name, value in request.fields])
        return f"{request.method} {request.target}{self._head}{own}\r\n".encode("ascii")

    def encode_connect(self) -> bytes:
        """The bytes that ask the proxy for a tunnel."""
        authority = self.exchange.authority
        fields = "".join([f"{name}: {value}\r\n" for name, value in self.proxy_fields.items()])
        return f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n{fields}\r\n".encode("ascii")


def _tls_context(ca_file: str) -> ssl.SSLContext:
    # Not ssl.create_default_context: that one lets the environment name a file for the session keys.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # demands a certificate, and that it names the host
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    context.load_verify_locations(ca_file)
    return context


def _proxy_fields(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    login = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"}
