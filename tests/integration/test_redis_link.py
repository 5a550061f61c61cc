"""A link of an event loop to a real Redis: turns, scripts, errors, breaks, sizes, TLS."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import pytest
import redis

from producer import CancelClient, CancelRequest
from tests.fault.proxy import Proxy
from tests.loopback import certificate
from tests.servers import Peek, Valkey, eventually, stopped
from worker.redis_link import AsyncLink, connect
from worker.store import ANSWER_WITHIN_S, Claimed, Lease, Release, Request, Store

MIB = 1 << 20


class Rig:
    """A link, and a store whose requests it carries."""

    def __init__(self, url: str, **options: Any) -> None:
        self._redis = connect(url, **options)
        self.link = AsyncLink(self._redis)
        self.store = Store(
            "cancels",
            "w",
            gate_scope="all",
            lease_ms=60_000,
            deadline_ms=300_000,
            outcome_ttl_s=3600,
            ledger_maxlen=20_000,
        )

    async def claim(self, *, wait: bool = False, slots: int = 10) -> list[str]:
        """The ids of the jobs that a claim brings."""
        return [lease.id for lease in (await self.claimed(wait=wait, slots=slots)).leases]

    async def claimed(self, *, wait: bool = False, slots: int = 10) -> Claimed:
        """What a claim brings."""
        return await self.link.ask(lambda: self.store.claim(slots, wait=wait))

    async def release(self, *leases: Lease, pin: str = "") -> list[int]:
        """Hand jobs back."""
        rows = [Release(lease, (), pin) for lease in leases]
        return (await self.link.ask(lambda: self.store.complete(rows))).answers

    async def release_much(self) -> list[int]:
        """A request of 15 MiB."""
        return await self.release(*map(large_row, range(256)), pin="x" * 60 * 1024)

    async def echo(self, *words: str) -> list[str]:
        """Ask for the words themselves."""
        request = Request(tuple(("ECHO", word) for word in words), None, _texts)
        return await self.link.ask(lambda: request)


def _texts(answers: list[Any], _: object) -> list[str]:
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return [answer.decode() for answer in answers]


@contextlib.asynccontextmanager
async def rig_on(url: str, **options: Any) -> AsyncIterator[Rig]:
    """A link for the length of a block."""
    rig = Rig(url, **options)
    try:
        yield rig
    finally:
        await rig.link.close()


@pytest.fixture
def relay(valkey: Valkey) -> Iterator[Proxy]:
    """Something between a link and the server."""
    with Proxy(valkey.port) as relay:
        yield relay


P = ParamSpec("P")


def in_a_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run a test in an event loop of its own."""

    @wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


@pytest.fixture
def secure(valkey: Valkey, tmp_path: Path) -> Iterator[tuple[Proxy, str]]:
    """A way to the server over TLS, and the file of who vouches for it."""
    ca_file, key_file = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ca_file, key_file)
    with Proxy(valkey.port, context) as proxy:
        yield proxy, ca_file


def enqueued(client: CancelClient, count: int) -> list[str]:
    """Ids of new jobs."""
    return [ticket.id for ticket in client.cancel_many(CancelRequest(algo_id=i + 1) for i in range(count))]


async def refused_by_server(task: asyncio.Task[Any]) -> BaseException:
    """The error of what was under way."""
    with pytest.raises(redis.RedisError) as raised:
        await task
    return raised.value


# ---- answers --------------------------------------------------------------------------------------------------------


async def ask_much_at_once(rig: Rig) -> None:
    """Each asker must get the answers to its own question."""
    questions = [[f"{n}-{part}" for part in range(1 + n % 4)] for n in range(300)]
    assert await asyncio.gather(*[rig.echo(*words) for words in questions]) == questions


@in_a_loop
async def test_each_asker_gets_its_own_answers(valkey: Valkey) -> None:
    """However many ask at the same time, each gets the answers to its own question."""
    async with rig_on(valkey.url) as rig:
        await ask_much_at_once(rig)


