"""`python -m tests`: the whole suite, and the coverage that the decisions must have.

All of it takes about four minutes on 2 quiet cores. Other words go to pytest (`python -m tests -k lease`), whose own
are shown by `python -m pytest --help`. `--decisions` alone tells within five seconds whether a change to the decisions
is right: their tables and rules. `--coverage` alone measures every process of the whole suite and holds all of it to
its floors, which takes half as long again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Least coverage of lines and branches together, percent: the decisions in full, the rest together nearly.
FULL = (
    "producer/message.py",
    "producer/untrusted.py",
    "worker/classify.py",
    "worker/decide.py",
    "worker/child.py",
    "worker/listing.py",
)
FLOOR = 90.0
#: How the whole suite is run. Without servers: measured always, as the decisions are proved there. With servers: eight
#: files at a time, as most of their time is waiting; those that break servers wait for conditions as the others do.
UNIT = ("-n", "3", "--dist", "loadfile", "tests/unit")
REST = ("-n", "8", "--dist", "loadfile", "--no-loadscope-reorder")
FOLDERS = ("fault", "model", "integration", "clients")
#: What takes longest there, so that none of it is begun when all else is nearly through.
LONGEST = (
    *("web_browser", "worker_failover", "canary", "versions", "chaos", "stock_fleet", "stock_worker", "web_process"),
    *("producer_cli", "log_process", "rehearse", "metrics", "pauses", "redis_reached", "worker_stalls", "check"),
    *("engine", "worker_redis", "model", "patience", "sandbox", "installed"),
)
#: What a change to the decisions answers to first: their literal tables, and rules for any history.
DECISIONS = ("classify_*", "decide_*", "child", "listing")
#: Programs that some tests drive, and what is left out without them, by marker; `.ci/run` installs them.
PROGRAMS = {
    "browser": (("chromium", "chromedriver"), "the page in a real browser", "chromium chromium-driver"),
    "promtool": (("promtool",), "what Prometheus makes of rules and dashboard", "prometheus"),
}


def main(arguments: list[str]) -> int:
    """Run pytest; gives the exit code."""
    if arguments in (["--help"], ["-h"]):
        print(__doc__)  # noqa: T201
        return 0
    missing = [marker for marker, (names, _, _) in PROGRAMS.items() if not all(map(shutil.which, names))]
    told = "\n".join(
        f"LEFT OUT: {PROGRAMS[each][1]}. For these tests: apt-get install {PROGRAMS[each][2]}" for each in missing
    )
    left_out = ("-m", " and ".join(f"not {each}" for each in missing)) if missing and "-m" not in arguments else ()
    if arguments == ["--decisions"]:
        arguments = [str(path) for name in DECISIONS for path in ROOT.glob(f"tests/unit/test_{name}.py")]
    if arguments and arguments != ["--coverage"]:
        return run([sys.executable, "-m", "pytest", *left_out, *arguments])
    if missing:
        print(told, file=sys.stderr)  # noqa: T201
    with tempfile.TemporaryDirectory() as directory:
        code = whole(Path(directory), left_out, everything=bool(arguments))
    if missing:
        print(told, file=sys.stderr)  # noqa: T201
    return code


def whole(directory: Path, left_out: Sequence[str], *, everything: bool) -> int:
    """Run all rounds, under coverage the first or ``everything``, and hold it to its floors.

    A round that fails ends nothing: whoever mends it wants to know of the others, too.
    """
    data, report = f"--data-file={directory}/coverage", directory / "report.json"
    coverage = [sys.executable, "-m", "coverage"]
    failed = 0
    for chosen in (UNIT, (*REST, *map(str, longest_first()))):
        measured = [*coverage, "run", data] if everything or chosen is UNIT else [sys.executable]
        failed = run([*measured, "-m", "pytest", *left_out, *chosen]) or failed
    shown = () if everything else (f"--include={','.join(FULL)}",)
    for command in (["combine", "-q"], ["report", *shown], ["json", "-q", "-o", str(report)]):
        if code := run([*coverage, command[0], data, *command[1:]]):
            return code
    return failed or judge(json.loads(report.read_text("utf-8")), everything=everything)


def longest_first() -> list[Path]:
    """The files of the second round in the order in which they are begun."""
    names = [f"test_{name}" for name in LONGEST]
    paths = (path for folder in FOLDERS for path in ROOT.glob(f"tests/{folder}/test_*.py"))
    files = sorted(path.relative_to(ROOT) for path in paths)
    return sorted(files, key=lambda path: names.index(path.stem) if path.stem in names else len(names))


def run(command: Sequence[str]) -> int:
    """Run a command in the checkout; gives its exit code.

    Compiled code is kept whatever the environment says: the tests start Python hundreds of times.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def judge(report: dict[str, dict[str, dict[str, dict[str, float]]]], *, everything: bool) -> int:
    """Hold the decisions to every line and branch and, with ``everything``, the rest together to the floor."""
    summaries = {name: file["summary"] for name, file in report["files"].items()}
    below = [name for name in FULL if summaries[name]["percent_covered"] < 100]
    if everything:
        rest = share(summary for name, summary in summaries.items() if name not in FULL)
        below += [f"the rest together: {rest:.1f} %"] if rest < FLOOR else []
        thin = [f"{name} {s['percent_covered']:.0f} %" for name, s in summaries.items() if s["percent_covered"] < FLOOR]
        print(f"thin: {', '.join(thin) or 'none'}")  # noqa: T201
    print(f"coverage below its floor: {', '.join(below) or 'none'}")  # noqa: T201
    return 1 if below else 0


def share(summaries: Iterable[dict[str, float]]) -> float:
    """Lines and branches covered, of all together, percent."""
    found = list(summaries)
    there = sum(summary["num_statements"] + summary["num_branches"] for summary in found)
    return 100 * sum(summary["covered_lines"] + summary["covered_branches"] for summary in found) / there


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
