"""New runs of failed requests by the client, and what RQ would have left of them."""

from __future__ import annotations

import signal

import pytest
import redis
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer

from producer import CancelClient, CancelRequest, UnknownRequest
from producer.keys import Keys
from producer.protocol import text
from tests.servers import Workers
from tests.strategies import fail, rqs_fields

KEYS = Keys()


def test_many_are_retried_or_none(client: CancelClient, connection: redis.Redis) -> None:
    """The rule holds beyond the thousand of one call, and an id given twice is started once."""
    tickets = client.cancel_many(CancelRequest(algo_id=number) for number in range(1, 1202))
    job_ids = [ticket.id for ticket in tickets]
    registry = FailedJobRegistry(KEYS.queue, connection=connection, serializer=JSONSerializer)
    connection.zadd(registry.key, {job_id: 4e9 + number for number, job_id in enumerate(job_ids)})
    connection.delete(KEYS.waiting)

    with pytest.raises(UnknownRequest, match="nobody"):
        client.retry([*job_ids, "nobody"])
    assert connection.llen(KEYS.waiting) == 0
    assert client.retry(job_ids + job_ids) == job_ids
    assert [text(job_id) for job_id in connection.lrange(KEYS.waiting, 0, -1)] == job_ids


def test_rq_requeues_to_the_same_hash(client: CancelClient, workers: Workers, connection: redis.Redis) -> None:
    """What a retry leaves is what RQ's requeue leaves for RQ to read; the retries that it may count are all there."""
    ours, theirs = fail(client, workers, 2)
    workers.all[0].stop(signal.SIGKILL)

    client.retry([ours])
    FailedJobRegistry(KEYS.queue, connection=connection, serializer=JSONSerializer).requeue(theirs)

    hashes = [rqs_fields(connection, job_id) for job_id in (ours, theirs)]
    for fields in hashes:
        for name in (b"data", b"description", b"created_at", b"enqueued_at", b"last_heartbeat", b"worker_name"):
            assert fields.pop(name)
        assert fields.pop(b"retries_left") == b"1000000"
    assert hashes[0] == hashes[1]
    assert connection.lrange(KEYS.waiting, 0, -1) == [ours.encode(), theirs.encode()]
