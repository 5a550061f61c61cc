"""Connections to the exchange: which one a call gets, and when one is not trusted any more."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
import threading
import time

import pytest

from producer.message import Call
from tests.fault.proxy import Proxy
from tests.loopback import (
    DONE,
    LOOPBACK,
    Authority,
    HandTls,
    Peer,
    answering,
    http_answer,
    late_tls,
    relaying,
)
from tests.servers import eventually
from tests.ways import REF, Bench, Client, bounded, failed, passed, replied, several
from worker.classify import Means, OrderRef, Reply, classify
from worker.exchange import Answer
from worker.signing import Credential

# ---- used again, or not ---------------------------------------------------------------------------------------------


def test_connection_is_used_again(bench: Bench, credential: Credential) -> None:
    """Calls of one thread share one connection."""
    server, client = bench.to(answering(http_answer()))
    for _ in range(5):
        assert replied(client.cancel(credential, REF)).http == 200
    assert server.connections == 1
    assert client.requests_sent == 5


@pytest.mark.parametrize("secure", [False, True])
def test_closed_idle_connection_is_replaced_unnoticed(
    bench: Bench, credential: Credential, authority: Authority, secure: bool
) -> None:
    """A pooled connection that the server closed meanwhile costs a new one, not an attempt."""
    closed = threading.Event()

    def once(peer: Peer) -> None:
        peer.read_head()
        peer.send(http_answer())
        if isinstance(peer.sock, ssl.SSLSocket):
            peer.sock.settimeout(0.05)  # say good-bye, but do not wait for the client's
            with contextlib.suppress(OSError):
                peer.sock.unwrap()
        peer.sock.close()
        closed.set()

    server = bench.server(once, authority.server_context(LOOPBACK) if secure else None)
    client = bench.client(server.url, ca_file=authority.ca_file)
    for turn in range(1, 4):
        assert replied(client.cancel(credential, REF)).http == 200
        assert closed.wait(5)
        closed.clear()
        assert (server.connections, len(server.heads), client.requests_sent) == (turn, turn, turn)


def test_request_on_a_dying_connection_is_not_sent_again(bench: Bench, credential: Credential) -> None:
    """If the pooled connection breaks once writing began, the attempt is in doubt and stays the only one."""

    def second_is_dropped(peer: Peer) -> None:
        peer.read_head()
        peer.send(http_answer())
        peer.read_head()

    server, client = bench.to(second_is_dropped)
    assert replied(client.cancel(credential, REF)).http == 200
    failed(client.cancel(credential, REF), seen=True, reason="no answer: RemoteDisconnected")
    assert len(server.heads) == 2
    assert replied(client.cancel(credential, REF)).http == 200
    assert server.used == [1, 1, 2]


def test_an_early_hint_is_not_taken_for_an_answer(bench: Bench, credential: Credential) -> None:
    """It is passed over; or it is a doubt, and its connection is given up: what follows answers nothing else."""
    server, client = bench.to(answering(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + http_answer()))
    means = [classify(Call.CANCEL, REF, client.cancel(credential, REF)).means for _ in range(2)]
    passes_over = means == [Means.CONFIRMED] * 2
    assert passes_over or means == [Means.UNCLEAR] * 2
    assert server.used == ([1, 1] if passes_over else [1, 2])


@pytest.mark.parametrize("interim", ["100 Continue", "102 Processing", "103 Early Hints"])
def test_interim_answers_are_passed_over(loop_bench: Bench, credential: Credential, interim: str) -> None:
    """What nobody asked for is no answer, and the connection is kept."""
    data = f"HTTP/1.1 {interim}\r\nLink: </x>\r\n\r\n".encode()
    server, client = loop_bench.to(answering(data * 2 + http_answer()))
    for _ in range(2):
        assert client.cancel(credential, REF) == Reply(http=200, body=DONE)
    assert server.used == [1, 1]


def test_continue_is_no_answer(bench: Bench, credential: Credential) -> None:
    """A "100 Continue" that nobody asked for is passed over, and the connection kept."""
    server, client = bench.to(answering(b"HTTP/1.1 100 Continue\r\n\r\n" + http_answer()))
    for _ in range(2):
        assert client.cancel(credential, REF) == Reply(http=200, body=DONE)
    assert server.used == [1, 1]


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_unasked_answer_is_not_taken_for_the_next(
    bench: Bench, credential: Credential, authority: Authority, secure: bool, late: bool
) -> None:
    """A second answer to one request, together with the first or after it, is nobody's: the connection is given up."""
    unasked = http_answer(b"unasked")
    sent = threading.Event()

    def behave(peer: Peer) -> None:
        while peer.read_head():
            peer.send(http_answer() + (b"" if late else unasked))
            if late:
                time.sleep(0.1)  # the answer has been read by then
                peer.send(unasked)
            sent.set()

    server = bench.server(behave, authority.server_context(LOOPBACK) if secure else None)
    client = bench.client(server.url, ca_file=authority.ca_file)
    for _ in range(2):
        assert client.cancel(credential, REF) == Reply(http=200, body=DONE)
        assert sent.wait(5)
        sent.clear()
    # What came in one piece with the answer requests throws away with it.
    assert server.used == ([1, 2] if late or bench.way == "asyncio" else [1, 1])


