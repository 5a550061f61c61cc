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
OK = Verdict(Means.CONFIRMED, 200, 200)


def key(account: str, api_key: str | None = None) -> Credential:
    """A key of an account, by default one of its own."""
    return Credential.from_secret(account, api_key or f"key-of-{account}", "secret")


DEFAULT, DESK = key("default"), key("desk")


class Worker:
    """A worker's breaker, and a Redis that notes what it is told and asked, and answers as it was set up."""

    def __init__(self, answer: int = 0, error: redis.RedisError | None = None, *, tries: bool = True) -> None:
        self.calls: list[tuple[str, str, str | bytes]] = []  # account, what, word
        self.answer = answer
        self.error = error
        self.breaker = KeyBreaker(self._ask, tries=tries)

    async def _ask(self, key: Suspect, what: str, word: str | bytes) -> tuple[int, str]:
        self.calls.append((key.account, what, word))
        if self.error is not None:
            raise self.error
        return self.answer, "what the exchange said"

    def asked(self) -> list[str]:
        """What was told or asked."""
        return [what for _, what, _ in self.calls]

    def tell(self, credential: Credential, verdict: Verdict) -> None:
        """Meet an answer to a call with a key."""
        asyncio.run(self.breaker.tell(credential, verdict))

    def know(self, *credentials: Credential) -> None:
        """Hear from Redis that these keys are refused."""
        self.breaker.know([Suspect(each.account, each.fingerprint) for each in credentials])

    def wait_until_ms(self, credential: Credential) -> int:
        """When a job of the key may ask again."""
        return asyncio.run(self.breaker.wait_until_ms(credential, b"job"))


def test_a_healthy_key_costs_no_call() -> None:
    """As long as no answer refused a key, nothing is asked of Redis."""
    worker = Worker()
    worker.tell(DEFAULT, OK)
    assert worker.wait_until_ms(DEFAULT) == 0
    assert worker.breaker.reason(DEFAULT) is None
    assert worker.calls == []


def test_a_refused_key_is_asked_about_and_other_accounts_are_not() -> None:
    """A refusal makes this worker ask before each call of that account, and of no other."""
    worker = Worker(answer=17)
    worker.tell(DESK, REFUSED)
    assert worker.wait_until_ms(DESK) == 17
    assert worker.wait_until_ms(DEFAULT) == 0
    assert "-2015" in (worker.breaker.reason(DESK) or "")
    assert [call[:2] for call in worker.calls] == [("desk", "failed"), ("desk", "ask")]


@pytest.mark.parametrize(
    ("means", "clears"),
    [
        *[(means, True) for means in (Means.CONFIRMED, Means.NO_SUCH_ORDER, Means.OPEN, Means.DENIED)],
        *[(means, False) for means in (Means.UNCLEAR, Means.NOT_SENT, Means.BUSY, Means.CLOCK)],
        *[(means, False) for means in (Means.LIMITED, Means.BLOCKED)],
    ],
)
def test_an_answer_that_needed_the_key_clears_it(means: Means, clears: bool) -> None:
    """Whatever the exchange answers after accepting the key ends the suspicion; a failure before the key was looked at
    neither clears nor confirms it."""
    worker = Worker()
    worker.tell(DEFAULT, REFUSED)
    worker.tell(DEFAULT, Verdict(means, 200))
    assert (worker.breaker.reason(DEFAULT) is None) is clears
    assert worker.asked() == ["failed", "answered"][: 1 + clears]


def test_redis_away_holds_nothing_back() -> None:
    """A breaker that cannot be looked up does not stop cancels: the exchange answers for itself."""
    worker = Worker(error=redis.ConnectionError("away"))
    worker.tell(DEFAULT, REFUSED)
    assert worker.wait_until_ms(DEFAULT) == 0


@pytest.mark.parametrize(("tries", "asked"), [(True, ["try", "ask", "ask"]), (False, ["ask"] * 3)])
def test_a_process_that_begins_tries_a_refused_key_once(tries: bool, asked: list[str]) -> None:
    """Whoever restarts a worker has perhaps mended the key: its first job is sent, the others wait for the answer. A
    stock worker's processes begin all the time: they ask."""
    worker = Worker(answer=17, tries=tries)
    worker.know(DEFAULT)
    assert [worker.wait_until_ms(DEFAULT) for _ in range(3)] == [17] * 3
    assert worker.asked() == asked
    assert worker.breaker.reason(DEFAULT) == "what the exchange said"


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
    worker = Worker()
    worker.know(refused)
    for _ in range(2):
        worker.tell(accepted, OK)
    assert worker.calls == [(accepted.account, "answered", "")] * is_told


def test_one_key_is_one_suspect_whatever_the_account() -> None:
    """Two accounts with one key wait together; another account that had the name before does not count."""
    worker = Worker(answer=17)
    worker.tell(key("one", "shared"), REFUSED)
    assert worker.wait_until_ms(key("two", "shared")) == 17
    assert worker.wait_until_ms(key("one", "not-shared")) == 0


def test_what_redis_forgets_is_forgotten() -> None:
    """Where another worker saw the key accepted, this one asks no more."""
    worker = Worker()
    worker.tell(DEFAULT, REFUSED)
    worker.know()  # asked before Redis was told
    assert worker.breaker.reason(DEFAULT) is not None
    worker.know(DEFAULT)
    worker.know()
    assert worker.breaker.reason(DEFAULT) is None
    assert worker.wait_until_ms(DEFAULT) == 0


def test_a_fingerprint_tells_keys_apart_and_nothing_of_them() -> None:
    """It is short, the same for one key whatever its account and secret, and holds no part of the key."""
    one = key("one", "k" * 64)
    assert one.fingerprint == Credential.from_secret("two", "k" * 64, "another").fingerprint
    assert one.fingerprint != key("one", "k" * 63 + "l").fingerprint
    assert suspect_of(f"one {one.fingerprint}".encode()) == (b"one", one.fingerprint.encode())
    assert suspect_of(b"desk2") == (b"desk2", b"desk2")
