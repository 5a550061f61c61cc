"""``python -m producer``: cancel orders, look up outcomes, retry, and watch a queue, from a shell.

The only place of the package that reads the environment. It is built with click, which RQ brings.
"""

from __future__ import annotations

import importlib.util
import io
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click
from rq.defaults import RQ_KEY_PREFIX
from rq.job import JobStatus

from producer import __version__, console, shell
from producer.client import CancelClient
from producer.door import checked_ids
from producer.keys import Keys
from producer.message import DEFAULT_QUEUE, CancelRequest, Outcome, OutcomeKind, check_queue_name
from producer.open_orders import WARNING, OpenOutcome, followed
from producer.protocol import LedgerGap, NotDurable, QueueUnavailable, TicketFields, UnknownRequest, WaitTimeout
from producer.rights import acl_lines
from producer.shell import ExitCode, Failure, InOrder, dumped, ended_by_signals, epilog, print_lines, say, stream_lines
from producer.status import Status, aligned
from producer.streams import open_closed_streams, silence
from producer.untrusted import InvalidRequest, MalformedMessage, clean_text
from producer.waiting import End, look

#: RQ's status of a job whose outcome is still to come.
_OPEN = frozenset({JobStatus.QUEUED, JobStatus.SCHEDULED, JobStatus.STARTED})
_UNKNOWN = "unknown id"
_UNREADABLE = "its record cannot be read"
_NOT_YET = "no outcome yet"
#: Between two looks of --watch, s.
_WATCH_S = 1.0
#: What a command ends with that lets one of these through; the text is what is said on stderr.
_ENDS: Mapping[type[Exception], ExitCode] = {
    InvalidRequest: ExitCode.USAGE,
    console.BadSetting: ExitCode.USAGE,
    console.BadFile: ExitCode.USAGE,
    QueueUnavailable: ExitCode.UNREACHABLE,
    MalformedMessage: ExitCode.NOT_OFF_THE_BOOK,
}


F = TypeVar("F", bound=Callable[..., object])
_SHOWN: dict[str, Any] = {"show_default": True, "show_envvar": True}
_WORDS = "A password on a command line is visible in ps: one with a password belongs into REDIS_URL."
_URL: dict[str, Any] = {"envvar": "REDIS_URL", "default": "redis://localhost:6379/0", "metavar": "URL", "help": _WORDS}
_of_queue = click.option("--queue", envvar="CANCEL_QUEUE", default=DEFAULT_QUEUE, metavar="Q", **_SHOWN)
_host = click.option("--host", default="127.0.0.1", show_default=True, metavar="H", help="Address to listen on.")


def _of_redis(function: F) -> F:
    """The options of every command that asks Redis."""
    return click.option("--redis-url", **_URL, **_SHOWN)(_of_queue(function))


def _common(function: F) -> F:
    """The options of every command that prints what it finds there."""
    return _of_redis(
        click.option("--json", "as_json", is_flag=True, help="One JSON object per line on stdout.")(function)
    )


def _port(default: int, **more: Any) -> Callable[[F], F]:
    words = "Port to listen on; 0: any free one."
    return click.option("--port", type=click.IntRange(0, 65535), default=default, show_default=True, help=words, **more)


def _client(redis_url: str, queue: str) -> CancelClient:
    verify, ca_file = (os.environ.get(name, "") for name in ("REDIS_TLS_VERIFY", "REDIS_TLS_CA"))
    return console.connect(redis_url, queue, verify, ca_file)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=epilog(
        "python -m producer cancel --algo-id 2146760 --wait 5",
        "python -m producer outcomes --follow --json",
        "python -m producer status --watch",
        "python -m producer COMMAND --help",
    ),
)
@click.version_option(__version__, prog_name="python -m producer", message="%(prog)s %(version)s")
def cli() -> None:
    """Ask for conditional orders to be cancelled, and learn what became of each."""
    found = importlib.util.find_spec("worker")
    place = None if found is None or found.origin is None else Path(found.origin)
    if place is not None and place.parent.parent != Path(__file__).parent.parent:
        say(f"Note: here `worker` is {place}, not this project's: start workers in another directory")


