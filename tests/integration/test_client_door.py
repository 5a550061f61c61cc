"""What bots really pass by mistake or habit: each is taken as it was meant, or refused with its type and the cure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import redis
import redis.asyncio
from redis.cluster import RedisCluster

from producer import AsyncCancelClient, CancelClient, CancelRequest, InvalidRequest
from producer.testing import AsyncFakeCancelClient, FakeCancelClient
from tests.servers import Valkey
from tests.strategies import BOTH, CONNECTIONS, PASSWORD, talking

NOBODY = "redis://127.0.0.1:1/0"


@dataclass(frozen=True)
class Int64:
    """A whole number as numpy has them: an index, but no int."""

    number: int

    def __index__(self) -> int:
        return self.number


@dataclass(frozen=True)
class Float64:
    """A number as numpy has them."""

    number: float

    def __float__(self) -> float:
        return self.number


Ask = Callable[[Any], object]
REQUEST = CancelRequest(algo_id=7)

#: What is done with a client; the field, and what its answer says of the type and the way out.
REFUSED: list[tuple[str, Ask, str, str]] = [
    ("an id of ccxt", lambda c: c.cancel(algo_id="2146760"), "algo_id", r"'2146760'.*not str: give int\(...\)"),
    ("durable in words", lambda c: c.cancel(algo_id=7, durable="no"), "durable", "not str: give True or False"),
    ("ids for requests", lambda c: c.cancel_many([1]), r"requests\[0\]", r"not int: give CancelRequest\(algo_id"),
    ("dicts", lambda c: c.cancel_many([{"algo_id": 1}]), r"requests\[0\]", r"not dict: give CancelRequest\(\*\*"),
    ("one dict", lambda c: c.cancel_many({"algo_id": 1}), "requests", "not dict: give a list"),
    ("one request", lambda c: c.cancel_many(REQUEST), "requests", "not CancelRequest: give a list"),
    ("no requests", lambda c: c.cancel_many(None), "requests", "not NoneType: give a list"),
    ("good ones and None", lambda c: c.cancel_many([REQUEST, None]), r"requests\[1\]", "not NoneType"),
    ("an id to retry", lambda c: c.retry("abc"), "ids", r"'abc'.*not str: give a list"),
    ("ids as numbers", lambda c: c.retry([5]), "id", "5.*not int: give a ticket, or its id as text"),
    ("missing_ok in words", lambda c: c.retry(["a"], missing_ok="no"), "missing_ok", "give True or False"),
    ("outcome of None", lambda c: c.outcome(None), "id", "not NoneType: give a ticket"),
    ("outcome of a number", lambda c: c.outcome(1), "id", "not int: give a ticket"),
    ("outcome of bytes", lambda c: c.outcome(b"abc"), "id", "not bytes: give a ticket"),
    ("outcome of no text", lambda c: c.outcome("\udc80"), "id", "UTF-8"),
    ("outcome of nothing", lambda c: c.outcome(""), "id", "1 to 256 bytes"),
    ("outcome of a book", lambda c: c.outcome("x" * 10**6), "id", "1 to 256 bytes"),
    ("outcomes of an id", lambda c: c.outcomes_of("abc"), "ids", "not str: give a list"),
    ("statuses of None", lambda c: c.statuses(None), "ids", "not NoneType: give a list"),
    *(
        (f"the ledger after {after!r}", lambda c, after=after: c.outcomes(after=after), "after", "a stream id such as")
        for after in (5, "", "yesterday", "1-2-3", "-", "+", "0x10", f"{2**64}-0")
    ),
    ("the ledger after None", lambda c: c.outcomes(after=None), "after", "not NoneType: give text"),
    ("follow in words", lambda c: c.outcomes(follow="no"), "follow", "give True or False"),
    ("waiting for nan", lambda c: c.wait("a", math.nan), "timeout_s", "0 or more seconds"),
    ("waiting in words", lambda c: c.wait("a", "5"), "timeout_s", "not str: give a number or a timedelta"),
    ("waiting for True", lambda c: c.wait("a", True), "timeout_s", "not bool: give a number"),
    ("waiting backwards", lambda c: c.wait("a", -1), "timeout_s", "0 or more seconds"),
    ("waiting for None", lambda c: c.wait(None), "id", "not NoneType: give a ticket"),
    ("waiting for many in words", lambda c: c.wait_many(["a"], "5"), "timeout_s", "not str"),
    ("waiting for numbers", lambda c: c.wait_many([1]), "id", "not int: give a ticket"),
    ("waiting for one of many", lambda c: c.wait_many("abc"), "ids", "not str: give a list"),
    ("waiting for None of many", lambda c: c.wait_many(None), "ids", "not NoneType: give a list"),
]
KINDS = [*BOTH, FakeCancelClient, AsyncFakeCancelClient]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ask", "field", "said"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_a_mistake_is_answered_at_the_door(kind: type[Any], ask: Ask, field: str, said: str) -> None:
    """It names field, value, type and the way out, although no server is there."""
    with talking(kind.from_url(NOBODY)) as talk, pytest.raises(InvalidRequest, match=rf"(?s)^{field}=.*{said}"):
        ask(talk)


#: What is given for a time-out of calls.
TIMEOUTS = [0, -1, math.nan, math.inf, "x", True, 10**9, timedelta(0)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("timeout_s", TIMEOUTS)
def test_a_time_out_is_a_length_of_time(kind: type[Any], timeout_s: object) -> None:
    """A call can take more than nothing and no more than an hour."""
    with pytest.raises(InvalidRequest, match=r"^timeout_s=.*more than 0 and at most 3600 seconds"):
        kind.from_url(NOBODY, timeout_s=timeout_s)


URLS = [
    None,
    b"redis://localhost",
    "",
    "localhost",
    "localhost:6379",
    f"http://:{PASSWORD}@localhost",
    f"redis://:{PASSWORD}@localhost:port/0",
    f"redis://:{PASSWORD}@localhost/zero",
    f"redis://:pass#{PASSWORD}@localhost",
    "redis://",
    "unix://",
    f"redis://:{PASSWORD}@localhost?db=x",
    f"redis://:{PASSWORD}@localhost?socket_timeout=soon",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("url", URLS)
def test_a_url_that_leads_nowhere_is_told_without_it(kind: type[Any], url: object) -> None:
    """The forms are named, and what may be a password is not."""
    with pytest.raises(InvalidRequest, match=r"^url=.*must be redis://") as caught:
        kind.from_url(url)
    assert PASSWORD not in str(caught.value) + repr(caught.value.value)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("options", [{"tiemout": 5}, {"ssl": True}])
def test_an_option_that_no_connection_has_is_named(kind: type[Any], options: dict[str, Any]) -> None:
    """Options are those of redis-py's connections."""
    with pytest.raises(InvalidRequest, match=rf"^options=.*{next(iter(options))}"):
        kind.from_url(NOBODY, **options)


