"""One request played through the decisions: the answers that may come, and what a worker does about them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

from producer.message import Attempt, Call, OutcomeKind
from worker import decide
from worker.child import Child
from worker.classify import SILENCE, Failure, Means, OrderRef, Ref, Reply, classify
from worker.decide import Again, Case, Policy, Span, Stop
from worker.job import Rules

T0 = 1750485492076
ALGO_ID = 2146760
CLIENT_ID = "6B2I9XVcJpCjqPAJ4YoFX7"
CHILD_ID = "88937381063"
POLICY = Policy()
TOOK_MS = 50

Answer = Reply | Failure


def refusal(http: int, code: int, msg: str = "", retry_after_ms: int | None = None) -> Reply:
    """An error answer of the exchange."""
    return Reply(http, json.dumps({"code": code, "msg": msg}).encode(), retry_after_ms)


def state(status: str, created_ms: int | None = T0 - 60_000, child: str = "") -> Reply:
    """The answer to a query: the order in ``status``."""
    order = {
        "algoId": ALGO_ID,
        "clientAlgoId": CLIENT_ID,
        "symbol": "BNBUSDT",
        "algoStatus": status,
        "actualOrderId": child,
        "createTime": created_ms,
    }
    return Reply(200, json.dumps(order).encode())


OK = Reply(200, json.dumps({"algoId": ALGO_ID, "clientAlgoId": CLIENT_ID, "code": "200", "msg": "success"}).encode())
TIMEOUT = Failure(True, "ReadTimeout")
SILENT = Failure(True, SILENCE)
NO_CONNECTION = Failure(False, "ConnectionRefusedError")
GONE = refusal(400, -2011, "Unknown order sent.")
NOT_THERE = refusal(400, -2013, "Order does not exist.")
RACE = refusal(400, -4117, "Stop order is triggering")
BAD_KEY = refusal(401, -2015, "Invalid API-key, IP, or permissions for action.")
BAD_PARAM = refusal(400, -1102, "Mandatory parameter was not sent.")
OVERLOAD = refusal(503, -1008, "Request throttled by system-level protection.")
UNAVAILABLE = Reply(503, b"Service Unavailable.")
COME_BACK = Reply(503, b"Service Unavailable.", retry_after_ms=7_000)
REGION, NO_PATH, NO_METHOD = Reply(451, b"<html>"), Reply(404, b"<html>"), Reply(405, b"")
UNKNOWN_ERROR = refusal(503, -1000, "Unknown error, please check your request or try again later.")
GATEWAY = Reply(502, b"<html>502 Bad Gateway</html>")
LATE_CLOCK = refusal(400, -1021, "Timestamp for this request is outside of the recvWindow.")
ENGINE_CLOCK = refusal(400, -5028, "Timestamp for this request is outside of the ME recvWindow")
LIMITED = refusal(429, -1003, "Too many requests.", retry_after_ms=3_000)
FORBIDDEN = Reply(403, b"<html>403</html>")
CHALLENGE = Reply(202, b"", challenge=True)
NEW, CANCELED, TRIGGERING = state("NEW"), state("CANCELED"), state("TRIGGERING")
TRIGGERED, FINISHED = state("TRIGGERED", child=CHILD_ID), state("FINISHED", child=CHILD_ID)
EXPIRED, REJECTED, ODD = state("EXPIRED"), state("REJECTED"), state("PENDING_CANCEL")
NEWER = state("NEW", created_ms=T0 + 1)
#: Two clocks that are one and the same, and known to be.
SAME = Span(0, 0)


@dataclasses.dataclass
class Played:
    """What was done about one order, and how it ended."""

    calls: list[str] = dataclasses.field(default_factory=list)
    delays: list[int] = dataclasses.field(default_factory=list)
    history: list[Attempt] = dataclasses.field(default_factory=list)
    now_ms: int = T0
    stop: Stop = dataclasses.field(default_factory=lambda: Stop(OutcomeKind.UNKNOWN))

    @property
    def kind(self) -> str:
        """The outcome's kind."""
        return self.stop.kind.value


def play(
    answers: list[Answer],
    *,
    rules: Rules = decide,
    ref: Ref | None = None,
    by_client_id: bool = False,
    age_ms: int = 0,
    deadline_s: float = 300,
    roll: float = 0.5,
    before: Sequence[Attempt] = (),
    **known: Any,
) -> Played:
    """Work on one request until it stops; the last answer is repeated for as long as calls are made. ``known``: what
    else its :class:`Case` holds.

    As a worker does: an order that a query shows by client id is from then on asked for by its algo id.
    """
    enqueued_ms = T0 - age_ms
    case = Case(by_client_id, enqueued_ms, enqueued_ms + round(deadline_s * 1000), **{"ahead": SAME, **known})
    played = Played(history=list(before))
    ref = ref or (OrderRef(None, CLIENT_ID) if by_client_id else OrderRef(ALGO_ID))
    replies = itertools.chain(answers, itertools.repeat(answers[-1]))
    step = rules.first_step(case, before, T0)
    while isinstance(step, Again):
        assert len(played.calls) < 2000, "it does not end"
        played.calls.append(step.call.value)
        verdict = classify(step.call, ref, next(replies))
        said = (verdict.http, verdict.code, verdict.msg, verdict.means.value, TOOK_MS)
        played.history.append(Attempt(len(played.history) + 1, played.now_ms, step.call, *said))
        played.now_ms += TOOK_MS
        if isinstance(rules, Child):
            rules.learn(verdict)
        step = rules.next_step(case, played.history, verdict, played.now_ms, roll)
        if isinstance(step, Again):
            if verdict.order is not None:
                ref = OrderRef(verdict.order.algo_id)
                case = dataclasses.replace(case, by_client_id=False)
            played.delays.append(step.delay_ms)
            assert step.resync is (verdict.means is Means.CLOCK), "only a clock refusal asks for its measurement"
            played.now_ms += step.delay_ms
    played.stop = step
    return played


C, Q = "cancel", "query"


#: When a cancel that was under way for TOOK_MS can no longer be accepted, counted from its start.
WINDOW_MS = TOOK_MS + POLICY.recv_window_ms + 1_000
CASE = Case(by_client_id=False, meant_at_ms=T0, deadline_at_ms=T0 + 300_000)


def attempt(means: Means, call: Call | str = Call.CANCEL, at_ms: int = T0, n: int = 1) -> Attempt:
    """An attempt as the job hash keeps it."""
    return Attempt(n, at_ms, call, None, None, "", means.value, TOOK_MS)


#: So many attempts may be answered; one; few.
ANSWERED, ONE, FEW = Policy(max_attempts=25), Policy(max_attempts=1), Policy(max_attempts=2)
