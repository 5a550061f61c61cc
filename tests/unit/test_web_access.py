"""Who may see the operators' page and act on it: refused starts, tokens, forms, and where a login leads."""

from __future__ import annotations

import pytest

from producer.console import BadSetting
from producer.web.access import Access, check_start, own_path

TOKEN = "a-token-of-the-tests"


@pytest.mark.parametrize(
    ("host", "token", "public_read", "said"),
    [
        ("0.0.0.0", None, False, "--public-read"),
        ("::", None, False, "WEB_TOKEN"),
        ("10.0.0.7", None, False, "--host 127.0.0.1"),
        ("example.com", None, False, "example.com"),
        ("127.0.0.1", "fifteen-letters", False, "16 characters"),
        *(("127.0.0.1", f"{TOKEN}{end}", False, "the end of a line") for end in ("\r", "\n", " ", "\x00x")),
        ("127.0.0.1", "a" * 40, False, "8 different characters"),
        ("0.0.0.0", "1234567" * 6, False, "8 different characters"),
        ("127.0.0.1", TOKEN, True, "leave one of them out"),
    ],
)
def test_an_open_door_is_not_opened_by_mistake(host: str, token: str | None, public_read: bool, said: str) -> None:
    """What strangers could read, and a token that can be guessed, stop the start with the ways out."""
    with pytest.raises(BadSetting, match=said):
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


@pytest.mark.parametrize(
    ("path", "leads_to"),
    [
        *((path, path) for path in ("/", "/failed?kind=refused&page=2", "/requests/4c7e0f1a", "/search?q=a%2Fb")),
        *((path, "/") for path in ("//evil.example", "/\\evil.example", "https://evil.example/", "evil", "", None)),
        *((path, "/") for path in ("/\t/evil.example", "javascript:alert(1)", "/a\r\nSet-Cookie: x=y", "/a b", "/<b>")),
    ],
)
def test_a_login_leads_to_the_page_that_was_asked_for(path: str | None, leads_to: str) -> None:
    """Our own addresses are kept; what could leave this site, or end a header, becomes the first page."""
    assert own_path(path) == leads_to


def test_a_note_is_ours_or_not_shown() -> None:
    """A link cannot put words on the page."""
    door = Access(TOKEN)

    assert door.noted(door.note("Retried 2 of 2.")) == "Retried 2 of 2."
    assert door.noted("Retried 9,999 of 9,999.") is None
    assert door.noted(None) is None
