"""Everything at once, and then the reckoning: `python -m tests.fault.chaos --jobs N --seed N`.

Producers ask for cancels, three workers make them, and meanwhile workers are killed, stopped and paused, the server is
killed and paused, connections break, replies are lost, and the exchange injects its own faults. Then the faults end,
the queue drains, and what producers were promised is held against the ledger, and the ledger against the exchange's own
book. The exit code is 0 only if nothing was lost, nothing came out twice or unasked, every outcome is the book's, and
none is undecided.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from producer import CancelClient, CancelRequest, QueueUnavailable
from producer.keys import Keys
from producer.protocol import NotDurable
from tests.fault.blows import SCALES, WORKERS, Blow, Kind, Scale, schedule
from tests.fault.ledger import Ask, Kill, exchange_side, key_kinds, queue_side, recoveries_ms, requests_during_bans
from tests.fault.proxy import Proxy
from tests.fault.verdict import Reckoning, table
from tests.servers import Peek, Valkey, Worker, Workers, running_valkey
from worker.sandbox.control import ExchangeConfig, PlacedOrder, RunningExchange, start_exchange

EXIT_OK, EXIT_FAILED = 0, 1
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
API_KEY, API_SECRET = "chaos-key", "chaos-secret"
PRODUCERS = 4
#: Orders that nobody asks about: a DELETE for one of them would be harm.
BYSTANDERS = 20
#: How often the run looks around, s, and says how it stands.
_LOOK_S, _SAY_S = 0.02, 1.0
#: How long a process may take to start or to leave before that is a failure, s.
_PATIENCE_S = 30.0


# ---- producers -------------------------------------------------------------------------------------------------------


class Producer(threading.Thread):
    """Asks for cancels in batches, at a steady rate on average, and repeats every call that is not acknowledged."""

    def __init__(self, number: int, seed: int, url: str, requests: Sequence[CancelRequest], per_s: float) -> None:
        super().__init__(name=f"producer-{number}", daemon=True)
        self._dice = random.Random(f"producer {seed} {number}")
        self._client = CancelClient.from_url(url, timeout_s=1.0)
        self._requests = requests
        self._per_s = per_s
        self.asks: list[Ask] = []
        self.stopped = threading.Event()

    def run(self) -> None:
        """Work off the requests."""
        began, sent = time.monotonic(), 0
        with self._client:
            while sent < len(self._requests) and not self.stopped.is_set():
                batch = self._requests[sent : sent + self._dice.randint(1, 20)]
                self._ask(batch, durable=self._dice.random() < 0.1)
                sent += len(batch)
                self.stopped.wait(max(began + sent / self._per_s - time.monotonic(), 0))

    def _ask(self, batch: Sequence[CancelRequest], *, durable: bool) -> None:
        while not self.stopped.is_set():
            try:
                tickets = self._client.cancel_many(batch, durable=durable)
            except NotDurable as error:
                self.asks += [Ask(t.request.algo_id or _algo_id(t.request), t.id) for t in error.tickets]
                return
            except QueueUnavailable:
                self.asks += [Ask(request.algo_id or _algo_id(request), None) for request in batch]
                self.stopped.wait(self._dice.uniform(0.05, 0.3))
            else:
                self.asks += [Ask(t.request.algo_id or _algo_id(t.request), t.id) for t in tickets]
                return


def _algo_id(request: CancelRequest) -> int:
    """The order of a request by client id alone; the exchange makes client ids of algo ids."""
    return int((request.client_algo_id or "").removeprefix("auto-"))


def requests_for(orders: Sequence[PlacedOrder], seed: int) -> list[list[CancelRequest]]:
    """Each producer's requests: most by algo id, some by client id, some for an order that another asks about too."""
    dice = random.Random(f"requests {seed}")
    shares: list[list[CancelRequest]] = [[] for _ in range(PRODUCERS)]
    for number, order in enumerate(orders):
        request = CancelRequest(algo_id=order.algo_id, urgent=dice.random() < 0.1)
        if dice.random() < 0.1:
            request = CancelRequest(client_algo_id=order.client_algo_id)
        shares[number % PRODUCERS].append(request)
        if dice.random() < 0.05:
            shares[(number + 1) % PRODUCERS].append(request)
    return shares


# ---- workers ---------------------------------------------------------------------------------------------------------


