"""Who may see the operators' page and act on it: refused starts, tokens, forms, and where a login leads."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from flask import Request
from werkzeug.test import EnvironBuilder

from producer.web import access
from producer.web.access import Access, TooManyLogins, UnsafeStart, check_start, own_path
from tests.servers import eventually

TOKEN = "a-token-of-the-tests"


def request(**headers: str) -> Request:
    """A request with these headers."""
    return Request(EnvironBuilder(headers=list(headers.items())).get_environ())


@pytest.mark.parametrize(
    ("host", "token", "public_read", "said"),
    [
        ("0.0.0.0", None, False, "--public-read"),
        ("::", None, False, "WEB_TOKEN"),
        ("10.0.0.7", None, False, "--host 127.0.0.1"),
        ("example.com", None, False, "example.com"),
        ("127.0.0.1", "fifteen-letters", False, "16 characters"),
        ("127.0.0.1", "a" * 40, False, "8 different characters"),
        ("0.0.0.0", "1234567" * 6, False, "8 different characters"),
        ("127.0.0.1", TOKEN, True, "leave one of them out"),
    ],
)
def test_an_open_door_is_not_opened_by_mistake(host: str, token: str | None, public_read: bool, said: str) -> None:
    """What strangers could read, and a token that can be guessed, stop the start with the ways out."""
    with pytest.raises(UnsafeStart, match=said):
        check_start(host, token, public_read)


@pytest.mark.parametrize(
    ("host", "token", "public_read"),
    [
        ("127.0.0.1", None, False),
        ("127.8.8.8", None, False),
        ("localhost", None, False),
        ("::1", None, False),
        ("[::1]", None, False),
        ("0.0.0.0", TOKEN, False),
        ("0.0.0.0", None, True),
    ],
)
def test_what_is_meant_is_allowed(host: str, token: str | None, public_read: bool) -> None:
    """Loopback needs no login, elsewhere a token or the explicit wish does."""
    check_start(host, token, public_read)


@pytest.mark.parametrize("path", ["/", "/failed?kind=refused&page=2", "/requests/4c7e0f1a", "/search?q=a%2Fb"])
def test_a_login_leads_to_the_page_that_was_asked_for(path: str) -> None:
    """Our own addresses are kept."""
    assert own_path(path) == path


@pytest.mark.parametrize(
    "path",
    [
        *("//evil.example", "/\\evil.example", "https://evil.example/", "evil", "", None, "/\t/evil.example"),
        *("javascript:alert(1)", "/a\r\nSet-Cookie: x=y", "/a b", "/<script>"),
    ],
)
def test_a_login_leads_nowhere_else(path: str | None) -> None:
    """What could leave this site, or end a header, becomes the first page."""
    assert own_path(path) == "/"


def test_the_right_token_is_let_in_at_once_and_a_wrong_one_waits() -> None:
    """A guess costs its time."""
    door = Access(TOKEN)
    began = time.monotonic()
    assert door.accepts(TOKEN)
    assert time.monotonic() - began < access.PENALTY_S / 2
    assert not door.accepts("a-token-of-the-testz")
    assert time.monotonic() - began >= access.PENALTY_S
    for odd in ("", "\ud800", "ä" * 40):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(access, "PENALTY_S", 0)
            assert not door.accepts(odd)


def test_whoever_guesses_keeps_nobody_out() -> None:
    """Beyond a few wrong ones that wait the next are turned away, while the right token is let in at once."""
    door = Access(TOKEN)

    def guess(number: int) -> str:
        try:
            return str(door.accepts(f"wrong-{number}"))
        except TooManyLogins:
            return "turned away"

    with ThreadPoolExecutor(20) as pool:
        told = pool.map(guess, range(20))
        eventually(lambda: door._waiting == 4, 5, "as many wait as may")
        began = time.monotonic()
        assert door.accepts(TOKEN)
        assert time.monotonic() - began < access.PENALTY_S / 2
        assert door._waiting == 4
        answers = list(told)
    assert (answers.count("False"), answers.count("turned away")) == (4, 16)


def test_without_a_token_nobody_is_let_in() -> None:
    """Neither the empty word nor anything else is the token that there is not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(access, "PENALTY_S", 0)
        door = Access(None)
        assert not door.accepts("")
        assert not door.accepts("None")
        assert door.login_of(request(Cookie=f"{access.COOKIE}=x")) is None


def test_a_form_is_of_one_login_and_one_purpose() -> None:
    """A form's token is good for its login alone, and nothing that is signed can stand for something else."""
    door, other = Access(TOKEN), Access("another-token-of-tests")
    form = door.form_token("login-1")

    assert door.is_form_of("login-1", form)
    assert not door.is_form_of("login-2", form)
    assert not door.is_form_of("login-1", form[:-1] + ("A" if form[-1] != "A" else "B"))
    assert not door.is_form_of("login-1", door.note("login-1"))
    assert not other.is_form_of("login-1", form)
    assert door.login_of(request(Cookie=f"{access.COOKIE}={form}")) is None


def test_a_note_is_ours_or_not_shown() -> None:
    """A link cannot put words on the page."""
    door = Access(TOKEN)

    assert door.noted(door.note("Retried 2 of 2.")) == "Retried 2 of 2."
    assert door.noted("Retried 9,999 of 9,999.") is None
    assert door.noted(None) is None


@pytest.mark.parametrize(
    ("host", "local"),
    [
        *(("localhost:8080", True), ("127.0.0.1", True), ("[::1]:8080", True), ("evil.example:8080", False)),
        *(("localhost.evil.example", False), ("", False), ("[", False)),
    ],
)
def test_a_strangers_name_is_told_from_our_own(host: str, local: bool) -> None:
    """A site that lets its own name lead to loopback is not served."""
    assert access.named_locally(request(Host=host)) is local


@pytest.mark.parametrize(
    ("proto", "in_clear"),
    [(None, False), ("https", False), ("HTTPS, http", False), ("http", True), ("http, https", True), ("", True)],
)
def test_what_a_proxy_took_without_tls_is_told(proto: str | None, in_clear: bool) -> None:
    """The first word of X-Forwarded-Proto is what the browser spoke; without the header there is no proxy to ask."""
    headers = {} if proto is None else {"X-Forwarded-Proto": proto}
    assert access.forwarded_in_clear(request(**headers)) is in_clear


@pytest.mark.parametrize(
    "name", ["X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "Forwarded", "X-Real-IP", "Via"]
)
def test_what_a_proxy_passed_on_is_known_by_its_headers(name: str) -> None:
    """Each header that proxies add tells of one; an ordinary request of a browser has none of them."""
    assert access.forwarded(request(**{name: "127.0.0.1"}))
    assert not access.forwarded(request(Host="localhost", Accept="text/html"))
