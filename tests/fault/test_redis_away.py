"""Redis down, paused, cut off, read-only, loading or full: no worker exits, none spins, all go on within two seconds of
its return, outcomes of requests in flight are written, and a repeated enqueue is harmless."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

import pytest
from rq.command import send_shutdown_command

from producer import CancelClient, CancelRequest, QueueUnavailable, Ticket
from producer.message import OutcomeKind
from producer.protocol import Wire
from tests.fault.conftest import DURABLE, Scenes, Stage, cpu_s, is_running, mark_of, name_of, store_like
from tests.fault.proxy import Proxy
from tests.orders import stayed_in_hand
from tests.servers import Peek, Valkey, Worker, Workers, eventually, free_port, refuses
from worker.sandbox.control import RunningExchange

SCENES = Scenes()
#: How soon after Redis' return work goes on, s (the issue's bound).
BACK_S = 2.0
#: Most CPU that a worker may use while Redis is away: part of one core.
IDLE_SHARE = 0.15
PRODUCER_TIMEOUT_S = 1.0


class Scenery:
    """A durable server behind a proxy, an exchange, and one worker with nothing to do."""

    def __init__(self, stage: Stage, options: tuple[str, ...] = (), **settings: str) -> None:
        stage.scenery = self
        self.valkey: Valkey = stage.valkey(*DURABLE, *options)
        self.proxy: Proxy = stage.proxy(self.valkey)
        self.exchange: RunningExchange = stage.exchange()
        self.client: CancelClient = stage.client(self.valkey.url)
        self.producer: CancelClient = stage.client(self.proxy.redis_url, timeout_s=PRODUCER_TIMEOUT_S)
        self.connection = stage.direct(self.valkey)
        self.peek = Peek(self.connection)
        self.fleet: Workers = stage.fleet(self.proxy.redis_url, self.exchange, **settings)
        self.store = store_like(self.fleet.environment)
        self.worker: Worker = self.fleet.start()
        assert self.ask(1)[0].wait(5).kind is OutcomeKind.CANCELLED  # scripts are loaded, connections open

    def ask(self, count: int) -> list[Ticket]:
        """Open orders and ask for their cancels."""
        orders = self.exchange.add_orders(count)
        return self.client.cancel_many([CancelRequest(algo_id=order.algo_id) for order in orders])

    def in_flight(self, count: int, latency_ms: float) -> list[Ticket]:
        """Have requests in flight that are answered after ``latency_ms``; later ones are answered at once."""
        self.exchange.set_latency_ms(latency_ms)
        tickets = self.ask(count)
        eventually(lambda: self.exchange.stats().in_flight >= count, what=f"{count} requests in flight")
        self.exchange.set_latency_ms(0)
        return tickets

    def away(self, seconds: float) -> None:
        """Let Redis be away; after the first second the worker must use next to no CPU."""
        time.sleep(1.0)
        before, began = cpu_s(self.worker.process.pid), time.monotonic()
        time.sleep(seconds - 1.0)
        share = (cpu_s(self.worker.process.pid) - before) / (time.monotonic() - began)
        assert share < IDLE_SHARE, f"{share:.0%} of a core while Redis was away"
        assert is_running(self.worker)

    def goes_on(self, *tickets: Ticket) -> None:
        """Work goes on in time: these and a new request get their outcomes, each from whoever had it."""
        began = time.monotonic()
        everything = [*tickets, *retried(lambda: self.ask(1))]
        for ticket in everything:
            outcome = ticket.wait(max(began + BACK_S - time.monotonic(), 0.01))
            assert stayed_in_hand(outcome)
        assert is_running(self.worker)
        ids = [outcome.id for outcome in self.peek.ledger()]
        assert len(ids) == len(set(ids))
        assert {entry.deletes_effective for entry in self.exchange.book().values()} == {1}

    def deletes(self, ticket: Ticket) -> int:
        """DELETEs for the ticket's order."""
        return self.exchange.book()[ticket.request.algo_id or 0].deletes


def retried(call: Callable[[], list[Ticket]]) -> list[Ticket]:
    """Repeat a producer's call until it is acknowledged, as its error says that one may."""
    ends_at = time.monotonic() + 5
    while time.monotonic() < ends_at:
        with suppress(QueueUnavailable):
            return call()
    return call()


@SCENES.add
def killed_and_restarted(stage: Stage) -> None:
    """kill -9 with the append-only file: what was acknowledged is there, what was in flight is written."""
    scenery = Scenery(stage, WORKER_CONCURRENCY="4")
    tickets = [*scenery.in_flight(4, 1000), *scenery.ask(3)]
    scenery.valkey.stop(signal.SIGKILL)
    scenery.away(3.5)
    scenery.valkey.start()
    scenery.goes_on(*tickets)


@SCENES.after(killed_and_restarted)
def in_a_black_hole(stage: Stage) -> None:
    """Nothing passes and nobody is told, and then connections break: what was in flight is written."""
    scenery: Scenery = stage.scenery
    tickets = scenery.in_flight(2, 500)
    scenery.proxy.timeout()
    scenery.away(4.0)
    scenery.proxy.timeout(False)
    scenery.proxy.reset_peer()
    scenery.goes_on(*tickets)


