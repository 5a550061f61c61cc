"""Everything at once, and then the reckoning: `python -m tests.fault.chaos --jobs N --seed N`.

Producers ask for cancels, three workers of ours (nobody reads the output of one) and two of RQ's own make them, and
meanwhile workers are killed, stopped and paused, the server is killed, paused, and replaced by its replica while it
stays up, connections break, replies are lost, operators type RQ's commands, the exchange injects its own faults, its
answers stay away, connections to it are forgotten on their way, its clock is apart from ours and is set once,
client ids are taken again as soon as the book shows their order CANCELED, and all open orders of a symbol are cancelled
while others are opened there. Then the faults end, the queue drains, and
what producers were promised is held against the ledger, and the ledger against the exchange's own book and log. The
exit code is 0 only if nothing was lost, nothing came out twice or unasked, every outcome is the book's, none is
undecided, and nobody sent what he must not send.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from producer.message import Outcome
from tests.failover import Pair, running_pair
from tests.fault.blows import MAKES, ON_REDIS, SCALES, TARGETS, UNREAD, Blow, Clock, Kind, Scale, clock, schedule
from tests.fault.fence import Away, lost_holds, sent_without_lease
from tests.fault.fleet import PATIENCE_S, RQ, Place, Team
from tests.fault.ledger import Ask, Kill, exchange_side, key_kinds, queue_side, recoveries_ms, requests_during_bans
from tests.fault.producers import (
    OPEN_PART,
    REOPENED_PART,
    SYMBOLS,
    Producer,
    Reopener,
    Strategy,
    Sweeper,
    requests_for,
    spoil_answers,
)
from tests.fault.proxy import Proxy
from tests.fault.verdict import Reckoning, table, times
from tests.servers import ROOT, Peek, Valkey, Workers, scrubbed
from worker.sandbox.control import (
    MAX_ARRIVALS,
    Arrival,
    BookEntry,
    ExchangeConfig,
    PlacedOrder,
    RunningExchange,
    start_exchange,
)
from worker.sandbox.edge import Incident

DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
API_KEY, API_SECRET = "chaos-key", "chaos-secret"
#: Orders that nobody asks about: a DELETE for one of them would be harm.
BYSTANDERS = 20
#: So much older than the run are its orders, ms: a clock that is set must not make them look younger than a request.
_AGE_MS = 60_000
#: So many jobs at a time are waited for before one of our workers is hurt.
_MANY = 5
#: How often the run looks around, s, and says how it stands.
_LOOK_S, _SAY_S = 0.02, 1.0

EXAMPLES = """examples:
  python -m tests.fault.chaos                          500 orders, about a minute
  python -m tests.fault.chaos --seed 7                 other blows at other times; the same seed strikes the same ones
  python -m tests.fault.chaos --jobs 2000 --scale full the workers' default waits, some minutes
  python -m tests.fault.chaos --seed 7 --keep-logs /tmp/chaos-7    to find out what happened to one request
  python -m tests.fault.chaos --json | jq .problems

