"""The full-screen view of a status: what it shows on which size of terminal, whatever stands in Redis."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from typing import Literal

import pytest
from rich.cells import cell_len
from rich.console import Console

from producer.message import OutcomeKind
from producer.status import Gate, Percentiles, RefusedKey, Status
from producer.watch import page
from producer.workers import WorkerRow

SIZES = [(80, 24), (120, 40)]
#: Markup, an escape sequence, a C1 control, a line break, a right-to-left override, wide characters.
HOSTILE = "[bold red]x[/] [/nothing] \x1b[2J\x1b]0;owned\x07 \x9b31m a\nb \u202ecba :smile: 全角文字"


def worker(number: int, name: str = "host-0123456789", **fields: object) -> WorkerRow:
    """A worker of ours at work."""
    figures = {"in_flight": 64, "concurrency": 64, "clock_offset_ms": -12, "used_weight": 1200, "weight_limit": 2400}
    return WorkerRow(
        f"{name}.{number}.0123456789ab",
        name,
        number,
        "busy",
        123_456,
        78,
        0.4,
        **(figures | fields),  # type: ignore[arg-type]
    )


#: A queue at work.
STATUS = Status(
    queue="cancels",
    at_ms=1_763_808_175_000,
    queued=1234,
    oldest_queued_s=3.25,
    in_flight=12,
    failed=7,
    gates=(Gate("all", open=True),),
    used_weight=1200,
    weight_limit=2400,
    outcomes={"cancelled": 1200, "refused": 3},
    enqueue_to_outcome=Percentiles(12, 340),
    enqueue_to_first_attempt=Percentiles(2, 30),
    workers=tuple(worker(number) for number in range(3)),
)


def drawn(seen: Status, width: int, height: int, stale: str | None = None, colour: bool = False) -> list[str]:
    """The lines that a terminal of this size gets."""
    file = io.StringIO()
    # Wider and higher than the view believes: a line that is too long shows itself.
    system: Literal["standard"] | None = "standard" if colour else None
    console = Console(file=file, width=4 * width, height=4 * height, force_terminal=colour, color_system=system)
    console.print(page(seen, width, height, stale))
    return file.getvalue().splitlines()


def closed(scope: str, reason: str = "429") -> Gate:
    """A gate that is closed for twelve seconds."""
    return Gate(scope, False, 12.0, 1_763_808_187_000, reason, "worker.1")


def refused(account: str, reason: str = "401 -2015 Invalid API-key.", is_open: bool = True) -> RefusedKey:
    """A key that is held back since half a minute, or only suspected."""
    return RefusedKey(account, 7, is_open, 34.0 if is_open else None, reason, 26.0 if is_open else None, 12)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_what_stops_cancels_comes_first(width: int, height: int) -> None:
    """Gate, queue latency and refused key stand above all else, in this order, with time of the look and way out."""
    lines = drawn(replace(STATUS, gates=(closed("all"),), keys=(refused("default"),)), width, height)

    assert lines[0].startswith("queue cancels ")
    assert lines[0].endswith(" 10:42:55 UTC  Ctrl-C leaves")
    assert cell_len(lines[0]) == width
    assert lines[2].startswith("gate all       CLOSED for 12.0 s: 429")
    assert lines[3].startswith("queue latency  3.2 s, 1,234 queued")
    assert lines[4].startswith("key default    HELD BACK for 34 s, 12 jobs wait, next try in 26 s: 401 ")
    assert "jobs           12 in flight, 0 scheduled, 7 failed" in lines
    assert "last minute    1,200 cancelled, 3 refused" in lines
    assert "used weight    1,200 of 2,400 (50 %)" in lines


def test_what_nobody_may_send_is_no_latency() -> None:
    """Behind a closed gate nothing waits for a worker: the view says for how long it has been held back."""
    lines = drawn(replace(STATUS, gates=(closed("all"),), oldest_queued_s=None, gated_s=93.0), 100, 30)

    assert lines[3].startswith("queue latency  held back for 93.0 s, 1,234 queued")


@pytest.mark.parametrize(("width", "height"), [*SIZES, (40, 12), (20, 5), (300, 100), (1, 1)])
def test_hostile_and_long_content_keeps_its_place(width: int, height: int) -> None:
    """However much there is to tell and whatever it is made of, it fits: no line wraps, nothing is obeyed."""
    seen = replace(
        STATUS,
        gates=tuple(closed(HOSTILE * 5, HOSTILE * 9) for _ in range(40)),
        keys=tuple(refused(HOSTILE * 5, HOSTILE * 9) for _ in range(40)),
        workers=tuple(worker(number, HOSTILE * 4) for number in range(300)),
        outcomes=dict.fromkeys([kind.value for kind in OutcomeKind] + [HOSTILE], 10**9),
        suspended=True,
    )

    lines = drawn(seen, width, height, stale=f"NOT OF NOW: {HOSTILE}")

    assert len(lines) <= height
    assert height < 2 or lines[1].startswith("NOT OF NOW"[: width - 1])
    assert all(cell_len(line) <= width for line in lines)
    text = "".join(lines)
    assert text.isprintable()
    if width >= 80:
        assert "[bold red]x[/] [/nothing]" in text
        assert ":smile:" in text
        assert any(line.startswith("queue latency  3.2 s, 1,234 queued") for line in lines)
        assert any("CLOSED for 12.0 s" in line for line in lines)
        assert any("HELD BACK" in line or line.startswith("key ") for line in lines)
        assert ("more gates" in text) == (height < 100)
        assert ("more keys" in text) == (height < 100)
        assert "suspended" in text


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_rows_of_workers_are_cut_last(width: int, height: int) -> None:
    """What does not fit of the workers is told as a number; a larger terminal shows more rows and columns."""
    lines = drawn(replace(STATUS, workers=tuple(map(worker, range(50)))), width, height)

    rows = [line for line in lines if line.startswith("host-")]
    assert len(lines) == height
    assert lines[-1] == f"... and {50 - len(rows)} more"
    assert len(rows) >= height - 14
    heads = next(line for line in lines if line.startswith("50 workers"))
    assert "in flight" in heads
    assert "state" in heads
    assert ("pid" in heads) == (width == 120)


def test_a_screen_that_holds_all_workers_cuts_none() -> None:
    """Each worker has a row with its own figures where there is room; a stock worker's unknown ones are dashes."""
    stock = WorkerRow("stock", "elsewhere", None, "idle", 0, 0, None)
    lines = drawn(replace(STATUS, workers=(worker(0), worker(1), stock)), 120, 40)

    assert "more" not in "".join(lines)
    assert any("64 of 64" in line and "-12 ms" in line and "0 s ago" in line for line in lines)
    assert [word for line in lines if line.startswith("stock") for word in line.split()] == [
        *("stock", "elsewhere", "-", "idle", "-", "0", "0", "-", "-", "-")
    ]


