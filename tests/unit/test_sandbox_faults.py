"""Faults of the local exchange: the table of what each one is, and the plan of who meets which."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from producer.message import Call
from worker.sandbox.control import ConfigError, ExchangeConfig
from worker.sandbox.fault_plan import FaultPlan
from worker.sandbox.faults import FAULT_SETS, Fault, FaultSet, Reach

NOW_MS = 1_750_485_492_076
IDS = range(2_000_000_000_000_001, 2_000_000_000_000_501)
ALL = FAULT_SETS["all"]
SOME = FAULT_SETS["some"]


#: Codes of exchange.md 4.2 that a cancel can meet, with the ones that are told apart by their text.
CODES = {-1000, -1001, -1002, -1003, -1004, -1006, -1007, -1008, -1010, -1013, -1015, -1016, -1020, -1021, -1022}
CODES |= {-1099, -1100, -1102, -2011, -2013, -2014, -2015, -2017, -4015, -4056, -4084, -4109, -4117, -4400, -5028}
CODES |= {-20124}
STATUSES = {200, 202, 302, 400, 401, 403, 404, 405, 408, 418, 429, 451, 500, 502, 503, 504}


def plan_of(fault_set: FaultSet = ALL, **options: int | float | None) -> FaultPlan:
    plan = FaultPlan(fault_set, **options)  # type: ignore[arg-type]
    for algo_id in IDS:
        plan.admit(algo_id)
    return plan


def test_the_table_covers_the_documented_answers() -> None:
    """Every status and code that a cancel can get has a fault, and so have the four texts of 503 and both of -1001."""
    answers = [fault.spec.answer for fault in Fault if fault.spec.answer is not None]
    errors = [
        (answer.status, json.loads(answer.body))
        for answer in answers
        if answer.content_type == "application/json" and answer.body.startswith(b"{")
    ]
    assert {error["code"] for _, error in errors} >= CODES
    assert {answer.status for answer in answers} >= STATUSES
    assert len({error["msg"] for status, error in errors if status == 503}) == 4
    assert len({error["msg"] for status, error in errors if status == 400 and error["code"] == -1001}) == 2
    assert len({error["msg"] for _, error in errors if error["code"] == -1021}) == 2
    assert len({error["msg"] for _, error in errors if error["code"] == -2011}) == 7


def test_unclear_answers_come_with_and_without_the_cancel() -> None:
    """Each answer that leaves a cancel open exists both ways, so that guessing cannot pass."""
    names = {fault.removesuffix("_executed") for fault in Fault if fault.endswith("_executed")}
    unclear = {"timeout_408", "html_500", "bad_gateway_502", "unknown_503", "gateway_timeout_504", "unknown_1000"}
    assert names >= unclear | {"unexpected_1006", "timeout_1007", "empty_200", "html_200", "wrong_id_200", "body_cut"}


def test_named_sets_grow_and_leave_out_what_is_final() -> None:
    """'none' is empty, 'some' is a part of 'all', and 'all' has every fault that a correct client gets over."""
    assert FAULT_SETS["none"] == FaultSet()
    assert set(SOME.faults) < set(ALL.faults)
    assert set(SOME.incidents) < set(ALL.incidents)
    final = {fault for fault in Fault if fault.spec.reach is Reach.SCRIPTED}
    assert set(ALL.faults) | set(ALL.incidents) == set(Fault) - final
    assert final >= {Fault.KEY_2015, Fault.KEY_ID_2008, Fault.TRIGGER_STUCK, Fault.ACCOUNT_2011}
    assert all(not fault.spec.pauses for fault in ALL.faults)


def test_a_seed_replays_whatever_the_order_of_arrival() -> None:
    """Two plans with one seed give an order's calls the same faults however the orders' requests are interleaved."""
    calls = [(algo_id, call) for algo_id in IDS[:100] for call in Call for _ in range(4)]
    met = []
    for shuffle_seed in (1, 2):
        plan = plan_of(seed=7, max_incidents=4)
        random.Random(shuffle_seed).shuffle(calls)
        seen: dict[tuple[int, Call], list[Fault | None]] = {}
        for algo_id, call in calls:
            seen.setdefault((algo_id, call), []).append(plan.meet(algo_id, call, NOW_MS))
        met.append(seen)
    assert met[0] == met[1]
    assert any(fault for faults in met[0].values() for fault in faults)


def test_no_fault_comes_after_the_end() -> None:
    """From `until_ms` on neither seeded nor scripted faults are met; until then they are."""
    plan = plan_of(rate=1.0, until_ms=NOW_MS)
    plan.script(IDS[0], Call.CANCEL, [Fault.DROP_AFTER], repeat_last=True)
    assert plan.meet(IDS[0], Call.CANCEL, NOW_MS - 1) is Fault.DROP_AFTER
    assert all(plan.meet(algo_id, call, NOW_MS) is None for algo_id in IDS[:50] for call in Call)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"fault_rate": 7}, "fault_rate: must be between 0 and 1"),
        ({"latency_ms": -5}, "latency_ms: must not be negative"),
        ({"tls_key_path": "key.pem"}, "tls_cert_path and tls_key_path: both or neither"),
        ({"incidents": ("drop_after",)}, "incidents: 'drop_after' is no fault"),
        ({"faults": "most"}, "faults: must be one of"),
        ({"accounts": {}}, "accounts: at least one"),
    ],
)
def test_an_exchange_that_cannot_be_meant_is_refused(fields: dict[str, Any], told: str) -> None:
    """What cannot be meant is told by the field's name, and nothing is started."""
    with pytest.raises(ConfigError, match=told):
        ExchangeConfig(**({"accounts": {"default": ("key", "secret")}} | fields))
