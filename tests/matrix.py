"""`python -m tests.matrix [SERVER ...]`: the part of the suite that Redis decides, against one server after the other.

Scripts, claims, streams and RQ's own commands are what versions of Redis and Valkey can differ in; the rest of the
suite is the same for all of them. A server is a redis-server or valkey-server program, which VALKEY_SERVER names for
the run; without any named, those that are found in installed wheels and on PATH.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from tests.servers import ROOT, scrubbed

#: The tests whose outcome a server can change.
CONTRACT = tuple(
    f"tests/integration/test_{name}.py"
    for name in (
        *("enqueue", "claim", "complete", "index", "leases", "runs", "script_costs", "gate_script", "damaged_keys"),
        *("worker_outcomes", "stock_worker", "rq_interop", "client", "testing_contract", "redis_users", "counts"),
    )
)
PROGRAMS = ("redis-server", "valkey-server")


def found_here() -> Iterator[str]:
    """Server programs of this machine: inside installed wheels, and on PATH."""
    for distribution in metadata.distributions():
        for file in distribution.files or ():
            path = Path(str(distribution.locate_file(file)))
            if file.name in PROGRAMS and path.is_file() and os.access(path, os.X_OK):
                yield str(path)
    yield from filter(None, map(shutil.which, PROGRAMS))


def version_of(server: str) -> str:
    """As "Redis 7.2.4".

    Raises:
        SystemExit: it is neither a Redis nor a Valkey server, or cannot be run.
    """
    try:
        said = subprocess.run([server, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SystemExit(f"error: {server}: {type(error).__name__}") from None
    if (found := re.search(r"(Redis|Valkey) server v=(\S+)", said)) is None:
        raise SystemExit(f"error: {server} is no Redis or Valkey server")
    return " ".join(found.groups())


def run(server: str, options: Sequence[str], jobs: int) -> bool:
    """Run the tests against a server, and print its row; gives whether all passed."""
    command = [sys.executable, "-m", "pytest", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-n", str(jobs), "--dist", "loadfile", *options, *CONTRACT]
    environment = scrubbed() | {"VALKEY_SERVER": server}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    *_, summary = done.stdout.strip().splitlines() or [done.stderr[-200:]]
    failed = re.findall(r"^(?:FAILED|ERROR) .*$", done.stdout, re.MULTILINE)
    print(f"{version_of(server):<22}  {summary}  {server}", *failed, sep="\n  ", flush=True)  # noqa: T201
    return done.returncode == 0


def main(arguments: list[str]) -> int:
    """Run the matrix; gives 0 where every server passed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.matrix", description=__doc__, epilog="-- OPTIONS: for pytest"
    )
    parser.add_argument("servers", nargs="*", metavar="SERVER", help="a redis-server or valkey-server program")
    parser.add_argument("--jobs", type=int, default=3, metavar="N", help="test files at a time (default: 3)")
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    asked = parser.parse_args(arguments[:cut])
    servers = {str(Path(shutil.which(name) or name).resolve()): None for name in asked.servers or found_here()}
    if not servers:
        parser.error("no server is found: name one, or pip install -e '.[sandbox]' in the checkout")
    for server in servers:
        version_of(server)
    passed = [run(server, arguments[cut + 1 :], asked.jobs) for server in servers]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
