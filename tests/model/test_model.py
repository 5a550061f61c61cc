"""The scripts, the clients and the stock task against a model of what must hold for every job."""

from __future__ import annotations

from random import Random

import pytest

from tests.model.driver import Driver
from tests.model.mutant_table import MUTANTS
from tests.model.rules import Finding
from tests.servers import ROOT, Valkey


# redis-py tidies up in finalizers, also for a process that is dead by then and may send nothing more.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("seed", [1, 2])
def test_no_rule_breaks_whatever_happens(valkey: Valkey, seed: int) -> None:
    """However producers, our holders, stock workers that die anywhere, and people with RQ's tools meet on a queue: each
    request ends in one outcome, and no other rule of the model breaks."""
    driver = Driver(valkey.port, Random(seed))
    try:
        taken = sum(1 for _ in driver.run(600))
    except Finding as finding:
        pytest.fail(driver.world.trace(finding))
    finally:
        driver.world.close()

    assert taken == 600
    happened = {"jobs popped by stock workers", "rq requeue", "rows sent again", "claim replies lost", "done listed"}
    assert happened <= set(driver.count)


def test_mutants_still_apply() -> None:
    """What a mutant changes stands once in its script, so that `python -m tests.model.mutants` tries what it says."""
    for mutant in MUTANTS:
        text = (ROOT / mutant.path).read_text("utf-8")
        assert mutant.applied(text) != text
