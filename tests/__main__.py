"""`python -m tests`: the whole suite, with coverage of every process, and the floors that it must hold.

Arguments go to pytest (`python -m tests -k lease`); a selection is not held to the floors.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Least coverage of lines and branches together, percent: the decisions in full, every other file nearly.
FULL = ("producer/message.py", "worker/verdict.py")
FLOOR = 90.0
#: Files that reach no line which the others do not: they run without coverage, which doubles what a test costs.
UNMEASURED = (
    *("integration/test_canary.py", "integration/test_hostile_jobs.py", "integration/test_web_browser.py"),
    *("integration/test_tls_redis.py", "integration/test_connections.py", "integration/test_bench.py"),
    *("integration/test_testing_contract.py", "integration/test_sandbox_server.py", "unit/test_fuzz.py"),
)
_BESIDE = tuple(f"tests/{name}" for name in UNMEASURED)
#: How the whole suite is run: what is measured, and the rest, four files or tests at a time, as most of their time is
#: waiting; then the faults by themselves: they play several scenes at a time of their own accord, and measure how soon
#: somebody notices.
MEASURED = (
    "-n",
    "4",
    "--dist",
    "loadfile",
    *(f"--ignore={path}" for path in _BESIDE),
    "tests/unit",
    "tests/integration",
)
ROUNDS = (MEASURED, ("-n", "4", "--dist", "load", *_BESIDE), ("tests/fault",))
#: What the tests of the page drive; `.ci/run` installs it.
BROWSER = ("chromium", "chromedriver")
NO_BROWSER = "LEFT OUT: the page in a real browser. For these tests: apt-get install chromium chromium-driver"


def main(arguments: list[str]) -> int:
    """Run pytest under coverage; gives the exit code."""
    missing = [name for name in BROWSER if shutil.which(name) is None]
    left_out = ("-m", "not browser") if missing else ()
    if missing and not arguments:
        print(NO_BROWSER, file=sys.stderr)  # noqa: T201
    with tempfile.TemporaryDirectory() as directory:
        data = f"--data-file={directory}/coverage"
        run = [sys.executable, "-m", "coverage"]
        for chosen in [tuple(arguments)] if arguments else ROUNDS:
            measured = [*run, "run", data] if chosen is MEASURED else [sys.executable]
            pytest = [*measured, "-m", "pytest", *(() if "-m" in arguments else left_out), *chosen]
            if code := subprocess.run(pytest, cwd=ROOT, check=False).returncode:
                return code
        if arguments:
            return 0
        subprocess.run([*run, "combine", "-q", data], cwd=ROOT, check=True)
        report = f"{directory}/report.json"
        subprocess.run([*run, "report", data], cwd=ROOT, check=True)
        subprocess.run([*run, "json", "-q", data, "-o", report], cwd=ROOT, check=True)
        code = judge(json.loads(Path(report).read_text("utf-8")))
    if missing:
        print(NO_BROWSER, file=sys.stderr)  # noqa: T201
    return code


def judge(report: dict[str, dict[str, dict[str, dict[str, float]]]]) -> int:
    """Hold the decisions to every line and branch, and the rest together to the floor; name the thin files."""
    summaries = {name: file["summary"] for name, file in report["files"].items()}
    below = [name for name in FULL if summaries[name]["percent_covered"] < 100]
    rest = [summary for name, summary in summaries.items() if name not in FULL]
    there = sum(summary["num_statements"] + summary["num_branches"] for summary in rest)
    covered = sum(summary["covered_lines"] + summary["covered_branches"] for summary in rest)
    if covered < there * FLOOR / 100:
        below.append(f"the rest together: {100 * covered / there:.1f} %")
    thin = [f"{name} {s['percent_covered']:.0f} %" for name, s in summaries.items() if s["percent_covered"] < FLOOR]
    print(f"thin: {', '.join(thin) or 'none'}")  # noqa: T201
    print(f"coverage below its floor: {', '.join(below) or 'none'}")  # noqa: T201
    return 1 if below else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
