"""The reader of answers: it agrees with the standard library on what is sound, and refuses what is not."""

from __future__ import annotations

import http.client
import io
import itertools
import socket
from dataclasses import dataclass
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.examples import examples
from worker.http1 import FIELD_LIMIT, FRAMING_LIMIT, MalformedResponse, ResponseReader

LIMIT = 200
NEXT = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecond"


def read(*pieces: bytes, limit: int = LIMIT, head_only: bool = False) -> ResponseReader:
    """What a client sees that gets ``pieces`` one by one and stops when the answer has ended."""
    reader = ResponseReader(limit, head_only=head_only)
    for piece in pieces:
        reader.feed(piece)
        if reader.ended:
            break
    return reader


def ok(*lines: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join([b"HTTP/1.1 200 OK", *lines, b"", body])


def chunked(body: bytes) -> bytes:
    return ok(b"Transfer-Encoding: chunked", body=body)


def standard(data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, fields and body as the standard library's client reads them."""
    sock = SimpleNamespace(makefile=lambda _mode: io.BytesIO(data))
    response = http.client.HTTPResponse(cast(socket.socket, sock), method="DELETE")
    response.begin()
    fields: dict[str, str] = {}
    for name, value in response.getheaders():
        key, text = name.lower(), value.strip(" \t")  # the blanks around it are no part of a value
        fields[key] = f"{fields[key]}, {text}" if key in fields else text
    return response.status, fields, response.read()


PROFILE = examples(150)


# ---- sound answers --------------------------------------------------------------------------------------------------

NAMES = st.from_regex(r"X-[A-Za-z0-9!#$%&'*+.^_`|~-]{1,8}", fullmatch=True)
VALUES = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=12)
PADDING = st.sampled_from(["", " ", "\t", "  \t "])


@dataclass(frozen=True)
class Sound:
    """A sound answer, where its head ends, and what must be known of it."""

    data: bytes
    head_size: int
    body: bytes
    until_close: bool
    keeps: bool


@st.composite
def any_case(draw: st.DrawFn, name: str) -> str:
    return "".join(letter.upper() if draw(st.booleans()) else letter.lower() for letter in name)


@st.composite
def chunks(draw: st.DrawFn, body: bytes) -> bytes:
    """``body`` in chunks of any size, with extensions and trailers."""
    out, rest = b"", body
    while rest:
        size = draw(st.integers(1, len(rest)))
        digits = draw(st.sampled_from([b"%x", b"%X", b"00%x"])) % size
        out += digits + draw(st.sampled_from([b"", b";a", b';name="va lue"', b" ; x=1", b"  "])) + b"\r\n"
        out += rest[:size] + b"\r\n"
        rest = rest[size:]
    trailers = draw(st.lists(st.tuples(NAMES, VALUES), max_size=2))
    return out + b"0\r\n" + b"".join(f"{n}: {v}\r\n".encode() for n, v in trailers) + b"\r\n"


@st.composite
def sound_answers(draw: st.DrawFn) -> Sound:
    status = draw(st.sampled_from([200, 204, 304, 400, 418, 429, 503]))
    body = draw(st.binary(max_size=60)) if status not in (204, 304) else b""
    framing = draw(st.sampled_from(["length", "chunked", "close"]))
    version = 1 if framing == "chunked" else draw(st.sampled_from([0, 1]))
    reason = draw(st.sampled_from(["", " ", " OK", " I'm a teapot: x"]))
    fields = draw(st.lists(st.tuples(NAMES, VALUES), max_size=4))
    connection = draw(st.sampled_from(["", "close", "Close", "keep-alive", "Keep-Alive"]))
    payload = body
    fields = [(name, value + draw(PADDING)) for name, value in fields]  # behind a length, http.client errs on it
    if framing == "length":
        fields.append((draw(any_case("content-length")), str(len(body))))
    elif framing == "chunked" and status not in (204, 304):
        fields.append((draw(any_case("transfer-encoding")), draw(any_case("chunked"))))
        payload = draw(chunks(body))
    if connection:
        fields.append((draw(any_case("connection")), connection))
    lines = [f"{name}:{draw(PADDING)}{value}" for name, value in draw(st.permutations(fields))]
    interim = draw(st.sampled_from(["", "HTTP/1.1 100 Continue\r\n\r\n", "HTTP/1.1 100 \r\nX-A: b\r\n\r\n"]))
    head = "\r\n".join([f"{interim}HTTP/1.{version} {status}{reason}", *lines, "", ""]).encode()
    keeps = connection.lower() == "keep-alive" if version == 0 else connection.lower() != "close"
    until_close = framing == "close" and status not in (204, 304)
    return Sound(head + payload, len(head), body, until_close, keeps and not until_close)


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted({cut % len(data) for cut in cuts} - {0}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@PROFILE
@given(sound_answers(), st.lists(st.integers(0, 400), max_size=12))
def test_reads_what_the_standard_library_reads(sound: Sound, cuts: list[int]) -> None:
    """Any sound answer, cut into any pieces, gives the status, fields and body that http.client finds in it."""
    reader = read(*split(sound.data, cuts), *([b""] if sound.until_close else []))
    assert (reader.status, reader.headers, reader.body) == standard(sound.data)
    assert reader.body == sound.body
    assert (reader.ended, reader.whole, reader.reusable) == (True, True, sound.keeps)


@PROFILE
@given(sound_answers(), st.lists(st.integers(0, 400), max_size=6))
def test_next_answer_is_never_touched(sound: Sound, cuts: list[int]) -> None:
    """Bytes behind an answer are no part of it, and forbid the connection's reuse if they came along with it."""
    if sound.until_close:
        return
    reader = read(*split(sound.data + NEXT, cuts))
    assert (reader.body, reader.whole) == (sound.body, True)
    together = read(sound.data + NEXT)
    assert (together.body, together.whole, together.reusable) == (sound.body, True, False)


@PROFILE
@given(sound_answers(), st.integers(0, 10_000), st.booleans())
def test_cut_answer_is_not_whole(sound: Sound, place: int, in_pieces: bool) -> None:
    """Wherever the connection breaks, there is no answer, or one that is marked as cut and not reused."""
    cut = place % len(sound.data)
    data = sound.data[:cut]
    pieces = [data[n : n + 1] for n in range(cut)] if in_pieces else [data] if data else []
    if cut < sound.head_size:
        with pytest.raises(http.client.RemoteDisconnected):
            read(*pieces, b"")
        return
    reader = read(*pieces, b"")
    assert reader.ended
    assert (reader.whole, reader.reusable) == (sound.until_close, False)
    assert sound.body.startswith(reader.body)


# ---- heads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"220 mail ready\r\n",
        b"\r\nHTTP/1.1 200 OK",
        b"http/1.1 200 OK\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        *[b"HTTP/1.1 %b\r\n\r\n" % line for line in (b" 200 OK", b"20 OK", b"2000 OK", b"099 Low", b"+20 OK")],
        *[b"HTTP/1.1 %b\r\n\r\n" % line for line in (b"200\xb2 OK", b"200OK", b"200 O\0K")],
        *[ok(field) for field in (b"no colon here", b": no name", b"X: a\0b", b"X: a\rb", b"X\xff: a")],
        *[ok(name + b": 5") for name in (b"Content-Length ", b"Content Length", b"X: a\nContent-Length")],
        ok(*[b"X-%d: y" % n for n in range(FIELD_LIMIT + 1)]),
        ok(b"X: " + b"x" * FRAMING_LIMIT),
    ],
)
def test_malformed_head_is_refused(head: bytes) -> None:
    """A head that is none or too large, or that two readers could read differently, is no answer."""
    with pytest.raises(MalformedResponse):
        read(head)


