"""Jobs that somebody with access to Redis damaged or made up: refused, and the next good request is served in time."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import redis
from rq import Queue
from rq.serializers import JSONSerializer

from producer import CancelClient, CancelRequest, OutcomeKind
from producer.message import TASK, encode_call
from tests.messages import NASTY_JOBS
from tests.servers import Peek, Worker, Workers, eventually
from worker.sandbox.control import RunningExchange

QUEUE = "rq:queue:cancels"
SURROGATE = "\\ud800"


def job_key(job_id: str) -> str:
    """RQ's hash of a job."""
    return f"rq:job:{job_id}"


def attempt(**changes: Any) -> str:
    """One attempt as the job hash keeps it, with some of its fields changed."""
    fields = {"n": 1, "at_ms": 1_763_807_442_123, "call": "cancel", "http": 503, "code": -1000, "msg": "busy"}
    return json.dumps({**fields, "verdict": "busy", "ms": 5, **changes})


#: Our own fields of a job's hash, damaged: the request itself is a sound one.
DAMAGED: dict[str, dict[str, str | bytes]] = {
    "attempts-no-json": {"c_attempts": "garbage"},
    "attempts-infinite": {"c_attempts": attempt().replace("503", "1e999")},
    "attempts-huge-number": {"c_attempts": attempt().replace("503", "1" * 400)},
    "attempts-float-beyond-64-bits": {"c_attempts": attempt(n=1e300)},
    "attempts-wrong-types": {"c_attempts": attempt(http={"a": []}, code="x", ms=None)},
    "attempts-surrogate": {"c_attempts": attempt(msg="?").replace("?", SURROGATE)},
    "attempts-deep": {"c_attempts": "[" * 10_000},
    "pin-no-json": {"c_pin": "garbage"},
    "pin-no-object": {"c_pin": "[7]"},
    "pin-text-for-id": {"c_pin": '{"algo_id":"7&symbol=X","symbol":null}'},
    "pin-id-beyond-64-bits": {"c_pin": '{"algo_id":9223372036854775808,"symbol":null}'},
    "pin-number-for-symbol": {"c_pin": '{"algo_id":7,"symbol":7}'},
    "pin-surrogate": {"c_pin": f'{{"algo_id":7,"symbol":"{SURROGATE}"}}'},
    "enqueued-no-number": {"c_enqueued_at_ms": "abc"},
    "deadline-exponent": {"c_deadline_at_ms": "1e300"},
    "run-beyond-64-bits": {"c_run": "9223372036854775808"},
    "run-no-number-of-a-new-run": {"c_run": "abc", "c_done": "1"},
    "run-last-of-a-new-run": {"c_run": "9223372036854775807", "c_done": "1"},
    "meant-no-number-of-a-new-run": {"c_meant_at_ms": "abc", "c_done": "refused"},
    "open-no-number": {"c_open_at_ms": "abc"},
}
#: Damage that leaves no doubt about what is asked: the request is served as if it were not there.
HARMLESS: dict[str, dict[str, str | bytes]] = {
    "rq-fields": {
        "created_at": "yesterday",
        "timeout": "abc",
        "retries_left": "many",
        "number_of_retries": "7",
        "result_ttl": "[]",
        "meta": b"\xff",
        "origin": "",
        "description": b"\xff\n",
        "dependency_ids": "{",
        "enqueued_at": "\0",
    },
    "order-of-another": {"c_order": "default:a:1"},
    "order-not-utf8": {"c_order": b"\xff"},
    "urgent-garbage": {"c_urgent": b"\xff"},
    "fields-of-nobody": {"c_x": "y", "": ""},
}


def put(connection: redis.Redis, job_id: str, data: bytes, fields: dict[str, str | bytes]) -> None:
    """Put a job on the queue as RQ does, and then change its hash."""
    queue = Queue("cancels", connection=connection, serializer=JSONSerializer)
    job = queue.create_job(TASK, args=({},), job_id=job_id)
    job.save()
    mapping: dict[Any, Any] = {"data": data, "status": "queued", **fields}
    connection.hset(job.key, mapping=mapping)
    connection.rpush(queue.key, job_id)


