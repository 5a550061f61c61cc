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

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rq.timeouts import JobTimeoutException, UnixSignalDeathPenalty

from producer.message import Call
from tests.examples import examples
from tests.loopback import DONE, Behaviour, Peer, answering, drip, drop_after_reading, http_answer, not_http, query_of
from tests.ways import API_KEY, CREDENTIAL, REF, SECRET, TOTAL_S, Bench, bounded, failed, proves_nothing, replied
from worker.classify import Failure, Means, Reply, classify
from worker.transport import BODY_LIMIT


def saying(data: bytes) -> Behaviour:
    """Read a request, send this, and go away."""

    def behave(peer: Peer) -> None:
        peer.read_head()
        peer.send(data)

    return behave


def reset_after_reading(peer: Peer) -> None:
    """Read a request, and be gone without a good-bye."""
    peer.read_head()
    peer.reset()


CONTRADICTING = saying(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef")
CUT_BODY = saying(http_answer()[:-10])
CUT_CHUNK = saying(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(DONE), DONE))


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (drop_after_reading, "no answer: RemoteDisconnected"),
        (reset_after_reading, "no answer: ConnectionResetError"),
        (not_http, "no answer:"),
        (CONTRADICTING, "no answer:"),
        *[(saying(http_answer(Server="x" * 40)[:size]), "no answer:") for size in (12, 14, 20, 40)],
        (CUT_BODY, ""),
        (CUT_CHUNK, ""),
    ],
)
def test_break_after_the_first_byte_proves_nothing(bench: Bench, behaviour: Behaviour, reason: str) -> None:
    """However the exchange goes away once writing began, the cancel is in doubt, and it is sent once."""
    server, client = bench.to(behaviour)
    answer = client.ask()
    proves_nothing(answer)
    if isinstance(answer, Failure):
        failed(answer, seen=True, reason=reason)
    assert len(server.heads) <= server.connections == 1


@pytest.mark.parametrize("secure", [False, True])
def test_connection_that_closes_at_once_is_no_answer(bench: Bench, secure: bool) -> None:
    """A server that closes what it has accepted is at most perhaps seen, and is not asked again for the same call."""
    server, client = bench.to(lambda peer: None, secure=secure)
    assert isinstance(client.ask(), Failure)
    assert (server.heads, server.connections) == ([], 1)


def test_cut_body_keeps_the_pause(bench: Bench) -> None:
    """A ban whose text is lost is still a ban, with its length."""
    _, client = bench.to(saying(http_answer(DONE, "418 I'm a teapot", Retry_After="120")[:-10]))
    assert client.ask() == Reply(http=418, body=DONE[:-10], retry_after_ms=120_000, truncated=True)


def test_an_answer_that_quotes_the_request_tells_neither_key_nor_signature(bench: Bench) -> None:
    """An edge may show all that it was sent: what can be recorded and logged of that holds no secret."""

    def quote(peer: Peer) -> None:
        path, *fields = peer.read_head().split(b"\r\n")
        peer.send(http_answer(b"\n".join([*sorted(fields, reverse=True), path]), "502 Bad Gateway"))

    server, client = bench.to(quote)
    said = classify(Call.CANCEL, REF, client.ask()).msg
    (head,) = server.heads
    assert said.startswith("X-MBX-APIKEY: ***")
    assert API_KEY in head.decode()
    assert API_KEY not in said
    assert query_of(head).partition("&signature=")[2] not in said


# ---- silence --------------------------------------------------------------------------------------------------------


def test_silence_is_bounded(bench: Bench) -> None:
    """An answer that does not come ends the attempt at eight tenths of recvWindow, in doubt."""
    _, client = bench.impatient(Peer.wait_until_closed)
    started_at = time.monotonic()
    with bounded():
        failed(client.ask(), seen=True, reason="no answer: TimeoutError")
    assert time.monotonic() - started_at >= TOTAL_S - 0.01


def test_a_silence_is_waited_for_longer_than_the_one_before(loop_bench: Bench) -> None:
    """A quarter of a second after quick answers, and twice as long when nothing has been heard since."""

    def once(peer: Peer) -> None:
        peer.read_head()
        if peer.number == 1:
            peer.send(http_answer())
        peer.wait_until_closed()

    _, client = loop_bench.to(once, recv_window_ms=60_000)
    replied(client.ask())
    for at_least_s in (0.25, 0.5):
        started_at = time.monotonic()
        failed(client.ask_patiently(), seen=True, reason="no answer: TimeoutError")
        assert time.monotonic() - started_at >= at_least_s - 0.01


@pytest.mark.parametrize("secure", [False, True])
def test_dripping_head_is_bounded(loop_bench: Bench, secure: bool) -> None:
    """A byte now and then does not prolong an attempt."""
    _, client = loop_bench.impatient(drip(http_answer() * 9, TOTAL_S / 20), secure=secure)
    with bounded():
        failed(client.ask(), seen=True, reason="no answer: TimeoutError")


