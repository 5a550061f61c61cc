"""The operators' pages over a real server: what they show, who may act, and what nobody may put on them."""

from __future__ import annotations

import re
import signal
import time
import zlib
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from html.parser import HTMLParser
from typing import Any

import pytest
import redis
from flask.testing import FlaskClient
from werkzeug.exceptions import ServiceUnavailable

from producer import CancelClient, CancelRequest
from producer.message import Outcome, OutcomeKind, encode_call
from producer.web import access, queries
from producer.web import app as web
from producer.web.app import create_app
from tests.servers import Valkey, Workers, eventually, running_valkey, stopped
from tests.strategies import PASSWORD, fail
from tests.webpages import HOSTILE, KEYS, LARGEST, NOW_MS, TOKEN, attempt, form_token, outcome, settle
from worker.sandbox.control import RunningExchange
from worker.sandbox.faults import Fault

CSP = (
    "default-src 'none'; style-src 'self'; script-src 'none'; img-src 'self' data:; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)


@pytest.fixture(autouse=True)
def _no_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "PENALTY_S", 0.01)


@pytest.fixture
def reader(client: CancelClient) -> Iterator[FlaskClient]:
    """The pages without a token."""
    with create_app(client).test_client() as pages:
        yield pages


@pytest.fixture
def operator(client: CancelClient) -> Iterator[FlaskClient]:
    """The pages with a token, logged in."""
    with create_app(client, TOKEN).test_client() as pages:
        assert pages.post("/login", data={"token": TOKEN}).status_code == 303
        yield pages


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


# --- what is shown ------------------------------------------------------------------------------------------------


def test_status_shows_the_queue_its_workers_and_what_they_did(
    reader: FlaskClient, client: CancelClient, workers: Workers, exchange: RunningExchange
) -> None:
    """The same figures as `status`, and below them the newest outcomes with their whole order ids."""
    worker = workers.start()
    (order,) = exchange.add_orders()
    client.cancel(algo_id=order.algo_id, symbol="BTCUSDT", tag="grid-7").wait(10)
    (failed,) = fail(client, workers)

    shown = page(reader, "/")

    words = cells(shown)
    assert f"{worker.process.pid}" in words
    assert re.search(r"failed 1 look", words)
    assert re.search(r"cancelled 1 .*refused 1 ", words)
    assert f"{order.algo_id} default BTCUSDT grid-7 not live" in words
    assert f'href="/requests/{failed}"' in shown
    assert '<meta http-equiv="refresh"' in shown
    assert '<meta http-equiv="refresh"' not in page(reader, "/?refresh=0")


def test_what_stands_still_is_told_first(reader: FlaskClient, client: CancelClient, connection: redis.Redis) -> None:
    """No worker, a closed gate, a suspension and a refused key are alerts, with the exchange's words."""
    client.cancel(algo_id=17)
    seconds, _ = connection.time()
    connection.hset(KEYS.gate("all"), mapping={"until_ms": (seconds + 60) * 1000, "reason": "429 <b>", "by": "host.1"})
    connection.set(KEYS.suspended, 1)
    connection.sadd(KEYS.suspects, "desk2")
    connection.hset(
        KEYS.breaker("desk2"),
        mapping={
            "failures": 5,
            "reason": "401 -2015 Invalid API-key",
            "since_ms": (seconds - 90) * 1000,
            "probe_at_ms": (seconds + 30) * 1000,
        },
    )

    words = cells(page(reader, "/"))

    assert "No live worker, and work is waiting" in words
    assert re.search(r"Gate all is closed for (60|5\d\.\d) s: 429 &lt;b&gt; \(by host\.1 \)", words)
    assert "Suspended. No worker takes anything until rq resume" in words
    assert re.search(r"desk2 held back 5 0 9\d\.\d s in [\d.]+ s 401 -2015 Invalid API-key", words)


def test_a_dead_worker_is_shown_as_such(reader: FlaskClient, client: CancelClient, connection: redis.Redis) -> None:
    """One that went silent is dimmed and named so; without another one the work that waits is an alarm."""
    stamp = datetime.fromtimestamp(connection.time()[0] - 34, UTC).strftime("%Y-%m-%dT%H:%M:%S.000000Z")
    beat: dict[Any, Any] = {"last_heartbeat": stamp, "state": "busy", "hostname": "h", "c_concurrency": 64}
    connection.hset(KEYS.worker_prefix + "dead", mapping=beat)
    connection.sadd("rq:workers:cancels", KEYS.worker_prefix + "dead")
    assert "No live worker" not in page(reader, "/")
    connection.zadd(KEYS.leases, {"lost": 1})

    shown = page(reader, "/")

    assert re.search(r'<tr class="stale"><th scope="row" class="id"><bdi>dead</bdi>', shown)
    words = cells(shown)
    assert re.search(r"silent for 3[4-9] s", words)
    assert "Workers (0 live, 1 silent)" in words
    assert "No live worker, and work is waiting." in words
    assert "in flight 0 1 to be taken over" in words
    client.cancel(algo_id=1)
    connection.hset(KEYS.worker_prefix + "stock", mapping={**beat, "c_concurrency": ""})
    connection.sadd("rq:workers:cancels", KEYS.worker_prefix + "stock")
    words = cells(page(reader, "/"))
    assert "Workers (1 live, 1 silent)" in words
    assert "No live worker" not in words