def order(exchange: RunningExchange) -> int:
    """An open order's algo id."""
    return exchange.add_orders(1)[0].algo_id


def is_served(client: CancelClient, exchange: RunningExchange) -> None:
    """Whether a good request is executed."""
    assert client.cancel(algo_id=order(exchange)).wait(30).kind is OutcomeKind.CANCELLED


def is_well(worker: Worker) -> None:
    """Whether a worker met nothing that it has no answer to."""
    assert worker.process.poll() is None
    for sign in ("Traceback", "event=defect", "state=away"):
        assert sign not in worker.output(), worker.output()[-2000:]


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_damaged_jobs_are_refused_alone(
    kind: str,
    workers: Workers,
    client: CancelClient,
    exchange: RunningExchange,
    connection: redis.Redis,
    peek: Peek,
) -> None:
    """Damaged jobs end as refused in records that can be read; their neighbours, claimed with them, are served."""
    # A stock worker forks for each: every other one will do.
    names = list(DAMAGED) if kind == "ours" else [name for name in DAMAGED if "new-run" not in name][::2]
    before = client.cancel_many([CancelRequest(algo_id=order(exchange)) for _ in range(2)])
    for name in names:
        put(connection, name, encode_call(CancelRequest(algo_id=7)), DAMAGED[name])
    after = client.cancel_many([CancelRequest(algo_id=order(exchange)) for _ in range(2)])
    worker = workers.start(LEASE_S="2") if kind == "ours" else workers.start_stock("--with-scheduler")

    good = [ticket.id for ticket in (*before, *after)]
    assert {client.wait(job_id, 30).kind for job_id in good} == {OutcomeKind.CANCELLED}
    outcomes = {name: client.wait(name, 30) for name in names}
    eventually(lambda: peek("ZCARD", peek.keys.unfinished) == 0, what="nothing is left")

    assert {name: outcome.kind for name, outcome in outcomes.items()} == dict.fromkeys(names, OutcomeKind.REFUSED)
    assert all(outcome.error for outcome in outcomes.values())
    assert Counter(entry.id for entry in peek.ledger()) == dict.fromkeys([*names, *good], 1)
    assert exchange.stats().requests["DELETE /fapi/v1/algoOrder"] == {"200": 4}
    assert {peek.job(name)["status"] for name in names} == {"failed"}
    if kind == "ours":
        is_well(worker)


def test_a_history_too_large_to_be_read_is_a_doubt(
    workers: Workers, client: CancelClient, exchange: RunningExchange, connection: redis.Redis
) -> None:
    """Where a history is larger than any, what was sent before is not known: the order is looked at, then cancelled."""
    algo_id = order(exchange)
    put(connection, "large", encode_call(CancelRequest(algo_id=algo_id)), {"c_attempts": attempt(msg="x" * 2_000_000)})
    worker = workers.start(LEASE_S="2")

    outcome = client.wait("large", 30)

    assert outcome.kind is OutcomeKind.CANCELLED
    assert [(a.call, a.verdict) for a in outcome.attempts] == [
        ("cancel", "unclear"),
        ("query", "open"),
        ("cancel", "confirmed"),
    ]
    assert (exchange.book()[algo_id].gets, exchange.book()[algo_id].deletes) == (1, 1)
    is_served(client, exchange)
    is_well(worker)


def test_a_doubt_stays_one_whatever_else_is_wrong(
    workers: Workers, client: CancelClient, connection: redis.Redis
) -> None:
    """What a history that is too large may have held is not known, also where the job is refused or taken back."""
    history: dict[str, str | bytes] = {"c_attempts": attempt(msg="x" * 2_000_000)}
    put(connection, "nobody", encode_call(CancelRequest(algo_id=7, account="nobody")), history)
    for name, fields in {"number": {"c_run": "abc"}, "taken-back": {"status": "canceled"}}.items():
        put(connection, name, encode_call(CancelRequest(algo_id=7)), {**history, **fields})
    workers.start(LEASE_S="2")

    assert {client.wait(name, 30).kind for name in ("nobody", "number", "taken-back")} == {OutcomeKind.UNKNOWN}