def test_unasked_answer_in_a_tunnel_over_tls_is_not_taken_for_the_next(
    bench: Bench, credential: Credential, authority: Authority
) -> None:
    """Nor is one that lies behind the answer in the proxy's own TLS record, where no look at the socket finds it."""

    def behave(peer: Peer) -> None:
        tls = HandTls(peer, authority.server_context(LOOPBACK))
        while tls.read_head():
            peer.send(tls.tickets + tls.record(http_answer()) + tls.record(http_answer(b"unasked")))

    server = bench.server(behave)
    proxy = bench.server(relaying(), authority.server_context(LOOPBACK))
    client = bench.client(f"https://127.0.0.1:{server.port}", ca_file=authority.ca_file, egress_proxy_url=proxy.url)
    for _ in range(2):
        assert client.cancel(credential, REF) == Reply(http=200, body=DONE)
    assert server.used == [1, 2]


@pytest.mark.parametrize("cut", [0, 20, len(http_answer()) - 10])
def test_late_answer_is_not_taken_for_the_next(bench: Bench, credential: Credential, cut: int) -> None:
    """An attempt that ran out of time closes its connection, however much of the answer had come."""
    given_up = threading.Event()
    late = http_answer(b"late".ljust(len(DONE)))

    def behave(peer: Peer) -> None:
        while peer.read_head():
            if peer.number == 1:
                peer.send(late[:cut])
                assert given_up.wait(5)
                peer.send(late[cut:])
            else:
                peer.send(http_answer())

    server, client = bench.impatient(behave)
    first = client.cancel(credential, REF)
    if cut < late.index(b"late"):
        failed(first, seen=True, reason="no answer: TimeoutError")
    else:
        assert replied(first).truncated
    given_up.set()
    for _ in range(2):
        assert client.query(credential, REF) == Reply(http=200, body=DONE)
    assert server.used == [1, 2, 2]
    assert client.requests_sent == 3


def test_connection_that_gets_an_unasked_answer_is_closed_at_once(loop_bench: Bench, credential: Credential) -> None:
    """Bytes on an idle connection close it as soon as they come, not when it is wanted."""
    go = threading.Event()
    over = threading.Event()

    def behave(peer: Peer) -> None:
        while peer.read_head():
            peer.send(http_answer())
            if peer.number == 1:
                assert go.wait(5)
                peer.send(http_answer(b"unasked"))
                with contextlib.suppress(OSError):
                    peer.wait_until_closed()
                over.set()
                return

    server, client = loop_bench.to(behave)

    async def calls() -> None:
        assert await client.exchange.call(Call.CANCEL, credential, REF) == Reply(http=200, body=DONE)
        go.set()
        await passed(over.is_set)
        assert await client.exchange.call(Call.CANCEL, credential, REF) == Reply(http=200, body=DONE)

    client.run(calls())
    assert server.used == [1, 2]


def test_connection_that_was_idle_too_long_is_not_trusted(bench: Bench, credential: Credential) -> None:
    """A flow that was still for longer than the bound may be forgotten on its way: it is closed, not used."""
    server, client = bench.to(answering(http_answer()), idle_bound_s=0.2)
    for _ in range(2):
        client.cancel(credential)
    assert server.used == [1, 1]
    time.sleep(0.3)
    client.cancel(credential)
    assert server.used == [1, 1, 2]