@dataclass
class Place:
    """A worker's place: who has it now, and how often it was taken."""

    number: int
    generation: int = 0
    worker: Worker | None = None
    is_leaving: bool = False  # its end is ours to wait for
    start_at_s: float = 0.0

    @property
    def dyno(self) -> str:
        """The name of the process that has it now."""
        return f"w{self.number}g{self.generation}"


class Team:
    """Three workers that are started again when they end, and one that ended by itself is noted."""

    def __init__(self, fleet: Workers, peek: Peek, restart_s: float) -> None:
        self._fleet = fleet
        self._peek = peek
        self._restart_s = restart_s
        self.places = [Place(number) for number in range(WORKERS)]
        self.kills: list[Kill] = []
        self.exits_s: list[float] = []
        self.left_held = 0  # jobs that a worker still held when it had left in peace: each costs an attempt
        self.walked_out: list[str] = []

    def tend(self) -> None:
        """Start whoever is due, note who ended unasked."""
        for place in self.places:
            if place.worker is None:
                if time.monotonic() >= place.start_at_s:
                    place.generation += 1
                    place.worker = self._fleet.start(wait=False, DYNO=place.dyno)
            elif not place.is_leaving and place.worker.process.poll() is not None:
                self.walked_out.append(f"{place.dyno} exit code {place.worker.process.returncode}")
                self._vacate(place)

    def is_at_work(self, place: Place) -> bool:
        """Whether the worker at a place has begun to claim."""
        return place.worker is not None and "event=started" in place.worker.output()

    def held_by(self, place: Place) -> list[str]:
        """Ids of the jobs on which the worker at a place has a lease that has not run out."""
        ids = self._peek("ZRANGEBYSCORE", self._peek.keys.leases, self._peek.now_ms(), "+inf")
        prefix = self._peek.keys.job_prefix
        return [i for i in ids if str(self._peek("HGET", prefix + i, "worker_name")).startswith(place.dyno + ".")]

    def kill(self, place: Place) -> None:
        """SIGKILL."""
        worker = self._in_place(place)
        place.is_leaving = True
        worker.process.send_signal(signal.SIGKILL)
        worker.process.wait(_PATIENCE_S)
        self.kills.append(Kill(self._peek.now_ms(), tuple(self.held_by(place))))
        self._vacate(place)

    def terminate(self, place: Place) -> None:
        """SIGTERM, twice, to the whole group: it must leave in peace, with nothing in its hands."""
        worker = self._in_place(place)
        place.is_leaving = True
        began = time.monotonic()
        for _ in range(2):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.process.pid, signal.SIGTERM)
            time.sleep(0.1)
        code = worker.process.wait(_PATIENCE_S)
        self.exits_s.append(time.monotonic() - began)
        if code != 0:
            self.walked_out.append(f"{place.dyno} exit code {code} after SIGTERM")
        self.left_held += len(self.held_by(place))
        self._vacate(place)

    def signal(self, place: Place, number: signal.Signals) -> None:
        """Send a signal that does not end the process."""
        self._in_place(place).process.send_signal(number)

    @staticmethod
    def _in_place(place: Place) -> Worker:
        if place.worker is None:
            raise RuntimeError(f"the worker {place.dyno} did not start again")
        return place.worker

    def _vacate(self, place: Place) -> None:
        if place.worker is not None:
            place.worker.stop(signal.SIGKILL)
        place.worker, place.is_leaving = None, False
        place.start_at_s = time.monotonic() + self._restart_s


