"""What a person sees of a sandbox run: progress on stderr while it goes on, tables on stdout at its end.

rich draws both where it is installed; progress is drawn on a terminal alone, elsewhere it is a line now and then.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from producer.message import OutcomeKind
from worker.sandbox.report import Report, counts

if TYPE_CHECKING:
    from rich.console import Console

#: Time between two lines of progress, and between two pictures of it on a terminal, s.
_LINE_S = 2.0
_PICTURE_S = 0.2


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How far a run has got."""

    wanted: int = 0
    kinds: Mapping[OutcomeKind, int] = field(default_factory=dict)
    requests: int = 0  # that the exchange received
    elapsed_s: float = 0.0  # since the first request was enqueued

    def words(self) -> str:
        """All but the number of outcomes, in a few words."""
        rate = sum(self.kinds.values()) / self.elapsed_s if self.elapsed_s else 0.0
        kinds = f"{counts(dict(self.kinds))}; " if self.kinds else ""
        return f"{kinds}{self.requests} requests to the exchange, {rate:.0f} outcomes/s"


class Progress(Protocol):
    """Shows how a run goes on."""

    #: Snapshots are worth making this often, s.
    every_s: float

    def say(self, what: str) -> None:
        """A step of the run began."""

    def show(self, snapshot: Snapshot) -> None:
        """The present state."""


class _Lines:
    every_s = _LINE_S

    def __init__(self) -> None:
        self._began_s = time.monotonic()

    def say(self, what: str) -> None:
        note(f"{time.monotonic() - self._began_s:5.1f} s  {what}")

    def show(self, snapshot: Snapshot) -> None:
        self.say(f"{sum(snapshot.kinds.values())} of {snapshot.wanted} outcomes: {snapshot.words()}")


class _Live:
    every_s = _PICTURE_S

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=None, words="")

    def say(self, what: str) -> None:
        self._progress.update(self._task, description=what)

    def show(self, snapshot: Snapshot) -> None:
        done = sum(snapshot.kinds.values())
        self._progress.update(self._task, completed=done, total=snapshot.wanted or None, words=snapshot.words())


@contextmanager
def progress() -> Iterator[Progress]:
    """A live picture if stderr is a terminal and rich is there, else plain lines."""
    console = _console(stderr=True)
    if console is None or not console.is_terminal:
        yield _Lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[words]}"),
    )
    with RichProgress(*columns, console=console, refresh_per_second=5) as live:
        yield _Live(live)


def note(line: str) -> None:
    """A line for people, beside the report."""
    sys.stderr.write(f"sandbox: {line}\n")
    sys.stderr.flush()


@dataclass(frozen=True, slots=True)
class Table:
    """A part of the report."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def show(report: Report) -> None:
    """Print the report for people on stdout."""
    console = _console(stderr=False)
    for table in tables(report):
        if console is None or not console.is_terminal:
            sys.stdout.write(plain(table))
        else:
            _draw(console, table)
    if report.ok:
        sys.stdout.write(f"ok: all {len(report.outcomes)} outcomes are as the exchange's book says\n")
        return
    for line in [f"FAILED: {problem}" for problem in report.problems] + _history(report):
        sys.stdout.write(line + "\n")


def tables(report: Report) -> list[Table]:
    """The report's parts, in order."""
    kinds = [(kind.value, str(every), str(every - wrong), str(wrong)) for kind, (every, wrong) in report.kinds.items()]
    every, wrong = len(report.outcomes), sum(wrong for _, wrong in report.kinds.values())
    kinds.append(("all", str(every), str(every - wrong), str(wrong)))
    faults = sorted(report.stats.faults_injected.items(), key=lambda pair: (-pair[1], pair[0]))
    named = [f"{name} {count}" for name, count in faults]
    rows = [tuple([*named[i : i + 4], "", "", ""][:4]) for i in range(0, len(named), 4)]
    return [
        Table("Outcomes and the exchange's book", ("kind", "outcomes", "as in the book", "different"), kinds),
        Table("Figures", ("figure", "value"), _figures(report)),
        Table(f"Faults injected: {sum(report.stats.faults_injected.values())}", ("", "", "", ""), rows),
    ]


def _figures(report: Report) -> list[tuple[str, str]]:
    stats, attempts, latency = report.stats, report.attempts, report.latency_ms
    pauses = [f"{incident.fault} {incident.duration_ms} ms" for incident in stats.incidents]
    calls = [(f"requests {call}", counts(answers)) for call, answers in sorted(stats.requests.items())]
    return [
        ("orders / requests / jobs", f"{report.orders} / {report.requests} / {len(report.asked)}"),
        ("workers / in flight each", f"{report.workers} / {report.concurrency}"),
        ("faults / seed", f"{report.faults} / {report.seed}"),
        ("attempts in total / most / mean", f"{attempts['total']} / {attempts['max']} / {attempts['mean']}"),
        ("enqueued to first request, p50 / p99", _ms(latency["first_request"])),
        ("enqueued to outcome, p50 / p99", _ms(latency["outcome"])),
        *calls,
        ("pauses told by the exchange", ", ".join(pauses) or "none"),
        ("requests in pauses / late ones", f"{stats.requests_during_incidents} / {report.late_requests}"),
        ("peak used weight / in flight", f"{stats.peak_used_weight} / {stats.peak_in_flight}"),
        ("wall time", f"{report.wall_s:.1f} s"),
    ]


def _ms(of: Mapping[str, int | None]) -> str:
    return f"{of['p50']} / {of['p99']} ms"


def _history(report: Report) -> list[str]:
    lines = []
    for shown in report.offending:
        problems: Any = shown["problems"]
        outcomes: Any = shown["outcomes"]
        book: Any = shown["book"] or {}
        lines.append(f"order {shown['algo_id']}, request {shown['id'] or '-'}: {'; '.join(problems)}")
        lines.append(f"  book: {book.get('status')}, met {', '.join(book.get('faults', ())) or 'no fault'}")
        for outcome in outcomes:
            lines.append(f"  outcome {outcome['kind']} of run {outcome['run']} by {outcome['worker']}")
            for a in outcome["attempts"]:
                said = " ".join(str(part) for part in (a["http"], a["code"], a["msg"]) if part not in (None, ""))
                lines.append(f"    {a['n']:>2} at {a['at_ms']} {a['call']:<6} {a['ms']:>5} ms  {a['verdict']}: {said}")
    return lines


def plain(table: Table) -> str:
    """The table as text with aligned columns."""
    lines = [table.header, *table.rows] if any(table.header) else list(table.rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))] if lines else []
    text = "".join("  " + "  ".join(map(str.ljust, line, widths)).rstrip() + "\n" for line in lines)
    return f"{table.title}\n{text}\n"


def _draw(console: Console, table: Table) -> None:
    from rich import box
    from rich.table import Table as RichTable

    drawn = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, show_header=any(table.header))
    for i, name in enumerate(table.header):
        drawn.add_column(name, overflow="fold", justify="right" if i and name in ("outcomes", "different") else "left")
    for row in table.rows:
        drawn.add_row(*row)
    console.print(drawn, markup=False)


def _console(*, stderr: bool) -> Console | None:
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(stderr=stderr, highlight=False, markup=False)
