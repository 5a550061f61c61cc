"""What the commands of the command line have in common: exit codes, help, errors, options, printing."""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import json
import math
import os
import signal
import socket
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum
from types import FrameType
from typing import TypeVar
from urllib.parse import urlsplit

import click

from producer.message import DEFAULT_ACCOUNT, OnTrigger
from producer.streams import silence

F = TypeVar("F", bound=Callable[..., object])


class ExitCode(IntEnum):
    """What the shell is told."""

    DONE = 0  # every order is known to be off the book, or without --wait every request was accepted
    NOT_OFF_THE_BOOK = 1  # some order is not known to be off the book; stronger than TIMED_OUT
    USAGE = 2  # bad usage or input; nothing was done
    TIMED_OUT = 3  # no outcome yet; the requests go on
    UNREACHABLE = 4  # Redis did not answer, or refused
    INTERRUPTED = 130  # Ctrl-C; requests that were accepted go on


_USAGE = {ExitCode.USAGE: "bad usage or input; nothing was done"}
#: What the exit codes of a command mean: of one that asks Redis for nothing, of those that serve, of those that print
#: what they find, and of those that are about orders.
PRINTS = {ExitCode.DONE: "printed", **_USAGE}
SERVES = {ExitCode.DONE: "ended by SIGTERM", **_USAGE, ExitCode.INTERRUPTED: "ended by Ctrl-C"}
READS = {
    ExitCode.DONE: "done",
    **_USAGE,
    ExitCode.UNREACHABLE: "Redis cannot be reached, or refuses",
    ExitCode.INTERRUPTED: "interrupted",
}
ABOUT_ORDERS = READS | {
    ExitCode.DONE: "all orders are known to be off the book (cancelled, already_cancelled, expired, rejected); "
    "without --wait: all requests were accepted",
    ExitCode.NOT_OFF_THE_BOOK: "some are not known to be off the book (every failed kind; triggered, unless its child "
    "has ended with nothing executed), or an id is unknown; stronger than 3",
    ExitCode.TIMED_OUT: "no outcome yet",
    ExitCode.INTERRUPTED: "interrupted; what was accepted goes on",
}
_ENVIRONMENT = """\b
Environment: REDIS_URL, CANCEL_QUEUE; for rediss:// also
REDIS_TLS_VERIFY (required or none) and REDIS_TLS_CA (a PEM file).
"""


def epilog(*examples: str, codes: Mapping[ExitCode, str] = ABOUT_ORDERS) -> str:
    """The end of a command's help."""
    shown = [f"  {example}" for example in examples]
    told = [
        textwrap.fill(codes[code], 70, initial_indent=f"  {code:<5}", subsequent_indent=" " * 7)
        for code in sorted(codes)
    ]
    environment = "" if codes is PRINTS else _ENVIRONMENT
    return "\n".join(["\b", "Examples:", *shown, "", "\b", "Exit codes:", *told, "", environment])


class Failure(click.ClickException):
    """One line on stderr; nothing was done."""

    exit_code = ExitCode.USAGE


def need(words: str, *modules: str) -> None:
    """Say what to install where one of these is not there."""
    if not all(importlib.util.find_spec(module) for module in modules):
        raise Failure(words)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on ``host``."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def names_this_machine(authority: str) -> bool:
    """Whether a request's Host is a name that this machine has for itself, and not a stranger's that leads here."""
    try:
        return is_loopback(urlsplit(f"//{authority}").hostname or "")
    except ValueError:
        return False


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and the end of a terminal end the block as Ctrl-C does, so that what was accepted is told; then they end
    the process. A second one ends it at once."""
    came: list[int] = []

    def interrupt(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        came.append(number)
        raise KeyboardInterrupt

    heeded = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is signal.SIG_DFL]
    for number in heeded:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, signal.SIG_DFL)
        if came:
            os.kill(os.getpid(), came[0])


_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """A socket that listens on the first address of ``host``, and that address.

    From here on SIGTERM and SIGINT only end :func:`wait_for_end`, however often they come: in this thread, and in those
    that it starts later.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a server has nothing to tell: a closed terminal ends it at once
    bare = host.strip("[]")
    try:
        family, *_, where = socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        with contextlib.ExitStack() as failed:
            failed.callback(listener.close)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
            listener.listen()
            failed.pop_all()
    except OSError as error:
        raise Failure(f"cannot listen on {host} port {port}: {error.strerror or type(error).__name__}") from None
    return listener, f"http://{f'[{bare}]' if ':' in bare else bare}:{listener.getsockname()[1]}/"


def wait_for_end() -> bool:
    """Wait for one of them; whether it was SIGINT."""
    return signal.sigwait(_SIGNALS) == signal.SIGINT


class InOrder(click.Command):
    """Remembers in which order its options were given, which click sorts by name."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, keeping the sequence of options under ``given``."""
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        ctx.meta["given"] = [parameter.name for parameter in given]
        return super().parse_args(ctx, args)


def _seconds(_: click.Context, __: click.Parameter, value: float | None) -> float | None:
    if value is not None and (math.isnan(value) or value < 0):
        raise click.BadParameter("must be a number of seconds, 0 or more")
    return value


def print_lines(*lines: str) -> None:
    """Lines on stdout, at once: whoever reads them through a pipe acts on them.

    Where nobody can get them, as the disk is full, the exit code still tells what it would have told.

    Raises:
        BrokenPipeError: the reader has left.
    """
    try:
        sys.stdout.writelines(f"{line}\n" for line in lines)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        silence(1)
        say(f"Error: stdout takes nothing: {error.strerror}")


def say(line: object) -> None:
    """A line on stderr, if that takes it."""
    try:
        click.echo(line, err=True)
    except OSError:
        silence(2)


def dumped(value: Mapping[str, object]) -> str:
    """A line of --json."""
    return json.dumps(value, separators=(",", ":"))  # in ASCII: whatever words stand in it cannot act on a terminal


_ABOUT_REQUEST = (
    click.option("--account", default=DEFAULT_ACCOUNT, show_default=True, metavar="A"),
    click.option("--tag", metavar="T", help="Carried into the outcome."),
    click.option("--deadline", type=float, metavar="S", help="How long the cancel is worth pursuing, seconds."),
    click.option("--urgent", is_flag=True, help="Go before what waits already."),
    click.option(
        "--on-trigger",
        type=click.Choice([what.value for what in OnTrigger]),
        default=OnTrigger.REPORT.value,
        help="What to do where an order has triggered: report the order that it became, or cancel that, too. A "
        "triggered stop is your exit in progress; cancelling it leaves the position open. This is for entries.",
    ),
    click.option("--wait", type=float, metavar="S", callback=_seconds, help="Wait up to S seconds for the outcomes."),
)


def about_request(function: F) -> F:
    """The options of every command that asks for cancels."""
    for option in reversed(_ABOUT_REQUEST):
        function = option(function)
    return function