exit code 0: nothing lost, nothing twice, nothing wrong; 1: the last line says what is
"""


@dataclass
class World:
    """Everything that runs, and the hand that strikes it."""

    scale: Scale
    seed: int
    pair: Pair
    proxies: tuple[Proxy, ...]  # to Redis: the workers', the producers'
    switch: Proxy  # our own, without faults
    way: Proxy  # the workers' to the exchange
    exchange: RunningExchange
    clock: Clock
    team: Team
    peek: Peek
    orders: list[PlacedOrder]
    producers: list[Producer] = field(default_factory=list)
    reopeners: list[Reopener] = field(default_factory=list)  # one
    sweepers: list[Sweeper] = field(default_factory=list)  # one
    requests: int = 0
    began_s: float = field(default_factory=time.monotonic)
    said_s: float = 0.0
    now: str = "starting"
    struck: list[Blow] = field(default_factory=list)
    away_ms: list[tuple[float, float]] = field(default_factory=list)  # when Redis was, by this machine's clock

    @property
    def valkey(self) -> Valkey:
        """The primary."""
        return self.pair.primary

    @property
    def asks(self) -> list[Ask]:
        """All calls so far."""
        return [ask for strategy in self.strategies for ask in list(strategy.asks)]

    @property
    def strategies(self) -> list[Producer | Strategy]:
        """All who ask."""
        return [*self.producers, *self.reopeners, *self.sweepers]

    @property
    def is_swept(self) -> bool:
        """Whether all open orders of a symbol are asked for by nobody now."""
        return not any(sweeper.standing for sweeper in self.sweepers)

    def until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Let time pass, tending workers and saying how it stands, until something is so; whether it came to be."""
        ends_at = time.monotonic() + timeout_s
        while not (is_so := condition()) and time.monotonic() < ends_at:
            self.team.tend()
            self.say()
            time.sleep(_LOOK_S)
        return is_so

    def rest(self, seconds: float) -> None:
        """Let time pass."""
        self.until(lambda: False, seconds)

    def say(self) -> None:
        """A line on stderr now and then."""
        if time.monotonic() - self.said_s < _SAY_S * (5 if self.scale.name == "full" else 1):
            return
        self.said_s = time.monotonic()
        keys = self.peek.keys
        told = sum(ask.id is not None for ask in self.asks)
        try:
            counts = [self.peek("XLEN", keys.outcomes), self.peek("LLEN", keys.waiting)]
            counts += [self.peek("ZCARD", keys.unfinished), self.peek("ZCARD", keys.scheduled)]
            stands = "recorded {}, waiting {}, unfinished {}, retries {}".format(*counts)
        except redis.RedisError as error:
            stands = f"Redis is away ({type(error).__name__})"
        asked = f"acknowledged {told} of at least {self.requests}"
        note(f"{time.monotonic() - self.began_s:6.1f} s  {asked}, {stands} | {self.now}")

    def strike(self, blow: Blow) -> None:
        """One blow, from beginning to end."""
        place, is_on_worker = self.team.places[blow.worker], blow.kind in TARGETS
        self.now = f"{blow.kind} {place.make} {place.dyno}" if is_on_worker else blow.kind.value
        if is_on_worker:  # one that is just starting has nothing to lose yet
            self.until(lambda: self.team.is_at_work(place), PATIENCE_S)
        began_ms = time.time() * 1000
        _STRIKES[blow.kind](self, place, blow)
        if blow.kind in ON_REDIS:
            self.away_ms.append((began_ms, time.time() * 1000))
        self.struck.append(blow)
        self.now = "calm"

    def command(self, *words: str) -> None:
        """One of RQ's commands, as an operator types it."""
        options = ["--url", self.valkey.url, "--path", str(ROOT)]
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen([RQ, *words, *options], cwd=ROOT, env=scrubbed(), stdout=said, stderr=said)
            if not self.until(lambda: process.poll() is not None, PATIENCE_S):
                process.kill()
            if process.wait() != 0:
                said.seek(0)
                raise RuntimeError(f"rq {' '.join(words)} ended with {process.returncode}: {said.read()[-500:]}")


# ---- blows -----------------------------------------------------------------------------------------------------------


def _catch(world: World, place: Place, *, horse: bool = False) -> bool:
    """Stop a worker in the middle of jobs, as many as it has at a time: one that holds none would show nothing.

    It may have to start first, or to wait for a ban to end. Whether it was caught.
    """
    team, jobs = world.team, 1 if place.make.is_stock else _MANY
    is_caught = world.until(lambda: team.catch(place, jobs, horse=horse), world.scale.patience_s)
    return is_caught or team.catch(place, horse=horse)


def _kill(world: World, place: Place, blow: Blow) -> None:
    _catch(world, place, horse=blow.kind is Kind.KILL_FAMILY)
    world.team.kill(place)


