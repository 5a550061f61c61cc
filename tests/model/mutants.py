"""`python -m tests.model.mutants`: break the scripts on purpose, one fault at a time, and see which tests notice.

Each mutant is made in a copy of the checkout, two at a time. The scripts' own tests run against it and then the model,
each until the first test fails. A mutant that neither kills is a rule that nobody holds the scripts to.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.model.mutant_table import MUTANTS, Mutant
from tests.servers import ROOT

#: Tests of the scripts, one rule at a time; processes, which can fail for being slow, start in hardly any of them.
_SCRIPTS = (
    *("claim", "complete", "counts", "enqueue", "leases", "runs", "gate_script", "index", "stock_claims", "spread"),
)
SCRIPT_TESTS = tuple(f"tests/integration/test_{name}.py" for name in _SCRIPTS)
MODEL_TESTS = ("tests/model/test_found.py", "tests/model/test_model.py", "-k", "not mutants")
_AT_ONCE = 2
#: A mutant that makes a test stand still is noticed, too, s.
_LONGEST_S = 900
_COPIED = ("producer", "worker", "tests", "pyproject.toml")
_FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)
_EXAMPLES = """examples:
  python -m tests.model.mutants                  all of them
  python -m tests.model.mutants --only complete  those of files or breaks that have this in their name
  python -m tests.model.mutants --list           what there is
"""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which tests noticed a mutant; empty: none of that group."""

    mutant: Mutant
    scripts: str
    model: str

    def line(self) -> str:
        """For people."""
        mark = "killed  " if self.scripts or self.model else "SURVIVED"
        by = ", ".join(test for test in (self.scripts, self.model) if test) or "nobody"
        return f"{mark} {self.mutant.name}: {self.mutant.breaks}\n           by {by}"


def main() -> int:
    """Run the mutants; gives 1 where one survived."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.model.mutants",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--only", default="", help="those whose file or fault has this in it")
    parser.add_argument("--list", action="store_true", help="name them and run none")
    asked = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if asked.only in f"{mutant.path} {mutant.breaks}"]
    if asked.list:
        say(*(f"{mutant.name}: {mutant.breaks}" for mutant in chosen))
        return 0
    if noticed := [test for test in killers(None) if test]:
        say(f"without any mutant these fail: {', '.join(noticed)}")
        return 1
    verdicts: list[Verdict] = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for verdict in pool.map(judge, chosen):
            verdicts.append(verdict)
            say(verdict.line())
    return summary(verdicts)


def summary(verdicts: list[Verdict]) -> int:
    """Say how many of each; gives the exit code."""
    survived = [verdict for verdict in verdicts if not verdict.scripts and not verdict.model]
    by_scripts = sum(bool(verdict.scripts) for verdict in verdicts)
    by_model = sum(bool(verdict.model) for verdict in verdicts)
    say(f"{len(verdicts)} mutants: killed by tests of the scripts {by_scripts}, by the model {by_model}")
    say(f"survived {len(survived)}", *(f"  {verdict.mutant.name}: {verdict.mutant.breaks}" for verdict in survived))
    return 1 if survived else 0


def judge(mutant: Mutant) -> Verdict:
    """Run the tests against one mutant."""
    return Verdict(mutant, *killers(mutant))


def killers(mutant: Mutant | None) -> Iterator[str]:
    """The first test of either group that fails with a mutant, or without any."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "copy"
        for name in _COPIED:
            _copied(ROOT / name, copy / name)
        if mutant is not None:
            script = copy / mutant.path
            script.write_text(mutant.applied(script.read_text("utf-8")), "utf-8")
        yield from [_first_failure(copy, SCRIPT_TESTS), _first_failure(copy, MODEL_TESTS)]


def _copied(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    else:
        shutil.copy(source, target)


def _first_failure(copy: Path, tests: tuple[str, ...]) -> str:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=_LONGEST_S, check=False)
    except subprocess.TimeoutExpired:
        return f"{tests[0]} (stands still)"
    if done.returncode == 0:
        return ""
    found = _FAILED.search(done.stdout)
    return found[1] if found else f"{tests[0]}: exit code {done.returncode}: {(done.stdout + done.stderr)[-500:]}"


def say(*lines: str) -> None:
    """Print."""
    print(*lines, sep="\n", flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
