"""The server around the pages: waitress, until a signal ends it."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from flask import Flask
from waitress import wasyncore
from waitress.server import create_server

#: Requests at a time. Pages that read the queue, or wait for their turn to, and failed logins keep 17 of them at most
#: (`_Turns`, `Access`): some are always left for the others.
_THREADS = 20
#: How long a request that is under way when a signal comes may take to its answer, s: far more than most need.
_GRACE_S = 0.5
_ENDS = (signal.SIGTERM, signal.SIGINT)


def serve(app: Flask, host: str, port: int, listening: Callable[[str], object]) -> bool:
    """Serve until SIGTERM or SIGINT; whether it was SIGINT. ``listening`` is told the address.

    Requests that are then under way have half a second; one that takes longer loses its connection.

    Raises:
        OSError: the address cannot be listened on.
    """
    # Somebody who hangs up in the middle is no news.
    logging.getLogger("waitress").setLevel(logging.CRITICAL)
    open_sockets: dict[int, Any] = {}
    listener = _listen(host, port)
    with _Ends() as ends:
        server: Any = create_server(
            app,
            map=open_sockets,
            sockets=[listener],
            threads=_THREADS,
            ident=None,
            clear_untrusted_proxy_headers=False,  # X-Forwarded-Proto says whether the cookie must be Secure
            max_request_header_size=32 * 1024,
            max_request_body_size=1024 * 1024,
            channel_timeout=30,
        )
        try:
            shown_host = f"[{host}]" if ":" in host else host
            with ends.told_to(server.pull_trigger):
                listening(f"http://{shown_host}:{listener.getsockname()[1]}/")
                while not ends.come:
                    wasyncore.loop(timeout=server.adj.asyncore_loop_timeout, map=open_sockets, count=1)
        finally:
            _close(server, open_sockets)
    return ends.come == [signal.SIGINT]


class _Ends:
    """The signals that end the server. Nothing is raised wherever one comes: a socket half opened would stay so.

    They reach the loop alone. Before and after it they wait, in the threads that are started meanwhile for good; once
    one has come, further ones change nothing until the process has ended.
    """

    def __init__(self) -> None:
        self.come: list[int] = []

    def __enter__(self) -> _Ends:
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
        return self

    def __exit__(self, *_: object) -> None:
        if self.come:
            for end in _ENDS:
                signal.signal(end, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    @contextlib.contextmanager
    def told_to(self, wake: Callable[[], object]) -> Iterator[None]:
        """For the length of the block a signal is noted in ``come``, and the first one calls ``wake``."""

        def note(number: int, _: FrameType | None) -> None:
            if not self.come:
                self.come.append(number)
                wake()

        before = {end: signal.signal(end, note) for end in _ENDS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
            for end, handler in before.items():
                signal.signal(end, handler)


def _close(server: Any, open_sockets: dict[int, Any]) -> None:
    """End the threads as far as they do in time, and close whatever is open: a large request has a file."""
    server.task_dispatcher.shutdown(timeout=_GRACE_S)
    for channel in list(server.active_channels.values()):
        # What no thread has in hand: a request half received, and those that waited (the shutdown has cut them off).
        waited = channel.requests[1:] if channel.connected else channel.requests
        for request in (channel.request, *waited):
            if request is not None:
                request.close()
        channel.handle_close()
    # The trigger last: a thread that still ran would write into whatever file had its number next.
    wasyncore.close_all(open_sockets)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens on the first address of ``host``."""
    family, *_, where = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener
