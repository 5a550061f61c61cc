"""What a worker does about one order: answers in, calls and the outcome out."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import pytest

from producer.message import Attempt, Call, OutcomeKind
from worker.classify import SILENCE, Failure, Means, OrderRef, Reply, Verdict, classify
from worker.decide import (
    BLIND_CANCEL_MS,
    LAST_TRY_MS,
    Again,
    Case,
    Policy,
    Span,
    Stop,
    backoff_ms,
    call_for,
    counted,
    first_step,
    in_doubt,
    last_status,
    looks_up_a_silence,
    next_step,
)

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
    resyncs: list[bool] = dataclasses.field(default_factory=list)
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
    policy: Policy = POLICY,
    by_client_id: bool = False,
    age_ms: int = 0,
    deadline_s: float = 300,
    roll: float = 0.5,
    ahead: Span | None = SAME,
) -> Played:
    """Work on one request until it stops; the last answer is repeated for as long as calls are made.

    As a worker does: an order that a query shows by client id is from then on asked for by its algo id.
    """
    enqueued_ms = T0 - age_ms
    case = Case(by_client_id, enqueued_ms, enqueued_ms + int(deadline_s * 1000), ahead)
    played = Played()
    ref = OrderRef(None, CLIENT_ID) if by_client_id else OrderRef(ALGO_ID)
    replies = itertools.chain(answers, itertools.repeat(answers[-1]))
    step = first_step(case, (), policy, T0)
    while isinstance(step, Again):
        assert len(played.calls) < 2000, "it does not end"
        played.calls.append(step.call.value)
        verdict = classify(step.call, ref, next(replies))
        if verdict.order is not None:
            ref = OrderRef(verdict.order.algo_id)
        n, at_ms = len(played.calls), played.now_ms
        played.history.append(
            Attempt(n, at_ms, step.call, verdict.http, verdict.code, verdict.msg, verdict.means.value, TOOK_MS)
        )
        played.now_ms += TOOK_MS
        step = next_step(case, played.history, verdict, policy, played.now_ms, roll)
        if isinstance(step, Again):
            case = dataclasses.replace(case, by_client_id=ref.algo_id is None)
            played.delays.append(step.delay_ms)
            played.resyncs.append(step.resync)
            played.now_ms += step.delay_ms
    played.stop = step
    return played


C, Q = "cancel", "query"

#: words, answers, calls made, outcome's kind. Enqueued just now, by algo id, with the default bounds.
PROCEDURE: list[tuple[str, list[Answer], list[str], str]] = [
    # the cancel is confirmed
    ("confirmed", [OK], [C], "cancelled"),
    ("no connection, then confirmed", [NO_CONNECTION, OK], [C, C], "cancelled"),
    ("overload, then confirmed", [OVERLOAD, UNAVAILABLE, OK], [C, C, C], "cancelled"),
    ("429, then confirmed", [LIMITED, OK], [C, C], "cancelled"),
    ("late clock, then confirmed", [LATE_CLOCK, ENGINE_CLOCK, OK], [C, C, C], "cancelled"),
    # an unclear cancel is read before anything else
    ("timeout, query CANCELED", [TIMEOUT, CANCELED], [C, Q], "cancelled"),
    ("502, query CANCELED", [GATEWAY, CANCELED], [C, Q], "cancelled"),
    ("503 unknown error, query CANCELED", [UNKNOWN_ERROR, CANCELED], [C, Q], "cancelled"),
    ("timeout, query NEW, confirmed", [TIMEOUT, NEW, OK], [C, Q, C], "cancelled"),
    ("timeout, query NEW, -2011, CANCELED", [TIMEOUT, NEW, GONE, CANCELED], [C, Q, C, Q], "cancelled"),
    ("timeout, query times out, CANCELED", [TIMEOUT, TIMEOUT, CANCELED], [C, Q, Q], "cancelled"),
    ("timeout, query overloaded, CANCELED", [TIMEOUT, OVERLOAD, CANCELED], [C, Q, Q], "cancelled"),
    ("timeout, query not sent, CANCELED", [TIMEOUT, NO_CONNECTION, CANCELED], [C, Q, Q], "cancelled"),
    ("timeout, query 429, CANCELED", [TIMEOUT, LIMITED, CANCELED], [C, Q, Q], "cancelled"),
    ("timeout, query late clock, CANCELED", [TIMEOUT, LATE_CLOCK, CANCELED], [C, Q, Q], "cancelled"),
    ("-2011, query times out, CANCELED", [GONE, TIMEOUT, CANCELED], [C, Q, Q], "already_cancelled"),
    ("timeout, query TRIGGERED", [TIMEOUT, TRIGGERED], [C, Q], "triggered"),
    ("timeout, query EXPIRED", [TIMEOUT, EXPIRED], [C, Q], "expired"),
    # "unknown order" alone decides nothing
    ("-2011, query CANCELED", [GONE, CANCELED], [C, Q], "already_cancelled"),
    ("-2011, query NEW, confirmed", [GONE, NEW, OK], [C, Q, C], "cancelled"),
    ("-2011, query TRIGGERED", [GONE, TRIGGERED], [C, Q], "triggered"),
    ("-2011, query FINISHED", [GONE, FINISHED], [C, Q], "triggered"),
    ("-2011, query EXPIRED", [GONE, EXPIRED], [C, Q], "expired"),
    ("-2011, query REJECTED", [GONE, REJECTED], [C, Q], "rejected"),
    ("-2013 to the cancel, query CANCELED", [NOT_THERE, CANCELED], [C, Q], "already_cancelled"),
    ("-2011, -2013 at first, then CANCELED", [GONE, NOT_THERE, NOT_THERE, CANCELED], [C, Q, Q, Q], "already_cancelled"),
    ("-2011, -2013 at first, then NEW", [GONE, NOT_THERE, NEW, OK], [C, Q, Q, C], "cancelled"),
    ("maintenance, then confirmed", [refusal(400, -2011, "Rest API trading is not enabled."), OK], [C, C], "cancelled"),
    # the trigger's few milliseconds
    ("-2011, TRIGGERING, TRIGGERED", [GONE, TRIGGERING, TRIGGERING, TRIGGERED], [C, Q, Q, Q], "triggered"),
    ("-4117, TRIGGERED", [RACE, TRIGGERED], [C, Q], "triggered"),
    ("-4117, NEW again, confirmed", [RACE, NEW, OK], [C, Q, C], "cancelled"),
    ("TRIGGERING, then REJECTED", [RACE, TRIGGERING, REJECTED], [C, Q, Q], "rejected"),
    ("a state of the future, then CANCELED", [GONE, ODD, CANCELED], [C, Q, Q], "already_cancelled"),
    # refusals that repeating cannot change
    ("bad key", [BAD_KEY], [C], "refused"),
    ("bad parameter", [BAD_PARAM], [C], "refused"),
    ("451, then confirmed", [REGION, REGION, OK], [C, C, C], "cancelled"),
    ("404 and 405 of an edge, then confirmed", [NO_PATH, NO_METHOD, OK], [C, C, C], "cancelled"),
    ("timeout, query 404 and 451, CANCELED", [TIMEOUT, NO_PATH, REGION, CANCELED], [C, Q, Q, Q], "cancelled"),
    ("overload, then bad key", [OVERLOAD, BAD_KEY], [C, C], "refused"),
    ("-2011, query refused", [GONE, BAD_KEY], [C, Q], "refused"),
    ("timeout, query refused", [TIMEOUT, BAD_KEY], [C, Q], "unknown"),
    ("timeout, NEW at once, refused", [TIMEOUT, NEW, BAD_KEY], [C, Q, C], "unknown"),
    # silence is a doubt, but not for good: what is said when it cannot strike any more is believed
    ("silence, query CANCELED", [SILENT, CANCELED], [C, Q], "cancelled"),
    ("silence, query silent, NEW, confirmed", [SILENT, SILENT, NEW, OK], [C, Q, Q, C], "cancelled"),
    ("silence, query refused, and refused later", [SILENT, BAD_KEY], [C, Q, Q], "refused"),
    ("silence, query refused, CANCELED later", [SILENT, BAD_KEY, CANCELED], [C, Q, Q], "cancelled"),
    ("silence, NEW at once, refused", [SILENT, NEW, BAD_KEY], [C, Q, C, Q], "refused"),
    ("silence and a timeout, refused", [SILENT, NEW, TIMEOUT, BAD_KEY], [C, Q, C, Q], "unknown"),
]


@pytest.mark.parametrize(("answers", "calls", "kind"), [p[1:] for p in PROCEDURE], ids=[p[0] for p in PROCEDURE])
def test_the_procedure(answers: list[Answer], calls: list[str], kind: str) -> None:
    """Each list of answers leads through these calls to this outcome."""
    played = play(answers)
    assert played.calls == calls
    assert played.kind == kind


#: So many attempts may be answered; one; few; few within a day.
ANSWERED, ONE, FEW = Policy(max_attempts=25), Policy(max_attempts=1), Policy(max_attempts=2)
LONG = {"policy": FEW, "deadline_s": 86_400}
#: words, answers, how it is played, calls made or their number, outcome's kind.
BOUNDS: list[tuple[str, list[Answer], dict[str, Any], list[str] | int, str]] = [
    ("overdue", [OK], {"age_ms": 300_000}, [], "overdue"),
    ("a moment before the deadline it is still sent", [OK], {"age_ms": 299_999}, [C], "cancelled"),
    ("stuck TRIGGERING", [RACE, TRIGGERING], {"policy": ANSWERED}, 25, "gave_up"),
    ("stuck TRIGGERING until the deadline", [RACE, TRIGGERING], {"deadline_s": 5, "roll": 0.99}, 10, "gave_up"),
    ("stuck TRIGGERING after a timeout", [TIMEOUT, TRIGGERING], {"policy": ANSWERED}, 25, "unknown"),
    ("a state of the future for ever", [GONE, ODD], {"policy": ANSWERED}, 25, "gave_up"),
    ("no connection until the deadline", [NO_CONNECTION], {"deadline_s": 2}, 6, "gave_up"),
    *[
        (f"{name} for an hour", [answer], {"policy": FEW, "deadline_s": 3_600}, 484, "gave_up")
        for name, answer in (("no connection", NO_CONNECTION), ("overload", OVERLOAD), ("404", NO_PATH))
    ],
    ("clock refusals for an hour", [LATE_CLOCK], {"policy": FEW, "deadline_s": 3_600}, 484, "gave_up"),
    ("451 until the deadline", [REGION], {"policy": FEW, "deadline_s": 10}, [C] * 10, "gave_up"),
    ("no connection for hours, then confirmed", [*[NO_CONNECTION] * 900, OK], LONG, 901, "cancelled"),
    ("overload for hours, then gone", [*[OVERLOAD] * 900, GONE, CANCELED], LONG, 902, "already_cancelled"),
    ("429 until the deadline", [LIMITED], {"deadline_s": 10}, [C] * 4, "gave_up"),
    ("403, longer than the deadline", [FORBIDDEN], {}, [C], "gave_up"),
    ("403 and a challenge, then confirmed", [FORBIDDEN, CHALLENGE, OK], {"deadline_s": 900}, [C, C, C], "cancelled"),
    ("-2011 and NEW for ever", [GONE, NEW] * 30, {"policy": ANSWERED}, 24, "gave_up"),
    ("timeout and NEW at once for ever", [TIMEOUT, NEW] * 30, {"policy": ANSWERED, "roll": 0.01}, 24, "unknown"),
    ("timeouts for ever", [TIMEOUT], {"policy": ANSWERED}, 25, "unknown"),
    ("no answer until the default deadline", [TIMEOUT], {"roll": 0.9}, 30, "unknown"),
    ("one attempt allowed, overload, confirmed", [OVERLOAD, OVERLOAD, OK], {"policy": ONE}, [C] * 3, "cancelled"),
    ("one attempt allowed, timeout", [TIMEOUT], {"policy": ONE}, [C], "unknown"),
    (
        "two allowed: the last is a query's",
        [TIMEOUT, CANCELED],
        {"policy": Policy(max_attempts=2)},
        [C, Q],
        "cancelled",
    ),
    ("silence, refused, the deadline within its window", [SILENT, BAD_KEY], {"deadline_s": 3}, [C, Q, Q], "unknown"),
    ("two allowed: no second cancel", [GONE, NEW, OK], {"policy": Policy(max_attempts=2)}, [C, Q], "gave_up"),
    ("three allowed: none after NEW", [TIMEOUT, NEW, OK], {"policy": Policy(max_attempts=3)}, [C, Q], "unknown"),
]


@pytest.mark.parametrize(("answers", "how", "calls", "kind"), [b[1:] for b in BOUNDS], ids=[b[0] for b in BOUNDS])
def test_the_bounds(answers: list[Answer], how: dict[str, Any], calls: list[str] | int, kind: str) -> None:
    """Attempts and time are both bounded, and the kind says whether a cancel may have worked."""
    played = play(answers, **how)
    assert (played.calls if isinstance(calls, list) else len(played.calls)) == calls
    assert played.kind == kind


# ---- not found ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "kind"), [(GONE, "not_found"), (TIMEOUT, "unknown"), (NOT_THERE, "not_found"), (SILENT, "not_found")]
)
@pytest.mark.parametrize("roll", [0.01, 0.5, 0.99])
def test_no_such_order_is_believed_at_the_horizon(first: Answer, kind: str, roll: float) -> None:
    """It is asked again until the horizon, and then cancelled once more and asked; a doubt before makes it unknown."""
    played = play([first, NOT_THERE], roll=roll)
    assert played.kind == kind
    since_ms = next(a.at_ms for a in played.history if a.verdict == "no_such_order")
    *_, before, last_word, last_look = played.history
    assert before.at_ms <= since_ms + POLICY.not_found_horizon_ms <= last_word.at_ms <= last_look.at_ms
    assert played.calls == [C] + [Q] * (len(played.calls) - 3) + [C, Q]
    assert "no such order" not in (played.stop.error or "")
    assert "400 -2013 Order does not exist." in (played.stop.error or "")


def test_no_such_order_is_not_believed_while_a_silent_cancel_may_strike() -> None:
    """With a short horizon it is asked until the window of the silent cancel has closed, and once more."""
    played = play([SILENT, NOT_THERE], policy=Policy(not_found_horizon_ms=0), roll=0.9)
    assert played.kind == "not_found"
    assert played.history[-1].at_ms >= T0 + WINDOW_MS


def test_asking_for_a_lost_order_costs_no_attempts() -> None:
    """A long horizon does not run into the bound on attempts."""
    played = play([GONE, NOT_THERE], policy=Policy(max_attempts=3, not_found_horizon_ms=200_000), roll=0.1)
    assert len(played.calls) > 20
    assert played.kind == "not_found"


def test_seeing_the_order_starts_the_horizon_anew() -> None:
    """An order that showed itself in between was not unknown for the whole horizon."""
    policy = Policy(not_found_horizon_ms=2_000)
    lost = play([GONE, *[NOT_THERE] * 3, ODD, NOT_THERE], policy=policy, roll=0.5)
    seen_at = [a.at_ms for a in lost.history if a.verdict == "odd_status"]
    assert seen_at
    assert lost.kind == "not_found"
    assert lost.now_ms >= seen_at[0] + 2_000
    assert lost.stop.order_status == "PENDING_CANCEL"


def test_a_cancels_word_alone_is_never_believed() -> None:
    """Even with no horizon at all, "unknown order" from a cancel is checked by a query, a cancel, and a query."""
    played = play([GONE, NOT_THERE], policy=Policy(not_found_horizon_ms=0))
    assert played.calls == [C, Q, C, Q]
    assert played.kind == "not_found"


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        ([OK], "cancelled"),
        ([OVERLOAD, REGION, LATE_CLOCK, OK], "cancelled"),
        ([TIMEOUT, CANCELED], "cancelled"),
        ([GONE, NEW, OK], "cancelled"),
        ([GONE, TRIGGERED], "triggered"),
        ([TIMEOUT, NOT_THERE], "unknown"),
        ([BAD_KEY], "refused"),
    ],
)
def test_a_late_book_is_asked_once_more_before_it_is_believed(answers: list[Answer], kind: str) -> None:
    """Where cancel and queries have missed the order until the horizon, a second cancel has the last word."""
    missed = [GONE, NOT_THERE, NOT_THERE]
    played = play([*missed, *answers], policy=Policy(not_found_horizon_ms=600), roll=0.9)
    assert played.calls[:4] == [C, Q, Q, C]
    assert played.kind == kind
    assert played.calls[4:] == [Q if answer in (NEW, CANCELED, TRIGGERED, NOT_THERE) else C for answer in answers[1:]]


def test_an_unknown_client_id_is_not_cancelled_again() -> None:
    """A request by client id alone has no last word: by then the id may mean another order."""
    played = play([NOT_THERE], by_client_id=True, age_ms=5_000)
    assert (set(played.calls), played.kind) == ({Q}, "not_found")


def test_where_no_attempt_is_left_the_order_is_believed_to_be_gone() -> None:
    """A bound on attempts that leaves no room for the last word makes no failure of what queries have told."""
    played = play([GONE, NOT_THERE], policy=Policy(max_attempts=2))
    assert (played.calls.count(C), played.kind) == (1, "not_found")


@pytest.mark.parametrize("seen", [Means.OPEN, Means.TRIGGERING, Means.ODD_STATUS])
def test_the_horizon_is_counted_from_when_the_order_was_last_seen(seen: Means) -> None:
    """Not a millisecond before the horizon is it believed, and a state in between starts the horizon anew."""
    lost_ms = T0 + 9_000
    history = [
        attempt(Means.NO_SUCH_ORDER),
        attempt(Means.NO_SUCH_ORDER, Call.QUERY, T0 + 50),
        attempt(seen, Call.QUERY, T0 + 8_000),
        attempt(Means.NO_SUCH_ORDER, Call.QUERY, lost_ms),
        attempt(Means.NO_SUCH_ORDER, Call.QUERY, lost_ms + 8_000),
    ]
    verdict = classify(Call.QUERY, OrderRef(ALGO_ID), NOT_THERE)
    assert next_step(CASE, history[:-1], verdict, POLICY, lost_ms + 500, 0.5) == Again(Call.QUERY, 400)
    early = next_step(CASE, history, verdict, POLICY, lost_ms + 9_999, 0.999)
    assert early == Again(Call.CANCEL, 1)
    assert next_step(CASE, history, verdict, POLICY, lost_ms + 10_000, 0.999) == Again(Call.CANCEL)
    asked = [attempt(Means.NO_SUCH_ORDER, at_ms=lost_ms + 10_000), attempt(Means.NO_SUCH_ORDER, Call.QUERY, lost_ms)]
    stop = next_step(CASE, [*history, *asked], verdict, POLICY, lost_ms + 10_050, 0.999)
    assert isinstance(stop, Stop)
    assert stop.kind == "not_found"


def test_the_deadline_comes_before_the_horizon() -> None:
    """A request that is no longer wanted is not asked about until a longer horizon ends."""
    played = play([GONE, NOT_THERE], deadline_s=4)
    assert played.kind == "gave_up"
    assert played.now_ms < T0 + 4_000 + TOOK_MS


# ---- by client id alone ---------------------------------------------------------------------------------------------


def test_a_fresh_client_id_is_cancelled_at_once() -> None:
    """Up to a tenth of a second after the request the id cannot have been reused: no look-up delays the cancel."""
    played = play([OK], by_client_id=True, age_ms=BLIND_CANCEL_MS)
    assert (played.calls, played.kind) == ([C], "cancelled")


def test_an_old_client_id_is_resolved_first_and_cancelled_by_algo_id() -> None:
    """Later than that the id may be another order's: it is looked up, and that very order is cancelled."""
    played = play([NEW, OK], by_client_id=True, age_ms=BLIND_CANCEL_MS + 1)
    assert (played.calls, played.kind) == ([Q, C], "cancelled")
    assert played.delays == [0]


