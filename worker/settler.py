"""Settlements on their way into Redis: those that come up together are written in one call (group commit)."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

import redis

from worker import log
from worker.line import Lines
from worker.store import Settlement, Store

__all__ = ["Settler", "where"]

#: Most settlements of one call.
GROUP = 256
#: An error of the script is about its rows, unless a server says this of itself; Redis 6.2 wraps that in one.
_ROWS = re.compile(r"script|WRONGTYPE", re.IGNORECASE)
_SERVER = re.compile(r"\b(BUSY|CLUSTERDOWN|LOADING|MASTERDOWN|MISCONF|NOREPLICAS|OOM|READONLY|TRYAGAIN|UNKILLABLE)\b")


class Settler:
    """Keeps settlements until they are written; a repeat of a write that had worked changes nothing.

    ``told`` is called for each with the answer of :meth:`worker.store.Store.settle`, or None where it could not be
    written at all: its job comes back when its lease runs out. Used by the thread of ``loop`` alone.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        lines: Lines,
        store: Store,
        told: Callable[[Settlement, int | None], None],
    ) -> None:
        self._loop = loop
        self._lines = lines
        self._store = store
        self._told = told
        self._heap: deque[Settlement] = deque()
        self._alone: deque[Settlement] = deque()  # of a group that could not be written as one
        self._writing: list[Settlement] = []
        self._is_planned = False
        self._is_resting = False  # the server refused

    @property
    def busy(self) -> bool:
        """Whether something is not written yet."""
        return bool(self._heap or self._alone or self._writing)

    def add(self, settlement: Settlement) -> None:
        """Write it with all that comes up in this turn of the loop."""
        self._heap.append(settlement)
        self._plan()

    def flush(self) -> None:
        """Write what there is; what comes up meanwhile is written when that is answered."""
        self._is_planned = False
        if self._writing or self._is_resting or not self._lines.can_ask or not (self._heap or self._alone):
            return
        if self._alone:
            group = [self._alone.popleft()]
        else:
            group = [self._heap.popleft() for _ in range(min(len(self._heap), GROUP))]
        self._writing = group
        try:
            request = self._store.settle_request(group)
        except Exception as error:  # noqa: BLE001 - what cannot be written at all must not hold up the others
            self._one_by_one(group, f"{type(error).__name__} in {where(error)}")
        else:
            self._lines.ask(request, partial(self._written, group), partial(self._refused, group))

    def _plan(self) -> None:
        if not self._is_planned and not self._writing:
            self._is_planned = True
            self._loop.call_soon(self.flush)

    def _written(self, group: list[Settlement], answers: list[int]) -> None:
        self._lines.worked()
        self._writing = []
        self._plan()
        for settlement, answer in zip(group, answers, strict=True):
            self._told(settlement, answer)

    def _refused(self, group: list[Settlement], error: redis.RedisError) -> None:
        said = str(error)
        if type(error) is redis.ResponseError and _ROWS.search(said) and not _SERVER.search(said):
            self._one_by_one(group, said)
            return
        self._heap.extendleft(reversed(group))
        self._writing = []
        if self._lines.can_ask:  # an answer; else it is written when there is a connection again
            self._is_resting = True
            self._loop.call_later(self._lines.trouble(error), self._try_again)

    def _try_again(self) -> None:
        self._is_resting = False
        self.flush()

    def _one_by_one(self, group: list[Settlement], said: str) -> None:
        """One row must not hold up the others."""
        self._writing = []
        self._plan()
        if len(group) > 1:
            self._alone.extend(group)
        else:
            log.error("defect", id=group[0].grant.id, where="settle", error=said)
            self._told(group[0], None)


def where(error: BaseException) -> str:
    """The place in the code that an error came from; what it says may hold what must not be logged."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}" if frame is not None else "?"