def test_failed_requests_are_shown_with_their_history(
    reader: FlaskClient, client: CancelClient, workers: Workers, exchange: RunningExchange
) -> None:
    """Kind, error, exact ids and each attempt of a request that a real worker gave up."""
    workers.start(NOT_FOUND_HORIZON_S="0.2")
    client.cancel(algo_id=LARGEST, client_algo_id="sl:1/BTC", symbol="ETHUSDT", tag="hedge").wait(10)

    shown = page(reader, "/failed")

    assert f">{LARGEST}<" in shown
    words = cells(shown)
    assert "not_found" in words
    assert "sl:1/BTC default ETHUSDT hedge may be live" in words
    assert "unknown to the exchange: 400 -2013 Order does not exist." in words
    assert re.search(r"\d+ attempts, enqueued \d s ago", words)
    assert re.search(r" 1 \d{4}-\d\d-\d\d [\d:.]+ cancel 400 -2011 Unknown order sent\. no_such_order \d+ ", words)
    assert "<details>" in shown


def test_failed_requests_are_paged_and_filtered(reader: FlaskClient, connection: redis.Redis) -> None:
    """Newest first, fifty to a page; kind and account choose, and the links keep the choice."""
    for number in range(120):
        kind = OutcomeKind.REFUSED if number % 3 == 0 else OutcomeKind.GAVE_UP
        account = "desk2" if number % 2 == 0 else "default"
        ended = outcome(f"r{number:03}", kind=kind, account=account, finished_at_ms=NOW_MS + 1000 * number)
        settle(connection, ended)

    def ids(path: str) -> list[str]:
        return list(dict.fromkeys(re.findall(r'href="/requests/(r\d+)"', page(reader, path))))

    assert ids("/failed") == [f"r{number:03}" for number in range(119, 69, -1)]
    assert ids("/failed?page=3") == [f"r{number:03}" for number in range(19, -1, -1)]
    assert ids("/failed?page=4") == []
    assert ids("/failed?kind=refused&account=desk2") == [f"r{number:03}" for number in range(114, -1, -6)]
    assert ids("/failed?account=desk2&page=2") == [f"r{number:03}" for number in range(18, -1, -2)]
    assert "account=desk2&amp;page=2" in page(reader, "/failed?account=desk2")
    assert "120 kept for a week; 20 match" in cells(page(reader, "/failed?kind=refused&account=desk2"))
    assert ids("/failed?account=nobody") == []
    assert "kind must be one of" in page(reader, "/failed?kind=cancelled", 400)


def test_a_request_is_shown_while_it_is_open_and_when_it_has_ended(
    reader: FlaskClient, client: CancelClient, workers: Workers, exchange: RunningExchange
) -> None:
    """State and deadline first, and the page looks again by itself; outcome and attempts afterwards."""
    (order,) = exchange.add_orders()
    ticket = client.cancel(algo_id=order.algo_id, deadline_s=60)

    shown = page(reader, f"/requests/{ticket.id}")
    assert "queued Waits for a worker." in cells(shown)
    assert re.search(r"deadline \S+ \S+ UTC, in 60\.0 s|deadline \S+ \S+ UTC, in 59\.\d s", cells(shown))
    assert 'http-equiv="refresh"' in shown
    workers.start()
    ticket.wait(10)
    shown = page(reader, f"/requests/{ticket.id}")
    assert "cancelled Our cancel took the order off the book." in cells(shown)
    assert re.search(r" 1 \S+ \S+ cancel 200 200? ?.* confirmed \d+ ", cells(shown))
    assert 'http-equiv="refresh"' not in shown


def test_a_request_whose_records_have_run_out_is_found_in_the_ledger(
    reader: FlaskClient, connection: redis.Redis
) -> None:
    """The ledger outlives job and record; what it has not either is unknown, with 404."""
    settle(connection, outcome("r1", kind=OutcomeKind.CANCELLED, may_be_live=False, error=None))
    connection.delete(KEYS.outcome_prefix + "r1")

    assert "cancelled" in cells(page(reader, "/requests/r1"))
    assert "Nobody knows this request" in page(reader, "/requests/r2", 404)


def test_a_failed_request_outlives_its_record(reader: FlaskClient, connection: redis.Redis) -> None:
    """A job stays failed for a week, its record a day: kind and error then come from RQ's own result."""
    settle(connection, outcome("r1", kind=OutcomeKind.REFUSED))
    connection.delete(KEYS.outcome_prefix + "r1", KEYS.outcomes)
    packed = b64encode(zlib.compress(b"refused: 401 -2015 Invalid API-key"))
    connection.xadd(KEYS.result_prefix + "r1", {"type": 2, "exc_string": packed})

    words = cells(page(reader, "/failed"))

    assert re.search(r"refused .*17 .*default", words)
    assert "401 -2015 Invalid API-key" in words
    assert "No attempt is on record" in words
    assert 'href="/requests/r1"' in page(reader, "/failed?kind=refused")


