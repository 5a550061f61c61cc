"""The server around the pages: waitress, until a signal ends it."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

from flask import Flask
from waitress import wasyncore
from waitress.server import create_server

#: Requests at a time; each may wait for Redis for as long as the client allows.
_THREADS = 12
_ENDS = (signal.SIGTERM, signal.SIGINT)


def serve(app: Flask, host: str, port: int, listening: Callable[[str], object]) -> bool:
    """Serve until SIGTERM or SIGINT; whether it was SIGINT. ``listening`` is told the address.

    Raises:
        OSError: the address cannot be listened on.
    """
    # Somebody who hangs up in the middle is no news.
    logging.getLogger("waitress").setLevel(logging.CRITICAL)
    ended_by: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        for end in _ENDS:  # whoever sends one twice gets the same end
            signal.signal(end, signal.SIG_IGN)
        ended_by.append(number)
        raise SystemExit(0)

    open_sockets: dict[int, Any] = {}
    listener = _listen(host, port)
    server = create_server(
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
    before = {end: signal.signal(end, stop) for end in _ENDS}
    try:
        shown_host = f"[{host}]" if ":" in host else host
        listening(f"http://{shown_host}:{listener.getsockname()[1]}/")
        server.run()
    except SystemExit:  # before the loop, which sees to it by itself
        pass
    finally:
        wasyncore.close_all(open_sockets)
        if not ended_by:  # else the process is on its way out, and a second signal must not change how it ends
            for end, handler in before.items():
                signal.signal(end, handler)
    return ended_by == [signal.SIGINT]


def _listen(host: str, port: int) -> socket.socket:
    """A socket bound to the first address of ``host``."""
    family, *_, where = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
    except OSError:
        listener.close()
        raise
    return listener
