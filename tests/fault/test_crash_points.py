"""kill -9 at every named step between popping a job and completing it: a healthy peer takes over, nothing is doubled.

All points run at the same time, each on a queue of its own with one worker that will die and one that will not; then
each test looks at what its point left.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import redis

from producer import CancelClient, Outcome
from producer.message import Attempt, OutcomeKind
from tests.conftest import API_KEY, API_SECRET
from tests.fault.conftest import TAKEN_OVER_S, environment, wait_for_line
from tests.fault.crashing import Point
from tests.fault.ledger import pattern_of
from tests.servers import Peek, Valkey, Worker, Workers, eventually, running_valkey
from worker.sandbox.control import BookEntry, ExchangeConfig, RunningExchange, start_exchange
from worker.sandbox.faults import Fault

CRASHING = (sys.executable, "-m", "tests.fault.crashing")
STOPPING = (Point.BEFORE_HANDING_BACK, Point.HANDED_BACK)
#: What the first DELETE of each order meets, where a point lies behind a bad answer.
FIRST_ANSWER = {
    Point.BEFORE_QUERY: Fault.UNKNOWN_503,
    Point.QUERIED: Fault.UNKNOWN_503,
    Point.SCHEDULED: Fault.INTERNAL_503,
    Point.IN_RETRY_WAIT: Fault.INTERNAL_503,
    Point.RETRY_CLAIMED: Fault.INTERNAL_503,
}
LOST, OPEN, SURE, BUSY, GONE = "worker lost", "open", "confirmed", "busy", "canceled"
#: The history of the job that the killed worker had. A claimed job counts as perhaps sent, whatever was really sent.
HISTORY = {
    Point.MOVED: [SURE],
    Point.CLAIMED: [LOST, OPEN, SURE],
    Point.BEFORE_SEND: [LOST, OPEN, SURE],
    Point.SENT: [LOST, GONE],
    Point.ANSWERED: [LOST, GONE],
    Point.BEFORE_QUERY: [LOST, OPEN, SURE],
    Point.QUERIED: [LOST, OPEN, SURE],
    Point.COMPLETED: [SURE],
    Point.SCHEDULED: [BUSY, SURE],
    Point.IN_RETRY_WAIT: [BUSY, SURE],
    Point.RETRY_CLAIMED: [BUSY, LOST, OPEN, SURE],
    Point.BEFORE_HANDING_BACK: [LOST, OPEN, SURE],
    Point.HANDED_BACK: [SURE],
}
#: Orders that are asked for before the worker that is to die must have had one.
MOST_ORDERS = 12
#: Scenes played at a time: how soon a peer takes over is measured, and two processors start two workers at a time.
AT_ONCE = 4


@dataclass
class Scene:
    """One queue with a worker that dies at a point and a healthy one, and what came of it."""

    point: Point
    fleet: Workers
    client: CancelClient
    exchange: RunningExchange
    dying: Worker
    peer: Worker
    orders: dict[str, int] = field(default_factory=dict)  # by job id
    crashed: str = ""  # the job that the dead worker had
    died_at_ms: int = 0

    @property
    def queue(self) -> str:
        """The queue's name."""
        return f"q-{self.point}"

    def play(self) -> None:
        """Ask for cancels until the one worker has died, and wait until all have ended."""
        (self._until_stopping_dies if self.point in STOPPING else self._until_working_dies)()
        eventually(lambda: len(self.client.outcomes_of(self.orders)) == len(self.orders), 10, f"{self.point}: outcomes")

    def _until_working_dies(self) -> None:
        """One at a time, so that it is known which job the dead worker had."""
        for _ in range(MOST_ORDERS):
            self.crashed = self._ask(1)[0]
            eventually(self._is_done_or_dead, 10, f"{self.point}: an outcome or a death")
            if self._is_dead():
                return
        raise AssertionError(f"{self.point} was not reached: {self.dying.output()}")

    def _until_stopping_dies(self) -> None:
        """Asked while it stops and yet waits at the queue, it gets jobs that it must not start."""
        for _ in range(5):
            self.dying.process.send_signal(signal.SIGTERM)
            wait_for_line(self.dying, "event=stopping")
            asked = self._ask(4)
            self.dying.process.wait(10)
            if self._is_dead():
                # Handed back or not, the job bears the name of the worker that had it last.
                eventually(lambda ids=asked: len(self.client.outcomes_of(ids)) == 4, 10)  # type: ignore[misc]
                self.crashed = max(asked, key=lambda each: len(self.outcome(each).attempts))
                return
            self.dying = start_dying(self.fleet, self.point, self.queue)
            wait_for_line(self.dying, "event=started", 60)
        raise AssertionError(f"{self.point} was not reached: {self.dying.output()}")

    def _ask(self, count: int) -> list[str]:
        asked = []
        for order in self.exchange.add_orders(count):
            if self.point in FIRST_ANSWER:
                self.exchange.script_faults(order.algo_id, [FIRST_ANSWER[self.point]])
            ticket = self.client.cancel(algo_id=order.algo_id)
            self.orders[ticket.id] = order.algo_id
            asked.append(ticket.id)
        return asked

    def _is_done_or_dead(self) -> bool:
        if self._is_dead():
            return True
        outcome = self.client.outcome(self.crashed)
        if outcome is None:
            return False
        # There its own outcome is recorded a moment before its death; elsewhere it means that the point was not
        # reached, as each worker took some of the steps.
        return self.point is not Point.COMPLETED or not outcome.worker.startswith(f"dying-{self.point}")

    def _is_dead(self) -> bool:
        if self.dying.process.poll() is None:
            return False
        self.died_at_ms = self.died_at_ms or time.time_ns() // 1_000_000
        return self.dying.process.returncode == -signal.SIGKILL

    def outcome(self, job_id: str) -> Outcome:
        """The outcome of a job."""
        outcome = self.client.outcome(job_id)
        assert outcome is not None
        return outcome