@in_a_loop
async def test_a_question_is_made_when_its_turn_has_come(valkey: Valkey, client: CancelClient) -> None:
    """What is asked is made right before it is sent: a claim's time-out does not run while it waits for its turn."""
    made: list[float] = []

    async with rig_on(valkey.url) as rig:

        def make() -> Request[list[str]]:
            made.append(time.monotonic())
            return Request((("ECHO", "late"),), None, _texts)

        await rig.claim()
        waiting = asyncio.create_task(rig.claim(wait=True))
        await asyncio.sleep(0.05)
        asked = time.monotonic()
        assert await rig.link.ask(make) == ["late"]
        assert waiting.done()
        assert made[0] - asked > 0.5


@in_a_loop
async def test_an_error_reaches_its_asker_and_the_connection_stays(valkey: Valkey, connection: redis.Redis) -> None:
    """An answer that is an error is told to the one who asked, with redis-py's class; the connection goes on."""
    async with rig_on(valkey.url) as rig:
        await rig.echo("before")
        connections = connection.info("stats")["total_connections_received"]
        broken: Request[list[str]] = Request((("ECHO", "one"), ("LLEN", "text")), None, _texts)
        connection.set("text", "no list")
        with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
            await rig.link.ask(lambda: broken)
        assert await rig.echo("after") == ["after"]
        assert connection.info("stats")["total_connections_received"] == connections


@in_a_loop
async def test_an_answer_that_makes_no_sense_costs_the_connection(relay: Proxy, client: CancelClient) -> None:
    """An answer of another shape than the script's is an error for its asker, and the next question gets its own."""
    async with rig_on(relay.redis_url) as rig:
        assert await rig.claim() == []
        asked = enqueued(client, 2)
        relay.mute_flows()
        claim = asyncio.create_task(rig.claim(slots=1))
        await asyncio.sleep(0.05)
        relay.say(b"+OK\r\n")
        with pytest.raises((ValueError, TypeError, LookupError)):
            await claim
        assert await rig.claim() == asked[1:]  # by a connection that the relay does not mute
        assert await rig.echo("after") == ["after"]


# ---- scripts that the server does not have --------------------------------------------------------------------------


async def flush_and_claim(rig: Rig, client: CancelClient, connection: redis.Redis) -> None:
    """A claim and a completion whose scripts the server has forgotten."""
    assert await rig.claim() == []
    asked = enqueued(client, 3)
    connection.script_flush()
    claimed = await rig.claimed(wait=True)
    assert [lease.id for lease in claimed.leases] == asked
    connection.script_flush()
    assert await rig.release(*claimed.leases) == [1, 1, 1]
    assert Peek(connection).waiting() == asked


@in_a_loop
async def test_a_missing_script_is_loaded(valkey: Valkey, client: CancelClient, connection: redis.Redis) -> None:
    """A server that forgot its scripts is given them by the request that needs them, and what it asked for happens."""
    async with rig_on(valkey.url) as rig:
        await flush_and_claim(rig, client, connection)


@in_a_loop
async def test_what_was_popped_before_a_missing_script_is_not_lost(
    valkey: Valkey, client: CancelClient, connection: redis.Redis
) -> None:
    """A job that comes while a claim waits at the queue is given by the script that is loaded only then."""
    async with rig_on(valkey.url) as rig:
        await rig.claim()
        waiting = asyncio.create_task(rig.claim(wait=True))
        while connection.info("clients")["blocked_clients"] < 1:
            await asyncio.sleep(0.005)
        with connection.pipeline(transaction=True) as pipeline:
            pipeline.script_flush()
            pipeline.hset("rq:job:late", mapping={"status": "queued", "data": "x"})
            pipeline.rpush("rq:queue:cancels", "late")
            pipeline.execute()
        assert await waiting == ["late"]
        assert connection.exists(rig.store.keys.claiming) == 0


# ---- breaks ---------------------------------------------------------------------------------------------------------