def test_a_connection_must_be_of_the_client_s_sort() -> None:
    """The other sort's connection, a Cluster, a URL or nothing are refused with the way out."""
    rows: list[tuple[Any, Any, str]] = [
        (AsyncCancelClient, redis.Redis(), "use CancelClient with it"),
        (CancelClient, redis.asyncio.Redis(), "use AsyncCancelClient with it"),
        (CancelClient, NOBODY, "or use from_url"),
        (AsyncCancelClient, None, "or use from_url"),
        (CancelClient, RedisCluster.__new__(RedisCluster), "must be a connection to one Redis"),
    ]
    for kind, given, said in rows:
        with pytest.raises(InvalidRequest, match=f"^connection=.*{said}"):
            kind(given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("queue", [None, "a b", 5])
def test_a_queue_has_a_name(kind: type[Any], queue: object) -> None:
    """A name that could collide, or is none, is refused."""
    with pytest.raises(InvalidRequest, match=r"^queue="):
        kind.from_url(NOBODY, queue)


def test_what_is_meant_is_taken(valkey: Valkey) -> None:
    """Numbers of other libraries, lengths of time of any kind, and tickets where ids are meant."""
    with CancelClient.from_url(valkey.url, timeout_s=timedelta(seconds=5)) as client:
        deadlines: list[Any] = [timedelta(minutes=1), Decimal("0.5"), Fraction(1, 2), Float64(3.5), 5, 2.5]
        for number, deadline in enumerate(deadlines, 1):
            algo_id: Any = Int64(number)
            ticket = client.cancel(algo_id=algo_id, deadline_s=deadline)
            assert (ticket.request.algo_id, type(ticket.request.algo_id)) == (number, int)
        assert client.cancel(algo_id=1).duplicate
        assert client.outcome(ticket) is None
        assert client.outcomes_of(each for each in [ticket]) == {}
        assert client.statuses([ticket, ticket.id]) == ["queued", "queued"]
        assert client.job(ticket).id == ticket.id
        assert list(client.wait_many([ticket], timedelta(0)).standing) == [ticket.id]
        assert client.retry({ticket}, missing_ok=True) == []


@pytest.mark.parametrize("options", CONNECTIONS)
def test_a_brought_connection_is_only_read(valkey: Valkey, options: dict[str, Any]) -> None:
    """Whatever it decodes, however it repeats: the client asks by its own rules, and leaves it as it was."""
    retry = redis.retry.Retry(redis.backoff.ConstantBackoff(1), 50)
    brought = redis.Redis(port=valkey.port, socket_timeout=2, retry=retry, encoding="utf-16", **options)
    before = dict(brought.connection_pool.connection_kwargs)
    with CancelClient(brought) as client:
        ticket = client.cancel(algo_id=17)
        assert client.statuses([ticket]) == ["queued"]
    assert brought.connection_pool.connection_kwargs == before
