"""Whatever is raised while a request is sent becomes a Failure that knows whether a byte may have left.

Each class of requests and urllib3 is raised at four places of a real call to a real server on loopback, made in the
way that waits and in the steps of an event loop.
"""

from __future__ import annotations

import gc
import http.client
import inspect
import re
import socket
import ssl
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest
import requests.exceptions
import urllib3.connection
import urllib3.connectionpool
import urllib3.exceptions

from producer.message import Call
from tests.ways import WAYS
from worker.classify import Failure, OrderRef, Reply
from worker.clock import ServerClock
from worker.exchange import Exchange, _BoundedSocket
from worker.signing import Credential

CANARY = "signature=c4n4ry"
URL = f"http://127.0.0.1/fapi/v1/algoOrder?{CANARY}"
REF = OrderRef(2146760)
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


def _family(*modules: Any) -> list[type[Exception]]:
    """Every exception class that the modules define, and every class derived from one of them anywhere."""
    found: dict[type[Exception], None] = {}

    def add(cls: type[Exception]) -> None:
        if cls not in found:
            found[cls] = None
            for sub in cls.__subclasses__():
                add(sub)

    for module in modules:
        for value in vars(module).values():
            own = getattr(value, "__module__", None) == module.__name__
            if own and isinstance(value, type) and issubclass(value, Exception):
                add(value)
    return sorted(found, key=lambda cls: f"{cls.__module__}.{cls.__qualname__}")


FAMILY = _family(requests.exceptions, urllib3.exceptions)
OTHERS: list[type[Exception]] = [
    OSError,
    BrokenPipeError,
    ConnectionRefusedError,
    ConnectionResetError,
    TimeoutError,
    socket.gaierror,
    ssl.SSLError,
    ssl.SSLCertVerificationError,
    ssl.SSLZeroReturnError,
    *_family(http.client),
    # a mistake of ours in the middle of a call leaves the same doubt
    AttributeError,
    KeyError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
]
CLASSES = list(dict.fromkeys([*FAMILY, *OTHERS]))

_ARGUMENTS: dict[str, Any] = {
    "url": URL,
    "location": URL,
    "message": URL,
    "msg": URL,
    "doc": URL,
    "line": URL,
    "line_type": URL,
    "version": URL,
    "host": URL,
    "scheme": "ftp",
    "unparsed_data": URL.encode(),
    "length": URL.encode(),
    "partial": 3,
    "expected": 5,
    "pos": 0,
    "defects": [],
    "reason": OSError(URL),
    "error": OSError(URL),
    "response": urllib3.HTTPResponse(body=b"", request_url=URL),
    "pool": None,
    "conn": None,
}


def _made(cls: type[Exception]) -> Exception:
    """An instance whose text, where it has any, holds the signed URL."""
    try:
        parameters = list(inspect.signature(cls).parameters.values())
    except ValueError:  # written in C
        return cls(URL)
    wanted = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if not wanted:
        return cls(URL, URL, 0) if issubclass(cls, requests.exceptions.JSONDecodeError) else cls(URL)
    return cls(**{name: _ARGUMENTS[name] for name in wanted if name in _ARGUMENTS})


