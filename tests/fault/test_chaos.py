"""The chaos run in small: a short one with all faults, the schedule it follows, and the verdict that ends it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest

from tests.fault.blows import FULL, QUICK, ROUND, WORKERS, Kind, Scale, schedule
from tests.fault.chaos import EXIT_FAILED, EXIT_OK
from tests.fault.ledger import ExchangeSide, KeyKind, QueueSide
from tests.fault.verdict import Reckoning, table
from tests.servers import ROOT, scrubbed

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
    queue=QueueSide(attempted=10, acknowledged=9, ok=9, lost=(), unexpected=(), recovered=1, duplicated=()),
    exchange=ExchangeSide(9, 11, 2, (), (), {"cancelled": 9}),
    incidents=2,
    requests_during_bans=0,
    recoveries_ms=(900, 1100, 1900),
    exits_s=(0.4, 1.2),
    consumed_by_restarts=0,
    walked_out=(),
    keys=(KeyKind("rq:job:*", 9, 9), KeyKind("rq:queues", 1, 0)),
)


def test_a_short_run_with_every_fault() -> None:
    """Under every kind of blow and of exchange fault nothing is lost, doubled, unasked or different from the book."""
    command = [sys.executable, "-m", "tests.fault.chaos", "--jobs", "400", "--seed", "1", "--json"]
    ended = subprocess.run(command, cwd=ROOT, env=scrubbed(), check=False, capture_output=True, text=True, timeout=110)
    assert ended.stdout, ended.stderr
    run = json.loads(ended.stdout)
    assert ended.returncode == EXIT_OK, run["problems"]
    assert set(run["blows"]) == {kind.value for kind in Kind}
    assert run["queue"]["ok"] >= 400
    assert run["recoveries_ms"], "no killed worker held a job"
    assert run["exchange_faults"] > 100
    assert all(kind["with_ttl"] == kind["count"] for kind in run["keys"] if kind["count"] > 1), run["keys"]


@pytest.mark.parametrize("scale", [QUICK, FULL], ids=lambda scale: scale.name)
def test_the_schedule_is_a_function_of_the_seed(scale: Scale) -> None:
    """The same seed strikes the same blows at the same times, another seed others."""
    blows = schedule(1, scale, 600)
    assert blows == schedule(1, scale, 600)
    assert blows != schedule(2, scale, 600)
    assert all(blow.at_s + blow.length_s <= 600 for blow in blows)


@pytest.mark.parametrize("seed", range(20))
def test_every_kind_of_blow_falls(seed: int) -> None:
    """However short the run, one round falls, of each kind, one blow after the other, on workers that there are."""
    blows = schedule(seed, QUICK, 0)
    assert sorted(blow.kind for blow in blows) == sorted(ROUND)
    for blow, following in pairwise(blows):
        assert following.at_s >= blow.at_s + blow.length_s
    assert {blow.worker for blow in blows} <= set(range(WORKERS))


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
        (replace(CLEAN, exchange=replace(CLEAN.exchange, differences=("x",))), "1 differences"),
        (replace(CLEAN, exchange=replace(CLEAN.exchange, harmful=("x",))), "1 orders touched"),
        (replace(CLEAN, exchange=replace(CLEAN.exchange, kinds={"gave_up": 1, "overdue": 2})), "3 unknown, gave_up"),
        (replace(CLEAN, consumed_by_restarts=2), "2 attempts consumed by restarts"),
        (replace(CLEAN, walked_out=("w0g1 exit code 1",)), "1 workers that ended unasked"),
    ],
)
def test_whatever_is_wrong_fails_the_run(wrong: Reckoning, said: str) -> None:
    """Each promise that is broken is named, and its items are shown."""
    assert wrong.problems()[0].startswith(said)
    assert f"FAILED: {said}" in table(wrong)


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
