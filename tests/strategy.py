"""A strategy in a process of its own, with the client of whatever version of the package a directory holds.

:class:`Strategy` is the test's end. Run as a program this is the other end: it reads one call a line from stdin, as
JSON, and answers each with a line. It uses only what the client of every version has.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from producer import CancelClient, CancelRequest, Outcome
from producer import __file__ as producer_file


class Strategy:
    """A process that asks for cancels through the client in ``directory``."""

    def __init__(self, directory: Path, url: str, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, url],
            cwd=directory,
            env=environment | {"PYTHONPATH": str(directory)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.producer = str(self._call("where"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.communicate()

    def cancel(self, *requests: dict[str, Any]) -> list[str]:
        """Ask for cancels in one call, each given by the fields of its request; gives the ids of their jobs."""
        return list(self._call("cancel", *requests))

    def outcomes(self, job_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Those outcomes that there are, as this version reads and shows them."""
        return dict(self._call("outcomes", *job_ids))

    def waited_for(self, job_id: str) -> dict[str, Any]:
        """The outcome of one request, waited for."""
        return dict(self._call("wait", job_id))

    def retry(self, *job_ids: str) -> list[str]:
        """Have failed requests run once more; gives those that do."""
        return list(self._call("retry", *job_ids))

    def ledger(self) -> list[dict[str, Any]]:
        """Every outcome of the ledger, oldest first."""
        return list(self._call("ledger"))

    def _say(self, *words: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()

    def _call(self, *words: object) -> Any:
        self._say(*words)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the strategy has ended, exit code {self._process.wait()}"
        return json.loads(line)


def answer(client: CancelClient, name: str, given: list[Any]) -> object:
    """Carry one call out."""

    def shown(outcome: Outcome) -> dict[str, object]:
        return outcome.as_dict() | {"off_the_book": outcome.off_the_book}

    if name == "cancel":
        return [ticket.id for ticket in client.cancel_many([CancelRequest(**fields) for fields in given])]
    if name == "outcomes":
        return {job_id: shown(outcome) for job_id, outcome in client.outcomes_of(given).items()}
    if name == "wait":
        return shown(client.wait(given[0], timeout_s=30))
    if name == "retry":
        return client.retry(given)
    if name == "ledger":
        return [shown(outcome) for _, outcome in client.outcomes()]
    return producer_file


def main(url: str) -> None:
    """Serve the calls on stdin."""
    with CancelClient.from_url(url, timeout_s=10) as client:
        for line in sys.stdin:
            name, *given = json.loads(line)
            sys.stdout.write(json.dumps(answer(client, name, given)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