@pytest.mark.parametrize(
    "first",
    [TIMEOUT, GONE, OVERLOAD, NO_CONNECTION, LATE_CLOCK, LIMITED, RACE],
    ids=["unclear", "unknown order", "overload", "not sent", "clock", "limited", "triggering"],
)
def test_a_second_cancel_is_never_sent_by_client_id(first: Answer) -> None:
    """Whatever the first answer was and however soon it came, the order is looked up and then cancelled by algo id."""
    played = play([first, NEW, OK], by_client_id=True, roll=0.0)
    assert (played.calls, played.kind) == ([C, Q, C], "cancelled")


def test_a_retry_is_looked_up_first() -> None:
    """What an earlier run sent may have freed the client id, however soon the retry came."""
    case = Case(by_client_id=True, meant_at_ms=T0, deadline_at_ms=T0 + 300_000, retried=True)
    assert first_step(case, (), POLICY, T0 + 1) == Again(Call.QUERY)
    assert first_step(dataclasses.replace(case, retried=False), (), POLICY, T0 + 1) == Again(Call.CANCEL)
    assert first_step(dataclasses.replace(case, by_client_id=False), (), POLICY, T0 + 1) == Again(Call.CANCEL)


def test_a_clock_that_was_set_back_makes_nothing_fresh() -> None:
    """A request that seems to come from the future may be of any age: it is looked up."""
    case = Case(by_client_id=True, meant_at_ms=T0, deadline_at_ms=T0 + 300_000)
    assert first_step(case, (), POLICY, T0 - 1) == Again(Call.QUERY)
    assert first_step(case, (), POLICY, T0) == Again(Call.CANCEL)


