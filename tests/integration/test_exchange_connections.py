"""Connections to the exchange: which one a call gets, and when one is not trusted any more."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from producer.message import Call
from tests.fault.proxy import Proxy
from tests.loopback import DONE, HandTls, Peer, answering, http_answer, late_tls, relaying
from tests.servers import eventually
from tests.ways import Bench, Client, bounded, failed, passed, proves_nothing, replied
from worker.classify import OrderRef, Reply
from worker.exchange import Answer

WELL = Reply(http=200, body=DONE)

# ---- used again, or not ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 2])
def test_connection_is_used_again(bench: Bench, before: bytes) -> None:
    """Calls of one thread share one connection, also where a "100 Continue" comes that nobody asked for."""
    server, client = bench.to(answering(before + http_answer()))
    for _ in range(5):
        assert client.ask() == WELL
    assert server.used == [1] * 5


@pytest.mark.parametrize("secure", [False, True])
def test_closed_idle_connection_is_replaced_unnoticed(bench: Bench, secure: bool) -> None:
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

    server, client = bench.to(once, secure=secure)
    for turn in range(1, 4):
        assert client.ask() == WELL
        assert closed.wait(5)
        closed.clear()
        assert (server.connections, len(server.heads)) == (turn, turn)


def test_request_on_a_dying_connection_is_not_sent_again(bench: Bench) -> None:
    """If the pooled connection breaks once writing began, the attempt is in doubt and stays the only one."""

    def second_is_dropped(peer: Peer) -> None:
        peer.read_head()
        peer.send(http_answer())
        peer.read_head()

    server, client = bench.to(second_is_dropped)
    assert client.ask() == WELL
    failed(client.ask(), seen=True, reason="no answer: RemoteDisconnected")
    assert client.ask() == WELL
    assert server.used == [1, 1, 2]


def test_an_early_hint_is_not_taken_for_an_answer(bench: Bench) -> None:
    """It is passed over; or it is a doubt, and its connection is given up: what follows answers nothing else."""
    server, client = bench.to(answering(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + http_answer()))
    answers = [client.ask() for _ in range(2)]
    if bench.way == "asyncio":
        assert (answers, server.used) == ([WELL] * 2, [1, 1])
    else:
        assert server.used == [1, 2]
        for answer in answers:
            proves_nothing(answer)


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_unasked_answer_is_not_taken_for_the_next(bench: Bench, secure: bool, late: bool) -> None:
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

    server, client = bench.to(behave, secure=secure)
    for _ in range(2):
        assert client.ask() == WELL
        assert sent.wait(5)
        sent.clear()
    # What came in one piece with the answer requests throws away with it.
    assert server.used == ([1, 2] if late or bench.way == "asyncio" else [1, 1])


def test_unasked_answer_in_a_tunnel_over_tls_is_not_taken_for_the_next(bench: Bench) -> None:
    """Nor is one that lies behind the answer in the proxy's own TLS record, where no look at the socket finds it."""

    def behave(peer: Peer) -> None:
        tls = HandTls(peer, bench.tls())
        while tls.read_head():
            peer.send(tls.tickets + tls.record(http_answer()) + tls.record(http_answer(b"unasked")))

    proxy = bench.server(relaying(), bench.tls())
    server, client = bench.over_tls(behave, egress_proxy_url=proxy.url)
    for _ in range(2):
        assert client.ask() == WELL
    assert server.used == [1, 2]


@pytest.mark.parametrize("cut", [0, 20, len(http_answer()) - 10])
def test_late_answer_is_not_taken_for_the_next(bench: Bench, cut: int) -> None:
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
    first = client.ask()
    if cut < late.index(b"late"):
        failed(first, seen=True, reason="no answer: TimeoutError")
    else:
        assert replied(first).truncated
    given_up.set()
    for _ in range(2):
        assert client.ask(call=Call.QUERY) == WELL
    assert server.used == [1, 2, 2]


def test_connection_that_gets_an_unasked_answer_is_closed_at_once(loop_bench: Bench) -> None:
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
        assert await client.asking() == WELL
        go.set()
        await passed(over.is_set)
        assert await client.asking() == WELL

    client.run(calls())
    assert server.used == [1, 2]


def test_connection_that_was_idle_too_long_is_not_trusted(bench: Bench) -> None:
    """A flow that was still for longer than the bound may be forgotten on its way: it is closed, not used."""
    server, client = bench.to(answering(http_answer()), idle_bound_s=0.2)
    for _ in range(2):
        client.ask()
    time.sleep(0.3)
    client.ask()
    assert server.used == [1, 1, 2]


@dataclass
class Ending:
    """Answers, and notes which connections have ended."""

    ended: list[int] = field(default_factory=list)

    def __call__(self, peer: Peer) -> None:
        answering(http_answer())(peer)
        self.ended.append(peer.number)