# --- cancel -------------------------------------------------------------------------------------------------------


@cli.command(
    cls=InOrder,
    epilog=epilog(
        "python -m producer cancel --algo-id 2146760",
        "python -m producer cancel --client-algo-id stop-17 --urgent --deadline 30 --wait 5",
        "python -m producer cancel --from-file ids.txt --account desk2 --wait 60 --json",
        "jq -c '{algo_id, symbol}' orders.json | python -m producer cancel --from-file -",
    ),
)
@click.option("--algo-id", multiple=True, metavar="ID", help="The exchange's id of an order; may be repeated.")
@click.option("--client-algo-id", multiple=True, metavar="ID", help="The client's id of an order; may be repeated.")
@click.option(
    "--from-file",
    multiple=True,
    metavar="F|-",
    help="A file, or - for stdin, with one order per line: digits (an algo id), a JSON object with fields of "
    "CancelRequest, or anything else as a client algo id. Blank lines and # comments are skipped. One bad line and "
    "nothing of it is enqueued; a file without an id is an error.",
)
@click.option("--symbol", metavar="S", help="Carried into the outcome.")
@shell.about_request
@click.option(
    "--durable",
    is_flag=True,
    help="Wait until the server's append-only file holds the requests. Where the server cannot confirm it: one line on "
    "stderr, and without --wait exit code 1; the requests stand.",
)
@_common
@click.pass_context
def cancel(
    ctx: click.Context, /, redis_url: str, queue: str, as_json: bool, wait: float | None, durable: bool, **options: Any
) -> ExitCode:
    """Enqueue cancels of orders, in the order given.

    The options about the request apply to all ids, and to each line of a file that does not say otherwise. Prints
    one line for each request: its ticket, or with --wait its outcome.
    """
    requests = _requests(ctx.meta["given"], options)
    with _client(redis_url, queue) as client:
        not_durable = None
        try:
            tickets: Sequence[TicketFields] = client.cancel_many(requests, durable=durable)
        except NotDurable as error:
            tickets, not_durable = error.tickets, error
            say(error)
        if wait is not None:
            return _wait(client, tickets, wait, as_json)
    code = ExitCode.DONE if not_durable is None else ExitCode.NOT_OFF_THE_BOOK
    return _show([_Told([console.ticket_cells(ticket)], ticket.as_dict(), code) for ticket in tickets], as_json)


def _requests(given: Sequence[str], options: Mapping[str, Any]) -> list[CancelRequest]:
    """What the command line asks for, in its order."""
    words = {name: iter(options[name]) for name in ("algo_id", "client_algo_id", "from_file")}
    defaults = {name: options[name] for name in ("account", "symbol", "tag", "urgent", "on_trigger")}
    defaults["deadline_s"] = options["deadline"]
    requests: list[CancelRequest] = []
    CancelRequest(algo_id=1, **defaults)  # a bad option is told once, not for each line of a file
    for name in given:
        if name == "algo_id":
            requests.append(CancelRequest(algo_id=console.algo_id_of(next(words[name])), **defaults))
        elif name == "client_algo_id":
            requests.append(CancelRequest(client_algo_id=next(words[name]), **defaults))
        elif name == "from_file":
            requests += _requests_of_file(next(words[name]), defaults)
    if not requests:
        raise click.UsageError("give --algo-id, --client-algo-id or --from-file")
    return requests


def _requests_of_file(name: str, defaults: Mapping[str, Any]) -> list[CancelRequest]:
    if name == "-":
        return console.read_requests(sys.stdin.buffer, "stdin", defaults)
    try:
        with Path(name).open("rb") as file:
            return console.read_requests(file, name, defaults)
    except OSError as error:
        raise console.BadFile(f"{name}: {error.strerror or type(error).__name__}; nothing was enqueued") from None