def test_a_step_that_had_to_wait_is_decided_anew() -> None:
    """A blind cancel that could not be sent at once is a look-up when it can be."""
    case = Case(by_client_id=True, meant_at_ms=T0, deadline_at_ms=T0 + 300_000)
    assert [first_step(case, (), POLICY, T0 + ms) for ms in (100, 101)] == [Again(Call.CANCEL), Again(Call.QUERY)]


@pytest.mark.parametrize("before", [[TIMEOUT], [GONE], [NO_CONNECTION]])
def test_a_newer_order_under_the_client_id_is_left_alone(before: list[Answer]) -> None:
    """An order created after the request was never meant: no cancel is sent to it."""
    played = play([*before, NEWER], by_client_id=True, roll=0.999, policy=Policy(backoff_base_ms=5_000))
    assert (played.calls, played.kind) == ([C, Q], "unknown")
    assert played.stop.error == "the client id belongs to an order created after the request: left alone"


@pytest.mark.parametrize("answer", [state(s, created_ms=T0 + 60_000) for s in ("NEW", "CANCELED", "TRIGGERED")])
def test_no_state_of_a_newer_order_is_reported_as_ours(answer: Reply) -> None:
    """That a newer order was cancelled says nothing about the one that was meant."""
    played = play([answer], by_client_id=True, age_ms=5_000)
    assert (played.calls, played.kind) == ([Q], "unknown")