def test_an_empty_queue_is_told_as_such() -> None:
    """Nothing waits, nothing came out, nobody works: said in words, and not in red."""
    seen = Status("cancels", 0, gates=(Gate("all", True),))
    text = "\n".join(drawn(seen, 80, 24, colour=True))
    for words in ("open", "nothing waits", "0 failed", "no outcomes", "none"):
        assert words in text
    assert "31m" not in text
    assert "used weight    -" in seen.lines()


@pytest.mark.parametrize(
    ("queued", "oldest_s", "told"),
    [(0, 0.004, None), (0, 1.25, "0, one is due for 1.2 s"), (1, 0.0, "1, the oldest for 0.0 s"), (2, None, None)],
)
def test_what_fell_due_this_moment_is_no_news(queued: int, oldest_s: float | None, told: str | None) -> None:
    """That a retry is due is said once it has waited for a claim that did not come."""
    seen = Status("cancels", 0, queued=queued, oldest_queued_s=oldest_s)
    (line,) = (line for line in seen.lines() if line.startswith("queued"))
    assert line.removeprefix("queued").strip() == (told or str(queued))
    assert any("nothing waits" in line for line in drawn(seen, 80, 24)) == (not queued and told is None)


def test_red_is_what_needs_somebody() -> None:
    """A closed gate, a refused key and failed kinds are red, zeros are dim, the rest is plain."""
    seen = replace(STATUS, gates=(closed("all"),), keys=(refused("default", is_open=False),))
    lines = drawn(seen, 120, 40, colour=True)

    assert "\x1b[1;31mCLOSED for" in lines[2]
    assert "\x1b[31mrefused 7 times in a row, still tried: 401" in lines[4]
    (jobs,) = (line for line in lines if line.startswith("jobs"))
    assert "12 in flight, \x1b[2m0 scheduled\x1b[0m, \x1b[31m7 failed\x1b[0m" in jobs
    (kinds,) = (line for line in lines if line.startswith("last minute"))
    assert kinds.endswith("1,200 cancelled, \x1b[31m3 refused\x1b[0m")


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_dead_are_told_and_dimmed(width: int, height: int) -> None:
    """A worker that went silent is named so and dimmed, below the live; work without a live one is an alarm."""
    dead = replace(worker(0), heartbeat_age_s=34.0)
    some = replace(STATUS, workers=(dead, worker(1), worker(2)))
    lines = drawn(some, width, height, colour=True)
    (row,) = (line for line in lines if "silent for 34 s" in line)
    assert row.startswith("\x1b[2m")
    assert lines.index(row) > max(number for number, line in enumerate(lines) if "0 s ago" in line)
    assert any("3 workers, 1 silent" in line for line in lines)
    assert "No live worker" not in "".join(lines)
    assert re.search(r"^workers +2 live, 1 silent$", "\n".join(some.lines()), re.M)

    none = replace(STATUS, workers=(dead,))
    assert "workers        No live worker, and work is waiting" in drawn(none, width, height)
    assert re.search(r"^workers +0 live, 1 silent: NO LIVE WORKER, and work is waiting$", "\n".join(none.lines()), re.M)
    idle = replace(none, queued=0, in_flight=0)
    assert "No live worker" not in "".join(drawn(idle, width, height))


def test_lost_leases_are_told_only_where_there_are_any() -> None:
    """What is to be taken over is a figure of its own, in view and lines, while there is such a thing."""
    assert "take" not in "\n".join([*drawn(STATUS, 120, 40), *STATUS.lines()])
    lost = replace(STATUS, to_be_taken_over=1234)
    assert "jobs           12 in flight, 1,234 to be taken over, 0 scheduled, 7 failed" in drawn(lost, 120, 40)
    assert re.search(r"^to take over +1,234, their leases ran out$", "\n".join(lost.lines()), re.M)
    assert (STATUS.as_dict()["to_be_taken_over"], lost.as_dict()["to_be_taken_over"]) == (0, 1234)