# --- search -------------------------------------------------------------------------------------------------------


def found(pages: FlaskClient, words: str, account: str = "") -> list[str]:
    """Ids of the requests that a search shows, in its order."""
    answer = pages.get("/search", query_string={"q": words, "account": account})
    assert answer.status_code == 200
    return list(dict.fromkeys(re.findall(r'href="/requests/([^"]+)"', answer.text)))


def test_an_order_is_found_by_each_of_its_ids(
    reader: FlaskClient, client: CancelClient, connection: redis.Redis
) -> None:
    """Open requests by algo id in accounts that ledger and registry name, by client id in any; ended ones there."""
    open_one = client.cancel(algo_id=LARGEST, account="desk3")
    by_name = client.cancel(client_algo_id="sl:1/BTC", account="quiet")
    by_both = client.cancel(algo_id=5, client_algo_id="sl:1/ETH", symbol="ETHUSDT")
    settle(connection, outcome("r1", account="desk3", algo_id=LARGEST - 1))
    ended = outcome("r2", kind=OutcomeKind.TRIGGERED, algo_id=None, client_algo_id="tp-1", actual_order_id="8886774")
    settle(connection, ended)

    assert found(reader, str(LARGEST)) == [open_one.id]
    assert found(reader, str(LARGEST - 1)) == ["r1"]
    assert found(reader, "sl:1/BTC") == found(reader, "sl:1/BTC", "quiet") == [by_name.id]
    assert found(reader, "sl:1/BTC", "desk3") == []
    assert found(reader, "sl:1/ETH") == found(reader, "5") == [by_both.id]
    assert found(reader, "tp-1") == ["r2"]
    assert found(reader, "8886774") == ["r2"]
    assert found(reader, "r2") == ["r2"]
    assert found(reader, open_one.id) == [open_one.id]
    assert found(reader, " r2 ") == ["r2"]
    assert found(reader, "922337203685477580") == []
    assert found(reader, "tp") == []
    assert "is found with its account given" in page(reader, "/search?q=tp")
    assert "is found with its account given" not in page(reader, "/search?q=tp-1")
    assert str(LARGEST) in cells(page(reader, f"/search?q={LARGEST}"))


def test_an_open_request_by_client_id_is_found_in_every_state(
    reader: FlaskClient, client: CancelClient, workers: Workers, exchange: RunningExchange
) -> None:
    """Also while it is under way, and while it waits for its next attempt."""
    retried, held = exchange.add_orders(client_algo_ids=["tp-1", "tp-2"])
    exchange.script_faults(retried.algo_id, [Fault.UNAVAILABLE_503], repeat_last=True)
    workers.start(BACKOFF_BASE_MS="60000", BACKOFF_CAP_MS="60000")
    first = client.cancel(client_algo_id="tp-1")
    eventually(lambda: client.statuses([first.id]) == ["scheduled"], what="it waits for its next attempt")
    exchange.set_latency_ms(2500)
    second = client.cancel(client_algo_id="tp-2")
    eventually(lambda: exchange.book()[held.algo_id].deletes == 1, what="it is under way")

    assert found(reader, "tp-1") == [first.id]
    assert found(reader, "tp-2") == [second.id]


def test_an_account_narrows_a_search_and_finds_what_no_record_names(reader: FlaskClient, client: CancelClient) -> None:
    """An account without any outcome yet is tried when it is given."""
    ticket = client.cancel(algo_id=5, account="quiet")
    mine = client.cancel(algo_id=5)

    assert found(reader, "5") == [mine.id]
    assert found(reader, "5", "quiet") == [ticket.id]
    assert found(reader, "5", "NOT AN ACCOUNT") == []


