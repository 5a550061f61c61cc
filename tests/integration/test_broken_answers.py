"""Answers that break off, never come, come late, are too long or make no sense; and that none of it shows a secret."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import threading
import time
import traceback
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rq.timeouts import JobTimeoutException, UnixSignalDeathPenalty

from producer.message import Call
from tests.examples import examples
from tests.loopback import (
    DONE,
    LOOPBACK,
    Authority,
    Behaviour,
    Peer,
    answering,
    drip,
    drop_after_reading,
    http_answer,
    not_http,
    query_of,
)
from tests.ways import API_KEY, REF, SECRET, TOTAL_S, Bench, bounded, failed, replied
from worker.classify import Failure, Means, Reply, classify
from worker.signing import Credential
from worker.transport import BODY_LIMIT

# ---- broken off: perhaps seen ---------------------------------------------------------------------------------------


def _reset_after_reading(peer: Peer) -> None:
    peer.read_head()
    peer.reset()


def _contradicting_lengths(peer: Peer) -> None:
    peer.read_head()
    peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef")


@pytest.mark.parametrize(
    "behaviour",
    [drop_after_reading, _reset_after_reading, not_http, _contradicting_lengths],
)
def test_break_after_the_first_byte_is_perhaps_seen(bench: Bench, credential: Credential, behaviour: Behaviour) -> None:
    """However the exchange goes away once writing began, the cancel is in doubt, and it is sent once."""
    server, client = bench.to(behaviour)
    answer = client.cancel(credential)
    assert isinstance(answer, Failure)
    assert answer.seen
    assert classify(Call.CANCEL, REF, answer).means is Means.UNCLEAR
    assert len(server.heads) <= 1
    assert client.requests_sent == server.connections == 1


def test_reset_is_named(bench: Bench, credential: Credential) -> None:
    """A connection that is reset says so."""
    _, client = bench.to(_reset_after_reading)
    failed(client.cancel(credential), seen=True, reason="no answer: ConnectionResetError")


@pytest.mark.parametrize("secure", [False, True])
def test_connection_that_closes_at_once_is_no_answer(
    bench: Bench, credential: Credential, authority: Authority, secure: bool
) -> None:
    """A server that closes what it has accepted is at most perhaps seen, and is not asked again for the same call."""
    server = bench.server(lambda peer: None, authority.server_context(LOOPBACK) if secure else None)
    client = bench.client(server.url, ca_file=authority.ca_file)
    answer = client.cancel(credential)
    assert isinstance(answer, Failure)
    assert client.requests_sent == answer.seen
    assert (server.heads, server.connections) == ([], 1)


@pytest.mark.parametrize("size", [12, 14, 20, 40])
def test_cut_head_proves_nothing(bench: Bench, credential: Credential, size: int) -> None:
    """A head that breaks off, even behind a status of 200, is no success."""

    def behave(peer: Peer) -> None:
        peer.read_head()
        peer.send(http_answer(Server="x" * 40)[:size])

    _, client = bench.to(behave)
    assert classify(Call.CANCEL, REF, client.cancel(credential)).means is Means.UNCLEAR


def _cut_body(status: str, **headers: str) -> Behaviour:
    def behave(peer: Peer) -> None:
        peer.read_head()
        peer.send(http_answer(DONE, status, **headers)[:-10])

    return behave


def test_cut_body_proves_nothing(bench: Bench, credential: Credential) -> None:
    """A success whose body is not whole is no success."""
    _, client = bench.to(_cut_body("200 OK"))
    answer = replied(client.cancel(credential))
    assert answer == Reply(http=200, body=DONE[:-10], truncated=True)
    assert classify(Call.CANCEL, REF, answer).means is Means.UNCLEAR


def test_cut_chunk_proves_nothing(bench: Bench, credential: Credential) -> None:
    """The same for a body in chunks that ends before its last one."""

    def behave(peer: Peer) -> None:
        peer.read_head()
        peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(DONE), DONE))

    _, client = bench.to(behave)
    answer = replied(client.cancel(credential))
    assert answer.truncated
    assert classify(Call.CANCEL, REF, answer).means is Means.UNCLEAR


def test_cut_body_keeps_the_pause(bench: Bench, credential: Credential) -> None:
    """A ban whose text is lost is still a ban, with its length."""
    _, client = bench.to(_cut_body("418 I'm a teapot", Retry_After="120"))
    answer = replied(client.cancel(credential))
    assert (answer.http, answer.retry_after_ms, answer.truncated) == (418, 120_000, True)


def test_an_answer_that_quotes_the_request_tells_neither_key_nor_signature(
    bench: Bench, credential: Credential
) -> None:
    """An edge may show all that it was sent: what can be recorded and logged of that holds no secret."""

    def quote(peer: Peer) -> None:
        path, *fields = peer.read_head().split(b"\r\n")
        peer.send(http_answer(b"\n".join([*sorted(fields, reverse=True), path]), "502 Bad Gateway"))

    server, client = bench.to(quote)
    said = classify(Call.CANCEL, REF, client.cancel(credential)).msg
    (head,) = server.heads
    assert said.startswith("X-MBX-APIKEY: ***")
    assert credential.api_key in head.decode()
    assert credential.api_key not in said
    assert query_of(head).partition("&signature=")[2] not in said


# ---- silence --------------------------------------------------------------------------------------------------------


def test_silence_is_bounded(bench: Bench, credential: Credential) -> None:
    """An answer that does not come ends the attempt at its bound, in doubt."""
    _, client = bench.impatient(Peer.wait_until_closed)
    with bounded():
        failed(client.cancel(credential), seen=True, reason="no answer: TimeoutError")


def test_bound_follows_recv_window(bench: Bench, credential: Credential) -> None:
    """Unless it is given, the bound is eight tenths of recvWindow."""
    _, client = bench.to(Peer.wait_until_closed, recv_window_ms=500)
    started_at = time.monotonic()
    with bounded(0.4):
        assert isinstance(client.cancel(credential), Failure)
    assert time.monotonic() - started_at >= 0.39


@pytest.mark.parametrize("secure", [False, True])
def test_dripping_head_is_bounded(
    loop_bench: Bench, credential: Credential, authority: Authority, secure: bool
) -> None:
    """A byte now and then does not prolong an attempt."""
    server = loop_bench.server(
        drip(http_answer() * 9, TOTAL_S / 20), authority.server_context(LOOPBACK) if secure else None
    )
    client = loop_bench.client(server.url, ca_file=authority.ca_file, patience_s=TOTAL_S)
    with bounded():
        failed(client.cancel(credential), seen=True, reason="no answer: TimeoutError")


def test_dripping_body_is_bounded(bench: Bench, credential: Credential) -> None:
    """The same after the head: what is there is handed over as broken off, which proves nothing."""

    def behave(peer: Peer) -> None:
        peer.read_head()
        head, _, body = http_answer().partition(b"\r\n\r\n")
        peer.send(head + b"\r\n\r\n")
        for byte in body:
            peer.send(bytes([byte]))
            time.sleep(TOTAL_S / 20)

    _, client = bench.impatient(behave)
    with bounded():
        answer = replied(client.cancel(credential))
    assert (answer.http, answer.truncated) == (200, True)
    assert classify(Call.CANCEL, REF, answer).means is Means.UNCLEAR


def _flood(peer: Peer) -> None:
    """For much longer than an attempt may take, send what is no answer."""
    peer.read_head()
    # Many in one write, which needs no turn of this process' threads.
    continues = b"HTTP/1.1 100 Continue\r\n\r\n" * 2**19
    ends_at = time.monotonic() + 5
    while time.monotonic() < ends_at:
        peer.send(continues)


def test_flood_without_an_answer_is_bounded(loop_bench: Bench, credential: Credential) -> None:
    """Nor does a server that never stops sending, and never comes to its answer."""
    server, client = loop_bench.to(_flood)
    failed(client.cancel(credential), seen=True, reason="no answer: MalformedResponse")
    assert client.requests_sent == len(server.heads) == 1


def test_loop_that_stood_still_is_no_silence(loop_bench: Bench, credential: Credential) -> None:
    """An answer that came while the loop was held up counts, although its time was over when the loop went on."""
    go = threading.Event()

    def behave(peer: Peer) -> None:
        while peer.read_head():
            assert go.wait(5)
            peer.send(http_answer())

    server, client = loop_bench.impatient(behave)

    def hold_up() -> None:
        go.set()
        time.sleep(0.2)

    async def calls() -> None:
        loop = asyncio.get_running_loop()
        over_s = loop.time() + TOTAL_S
        call = asyncio.create_task(client.exchange.call(Call.CANCEL, credential, REF))
        # Held up twice, so that the time is over before the answer has come, and the loop hears of the time first.
        loop.call_at(over_s - 0.03, time.sleep, 0.06)
        loop.call_at(over_s - 0.02, hold_up)
        assert await call == Reply(http=200, body=DONE)

    client.run(calls())
    assert client.cancel(credential) == Reply(http=200, body=DONE)
    assert server.used == [1, 1]


# ---- too long, coded, elsewhere, nonsense ----------------------------------------------------------------------------


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_huge_body_is_read_in_part(
    bench: Bench, credential: Credential, authority: Authority, framing: str, secure: bool
) -> None:
    """At most 64 KiB are read, the rest is not waited for, and its connection is not used again."""
    size = 4 * BODY_LIMIT
    head = {
        "length": b"Content-Length: %d\r\n\r\n" % size,
        "chunked": b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % size,
        "close": b"Connection: close\r\n\r\n",
    }[framing]
    behaviour = answering(b"HTTP/1.1 200 OK\r\n" + head + b"x" * (BODY_LIMIT + 1))
    server = bench.server(behaviour, authority.server_context(LOOPBACK) if secure else None)
    client = bench.client(server.url, ca_file=authority.ca_file)
    for _ in range(2):
        answer = replied(client.cancel(credential))
        assert (answer.body, answer.truncated) == (b"x" * BODY_LIMIT, True)
    assert server.used == [1, 2]


@pytest.mark.parametrize("secure", [False, True])
def test_largest_whole_body_is_whole(bench: Bench, credential: Credential, authority: Authority, secure: bool) -> None:
    """A body of exactly the limit is not called broken off."""
    behaviour = answering(http_answer(b"x" * BODY_LIMIT))
    server = bench.server(behaviour, authority.server_context(LOOPBACK) if secure else None)
    client = bench.client(server.url, ca_file=authority.ca_file)
    for _ in range(2):
        assert client.cancel(credential) == Reply(http=200, body=b"x" * BODY_LIMIT)
    assert server.used == [1, 1]


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_redirect_is_not_followed(bench: Bench, credential: Credential, status: str) -> None:
    """A redirect is an answer like any other: neither key nor signature goes where it points."""
    elsewhere = bench.server(answering(http_answer()))
    _, client = bench.to(answering(http_answer(b"", status, Location=f"{elsewhere.url}/fapi/v1/algoOrder")))
    answer = replied(client.cancel(credential))
    assert answer.http == int(status[:3])
    assert elsewhere.connections == 0


def raw_deflate(data: bytes) -> bytes:
    """Deflate without zlib's header, as some servers send it."""
    coder = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return coder.compress(data) + coder.flush()


