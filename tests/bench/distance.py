"""A TCP proxy that puts a server some way off: `python -m tests.bench.distance TARGET_PORT ONE_WAY_MS`.

Prints the port that it listens on. Threads that sleep, not an event loop: the loop's timers round to whole
milliseconds, which is the whole distance here.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from queue import SimpleQueue

_CHUNK = 1 << 16


def _deliver(parcels: SimpleQueue[tuple[float, bytes]], target: socket.socket) -> None:
    """Hand over each parcel when it is due; an empty one is the end of the stream."""
    with contextlib.suppress(OSError):
        while True:
            due_at, data = parcels.get()
            if (early_s := due_at - time.perf_counter()) > 0:
                time.sleep(early_s)
            if not data:
                target.shutdown(socket.SHUT_WR)
                return
            target.sendall(data)


def _carry(source: socket.socket, target: socket.socket, one_way_s: float) -> None:
    parcels: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
    threading.Thread(target=_deliver, args=(parcels, target), daemon=True).start()
    data = b"-"
    while data:
        try:
            data = source.recv(_CHUNK)
        except OSError:
            data = b""
        parcels.put((time.perf_counter() + one_way_s, data))


def main() -> None:
    """Serve until killed."""
    target_port, one_way_s = int(sys.argv[1]), float(sys.argv[2]) / 1000
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    while True:
        client = listener.accept()[0]
        server = socket.create_connection(("127.0.0.1", target_port))
        for near, away in ((client, server), (server, client)):
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=_carry, args=(near, away, one_way_s), daemon=True).start()


if __name__ == "__main__":
    main()