def _kill_horse(world: World, place: Place, blow: Blow) -> None:
    _catch(world, place, horse=True)
    world.team.kill_horse(place)


def _pause(world: World, place: Place, blow: Blow) -> None:
    if not _catch(world, place):
        world.team.signal(place, signal.SIGSTOP)
    world.rest(blow.length_s)
    world.team.signal(place, signal.SIGCONT)


def _valkey_kill(world: World, place: Place, blow: Blow) -> None:
    world.valkey.stop(signal.SIGKILL)
    world.rest(blow.length_s)
    world.valkey.start()


def _valkey_pause(world: World, place: Place, blow: Blow) -> None:
    process = world.valkey.process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    time.sleep(blow.length_s)  # not `rest`: this process' own looks at the server would hang
    process.send_signal(signal.SIGCONT)


def _failover(world: World, place: Place, blow: Blow) -> None:
    world.pair.in_step()
    world.pair.fail_over()
    world.rest(blow.length_s)  # for so long new connections lead to the old server too
    for proxy in (*world.proxies, world.switch):
        proxy.target_port = world.valkey.port
    world.switch.reset_peer()


def _reset(world: World, place: Place, blow: Blow) -> None:
    for _ in range(4):
        for proxy in world.proxies:
            proxy.reset_peer()
        world.rest(blow.length_s / 4)


def _rain(world: World, place: Place, blow: Blow) -> None:
    for proxy in world.proxies:
        proxy.let_it_rain(reset=0.03, lose=0.05)
    world.rest(blow.length_s)
    for proxy in world.proxies:
        proxy.let_it_rain()


def _hole(world: World, place: Place, blow: Blow) -> None:
    for proxy in world.proxies:
        proxy.timeout()
    world.rest(blow.length_s)
    for proxy in world.proxies:
        proxy.timeout(False)


def _silences(world: World, place: Place, blow: Blow) -> None:
    world.way.let_it_rain(mute=0.15, deaf=0.15)
    world.rest(blow.length_s)
    world.way.let_it_rain()


def _info(world: World, place: Place, blow: Blow) -> None:
    # RQ takes for abandoned what has not been heard of for a minute and a half, whoever works on it.
    started = world.peek.keys.started
    for entry in world.peek("ZRANGE", started, 0, -1):
        world.peek("ZADD", started, "XX", 1, entry)
    world.command("info")


def _requeue(world: World, place: Place, blow: Blow) -> None:
    words = ["requeue", "--queue", world.peek.keys.queue, "--serializer", "json"]
    has_gone_forward = world.clock.goes_forward and any(each.kind is Kind.CLOCK for each in world.struck)
    if not has_gone_forward:
        world.command(*words, "--all")
    # An order that was opened before the clock was set ahead looks older than it is to whoever measures the clock now.
    # A person who asks by client id once more, for a request that was left alone, is told so nowhere: not done here.
    # So it is with a listing.
    elif ids := set(world.peek("ZRANGE", world.peek.keys.failed, 0, -1)) - _ids(world):
        world.command(*words, *sorted(job_id for job_id in ids if not _lists(world, job_id)))


def _suspend(world: World, place: Place, blow: Blow) -> None:
    world.command("suspend")
    world.rest(blow.length_s)
    world.command("resume")


def _clock(world: World, place: Place, blow: Blow) -> None:
    # What the exchange dated before its clock was set cannot be compared with what it dates later. So nobody may be
    # in the middle of finding out whether an order that has an id now, or is open, is one that was meant: no worker
    # that comes later could know.
    resting: list[Strategy] = [*world.reopeners, *world.sweepers]
    keys = [world.peek.keys.outcome_prefix + job_id for each in resting for job_id in each.rest()]

    def has_ended() -> bool:
        unfinished = world.peek("ZRANGE", world.peek.keys.unfinished, 0, -1)
        is_listing = any(_lists(world, job_id) for job_id in unfinished)
        return world.is_swept and not is_listing and (not keys or world.peek("EXISTS", *keys) == len(keys))

    if not world.until(has_ended, world.scale.drain_s):
        raise RuntimeError("requests by client id, or for all open orders, did not end")
    world.exchange.set_clock_skew_ms(world.clock.then_ms)
    for each in resting:
        each.go_on()


