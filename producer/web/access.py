"""Who may look and who may act: the login with its signed cookie, the token of a form, and the headers of every page.

Nothing is stored: the cookie says when it was made and is signed by a key made from WEB_TOKEN, so that it ends after
twelve hours and with a change of the token.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

from flask import Request, Response
from itsdangerous import BadData, URLSafeTimedSerializer

from producer.console import BadSetting
from producer.shell import is_loopback
from producer.untrusted import clean_text

#: Least length of WEB_TOKEN, characters.
MIN_TOKEN_CHARS = 16
#: Least number of different characters in it.
MIN_TOKEN_KINDS = 8
#: Life of a login, s.
LOGIN_S = 12 * 3600
#: How long the answer to what may be a guess at the token is held back, s.
GUESS_S = 1.0
#: Where a login is sent to.
LOGIN_PATH = "/login"
#: How long the note after an action can be shown, s.
_NOTE_S = 60
COOKIE = "cancel_queue_login"

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'none'; img-src 'self' data:; "
    "frame-src 'self'; form-action 'self'; frame-ancestors 'self'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_BY_HTTPS = {"Strict-Transport-Security": "max-age=31536000"}
#: What proxies add: whoever sent a request that has one of these need not sit at this machine.
_FORWARDED = ("X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "Forwarded", "X-Real-IP", "Via")
_OWN_PATH = re.compile(r"/(?![/\\])[A-Za-z0-9._~%/?=&:@+-]*")


def check_start(host: str, token: str | None, public_read: bool) -> None:
    """Refuse settings by which strangers could read the queue.

    Raises:
        BadSetting: they could, the token is too weak, or the settings contradict each other.
    """
    if token is not None and (token != token.strip() or not token.isprintable()):
        raise BadSetting(
            "WEB_TOKEN begins or ends with white space, or holds a control character (the end of a line?), which no "
            "login can send; try: openssl rand -hex 16"
        )
    if token is not None and len(token) < MIN_TOKEN_CHARS:
        raise BadSetting(f"WEB_TOKEN must have {MIN_TOKEN_CHARS} characters or more; try: openssl rand -hex 16")
    if token is not None and len(set(token)) < MIN_TOKEN_KINDS:
        raise BadSetting(f"WEB_TOKEN must have {MIN_TOKEN_KINDS} different characters; try: openssl rand -hex 16")
    if token is not None and public_read:
        raise BadSetting("--public-read means without a login, and WEB_TOKEN asks for one: leave one of them out")
    if token is None and not public_read and not is_loopback(host):
        raise BadSetting(
            f"whoever reaches {host} could read every order here. Set WEB_TOKEN ({MIN_TOKEN_CHARS} characters or more) "
            "so that a login is asked for, or bind to --host 127.0.0.1, or give --public-read if that is what you want"
        )


def forwarded(request: Request) -> bool:
    """Whether a proxy says that it passed this request on."""
    return any(name in request.headers for name in _FORWARDED)


def forwarded_in_clear(request: Request) -> bool:
    """Whether a proxy says that the browser spoke to it without TLS."""
    return "X-Forwarded-Proto" in request.headers and not _by_https(request)


def own_path(path: str | None) -> str:
    """``path`` if it leads to a page of ours, else the first page: a login must not send anybody elsewhere."""
    return path if path is not None and _OWN_PATH.fullmatch(path) else "/"


def harden(response: Response, request: Request) -> Response:
    """Set the headers that every answer carries."""
    response.headers.update(_HEADERS)
    if _by_https(request):
        response.headers.update(_BY_HTTPS)
    return response


def bearer(authorization: str) -> str | None:
    """The token of an Authorization header, if there is one."""
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def whence(request: Request) -> str:
    """Where a request says that it comes from, fit for a log."""
    passed_on = request.headers.get("X-Forwarded-For")
    by = clean_text(request.remote_addr or "?", 60)
    return by if passed_on is None else f"{by}, which names {clean_text(passed_on, 100)}"


def is_foreign(request: Request) -> bool:
    """Whether a browser says that another site made this request."""
    return request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none")


class Access:
    """The login of one process. Without a token nobody can log in, and nothing can be changed."""

    def __init__(self, token: str | None) -> None:
        self.enabled = token is not None
        self._digest = _digest(token or secrets.token_hex())
        key = hashlib.pbkdf2_hmac("sha256", self._digest, b"algo-cancel-queue web", 100_000)
        self._signer = URLSafeTimedSerializer(key, signer_kwargs={"digest_method": hashlib.sha256})

    # --- logging in ---

    def accepts(self, token: str) -> bool:
        """Whether this is the token."""
        return hmac.compare_digest(_digest(token), self._digest) and self.enabled

    def is_guess(self, method: str, path: str, authorization: str) -> bool:
        """Whether a request may be a guess at the token: any login, so that the time tells nothing, and a wrong header.

        Each is answered :data:`GUESS_S` late. None is refused for being one of many: the right token may be among them.
        """
        token = bearer(authorization)
        is_login = method == "POST" and path.rstrip("/") == LOGIN_PATH
        return self.enabled and (is_login or (token is not None and not self.accepts(token)))

    def let_in(self, response: Response, request: Request) -> Response:
        """Set the cookie of a new login."""
        response.set_cookie(
            COOKIE,
            self._sign("login", secrets.token_urlsafe(16)),
            max_age=LOGIN_S,
            httponly=True,
            samesite="Strict",
            secure=_by_https(request),
        )
        return response

    def let_out(self, response: Response, request: Request) -> Response:
        """Take the cookie back."""
        response.delete_cookie(COOKIE, httponly=True, samesite="Strict", secure=_by_https(request))
        return response

    def login_of(self, request: Request) -> str | None:
        """What names the login of this request's cookie; None without a valid one."""
        return self._signed("login", request.cookies.get(COOKIE, ""), LOGIN_S) if self.enabled else None

    # --- forms ---

    def form_token(self, login: str) -> str:
        """What every form of a login carries, so that no other site can make one."""
        return self._sign("form", login)

    def is_form_of(self, login: str, token: str) -> bool:
        """Whether a form was made for this login."""
        return hmac.compare_digest((self._signed("form", token, LOGIN_S) or "").encode(), login.encode())

    def note(self, words: str) -> str:
        """A sentence of ours, to be shown by the page that follows an action, and not to be made up by a link."""
        return self._sign("note", words)

    def noted(self, note: str | None) -> str | None:
        """The sentence of :meth:`note`, while it is fresh."""
        return self._signed("note", note or "", _NOTE_S)

    def _sign(self, purpose: str, value: str) -> str:
        signed = self._signer.dumps(value, salt=purpose)
        return signed if isinstance(signed, str) else signed.decode()

    def _signed(self, purpose: str, text: str, life_s: int) -> str | None:
        try:
            return str(self._signer.loads(text, max_age=life_s, salt=purpose))
        except BadData:
            return None


def _digest(token: str) -> bytes:
    """Of one length whatever is given, so that a comparison takes one time."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _by_https(request: Request) -> bool:
    """Whether the browser spoke TLS, to us or to the proxy in front of us. A lie about it only harms the liar."""
    proto = request.headers.get("X-Forwarded-Proto", "").partition(",")[0].strip().lower()
    return request.is_secure or proto == "https"
