"""A worker that was paused longer than its lease does no harm when it wakes: one outcome, and no request after the
lease was taken."""

from __future__ import annotations

import signal
import time
from concurrent.futures import Future

import pytest

from producer import CancelClient, Ticket
from producer.message import OutcomeKind
from tests.fault.conftest import Scenes, Stage, name_of, state
from tests.servers import Peek, Valkey, Worker, Workers, eventually
from worker.sandbox.control import RunningExchange
from worker.sandbox.faults import Fault

#: A wait at the queue ends within a second, on behalf of a process that stands still too: before the lease does.
LEASE_S = "1.5"
#: Time between a DELETE's arrival and its answer, in which the worker is paused, ms; later ones are answered soon.
LATENCY_MS = 1200
#: How long a woken worker is watched for requests that it must not send, s: longer than its looks at Redis.
WATCHED_S = 1.5
SCENES = Scenes()


class Pair:
    """A worker that is to be paused, and a peer that comes when it is."""

    def __init__(self, stage: Stage) -> None:
        self.valkey: Valkey = stage.valkey()
        self.exchange: RunningExchange = stage.exchange()
        self.client: CancelClient = stage.client(self.valkey.url)
        self.peek = Peek(stage.direct(self.valkey))
        self._fleet: Workers = stage.fleet(self.valkey.url, self.exchange, LEASE_S=LEASE_S)
        self.paused = self._fleet.start()

    def pause(self) -> None:
        """Stop the process as a suspended host would."""
        self.paused.process.send_signal(signal.SIGSTOP)
        eventually(lambda: state(self.paused.process.pid) == "T", what="the process stands still")

    def wake(self) -> None:
        """Let it go on."""
        self.paused.process.send_signal(signal.SIGCONT)

    def send(self, *faults: Fault) -> tuple[Ticket, int]:
        """Have a DELETE sent and the sender paused before it has the answer; gives its order too."""
        order = self.exchange.add_orders()[0]
        if faults:
            self.exchange.script_faults(order.algo_id, faults)
        self.exchange.set_latency_ms(LATENCY_MS)
        ticket = self.client.cancel(algo_id=order.algo_id)
        eventually(lambda: self.requests(order.algo_id)[0] == 1, what="the DELETE arrives")
        self.pause()
        self.exchange.set_latency_ms(0)
        return ticket, order.algo_id

    def gets(self, ticket: Ticket) -> bool:
        """Whether Redis gives a new job to the worker that stands still, and does not keep it waiting."""
        eventually(lambda: self.peek.waiting() or self.peek.job(ticket.id)["worker_name"], what="a place for the job")
        return not self.peek.waiting()

    def peer_takes_over(self, ticket: Ticket) -> Worker:
        """Start the peer and wait until it has ended the job."""
        peer = self._fleet.start()
        assert ticket.wait(15).kind is OutcomeKind.CANCELLED
        assert [outcome.worker for outcome in self.peek.ledger()] == [name_of(peer)]
        return peer

    def requests(self, algo_id: int) -> tuple[int, int]:
        """DELETEs and GETs that the exchange has got for an order."""
        entry = self.exchange.book()[algo_id]
        return entry.deletes, entry.gets

    def wake_and_watch(self, algo_id: int) -> None:
        """See that the woken worker sends nothing for the order, and that the outcome stays the only one."""
        before, records = self.requests(algo_id), len(self.peek.ledger())
        self.wake()
        ends_at = time.monotonic() + WATCHED_S
        while time.monotonic() < ends_at:
            assert self.requests(algo_id) == before
            time.sleep(0.05)
        assert len(self.peek.ledger()) == records
        assert self.exchange.book()[algo_id].deletes_effective == 1


@SCENES.add
def an_answer_read_after_the_lease_is_not_recorded(stage: Stage) -> None:
    """Paused between its DELETE and the answer, the first worker's outcome is refused: the peer's stands alone. From
    then on it takes new jobs as before."""
    pair = Pair(stage)
    ticket, algo_id = pair.send()
    peer = pair.peer_takes_over(ticket)
    assert [attempt.msg for attempt in ticket.wait(1).attempts] == ["worker lost", "CANCELED"]
    assert peer.stop() == 0
    pair.wake_and_watch(algo_id)
    assert "event=fenced" in pair.paused.output()
    order = pair.exchange.add_orders()[0]
    outcome = pair.client.cancel(algo_id=order.algo_id).wait(5)
    assert (outcome.kind, outcome.worker) == (OutcomeKind.CANCELLED, name_of(pair.paused))
    assert len(outcome.attempts) == 1


@SCENES.add
def no_query_follows_an_answer_read_too_late(stage: Stage) -> None:
    """An unclear answer asks for a query at once; read after the lease, it gets none."""
    pair = Pair(stage)
    ticket, algo_id = pair.send(Fault.UNKNOWN_503)
    pair.peer_takes_over(ticket)
    pair.wake_and_watch(algo_id)


@SCENES.add
def no_second_delete_follows_an_answer_read_too_late(stage: Stage) -> None:
    """A clock refusal asks for the same DELETE at once; read after the lease, it gets none."""
    pair = Pair(stage)
    ticket, algo_id = pair.send(Fault.AHEAD_1021)
    pair.peer_takes_over(ticket)
    pair.wake_and_watch(algo_id)


@SCENES.add
def a_claim_read_after_its_lease_sends_nothing(stage: Stage) -> None:
    """Redis hands a job to a worker that stands still at the queue; it wakes when somebody else has done the job."""
    pair = Pair(stage)
    for _ in range(10):
        pair.client.cancel(algo_id=pair.exchange.add_orders()[0].algo_id).wait(5)  # the server knows the scripts now
        pair.peek("DEL", pair.peek.keys.outcomes)
        pair.pause()
        order = pair.exchange.add_orders()[0]
        ticket = pair.client.cancel(algo_id=order.algo_id)
        if pair.gets(ticket):
            break
        pair.wake()  # it stood still between two waits, when nobody was at the queue: once more
        ticket.wait(5)
    assert pair.peek.job(ticket.id)["worker_name"] == name_of(pair.paused)
    pair.peer_takes_over(ticket)
    pair.wake_and_watch(order.algo_id)


@pytest.mark.parametrize("name", SCENES)
def test_fence(played: dict[str, Future[None]], name: str) -> None:
    """Each scene above shows its rule."""
    played[name].result()
