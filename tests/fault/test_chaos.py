"""The chaos run in small: a short one with all faults, the schedule it follows, and the verdict that ends it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

import pytest

from tests.fault.blows import FULL, MAKES, QUICK, ROUND, TARGETS, Kind, Scale, clock, schedule
from tests.fault.chaos import EXIT_FAILED, EXIT_OK
from tests.fault.ledger import ExchangeSide, KeyKind, QueueSide
from tests.fault.verdict import Reckoning, table
from tests.servers import ROOT, eventually, scrubbed

#: A run without anything wrong.
CLEAN = Reckoning(
    scale="quick",
    seed=1,
    seconds=20.0,
    drained_s=1.0,
    blows=("kill", "kill", "term"),
    exchange_faults=10,
    replies_lost=3,
    resets=4,
    silences=5,
    flows_forgotten=6,
    queue=QueueSide(attempted=10, acknowledged=9, ok=9, lost=(), unexpected=(), recovered=1, duplicated=()),
    miscounted=False,
    exchange=ExchangeSide(9, 11, 2, (), (), {"cancelled": 9}),
    incidents=2,
    requests_during_bans=0,
    leases_lost=4,
    sent_without_lease=(),
    reopened=1,
    unread=3,
    recoveries_ms=(900, 1100, 1900),
    exits_s=(0.4, 1.2),
    consumed_by_restarts=0,
    walked_out=(),
    stock_ends=("w3g1 exit code 1",),
    keys=(KeyKind("rq:job:*", 9, 9), KeyKind("rq:queues", 1, 0)),
)


def test_a_short_run_with_every_fault() -> None:
    """Under every kind of blow and of exchange fault nothing is lost, doubled, unasked or different from the book."""
    command = [sys.executable, "-m", "tests.fault.chaos", "--jobs", "400", "--seed", "1", "--json"]
    ended = subprocess.run(command, cwd=ROOT, env=scrubbed(), check=False, capture_output=True, text=True, timeout=170)
    assert ended.stdout, ended.stderr
    run = json.loads(ended.stdout)
    assert ended.returncode == EXIT_OK, run["problems"]
    assert set(run["blows"]) == {kind.value for kind in Kind}
    assert run["queue"]["ok"] >= 400
    assert run["recoveries_ms"], "no killed worker held a job"
    assert run["exchange_faults"] > 100
    assert run["leases_lost"], "nobody lost a lease: that nothing was sent for one says nothing"
    assert run["reopened"] > 20
    assert sum(run["exchange"]["left_alone"].values()), "no client id was taken again behind an unclear answer"
    least = {"listings": 15, "named": 15, "joined": 1, "spared": 6}
    assert all(run["exchange"][name] >= count for name, count in least.items()), run["exchange"]
    assert run["unread"] > 20
    assert all(kind["with_ttl"] == kind["count"] for kind in run["keys"] if kind["count"] > 1), run["keys"]


def marked(mark: str) -> list[int]:
    """Processes that have this in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def test_nothing_outlives_a_run_that_is_told_to_leave(tmp_path: Path) -> None:
    """On SIGTERM, as `timeout` sends it, servers, exchange and every worker end with the run."""
    mark = f"OF_THIS_RUN={uuid4().hex}"
    environment = scrubbed() | dict([mark.split("=")])
    command = [sys.executable, "-m", "tests.fault.chaos", "--keep-logs", str(tmp_path)]
    with (tmp_path / "said").open("wb") as said:
        run = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=said, start_new_session=True)
    try:
        eventually(lambda: "| calm" in (tmp_path / "said").read_text() or run.poll() is not None, 60, "blows fall")
        assert len(marked(mark)) >= 7, "the run, the exchange, five workers; Valkey hides its environment"
    finally:
        run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 128 + signal.SIGTERM
    eventually(lambda: not marked(mark), 5, "all have ended")


@pytest.mark.parametrize("scale", [QUICK, FULL], ids=lambda scale: scale.name)
def test_the_schedule_is_a_function_of_the_seed(scale: Scale) -> None:
    """The same seed strikes the same blows at the same times, another seed others."""
    blows = schedule(1, scale, 600)
    assert blows == schedule(1, scale, 600)
    assert blows != schedule(2, scale, 600)
    assert all(blow.at_s + blow.length_s <= 600 for blow in blows)


@pytest.mark.parametrize("seed", range(20))
def test_every_kind_of_blow_falls(seed: int) -> None:
    """However short the run, one round falls, of each kind, one blow after the other, on workers it is meant for."""
    blows = schedule(seed, QUICK, 0)
    assert sorted(blow.kind for blow in blows) == sorted([*ROUND, Kind.CLOCK])
    for blow, following in pairwise(blows):
        assert following.at_s >= blow.at_s + blow.length_s
        assert blow.worker in TARGETS.get(blow.kind, range(len(MAKES)))


