"""Helpers for tests of the operators' pages: records as a worker's settlement leaves them, and the real process."""

from __future__ import annotations

import contextlib
import http.client
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

import redis
from flask.testing import FlaskClient

from producer.keys import JobField, Keys
from producer.message import Attempt, Call, CancelRequest, Outcome, OutcomeKind, encode_call
from tests.commands import Served

KEYS = Keys()
TOKEN = "a-token-of-the-tests"
LARGEST = 2**63 - 1
NOW_MS = 1_763_807_442_123
#: What a browser would run, load or take for markup if a page let it.
HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "</title></textarea></style><script>alert(1)</script>",
    "<details open ontoggle=alert(1)>",
    "javascript:alert(1)",
    "{{ 7*191 }}{% raw %}",
    "<meta http-equiv=refresh content='0;url=//evil.example'>",
    "<base href=//evil.example><link rel=stylesheet href=//evil.example/x.css>",
    "<form action=//evil.example><input name=token>",
)


def attempt(n: int = 1, msg: str = "Order does not exist.", verdict: str = "no_such_order") -> Attempt:
    """One query that was told that there is no such order."""
    return Attempt(n, NOW_MS + 10 * n, Call.QUERY, 400, -2013, msg, verdict, 7)


def outcome(job_id: str, **fields: Any) -> Outcome:
    """A failed outcome of an order of `default`."""
    given: dict[str, Any] = {
        "kind": OutcomeKind.NOT_FOUND,
        "account": "default",
        "algo_id": 17,
        "may_be_live": True,
        "attempts": (attempt(),),
        "enqueued_at_ms": NOW_MS,
        "finished_at_ms": NOW_MS + 2000,
        "worker": "host.1.abc",
        "error": "unknown to the exchange: 400 -2013 Order does not exist.",
    }
    return Outcome(job_id, 1, **(given | fields))


def settle(connection: redis.Redis, ended: Outcome, data: bytes | None = None, raw: str | None = None) -> None:
    """Write what the settlement of a worker leaves of an outcome: record, ledger, job, and the failed registry."""
    record = ended.encode() if raw is None else raw
    connection.set(KEYS.outcome_prefix + ended.id, record)
    connection.xadd(KEYS.outcomes, {"outcome": record})
    if not ended.kind.failed:
        return
    fields: Mapping[Any, Any] = {
        "status": "failed",
        "data": encode_call(CancelRequest(algo_id=17)) if data is None else data,
        "created_at": "2025-11-22T10:30:42.000000Z",
        "ended_at": "2025-11-22T10:30:44.000000Z",
        JobField.ENQUEUED_AT_MS: NOW_MS,
        JobField.RUN: 1,
        JobField.DONE: 1,
    }
    connection.hset(KEYS.job_prefix + ended.id, mapping=dict(fields))
    connection.zadd(KEYS.failed, {ended.id: ended.finished_at_ms // 1000 + 7 * 86_400})


CSP = (
    "default-src 'none'; style-src 'self'; script-src 'none'; img-src 'self' data:; "
    "frame-src 'self'; form-action 'self'; frame-ancestors 'self'; base-uri 'none'"
)


def page(pages: FlaskClient, path: str, code: int = 200) -> str:
    """The text of a page, once its status and headers are right."""
    answer = pages.get(path)
    assert answer.status_code == code, answer.text
    assert answer.headers["Content-Security-Policy"] == CSP
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert "Traceback" not in answer.text
    return answer.text


def cells(text: str) -> str:
    """A page's words alone."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text))


def found(pages: FlaskClient, words: str, account: str = "") -> list[str]:
    """Ids of the requests that a search shows, in its order."""
    answer = pages.get("/search", query_string={"q": words, "account": account})
    assert answer.status_code == 200
    return list(dict.fromkeys(re.findall(r'href="/requests/([^"]+)"', answer.text)))


def form_token(page: str) -> str:
    """What the first form of a page carries."""
    found = re.search(r'name="form_token" value="([^"]+)"', page)
    assert found is not None, page
    return found.group(1)


class Reply:
    """One answer, read to its end."""

    def __init__(self, answer: http.client.HTTPResponse) -> None:
        self.status = answer.status
        self.headers = answer.headers
        self.text = answer.read().decode()


class WebProcess(Served):
    """`python -m producer web` as a real process, and HTTP to it."""

    command = "web"

    def __call__(
        self, path: str, form: Mapping[str, str] | None = None, method: str | None = None, **headers: str
    ) -> Reply:
        """GET, or POST with a form; underscores in the names of headers are dashes."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        body = None
        if form is not None:
            named["Content-Type"] = "application/x-www-form-urlencoded"
            body = urlencode(form)
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)) as connection:
            connection.request(method or ("GET" if form is None else "POST"), path, body, named)
            return Reply(connection.getresponse())
