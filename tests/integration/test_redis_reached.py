"""The way to the primary, with real servers: Sentinels, sockets, replicas, clusters, and what is no Redis at all."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis

from producer import AsyncCancelClient, CancelClient, OutcomeKind, QueueUnavailable
from producer.redis_url import SURE_S, Address, NotPrimary, NotSupported
from tests.exporting import exporting, outcomes
from tests.failover import SERVICE, UNSUPPORTED, Pair, Sentinel, cluster, direct, running_pair, running_sentinel
from tests.fault.proxy import Proxy
from tests.servers import Valkey, eventually, free_port, python, running_valkey
from tests.strategies import BOTH, talking
from tests.webpages import TOKEN, WebProcess, outcome, settle

PASSWORD = "not-to-be-seen"


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A primary and its replica."""
    with running_pair() as running:
        yield running


@pytest.fixture
def sentinel(pair: Pair) -> Iterator[Sentinel]:
    """Watches them."""
    with running_sentinel(pair) as running:
        yield running


def through(sentinel: Sentinel, *others: int, database: str = "") -> str:
    """The URL of a service; others: ports of Sentinels that are asked before."""
    places = ",".join(f"127.0.0.1:{port}" for port in (*others, sentinel.port))
    return f"redis+sentinel://{places}/{SERVICE}{database}"


def command(*words: str, **environment: str) -> tuple[int, str]:
    """Exit code and what a command says on stderr, or where that is nothing on stdout."""
    done = python("-m", "producer", *words, **environment)
    return done.returncode, done.stderr or done.stdout


Enqueue = Callable[[str, int], str]


def enqueue(url: str, algo_id: int, sort: Any = CancelClient) -> str:
    """By a client."""
    with talking(sort.from_url(url)) as talk:
        return str(talk.cancel(algo_id=algo_id).id)


def enqueue_async(url: str, algo_id: int) -> str:
    """By the one for tasks."""
    return enqueue(url, algo_id, AsyncCancelClient)


def enqueue_by_command(url: str, algo_id: int) -> str:
    """By the command."""
    code, said = command("cancel", "--algo-id", str(algo_id), "--json", REDIS_URL=url)
    assert code == 0, said
    return str(json.loads(said)["id"])


both = pytest.mark.parametrize("ask", [enqueue, enqueue_async])
every = pytest.mark.parametrize("ask", [enqueue, enqueue_async, enqueue_by_command])


# ---- Sentinels ------------------------------------------------------------------------------------------------------


@every
def test_sentinels_lead_to_the_primary(ask: Enqueue, sentinel: Sentinel, pair: Pair) -> None:
    """Clients and commands find the primary through any Sentinel that answers; a database is one of the primary's."""
    job_id = ask(through(sentinel, free_port(), pair.replica.port, database="/3"), 1)

    with redis.Redis(port=pair.primary.port, db=3) as there:
        assert there.exists(f"rq:job:{job_id}")


def test_a_service_that_no_sentinel_knows(sentinel: Sentinel) -> None:
    """A wrong name is told by name."""
    with pytest.raises(QueueUnavailable, match="the primary of nobody is not known: the Sentinels know no such"):
        enqueue(through(sentinel).replace(SERVICE, "nobody"), 1)


def test_sentinels_that_want_a_login(pair: Pair) -> None:
    """Their login is an option of the URL; without it that is what the error says."""
    with running_sentinel(pair, f"requirepass {PASSWORD}") as sentinel:
        assert enqueue(f"{through(sentinel)}?sentinel_password={PASSWORD}", 1)
        with pytest.raises(QueueUnavailable, match="refused the login"):
            enqueue(through(sentinel), 1)


def test_no_sentinel_answers() -> None:
    """The command says so in one line and leaves with 4."""
    url = f"redis+sentinel://user:{PASSWORD}@127.0.0.1:{free_port()}/{SERVICE}"
    code, said = command("status", REDIS_URL=url)

    assert code == 4
    assert "no Sentinel answers" in said
    assert "Connection refused" in said
    assert (len(said.splitlines()), PASSWORD in said) == (1, False)


@both
def test_clients_follow_a_failover_of_sentinels(ask: Enqueue, sentinel: Sentinel, pair: Pair) -> None:
    """After a failover new clients find the new primary as soon as it is one."""
    sentinel.fail_over()
    eventually(lambda: ask_until_it_works(ask, through(sentinel)), 30, "the request is taken")

    with direct(pair.replica) as there:
        assert there.llen("rq:queue:cancels") >= 1


def ask_until_it_works(ask: Enqueue, url: str) -> bool:
    """Whether it does now."""
    with contextlib.suppress(QueueUnavailable):
        return bool(ask(url, 1))
    return False


# ---- a server that stays up as a replica ----------------------------------------------------------------------------


@pytest.fixture
def proxied(pair: Pair) -> Iterator[Proxy]:
    """An address that leads to the primary: what is connected stays where it is."""
    with Proxy(pair.primary.port) as proxy:
        yield proxy