# ---- the run ---------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """Everything that runs, and the hand that strikes it."""

    scale: Scale
    seed: int
    valkey: Valkey
    proxies: tuple[Proxy, ...]  # the workers', the producers'
    exchange: RunningExchange
    team: Team
    peek: Peek
    producers: list[Producer] = field(default_factory=list)
    orders: int = 0
    began_s: float = field(default_factory=time.monotonic)
    said_s: float = 0.0
    now: str = "starting"
    struck: list[Blow] = field(default_factory=list)

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
        told = sum(ask.id is not None for producer in self.producers for ask in list(producer.asks))
        try:
            counts = [self.peek("XLEN", keys.outcomes), self.peek("LLEN", keys.waiting)]
            counts += [self.peek("ZCARD", keys.leases), self.peek("ZCARD", keys.scheduled)]
            stands = "recorded {}, waiting {}, in flight {}, retries {}".format(*counts)
        except redis.RedisError as error:
            stands = f"Redis is away ({type(error).__name__})"
        note(f"{time.monotonic() - self.began_s:6.1f} s  acknowledged {told} of {self.orders}, {stands} | {self.now}")

    def strike(self, blow: Blow) -> None:
        """One blow, from beginning to end."""
        self.now = f"{blow.kind} worker {blow.worker}" if blow.kind in _ON_WORKERS else f"{blow.kind}"
        place = self.team.places[blow.worker]
        if blow.kind in _ON_WORKERS:  # one that is just starting has nothing to lose yet
            self.until(lambda: self.team.is_at_work(place), _PATIENCE_S)
        _STRIKES[blow.kind](self, place, blow)
        self.struck.append(blow)
        self.now = "calm"


def _kill(world: World, place: Place, blow: Blow) -> None:
    # One that holds nothing would show nothing. It may have to start first, or to wait for a ban to end.
    world.until(lambda: bool(world.team.held_by(place)), 3.0 if world.scale.name == "quick" else 15.0)
    world.team.kill(place)


def _pause(world: World, place: Place, blow: Blow) -> None:
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


_ON_WORKERS = (Kind.KILL, Kind.TERM, Kind.PAUSE)
_STRIKES: dict[Kind, Callable[[World, Place, Blow], None]] = {
    Kind.KILL: _kill,
    Kind.TERM: lambda world, place, blow: world.team.terminate(place),
    Kind.PAUSE: _pause,
    Kind.VALKEY_KILL: _valkey_kill,
    Kind.VALKEY_PAUSE: _valkey_pause,
    Kind.RESET: _reset,
    Kind.RAIN: _rain,
    Kind.HOLE: _hole,
}


@contextlib.contextmanager
def world_of(scale: Scale, seed: int, jobs: int, logs: Path | None) -> Iterator[World]:
    """Start everything but the producers; all of it ends with the block."""
    with ExitStack() as stack:
        valkey = stack.enter_context(running_valkey(*DURABLE))
        proxies = tuple(stack.enter_context(Proxy(valkey.port, seed=seed + number)) for number in range(2))
        config = ExchangeConfig(
            accounts={"default": (API_KEY, API_SECRET)},
            faults="all",
            seed=seed,
            incidents=None if scale.incidents is None else tuple(scale.incidents),
            max_incidents=scale.max_incidents,
            timing=scale.timing,
            latency_ms=scale.latency_ms,
            weight_limit_per_minute=scale.weight_limit,
        )
        exchange = stack.enter_context(start_exchange(config))
        directory = logs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory.mkdir(parents=True, exist_ok=True)
        settings = {"BINANCE_API_KEY": API_KEY, "BINANCE_API_SECRET": API_SECRET, "LEDGER_MAXLEN": str(4 * jobs + 1000)}
        settings |= {"REDIS_URL": proxies[0].redis_url, "BINANCE_BASE_URL": exchange.url, **scale.settings}
        fleet = Workers(directory, settings)
        stack.callback(fleet.stop)
        direct: redis.Redis = redis.Redis(port=valkey.port, socket_timeout=5, retry=Retry(NoBackoff(), 1))
        stack.callback(direct.close)
        peek = Peek(direct)
        yield World(scale, seed, valkey, proxies, exchange, Team(fleet, peek, scale.restart_s), peek)


def run(scale: Scale, seed: int, jobs: int, logs: Path | None = None) -> Reckoning:
    """A whole run, from the first process to the reckoning."""
    with world_of(scale, seed, jobs, logs) as world:
        registered = f"{Keys().rq}:workers"
        if not world.until(lambda: world.peek("SCARD", registered) == WORKERS, _PATIENCE_S):
            raise RuntimeError("the workers did not start")
        produce_and_strike(world, jobs)
        drained_s = drain(world)
        return reckon(world, drained_s, logs)


