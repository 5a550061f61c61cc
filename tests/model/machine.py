"""A state machine over the scripts, small enough for exact foresight: what every call gives is known before it is made.

Leases and retries last either no time at all or a minute; RQ's part is what people do with it.
"""

from __future__ import annotations

import time
from random import Random

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from rq import Queue
from rq.job import Job as RqJob
from rq.job import JobStatus
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer

from producer import CancelRequest, OutcomeKind
from producer.keys import FAILURE_TTL_S, RESULT_TTL_S, Band
from producer.message import OpenRequest, decode_attempts
from tests.model.holders import QUEUE, Hand, WatchedStore
from tests.model.rules import FAILED, Job
from tests.model.steps import attempts, calls_of, done, is_listing, listed, resume
from tests.model.world import World
from worker.store import Lease, Release, Retry, Row, Suspect

#: A lease that is over when the next claim comes, and one that outlasts the test, ms.
DEAD_MS, LIVE_MS = 1, 60_000
FAR_MS = 60_000
SUSPECT = Suspect("default", "0123456789abcdef")
#: What waits for so long while slots are left over stands in no list, ms.
OVERLOOKED_MS = 5_000
NUMBERS = st.integers(0, 30)
REQUESTS = st.one_of(
    st.integers(1, 4).map(lambda n: CancelRequest(algo_id=n)),
    st.integers(1, 4).map(lambda n: CancelRequest(algo_id=n, urgent=True, deadline_s=400)),
    st.integers(1, 4).map(lambda n: CancelRequest(algo_id=n, on_trigger="cancel_child")),
    st.sampled_from("xy").map(lambda name: CancelRequest(client_algo_id=name)),
    st.sampled_from((None, 400)).map(lambda deadline_s: OpenRequest(symbol="BTCUSDT", deadline_s=deadline_s)),
)
ENDS = st.sampled_from(("cancelled", "triggered", "unknown", "refused", "retry now", "retry later", "release", "tried"))