@in_a_loop
async def test_a_connection_that_the_server_closes(valkey: Valkey, connection: redis.Redis) -> None:
    """Who waited for an answer is told that there is none; who asks next gets one, by a new connection."""
    async with rig_on(valkey.url) as rig:
        await rig.echo("before")
        waiting = asyncio.create_task(rig.claim(wait=True))
        behind = asyncio.create_task(rig.echo("behind"))
        while connection.info("clients")["blocked_clients"] < 1:
            await asyncio.sleep(0.005)
        connection.client_kill_filter(_type="normal", skipme=True)
        assert isinstance(await refused_by_server(waiting), redis.ConnectionError)
        assert await behind == ["behind"]


@in_a_loop
async def test_a_server_that_stands_still(valkey: Valkey) -> None:
    """Without an answer for the time-out it is an error; what the server says later is nobody's."""
    async with rig_on(valkey.url) as rig:
        await rig.echo("before")
        with stopped(valkey):
            began_s = time.monotonic()
            with pytest.raises(redis.TimeoutError):
                await rig.echo("unanswered")
            assert ANSWER_WITHIN_S - 0.05 <= time.monotonic() - began_s <= ANSWER_WITHIN_S + 0.5
        assert await rig.echo("after") == ["after"]


@in_a_loop
async def test_a_server_that_takes_no_more(valkey: Valkey) -> None:
    """A request that stays half written is given up like one that gets no answer, and the next one is served."""
    async with rig_on(valkey.url) as rig:
        assert await rig.release(large_row(0)) == [0]
        with stopped(valkey):
            writing = asyncio.create_task(rig.release_much())
            await asyncio.wait([writing], timeout=2 * ANSWER_WITHIN_S)
            assert writing.done()
            assert isinstance(await refused_by_server(writing), redis.TimeoutError)
        assert await rig.echo("after") == ["after"]
        await asyncio.sleep(0.2)  # the server takes the rest, and the old connection ends


@in_a_loop
async def test_a_connection_that_takes_long_to_open(
    relay: Proxy, client: CancelClient, connection: redis.Redis
) -> None:
    """A claim may wait at the queue all the same: what is claimed then is heard of."""
    async with rig_on(relay.redis_url) as rig:
        relay.opens_after_s = ANSWER_WITHIN_S - 0.3
        claim = asyncio.create_task(rig.claim(wait=True))
        while connection.info("clients")["blocked_clients"] < 1:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.6)
        asked = enqueued(client, 1)
        assert await claim == asked


@pytest.mark.parametrize("is_sent", [False, True], ids=["before it asks", "once it has asked"])
@in_a_loop
async def test_a_loop_that_stood_still_reads_before_it_judges(valkey: Valkey, is_sent: bool) -> None:
    """An answer that came in time is told, though nobody looked at it for longer than the time-out."""

    def stand_still() -> None:
        asyncio.get_running_loop().call_soon(time.sleep, ANSWER_WITHIN_S + 0.1)

    def make() -> Request[list[str]]:
        if is_sent:
            stand_still()
        return Request((("ECHO", "one"), ("ECHO", "two")), None, _texts)

    async with rig_on(valkey.url) as rig:
        await rig.echo("before")
        asking = asyncio.create_task(rig.link.ask(make))
        if not is_sent:
            stand_still()
        assert await asking == ["one", "two"]


@pytest.mark.parametrize(
    ("words", "hangs_up"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", False),
        (b"\x00\xff\xfe", False),
        (b"$-5\r\n", False),
        (b"*99999999999\r\n", False),
        (b"*2\r\n*1\r\n?\r\n", False),
        (b"$-1\r\n*3\r\n$4\r\n17", True),
    ],
)
@in_a_loop
async def test_words_that_are_no_answer_break_the_connection(relay: Proxy, words: bytes, hangs_up: bool) -> None:
    """What is not Redis' protocol, and half an answer, is an error; nothing of it is taken for an answer, not by the
    next one either."""
    async with rig_on(relay.redis_url) as rig:
        await rig.echo("before")
        waiting = asyncio.create_task(rig.claim(wait=True))
        await asyncio.sleep(0.05)
        relay.say(words)
        if hangs_up:
            relay.hang_up()
        await refused_by_server(waiting)
        assert await rig.echo("after") == ["after"]


