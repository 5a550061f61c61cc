"""`python -m worker`: run a worker, check the set-up, or see it all work in the sandbox."""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":
    # What follows takes a second. Until there is a worker nobody loses anything by its end, and a signal that a process
    # with the id 1 does not handle would never be heard of again.
    for _number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(_number, lambda *_: os._exit(0))

import contextlib
import errno
import importlib.util
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

if (_at := getattr(importlib.util.find_spec("producer"), "origin", "")) and not Path(_at).samefile(
    Path(__file__).parent.parent / "producer" / "__init__.py"
):
    sys.exit(f"Error: here `producer` is {_at}, not this project's: start the worker in another directory")

from producer.streams import open_closed_streams, silence
from worker import log
from worker.settings import SETTINGS, QueuePlace, Settings, SettingsError, environment_for_readers, sandbox_server

T = TypeVar("T")

EX_OK = 0
EX_UNHEALTHY = 1
EX_UNAVAILABLE = 69  # sysexits.h
EX_CONFIG = 78


def _settings_table() -> str:
    """The settings for `--help`; click leaves a paragraph that begins with \b as it is."""
    width = max(len(setting.variable) for setting in SETTINGS)
    rows = (f"  {s.variable:<{width}}  {s.default or '-'}\n      {s.meaning}: {s.accepts}" for s in SETTINGS)
    return "\b\nSettings are environment variables, each with its default:\n" + "\n".join(rows)


_EPILOG = f"""
\b
Examples:
  python -m worker                          one worker, settings from the environment
  python -m worker --burst                  work off what is there, then leave
  python -m worker check                    is everything there, and are the keys accepted?
  python -m worker health                   for probes: 0 while a worker of this host is alive
  python -m worker rehearse                 place and cancel an order on the exchange's demo host, and show it
  python -m worker sandbox --faults all     see it work against a local exchange that misbehaves
  python -m worker sandbox --serve          keep it up for a strategy under development
  python -m worker metrics --port 9464      Prometheus metrics of the queue
  python -m worker web --port 8080          a page about the queue

\b
Exit codes: 0 stopped as asked; 1 (health) no worker is alive; 2 bad usage; 69 Redis refused the login or cannot be
used, or (check) something is unreachable; 70 a defect; 74 stdout takes nothing; 78 bad settings, or (check) a key is
refused; 130 left at once after a second Ctrl-C.

{_settings_table()}
"""


def _say(text: str, *, to_stderr: bool = False) -> None:
    """Print a line for people. Where nobody can get it the exit code still tells what it would have told."""
    try:
        click.echo(text, err=to_stderr)
    except OSError:
        silence(2 if to_stderr else 1)


def _told(read: Callable[[], T]) -> T:
    """What is read of the environment; where it is wrong, that is said, and the end is here."""
    try:
        return read()
    except SettingsError as error:
        for problem in error.problems:
            _say(f"error: {problem}", to_stderr=True)
        sys.exit(EX_CONFIG)


def _settings(queue: str | None = None, concurrency: str | None = None) -> Settings:
    settings = _told(lambda: Settings.from_env().overridden(queue=queue, concurrency=concurrency))
    log.configure(settings.log_level, settings.log_format)
    return settings


