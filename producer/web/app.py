"""The pages as a WSGI application: :func:`create_app`. What is read stands in :mod:`producer.web.queries`."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any, TypeVar

from flask import Flask, Response, g, make_response, redirect, render_template, request, url_for
from jinja2 import StrictUndefined
from werkzeug.exceptions import BadRequest, Conflict, Forbidden, HTTPException, NotFound, ServiceUnavailable
from werkzeug.wrappers import Response as WerkzeugResponse

from producer.client import CancelClient
from producer.keys import Band
from producer.message import OutcomeKind
from producer.protocol import CHUNK, Conversation, QueueUnavailable, UnknownRequest
from producer.shell import names_this_machine
from producer.status import readable
from producer.timeline import read_timeline
from producer.untrusted import InvalidRequest, clean_text
from producer.web import queries
from producer.web.access import (
    LOGIN_PATH,
    MIN_TOKEN_CHARS,
    Access,
    bearer,
    forwarded,
    forwarded_in_clear,
    harden,
    is_foreign,
    own_path,
    whence,
)
from producer.web.filters import UNREADABLE, Wanted, wanted_of
from producer.web.formatting import FILTERS, fit
from producer.web.plots import plots_of, rows_of
from producer.web.queries import PAGE, Standing
from producer.web.seen import USABLE_ID, Seen, requests_of

#: Between two looks of a page that refreshes itself, s.
REFRESH_S = 5
#: What is drawn: minutes, and how many of them make an interval.
_HOUR, _DAY = (60, 1), (1440, 15)
#: Outcomes below the status.
_NEWEST = 25
#: Largest form, bytes: :data:`CHUNK` ids and a little more.
_MAX_FORM_BYTES = 512 * 1024
#: Longest word that is searched for, characters.
_MAX_QUERY = 200
#: Calls of Redis at a time, each on a connection of its own, and those among them that read far back.
_CALLS = 2
_HEAVY_CALLS = 1
#: How many more wait for one of each; further ones are turned away at once, so that they do not keep all threads.
_WAITING = 8
_HEAVY_WAITING = 3
#: How long a page waits for its turn, s, and when one that was turned away may come again.
_TURN_S = 5.0
_AGAIN_S = 2
_OPEN_TO_ALL = frozenset({"healthz", "style", "login"})
_READ_ONLY = (
    "These pages are read-only, because the process was started without WEB_TOKEN. Set WEB_TOKEN "
    f"({MIN_TOKEN_CHARS} characters or more) and start it again, or use a shell: python -m producer retry ID"
)
_NOT_LOCAL = (
    "Without WEB_TOKEN these pages answer to localhost alone, so that no other site's name can lead here. "
    "What a proxy has forwarded is refused too: it can come from anywhere. Set WEB_TOKEN, or start with --public-read."
)
_IN_CLEAR = "Open this page with https: the token and the cookie of a login would go over the net in clear."
_BUSY = "Others are reading the queue, and it was not this page's turn in time. Nothing was done; try again."
_CROWD = "Too many others wait for their turn to read the queue. Nothing was done; try again in a few seconds."

#: The addresses of the lists of open requests.
_BANDS = {"queued": Band.WAITING, "scheduled": Band.RETRY, "in-flight": Band.HELD}
_ENDED = tuple(kind.value for kind in OutcomeKind)
_FAILED = tuple(kind.value for kind in OutcomeKind if kind.failed)
#: An entry of the ledger.
_ENTRY = re.compile(r"[0-9]{1,15}-[0-9]{1,15}")
_log = logging.getLogger("producer.web")

T = TypeVar("T")
Answer = Response | WerkzeugResponse | str | tuple[str, int]


def create_app(client: CancelClient, token: str | None = None, *, local_names_only: bool = False) -> Flask:
    """The pages about the queue of ``client``.

    With a ``token`` everything asks for a login, and requests can be retried; without one nothing can be changed.
    ``local_names_only`` turns away requests that name another host than this machine, or that a proxy forwarded (for a
    server on loopback). All pages together hold two connections of Redis at most.
    """
    app = Flask(__name__, static_folder=None)
    app.debug = False  # whatever FLASK_DEBUG says: a page of a debugger would show secrets
    app.config.update(MAX_CONTENT_LENGTH=_MAX_FORM_BYTES, MAX_FORM_MEMORY_SIZE=_MAX_FORM_BYTES)
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False  # either would redirect to the host that the request names
    app.jinja_env.undefined = StrictUndefined
    app.jinja_env.finalize = fit
    app.jinja_env.trim_blocks = app.jinja_env.lstrip_blocks = True
    app.jinja_env.filters.update(FILTERS)
    app.extensions["access"] = access = Access(token)
    pages = _Pages(client, access)
    app.before_request(partial(_guard, access, local_names_only))
    app.after_request(_finished)
    app.context_processor(
        lambda: {
            "queue": client.keys.queue if g.get("let_in") else None,  # nobody else learns its name
            "login": access.login_of(request),
            "writable": access.enabled,
            "live": _is_live(),
            "now_ms": getattr(g.get("standing"), "at_ms", None),
            "standing": pages.standing,
        }
    )
    app.jinja_env.globals.update(form_token=access.form_token)
    for rule, view in pages.rules().items():
        methods = ["POST"] if view.__name__ in ("logout", "start") else ["GET"]
        app.add_url_rule(rule, view.__name__, view, methods=methods + ["POST"] * (view.__name__ == "login"))
    app.add_url_rule("/healthz", "healthz", lambda: Response("ok\n", mimetype="text/plain"))
    app.add_url_rule("/style.css", "style", lambda: Response(_STYLE, mimetype="text/css"))
    app.register_error_handler(QueueUnavailable, _away)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _broken)
    return app


def _guard(access: Access, local_names_only: bool) -> Answer | None:
    """Look at a request before its page does: None to let it through, else the answer."""
    if request.endpoint == "healthz":
        return None
    if local_names_only and (forwarded(request) or not names_this_machine(request.headers.get("Host", ""))):
        return _message(421, "Not here", _NOT_LOCAL)
    if access.enabled and forwarded_in_clear(request):
        raise Forbidden(_IN_CLEAR)
    g.let_in = not access.enabled
    changes = request.method not in ("GET", "HEAD", "OPTIONS")
    if changes and not access.enabled:
        raise Forbidden(_READ_ONLY)
    if changes and is_foreign(request):
        raise Forbidden("Another site made this request. Open the page here and repeat it.")
    if not access.enabled or request.endpoint in _OPEN_TO_ALL:
        return None
    token = bearer(request.headers.get("Authorization", ""))
    if token is not None:
        g.let_in = _accepted(access, token)
        return None if g.let_in else _login_form()
    login = access.login_of(request)
    if login is None:
        return _login_form()
    g.let_in = True
    if changes and not access.is_form_of(login, request.form.get("form_token", "")):
        raise Forbidden("This form is not of the present login, or too old. Open the page again and repeat it.")
    return None


def _accepted(access: Access, token: str) -> bool:
    """Whether it is the token; a wrong one is logged. How long its answer takes is the server's affair."""
    accepted = access.accepts(token)
    if not accepted:
        _log.warning("web: wrong token from %s", whence(request))
    return accepted


