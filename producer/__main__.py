"""``python -m producer``: cancel orders, look up outcomes, retry, and watch a queue, from a shell.

The only place of the package that reads the environment. It is built with click, which RQ brings.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
from rq.defaults import RQ_KEY_PREFIX
from rq.job import JobStatus

from producer import __version__, console
from producer.client import CancelClient
from producer.door import checked_ids, checked_position
from producer.keys import Keys
from producer.message import DEFAULT_QUEUE, CancelRequest, Outcome, check_queue_name
from producer.open_orders import WARNING, OpenOutcome
from producer.protocol import LedgerGap, NotDurable, QueueUnavailable, TicketFields, UnknownRequest, WaitTimeout
from producer.rights import acl_lines
from producer.shell import ExitCode, Failure, InOrder, about_request, dumped, epilog, print_line, print_lines, say
from producer.status import Status, aligned
from producer.streams import open_closed_streams, silence
from producer.untrusted import InvalidRequest, MalformedMessage, clean_text
from producer.waiting import look

#: RQ's status of a job whose outcome is still to come.
_OPEN = frozenset({JobStatus.QUEUED, JobStatus.SCHEDULED, JobStatus.STARTED})
_UNKNOWN = "unknown id"
_UNREADABLE = "its record cannot be read"
_NOT_YET = "no outcome yet"
#: Between two looks of --watch, s.
_WATCH_S = 1.0

C = TypeVar("C", bound=CancelClient)
F = TypeVar("F", bound=Callable[..., object])


def _common(function: F) -> F:
    """The options of every command that prints."""
    return _where(click.option("--json", "as_json", is_flag=True, help="One JSON object per line on stdout.")(function))


def _where(function: F) -> F:
    """The options that every command has."""
    shown: dict[str, Any] = {"show_default": True, "show_envvar": True}
    words = "A password on a command line is visible in ps: one with a password belongs into REDIS_URL."
    url: dict[str, Any] = {
        "envvar": "REDIS_URL",
        "default": "redis://localhost:6379/0",
        "metavar": "URL",
        "help": words,
    }
    queue = click.option("--queue", envvar="CANCEL_QUEUE", default=DEFAULT_QUEUE, metavar="Q", **shown)
    return click.option("--redis-url", **url, **shown)(queue(function))


def _client(redis_url: str, queue: str) -> contextlib.AbstractContextManager[CancelClient]:
    return _client_as(CancelClient, redis_url, queue)


@contextlib.contextmanager
def _client_as(kind: type[C], redis_url: str, queue: str) -> Iterator[C]:
    try:
        client = console.connect_as(
            kind, redis_url, queue, os.environ.get("REDIS_TLS_VERIFY", ""), os.environ.get("REDIS_TLS_CA", "")
        )
    except (console.BadSetting, InvalidRequest) as error:
        raise Failure(str(error), ExitCode.USAGE) from None
    with client:
        try:
            yield client
        except QueueUnavailable as error:
            raise Failure(str(error), ExitCode.UNREACHABLE) from None


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
@about_request
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
            say(str(error))
        if wait is not None:
            return _wait(client, tickets, wait, as_json)
    if as_json:
        print_lines(dumped(ticket.as_dict()) for ticket in tickets)
    else:
        print_lines(aligned([console.ticket_cells(ticket) for ticket in tickets]))
    return ExitCode.DONE if not_durable is None else ExitCode.NOT_OFF_THE_BOOK


def _requests(given: Sequence[str], options: Mapping[str, Any]) -> list[CancelRequest]:
    """What the command line asks for, in its order."""
    words = {name: iter(options[name]) for name in ("algo_id", "client_algo_id", "from_file")}
    defaults = {name: options[name] for name in ("account", "symbol", "tag", "urgent", "on_trigger")}
    defaults["deadline_s"] = options["deadline"]
    requests: list[CancelRequest] = []
    try:
        CancelRequest(algo_id=1, **defaults)  # a bad option is told once, not for each line of a file
        for name in given:
            if name == "algo_id":
                requests.append(CancelRequest(algo_id=console.algo_id_of(next(words[name])), **defaults))
            elif name == "client_algo_id":
                requests.append(CancelRequest(client_algo_id=next(words[name]), **defaults))
            elif name == "from_file":
                requests += _requests_of_file(next(words[name]), defaults)
    except (InvalidRequest, console.BadFile) as error:
        raise Failure(str(error), ExitCode.USAGE) from None
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
    job_ids = [ticket.id for ticket in tickets]
    found: dict[str, Outcome] = {}
    in_vain: Mapping[str, Exception] = {}
    rest = "waiting was broken off by an error; the request goes on"
    try:
        with console.progress(len(set(job_ids))) as shown:
            in_vain = console.collect(client, job_ids, timeout_s, found, shown)
        rest = _NOT_YET
    except KeyboardInterrupt:
        rest = "interrupted; the request goes on"
        say("interrupted; the requests go on")
        return ExitCode.INTERRUPTED
    finally:
        # However the waiting ended: without its id nobody could ask for an outcome later.
        words = {job_id: _why(in_vain[job_id]) if job_id in in_vain else rest for job_id in job_ids}
        if as_json:
            print_lines(_outcome_json(ticket.id, found, words[ticket.id]) for ticket in tickets)
        else:
            print_lines(aligned([_cells(ticket.id, found, ticket.request, words[ticket.id]) for ticket in tickets]))
    return _judged(job_ids, found, in_vain)


def _why(error: Exception) -> str:
    """Why there will be no outcome, in a few words; all of them go to stderr."""
    return _UNREADABLE if isinstance(error, MalformedMessage) else _UNKNOWN


def _judged(job_ids: Sequence[str], found: Mapping[str, Outcome], in_vain: Mapping[str, Exception]) -> ExitCode:
    for error in in_vain.values():
        say(str(error))
    if in_vain or any(not outcome.off_the_book for outcome in found.values()):
        return ExitCode.NOT_OFF_THE_BOOK
    return ExitCode.DONE if all(job_id in found for job_id in job_ids) else ExitCode.TIMED_OUT


def _outcome_json(job_id: str, found: Mapping[str, Outcome], why: str, **more: object) -> str:
    """The record, or that there is none; ``why`` is said unless it is only that it takes longer."""
    outcome = found.get(job_id)
    bare = {"id": job_id, "kind": None, **more} | ({} if why == _NOT_YET else {"error": why})
    return dumped(bare if outcome is None else outcome.as_dict())


def _words(status: str | None) -> str:
    """What is said of a request that has no record."""
    if status is None:
        return _UNKNOWN
    return f"{_NOT_YET}, {status}" if status in _OPEN else f"record has run out, {clean_text(status, 40)}"


def _cells(job_id: str, found: Mapping[str, Outcome], order: CancelRequest | None, words: str) -> tuple[str, ...]:
    if job_id in found:
        return console.outcome_cells(found[job_id])
    return console.missing_cells(job_id, order, words, known=words != _UNKNOWN)


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
@about_request
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

    Only --wait tells the final word, and looks once more for what the list lagged behind. Without it each order's own
    outcome tells: `outcome ID` of the printed id says how many orders were listed, its --json also their requests.
    """
    with _client(redis_url, queue) as client:
        try:
            ticket = client.cancel_open(**options, deadline_s=deadline)
        except InvalidRequest as error:
            raise Failure(str(error), ExitCode.USAGE) from None
        say(f"{clean_text(options['symbol'])}: {WARNING}")
        if wait is None:
            print_line(dumped(ticket.as_dict()) if as_json else clean_text(ticket.id))
            return ExitCode.DONE
        seen, code = OpenOutcome(ticket.id, None, True), ExitCode.INTERRUPTED
        try:
            seen = client.wait(ticket, wait)
            code = ExitCode.DONE if seen.off_the_book else ExitCode.NOT_OFF_THE_BOOK
        except WaitTimeout as error:
            seen = error.so_far or seen
            say(str(error))
            is_bad = any(order.kind is not None and not order.off_the_book for order in seen.orders)
            code = ExitCode.NOT_OFF_THE_BOOK if is_bad or seen.error else ExitCode.TIMED_OUT
        except KeyboardInterrupt:
            say("interrupted; the requests go on")
        except UnknownRequest as error:
            say(str(error))
            code = ExitCode.NOT_OFF_THE_BOOK
        finally:
            print_lines([dumped(seen.as_dict())] if as_json else console.open_lines(seen))
    return code


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

    Where there is no record --json prints {"id","kind":null,"status"} with RQ's status of the job, and "error" where
    it cannot be read. The exit code is 3 while the request is queued, scheduled or started, and 1 if its record
    cannot be read or has run out, or nobody knows the id.
    """
    try:
        checked_ids(ids)
    except InvalidRequest as error:
        raise Failure(str(error), ExitCode.USAGE) from None
    with _client(redis_url, queue) as client:
        # In this order: a request that ends in between is found.
        statuses = dict(zip(ids, client.statuses(ids), strict=True))
        ends = client.converse(look(client.keys, ids, for_the_gone=False))
    found = {job_id: end for job_id, end in ends.items() if isinstance(end, Outcome)}
    unreadable = {job_id: end for job_id, end in ends.items() if isinstance(end, Exception)}
    words = {job_id: _words(status) for job_id, status in statuses.items()} | dict.fromkeys(unreadable, _UNREADABLE)
    if as_json:
        faults = dict.fromkeys(unreadable, _UNREADABLE)
        lines = (_outcome_json(job_id, found, faults.get(job_id, _NOT_YET), status=statuses[job_id]) for job_id in ids)
        print_lines(lines)
    else:
        print_lines(aligned([_cells(job_id, found, None, words[job_id]) for job_id in ids]))
    judged = _judged(ids, found, unreadable)
    if any(job_id not in found and status not in _OPEN for job_id, status in statuses.items()):
        return ExitCode.NOT_OFF_THE_BOOK
    return judged


@cli.command(
    epilog=epilog(
        "python -m producer outcomes",
        "python -m producer outcomes --after '$' --follow",
        "python -m producer outcomes --after 1763797200000-0 --json | jq .kind",
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
    try:
        checked_position(after)
    except InvalidRequest as error:
        raise Failure(str(error), ExitCode.USAGE) from None
    with _client(redis_url, queue) as client:
        while True:
            try:
                for entry, ended in client.outcomes(after, follow=follow):
                    if as_json:
                        print_line(dumped({**ended.as_dict(), "entry": entry}))
                    else:
                        print_line(console.streamed((entry, *console.outcome_cells(ended))))
                return ExitCode.DONE
            except LedgerGap as gap:
                say(str(gap))
                after = gap.resume


# --- retry --------------------------------------------------------------------------------------------------------


@cli.command(
    short_help="Start new runs of requests that ended in a failed kind.",
    epilog=epilog(
        "python -m producer retry 4c7e0f1a3d5b4e6f8a9b0c1d2e3f4a5b",
        "python -m producer retry --failed",
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
            raise Failure(f"{error}; nothing was retried", ExitCode.USAGE) from None
    print_lines(dumped({"id": job_id}) if as_json else clean_text(job_id, 80) for job_id in started)
    if not started:
        say("there is nothing to retry")
    return ExitCode.DONE


# --- status -------------------------------------------------------------------------------------------------------


@cli.command(
    short_help="Show how a queue stands.",
    epilog=epilog("python -m producer status", "python -m producer status --watch --queue cancels"),
)
@click.option("--watch", is_flag=True, help="Look again every second until Ctrl-C; full-screen on a terminal.")
@_common
def status(redis_url: str, queue: str, as_json: bool, watch: bool) -> ExitCode:
    """Show the queue: what waits and for how long, what is in flight, gate, refused keys, outcomes, workers."""
    with _client(redis_url, queue) as client:
        seen = client.status()
        if not watch:
            print_lines([dumped(seen.as_dict())] if as_json else seen.lines())
            return ExitCode.DONE
        if not as_json and (full_screen := _full_screen()) is not None:
            full_screen(seen, client.status, str)
        while True:
            print_lines([dumped(seen.as_dict())] if as_json else [*seen.lines(), ""])
            seen = _next_look(client)


def _next_look(client: CancelClient) -> Status:
    while True:
        time.sleep(_WATCH_S)
        try:
            return client.status()
        except QueueUnavailable as error:
            # Whoever watches wants to see it come back.
            say(str(error))


def _full_screen() -> Callable[..., NoReturn] | None:
    """What shows a status on the whole terminal; None where stdout is none, or rich is not installed."""
    try:
        from producer import watch
    except ImportError:
        return None
    return watch.run if watch.usable() else None


# --- acl ----------------------------------------------------------------------------------------------------------


@cli.command(epilog=epilog("python -m producer acl", "python -m producer acl --queue desk-a | grep ' strategy '"))
@click.option("--redis-6", is_flag=True, help="For Redis 6.2, where nothing keeps a strategy from forging outcomes.")
@click.option("--queue", envvar="CANCEL_QUEUE", default=DEFAULT_QUEUE, metavar="Q", show_default=True, show_envvar=True)
def acl(queue: str, redis_6: bool) -> ExitCode:
    """Print users of Redis, each with no more rights than its part needs, as lines for redis-cli.

    They are for Redis 7 or later and Valkey. Put passwords in the place of the words in capitals. Asks no server.
    """
    try:
        print_lines(acl_lines(Keys(check_queue_name(queue), RQ_KEY_PREFIX), redis_6=redis_6))
    except InvalidRequest as error:
        raise Failure(str(error), ExitCode.USAGE) from None
    return ExitCode.DONE


# --- metrics ------------------------------------------------------------------------------------------------------


@cli.command(
    short_help="Serve Prometheus metrics of a queue.",
    epilog=epilog("python -m producer metrics", "python -m producer metrics --port 9464 --host 0.0.0.0"),
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=9464, show_default=True, help="Port to listen on; 0: any free one."
)
@click.option("--host", default="127.0.0.1", show_default=True, metavar="H", help="Address to listen on.")
@_where
def metrics(redis_url: str, queue: str, port: int, host: str) -> ExitCode:
    """Serve the queue's metrics for Prometheus until told to stop; one process for each queue.

    Everything is read from Redis when Prometheus asks. Outcomes and times are counted there, whatever is restarted;
    what only the ledger tells (accounts, attempts, replies) is counted from the first scrape on. While Redis does not
    answer, or refuses, cancel_up is 0. There is no login: whoever reaches the port reads the figures. Leaves with 0
    on SIGTERM.
    """
    try:
        from producer.metrics import LedgerClient, QueueCollector, Server
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "prometheus_client":
            raise
        raise Failure("metrics needs prometheus-client: pip install prometheus-client", ExitCode.USAGE) from None
    with _client_as(LedgerClient, redis_url, queue) as client:
        try:
            server = Server(QueueCollector(client), host, port)
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise Failure(f"cannot listen on {host} port {port}: {why}", ExitCode.USAGE) from None
        with server:
            server.start()
            print_line(f"metrics of queue {queue} on {server.url}")
            return ExitCode.INTERRUPTED if server.wait() else ExitCode.DONE


# --- web ----------------------------------------------------------------------------------------------------------


@cli.command(
    short_help="Serve a page about a queue for operators.",
    epilog=epilog(
        "python -m producer web",
        'export WEB_TOKEN=$(openssl rand -hex 16); echo "$WEB_TOKEN"',
        "python -m producer web --host 0.0.0.0",
    ),
)
@click.option("--host", default="127.0.0.1", show_default=True, metavar="H", help="Address to listen on.")
@click.option(
    "--port",
    envvar="PORT",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    show_envvar=True,
    help="Port to listen on; 0: any free one.",
)
@click.option("--public-read", is_flag=True, help="Let whoever reaches HOST read everything, without a login.")
@_where
def web(redis_url: str, queue: str, host: str, port: int, public_read: bool) -> ExitCode:
    """Serve pages about the queue: status, open requests, outcomes, failed requests, history, search, and retry.

    With WEB_TOKEN in the environment (16 characters or more, 8 of them different) every page asks for it, and
    failed requests can be retried. Without it nothing can be changed, and only this machine may read: another HOST than
    loopback is refused unless --public-read is given, and so is what a proxy forwards. Speaks HTTP: put TLS in front.
    Leaves with 0 on SIGTERM.
    """
    token = os.environ.get("WEB_TOKEN") or None
    try:
        from producer.web import access, app, serving
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("flask", "jinja2", "werkzeug", "itsdangerous", "waitress"):
            raise
        raise Failure("web needs Flask and waitress: pip install flask waitress", ExitCode.USAGE) from None
    try:
        access.check_start(host, token, public_read)
    except access.UnsafeStart as error:
        raise Failure(str(error), ExitCode.USAGE) from None
    local_names_only = token is None and not public_read
    with _client(redis_url, queue) as client:
        pages = app.create_app(client, token, local_names_only=local_names_only)
        mode = "read-only" if token is None else "login by WEB_TOKEN"
        try:
            interrupted = serving.serve(pages, host, port, lambda url: print_line(f"queue {queue} on {url} ({mode})"))
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise Failure(f"cannot listen on {host} port {port}: {why}", ExitCode.USAGE) from None
    return ExitCode.INTERRUPTED if interrupted else ExitCode.DONE


# --- the way out --------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (by default with the process' arguments); gives the exit code."""
    open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        return int(cli.main(arguments, prog_name="python -m producer", standalone_mode=False))
    except click.Abort:
        return ExitCode.INTERRUPTED
    except click.ClickException as error:
        try:
            error.show()
        except OSError:
            silence(2)
        return error.code if isinstance(error, Failure) else error.exit_code
    except MalformedMessage as error:
        say(f"Error: {error}")
        return ExitCode.NOT_OFF_THE_BOOK
    except OSError as error:
        # The reader has left (`| head`), or the help found no place; all other errors are told where they happen.
        silence(1)
        if not isinstance(error, BrokenPipeError):
            say(f"Error: {error.strerror or type(error).__name__}")
        return ExitCode.NOT_OFF_THE_BOOK


if __name__ == "__main__":
    sys.exit(main())