#: Offset of Redis' clock to the exchange's, the order's age at the request, and what is made of it.
AGES: list[tuple[str, Span | None, int | None, str]] = [
    ("clocks alike, created before", SAME, 1, "cancelled"),
    ("clocks alike, created in the same millisecond", SAME, 0, "cancelled"),
    ("clocks alike, created after", SAME, -1, "an order created after the request"),
    ("known to 20 ms, clearly before", Span(-10, 10), 10, "cancelled"),
    ("known to 20 ms, perhaps after", Span(-10, 10), 9, "the clocks are known to 20 ms"),
    ("known to 20 ms, perhaps before", Span(-10, 10), -10, "the clocks are known to 20 ms"),
    ("known to 20 ms, clearly after", Span(-10, 10), -11, "an order created after the request"),
    ("Redis 5 s ahead, created before", Span(4_990, 5_010), 5_010, "cancelled"),
    ("Redis 5 s ahead, perhaps after", Span(4_990, 5_010), 5_009, "the clocks are known to 20 ms"),
    ("Redis 5 s ahead, created after", Span(4_990, 5_010), 4_989, "an order created after the request"),
    ("Redis 5 s behind, created before", Span(-5_010, -4_990), -4_990, "cancelled"),
    ("Redis 5 s behind, perhaps after", Span(-5_010, -4_990), -4_991, "the clocks are known to 20 ms"),
    ("Redis 5 s behind, created after", Span(-5_010, -4_990), -5_011, "an order created after the request"),
    ("not measured, created long before", None, 60_000, "the clocks are not measured"),
    ("not measured, seems created after", None, -60_000, "the clocks are not measured"),
    ("no time of creation", SAME, None, "it has no time of creation"),
]