def test_connections_that_nobody_needs_are_closed(loop_bench: Bench) -> None:
    """While one connection suffices, those of the last burst go when they have been idle for too long."""
    behaviour = Ending()
    server, client = loop_bench.to(behaviour, idle_bound_s=0.3)
    client.run(client.several(4))
    assert server.connections == 4
    eventually(lambda: client.ask() and len(behaviour.ended) == 3)
    assert server.connections == 4


def test_no_more_connections_are_kept_than_allowed(loop_bench: Bench) -> None:
    """Beyond the pool's size a connection is closed when its call has ended."""
    behaviour = Ending()
    server, client = loop_bench.to(behaviour, pool_size=2)
    client.run(client.several(5))
    eventually(lambda: len(behaviour.ended) == server.connections - 2)


def test_what_was_idle_as_long_as_a_silent_connection_is_not_used(loop_bench: Bench) -> None:
    """A firewall that forgot one flow for its silence forgot those, too: the next call opens a connection."""
    server = loop_bench.server(answering(http_answer()))
    with Proxy(server.port) as firewall:
        client = loop_bench.client(firewall.http_url, recv_window_ms=60_000)
        client.run(client.several(4))
        before = server.connections
        time.sleep(1.1)
        firewall.forget_flows()
        failed(client.ask_patiently(), seen=True, reason="no answer: TimeoutError")
        assert client.ask_patiently() == WELL
        assert server.connections == before + 1


def test_connections_are_kept_warm_though_they_were_forgotten(loop_bench: Bench) -> None:
    """A warm connection that does not answer is replaced: the next cancel does not meet it."""
    server = loop_bench.server(answering(http_answer(b'{"serverTime":1760000000000}')))
    with Proxy(server.port) as firewall:
        client = loop_bench.client(firewall.http_url, recv_window_ms=60_000)
        assert client.run(client.exchange.keep_warm()) == 2
        firewall.forget_flows()
        assert client.run(client.exchange.keep_warm()) == 2
        assert server.connections == 4


# ---- closed ---------------------------------------------------------------------------------------------------------


async def closed(client: Client) -> None:
    """Close the client, its loop going on."""
    client.exchange.close()


def test_closed_client_sends_nothing(bench: Bench) -> None:
    """After close() calls fail as not sent."""
    server, client = bench.to(answering(http_answer()))
    client.ask()
    client.run(closed(client))
    failed(client.ask(), seen=False, reason="could not connect: ConnectionAbortedError")
    assert len(server.heads) == 1


def test_close_frees_whoever_waits_for_a_connection(loop_bench: Bench) -> None:
    """Calls that have no connection yet fail unsent at once; one that was sent gets its answer."""
    asked = threading.Event()
    go = threading.Event()
    ended: list[int] = []

    def behave(peer: Peer) -> None:
        while peer.read_head():
            asked.set()
            assert go.wait(5)
            peer.send(http_answer())
        ended.append(peer.number)

    _, client = loop_bench.to(behave)

    async def calls() -> None:
        sent = asyncio.create_task(client.asking())
        await passed(asked.is_set)
        waiting = [asyncio.create_task(client.asking()) for _ in range(3)]
        await asyncio.sleep(0)
        client.exchange.close()
        for task in waiting:
            failed(await task, seen=False, reason="could not connect: ConnectionAbortedError")
        go.set()
        assert await sent == WELL
        await passed(lambda: 1 in ended)

    client.run(calls())


def test_close_ends_what_is_being_opened(loop_bench: Bench) -> None:
    """Nothing of a client goes on in the loop after close(), a handshake that hangs included."""
    server, client = loop_bench.over_tls(Peer.wait_until_closed)

    async def calls() -> None:
        waiting = asyncio.create_task(client.asking())
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


def test_calls_at_once_get_their_own_answers(loop_bench: Bench) -> None:
    """Many calls in flight, in rounds that share their connections: each gets the answer to its own."""
    server, client = loop_bench.to(echo)
    for first in (100, 200, 300):
        answers = client.run(client.several(40, first))
        assert answers == [Reply(http=200, body=b"%d" % (first + n)) for n in range(40)]
    assert server.connections <= 40
    assert len(server.heads) == 120


