"""`python -m tests.fuzz --seconds 60 [--target decode|http|verdict]`: look for bytes that break a rule of the targets.

With atheris (not among the project's dependencies) the search is guided by coverage. Without it, Hypothesis damages the
seeds. Either way a finding ends the search with a traceback and exit code other than 0.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

TARGETS = ("decode", "http", "verdict")


def _atheris() -> ModuleType | None:
    try:
        return importlib.import_module("atheris")
    except ImportError:
        return None


def _guided(atheris: ModuleType, name: str, seconds: int) -> None:
    """Hand over to libFuzzer, which ends the process itself."""
    # What is instrumented must not have been imported before; instrumenting everything would take minutes.
    with atheris.instrument_imports(include=["producer", "worker", "json"]):
        targets = importlib.import_module("tests.fuzz.targets")
    with tempfile.TemporaryDirectory() as directory:
        for number, seed in enumerate(targets.seeds(name)):
            (Path(directory) / str(number)).write_bytes(seed)
        options = [f"-max_total_time={seconds}", "-max_len=4096", "-timeout=10", "-print_final_stats=1"]
        options += [f"-artifact_prefix={tempfile.gettempdir()}/fuzz-", directory]
        atheris.Setup([sys.argv[0], *options], targets.TARGETS[name])
        atheris.Fuzz()


def main() -> int:
    """Fuzz one target in this process, or each of them in one of its own."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="how long each target is fuzzed")
    parser.add_argument("--target", choices=TARGETS)
    chosen = parser.parse_args()
    if chosen.target is None:
        command = [sys.executable, "-m", "tests.fuzz", "--seconds", str(chosen.seconds), "--target"]
        return max(int(subprocess.run([*command, name]).returncode != 0) for name in TARGETS)
    atheris = _atheris()
    if atheris is not None:
        _guided(atheris, chosen.target, chosen.seconds)
    else:
        importlib.import_module("tests.fuzz.mutations").search(chosen.target, chosen.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