@click.group(
    invoke_without_command=True,
    epilog=_EPILOG,
    context_settings={"max_content_width": 118, "help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="algo-cancel-queue", prog_name="python -m worker", message="%(prog)s %(version)s")
@click.option("--queue", metavar="Q", help="Queue to serve, instead of CANCEL_QUEUE.")
@click.option("--concurrency", metavar="N", help="Requests in flight at the most, instead of WORKER_CONCURRENCY.")
@click.option("--burst", is_flag=True, help="Leave when queue, retries and leases are empty.")
@click.pass_context
def main(context: click.Context, /, queue: str | None, concurrency: str | None, burst: bool) -> None:
    """Sign and send the cancels on the queue, and record what became of each order, until told to stop."""
    if context.invoked_subcommand is not None:
        for number in (signal.SIGTERM, signal.SIGHUP):  # those commands end as others do
            signal.signal(number, signal.SIG_DFL)
        return
    settings = _settings(queue, concurrency)
    sys.exit(_work(settings, burst))


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """Keep a module that is not loaded yet from being loaded, by those who can do without it.

    requests guesses the encoding of a text with charset_normalizer, or warns that it cannot. Nothing here is ever
    guessed, and the tables for it would be a twelfth of a worker's memory.
    """
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # Python's own sign that there is no such module
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        del sys.modules[name]


def _work(settings: Settings, burst: bool) -> int:
    with _without("charset_normalizer"):
        from worker.runner import CancelWorker

    worker = CancelWorker([settings.queue], settings=settings)
    worker.work(burst=burst)
    return worker.exit_code


@main.command("check")
def check_command() -> None:
    """Rehearse what a worker needs: of the settings, of Redis, of the exchange, and of each account's key.

    Redis is asked on throwaway keys; a key is proven by a query for and a cancel of an order that cannot exist. No
    order is touched.

    \b
    Exit codes: 0 a worker can work (lines with `warn` want a look), 69 something cannot be reached or worked with,
    78 bad settings, or a key is refused.
    """
    settings = _settings()
    from worker.check import Fault, check

    exits = {Fault.UNREACHABLE: EX_UNAVAILABLE, Fault.SETTINGS: EX_CONFIG}
    marks = {Fault.NONE: "ok    ", Fault.WARNING: "warn  "}
    worst = EX_OK
    for finding in check(settings):
        _say(f"{marks.get(finding.fault, 'FAILED')}  {finding.what:<16}  {finding.said}")
        worst = max(worst, exits.get(finding.fault, EX_OK))
    sys.exit(worst)


@main.command("health")
@click.option("--queue", metavar="Q", help="Queue that the worker serves, instead of CANCEL_QUEUE.")
def health_command(queue: str | None) -> None:
    """Tell a probe whether a worker of this host is alive: it has beaten, and its loop moved, within 10 s.

    Needs REDIS_URL and CANCEL_QUEUE as the worker has them, and no key. Says nothing while one is.

    \b
    Exit codes: 0 one is alive, 1 none is, or Redis does not answer (one line says which), 78 bad settings.
    """
    from worker.health import why_unhealthy

    if (reason := why_unhealthy(_told(lambda: QueuePlace.from_env(queue)))) is not None:
        _say(reason)
        sys.exit(EX_UNHEALTHY)


_REHEARSE_EPILOG = """
\b
Examples:
  export REDIS_URL=redis://localhost:6379/0 BINANCE_API_KEY=... BINANCE_API_SECRET=...
  export BINANCE_BASE_URL=https://demo-fapi.binance.com     keys of the demo site
  python -m worker rehearse
  python -m worker rehearse --symbol ETHUSDT --json > rehearsal.json

\b
Exit codes: 0 passed, 1 failed, 2 bad usage, 69 something cannot be reached or worked with, 75 inconclusive: the demo
exchange dropped the order by itself or left it TRIGGERING, 78 bad settings, a refused key, or a host that is neither
demo nor loopback, 129 after SIGHUP, 130 after Ctrl-C, 143 after SIGTERM: the order is taken back first.
"""


@main.command("rehearse", epilog=_REHEARSE_EPILOG)
@click.option("--symbol", metavar="S", default="BTCUSDT", show_default=True, help="Symbol to place the order on.")
@click.option("--account", metavar="A", default="default", show_default=True, help="Account whose key is used.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout at the end, the rest on stderr.")
def rehearse_command(symbol: str, account: str, as_json: bool) -> None:
    """See a cancel work on the exchange's demo host: place a stop, cancel it through a queue, look whether it is gone.

    Places one reducing STOP_MARKET far from the market, as small as the symbol allows, cancels it through a queue and a
    worker of its own, and shows each request and answer without key and signature. Leaves neither orders nor keys in
    Redis behind; what a killed rehearsal has left on the symbol it cancels first. Goes to demo-fapi.binance.com,
    testnet.binancefuture.com and loopback, and nowhere else: nothing changes that.
    """
    if not symbol.isprintable() or not 1 <= len(symbol) <= 32:
        raise click.UsageError(f"--symbol {ascii(symbol)[:80]} names no symbol, as BTCUSDT does")
    settings = _told(Settings.from_env)
    from worker.rehearse import rehearse
    from worker.secrecy import keep_memory_private

    keep_memory_private()
    log.tell_warnings_on_stderr()
    for warning in settings.warnings:
        _say(f"warn {warning}", to_stderr=True)
    say = partial(_say, to_stderr=as_json)
    sys.exit(rehearse(settings, symbol.upper(), account, say=say, tell=_say if as_json else None))


@main.command("sandbox")
@click.option("--orders", type=click.IntRange(1, 20_000), default=200, show_default=True, help="Orders to cancel.")
@click.option("--workers", type=click.IntRange(1, 16), default=2, show_default=True, help="Worker processes.")
@click.option(
    "--concurrency", type=click.IntRange(1, 512), default=64, show_default=True, help="Requests in flight of each."
)
@click.option(
    "--faults",
    type=click.Choice(["none", "some", "all"]),
    default="some",
    show_default=True,
    help="What the exchange does wrong: nothing, the usual, or everything known.",
)
@click.option(
    "--seed",
    type=int,
    default=1,
    show_default=True,
    help="Same seed: the same orders, and faults drawn alike; counts differ a little.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, and nothing else there.")
@click.option(
    "--keep-logs", type=click.Path(file_okay=False, path_type=Path), help="Keep the workers' logs in this directory."
)
@click.option(
    "--serve", "stay", is_flag=True, help="Cancel nothing: stay up for a strategy of yours, and print where it all is."
)
@click.option("--port", type=click.IntRange(0, 65_535), help="With --serve: the exchange's port.  [default: any]")
@click.option("--redis-port", type=click.IntRange(0, 65_535), help="With --serve: Redis' port.  [default: any]")
def sandbox_command(stay: bool, port: int | None, redis_port: int | None, **options: Any) -> None:
    """See it all work: a Redis, an exchange that misbehaves, workers and a producer on this machine alone.

    Opens orders at the exchange, cancels all of them, and holds every outcome against the exchange's own book. Needs no
    setting and no key. With --serve it opens the orders and leaves the cancels to you, until Ctrl-C or SIGTERM; it
    prints where everything is, and an API key and secret for your own library, which are worth nothing elsewhere.
    It behaves as we read the exchange's documents: that a program agrees with it proves nothing of the exchange.

    \b
    With --serve, to POST to $BINANCE_BASE_URL/_sandbox/NAME (worker/docs/sandbox.md has all):
      orders  {"orders": [{"symbol": "BTCUSDT", "order_type": "STOP"}]}
      move    {"algo_id": N, "move": "trigger"}, also "cancel", "expire", "reject", and of the child of a
              triggered one "fill" ("quantity", "price") and "end_child" ("status"); lag: "child_after_ms"
      set     {"symbol": "BTCUSDT", "mark_price": "50000"}, {"hedge_mode": true}, {"latency_ms": 50}
      script  {"algo_id": N, "call": "cancel", "faults": ["drop_after"]}

    \b
    Examples:
      python -m worker sandbox --faults all --seed 7
      python -m worker sandbox --serve --faults none --orders 5 --port 8001 --redis-port 6380

    \b
    Exit codes: 0 all as in the book, 1 something is not, 2 bad usage, 69 a part did not start,
    129 after SIGHUP, 130 after Ctrl-C, 143 after SIGTERM;
    with --serve: 0 after SIGTERM, 69 a part did not start or ended, 129 after SIGHUP, 130 after Ctrl-C.
    """
    from worker.sandbox.stage import Options

    asked = Options(port=port or 0, redis_port=redis_port or 0, **options)
    if stay:
        from worker.sandbox.serve import serve

        sys.exit(serve(asked, *sandbox_server()))
    if port is not None or redis_port is not None:
        raise click.UsageError("--port and --redis-port need --serve")
    from worker.sandbox.run import run

    sys.exit(run(asked, *sandbox_server()))


def _hand_over(command: str, what: str) -> None:
    """A command that becomes `python -m producer COMMAND`: what only reads the queue runs without the worker's code and
    secrets."""

    @main.command(
        command,
        help=f"{what} (the same as `python -m producer {command}`).",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def become(arguments: tuple[str, ...]) -> None:
        words = [sys.executable, "-m", "producer", command, *arguments]
        os.execve(sys.executable, words, environment_for_readers())  # noqa: S606


_hand_over("metrics", "Serve Prometheus metrics of the queue")
_hand_over("web", "Serve the page for operators")


def start() -> None:
    """The command line, without a traceback for Ctrl-C, a closed stream, or a letter that a terminal lacks."""
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main(prog_name="python -m worker")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EBADF, errno.EIO) or error.filename is not None:
            raise  # it is no stream's
        silence(1)
        _say(f"error: stdout takes nothing: {error.strerror}", to_stderr=True)
        sys.exit(os.EX_IOERR)
    finally:
        try:
            sys.stdout.flush()
        except OSError:
            silence(1)


if __name__ == "__main__":
    start()
