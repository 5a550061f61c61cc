"""The proxy does what it says, and what it does by chance is a function of its seed."""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.fault.proxy import Proxy, Toxic, Weather
from tests.servers import Valkey, eventually
from worker.sandbox.control import RunningExchange


@pytest.fixture
def proxy(valkey: Valkey) -> Iterator[Proxy]:
    """A proxy in front of the server."""
    with Proxy(valkey.port, seed=7) as proxy:
        yield proxy


@pytest.fixture
def through(proxy: Proxy) -> Iterator[redis.Redis]:
    """A client through the proxy that repeats nothing."""
    with redis.Redis(port=proxy.port, socket_timeout=0.5, retry=Retry(NoBackoff(), 0)) as client:
        client.ping()
        yield client


def test_it_carries_both_ways(through: redis.Redis, connection: redis.Redis) -> None:
    """Without a toxic nothing is changed, however large."""
    through.set("large", b"x" * 3_000_000)
    assert connection.get("large") == through.get("large") == b"x" * 3_000_000


def test_a_lost_reply_belongs_to_a_command_that_ran(
    proxy: Proxy, through: redis.Redis, connection: redis.Redis
) -> None:
    """limit_data: the command is carried out, its answer never comes whole, and other commands are left alone."""
    trap = proxy.limit_data(b"INCR", keep=1)
    through.set("n", 1)
    with pytest.raises(redis.ConnectionError):
        through.incr("n")
    assert (connection.get("n"), trap.sprung, proxy.count.replies_lost) == (b"2", 1, 1)
    assert through.incr("n") == 3


def test_a_trap_can_wait_for_an_answer(proxy: Proxy, through: redis.Redis) -> None:
    """A trap that names a part of the answer lets other answers to the same command pass."""
    through.mset({"a": "plain", "b": "treasure"})
    trap = proxy.limit_data(b"GET", b"treasure")
    assert through.get("a") == b"plain"
    with pytest.raises(redis.ConnectionError):
        through.get("b")
    assert trap.sprung == 1


def test_a_pipeline_runs_whole_before_its_reply_is_lost(
    proxy: Proxy, through: redis.Redis, connection: redis.Redis
) -> None:
    """Commands behind a blocking one in the same write have run when the connection breaks."""
    proxy.limit_data(b"BLPOP")
    connection.rpush("list", "item")
    with through.pipeline(transaction=False) as pipeline:
        pipeline.execute_command("BLPOP", "list", 1)
        pipeline.execute_command("SET", "after", "1")
        with pytest.raises(redis.ConnectionError):
            pipeline.execute()
    assert connection.get("after") == b"1"


def test_reset_peer(proxy: Proxy, through: redis.Redis) -> None:
    """A client whose connection is reset while it waits for an answer learns it at once."""
    proxy.timeout()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(through.ping)
        time.sleep(0.1)
        assert proxy.reset_peer() == 1
        with pytest.raises(redis.ConnectionError):
            waiting.result(0.2)


def test_timeout_is_a_black_hole(proxy: Proxy, through: redis.Redis, connection: redis.Redis) -> None:
    """Nothing passes and nobody is told, also on new connections; what was held passes afterwards."""
    proxy.timeout()
    for _ in range(2):
        with pytest.raises(redis.TimeoutError):
            through.set("late", 1)
    assert connection.get("late") is None
    proxy.timeout(False)
    eventually(lambda: connection.get("late") == b"1", 2, "what was held arrives")


def test_down_refuses_and_up_accepts(proxy: Proxy, through: redis.Redis) -> None:
    """A closed door breaks what is open and refuses what is new, on the same port again when it opens."""
    proxy.down()
    with pytest.raises(redis.ConnectionError):
        through.ping()
    proxy.up()
    assert through.ping()


def test_latency(proxy: Proxy, through: redis.Redis) -> None:
    """Answers come later by what was asked for."""
    proxy.latency(100)
    began = time.monotonic()
    through.ping()
    assert 0.1 <= time.monotonic() - began < 0.45


def test_latency_of_some(proxy: Proxy, through: redis.Redis) -> None:
    """Told which requests, it delays the answers to these alone."""
    proxy.latency(400, b"slow")
    began = time.monotonic()
    through.echo("quick")
    assert time.monotonic() - began < 0.4
    through.echo("slow")
    assert time.monotonic() - began >= 0.4


def test_weather_is_a_function_of_the_seed() -> None:
    """The same seed, connection and turn always meet the same; another seed meets something else."""
    turns = [(connection, turn) for connection in range(20) for turn in range(1, 51)]
    first, again, other = ([Weather(seed, reset=0.1, lose=0.2).meets(*turn) for turn in turns] for seed in (1, 1, 2))
    assert first == again
    assert first != other
    toxics = [toxic for toxic, _ in first]
    assert 60 < toxics.count(Toxic.RESET) < 140
    assert 150 < toxics.count(Toxic.LOSE) < 250
    assert {Weather(1).meets(*turn)[0] for turn in turns} == {None}


def test_rain_falls_until_it_stops(proxy: Proxy, through: redis.Redis) -> None:
    """In the rain some commands fail, and none does when it has stopped."""
    proxy.let_it_rain(reset=0.3, lose=0.3)
    failed = 0
    for _ in range(50):
        try:
            through.ping()
        except redis.ConnectionError:
            failed += 1
    assert failed > 10
    proxy.let_it_rain()
    through.connection_pool.disconnect()
    assert all(through.ping() for _ in range(50))


def test_in_front_of_the_exchange(exchange: RunningExchange) -> None:
    """HTTP goes through it too, and a request whose answer is lost has been served."""
    port = int(exchange.url.rpartition(":")[2])
    with Proxy(port) as proxy:
        proxy.limit_data(b"GET /fapi/v1/time", keep=20)
        for path, is_cut in (("/fapi/v1/ping", False), ("/fapi/v1/time", True), ("/fapi/v1/time", False)):
            caller = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=2)
            caller.request("GET", path)
            if is_cut:
                with pytest.raises((http.client.HTTPException, ConnectionError)):
                    caller.getresponse().read()
            else:
                assert caller.getresponse().read()
            caller.close()
    assert exchange.stats().requests["GET /fapi/v1/time"]["200"] == 2


@pytest.mark.parametrize(("toxic", "carried_out"), [("mute", True), ("deaf", False)])
def test_a_silence_breaks_no_connection(
    proxy: Proxy, through: redis.Redis, connection: redis.Redis, toxic: str, carried_out: bool
) -> None:
    """mute, deaf: no answer comes, whether the command ran or not, and the connection stays."""
    proxy.let_it_rain(**{toxic: 1.0})
    with pytest.raises(redis.TimeoutError):
        through.incr("n")
    assert (connection.exists("n"), proxy.count.resets, proxy.count.silences) == (int(carried_out), 0, 1)
    proxy.let_it_rain()
    assert through.ping()


def test_flows_are_forgotten(proxy: Proxy, through: redis.Redis, connection: redis.Redis) -> None:
    """forget_flows, forget: nothing passes any more on those that are there, or were still for too long; new ones are
    well."""
    proxy.forget_flows()
    with pytest.raises(redis.TimeoutError):
        through.incr("n")
    assert through.incr("n") == 1
    proxy.forget(0.3)
    time.sleep(0.5)
    with pytest.raises(redis.TimeoutError):
        through.incr("n")
    proxy.heal()
    assert through.incr("n") == 2
    assert connection.get("n") == b"2"
    assert proxy.count.flows_forgotten >= 2
