"""A breaker for each API key: a key that the exchange refuses again and again is left in peace.

It belongs to the key, whatever account names it, and is known by the key's fingerprint. All workers meet at Redis,
which tells each of them with its beats which keys are refused: one that is not costs no call, and whoever first sees a
key of a refused account accepted says so.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

import redis

from worker import log
from worker.classify import Means, Verdict
from worker.signing import Credential
from worker.store import Suspect

#: Refusals of a key in a row that open its breaker, and the time between probes while it is open, ms.
FAILURES = 5
PROBE_EVERY_MS = 60_000
#: Verdicts that say nothing of the key: its check may not have been reached.
_SILENT = frozenset({Means.UNCLEAR, Means.NOT_SENT, Means.BUSY, Means.CLOCK, Means.LIMITED, Means.BLOCKED})


#: Tells of an answer (`failed`, `answered`) or asks to send (`ask`, `try`): key, what, reason or job id; gives when to
#: ask again, ms, or 0, and why (:meth:`worker.store.Store.key`).
Ask = Callable[[Suspect, str, str | bytes], Awaitable[tuple[int, str]]]


class KeyBreaker:
    """The breakers of one worker's keys.

    ``tries``: the first job of a key that was refused before this process began is sent at once, as a probe: a restart
    is how most keys are mended.
    """

    def __init__(self, ask: Ask, *, tries: bool = True) -> None:
        self._ask_redis = ask
        self._tries = tries
        self._tried: set[str] = set()
        self._reasons: dict[str, str] = {}  # by fingerprint, as far as this process has heard of one
        self._suspects: frozenset[Suspect] = frozenset()

    def know(self, suspects: Iterable[Suspect]) -> None:
        """Take note of the keys that are refused by what Redis says."""
        before, self._suspects = self._suspects, frozenset(suspects)
        for ended in {each.fingerprint for each in before} - {each.fingerprint for each in self._suspects}:
            self._reasons.pop(ended, None)

    def reason(self, credential: Credential) -> str | None:
        """Why the key is suspected, or None."""
        return self._reasons.get(credential.fingerprint)

    async def wait_until_ms(self, credential: Credential, job_id: bytes) -> int:
        """When ``job_id`` may ask again (Redis' clock), or 0 if it may send now."""
        print_ = credential.fingerprint
        if print_ not in self._reasons and all(each.fingerprint != print_ for each in self._suspects):
            return 0
        is_first = self._tries and print_ not in self._tried and print_ not in self._reasons
        self._tried.add(print_)
        until_ms, reason = await self._ask(credential, "try" if is_first else "ask", job_id)
        if until_ms > 0:
            self._reasons.setdefault(print_, reason)
        return until_ms

    async def tell(self, credential: Credential, verdict: Verdict) -> None:
        """Take note of an answer to a signed call; most say nothing new."""
        account, print_ = credential.account, credential.fingerprint
        if verdict.means is Means.KEY_REFUSED:
            reason = " ".join(str(part) for part in (verdict.http, verdict.code, verdict.msg) if part not in (None, ""))
            self._reasons[print_] = reason
            probe_at_ms, _ = await self._ask(credential, "failed", reason)
            if probe_at_ms > 0:
                log.error("key", account=account, state="held_back", probe_at_ms=probe_at_ms, reason=reason)
            return
        others = frozenset(each for each in self._suspects if each.account != account and each.fingerprint != print_)
        if verdict.means not in _SILENT and (print_ in self._reasons or others != self._suspects):
            self._reasons.pop(print_, None)
            self._suspects = others
            await self._ask(credential, "answered", "")
            log.info("key", account=account, state="accepted")

    async def _ask(self, credential: Credential, what: str, word: str | bytes) -> tuple[int, str]:
        try:
            return await self._ask_redis(Suspect(credential.account, credential.fingerprint), what, word)
        except redis.RedisError as error:
            log.warning("key", account=credential.account, state="not_shared", error=type(error).__name__)
            return 0, ""
