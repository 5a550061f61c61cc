"""What can happen to a queue without RQ: producers, our holders, pauses, and time that passes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from producer import CancelRequest, OutcomeKind
from producer.keys import Band
from producer.message import Attempt, Call, ListedOrder, OpenRequest, Outcome, decode_attempts, decode_call
from tests.model.holders import Hand, WatchedStore
from tests.model.rules import FAILED
from tests.model.world import World
from worker.store import Done, Release, Retry, Row, is_alone

GOOD = tuple(kind for kind in OutcomeKind if not kind.failed and kind is not OutcomeKind.LISTED)
BAD = tuple(kind for kind in OutcomeKind if kind.failed)
#: A waiting job that is older than this is found without a list, s.
_OVERLOOKED_S = 31


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that can happen, and how often beside the others."""

    weight: float
    take: Callable[[World], None]
    may_nest: bool = True  # also while RQ is at work


# -- producers --------------------------------------------------------------------------------------------------------


def a_request(world: World) -> CancelRequest:
    """One order of a few, so that requests meet, or all open ones."""
    chance = world.chance
    which: dict[str, Any] = {"algo_id": chance.choice(world.algo_ids)}
    if chance.random() < 0.25:
        which = {"client_algo_id": chance.choice(world.client_ids)}
    deadline_s = chance.choice((None, None, None, 0.03, 0.2, 400.0))
    on_trigger = "cancel_child" if chance.random() < 0.1 else "report"
    how: dict[str, Any] = {"urgent": chance.random() < 0.25, "deadline_s": deadline_s, "on_trigger": on_trigger}
    return OpenRequest(symbol="BTCUSDT", **how) if chance.random() < 0.1 else CancelRequest(**which, **how)


def enqueue(world: World) -> None:
    """A strategy asks, and hears its tickets or not; then it asks again in the same words, at once or later."""
    asked = [a_request(world) for _ in range(world.chance.choice((1, 1, 1, 2, 5)))]
    world.count["requests"] += len(asked)
    if world.chance.random() < 0.4:
        world.enqueue(asked)
        return
    call = world.call(asked)
    is_heard = world.chance.random() < 0.7
    world.send(call, is_heard=is_heard)
    if not is_heard:
        world.count["enqueue replies lost"] += 1
        world.unheard.append(call)


def repeat_call(world: World) -> None:
    """A call whose reply was lost is sent again."""
    if world.unheard:
        call = world.unheard.pop(world.chance.randrange(len(world.unheard)))
        world.send(call, is_heard=True, is_repeat=True)
        world.count["enqueue calls repeated"] += 1


def retry(world: World) -> None:
    """The client's retry, of failed jobs and of others."""
    model, now_ms = world.model, world.now_ms()
    failed = set(world.plain.zrange(world.keys.failed, 0, -1))
    known = [job for job in model.jobs.values() if not job.is_expired and not job.is_deleted]
    likely = [job for job in known if job.id in failed] or known
    chosen = world.chance.sample(likely, min(len(likely), 3))
    if known and world.chance.random() < 0.3:
        chosen.append(world.chance.choice(known))
    ids = list(dict.fromkeys(job.id for job in chosen))
    started = world.client.retry(ids, missing_ok=True) if ids else []
    for job in chosen:
        if job.id in started:
            world.note(job.id, "is retried by the client")
            model.retried(job.id, now_ms)
            world.count["retries by the client"] += 1
        elif job.done in FAILED and job.id in failed:
            raise world.model.finding(6, job.id, "has failed, and cannot be retried", job.done)


# -- our holders ------------------------------------------------------------------------------------------------------


def claim(world: World) -> None:
    """A holder claims in one of the ways that a worker does, and hears what it was given or not."""
    chance = world.chance
    how = {
        "bring_back": chance.random() < 0.9,
        "take_lost": chance.random() < 0.9,
        "look_closely": chance.random() < 0.5,
    }
    claim_by(world, chance.choice(world.stores), chance.randint(1, 6), is_heard=chance.random() < 0.92, **how)


