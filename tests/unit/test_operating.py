"""The documents name what there is: settings, files, and the sandbox's calls and controls."""

from __future__ import annotations

import re
from inspect import signature
from pathlib import Path

import pytest

from tests.servers import ROOT, python
from worker.sandbox.control import HANDLERS, MOVES
from worker.sandbox.endpoints import ENDPOINTS
from worker.sandbox.server import ORDER_CALLS
from worker.settings import SETTINGS

TEXT = (ROOT / "worker/docs/operating.md").read_text("utf-8")


def test_every_setting_is_explained() -> None:
    """`--help` is where each variable stands with its default, its meaning and its rule: whoever looks finds it."""
    told = " ".join(python("-m", "worker", "--help").stdout.split())
    for setting in SETTINGS:
        assert f"{setting.variable} {setting.default or '-'} {setting.meaning}: {setting.accepts}" in told


def test_the_sandboxs_document_names_every_call_and_control() -> None:
    """Whoever develops against the sandbox finds each of its exchange's calls, moves and settings in one place."""
    text = (ROOT / "worker/docs/sandbox.md").read_text("utf-8")
    calls = {path.rpartition("/")[2] for _, path in (*ENDPOINTS, *ORDER_CALLS)}
    assert {name for name in calls if name not in text} <= {"dual", "leverageBracket"}
    controls = {name for _, name in HANDLERS} | {*MOVES, *(name for takes, _ in MOVES.values() for name in takes)}
    for handler in HANDLERS.values():
        controls |= {each.name for each in signature(handler).parameters.values() if each.kind is each.KEYWORD_ONLY}
    assert len(controls) > 30
    assert {name for name in controls if f"`{name}`" not in text and f'"{name}"' not in text} == set()


@pytest.mark.parametrize(
    "document", sorted([*ROOT.glob("*.md"), *ROOT.glob("*/docs/*.md")]), ids=lambda path: path.name
)
def test_the_documents_name_files_and_places_that_there_are(document: Path) -> None:
    """Whoever follows a name or a link arrives."""
    text = document.read_text("utf-8")
    files = {str(path.relative_to(ROOT)) for path in ROOT.glob("[!.]*/**/*.*")} | {path.name for path in ROOT.iterdir()}
    named = set(re.findall(r"`([\w./-]+\.(?:py|lua|md|toml|json))`", text))
    assert [name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in files)] == []
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (document.parent / target).exists(), target


def test_every_promise_names_tests_that_there_are() -> None:
    """`python -m tests -k NAME` finds what holds a promise of the README."""
    promises = (ROOT / "README.md").read_text("utf-8").partition("## What you can rely on")[2].partition("\n## ")[0]
    bullets = promises.split("\n- **")[1:]
    texts = {path.name: path.read_text("utf-8") for path in ROOT.glob("tests/*/test_*.py")}
    assert len(bullets) > 10
    for bullet in bullets:
        names = re.findall(r"`(\w+)`", (re.search(r"\[(`[\w`,\s]+`)\]\s*(?:\n\n|$)", bullet + "\n\n") or [""])[0])
        assert names, bullet
        for name in names:
            assert any(name in file or re.search(rf"^def test_\w*{name}", text, re.M) for file, text in texts.items())
