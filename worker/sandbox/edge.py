"""Limits per IP: weight counting, rate limits, bans and firewall blocks (exchange.md 4)."""

from __future__ import annotations

from dataclasses import dataclass, field

from worker.sandbox.faults import Answer, Fault, FaultTiming


@dataclass(frozen=True, slots=True)
class Incident:
    """A time in which every request of an IP gets one answer: a rate limit, a ban or a firewall's block."""

    fault: str
    peer: str
    started_ms: int  # local time
    duration_ms: int
    requests_ms: list[int] = field(default_factory=list)  # when requests came all the same, since the start

    @property
    def until_ms(self) -> int:
        """When it ends, local time."""
        return self.started_ms + self.duration_ms


class Edge:
    """Weight counting, rate limits, bans and firewall blocks, for each client IP."""

    def __init__(self, limit_per_minute: int, timing: FaultTiming) -> None:
        self.limit_per_minute = limit_per_minute
        self.peak_used_weight = 0
        self.incidents: list[Incident] = []
        self._timing = timing
        self._current: dict[str, Incident] = {}
        self._used: dict[str, tuple[int, int]] = {}  # minute of exchange time, weight in it

    def used_weight(self, peer: str, server_ms: int) -> int:
        """The IP's weight in the current minute of exchange time."""
        minute, used = self._used.get(peer, (0, 0))
        return used if minute == server_ms // 60_000 else 0

    def most_used_weight(self, server_ms: int) -> int:
        """The weight of the busiest IP."""
        return max((self.used_weight(peer, server_ms) for peer in self._used), default=0)

    def admit(self, peer: str, now_ms: int, server_ms: int, weight: int) -> Incident | None:
        """Count the request; the incident that refuses it, or None when it may pass."""
        used = self.used_weight(peer, server_ms) + weight
        self._used[peer] = (server_ms // 60_000, used)
        self.peak_used_weight = max(self.peak_used_weight, used)
        incident = self._current.get(peer)
        if incident is not None and now_ms < incident.until_ms:
            since_ms = now_ms - incident.started_ms
            incident.requests_ms.append(since_ms)
            if incident.fault == Fault.LIMITED_429 and since_ms >= self._timing.ban_after_ms:
                return self.start(peer, Fault.BANNED_418, now_ms)
            return incident
        if used > self.limit_per_minute:
            return self.start(peer, Fault.LIMITED_429, now_ms, 60_000 - server_ms % 60_000)
        return None

    def start(self, peer: str, fault: Fault, now_ms: int, duration_ms: int | None = None) -> Incident:
        """Refuse everything from the IP from now on for so long, by default as long as such incidents last."""
        duration_ms = self._timing.incident_ms(fault) if duration_ms is None else duration_ms
        incident = Incident(fault, peer, now_ms, duration_ms)
        self.incidents.append(incident)
        self._current[peer] = incident
        return incident

    def answer(self, incident: Incident, now_ms: int, skew_ms: int) -> Answer:
        """What the IP is told now; times in texts are exchange time."""
        answer = Fault(incident.fault).spec.answer or Answer(503)
        if answer.status == 429:
            text = f"Too many requests; current limit of IP({incident.peer}) is {self.limit_per_minute} per minute."
        elif answer.status == 418:
            until_ms = incident.until_ms + skew_ms
            text = (
                f"Way too many requests; IP({incident.peer}) banned until {until_ms}. Use the websocket to avoid bans."
            )
        else:
            return answer
        retry_after_s = max(1, -(-(incident.until_ms - now_ms) // 1_000))
        return Answer.error(-1003, text, answer.status, (("Retry-After", str(retry_after_s)),))