def start_dying(fleet: Workers, point: Point, queue: str) -> Worker:
    """A worker that dies at ``point``, named so that it is recognised."""
    return fleet.start(command=(*CRASHING, point, "--"), wait=False, CANCEL_QUEUE=queue, DYNO=f"dying-{point}")


@dataclass
class Stage:
    """The servers that all scenes share."""

    valkey: Valkey
    exchange: RunningExchange
    fleet: Workers
    scenes: dict[Point, Scene]
    failures: dict[Point, BaseException]
    normal: set[tuple[str, bool]]  # what a run without a death leaves
    connection: redis.Redis

    def scene(self, point: Point) -> Scene:
        """The scene of a point, which came to its end."""
        if point in self.failures:
            raise self.failures[point]
        return self.scenes[point]

    def book(self) -> dict[int, BookEntry]:
        """The exchange's book."""
        return self.exchange.book()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """All points, some played at the same time."""
    accounts = {"default": (API_KEY, API_SECRET)}
    with running_valkey("--appendonly", "no") as valkey, start_exchange(ExchangeConfig(accounts)) as exchange:
        fleet = Workers(tmp_path_factory.mktemp("crash"), environment(valkey.url, exchange.url))
        fleet.environment["BACKOFF_BASE_MS"] = "500"  # long enough to die in a wait
        connection = redis.Redis(port=valkey.port)
        scenes = {}
        try:
            for point in Point:
                queue = f"q-{point}"
                client = CancelClient.from_url(valkey.url, queue)
                peer = fleet.start(wait=False, CANCEL_QUEUE=queue, DYNO=f"peer-{point}")
                scenes[point] = Scene(point, fleet, client, exchange, start_dying(fleet, point, queue), peer)
                for worker in (peer, scenes[point].dying):
                    wait_for_line(worker, "event=started", 60)
            normal = play_without_death(fleet, valkey, exchange, connection)
            failures = play_all(scenes)
            fleet.stop()  # the tests only look
            yield Stage(valkey, exchange, fleet, scenes, failures, normal, connection)
        finally:
            fleet.stop()
            connection.close()
            for scene in scenes.values():
                scene.client.close()


def play_without_death(
    fleet: Workers, valkey: Valkey, exchange: RunningExchange, connection: redis.Redis
) -> set[tuple[str, bool]]:
    """Cancels on a queue of their own, one with a retry; gives the keys that are left of them."""
    worker = fleet.start(wait=False, CANCEL_QUEUE="q-normal")
    first, second = (order.algo_id for order in exchange.add_orders(2))
    exchange.script_faults(first, [Fault.INTERNAL_503])
    with CancelClient.from_url(valkey.url, "q-normal") as client:
        tickets = [client.cancel(algo_id=algo_id) for algo_id in (first, second)]
        for ticket in tickets:
            assert ticket.wait(60).kind is OutcomeKind.CANCELLED, worker.output()
    return keys_left(connection, "q-normal", [ticket.id for ticket in tickets])