@pytest.mark.parametrize("sort", BOTH)
def test_a_client_leaves_a_server_that_is_no_primary_any_more(sort: type[Any], pair: Pair, proxied: Proxy) -> None:
    """The call that meets a replica goes to the new primary, on any of a client's connections; so does a retry."""
    with talking(sort.from_url(proxied.redis_url)) as client, talking(sort.from_url(proxied.redis_url)) as other:
        tickets = [client.cancel(algo_id=1), other.cancel(algo_id=2, durable=False)]
        proxied.target_port = pair.replica.port
        pair.fail_over()

        assert client.cancel(algo_id=1).duplicate
        assert other.retry([tickets[0].id], missing_ok=True) == []
        assert other.cancel_many([ticket.request for ticket in tickets])[1].id == tickets[1].id


def test_who_only_reads_leaves_it_too(pair: Pair, proxied: Proxy) -> None:
    """A kept connection on which nothing is written is not trusted for long: what it reads is the primary's."""
    with CancelClient.from_url(proxied.redis_url) as client, direct(pair.primary) as old:
        ticket = client.cancel(algo_id=1)
        proxied.target_port = pair.replica.port
        pair.fail_over()
        old.execute_command("REPLICAOF", "127.0.0.1", free_port())  # it hears nothing any more
        with direct(pair.primary) as new:
            new.hset(f"rq:job:{ticket.id}", "status", "seen-there")
        eventually(lambda: client.statuses([ticket.id]) == ["seen-there"], SURE_S + 15, "it reads at the new one")


def test_who_waits_leaves_it_too(pair: Pair, proxied: Proxy) -> None:
    """A waiter that listens at an old server which hears nothing any more has its outcome all the same."""
    found: list[OutcomeKind] = []

    async def wait(ticket_id: str) -> None:
        async with AsyncCancelClient.from_url(proxied.redis_url) as client:
            found.append((await client.wait(ticket_id, 40)).kind)

    with CancelClient.from_url(proxied.redis_url) as client, direct(pair.primary) as old:
        ticket = client.cancel(algo_id=17)
        waiters = [
            threading.Thread(target=lambda: found.append(ticket.wait(40).kind)),
            threading.Thread(target=lambda: asyncio.run(wait(ticket.id))),
        ]
        for waiter in waiters:
            waiter.start()
        eventually(lambda: old.info("clients")["blocked_clients"] == 2, 20, "both listen")
        pair.fail_over()
        proxied.target_port = pair.primary.port
        old.execute_command("REPLICAOF", "127.0.0.1", free_port())
        with direct(pair.primary) as there:
            settle(there, outcome(ticket.id))
        for waiter in waiters:
            waiter.join()
    assert found == [OutcomeKind.NOT_FOUND] * 2


def test_page_and_exporter_leave_it_too(pair: Pair, proxied: Proxy) -> None:
    """What they show, and a retry from the page, are the new primary's; an old server that hears nothing any more
    stays up beside it."""
    url = proxied.redis_url
    with exporting(url) as exporter, WebProcess(url, WEB_TOKEN=TOKEN) as web:
        assert outcomes(exporter.scrape()) == 0
        assert web("/failed", Authorization=f"Bearer {TOKEN}").status == 200
        old = pair.primary
        pair.fail_over()
        proxied.target_port = pair.primary.port
        with direct(old) as there:
            there.execute_command("REPLICAOF", "127.0.0.1", free_port())
        with direct(pair.primary) as there:
            settle(there, outcome("r1"))
        eventually(
            lambda: "r1" in web("/failed", Authorization=f"Bearer {TOKEN}").text, 30, "the page shows what is there"
        )
        assert web("/retry/start", {"id": "r1"}, Authorization=f"Bearer {TOKEN}").status == 303
        with direct(pair.primary) as there:
            assert there.llen("rq:queue:cancels") == 1
        eventually(lambda: outcomes(exporter.scrape()) == 1, 30, "the exporter counts what is there")
        assert exporter.value("cancel_up") == 1


def test_a_dead_connection_costs_no_call(proxied: Proxy) -> None:
    """A connection that was forgotten on the way is found out and replaced, without an error."""
    with CancelClient.from_url(proxied.redis_url, timeout_s=10) as client:
        client.statuses(["x"])
        time.sleep(SURE_S + 0.1)
        proxied.forget_flows()
        began = time.monotonic()
        assert client.statuses(["x"]) == [None]
        assert time.monotonic() - began < 8


def test_a_replica_is_not_taken_for_the_primary(pair: Pair) -> None:
    """An address that leads to a replica is refused by name, for now: the next call may find the primary."""
    with CancelClient.from_url(pair.replica.url) as client:
        with pytest.raises(QueueUnavailable, match="NotPrimary: it is a replica, not the primary"):
            client.status()
        with direct(pair.replica) as there:
            there.execute_command("REPLICAOF", "NO", "ONE")
        assert client.cancel(algo_id=1)