@in_a_loop
async def test_an_asker_that_gives_up_takes_the_connection_with_it(valkey: Valkey) -> None:
    """The answer to a question that nobody waits for any more is not taken for the next one's."""
    async with rig_on(valkey.url) as rig:
        await rig.claim()
        waiting = asyncio.create_task(rig.claim(wait=True))
        await asyncio.sleep(0.05)
        waiting.cancel()
        assert await rig.echo("after") == ["after"]


# ---- sizes ----------------------------------------------------------------------------------------------------------


def large_row(number: int) -> Lease:
    """A job that nobody holds."""
    return Lease(f"id-{number}".encode(), "token", b"", 1, 2, 1, b"", b"", 1, 0)


@in_a_loop
async def test_a_request_larger_than_every_buffer(valkey: Valkey) -> None:
    """A completion of 15 MiB is written as the server takes it, without holding up the loop."""
    async with rig_on(valkey.url) as rig:
        assert await rig.release(large_row(0)) == [0]
        with stopped(valkey):
            writing = asyncio.create_task(rig.release_much())
            began_s = time.monotonic()
            for _ in range(20):
                await asyncio.sleep(0.01)
            assert time.monotonic() - began_s < 1  # nothing waited for the server
            assert not writing.done()
        assert await writing == [0] * 256


@in_a_loop
async def test_an_answer_in_small_pieces(relay: Proxy, client: CancelClient) -> None:
    """Answers that arrive byte by byte, and those of a megabyte, are what they would be in one piece."""
    asked = enqueued(client, 3)

    async with rig_on(relay.redis_url) as rig:
        word = "x" * MIB
        assert await rig.echo(word, "end") == [word, "end"]
        assert await rig.claim(slots=1) == asked[:1]
        relay.in_bytes = True
        assert await rig.claim(wait=True) == asked[1:]
        assert await rig.echo("one", "two") == ["one", "two"]


# ---- TLS ------------------------------------------------------------------------------------------------------------


@in_a_loop
async def test_silence_over_tls(secure: tuple[Proxy, str]) -> None:
    """A flow that is forgotten in silence costs no more time than without TLS, though nobody hears its farewell."""
    proxy, ca_file = secure
    with Proxy(proxy.port) as between:
        async with rig_on(between.redis_url.replace("redis:", "rediss:"), ssl_ca_certs=ca_file) as rig:
            await rig.echo("before")
            between.mute_flows()
            asking = asyncio.create_task(rig.echo("unanswered"))
            await asyncio.wait([asking], timeout=2 * ANSWER_WITHIN_S)
            assert asking.done()
            assert isinstance(await refused_by_server(asking), redis.TimeoutError)
            assert await rig.echo("after") == ["after"]
            await rig.link.close()
            between.hang_up()
            await asyncio.sleep(0.2)  # TLS takes its leave in the loop's next turns


@in_a_loop
async def test_over_tls(secure: tuple[Proxy, str], client: CancelClient, connection: redis.Redis) -> None:
    """All this holds over TLS: order, missing scripts, sizes, and a connection that breaks."""
    proxy, ca_file = secure
    async with rig_on(proxy.redis_url, ssl_ca_certs=ca_file) as rig:
        await ask_much_at_once(rig)
        await flush_and_claim(rig, client, connection)
        word = "x" * MIB
        assert await rig.echo(word) == [word]
        assert len(await rig.claim()) == 3
        waiting = asyncio.create_task(rig.claim(wait=True))
        await asyncio.to_thread(eventually, lambda: connection.info("clients")["blocked_clients"] == 1)
        connection.client_kill_filter(_type="normal", skipme=True)
        assert isinstance(await refused_by_server(waiting), redis.ConnectionError)
        assert await rig.echo("after") == ["after"]
        await rig.link.close()
        await asyncio.sleep(0.1)  # TLS takes its leave in the loop's next turns
