"""`python -m tests.versions [--pythons] [PYTEST ARGUMENTS]`: the suite, or what is named, with other versions.

By default with the oldest versions of all dependencies that pyproject.toml allows, on this interpreter (but without the
exchange's libraries of `tests/clients`, which ask for newer ones of what they share with us); with
`--pythons` with the newest ones, on each interpreter that is found of those that it allows. Each run has an environment
of its own, which is removed afterwards.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.servers import ROOT

#: What runs in production; the tools of the tests are as new as they are.
EXTRAS = ("signing", "sandbox", "metrics", "web")
MINORS = range(11, 15)
_LEAST = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)(?:\[[^\]]*\])?>=(?P<version>[0-9.]+)")


def main(arguments: list[str]) -> int:
    """Run pytest as often as asked for; gives the worst exit code."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)  # noqa: T201
        return 0
    if arguments[:1] != ["--pythons"]:
        return _run(Path(sys.executable), "\n".join(oldest()), arguments)
    worst = 0
    pythons = dict(_pythons())
    for minor in MINORS:
        if minor in pythons:
            worst = max(worst, _run(pythons[minor], "", arguments[1:]))
        else:
            _say(f"Python 3.{minor}: not found")
    return worst


def _project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return project


def oldest() -> Iterator[str]:
    """Each dependency at the lower end of its range."""
    project = _project()
    optional = project["optional-dependencies"]
    for wanted in (*project["dependencies"], *(each for extra in EXTRAS for each in optional[extra])):
        if found := _LEAST.match(wanted):
            yield f"{found['name']}=={found['version']}"


def _pythons() -> Iterator[tuple[int, Path]]:
    """Interpreters by minor version, the best one last: on PATH (perhaps a mere pointer), of pyenv, and this one."""
    for minor in MINORS:
        if found := shutil.which(f"python3.{minor}"):
            yield minor, Path(found)
    for place in sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/3.*/bin/python")):
        yield int(place.parent.parent.name.split(".")[1]), place
    yield sys.version_info.minor, Path(sys.executable)


def _wanted(*, is_oldest: bool) -> tuple[str, ...]:
    """What is installed."""
    if not is_oldest:
        return ("-e", f"{ROOT}[test]")
    project = _project()
    tools = [each for each in project["optional-dependencies"]["test"] if not each.startswith(project["name"])]
    return ("-e", f"{ROOT}[{','.join(EXTRAS)}]", *tools)


def _run(python: Path, constraints: str, arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        inside, pinned = str(home / "venv" / "bin" / "python"), home / "constraints.txt"
        pinned.write_text(constraints, "utf-8")
        wanted = _wanted(is_oldest=bool(constraints))
        install = [inside, "-m", "pip", "install", "-q", "-c", str(pinned), *wanted]
        test = [inside, "-m", "pytest", *arguments] if arguments else [inside, "-m", "tests"]
        for command in ([str(python), "-m", "venv", str(home / "venv")], install):
            if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
                _say(f"{python}: cannot be prepared")
                return code
        left_out = {"PYTEST_ADDOPTS": "--deselect tests/clients"} if constraints else {}
        code = subprocess.run(test, cwd=ROOT, check=False, env=os.environ | left_out).returncode
        shown = "the oldest versions" if constraints else "the newest versions"
        version = subprocess.run([inside, "--version"], capture_output=True, text=True, check=False).stdout.strip()
        _say(f"{version} with {shown}: {'passed' if code == 0 else f'failed ({code})'}")
        return code


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