def produce_and_strike(world: World, jobs: int) -> None:
    """Producers and blows side by side; then every fault ends."""
    scale = world.scale
    orders = world.exchange.add_orders(jobs + BYSTANDERS)
    shares = requests_for(orders[:jobs], world.seed)
    world.orders = sum(map(len, shares))
    blows = schedule(world.seed, scale, world.orders / scale.orders_per_s)
    duration_s = max(world.orders / scale.orders_per_s, blows[-1].at_s + blows[-1].length_s)
    url = world.proxies[1].redis_url
    for number, share in enumerate(shares):
        world.producers.append(Producer(number, world.seed, url, share, len(share) / duration_s))
    began = world.began_s = time.monotonic()
    for producer in world.producers:
        producer.start()
    for blow in blows:
        world.rest(began + blow.at_s - time.monotonic())
        world.strike(blow)
    world.until(lambda: not any(producer.is_alive() for producer in world.producers), duration_s + _PATIENCE_S)
    world.exchange.end_faults()
    for proxy in world.proxies:
        proxy.heal()


def drain(world: World) -> float:
    """Wait until nothing is left to do; gives how long that took, s."""
    world.now = "draining"
    began, peek = time.monotonic(), world.peek
    keys = peek.keys

    def is_drained() -> bool:
        counts = [peek("LLEN", keys.waiting), peek("LLEN", keys.claiming)]
        return not any([*counts, peek("ZCARD", keys.scheduled), peek("ZCARD", keys.leases)])

    world.until(is_drained, world.scale.drain_s)
    for producer in world.producers:
        producer.stopped.set()
        producer.join(_PATIENCE_S)
    took_s = time.monotonic() - began
    # What the exchange still has to carry out late must be in its book.
    world.rest(world.scale.timing.late_execution_ms / 1000 + 0.2)
    return took_s


def reckon(world: World, drained_s: float, logs: Path | None) -> Reckoning:
    """Stop the workers and hold everything against everything."""
    peek, team = world.peek, world.team
    for place in team.places:
        world.until(lambda place=place: team.is_at_work(place), _PATIENCE_S)  # type: ignore[misc]
        team.terminate(place)
    asks = [ask for producer in world.producers for ask in producer.asks]
    records, book, stats = peek.ledger(), world.exchange.book(), world.exchange.stats()
    order_of = {entry.client_algo_id: algo_id for algo_id, entry in book.items() if not entry.decoy}
    # A key that ends between the two commands had a time to live.
    keys = [(key, peek("TTL", key) != -1) for key in peek("KEYS", "*")]
    if logs is not None:
        (logs / "ledger.jsonl").write_text("".join(record.encode() + "\n" for record in records), "utf-8")
        (logs / "kills.json").write_text(json.dumps([asdict(kill) for kill in team.kills]), "utf-8")
    return Reckoning(
        scale=world.scale.name,
        seed=world.seed,
        seconds=time.monotonic() - world.began_s,
        drained_s=drained_s,
        blows=tuple(blow.kind.value for blow in world.struck),
        exchange_faults=sum(stats.faults_injected.values()),
        replies_lost=sum(proxy.count.replies_lost for proxy in world.proxies),
        resets=sum(proxy.count.resets for proxy in world.proxies),
        queue=queue_side(asks, records, order_of),
        exchange=exchange_side(asks, records, book, order_of),
        incidents=len(stats.incidents),
        requests_during_bans=requests_during_bans(stats.incidents),
        recoveries_ms=tuple(recoveries_ms(team.kills, records)),
        exits_s=tuple(team.exits_s),
        consumed_by_restarts=team.left_held,
        walked_out=tuple(team.walked_out),
        keys=tuple(key_kinds(keys)),
    )


def note(text: str) -> None:
    """A line of progress."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fault.chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=500, metavar="N", help="orders to be cancelled (default 500)")
    parser.add_argument(
        "--seed", type=int, default=1, metavar="N", help="of the schedule and of all faults (default 1)"
    )
    parser.add_argument("--scale", choices=SCALES, default="quick", help="quick: waits scaled down; full: the defaults")
    parser.add_argument("--json", action="store_true", help="the reckoning as one JSON object")
    parser.add_argument("--keep-logs", type=Path, metavar="DIR", help="keep logs and ledger there")
    chosen = parser.parse_args(arguments)
    if chosen.jobs < 1:
        parser.error("--jobs must be at least 1")
    reckoning = run(SCALES[chosen.scale], chosen.seed, chosen.jobs, chosen.keep_logs)
    sys.stdout.write(json.dumps(reckoning.as_dict()) + "\n" if chosen.json else table(reckoning))
    return EXIT_FAILED if reckoning.problems() else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