def test_dripping_body_is_bounded(bench: Bench) -> None:
    """The same after the head: what is there is handed over as broken off, which proves nothing."""
    head = http_answer().partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    _, client = bench.impatient(drip(DONE, TOTAL_S / 20, at_once=head))
    with bounded():
        answer = replied(client.ask())
    assert (answer.http, answer.truncated) == (200, True)
    proves_nothing(answer)


def _flood(peer: Peer) -> None:
    """For much longer than an attempt may take, send what is no answer."""
    peer.read_head()
    # Many in one write, which needs no turn of this process' threads.
    continues = b"HTTP/1.1 100 Continue\r\n\r\n" * 2**19
    ends_at = time.monotonic() + 5
    while time.monotonic() < ends_at:
        peer.send(continues)


def test_flood_without_an_answer_is_bounded(loop_bench: Bench) -> None:
    """Nor does a server that never stops sending, and never comes to its answer."""
    server, client = loop_bench.to(_flood)
    failed(client.ask(), seen=True, reason="no answer: MalformedResponse")
    assert len(server.heads) == 1


def test_loop_that_stood_still_is_no_silence(loop_bench: Bench) -> None:
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
        call = asyncio.create_task(client.asking())
        # Held up twice, so that the time is over before the answer has come, and the loop hears of the time first.
        loop.call_at(over_s - 0.03, time.sleep, 0.06)
        loop.call_at(over_s - 0.02, hold_up)
        assert await call == Reply(http=200, body=DONE)

    client.run(calls())
    assert client.ask() == Reply(http=200, body=DONE)
    assert server.used == [1, 1]


# ---- too long, coded, elsewhere, nonsense ----------------------------------------------------------------------------

_TOO_LONG = {
    "length": b"200 OK\r\nContent-Length: %d\r\n\r\n" % (4 * BODY_LIMIT),
    "chunked": b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % (4 * BODY_LIMIT),
    "close": b"200 OK\r\nConnection: close\r\n\r\n",
    "redirect": b"302 Found\r\nLocation: /elsewhere\r\nContent-Length: %d\r\n\r\n" % (4 * BODY_LIMIT),
}


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("framing", _TOO_LONG)
def test_huge_body_is_read_in_part(bench: Bench, framing: str, secure: bool) -> None:
    """At most 64 KiB are read, the rest is not waited for, and its connection is not used again."""
    behaviour = answering(b"HTTP/1.1 " + _TOO_LONG[framing] + b"x" * (BODY_LIMIT + 1))
    server, client = bench.to(behaviour, secure=secure)
    for _ in range(2):
        answer = replied(client.ask())
        assert (answer.body, answer.truncated) == (b"x" * BODY_LIMIT, True)
    assert server.used == [1, 2]


def raw_deflate(data: bytes) -> bytes:
    """Deflate without zlib's header, as some servers send it."""
    coder = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return coder.compress(data) + coder.flush()


def coded_chunks() -> bytes:
    """A coded answer whose length is not told before, with a chunk that ends within the coded text."""
    coded = gzip.compress(DONE)
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (coded[:7], coded[7:40], coded[40:], b""))
    return b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (http_answer(b"x" * BODY_LIMIT), b"x" * BODY_LIMIT),
        (http_answer(gzip.compress(DONE), Content_Encoding="gzip"), DONE),
        (http_answer(gzip.compress(DONE), Content_Encoding="X-GZip"), DONE),
        (http_answer(zlib.compress(DONE), Content_Encoding="deflate"), DONE),
        (http_answer(raw_deflate(DONE), Content_Encoding="deflate"), DONE),
        (http_answer(gzip.compress(DONE[:40]) + gzip.compress(DONE[40:]), Content_Encoding="gzip"), DONE),
        (http_answer(gzip.compress(zlib.compress(DONE)), Content_Encoding="deflate, gzip"), DONE),
        (http_answer(gzip.compress(DONE), Content_Encoding="identity, GZIP,"), DONE),
        (coded_chunks(), DONE),
    ],
)
def test_longest_and_coded_answers_are_whole(bench: Bench, answer: bytes, body: bytes) -> None:
    """A body of exactly the limit is whole, and a proxy that compresses in spite of "identity" does not turn a success
    into a doubt."""
    server, client = bench.to(answering(answer))
    for _ in range(2):
        assert client.ask() == Reply(http=200, body=body)
    assert server.used == [1, 1]


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", DONE),
        ("gzip", gzip.compress(DONE)[:-9]),
        ("gzip", gzip.compress(DONE) + b"more"),
        ("deflate", b"\xff" * 40),
        ("gzip, gzip", gzip.compress(DONE)),
    ],
    ids=["plain", "cut", "more", "garbage", "not twice"],
)
def test_answer_that_cannot_be_decoded_proves_nothing(bench: Bench, coding: str, body: bytes) -> None:
    """What does not decode as one whole body is no success."""
    _, client = bench.to(answering(http_answer(body, Content_Encoding=coding)))
    answer = replied(client.ask())
    assert answer.truncated
    proves_nothing(answer)


