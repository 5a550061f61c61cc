"""Which keys are RQ's, in RQ's own words, and which are ours."""

from __future__ import annotations

from hashlib import sha1
from itertools import pairwise

import redis
import rq.registry
from rq import worker_registration
from rq.defaults import RQ_KEY_PREFIX
from rq.job import Job
from rq.queue import Queue
from rq.results import Result
from rq.suspension import WORKERS_SUSPENDED
from rq.worker import BaseWorker

from producer.keys import Band, Keys, Script

KEYS = Keys("stops", RQ_KEY_PREFIX)


def test_keys_of_rqs_own(unconnected: redis.Redis) -> None:
    """Lists, jobs, registries, results, workers and the suspension stand where RQ keeps them, in whatever queue."""
    registries = rq.registry
    for theirs, ours, spelt in (
        (Queue("stops", connection=unconnected).key, KEYS.waiting, "rq:queue:stops"),
        (Queue("stops", connection=unconnected).intermediate_queue_key, KEYS.intermediate, ""),
        (Queue.redis_queues_keys, KEYS.queues, "rq:queues"),
        (Job.key_for("j1"), f"{KEYS.job_prefix}j1", "rq:job:j1"),
        (registries.StartedJobRegistry("stops").key, KEYS.started, "rq:wip:stops"),
        (registries.ScheduledJobRegistry("stops").key, KEYS.scheduled, "rq:scheduled:stops"),
        (registries.FinishedJobRegistry("stops").key, KEYS.finished, "rq:finished:stops"),
        (registries.FailedJobRegistry("stops").key, KEYS.failed, "rq:failed:stops"),
        (registries.CanceledJobRegistry("stops").key, KEYS.canceled, "rq:canceled:stops"),
        (Result.get_key("j1"), f"{KEYS.result_prefix}j1", "rq:results:j1"),
        (BaseWorker.redis_worker_namespace_prefix, KEYS.worker_prefix, "rq:worker:"),
        (worker_registration.REDIS_WORKER_KEYS, KEYS.workers, "rq:workers"),
        (worker_registration.WORKERS_BY_QUEUE_KEY % "stops", KEYS.queue_workers, "rq:workers:stops"),
        (WORKERS_SUSPENDED, KEYS.suspended, "rq:suspended"),
    ):
        assert theirs == ours
        assert ours == spelt or not spelt


def test_keys_of_our_own() -> None:
    """Our keys begin with the queue's name, so that two queues never share a lease or an outcome; names of version 0.1
    stay."""
    assert (KEYS.claiming, KEYS.unfinished, KEYS.outcomes) == ("stops:claiming", "stops:leases", "stops:outcomes")
    assert (KEYS.outcome_prefix, KEYS.order_prefix) == ("stops:outcome:", "stops:order:")
    assert (KEYS.counts, KEYS.minutes) == ("stops:counts", "stops:minutes")
    assert (KEYS.durable, KEYS.suspects) == ("stops:durable", "stops:keys")
    assert (KEYS.breaker("hedge-2"), KEYS.held("hedge-2")) == ("stops:key:hedge-2", "stops:held:hedge-2")
    assert (Keys.gate("all"), Keys.gate("worker.1")) == ("gate:all", "gate:worker.1")


def test_bands_of_the_index_hold_any_time() -> None:
    """A time of our days comes out of its band as it went in, and bands come in the order of their states."""
    assert [band.name for band in Band] == ["HELD", "WAITING", "RETRY", "END"]
    for band, end in pairwise(Band):
        for at_ms in (0, 1_763_807_442_123, 9_999_999_999_999):  # the last one: in the year 2286
            assert band <= float(band + at_ms) < end
            assert float(band + at_ms) - band == at_ms


def test_a_name_stays_a_name_in_a_script() -> None:
    """Whatever a constant holds, a script takes it as it is: no text ends early, and no word of it becomes code."""
    odd = 'a"b\\c\n]] .. os.exit() --\u00fc RETRY_BAND'
    script = Script(Keys("stops").lua() | {"FAILED": odd, "LIST": [odd, 5, {"x": True}]}, "producer/retry.lua")

    literal = "a\\034b\\092c\\010]] .. os.exit() --\\195\\188 RETRY_BAND"
    assert f'local LIST = {{"{literal}",5,{{x=true}}}}\n' in script.source
    assert f"on('ZSCORE', \"{literal}\", id)" in script.source
    assert script.sha == sha1(script.source.encode(), usedforsecurity=False).hexdigest()


def test_a_prefix_of_rq_moves_rqs_keys_only() -> None:
    """With another RQ_KEY_PREFIX every key of RQ's moves and none of ours does."""
    names = vars(Keys()).keys() - {"rq", "queue"}
    moved = {name for name in names if getattr(Keys(rq="app"), name) != getattr(Keys(), name)}
    ours = {"claiming", "counts", "durable", "minutes", "order_prefix", "outcome_prefix", "outcomes", "suspects"}
    ours |= {"unfinished"}
    assert moved == names - ours
    assert all(getattr(Keys(rq="app"), name).startswith("app:") for name in moved)