def play_all(scenes: dict[Point, Scene]) -> dict[Point, BaseException]:
    """Play all scenes; gives what went wrong."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        played = {point: pool.submit(scene.play) for point, scene in scenes.items()}
    return {point: error for point, future in played.items() if (error := future.exception()) is not None}


def said(attempt: Attempt) -> str:
    """What a history is compared by."""
    return attempt.msg if attempt.msg == LOST else attempt.verdict


@pytest.mark.parametrize("point", list(Point))
class TestCrashPoint:
    """What every step between the pop and the completion must bear."""

    def test_one_outcome_each(self, stage: Stage, point: Point) -> None:
        """Whatever step its worker died at, each request has exactly one outcome, which was counted once."""
        scene = stage.scene(point)
        peek = Peek(stage.connection, scene.queue)
        assert sorted(outcome.id for outcome in peek.ledger()) == sorted(scene.orders)
        assert peek.counted() == peek.kinds()

    def test_the_kind_is_the_books(self, stage: Stage, point: Point) -> None:
        """The outcome says what the exchange's book says, and the order was cancelled once."""
        scene, book = stage.scene(point), stage.book()
        for job_id, algo_id in scene.orders.items():
            assert scene.outcome(job_id).kind is OutcomeKind.CANCELLED
            assert (book[algo_id].status, book[algo_id].deletes_effective) == ("CANCELED", 1)

    def test_history_of_the_job_that_was_held(self, stage: Stage, point: Point) -> None:
        """An attempt that may have left stands in the history as unclear; one that cannot have left does not."""
        scene = stage.scene(point)
        attempts = scene.outcome(scene.crashed).attempts
        assert [said(attempt) for attempt in attempts] == HISTORY[point]
        assert [attempt.n for attempt in attempts] == list(range(1, len(attempts) + 1))
        assert all(attempt.verdict == "unclear" for attempt in attempts if attempt.msg == LOST)

    def test_taken_over_in_time(self, stage: Stage, point: Point) -> None:
        """An idle peer goes on with the job within the lease and 1.5 s."""
        scene = stage.scene(point)
        outcome = scene.outcome(scene.crashed)
        if point is Point.COMPLETED:  # nothing was left to take over
            assert outcome.worker.startswith(f"dying-{point}")
            return
        assert outcome.worker.startswith(f"peer-{point}")
        resumed_at_ms = next(a.at_ms for a in outcome.attempts if said(a) not in (LOST, BUSY))
        assert resumed_at_ms - scene.died_at_ms <= TAKEN_OVER_S * 1000

    def test_leaves_what_a_normal_run_leaves(self, stage: Stage, point: Point) -> None:
        """A death leaves no kind of key, and none without a time to live, that a run without one does not leave."""
        scene = stage.scene(point)
        assert keys_left(stage.connection, scene.queue, scene.orders) == stage.normal


def keys_left(connection: redis.Redis, queue: str, job_ids: Iterable[str]) -> set[tuple[str, bool]]:
    """The kinds of keys of a queue, each with whether it has a time to live."""
    marks = (queue, *job_ids)
    keys = [raw.decode() for raw in connection.scan_iter(count=1000)]
    return {
        (pattern_of(key).replace(queue, "QUEUE"), connection.ttl(key) > 0)
        for key in keys
        if any(mark in key for mark in marks)
    }


def test_an_id_between_pop_and_claim_stands_in_the_claiming_list(stage: Stage) -> None:
    """The step before the claim leaves the id in our own list, started by nobody, and the next claim finds it there."""
    with CancelClient.from_url(stage.valkey.url, "q-alone") as client:
        dying = start_dying(stage.fleet, Point.MOVED, "q-alone")
        wait_for_line(dying, "event=started")
        ticket = client.cancel(algo_id=stage.exchange.add_orders()[0].algo_id)
        assert dying.process.wait(10) == -signal.SIGKILL
        peek = Peek(stage.connection, "q-alone")
        assert peek("LRANGE", peek.keys.claiming, 0, -1) == [ticket.id]
        assert peek.waiting() == []
        assert peek.job(ticket.id)["status"] == "queued"
        assert stage.fleet.start("--burst", wait=False, CANCEL_QUEUE="q-alone").process.wait(20) == 0
        outcome = client.outcome(ticket.id)
    assert outcome is not None
    assert [said(attempt) for attempt in outcome.attempts] == [SURE]


def test_two_holders_die_one_after_the_other(stage: Stage) -> None:
    """A job whose second holder dies too is unclear twice, and is cancelled once by the third."""
    order = stage.exchange.add_orders()[0]
    with CancelClient.from_url(stage.valkey.url, "q-twice") as client:
        ticket = client.cancel(algo_id=order.algo_id)
        for point in (Point.BEFORE_SEND, Point.QUERIED):
            assert start_dying(stage.fleet, point, "q-twice").process.wait(20) == -signal.SIGKILL
        assert stage.fleet.start("--burst", wait=False, CANCEL_QUEUE="q-twice").process.wait(20) == 0
        outcome = client.outcome(ticket.id)
    assert outcome is not None
    assert outcome.kind is OutcomeKind.CANCELLED
    assert [said(attempt) for attempt in outcome.attempts] == [LOST, LOST, OPEN, SURE]
    assert stage.book()[order.algo_id].deletes_effective == 1