def _login_form() -> Answer:
    """The login, with 401, in place of the page that was asked for: one answer to wrong tokens and to none."""
    full_path = request.path if _is_live() else request.full_path.rstrip("?")
    asked = full_path if request.method == "GET" else None
    page = request.form.get("next") if request.endpoint == "login" else asked
    answer = make_response(render_template("login.html", next=own_path(page), refused=True), 401)
    answer.headers["WWW-Authenticate"] = 'Bearer realm="algo-cancel-queue"'
    return answer


def _finished(response: Response) -> Response:
    """Add the headers that every answer carries; when to look again is one, so that a page's words need no element."""
    if g.get("refresh"):
        response.headers["Refresh"] = str(g.refresh)
    return harden(response, request)


# --- Errors -------------------------------------------------------------------------------------------------------


def _message(code: int, title: str, words: str) -> tuple[str, int]:
    return render_template("message.html", title=title, words=words), code


def _away(error: QueueUnavailable) -> Answer:
    """Redis is away: say so, and look again by itself where that changes nothing."""
    g.standing = None  # asking for it would only take as long again
    words = f"{error}."
    if request.method == "POST":
        words += " The retry may or may not have been started: those that were are no longer among the failed ones."
    if request.method == "GET":
        g.refresh = REFRESH_S
    answer = make_response(_message(503, "The queue cannot be read", words))
    answer.headers["Retry-After"] = str(REFRESH_S)
    return answer


