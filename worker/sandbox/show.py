"""What a person sees of a sandbox run: progress on stderr while it goes on, tables on stdout at its end.

rich draws both where it is installed; progress is drawn on a terminal alone, elsewhere it is a line now and then.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from producer.message import OutcomeKind
from worker.sandbox.report import Report, counts

if TYPE_CHECKING:
    from rich.console import Console

#: Time between two lines of progress, and between two pictures of it on a terminal, s.
_LINE_S = 2.0
_PICTURE_S = 0.2


class Screen:
    """Shows how a run goes on: as a live picture of rich's, or else in plain lines."""

    def __init__(self, live: Any = None) -> None:
        self._live = live
        self._task = live and live.add_task("starting", total=None, words="")
        self._began_s = time.monotonic()
        #: The state is worth being shown this often, s.
        self.every_s = _PICTURE_S if live else _LINE_S

    def say(self, what: str) -> None:
        """A step of the run began."""
        if self._live:
            self._live.update(self._task, description=what)
        else:
            note(f"{time.monotonic() - self._began_s:5.1f} s  {what}")

    def show(self, wanted: int, kinds: Mapping[OutcomeKind, int], requests: int, elapsed_s: float) -> None:
        """So many outcomes are wanted and so many there, after as many requests to the exchange; ``elapsed_s`` since
        the first was enqueued."""
        done = sum(kinds.values())
        words = f"{counts(dict(kinds))}; " if kinds else ""
        words += f"{requests} requests to the exchange, {done / elapsed_s if elapsed_s else 0:.0f} outcomes/s"
        if self._live:
            self._live.update(self._task, completed=done, total=wanted or None, words=words)
        else:
            self.say(f"{done} of {wanted} outcomes: {words}")


@contextmanager
def progress() -> Iterator[Screen]:
    """A live picture if stderr is a terminal and rich is there, else plain lines."""
    console = _console(stderr=True)
    if console is None or not console.is_terminal:
        yield Screen()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[words]}"),
    )
    with Progress(*columns, console=console, refresh_per_second=5) as live:
        yield Screen(live)


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