def test_connections_that_nobody_needs_are_closed(loop_bench: Bench, credential: Credential) -> None:
    """While one connection suffices, those of the last burst go when they have been idle for too long."""
    ended: list[int] = []

    def behave(peer: Peer) -> None:
        answering(http_answer())(peer)
        ended.append(peer.number)

    server, client = loop_bench.to(behave, idle_bound_s=0.3)
    client.run(several(client, credential, 4))
    assert server.connections == 4
    eventually(lambda: client.cancel(credential) and len(ended) == 3)
    assert server.connections == 4


def test_what_was_idle_as_long_as_a_silent_connection_is_not_used(loop_bench: Bench, credential: Credential) -> None:
    """A firewall that forgot one flow for its silence forgot those, too: the next call opens a connection."""
    server = loop_bench.server(answering(http_answer()))
    with Proxy(server.port) as firewall:
        client = loop_bench.client(firewall.http_url, recv_window_ms=60_000)
        client.run(several(client, credential, 4))
        before = server.connections
        time.sleep(1.1)
        firewall.forget_flows()
        failed(client.patient_cancel(credential), seen=True, reason="no answer: TimeoutError")
        assert replied(client.patient_cancel(credential)).http == 200
        assert server.connections == before + 1


def test_connections_are_kept_warm_though_they_were_forgotten(loop_bench: Bench) -> None:
    """A warm connection that does not answer is replaced: the next cancel does not meet it."""

    def behave(peer: Peer) -> None:
        while peer.read_head():
            peer.send(http_answer(b'{"serverTime":1760000000000}'))

    server = loop_bench.server(behave)
    with Proxy(server.port) as firewall:
        client = loop_bench.client(firewall.http_url, recv_window_ms=60_000)
        assert client.run(client.exchange.keep_warm()) == 2
        firewall.forget_flows()
        assert client.run(client.exchange.keep_warm()) == 2
        assert server.connections == 4


def test_no_more_connections_are_kept_than_allowed(loop_bench: Bench, credential: Credential) -> None:
    """Beyond the pool's size a connection is closed when its call has ended."""
    ended: list[int] = []

    def behave(peer: Peer) -> None:
        answering(http_answer())(peer)
        ended.append(peer.number)

    server, client = loop_bench.to(behave, pool_size=2)
    client.run(several(client, credential, 5))
    eventually(lambda: len(ended) == server.connections - 2)


def test_closed_client_sends_nothing(bench: Bench, credential: Credential) -> None:
    """After close() calls fail as not sent."""
    server, client = bench.to(answering(http_answer()))
    client.cancel(credential)
    client.run(closed(client))
    failed(client.cancel(credential), seen=False, reason="could not connect: ConnectionAbortedError")
    assert len(server.heads) == 1


def test_close_frees_whoever_waits_for_a_connection(loop_bench: Bench, credential: Credential) -> None:
    """Calls that have no connection yet fail unsent at once; one that was sent gets its answer."""
    asked = threading.Event()
    go = threading.Event()

    def behave(peer: Peer) -> None:
        while peer.read_head():
            asked.set()
            assert go.wait(5)
            peer.send(http_answer())
        ended.append(peer.number)

    ended: list[int] = []
    _, client = loop_bench.to(behave)

    async def calls() -> None:
        sent = asyncio.create_task(client.exchange.call(Call.CANCEL, credential, REF))
        await passed(asked.is_set)
        waiting = [asyncio.create_task(client.exchange.call(Call.CANCEL, credential, REF)) for _ in range(3)]
        await asyncio.sleep(0)
        client.exchange.close()
        for task in waiting:
            failed(await task, seen=False, reason="could not connect: ConnectionAbortedError")
        go.set()
        assert await sent == Reply(http=200, body=DONE)
        await passed(lambda: 1 in ended)

    client.run(calls())


def test_close_ends_what_is_being_opened(loop_bench: Bench, credential: Credential, authority: Authority) -> None:
    """Nothing of a client goes on in the loop after close(), a handshake that hangs included."""
    server = loop_bench.server(Peer.wait_until_closed)
    client = loop_bench.client(f"https://127.0.0.1:{server.port}", ca_file=authority.ca_file)

    async def calls() -> None:
        waiting = asyncio.create_task(client.exchange.call(Call.CANCEL, credential, REF))
        await passed(lambda: server.connections)
        client.exchange.close()
        failed(await waiting, seen=False, reason="could not connect: ConnectionAbortedError")
        await passed(lambda: asyncio.all_tasks() == {asyncio.current_task()})

    with bounded(0):
        client.run(calls())