def claim_by(world: World, store: WatchedStore, slots: int, *, is_heard: bool = True, **how: bool) -> int:
    """Claim for a holder, ``how`` as :meth:`Store.claim` has it; gives how many leases came."""
    may_wait = world.plain.llen(world.keys.waiting) > 0  # then it will not have to
    claimed = world.link.ask_now(store.claim(slots, wait=may_wait and world.chance.random() < 0.3, **how))
    if claimed.damaged:
        raise world.model.finding(1, claimed.damaged[0], "is said to be damaged", claimed.damaged)
    world.count["leases"] += len(claimed.leases)
    world.count["claim replies lost"] += bool(claimed.leases) and not is_heard
    world.hands += [Hand(store, lease, is_dead=not is_heard) for lease in claimed.leases]
    return len(claimed.leases)


def attempts(count: int) -> tuple[Attempt, ...]:
    """A history of so many cancels without an answer."""
    return tuple(Attempt(n, 10**12 + n, Call.CANCEL, 503, -1000, "x", "unclear", 1) for n in range(1, count + 1))


def a_row(world: World, hand: Hand) -> Row:
    """How a holder ends its hold: every kind of outcome, retries, releases."""
    chance, lease = world.chance, hand.lease
    made, pin = len(decode_attempts(lease.attempts)), chance.choice(("", '{"algo_id":7,"symbol":null}'))
    if lease.fault:
        return done(world, hand, chance.choice((OutcomeKind.GAVE_UP, OutcomeKind.UNKNOWN)), made)
    what = chance.random()
    if is_listing(hand) and what < 0.4:
        return listed(world, hand, made + 1)
    if what < 0.5:
        kind = chance.choice(GOOD if chance.random() < 0.6 else BAD)
        return done(world, hand, kind, made + chance.randint(0, 1), pin)
    if what < 0.8:
        return Retry(lease, attempts(made + chance.randint(0, 2)), chance.choice((0, 1, 30, 120, 1500)), pin)
    return Release(lease, None if chance.random() < 0.6 else attempts(made + chance.randint(0, 1)), pin)


def done(world: World, hand: Hand, kind: OutcomeKind, made: int, pin: str = "") -> Done:
    """The row of an outcome."""
    lease = hand.lease
    return Done(
        lease,
        Outcome(
            lease.id,
            lease.run,
            kind,
            attempts=attempts(made),
            enqueued_at_ms=lease.enqueued_at_ms,
            finished_at_ms=world.chance.randrange(10**12),
            worker=hand.store.holder,
            error="why",
        ),
        pin,
    )


def is_listing(hand: Hand) -> bool:
    """Whether all open orders of a symbol are asked for."""
    return isinstance(decode_call(hand.lease.data), OpenRequest)


def listed(world: World, hand: Hand, made: int) -> Done:
    """The row of a listing that names some orders."""
    chance, row = world.chance, done(world, hand, OutcomeKind.LISTED, made)
    asked = [CancelRequest(algo_id=i) for i in chance.sample(world.algo_ids, chance.randint(1, 4))]
    requests = tuple((f"{chance.getrandbits(128):032x}", request) for request in asked)
    orders = tuple(ListedOrder(request.algo_id or 0, job_id) for job_id, request in requests)
    return replace(row, outcome=replace(row.outcome, orders=orders), requests=requests)


def complete(world: World) -> None:
    """A holder ends some of its holds, in time or late, or sends rows again whose answer it did not hear."""
    hands = [hand for hand in world.hands if not hand.is_dead]
    if not hands:
        return
    store = world.chance.choice(hands).store
    mine = [hand for hand in hands if hand.store is store]
    chosen = world.chance.sample(mine, min(len(mine), world.chance.randint(1, 6)))
    complete_all(world, store, chosen, is_heard=world.chance.random() < 0.85)


