"""The breaker of a key, without a server: when it asks Redis, and what it believes."""

from __future__ import annotations

import asyncio

import pytest
import redis

from producer.keys import suspect_of
from worker.classify import Means, Verdict
from worker.key_breaker import KeyBreaker
from worker.signing import Credential
from worker.store import Suspect

REFUSED = Verdict(Means.KEY_REFUSED, 401, -2015, "Invalid API-key, IP, or permissions for action.")


class Recorder:
    """Notes what is told and asked, and answers as it was set up."""

    def __init__(self, answer: int = 0, error: redis.RedisError | None = None) -> None:
        self.calls: list[tuple[str, str, str | bytes]] = []  # account, what, word
        self.answer = answer
        self.error = error

    async def ask(self, key: Suspect, what: str, word: str | bytes) -> tuple[int, str]:
        """As :data:`worker.key_breaker.Ask` says."""
        self.calls.append((key.account, what, word))
        if self.error is not None:
            raise self.error
        return self.answer, "what the exchange said"


def key(account: str, api_key: str | None = None) -> Credential:
    """A key of an account, by default one of its own."""
    return Credential.from_secret(account, api_key or f"key-of-{account}", "secret")


DEFAULT, DESK = key("default"), key("desk")


def suspect(credential: Credential) -> Suspect:
    """The key as one that is refused."""
    return Suspect(credential.account, credential.fingerprint)


def wait_until_ms(breaker: KeyBreaker, credential: Credential) -> int:
    """When a job of the key may ask again."""
    return asyncio.run(breaker.wait_until_ms(credential, b"job"))


def test_a_healthy_key_costs_no_call() -> None:
    """As long as no answer refused a key, nothing is asked of Redis."""
    store = Recorder()
    breaker = KeyBreaker(store.ask)

    asyncio.run(breaker.tell(DEFAULT, Verdict(Means.CONFIRMED, 200, 200)))

    assert wait_until_ms(breaker, DEFAULT) == 0
    assert breaker.reason(DEFAULT) is None
    assert store.calls == []


def test_a_refused_key_is_asked_about_and_other_accounts_are_not() -> None:
    """A refusal makes this worker ask before each call of that account, and of no other."""
    store = Recorder(answer=17)
    breaker = KeyBreaker(store.ask)

    asyncio.run(breaker.tell(DESK, REFUSED))

    assert wait_until_ms(breaker, DESK) == 17
    assert wait_until_ms(breaker, DEFAULT) == 0
    assert "-2015" in (breaker.reason(DESK) or "")
    assert [call[:2] for call in store.calls] == [("desk", "failed"), ("desk", "ask")]


@pytest.mark.parametrize("means", [Means.CONFIRMED, Means.NO_SUCH_ORDER, Means.OPEN, Means.DENIED])
def test_an_answer_that_needed_the_key_clears_it(means: Means) -> None:
    """Whatever the exchange answers after accepting the key ends the suspicion."""
    store = Recorder()
    breaker = KeyBreaker(store.ask)
    asyncio.run(breaker.tell(DEFAULT, REFUSED))

    asyncio.run(breaker.tell(DEFAULT, Verdict(means, 200)))

    assert breaker.reason(DEFAULT) is None
    assert store.calls[-1][1] == "answered"


@pytest.mark.parametrize(
    "means", [Means.UNCLEAR, Means.NOT_SENT, Means.BUSY, Means.CLOCK, Means.LIMITED, Means.BLOCKED]
)
def test_an_answer_that_says_nothing_of_the_key_changes_nothing(means: Means) -> None:
    """A failure before the key was looked at neither clears nor confirms a suspicion."""
    store = Recorder()
    breaker = KeyBreaker(store.ask)
    asyncio.run(breaker.tell(DEFAULT, REFUSED))

    asyncio.run(breaker.tell(DEFAULT, Verdict(means, 503)))

    assert breaker.reason(DEFAULT) is not None
    assert len(store.calls) == 1