@pytest.mark.parametrize(
    ("coding", "code"),
    [("gzip", gzip.compress), ("X-GZip", gzip.compress), ("deflate", zlib.compress), ("deflate", raw_deflate)],
)
def test_coded_answer_is_decoded(
    bench: Bench, credential: Credential, coding: str, code: Callable[[bytes], bytes]
) -> None:
    """A proxy that compresses in spite of "identity" does not turn a success into a doubt."""
    server, client = bench.to(answering(http_answer(code(DONE), Content_Encoding=coding)))
    for _ in range(2):
        assert client.cancel(credential) == Reply(http=200, body=DONE)
    assert server.used == [1, 1]


def test_coded_answer_in_chunks_is_decoded(bench: Bench, credential: Credential) -> None:
    """The same where its length is not told before, and a chunk ends within the coded text."""
    coded = gzip.compress(DONE)
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (coded[:7], coded[7:40], coded[40:], b""))
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n"
    server, client = bench.to(answering(head + chunks))
    for _ in range(2):
        assert client.cancel(credential) == Reply(http=200, body=DONE)
    assert server.used == [1, 1]


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", DONE),
        ("gzip", gzip.compress(DONE)[:-9]),
        ("gzip", gzip.compress(DONE) + b"more"),
        ("gzip", gzip.compress(DONE[:40]) + gzip.compress(DONE[40:])),
        ("deflate", b"\xff" * 40),
        ("br", DONE),
        ("gzip, gzip", gzip.compress(gzip.compress(DONE))),
    ],
    ids=["plain", "cut", "more", "two", "garbage", "unknown", "twice"],
)
def test_answer_that_cannot_be_decoded_proves_nothing(
    bench: Bench, credential: Credential, coding: str, body: bytes
) -> None:
    """What does not decode as one whole body is no success."""
    _, client = bench.to(answering(http_answer(body, Content_Encoding=coding)))
    answer = replied(client.cancel(credential))
    assert answer.truncated
    assert classify(Call.CANCEL, REF, answer).means is Means.UNCLEAR