# ---- what is not supported ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("server", "told"), UNSUPPORTED)
def test_what_cannot_be_used_is_refused_by_name(server: Any, told: str) -> None:
    """Commands say what answers at the address in one line and leave with 4; the clients say the same."""
    with server() as url:
        code, said = command("cancel", "--algo-id", "1", REDIS_URL=url)
        assert (code, len(said.splitlines())) == (4, 1)
        assert told in said
        for ask in (enqueue, enqueue_async):
            with pytest.raises(QueueUnavailable, match=re.escape(told)):
                ask(url, 1)


# ---- connections ----------------------------------------------------------------------------------------------------


@every
def test_a_socket_of_this_host(ask: Enqueue, tmp_path: Path) -> None:
    """`unix:///path` leads to Redis as an address does."""
    path = tmp_path / "r.sock"
    with running_valkey("--unixsocket", str(path)) as server, direct(server) as there:
        job_id = ask(f"unix://{path}", 1)
        assert there.exists(f"rq:job:{job_id}")


def test_a_user_without_rights_is_told_apart(valkey: Valkey, connection: redis.Redis) -> None:
    """That HELLO is asked for needs no right: a user who may only read can connect."""
    connection.execute_command("ACL", "SETUSER", "poor", "on", ">pw", "-@all", "+get", "~*")
    try:
        with Address.parse(valkey.url.replace("://", "://poor:pw@")).client(2.0) as client:
            assert client.get("nothing") is None
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.set("a", 1)
    finally:
        connection.execute_command("ACL", "DELUSER", "poor")


def test_errors_have_classes(pair: Pair) -> None:
    """Whoever uses the addresses alone can tell what passes from what lasts."""
    with Address.parse(pair.replica.url).client(2.0) as client, pytest.raises(NotPrimary):
        client.ping()
    with cluster() as url, Address.parse(url).client(2.0) as client, pytest.raises(NotSupported):
        client.ping()


# ---- what a failed call may have done -------------------------------------------------------------------------------


@pytest.mark.parametrize("sort", BOTH)
def test_what_never_left_is_told_as_that(sort: type[Any], tmp_path: Path) -> None:
    """Where no connection could be opened, a call that writes says at once, and without a password, that nothing was
    sent; whoever shares its connection is told the same."""

    def refused(ask: Callable[[], object]) -> None:
        with pytest.raises(QueueUnavailable, match="; nothing was sent: a repeat makes the first request") as caught:
            ask()
        assert caught.value.nothing_sent
        assert "carried out" not in str(caught.value)
        assert PASSWORD not in "".join(traceback.format_exception(caught.value))

    for url in (f"redis://user:{PASSWORD}@127.0.0.1:{free_port()}/0", f"unix://{tmp_path}/nobody.sock"):
        with talking(sort.from_url(url, timeout_s=120)) as talk:
            began = time.monotonic()
            assert PASSWORD not in repr(talk.client)
            refused(lambda: talk.cancel(client_algo_id="stop-1"))
            refused(lambda: talk.retry(["a"]))
            refused(lambda: talk.cancel_open("BTCUSDT"))
            assert time.monotonic() - began < 60
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silence = f"redis://user:{PASSWORD}@127.0.0.1:{silent.getsockname()[1]}/0"
        with talking(sort.from_url(silence, timeout_s=0.5)) as talk:
            refused(lambda: talk.cancel(client_algo_id="stop-1"))
    with CancelClient.from_url(url) as client, ThreadPoolExecutor(16) as pool:
        for _ in pool.map(lambda _: refused(lambda: client.cancel(client_algo_id="stop-1")), range(200)):
            pass


@pytest.mark.parametrize("sort", BOTH)
@pytest.mark.parametrize("met", ["nobody", "a full server", "another login"])
def test_what_may_have_left_is_told_as_that(met: str, sort: type[Any]) -> None:
    """A call whose answer was lost may have been carried out, though its repeat found nobody, or was refused."""
    with (
        running_valkey() as server,
        redis.Redis(port=server.port) as connection,
        Proxy(server.port) as proxy,
        talking(sort.from_url(proxy.redis_url, timeout_s=30)) as talk,
    ):
        talk.cancel(algo_id=1)
        proxy.latency(60_000, b"EVALSHA")

        def lose() -> None:
            eventually(lambda: connection.llen("rq:queue:cancels") == 2, what="it was carried out")
            proxy.latency(0)
            if met == "another login":
                connection.config_set("requirepass", "x")
            elif met == "a full server":
                connection.config_set("maxmemory", 1)
            (proxy.down if met == "nobody" else proxy.reset_peer)()

        other = threading.Thread(target=lose)
        other.start()
        with pytest.raises(QueueUnavailable, match="it may have been carried out") as caught:
            talk.cancel(client_algo_id="stop-1")
        other.join()
        assert not caught.value.nothing_sent
