"""Whatever is raised while a request is sent becomes a failure that knows whether a byte may have left."""

from __future__ import annotations

import http.client
import re
import socket
import ssl
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import requests.exceptions
import urllib3.exceptions
from rq.timeouts import JobTimeoutException

from tests.loopback import Server, answering, drop_after_reading, http_answer
from tests.ways import Bench, Client, failed
from worker.classify import Failure, OrderRef, Reply
from worker.clock import ServerClock
from worker.signing import Credential
from worker.transport import Request, Route

CANARY = "signature=c4n4ry"
URL = f"http://127.0.0.1/fapi/v1/algoOrder?{CANARY}"


#: What may be raised in a call, with the signed URL in its text; a mistake of ours leaves the same doubt.
CLASSES: list[type[Exception]] = [
    *(OSError, ConnectionRefusedError, ConnectionResetError, TimeoutError, socket.gaierror, ssl.SSLError),
    *(http.client.HTTPException, KeyError, MemoryError, RuntimeError, TypeError, ValueError),
]
_ERRORS = urllib3.exceptions
#: Of requests, urllib3 and the system: those that prove that nothing has left, and others.
PROOFS: list[Exception] = [
    _ERRORS.ConnectTimeoutError(URL),
    _ERRORS.NewConnectionError(None, URL),  # type: ignore[arg-type]
    _ERRORS.NameResolutionError(URL, None, socket.gaierror(URL)),  # type: ignore[arg-type]
    ssl.SSLCertVerificationError(URL),
]
DOUBTS: list[Exception] = [
    *(cls(URL) for cls in (requests.ConnectionError, requests.ConnectTimeout, requests.ReadTimeout)),
    *(cls(URL) for cls in (requests.exceptions.ProxyError, requests.exceptions.SSLError, requests.TooManyRedirects)),
    *(cls(URL) for cls in (requests.exceptions.ChunkedEncodingError, requests.exceptions.InvalidHeader)),
    *(
        _ERRORS.ProtocolError(URL),
        _ERRORS.SSLError(URL),
        _ERRORS.ProxyError(URL, OSError(URL)),
        _ERRORS.DecodeError(URL),
    ),
    *(_ERRORS.IncompleteRead(3, 5), _ERRORS.MaxRetryError(None, URL), _ERRORS.ReadTimeoutError(None, URL, URL)),  # type: ignore[arg-type]
    *(OSError(5, URL), ConnectionResetError(URL), BrokenPipeError(URL), TimeoutError(URL), ssl.SSLError(URL)),
]


