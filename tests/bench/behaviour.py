"""How cancels get along with time: the first one after a pause, and retries."""

from __future__ import annotations

import contextlib
import re
import socket
import sys
import threading
import time
from dataclasses import replace
from typing import Self
from uuid import uuid4

import redis

from tests.bench.common import NEAR_MS, Bench, forget, put_paced, warm_up
from tests.bench.figures import FirstAfterIdle, Retries
from tests.bench.rig import Arrival, Rig, open_rig
from tests.bench.systems import PROJECT, RQ_SIMPLE, Running, System, running, wait_recorded

_IDLES = 2  # pauses last so many times as long as the exchange lets a connection idle


# ---- first cancel after a pause -------------------------------------------------------------------------------------


def first_after_idle(bench: Bench, pausing: threading.Event) -> list[FirstAfterIdle]:
    """The project's and a stock worker's first cancel after a pause, on servers of their own.

    ``pausing`` is set when the pause begins: others may work meanwhile.
    """
    closes_after_s = bench.sizes.closes_after_s
    project = replace(PROJECT, command=(sys.executable, "-m", "tests.bench.warm_worker"))
    chosen = [project if system is PROJECT else system for system in bench.systems if system in (PROJECT, RQ_SIMPLE)]
    with open_rig(tls=True, closes_after_s=closes_after_s) as rig, contextlib.ExitStack() as stack:
        trusted = rig.exchange.ca_file
        variables = {"EXCHANGE_TLS_CA": trusted, "REQUESTS_CA_BUNDLE": trusted, "BENCH_WARM_S": bench.sizes.warm_s}
        workers = [stack.enter_context(running(system, rig, environment=variables)) for system in chosen]
        warm_ms = [warm_up(bench, rig, worker) for worker in workers]
        idle_s = _IDLES * closes_after_s
        pausing.set()
        time.sleep(idle_s)
        rig.exchange.reset(delay_ms=NEAR_MS)
        figures = []
        for worker, before_ms in zip(workers, warm_ms, strict=True):
            figures.append(_first(bench, rig, worker, before_ms, idle_s))
    return figures


def _first(bench: Bench, rig: Rig, worker: Running, warm_ms: list[float], idle_s: float) -> FirstAfterIdle:
    (order,) = orders = bench.take(1)
    recorded = worker.producer.recorded()
    sent = put_paced(worker, orders, 0)
    wait_recorded(worker.producer, recorded + 1, bench.sizes.limit_s)
    arrivals = rig.exchange.arrivals()
    came_ns = arrivals[order][0][0] if order in arrivals else time.time_ns()
    between = [ready_ns for ready_ns in rig.exchange.handshakes() if sent.asked_ns[order] < ready_ns <= came_ns]
    bench.say(f"cold: {worker.system.title}, after {idle_s:.0f} s: {len(between)} handshakes")
    return FirstAfterIdle(
        system=worker.system.name,
        closes_after_s=bench.sizes.closes_after_s,
        idle_s=idle_s,
        handshakes=len(between),
        latency_ms=(came_ns - sent.asked_ns[order]) / 1e6,
        warm_ms=warm_ms,
        lost=int(order not in arrivals),
        unrecorded=worker.producer.unrecorded(orders),
    )


# ---- retries --------------------------------------------------------------------------------------------------------


class Monitor:
    """Everything that a server executes while a block runs, commands inside scripts too, as MONITOR tells it.

    It is read here and understood later: what is measured shall not wait for whoever looks on.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._end = uuid4().hex.encode()
        self._parts: list[bytes] = []
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Self:
        self._socket.sendall(b"MONITOR\r\n")
        if not self._socket.recv(5).startswith(b"+OK"):
            raise RuntimeError("the server does not let itself be monitored")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with redis.Redis(port=self._port) as client:
            client.echo(self._end)
        self._thread.join(10)
        self._socket.close()

    def _read(self) -> None:
        tail = b""
        while self._end not in tail and (data := self._socket.recv(1 << 16)):
            self._parts.append(data)
            tail = tail[-64:] + data

    def scheduled(self, registry: str) -> dict[str, float]:
        """When each job was due for the first time, s since the epoch: its score in that registry."""
        entry = rb'"ZADD" "%s" (?:"[A-Z]+" )*"([0-9.]+)" "([^"]+)"' % re.escape(registry.encode())
        due: dict[str, float] = {}
        for score, job_id in re.findall(entry, b"".join(self._parts)):
            due.setdefault(job_id.decode(), float(score))
        return due


def retries(bench: Bench, rig: Rig, system: System) -> Retries:
    """Let the exchange refuse each order's first cancel, and see when the second one comes."""
    forget(rig)
    with running(system, rig) as worker:
        warm_up(bench, rig, worker)
        producer = worker.producer
        orders, recorded = bench.take(bench.sizes.retries[system.name]), producer.recorded()
        rig.exchange.reset(delay_ms=NEAR_MS, refuses_first=True)
        with Monitor(rig.valkey.port) as monitor:
            put_paced(worker, orders, system.pace_s / 2)
            rig.exchange.wait_for(len(orders), bench.sizes.limit_s, again=True)
            wait_recorded(producer, recorded + len(orders), bench.sizes.limit_s)
        due = monitor.scheduled(producer.retries)
        bench.say(f"retries: {system.title}, {len(orders)} orders")
        jobs = {order: producer.jobs[order] for order in orders}
        return _retries(system.name, jobs, rig.exchange.arrivals(), due, producer.unrecorded(orders))


def _retries(
    system: str, jobs: dict[int, str], arrivals: dict[int, list[Arrival]], due: dict[str, float], unrecorded: int
) -> Retries:
    delays_ms, late_ms, at_once, lost, repeats = [], [], 0, 0, 0
    for order, job_id in jobs.items():
        came = [ns / 1e9 for ns, _ in arrivals.get(order, ())]
        repeats += max(len(came) - 2, 0)
        if len(came) < 2:
            lost += 1
        elif job_id not in due:
            at_once += 1
        else:
            delays_ms.append(1000 * (due[job_id] - came[0]))
            late_ms.append(1000 * (came[1] - due[job_id]))
    return Retries(system, len(jobs), delays_ms, late_ms, at_once, lost, unrecorded, repeats)
