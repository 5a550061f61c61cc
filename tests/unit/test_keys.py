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


def test_key_of_the_waiting_list(unconnected: redis.Redis) -> None:
    """Job ids wait where RQ's Queue keeps them."""
    assert Queue("stops", connection=unconnected).key == KEYS.waiting
    assert Keys().waiting == "rq:queue:cancels"


def test_key_of_the_queues() -> None:
    """The queue is listed in RQ's set of queues."""
    assert Queue.redis_queues_keys == KEYS.queues
    assert Keys().queues == "rq:queues"


def test_key_of_a_job() -> None:
    """Job hashes stand where Job.fetch looks."""
    assert Job.key_for("j1") == KEYS.job_prefix + "j1"
    assert Keys().job_prefix == "rq:job:"


def test_key_of_the_started_registry() -> None:
    """Jobs in flight stand in RQ's StartedJobRegistry."""
    assert rq.registry.StartedJobRegistry("stops").key == KEYS.started
    assert Keys().started == "rq:wip:cancels"


def test_key_of_the_scheduled_registry() -> None:
    """Retries wait in RQ's ScheduledJobRegistry."""
    assert rq.registry.ScheduledJobRegistry("stops").key == KEYS.scheduled
    assert Keys().scheduled == "rq:scheduled:cancels"


def test_key_of_the_finished_registry() -> None:
    """Finished jobs stand in RQ's FinishedJobRegistry."""
    assert rq.registry.FinishedJobRegistry("stops").key == KEYS.finished
    assert Keys().finished == "rq:finished:cancels"


def test_key_of_the_failed_registry() -> None:
    """Failed kinds stand in RQ's FailedJobRegistry."""
    assert rq.registry.FailedJobRegistry("stops").key == KEYS.failed
    assert Keys().failed == "rq:failed:cancels"


def test_key_of_the_canceled_registry() -> None:
    """What a person took back through RQ stands in its CanceledJobRegistry."""
    assert rq.registry.CanceledJobRegistry("stops").key == KEYS.canceled
    assert Keys().canceled == "rq:canceled:cancels"


def test_key_of_a_result_stream() -> None:
    """Results stand in RQ's result stream of the job."""
    assert Result.get_key("j1") == KEYS.result_prefix + "j1"
    assert Keys().result_prefix == "rq:results:"


def test_key_of_a_worker() -> None:
    """A worker's hash is found under RQ's worker namespace."""
    assert BaseWorker.redis_worker_namespace_prefix == KEYS.worker_prefix
    assert Keys().worker_prefix == "rq:worker:"


def test_keys_of_rqs_workers(unconnected: redis.Redis) -> None:
    """Dead workers are looked for in RQ's sets of workers."""
    assert KEYS.workers == worker_registration.REDIS_WORKER_KEYS
    assert KEYS.queue_workers == worker_registration.WORKERS_BY_QUEUE_KEY % "stops"
    assert Queue("stops", connection=unconnected).intermediate_queue_key == KEYS.intermediate


def test_key_of_the_suspension() -> None:
    """`rq suspend` is noticed."""
    assert KEYS.suspended == WORKERS_SUSPENDED
    assert Keys().suspended == "rq:suspended"


def test_keys_of_our_own() -> None:
    """Our keys begin with the queue's name, so that two queues never share a lease or an outcome; names of version 0.1
    stay."""
    assert (KEYS.claiming, KEYS.unfinished, KEYS.outcomes) == ("stops:claiming", "stops:leases", "stops:outcomes")
    assert (KEYS.outcome_prefix, KEYS.order_prefix) == ("stops:outcome:", "stops:order:")
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
    names = [name for name, value in vars(Keys).items() if isinstance(value, property)]
    moved = {name for name in names if getattr(Keys(rq="app"), name) != getattr(Keys(), name)}
    ours = {"claiming", "durable", "order_prefix", "outcome_prefix", "outcomes", "suspects", "unfinished"}
    assert moved == set(names) - ours
    assert all(getattr(Keys(rq="app"), name).startswith("app:") for name in moved)
