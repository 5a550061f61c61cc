"""The breaker of a key, without a server: when it asks Redis, and what it believes."""

from __future__ import annotations

import asyncio

import pytest
import redis

from worker.classify import Means, Verdict
from worker.key_breaker import KeyBreaker

REFUSED = Verdict(Means.KEY_REFUSED, 401, -2015, "Invalid API-key, IP, or permissions for action.")


class Recorder:
    """Notes what is told and asked, and answers as it was set up."""

    def __init__(self, answer: int = 0, error: redis.RedisError | None = None) -> None:
        self.calls: list[tuple[str, str, str | bytes]] = []
        self.answer = answer
        self.error = error

    async def ask(self, account: str, what: str, word: str | bytes) -> int:
        """As :data:`worker.key_breaker.Ask` says."""
        self.calls.append((account, what, word))
        if self.error is not None:
            raise self.error
        return self.answer


def wait_until_ms(breaker: KeyBreaker, account: str) -> int:
    """When a job of the account may ask again."""
    return asyncio.run(breaker.wait_until_ms(account, b"job"))


def test_a_healthy_key_costs_no_call() -> None:
    """As long as no answer refused a key, nothing is asked of Redis."""
    store = Recorder()
    breaker = KeyBreaker(store.ask)

    asyncio.run(breaker.tell("default", Verdict(Means.CONFIRMED, 200, 200)))

    assert wait_until_ms(breaker, "default") == 0
    assert breaker.reason("default") is None
    assert store.calls == []


def test_a_refused_key_is_asked_about_and_other_accounts_are_not() -> None:
    """A refusal makes this worker ask before each call of that account, and of no other."""
    store = Recorder(answer=17)
    breaker = KeyBreaker(store.ask)

    asyncio.run(breaker.tell("desk", REFUSED))

    assert wait_until_ms(breaker, "desk") == 17
    assert wait_until_ms(breaker, "default") == 0
    assert "-2015" in (breaker.reason("desk") or "")
    assert [call[:2] for call in store.calls] == [("desk", "failed"), ("desk", "ask")]


@pytest.mark.parametrize("means", [Means.CONFIRMED, Means.NO_SUCH_ORDER, Means.OPEN, Means.DENIED])
def test_an_answer_that_needed_the_key_clears_it(means: Means) -> None:
    """Whatever the exchange answers after accepting the key ends the suspicion."""
    store = Recorder()
    breaker = KeyBreaker(store.ask)
    asyncio.run(breaker.tell("default", REFUSED))

    asyncio.run(breaker.tell("default", Verdict(means, 200)))

    assert breaker.reason("default") is None
    assert store.calls[-1][1] == "answered"


@pytest.mark.parametrize(
    "means", [Means.UNCLEAR, Means.NOT_SENT, Means.BUSY, Means.CLOCK, Means.LIMITED, Means.BLOCKED]
)
def test_an_answer_that_says_nothing_of_the_key_changes_nothing(means: Means) -> None:
    """A failure before the key was looked at neither clears nor confirms a suspicion."""
    store = Recorder()
    breaker = KeyBreaker(store.ask)
    asyncio.run(breaker.tell("default", REFUSED))

    asyncio.run(breaker.tell("default", Verdict(means, 503)))

    assert breaker.reason("default") is not None
    assert len(store.calls) == 1


def test_redis_away_holds_nothing_back() -> None:
    """A breaker that cannot be looked up does not stop cancels: the exchange answers for itself."""
    breaker = KeyBreaker(Recorder(error=redis.ConnectionError("away")).ask)

    asyncio.run(breaker.tell("default", REFUSED))

    assert wait_until_ms(breaker, "default") == 0