def test_last_used_connection_is_used_first(loop_bench: Bench) -> None:
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
        tasks = [asyncio.create_task(client.asking(OrderRef(n))) for n in (1, 2)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        second_may_end.set()
        await asyncio.wait(tasks)
        for _ in range(3):
            await client.asking()

    client.run(calls())
    assert server.used[2:] == [2, 2, 2]


def test_few_connections_are_opened_at_a_time(loop_bench: Bench) -> None:
    """A burst that finds no connection opens eight at once at the most, and all of its calls are answered."""
    lock = threading.Lock()
    counts = {"now": 0, "most": 0}
    tls = loop_bench.tls()

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

    _, client = loop_bench.over_tls(behave)
    answers = client.run(client.several(30))
    assert all(isinstance(answer, Reply) for answer in answers)
    assert 4 <= counts["most"] <= 8


# ---- handed on ------------------------------------------------------------------------------------------------------


class OneConnection:
    """A server whose first connection serves one call after the other; every later one hangs in its handshake."""

    def __init__(self, bench: Bench) -> None:
        self._tls = bench.tls()
        self._go = threading.Event()
        self.surplus = b""  # follows each answer
        self.server, self.client = bench.over_tls(self._behave, recv_window_ms=3_750)

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

    async def second(self) -> Answer | None:
        """A call that begins when the first has been sent, which is answered when this one waits for a connection."""
        await passed(lambda: self.server.heads)
        call = asyncio.create_task(self.client.asking())
        await passed(lambda: self.server.connections == 2)
        self._go.set()
        return await call

    def handed_on(self, meanwhile: Callable[[asyncio.Task[Answer | None]], object]) -> Answer | None:
        """What the second call is told, if this is done at the moment at which the first one's connection is its."""

        async def calls() -> Answer | None:
            waiting = asyncio.create_task(self.second())
            assert await self.client.asking() == WELL
            meanwhile(waiting)
            return await waiting

        return self.client.run(calls())


@pytest.fixture
def one_connection(loop_bench: Bench) -> OneConnection:
    """Two calls, and a connection for one of them."""
    return OneConnection(loop_bench)


def test_waiting_call_takes_a_connection_that_falls_free(one_connection: OneConnection) -> None:
    """A call whose own connection hangs in its handshake is served by one that another call has done with."""
    assert one_connection.handed_on(lambda _: None) == WELL
    assert one_connection.server.used == [1, 1]


def test_connection_handed_to_a_cancelled_call_serves_the_next(one_connection: OneConnection) -> None:
    """A call that is given up at the very moment at which it gets a connection does not lose it."""
    one = one_connection
    with pytest.raises(asyncio.CancelledError):
        one.handed_on(lambda waiting: waiting.cancel())
    assert one.client.ask() == WELL
    assert one.server.used == [1, 1]


def test_call_whose_time_is_over_is_not_sent(one_connection: OneConnection) -> None:
    """However a call gets its connection, it is not sent when no time is left for an answer."""
    failed(one_connection.handed_on(lambda _: time.sleep(3.1)), seen=False, reason="not sent: TimeoutError")
    assert one_connection.server.used == [1]


def test_connection_that_gets_an_unasked_answer_when_it_is_handed_on(one_connection: OneConnection) -> None:
    """Nor is it used if the unasked answer comes between one call and the next, and the loop has not seen it yet."""
    one_connection.surplus = http_answer(b"unasked")
    failed(one_connection.handed_on(lambda _: time.sleep(0.3)), seen=False, reason="not sent: ConnectionResetError")
    assert one_connection.server.used == [1]


# ---- given up -------------------------------------------------------------------------------------------------------


async def given_up(client: Client, when: Callable[[], object]) -> None:
    """A call that is cancelled as soon as something is so."""
    call = asyncio.create_task(client.asking())
    await passed(when)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


def test_connection_of_a_cancelled_call_is_closed(loop_bench: Bench) -> None:
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
        await given_up(client, lambda: server.heads)
        await passed(over.is_set)
        assert await client.asking() == WELL

    client.run(calls())
    assert server.used == [1, 2]


def test_cancelled_wait_leaves_its_connection_to_the_next(loop_bench: Bench) -> None:
    """A call that is given up before it was sent sends nothing, and what was opened for it serves the next one."""
    server, client = loop_bench.over_tls(late_tls(loop_bench.tls(), 0.2))

    async def calls() -> None:
        await given_up(client, lambda: server.connections)
        await asyncio.sleep(0.4)
        assert await client.asking() == WELL

    client.run(calls())
    assert server.used == [1]


def test_opening_for_a_call_that_is_gone_does_not_fail_the_next(loop_bench: Bench) -> None:
    """When the time of a connection that hangs is over, a call that has time left gets another one."""

    def behave(peer: Peer) -> None:
        if peer.number == 1:
            peer.wait_until_closed()
        else:
            late_tls(tls, 0)(peer)

    tls = loop_bench.tls()
    server, client = loop_bench.over_tls(behave, recv_window_ms=2_500)

    async def calls() -> None:
        await given_up(client, lambda: server.connections)
        await asyncio.sleep(0.4)
        assert await client.asking() == WELL

    client.run(calls())
    assert server.used == [2]
