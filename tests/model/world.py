"""The world that a driver lives in: one queue on a real server, the model of it, and what stands in Redis."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import redis

from producer import CancelClient, CancelRequest
from producer.message import OnTrigger, OutcomeKind, decode_call, decode_outcome
from producer.protocol import Wire
from tests.model.holders import DEADLINE_MS, QUEUE, Hand, WatchedStore
from tests.model.rules import Asked, Finding, Model, Seen
from worker.redis_link import BlockingLink, connect

#: Leases of our holders, ms: some run out while others work, the last holder's never.
LEASES_MS = (40, 80, 200, 60_000)
#: How much is remembered of each job.
_TRACE = 200

#: All of one moment: the time, new entries of the ledger, pointers, and what is written of each job.
_LOOK = """
local at, pointers, rows = redis.call('TIME'), {}, {}
local n = tonumber(ARGV[6])
for i = 7, 6 + n do pointers[i - 6] = redis.call('GET', ARGV[5] .. ARGV[i]) or '' end
for i = 7 + n, #ARGV do
  local id, job = ARGV[i], ARGV[1] .. ARGV[i]
  local row = redis.call('HMGET', job, 'status', 'c_lease', 'c_done', 'c_run', 'c_due_at_ms', 'c_open_at_ms',
    'c_attempts')
  for k = 1, 7 do row[k] = row[k] or '' end
  row[8], row[9] = redis.call('EXISTS', job), redis.call('TTL', job)
  row[10], row[11] = redis.call('ZSCORE', ARGV[2], id) or '', redis.call('EXISTS', ARGV[3] .. id)
  rows[#rows + 1] = row
end
local position, ledger, counts = string.match(ARGV[4], '(%S+) (%S+) (%S+)')
local counted = {}
for n = 1, 16 do counted[n] = redis.call('BITFIELD', counts, 'GET', 'i64', '#' .. n)[1] end
return {at[1] * 1000 + math.floor(at[2] / 1000), redis.call('XRANGE', ledger, position, '+'), counted, pointers, rows}
"""


@dataclass(slots=True)
class Call:
    """The words of one enqueue call, which may be sent again."""

    number: int
    words: list[Any]
    script: str
    #: For each row of the words: its own id and what is asked.
    rows: list[tuple[str, Asked]] = field(default_factory=list)


class World:
    """Everything about the queue at ``port``; ``chance`` decides all that is left to chance."""

    def __init__(self, port: int, chance: Random) -> None:
        url = f"redis://127.0.0.1:{port}/0"
        self.url = url
        self.chance = chance
        self.plain = redis.Redis(port=port, decode_responses=True, encoding_errors="replace")
        self.raw = redis.Redis(port=port)
        self.client = CancelClient.from_url(url)
        self.keys = self.client.keys
        self.wire = Wire(QUEUE)
        self.connection = connect(url)
        self.link = BlockingLink(self.connection)
        self.model = Model(DEADLINE_MS)
        self.stores = [WatchedStore(self, f"ours{n}", lease_ms) for n, lease_ms in enumerate(LEASES_MS)]
        self.hands: list[Hand] = []
        self.unheard: list[Call] = []
        self.algo_ids = list(range(1, 8))
        self.client_ids = ["c1", "c2", "c3"]
        self.count = Counter[str]()
        self.step = 0
        self.depth = 0
        self.deleting = 0  # Queue.empty is under way: hashes may be gone
        self.in_rqs_hands = Counter[str]()  # popped by a stock worker that is not through with them
        self.left_behind: set[str] = set()  # popped by one that died
        self.fading: set[str] = set()  # unfinished, and yet RQ has given them a time to live
        self.meanwhile: Callable[[], None] = lambda: None  # what happens while RQ is at work
        self.tidied = (0, 0)
        self._calls = 0
        self._ledger_at = "-"
        self._traces: dict[str, deque[str]] = {}
        self._look = self.plain.register_script(_LOOK)

    def close(self) -> None:
        """Part with the server."""
        self.client.close()
        for each in (self.plain, self.raw, self.connection):
            each.close()

    def now_ms(self) -> int:
        """Redis' time."""
        seconds, micros = self.plain.time()
        return int(seconds) * 1000 + int(micros) // 1000

    # -- what happened --

    def note(self, job_id: str, text: str) -> None:
        """Keep what happened to a job."""
        trace = self._traces.setdefault(job_id, deque(maxlen=_TRACE))
        trace.append(f"{'  ' * self.depth}step {self.step}: {text}")

    def trace(self, finding: Finding) -> str:
        """The finding, and what happened to the jobs that it names, in order."""
        lines = [str(finding)]
        for job_id, trace in self._traces.items():
            if job_id == finding.job_id or job_id[:8] in str(finding):
                lines += [job_id[:8], *(f"  {line}" for line in trace)]
        return "\n  ".join(lines)

    def open_jobs(self) -> list[str]:
        """Ids of jobs that are to end yet."""
        return [job.id for job in self.model.jobs.values() if not job.done and not job.is_deleted]

    def idle_hands(self) -> list[Hand]:
        """Leases whose holders are alive and have not ended them."""
        return [hand for hand in self.hands if not hand.is_dead and hand.sent is None]

    # -- enqueueing --

    def call(self, requests: list[CancelRequest]) -> Call:
        """The words that enqueue the requests, not sent yet."""
        self._calls += 1
        conversation = self.wire.enqueue(requests, False)
        (command,) = next(conversation)
        conversation.close()
        call = Call(self._calls, list(command), self.wire.enqueue_script.source)
        for row in range(4, len(call.words), 7):
            own_id, _, data, _, deadline, _, child = call.words[row : row + 7]
            asked = self._asked(call.number, decode_call(data), deadline)
            call.rows.append((own_id, replace(asked, cancels_child=child == "1")))
        return call

    def _asked(self, number: int, request: CancelRequest, deadline: Any) -> Asked:
        child = request.on_trigger == OnTrigger.CANCEL_CHILD
        return Asked(number, request.order_key, request.joins, int(deadline) if deadline != "" else None, child)

    def send(self, call: Call, *, is_heard: bool, is_repeat: bool = False) -> list[str]:
        """Send the words of a call, and tell the model what came of them; gives the ids of the carrying jobs."""
        now_ms = self.now_ms()
        answer = self._sent(call)
        for (own_id, asked), job_id in zip(call.rows, answer[1::2], strict=True):
            is_new = job_id not in self.model.jobs
            job = self.model.acknowledged(asked, job_id, now_ms, is_repeat=is_repeat)
            job.is_acknowledged = is_heard or (job.is_acknowledged and not is_new)
            how = "made" if is_new else "its own" if job_id == own_id else "joined"
            self.note(job_id, f"call {call.number} asks for {asked.order} in {asked.deadline_ms} ms: {how}")
        if is_repeat:
            self.check()  # a second row for its order may have begun a run that RQ was told to make
        return answer[1::2]

    def _sent(self, call: Call) -> list[str]:
        try:
            answer = self.plain.execute_command(*call.words)
        except redis.exceptions.NoScriptError:
            answer = self.plain.execute_command("EVAL", call.script, *call.words[2:])
        return list(answer)

    def enqueue(self, requests: list[CancelRequest]) -> None:
        """Have the client enqueue them."""
        self._calls += 1
        now_ms = self.now_ms()
        tickets = self.client.cancel_many(requests)
        for request, ticket in zip(requests, tickets, strict=True):
            deadline_ms = "" if request.deadline_s is None else request.deadline_s * 1000
            asked = self._asked(self._calls, request, deadline_ms)
            is_new = ticket.id not in self.model.jobs
            if ticket.id != ticket.id.lower() or ticket.request != request:
                raise self.model.finding(8, ticket.id, "is a ticket of another request", request)
            job = self.model.acknowledged(asked, ticket.id, now_ms)
            job.is_acknowledged = True
            how = "new" if is_new else "joined"
            self.note(ticket.id, f"call {self._calls} asks for {asked.order} in {asked.deadline_ms} ms: {how}")

    # -- what stands in Redis --

    def check(self) -> None:
        """Show the model what stands in Redis."""
        model = self.model
        ids = [job.id for job in model.jobs.values() if not job.is_expired]
        orders = sorted({job.order for job in model.jobs.values() if ":a:" in job.order})
        now_ms, ledger, counted, led_to, rows = self._looked(orders, ids)
        for position, fields in ledger:
            self._ledger_at = f"({position}"
            outcome = decode_outcome(dict(zip(fields[::2], fields[1::2], strict=True))["outcome"])
            for named in outcome.orders or ():
                self.note(named.id, f"is named by the listing {outcome.id[:8]} for order {named.algo_id}")
            model.recorded(outcome)
        if dict(zip(OutcomeKind, counted, strict=False)) != {kind: model.recorded_kinds[kind] for kind in OutcomeKind}:
            raise model.finding(15, "", "counts differ from the ledger", counted, dict(model.recorded_kinds))
        for seen in map(_seen, ids, rows):
            self._show(seen, now_ms)
        for order, job_id in zip(orders, led_to, strict=True):
            model.leads_to(order, job_id)

    def _looked(self, orders: list[str], ids: list[str]) -> Any:
        keys = self.keys
        first = (
            keys.job_prefix,
            keys.unfinished,
            keys.outcome_prefix,
            f"{self._ledger_at} {keys.outcomes} {keys.counts}",
        )
        return self._look(args=[*first, keys.order_prefix, len(orders), *orders, *ids])

    def _show(self, seen: Seen, now_ms: int) -> None:
        job = self.model.jobs[seen.id]
        if not seen.exists and self.deleting and not job.is_expired:
            job.is_deleted = True
            self.note(seen.id, "its hash is gone with the queue")
        in_hands = seen.id in self.left_behind or self.in_rqs_hands[seen.id] > 0
        if seen.ttl >= 0:
            self.left_behind.discard(seen.id)
        is_fading = seen.ttl >= 0 and not seen.done and not job.is_deleted
        (self.fading.add if is_fading else self.fading.discard)(seen.id)
        self.model.seen(seen, now_ms, is_in_rqs_hands=in_hands)

    def forget(self, job_ids: list[str]) -> None:
        """All keys of ended jobs run out, as their time to live would have it."""
        keys, jobs = self.keys, self.model.jobs
        for job_id in job_ids:
            job = jobs.pop(job_id)
            if self.model.pointers.get(job.order) == job_id:
                del self.model.pointers[job.order]
                self.plain.delete(keys.order_prefix + job.order)
            self.plain.delete(keys.job_prefix + job_id, keys.outcome_prefix + job_id, keys.result_prefix + job_id)
            for registry in (keys.finished, keys.failed, keys.scheduled, keys.unfinished):
                self.plain.zrem(registry, job_id)
            if job.is_acknowledged and not job.is_deleted and set(job.outcomes) != set(range(1, job.run + 1)):
                raise self.model.finding(1, job_id, f"is over after {job.run} runs with these outcomes", job.outcomes)
            self.model.forgotten.add(job_id)
            self.left_behind.discard(job_id)
            self.fading.discard(job_id)
            self._traces.pop(job_id, None)

    def scores(self, key: str) -> list[tuple[str, float]]:
        """Members of a sorted set, and their scores."""
        found: Any = self.plain.zrange(key, 0, -1, withscores=True)
        return [(str(member), float(score)) for member, score in found]

    def lasting_keys(self) -> Iterator[str]:
        """Keys without a time to live."""
        for key in self.plain.scan_iter("*", 1000):
            if self.plain.ttl(key) == -1:
                yield key


def _seen(job_id: str, row: list[Any]) -> Seen:
    status, lease, done, run, due, open_at, attempts, exists, ttl, score, has_record = row
    return Seen(
        id=job_id,
        exists=exists == 1,
        status=status,
        lease=lease,
        done=done,
        run=int(run or 1),
        due_ms=int(due or 0),
        open_at=open_at,
        attempts=attempts,
        ttl=ttl,
        score=float(score) if score else None,
        has_record=has_record == 1,
    )
