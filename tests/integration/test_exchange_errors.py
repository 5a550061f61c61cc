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

from producer.message import Call
from tests.loopback import Server, answering, drop_after_reading, http_answer
from tests.ways import Bench, failed
from worker.classify import OrderRef, Reply
from worker.exchange import Answer
from worker.signing import Credential
from worker.transport import Request

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
    *(_ERRORS.ProtocolError(URL), _ERRORS.SSLError(URL), _ERRORS.ProxyError(URL, OSError(URL))),
    _ERRORS.DecodeError(URL),
    *(_ERRORS.IncompleteRead(3, 5), _ERRORS.MaxRetryError(None, URL), _ERRORS.ReadTimeoutError(None, URL, URL)),  # type: ignore[arg-type]
    *(OSError(5, URL), ConnectionResetError(URL), BrokenPipeError(URL), TimeoutError(URL), ssl.SSLError(URL)),
]


def _raiser(error: BaseException) -> Callable[..., NoReturn]:
    def raise_it(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise error

    return raise_it


def _id(cls: type[Exception]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _is_unsent(server: Server, answer: Answer, phase: str) -> None:
    """It is a failure that names classes only, and nothing was sent."""
    reason = failed(answer, seen=False, reason=f"{phase}:").reason
    assert CANARY not in reason
    assert re.fullmatch(r"[a-zA-Z ]+: [A-Za-z]+", reason)
    assert server.heads == []


@pytest.mark.parametrize("cls", CLASSES, ids=_id)
def test_raised_before_the_first_byte(cls: type[Exception], loop_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised while connecting or while signing, it is a failure that nobody can have seen, and the client goes on."""
    server = loop_bench.server(answering(http_answer()))
    client = loop_bench.client(f"http://localhost:{server.port}")
    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", _raiser(cls(URL)))
        _is_unsent(server, client.ask(), "could not connect")
    _is_unsent(server, client.ask(credential=Credential("default", "key", "hmac", _raiser(cls(URL)))), "not sent")
    assert isinstance(client.ask(call=Call.QUERY), Reply)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("error", [*PROOFS, *DOUBTS], ids=lambda error: _id(type(error)))
def test_raised_by_requests(
    requests_bench: Bench, error: Exception, wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the errors of requests, urllib3 and the system only those that prove it leave no doubt."""

    def send(*_args: Any, **_kwargs: Any) -> NoReturn:
        try:
            raise error
        except Exception as inner:
            if wrapped:
                raise requests.exceptions.ProxyError(URL) from inner
            raise

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    answer = failed(requests_bench.client("http://127.0.0.1:9").ask(), seen=error in DOUBTS)
    assert CANARY not in answer.reason


def test_alarm_shows_nothing_of_what_was_handled(requests_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """RQ's time-out passes as it is, but without the error in whose handling it came: that one names the URL."""

    def send(*_args: Any, **_kwargs: Any) -> NoReturn:
        try:
            raise urllib3.exceptions.MaxRetryError(None, URL)  # type: ignore[arg-type]
        except urllib3.exceptions.HTTPError:
            raise alarm  # noqa: B904 - as an alarm does

    alarm = JobTimeoutException("Task exceeded maximum timeout value (1 seconds)")
    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    with pytest.raises(JobTimeoutException) as caught:
        requests_bench.client("http://127.0.0.1:9").ask()
    assert caught.value is alarm
    assert CANARY not in "".join(traceback.format_exception(alarm))


def test_order_without_an_id_is_not_sent(bench: Bench) -> None:
    """A reference that names nothing never becomes a request."""
    server, client = bench.to(answering(http_answer()))
    _is_unsent(server, client.ask(OrderRef(None)), "not sent")


def test_request_shows_neither_target_nor_key() -> None:
    """A signed request in a log or a traceback is a method and nothing more."""
    assert repr(Request("GET", f"/?{CANARY}", (("X-MBX-APIKEY", "k3y"),))) == "Request(method='GET')"


def test_callers_own_error_proves_nothing(bench: Bench) -> None:
    """A call made while a failure to connect is handled is in doubt if it breaks off."""
    _, client = bench.to(drop_after_reading)
    try:
        raise urllib3.exceptions.NewConnectionError(None, "the caller's")  # type: ignore[arg-type]
    except urllib3.exceptions.HTTPError:
        failed(client.ask(), seen=True, reason="no answer: RemoteDisconnected")
