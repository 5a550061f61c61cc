"""The project's worker for an exchange with a certificate of the benchmark's own.

BENCH_CA_FILE names the authority. BENCH_WARM_S, if set, is the interval in s at which connections are kept warm: an
exchange that closes idle connections sooner than a real one can then be waited for.
"""

from __future__ import annotations

import os
from functools import partial

import worker.runner
import worker.wiring
from worker.__main__ import start
from worker.transport import Route


def main() -> None:
    """Start the worker with both in place."""
    vars(worker.wiring)["Route"] = partial(Route, ca_file=os.environ["BENCH_CA_FILE"])
    if warm_s := os.environ.get("BENCH_WARM_S"):
        if "_WARM_S" not in vars(worker.runner):
            raise RuntimeError("worker.runner has no _WARM_S any more: the scaled measurement would measure nothing")
        vars(worker.runner)["_WARM_S"] = float(warm_s)
    start()


if __name__ == "__main__":
    main()