def test_redis_away_holds_nothing_back() -> None:
    """A breaker that cannot be looked up does not stop cancels: the exchange answers for itself."""
    breaker = KeyBreaker(Recorder(error=redis.ConnectionError("away")).ask)

    asyncio.run(breaker.tell(DEFAULT, REFUSED))

    assert wait_until_ms(breaker, DEFAULT) == 0


OK = Verdict(Means.CONFIRMED, 200, 200)


def test_a_process_that_begins_tries_a_refused_key_once() -> None:
    """Whoever restarts a worker has perhaps mended the key: its first job is sent, the others wait for the answer."""
    store = Recorder(answer=17)
    breaker = KeyBreaker(store.ask)
    breaker.know([suspect(DEFAULT)])

    for _ in range(3):
        wait_until_ms(breaker, DEFAULT)

    assert [what for _, what, _ in store.calls] == ["try", "ask", "ask"]
    assert breaker.reason(DEFAULT) == "what the exchange said"


def test_a_process_for_each_job_tries_no_refused_key() -> None:
    """A stock worker's processes begin all the time: they ask."""
    store = Recorder(answer=17)
    breaker = KeyBreaker(store.ask, tries=False)
    breaker.know([suspect(DEFAULT)])

    assert wait_until_ms(breaker, DEFAULT) == 17
    assert [what for _, what, _ in store.calls] == ["ask"]


@pytest.mark.parametrize(
    ("refused", "accepted", "is_told"),
    [
        (DEFAULT, DEFAULT, True),
        (DEFAULT, key("default", "a-new-key"), True),
        (key("old-name", "one-key"), key("new-name", "one-key"), True),
        (DEFAULT, DESK, False),
    ],
    ids=["the same key", "the account's new key", "the key under another name", "another account's"],
)
def test_a_refusal_that_others_saw_ends_with_the_first_accepted_call(
    refused: Credential, accepted: Credential, is_told: bool
) -> None:
    """Who never saw the refusal tells once that the account has a key that works; of others it says nothing."""
    store = Recorder()
    breaker = KeyBreaker(store.ask)
    breaker.know([suspect(refused)])

    for _ in range(2):
        asyncio.run(breaker.tell(accepted, OK))

    assert store.calls == [(accepted.account, "answered", "")] * is_told


def test_one_key_is_one_suspect_whatever_the_account() -> None:
    """Two accounts with one key wait together; another account that had the name before does not count."""
    store = Recorder(answer=17)
    breaker = KeyBreaker(store.ask)
    asyncio.run(breaker.tell(key("one", "shared"), REFUSED))

    assert wait_until_ms(breaker, key("two", "shared")) == 17
    assert wait_until_ms(breaker, key("one", "not-shared")) == 0


def test_what_redis_forgets_is_forgotten() -> None:
    """Where another worker saw the key accepted, this one asks no more."""
    store = Recorder()
    breaker = KeyBreaker(store.ask)
    asyncio.run(breaker.tell(DEFAULT, REFUSED))
    breaker.know([])  # asked before Redis was told
    assert breaker.reason(DEFAULT) is not None
    breaker.know([suspect(DEFAULT)])
    breaker.know([])

    assert breaker.reason(DEFAULT) is None
    assert wait_until_ms(breaker, DEFAULT) == 0


def test_a_fingerprint_tells_keys_apart_and_nothing_of_them() -> None:
    """It is short, the same for one key whatever its account and secret, and holds no part of the key."""
    one = key("one", "k" * 64)
    assert one.fingerprint == Credential.from_secret("two", "k" * 64, "another").fingerprint
    assert one.fingerprint != key("one", "k" * 63 + "l").fingerprint
    assert suspect_of(f"one {one.fingerprint}".encode()) == (b"one", one.fingerprint.encode())
    assert suspect_of(b"desk2") == (b"desk2", b"desk2")
