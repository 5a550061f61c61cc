"""What tests of the clients share: ways to connect, looks at a job and at the server's counters, requests that fail."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import redis

from producer import AsyncCancelClient, CancelClient, CancelRequest, Outcome, OutcomeKind, Ticket
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


#: Both clients: one rule, one test.
BOTH = [CancelClient, AsyncCancelClient]


class Talk:
    """Calls a client of either sort and gives what comes of it."""

    def __init__(self, client: Any, runner: asyncio.Runner) -> None:
        self.client = client
        self._runner = runner

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.client, name)
        return lambda *args, **options: self.end(method(*args, **options))

    def end(self, value: Any) -> Any:
        """The value, awaited if it has to be."""
        return self._runner.run(_await(value)) if inspect.isawaitable(value) else value

    def wait_for(self, ticket: Any, timeout_s: float | None = 10) -> Outcome:
        """The ticket's outcome."""
        outcome = self.end(ticket.wait(timeout_s))
        assert isinstance(outcome, Outcome)
        return outcome

    def ledger(self, after: str = "0-0", *, follow: bool = False, most: int = 100) -> list[tuple[str, Outcome]]:
        """The first entries after a place."""
        entries = self.client.outcomes(after, follow=follow)
        if not hasattr(entries, "__anext__"):
            return list(itertools.islice(entries, most))

        async def read() -> list[tuple[str, Outcome]]:
            found: list[tuple[str, Outcome]] = []
            async for entry in entries:
                found.append(entry)
                if len(found) == most:
                    break
            await entries.aclose()
            return found

        return self._runner.run(read())


async def _await(value: Any) -> Any:
    return await value


@contextlib.contextmanager
def talking(client: Any) -> Iterator[Talk]:
    """Talk with a client, which is closed in the end.

    In asyncio's debug mode: what is never awaited, or left open, becomes a warning, hence an error.
    """
    with asyncio.Runner(debug=True) as runner:
        talk = Talk(client, runner)
        try:
            yield talk
        finally:
            talk.close()


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