def _lists(world: World, job_id: str) -> bool:
    """Whether a job lists open orders."""
    return "cancel_open" in str(world.peek("HGET", world.peek.keys.job_prefix + job_id, "data"))


def _ids(world: World) -> set[str]:
    """Jobs of requests whose client ids are taken again."""
    return {ask.id for each in world.reopeners for ask in each.asks if ask.id is not None}


_STRIKES: dict[Kind, Callable[[World, Place, Blow], None]] = {
    Kind.KILL: _kill,
    Kind.KILL_HORSE: _kill_horse,
    Kind.KILL_FAMILY: _kill,
    Kind.TERM: lambda world, place, blow: world.team.terminate(place),
    Kind.PAUSE: _pause,
    Kind.VALKEY_KILL: _valkey_kill,
    Kind.VALKEY_PAUSE: _valkey_pause,
    Kind.FAILOVER: _failover,
    Kind.RESET: _reset,
    Kind.RAIN: _rain,
    Kind.HOLE: _hole,
    Kind.SILENCES: _silences,
    Kind.FORGOTTEN: lambda world, place, blow: world.way.forget_flows(),
    Kind.INFO: _info,
    Kind.REQUEUE: _requeue,
    Kind.SUSPEND: _suspend,
    Kind.CLOCK: _clock,
}


# ---- the run ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def world_of(scale: Scale, seed: int, jobs: int, logs: Path | None) -> Iterator[World]:
    """Start everything but the producers; all of it ends with the block."""
    with ExitStack() as stack:
        pair = stack.enter_context(running_pair(*DURABLE))
        ports = [pair.primary.port] * 3
        *proxies, switch = [stack.enter_context(Proxy(port, seed=seed + n)) for n, port in enumerate(ports)]
        exchange = stack.enter_context(start_exchange(_exchange_config(scale, seed)))
        times = clock(seed)
        exchange.set_clock_skew_ms(times.first_ms - _AGE_MS)
        orders = exchange.add_orders(jobs + BYSTANDERS)
        exchange.set_clock_skew_ms(times.first_ms)
        way = stack.enter_context(Proxy(urlsplit(exchange.url).port or 0, seed=seed + len(proxies)))
        directory = logs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory.mkdir(parents=True, exist_ok=True)
        settings = {"BINANCE_API_KEY": API_KEY, "BINANCE_API_SECRET": API_SECRET, "LEDGER_MAXLEN": str(4 * jobs + 1000)}
        settings |= {"LOG_LEVEL": "DEBUG"} if logs else {}
        settings |= {"REDIS_URL": proxies[0].redis_url, "BINANCE_BASE_URL": way.http_url, **scale.settings}
        fleet = Workers(directory, settings)
        stack.callback(fleet.stop)
        direct: redis.Redis = redis.Redis(port=switch.port, socket_timeout=5, retry=Retry(NoBackoff(), 1))
        stack.callback(direct.close)
        team = Team(fleet, Peek(direct), scale.restart_s, MAKES)
        stack.callback(team.close)
        yield World(scale, seed, pair, tuple(proxies), switch, way, exchange, times, team, Peek(direct), orders)


def _exchange_config(scale: Scale, seed: int) -> ExchangeConfig:
    return ExchangeConfig(
        accounts={"default": (API_KEY, API_SECRET)},
        faults="all",
        seed=seed,
        incidents=None if scale.incidents is None else tuple(scale.incidents),
        max_incidents=scale.max_incidents,
        timing=scale.timing,
        latency_ms=scale.latency_ms,
        weight_limit_per_minute=scale.weight_limit,
    )


