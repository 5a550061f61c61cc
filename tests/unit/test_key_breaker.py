"""The breaker of a key, without a server: when it asks Redis, and what it believes."""

from __future__ import annotations

import pytest
import redis

from worker.classify import Means, Verdict
from worker.key_breaker import KeyBreaker

REFUSED = Verdict(Means.KEY_REFUSED, 401, -2015, "Invalid API-key, IP, or permissions for action.")


class Recorder:
    """A key store that notes what it is told and answers as it was set up."""

    def __init__(self, answer: int = 0, error: redis.RedisError | None = None) -> None:
        self.calls: list[tuple[str, str, str]] = []
        self.answer = answer
        self.error = error

    def key(self, account: str, what: str, word: str, failures: int, probe_every_ms: int) -> int:
        self.calls.append((account, what, word))
        if self.error is not None:
            raise self.error
        return self.answer


def test_a_healthy_key_costs_no_call() -> None:
    """As long as no answer refused a key, nothing is asked of Redis."""
    store = Recorder()
    guard = KeyBreaker(store)

    guard.tell("default", Verdict(Means.CONFIRMED, 200, 200))

    assert guard.wait_until_ms("default", "job") == 0
    assert guard.reason("default") is None
    assert store.calls == []


def test_a_refused_key_is_asked_about_and_other_accounts_are_not() -> None:
    """A refusal makes this worker ask before each call of that account, and of no other."""
    store = Recorder(answer=17)
    guard = KeyBreaker(store)

    guard.tell("desk", REFUSED)

    assert guard.wait_until_ms("desk", "job") == 17
    assert guard.wait_until_ms("default", "job") == 0
    assert "-2015" in (guard.reason("desk") or "")
    assert [call[:2] for call in store.calls] == [("desk", "failed"), ("desk", "ask")]


@pytest.mark.parametrize("means", [Means.CONFIRMED, Means.NO_SUCH_ORDER, Means.OPEN, Means.DENIED])
def test_an_answer_that_needed_the_key_clears_it(means: Means) -> None:
    """Whatever the exchange answers after accepting the key ends the suspicion."""
    store = Recorder()
    guard = KeyBreaker(store)
    guard.tell("default", REFUSED)

    guard.tell("default", Verdict(means, 200))

    assert guard.reason("default") is None
    assert store.calls[-1][1] == "answered"


@pytest.mark.parametrize(
    "means", [Means.UNCLEAR, Means.NOT_SENT, Means.BUSY, Means.CLOCK, Means.LIMITED, Means.BLOCKED]
)
def test_an_answer_that_says_nothing_of_the_key_changes_nothing(means: Means) -> None:
    """A failure before the key was looked at neither clears nor confirms a suspicion."""
    store = Recorder()
    guard = KeyBreaker(store)
    guard.tell("default", REFUSED)

    guard.tell("default", Verdict(means, 503))

    assert guard.reason("default") is not None
    assert len(store.calls) == 1


def test_redis_away_holds_nothing_back() -> None:
    """A breaker that cannot be looked up does not stop cancels: the exchange answers for itself."""
    guard = KeyBreaker(Recorder(error=redis.ConnectionError("away")))

    guard.tell("default", REFUSED)

    assert guard.wait_until_ms("default", "job") == 0