@pytest.mark.parametrize(("ahead", "older_ms", "made"), [row[1:] for row in AGES], ids=[row[0] for row in AGES])
def test_only_an_order_from_before_the_request_is_hit(ahead: Span | None, older_ms: int | None, made: str) -> None:
    """An order found by client id is cancelled if it is proven to be older, else left alone with a reason."""
    meant_ms = T0 - 5_000
    created_ms = None if older_ms is None else meant_ms - older_ms
    played = play([state("NEW", created_ms), OK], by_client_id=True, age_ms=5_000, ahead=ahead)
    if made == "cancelled":
        assert (played.calls, played.kind) == ([Q, C], "cancelled")
    else:
        assert (played.calls, played.kind) == ([Q], "unknown")
        assert made in (played.stop.error or "")
        assert (played.stop.error or "").endswith(": left alone")


def _at_the_exchange(shift_ms: int) -> list[list[Answer]]:
    """Conversations as an exchange has them whose clock is ahead of Redis' by ``shift_ms``."""
    old, young = state("NEW", T0 - 60_000 + shift_ms), state("NEW", T0 + 300 + shift_ms)
    return [
        [OK],
        [GONE, old, OK],
        [TIMEOUT, old, OK],
        [TIMEOUT, young],
        [OVERLOAD, state("CANCELED", T0 - 60_000 + shift_ms)],
        [refusal(418, -1003, f"banned until {T0 + 130_000 + shift_ms}."), old, OK],
    ]


@pytest.mark.parametrize("by_client_id", [True, False])
@pytest.mark.parametrize("shift_ms", [-5_000, 5_000, 3_600_000])
def test_a_wrong_clock_of_the_exchange_changes_nothing(shift_ms: int, by_client_id: bool) -> None:
    """Seconds or an hour ahead or behind: while the offset is known, every call, delay and end is the same."""
    there = _at_the_exchange(shift_ms)
    for shifted, straight in zip(there, _at_the_exchange(0), strict=True):
        away = play(shifted, by_client_id=by_client_id, ahead=Span(-shift_ms, -shift_ms))
        here = play(straight, by_client_id=by_client_id)
        assert (away.calls, away.delays, away.stop) == (here.calls, here.delays, here.stop)


def test_a_tried_client_id_is_resolved_even_while_fresh() -> None:
    """An unclear cancel may have freed the client id within the first moments already, and a look-up tells its age."""
    case = Case(by_client_id=True, meant_at_ms=T0, deadline_at_ms=T0 + 300_000)
    history = [attempt(Means.UNCLEAR), attempt(Means.OPEN, Call.QUERY, T0 + 50)]
    for tried in (history, history[:1], history[1:]):
        assert first_step(case, tried, POLICY, T0 + 60) == Again(Call.QUERY)


def test_the_last_attempt_resolves_a_client_id_that_grew_old() -> None:
    """The attempt that is kept for a query is used where the backoff makes the next call a query."""
    played = play([OVERLOAD, CANCELED], by_client_id=True, policy=Policy(max_attempts=2, backoff_base_ms=4_000))
    assert (played.calls, played.kind) == ([C, Q], "already_cancelled")


def test_a_look_up_that_is_refused_is_backed_off() -> None:
    """Before the first cancel too, an overloaded exchange is not asked in a tight loop."""
    assert play([OVERLOAD, NEW, OK], by_client_id=True, age_ms=5_000, roll=0.5).delays == [50, 0]


def test_by_algo_id_the_time_of_creation_is_not_asked() -> None:
    """An algo id is never reused, so an order by algo id is ours whatever its time says."""
    assert play([GONE, NEWER, OK]).kind == "cancelled"


def test_coming_back_unpinned_it_is_looked_up_again() -> None:
    """A worker that knows only the client id of an old request asks, even where another one saw the order open."""
    case = Case(by_client_id=True, meant_at_ms=T0, deadline_at_ms=T0 + 300_000)
    assert first_step(case, [attempt(Means.OPEN, Call.QUERY)], POLICY, T0 + 2_000) == Again(Call.QUERY)
    assert first_step(case, [attempt(Means.BUSY)], POLICY, T0 + 2_000) == Again(Call.QUERY)


# ---- delays ---------------------------------------------------------------------------------------------------------


def test_clock_refusals_are_answered_at_once_three_times_in_a_row() -> None:
    """A fresh clock and signature come at once; from the fourth refusal on it backs off."""
    played = play([LATE_CLOCK, LATE_CLOCK, ENGINE_CLOCK, LATE_CLOCK, OK], roll=0.5)
    assert played.kind == "cancelled"
    assert played.delays == [0, 0, 0, 400]
    assert played.resyncs == [True] * 4
    assert [counted(played.history[:n]) for n in range(6)] == [0, 0, 0, 0, 0, 1]


def test_only_a_clock_refusal_asks_for_a_resync() -> None:
    """No other answer makes the next call wait for a measurement of the clock."""
    assert play([OVERLOAD, NO_CONNECTION, TIMEOUT, NEW, OK]).resyncs == [False] * 4


@pytest.mark.parametrize(
    ("answer", "delay_ms"),
    [
        (LIMITED, 3_000),
        (refusal(429, -1003), 10_000),
        (refusal(418, -1003), 120_000),
        (refusal(418, -1003, f"IP banned until {T0 + TOOK_MS + 7_000}."), 7_000),
        (refusal(418, -1003, f"IP banned until {T0 + TOOK_MS + 7_000}.", 9_000), 9_000),
        (FORBIDDEN, 20_000),
        (CHALLENGE, 20_000),
        (REGION, 1_000),
    ],
    ids=["Retry-After", "429", "418", "ban epoch", "the later of both", "403", "challenge", "451"],
)
def test_a_closed_gate_costs_time_and_no_attempt(answer: Reply, delay_ms: int) -> None:
    """The delay is the pause that the exchange asked for, or the policy's; the attempt is not counted."""
    played = play([answer, OK], policy=Policy(waf_pause_ms=20_000, max_attempts=1))
    assert played.delays == [delay_ms]
    assert counted(played.history[:1]) == 0
    assert played.kind == "cancelled"


def test_a_pause_beyond_the_deadline_ends_the_request_now() -> None:
    """Nothing is sent into a closed gate: a request whose deadline lies within the pause stops at once."""
    played = play([FORBIDDEN], policy=Policy(waf_pause_ms=300_000), deadline_s=300)
    assert played.now_ms == T0 + TOOK_MS
    assert played.stop.error == "the deadline comes before the next try; last: blocked <html>403</html>"


