"""A few threads for what has to wait: unlike an executor's, they hold up nobody's exit."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

__all__ = ["Aside", "Helpers"]

T = TypeVar("T")


class Aside(Protocol):
    """A way to have something done that waits, and to go on with its result or its error."""

    def __call__(self, work: Callable[[], T], then: Callable[[Any, BaseException | None], None]) -> None:
        """Do ``work`` elsewhere, and call ``then`` here when it is done."""


class Helpers:
    """At most ``size`` daemon threads, made when they are needed, that do one piece of work after the other."""

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        self._name = name
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._made = 0

    def run(self, work: Callable[[], None]) -> None:
        """Have ``work`` done, which must not raise. To be called by one thread alone.

        Raises:
            RuntimeError: it will not be done, as not even one thread can be made.
        """
        if self._made < self._size and not self._idle.acquire(blocking=False):
            self._make()
        self._work.put(work)

    def _make(self) -> None:
        try:
            threading.Thread(target=self._live, name=f"{self._name}-{self._made}", daemon=True).start()
        except RuntimeError:  # no more threads: those that there are must do
            if self._made == 0:
                raise
        else:
            self._made += 1

    def _live(self) -> None:
        while True:
            self._work.get()()
            self._idle.release()