def test_bomb_is_decoded_in_part(bench: Bench, credential: Credential) -> None:
    """A little body that would decode to a huge one is read up to the limit, and takes no more memory."""
    _, client = bench.to(answering(http_answer(gzip.compress(b"x" * 2**25), Content_Encoding="gzip")))
    tracemalloc.start()
    try:
        answer = client.cancel(credential)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert answer == Reply(http=200, body=b"x" * BODY_LIMIT, truncated=True)
    assert most < 2**24


def test_long_body_of_a_redirect_is_read_in_part(bench: Bench, credential: Credential) -> None:
    """Nor is more of its body read or waited for than of any other answer."""
    head = b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: %d\r\n\r\n" % (4 * BODY_LIMIT)
    server, client = bench.to(answering(head + b"x" * (BODY_LIMIT + 1)))
    assert client.cancel(credential) == Reply(http=302, body=b"x" * BODY_LIMIT, truncated=True)
    assert len(server.heads) == 1


VALID = http_answer(Retry_After="3", X_MBX_USED_WEIGHT_1M="5")


@examples(150)
@given(cut=st.integers(0, len(VALID)), junk=st.binary(max_size=12), resume=st.integers(0, len(VALID)))
def test_any_bytes_are_an_answer_or_a_failure(
    bench: Bench, credential: Credential, cut: int, junk: bytes, resume: int
) -> None:
    """Whatever a server sends before it closes, nothing is raised, and success needs the whole, true answer."""

    def behave(peer: Peer) -> None:
        peer.read_head()
        peer.send(VALID[:cut] + junk + VALID[resume:])

    server, client = bench.to(behave)
    answer = client.cancel(credential)
    if isinstance(answer, Failure):
        assert answer.seen
    elif classify(Call.CANCEL, REF, answer).means is Means.CONFIRMED:
        assert (answer.http, answer.truncated) == (200, False)
        assert json.loads(answer.body)["algoId"] == REF.algo_id
    assert len(server.heads) == 1