def test_a_search_reads_a_long_ledger_in_parts_and_ends_at_a_bound(
    reader: FlaskClient, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries of every part are found, fifty are shown, and the page says how far it looked."""
    pipeline = connection.pipeline()
    for number in range(2500):
        record = outcome(f"r{number}", kind=OutcomeKind.CANCELLED, algo_id=1 + number % 25).encode()
        pipeline.xadd(KEYS.outcomes, {"outcome": record})
    pipeline.execute()

    assert len(found(reader, "7")) == 50
    words = cells(page(reader, "/search?q=7"))
    assert "There are more than these." in words
    assert "and 2,500 entries of the ledger" in words
    assert found(reader, "r0") == ["r0"]
    monkeypatch.setattr(queries, "DEPTH", 1200)
    assert found(reader, "r0") == []
    assert found(reader, "r1300") == ["r1300"]
    assert "the newest 1,200 entries of the ledger" in cells(page(reader, "/search?q=r0"))


# --- what cannot be read ------------------------------------------------------------------------------------------


def test_foreign_things_are_shown_as_such(reader: FlaskClient, connection: redis.Redis) -> None:
    """Records, jobs and ids of nobody's contract appear with the reason why they cannot be read; no page breaks."""
    connection.xadd(KEYS.outcomes, {"outcome": '{"v":2}'})
    connection.xadd(KEYS.outcomes, {"else": b"\xff\xfe"})
    settle(connection, outcome("bad-record"), raw="[]")
    settle(connection, outcome("pickle"), data=b"\x80\x04K\x01.", raw="{")
    connection.set(KEYS.job_prefix + "string", "no hash")
    connection.hset(KEYS.outcome_prefix + "hash", "a", "b")
    connection.zadd(KEYS.failed, {"string": 3, "hash": 2, "gone": 4, "../../etc": 5})
    connection.zadd(KEYS.failed, {b"\xff\xfe/../x": 1})

    words = cells(page(reader, "/"))
    assert words.count("cannot be read") >= 4
    words = cells(page(reader, "/failed"))
    assert "not an outcome record of version 1" in words
    assert "not a request of this contract: not JSON" in words
    assert "its job is not a hash of RQ&#39;s" in words
    assert "Its job has run out, so it cannot be retried." in words
    assert "../../etc" in words
    assert cells(page(reader, "/failed?kind=unreadable")).count("unreadable") >= 6
    page(reader, "/requests/pickle")
    page(reader, "/requests/string")
    page(reader, "/requests/..%2f..%2fetc", 404)
    page(reader, "/search?q=bad-record")
    page(reader, "/search?q=%ff%fe")
    page(reader, "/search?q=" + "x" * 300)


def test_wrong_kinds_of_keys_break_no_page(reader: FlaskClient, connection: redis.Redis) -> None:
    """A ledger that is no stream is Redis' refusal, told with 503; a worker's hash of rubbish is none of our faults."""
    connection.sadd("rq:workers:cancels", "rq:worker:odd")
    connection.hset("rq:worker:odd", mapping={"last_heartbeat": "x", "pid": "y", "hostname": b"\xff"})
    page(reader, "/")
    connection.set(KEYS.outcomes, "no stream")
    assert "Redis refused (WRONGTYPE)" in page(reader, "/", 503)


@pytest.mark.parametrize("bad", HOSTILE)
def test_nothing_that_a_stranger_wrote_becomes_markup(
    operator: FlaskClient, connection: redis.Redis, client: CancelClient, bad: str
) -> None:
    """Tag, ids, messages, errors, accounts, workers and the searched words are shown as they were written."""
    fields = {"symbol": bad, "tag": bad, "client_algo_id": bad, "error": bad, "worker": bad, "account": bad}
    hostile = outcome("r1", attempts=(attempt(msg=bad, verdict=bad),), order_status=bad, actual_order_id=bad, **fields)
    settle(connection, hostile, data=bad.encode())
    settle(connection, outcome(bad, error=bad), raw=outcome(bad).encode()[:-9])
    client.cancel(algo_id=9, tag=bad[:64])
    connection.sadd("rq:workers:cancels", f"rq:worker:{bad}")
    stamp = connection.time()[0]
    worker: dict[Any, Any] = {
        "last_heartbeat": f"2100-01-01T00:00:{stamp % 60:02}.000000Z",
        "hostname": bad,
        "state": bad,
        "pid": 1,
    }
    connection.hset(f"rq:worker:{bad}", mapping=worker)
    connection.hset(KEYS.gate("all"), mapping={"until_ms": (stamp + 60) * 1000, "reason": bad, "by": bad})

    for path in ("/", "/failed", "/requests/r1", "/retry?id=r1", "/retry", "/search?q=17", "/search?q=9"):
        shown = page(operator, path)
        _no_markup(shown, bad)
        assert "1337" not in shown
    _no_markup(operator.get("/search", query_string={"q": bad, "account": bad}).text, bad)
    _no_markup(operator.get("/failed", query_string={"account": bad, "note": bad}).text, bad)
    _no_markup(create_app(client, TOKEN).test_client().get("/failed", query_string={"q": bad}).text, bad)


class _Elements(HTMLParser):
    """The elements of a page and their attributes, as a browser reads them."""

    def __init__(self, shown: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str, str]] = []
        self.feed(shown)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [(tag, name, value or "") for name, value in attrs] or [(tag, "", "")]


def _no_markup(shown: str, bad: str) -> None:
    """No element, attribute or address beside those of the templates."""
    if set(bad) & set("<>\"'"):
        assert bad not in shown
    elements = _Elements(shown).found
    assert not {tag for tag, *_ in elements} & {"script", "img", "svg", "base", "iframe", "object", "style", "textarea"}
    for tag, name, value in elements:
        assert not name.startswith("on"), tag
        if name in ("href", "action", "src", "formaction"):
            assert re.match(r"/(?!/)|#content$|data:image/svg", value), value
    assert [value for tag, name, value in elements if (tag, name) == ("link", "rel")] == ["stylesheet", "icon"]
    refreshes = [value for tag, name, value in elements if (tag, name) == ("meta", "content")]
    assert set(refreshes) <= {"width=device-width, initial-scale=1", "5"}


