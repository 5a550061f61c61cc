"""RQ's own hash of a job, for whoever makes one: strategies, and workers that list the orders of a symbol."""

from __future__ import annotations

from typing import Any

from redis import Redis
from rq.job import Job, JobStatus, Retry
from rq.serializers import JSONSerializer

from producer.keys import ENDLESS_RETRIES, FAILURE_TTL_S, RESULT_TTL_S
from producer.message import TASK

#: What a stock RQ worker allows one step, s: connect, send, answer, and a query after it.
_STEP_TIMEOUT_S = 60


def fields_of_job(queue: str) -> dict[str, Any]:
    """RQ's own hash of such a job, made by RQ, without what differs from request to request."""
    job = Job.create(
        func=TASK,
        connection=Redis(),  # RQ wants one; it is never opened
        serializer=JSONSerializer,
        origin=queue,
        timeout=_STEP_TIMEOUT_S,
        result_ttl=RESULT_TTL_S,
        failure_ttl=FAILURE_TTL_S,
        retry=Retry(max=ENDLESS_RETRIES),
        status=JobStatus.QUEUED,
        description="-",
    )
    fields = job.to_dict()
    for name in ("data", "description", "created_at"):
        del fields[name]
    known = {name: value.value if isinstance(value, JobStatus) else value for name, value in fields.items()}
    return {name: value for name, value in known.items() if value != ""}  # to RQ, what is absent is empty


def words_of_job(queue: str) -> dict[str, list[Any]]:
    """The same as the constant of the scripts that make one."""
    return {"JOB_FIELDS": [word for field in fields_of_job(queue).items() for word in field]}
