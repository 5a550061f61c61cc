"""What is shipped for whoever watches: Prometheus' rules, Grafana's dashboard, and the table that explains the metrics.

Prometheus' own `promtool` reads the rules and plays what they see (`cancels.rules.test.yml`).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from producer.keys import Keys
from tests.exporting import append, exporting, record
from tests.servers import ROOT, Valkey, Workers, eventually

RULES = ROOT / "worker/docs/cancels.rules.yml"
DASHBOARD = json.loads((ROOT / "worker/docs/cancels.dashboard.json").read_text("utf-8"))
OPERATING = (ROOT / "worker/docs/operating.md").read_text("utf-8")
METRIC = re.compile(r"\bcancel_[a-z_]+\b")


def panels() -> Iterator[dict[str, Any]]:
    """Those of the dashboard."""
    yield from DASHBOARD["panels"]


def expressions() -> list[str]:
    """What the dashboard asks of Prometheus, with its variables filled in."""
    asked = [target["expr"] for panel in panels() for target in panel["targets"]]
    return [expr.replace("$queue", "cancels").replace("$__rate_interval", "5m") for expr in asked]


@pytest.fixture
def scraped(valkey: Valkey, connection: redis.Redis, workers: Workers) -> dict[str, set[str]]:
    """Each name that a scrape has, with its labels, where a worker is at work and a key is refused."""
    connection.sadd(Keys().suspects, "default")
    connection.hset(Keys().breaker("default"), mapping={"failures": 5, "since_ms": 1, "probe_at_ms": 2})
    workers.start()
    with exporting(valkey.url) as exporter:
        eventually(lambda: exporter.value("cancel_clock_offset_seconds") is not None, what="the worker's figures")
        append(connection, record())
        names: dict[str, set[str]] = {}
        for name, labels in exporter.scrape():
            names.setdefault(name, {"queue"}).update(label for label, _ in labels)
        return names


def test_what_watches_asks_for_what_is_told(scraped: dict[str, set[str]]) -> None:
    """Rules and dashboard name metrics and labels of a real scrape, and the table explains each metric of it and no
    other."""
    families = {
        re.sub(r"_(bucket|sum|count)$", "", name) if "le" in labels else name for name, labels in scraped.items()
    }
    families -= {f"{name}{end}" for name in families for end in ("_sum", "_count")}
    table = re.findall(r"^\| (`cancel_.*?) \|", OPERATING, re.MULTILINE)
    rules = "\n".join(line for line in RULES.read_text("utf-8").splitlines() if not line.lstrip().startswith("#"))
    asked = {*METRIC.findall(rules), *METRIC.findall("\n".join(expressions()))}

    assert {name for row in table for name in METRIC.findall(row)} == families
    assert asked <= set(scraped)
    known = set().union(*scraped.values()) | {"instance"}
    told = [target["legendFormat"] for panel in panels() for target in panel["targets"]]
    assert set(re.findall(r"\{\{ ?(?:\$labels\.)?(\w+)", " ".join([rules, *told]))) - {"value"} <= known
    grouped = re.findall(r"by \(([^)]*)\)", " ".join([rules, *expressions()]))
    assert {label.strip() for labels in grouped for label in labels.split(",")} <= known


def test_each_alert_says_what_to_do() -> None:
    """Whoever is woken reads how bad it is and what it is about, and finds the alert's name where the link leads."""
    text = RULES.read_text("utf-8")
    alerts = re.split(r"^      - alert: ", text, flags=re.MULTILINE)[1:]
    section = OPERATING.partition("\n## When it wakes you\n")[2].partition("\n## ")[0]

    assert len(alerts) > 10
    for alert in alerts:
        name = alert.split("\n", 1)[0]
        assert re.search(r"^          severity: (critical|warning)$", alert, re.MULTILINE), name
        assert re.search(r'^          summary: ".+"$', alert, re.MULTILINE), name
        assert "\n          runbook_url: operating.md#when-it-wakes-you\n" in f"{alert}\n", name
        assert f"`{name}`" in section, name


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    """Panels stand side by side without covering each other, ask the chosen Prometheus and queue, and have own ids."""
    assert DASHBOARD["schemaVersion"] >= 39
    assert [each["name"] for each in DASHBOARD["templating"]["list"]] == ["datasource", "queue"]
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)
    covered: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not covered & cells, panel["title"]
        assert all(x < 24 for x, _ in cells)
        covered |= cells
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == panel["datasource"]["uid"] == "${datasource}"
            assert 'queue="$queue"' in target["expr"], panel["title"]


def promtool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """What Prometheus' tool says."""
    if (program := shutil.which("promtool")) is None:
        pytest.fail("promtool is not installed; on Debian: apt-get install prometheus", pytrace=False)
    return subprocess.run([program, *words], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.promtool
def test_prometheus_takes_the_rules() -> None:
    """The file loads as it stands, and its alerts fire when they should and at no other time."""
    checked = promtool("check", "rules", RULES)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    played = promtool("test", "rules", Path(__file__).with_name("cancels.rules.test.yml"))
    assert played.returncode == 0, played.stdout + played.stderr


@pytest.mark.promtool
def test_prometheus_understands_the_dashboard(tmp_path: Path) -> None:
    """Each expression of a panel is one that Prometheus can evaluate."""
    rules = [{"record": f"r{n}", "expr": expr} for n, expr in enumerate(expressions())]
    file = tmp_path / "rules.json"  # what is JSON is YAML, too
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}), "utf-8")

    checked = promtool("check", "rules", file)

    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(rules)} rules found" in checked.stdout