def complete_all(world: World, store: WatchedStore, hands: list[Hand], *, is_heard: bool = True) -> None:
    """End these holds."""
    world.count["rows sent again"] += sum(hand.sent is not None for hand in hands)
    pairs = [(hand, hand.sent or a_row(world, hand)) for hand in hands]
    rest = [pair for pair in pairs if not is_alone(pair[1])]
    # What makes requests is ended by a call of its own, all else by one.
    for call in [*([pair] for pair in pairs if is_alone(pair[1])), *([rest] if rest else [])]:
        _complete(world, store, call, is_heard=is_heard)
    ended = {id(hand) for hand in hands if hand.sent is None}
    world.hands = [hand for hand in world.hands if id(hand) not in ended]


def _complete(world: World, store: WatchedStore, pairs: list[tuple[Hand, Row]], *, is_heard: bool) -> None:
    lost = [hand.lease.id for hand, _ in pairs if not _is_held(world, hand)]
    stale = {job_id for job_id in lost if sum(hand.lease.id == job_id for hand, _ in pairs) == 1}
    before = {job_id: _written(world, job_id) for job_id in stale}
    completed = world.link.ask_now(store.complete([row for _, row in pairs]))
    for job_id in stale:
        job = world.model.jobs.get(job_id)
        is_fair = job is not None and not job.is_deleted
        if is_fair and _written(world, job_id) != before[job_id]:
            raise world.model.finding(3, job_id, "is changed by a completion under a lease that was lost")
    for (hand, row), answer in zip(pairs, completed.answers, strict=True):
        world.count[_kind(row) if answer else "completions fenced off"] += 1
        hand.sent = None if is_heard else row


def _is_held(world: World, hand: Hand) -> bool:
    job = world.model.jobs.get(hand.lease.id)
    return job is not None and job.hold is not None and job.hold.token == hand.lease.token


def _kind(row: Row) -> str:
    return f"done {row.outcome.kind.value}" if isinstance(row, Done) else type(row).__name__.lower()


def _written(world: World, job_id: str) -> list[Any]:
    """What stands of it; without the end of a lease, which a stock worker's thread prolongs at any time."""
    keys, plain = world.keys, world.plain
    with plain.pipeline() as pipeline:
        pipeline.hgetall(keys.job_prefix + job_id)
        for registry in (keys.unfinished, keys.scheduled, keys.failed, keys.finished):
            pipeline.zscore(registry, job_id)
        pipeline.get(keys.outcome_prefix + job_id)
        pipeline.lrange(keys.waiting, 0, -1)
        job, indexed, *written, waiting = pipeline.execute()
    return [job, None if indexed is None else max(indexed, Band.WAITING), *written, waiting.count(job_id)]


def renew(world: World) -> None:
    """A holder renews what it holds, also what it has lost without knowing."""
    hands = world.idle_hands()
    if hands:
        store = world.chance.choice(hands).store
        world.link.ask_now(store.beat([hand.lease for hand in hands if hand.store is store], None, 1))
        world.count["beats"] += 1


def die(world: World) -> None:
    """A holder dies with a lease in hand."""
    hands = world.idle_hands()
    if hands:
        hand = world.chance.choice(hands)
        hand.is_dead = True
        world.note(hand.lease.id, f"{hand.store.holder} dies")
        world.count["holders dead"] += 1


def left_in_claiming(world: World) -> None:
    """The connection of a holder breaks between the blocking move and the claim."""
    keys = world.keys
    if world.plain.lmove(keys.waiting, keys.claiming, "LEFT", "RIGHT") is not None:
        world.count["ids left in the claiming list"] += 1


def tidy(world: World) -> None:
    """A worker of ours tidies: a waiting job that would run out, as RQ was late with its own, no longer does."""
    waiting = world.plain.lrange(world.keys.waiting, 0, -1) if world.tidied[1] == 0 else []
    cursor, position, damaged = world.link.ask_now(world.stores[0].tidy(*world.tidied))
    world.tidied = cursor, position
    world.count["steps of tidying"] += 1
    if damaged:
        raise world.model.finding(1, damaged[0], "is said to be damaged")
    world.check()
    if fading := world.fading.intersection(waiting):
        raise world.model.finding(12, fading.pop(), "runs out though it waits")


