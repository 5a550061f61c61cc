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
from contextlib import ExitStack
from typing import Any

import pytest

from tests.loopback import answering, http_answer, relaying
from tests.servers import ROOT, eventually
from tests.ways import Bench, Client, bounded, failed, replied
from worker.classify import Reply

URL = "http://exchange.test:1"
Named = Callable[..., None]


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Named:
    """Gives the name exchange.test these addresses, which are looked up when ``when`` says so."""
    real = socket.getaddrinfo

    def name(*addresses: Any, when: Callable[[], object] = lambda: None) -> None:
        def look_up(host: str, port: int, *args: Any, **options: Any) -> list[Any]:
            if host != "exchange.test":
                return real(host, port, *args, **options)
            if options.get("flags"):
                raise socket.gaierror(socket.EAI_NONAME, "a name")
            when()
            return list(addresses)

        monkeypatch.setattr(socket, "getaddrinfo", look_up)

    return name


def tcp(host: str, port: int, protocol: int = 6) -> tuple[Any, ...]:
    """An address as a look-up gives it."""
    return (socket.AF_INET, socket.SOCK_STREAM, protocol, "", (host, port))


@contextlib.contextmanager
def swallowing(host: str = "127.0.0.1") -> Iterator[tuple[str, int]]:
    """An address that does not answer whoever wants to connect."""
    with socket.socket() as full, ExitStack() as waiting:
        full.bind((host, 0))
        full.listen(0)
        for _ in range(3):  # what the kernel queues beyond the backlog
            sock = waiting.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        yield full.getsockname()


@pytest.fixture
def silent(stack: ExitStack) -> Callable[[int], list[Any]]:
    """Makes so many such addresses."""
    return lambda count: [tcp(*stack.enter_context(swallowing(f"127.0.0.{2 + n}"))) for n in range(count)]


def test_every_address_is_tried(bench: Bench, named: Named) -> None:
    """A name of which some addresses are dead or of no use here is reached through the living one."""
    port = bench.server(answering(http_answer())).port
    unsupported = tcp("127.0.0.1", port, 255)  # as IPv6 is where the kernel has none
    named(unsupported, tcp("127.0.0.2", port), tcp("127.0.0.3", port), tcp("127.0.0.1", port))
    assert replied(bench.client(URL).ask()).http == 200


def test_silent_addresses_do_not_use_up_the_time(
    loop_bench: Bench, named: Named, silent: Callable[[int], list[Any]]
) -> None:
    """Two addresses that swallow every packet do not keep a call from the third."""
    server = loop_bench.server(answering(http_answer()))
    named(*silent(2), tcp("127.0.0.1", server.port))
    client = loop_bench.client(URL)

    async def call() -> None:
        assert replied(await client.asking()).http == 200
        await asyncio.sleep(0.01)
        assert asyncio.all_tasks() == {asyncio.current_task()}  # the others' attempts are over

    client.run(call())


def test_addresses_that_failed_are_tried_last(
    loop_bench: Bench, named: Named, silent: Callable[[int], list[Any]]
) -> None:
    """Where more addresses are silent than one attempt has time for, the next one goes on behind them."""
    server = loop_bench.server(answering(http_answer()))
    named(*silent(6), tcp("127.0.0.1", server.port))
    client = loop_bench.client(URL, recv_window_ms=2_500)
    failed(client.ask(), seen=False, reason="could not connect: TimeoutError")
    eventually(lambda: isinstance(client.ask(), Reply), 30)


def test_families_take_turns(loop_bench: Bench, named: Named, silent: Callable[[int], list[Any]]) -> None:
    """Where one family's addresses are all silent, the other one's first is the next."""
    server = loop_bench.server(answering(http_answer()))
    mapped = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::ffff:127.0.0.1", server.port, 0, 0))
    named(*silent(10), mapped)
    assert replied(loop_bench.client(URL).ask()).http == 200


@pytest.mark.parametrize("addresses", [1, 2])
def test_opening_that_is_given_up_leaves_no_socket(loop_bench: Bench, named: Named, addresses: int) -> None:
    """Whenever a client is closed while it connects, what it had connected is closed with it."""
    server = loop_bench.server(answering(http_answer()))
    named(*[tcp("127.0.0.1", server.port), tcp("127.0.0.2", server.port)][:addresses])

    async def given_up(client: Client, turns: int) -> None:
        call = asyncio.create_task(client.exchange.ask_time())
        for _ in range(turns):
            await asyncio.sleep(0.0002)
        client.exchange.close()
        await call

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for turns in range(60):
            client = loop_bench.client(URL)
            client.run(given_up(client, turns % 15))
        gc.collect()
    assert [str(each.message) for each in said if issubclass(each.category, ResourceWarning)] == []


def test_unknown_host_is_not_seen(bench: Bench, named: Named) -> None:
    """A name that does not resolve leaves no doubt."""

    def none() -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    named(when=none)
    failed(bench.client(URL).ask(), seen=False, reason="could not connect: gaierror")


def test_hanging_look_up_is_bounded(loop_bench: Bench, named: Named) -> None:
    """A resolver that does not answer holds nobody longer than connecting may take, and is asked once for all."""
    release = threading.Event()
    asked: list[int] = []

    def hang() -> None:
        asked.append(1)
        release.wait(10)

    server = loop_bench.server(answering(http_answer()))
    named(tcp("127.0.0.1", server.port), when=hang)
    client = loop_bench.client(URL, recv_window_ms=250)
    with bounded():
        for answer in [*client.run(client.several(20)), client.ask()]:
            failed(answer, seen=False, reason="could not connect: TimeoutError")
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