def _wait(client: CancelClient, tickets: Sequence[TicketFields], timeout_s: float, as_json: bool) -> ExitCode:
    wanted = {ticket.id: ticket.request for ticket in tickets}
    ends: dict[str, End] = {}
    rest, code = "waiting was broken off by an error; the request goes on", None
    try:
        with console.progress(len(wanted)) as shown:
            console.collect(client, wanted, timeout_s, ends, shown)
        rest = _NOT_YET
    except KeyboardInterrupt:
        rest, code = "interrupted; the request goes on", ExitCode.INTERRUPTED
        say("interrupted; the requests go on")
    finally:
        # However the waiting ended: without its id nobody could ask for an outcome later.
        told = [_told(job.id, ends.get(job.id), rest, ExitCode.TIMED_OUT, job.request) for job in tickets]
        judged = _show(told, as_json)
    for end in ends.values():
        if isinstance(end, Exception):
            say(end)
    return judged if code is None else code


# --- what is said of a request ------------------------------------------------------------------------------------


class _Told(NamedTuple):
    """What is said of one request: in rows for people, in --json, and by the exit code."""

    rows: Sequence[tuple[str, ...]]
    record: Mapping[str, object]
    code: ExitCode


def _show(told: Sequence[_Told], as_json: bool) -> ExitCode:
    """Print it; gives the exit code for all of them."""
    if as_json:
        print_lines(*(dumped(each.record) for each in told))
    else:
        print_lines(*aligned([row for each in told for row in each.rows]))
    codes = {each.code for each in told}
    return next((code for code in (ExitCode.NOT_OFF_THE_BOOK, ExitCode.TIMED_OUT) if code in codes), ExitCode.DONE)


def _told(
    job_id: str, end: End | None, words: str, code: ExitCode, order: CancelRequest | None = None, **more: object
) -> _Told:
    """``words`` and ``code`` are those of a request that has not ended, ``order`` and ``more`` what is known of it."""
    if isinstance(end, Outcome):
        code = ExitCode.DONE if end.off_the_book else ExitCode.NOT_OFF_THE_BOOK
        return _Told([console.outcome_cells(end)], console.record(end), code)
    if end is not None:  # all of why goes to stderr
        words, code = _UNREADABLE if isinstance(end, MalformedMessage) else _UNKNOWN, ExitCode.NOT_OFF_THE_BOOK
    record = {"id": job_id, "kind": None, **more}
    if not words.startswith(_NOT_YET):
        record["error"] = words
    return _Told([console.missing_cells(job_id, order, words, known=words != _UNKNOWN)], record, code)


def _told_by_status(job_id: str, end: End | None, status: str | None) -> _Told:
    """The same by RQ's status of a job that may have no record."""
    words, code = _UNKNOWN, ExitCode.NOT_OFF_THE_BOOK
    if status in _OPEN:
        words, code = f"{_NOT_YET}, {status}", ExitCode.TIMED_OUT
    elif status is not None:
        words = f"record has run out, {clean_text(status, 40)}"
    return _told(job_id, end, words, code, status=status)


def _followed(listing: Outcome, seen: OpenOutcome) -> _Told:
    """A listing and, below it, the orders that it named."""
    record = console.record(listing) | {"orders": seen.as_dict()["orders"]}
    code = _open_code(seen)
    if code is ExitCode.DONE:
        say(f"{listing.id}: all that was listed is off the book; a list may lag: `cancel-open --wait` looks once more")
        code = ExitCode.NOT_OFF_THE_BOOK
    return _Told([console.outcome_cells(listing), *map(console.open_cells, seen.orders)], record, code)


def _open_code(seen: OpenOutcome) -> ExitCode:
    if seen.off_the_book:
        return ExitCode.DONE
    is_bad = seen.error or seen.left_alone or any(order.kind and not order.off_the_book for order in seen.orders)
    return ExitCode.NOT_OFF_THE_BOOK if is_bad or seen.kind is not None else ExitCode.TIMED_OUT


# --- cancel-open --------------------------------------------------------------------------------------------------


