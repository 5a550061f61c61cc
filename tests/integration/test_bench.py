"""The benchmark works: its servers do what they say, and a short run measures, reports, and loses nothing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench.figures import Idle, Results
from tests.bench.plot import draw
from tests.bench.rig import Rig, open_rig
from tests.servers import ROOT


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """The benchmark's servers, Redis 4 ms away both ways together."""
    with open_rig(2.0) as running:
        yield running


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    command = [sys.executable, "-m", "tests.bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_a_short_run_measures_and_reports() -> None:
    """Two systems, two measurements: exit code 0, one JSON object on stdout, tables on stderr, nothing lost."""
    done = bench("--quick", "--only", "idle", "calls", "cold", "project", "floor", "--json", "-")

    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["losses"] == []
    assert {one["system"] for one in record["results"]["idle"]} == {"project", "floor"}
    for one in record["results"]["idle"]:
        assert one["latencies_ms"]
        assert min(one["latencies_ms"]) > 0
        assert len(one["latencies_ms"]) == len(one["calls_ms"])
        assert one["repeats"] == 0
    assert record["results"]["burst"] == record["results"]["memory"] == []
    assert {ratio["to"] for ratio in record["ratios"]} == {"bare BLPOP + DELETE", "a bare PING"}
    assert record["environment"]["cores"] >= 1
    assert "Idle latency" in done.stderr
    assert "bare BLPOP + DELETE" in done.stderr


def test_a_plot_is_drawn_or_refused(tmp_path: Path) -> None:
    """With matplotlib there is a PNG; without it the command says, before it measures anything, what to install."""
    file = tmp_path / "plot.png"
    idle = Idle("project", 0, 0.1, [1.0, 2.0], [0.1, 0.1], 0, 0, 0)

    if importlib.util.find_spec("matplotlib") is None:
        done = bench("--quick", "--plot", str(file))
        assert done.returncode == 2
        assert "[bench]" in done.stderr
    else:
        draw(Results(idle=[idle]), file, "a machine")
        assert file.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_name_is_refused() -> None:
    """A name that is neither measurement nor system is named, with exit code 2."""
    done = bench("--only", "idle", "nonsense")

    assert done.returncode == 2
    assert "nonsense" in done.stderr
