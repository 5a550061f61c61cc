"""The chaos run in small: a short one with all faults."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.fault.blows import Kind
from tests.servers import ROOT, scrubbed


def test_a_short_run_with_every_fault() -> None:
    """Under every kind of blow and of exchange fault nothing is lost, doubled, unasked or different from the book."""
    command = [sys.executable, "-m", "tests.fault.chaos", "--jobs", "400", "--seed", "1", "--json"]
    ended = subprocess.run(command, cwd=ROOT, env=scrubbed(), check=False, capture_output=True, text=True, timeout=170)
    assert ended.stdout, ended.stderr
    run = json.loads(ended.stdout)
    assert ended.returncode == 0, run["problems"]
    assert set(run["blows"]) == {kind.value for kind in Kind}
    assert run["queue"]["ok"] >= 400
    assert run["recoveries_ms"]["count"], "no killed worker held a job"
    assert run["exchange_faults"] > 100
    assert run["leases_lost"], "nobody lost a lease: that nothing was sent for one says nothing"
    assert run["reopened"] > 20
    assert sum(run["exchange"]["left_alone"].values()), "no client id was taken again behind an unclear answer"
    least = {"listings": 15, "named": 15, "joined": 1, "spared": 6}
    assert all(run["exchange"][name] >= count for name, count in least.items()), run["exchange"]
    assert run["unread"] > 20
    assert all(kind["with_ttl"] == kind["count"] for kind in run["keys"] if kind["count"] > 1), run["keys"]
