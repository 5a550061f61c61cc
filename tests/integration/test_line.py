"""One connection to Redis in an event loop, against a real server: order, scripts, errors, breaks, sizes, TLS."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

import pytest
import redis
from worker.line import Line

from producer import CancelClient, CancelRequest
from tests.integration.test_client import Proxy
from tests.integration.test_sandbox_server import certificate
from tests.servers import Peek, Valkey, end_server, eventually, running_valkey
from worker.store import SOCKET_TIMEOUT_S, Grant, Request, Script, Settlement, Store, connect

#: Hand-made requests call none, and yet have one.
NO_SCRIPT = Script("gate.lua")
BROKEN = "broken"
MIB = 1 << 20


class Rig:
    """A line in a loop of the test's own, and what it has told, in turn, by the names of the requests."""

    def __init__(self, url: str, **options: Any) -> None:
        self._redis = connect(url, **options)
        self.store = Store(
            self._redis,
            "cancels",
            "w",
            gate_scope="all",
            lease_ms=60_000,
            deadline_ms=300_000,
            outcome_ttl_s=3600,
            ledger_maxlen=20_000,
        )
        self.loop = asyncio.SelectorEventLoop()
        self.defects: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.defects.append(context))
        self.told: list[tuple[str, Any]] = []
        self._connection = self.store.connect()
        self.line = Line(self.loop, self._connection, partial(self._note, BROKEN))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.line.close()
        self.store.release(self._connection)
        self.loop.close()
        self._redis.close()

    def ask(self, name: str, request: Request[Any]) -> None:
        """Send it, and note under this name what is told of it."""
        self.line.ask(request, partial(self._note, name), partial(self._note, name))

    def claim(self, name: str, *, wait: bool, slots: int = 10) -> None:
        """Ask for jobs."""
        self.ask(name, self.store.claim_request(slots, wait=wait))

    def echo(self, *words: str) -> None:
        """Ask for the words themselves, under the first one's name."""
        self.ask(words[0], Request(tuple(("ECHO", word) for word in words), NO_SCRIPT, list))

    def names(self) -> list[str]:
        """What was told of, in turn."""
        return [name for name, _ in self.told]

    def of(self, name: str) -> Any:
        """What was told under a name, once."""
        (told,) = [what for about, what in self.told if about == name]
        return told

    def run(self, condition: Callable[[], object] | None = None, timeout_s: float = 10.0) -> None:
        """Let the loop run until there is something true, or without a condition for the whole time."""

        async def watch() -> None:
            ends_at = time.monotonic() + timeout_s
            while time.monotonic() < ends_at:
                if condition is not None and condition():
                    return
                await asyncio.sleep(0.005)
            assert condition is None, f"not within {timeout_s} s: {self.told}"

        self.loop.run_until_complete(watch())
        assert self.defects == []

    def run_until_told(self, count: int, timeout_s: float = 10.0) -> None:
        """Let the loop run until so many things were told."""
        self.run(lambda: len(self.told) >= count, timeout_s)

    def _note(self, name: str, what: Any) -> None:
        self.told.append((name, what))