class QueueMachine(RuleBasedStateMachine):
    """One queue on the server at ``port``."""

    port: int

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.port, Random(0))
        self.world.plain.flushall()
        self.model = self.world.model
        self._stores: dict[tuple[str, int], WatchedStore] = {}
        self.is_paused = False
        self.removed: set[str] = set()  # taken off the list by a person
        self.late: set[str] = set()  # given a time to live by RQ, and not leased since

    def teardown(self) -> None:
        """Part with the server."""
        self.world.close()

    def _store(self, holder: str, lease_ms: int) -> WatchedStore:
        key = (holder, lease_ms)
        if key not in self._stores:
            self._stores[key] = WatchedStore(self.world, holder, lease_ms)
        return self._stores[key]

    def _jobs(self) -> list[Job]:
        return [job for job in self.model.jobs.values() if not job.is_deleted]

    def _pick(self, number: int) -> Job | None:
        jobs = self._jobs()
        return jobs[number % len(jobs)] if jobs else None

    # -- producers --

    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=4), twice=st.booleans())
    def enqueue(self, requests: list[CancelRequest], twice: bool) -> None:
        """Requests are enqueued, maybe twice in the same words."""
        call, before = self.world.call(requests), set(self.model.jobs)
        for is_repeat in (False, True)[: 1 + twice]:
            carrying = self.world.send(call, is_heard=True, is_repeat=is_repeat)
            if not is_repeat:
                self._are_at_hand(before.intersection(carrying))
        self.removed &= {job.id for job in self._jobs() if job.id not in self._listed()}

    def _are_at_hand(self, joined: set[str]) -> None:
        """What a request joins stands in the list, if nobody has it and it waits for nothing."""
        now_ms, listed = self.world.now_ms(), self._listed()
        for job in (self.model.jobs[job_id] for job_id in joined):
            assert job.hold is not None or job.due_ms > now_ms or job.id in listed, job

    @rule()
    def retry_all(self) -> None:
        """The client retries all that failed."""
        failed = {job.id for job in self._jobs() if job.done in FAILED and not job.left_failed}
        assert set(self.world.client.failed_ids()) == failed
        now_ms = self.world.now_ms()
        started = self.world.client.retry(sorted(failed)) if failed else []
        assert set(started) == failed
        for job_id in started:
            self.model.retried(job_id, now_ms)

    # -- holders --

    @rule(
        holder=st.sampled_from("AB"),
        lease_ms=st.sampled_from((DEAD_MS, LIVE_MS)),
        slots=st.integers(1, 5),
        bring_back=st.booleans(),
        take_lost=st.booleans(),
    )
    def claim(self, holder: str, lease_ms: int, slots: int, bring_back: bool, take_lost: bool) -> None:
        """A worker claims, and is given exactly what is free, as far as it has slots."""
        time.sleep(0.003)
        store = self._store(holder, lease_ms)
        at_hand = self._free(bring_back=bring_back, take_lost=take_lost)
        free = at_hand | (self._overlooked() if bring_back and not self.is_paused else set())
        request = store.claim(slots, wait=False, bring_back=bring_back, take_lost=take_lost)
        claimed = self.world.link.ask_now(request)
        ids = [lease.id for lease in claimed.leases]
        assert set(ids) <= free, (ids, free)
        assert min(slots, len(at_hand)) <= len(ids), (ids, at_hand)
        assert len(ids) == slots or at_hand <= set(ids), (ids, at_hand)
        assert ids or not free, free  # where nothing else is at hand, what was overlooked comes
        assert (claimed.gate_until_ms > 0 or claimed.suspended) == self.is_paused
        self._given(store, claimed.leases)
        self.removed.difference_update(ids)

    def _given(self, store: WatchedStore, leases: list[Lease]) -> None:
        self.world.hands += [Hand(store, lease) for lease in leases]
        self.late.difference_update(lease.id for lease in leases)

    def _free(self, *, bring_back: bool, take_lost: bool) -> set[str]:
        """What a claim gives as far as it has slots, beside what was overlooked."""
        now_ms, listed = self.world.now_ms(), self._listed()
        free = set[str]()
        for job in self._jobs():
            is_lost = job.hold is not None and job.hold.ends_ms <= now_ms and take_lost
            is_due = job.due_ms != 0 and job.due_ms <= now_ms
            is_at_hand = job.id in listed or (bring_back and (is_lost or is_due))
            if self.is_paused:  # what waits is looked through by the index
                is_at_hand = job.is_recalled
            is_open = not job.done or (job.left_failed and job.id in listed)
            is_ripe = job.due_ms <= now_ms or (job.is_recalled and job.id in listed)
            if is_open and (job.hold is None or is_lost) and is_at_hand and is_ripe:
                free.add(job.id)
        return free

    def _overlooked(self) -> set[str]:
        """What waits for so long that it must have fallen off the list."""
        oldest, scores = (
            Band.WAITING + self.world.now_ms() - OVERLOOKED_MS,
            self.world.scores(self.world.keys.unfinished),
        )
        waiting = {job_id for job_id, score in scores if Band.WAITING <= score <= oldest}
        return {job.id for job in self._jobs() if job.id in waiting and not job.done}

    def _listed(self) -> set[str]:
        keys = self.world.keys
        return {str(job_id) for key in (keys.waiting, keys.claiming) for job_id in self.world.plain.lrange(key, 0, -1)}

    @precondition(lambda self: self.model.jobs)
    @rule(number=NUMBERS, lease_ms=st.sampled_from((DEAD_MS, LIVE_MS)))
    def stock_claims(self, number: int, lease_ms: int) -> None:
        """A stock worker asks for one job, and is told why it is not given."""
        time.sleep(0.003)
        job = self._pick(number)
        if job is None or job.left_failed:
            return
        store, now_ms = self._store("stock", lease_ms), self.world.now_ms()
        expected = self._why_not(job, now_ms)
        claimed = self.world.link.ask_now(store.claim_one(job.id))
        assert claimed.why_not == expected
        assert [lease.id for lease in claimed.leases] == ([] if expected else [job.id])
        self._given(store, claimed.leases)

    def _why_not(self, job: Job, now_ms: int) -> str:
        is_held = job.hold is not None and job.hold.ends_ms > now_ms
        if job.done or is_held:
            return "settled" if job.done else "held"
        if job.is_recalled:
            return ""
        if job.due_ms > now_ms:
            return "scheduled"
        return "closed" if self._gate_is_closed() else ""

    def _gate_is_closed(self) -> bool:
        until_ms = self.world.plain.hget(self.world.keys.gate("all"), "until_ms")
        return int(until_ms or 0) > self.world.now_ms()

    @precondition(lambda self: self.world.hands)
    @rule(picks=st.lists(st.tuples(NUMBERS, ENDS), min_size=1, max_size=3))
    def complete(self, picks: list[tuple[int, str]]) -> None:
        """Holds are ended in one call, also such as were lost or ended before."""
        hands = self.world.hands
        chosen = {id(hand): (hand, end) for hand, end in ((hands[n % len(hands)], end) for n, end in picks)}
        store = next(iter(chosen.values()))[0].store
        mine = [
            (hand, end) for hand, end in chosen.values() if (hand.store.holder == "stock") == (store.holder == "stock")
        ]
        for pairs in calls_of([(hand, hand.sent or self._row(hand, end)) for hand, end in mine]):
            rows = [row for _, row in pairs]
            jobs = [row.lease.id for row in rows]
            expected = [self._last_answer(row) if jobs.count(row.lease.id) == 1 else None for row in rows]
            completed = self.world.link.ask_now(store.complete(rows))
            for (hand, row), answer, before in zip(pairs, completed.answers, expected, strict=True):
                hand.sent = row
                assert before is None or answer == before, (row, answer, before)
        self.removed &= {job.id for job in self._jobs() if job.id not in self._listed()}

    def _last_answer(self, row: Row) -> int | None:
        """What a row must be answered that repeats the last end of its job."""
        job = self.model.jobs[row.lease.id]
        last = next(reversed(job.ended), None)
        return job.ended[last] if last == row.lease.token and not job.is_deleted else None

    def _row(self, hand: Hand, end: str) -> Row:
        lease, made = hand.lease, len(decode_attempts(hand.lease.attempts))
        match end:
            case "retry now":
                return Retry(lease, attempts(made + 1), 0)
            case "retry later":
                return Retry(lease, attempts(made + 1), FAR_MS)
            case "release":
                return Release(lease)
            case "tried":
                return Release(lease, attempts(made + 1))
            case "cancelled" | "triggered" if is_listing(hand):
                return listed(self.world, hand, made + 1)
        return done(self.world, hand, OutcomeKind(end), made)

    @precondition(lambda self: self.world.hands)
    @rule()
    def renew(self) -> None:
        """All leases that were ever given are renewed: exactly those that were not lost or ended go on."""
        store = self._store("A", LIVE_MS)
        leases = [hand.lease for hand in self.world.hands]
        held = {job.hold.token for job in self._jobs() if job.hold is not None}
        beat = self.world.link.ask_now(store.beat(leases, None, 1))
        known = {lease.token for lease in leases if not self.model.jobs[lease.id].is_deleted}
        assert beat.lost & known == known - held

    # -- people --

    @rule(how=st.sampled_from(("close", "suspend", "open")))
    def pause(self, how: str) -> None:
        """The gate is closed, RQ is suspended, or both are over."""
        if how == "close":
            self.world.link.ask_now(self._store("A", LIVE_MS).close_gate(FAR_MS, "why", False))
        elif how == "suspend":
            self.world.plain.set(self.world.keys.suspended, 1)
        else:
            resume(self.world)
        self.is_paused = how != "open"
        if how == "close":
            assert self._gate_is_closed()

    @rule(number=NUMBERS)
    def requeue(self, number: int) -> None:
        """RQ's requeue of a failed job."""
        job = self._pick(number)
        if job is None or job.done not in FAILED or job.left_failed:
            return
        FailedJobRegistry(QUEUE, connection=self.world.raw, serializer=JSONSerializer).requeue(job.id)
        job.left_failed = True

    @rule(number=NUMBERS, is_stopped=st.booleans())
    def cancel(self, number: int, is_stopped: bool) -> None:
        """A person cancels an unfinished job through RQ, or has a stock worker stop it."""
        job = self._pick(number)
        if job is not None and not job.done and not job.is_recalled:
            rq_job = RqJob.fetch(job.id, connection=self.world.raw, serializer=JSONSerializer)
            if is_stopped:
                rq_job.set_status(JobStatus.STOPPED)
            else:
                rq_job.cancel()
            job.is_recalled = job.is_surely_recalled = True

    @rule(number=NUMBERS)
    def rq_is_late(self, number: int) -> None:
        """RQ finishes with an earlier run of a waiting job, and gives it a time to live."""
        job = self._pick(number)
        if job is not None and not job.done and job.hold is None:
            self.world.plain.expire(self.world.keys.job_prefix + job.id, RESULT_TTL_S)
            self.late.add(job.id)

    @rule()
    def left_in_claiming(self) -> None:
        """The connection of a holder breaks between the blocking move and the claim."""
        keys = self.world.keys
        self.world.plain.lmove(keys.waiting, keys.claiming, "LEFT", "RIGHT")

    @rule(number=NUMBERS)
    def delete(self, number: int) -> None:
        """A person deletes a job through RQ."""
        job = self._pick(number)
        if job is not None:
            RqJob.fetch(job.id, connection=self.world.raw, serializer=JSONSerializer).delete()
            job.is_deleted = True

    @rule(number=NUMBERS)
    def remove(self, number: int) -> None:
        """A person takes a waiting job off the list."""
        job = self._pick(number)
        if job is not None and not job.done:
            while Queue(QUEUE, connection=self.world.raw, serializer=JSONSerializer).remove(job.id):
                self.removed.add(job.id)

    @rule()
    def grow_old(self) -> None:
        """All that waits has waited for long."""
        index = self.world.keys.unfinished
        for job_id, score in self.world.scores(index):
            if Band.WAITING <= score < Band.RETRY:
                self.world.plain.zadd(index, {job_id: score - 2 * OVERLOOKED_MS}, xx=True)

    @rule(numbers=st.lists(NUMBERS, min_size=1, max_size=3))
    def key_is_accepted_again(self, numbers: list[int]) -> None:
        """What waited for its key, which was refused, is due at once when the key is accepted."""
        store, link, jobs = self._store("A", LIVE_MS), self.world.link, [self._pick(number) for number in numbers]
        assert link.ask_now(store.key(SUSPECT, "ask", "", 1, FAR_MS)) == (0, "")
        assert link.ask_now(store.key(SUSPECT, "failed", "why", 1, FAR_MS))[0] > self.world.now_ms()
        for job in jobs:
            if job is not None:
                assert link.ask_now(store.key(SUSPECT, "ask", job.id, 1, FAR_MS))[0] > self.world.now_ms()
        before_ms = self.world.now_ms()
        assert link.ask_now(store.key(SUSPECT, "answered", "", 1, FAR_MS)) == (0, "")
        for job in jobs:
            if job is not None and job.due_ms and job.hold is None:
                job.due_ms = int(self.world.plain.hget(self.world.keys.job_prefix + job.id, "c_due_at_ms") or 0)
                assert before_ms <= job.due_ms <= self.world.now_ms()

    @rule(number=NUMBERS)
    def push_again(self, number: int) -> None:
        """An id comes into the list once more."""
        if (job := self._pick(number)) is not None:
            self.world.plain.lpush(self.world.keys.waiting, job.id)

    @rule()
    def tidy(self) -> None:
        """A worker of ours tidies: nothing changes for any job."""
        self.world.link.ask_now(self._store("A", LIVE_MS).tidy(0, 0))

    @rule()
    def flush_scripts(self) -> None:
        """The server forgets all scripts."""
        self.world.plain.script_flush()

    # -- what always holds --

    @invariant()
    def rules_hold(self) -> None:
        """The rules, and RQ's view of every job that no stock worker touched."""
        self.world.check()
        keys, plain = self.world.keys, self.world.plain
        finished, failed = (set(plain.zrange(key, 0, -1)) for key in (keys.finished, keys.failed))
        started = {entry for entry, _ in self.world.scores(keys.started)}
        listed = self._listed()
        for job in self._jobs():
            status, ttl_s = plain.hget(keys.job_prefix + job.id, "status"), plain.ttl(keys.job_prefix + job.id)
            if job.left_failed:
                continue
            if job.done:
                life_s = FAILURE_TTL_S if job.done in FAILED else RESULT_TTL_S
                assert (status, life_s - 60 < ttl_s <= life_s) == ("failed" if job.done in FAILED else "finished", True)
                assert (job.id in failed, job.id in finished) == (job.done in FAILED, job.done not in FAILED)
                assert not any(entry.startswith(job.id) for entry in started)
                continue
            assert ttl_s == -1 or job.id in self.late
            assert job.id not in failed | finished
            assert not job.is_recalled or status in ("canceled", "stopped")
            shown = {entry for entry in started if entry.startswith(job.id)}
            if job.hold is not None:
                is_ours = self._is_of_ours(job.hold.token)
                assert shown == ({f"{job.id}:{job.hold.token}"} if is_ours else set())
            elif not job.is_recalled and job.due_ms == 0:
                assert job.id in listed | self.removed or status == "started", job
        self._only_retries_are_scheduled()

    def _is_of_ours(self, token: str) -> bool:
        return all(hand.store.holder != "stock" for hand in self.world.hands if hand.lease.token == token)

    def _only_retries_are_scheduled(self) -> None:
        known = {job.id: job for job in self._jobs() if not job.is_recalled}
        scheduled = {job_id for job_id, _ in self.world.scores(self.world.keys.scheduled) if job_id in known}
        now_ms = self.world.now_ms()
        waiting = {job.id for job in known.values() if job.due_ms > now_ms}
        assert (
            waiting <= scheduled <= {job.id for job in known.values() if job.due_ms}
        )  # any claim may bring back others
