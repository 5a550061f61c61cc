"""`python -m tests.model`: drive a queue by chance, and hold it to the rules of :mod:`tests.model.rules`."""

from __future__ import annotations

import argparse
import sys
import time
from random import Random

from tests.model.driver import Driver
from tests.model.rules import Finding
from tests.servers import running_valkey

_EXAMPLES = """examples:
  python -m tests.model                            one seed, 10,000 steps
  python -m tests.model --seed 7 --steps 2000      the same choices as any run with this seed, as far as time allows
  python -m tests.model --seeds 10 --steps 10000   seeds 1 to 10, until one finds something
"""


def main() -> int:
    """Run the driver; gives 1 where a rule was broken."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.model",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=10_000, help="steps of each seed (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="the first seed (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, one after the other (default: 1)")
    asked = parser.parse_args()
    for seed in range(asked.seed, asked.seed + asked.seeds):
        if not drive(seed, asked.steps):
            return 1
    return 0


def drive(seed: int, steps: int) -> bool:
    """One seed, on a server of its own; tells what happened, and whether all rules held."""
    began = time.monotonic()
    with running_valkey("--appendonly", "no") as server:
        driver = Driver(server.port, Random(seed))
        try:
            for step in driver.run(steps):
                if step % 1000 == 0:
                    print(f"seed {seed}: step {step} after {time.monotonic() - began:.0f} s", flush=True)  # noqa: T201
        except Finding as finding:
            print(f"seed {seed}, step {driver.world.step}: {driver.world.trace(finding)}")  # noqa: T201
            return False
        finally:
            driver.world.close()
    counts = ", ".join(f"{name} {count}" for name, count in sorted(driver.count.items()))
    print(f"seed {seed}: {steps} steps in {time.monotonic() - began:.0f} s, no rule broken; {counts}", flush=True)  # noqa: T201
    return True


if __name__ == "__main__":
    sys.exit(main())