@pytest.mark.parametrize("answer", [COME_BACK, Reply(502, b"<html>", 7_000), Reply(404, b"", 7_000)])
def test_a_server_that_names_a_time_is_left_alone_until_then(answer: Reply) -> None:
    """Retry-After of a 503, or of any answer that closes no gate, holds for the order's next call."""
    for before in ([], [TIMEOUT]):
        assert play([*before, answer, NEW, OK], roll=0.0).delays[len(before)] == 7_000


def test_a_time_beyond_the_deadline_leaves_a_last_try() -> None:
    """A maintenance that is announced for longer than the deadline may end sooner: the cancel is tried once more."""
    played = play([COME_BACK, OK], deadline_s=5)
    assert (played.kind, played.delays) == ("cancelled", [5_000 - TOOK_MS - LAST_TRY_MS])


@pytest.mark.parametrize("first", [TIMEOUT, GONE, GATEWAY])
def test_the_first_query_does_not_wait(first: Answer) -> None:
    """What became of an unclear or refused cancel is asked at once."""
    assert play([first, CANCELED]).delays == [0]


@pytest.mark.parametrize(("roll", "delays"), [(0.0, [0, 15] * 2 + [0, 0]), (0.999, [19, 29] * 2 + [0, 3_196])])
def test_silence_is_followed_by_short_pauses_at_first(roll: float, delays: list[int]) -> None:
    """The look-up is spread by chance, an open order gets a moment; where silence goes on, a backoff is added."""
    assert play([SILENT, NEW, SILENT, NEW, SILENT, NEW, OK], roll=roll).delays == delays


def test_a_silence_is_told_from_an_answer_that_leaves_it_open() -> None:
    """Only what is asked because nothing came back is a look-up that waits its turn."""
    silent = dataclasses.replace(attempt(Means.UNCLEAR), msg=SILENCE)
    assert [looks_up_a_silence(history) for history in ([], [attempt(Means.UNCLEAR)], [silent])] == [False, False, True]


def test_an_id_is_free_only_when_no_cancel_by_it_may_strike() -> None:
    """A state that frees the client id is asked for once more then, and is the outcome; ours is ours all the same."""
    case = dataclasses.replace(CASE, strikes_until_ms=T0 + 900)
    for means, call, kind in (
        (Means.CONFIRMED, Call.CANCEL, "cancelled"),
        (Means.CANCELED, Call.QUERY, "cancelled"),
        (Means.TRIGGERED, Call.QUERY, "triggered"),
        (Means.EXPIRED, Call.QUERY, "expired"),
        (Means.REJECTED, Call.QUERY, "rejected"),
    ):
        history = [attempt(Means.UNCLEAR), attempt(means, call, T0 + 100, 2)]
        step = next_step(case, history, Verdict(means), POLICY, T0 + 150, 0.5)
        assert step == Again(Call.QUERY, 750)
        stop = next_step(case, history, Verdict(means), POLICY, T0 + 900, 0.5)
        assert isinstance(stop, Stop)
        assert stop.kind == kind
    settled = [attempt(Means.NO_SUCH_ORDER), attempt(Means.CONFIRMED, n=2), attempt(Means.CANCELED, Call.QUERY, n=3)]
    stop = next_step(CASE, settled, Verdict(Means.CANCELED), POLICY, T0 + 900, 0.5)
    assert isinstance(stop, Stop)
    assert stop.kind == "cancelled"


def test_an_open_order_is_cancelled_again_after_a_backoff() -> None:
    """A cancel that was refused although the order is open is not repeated in a tight loop."""
    played = play([GONE, NEW, GONE, NEW, OK], roll=0.5)
    assert played.delays == [0, 100, 0, 400]


@pytest.mark.parametrize("roll", [0.0, 0.999])
def test_a_triggering_order_is_polled_fast_then_slower(roll: float) -> None:
    """A trigger takes about ten milliseconds; one that takes longer is asked about ever less often, up to the cap."""
    policy = Policy(max_attempts=40, backoff_cap_ms=1_000)
    played = play([RACE, TRIGGERING], roll=roll, policy=policy, deadline_s=3600)
    most = [10, 20, 40, 80, 160, 320, 640, *[1_000] * 32]
    assert played.delays == [int(full * (0.5 + roll / 2)) for full in most]


def test_backoff_doubles_up_to_its_cap_with_full_jitter() -> None:
    """The delay is uniform from nothing to a doubling ceiling, so that workers do not strike together."""
    policy = Policy(backoff_base_ms=100, backoff_cap_ms=1_000)
    assert [backoff_ms(n, policy, 0.999) for n in (1, 2, 3, 4, 5, 60, 10_000)] == [99, 199, 399, 799, 999, 999, 999]
    assert [backoff_ms(n, policy, 0.0) for n in (1, 5, 60)] == [0, 0, 0]


def test_the_last_try_comes_before_the_deadline() -> None:
    """A backoff that would end past the deadline is cut, so that there is time for one more answer."""
    policy = Policy(backoff_base_ms=60_000, backoff_cap_ms=60_000)
    played = play([OVERLOAD, OK], policy=policy, deadline_s=10, roll=0.9)
    assert played.kind == "cancelled"
    assert played.history[-1].at_ms == T0 + 10_000 - LAST_TRY_MS


@pytest.mark.parametrize(("left_ms", "goes_on"), [(3_001, True), (3_000, False), (2_999, False)])
def test_a_pause_must_end_before_the_deadline(left_ms: int, goes_on: bool) -> None:
    """A pause that ends just when the deadline comes leaves no time to send anything."""
    case = Case(by_client_id=False, meant_at_ms=T0, deadline_at_ms=T0 + left_ms)
    verdict = classify(Call.CANCEL, OrderRef(ALGO_ID), LIMITED)
    step = next_step(case, [attempt(Means.LIMITED)], verdict, POLICY, T0, 0.5)
    assert isinstance(step, Again) is goes_on


