"""The local exchange's HTTP/1.1: requests as they are read from a connection, and answers as they travel."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, cast

from worker.sandbox.faults import Answer, Delivery

if TYPE_CHECKING:
    from worker.sandbox.server import ExchangeServer

MAX_HEAD_BYTES = 16 * 1024
MAX_BODY_BYTES = 16 * 1024 * 1024


@dataclass(slots=True)
class Request:
    """One HTTP request as it was received; header names are lower case."""

    method: str
    path: str
    query: bytes
    headers: dict[bytes, bytes]
    body: bytes
    arrival_ns: int
    peer: str
    port: int

    @property
    def label(self) -> str:
        """What the request is counted under."""
        return f"{self.method} {self.path[:80]}"


@dataclass(slots=True)
class Reply:
    """An answer, how it travels and when. `resume` makes the real reply when the delay is over."""

    answer: Answer
    delivery: Delivery = Delivery.WHOLE
    delay_ms: float = 0.0
    used_weight: int | None = None
    resume: Callable[[], Reply] | None = None

    def head(self) -> bytes:
        """Status line and headers, with the length that the body should have."""
        answer = self.answer
        lines = [
            f"HTTP/1.1 {answer.status} {_reason(answer.status)}",
            f"Content-Type: {answer.content_type}",
            f"Content-Length: {len(answer.body)}",
        ]
        if self.used_weight is not None and not answer.from_edge:
            lines.append(f"X-MBX-USED-WEIGHT-1M: {self.used_weight}")
        lines.extend(f"{name}: {value}" for name, value in answer.headers)
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


class _Malformed(Exception):
    """The bytes are no request that this server reads; `status` says why."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Connection(asyncio.Protocol):
    """One client connection: requests are served one after another, so that pipelined ones get answers in order."""

    def __init__(self, exchange: ExchangeServer, drip_interval_ms: int) -> None:
        self._exchange = exchange
        self._drip_interval_s = drip_interval_ms / 1_000
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._current: Request | None = None
        self._serving = False
        self._lost = False
        self._keep_alive = True
        self._timer: asyncio.TimerHandle | None = None
        self._peer, self._port = "?", 0
        self.last_active_s = self._loop.time()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = cast(asyncio.Transport, transport)
        self._peer, self._port = (transport.get_extra_info("peername") or ("?", 0))[:2]
        self._exchange.connections.add(self)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        self._buffer += data
        self.last_active_s = self._loop.time()
        if self._current is None:
            self._serve()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Called by asyncio. What the request still has to do to its order is done all the same."""
        self._lost = True
        self._exchange.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        self._end()

    def close_if_idle(self, idle_s: float) -> None:
        """Close the connection without notice when nothing has come for so long and no answer is owed."""
        if self._current is None and self._loop.time() - self.last_active_s >= idle_s:
            self._transport.close()

    def abort(self) -> None:
        """Close the connection now."""
        self._transport.abort()

    def _serve(self) -> None:
        # A loop, not recursion: a thousand pipelined requests would be as many frames.
        self._serving = True
        try:
            while self._current is None and not self._transport.is_closing():
                request = self._parse()
                if request is None:
                    return
                self._current = request
                self._dispatch(self._exchange.handle(request))
        except _Malformed as error:
            self._transport.write(Reply(Answer(error.status)).head())
            self._transport.close()
        finally:
            self._serving = False

    def _parse(self) -> Request | None:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise _Malformed(431)
            return None
        request_line, *header_lines = bytes(self._buffer[:end]).split(b"\r\n")
        headers = {}
        for line in header_lines:
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip()
        if b"transfer-encoding" in headers:
            raise _Malformed(501)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            raise _Malformed(413 if length.isdigit() else 400)
        stop = end + 4 + int(length)
        if len(self._buffer) < stop:
            return None
        body = bytes(self._buffer[end + 4 : stop])
        del self._buffer[:stop]
        return self._request(request_line, headers, body)

    def _request(self, request_line: bytes, headers: dict[bytes, bytes], body: bytes) -> Request:
        parts = request_line.split(b" ")
        if len(parts) != 3 or not parts[2].startswith(b"HTTP/1."):
            raise _Malformed(400)
        path, _, query = parts[1].partition(b"?")
        connection = headers.get(b"connection", b"").lower()
        self._keep_alive = connection == b"keep-alive" if parts[2] == b"HTTP/1.0" else connection != b"close"
        return Request(
            parts[0].decode("latin-1"),
            path.decode("latin-1"),
            query,
            headers,
            body,
            time.time_ns(),
            self._peer,
            self._port,
        )

    def _dispatch(self, reply: Reply) -> None:
        if reply.delay_ms <= 0:
            self._resume(reply)
        elif reply.resume is not None:
            # Not kept in _timer: the order is cancelled even when the client has gone by then.
            self._loop.call_later(reply.delay_ms / 1_000, self._resume, reply)
        else:
            self._timer = self._loop.call_later(reply.delay_ms / 1_000, self._deliver, reply)

    def _resume(self, reply: Reply) -> None:
        self._deliver(reply if reply.resume is None else reply.resume())

    def _deliver(self, reply: Reply) -> None:
        if self._lost:
            return
        head, body = reply.head(), reply.answer.body
        match reply.delivery:
            case Delivery.CLOSED:
                self._transport.close()
            case Delivery.RESET:
                self._reset()
            case Delivery.CUT_SHORT:
                self._transport.write(head + body[: len(body) // 2])
                self._transport.close()
            case Delivery.NOT_HTTP:
                self._transport.write(b"\x15\x03\x03 this is no HTTP\r\n\r\n")
                self._transport.close()
            case Delivery.DRIPPED:
                self._drip(head + body, 0)
            case _:
                self._transport.write(head + body)
                self._finish(close=reply.delivery is Delivery.THEN_CLOSED)

    def _drip(self, data: bytes, sent: int) -> None:
        if sent == len(data):
            self._finish(close=False)
            return
        self._transport.write(data[sent : sent + 1])
        self._timer = self._loop.call_later(self._drip_interval_s, self._drip, data, sent + 1)

    def _reset(self) -> None:
        # Lingering for zero seconds makes the kernel send RST instead of FIN.
        raw = self._transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def _finish(self, *, close: bool) -> None:
        self._end()
        self.last_active_s = self._loop.time()
        if close or not self._keep_alive:
            self._transport.close()
        elif not self._serving:
            self._serve()

    def _end(self) -> None:
        if self._current is not None:
            self._exchange.request_ended(self._current)
            self._current = None


def _reason(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"
