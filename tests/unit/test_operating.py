"""The pages for operators and developers name what there is: settings, and the sandbox's calls and controls."""

from __future__ import annotations

import re

from tests.servers import ROOT
from worker.sandbox.endpoints import ENDPOINTS
from worker.sandbox.server import ORDER_CALLS
from worker.settings import SETTINGS

TEXT = (ROOT / "worker/docs/operating.md").read_text("utf-8")


def test_every_setting_is_explained() -> None:
    """Whoever looks for a variable finds it; DYNO is Heroku's own."""
    missing = {setting.variable for setting in SETTINGS} - {"DYNO"} - set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", TEXT))
    assert {variable for variable in missing if "<ACCOUNT>" not in variable} == set()


def test_the_sandboxs_document_names_every_call_and_control() -> None:
    """Whoever develops against the sandbox finds each of its exchange's calls, moves and settings in one place."""
    text = (ROOT / "worker/docs/sandbox.md").read_text("utf-8")
    calls = {path.rpartition("/")[2] for _, path in (*ENDPOINTS, *ORDER_CALLS)}
    assert {name for name in calls if name not in text} <= {"dual", "leverageBracket"}
    source = (ROOT / "worker/sandbox/control.py").read_text("utf-8")
    controls = {*re.findall(r'\("(?:GET|POST)", "(\w+)"\):', source), *re.findall(r'case "(\w+)"', source)}
    controls |= {*re.findall(r'if "(\w+)" in asked:', source), *re.findall(r'asked\.get\("(end_faults)"\)', source)}
    assert len(controls) > 15
    assert {name for name in controls if f"`{name}`" not in text and f'"{name}"' not in text} == set()
