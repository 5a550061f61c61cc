"""The worker as RQ sees it: born, heartbeating, suspended, commanded and buried as any RQ worker is.

What RQ does for one job at a time, :class:`worker.crew.Crew` does for many; the rest of RQ's worker is kept.
`python -m worker` runs it, and so does `rq worker -w worker.runner.CancelWorker`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any
from uuid import uuid4

import redis
from rq import worker_registration
from rq.serializers import JSONSerializer
from rq.utils import ensure_job_list
from rq.worker import BaseWorker, WorkerStatus

from producer.keys import WorkerField
from worker import log
from worker.away import trouble
from worker.crew import Crew
from worker.settings import Settings
from worker.store import Store, connect_like
from worker.wiring import lease_of, open_canceller, open_exchange, open_redis, open_store

EX_OK = 0
EX_UNAVAILABLE = 69  # sysexits.h: Redis refused the login
EX_SOFTWARE = 70  # sysexits.h: a defect
EX_INTERRUPTED = 130

#: How often Redis is asked for the gate and for suspension at the latest, s.
_LOOK_S = 1.0
#: How often the exchange's clock is measured and connections are kept warm, s: two calls each, five a minute.
_WARM_S = 25.0
#: What of the grace is kept for leaving RQ's registries, and of that for the interpreter's end, s.
_FAREWELL_S, _END_S = 3.0, 1.0


class _StopRequest:
    """What a signal leaves for the main thread.

    Not a threading.Event: the handler runs in the main thread, perhaps while that very thread holds the event's lock in
    `wait`, and would then wait for itself. SimpleQueue's `put` is made to be called from anywhere.
    """

    def __init__(self) -> None:
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._made = False

    def make(self) -> None:
        self._made = True
        self._news.put(None)

    def wait(self, timeout_s: float) -> bool:
        """Whether to stop, known within ``timeout_s``."""
        if not self._made:
            with contextlib.suppress(queue.Empty):
                self._news.get(timeout=timeout_s)
        return self._made


class CancelWorker(BaseWorker):
    """An RQ worker that keeps many cancels in flight in one process, on one queue.

    RQ's maintenance never runs here: it loads the callbacks that a job's hash names, and calls its webhooks.
    """

    def __init__(
        self,
        queues: Any,
        name: str | None = None,
        *,
        connection: redis.Redis | None = None,
        settings: Settings | None = None,
        **options: Any,
    ) -> None:
        self._settings = settings or Settings.from_env()
        own = connect_like(connection) if connection is not None else open_redis(self._settings)
        options["serializer"] = JSONSerializer
        # RQ's command line hands in queues that unpickle what stands in Redis, unless told otherwise: only names count.
        names = [queue if isinstance(queue, str) else queue.name for queue in ensure_job_list(queues)]
        super().__init__(names, name or _unique_name(self._settings), connection=own, **options)
        if len(self.queues) != 1:
            raise ValueError(
                f"one queue for each worker, not {', '.join(self.queue_names())}: start a process for each"
            )
        self._stop = _StopRequest()
        self._ended = threading.Event()  # upkeep is not needed any more
        self._interrupts = 0
        self.exit_code = EX_OK
        self._knows_limit = False
        self._renewed_at_s = 0.0  # monotonic
        self._exchange, clock = open_exchange(self._settings)
        self._store: Store = open_store(own, self._settings, self.name, self.queues[0].name)
        self._canceller, self._gate = open_canceller(self._settings, self._exchange, clock, self._store, self.name)
        self._clock = clock
        self._crew = Crew(
            self._settings.concurrency,
            lease_of(self._settings),
            self._store,
            self._canceller,
            self._exchange,
            self._gate,
        )

    def _set_connection(self, connection: redis.Redis) -> redis.Redis:
        """Keep our own time-outs: RQ would wait 415 s for an answer."""
        return connection

    def _set_ip_address(self, connection: redis.Redis) -> None:  # noqa: ARG002
        """Not at construction: Redis may be away when a worker starts. See `_be_born`."""
        self.ip_address = "unknown"

    def work(self, burst: bool = False, *_: Any, **__: Any) -> bool:
        """Work until told to stop, or with ``burst`` until nothing is left; gives whether any outcome was recorded.

        RQ's other options (scheduler, idle time, job count) mean nothing here: retries need no scheduler.
        """
        log.configure_unless_done(self._settings.log_level, self._settings.log_format)
        self._install_signal_handlers()
        if not self._be_born():
            self._exchange.close()
            return False
        self._meet_exchange()
        self._tell_start()
        self._crew.start()
        upkeep = [threading.Thread(target=loop, name=loop.__name__, daemon=True) for loop in (self._look, self._warm)]
        for thread in upkeep:
            thread.start()
        try:
            self._wait(burst)
        finally:
            self._leave()
        return self._crew.outcomes > 0

    def _be_born(self) -> bool:
        """Register as RQ's workers do, as soon as Redis is there; False if told to stop before."""
        is_away = False
        while not self._stop.wait(0):
            try:
                super()._set_ip_address(self.connection)
                if self.birth_date is None:  # else it was done, perhaps unheard: RQ takes our own hash for another's
                    self.register_birth()  # type: ignore[no-untyped-call]
                if self.pubsub_thread is None:
                    self.subscribe()  # type: ignore[no-untyped-call]
                self.set_state(WorkerStatus.IDLE)
                seconds, micros = self.connection.time()
                self._store.clock.observe(seconds * 1000 + micros // 1000)
                self._gate.observe(self._store.renew([])[1] or 0)
            except redis.AuthenticationError:
                raise
            except (redis.ConnectionError, redis.TimeoutError) as error:
                if not is_away:
                    log.error("redis", state="away", error=trouble(error))
                is_away = True
                self._stop.wait(_LOOK_S)
                continue
            if is_away:
                log.info("redis", state="back")
            return True
        return False

    def _meet_exchange(self) -> None:
        """Measure its clock and learn its limit, unless nothing may be sent now."""
        now_ms = self._store.clock.now_ms()
        if not self._gate.closed(now_ms):
            self._exchange.sync_time()
            self._learn_weight_limit()
            self._canceller.heed_refusal()

    def _tell_start(self) -> None:
        log.info(
            "started",
            worker=self.name,
            pid=os.getpid(),
            queue=self.queue_names()[0],
            redis=self._settings.display_redis_url,
            exchange=self._settings.base_url,
            accounts=",".join(sorted(self._settings.credentials)),
            concurrency=self._settings.concurrency,
            clock_offset_ms=self._clock.offset_ms if self._clock.measured else None,
        )

    def _wait(self, burst: bool) -> None:
        while not self._stop.wait(0.05 if burst else 0.5):
            if self._crew.refused is not None:
                log.error("redis", state="refused", error="the login was refused; restart with the new REDIS_URL")
                self.exit_code = EX_UNAVAILABLE
                return
            if not self._crew.is_alive:
                log.error("defect", where="cancel-loop", error="it has ended; the leases bring its jobs back")
                self.exit_code = EX_SOFTWARE
                return
            if burst and self._crew.idle() and self._drained():
                return

    def _drained(self) -> bool:
        try:
            return self._store.drained()
        except redis.RedisError:
            return False

    # -- upkeep --

    def _look(self) -> None:
        """Renew the leases of all jobs in flight, tell RQ that we live, learn of the gate and of suspension."""
        while not self._ended.wait(min(self._settings.lease_s / 4, _LOOK_S)):
            try:
                self._look_once()
            except redis.RedisError as error:
                log.debug("look", error=type(error).__name__)
            except Exception as error:  # noqa: BLE001 - without renewals every job in flight would be lost
                log.error("defect", where="look", error=type(error).__name__)

    def _look_once(self) -> None:
        asked_at_s = time.monotonic()
        # Not at each look: what is renewed all the time is taken over a whole lease after its holder's death.
        is_due = asked_at_s >= self._renewed_at_s + self._settings.lease_s / 4
        held = self._crew.held() if is_due else []
        lost, gate_until_ms, suspended = self._store.renew(held)
        if is_due:
            self._renewed_at_s = asked_at_s
            self._crew.renewed(asked_at_s, lost)
        now_ms = self._store.clock.now_ms()
        self._gate.told(gate_until_ms, now_ms, asked_at_s)
        self._gate.share(now_ms)
        self._crew.suspend(suspended)
        at_work = WorkerStatus.BUSY if self._crew.in_flight() else WorkerStatus.IDLE
        state = WorkerStatus.SUSPENDED if suspended else at_work
        with self.connection.pipeline(transaction=False) as pipeline:
            self.heartbeat(pipeline=pipeline)
            pipeline.hset(self.key, mapping=self._figures())
            if state != self.get_state():
                self.set_state(state, pipeline=pipeline)
            is_new = pipeline.execute()[0] == 1
        if is_new:  # Redis came back without its data
            with self.connection.pipeline() as pipeline:
                pipeline.hset(self.key, mapping={**self.serialize(), "state": state})
                worker_registration.register(self, pipeline)
                pipeline.execute()

    def _figures(self) -> dict[Any, Any]:
        """What an operator wants to know of this process beside what RQ says of it."""
        figures: dict[Any, Any] = {
            WorkerField.CONCURRENCY: self._settings.concurrency,
            WorkerField.IN_FLIGHT: self._crew.working_on(),
            WorkerField.USED_WEIGHT: self._exchange.last_used_weight(),
            WorkerField.WEIGHT_LIMIT: self._gate.weight_limit,
        }
        if self._clock.measured:
            figures[WorkerField.CLOCK_OFFSET_MS] = self._clock.offset_ms
        return figures

    def _warm(self) -> None:
        """Keep connections open and the clock true, so that the next cancel waits for neither."""
        while not self._ended.wait(_WARM_S if self._clock.measured else _LOOK_S):
            now_ms = self._store.clock.now_ms()
            if self._gate.closed(now_ms):
                continue
            self._exchange.keep_warm()
            self._learn_weight_limit()
            self._canceller.heed_refusal()

    def _learn_weight_limit(self) -> None:
        if not self._knows_limit and (limit := self._exchange.weight_limit()) is not None:
            self._gate.weight_limit = limit
            self._knows_limit = True

    # -- stopping --

    def _install_signal_handlers(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.request_stop)
            signal.signal(signal.SIGTERM, self.request_stop)

    def request_stop(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """SIGTERM may come any number of times. SIGINT twice is a person who does not want to wait."""
        if signum == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                left = self._crew.in_flight()
                sys.stderr.write(f"left at once: {left} jobs in flight come back when their leases run out\n")
                sys.stderr.flush()
                os._exit(EX_INTERRUPTED)
        self._stop.make()

    def _leave(self) -> None:
        grace_s = self._settings.shutdown_grace_s
        began = time.monotonic()
        log.info("stopping", worker=self.name, in_flight=self._crew.in_flight(), grace_s=grace_s)
        self._crew.stop()
        done = self._crew.join(max(grace_s - _FAREWELL_S, 1))
        self._ended.set()
        # In a thread of its own: while Redis is away it would take longer than there is.
        farewell = threading.Thread(target=self._say_farewell, name="farewell", daemon=True)
        farewell.start()
        farewell.join(max(began + grace_s - _END_S - time.monotonic(), 0.1))
        log.info(
            "stopped",
            worker=self.name,
            left=None if done else self._crew.in_flight(),
            outcomes=self._crew.outcomes,
            seconds=time.monotonic() - began,
        )
        self._exchange.close()
        if threading.current_thread() is threading.main_thread():
            # One more SIGTERM while the interpreter takes itself apart must not turn this into a death by signal.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _say_farewell(self) -> None:
        try:
            self.register_death()  # type: ignore[no-untyped-call]
            self.unsubscribe()  # type: ignore[no-untyped-call]
        except redis.RedisError as error:
            log.warning("farewell", error=type(error).__name__)

    # -- RQ's commands and pub/sub --

    def _pubsub_exception_handler(self, exc: Exception, pubsub: Any, pubsub_thread: Any) -> None:  # noqa: ARG002
        """RQ 3.0 lets the thread die of a time-out; commands must work again when Redis does."""
        if not isinstance(exc, redis.RedisError | OSError):
            raise exc
        self._ended.wait(_LOOK_S)

    def handle_payload(self, message: Any) -> None:
        """A command of RQ's; what is none must not end the thread that listens for them."""
        try:
            if json.loads(message["data"])["command"] == "shutdown":
                # RQ would send itself a Ctrl-C, and a second one means to leave at once. A command never means that.
                self._stop.make()
                return
            super().handle_payload(message)  # type: ignore[no-untyped-call]
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            log.warning("ignored", command="not understood", error=type(error).__name__)

    def kill_horse(self, *_: Any, **__: Any) -> None:
        """RQ's `stop-job` command kills the process that runs a job; here it would kill every job."""
        log.warning("ignored", command="stop-job", reason="a cancel that was sent cannot be stopped")


def _unique_name(settings: Settings) -> str:
    """RQ refuses the name of a killed worker for minutes, so none is used twice."""
    process = settings.process_name or f"{socket.gethostname()}.{os.getpid()}"
    return f"{process}.{uuid4().hex[:12]}"