def _raiser(error: BaseException) -> Callable[..., NoReturn]:
    def raise_it(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise error

    return raise_it


def _unsignable(error: BaseException) -> Credential:
    return Credential("default", "key", "hmac", _raiser(error))


def _id(cls: type[Exception]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _is_unsent(server: Server, client: Client, answer: Reply | Failure, phase: str) -> None:
    """It is a failure that names classes only, and nothing was sent."""
    failed(answer, seen=False, reason=f"{phase}:")
    assert isinstance(answer, Failure)
    assert CANARY not in answer.reason
    assert re.fullmatch(r"[a-zA-Z ]+: [A-Za-z]+", answer.reason)
    assert (server.heads, client.requests_sent) == ([], 0)


@pytest.mark.parametrize("cls", CLASSES, ids=_id)
def test_raised_before_the_first_byte(
    cls: type[Exception], loop_bench: Bench, monkeypatch: pytest.MonkeyPatch, credential: Credential
) -> None:
    """Raised while connecting or while signing, it is a failure that nobody can have seen, and the client goes on."""
    server = loop_bench.server(answering(http_answer()))
    client = loop_bench.client(f"http://localhost:{server.port}")
    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", _raiser(cls(URL)))
        _is_unsent(server, client, client.cancel(credential), "could not connect")
    _is_unsent(server, client, client.cancel(_unsignable(cls(URL))), "not sent")
    assert isinstance(client.query(credential), Reply)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("error", [*PROOFS, *DOUBTS], ids=lambda error: _id(type(error)))
def test_raised_by_requests(
    error: Exception, wrapped: bool, credential: Credential, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the errors of requests, urllib3 and the system only those that prove it leave no doubt."""

    def send(*_args: Any, **_kwargs: Any) -> NoReturn:
        try:
            raise error
        except Exception as inner:
            if wrapped:
                raise requests.exceptions.ProxyError(URL) from inner
            raise

    client = Client("requests", "http://127.0.0.1:9", ServerClock(), {"recv_window_ms": 3_000})
    with monkeypatch.context() as patch:
        patch.setattr(requests.Session, "send", send)
        answer = client.cancel(credential)
    client.close()
    assert isinstance(answer, Failure)
    assert answer.seen is (error in DOUBTS)
    assert client.requests_sent == answer.seen
    assert CANARY not in answer.reason


def test_alarm_shows_nothing_of_what_was_handled(credential: Credential, monkeypatch: pytest.MonkeyPatch) -> None:
    """RQ's time-out passes as it is, but without the error in whose handling it came: that one names the URL."""

    def send(*_args: Any, **_kwargs: Any) -> NoReturn:
        try:
            raise urllib3.exceptions.MaxRetryError(None, URL)  # type: ignore[arg-type]
        except urllib3.exceptions.HTTPError:
            raise alarm  # noqa: B904 - as an alarm does

    alarm = JobTimeoutException("Task exceeded maximum timeout value (1 seconds)")
    client = Client("requests", "http://127.0.0.1:9", ServerClock(), {"recv_window_ms": 3_000})
    monkeypatch.setattr(requests.Session, "send", send)
    with pytest.raises(JobTimeoutException) as caught:
        client.cancel(credential)
    client.close()
    assert caught.value is alarm
    assert CANARY not in "".join(traceback.format_exception(alarm))
    assert client.requests_sent == 1


# ---- reasons --------------------------------------------------------------------------------------------------------


# ---- what is never sent ---------------------------------------------------------------------------------------------


def test_order_without_an_id_is_not_sent(bench: Bench, credential: Credential) -> None:
    """A reference that names nothing never becomes a request."""
    server, client = bench.to(answering(http_answer()))
    _is_unsent(server, client, client.cancel(credential, OrderRef(None)), "not sent")


def test_key_that_would_break_the_head_is_not_sent(bench: Bench) -> None:
    """A key with a line break in it cannot add a field or a request of its own."""
    server, client = bench.to(answering(http_answer()))
    smuggler = Credential("default", "key\r\nX: y", "hmac", lambda _payload: "c4n4ry")
    assert client.cancel(smuggler) == Failure(seen=False, reason="not sent: CredentialError")
    assert server.heads == []


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
        "https://fapi..binance.com",
        f"https://{'x' * 64}.com",
    ],
)
def test_bad_base_url_is_refused(url: str) -> None:
    """What is no base URL is refused at once, in words that do not repeat it."""
    with pytest.raises(ValueError, match="base URL must be") as caught:
        Route(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "socks5://user:hunter2@proxy:1080",
        "user:hunter2@proxy",
        "http://user:hunt/er2@proxy:80",
        "http://[hunter2",
        "http://user:hunter2@proxy..local:80",
    ],
)
def test_bad_proxy_url_is_refused_without_its_password(url: str) -> None:
    """A proxy URL that cannot be used is refused in words that hold no part of it."""
    with pytest.raises(ValueError, match="egress proxy must be") as caught:
        Route("https://fapi.binance.com", egress_proxy_url=url)
    assert "hunt" not in str(caught.value)
    assert caught.value.__context__ is None


def test_request_shows_neither_target_nor_key() -> None:
    """A signed request in a log or a traceback is a method and nothing more."""
    assert repr(Request("GET", f"/?{CANARY}", (("X-MBX-APIKEY", "k3y"),))) == "Request(method='GET')"


def test_callers_own_error_proves_nothing(bench: Bench, credential: Credential) -> None:
    """A call made while a failure to connect is handled is in doubt if it breaks off."""
    _, client = bench.to(drop_after_reading)
    try:
        raise urllib3.exceptions.NewConnectionError(None, "the caller's")  # type: ignore[arg-type]
    except urllib3.exceptions.HTTPError:
        failed(client.cancel(credential), seen=True, reason="no answer: RemoteDisconnected")
