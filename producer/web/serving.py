"""The server around the pages: waitress, until a signal ends it."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from threading import Thread
from typing import Any

from flask import Flask
from waitress import wasyncore
from waitress.server import create_server

from producer.shell import wait_for_end
from producer.web.access import GUESS_S

#: Requests at a time. Pages that read the queue, or wait for their turn to, keep 14 of them at most (`_Turns`): some
#: are always left for the others.
_THREADS = 18
#: Connections at a time, each with a file for a large form at most: they fit into the 1,024 files of most systems.
_CONNECTIONS = 400
#: From how many on the oldest that have no request under way make room, so that a new one is always heard.
_CROWDED = _CONNECTIONS - 20
#: How long a new connection has to say something, s.
_YOUNG_S = 3.0
#: The longest pause between two looks at who has waited long enough, s.
_LOOK_S = 1.0
#: Lines for the log that wait to be written, and lines written in so many seconds, at the most.
_UNWRITTEN, _LINES, _LINES_S = 1000, 200, 10.0
#: How long a request that is under way when a signal comes may take to its answer, s: far more than most need.
_GRACE_S = 0.5


def serve(app: Flask, listener: socket.socket) -> bool:
    """Serve until SIGTERM or SIGINT; whether it was SIGINT.

    Requests that are then under way have half a second; one that takes longer loses its connection.
    """
    # Somebody who hangs up in the middle is no news.
    logging.getLogger("waitress").setLevel(logging.CRITICAL)
    logging.getLogger("producer.web").addHandler(_Log())
    open_sockets: dict[int, Any] = {}
    server: Any = create_server(
        app,
        map=open_sockets,
        sockets=[listener],
        threads=_THREADS,
        ident=None,
        clear_untrusted_proxy_headers=False,  # X-Forwarded-Proto says whether the cookie must be Secure
        max_request_header_size=32 * 1024,
        max_request_body_size=1024 * 1024,
        inbuf_overflow=64 * 1024,
        recv_bytes=2048,  # what is asked in one go is answered before it is read: no more than some dozen pages
        connection_limit=_CONNECTIONS,
        channel_timeout=30,
    )
    guesses = _Guesses(server, app.extensions["access"].is_guess)
    ended: list[bool] = []

    def wait() -> None:
        ended.append(wait_for_end())
        server.pull_trigger()

    # Nothing is raised wherever a signal comes: a socket half opened would stay so.
    Thread(target=wait, name="signals", daemon=True).start()
    try:
        while not ended:
            wasyncore.loop(guesses.answered(), use_poll=True, map=open_sockets, count=1)
            _make_room(server, guesses)
    finally:
        guesses.drop()
        _close(server, open_sockets)
    return ended[0]


class _Guesses:
    """Requests that may be guesses at the token: they wait here, without a thread, and keep nobody else waiting."""

    def __init__(self, server: Any, is_guess: Callable[[str, str, str], bool]) -> None:
        self._is_guess, self._serve = is_guess, server.add_task
        self._waiting: deque[tuple[float, Any]] = deque()
        server.add_task = self._sort

    def _sort(self, channel: Any) -> None:
        """What the server is to do with a connection whose next request is complete."""
        asked = channel.requests[0]
        if asked.error is None and self._is_guess(asked.command, asked.path, asked.headers.get("AUTHORIZATION", "")):
            asked.headers["CONNECTION"] = "close"  # so that nobody keeps one for the next guess
            self._waiting.append((time.monotonic() + GUESS_S, channel))
        else:
            self._serve(channel)

    def answered(self) -> float:
        """Have those answered that have waited; gives the time until the next one has, s, :data:`_LOOK_S` at most."""
        while self._waiting:
            left_s = self._waiting[0][0] - time.monotonic()
            if left_s > 0:
                return min(left_s + 0.001, _LOOK_S)
            self._serve(self._waiting.popleft()[1])
        return _LOOK_S

    def hurry(self, count: int) -> None:
        """Have so many answered before their time: were they dropped, the right token would be, too."""
        for _ in range(min(count, len(self._waiting))):
            self._serve(self._waiting.popleft()[1])

    def drop(self) -> None:
        """Give up on all that wait."""
        for _, channel in self._waiting:
            channel.cancel()


def _make_room(server: Any, guesses: _Guesses) -> None:
    """In a crowd, close the oldest connections on which no request is under way: idle ones, and those that send theirs
    or take their answer so slowly that no browser does. Where there are none, guesses wait no longer."""
    crowd = len(server.active_channels) - _CROWDED
    if crowd > 0:
        born_s = time.time() - _YOUNG_S
        idle = [each for each in server.active_channels.values() if not each.requests and each.creation_time < born_s]
        for channel in sorted(idle, key=lambda channel: float(channel.creation_time))[:crowd]:
            _hang_up(channel, [channel.request])
        guesses.hurry(crowd - len(idle))


def _hang_up(channel: Any, unserved: list[Any]) -> None:
    """Close a connection with the requests that no thread has in hand: a large one has a file."""
    for request in unserved:
        if request is not None:
            request.close()
    channel.handle_close()


class _Log(logging.Handler):
    """Writes to stderr from a thread of its own, so that whoever does not read it holds up no page. What comes in a
    flood is counted instead."""

    def __init__(self) -> None:
        super().__init__()
        self._unwritten: queue.Queue[str] = queue.Queue(_UNWRITTEN)
        self._since_s, self._lines, self._left_out = 0.0, 0, 0
        if sys.__stderr__ is not None:  # else its number may be another file's by now
            Thread(target=self._write, args=(sys.__stderr__.fileno(),), name="web log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Hand a line over."""
        now_s = time.monotonic()
        if now_s - self._since_s >= _LINES_S:
            self._since_s, self._lines = now_s, 0
        self._lines += 1
        noted = f" (and {self._left_out:,} lines before it that were left out)" if self._left_out else ""
        try:
            if self._lines > _LINES:
                raise queue.Full
            self._unwritten.put_nowait(f"{self.format(record)}{noted}\n")
            self._left_out = 0
        except queue.Full:
            self._left_out += 1

    def _write(self, stderr: int) -> None:
        while True:
            line = self._unwritten.get().encode("utf-8", "replace")
            with contextlib.suppress(OSError):
                os.write(stderr, line)  # not by sys.stderr, whose lock would hold the process at its end


def _close(server: Any, open_sockets: dict[int, Any]) -> None:
    """End the threads as far as they do in time, and close whatever is open."""
    server.task_dispatcher.shutdown(timeout=_GRACE_S)
    for channel in list(server.active_channels.values()):
        # A request half received, and those that waited: the shutdown has cut off the ones that no thread had begun.
        waited = channel.requests[1:] if channel.connected else channel.requests
        _hang_up(channel, [channel.request, *waited])
    # The trigger last: a thread that still ran would write into whatever file had its number next.
    wasyncore.close_all(open_sockets)
