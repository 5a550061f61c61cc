"""How connections to the exchange are opened: names, addresses, sockets, and how long all that may take."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from producer.message import Call
from tests.loopback import DONE, LOOPBACK, Authority, Peer, answering, http_answer, relaying
from tests.servers import ROOT, eventually
from tests.ways import REF, Bench, Client, bounded, failed, passed, replied, several
from worker.classify import Reply
from worker.signing import Credential


def named(monkeypatch: pytest.MonkeyPatch, addresses: Callable[[], list[Any]]) -> None:
    """Let the name exchange.test have these addresses."""
    real = socket.getaddrinfo

    def look_up(host: str, port: int, *args: Any, **options: Any) -> list[Any]:
        if host != "exchange.test":
            return real(host, port, *args, **options)
        if options.get("flags"):
            raise socket.gaierror(socket.EAI_NONAME, "a name")
        return addresses()

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def tcp(host: str, port: int, protocol: int = 6) -> tuple[Any, ...]:
    """An address as a look-up gives it."""
    return (socket.AF_INET, socket.SOCK_STREAM, protocol, "", (host, port))


@contextlib.contextmanager
def swallowing(host: str = "127.0.0.1") -> Iterator[tuple[str, int]]:
    """An address that does not answer whoever wants to connect."""
    with socket.socket() as full, contextlib.ExitStack() as waiting:
        full.bind((host, 0))
        full.listen(0)
        for _ in range(3):  # what the kernel queues beyond the backlog
            sock = waiting.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        yield full.getsockname()


def test_every_address_is_tried(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of which some addresses are dead or of no use here is reached through the living one."""
    server = bench.server(answering(http_answer()))
    unsupported = tcp("127.0.0.1", server.port, 255)  # as IPv6 is where the kernel has none
    dead = [tcp("127.0.0.2", server.port), tcp("127.0.0.3", server.port)]
    named(monkeypatch, lambda: [unsupported, *dead, tcp("127.0.0.1", server.port)])
    assert replied(bench.client("http://exchange.test:1").cancel(credential)).http == 200