@cli.command(
    "cancel-open",
    short_help="Enqueue cancels of all open conditional orders of a symbol.",
    epilog=epilog(
        "python -m producer cancel-open --symbol BTCUSDT --wait 10",
        "python -m producer cancel-open --symbol BTCUSDT --account desk2 --urgent --deadline 60 --wait 60 --json",
    ),
)
@click.option("--symbol", required=True, metavar="S", help="The symbol, as BTCUSDT.")
@shell.about_request
@_common
def cancel_open(
    redis_url: str, queue: str, as_json: bool, wait: float | None, deadline: float | None, **options: Any
) -> ExitCode:
    """Enqueue cancels of all conditional orders of a symbol that are open now.

    THIS REMOVES PROTECTION; POSITIONS AND NORMAL ORDERS STAY. A worker lists the orders and makes a request for each;
    orders opened later, other symbols and other accounts are left alone. Prints the id of the request or, with --wait,
    a line for each order; --json prints one object, whose kind is that of the worst of them. Where no order was seen
    the exit code is 0. An order of which the clocks cannot tell whether it was open is left alone and named: then the
    kind is unknown, and the exit code 1.

    Only --wait tells the final word, and looks once more for what the list lagged behind. Without it `outcome ID` of
    the printed id says which orders were listed, and what has become of each.
    """
    with _client(redis_url, queue) as client:
        ticket = client.cancel_open(**options, deadline_s=deadline)
        say(f"{clean_text(options['symbol'])}: {WARNING}")
        if wait is None:
            print_lines(dumped(ticket.as_dict()) if as_json else clean_text(ticket.id))
            return ExitCode.DONE
        seen, code = OpenOutcome(ticket.id, None, True), None
        try:
            seen = client.wait(ticket, wait)
        except WaitTimeout as error:
            seen = error.so_far or seen
            say(error)
        except KeyboardInterrupt:
            code = ExitCode.INTERRUPTED
            say("interrupted; the requests go on")
        except UnknownRequest as error:
            code = ExitCode.NOT_OFF_THE_BOOK
            say(error)
        finally:
            print_lines(*([dumped(seen.as_dict())] if as_json else console.open_lines(seen)))
    return _open_code(seen) if code is None else code


# --- outcome, outcomes --------------------------------------------------------------------------------------------


@cli.command(
    epilog=epilog(
        "python -m producer outcome 4c7e0f1a3d5b4e6f8a9b0c1d2e3f4a5b",
        "python -m producer outcome ID1 ID2 --json",
    )
)
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@_common
def outcome(redis_url: str, queue: str, as_json: bool, ids: tuple[str, ...]) -> ExitCode:
    """Show what became of requests, in the order given.

    Of a request for all open orders of a symbol it shows each order that was listed. As a list may lag behind, that is
    never the final word: the exit code is 3 while one of them is open, else 1 (`cancel-open --wait` looks once more).
    Where there is no record --json prints {"id","kind":null,"status"} with RQ's status of the job, and "error" where
    none will come. The exit code is 3 while the request is queued, scheduled or started, and 1 if its record
    cannot be read or has run out, or nobody knows the id.
    """
    checked_ids(ids)
    with _client(redis_url, queue) as client:
        # In this order: a request that ends in between is found.
        statuses = client.statuses(ids)
        ends = client.converse(look(client.keys, ids, for_the_gone=False))
        told = {each: _told_by_status(each, ends.get(each), status) for each, status in zip(ids, statuses, strict=True)}
        for job_id, end in ends.items():
            try:
                if isinstance(end, Outcome) and end.kind is OutcomeKind.LISTED:
                    of_orders = look(client.keys, [order.id for order in end.orders or ()])
                    told[job_id] = _followed(end, followed(end, client.converse(of_orders)))
                elif isinstance(end, Exception):
                    say(end)
            except MalformedMessage as error:  # it costs itself alone
                told[job_id] = _told_by_status(job_id, error, None)
                say(error)
    return _show([told[job_id] for job_id in ids], as_json)


