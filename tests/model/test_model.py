"""The scripts, the clients and the stock task against a model of what must hold for every job."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.model.machine import QueueMachine
from tests.servers import Valkey


def test_every_answer_of_the_scripts_is_foreseen(valkey: Valkey) -> None:
    """Whatever is asked in whatever order, each claim, completion, renewal and retry gives what a small model says."""

    class Machine(QueueMachine):
        port = valkey.port

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
