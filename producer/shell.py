"""What the commands of the command line have in common: exit codes, help, errors, options, printing."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from typing import TypeVar

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


_EXIT_CODES = """\b
Exit codes:
  0    all orders are known to be off the book (cancelled, already_cancelled,
       expired, rejected); without --wait: all requests were accepted
  1    some are not known to be off the book (every failed kind; triggered,
       unless its child has ended with nothing executed), or an id is
       unknown; stronger than 3
  2    bad usage or input; nothing was done
  3    no outcome yet
  4    Redis cannot be reached, or refuses
  130  interrupted; what was accepted goes on
"""
_ENVIRONMENT = """\b
Environment: REDIS_URL, CANCEL_QUEUE; for rediss:// also
REDIS_TLS_VERIFY (required or none) and REDIS_TLS_CA (a PEM file).
"""


def epilog(*examples: str) -> str:
    lines = "\n".join(f"  {example}" for example in examples)
    return f"\b\nExamples:\n{lines}\n\n{_EXIT_CODES}\n{_ENVIRONMENT}"


class Failure(click.ClickException):
    """One line on stderr and an exit code."""

    def __init__(self, message: str, code: ExitCode) -> None:
        super().__init__(message)
        self.code = code


class InOrder(click.Command):
    """Remembers in which order its options were given, which click sorts by name."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, keeping the sequence of options under ``given``."""
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        ctx.meta["given"] = [parameter.name for parameter in given]
        return super().parse_args(ctx, args)


def seconds(_: click.Context, __: click.Parameter, value: float | None) -> float | None:
    if value is not None and (math.isnan(value) or value < 0):
        raise click.BadParameter("must be a number of seconds, 0 or more")
    return value


def print_line(line: str) -> None:
    print_lines([line])


def print_lines(lines: Iterable[str]) -> None:
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


def say(line: str) -> None:
    """A line on stderr, if that takes it."""
    try:
        click.echo(line, err=True)
    except OSError:
        silence(2)


def dumped(value: Mapping[str, object]) -> str:
    return json.dumps(value, separators=(",", ":"))  # in ASCII: whatever words stand in it cannot act on a terminal


def about_request(function: F) -> F:
    """The options of every command that asks for cancels."""
    found = (
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
        click.option(
            "--wait", type=float, metavar="S", callback=seconds, help="Wait up to S seconds for the outcomes."
        ),
    )
    decorated: Callable[..., object] = function
    for option in reversed(found):
        decorated = option(decorated)
    return decorated  # type: ignore[return-value]