def run(scale: Scale, seed: int, jobs: int, logs: Path | None = None) -> Reckoning:
    """A whole run, from the first process to the reckoning."""
    with world_of(scale, seed, jobs, logs) as world:
        team = world.team
        if not world.until(lambda: all(map(team.is_at_work, team.places)) or bool(team.walked_out), PATIENCE_S):
            raise RuntimeError("the workers did not start")
        produce_and_strike(world)
        drained_s = drain(world)
        return reckon(world, drained_s, logs)


def produce_and_strike(world: World) -> None:
    """Producers and blows side by side; then every fault ends."""
    duration_s, blows = _start_producers(world)
    began = world.began_s = time.monotonic()
    for strategy in world.strategies:
        strategy.start()
    for blow in blows:
        world.rest(began + blow.at_s - time.monotonic())
        world.strike(blow)
    world.until(lambda: all(strategy.has_asked for strategy in world.strategies), duration_s + PATIENCE_S)
    world.exchange.end_faults()
    for proxy in (*world.proxies, world.way):
        proxy.heal()


def _start_producers(world: World) -> tuple[float, list[Blow]]:
    """Make the strategies; gives how long they are to ask, s, and what falls meanwhile."""
    scale, orders = world.scale, world.orders[: len(world.orders) - BYSTANDERS]
    taken = round(len(orders) * REOPENED_PART)
    shares, sweeps = requests_for(orders[taken:], world.seed), round(len(orders) * OPEN_PART)
    spoil_answers(orders[:taken], world.exchange, world.seed)
    world.requests = sum(map(len, shares)) + taken + sweeps
    blows = schedule(world.seed, scale, world.requests / scale.orders_per_s)
    duration_s = max(world.requests / scale.orders_per_s, blows[-1].at_s + blows[-1].length_s)
    url, ids = world.proxies[1].redis_url, {order.client_algo_id: order.algo_id for order in orders}
    for number, share in enumerate(shares):
        world.producers.append(Producer(number, world.seed, url, share, ids, len(share) / duration_s))
    world.reopeners.append(Reopener(world.seed, url, world.exchange, orders[:taken], max(taken, 1) / duration_s))
    world.sweepers.append(Sweeper(world.seed, url, world.exchange, sweeps, max(sweeps, 1) / duration_s))
    return duration_s, blows


def drain(world: World) -> float:
    """Wait until nothing is left to do; gives how long that took, s."""
    world.now = "draining"
    began, peek = time.monotonic(), world.peek
    keys = peek.keys

    def is_drained() -> bool:
        counts = [peek("LLEN", keys.waiting), peek("LLEN", keys.claiming)]
        return world.is_swept and not any([*counts, peek("ZCARD", keys.scheduled), peek("ZCARD", keys.unfinished)])

    world.until(is_drained, world.scale.drain_s)
    for strategy in world.strategies:
        strategy.stopped.set()
        strategy.join(PATIENCE_S)
    took_s = time.monotonic() - began
    # What the exchange still has to carry out late must be in its book.
    world.rest(world.scale.timing.late_execution_ms / 1000 + 0.2)
    return took_s


