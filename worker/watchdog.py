"""Ends a process whose event loop stands still: it is started anew, and the leases bring its jobs back.

A loop that stands in a call which never comes back cannot say so itself, and whoever asks only whether the process
lives is told that it does.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from worker import log

#: How long the end may be put off by what is still to be said, s.
_WORDS_S = 1.0
#: Innermost frames of each thread that are told.
_FRAMES = 12


def end_process() -> None:
    """Tell on stderr where each thread stands, and end the process with 70, within a second whatever is locked."""
    try:
        words = threading.Thread(target=_last_words, name="last-words", daemon=True)
        words.start()
        words.join(_WORDS_S)
    finally:
        os._exit(os.EX_SOFTWARE)


def _last_words() -> None:
    log.last_words("defect", where="loop", error="it stands still; the leases bring its jobs back", exit=os.EX_SOFTWARE)
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            log.last_words("stands", thread=names.get(ident, ident), frames=_frames(frame))


def _frames(frame: FrameType | None) -> str:
    """Files and lines alone, from the innermost outwards: a variable may hold a secret."""
    found: list[str] = []
    while frame is not None and len(found) < _FRAMES:
        found.append(f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno}")
        frame = frame.f_back
    return " ".join(found)


class Watchdog:
    """Ends the process after ``looks`` looks in a row, ``look_s`` apart, without a tick.

    The loop has to call :meth:`tick` at least once in ``look_s``. Only time in which this thread ran counts: when it
    was held up itself (a stopped process, a sleeping host, no processor to be had), the loop was too, and the count
    begins anew.
    """

    def __init__(self, look_s: float, looks: int) -> None:
        self._look_s = look_s
        self._looks = looks
        self._ticks = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def tick(self) -> None:
        """The loop moves. For its thread alone."""
        self._ticks += 1

    def start(self) -> None:
        """Begin to watch; the first tick is due within the first look."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no more: the loop is about to end. Does not wait, and may be called before the start."""
        self._stopped.set()

    def _watch(self) -> None:
        seen, missed = self._ticks, 0
        began_s = time.monotonic()
        while not self._stopped.wait(self._look_s):
            now_s = time.monotonic()
            was_held_up = now_s - began_s > 2 * self._look_s
            ticks = self._ticks
            missed = 0 if ticks != seen or was_held_up else missed + 1
            if missed >= self._looks:
                end_process()
            seen, began_s = ticks, now_s