# --- who may act --------------------------------------------------------------------------------------------------


def test_without_a_token_nothing_can_be_changed(
    reader: FlaskClient, client: CancelClient, connection: redis.Redis
) -> None:
    """No login, no button; whatever is posted is answered with 403 and the ways out."""
    settle(connection, outcome("r1"))

    shown = page(reader, "/failed")
    assert "Retry" not in shown
    assert "read-only" in shown
    for path in ("/retry/start", "/login", "/logout", "/", "/nothing"):
        answer = reader.post(path, data={"id": "r1", "token": ""})
        assert answer.status_code == 403
        assert "python -m producer retry ID" in answer.text
        assert "WEB_TOKEN" in answer.text
    assert reader.get("/retry?id=r1").status_code == 403
    assert reader.get("/login").status_code == 403
    assert client.failed_ids() == ["r1"]


def test_with_a_token_every_page_asks_for_it(client: CancelClient) -> None:
    """Reading too; only the sign of life, the style sheet and the login itself are open."""
    pages = create_app(client, TOKEN).test_client()

    for path in ("/", "/failed", "/requests/x", "/search?q=1", "/retry", "/nothing", "//evil.example/x"):
        answer = pages.get(path)
        assert answer.status_code == 401, path
        assert "Log in" in answer.text
        assert "//evil.example" not in answer.text
    assert pages.post("/retry/start", data={"id": "x"}).status_code == 401
    assert (pages.get("/healthz").status_code, pages.get("/healthz").text) == (200, "ok\n")
    assert pages.get("/style.css").mimetype == "text/css"


def test_a_login_is_a_cookie_that_scripts_and_other_sites_cannot_use(client: CancelClient) -> None:
    """HttpOnly, SameSite=Strict, twelve hours, Secure behind TLS; a wrong token gets none, and logging out ends it."""
    pages = create_app(client, TOKEN).test_client()

    wrong = pages.post("/login", data={"token": TOKEN + "x"})
    assert (wrong.status_code, wrong.headers.get("Set-Cookie")) == (401, None)
    assert "That is not the token." in wrong.text
    plain = pages.post("/login", data={"token": TOKEN, "next": "/failed?kind=refused"})
    assert (plain.status_code, plain.headers["Location"]) == (303, "/failed?kind=refused")
    cookie = plain.headers["Set-Cookie"]
    assert all(word in cookie for word in ("HttpOnly", "SameSite=Strict", "Max-Age=43200", "Path=/"))
    assert "Secure" not in cookie
    assert TOKEN not in cookie
    behind = pages.post("/login", data={"token": TOKEN}, headers={"X-Forwarded-Proto": "https"})
    assert "Secure" in behind.headers["Set-Cookie"]
    token = form_token(page(pages, "/"))
    assert pages.post("/logout").status_code == 403
    assert pages.post("/logout", data={"form_token": token}).status_code == 303
    assert pages.get("/").status_code == 401


