"""The command line's material, free of click and of the environment: connecting, reading ids, waiting, showing."""

from __future__ import annotations

import ssl
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, BinaryIO

from producer.client import CancelClient
from producer.message import (
    MAX_ALGO_ID,
    VERSION,
    CancelRequest,
    OnTrigger,
    Outcome,
    OutcomeKind,
    decode_request,
)
from producer.open_orders import OpenOrder, OpenOutcome
from producer.protocol import TicketFields
from producer.redis_url import FORMS, OPTIONS, Address, BadRedisUrl
from producer.status import aligned
from producer.untrusted import MAX_PAYLOAD_BYTES, InvalidRequest, MalformedMessage, MessageError, clean_text, loads
from producer.waiting import LOOK_S, End, look, proven

#: Bad lines of a file that are reported one by one.
SHOWN_BAD_LINES = 20
#: Time between two lines of progress where there is no terminal, s.
PROGRESS_S = 5.0
#: Time between two looks for outcomes, s: from soon to seldom.
_FIRST_PAUSE_S = 0.01
_LAST_PAUSE_S = 0.25


class BadSetting(ValueError):
    """A setting cannot be used. The text names it and what it must be, and shows no secret."""


class BadFile(ValueError):
    """A file of ids cannot be used; the text has a line for each of the first faults."""


# --- Connecting ---------------------------------------------------------------------------------------------------


def connect(url: str, queue: str, tls_verify: str, tls_ca: str) -> CancelClient:
    """A client; ``tls_verify`` (required, none, or empty) and ``tls_ca`` matter to rediss:// alone.

    Raises:
        BadSetting: the URL or a TLS setting cannot be used.
        InvalidRequest: ``queue`` cannot name a queue.
    """
    try:
        address = Address.parse(url)
    except BadRedisUrl as error:
        raise BadSetting(f"REDIS_URL must be {FORMS}{f': {error}' if str(error) else ''}") from None
    if address.others:
        raise BadSetting(f"REDIS_URL: after the question mark only {', '.join(sorted(OPTIONS))} may be set")
    tls = _tls_options(address.options, tls_verify, tls_ca) if address.is_tls else {}
    return CancelClient.from_url(url, queue, **tls)


def _tls_options(options: Mapping[str, Any], verify: str, ca_file: str) -> dict[str, Any]:
    """What redis-py is told beside the URL, which must not say less than the setting."""
    by_url = options.get("ssl_cert_reqs", "")
    if verify not in ("", "required", "none"):
        raise BadSetting("REDIS_TLS_VERIFY must be required or none")
    if by_url and verify and by_url != verify:
        raise BadSetting(f"REDIS_TLS_VERIFY must not contradict REDIS_URL, which says ssl_cert_reqs={by_url}")
    required = (by_url or verify or "required") == "required"
    is_named = required and options.get("ssl_check_hostname") is not False
    found: dict[str, Any] = {"ssl_cert_reqs": "required" if required else "none", "ssl_check_hostname": is_named}
    if ca_file:
        if options.get("ssl_ca_certs", ca_file) != ca_file:
            raise BadSetting("REDIS_TLS_CA must not contradict REDIS_URL, which names another file as ssl_ca_certs")
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=ca_file)
        except OSError:  # ssl.SSLError is one
            raise BadSetting("REDIS_TLS_CA must be the path of a PEM file") from None
        found["ssl_ca_certs"] = ca_file
    return found


# --- Reading ids --------------------------------------------------------------------------------------------------


def algo_id_of(text: str) -> int:
    """A whole number as people type it.

    Raises:
        InvalidRequest: it is none, or starts with a zero as only a client's id would.
    """
    if not (text.isascii() and text.isdigit()) or len(text) > 19 or text.startswith("0"):
        raise InvalidRequest("algo_id", text, f"must be a whole number from 1 to {MAX_ALGO_ID}")
    return int(text)