@pytest.mark.parametrize(("left_ms", "delay_ms"), [(1_500, 500), (1_001, 1), (1_000, None), (1, None)])
def test_there_is_a_last_try_only_with_time_for_its_answer(left_ms: int, delay_ms: int | None) -> None:
    """The last try starts a second before the deadline; a request with less than that left is over."""
    case = Case(by_client_id=False, meant_at_ms=T0, deadline_at_ms=T0 + left_ms)
    verdict = classify(Call.CANCEL, OrderRef(ALGO_ID), OVERLOAD)
    policy = Policy(backoff_base_ms=60_000, backoff_cap_ms=60_000)
    step = next_step(case, [attempt(Means.BUSY)], verdict, policy, T0, 0.5)
    assert (step.delay_ms if isinstance(step, Again) else None) == delay_ms


def test_the_defaults_are_the_documented_ones() -> None:
    """Who sets nothing gets the documented bounds."""
    assert dataclasses.astuple(Policy()) == (200, 100, 15_000, 10_000, 5_000, 300_000)
    assert (BLIND_CANCEL_MS, LAST_TRY_MS) == (100, 1_000)


def test_after_the_last_try_it_gives_up() -> None:
    """The last try is one: what follows is the outcome, before the deadline."""
    policy = Policy(backoff_base_ms=60_000, backoff_cap_ms=60_000)
    played = play([OVERLOAD], policy=policy, deadline_s=10, roll=0.9)
    assert played.calls == [C, C]
    assert played.now_ms < T0 + 10_000
    assert played.stop.error == (
        "the deadline comes before the next try; last: busy Request throttled by system-level protection."
    )


# ---- coming back to a request ---------------------------------------------------------------------------------------

CASE = Case(by_client_id=False, meant_at_ms=T0, deadline_at_ms=T0 + 300_000)


def attempt(means: Means, call: Call | str = Call.CANCEL, at_ms: int = T0, n: int = 1) -> Attempt:
    """An attempt as the job hash keeps it."""
    return Attempt(n, at_ms, call, None, None, "", means.value, TOOK_MS)


def test_after_a_crash_an_unfinished_attempt_is_read_first() -> None:
    """A worker that died while sending leaves an unclear attempt behind: the next one asks before it cancels."""
    assert first_step(CASE, [attempt(Means.UNCLEAR)], POLICY, T0 + 9_000) == Again(Call.QUERY)


def test_after_a_clean_refusal_the_cancel_is_repeated() -> None:
    """A retry of a cancel that was not executed is a cancel."""
    assert first_step(CASE, [attempt(Means.BUSY)], POLICY, T0 + 500) == Again(Call.CANCEL)


@pytest.mark.parametrize(
    ("means", "kind"), [(Means.UNCLEAR, "unknown"), (Means.BUSY, "gave_up"), (Means.NOT_SENT, "gave_up")]
)
def test_after_the_deadline_a_retry_is_not_sent(means: Means, kind: str) -> None:
    """A request that was tried and came back too late ends by what its attempts left behind, never as overdue."""
    stop = first_step(CASE, [attempt(means)], POLICY, CASE.deadline_at_ms)
    assert isinstance(stop, Stop)
    assert stop.kind == kind
    assert stop.error == f"the deadline passed; last: {means}"


def test_a_retry_beyond_the_bound_is_not_sent() -> None:
    """Coming back to a request cannot exceed its attempts, whoever comes back."""
    stop = first_step(CASE, [attempt(Means.OPEN, Call.QUERY)] * 25, ANSWERED, T0 + 500)
    assert isinstance(stop, Stop)
    assert (stop.kind, stop.error) == (OutcomeKind.GAVE_UP, "25 counted attempts were made; last: open")


def test_the_deadline_during_the_last_call_ends_the_request() -> None:
    """An answer that comes after the deadline is still read, but leads to no further call."""
    late = CASE.deadline_at_ms
    answers: list[tuple[Answer, Call, str]] = [
        (OK, Call.CANCEL, "cancelled"),
        (CANCELED, Call.QUERY, "already_cancelled"),
        (OVERLOAD, Call.CANCEL, "gave_up"),
        (TIMEOUT, Call.CANCEL, "unknown"),
        (NEW, Call.QUERY, "gave_up"),
    ]
    for answer, call, kind in answers:
        verdict = classify(call, OrderRef(ALGO_ID), answer)
        stop = next_step(CASE, [attempt(verdict.means, call)], verdict, POLICY, late, 0.5)
        assert isinstance(stop, Stop)
        assert stop.kind == kind
        assert not stop.kind.failed or (stop.error or "").startswith("the deadline passed; last: ")


# ---- what the outcome tells -----------------------------------------------------------------------------------------


def test_a_triggered_order_hands_on_its_child() -> None:
    """The strategy gets the id of the order that is live now, and the state in the exchange's words."""
    stop = play([GONE, TRIGGERED]).stop
    assert (stop.order_status, stop.actual_order_id) == ("TRIGGERED", CHILD_ID)
    stop = play([GONE, FINISHED]).stop
    assert (stop.order_status, stop.actual_order_id) == ("FINISHED", CHILD_ID)


@pytest.mark.parametrize(
    ("answers", "status"),
    [
        ([OK], "CANCELED"),
        ([TIMEOUT, CANCELED], "CANCELED"),
        ([GONE, EXPIRED], "EXPIRED"),
        ([GONE, REJECTED], "REJECTED"),
        ([RACE, TRIGGERING], "TRIGGERING"),
        ([GONE, ODD], "PENDING_CANCEL"),
        ([GONE, NEW, BAD_KEY], "NEW"),
        ([BAD_KEY], None),
        ([TIMEOUT], None),
    ],
)
def test_the_outcome_holds_the_state_as_last_seen(answers: list[Answer], status: str | None) -> None:
    """Whoever has to look gets the order's last known state, if any was seen."""
    assert play(answers).stop.order_status == status


def test_a_refusal_is_quoted_in_the_outcome() -> None:
    """The outcome's error is what the exchange said, with status and code."""
    assert play([BAD_KEY]).stop.error == "refused: 401 -2015 Invalid API-key, IP, or permissions for action."
    assert play([BAD_PARAM]).stop.error == "refused: 400 -1102 Mandatory parameter was not sent."


def test_overdue_says_that_nothing_was_sent() -> None:
    """An overdue request was never sent: that is what its error says."""
    assert play([OK], age_ms=300_000).stop.error == "the deadline passed before anything was sent"


