"""What tests of the clients share: ways to connect, looks at a job and at the server's counters, requests that fail."""

from __future__ import annotations

from typing import Any

import redis

from producer import CancelClient, CancelRequest, OutcomeKind, Ticket
from producer.keys import Keys
from tests.servers import Workers

KEYS = Keys()
PASSWORD = "password-of-the-tests"
#: Every way in which a strategy may have made its connection.
CONNECTIONS: tuple[dict[str, Any], ...] = (
    {"protocol": 2},
    {"protocol": 3},
    {"protocol": 2, "decode_responses": True},
    {"protocol": 3, "decode_responses": True},
)


def field(connection: redis.Redis, ticket: Ticket, name: str) -> int:
    """A number in the job's hash."""
    return int(connection.hget(KEYS.job_prefix + ticket.id, name) or 0)


def rqs_fields(connection: redis.Redis, job_id: str) -> dict[bytes, bytes]:
    """What RQ reads in the hash of a job: fields of its own; to RQ one that is absent is empty."""
    found: Any = connection.hgetall(KEYS.job_prefix + job_id)
    return {name: value for name, value in found.items() if value and not name.startswith(b"c_")}


def now_ms(connection: redis.Redis) -> float:
    """Redis' clock."""
    seconds, micros = connection.time()
    return float(seconds * 1000 + micros / 1000)


def calls(connection: redis.Redis, command: str) -> int:
    """How often the server has run a command since its counters were cleared."""
    statistics: Any = connection.info("commandstats")
    return int(statistics.get(f"cmdstat_{command}", {"calls": 0})["calls"])


def blocked(client: CancelClient) -> int:
    """How many clients the server lets wait."""
    told: Any = client._redis.info("clients")
    return int(told["blocked_clients"])


def fail(client: CancelClient, workers: Workers, count: int = 1) -> list[str]:
    """Requests that ended in a failed kind, as no worker has their account; ids in the order of RQ's registry."""
    if not workers.all:
        workers.start()
    tickets = client.cancel_many(CancelRequest(algo_id=number, account="nobody") for number in range(1, count + 1))
    assert {ticket.wait(30).kind for ticket in tickets} == {OutcomeKind.REFUSED}
    assert sorted(client.failed_ids()) == sorted(ticket.id for ticket in tickets)
    return client.failed_ids()
