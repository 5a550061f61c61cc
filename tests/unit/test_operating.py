"""The page for operators names what there is: settings, metrics, and rules that can be loaded as they stand."""

from __future__ import annotations

import re

from tests.servers import ROOT
from worker.sandbox.endpoints import ENDPOINTS
from worker.sandbox.server import ORDER_CALLS
from worker.settings import SETTINGS

TEXT = (ROOT / "worker/docs/operating.md").read_text("utf-8")
#: The block of Prometheus' rules, as it is written to a file.
RULES = re.search(r"^```yaml\n(?:#.*\n)?(groups:\n.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_every_setting_is_explained() -> None:
    """Whoever looks for a variable finds it; DYNO is Heroku's own."""
    missing = {setting.variable for setting in SETTINGS} - {"DYNO"} - set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", TEXT))
    assert {variable for variable in missing if "<ACCOUNT>" not in variable} == set()


def test_the_rules_stand_in_a_group() -> None:
    """Prometheus loads a file of groups, and no bare rules; each rule has an expression, and nothing stands outside."""
    assert RULES is not None
    head, *rules = re.split(r"^      - alert: ", RULES[1], flags=re.MULTILINE)
    assert head == "groups:\n  - name: cancels\n    rules:\n"
    assert len(rules) > 5
    for rule in rules:
        first, *lines = rule.rstrip().split("\n")
        assert re.fullmatch(r"[A-Za-z]+( +#.*)?", first)
        assert lines[0].startswith("        expr: ")
        assert ": " not in lines[0].removeprefix("        expr: ")
        assert all(line.startswith("        ") for line in lines)


def test_the_rules_name_metrics_that_there_are() -> None:
    """A rule about a metric that was renamed would never wake anybody."""
    assert RULES is not None
    source = (ROOT / "producer/metrics.py").read_text("utf-8")
    named = set(re.findall(r"\b(cancel_[a-z_]+?)(?:_bucket|_total)?\b(?=[^a-z_]|$)", RULES[1]))
    known = set(re.findall(r"\"(cancel_[a-z_]+?)(?:_total)?\"", source))
    known |= {f"cancel_{name}" for name in re.findall(r"\"([a-z_]+?)(?:_total)?\"", source)}
    assert named <= known


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
