"""The driver: one thing after the other, as chance has it, and a look at the rules now and then; at the end all is
drained."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator
from random import Random

from producer import OutcomeKind
from producer.keys import Band
from producer.message import decode_attempts
from tests.model.holders import WatchedStore
from tests.model.rq_steps import RQ, clean_late
from tests.model.rules import Finding
from tests.model.steps import OURS, Step, claim_by, complete_all, done, expire_hold, grow_old, repeat_call, resume, tidy
from tests.model.stock import STOCK
from tests.model.world import World

#: How often the rules are looked at, and old jobs forgotten, steps.
_CHECK_EVERY, _FORGET_EVERY = 3, 50
#: So many jobs are kept while the driver goes on; beyond it the ended ones are forgotten.
_MOST_JOBS = 100
#: RQ's entries of started jobs live no longer, s; our holders' outlast their deadline by an hour.
_STOCK_LIFE_S = 3000
#: Rounds in which a queue must be drained.
_DRAIN_ROUNDS = 300
#: Keys that may last: RQ's sets, lists and registries, our ledger.
_LASTING = ("rq:queues", "rq:workers", "rq:wip:", "rq:failed:", "rq:finished:", "rq:canceled:", "rq:scheduled:")
_STEPS = (*OURS, *RQ, *STOCK)


class Driver:
    """Drives one world by ``chance``."""

    def __init__(self, port: int, chance: Random) -> None:
        self.world = World(port, chance)
        self.world.meanwhile = self._meanwhile
        self._nested = tuple(step for step in _STEPS if step.may_nest)
        self._trouble: BaseException | None = None
        self._rq_cleans = chance.random() < 0.5  # at the end

    @property
    def count(self) -> Counter[str]:
        """What happened, by kind."""
        return self.world.count

    def run(self, steps: int) -> Iterator[int]:
        """Take so many steps and drain the queue; gives the number of each step, for who shows progress.

        Raises:
            Finding: a rule is broken.
        """
        world = self.world
        with _silence():
            for world.step in range(1, steps + 1):
                self._take(_STEPS)
                if world.step % _CHECK_EVERY == 0:
                    world.check()
                if world.step % _FORGET_EVERY == 0:
                    self._forget()
                yield world.step
            self._drain()

    def _take(self, steps: tuple[Step, ...]) -> None:
        step = self.world.chance.choices(steps, [step.weight for step in steps])[0]
        step.take(self.world)
        self._stop_at_trouble()

    def _stop_at_trouble(self) -> None:
        if self.world.model.first is not None:
            raise self.world.model.first
        if self._trouble is not None:
            raise self._trouble

    def _meanwhile(self) -> None:
        """Other things that happen while RQ is at work, between two of its round trips."""
        world = self.world
        if world.depth > 0 or world.chance.random() < 0.85:
            return
        world.depth += 1
        try:
            for _ in range(world.chance.randint(1, 4)):
                self._take(self._nested)
        except Exception as error:
            self._trouble = self._trouble or error
            raise
        finally:
            world.depth -= 1

    def _forget(self) -> None:
        world = self.world
        held = {job.hold.token for job in world.model.jobs.values() if job.hold is not None}
        world.hands = [hand for hand in world.hands if not hand.is_dead or hand.lease.token in held]
        if len(world.model.jobs) <= _MOST_JOBS:
            return
        world.check()
        busy = {hand.lease.id for hand in world.hands} | set(world.plain.lrange(world.keys.waiting, 0, -1))
        busy |= {own_id for call in world.unheard for own_id, _ in call.rows} | world.left_behind
        over = [job for job in world.model.jobs.values() if job.is_deleted or (job.done and not job.left_failed)]
        world.forget([job.id for job in over if job.id not in busy][: len(world.model.jobs) - _MOST_JOBS // 2])

    # -- the end --

    def _drain(self) -> None:
        world = self.world
        for hand in world.hands:
            hand.is_dead = hand.is_dead or world.chance.random() < 0.3
        while world.unheard:
            repeat_call(world)
        for _ in range(_DRAIN_ROUNDS):
            if self._drain_a_little(world.stores[-1]):
                break
        else:
            raise self._never_drained()
        resume(world)  # somebody may have suspended RQ meanwhile
        self._stop_at_trouble()
        self._judge()

    def _drain_a_little(self, store: WatchedStore) -> bool:
        world = self.world
        resume(world)
        for hand in [hand for hand in world.hands if not hand.is_dead]:
            made = len(decode_attempts(hand.lease.attempts))
            hand.sent = hand.sent or done(world, hand, OutcomeKind.CANCELLED, made)
            complete_all(world, hand.store, [hand])
        for job_id in [job.id for job in world.model.jobs.values() if job.hold is not None]:
            expire_hold(world, job_id)
        self._let_time_pass()
        leases = claim_by(world, store, 50, look_closely=True)
        tidy(world)
        world.check()
        return leases == 0 and not world.open_jobs() and world.link.ask_now(store.is_drained())

    def _let_time_pass(self) -> None:
        world, index = self.world, self.world.keys.unfinished
        grow_old(world)
        now_ms = world.now_ms()
        self._takes_for_abandoned(now_ms)
        for job_id, score in world.scores(index):
            job = world.model.jobs.get(job_id)
            if score >= Band.RETRY:
                self._falls_due(job_id, now_ms)
            elif score < Band.WAITING and job is not None and job.is_deleted:
                # The index knows the hold of a deleted job to its end, also when its holder has given it up.
                world.plain.zadd(index, {job_id: now_ms}, xx=True)

    def _never_drained(self) -> Finding:
        world, keys = self.world, self.world.keys
        left = [*world.scores(keys.unfinished), *world.scores(keys.scheduled)]
        job_id = next(iter(world.open_jobs()), left[0][0] if left else "-")
        return world.model.finding(1, job_id, "keeps the queue from being drained", left)

    def _takes_for_abandoned(self, now_ms: int) -> None:
        """What dead stock workers left in RQ's registry has run out. We must not need RQ to clean up."""
        if self._rq_cleans:
            clean_late(self.world)
            return
        started = self.world.keys.started
        for entry, score in self.world.scores(started):
            if score < now_ms / 1000 + _STOCK_LIFE_S:
                self.world.plain.zadd(started, {entry: now_ms / 1000}, xx=True)

    def _falls_due(self, job_id: str, now_ms: int) -> None:
        world, keys = self.world, self.world.keys
        if (job := world.model.jobs.get(job_id)) is not None and job.due_ms:
            job.due_ms = now_ms
            world.plain.hset(keys.job_prefix + job_id, "c_due_at_ms", now_ms)
        world.plain.zadd(keys.scheduled, {job_id: now_ms / 1000}, xx=True)
        world.plain.zadd(keys.unfinished, {job_id: Band.RETRY + now_ms}, xx=True)

    def _judge(self) -> None:
        world = self.world
        for job in world.model.jobs.values():
            runs = set(range(1, job.run + 1))
            if job.is_acknowledged and not job.is_deleted and set(job.outcomes) != runs:
                raise world.model.finding(1, job.id, f"has {job.run} runs and these outcomes", job.outcomes)
        for key in world.lasting_keys():
            if not key.startswith(_LASTING) and key not in (world.keys.outcomes, world.keys.counts):
                held = world.plain.hgetall(key) if world.plain.type(key) == "hash" else ""
                raise world.model.finding(12, key.rpartition(":")[2], "lasts for ever", key, held)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Neither RQ nor the job function prints anything."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


__all__ = ["Driver", "Finding"]