def test_strange_fields_of_rq_change_nothing(
    workers: Workers, client: CancelClient, exchange: RunningExchange, connection: redis.Redis
) -> None:
    """What RQ or a stranger wrote beside a sound request does not keep it from being executed."""
    ids = {name: order(exchange) for name in HARMLESS}
    for name, fields in HARMLESS.items():
        put(connection, name, encode_call(CancelRequest(algo_id=ids[name])), fields)
    worker = workers.start(LEASE_S="2")

    for name in HARMLESS:
        assert client.wait(name, 30).kind is OutcomeKind.CANCELLED, name
    is_served(client, exchange)
    is_well(worker)


def test_a_past_deadline_is_overdue_however_far(
    workers: Workers, client: CancelClient, exchange: RunningExchange, connection: redis.Redis
) -> None:
    """A negative deadline is a deadline in the past: nothing is sent."""
    worker = workers.start(LEASE_S="2")
    asked: dict[str, str | bytes] = {"c_enqueued_at_ms": "1763807442123"}
    put(connection, "negative", encode_call(CancelRequest(algo_id=7)), {**asked, "c_deadline_at_ms": "-1"})
    put(connection, "zero", encode_call(CancelRequest(algo_id=7)), {**asked, "c_deadline_at_ms": "0"})

    assert [client.wait(name, 30).kind for name in ("negative", "zero")] == [OutcomeKind.OVERDUE] * 2
    is_served(client, exchange)
    assert exchange.stats().requests["DELETE /fapi/v1/algoOrder"] == {"200": 1}
    is_well(worker)


def test_entries_without_a_job_are_dropped(
    workers: Workers, client: CancelClient, exchange: RunningExchange, connection: redis.Redis, peek: Peek
) -> None:
    """What names no job, or a key that is no hash, can have no outcome: it is dropped, its neighbours are served."""
    connection.set(job_key("text"), "x")
    connection.rpush(job_key("list"), "x")
    connection.sadd(job_key("set"), "x")
    connection.zadd(job_key("sorted"), {"x": 1})
    connection.xadd(job_key("stream"), {"x": "y"})
    strangers: list[bytes] = [b"text", b"list", b"set", b"sorted", b"stream", b"missing", b"", b"\xff", b"\0taken"]
    strangers += [b"x" * 100_000, b"a:b:c", b"\r\n*1\r\n$8\r\nFLUSHALL\r\n", b"{}", b"-1"]
    first, last = order(exchange), order(exchange)
    before = client.cancel(algo_id=first)
    connection.rpush(QUEUE, *strangers)
    after = client.cancel(algo_id=last)
    worker = workers.start(LEASE_S="2")

    assert [ticket.wait(30).kind for ticket in (before, after)] == [OutcomeKind.CANCELLED] * 2
    for stranger in strangers:
        connection.rpush(QUEUE, stranger)
    is_served(client, exchange)
    eventually(lambda: peek("LLEN", QUEUE) == 0, what="the strangers are gone")
    assert len(peek.ledger()) == 3
    is_well(worker)


BESIDE = ("rq:executions:{}", "rq:results:{}", "cancels:outcome:{}", "cancels:order:default:a:{}")