@cli.command(
    epilog=epilog(
        "python -m producer outcomes",
        "python -m producer outcomes --after '$' --follow",
        "python -m producer outcomes --after 1763797200000-0 --json | jq .kind",
        codes=shell.READS,
    )
)
@click.option(
    "--after",
    default="0-0",
    show_default=True,
    metavar="STREAM-ID",
    help="Begin after this entry; $ is the newest one.",
)
@click.option("--follow", is_flag=True, help="Go on with new ones as they come.")
@_common
def outcomes(redis_url: str, queue: str, as_json: bool, after: str, follow: bool) -> ExitCode:
    """List the ledger: one line for each outcome, oldest first.

    --json prints the outcome's record with its stream id as "entry", to go on --after it. An entry
    that cannot be read is passed over and named on stderr, and so are entries that were trimmed before
    they were read. Exits with 0.
    """
    with _client(redis_url, queue) as client:
        while True:
            try:
                for entry, ended in client.outcomes(after, follow=follow):
                    line = console.streamed((entry, *console.outcome_cells(ended)))
                    stream_lines(dumped(console.record(ended) | {"entry": entry}) if as_json else line)
                return ExitCode.DONE
            except LedgerGap as gap:
                say(gap)
                after = gap.resume


# --- retry --------------------------------------------------------------------------------------------------------


@cli.command(
    short_help="Start new runs of requests that ended in a failed kind.",
    epilog=epilog(
        "python -m producer retry 4c7e0f1a3d5b4e6f8a9b0c1d2e3f4a5b",
        "python -m producer retry --failed",
        codes=shell.READS,
    ),
)
@click.argument("ids", metavar="[ID...]", nargs=-1)
@click.option("--failed", is_flag=True, help="All that ended in a failed kind.")
@_common
def retry(redis_url: str, queue: str, as_json: bool, ids: tuple[str, ...], failed: bool) -> ExitCode:
    """Start a new run, with a new deadline, of requests that ended in a failed kind, and print their ids.

    An id that is not among the failed ones is an error (2), and none is retried then.
    """
    if bool(ids) == failed:
        raise click.UsageError("give ids or --failed, and not both" if ids else "give ids or --failed")
    with _client(redis_url, queue) as client:
        try:
            started = client.retry(client.failed_ids() if failed else ids, missing_ok=failed)
        except UnknownRequest as error:
            raise Failure(f"{error}; nothing was retried") from None
    print_lines(*(dumped({"id": job_id}) if as_json else clean_text(job_id, 80) for job_id in started))
    if not started:
        say("there is nothing to retry")
    return ExitCode.DONE


# --- status -------------------------------------------------------------------------------------------------------


@cli.command(
    short_help="Show how a queue stands.",
    epilog=epilog("python -m producer status", "python -m producer status --watch --queue cancels", codes=shell.READS),
)
@click.option("--watch", is_flag=True, help="Look again every second until Ctrl-C; full-screen on a terminal.")
@_common
def status(redis_url: str, queue: str, as_json: bool, watch: bool) -> ExitCode:
    """Show the queue: what waits and for how long, what is in flight, gate, refused keys, outcomes, workers."""
    with _client(redis_url, queue) as client:
        seen = client.status()
        if watch and not as_json and importlib.util.find_spec("rich") is not None:
            from producer import watch as view

            if view.usable():
                view.run(seen, client.status)
        show = stream_lines if watch else print_lines
        show(*([dumped(seen.as_dict())] if as_json else seen.lines()))
        while watch:
            seen = _next_look(client)
            show(*([dumped(seen.as_dict())] if as_json else ["", *seen.lines()]))
    return ExitCode.DONE


def _next_look(client: CancelClient) -> Status:
    while True:
        time.sleep(_WATCH_S)
        try:
            return client.status()
        except QueueUnavailable as error:
            say(error)  # whoever watches wants to see it come back


# --- acl ----------------------------------------------------------------------------------------------------------


@cli.command(
    epilog=epilog(
        "python -m producer acl", "python -m producer acl --queue desk-a | grep ' strategy '", codes=shell.PRINTS
    )
)
@click.option("--redis-6", is_flag=True, help="For Redis 6.2, where nothing keeps a strategy from forging outcomes.")
@_of_queue
def acl(queue: str, redis_6: bool) -> ExitCode:
    """Print users of Redis, each with no more rights than its part needs, as lines for redis-cli.

    They are for Redis 7 or later and Valkey. Put passwords in the place of the words in capitals. Asks no server.
    """
    print_lines(*acl_lines(Keys(check_queue_name(queue), RQ_KEY_PREFIX), redis_6=redis_6))
    return ExitCode.DONE


