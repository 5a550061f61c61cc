"""A real exporter process and what it says, and records that a worker might have written."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import redis
from prometheus_client.parser import text_string_to_metric_families

from producer.keys import Keys
from producer.message import Attempt, Call, Outcome, OutcomeKind
from tests.commands import Served

KEYS = Keys()
Scrape = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Exporter(Served):
    """`python -m producer metrics` as a real process."""

    command = "metrics"

    def text(self) -> str:
        """One scrape as it came; an answer other than 200 raises."""
        with urllib.request.urlopen(self.url, timeout=20) as answer:
            assert answer.status == 200
            return str(answer.read().decode())

    def scrape(self) -> Scrape:
        """One scrape: value by name and labels, of which `queue` stands on all and is left out."""
        found: Scrape = {}
        for family in text_string_to_metric_families(self.text()):
            assert family.documentation
            for sample in family.samples:
                labels = dict(sample.labels)
                assert labels.pop("queue") == "cancels"
                name = (sample.name, tuple(sorted(labels.items())))
                assert name not in found
                found[name] = sample.value
        return found

    def value(self, name: str, **labels: str) -> float | None:
        """One figure of a new scrape, None where it has none."""
        return self.scrape().get((name, tuple(sorted(labels.items()))))


@contextlib.contextmanager
def exporting(url: str, *arguments: str, **environment: str) -> Iterator[Exporter]:
    """An exporter on a port of its own, which complains of nothing as long as the block runs."""
    with Exporter(url, *arguments, stderr=None, PORT="1", **environment) as exporter:
        yield exporter
        if exporter.process.poll() is None:
            assert exporter.stop() == (0, "")


def record(number: int = 1, **fields: object) -> str:
    """An outcome record as a worker writes it, with these fields, which no worker need have written."""
    attempts = (Attempt(1, 1_010, Call.CANCEL, 200, 200, "", "confirmed", 5),)
    base = Outcome(f"{number:032x}", 1, OutcomeKind.CANCELLED, "default", number, may_be_live=False, attempts=attempts)
    ended = replace(base, enqueued_at_ms=1_000, finished_at_ms=1_040, worker="w.1")
    return json.dumps(ended.as_dict() | fields)


def append(connection: redis.Redis, *records: str, **options: Any) -> None:
    """Entries of the ledger."""
    with connection.pipeline(transaction=False) as pipeline:
        for each in records:
            pipeline.xadd(KEYS.outcomes, {"outcome": each}, **options)
        pipeline.execute()


def outcomes(scrape: Scrape, name: str = "cancel_account_outcomes_total") -> float:
    """How many outcomes are counted in all: what the ledger told, unless another metric is named."""
    return sum(value for (each, _), value in scrape.items() if each == name)
