"""How many examples Hypothesis draws, and from where: one place, so that one variable searches everywhere.

An ordinary run draws the same examples each time, so that it tells of the change and not of the draw. A search,
`EXAMPLES_TIMES=50 .venv/bin/python -m pytest tests/unit`, draws fifty times as many, each time others.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

TIMES = int(os.environ.get("EXAMPLES_TIMES", "1"))


def examples(count: int) -> settings:
    """The settings of a test that draws ``count`` examples in an ordinary run."""
    return settings(
        max_examples=count * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