# --- metrics ------------------------------------------------------------------------------------------------------


@cli.command(
    short_help="Serve Prometheus metrics of a queue.",
    epilog=epilog(
        "python -m producer metrics", "python -m producer metrics --port 9464 --host 0.0.0.0", codes=shell.SERVES
    ),
)
@_port(9464)
@_host
@_of_redis
def metrics(redis_url: str, queue: str, port: int, host: str) -> ExitCode:
    """Serve the queue's metrics for Prometheus until told to stop; one process for each queue.

    Everything is read from Redis when Prometheus asks. Outcomes and times are counted there, whatever is restarted;
    what only the ledger tells (accounts, attempts, replies) is counted from the first scrape on. While Redis does not
    answer, or refuses, cancel_up is 0. There is no login: whoever reaches the port reads the figures. On loopback only
    requests for this machine are answered (Host: localhost, 127.0.0.1 or [::1]; let a proxy send one of them).
    """
    shell.need("metrics needs prometheus-client: pip install prometheus-client", "prometheus_client")
    from producer.metrics import serve

    with _client(redis_url, queue) as client:
        listener, url = shell.listen(host, port)
        print_lines(f"metrics of queue {queue} on {url}metrics")
        is_interrupted = serve(client, listener, local_names_only=shell.is_loopback(host))
        return ExitCode.INTERRUPTED if is_interrupted else ExitCode.DONE


# --- web ----------------------------------------------------------------------------------------------------------


@cli.command(
    short_help="Serve a page about a queue for operators.",
    epilog=epilog(
        "python -m producer web",
        'export WEB_TOKEN=$(openssl rand -hex 16); echo "$WEB_TOKEN"',
        "python -m producer web --host 0.0.0.0",
        codes=shell.SERVES,
    ),
)
@_host
@_port(8080, envvar="PORT", show_envvar=True)
@click.option("--public-read", is_flag=True, help="Let whoever reaches HOST read everything, without a login.")
@_of_redis
def web(redis_url: str, queue: str, host: str, port: int, public_read: bool) -> ExitCode:
    """Serve pages about the queue: status, open requests, outcomes, failed requests, history, search, and retry.

    With WEB_TOKEN in the environment (16 characters or more, 8 of them different) every page asks for it, and
    failed requests can be retried. Without it nothing can be changed, and only this machine may read: another HOST than
    loopback is refused unless --public-read is given, and so is what a proxy forwards. Speaks HTTP: put TLS in front.
    """
    shell.need("web needs Flask and waitress: pip install flask waitress", "flask", "waitress")
    from producer.web.access import check_start
    from producer.web.app import create_app
    from producer.web.serving import serve

    token = os.environ.get("WEB_TOKEN") or None
    check_start(host, token, public_read)
    with _client(redis_url, queue) as client:
        pages = create_app(client, token, local_names_only=token is None and not public_read)
        listener, url = shell.listen(host, port)
        print_lines(f"queue {queue} on {url} ({'read-only' if token is None else 'login by WEB_TOKEN'})")
        return ExitCode.INTERRUPTED if serve(pages, listener) else ExitCode.DONE


# --- the way out --------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (by default with the process' arguments); gives the exit code."""
    open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    with ended_by_signals():
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        return int(cli.main(arguments, prog_name="python -m producer", standalone_mode=False))
    except click.Abort:
        return ExitCode.INTERRUPTED
    except click.ClickException as error:
        try:
            error.show()
        except OSError:
            silence(2)
        return error.exit_code
    except tuple(_ENDS) as error:
        say(f"Error: {error}")
        return next(code for kind, code in _ENDS.items() if isinstance(error, kind))
    except OSError as error:
        # The reader has left (`| head`), or the help found no place; all other errors are told where they happen.
        silence(1)
        if not isinstance(error, BrokenPipeError):
            say(f"Error: {error.strerror or type(error).__name__}")
        return ExitCode.NOT_OFF_THE_BOOK


if __name__ == "__main__":
    sys.exit(main())