def test_a_bound_is_named_with_the_last_answer() -> None:
    """Which bound was reached, and at what answer, stands in the outcome."""
    ended = play([TIMEOUT], policy=ANSWERED)
    assert ended.stop.error == "25 counted attempts were made; last: unclear ReadTimeout"
    ended = play([NO_CONNECTION])
    assert ended.stop.error == "the deadline comes before the next try; last: not_sent ConnectionRefusedError"


def test_the_last_state_skips_what_shows_none() -> None:
    """Answers without a state do not hide the one seen before."""
    history = [attempt(Means.OPEN, Call.QUERY), attempt(Means.BUSY), attempt(Means.UNCLEAR)]
    assert last_status(history) == "NEW"
    assert last_status(history[1:]) is None
    assert last_status([*history, attempt(Means.FINISHED, "query_child")]) == "NEW"


def test_a_newer_workers_calls_about_another_order_start_no_horizon() -> None:
    """That a child order is not known says nothing of its parent."""
    verdict = classify(Call.QUERY, OrderRef(ALGO_ID), NOT_THERE)
    missed = attempt(Means.NO_SUCH_ORDER, Call.QUERY, T0 + 20_000)
    history = [attempt(Means.NO_SUCH_ORDER, "query_child"), attempt(Means.UNCLEAR, "cancel_child"), missed]
    assert isinstance(next_step(CASE, history, verdict, POLICY, T0 + 20_050, 0.5), Again)
    known = [attempt(Means.NO_SUCH_ORDER), attempt(Means.NO_SUCH_ORDER, at_ms=T0 + 11_000), missed]
    assert isinstance(next_step(CASE, known, verdict, POLICY, T0 + 20_050, 0.5), Stop)


# ---- doubt ----------------------------------------------------------------------------------------------------------

#: When a cancel that was under way for TOOK_MS can no longer be accepted, counted from its start.
WINDOW_MS = TOOK_MS + POLICY.recv_window_ms + 1_000


@pytest.mark.parametrize(
    ("history", "doubt"),
    [
        ([], False),
        ([attempt(Means.BUSY), attempt(Means.NO_SUCH_ORDER)], False),
        ([attempt(Means.UNCLEAR, Call.QUERY)], False),
        ([attempt(Means.UNCLEAR)], True),
        ([attempt(Means.UNCLEAR), attempt(Means.DENIED)], True),
        ([attempt(Means.UNCLEAR), attempt(Means.NO_SUCH_ORDER, Call.QUERY, T0 + 60_000)], True),
        ([attempt(Means.UNCLEAR), attempt(Means.TRIGGERING, Call.QUERY, T0 + 60_000)], True),
        ([attempt(Means.UNCLEAR), attempt(Means.OPEN, Call.QUERY, T0 + WINDOW_MS - 1)], True),
        ([attempt(Means.UNCLEAR), attempt(Means.OPEN, Call.QUERY, T0 + WINDOW_MS)], False),
        ([attempt(Means.OPEN, Call.QUERY), attempt(Means.UNCLEAR, at_ms=T0 + 50)], True),
        (
            [
                attempt(Means.UNCLEAR),
                attempt(Means.OPEN, Call.QUERY, T0 + 100),
                attempt(Means.OPEN, Call.QUERY, T0 + 60_000),
            ],
            False,
        ),
        ([attempt(Means.UNCLEAR, "cancel_child")], False),
        ([attempt(Means.UNCLEAR), attempt(Means.OPEN, "query_child", T0 + 60_000)], True),
    ],
    ids=[
        "nothing sent",
        "clean refusals",
        "an unclear query",
        "an unclear cancel",
        "a refusal clears nothing",
        "no such order clears nothing",
        "TRIGGERING clears nothing",
        "NEW while the cancel can still strike",
        "NEW after the cancel's window",
        "NEW before the cancel",
        "NEW twice, the second time after the window",
        "an unclear call of a newer worker's about another order",
        "NEW of another order",
    ],
)
def test_only_a_query_after_the_window_settles_an_unclear_cancel(history: list[Attempt], doubt: bool) -> None:
    """A cancel that may have worked stays in doubt until the order is seen open when it can no longer strike."""
    assert in_doubt(history, POLICY) is doubt


def test_a_settled_cancel_leaves_the_next_refusal_a_refusal() -> None:
    """Once a late query shows the order open, the unclear cancel before it did nothing."""
    policy = Policy(backoff_base_ms=8_000, backoff_cap_ms=8_000)
    played = play([TIMEOUT, TIMEOUT, NEW, BAD_KEY], roll=0.999, policy=policy)
    assert (played.calls, played.kind) == ([C, Q, Q, C], "refused")


@pytest.mark.parametrize(
    ("last", "call"),
    [
        (attempt(Means.NO_SUCH_ORDER), Call.QUERY),
        (attempt(Means.TRIGGER_RACE), Call.QUERY),
        (attempt(Means.UNCLEAR), Call.QUERY),
        (attempt(Means.TRIGGERING, Call.QUERY), Call.QUERY),
        (attempt(Means.ODD_STATUS, Call.QUERY), Call.QUERY),
        (attempt(Means.UNCLEAR, Call.QUERY), Call.QUERY),
        (attempt(Means.BUSY, Call.QUERY), Call.QUERY),
        (attempt(Means.NOT_SENT, Call.QUERY), Call.QUERY),
        (attempt(Means.CLOCK, Call.QUERY), Call.QUERY),
        (attempt(Means.LIMITED, Call.QUERY), Call.QUERY),
        (attempt(Means.OPEN, Call.QUERY), Call.CANCEL),
        (attempt(Means.BUSY), Call.CANCEL),
        (attempt(Means.NOT_SENT), Call.CANCEL),
        (attempt(Means.CLOCK), Call.CANCEL),
        (attempt(Means.LIMITED), Call.CANCEL),
        (attempt(Means.BLOCKED), Call.CANCEL),
        (attempt(Means.CONFIRMED, "cancel_child"), Call.QUERY),
        (attempt(Means.OPEN, "query_child"), Call.QUERY),
    ],
    ids=lambda value: f"{value.call}-{value.verdict}" if isinstance(value, Attempt) else f"then {value}",
)
def test_a_query_comes_wherever_a_cancel_would_be_a_guess(last: Attempt, call: Call) -> None:
    """What is asked next hangs on whether the order's state is known well enough to cancel."""
    assert call_for(CASE, [last], POLICY, T0 + 100) is call