def reckon(world: World, drained_s: float, logs: Path | None) -> Reckoning:
    """Stop the workers and hold everything against everything."""
    peek, team = world.peek, world.team
    for place in team.places:
        world.until(lambda place=place: team.is_at_work(place), PATIENCE_S)  # type: ignore[misc]
        team.terminate(place)
    records, book, stats = peek.ledger(), world.exchange.book(), world.exchange.stats()
    arrivals, order_of = world.exchange.arrivals(), {order.client_algo_id: order.algo_id for order in world.orders}
    if len(arrivals) == MAX_ARRIVALS:
        raise RuntimeError("the exchange has forgotten the first requests")
    # A key that ends between the two commands had a time to live.
    keys = [(key, peek("TTL", key) != -1) for key in peek("KEYS", "*")]
    reopened = {order for each in world.reopeners for order in each.reopened}
    told = {ticket_id: outcome for each in world.sweepers for ticket_id, outcome in each.ended.items()}
    ahead_ms = dict.fromkeys(SYMBOLS[0], world.clock.first_ms) | dict.fromkeys(SYMBOLS[1], world.clock.then_ms)
    opened_ms = {i: each.create_time_ms - ahead_ms[each.symbol] for i, each in book.items() if each.symbol in ahead_ms}
    if logs is not None:
        _keep(
            logs,
            records,
            world.away_ms,
            kills=team.kills,
            arrivals=arrivals,
            book=list(book.values()),
            incidents=stats.incidents,
        )
    return Reckoning(
        scale=world.scale.name,
        seed=world.seed,
        seconds=time.monotonic() - world.began_s,
        drained_s=drained_s,
        blows=dict(Counter(blow.kind.value for blow in world.struck)),
        exchange_faults=sum(stats.faults_injected.values()),
        replies_lost=sum(proxy.count.replies_lost for proxy in world.proxies),
        resets=sum(proxy.count.resets for proxy in world.proxies),
        silences=world.way.count.silences,
        flows_forgotten=world.way.count.flows_forgotten,
        queue=queue_side(world.asks, records, order_of),
        miscounted=peek.counted() != peek.kinds(),
        exchange=exchange_side(world.asks, records, book, order_of, reopened, opened_ms, told),
        incidents=len(stats.incidents),
        requests_during_bans=requests_during_bans(stats.incidents, world.away_ms),
        leases_lost=lost_holds(records),
        sent_without_lease=tuple(sent_without_lease(records, arrivals, order_of, world.away_ms)),
        reopened=len(reopened),
        unread=sum((record.worker or "").startswith(f"w{UNREAD}g") for record in records),
        recoveries_ms=times(recoveries_ms(team.kills, records)),
        exits_s=times(team.exits_s),
        consumed_by_restarts=team.left_held,
        walked_out=tuple(team.walked_out),
        stock_ends=tuple(team.stock_ends),
        keys=tuple(key_kinds(keys)),
    )


def _keep(
    logs: Path, records: Sequence[Outcome], away_ms: Away, **lists: Sequence[Kill | Arrival | BookEntry | Incident]
) -> None:
    (logs / "away.json").write_text(json.dumps(away_ms), "utf-8")
    (logs / "ledger.jsonl").write_text("".join(record.encode() + "\n" for record in records), "utf-8")
    for name, items in lists.items():
        (logs / f"{name}.json").write_text(json.dumps([asdict(item) for item in items], indent=0), "utf-8")


def note(text: str) -> None:
    """A line of progress."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fault.chaos",
        description=(__doc__ or "").partition("\n\n")[2],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--jobs", type=int, default=500, metavar="N", help="orders to be cancelled (default 500)")
    parser.add_argument(
        "--seed", type=int, default=1, metavar="N", help="of the schedule and of all faults (default 1)"
    )
    parser.add_argument("--scale", choices=SCALES, default="quick", help="quick: waits scaled down; full: the defaults")
    parser.add_argument("--json", action="store_true", help="the reckoning as one JSON object")
    parser.add_argument("--keep-logs", type=Path, metavar="DIR", help="keep logs, ledger, book and requests there")
    chosen = parser.parse_args(arguments)
    if chosen.jobs < 1:
        parser.error("--jobs must be at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # all that was started ends with it
    reckoning = run(SCALES[chosen.scale], chosen.seed, chosen.jobs, chosen.keep_logs)
    sys.stdout.write(json.dumps(reckoning.as_dict()) + "\n" if chosen.json else table(reckoning))
    return 1 if reckoning.problems() else 0


if __name__ == "__main__":
    sys.exit(main())