class _Answering:
    """A server that answers everything with an empty object, and counts the requests that reached it."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests = 0
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
            self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines:
            try:
                for line in lines:
                    if line == b"\r\n":
                        self.requests += 1
                        connection.sendall(ANSWER)
            except OSError:
                pass

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def server() -> Iterator[_Answering]:
    answering = _Answering()
    yield answering
    answering.close()


@pytest.fixture(params=WAYS)
def exchange(server: _Answering, request: pytest.FixtureRequest) -> Iterator[Exchange]:
    client = request.param(server.url, recv_window_ms=3_000, clock=ServerClock())
    yield client
    client.close()


@pytest.fixture
def credential() -> Credential:
    return Credential.from_secret("default", "key", "secret")


def _raiser(error: BaseException) -> Callable[..., NoReturn]:
    def raise_it(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise error

    return raise_it


def _is_failure(answer: Reply | Failure, *, seen: bool) -> Failure:
    assert isinstance(answer, Failure)
    assert answer.seen is seen
    assert CANARY not in answer.reason
    assert re.fullmatch(r"[a-z A-Z]+: [A-Za-z]+", answer.reason)
    return answer


def _still_works(exchange: Exchange, credential: Credential) -> None:
    assert isinstance(exchange.query(credential, REF), Reply)


def test_the_walk_finds_the_classes() -> None:
    """The walk is not empty by accident: it reaches the well-known leaves of both libraries."""
    assert {
        requests.exceptions.ChunkedEncodingError,
        requests.exceptions.ConnectTimeout,
        requests.exceptions.ReadTimeout,
        requests.exceptions.ProxyError,
        urllib3.exceptions.IncompleteRead,
        urllib3.exceptions.MaxRetryError,
        urllib3.exceptions.NameResolutionError,
        urllib3.exceptions.ProtocolError,
        urllib3.exceptions.ReadTimeoutError,
    } <= set(FAMILY)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: f"{cls.__module__}.{cls.__qualname__}")
def test_raised_before_the_first_byte(
    cls: type[Exception],
    server: _Answering,
    exchange: Exchange,
    monkeypatch: pytest.MonkeyPatch,
    credential: Credential,
) -> None:
    """Raised while connecting or while signing, it is a failure that nobody can have seen."""
    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", _raiser(_made(cls)))
        failure = _is_failure(exchange.cancel(credential, REF), seen=False)
        assert failure.reason.startswith("could not connect: ")
    unsignable = Credential("default", "key", "hmac", _raiser(_made(cls)))
    _is_failure(exchange.cancel(unsignable, REF), seen=False)
    assert server.requests == 0
    assert exchange.requests_sent == 0
    _still_works(exchange, credential)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: f"{cls.__module__}.{cls.__qualname__}")
def test_raised_after_the_first_byte(
    cls: type[Exception],
    server: _Answering,
    exchange: Exchange,
    monkeypatch: pytest.MonkeyPatch,
    credential: Credential,
) -> None:
    """Raised while writing or while waiting for the answer, it is a failure that may have been seen, and no retry."""
    with monkeypatch.context() as patch:
        patch.setattr(_BoundedSocket, "recv", _raiser(_made(cls)))
        failure = _is_failure(exchange.cancel(credential, REF), seen=True)
        assert failure.reason.startswith("no answer: ")
    with monkeypatch.context() as patch:
        patch.setattr(_BoundedSocket, "sendall", _raiser(_made(cls)))
        failure = _is_failure(exchange.cancel(credential, REF), seen=True)
        assert failure.reason.startswith("sending broke off: ")
    assert exchange.requests_sent == 2
    _still_works(exchange, credential)
    assert server.requests <= 2


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (urllib3.connectionpool.HTTPConnectionPool, "_get_conn", ["self", "timeout"]),
        (urllib3.connectionpool.HTTPConnectionPool, "_put_conn", ["self", "conn"]),
        (urllib3.connectionpool.HTTPSConnectionPool, "_prepare_proxy", ["self", "conn"]),
        (urllib3.connection.HTTPConnection, "_new_conn", ["self"]),
        (urllib3.connection.HTTPConnection, "_tunnel", ["self"]),
    ],
)
def test_urllib3_still_has_what_is_borrowed(owner: type, name: str, parameters: list[str]) -> None:
    """These private methods of urllib3 are called or replaced by the client: a release without them needs a new one."""
    assert list(inspect.signature(getattr(owner, name)).parameters) == parameters


def test_reason_names_the_root(exchange: Exchange, credential: Credential, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class in the reason is the one that began it, not one of the layers that wrapped it."""
    monkeypatch.setattr(socket, "getaddrinfo", _raiser(ConnectionAbortedError(URL)))
    answer = exchange.cancel(credential, REF)
    assert answer == Failure(seen=False, reason="could not connect: ConnectionAbortedError")


