"""The operators' pages over a real server: who may act, and what they say on bad days."""

from __future__ import annotations

import re
import signal

import pytest
import redis
from flask.testing import FlaskClient

from producer import CancelClient, CancelRequest
from producer.message import Outcome, OutcomeKind, encode_call
from producer.web import access, queries
from producer.web.app import create_app
from tests.servers import Workers, running_valkey, stopped
from tests.strategies import PASSWORD, fail
from tests.webpages import KEYS, TOKEN, cells, form_token, outcome, page, settle

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
    assert 'name="next" value="/"' in pages.get("/?live=1").text  # in the frame, too, it leads to the whole page
    assert pages.post("/retry/start", data={"id": "x"}).status_code == 401
    assert (pages.get("/healthz").status_code, pages.get("/healthz").text) == (200, "ok\n")
    assert pages.get("/style.css").mimetype == "text/css"


def test_a_login_is_a_cookie_that_scripts_and_other_sites_cannot_use(client: CancelClient) -> None:
    """HttpOnly, SameSite=Strict, twelve hours, Secure behind TLS; a wrong token gets none, and logging out ends it."""
    pages = create_app(client, TOKEN).test_client()

    wrong = pages.post("/login", data={"token": TOKEN + "x"})
    assert (wrong.status_code, wrong.headers.get("Set-Cookie")) == (401, None)
    assert "None came with this request, or it was not the right one." in wrong.text
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
    after = page(operator, answer.headers["Location"] + "&live=1")
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


PROXIES = ("X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "Forwarded", "X-Real-IP", "Via")


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        *(({"Host": name}, 421) for name in ("evil.example", "localhost.evil.example")),
        *(({"Host": name}, 200) for name in ("localhost:8080", "[::1]:1")),
        *(({"Host": "localhost:8080", name: "127.0.0.1"}, 421) for name in PROXIES),
    ],
)
def test_on_loopback_only_this_machine_reads(client: CancelClient, headers: dict[str, str], code: int) -> None:
    """Without a login neither a site whose name leads here nor what a proxy forwards is answered."""
    pages = create_app(client, local_names_only=True).test_client()

    answer = pages.get("/", headers=headers)

    assert (answer.status_code, "What a proxy has forwarded is refused too" in answer.text) == (code, code == 421)
    assert pages.get("/healthz", headers={"Host": "10.1.2.3"}).status_code == 200
    assert create_app(client).test_client().get("/", headers=headers).status_code == 200


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
    for proto, code in (("http, https", 403), ("", 403), ("HTTPS, http", 200)):  # the first is what the browser spoke
        assert pages.get("/login", headers={"X-Forwarded-Proto": proto}).status_code == code
    answer = pages.get("/login", headers=safe)
    assert (answer.status_code, answer.headers["Strict-Transport-Security"]) == (200, "max-age=31536000")
    assert "Strict-Transport-Security" not in pages.get("/login").headers
    assert create_app(client).test_client().get("/", headers=plain).status_code == 200


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
                for path in ("/?live=1", "/failed", "/requests/x", "/search?q=1", "/retry", "/queued", "/outcomes"):
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
    client: CancelClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """500 without a traceback; the log names the place and not the words."""

    def broken(*_: object) -> Outcome:
        raise RuntimeError(f"with a {PASSWORD} in it")

    monkeypatch.setattr(queries, "outcomes", broken)
    monkeypatch.setenv("FLASK_DEBUG", "1")
    answer = create_app(client).test_client().get("/?live=1")

    assert answer.status_code == 500
    assert "This page is broken" in answer.text
    assert "RuntimeError" not in answer.text
    (said,) = caplog.messages
    assert re.fullmatch(r"web: status: RuntimeError at test_web_rights\.py:\d+", said)
    assert PASSWORD not in answer.text + said


def test_a_retry_by_a_client_id_alone_says_what_that_means(operator: FlaskClient, connection: redis.Redis) -> None:
    """A client id can be used again, so the confirmation says which order is meant; an algo id needs no such words."""
    words = "the client algo id may name a newer order by now; such an order is left alone"
    settle(connection, outcome("r1", algo_id=5, client_algo_id="sl-1"))
    settle(connection, outcome("r2", algo_id=None, client_algo_id="sl-2"), encode_call(CancelRequest(None, "sl-2")))

    assert words not in page(operator, "/retry?id=r1")
    assert words in page(operator, "/retry?id=r2")
    assert words in page(operator, "/retry")
