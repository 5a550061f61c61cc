"""The project's worker with shorter waits.

BENCH_WARM_S is the interval in s at which connections are kept warm, and unused ones are trusted a little longer: an
exchange that closes idle connections sooner than a real one, or a firewall that forgets them sooner, can then be waited
for. None: as ever.
"""

from __future__ import annotations

import os
from functools import partial

import worker.runner
import worker.transport_asyncio
from worker.__main__ import start
from worker.transport import IDLE_BOUND_S
from worker.transport_asyncio import AsyncioTransport


def main() -> None:
    """Start the worker with all that in place."""
    if warm_s := os.environ.get("BENCH_WARM_S"):
        if "_WARM_S" not in vars(worker.runner):
            raise RuntimeError("worker.runner has no _WARM_S any more: the scaled measurement would measure nothing")
        trusted_s = float(warm_s) * IDLE_BOUND_S / worker.runner._WARM_S
        vars(worker.runner)["_WARM_S"] = float(warm_s)
        vars(worker.transport_asyncio)["AsyncioTransport"] = partial(AsyncioTransport, idle_bound_s=trusted_s)
    start()


if __name__ == "__main__":
    main()
