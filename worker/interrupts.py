"""Signals that ask a command for its end."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Self

__all__ = ["Interrupted", "Interrupts"]


class Interrupted(Exception):
    """A signal asked for the end."""


class Interrupts:
    """Notes the signals that ask for the end. They are looked at between steps: none may come between the start of a
    process and the note of it, or that process would be left behind."""

    def __init__(self) -> None:
        #: The last signal that came.
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number

    @property
    def exit_code(self) -> int:
        """As shells tell the death by this signal: 130 for Ctrl-C."""
        return 128 + (self.received or signal.SIGINT)

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self.received is not None:
            raise Interrupted