def test_head_of_a_hundred_fields_is_read() -> None:
    """So many are no malformed head."""
    assert read(ok(*[b"X-%d: y" % n for n in range(FIELD_LIMIT - 1)], b"Content-Length: 0")).reusable


def test_head_without_end_is_refused_in_time() -> None:
    """It is refused when it is too long, not when the memory is full."""
    start = b"HTTP/1.1 200 OK\r\nX: "
    filled = start.ljust(FRAMING_LIMIT, b"x")
    assert read(start, filled[len(start) :]).status == 0
    with pytest.raises(MalformedResponse):
        read(filled, b"x")


# ---- framing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines",
    [
        [b"Content-Length: 5", b"Content-Length: 6"],
        [b"Content-Length: 5", b"Content-Length: 5"],
        *[[b"Content-Length:" + length] for length in (b"", b" 5, 5", b" -1", b" +5", b" 0x5", b" 5_0", b" 5 0")],
        *[[b"Content-Length: " + length] for length in (b"\xb2", b"five", b"9" * 19, b"9" * 5_000)],
        [b"Content-Length: 5", b"Transfer-Encoding: chunked"],
        [b"Transfer-Encoding: chunked", b"Content-Length: 5"],
        *[[b"Transfer-Encoding:" + coding] for coding in (b"", b" gzip", b" xchunked")],
        *[[b"Transfer-Encoding: %b, chunked" % coding] for coding in (b"gzip", b"chunked")],
        [b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"],
    ],
)
def test_doubtful_end_is_refused(lines: list[bytes]) -> None:
    """Where lengths contradict each other or make no sense, nobody can say where the answer ends."""
    with pytest.raises(MalformedResponse):
        read(ok(*lines, body=b"5\r\nabcde\r\n0\r\n\r\n"))


