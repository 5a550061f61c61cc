"""What a bot meets that has the project installed: its version, its types, and names that stand in its way."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import producer
from tests.servers import ROOT, scrubbed

SNIPPET = """
from producer import AsyncCancelClient, CancelClient, Outcome, Ticket, Waited

def use(client: CancelClient) -> Outcome:
    ticket: Ticket = client.cancel(algo_id=1, deadline_s=60)
    waited: Waited = client.wait_many([ticket, ticket.id], timeout_s=5)
    return waited.ended[ticket.id]

async def use_async(client: AsyncCancelClient) -> Outcome:
    return await (await client.cancel(algo_id="1")).wait(5)
"""


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of the installation, in a directory of a bot."""
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(
        command, cwd=directory, env=scrubbed(), capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("package", ["producer", "worker"])
def test_the_version_is_told(package: str, tmp_path: Path) -> None:
    """By both commands, and by the package that strategies import."""
    done = run(tmp_path, package, "--version")

    assert (done.returncode, done.stdout) == (0, f"python -m {package} {version('algo-cancel-queue')}\n")
    assert producer.__version__ == version("algo-cancel-queue")


def test_types_are_seen(tmp_path: Path) -> None:
    """A type checker sees the types through the installation that README names, and tells a wrong one."""
    (tmp_path / "bot.py").write_text(SNIPPET)
    done = run(tmp_path, "mypy", "--strict", "bot.py")

    assert [line.partition(": error: ")[0] for line in done.stdout.splitlines()[:-1]] == ["bot.py:10"], done.stdout
    assert 'incompatible type "str"; expected "int | None"' in done.stdout


def test_a_module_that_is_gone_is_not_shipped(tmp_path: Path) -> None:
    """`pip install .` in a checkout leaves nothing there, and the next one ships what stands there then, types too."""
    checkout, wheels = tmp_path / "checkout", tmp_path / "wheels"
    checkout.mkdir()
    for name in ("producer", "worker"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, checkout)
    before = sorted(path.name for path in checkout.iterdir())
    (checkout / "producer" / "gone.py").touch()
    for name in ("first", "second"):
        done = run(checkout, "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(wheels / name), ".")
        assert done.returncode == 0, done.stderr
        (checkout / "producer" / "gone.py").unlink(missing_ok=True)

    assert sorted(path.name for path in checkout.iterdir()) == before
    (wheel,) = (wheels / "second").iterdir()
    shipped = zipfile.ZipFile(wheel).namelist()
    assert "producer/gone.py" not in shipped
    sources = {str(path.relative_to(ROOT)) for name in ("producer", "worker") for path in (ROOT / name).rglob("*.*")}
    assert {name for name in sources if "__pycache__" not in name} == {n for n in shipped if ".dist-info/" not in n}


def test_a_bot_s_own_names_are_noticed(tmp_path: Path) -> None:
    """A `producer` of the bot's own stops our worker with its path; a `worker` of its own is pointed out."""
    (tmp_path / "producer.py").write_text("")
    done = run(tmp_path, "worker", "--version")
    assert done.returncode == 1
    assert f"here `producer` is {tmp_path / 'producer.py'}, not this project's" in done.stderr
    (tmp_path / "producer.py").unlink()
    (tmp_path / "worker.py").write_text("")
    done = run(tmp_path, "producer", "outcome", "")
    assert f"here `worker` is {tmp_path / 'worker.py'}, not this project's" in done.stderr
