"""`python -m tests`: the whole suite, with coverage of every process, and the floors that it must hold.

Arguments go to pytest (`python -m tests -k lease`); a selection is not held to the floors.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Least coverage of lines and branches together, percent: the decisions in full, every other file nearly.
FULL = ("producer/message.py", "worker/verdict.py")
FLOOR = 90.0
#: How the whole suite is run: three files at a time, as most of their time is waiting; then the faults by themselves:
#: they play several scenes at a time of their own accord, and measure how soon somebody notices.
ROUNDS = (("-n", "3", "--dist", "loadfile", "tests/unit", "tests/integration"), ("tests/fault",))


def main(arguments: list[str]) -> int:
    """Run pytest under coverage; gives the exit code."""
    with tempfile.TemporaryDirectory() as directory:
        data = f"--data-file={directory}/coverage"
        run = [sys.executable, "-m", "coverage"]
        for chosen in [tuple(arguments)] if arguments else ROUNDS:
            pytest = [*run, "run", data, "-m", "pytest", *chosen]
            if code := subprocess.run(pytest, cwd=ROOT, check=False).returncode:
                return code
        if arguments:
            return 0
        subprocess.run([*run, "combine", "-q", data], cwd=ROOT, check=True)
        report = f"{directory}/report.json"
        subprocess.run([*run, "report", data], cwd=ROOT, check=True)
        subprocess.run([*run, "json", "-q", data, "-o", report], cwd=ROOT, check=True)
        return judge(json.loads(Path(report).read_text("utf-8")))


def judge(report: dict[str, dict[str, dict[str, dict[str, float]]]]) -> int:
    """Name every file below its floor."""
    below = []
    for name, file in report["files"].items():
        floor = 100.0 if name in FULL else FLOOR
        covered = file["summary"]["percent_covered"]
        if covered < floor:
            below.append(f"{name}: {covered:.1f} % of lines and branches are covered, {floor:.0f} % is the floor")
    print("\n".join(below) or "coverage: every file is above its floor")  # noqa: T201
    return 1 if below else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