# -- pauses, time, the server -----------------------------------------------------------------------------------------


def pause(world: World) -> None:
    """The gate closes for a while or is opened; RQ is suspended or resumed."""
    chance = world.chance
    world.count["pauses"] += 1
    match chance.randrange(4):
        case 0:
            world.link.ask_now(world.stores[0].close_gate(chance.choice((1, 20, 60)), "why", False))
        case 1:
            resume(world)
        case 2:
            world.plain.set(world.keys.suspended, 1)
        case 3:
            world.plain.delete(world.keys.suspended)


def resume(world: World) -> None:
    """A person opens the gate and resumes RQ."""
    world.plain.delete(world.keys.gate("all"))
    world.plain.delete(world.keys.suspended)


def flush_scripts(world: World) -> None:
    """The server forgets all scripts, as it does at a restart."""
    world.plain.script_flush()
    world.count["script flushes"] += 1


def wait(world: World) -> None:
    """Some ms pass: leases run out, retries fall due."""
    time.sleep(world.chance.choice((1, 3, 10, 40)) / 1000)
    world.count["waits"] += 1


def grow_old(world: World) -> None:
    """Half a minute passes for waiting jobs: who stands in no list is overlooked no longer."""
    index = world.keys.unfinished
    for job_id, score in world.scores(index):
        if Band.WAITING <= score < Band.RETRY and world.chance.random() < 0.5:
            world.plain.zadd(index, {job_id: score - 1000 * _OVERLOOKED_S}, xx=True)
    world.count["half minutes waited"] += 1


def outlast(world: World) -> None:
    """A long lease runs out: its holder was silent for a minute."""
    held = [job for job in world.model.jobs.values() if job.hold is not None]
    if held:
        expire_hold(world, world.chance.choice(held).id)
        world.count["leases outlasted"] += 1


def expire_hold(world: World, job_id: str) -> None:
    """The lease of a job ends now."""
    hold, now_ms = world.model.jobs[job_id].hold, world.now_ms()
    key = world.keys.job_prefix + job_id
    token, exists = world.plain.hget(key, "c_lease"), world.plain.exists(key)
    if hold is not None and (token == hold.token or not exists):
        world.plain.zadd(world.keys.unfinished, {job_id: now_ms}, xx=True)
        hold.ends_ms = min(hold.ends_ms, now_ms)
        world.note(job_id, f"lease {hold.token} ends, its holder was silent")


def expire_keys(world: World) -> None:
    """Keys of ended jobs run out: the record, or the hash with RQ's result."""
    busy = {hand.lease.id for hand in world.hands}
    asked = {own_id for call in world.unheard for own_id, _ in call.rows}
    for job in list(world.model.jobs.values()):
        if not job.done or job.left_failed or job.is_deleted or job.id in busy or world.chance.random() > 0.1:
            continue
        if world.in_rqs_hands[job.id] or job.id in world.left_behind:
            continue
        if world.chance.random() < 0.3:
            if job.id not in asked:
                job.record_is_expired = True
                world.plain.delete(world.keys.outcome_prefix + job.id)
                world.note(job.id, "its record has run out")
            continue
        job.is_expired = True
        world.plain.delete(world.keys.job_prefix + job.id, world.keys.result_prefix + job.id)
        for registry in (world.keys.failed, world.keys.finished):
            world.plain.zrem(registry, job.id)
        world.note(job.id, "its hash has run out")
        world.count["hashes run out"] += 1


OURS = (
    Step(14, enqueue),
    Step(3, repeat_call),
    Step(2, retry),
    Step(16, claim),
    Step(16, complete),
    Step(4, renew),
    Step(3, die),
    Step(1, left_in_claiming),
    Step(1, tidy),
    Step(2, pause),
    Step(0.1, flush_scripts),
    Step(6, wait),
    Step(0.5, grow_old),
    Step(1, outlast),
    Step(1, expire_keys, may_nest=False),
)
