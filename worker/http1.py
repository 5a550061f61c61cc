"""One answer of an HTTP/1.x server, read from the bytes of a connection: no socket, no clock.

It reads what RFC 9112 allows in answer to any request but HEAD. Where the RFC leaves a choice
and leniency could make one answer's bytes pass for another's, it refuses: for a cancel, an answer that is not
understood is only a doubt, while a wrong one is a wrong record.
"""

from __future__ import annotations

import re
from http.client import RemoteDisconnected

__all__ = ["FRAMING_LIMIT", "MalformedResponse", "ResponseReader"]

#: Most bytes of a head, of a chunk's size line, and of the trailers: CDNs stay below 32 KiB.
FRAMING_LIMIT = 32 * 1024
#: Most fields of a head.
FIELD_LIMIT = 100

_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_HEAD = re.compile(rf"HTTP/1\.([0-9]) ([1-9][0-9][0-9])(?: [^\r\n\0]*)?\r\n((?:{_NAME}:[^\r\n\0]*\r\n)*)\r\n")
_FIELD = re.compile(rf"({_NAME}):([^\r\n]*)\r\n")
_FOLD = re.compile(r"\r\n[ \t]+")
_LENGTH = re.compile(r"[0-9]{1,18}")
#: The size of a chunk, together with the line break that ends what stands before it.
_SIZE_LINE = re.compile(rb"\r\n([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\r\n\0]{0,%d})?\r\n" % FRAMING_LIMIT)


class MalformedResponse(ValueError):
    """What came is no HTTP/1.x answer, or leaves open where the answer ends."""


class ResponseReader:
    """Reads one answer from what :meth:`feed` is given; it is to be fed until ``ended``.

    ``status`` is 0 until the head is whole; interim answers are passed over (RFC 9110, 15.2), but for a switch of
    protocols, which is handed over as an answer without a body. ``headers`` has lower-case names, and the values of a
    repeated one joined by ", ".
    ``body`` is what there is of it, at most ``body_limit`` bytes, and ``whole`` says whether that is all. ``reusable``
    says whether the connection may serve another request: the answer has ended where it said, nothing came after it.

    ``head_only``: it is over with its head, as the answer to CONNECT is; ``surplus`` says whether more came with it.
    """

    def __init__(self, body_limit: int, *, head_only: bool = False) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.whole = self.ended = self.reusable = self.surplus = False
        self.body_limit = body_limit
        self._head_only = head_only
        self._buffer = b""
        self._keep_alive = False
        self._chunked = self._last_chunk = False
        self._left: int | None = 0  # of the body, or of the present chunk; None: until the connection closes

    def feed(self, data: bytes) -> None:
        """Take in what the connection gave; ``b""`` says that it was closed.

        Raises:
            MalformedResponse: the head is none.
            http.client.RemoteDisconnected: the connection was closed before the head was whole.
        """
        self._buffer += data
        if not self.status:
            self._take_head()
            if not self.status:
                if not data:
                    raise RemoteDisconnected("no whole answer")
                return
        if self._chunked:
            self._take_chunks()
        else:
            self._take_plain()
        if not data and not self.ended:
            self.ended = True
            self.whole = self._left is None

    # -- the head

    def _take_head(self) -> None:
        head = self._cut_head()
        while head is not None and head[2] != "101" and head[2] < "200":
            head = self._cut_head()
        if head is None:
            return
        fields = _FIELD.findall(head[3])
        if len(fields) > FIELD_LIMIT:
            raise MalformedResponse("too many fields")
        headers = self.headers
        for field, padded in fields:
            name, value = field.lower(), padded.strip(" \t")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        self._note_framing(int(head[2]), old=head[1] == "0")
        self.status = int(head[2])

    def _cut_head(self) -> re.Match[str] | None:
        """The next head, cut off the buffer; None while it is not whole."""
        end = self._buffer.find(b"\r\n\r\n")
        size = len(self._buffer) if end < 0 else end
        # By its first bytes already, so that what speaks no HTTP is not waited for.
        if size > FRAMING_LIMIT or not b"HTTP/1.".startswith(self._buffer[:7]):
            raise MalformedResponse("not the head of an answer")
        if end < 0:
            return None
        head = _HEAD.fullmatch(_FOLD.sub(" ", self._buffer[: end + 4].decode("latin-1")))
        if head is None:
            raise MalformedResponse("a malformed head")
        self._buffer = self._buffer[end + 4 :]
        return head

    def _note_framing(self, status: int, *, old: bool) -> None:
        """Where the body ends (RFC 9112, 6.3), and whether the connection may outlive it (9.3)."""
        length, coding = self.headers.get("content-length"), self.headers.get("transfer-encoding")
        connection = self.headers.get("connection", "").lower()
        # After an interim status the true answer is still to come, and must not be taken for the next request's.
        self._keep_alive = status >= 200 and "close" not in connection and (not old or "keep-alive" in connection)
        if status < 200 or status in (204, 304) or self._head_only:
            self._left = 0
        elif coding is not None:
            if coding.lower() != "chunked" or length is not None or old:
                raise MalformedResponse("an unknown transfer coding, or one that contradicts the rest of the head")
            self._chunked = True
            self._buffer = b"\r\n" + self._buffer  # as before any other chunk
        elif length is None:
            self._left = None
        elif _LENGTH.fullmatch(length):
            self._left = int(length)
        else:
            raise MalformedResponse("a length that is none, or more than one")

    # -- the body

    def _take_plain(self) -> None:
        length, limit = self._left, self.body_limit
        self.body = self._buffer[: limit if length is None else min(length, limit)]
        if len(self.body) == length:
            self._finish(surplus=len(self._buffer) > length)
        elif len(self._buffer) > limit:
            self.ended = True

    def _take_chunks(self) -> None:
        buffer, at, left = self._buffer, 0, self._left or 0
        parts, room = [self.body], self.body_limit - len(self.body)
        while not self._last_chunk and room >= 0:
            piece = buffer[at : at + left]
            parts.append(piece)
            at, left, room = at + len(piece), left - len(piece), room - len(piece)
            size_line = None if left else _SIZE_LINE.match(buffer, at)
            if size_line is None:
                break
            left = int(size_line[1], 16)
            self._last_chunk = left == 0
            at = size_line.end() - (2 if self._last_chunk else 0)  # the trailers' end is looked for like a head's
        self.body = b"".join(parts)[: self.body_limit]
        self._buffer, self._left = buffer[at:], left
        self.ended = room < 0 or (left == 0 and self._take_framing())

    def _take_framing(self) -> bool:
        """Whether the answer is over by what stands behind a chunk: at its end, or because it makes no sense."""
        rest = self._buffer
        end = rest.find(b"\r\n\r\n") if self._last_chunk else -1
        if 0 <= end <= FRAMING_LIMIT:
            self._finish(surplus=len(rest) > end + 4)
        broken = len(rest) > FRAMING_LIMIT or (not self._last_chunk and b"\r\n" in rest[2:])
        return self.whole or broken

    def _finish(self, *, surplus: bool) -> None:
        self.whole = self.ended = True
        self.surplus = surplus
        self.reusable = self._keep_alive and not surplus
