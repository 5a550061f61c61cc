"""`python -m worker health`: whether a worker of this host is alive, for the probes of whoever keeps it running.

A worker beats once a second from its event loop, so a beat also says that the loop moved. Little is loaded here: a
probe comes every few seconds.
"""

from __future__ import annotations

import re
import socket

import redis

from producer.keys import Keys, WorkerField
from producer.redis_url import Address, why
from worker.settings import QueuePlace

__all__ = ["why_unhealthy"]

#: The oldest beat of a worker that is alive, s.
FRESH_S = 10
#: No answer is waited for longer, s.
_PATIENCE_S = 3
_NUMBER = re.compile(rb"[0-9]{1,18}")
#: Most workers of a queue that are looked at.
_MOST_WORKERS = 1_000


def why_unhealthy(place: QueuePlace) -> str | None:
    """Why no worker of this host on this queue is known to be alive; None: one has beaten within :data:`FRESH_S`."""
    try:
        with Address.parse(place.url).client(_PATIENCE_S, **place.options) as connection:
            ages_s = _ages_s(connection, Keys(place.queue))
    except (redis.RedisError, OSError) as error:
        return f"Redis does not answer ({why(error)}), so it is not known whether a worker is alive"
    if not ages_s:
        return f"no worker of this host ({socket.gethostname()}) is known on queue {place.queue}"
    youngest_s = min(ages_s)
    return None if youngest_s <= FRESH_S else f"the last beat of a worker of this host was {youngest_s:.0f} s ago"


def _ages_s(connection: redis.Redis, keys: Keys) -> list[float]:
    """How old the last beats of this host's workers are."""
    seconds, micros = connection.time()
    members = connection.srandmember(keys.queue_workers, _MOST_WORKERS) or []
    with connection.pipeline(transaction=False) as pipeline:
        for key in members:
            pipeline.execute_command("HMGET", key, "hostname", WorkerField.BEAT_AT_MS)
        found = pipeline.execute(raise_on_error=False)
    now_ms, host = seconds * 1000 + micros // 1000, socket.gethostname().encode()
    # What else stands among the workers, or in a worker's record, is passed over.
    known = [answer for answer in found if isinstance(answer, list)]
    return [(now_ms - int(beat)) / 1000 for name, beat in known if name == host and _NUMBER.fullmatch(beat or b"")]
