"""Lines to a file descriptor through a bounded queue and a thread of its own: whoever hands one in never waits for it.

A reader that has stopped, a disk that is full, a descriptor that is closed: each costs lines, which are counted, and
nothing else. Here nothing is known of what a line says (:mod:`worker.log`).
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import queue
import select
import threading
import time
from collections import deque
from collections.abc import Callable

from producer.streams import silence

#: What is kept for a descriptor that takes nothing: so many lines, and so many bytes.
MAX_LINES, MAX_BYTES = 10_000, 8 * 1024 * 1024
#: How long the thread waits for company before it writes a line, s: one write for all lines of a busy moment, and none
#: in the moment in which a cancel is sent.
_GATHER_S = 0.005
#: How long is waited for before the next write when one failed, s: from, doubled each time, to.
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.01, 1.0
#: How long a line is waited for where each one is, s.
_EACH_S = 0.2
#: How long the end of a process waits for its last lines, s.
_EXIT_S = 0.5
#: Between two looks at whether all is written, s.
_LOOK_S = 0.001


class Output:
    """The way to one descriptor. There is one for a process; its thread begins with :meth:`start` or the first line.

    In a process that was forked it begins anew and empty, so that nothing is written twice, and waits for each line to
    be written: such a process (RQ's horse) is ended by `os._exit`, which waits for nobody.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._tell_lost: Callable[[int], bytes] = lambda lost: b"%d lines lost\n" % lost
        self._is_closed = False
        self._is_each_waited_for = False
        self._begin_anew()
        os.register_at_fork(after_in_child=self._forked)
        atexit.register(self._end)

    def _begin_anew(self) -> None:
        # Reentrant, as a signal's handler may log in the middle of a line of the same thread; so is SimpleQueue.
        self._lock = threading.RLock()
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._queue: deque[bytes | int] = deque()  # lines, and where some were lost, how many
        self._bytes = 0
        self._lost = 0  # since the last line that was taken
        self._is_awake = False  # the thread will look at the queue
        self._is_writing = False  # it has taken something from there
        self._is_failing = False  # the last write did
        self._is_stuck = False  # somebody waited in vain, and nothing was written since
        self._is_torn = False  # what was written last is a part of a line
        self._pause_s = 0.0

    def _forked(self) -> None:
        self._begin_anew()
        self._is_each_waited_for = True

    # -- for everybody --

    def start(self, tell_lost: Callable[[int], bytes], *, wait_for_each: bool) -> None:
        """Take lines. ``tell_lost`` makes the one that tells how many were lost.

        With ``wait_for_each`` a line is written, or was waited for 0.2 s, when :meth:`put` returns.
        """
        self._tell_lost = tell_lost
        self._is_each_waited_for = wait_for_each
        self._start_thread()

    def put(self, line: bytes) -> None:
        """Have a line written, its end included. Where there is no room for it, it is counted and forgotten."""
        if self._is_closed:
            return
        with self._lock:
            # Once full, the queue takes nothing before it is half empty: one long gap is told of, not a thousand.
            share = 2 if self._lost else 1
            if len(self._queue) >= MAX_LINES // share or self._bytes + len(line) > MAX_BYTES // share:
                self._lost += 1
                return
            if self._lost:
                self._queue.append(self._lost)
                self._lost = 0
            self._queue.append(line)
            self._bytes += len(line)
        if not self._is_awake:
            self._is_awake = True
            self._wake.put(None)
        if self._thread is None:
            self._start_thread()
        if self._is_each_waited_for and not self._is_stuck:
            self.flush(_EACH_S)

    def flush(self, timeout_s: float) -> bool:
        """Wait until all lines are written, at most so long; False if some are not, or are lost."""
        ends_at_s = time.monotonic() + timeout_s
        while self._queue or self._is_writing:
            if time.monotonic() >= ends_at_s:
                self._is_stuck = True
                return False
            time.sleep(_LOOK_S)
        return not self._is_failing and not self._is_closed

    def _end(self) -> None:
        """At the end of the process; whoever has waited in vain before does not wait twice."""
        if not self.flush(0 if self._is_stuck else _EXIT_S):
            silence(self._fd)

    # -- the thread --

    def _start_thread(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._live, name="log", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:  # no more threads now: the next line tries again
                    self._thread = None

    def _live(self) -> None:
        while not self._is_closed:
            self._wake.get()
            if not self._is_each_waited_for:
                time.sleep(_GATHER_S)
            self._is_awake = False
            while not self._is_closed and (taken := self._take()):
                self._write(taken)

    def _take(self) -> bytes | int:
        """What comes next: whole lines, as many as a pipe takes in one piece, or how many were lost. Else 0."""
        with self._lock:
            if not self._queue:
                lost, self._lost = self._lost, 0
                self._bytes = 0
                self._is_writing = lost > 0
                return lost
            self._is_writing = True
            first = self._queue.popleft()
            if isinstance(first, int):
                return first
            lines, size = [first], len(first)
            while self._queue and isinstance(line := self._queue[0], bytes) and size + len(line) <= select.PIPE_BUF:
                lines.append(line)
                size += len(line)
                self._queue.popleft()
            self._bytes -= size
            return b"".join(lines)

    def _write(self, taken: bytes | int) -> None:
        data = self._tell_lost(taken) if isinstance(taken, int) else taken
        done = 0
        while done < len(data):
            try:
                if self._is_torn:
                    os.write(self._fd, b"\n")
                    self._is_torn = False
                done += os.write(self._fd, data[done:])
            except BlockingIOError:  # somebody made it so; what it is full of is read some time
                self._pause()
            except OSError as error:
                if done:
                    self._is_torn = data[done - 1 : done] != b"\n"
                self._failed(error, taken if isinstance(taken, int) else data.count(b"\n", done))
                return
            else:
                self._is_failing = self._is_stuck = False
                self._pause_s = 0.0

    def _failed(self, error: OSError, lost: int) -> None:
        """Give up what is queued, so that a full disk or a reader that has left costs no memory, and wait a while."""
        with self._lock:
            self._lost += lost + sum(entry if isinstance(entry, int) else 1 for entry in self._queue)
            self._queue.clear()
            self._bytes = 0
            self._is_writing = False
            self._is_failing = True
            # Its number may soon be that of a connection: never again.
            self._is_closed = error.errno == errno.EBADF
        self._pause()

    def _pause(self) -> None:
        self._pause_s = min(max(2 * self._pause_s, _FIRST_PAUSE_S), _LAST_PAUSE_S)
        time.sleep(self._pause_s)


def write_now(fd: int, data: bytes, timeout_s: float) -> None:
    """Write past any queue, from any thread or signal's handler; what is not taken in time is lost. Raises nothing."""
    ends_at_s = time.monotonic() + timeout_s
    room = select.poll()
    room.register(fd, select.POLLOUT)
    with contextlib.suppress(OSError):
        while data and room.poll(max(ends_at_s - time.monotonic(), 0) * 1000):
            data = data[os.write(fd, data[: select.PIPE_BUF]) :]
