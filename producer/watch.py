"""The status as a full-screen view that is drawn anew each second; needs rich.

What decides whether cancels go out comes first and is never crowded out: gate, queue latency, refused keys. The rows of
the workers take what is left of the screen. Nothing that came from Redis is read as markup.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import NoReturn

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from producer.message import OutcomeKind
from producer.protocol import QueueUnavailable
from producer.status import MAX_ENTRIES, Status, shown, span, weight
from producer.workers import WORKER_COLUMNS, worker_cells

#: Between two looks, and between two looks at the size of the terminal, s.
_LOOK_EVERY_S = 1.0
_RESIZE_EVERY_S = 0.1
#: From this height on, lines, blank lines keep the parts apart.
_AIRY = 20
_LABEL_CELLS = 15
#: Longest name of a gate or account, and longest words about it, characters; a wide character takes two cells.
_MAX_LABEL_NAME = 20
_MAX_SAID = 400
#: Narrowest column of workers' names, and the columns beside it in the order in which a wider terminal gets them.
_NAME_CELLS = 20
_BY_NEED = ("in flight", "state", "failed", "heartbeat", "ok", "weight", "clock", "pid", "host")

_ALARM = "bold red"
_FAILED_KINDS = frozenset(kind.value for kind in OutcomeKind if kind.failed) | {"unreadable"}


def page(status: Status, width: int, height: int, stale: str | None = None) -> RenderableType:
    """The view of a status on a terminal of this size: at most ``height`` lines, none wider than ``width`` cells.

    ``stale`` says why the status is not of now, and how old it is.
    """
    head = [_headline(status, width)]
    if stale is not None:
        head.append(Text(shown(stale, 4 * width), style="reverse red"))
    gap = [Text()] if height >= _AIRY else []
    figures = _figures(status, width)
    # Two lines are kept for the workers: their head, and that there are some.
    room = height - len(head) - len(figures) - 3 * len(gap) - 2
    lines = [*head, *gap, *_alarms(status, room), *gap, *figures, *gap]
    lines += _workers(status, width, height - len(lines))
    for line in lines:
        line.truncate(width, overflow="ellipsis")
        line.no_wrap = True
    return Group(*lines[:height])


def _headline(status: Status, width: int) -> Text:
    at = datetime.fromtimestamp(status.at_ms / 1000, UTC).strftime("%H:%M:%S UTC")
    right = f"{at}  Ctrl-C leaves"
    left = Text(f"queue {shown(status.queue)}", style="bold")
    left.truncate(max(1, width - len(right) - 2), overflow="ellipsis")
    return Text.assemble(left, " " * (width - left.cell_len - len(right)), (right, "dim"))


def _alarms(status: Status, room: int) -> list[Text]:
    """Gates, queue latency and refused keys in at most ``room`` lines, but one gate and one key at any rate."""
    closed = [gate for gate in status.gates if not gate.open]
    gates = [_named("gate", gate.scope, str(gate), _ALARM) for gate in closed]
    # An open gate is news only where no other is closed.
    gates = gates or [_named("gate", gate.scope, str(gate), "") for gate in status.gates[:1]]
    keys = [_named("key", key.account, str(key), _ALARM if key.open else "red") for key in status.keys]
    latency = [_latency(status)]
    if status.suspended:
        latency.append(_line("suspended", ("nothing is claimed until `rq resume`", _ALARM)))
    if status.unattended:
        latency.append(_line("workers", ("No live worker, and work is waiting", _ALARM)))
    latency += [_line("damaged", (f"{key} is of the wrong type", _ALARM)) for key in status.damaged[:1]]
    if len(status.damaged) > 1:
        latency[-1].append(f", and {len(status.damaged) - 1:,} more")
    room -= len(latency)
    for_keys = max(1, room - len(gates), room // 2)
    for_gates = max(1, room - min(for_keys, len(keys)))
    return [*_cut(gates, for_gates, "gates"), *latency, *_cut(keys, for_keys, "keys")]


def _latency(status: Status) -> Text:
    if status.gated_s is not None:
        return _line("queue latency", (f"held back for {status.gated_s:.1f} s", _ALARM), f", {status.queued:,} queued")
    if not status.queued and status.oldest_s is None:
        return _line("queue latency", ("nothing waits", "dim"))
    oldest = "-" if status.oldest_s is None else f"{status.oldest_s:.1f} s"
    return _line("queue latency", (oldest, "bold"), f", {status.queued:,} queued")


def _cut(lines: Sequence[Text], room: int, what: str) -> list[Text]:
    """The first lines; the last place says how many more there are, unless it is the only one."""
    if len(lines) <= room:
        return list(lines)
    if room == 1:
        return [Text.assemble(f"(1 of {len(lines):,}) ", lines[0])]
    return [*lines[: room - 1], Text(f"... and {len(lines) - room + 1:,} more {what}", style="red")]


def _figures(status: Status, width: int) -> list[Text]:
    counts = [_count(status.in_flight, "in flight"), _count(status.scheduled, "scheduled")]
    if status.to_be_taken_over:
        counts.insert(1, _count(status.to_be_taken_over, "to be taken over", "red"))
    counts.append(_count(status.failed, "failed", "red"))
    kinds = [_count(n, shown(kind), "red" if kind in _FAILED_KINDS else "") for kind, n in status.outcomes.items()]
    if status.outcomes_partial:
        kinds.append(Text(f"of the newest {MAX_ENTRIES:,}", style="dim"))
    used = Text(weight(status.used_weight, status.weight_limit), style="" if status.used_weight else "dim")
    first, ended = (
        Text("-", style="dim") if each.p50 is None else Text(f"p50 / p99 {each} after the enqueue")
        for each in (status.enqueue_to_first_attempt, status.enqueue_to_outcome)
    )
    return [
        *_flow("jobs", counts, width),
        *_flow("last minute", kinds or [Text("no outcomes", style="dim")], width),
        _line("first attempt", first),
        _line("outcome", ended),
        _line("used weight", used),
    ]


def _count(count: int, what: str, style: str = "") -> Text:
    return Text(f"{count:,} {what}", style=style if count else "dim")


def _line(label: str, *parts: str | Text | tuple[str, str]) -> Text:
    return Text.assemble((f"{label:<{_LABEL_CELLS - 2}}  ", ""), *parts)


def _named(kind: str, name: str, said: str, style: str) -> Text:
    """A line about one of several; a long name may not hide what is said of it."""
    return _line(f"{kind} {shown(name, _MAX_LABEL_NAME)}", (shown(said, _MAX_SAID), style))


def _flow(label: str, parts: Iterable[Text], width: int) -> list[Text]:
    """Parts side by side on as many lines as they need."""
    lines = [_line(label)]
    for part in parts:
        is_first = lines[-1].cell_len <= _LABEL_CELLS
        if not is_first and lines[-1].cell_len + 2 + part.cell_len > width:
            lines.append(_line(""))
            is_first = True
        lines[-1] = Text.assemble(lines[-1], "" if is_first else ", ", part)
    return lines


def _workers(status: Status, width: int, room: int) -> list[Text]:
    """The table of the workers in at most ``room`` lines, with the columns that fit."""
    if not status.workers:
        return [_line("workers", ("none", _ALARM if status.unattended else "dim"))][: max(0, room)]
    # Where not all have room, those that work are shown.
    workers = sorted(status.workers, key=lambda row: not row.live)
    rows = [dict(zip(WORKER_COLUMNS, map(shown, worker_cells(row)), strict=True)) for row in workers]
    count = len(rows)
    silent = count - status.live_workers
    head = f"{count:,} workers" + (f", {silent:,} silent" if silent else "")
    fitting = max(0, room - 1)
    if count > fitting:
        rows = rows[: max(0, fitting - 1)]
    widths = _widths(rows, width)
    lines = [_row({name: name for name in widths} | {"name": head}, widths, "dim")]
    lines += [_row(row, widths, "" if worker.live else "dim") for row, worker in zip(rows, workers, strict=False)]
    if len(rows) < count:
        lines.append(Text(f"... and {count - len(rows):,} more" if rows else head, style="dim"))
    # Where only one line is left, how many there are says more than a head without rows.
    return lines[: max(0, room)] if rows else lines[-1:][: max(0, room)]


def _widths(rows: Sequence[dict[str, str]], width: int) -> dict[str, int]:
    """Cells of each column shown, in the order of :data:`WORKER_COLUMNS`."""
    natural = {name: max(map(cell_len, (name, *(row[name] for row in rows)))) for name in WORKER_COLUMNS}
    left = width - min(_NAME_CELLS, natural["name"])
    chosen = {"name"}
    for name in _BY_NEED:
        if left < natural[name] + 2:
            break
        left -= natural[name] + 2
        chosen.add(name)
    natural["name"] = max(min(natural["name"], _NAME_CELLS) + left, 1)
    longest = max((cell_len(row["name"]) for row in rows), default=0)
    natural["name"] = min(natural["name"], max(longest, _NAME_CELLS))
    return {name: natural[name] for name in WORKER_COLUMNS if name in chosen}


def _row(cells: dict[str, str], widths: dict[str, int], style: str = "") -> Text:
    line = Text(style=style)
    for name, cells_wide in widths.items():
        cell = Text(cells[name])
        if name == "failed" and cells[name] not in ("0", "failed"):
            cell.stylize("red")
        cell.truncate(cells_wide, overflow="ellipsis", pad=True)
        line.append_text(cell)
        line.append("  ")
    line.rstrip()
    return line


# --- The loop -----------------------------------------------------------------------------------------------------


def usable() -> bool:
    """Whether stdout is a terminal that can be drawn on."""
    return sys.stdout.isatty() and not Console().is_dumb_terminal


def run(seen: Status, look: Callable[[], Status]) -> NoReturn:
    """Show ``seen``, then each second what ``look`` gives, until Ctrl-C (KeyboardInterrupt).

    While ``look`` raises QueueUnavailable the last view stays, with its age and the reason.
    """
    console = Console(markup=False, highlight=False, emoji=False)
    seen_at_s = time.monotonic()
    stale: str | None = None
    with _given_back(console), Live(console=console, screen=True, auto_refresh=False, redirect_stderr=False) as live:
        while True:
            _draw(live, seen, stale)
            try:
                seen = look()
                seen_at_s, stale = time.monotonic(), None
            except QueueUnavailable as error:
                stale = f"NOT OF NOW, {span(time.monotonic() - seen_at_s)} old: {error}"


def _draw(live: Live, seen: Status, stale: str | None) -> None:
    """Draw, and draw again as often as the terminal changes its size, until the next look is due."""
    ends_at_s = time.monotonic() + _LOOK_EVERY_S
    drawn = None
    while time.monotonic() < ends_at_s:
        size = live.console.size
        if size != drawn:
            live.update(page(seen, size.width, size.height, stale), refresh=True)
            drawn = size
        time.sleep(_RESIZE_EVERY_S)


@contextlib.contextmanager
def _given_back(console: Console) -> Iterator[None]:
    """The terminal is left as it was found, however the block ends; keys typed meanwhile are not shown."""
    try:
        with _without_echo():
            yield
    finally:
        _restore(console)


def _restore(console: Console) -> None:
    """What Live does when it ends, for a signal that came while it began or ended."""
    if console.is_alt_screen:
        console.show_cursor(True)
        console.set_alt_screen(False)


@contextlib.contextmanager
def _without_echo() -> Iterator[None]:
    try:
        import termios
    except ImportError:  # no such terminals on this system
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = termios.tcgetattr(sys.stdin)
    quiet[3] &= ~termios.ECHO
    try:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
        yield
    finally:
        # What was typed at the view was not meant for the shell.
        termios.tcsetattr(sys.stdin, termios.TCSAFLUSH, before)
