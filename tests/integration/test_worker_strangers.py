"""What is on the queue and no cancel of ours: refused, or accepted from whoever knows RQ alone."""

from __future__ import annotations

import json
import secrets
import time
import zlib
from collections import Counter
from pathlib import Path

import redis
from rq import Queue
from rq.job import Job
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer

from producer import CancelClient, OutcomeKind
from producer.message import TASK, VERSION
from tests.orders import opened
from tests.servers import Peek, Workers, eventually
from worker.sandbox.control import RunningExchange


def data_of(call: object) -> bytes:
    """A job's payload as RQ's JSON serializer writes it."""
    return zlib.compress(json.dumps(call).encode())


def strangers(marker: Path) -> dict[str, bytes]:
    """Payloads that are no cancel of this version, by what is wrong with them."""
    good = {"v": VERSION, "account": "default", "algo_id": 7}
    deep = b"[" * 10_000 + b"]" * 10_000
    return {
        "shell": data_of(["os.system", None, [f"touch {marker}"], {}]),
        "private": data_of(["worker.task._tools", None, [good], {}]),
        "method": data_of([TASK, "worker.task.Unfenced", [good], {}]),
        "huge": data_of([TASK, None, [{**good, "tag": secrets.token_hex(5_000_000)}], {}]),
        "bomb": data_of([TASK, None, [{**good, "tag": "x" * 50_000_000}], {}]),
        "deep": zlib.compress(f'["{TASK}",null,['.encode() + deep + b"],{}]"),
        "nan": zlib.compress(f'["{TASK}",null,[{{"v":1,"account":"default","algo_id":NaN}}],{{}}]'.encode()),
        "beyond-64-bits": data_of([TASK, None, [{**good, "algo_id": 2**63}], {}]),
        "text-for-number": data_of([TASK, None, [{**good, "algo_id": "7"}], {}]),
        "control-characters": data_of([TASK, None, [{**good, "tag": "a\nb"}], {}]),
        "no-order": data_of([TASK, None, [{"v": VERSION, "account": "default"}], {}]),
        "version": data_of([TASK, None, [{**good, "v": 2}], {}]),
        "field": data_of([TASK, None, [{**good, "price": 1}], {}]),
        "no-arguments": data_of([TASK, None, [], {}]),
        "two-arguments": data_of([TASK, None, [good, good], {}]),
        "by-name": data_of([TASK, None, [], {"request": good}]),
        "object": data_of({"func": TASK}),
        "not-json": b"\x00\xff not even compressed",
        "empty": b"",
    }


def test_strangers_are_refused(
    workers: Workers,
    client: CancelClient,
    exchange: RunningExchange,
    peek: Peek,
    connection: redis.Redis,
    tmp_path: Path,
) -> None:
    """Any job but a cancel of this version ends in one refused outcome; nothing of it runs, and the worker goes on."""
    marker = tmp_path / "was-here"
    worker = workers.start()
    plain, pickled = (Queue("cancels", connection=connection, serializer=s) for s in (JSONSerializer, None))
    expected = {pickled.enqueue("os.system", f"touch {marker}").id}
    expected.add(pickled.enqueue(TASK, {"v": VERSION, "account": "default", "algo_id": 7}).id)
    for name, data in strangers(marker).items():
        job = plain.create_job(TASK, args=({},), job_id=name)
        job.save()
        connection.hset(job.key, mapping={"data": data, "status": "queued"})
        connection.rpush(plain.key, job.id)
        expected.add(job.id)
    connection.hset("rq:job:no-fields-of-rq", "x", "y")
    connection.rpush(plain.key, "no-fields-of-rq", "deleted-before")
    expected.add("no-fields-of-rq")

    eventually(lambda: len(peek.ledger()) >= len(expected), what="every stranger has its outcome")
    (algo_id,) = opened(exchange, 1)
    assert client.cancel(algo_id=algo_id).wait(10).kind is OutcomeKind.CANCELLED

    ledger = [outcome for outcome in peek.ledger() if outcome.kind is not OutcomeKind.CANCELLED]
    assert Counter(outcome.id for outcome in ledger) == dict.fromkeys(expected, 1)
    assert {(o.kind, o.may_be_live, o.attempts, o.algo_id) for o in ledger} == {(OutcomeKind.REFUSED, None, (), None)}
    assert all(outcome.error and len(outcome.error) < 400 for outcome in ledger)
    assert not marker.exists()
    assert worker.process.poll() is None
    assert "Traceback" not in worker.output()
    assert exchange.stats().requests["DELETE /fapi/v1/algoOrder"] == {"200": 1}
    failed = FailedJobRegistry("cancels", connection=connection, serializer=JSONSerializer)
    assert set(failed.get_job_ids()) == expected
    assert Job.fetch("shell", connection=connection, serializer=JSONSerializer).get_status() == "failed"


def test_ids_that_rq_would_not_make(
    workers: Workers, peek: Peek, connection: redis.Redis, client: CancelClient, exchange: RunningExchange
) -> None:
    """A job whose id holds a colon or is no text at all is refused once, and does not stay in anybody's hand."""
    worker = workers.start(LEASE_S="1")
    for job_id in (b"a:b", b"\xff\xfe", b"a b\n"):
        connection.hset(b"rq:job:" + job_id, mapping={"status": "queued", "data": b"x"})
        connection.rpush("rq:queue:cancels", job_id)
    eventually(lambda: len(peek.ledger()) == 3, what="all are refused")
    time.sleep(1.5)  # longer than the lease: whatever was not settled would come back

    assert peek.kinds() == {"refused": 3}
    assert peek("ZCARD", peek.keys.unfinished) == 0
    (algo_id,) = opened(exchange, 1)
    assert client.cancel(algo_id=algo_id).wait(10).kind is OutcomeKind.CANCELLED
    assert "Traceback" not in worker.output()


def test_plain_rq_enqueue_is_accepted(
    workers: Workers, client: CancelClient, exchange: RunningExchange, connection: redis.Redis
) -> None:
    """A program that knows RQ alone can enqueue a cancel by the function's name."""
    workers.start()
    (algo_id,) = opened(exchange, 1)
    queue = Queue("cancels", connection=connection, serializer=JSONSerializer)

    job = queue.enqueue("worker.task.cancel_algo_order", {"v": 1, "account": "default", "algo_id": algo_id})

    assert client.wait(job.id, 10).kind is OutcomeKind.CANCELLED
    assert job.get_status() == "finished"
    assert job.return_value(refresh=True) == "cancelled"