@pytest.mark.parametrize("seed", range(20))
def test_the_exchanges_clock_is_set_once_and_by_seconds(seed: int) -> None:
    """It is apart from the start, and moves by more than a timestamp may be ahead: else nobody could notice it."""
    times = clock(seed)
    assert 2_000 <= abs(times.first_ms) <= 6_000
    assert 2_500 <= abs(times.then_ms - times.first_ms) <= 6_000
    assert times == clock(seed)
    blows = schedule(seed, QUICK, 300)
    at = [number for number, blow in enumerate(blows) if blow.kind is Kind.CLOCK]
    assert len(at) == 1
    assert len(ROUND) // 2 <= at[0] <= len(ROUND)


def test_a_clean_run_has_no_problem() -> None:
    """What producers had to repeat, harmless repeats of DELETEs and recovered requests are no failure."""
    assert CLEAN.problems() == []
    assert table(CLEAN).endswith("nothing lost, nothing twice, nothing wrong\n")
    assert json.loads(json.dumps(CLEAN.as_dict()))["problems"] == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (replace(CLEAN, queue=replace(CLEAN.queue, lost=("a",))), "1 lost"),
        (replace(CLEAN, queue=replace(CLEAN.queue, unexpected=("a", "b"))), "2 unexpected"),
        (replace(CLEAN, queue=replace(CLEAN.queue, duplicated=("a run 1",))), "1 duplicated outcomes"),
        (replace(CLEAN, miscounted=True), "1 counts that are not the ledger's"),
        (replace(CLEAN, exchange=replace(CLEAN.exchange, differences=("x",))), "1 differences"),
        (replace(CLEAN, exchange=replace(CLEAN.exchange, harmful=("x",))), "1 orders touched"),
        (replace(CLEAN, exchange=replace(CLEAN.exchange, kinds={"gave_up": 1, "overdue": 2})), "3 unknown, gave_up"),
        (replace(CLEAN, requests_during_bans=1), "1 requests during bans"),
        (replace(CLEAN, sent_without_lease=("x",)), "1 requests sent for a lost lease"),
        (replace(CLEAN, queue=replace(CLEAN.queue, ok=500), unread=0), "1 worker that stood still"),
        (replace(CLEAN, consumed_by_restarts=2), "2 attempts consumed by restarts"),
        (replace(CLEAN, walked_out=("w0g1 exit code 1",)), "1 workers that ended unasked"),
    ],
)
def test_whatever_is_wrong_fails_the_run(wrong: Reckoning, said: str) -> None:
    """Each promise that is broken is named, and its items are shown."""
    assert wrong.problems()[0].startswith(said)
    assert f"FAILED: {said}" in table(wrong)


def test_what_was_left_alone_is_counted_apart() -> None:
    """Requests whose client id was another order's by then are told with their reason, and are no failure."""
    exchange = replace(CLEAN.exchange, kinds={"cancelled": 7, "unknown": 2}, left_alone={"a newer order": 2})
    run = replace(CLEAN, exchange=exchange)
    assert run.problems() == []
    assert "      2 a newer order\n" in table(run)
    assert replace(run, exchange=replace(exchange, kinds={"unknown": 3})).problems() == [
        "1 unknown, gave_up or overdue"
    ]


def test_a_long_list_is_cut() -> None:
    """The table stays a table when everything is wrong."""
    lost = tuple(f"{number:032x}" for number in range(500))
    shown = table(replace(CLEAN, queue=replace(CLEAN.queue, lost=lost)))
    assert "and 490 more" in shown
    assert len(shown.splitlines()) < 60


def test_bad_usage() -> None:
    """A number of jobs that makes no sense is refused with the usual exit code."""
    command = [sys.executable, "-m", "tests.fault.chaos", "--jobs", "0"]
    ended = subprocess.run(command, cwd=ROOT, env=scrubbed(), check=False, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "--jobs" in ended.stderr
    assert EXIT_FAILED not in (EXIT_OK, 2)


def test_help_shows_how_to_use_it() -> None:
    """Nobody has to read the code to repeat a run."""
    command = [sys.executable, "-m", "tests.fault.chaos", "--help"]
    said = subprocess.run(command, cwd=ROOT, env=scrubbed(), check=True, capture_output=True, text=True).stdout
    for words in ("examples:", "--jobs 2000 --scale full", "--seed 7 --keep-logs", "exit code 0"):
        assert words in said