def test_a_login_ends_with_time_and_with_its_token(client: CancelClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cookie is void after twelve hours, under another token, and when a letter of it is changed."""
    pages = create_app(client, TOKEN).test_client()
    pages.post("/login", data={"token": TOKEN})
    cookie = pages.get_cookie(access.COOKIE)
    assert cookie is not None
    value = cookie.value

    def code(with_cookie: str, token: str = TOKEN) -> int:
        other = create_app(client, token).test_client()
        other.set_cookie(access.COOKIE, with_cookie)
        return other.get("/").status_code

    assert code(value) == 200  # another process of the same token
    assert code(value, "another-token-of-tests") == 401
    assert code(value[:-2] + ("AA" if value[-2:] != "AA" else "BB")) == 401
    monkeypatch.setattr(access, "LOGIN_S", -1)
    assert code(value) == 401


@pytest.mark.parametrize("page_asked", ["//evil.example", "https://evil.example", "/\\evil.example", "evil"])
def test_a_login_redirects_to_our_own_pages_alone(client: CancelClient, page_asked: str) -> None:
    """Neither the form nor the Host header can send anybody elsewhere."""
    pages = create_app(client, TOKEN).test_client()

    data = {"token": TOKEN, "next": page_asked}
    answer = pages.post("/login", data=data, headers={"Host": "evil.example", "X-Forwarded-Host": "evil.example"})

    assert (answer.status_code, answer.headers["Location"]) == (303, "/")
    shown = pages.get("/login", query_string={"next": page_asked}, headers={"Host": "evil.example"})
    assert "evil" not in shown.text
    assert pages.get("/failed/", headers={"Host": "evil.example"}).headers.get("Location") is None


def test_a_script_shows_the_token_in_a_header(client: CancelClient, connection: redis.Redis) -> None:
    """Authorization: Bearer reads and retries without a cookie; a wrong one is refused."""
    settle(connection, outcome("r1"))
    pages = create_app(client, TOKEN).test_client()
    headers = {"Authorization": f"Bearer {TOKEN}"}

    assert pages.get("/failed", headers=headers).status_code == 200
    assert pages.get("/failed", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert pages.get("/failed", headers={"Authorization": f"Basic {TOKEN}"}).status_code == 401
    answer = pages.post("/retry/start", data={"id": "r1"}, headers=headers)
    assert (answer.status_code, client.failed_ids()) == (303, [])


def test_one_request_is_retried_after_a_confirmation(
    operator: FlaskClient, client: CancelClient, workers: Workers
) -> None:
    """The page names it, the form starts a new run of it, and a second time there is nothing to retry."""
    first, second = fail(client, workers, 2)
    workers.all[0].stop(signal.SIGKILL)
    assert f"/retry?id={first}" in page(operator, "/failed")
    shown = page(operator, f"/retry?id={first}")
    assert "Retry 1 request?" in shown
    assert second not in shown
    data = {"form_token": form_token(shown), "id": first}

    answer = operator.post("/retry/start", data=data)

    assert answer.status_code == 303
    after = page(operator, answer.headers["Location"])
    assert "Retried 1 of 1." in after
    assert "queued Waits for a worker." in cells(after)
    assert (client.failed_ids(), client.statuses([first, second])) == ([second], ["queued", "failed"])
    again = operator.post("/retry/start", data=data)
    assert again.status_code == 409
    assert "is not among the failed requests of queue cancels; nothing was retried" in cells(again.text)


def test_all_that_match_are_retried_and_no_other(
    operator: FlaskClient, client: CancelClient, connection: redis.Redis
) -> None:
    """Those that were confirmed are started, though more match by then; one that somebody else took is told."""
    for number in range(5):
        settle(connection, outcome(f"r{number}", kind=OutcomeKind.REFUSED, account="desk2"))
    settle(connection, outcome("other", kind=OutcomeKind.GAVE_UP, account="desk2"))
    shown = page(operator, "/retry?kind=refused&account=desk2")
    assert "Retry 5 requests?" in shown
    assert "kind refused account desk2" in cells(shown)
    settle(connection, outcome("late", kind=OutcomeKind.REFUSED, account="desk2"))
    client.retry(["r3"])
    ids = re.findall(r'name="id" value="([^"]+)"', shown)
    data = {"form_token": form_token(shown), "id": ids, "kind": "refused", "account": "desk2"}

    answer = operator.post("/retry/start", data=data)

    assert answer.headers["Location"].startswith("/failed?kind=refused&account=desk2&note=")
    assert "Retried 4 of 5. The others were no longer among the failed ones." in page(
        operator, answer.headers["Location"]
    )
    assert sorted(client.failed_ids()) == ["late", "other"]


def test_a_retry_by_a_client_id_alone_says_what_that_means(operator: FlaskClient, connection: redis.Redis) -> None:
    """A client id can be used again, so the confirmation says which order is meant; an algo id needs no such words."""
    words = "the client algo id may name a newer order by now; such an order is left alone"
    settle(connection, outcome("r1", algo_id=5, client_algo_id="sl-1"))
    settle(connection, outcome("r2", algo_id=None, client_algo_id="sl-2"), encode_call(CancelRequest(None, "sl-2")))

    assert words not in page(operator, "/retry?id=r1")
    assert words in page(operator, "/retry?id=r2")
    assert words in page(operator, "/retry")


def test_a_retry_of_many_says_how_many_it_leaves(operator: FlaskClient, connection: redis.Redis) -> None:
    """A thousand is what is started together; the page says so, and that many fit into its form."""
    pipeline = connection.pipeline(transaction=False)
    for number in range(1003):
        settle(pipeline, outcome(f"{number:032x}"))
    pipeline.execute()
    assert "Retry the newest 1,000…" in page(operator, "/failed")

    shown = page(operator, "/retry")

    assert "Retry 1,000 requests?" in shown
    assert "1,003 match;" in shown
    ids = re.findall(r'name="id" value="([^"]+)"', shown)
    answer = operator.post("/retry/start", data={"form_token": form_token(shown), "id": ids})
    assert "Retried 1,000 of 1,000." in page(operator, answer.headers["Location"])
    assert connection.zcard(KEYS.failed) == 3


def test_a_form_of_another_login_or_site_does_nothing(
    operator: FlaskClient, client: CancelClient, connection: redis.Redis
) -> None:
    """Without the login's own token, or when a browser names another site, a POST is refused."""
    settle(connection, outcome("r1"))
    stranger = create_app(client, TOKEN).test_client()
    stranger.post("/login", data={"token": TOKEN})
    token = form_token(page(operator, "/retry?id=r1"))

    for data in ({}, {"form_token": ""}, {"form_token": "x"}, {"form_token": form_token(page(stranger, "/"))}):
        assert operator.post("/retry/start", data={"id": "r1"} | data).status_code == 403
    crossed = operator.post(
        "/retry/start", data={"id": "r1", "form_token": token}, headers={"Sec-Fetch-Site": "cross-site"}
    )
    assert crossed.status_code == 403
    assert operator.get("/retry/start?id=r1").status_code == 405
    for ids in ([], ["<script>"], [f"r{number}" for number in range(1001)]):
        assert operator.post("/retry/start", data={"id": ids, "form_token": token}).status_code == 400
    assert client.failed_ids() == ["r1"]


def test_a_strangers_name_for_this_machine_is_turned_away(client: CancelClient) -> None:
    """On loopback without a login, a site whose name leads here reads nothing."""
    pages = create_app(client, local_names_only=True).test_client()

    assert pages.get("/", headers={"Host": "evil.example"}).status_code == 421
    assert pages.get("/", headers={"Host": "localhost:8080"}).status_code == 200
    assert pages.get("/healthz", headers={"Host": "10.1.2.3"}).status_code == 200


@pytest.mark.parametrize(
    "name", ["X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "Forwarded", "X-Real-IP", "Via"]
)
def test_what_a_proxy_forwards_to_loopback_is_turned_away(client: CancelClient, name: str) -> None:
    """A proxy on this machine does not open the pages to whoever reaches it, whatever Host it sends."""
    pages = create_app(client, local_names_only=True).test_client()

    answer = pages.get("/", headers={"Host": "localhost:8080", name: "127.0.0.1"})

    assert answer.status_code == 421
    assert "What a proxy has forwarded is refused too" in answer.text
    assert create_app(client).test_client().get("/", headers={name: "127.0.0.1"}).status_code == 200


def test_in_clear_through_a_proxy_nothing_is_shown_and_no_token_taken(client: CancelClient) -> None:
    """Behind a proxy that took the request without TLS all is 403 but the sign of life; with TLS it stays TLS."""
    pages = create_app(client, TOKEN).test_client()
    plain, safe = {"X-Forwarded-Proto": "http"}, {"X-Forwarded-Proto": "https"}

    for path in ("/", "/login", "/style.css", "/nothing"):
        answer = pages.get(path, headers=plain)
        assert (answer.status_code, answer.headers.get("Location")) == (403, None)
        assert "Open this page with https" in answer.text
        assert answer.headers.get("Strict-Transport-Security") is None
    answer = pages.post("/login", data={"token": TOKEN}, headers=plain)
    assert (answer.status_code, answer.headers.get("Set-Cookie")) == (403, None)
    assert pages.get("/", headers=plain | {"Authorization": f"Bearer {TOKEN}"}).status_code == 403
    assert pages.get("/healthz", headers=plain).status_code == 200
    answer = pages.get("/login", headers=safe)
    assert (answer.status_code, answer.headers["Strict-Transport-Security"]) == (200, "max-age=31536000")
    assert "Strict-Transport-Security" not in pages.get("/login").headers
    assert create_app(client).test_client().get("/", headers=plain).status_code == 200


def test_only_a_post_logs_in(client: CancelClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """HEAD of the login page is neither an attempt, which would wait, nor a login, whatever it carries."""
    monkeypatch.setattr(access, "PENALTY_S", 60)
    pages = create_app(client, TOKEN).test_client()

    for token in ("wrong", TOKEN):
        answer = pages.head("/login", data={"token": token})
        assert (answer.status_code, answer.headers.get("Set-Cookie")) == (200, None)


def test_wrong_tokens_beyond_the_limit_are_told_when_to_come_again(
    client: CancelClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While some wait, a further wrong one gets 429 with Retry-After, by form or header; the right one is let in."""
    monkeypatch.setattr(access, "PENALTY_S", 60)
    monkeypatch.setattr(access, "_WAITING", 0)
    pages = create_app(client, TOKEN).test_client()

    by_form = pages.post("/login", data={"token": "wrong"})
    by_header = pages.get("/", headers={"Authorization": "Bearer wrong"})
    for answer in (by_form, by_header):
        assert (answer.status_code, answer.headers["Retry-After"]) == (429, "2")
    assert pages.post("/login", data={"token": TOKEN}).status_code == 303


def test_the_queues_name_is_for_those_who_may_read(client: CancelClient) -> None:
    """Neither the login, nor a page before it, nor a request that is turned away tells which queue this is."""
    name = client.keys.queue
    guarded, local = (create_app(client, TOKEN).test_client(), create_app(client, local_names_only=True).test_client())

    shown = [guarded.get(path) for path in ("/", "/login", "/failed?kind=x", "/nothing")]
    shown.append(guarded.post("/login", data={"token": "wrong"}))
    shown.append(guarded.get("/", headers={"Authorization": "Bearer wrong"}))
    shown.append(guarded.get("/", headers={"X-Forwarded-Proto": "http"}))
    shown.append(local.get("/", headers={"Host": "evil.example"}))
    assert [answer.status_code for answer in shown] == [401, 200, 401, 401, 401, 401, 403, 421]
    assert not [answer.text for answer in shown if name in answer.text]
    guarded.post("/login", data={"token": TOKEN})
    assert f"<title>Status · {name}</title>" in page(guarded, "/")
    assert f"<bdi>{name}</bdi>" in page(guarded, "/nothing", 404)
    assert f"<title>Status · {name}</title>" in page(local, "/")


def test_an_error_keeps_its_headers(operator: FlaskClient) -> None:
    """A method that an address does not know is answered with those that it knows."""
    answer = operator.get("/retry/start")

    assert (answer.status_code, set(answer.headers["Allow"].split(", "))) == (405, {"POST", "OPTIONS"})
    assert answer.mimetype == "text/html"


def test_pages_wait_for_their_turn_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """While two calls of Redis hang, a third page is told so in time and changes nothing; afterwards all is well."""
    monkeypatch.setattr(web, "_TURN_S", 0.2)
    with running_valkey() as server, CancelClient.from_url(server.url, timeout_s=10) as client:
        app = create_app(client, TOKEN)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with redis.Redis(port=server.port) as connection:
            settle(connection, outcome("r1"))
        with ThreadPoolExecutor(2) as pool, stopped(server):
            hanging = [pool.submit(app.test_client().get, path, headers=headers) for path in ("/search?q=1", "/")]
            pages = app.test_client()
            eventually(lambda: pages.get("/", headers=headers).status_code == 503, 5, "no turn is free")
            began = time.monotonic()
            for answer in (
                pages.get("/search?q=1", headers=headers),
                pages.post("/retry/start", data={"id": "r1"}, headers=headers),
            ):
                assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
                assert "Nothing was done; try again." in answer.text
            assert time.monotonic() - began < 3
            assert pages.get("/healthz").status_code == 200
            assert server.process is not None
            server.process.send_signal(signal.SIGCONT)
            assert [done.result(20).status_code for done in hanging] == [200, 200]
        assert client.failed_ids() == ["r1"]
        assert pages.get("/failed?kind=refused", headers=headers).status_code == 200


def test_a_heavy_reading_leaves_a_turn_for_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second search waits for the first one, while a light page does not."""
    monkeypatch.setattr(web, "_TURN_S", 0.1)
    turns = web._Turns()

    with turns.taken(heavy=True):
        with pytest.raises(ServiceUnavailable), turns.taken(heavy=True):
            pytest.fail("two at a time")
        with turns.taken(heavy=False), pytest.raises(ServiceUnavailable), turns.taken(heavy=False):
            pytest.fail("three at a time")
    with turns.taken(heavy=True), turns.taken(heavy=False):
        pass


# --- bad days -----------------------------------------------------------------------------------------------------


def test_a_server_that_is_away_is_told_in_time_and_without_secrets() -> None:
    """503 within the client's time-out, with what happened and no address; the sign of life stays."""
    with running_valkey() as server:
        url = f"redis://:{PASSWORD}@127.0.0.1:{server.port}/0"
        with redis.Redis(port=server.port) as connection:
            connection.config_set("requirepass", PASSWORD)
        with CancelClient.from_url(url, timeout_s=0.3) as client:
            pages = create_app(client, TOKEN).test_client()
            pages.post("/login", data={"token": TOKEN})
            token = form_token(page(pages, "/"))
            with stopped(server):
                for path in ("/", "/failed", "/requests/x", "/search?q=1", "/retry"):
                    answer = pages.get(path)
                    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
                    assert "Redis did not answer" in answer.text
                    assert "looks again every 5 s" in answer.text
                    assert PASSWORD not in answer.text
                posted = pages.post("/retry/start", data={"form_token": token, "id": "r1"})
                assert posted.status_code == 503
                assert "may or may not have been started" in posted.text
                assert pages.get("/healthz").status_code == 200
            page(pages, "/")


def test_a_fault_of_ours_shows_nothing_of_itself(
    client: CancelClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """500 without a traceback; stderr names the place and not the words."""

    def broken(*_: object) -> Outcome:
        raise RuntimeError(f"with a {PASSWORD} in it")

    monkeypatch.setattr(queries, "newest", broken)
    monkeypatch.setenv("FLASK_DEBUG", "1")
    answer = create_app(client).test_client().get("/")

    assert answer.status_code == 500
    assert "This page is broken" in answer.text
    assert "RuntimeError" not in answer.text
    said = capsys.readouterr().err
    assert re.fullmatch(r"web: status: RuntimeError at test_web\.py:\d+\n", said)
    assert PASSWORD not in answer.text + said


def test_figures_that_cannot_be_read_leave_the_rest_of_the_page(
    reader: FlaskClient, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest outcomes are shown though the status cannot be made sense of."""
    settle(connection, outcome("r1"))

    def odd(_: object) -> None:
        raise ValueError("invalid literal")

    monkeypatch.setattr(CancelClient, "status", odd)
    words = cells(page(reader, "/"))

    assert "Something in Redis keeps these figures from being read (ValueError)." in words
    assert "not_found" in words


def test_a_queue_named_oddly_has_pages_too(valkey: Valkey) -> None:
    """Every page is of the client's queue alone."""
    with CancelClient.from_url(valkey.url, "other.queue-1") as client:
        ticket = client.cancel_many([CancelRequest(algo_id=3)])[0]
        pages = create_app(client).test_client()
        assert "other.queue-1" in page(pages, "/")
        assert found(pages, "3") == [ticket.id]