def test_keys_of_another_type_beside_a_job_harm_that_job_alone(
    workers: Workers, client: CancelClient, exchange: RunningExchange, connection: redis.Redis
) -> None:
    """Where another type of key stands in the way of one job's bookkeeping, the others are served all the same."""
    before = client.cancel(algo_id=order(exchange))
    for number, beside in enumerate(BESIDE, 1):
        name = f"hindered-{number}"
        put(connection, name, encode_call(CancelRequest(algo_id=number)), {"c_order": f"default:a:{name}"})
        connection.rpush(beside.format(name), "x")
    after = client.cancel(algo_id=order(exchange))
    worker = workers.start(LEASE_S="2", NOT_FOUND_HORIZON_S="0")

    for ticket in (before, after):
        assert ticket.wait(30).kind is OutcomeKind.CANCELLED
    is_served(client, exchange)
    assert worker.process.poll() is None


def test_due_entries_without_a_job_are_dropped(
    workers: Workers, client: CancelClient, exchange: RunningExchange, connection: redis.Redis, peek: Peek
) -> None:
    """What names no job among the retries and the leases is dropped, too."""
    places = ("rq:scheduled:cancels", "cancels:leases")
    connection.set(job_key("text"), "x")
    for where in places:
        connection.zadd(where, dict.fromkeys([b"text", b"missing", b"\xff", b"", b"a:b"], 1.0))
    connection.hset(job_key("open"), mapping={"status": "started", "c_lease": "x-1", "c_open_at_ms": "abc"})
    connection.zadd("cancels:leases", {"open": 1.0})
    worker = workers.start(LEASE_S="2")

    is_served(client, exchange)
    eventually(lambda: peek("EXISTS", *places) == 0, what="they are gone")
    assert client.wait("open", 30).kind is OutcomeKind.REFUSED
    is_well(worker)


#: By ids that RQ takes.
NASTY = {f"nasty-{number}": data for number, (data, _) in enumerate(NASTY_JOBS.values())}


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_nasty_payloads(
    kind: str,
    workers: Workers,
    client: CancelClient,
    exchange: RunningExchange,
    connection: redis.Redis,
    peek: Peek,
    tmp_path: Path,
) -> None:
    """No payload gets further than its refusal: nothing of it runs, nothing is sent, the record can be read, the next
    request is served.

    A stock worker refuses, without an outcome, what RQ itself cannot read.
    """
    # A stock worker forks for each, runs other functions, and takes an empty instance or keyword list for none.
    names = list(NASTY) if kind == "ours" else list(NASTY)[3::4]
    for name in names:
        put(connection, name, NASTY[name], {})
    marker = tmp_path / "was-here"
    if kind == "ours":
        pickled = Queue("cancels", connection=connection)
        names += [pickled.enqueue("os.system", f"touch {marker}").id, pickled.enqueue(TASK, {"v": 1, "algo_id": 7}).id]
        put(connection, "shell", f'["os.system",null,["touch {marker}"],{{}}]'.encode(), {})
        connection.hset(job_key("no-fields-of-rq"), "x", "y")
        connection.rpush(QUEUE, "no-fields-of-rq", "deleted-before")
        names += ["shell", "no-fields-of-rq"]
    duplicate = order(exchange)
    # As for RQ, the last of two equal keys holds.
    text = f'["{TASK}",null,[{{"v":1,"account":"x","account":"default","algo_id":7,"algo_id":{duplicate}}}],{{}}]'
    put(connection, "duplicate-keys", text.encode(), {})
    worker = workers.start() if kind == "ours" else workers.start_stock("--with-scheduler")

    assert client.wait("duplicate-keys", 30).kind is OutcomeKind.CANCELLED
    is_served(client, exchange)
    refused = {outcome.id: outcome for outcome in peek.ledger() if outcome.kind is OutcomeKind.REFUSED}
    if kind == "ours":
        assert refused.keys() == set(names)
        assert set(client.failed_ids()) == set(names)
        assert {(o.may_be_live, o.attempts, o.algo_id) for o in refused.values()} == {(None, (), None)}
        assert not marker.exists()
        is_well(worker)
    assert all(outcome.error and len(outcome.error) < 400 for outcome in refused.values())
    assert {connection.hget(job_key(name), "status") for name in names} == {b"failed"}
    assert exchange.stats().requests["DELETE /fapi/v1/algoOrder"] == {"200": 2}
