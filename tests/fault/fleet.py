"""The workers of a chaos run: ours, one of which nobody reads, and RQ's own. Whoever ends is started again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from producer.keys import Band
from tests.fault.blows import Make
from tests.fault.ledger import Kill
from tests.servers import ROOT, Peek, Worker, Workers, members

RQ = str(Path(sys.executable).with_name("rq"))
#: How long a process may take to start or to leave before that is a failure, s.
PATIENCE_S = 30.0


@dataclass
class Place:
    """A worker's place: what kind it is for, who has it now, and how often it was taken."""

    number: int
    make: Make
    generation: int = 0
    worker: Worker | None = None
    unread: int = -1  # the reading end of a pipe that takes nothing any more
    is_leaving: bool = False  # its end is ours to wait for
    start_at_s: float = 0.0

    @property
    def dyno(self) -> str:
        """The name of the process that has it now; its name in RQ begins with it and a dot."""
        return f"w{self.number}g{self.generation}"


class Team:
    """The workers. One of ours that ends by itself is at fault; RQ's own do when Redis is lost at a bad time."""

    def __init__(self, fleet: Workers, peek: Peek, restart_s: float, makes: Iterable[Make]) -> None:
        self._fleet = fleet
        self._peek = peek
        self._restart_s = restart_s
        self.places = [Place(number, make) for number, make in enumerate(makes)]
        self.kills: list[Kill] = []
        self.exits_s: list[float] = []
        self.left_held = 0  # jobs that a worker still held when it had left in peace: each costs an attempt
        self.walked_out: list[str] = []
        self.stock_ends: list[str] = []

    def tend(self) -> None:
        """Start whoever is due, note who ended unasked."""
        for place in self.places:
            if place.worker is None:
                if time.monotonic() >= place.start_at_s:
                    self._start(place)
            elif not place.is_leaving and place.worker.process.poll() is not None:
                ends = self.stock_ends if place.make.is_stock else self.walked_out
                ends.append(f"{place.dyno} exit code {place.worker.process.returncode}")
                self._vacate(place)

    def _start(self, place: Place) -> None:
        place.generation += 1
        if place.make is Make.UNREAD:
            place.unread, writing = _full_pipe()
            place.worker = self._fleet.start(wait=False, stdout=writing, DYNO=place.dyno)
            os.close(writing)
        elif place.make.is_stock:
            options = ["--url", self._fleet.environment["REDIS_URL"], "--serializer", "json", "--path", str(ROOT)]
            options += ["--name", f"{place.dyno}.{place.make}"]
            options += ["-w", "rq.SimpleWorker"] if place.make is Make.SIMPLE else []
            place.worker = self._fleet.start(*options, command=(RQ, "worker", self._peek.keys.queue), wait=False)
        else:
            place.worker = self._fleet.start(wait=False, DYNO=place.dyno)
        place.worker.log = place.worker.log.rename(place.worker.log.with_name(f"{place.dyno}.{place.make}.log"))

    def is_at_work(self, place: Place) -> bool:
        """Whether RQ knows the worker at a place."""
        prefix = f"{self._peek.keys.worker_prefix}{place.dyno}."
        return place.worker is not None and any(
            key.startswith(prefix) for key in self._peek("SMEMBERS", self._peek.keys.workers)
        )

    def held_by(self, place: Place) -> list[str]:
        """Ids of the jobs on which the worker at a place has a lease that has not run out."""
        keys, prefix = self._peek.keys, f"{place.dyno}."
        ids = self._peek("ZRANGEBYSCORE", keys.unfinished, self._peek.now_ms(), f"({int(Band.WAITING)}")
        return [i for i in ids if str(self._peek("HGET", keys.job_prefix + i, "worker_name")).startswith(prefix)]

    def catch(self, place: Place, jobs: int = 1, *, horse: bool = False) -> bool:
        """Stop all processes of a place in the middle of so many jobs, its horse among them if so wanted.

        False: not now; they go on.
        """
        if len(self.held_by(place)) < jobs or (horse and not _horses(place)):
            return False
        self.signal(place, signal.SIGSTOP)
        if len(self.held_by(place)) >= jobs and (_horses(place) or not horse):
            return True
        self.signal(place, signal.SIGCONT)
        return False

    def kill(self, place: Place) -> None:
        """SIGKILL to all processes of a place."""
        place.is_leaving = True
        self.signal(place, signal.SIGKILL)
        _in_place(place).process.wait(PATIENCE_S)
        self._note_kill(place)
        self._vacate(place)

    def kill_horse(self, place: Place) -> None:
        """SIGKILL to the process that has the job, and none to its parent."""
        horses = _horses(place)
        _send(horses, signal.SIGKILL)
        self.signal(place, signal.SIGCONT)
        if horses:
            self._note_kill(place)

    def _note_kill(self, place: Place) -> None:
        self.kills.append(Kill(self._peek.now_ms(), tuple(self.held_by(place))))

    def terminate(self, place: Place) -> None:
        """SIGTERM. Ours gets it twice, with its whole group, and must leave in peace, with nothing in its hands."""
        worker, place.is_leaving = _in_place(place), True
        if place.make.is_stock:  # the second one means at once
            self._terminate_stock(place, worker)
            return
        began = time.monotonic()
        for _ in range(2):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.process.pid, signal.SIGTERM)
            time.sleep(0.1)
        code = _end_of(worker)
        self.exits_s.append(time.monotonic() - began)
        if code != 0:
            self.walked_out.append(f"{place.dyno} exit code {code} after SIGTERM")
        self.left_held += len(self.held_by(place))
        self._vacate(place)

    def _terminate_stock(self, place: Place, worker: Worker) -> None:
        worker.process.send_signal(signal.SIGTERM)
        code = _end_of(worker)
        if code != 0:
            self.stock_ends.append(f"{place.dyno} exit code {code} after SIGTERM")
        self._vacate(place)

    def signal(self, place: Place, number: signal.Signals) -> None:
        """Send a signal to all processes of a place, the parent first: it would take a stopped horse for a dead one."""
        _send(members(_in_place(place).process.pid), number)

    def close(self) -> None:
        """End all of them at once."""
        for place in self.places:
            self._vacate(place)

    def _vacate(self, place: Place) -> None:
        if place.worker is not None:
            _send(members(place.worker.process.pid), signal.SIGKILL)
            place.worker.stop(signal.SIGKILL)
        if place.unread >= 0:
            os.close(place.unread)
        place.worker, place.is_leaving, place.unread = None, False, -1
        place.start_at_s = time.monotonic() + self._restart_s


def _in_place(place: Place) -> Worker:
    if place.worker is None:
        raise RuntimeError(f"the worker {place.dyno} did not start again")
    return place.worker


def _end_of(worker: Worker) -> int | None:
    """The exit code of a process that was told to leave; None: it did not."""
    try:
        return worker.process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        return None


def _full_pipe() -> tuple[int, int]:
    """A pipe that takes not one byte more, as if it had not been read for long: its reading and its writing end."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    return reading, writing


def _horses(place: Place) -> list[int]:
    leader = _in_place(place).process.pid
    return [pid for pid in members(leader) if pid != leader]


def _send(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