@pytest.mark.parametrize("coding", ["br", "zstd, identity", "gzip, none"])
def test_a_coding_that_nobody_asked_for_is_named(bench: Bench, coding: str) -> None:
    """A proxy's coding that cannot be read makes a success a doubt, and the record says why."""
    _, client = bench.to(answering(http_answer(DONE, Content_Encoding=coding)))
    answer = replied(client.ask())
    proves_nothing(answer)
    assert "a proxy on the way does that" in classify(Call.CANCEL, REF, answer).msg


def test_bomb_is_decoded_in_part(bench: Bench) -> None:
    """A little body that would decode to a huge one is read up to the limit, and takes no more memory."""
    _, client = bench.to(answering(http_answer(gzip.compress(b"x" * 2**25), Content_Encoding="gzip")))
    tracemalloc.start()
    try:
        answer = client.ask()
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert answer == Reply(http=200, body=b"x" * BODY_LIMIT, truncated=True)
    assert most < 2**24


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_redirect_is_not_followed(bench: Bench, status: str) -> None:
    """A redirect is an answer like any other: neither key nor signature goes where it points."""
    elsewhere = bench.server(answering(http_answer()))
    _, client = bench.to(answering(http_answer(b"", status, Location=f"{elsewhere.url}/fapi/v1/algoOrder")))
    assert replied(client.ask()).http == int(status[:3])
    assert elsewhere.connections == 0


VALID = http_answer(Retry_After="3", X_MBX_USED_WEIGHT_1M="5")


@examples(150)
@given(cut=st.integers(0, len(VALID)), junk=st.binary(max_size=12), resume=st.integers(0, len(VALID)))
def test_any_bytes_are_an_answer_or_a_failure(bench: Bench, cut: int, junk: bytes, resume: int) -> None:
    """Whatever a server sends before it closes, nothing is raised, and success needs the whole, true answer."""
    server, client = bench.to(saying(VALID[:cut] + junk + VALID[resume:]))
    answer = client.ask()
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
        reset_after_reading,
        CONTRADICTING,
        CUT_BODY,
        Peer.wait_until_closed,
    ],
)
def test_no_secret_in_logs_or_answers(bench: Bench, behaviour: Behaviour, caplog: pytest.LogCaptureFixture) -> None:
    """With every logger at its most talkative, neither the signature nor the signed URL nor the secret is shown."""
    for name in (None, "urllib3", "asyncio"):
        caplog.set_level(logging.DEBUG, name)
    server, client = bench.impatient(behaviour)
    answers = [client.ask(), client.ask(call=Call.QUERY)]
    formatter = logging.Formatter("%(message)s %(args)s %(exc_text)s")
    shown = [formatter.format(record) for record in caplog.records]
    if bench.way == "requests":
        assert any("Starting new HTTP connection" in text for text in shown)
    signatures = [query_of(head).partition("&signature=")[2] for head in server.heads]
    for text in [*shown, *map(repr, answers), repr(client.exchange), repr(CREDENTIAL)]:
        assert not any(secret in text for secret in (SECRET, API_KEY, "signature", "timestamp="))
        assert not any(signature and signature in text for signature in signatures)


def test_own_time_out_of_rq_passes(requests_bench: Bench) -> None:
    """The alarm of a stock worker ends the call, is taken for no answer, and shows no signed URL."""

    def behave(peer: Peer) -> None:
        if peer.number == 1:
            peer.wait_until_closed()
        answering(http_answer())(peer)

    server, client = requests_bench.to(behave)
    with pytest.raises(JobTimeoutException) as caught, UnixSignalDeathPenalty(1, JobTimeoutException):
        client.ask()
    assert "signature" not in "".join(traceback.format_exception(caught.value))
    assert client.ask() == Reply(http=200, body=DONE)
    assert server.used == [2]


def test_given_up_call_shows_no_signature(loop_bench: Bench) -> None:
    """Not even a traceback that shows the variables of a call's frames has any part of the signed request."""
    server, client = loop_bench.to(Peer.wait_until_closed)

    async def calls() -> None:
        async with asyncio.timeout(0.2):
            await client.asking()

    with pytest.raises(TimeoutError) as caught:
        client.run(calls())
    assert server.connections == 1
    told = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    assert told.__cause__ is not None
    shown = "".join(told.format())
    assert "send" in shown
    assert "timestamp=" not in shown
