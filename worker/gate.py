"""The pause that all requests of one egress address share, as this process last knew it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import redis

from worker import log
from worker.verdict import Policy, Verdict


class Gate:
    """Looked at right before each send. Redis holds the truth; a claim or renewal brings it here each second.

    ``publish`` closes the gate for everybody for some ms (:meth:`worker.store.Store.close_gate`) and gives its end.
    """

    def __init__(self, publish: Callable[[int, str], int]) -> None:
        self._publish = publish
        self._lock = threading.Lock()
        self._unshared: tuple[int, str] | None = None
        self.until_ms = 0  # by Redis' clock

    def closed(self, now_ms: int) -> bool:
        """Whether nothing may be sent now."""
        return now_ms < self.until_ms

    def observe(self, until_ms: int) -> None:
        """Note what Redis says; an end that is later here has not reached Redis yet, and holds."""
        with self._lock:
            self.until_ms = max(self.until_ms, until_ms)

    def close_for(self, verdict: Verdict, policy: Policy, now_ms: int) -> None:
        """Close it as long as a gated ``verdict`` asks for."""
        self.close(verdict.pause_ms(now_ms, policy), f"{verdict.http} {verdict.msg}".strip(), now_ms)

    def close(self, pause_ms: int, reason: str, now_ms: int) -> None:
        """Close it here at once, and for everybody as soon as Redis hears of it."""
        self.observe(now_ms + pause_ms)
        with self._lock:
            if self._unshared is None or self._unshared[0] < now_ms + pause_ms:
                self._unshared = (now_ms + pause_ms, reason)
        log.warning("gate", state="closed", pause_ms=pause_ms, reason=reason)
        self.share(now_ms)

    def share(self, now_ms: int) -> None:
        """Tell Redis of a closing that it has not heard of; called again until it has."""
        with self._lock:
            unshared = self._unshared
        if unshared is None:
            return
        until_ms, reason = unshared
        try:
            self.observe(self._publish(max(until_ms - now_ms, 0), reason))
        except redis.RedisError as error:
            log.error("gate", state="not_shared", reason=reason, error=type(error).__name__)
            return
        with self._lock:
            if self._unshared == unshared:
                self._unshared = None
