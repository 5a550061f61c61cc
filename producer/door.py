"""What callers hand in, before anything is sent: each value is taken as it was meant, or refused with type and cure.

The fields of a request are checked by :class:`producer.message.CancelRequest` itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from producer.message import MAX_ID_BYTES, CancelRequest
from producer.untrusted import InvalidRequest, checked_seconds, not_a

#: Longest time-out of a call, s.
MAX_TIMEOUT_S = 3600

_STREAM_ID = re.compile(r"[0-9]{1,20}(-[0-9]{1,20})?")


def checked_id(value: object) -> str:
    """The id of a request, given as text or by its ticket.

    Raises:
        InvalidRequest: it can be none.
    """
    job_id = getattr(value, "id", value)
    if not isinstance(job_id, str):
        rule = "must be the id of a request" + not_a(job_id, str, "give a ticket, or its id as text")
        raise InvalidRequest("id", value, rule)
    try:
        size = len(job_id[: MAX_ID_BYTES + 1].encode())
    except UnicodeEncodeError:
        raise InvalidRequest("id", job_id, "must be text that UTF-8 can hold") from None
    if not 1 <= size <= MAX_ID_BYTES:
        raise InvalidRequest("id", job_id, f"must have 1 to {MAX_ID_BYTES} bytes")
    return job_id


def checked_ids(values: object) -> list[str]:
    """Ids of requests, given as any iterable of ids and tickets.

    Raises:
        InvalidRequest: it is none, or one of them can be no id.
    """
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        rule = "must be ids or tickets of requests" + not_a(values, list, "give a list, as [ticket.id]")
        raise InvalidRequest("ids", values, rule)
    return [checked_id(value) for value in values]


def checked_requests(values: object) -> list[CancelRequest]:
    """Requests, given as any iterable of them.

    Raises:
        InvalidRequest: it is none, or something in it is no request.
    """
    if isinstance(values, CancelRequest | Mapping | str | bytes) or not isinstance(values, Iterable):
        rule = "must be requests" + not_a(values, list, "give a list, as [CancelRequest(algo_id=7)]")
        raise InvalidRequest("requests", values, rule)
    requests = list(values)
    for position, value in enumerate(requests):
        if not isinstance(value, CancelRequest):
            cure = "give CancelRequest(**fields)" if isinstance(value, Mapping) else "give CancelRequest(algo_id=7)"
            raise InvalidRequest(f"requests[{position}]", value, "must be a CancelRequest" + not_a(value, list, cure))
    return requests


def checked_position(after: object) -> str:
    """``after``, if it can name a place in the ledger.

    Raises:
        InvalidRequest: it cannot.
    """
    if isinstance(after, str):
        is_id = _STREAM_ID.fullmatch(after) and all(int(part) < 2**64 for part in after.split("-"))
        if is_id or after == "$":
            return after
    rule = "must be a stream id such as 1700000000000-0, or $ for the newest entry"
    raise InvalidRequest("after", after, rule + not_a(after, str, "give text"))


def checked_wait(timeout_s: object) -> float | None:
    """How long to wait for outcomes, s; None: as long as it takes.

    Raises:
        InvalidRequest: it is no length of time.
    """
    if timeout_s is None:
        return None
    patience_s = checked_seconds("timeout_s", timeout_s, math.inf, or_zero=True)
    return None if patience_s == math.inf else float(patience_s)


def checked_timeout(timeout_s: object) -> float:
    """How long a call may take, s.

    Raises:
        InvalidRequest: it is no length of time, or none that a call can have.
    """
    return float(checked_seconds("timeout_s", timeout_s, MAX_TIMEOUT_S))