# ---- many calls at once ---------------------------------------------------------------------------------------------


def echo(peer: Peer) -> None:
    """Answer with the algo id that was asked about."""
    while head := peer.read_head():
        algo_id = re.search(rb"algoId=(\d+)", head)
        assert algo_id is not None
        peer.send(http_answer(algo_id[1]))


async def closed(client: Client) -> None:
    """Close the client, its loop going on."""
    client.exchange.close()


def test_calls_at_once_get_their_own_answers(loop_bench: Bench, credential: Credential) -> None:
    """Many calls in flight, in rounds that share their connections: each gets the answer to its own."""
    server, client = loop_bench.to(echo)
    for first in (100, 200, 300):
        answers = client.run(several(client, credential, 40, first))
        assert answers == [Reply(http=200, body=b"%d" % (first + n)) for n in range(40)]
    assert server.connections <= 40
    assert client.requests_sent == 120


def test_last_used_connection_is_used_first(loop_bench: Bench, credential: Credential) -> None:
    """Of several idle connections the warmest serves the next call."""
    both_asked = threading.Barrier(2)
    second_may_end = threading.Event()

    def behave(peer: Peer) -> None:
        while head := peer.read_head():
            if b"algoId=1&" in head or b"algoId=2&" in head:
                both_asked.wait(5)
                assert peer.number == 1 or second_may_end.wait(5)
            peer.send(http_answer())

    server, client = loop_bench.to(behave)

    async def calls() -> None:
        tasks = [asyncio.create_task(client.exchange.call(Call.CANCEL, credential, OrderRef(n))) for n in (1, 2)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        second_may_end.set()
        await asyncio.wait(tasks)
        for _ in range(3):
            await client.exchange.call(Call.CANCEL, credential, REF)

    client.run(calls())
    assert server.used[2:] == [2, 2, 2]


def test_few_connections_are_opened_at_a_time(loop_bench: Bench, credential: Credential, authority: Authority) -> None:
    """A burst that finds no connection opens eight at once at the most, and all of its calls are answered."""
    lock = threading.Lock()
    counts = {"now": 0, "most": 0}
    tls = authority.server_context(LOOPBACK)

    def behave(peer: Peer) -> None:
        with lock:
            counts["now"] += 1
            counts["most"] = max(counts.values())
        time.sleep(0.05)
        with lock:
            counts["now"] -= 1
        with tls.wrap_socket(peer.sock, server_side=True) as peer.sock:
            while peer.read_head():
                time.sleep(0.2)
                peer.send(http_answer())

    server = loop_bench.server(behave)
    client = loop_bench.client(f"https://127.0.0.1:{server.port}", ca_file=authority.ca_file)
    answers = client.run(several(client, credential, 30))
    assert all(isinstance(answer, Reply) for answer in answers)
    assert 4 <= counts["most"] <= 8


class OneConnection:
    """A server whose first connection serves one call after the other; every later one hangs in its handshake."""

    def __init__(self, bench: Bench, authority: Authority, credential: Credential) -> None:
        self._tls = authority.server_context(LOOPBACK)
        self._go = threading.Event()
        self._credential = credential
        self.surplus = b""  # follows each answer
        self.server = bench.server(self._behave)
        url = f"https://127.0.0.1:{self.server.port}"
        self.client = bench.client(url, ca_file=authority.ca_file, patience_s=3)

    def _behave(self, peer: Peer) -> None:
        if peer.number > 1:
            peer.wait_until_closed()
            return
        with self._tls.wrap_socket(peer.sock, server_side=True) as peer.sock:
            while peer.read_head():
                assert self._go.wait(5)
                peer.send(http_answer())
                if self.surplus:
                    time.sleep(0.1)
                    peer.send(self.surplus)

    async def first(self) -> Answer | None:
        """A call that is answered when :meth:`second` waits for a connection."""
        return await self.client.exchange.call(Call.CANCEL, self._credential, REF)

    async def second(self) -> Answer | None:
        """A call that begins when the first has been sent."""
        await passed(lambda: self.server.heads)
        call = asyncio.create_task(self.first())
        await passed(lambda: self.server.connections == 2)
        self._go.set()
        return await call


@pytest.fixture
def one_connection(loop_bench: Bench, authority: Authority, credential: Credential) -> OneConnection:
    """Two calls, and a connection for one of them."""
    return OneConnection(loop_bench, authority, credential)


def test_waiting_call_takes_a_connection_that_falls_free(one_connection: OneConnection) -> None:
    """A call whose own connection hangs in its handshake is served by one that another call has done with."""
    one = one_connection

    async def calls() -> None:
        for answer in await asyncio.gather(one.first(), one.second()):
            assert answer == Reply(http=200, body=DONE)

    one.client.run(calls())
    assert one.server.used == [1, 1]


def test_connection_handed_to_a_cancelled_call_serves_the_next(one_connection: OneConnection) -> None:
    """A call that is given up at the very moment at which it gets a connection does not lose it."""
    one = one_connection

    async def calls() -> None:
        waiting = asyncio.create_task(one.second())
        await one.first()
        waiting.cancel()  # the first call's connection is its by now
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await one.first() == Reply(http=200, body=DONE)

    one.client.run(calls())
    assert (one.server.used, one.client.requests_sent) == ([1, 1], 2)


def test_call_whose_time_is_over_is_not_sent(one_connection: OneConnection) -> None:
    """However a call gets its connection, it is not sent when no time is left for an answer."""
    one = one_connection

    async def calls() -> None:
        waiting = asyncio.create_task(one.second())
        await one.first()
        time.sleep(3.1)  # the first call's connection is its by now, and the loop stands still
        failed(await waiting, seen=False, reason="not sent: TimeoutError")

    one.client.run(calls())
    assert (one.server.used, one.client.requests_sent) == ([1], 1)


def test_connection_that_gets_an_unasked_answer_when_it_is_handed_on(one_connection: OneConnection) -> None:
    """Nor is it used if the unasked answer comes between one call and the next, and the loop has not seen it yet."""
    one = one_connection
    one.surplus = http_answer(b"unasked")

    async def calls() -> None:
        waiting = asyncio.create_task(one.second())
        await one.first()
        time.sleep(0.3)  # the first call's connection is the second's by now, and the loop stands still
        failed(await waiting, seen=False, reason="not sent: ConnectionResetError")

    one.client.run(calls())
    assert (one.server.used, one.client.requests_sent) == ([1], 1)


def test_connection_of_a_cancelled_call_is_closed(loop_bench: Bench, credential: Credential) -> None:
    """A call that is given up takes its connection with it: the answer, if it comes, is nobody's."""
    over = threading.Event()

    def behave(peer: Peer) -> None:
        peer.read_head()
        if peer.number == 1:
            peer.wait_until_closed()
            over.set()
        else:
            peer.send(http_answer())

    server, client = loop_bench.to(behave)

    async def calls() -> None:
        given_up = asyncio.create_task(client.exchange.call(Call.CANCEL, credential, REF))
        await passed(lambda: server.heads)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        await passed(over.is_set)
        assert await client.exchange.call(Call.CANCEL, credential, REF) == Reply(http=200, body=DONE)

    client.run(calls())
    assert (server.used, client.requests_sent) == ([1, 2], 2)


def test_cancelled_wait_leaves_its_connection_to_the_next(
    loop_bench: Bench, credential: Credential, authority: Authority
) -> None:
    """A call that is given up before it was sent sends nothing, and what was opened for it serves the next one."""
    server = loop_bench.server(late_tls(authority.server_context(LOOPBACK), 0.2))
    client = loop_bench.client(f"https://127.0.0.1:{server.port}", ca_file=authority.ca_file)

    async def calls() -> None:
        given_up = asyncio.create_task(client.exchange.call(Call.CANCEL, credential, REF))
        await passed(lambda: server.connections)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        assert client.requests_sent == 0
        await asyncio.sleep(0.4)
        assert await client.exchange.call(Call.CANCEL, credential, REF) == Reply(http=200, body=DONE)

    client.run(calls())
    assert (server.used, client.requests_sent) == ([1], 1)