def test_reason_is_not_taken_from_the_callers_own_error(exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call made while another exception is handled names its own."""
    unsignable = Credential("default", "key", "hmac", _raiser(ZeroDivisionError()))
    try:
        raise LookupError("the caller's")
    except LookupError:
        answer = exchange.cancel(unsignable, REF)
    assert answer == Failure(seen=False, reason="not sent: ZeroDivisionError")


def test_no_step_takes_the_callers_own_error(
    server: _Answering, credential: Credential, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop that ends one call while it handles another's exception: each step names its own."""
    answers: list[Reply | Failure | None] = []
    client = Exchange(server.url, recv_window_ms=3_000, clock=ServerClock())
    unsignable, unheard, unconnected = [
        client.prepare(Call.CANCEL, one, REF)
        for one in (Credential("default", "key", "hmac", _raiser(ZeroDivisionError())), credential, credential)
    ]
    for pending in (unsignable, unheard):
        assert (pending.begin(), pending.connect()) == (None, None)
    assert (unheard.begin(), unconnected.begin()) == (None, None)
    monkeypatch.setattr(socket, "getaddrinfo", _raiser(ConnectionAbortedError()))
    monkeypatch.setattr(_BoundedSocket, "recv", _raiser(BufferError()))
    try:
        raise LookupError("the caller's")
    except LookupError:
        answers += [unsignable.begin(), unconnected.connect(), unheard.receive()]
    client.close()
    assert answers == [
        Failure(seen=False, reason="not sent: ZeroDivisionError"),
        Failure(seen=False, reason="could not connect: ConnectionAbortedError"),
        Failure(seen=True, reason="no answer: BufferError"),
    ]
    assert client.requests_sent == 1


def test_cycle_of_causes_ends(exchange: Exchange) -> None:
    """Exceptions that name each other as their cause cannot hold a worker."""
    first, second = ValueError(), KeyError()
    first.__cause__, second.__cause__ = second, first
    answer = exchange.cancel(Credential("default", "key", "hmac", _raiser(first)), REF)
    assert isinstance(answer, Failure)
    first.__cause__ = None


def test_order_without_an_id_is_not_sent(exchange: Exchange, credential: Credential) -> None:
    """A reference that names nothing never becomes a request."""
    assert exchange.cancel(credential, OrderRef(None)) == Failure(seen=False, reason="not sent: ValueError")


def test_key_that_would_break_the_head_is_not_sent(exchange: Exchange, server: _Answering) -> None:
    """A key with a line break in it cannot add a field or a request of its own."""
    smuggler = Credential("default", "key\r\nX: y", "hmac", lambda _payload: "c4n4ry")
    assert exchange.cancel(smuggler, REF) == Failure(seen=False, reason="not sent: CredentialError")
    assert server.requests == 0


@pytest.mark.parametrize("exchange", [Exchange], indirect=True)
@pytest.mark.parametrize("cls", [KeyboardInterrupt, SystemExit])
def test_stop_of_the_process_passes(
    cls: type[BaseException],
    server: _Answering,
    exchange: Exchange,
    credential: Credential,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C and exit are not swallowed, show no signature among their variables, and leave a pool that works."""
    telltale = Credential("default", "key", "hmac", lambda _payload: "c4n4ry".upper())
    with monkeypatch.context() as patch:
        patch.setattr(_BoundedSocket, "recv", _raiser(cls()))
        with pytest.raises(cls) as caught:
            exchange.cancel(telltale, REF)
    assert server.requests <= exchange.requests_sent == 1
    shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    assert "C4N4RY" not in "".join(shown.format())
    del caught, shown
    gc.collect()
    _still_works(exchange, credential)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://fapi.binance.com",
        "fapi.binance.com",
        "https://",
        "https://user:hunter2@fapi.binance.com",
        "https://fapi.binance.com?x=hunter2",
        "https://fapi.binance.com:hunter2",
        "https://[hunter2",
        "https://fapi.binance.com/a hunter2",
        "https://fapi.binance.com/\r\nhunter2: x",
        "https://fapi.bin\xe4nce.com",
    ],
)
def test_bad_base_url_is_refused(url: str) -> None:
    """What is no base URL is refused at once, in words that do not repeat it."""
    with pytest.raises(ValueError, match="base URL must be") as caught:
        Exchange(url, recv_window_ms=5_000, clock=ServerClock())
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["socks5://user:hunter2@proxy:1080", "user:hunter2@proxy", "http://user:hunt/er2@proxy:80", "http://[hunter2"],
)
def test_bad_proxy_url_is_refused_without_its_password(url: str) -> None:
    """A proxy URL that cannot be used is refused in words that hold no part of it."""
    with pytest.raises(ValueError, match="egress proxy must be") as caught:
        Exchange("https://fapi.binance.com", recv_window_ms=5_000, clock=ServerClock(), egress_proxy_url=url)
    assert "hunt" not in str(caught.value)
    assert caught.value.__context__ is None