def _http_error(error: HTTPException) -> Answer:
    if error.code == ServiceUnavailable.code:
        g.standing = None
    answer = make_response(_message(error.code or 500, error.name, error.description or ""))
    for name, value in error.get_headers():
        if name != "Content-Type":
            answer.headers[name] = value
    return answer


def _broken(error: Exception) -> Answer:
    """A fault of ours: its kind and place go to stderr, without the words, which may quote what nobody should see."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = "?" if place is None else f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}"
    _log.error("web: %s: %s at %s", request.endpoint, type(error).__name__, where)
    return _message(500, "This page is broken", "The process' log says where. The command line shows the same figures.")


# --- Pages --------------------------------------------------------------------------------------------------------


class _Turns:
    """Lets few calls of Redis be under way at a time: a small plan has few connections, and workers need theirs.

    Some more wait, each keeping a thread of the server; who would be one too many is turned away.
    """

    def __init__(self) -> None:
        lanes = ((_HEAVY_CALLS, _HEAVY_WAITING), (_CALLS, _WAITING))
        # The heavy one first: while it waits for that it keeps no light one away.
        self._lanes = [(BoundedSemaphore(calls + waiting), BoundedSemaphore(calls)) for calls, waiting in lanes]

    @contextlib.contextmanager
    def taken(self, heavy: bool) -> Iterator[None]:
        """Wait for a turn, and have it for the length of the block; ``heavy``: one of those that read far back.

        Raises:
            ServiceUnavailable: it did not come within :data:`_TURN_S`, or too many wait already.
        """
        until_s = time.monotonic() + _TURN_S
        with contextlib.ExitStack() as held:
            for places, calls in self._lanes if heavy else self._lanes[1:]:
                for lock, until, words in ((places, 0.0, _CROWD), (calls, until_s, _BUSY)):
                    if not lock.acquire(timeout=max(0.0, until - time.monotonic())):
                        raise ServiceUnavailable(words, retry_after=_AGAIN_S)
                    held.callback(lock.release)
            yield


class _Pages:
    """One method for each address."""

    def __init__(self, client: CancelClient, access: Access) -> None:
        self._client = client
        self._keys = client.keys
        self._access = access
        self._turns = _Turns()

    def rules(self) -> Mapping[str, Any]:
        """Address and method."""
        return {
            "/": self.status,
            "/<any(queued, scheduled, 'in-flight'):state>": self.open_requests,
            "/outcomes": self.outcomes,
            "/history": self.history,
            "/failed": self.failed,
            "/requests/<job_id>": self.one,
            "/search": self.search,
            "/retry": self.confirm,
            "/retry/start": self.start,
            LOGIN_PATH: self.login,
            "/logout": self.logout,
        }

    def _ask(self, conversation: Conversation[T], heavy: bool = False) -> T:
        """What Redis says, and in the same turn what the banner of each page needs."""
        with self._turns.taken(heavy):
            told = self._client.converse(conversation)
            if "standing" not in g:
                g.standing = self._client.converse(queries.standing(self._keys))
            return told

    def standing(self) -> Standing | None:
        """What holds up everything, for the banner; None where it cannot be told."""
        if "standing" not in g:
            with contextlib.suppress(QueueUnavailable, HTTPException), self._turns.taken(heavy=False):
                g.standing = self._client.converse(queries.standing(self._keys))
        found: Standing | None = g.get("standing")
        return found

    # --- reading ---

    def status(self) -> Answer:
        """How the queue stands, as `python -m producer status` says it, and the newest outcomes."""
        if (frame := _frame("Status", REFRESH_S)) is not None:
            return frame
        with self._turns.taken(heavy=False):
            seen = self._client.status()
        g.standing = Standing(seen.at_ms, seen.suspended, seen.workers_known and not seen.live_workers, seen.unattended)
        rows = self._ask(queries.outcomes(self._keys, Wanted())).rows[:_NEWEST]
        hour = self._ask(read_timeline(self._keys, *_HOUR)).intervals
        about = {"ledger": self._keys.outcomes, "hour": rows_of(hour), "plots": plots_of(hour, "minute", "last hour")}
        return render_template("status.html", s=seen, rows=rows, **about)

    def history(self) -> Answer:
        """What became of requests in the last hour and day."""
        damaged: dict[str, None] = {}
        self._ask(readable([("GETRANGE", key, 0, 0) for key in (self._keys.counts, self._keys.minutes)], damaged))
        hour = self._ask(read_timeline(self._keys, *_HOUR))
        day = self._ask(read_timeline(self._keys, *_DAY), heavy=True)
        windows = [
            ("Last hour", plots_of(hour.intervals, "minute", "last hour"), rows_of(hour.intervals)),
            ("Last day", plots_of(day.intervals, "quarter of an hour", "last day"), rows_of(day.intervals)),
        ]
        about = {"at_ms": day.at_ms, "since_ms": day.total.since_ms, "damaged": damaged}
        return render_template("history.html", windows=windows, **about)

    def open_requests(self, state: str) -> Answer:
        """Those that wait for a worker, for their next attempt, or that a worker has in hand."""
        page = min(_page(), queries.DEPTH // PAGE)
        found = self._ask(queries.open_requests(self._keys, _BANDS[state], (page - 1) * PAGE))
        return render_template("open.html", found=found, state=state, page=page, depth=queries.DEPTH)

    def outcomes(self) -> Answer:
        """The ledger, newest first."""
        wanted = wanted_of(request.args, _ENDED)
        before = request.args.get("before")
        if before is not None and not _ENTRY.fullmatch(before):
            raise BadRequest(f"before={before[:80]!r}: must be the id of an entry of the ledger, as 1763807442123-0.")
        found = None
        if wanted.fault is None:
            found = self._ask(queries.outcomes(self._keys, wanted, before), heavy=not wanted.all)
        return self._filtered("outcomes.html", wanted, _ENDED, found=found, before=before)

    def failed(self) -> Answer:
        """The failed requests, newest first."""
        wanted = wanted_of(request.args, _FAILED)
        page = _page()
        found, pages = None, 1
        if wanted.fault is None:
            found = self._ask(queries.failed(self._keys, wanted, (page - 1) * PAGE), heavy=not wanted.all)
            pages = max(1, -(-found.matching // PAGE))
        note = self._access.noted(request.args.get("note"))
        return self._filtered(
            "failed.html", wanted, _FAILED, found=found, page=page, pages=pages, most=CHUNK, note=note
        )

    def _filtered(self, template: str, wanted: Wanted, kinds: Sequence[str], **about: Any) -> Answer:
        """A page with a filter; with 400 if that has a fault."""
        about |= {"wanted": wanted, "kinds": (*kinds, UNREADABLE), "depth": queries.DEPTH}
        return render_template(template, **about), 200 if wanted.fault is None else 400

    def one(self, job_id: str) -> Answer:
        """One request in full."""
        if not USABLE_ID.fullmatch(job_id):
            raise NotFound("No request can have this id.")
        (seen,) = self._ask(requests_of(self._keys, [job_id]))
        earlier: list[Seen] = []
        if seen.outcome is None and seen.status is None and not seen.faults:
            earlier = self._ask(queries.history(self._keys, job_id), heavy=True)
            if not earlier:
                raise NotFound("Nobody knows this request any more: neither a job, nor an outcome, nor the ledger.")
            seen = earlier[0]
        if seen.open and (frame := _frame("Request", REFRESH_S)) is not None:
            return frame
        note = self._access.noted(request.args.get("note"))
        return render_template("request.html", seen=seen, note=note)

    def search(self) -> Answer:
        """By the id of an order or of a request."""
        words = request.args.get("q", "").strip()
        account = request.args.get("account", "").strip() or None
        found, fault = None, None
        if len(words) > _MAX_QUERY:
            fault = f"{InvalidRequest('q', words, f'an id has {_MAX_QUERY} characters at most')}."
        elif words:
            found = self._ask(queries.search(self._keys, words, account), heavy=True)
        return render_template("search.html", words=words, account=account, found=found, fault=fault)

    # --- retrying ---

    def confirm(self) -> Answer:
        """What a retry would start, to be confirmed."""
        if not self._access.enabled:
            raise Forbidden(_READ_ONLY)
        ids = [job_id for job_id in request.args.getlist("id") if USABLE_ID.fullmatch(job_id)]
        wanted = wanted_of(request.args, _FAILED)
        if wanted.fault is not None:
            raise BadRequest(wanted.fault)
        if ids:
            rows = self._ask(requests_of(self._keys, list(dict.fromkeys(ids))[:CHUNK]))
            matching, damaged = len(rows), tuple[str, ...]()
        else:
            found = self._ask(queries.failed(self._keys, wanted, 0, CHUNK), heavy=not wanted.all)
            rows, matching, damaged = list(found.rows), found.matching, found.damaged
        chosen = [seen for seen in rows if seen.retryable]
        return render_template(
            "retry.html",
            chosen=chosen,
            matching=matching,
            damaged=damaged,
            wanted=wanted,
            by_id=bool(ids),
            form=self._access.login_of(request),
            by_name=any(seen.of_order("algo_id") is None and seen.of_order("client_algo_id") for seen in chosen),
        )

    def start(self) -> Answer:
        """Start what was confirmed: those very requests, whatever has failed since."""
        ids = list(dict.fromkeys(request.form.getlist("id")))
        if not 1 <= len(ids) <= CHUNK or not all(USABLE_ID.fullmatch(job_id) for job_id in ids):
            raise BadRequest(f"Give 1 to {CHUNK:,} ids of failed requests.")
        try:
            # One call of one script: started together or not at all.
            with self._turns.taken(heavy=False):
                started = self._client.retry(ids, missing_ok=len(ids) > 1)
        except UnknownRequest as error:
            raise Conflict(f"{clean_text(str(error), 300)}; nothing was retried.") from None
        words = f"Retried {len(started):,} of {len(ids):,}."
        if len(started) < len(ids):
            words += " The others were no longer among the failed ones."
        note = self._access.note(words)
        if len(ids) == 1:
            return redirect(url_for("one", job_id=ids[0], note=note), 303)
        kept: Mapping[str, Any] = wanted_of(request.form, _FAILED).typed
        return redirect(url_for("failed", **kept, note=note), 303)

    # --- access and the rest ---

    def login(self) -> Answer:
        """Ask for the token; set the cookie."""
        if not self._access.enabled:
            raise Forbidden(_READ_ONLY)
        if request.method != "POST":
            page = own_path(request.args.get("next"))
            return render_template("login.html", next=page, refused=False)
        if not _accepted(self._access, request.form.get("token", "")):
            return _login_form()
        return self._access.let_in(make_response(redirect(own_path(request.form.get("next")), 303)), request)

    def logout(self) -> Answer:
        """Take the cookie back."""
        return self._access.let_out(make_response(redirect(url_for("login"), 303)), request)


_STYLE = files("producer.web").joinpath("static", "style.css").read_text("utf-8")


def _page() -> int:
    """Which page of a list is asked for, from 1."""
    text = request.args.get("page", "")
    return max(1, int(text)) if text.isascii() and text.isdigit() and len(text) <= 9 else 1


def _is_live() -> bool:
    """Whether this is the part of a page that looks again, without the rest around it."""
    return request.args.get("live") == "1"


def _frame(title: str, every_s: int) -> str | None:
    """A page with the part of it that looks again in a frame: what is typed beside that is not lost.

    None where that part alone is asked for, which is told to come again, and where all is to be seen at once: with
    ?refresh=0, and by what is no browser, which has no frames.
    """
    if request.args.get("refresh") == "0":
        return None
    if _is_live():
        g.refresh = every_s
        return None
    if not any(name in request.headers for name in ("Sec-Fetch-Dest", "Upgrade-Insecure-Requests")):
        return None
    told: dict[str, Any] = {"note": request.args.get("note"), "live": 1}
    address = url_for(str(request.endpoint), **(request.view_args or {}), **told)
    return render_template("frame.html", title=title, frame=address)
