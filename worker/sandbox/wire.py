"""The local exchange's HTTP/1.1: requests as they are read from a connection, and answers as they travel."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING

from worker.sandbox.faults import Answer, Delivery

if TYPE_CHECKING:
    from worker.sandbox.server import ExchangeServer

HOST = "127.0.0.1"
IDLE_CLOSE_S = 60.0
MAX_HEAD_BYTES = 16 * 1024
MAX_BODY_BYTES = 16 * 1024 * 1024
#: Deliveries after which there is no connection any more.
_LAST_WORDS = frozenset({Delivery.CLOSED, Delivery.RESET, Delivery.CUT_SHORT, Delivery.NOT_HTTP, Delivery.THEN_CLOSED})


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


async def listen(exchange: ExchangeServer, port: int, tls: ssl.SSLContext | None) -> asyncio.Server:
    """Serve clients on loopback; their requests are given to the exchange's `handle`.

    Raises:
        OSError: the port is taken.
    """

    served: set[asyncio.Task[None]] = set()  # the loop itself would let go of them

    def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(_Connection(exchange, reader, writer).serve())
        served.add(task)
        task.add_done_callback(served.discard)

    def connected() -> asyncio.Protocol:
        return _Protocol(asyncio.StreamReader(MAX_HEAD_BYTES), serve)

    return await asyncio.get_running_loop().create_server(connected, HOST, port, backlog=1_024, ssl=tls)


class _Protocol(asyncio.StreamReaderProtocol):
    def eof_received(self) -> bool:
        """A client that sends no more waits for no answer either: the connection ends."""
        super().eof_received()
        return False


class _Malformed(Exception):
    """The bytes are no request that this server reads; `status` says why."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _Connection:
    """One client connection: requests are served one after another, so that pipelined ones get answers in order."""

    def __init__(self, exchange: ExchangeServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._exchange, self._reader, self._writer = exchange, reader, writer
        self._keep_alive = True
        self._gone = asyncio.create_task(writer.wait_closed())
        self._gone.add_done_callback(lambda task: task.cancelled() or task.exception())  # how it ended is of no matter

    async def serve(self) -> None:
        """Until the client leaves, is idle for too long, or is to be rid of."""
        try:
            while self._keep_alive:
                async with asyncio.timeout(IDLE_CLOSE_S):
                    request = await self._read()
                reply = self._exchange.handle(request)
                try:
                    await self._answer(reply)
                finally:
                    self._exchange.request_ended(request)
        except _Malformed as error:
            self._writer.write(Reply(Answer(error.status)).head())
        except (OSError, EOFError):  # it has left, or was idle
            pass
        finally:
            self._writer.close()

    async def _read(self) -> Request:
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            raise _Malformed(431) from None
        request_line, *header_lines = head[:-4].split(b"\r\n")
        headers = {}
        for line in header_lines:
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip()
        if b"transfer-encoding" in headers:
            raise _Malformed(501)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            raise _Malformed(413 if length.isdigit() else 400)
        body = await self._reader.readexactly(int(length))
        parts = request_line.split(b" ")
        if len(parts) != 3 or not parts[2].startswith(b"HTTP/1."):
            raise _Malformed(400)
        path, _, query = parts[1].partition(b"?")
        connection = headers.get(b"connection", b"").lower()
        self._keep_alive = connection == b"keep-alive" if parts[2] == b"HTTP/1.0" else connection != b"close"
        peer, port = (self._writer.get_extra_info("peername") or ("?", 0))[:2]
        method = parts[0].decode("latin-1")
        return Request(method, path.decode("latin-1"), query, headers, body, time.time_ns(), peer, port)

    async def _answer(self, reply: Reply) -> None:
        if reply.resume is not None:
            # In any case: the order is cancelled even when the client has gone by then.
            await asyncio.sleep(reply.delay_ms / 1_000)
            reply = reply.resume()
        elif not await self._stays(reply.delay_ms):
            return
        head, body = reply.head(), reply.answer.body
        if reply.delivery in _LAST_WORDS:
            self._keep_alive = False
        match reply.delivery:
            case Delivery.CLOSED:
                return
            case Delivery.RESET:
                # Lingering for zero seconds makes the kernel send RST instead of FIN.
                raw = self._writer.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self._writer.transport.abort()
            case Delivery.CUT_SHORT:
                self._writer.write(head + body[: len(body) // 2])
            case Delivery.NOT_HTTP:
                self._writer.write(b"\x15\x03\x03 this is no HTTP\r\n\r\n")
            case Delivery.DRIPPED:
                for byte in head + body:
                    self._writer.write(bytes([byte]))
                    if not await self._stays(self._exchange.config.timing.drip_interval_ms):
                        return
            case _:
                self._writer.write(head + body)

    async def _stays(self, pause_ms: float) -> bool:
        """Whether the client is still there after so long; where it leaves, that is known at once."""
        if pause_ms > 0:
            await asyncio.wait([self._gone], timeout=pause_ms / 1_000)
        return not self._gone.done()


def _reason(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"