@SCENES.add
def paused(stage: Stage) -> None:
    """SIGSTOP and SIGCONT: the server answers nothing for longer than any time-out, and then all at once."""
    scenery = Scenery(stage)
    tickets = scenery.in_flight(2, 1000)
    process = scenery.valkey.process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    scenery.away(5.0)
    process.send_signal(signal.SIGCONT)
    scenery.goes_on(*tickets)


@SCENES.after(paused)
def commands_are_obeyed_after_an_outage(stage: Stage) -> None:
    """RQ's commands reach the worker again: its thread for them survives what RQ's own does not."""
    scenery: Scenery = stage.scenery
    name = name_of(scenery.worker)
    for outage in (scenery.proxy.reset_peer, scenery.proxy.down):
        outage()
        scenery.proxy.up()
        eventually(lambda: scenery.connection.pubsub_numsub(f"rq:pubsub:{name}")[0][1] == 1, 5, "it listens again")
    send_shutdown_command(scenery.connection, name)
    assert scenery.worker.process.wait(5) == 0


@SCENES.add
def connections_refused(stage: Stage) -> None:
    """Refused connections are tried again with pauses in between, and the log says it once."""
    scenery = Scenery(stage, LEASE_S="30", WORKER_CONCURRENCY="2")
    tickets = scenery.in_flight(2, 500)
    scenery.proxy.down()
    scenery.away(3.0)
    scenery.proxy.up()
    scenery.goes_on(*tickets)
    assert len(re.findall("event=redis state=away", scenery.worker.output())) == 1


@SCENES.after(connections_refused)
def read_only(stage: Stage) -> None:
    """A server that became a replica refuses writes: workers wait it out, producers are told."""
    scenery: Scenery = stage.scenery
    tickets = scenery.in_flight(2, 500)
    scenery.connection.execute_command("REPLICAOF", "127.0.0.1", free_port())
    with pytest.raises(QueueUnavailable, match="it is a replica, not the primary"):
        scenery.client.cancel(algo_id=1)
    scenery.away(3.0)
    scenery.connection.execute_command("REPLICAOF", "NO", "ONE")
    scenery.goes_on(*tickets)


@SCENES.after(connections_refused)
def out_of_memory(stage: Stage) -> None:
    """A full server refuses what grows: nothing is half done, and work goes on when there is room."""
    scenery: Scenery = stage.scenery
    tickets = [*scenery.in_flight(2, 500), *scenery.ask(3)]
    scenery.connection.config_set("maxmemory", 1)
    with pytest.raises(QueueUnavailable, match="OutOfMemory"):
        scenery.client.cancel(algo_id=1)
    scenery.connection.config_resetstat()
    scenery.away(3.0)
    # A full server refuses the wait at the queue at once: the next one must not follow at once.
    assert scenery.connection.info("commandstats")["cmdstat_blmove"]["rejected_calls"] < 40
    scenery.connection.config_set("maxmemory", 0)
    scenery.goes_on(*tickets)


@SCENES.add
def loading(stage: Stage) -> None:
    """A server that is still loading its file refuses everything: workers wait it out, producers are told."""
    scenery = Scenery(stage, ("--key-load-delay", "1000", "--loading-process-events-interval-bytes", "1024"))
    with scenery.connection.pipeline(transaction=False) as pipeline:
        for number in range(4000):
            pipeline.set(f"ballast:{number}", "x" * 200)
        pipeline.execute()
    scenery.connection.bgrewriteaof()
    eventually(lambda: not scenery.connection.info("persistence")["aof_rewrite_in_progress"], 10, "a base file")
    tickets = scenery.in_flight(2, 500)
    scenery.valkey.stop(signal.SIGKILL)
    scenery.valkey.start(wait=False)
    eventually(lambda: refuses(scenery.connection, "loading"), 5, "the server says LOADING")
    with pytest.raises(QueueUnavailable):
        scenery.client.outcome("none")
    scenery.away(2.0)
    assert refuses(scenery.connection, "loading")
    eventually(lambda: not refuses(scenery.connection, "loading"), 20, "it has loaded")
    scenery.goes_on(*tickets)


@SCENES.add
def connections_reset_under_load(stage: Stage) -> None:
    """Every connection is reset again and again while hundreds are worked off: each gets one outcome."""
    scenery = Scenery(stage, WORKER_CONCURRENCY="8")
    scenery.exchange.set_latency_ms(20)
    tickets = scenery.ask(400)
    for _ in range(12):
        time.sleep(0.1)
        scenery.proxy.reset_peer()
    assert is_running(scenery.worker)
    for ticket in tickets:
        assert ticket.wait(20).kind is OutcomeKind.CANCELLED
    ledger = scenery.peek.ledger()
    assert len(ledger) == len({outcome.id for outcome in ledger}) == len(tickets) + 1