# ---- secrets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "behaviour",
    [
        answering(http_answer()),
        answering(http_answer(b"", "302 Found", Location="http://127.0.0.1/")),
        answering(b"HTTP/1.1 200 OK\r\nno colon here\r\nContent-Length: 2\r\n\r\n{}"),
        answering(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n"),
        drop_after_reading,
        _reset_after_reading,
        _contradicting_lengths,
        _cut_body("200 OK"),
        Peer.wait_until_closed,
    ],
)
def test_no_secret_in_logs_or_answers(
    bench: Bench, credential: Credential, behaviour: Behaviour, caplog: pytest.LogCaptureFixture
) -> None:
    """With every logger at its most talkative, neither the signature nor the signed URL nor the secret is shown."""
    for name in (None, "urllib3", "asyncio"):
        caplog.set_level(logging.DEBUG, name)
    server, client = bench.impatient(behaviour)
    answers = [client.cancel(credential), client.query(credential)]
    formatter = logging.Formatter("%(message)s %(args)s %(exc_text)s")
    shown = [formatter.format(record) for record in caplog.records]
    if bench.way == "requests":
        assert any("Starting new HTTP connection" in text for text in shown)
    signatures = [query_of(head).partition("&signature=")[2] for head in server.heads]
    for text in [*shown, *map(repr, answers), repr(client.exchange), repr(credential)]:
        assert SECRET not in text
        assert API_KEY not in text
        assert "signature" not in text
        assert "timestamp=" not in text
        assert not any(signature and signature in text for signature in signatures)


def test_own_time_out_of_rq_passes(credential: Credential) -> None:
    """The alarm of a stock worker ends the call, is taken for no answer, and shows no signed URL."""

    def behave(peer: Peer) -> None:
        if peer.number == 1:
            peer.wait_until_closed()
        answering(http_answer())(peer)

    bench = Bench("requests")
    try:
        server, client = bench.to(behave)
        with pytest.raises(JobTimeoutException) as caught, UnixSignalDeathPenalty(1, JobTimeoutException):
            client.cancel(credential)
        assert "signature" not in "".join(traceback.format_exception(caught.value))
        assert client.requests_sent == 1
        assert client.cancel(credential) == Reply(http=200, body=DONE)
        assert server.used == [2]
    finally:
        bench.close()


def test_given_up_call_shows_no_signature(loop_bench: Bench, credential: Credential) -> None:
    """Not even a traceback that shows the variables of a call's frames has any part of the signed request."""
    _, client = loop_bench.to(Peer.wait_until_closed)

    async def calls() -> None:
        async with asyncio.timeout(0.2):
            await client.exchange.call(Call.CANCEL, credential, REF)

    with pytest.raises(TimeoutError) as caught:
        client.run(calls())
    assert client.requests_sent == 1
    told = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    assert told.__cause__ is not None
    shown = "".join(told.format())
    assert "send" in shown
    assert "timestamp=" not in shown