class Relay:
    """Between a line and a server: answers can come byte by byte, and the server can be made to say anything."""

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.size = 65536  # of the pieces in which answers come
        self.is_mute = False  # the server's own answers are swallowed
        self._sockets: list[socket.socket] = []  # the client's end and the server's
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        end_server(self._listener, self._sockets, self._threads)

    @property
    def url(self) -> str:
        """The server by way of here."""
        return f"redis://127.0.0.1:{self.port}/0"

    def say(self, what: bytes) -> None:
        """Say something in the server's name."""
        self._sockets[0].sendall(what)

    def hang_up(self) -> None:
        """Close the connection in the server's name."""
        self._sockets[0].shutdown(socket.SHUT_WR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                server = socket.create_connection(("127.0.0.1", self._upstream))
                self._sockets += (client, server)
                for pair in ((client, server, False), (server, client, True)):
                    self._threads.append(threading.Thread(target=self._carry, args=pair))
                    self._threads[-1].start()

    def _carry(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if is_answer and self.is_mute:
                    continue
                size = self.size if is_answer else len(data)
                for at in range(0, len(data), size):
                    target.sendall(data[at : at + size])
                    if size == 1:
                        time.sleep(0.0002)  # else the kernel hands over several at once


@pytest.fixture
def rig(valkey: Valkey) -> Iterator[Rig]:
    """A line to the server."""
    with Rig(valkey.url) as rig:
        yield rig


@pytest.fixture
def relay(valkey: Valkey) -> Iterator[Relay]:
    """Something between a line and the server."""
    with Relay(valkey.port) as relay:
        yield relay


@pytest.fixture
def tls_rig(valkey: Valkey, tmp_path: Path) -> Iterator[Rig]:
    """A line to the server behind TLS."""
    ca_file, key_file = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ca_file, key_file)
    with (
        Proxy(valkey.port, context) as proxy,
        Rig(f"rediss://127.0.0.1:{proxy.port}/0", ssl_ca_certs=ca_file) as rig,
    ):
        yield rig


def enqueued(client: CancelClient, count: int) -> list[str]:
    """Ids of new jobs."""
    return [ticket.id for ticket in client.cancel_many(CancelRequest(algo_id=i + 1) for i in range(count))]


def ids(claimed: Any) -> list[str]:
    """The jobs that a claim brought."""
    assert not isinstance(claimed, Exception), claimed
    return [grant.id for grant in claimed.grants]


def large(count: int = 256, size: int = 60 * 1024) -> list[Settlement]:
    """So many rows of this size, of jobs that nobody holds."""
    return [
        Settlement(Grant(f"id-{n}", "lease", b"", 1, 2, 1, b"", b""), attempts=(), pin="x" * size) for n in range(count)
    ]


# ---- answers --------------------------------------------------------------------------------------------------------


def check_order(rig: Rig) -> None:
    """Ask for much at once; each asker must get the answers to its own question."""
    questions = [[f"{n}-{part}" for part in range(1 + n % 4)] for n in range(300)]
    for words in questions[:200]:
        rig.echo(*words)
    rig.run_until_told(50)
    for words in questions[200:]:
        rig.echo(*words)
    rig.run_until_told(len(questions))
    assert rig.told == [(words[0], [word.encode() for word in words]) for words in questions]


def test_answers_come_in_the_order_of_the_questions(rig: Rig) -> None:
    """Requests need not wait for each other: each gets its own answers, in the order of asking."""
    check_order(rig)


def test_nothing_is_told_before_ask_returns(rig: Rig) -> None:
    """An asker is called by the loop alone, so that asking is safe wherever it stands."""
    rig.echo("one")
    time.sleep(0.05)
    rig.echo("two")
    assert rig.told == []
    rig.run_until_told(2)


def test_an_asker_may_ask_again(rig: Rig) -> None:
    """What is asked while an answer is being told takes its turn behind what was asked before."""
    first = Request((("ECHO", "one"),), NO_SCRIPT, list)
    rig.line.ask(first, lambda _: rig.echo("three"), lambda _: None)
    rig.echo("two")
    rig.run_until_told(2)
    assert rig.names() == ["two", "three"]


def test_an_error_reaches_its_asker_and_the_line_goes_on(rig: Rig, connection: redis.Redis) -> None:
    """An answer that is an error is told to the one who asked, with redis-py's class; the others get their answers."""
    rig.claim("before", wait=False)
    rig.run_until_told(1)
    connection.set(rig.store.keys.claiming, "no list")
    rig.claim("claim", wait=False)
    rig.echo("after")
    rig.run_until_told(3)
    assert rig.names() == ["before", "claim", "after"]
    assert type(rig.of("claim")) is redis.ResponseError
    assert "WRONGTYPE" in str(rig.of("claim"))

    connection.delete(rig.store.keys.claiming)
    rig.claim("again", wait=False)
    rig.run_until_told(4)
    assert ids(rig.of("again")) == []


def test_an_answer_that_makes_no_sense_reaches_its_asker(relay: Relay) -> None:
    """An answer of another shape than the script's is an error for the asker, who would else wait for ever."""
    with Rig(relay.url) as rig:
        relay.is_mute = True
        rig.claim("claim", wait=False)
        rig.ask("settle", rig.store.settle_request(large(1, 1)))
        rig.echo("after")
        relay.say(b"*2\r\n+OK\r\n:1\r\n" + b":5\r\n" + b"+after\r\n")
        rig.run_until_told(3)
        assert rig.names() == ["claim", "settle", "after"]
        assert all(isinstance(rig.of(name), redis.ResponseError) for name in ("claim", "settle"))


# ---- scripts that the server does not have --------------------------------------------------------------------------


def test_a_missing_script_is_loaded_on_the_same_line(rig: Rig, client: CancelClient, connection: redis.Redis) -> None:
    """A server that forgot its scripts is given them by the request that needs them, and what it asked for happens."""
    rig.claim("first", wait=False)
    rig.run_until_told(1)
    asked = enqueued(client, 3)
    connection.script_flush()
    rig.claim("second", wait=False)
    rig.run_until_told(2)
    assert ids(rig.of("second")) == asked
    connection.script_flush()
    rig.ask("settle", rig.store.settle_request([Settlement(grant) for grant in rig.of("second").grants]))
    rig.run_until_told(3)
    assert rig.of("settle") == [1, 1, 1]
    assert Peek(connection).waiting() == asked


@pytest.mark.parametrize("waits", [False, True])
def test_what_was_popped_before_a_missing_script_is_not_lost(
    rig: Rig, client: CancelClient, connection: redis.Redis, waits: bool
) -> None:
    """A job that the wait has popped is given by the script that is loaded behind it, whatever was asked meanwhile."""
    rig.claim("first", wait=False)
    rig.run_until_told(1)
    connection.script_flush()
    asked = [] if waits else enqueued(client, 1)
    rig.claim("waiting", wait=True)
    rig.echo("meanwhile")
    rig.claim("beside", wait=False)
    if waits:
        rig.run(lambda: connection.info("clients")["blocked_clients"] == 1)
        asked = enqueued(client, 1)
        connection.script_flush()  # the producer's own came into the server with it
    rig.run_until_told(4)
    assert rig.names()[1] == "meanwhile"
    assert sorted(ids(rig.of("waiting")) + ids(rig.of("beside"))) == asked
    assert connection.zrange(rig.store.keys.leases, 0, -1) == [asked[0].encode()]
    assert connection.exists(rig.store.keys.claiming) == 0


def test_each_request_gets_its_own_script(rig: Rig, client: CancelClient, connection: redis.Redis) -> None:
    """Several requests that miss different scripts at the same time each get the answer to their own."""
    (asked,) = enqueued(client, 1)
    rig.ask("settle", rig.store.settle_request(large(2, 10)))
    rig.claim("claim", wait=True)
    rig.ask("settle more", rig.store.settle_request(large(3, 10)))
    rig.run_until_told(3)
    assert (rig.of("settle"), ids(rig.of("claim")), rig.of("settle more")) == ([0, 0], [asked], [0, 0, 0])


# ---- breaks ---------------------------------------------------------------------------------------------------------


def check_break(
    rig: Rig, answered: list[str], unanswered: list[str], kind: type[redis.RedisError], silence_s: float = 0.1
) -> None:
    """See that the break was told first, then the same error to each that had no answer, in turn; then never more."""
    rig.run_until_told(len(answered) + 1 + len(unanswered))
    assert rig.names() == [*answered, BROKEN, *unanswered]
    assert isinstance(rig.of(BROKEN), kind)
    assert [rig.of(name) for name in unanswered] == [rig.of(BROKEN)] * len(unanswered)
    told = list(rig.told)
    rig.echo("too late")
    rig.run(timeout_s=silence_s)
    assert rig.told == told


def test_a_connection_that_the_server_closes(rig: Rig, connection: redis.Redis) -> None:
    """It is told once, then each request that was not answered fails, once and in the order of asking."""
    rig.echo("answered")
    rig.run_until_told(1)
    rig.claim("waiting", wait=True)
    rig.echo("behind", "twice")
    rig.echo("last")
    connection.client_kill_filter(_type="normal", skipme=True)
    check_break(rig, ["answered"], ["waiting", "behind", "last"], redis.ConnectionError, SOCKET_TIMEOUT_S + 0.3)


def test_the_owner_hears_of_a_break_before_the_askers(rig: Rig, connection: redis.Redis) -> None:
    """An asker that asks again as soon as it hears of a break finds an owner that knows of it."""
    known: list[bool] = []
    request = Request((("ECHO", "one"),), NO_SCRIPT, list)
    rig.claim("waiting", wait=True)
    rig.line.ask(request, lambda _: known.append(False), lambda _: known.append(BROKEN in rig.names()))
    connection.client_kill_filter(_type="normal", skipme=True)
    rig.run(lambda: known)
    assert known == [True]
    assert rig.names() == [BROKEN, "waiting"]


def test_a_server_that_stands_still() -> None:
    """Without an answer for the time-out the line is broken, also for who asked later; answers that come after all are
    told to nobody."""
    with running_valkey("--appendonly", "no") as valkey, Rig(valkey.url) as rig:
        assert valkey.process is not None
        rig.echo("answered")
        rig.run_until_told(1)
        valkey.process.send_signal(signal.SIGSTOP)
        began_s = time.monotonic()
        rig.echo("unanswered")
        rig.run(timeout_s=0.5)
        rig.echo("later")
        rig.run_until_told(4)
        assert SOCKET_TIMEOUT_S - 0.05 <= time.monotonic() - began_s <= SOCKET_TIMEOUT_S + 0.5
        valkey.process.send_signal(signal.SIGCONT)
        check_break(rig, ["answered"], ["unanswered", "later"], redis.TimeoutError, 0.3)


def test_a_loop_that_stood_still_reads_before_it_judges(rig: Rig) -> None:
    """Answers that came in time are told, though nobody looked at them for longer than the time-out."""
    rig.echo("one")
    rig.run_until_told(1)
    rig.echo("two", "parts")
    time.sleep(SOCKET_TIMEOUT_S + 0.1)
    rig.line._look()  # what a loop does first that was woken by its clock
    assert rig.told[1:] == [("two", [b"two", b"parts"])]
    rig.echo("three")
    rig.run_until_told(3)
    assert rig.names() == ["one", "two", "three"]


def test_an_idle_line_is_not_late(rig: Rig) -> None:
    """The time-out counts from a question, not from the last one's answer."""
    rig.echo("one")
    rig.run(timeout_s=SOCKET_TIMEOUT_S + 0.3)
    rig.echo("two")
    rig.run_until_told(2)
    assert rig.names() == ["one", "two"]


@pytest.mark.parametrize(
    "words",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00\xff\xfe", b"$-5\r\n", b"*99999999999\r\n", b"*2\r\n*1\r\n?\r\n"],
)
def test_words_that_are_no_answer_break_the_line(relay: Relay, words: bytes) -> None:
    """What is not Redis' protocol breaks the line, once; nothing of it is taken for an answer."""
    with Rig(relay.url) as rig:
        rig.echo("before")
        rig.run_until_told(1)
        rig.claim("waiting", wait=True)
        relay.say(words)
        check_break(rig, ["before"], ["waiting"], redis.InvalidResponse)


def test_an_answer_that_nobody_asked_for_breaks_the_line(relay: Relay) -> None:
    """An answer without a question says that questions and answers do not belong together any more."""
    with Rig(relay.url) as rig:
        rig.echo("before")
        rig.run_until_told(1)
        relay.say(b"+OK\r\n+OK\r\n")
        check_break(rig, ["before"], [], redis.InvalidResponse)


def test_an_answer_that_breaks_off(relay: Relay) -> None:
    """Half an answer is none."""
    with Rig(relay.url) as rig:
        rig.claim("waiting", wait=True)
        relay.say(b"$-1\r\n*3\r\n$4\r\n17")
        relay.hang_up()
        check_break(rig, [], ["waiting"], redis.ConnectionError)


def test_a_closed_line_tells_nothing(rig: Rig) -> None:
    """Closing is the owner's own wish: it is not told of it, nor of anything that was asked."""
    rig.echo("one")
    rig.line.close()
    rig.line.close()
    rig.run(timeout_s=0.2)
    assert rig.told == []


# ---- sizes ----------------------------------------------------------------------------------------------------------


def check_large_request(rig: Rig, valkey: Valkey) -> None:
    """Ask for more than any buffer holds while nobody reads: the loop goes on, and then all of it is written."""
    assert valkey.process is not None
    rig.ask("script", rig.store.settle_request(large(1, 1)))
    rig.run_until_told(1)
    valkey.process.send_signal(signal.SIGSTOP)
    try:
        began_s = time.monotonic()
        rig.ask("large", rig.store.settle_request(large()))
        rig.echo("behind")
        assert time.monotonic() - began_s < 1  # nothing waited for the server
        turns = 0

        def turn() -> None:
            nonlocal turns
            turns += 1
            if turns < 20:
                rig.loop.call_later(0.01, turn)

        turn()
        rig.run(lambda: turns == 20, 2)
    finally:
        valkey.process.send_signal(signal.SIGCONT)
    rig.run_until_told(3)
    assert rig.names() == ["script", "large", "behind"]
    assert rig.of("large") == [0] * 256


def test_a_request_larger_than_every_buffer(rig: Rig, valkey: Valkey) -> None:
    """A settlement of 15 MiB is written as the server takes it, without holding up the loop, and in order."""
    check_large_request(rig, valkey)


def test_a_large_answer(rig: Rig) -> None:
    """An answer of more than one read arrives whole."""
    word = "x" * MIB
    rig.echo(word, "end")
    rig.echo("small")
    rig.run_until_told(2)
    assert rig.told == [(word, [word.encode(), b"end"]), ("small", [b"small"])]


def test_an_answer_in_small_pieces(relay: Relay, client: CancelClient) -> None:
    """Answers that arrive byte by byte are what they would be in one piece."""
    asked = enqueued(client, 3)
    with Rig(relay.url) as rig:
        rig.claim("script", wait=False, slots=1)
        rig.run_until_told(1)
        relay.size = 1
        rig.claim("claim", wait=True)
        rig.echo("one", "two")
        rig.run_until_told(3)
        assert ids(rig.of("script")) + ids(rig.of("claim")) == asked
        assert rig.of("one") == [b"one", b"two"]


# ---- TLS ------------------------------------------------------------------------------------------------------------


def test_order_over_tls(tls_rig: Rig) -> None:
    """Over TLS answers come in the order of the questions too."""
    check_order(tls_rig)


def test_sizes_over_tls(tls_rig: Rig, valkey: Valkey) -> None:
    """Over TLS, whose records hold 16 KiB, large requests and large answers are whole too."""
    check_large_request(tls_rig, valkey)
    word = "x" * MIB
    tls_rig.echo(word)
    tls_rig.run_until_told(4)
    assert tls_rig.of(word) == [word.encode()]


def test_a_missing_script_over_tls(tls_rig: Rig, client: CancelClient) -> None:
    """Over TLS a missing script is loaded, and what was popped is given."""
    (asked,) = enqueued(client, 1)
    tls_rig.claim("claim", wait=True)
    tls_rig.run_until_told(1)
    assert ids(tls_rig.of("claim")) == [asked]


def test_tls_that_breaks(tls_rig: Rig, connection: redis.Redis) -> None:
    """A TLS connection whose server is gone is told once, and then to who waited for an answer."""
    tls_rig.claim("waiting", wait=True)
    eventually(lambda: connection.info("clients")["blocked_clients"] == 1)
    connection.client_kill_filter(_type="normal", skipme=True)
    check_break(tls_rig, [], ["waiting"], redis.ConnectionError)
