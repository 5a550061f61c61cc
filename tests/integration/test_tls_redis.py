"""Redis over TLS with a self-signed chain, as Heroku's Key-Value Store has one: worker, check and producers.

None of the servers in wheels speaks TLS, so a proxy ends it in front of a real one.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from producer import AsyncCancelClient, CancelClient, OutcomeKind, QueueUnavailable
from tests.fault.proxy import Proxy
from tests.loopback import certificate
from tests.servers import Valkey, Worker, Workers, eventually, python
from worker.sandbox.control import RunningExchange

PASSWORD = "not-to-be-seen"
WAY_OUT = "see REDIS_TLS_CA and REDIS_TLS_VERIFY"


@pytest.fixture
def ca_file(tmp_path: Path) -> str:
    """The certificate of the server, which nobody vouches for."""
    return certificate(tmp_path)[0]


@pytest.fixture
def tls(valkey: Valkey, ca_file: str) -> Iterator[Proxy]:
    """The server, behind TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ca_file, Path(ca_file).with_name("key.pem"))
    with Proxy(valkey.port, context) as proxy:
        yield proxy


@pytest.fixture
def url(tls: Proxy) -> str:
    """Where it is."""
    return tls.redis_url


@pytest.fixture
def fleet(workers: Workers, url: str) -> Workers:
    """Worker processes that find Redis there."""
    workers.environment["REDIS_URL"] = url
    return workers


def ways(ca_file: str) -> dict[str, dict[str, str]]:
    """What makes such a server acceptable."""
    return {"nobody asks": {"REDIS_TLS_VERIFY": "none"}, "vouched for": {"REDIS_TLS_CA": ca_file}}


def command(*words: str, **environment: str) -> tuple[int, str]:
    """Exit code and all output of a command."""
    done = python("-m", *words, **environment)
    return done.returncode, done.stdout + done.stderr


def waits_for_redis(worker: Worker) -> bool:
    """Whether it says that Redis is away."""
    return "event=redis state=away" in worker.output()


# ---- refused --------------------------------------------------------------------------------------------------------


def test_worker_refuses_a_server_that_nobody_vouches_for(fleet: Workers) -> None:
    """By default a self-signed chain is refused; the worker's log names the two ways out, and shows no password."""
    worker = fleet.start(wait=False, REDIS_URL=fleet.environment["REDIS_URL"].replace("://", f"://default:{PASSWORD}@"))
    eventually(lambda: waits_for_redis(worker), what="the worker says that Redis is away")

    assert WAY_OUT in worker.output()
    assert "self-signed certificate" in worker.output()
    assert worker.stop() == 0
    assert PASSWORD not in worker.output()


def test_a_vouched_for_server_must_have_the_right_name(fleet: Workers, ca_file: str) -> None:
    """The same server by a name that its certificate does not hold is refused; 127.1 is the same address."""
    by_name = fleet.environment["REDIS_URL"].replace("127.0.0.1", "127.1")
    environment = fleet.environment | {"REDIS_URL": by_name, "REDIS_TLS_CA": ca_file}
    code, said = command("worker", "check", **environment)

    assert code == 69
    assert WAY_OUT in said
    assert command("worker", "check", **fleet.environment, REDIS_TLS_CA=ca_file)[0] == 0
    assert command("producer", "status", **environment)[0] == 4
    assert command("producer", "status", **fleet.environment, REDIS_TLS_CA=ca_file)[0] == 0


def test_producers_refuse_it(url: str, ca_file: str) -> None:
    """The clients refuse it by default, and the command line names the ways out."""
    with CancelClient.from_url(url) as client, pytest.raises(QueueUnavailable):
        client.cancel(algo_id=1)
    code, said = command("producer", "cancel", "--algo-id", "1", REDIS_URL=url)

    assert code == 4
    assert WAY_OUT in said


# ---- accepted -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["nobody asks", "vouched for"])
def test_from_enqueue_to_outcome(fleet: Workers, exchange: RunningExchange, url: str, ca_file: str, way: str) -> None:
    """With either setting the worker serves the queue over TLS, and the command line speaks to it over TLS."""
    settings = ways(ca_file)[way]
    (order,) = exchange.add_orders(1)
    fleet.environment |= settings
    worker = fleet.start()
    words = ("producer", "cancel", "--algo-id", str(order.algo_id), "--wait", "10", "--json")
    code, said = command(*words, REDIS_URL=url, **settings)

    assert code == 0, said
    assert '"kind":"cancelled"' in said
    assert command("worker", "check", **fleet.environment)[0] == 0
    assert worker.stop() == 0
    assert not waits_for_redis(worker)


@pytest.mark.parametrize("options", ["ssl_cert_reqs=none", "ssl_ca_certs={ca_file}"])
def test_options_of_the_url(fleet: Workers, exchange: RunningExchange, url: str, ca_file: str, options: str) -> None:
    """The URL can say it as well, to both clients and to the worker."""
    there = f"{url}?{options.format(ca_file=ca_file)}"
    first, second = exchange.add_orders(2)
    fleet.start(REDIS_URL=there)

    async def ask() -> OutcomeKind:
        async with AsyncCancelClient.from_url(there) as client:
            kind = (await (await client.cancel(algo_id=second.algo_id)).wait(30)).kind
        await asyncio.sleep(0.2)  # TLS takes its leave in the loop's next turns, of which there would be none
        return kind

    with CancelClient.from_url(there) as client:
        assert client.cancel(algo_id=first.algo_id).wait(30).kind is OutcomeKind.CANCELLED
    assert asyncio.run(ask()) is OutcomeKind.CANCELLED


def test_connection_lost_and_found(
    fleet: Workers, exchange: RunningExchange, valkey: Valkey, tls: Proxy, ca_file: str
) -> None:
    """A worker whose TLS connections break comes back over TLS, with the same settings."""
    worker = fleet.start(REDIS_TLS_CA=ca_file)
    tls.reset_peer()
    (order,) = exchange.add_orders(1)
    with CancelClient.from_url(valkey.url) as client:
        assert client.cancel(algo_id=order.algo_id).wait(30).kind is OutcomeKind.CANCELLED
    assert worker.stop() == 0