@SCENES.add
def the_reply_to_a_completion_is_lost(stage: Stage) -> None:
    """A completion ran and nobody knows: it is repeated, changes nothing, and the outcome stands once."""
    scenery = Scenery(stage)
    trap = scenery.proxy.limit_data(mark_of(scenery.store.complete([])))
    tickets = scenery.ask(1)
    eventually(lambda: trap.sprung, 5, "a reply is lost")
    scenery.goes_on(*tickets)


@SCENES.after(the_reply_to_a_completion_is_lost)
def the_reply_to_a_claim_is_lost(stage: Stage) -> None:
    """A claim ran and nobody knows: its job comes back when the lease ends, and counts as perhaps sent."""
    scenery: Scenery = stage.scenery
    trap = scenery.proxy.limit_data(mark_of(scenery.store.claim(1, wait=False)), b"$32")
    ticket = scenery.ask(1)[0]
    eventually(lambda: trap.sprung, 5, "a reply is lost")
    outcome = ticket.wait(5)
    assert outcome.kind is OutcomeKind.CANCELLED
    assert [attempt.msg for attempt in outcome.attempts] == ["worker lost", "NEW", "success"]
    assert scenery.deletes(ticket) == 1


@SCENES.after(the_reply_to_a_completion_is_lost)
def the_reply_to_an_enqueue_is_lost(stage: Stage) -> None:
    """A producer's call whose reply is lost is repeated by the client under the same ids: one job, not a duplicate."""
    scenery: Scenery = stage.scenery
    scenery.producer.outcome("none")  # connected
    trap = scenery.proxy.limit_data(Wire("cancels").enqueue_script.sha.encode())
    ticket = scenery.producer.cancel(algo_id=scenery.exchange.add_orders()[0].algo_id)
    assert trap.sprung == 1
    assert not ticket.duplicate
    assert ticket.wait(5).id == ticket.id
    assert scenery.deletes(ticket) == 1


@SCENES.after(the_reply_to_a_completion_is_lost)
def producers_learn_it_in_time(stage: Stage) -> None:
    """A producer gets a clear error within its time-out, in a black hole too; repeating is harmless."""
    scenery: Scenery = stage.scenery
    scenery.exchange.set_latency_ms(300)
    algo_id = scenery.exchange.add_orders()[0].algo_id
    for hurt, heal in ((scenery.proxy.timeout, scenery.proxy.heal), (scenery.proxy.down, scenery.proxy.up)):
        scenery.producer.outcome("none")  # connected
        hurt()
        began = time.monotonic()
        with pytest.raises(QueueUnavailable, match="Repeating it is safe by algo id"):
            scenery.producer.cancel(algo_id=algo_id)
        assert time.monotonic() - began < PRODUCER_TIMEOUT_S + 0.5
        heal()
    first, second = (retried(lambda: [scenery.producer.cancel(algo_id=algo_id)])[0] for _ in range(2))
    assert (second.id, second.duplicate) == (first.id, True)
    assert first.wait(5).kind is OutcomeKind.CANCELLED
    time.sleep(1.2)  # what the black hole held has arrived by now
    assert scenery.deletes(first) == 1


@SCENES.add
def peers_leave_leases_alone_at_first(stage: Stage) -> None:
    """When Redis returns, holders complete before anybody takes leases that ran out meanwhile: no attempt is lost."""
    scenery = Scenery(stage)
    peers = [scenery.fleet.start() for _ in range(2)]
    tickets = scenery.in_flight(6, 1000)
    scenery.proxy.down()
    scenery.away(3.0)  # three leases
    scenery.proxy.up()
    scenery.goes_on(*tickets)
    assert all(is_running(peer) for peer in peers)


@SCENES.after(peers_leave_leases_alone_at_first)
def the_reply_to_a_renewal_is_lost(stage: Stage) -> None:
    """A renewal that is not answered is made again before the lease ends: the job stays with its worker."""
    scenery: Scenery = stage.scenery
    tickets = scenery.in_flight(1, 2500)
    trap = scenery.proxy.limit_data(mark_of(scenery.store.beat([], None, 1)), times=3)
    eventually(lambda: trap.sprung >= 2, 5, "replies are lost")
    assert stayed_in_hand(tickets[0].wait(15))


@SCENES.add
def flushed(stage: Stage) -> None:
    """A server that comes back empty: the worker registers itself again and works on, RQ sees it."""
    scenery = Scenery(stage)
    name = name_of(scenery.worker)
    scenery.connection.flushall()
    eventually(lambda: f"rq:worker:{name}" in scenery.peek("SMEMBERS", "rq:workers"), BACK_S)
    assert scenery.peek("HGET", f"rq:worker:{name}", "queues") == "cancels"
    assert scenery.peek("TTL", f"rq:worker:{name}") > 0
    scenery.goes_on()
    scenery.connection.script_flush()
    scenery.goes_on()


@pytest.mark.parametrize("name", SCENES)
def test_redis_away(played: dict[str, Future[None]], name: str) -> None:
    """Each scene above shows its rule."""
    played[name].result()