def test_silent_addresses_do_not_use_up_the_time(loop_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two addresses that swallow every packet do not keep a call from the third."""
    server = loop_bench.server(answering(http_answer()))
    with swallowing("127.0.0.2") as one, swallowing("127.0.0.3") as other:
        named(monkeypatch, lambda: [tcp(*one), tcp(*other), tcp("127.0.0.1", server.port)])
        client = loop_bench.client("http://exchange.test:1")

        async def call() -> None:
            assert replied(await client.asking()).http == 200
            await asyncio.sleep(0.01)
            assert asyncio.all_tasks() == {asyncio.current_task()}  # the others' attempts are over

        client.run(call())


def test_addresses_that_failed_are_tried_last(loop_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where more addresses are silent than one attempt has time for, the next one goes on behind them."""
    server = loop_bench.server(answering(http_answer()))
    with contextlib.ExitStack() as silent:
        addresses = [tcp(*silent.enter_context(swallowing(f"127.0.0.{n}"))) for n in range(2, 8)]
        named(monkeypatch, lambda: [*addresses, tcp("127.0.0.1", server.port)])
        client = loop_bench.client("http://exchange.test:1", recv_window_ms=2_500)
        failed(client.ask(), seen=False, reason="could not connect: TimeoutError")
        eventually(lambda: isinstance(client.ask(), Reply), 30)


@pytest.mark.parametrize("addresses", [1, 2])
def test_opening_that_is_given_up_leaves_no_socket(
    loop_bench: Bench, monkeypatch: pytest.MonkeyPatch, addresses: int
) -> None:
    """Whenever a client is closed while it connects, what it had connected is closed with it."""
    server = loop_bench.server(answering(http_answer()))
    named(monkeypatch, lambda: [tcp("127.0.0.1", server.port), tcp("127.0.0.2", server.port)][:addresses])

    async def given_up(client: Client, turns: int) -> None:
        call = asyncio.create_task(client.exchange.ask_time())
        for _ in range(turns):
            await asyncio.sleep(0.0002)
        client.exchange.close()
        await call

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for turns in range(60):
            client = loop_bench.client("http://exchange.test:1")
            client.run(given_up(client, turns % 15))
        gc.collect()
    assert [str(each.message) for each in said if issubclass(each.category, ResourceWarning)] == []


def test_families_take_turns(loop_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one family's addresses are all silent, the other one's first is the next."""
    server = loop_bench.server(answering(http_answer()))
    with contextlib.ExitStack() as silent:
        addresses = [tcp(*silent.enter_context(swallowing(f"127.0.0.{n}"))) for n in range(2, 12)]
        mapped = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::ffff:127.0.0.1", server.port, 0, 0))
        named(monkeypatch, lambda: [*addresses, mapped])
        assert replied(loop_bench.client("http://exchange.test:1").cancel(credential)).http == 200


def test_unknown_host_is_not_seen(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that does not resolve leaves no doubt."""

    def none() -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    named(monkeypatch, none)
    client = bench.client("https://exchange.test")
    failed(client.ask(), seen=False, reason="could not connect: gaierror")


def test_hanging_look_up_is_bounded(loop_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver that does not answer holds nobody longer than connecting may take, and is asked once for all."""
    release = threading.Event()
    asked: list[int] = []

    def hang() -> list[Any]:
        asked.append(1)
        release.wait(10)
        return [tcp("127.0.0.1", server.port)]

    server = loop_bench.server(answering(http_answer()))
    named(monkeypatch, hang)
    client = loop_bench.client("http://exchange.test:1", recv_window_ms=250)
    with bounded():
        for answer in client.run(client.several(20)):
            failed(answer, seen=False, reason="could not connect: TimeoutError")
        failed(client.ask(), seen=False, reason="could not connect: TimeoutError")
    assert asked == [1]
    release.set()
    eventually(lambda: isinstance(client.ask(), Reply))


HANGING = """
import asyncio, socket, sys, threading
sys.path.insert(0, {root!r})
from tests.ways import Client
from worker.clock import ServerClock
real = socket.getaddrinfo
def hang(host, *args, **options):
    if host != "exchange.test":
        return real(host, *args, **options)
    if options.get("flags"):
        raise socket.gaierror(socket.EAI_NONAME, "a name")
    threading.Event().wait(60)
socket.getaddrinfo = hang
client = Client("asyncio", "http://exchange.test", ServerClock(), dict(recv_window_ms=250))
print(client.run(client.exchange.ask_time()))
client.close()
"""


def test_hanging_look_up_does_not_hold_the_process() -> None:
    """A process whose look-up hangs ends when it is done."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", HANGING.format(root=str(ROOT))],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Failure(seen=False, reason='could not connect: TimeoutError')\n"


def test_full_backlog_is_bounded(bench: Bench) -> None:
    """A host that accepts no connection costs half of an attempt's time, and no doubt."""
    with swallowing() as (host, port):
        client = bench.client(f"http://{host}:{port}", recv_window_ms=5_000)
        with bounded(2):
            failed(client.ask(), seen=False, reason="could not connect: TimeoutError")


@pytest.mark.parametrize("proxied", [False, True])
def test_sockets_are_set_up(loop_bench: Bench, monkeypatch: pytest.MonkeyPatch, proxied: bool) -> None:
    """Every connection has Nagle's algorithm off and keepalive on, the one to a proxy too."""
    made: list[socket.socket] = []
    real = socket.socket.connect

    class Watched(socket.socket):
        def connect(self, address: Any) -> None:
            made.append(self)
            real(self, address)

    server = loop_bench.server(answering(http_answer()), loop_bench.tls())
    proxy = loop_bench.server(relaying())
    client = loop_bench.client(server.url, egress_proxy_url=proxy.url if proxied else None)
    with monkeypatch.context() as patch:
        patch.setattr(socket, "socket", Watched)
        assert replied(client.ask()).http == 200
    (sock,) = [one for one in made if one.fileno() >= 0 and one.getpeername()[1] in (server.port, proxy.port)][:1]
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 30


def test_opening_for_a_call_that_is_gone_does_not_fail_the_next(loop_bench: Bench) -> None:
    """When the time of a connection that hangs is over, a call that has time left gets another one."""
    tls = loop_bench.tls()

    def behave(peer: Peer) -> None:
        if peer.number == 1:
            peer.wait_until_closed()
        else:
            with tls.wrap_socket(peer.sock, server_side=True) as peer.sock:
                answering(http_answer())(peer)

    server, client = loop_bench.over_tls(behave, recv_window_ms=2_500)

    async def calls() -> None:
        gone = asyncio.create_task(client.asking())
        await passed(lambda: server.connections)
        gone.cancel()
        await asyncio.sleep(0.4)
        assert await client.asking() == Reply(http=200, body=DONE)

    client.run(calls())
    assert server.used == [2]