def request_of(line: str, defaults: Mapping[str, Any]) -> CancelRequest | None:
    """The request of one line: digits are an algo id, a line that starts with { is a JSON object with fields of
    CancelRequest, anything else is a client algo id. None for a blank line and a # comment.

    Raises:
        InvalidRequest, MalformedMessage: the line is none of these.
    """
    word = line.strip()
    if not word or word.startswith("#"):
        return None
    if word.startswith("{"):
        fields = {"v": VERSION, **defaults, **loads(word, once=True)}
        on_trigger = fields.pop("on_trigger", OnTrigger.REPORT)  # stands beside the call, not in it
        return replace(decode_request(fields), on_trigger=on_trigger)
    if word.isdigit():
        return CancelRequest(algo_id=algo_id_of(word), **defaults)
    return CancelRequest(client_algo_id=word, **defaults)


def read_requests(file: BinaryIO, name: str, defaults: Mapping[str, Any]) -> list[CancelRequest]:
    """The requests of a file, in its order; ``defaults`` are the fields that its lines leave out.

    Raises:
        BadFile: lines break a rule, or there is no request in it.
    """
    requests: list[CancelRequest] = []
    faults: list[str] = []
    bad = 0
    for number, line in enumerate(_lines(file), 1):
        try:
            request = request_of(_decoded(line), defaults)
        except MessageError as error:
            bad += 1
            if bad <= SHOWN_BAD_LINES:
                faults.append(f"{name}:{number}: {_fault(line, error)}")
            continue
        if request is not None:
            requests.append(request)
    if bad > SHOWN_BAD_LINES:
        faults.append(f"{name}: {bad - SHOWN_BAD_LINES:,} more bad lines")
    if bad:
        raise BadFile("\n".join([*faults, "nothing was enqueued"]))
    if not requests:
        raise BadFile(f"{name}: there is no id in it; nothing was enqueued")
    return requests


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines, each cut one byte after the largest that is read: what is no text file must not fill the memory."""
    limit = MAX_PAYLOAD_BYTES + 1
    for line in iter(partial(file.readline, limit), b""):
        rest = line
        while len(rest) == limit and not rest.endswith(b"\n"):
            rest = file.readline(limit)
        yield line


def _decoded(line: bytes) -> str:
    if len(line) > MAX_PAYLOAD_BYTES:
        raise MalformedMessage(f"longer than {MAX_PAYLOAD_BYTES} bytes")
    try:
        return line.decode().removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise MalformedMessage("not UTF-8") from None


def _fault(line: bytes, error: MessageError) -> str:
    if isinstance(error, InvalidRequest):
        return str(error)  # names field and value
    return f"{clean_text(line[:400].decode('utf-8', 'replace'), 80)!r}: {error}"


# --- Waiting ------------------------------------------------------------------------------------------------------


def collect(
    client: CancelClient,
    wanted: Mapping[str, CancelRequest],
    timeout_s: float,
    ends: dict[str, End],
    progress: Callable[[int], None],
) -> None:
    """Look for what ends these requests until all have ended or the time is up, adding it to ``ends``.

    One loop for all ids. An error, Ctrl-C too, leaves in ``ends`` what had come before it.
    """
    ends_at = time.monotonic() + timeout_s
    pause_s = _FIRST_PAUSE_S
    gone_at = ends_at - timeout_s
    while True:
        began = time.monotonic()
        is_due = began >= gone_at  # to look for what nobody knows any more costs more than a look for outcomes
        gone_at = began + LOOK_S if is_due else gone_at
        pending = [job_id for job_id in wanted if job_id not in ends]
        found = client.converse(look(client.keys, pending, for_the_gone=is_due))
        ends |= {job_id: proven(end, wanted[job_id]) for job_id, end in found.items()}
        progress(sum(isinstance(end, Outcome) for end in ends.values()))
        looked = time.monotonic()
        if len(ends) == len(wanted) or looked >= ends_at:
            return
        # Whoever waits for very many must not keep the server busy with looking.
        pause_s = max(min(pause_s * 1.3, _LAST_PAUSE_S), 4 * (looked - began))
        time.sleep(min(pause_s, ends_at - looked))


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """A function that takes how many outcomes there are and shows it on stderr: a bar on a terminal if rich is
    installed, else a line every few seconds."""
    try:
        if not sys.stderr.isatty():
            raise ImportError
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield _plain(total)
        return
    columns = (TextColumn("outcomes"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.update(task, completed=done)


def _plain(total: int) -> Callable[[int], None]:
    began = shown = time.monotonic()

    def show(done: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= PROGRESS_S:
            shown = now
            print(f"{done:,} of {total:,} have an outcome after {now - began:.0f} s", file=sys.stderr, flush=True)  # noqa: T201

    return show


# --- Showing ------------------------------------------------------------------------------------------------------


def ticket_cells(ticket: TicketFields) -> tuple[str, ...]:
    """A ticket for people: id, order, account, what became of the enqueue."""
    request = ticket.request
    accepted = "joined an open request" if ticket.duplicate else "accepted"
    return (
        clean_text(ticket.id, 80),
        _order(request.algo_id, request.client_algo_id),
        f"account={request.account}",
        accepted,
    )


def record(outcome: Outcome) -> dict[str, object]:
    """An outcome for --json: its record, and what follows from it."""
    return {**outcome.as_dict(), "off_the_book": outcome.off_the_book}


def outcome_cells(outcome: Outcome) -> tuple[str, ...]:
    """An outcome for people: id, order, kind, whether the order may be live, what else is known."""
    live = {True: "MAY BE LIVE", False: "not live", None: "no order"}[outcome.may_be_live]
    details = []
    if outcome.orders is not None:
        details.append(f"{len(outcome.orders)} open on {outcome.symbol}, each with a request of its own")
    if outcome.left_alone:
        details.append(f"left alone: {', '.join(map(str, outcome.left_alone))}")
    details += _fate(outcome, f" {outcome.symbol}" if outcome.symbol else "")
    words = (outcome.id, _order(outcome.algo_id, outcome.client_algo_id), outcome.kind.value, live, ", ".join(details))
    return tuple(clean_text(word) for word in words)


def open_cells(order: OpenOrder) -> tuple[str, ...]:
    """The same of one of all open orders of a symbol."""
    live = "MAY BE LIVE" if order.may_be_live else "not live"
    words = (order.id, _order(order.algo_id, None), order.kind or "no outcome yet", live, ", ".join(_fate(order)))
    return tuple(clean_text(word) for word in words)


def _fate(end: Outcome | OpenOrder, symbol: str = "") -> Iterator[str]:
    if end.actual_order_id:
        yield f"now order {end.actual_order_id}{symbol}"
    if end.order_status:
        yield f"status {end.order_status}"
    if end.child_status:
        by = " by us" if end.child_cancelled else ""
        yield f"which is {end.child_status}{by}, executed {end.child_executed_qty or '?'}"
    if end.error:
        yield end.error


def open_lines(outcome: OpenOutcome) -> list[str]:
    """What became of all open orders of a symbol, for people: how many were seen, and a line for each."""
    count = len(outcome.orders)
    lines = [f"{clean_text(outcome.id, 80)}  {count} order{'' if count == 1 else 's'} seen"]
    if count or outcome.kind is not OutcomeKind.LISTED:
        lines[0] += f"  {outcome.kind or 'no outcome yet'}"
    if outcome.may_be_live:
        lines[0] += "  MAY BE LIVE"
    if outcome.error:
        lines.append(clean_text(outcome.error))
    if outcome.left_alone:
        named = ", ".join(map(str, outcome.left_alone))
        lines.append(f"left alone, as the clocks cannot tell whether they were open then: algo_id={named}")
    return lines + aligned([open_cells(order) for order in outcome.orders])


def missing_cells(job_id: str, order: CancelRequest | None, words: str, known: bool = True) -> tuple[str, ...]:
    """The same for a request that has no outcome (yet); ``known``: there is a job, hence an order."""
    named = "-" if order is None else _order(order.algo_id, order.client_algo_id)
    return clean_text(job_id), named, "-", "MAY BE LIVE" if known else "-", words


def streamed(cells: Sequence[str]) -> str:
    """Cells as one line, for those that come one by one and cannot know how wide the others are."""
    widths = (20, 32, 28, 17, 11)
    padded = (f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=False))
    return "  ".join([*padded, *cells[len(widths) :]]).rstrip()


def _order(algo_id: int | None, client_algo_id: str | None) -> str:
    if algo_id is not None:
        return f"algo_id={algo_id}"
    return "-" if client_algo_id is None else f"client_algo_id={client_algo_id}"