@pytest.mark.parametrize(
    "body",
    [
        *[size + b"\r\nabc\r\n0\r\n\r\n" for size in (b"", b"g", b"-3", b"+3", b"0x3", b" 3", b";x", b"3 x")],
        *[size + b"\r\nabc\r\n0\r\n\r\n" for size in (b"3;a\nb", b"3;a\0b", b"0" * 16 + b"3")],
        b"3\nabc\r\n0\r\n\r\n",
        b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n",
        b"3\r\nabcd\r\n0\r\n\r\n",
        b"3\r\nabc0\r\n\r\n",
        b"3\r\nabc\n0\r\n\r\n",
        b"f" * 400 + b"\r\nabc\r\n0\r\n\r\n",
        b"3;" + b"x" * FRAMING_LIMIT + b"x\r\nabc\r\n0\r\n\r\n",
        b"0\r\nX: " + b"x" * FRAMING_LIMIT,
        b"0\r\nX: " + b"x" * FRAMING_LIMIT + b"\r\n\r\n",
    ],
)
def test_malformed_chunks_are_not_whole(body: bytes) -> None:
    """A size that is none, or a chunk of another size than it says, ends the answer at once, as a cut one."""
    reader = read(chunked(body))
    assert (reader.status, reader.ended, reader.whole, reader.reusable) == (200, True, False, False)
    assert b"abc".startswith(reader.body)


@pytest.mark.parametrize(
    ("head", "before", "after"),
    [
        (ok(b"Content-Length: %d" % (LIMIT + 1)), b"", b""),
        (ok(b"Content-Length: " + b"9" * 18), b"", b""),
        (ok(b"Connection: close"), b"", b""),
        (chunked(b""), b"%x\r\n" % (LIMIT + 1), b"\r\n0\r\n\r\n"),
    ],
)
def test_body_is_bounded(head: bytes, before: bytes, after: bytes) -> None:
    """One byte beyond the limit ends the reading, whatever was promised."""
    for pieces in ([head + before + b"x" * (LIMIT + 1) + after], [head, before, b"x" * LIMIT, b"x", after]):
        reader = read(*[piece for piece in pieces if piece])
        assert (reader.body, reader.ended, reader.whole, reader.reusable) == (b"x" * LIMIT, True, False, False)


@pytest.mark.parametrize(
    ("status", "head_only"),
    [
        *[(b"204 No Content", False), (b"304 Not Modified", False)],
        *[(b"200 Connection established", True), (b"407 Who are you", True)],
    ],
)
@pytest.mark.parametrize("line", [b"Content-Length: 5", b"Transfer-Encoding: chunked", b"X: y"])
def test_answer_without_a_body(status: bytes, line: bytes, head_only: bool) -> None:
    """Some statuses never have one, whatever their fields say, and nothing is waited for behind the head of an answer
    to CONNECT; what follows is not theirs."""
    head = b"HTTP/1.1 %b\r\n%b\r\n\r\n" % (status, line)
    alone, followed = read(head, head_only=head_only), read(head + NEXT, head_only=head_only)
    assert (alone.body, alone.whole, alone.reusable, alone.surplus) == (b"", True, True, False)
    assert (followed.body, followed.whole, followed.reusable, followed.surplus) == (b"", True, False, True)


@pytest.mark.parametrize("interim", [b"100 Continue", b"102 Processing", b"103 Early Hints", b"199 "])
def test_interim_answers_are_passed_over(interim: bytes) -> None:
    """Any number of them is no answer, even with fields that would frame one."""
    data = b"HTTP/1.1 %b\r\nContent-Length: 9\r\n\r\n" % interim * 3 + ok(b"Content-Length: 2", body=b"{}")
    reader = read(data)
    assert (reader.status, reader.headers, reader.body) == (200, {"content-length": "2"}, b"{}")
    assert reader.reusable
    assert read(b"HTTP/1.1 %b\r\n\r\n" % interim).status == 0
    with pytest.raises(http.client.RemoteDisconnected):
        read(b"HTTP/1.1 %b\r\n\r\n" % interim, b"")


def test_a_switch_of_protocols_ends_the_connection() -> None:
    """What nobody asked for is handed over, and nothing behind it is taken for another's."""
    for rest in (b"", NEXT):
        reader = read(b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade, keep-alive\r\n\r\n%b" % rest)
        assert (reader.status, reader.body, reader.whole) == (101, b"", True)
        assert not reader.reusable


@pytest.mark.parametrize(
    ("version", "connection", "reusable"),
    [
        (1, b"", True),
        (1, b"keep-alive", True),
        (1, b"close", False),
        (1, b"Keep-Alive, CLOSE", False),
        (0, b"", False),
        (0, b"Keep-Alive", True),
        (0, b"close", False),
    ],
)
def test_reuse_follows_version_and_connection(version: int, connection: bytes, reusable: bool) -> None:
    """HTTP/1.1 stays open unless it says close, HTTP/1.0 closes unless it says keep-alive."""
    data = b"HTTP/1.%d 200 OK\r\nConnection: %b\r\nContent-Length: 0\r\n\r\n" % (version, connection)
    assert read(data).reusable is reusable
