"""What processes have used: CPU time and memory, read from /proc. On systems without it there is nothing to tell."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Self

_PROC = Path("/proc")
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
#: Linux makes the id of a process' CPU clock out of its pid and this (clock_getcpuclockid(3)); in nanoseconds, where
#: /proc/PID/stat has steps of 10 ms.
_CPUCLOCK_SCHED = 2
_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20
_SAMPLE_S = 0.05


def tree(pid: int) -> list[int]:
    """A process and its living descendants."""
    found = [pid]
    for parent in found:
        try:
            for task in (_PROC / str(parent) / "task").iterdir():
                found += map(int, (task / "children").read_text("ascii").split())
        except OSError:
            continue  # it has ended, or this system does not tell
    return found


def cpu_s(pid: int) -> float | None:
    """CPU seconds of a process, its living descendants, and those that it has waited for (these in steps of 10 ms)."""
    total = None
    for each in tree(pid):
        try:
            waited = (_PROC / str(each) / "stat").read_text("ascii").rpartition(")")[2].split()[13:15]  # cutime cstime
            own_s = time.clock_gettime(~each << 3 | _CPUCLOCK_SCHED)
        except OSError:
            continue  # it has ended, or this system does not tell
        total = (total or 0.0) + own_s + sum(map(int, waited)) * _TICK_S
    return total


def rss_mib(pid: int) -> float | None:
    """Resident memory of a process and its living descendants, MiB; pages that they share count for each."""
    total = None
    for each in tree(pid):
        try:
            total = (total or 0.0) + int((_PROC / str(each) / "statm").read_text("ascii").split()[1]) * _PAGE_MIB
        except OSError:
            continue
    return total


def until_quiet(pid: int, limit_s: float = 3.0) -> None:
    """Return once a process has used next to no CPU for a moment, or after ``limit_s``."""
    ends_at, before = time.monotonic() + limit_s, cpu_s(pid)
    while time.monotonic() < ends_at:
        time.sleep(0.1)
        now = cpu_s(pid)
        if now is None or before is None or now - before < 0.01:
            return
        before = now


class PeakRss:
    """The largest resident memory of a process while a block runs; ``mib`` is None where it cannot be told."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.mib: float | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        last = False
        while not last:
            last = self._ended.wait(_SAMPLE_S)
            if (now := rss_mib(self._pid)) is not None:
                self.mib = max(now, self.mib or 0.0)
