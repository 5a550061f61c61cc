"""Our worker as RQ sees it: registration, heartbeats, commands and signals around the engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any
from uuid import uuid4

import redis
from rq import Queue, worker_registration
from rq.serializers import JSONSerializer
from rq.worker import BaseWorker, WorkerStatus

from producer.keys import WorkerField
from producer.redis_url import passes, why
from producer.untrusted import MalformedMessage, clean_text, loads
from worker import log
from worker.daemon import WorkerLoop, in_daemon_thread, wait_for
from worker.engine import tell_damaged
from worker.redis_link import Channel, Outage, connect
from worker.secrecy import keep_memory_private
from worker.settings import Settings
from worker.store import ANSWER_WITHIN_S
from worker.watchdog import Watchdog
from worker.wiring import open_engine, open_exchange, open_redis, open_store

EX_INTERRUPTED = 130

#: How often Redis is asked for the gate and for suspension at the latest, s.
_LOOK_S = 1.0
#: How often the exchange's clock is measured and connections are kept warm, s: two calls each, eight a minute. Shorter
#: than any firewall in use forgets a flow that is still.
_WARM_S = 15.0
#: How often registries and RQ's lists are tidied, s; sooner while a round through a long queue is not over.
_TIDY_S = 10.0
#: What of the grace is kept for leaving RQ's registries, and of that for the interpreter's end, s.
_FAREWELL_S, _END_S = 3.0, 1.0
#: How long the last lines of the log may take, s.
_LAST_LINES_S = 0.3
#: A loop that has not moved for this many looks of the watchdog, each of so many s, will not move again.
_STUCK_LOOKS, _STUCK_LOOK_S = 10, 1.0


class CancelWorker(BaseWorker):
    """An RQ worker that keeps many cancels in flight in one process, on one queue."""

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
        own = connect(connection) if connection is not None else open_redis(self._settings)
        # Queues that RQ's command line hands in keep a serializer of their own, which may execute what it reads.
        given = queues if isinstance(queues, list | tuple) else [queues]
        names = [queue.name if isinstance(queue, Queue) else queue for queue in given]
        if len(names) != 1:
            raise ValueError(f"one queue for each worker, not {', '.join(names)}: start a process for each")
        # RQ would prepare by asking Redis, which may be away when a worker starts: see `_register`.
        options |= {"serializer": JSONSerializer, "prepare_for_work": False}
        super().__init__(names, name or _unique_name(self._settings), connection=own, **options)
        self.hostname, self.pid = socket.gethostname(), os.getpid()
        self._interrupts = 0
        self.exit_code = os.EX_OK
        self._stop = threading.Event()  # told from any thread, before there is a loop too
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watchdog = Watchdog(_STUCK_LOOK_S, _STUCK_LOOKS)

    @property
    def connection_timeout(self) -> int:
        """Our own; RQ would wait 415 s for an answer."""
        return int(ANSWER_WITHIN_S)

    def work(self, burst: bool = False, *_: Any, **__: Any) -> bool:
        """Work until told to stop, or with ``burst`` until nothing is left; gives whether any outcome was recorded.

        RQ's other options (scheduler, idle time, job count) mean nothing here: retries need no scheduler.
        """
        log.configure_unless_done(self._settings.log_level, self._settings.log_format)
        keep_memory_private()
        self._heed_signals()
        with asyncio.Runner(loop_factory=WorkerLoop) as runner:
            outcomes = runner.run(self._live(burst))
        if threading.current_thread() is threading.main_thread():
            # One more SIGTERM while the interpreter takes itself apart must not turn this into a death by signal.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return outcomes > 0

    # -- one life --

    async def _live(self, burst: bool) -> int:
        self._woken = asyncio.Event()
        self._exchange, self._server_clock = open_exchange(self._settings)
        self._store = open_store(self._settings, self.name, self.queues[0].name)
        self._channel = Channel(self.connection, self.pubsub_channel_name)
        parts = (self._settings, self._exchange, self._server_clock, self._store, self.connection, self.name)
        self._engine = open_engine(*parts, life_s=self.worker_ttl + 60)
        self._rest, self._gate = self._engine.rest, self._engine.canceller.gate
        self._loop = asyncio.get_running_loop()  # signals find all of the above from now on
        if self._stop.is_set():
            self._woken.set()
        self._watchdog.start()
        self._tick()
        try:
            if await self._be_born():
                await self._meet_exchange()
                self._tell_start()
                await self._work(burst)
            elif self.birth_date is not None:
                await self._part(_END_S)
        finally:
            await self._channel.close()
            self._exchange.close()
            self._watchdog.stop()
        return self._engine.outcomes

    def _tick(self) -> None:
        self._watchdog.tick()
        if self._loop is not None:
            self._loop.call_later(_STUCK_LOOK_S / 4, self._tick)

    async def _be_born(self) -> bool:
        """Register as RQ's workers do, as soon as Redis is there; False if told to stop before."""
        outage = Outage()
        while not self._stop.is_set():
            try:
                await self._unless_stopped(self._hear_and_register(), _END_S)
                await self._unless_stopped(self._engine.beat(None))
            except redis.RedisError as error:
                if not passes(error):
                    self._refused(error)
                    return False
                outage.note(error)
                await wait_for(self._woken, _LOOK_S)
                continue
            self._listens_since = self._rest.opened
            if not self._stop.is_set():
                outage.end()
            return not self._stop.is_set()
        return False

    def _refused(self, error: redis.RedisError) -> None:
        """What waiting does not change ends the worker: whoever starts it again reads the settings again."""
        # A login's own words may hold the password; what else is asked at the start holds no secret.
        said = clean_text(str(error), 200) if isinstance(error, redis.ResponseError) else None
        redis_url = self._settings.display_redis_url
        log.error("redis", state="refused", redis=redis_url, error=why(error), said=said)
        self.exit_code = os.EX_UNAVAILABLE

    async def _hear_and_register(self) -> None:
        with contextlib.suppress(redis.exceptions.NoPermissionError):  # it is missed by RQ's commands alone
            await self._channel.open()
        await in_daemon_thread(self._register, "register")

    def _register(self) -> None:
        """RQ's own registration; it waits for Redis, but work does not hang on it: `_be_known` tries again.

        Its connection is not kept: when it is needed again, Redis may be elsewhere.
        """
        try:
            # A user may lack the right, or have a name with which redis-py cannot read the answer.
            with contextlib.suppress(redis.ResponseError, ValueError):
                self.ip_address = str(self.connection.client_info()["addr"])
            if self.birth_date is None:
                self.register_birth()  # type: ignore[no-untyped-call]
                self.set_state(WorkerStatus.IDLE)
                self._is_registered = True
            else:  # it was done, perhaps unheard: RQ would take our own hash for another's
                self._register_anew()
        except redis.ResponseError as error:
            log.warning("unregistered", worker=self.name, error=why(error))
        finally:
            self.connection.connection_pool.disconnect()

    async def _meet_exchange(self) -> None:
        """Measure its clock and learn its limit, unless nothing may be sent now."""
        if not self._gate.closed(self._store.clock.now_ms()):
            await self._unless_stopped(self._exchange.sync_time())
            await self._unless_stopped(self._learn_weight_limit())
            await self._engine.canceller.heed_refusal()

    def _tell_start(self) -> None:
        clock = self._server_clock
        for warning in self._settings.warnings:
            log.warning("setting", problem=warning)
        log.info(
            "started",
            worker=self.name,
            pid=os.getpid(),
            queue=self.queue_names()[0],
            redis=self._settings.display_redis_url,
            exchange=self._settings.base_url,
            accounts=",".join(sorted(self._settings.credentials)),
            accounts_left_out=",".join(self._settings.accounts_left_out) or None,
            concurrency=self._settings.concurrency,
            clock_offset_ms=clock.offset_ms if clock.measured else None,
        )

    async def _work(self, burst: bool) -> None:
        engine = asyncio.create_task(self._engine.run())
        steps = (self._look, self._be_known, self._warm, self._tidy, self._listen)
        upkeep = [asyncio.create_task(self._for_ever(step)) for step in steps]
        try:
            await self._until_stop(engine, burst)
        finally:
            await self._leave(engine, upkeep)

    async def _until_stop(self, engine: asyncio.Task[None], burst: bool) -> None:
        while not self._stop.is_set():
            await wait_for(self._woken, 0.05 if burst else 0.5)
            if self._engine.refused is not None:
                log.error("redis", state="refused", error="the login was refused; restart with the new REDIS_URL")
                self.exit_code = os.EX_UNAVAILABLE
                return
            if engine.done():
                log.error("defect", where="engine", error="it has ended; the leases bring its jobs back")
                self.exit_code = os.EX_SOFTWARE
                return
            if burst and self._engine.is_idle() and await self._is_drained():
                return

    async def _is_drained(self) -> bool:
        try:
            return await self._rest.ask(self._store.is_drained)
        except redis.RedisError:
            return False

    async def _unless_stopped(self, work: Coroutine[Any, Any, object], grace_s: float = 0.0) -> None:
        """Wait for something, but no more than ``grace_s`` beyond a stop."""
        doing, stop = asyncio.create_task(work), asyncio.create_task(self._woken.wait())
        await asyncio.wait({doing, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if grace_s:
            await asyncio.wait({doing}, timeout=grace_s)
        if doing.done():
            doing.result()
        else:
            doing.cancel()

    # -- upkeep --

    async def _for_ever(self, step: Callable[[], Coroutine[Any, Any, float]]) -> None:
        """Repeat a step after as many seconds as it gives; what goes wrong with it must not end the upkeep."""
        while True:
            pause_s = _LOOK_S
            try:
                pause_s = await step()
            except redis.RedisError as error:
                log.debug("upkeep", error=type(error).__name__)
            except Exception as error:  # noqa: BLE001 - without renewals every job in flight would be lost
                log.defect(error)
            await asyncio.sleep(pause_s)

    async def _look(self) -> float:
        """Renew leases, tell RQ that we live, learn of the gate and of suspension."""
        self._is_unknown = await self._engine.beat(self._figures())
        return min(self._settings.lease_s / 4, _LOOK_S)

    async def _be_known(self) -> float:
        """Register again where RQ has forgotten us; apart from the renewals, which must not wait for it."""
        if self._is_unknown or not self._is_registered:
            await in_daemon_thread(self._register_anew, "register")
        return _LOOK_S

    def _register_anew(self) -> None:
        """Redis came back without its data, or is another server by now."""
        connection = connect(self.connection)
        try:
            with connection.pipeline() as pipeline:
                pipeline.hset(self.key, mapping={**self.serialize(), "state": self._state_now()})
                pipeline.expire(self.key, self.worker_ttl + 60)
                worker_registration.register(self, pipeline)
                pipeline.execute()
            self._is_registered = True
        finally:
            connection.connection_pool.disconnect()

    def _state_now(self) -> WorkerStatus:
        if self._engine.canceller.is_suspended:
            return WorkerStatus.SUSPENDED
        return WorkerStatus.BUSY if self._engine.in_hand else WorkerStatus.IDLE

    def _figures(self) -> dict[str, Any]:
        """What an operator wants to know of this process beside what RQ says of it."""
        figures: dict[str, Any] = {
            "state": self._state_now().value,
            # RQ's own counts.
            "successful_job_count": self._engine.finished,
            "failed_job_count": self._engine.failed,
            "total_working_time": f"{self._engine.working_s:.6f}",
            WorkerField.CONCURRENCY: self._settings.concurrency,
            WorkerField.IN_FLIGHT: self._engine.working_on,
            WorkerField.USED_WEIGHT: self._exchange.last_used_weight(),
            WorkerField.WEIGHT_LIMIT: self._gate.weight_limit,
        }
        if self._server_clock.measured:
            figures[WorkerField.CLOCK_OFFSET_MS] = self._server_clock.offset_ms
        return figures

    async def _warm(self) -> float:
        """Keep connections open and the clock true, so that the next cancel waits for neither."""
        pause_s = _WARM_S if self._server_clock.measured else _LOOK_S
        await asyncio.sleep(pause_s)
        with contextlib.suppress(redis.RedisError):  # a process that stood still may not have heard of a pause
            await self._engine.beat(None)
        if not self._gate.closed(self._store.clock.now_ms()):
            await self._exchange.keep_warm()
            await self._learn_weight_limit()
            await self._engine.canceller.heed_refusal()
        return 0.0

    async def _learn_weight_limit(self) -> None:
        if not self._knows_limit and (limit := await self._exchange.weight_limit()) is not None:
            self._gate.weight_limit = limit
            self._knows_limit = True

    async def _tidy(self) -> float:
        """What RQ's maintenance would do for this queue, without loading anything of a job's."""
        cursor, position = self._tidied
        cursor, position, damaged = await self._rest.ask(lambda: self._store.tidy(cursor, position))
        self._tidied = cursor, position
        tell_damaged(damaged)
        return _LOOK_S if cursor or position else _TIDY_S

    _is_registered = False  # with RQ, by what we have heard of it
    _is_unknown = False  # to RQ, as of the last look
    _knows_limit = False
    _listens_since = 0  # how often the other connections had been opened by then
    _tidied = (0, 0)

    # -- stopping --

    def _heed_signals(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, self.request_stop)

    def request_stop(self, signum: int | None, frame: Any) -> None:  # noqa: ARG002
        """SIGTERM may come any number of times, SIGINT twice is a person who does not want to wait."""
        if signum in (signal.SIGTERM, signal.SIGHUP):
            # Heard once and for all: further ones would interrupt this one, and each other, without an end. (Ignored
            # they would be told of on stderr where one is pending already.)
            signal.signal(signum, lambda *_: None)
        if signum == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                left = self._engine.in_hand if self._loop is not None else 0
                log.last_words("left_at_once", in_flight=left, reason="their leases bring them back")
                os._exit(EX_INTERRUPTED)
        self._stop.set()
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._woken.set)

    async def _leave(self, engine: asyncio.Task[None], upkeep: list[asyncio.Task[None]]) -> None:
        loop, grace_s = asyncio.get_running_loop(), self._settings.shutdown_grace_s
        began = loop.time()
        log.info("stopping", worker=self.name, in_flight=self._engine.in_hand, grace_s=grace_s)
        self._engine.stop()
        await asyncio.wait([engine], timeout=max(grace_s - _FAREWELL_S, 1))
        is_done = engine.done()
        for task in (*upkeep, engine):
            task.cancel()
        await asyncio.wait([engine], timeout=0.5)
        with contextlib.suppress(redis.RedisError, TimeoutError):  # the last counts
            async with asyncio.timeout(0.5):
                await self._engine.beat(self._figures())
                await self._rest.close()
        await self._part(max(began + grace_s - _END_S - loop.time(), 0.1))
        log.info(
            "stopped",
            worker=self.name,
            left=None if is_done else self._engine.in_hand,
            outcomes=self._engine.outcomes,
            seconds=loop.time() - began,
        )
        log.flush(_LAST_LINES_S)

    async def _part(self, within_s: float) -> None:
        """Leave RQ's registries: in a thread of its own, as while Redis is away it would take longer than there is."""
        with contextlib.suppress(TimeoutError, RuntimeError):  # no thread is to be had
            async with asyncio.timeout(within_s):
                await in_daemon_thread(self._say_farewell, "farewell")

    def _say_farewell(self) -> None:
        try:
            self.register_death()  # type: ignore[no-untyped-call]
        except redis.RedisError as error:
            log.warning("farewell", error=why(error))
        finally:
            self.connection.connection_pool.disconnect()

    # -- RQ's commands --

    async def _listen(self) -> float:
        """Obey RQ's commands; where others of our connections had to be opened anew, this one may lead nowhere."""
        if self._listens_since != self._rest.opened:
            self._listens_since = self._rest.opened
            await self._channel.close()
        try:
            message = await self._channel.hear()
        except redis.exceptions.NoPermissionError:  # nobody gives it that right from one moment to the next
            return _WARM_S
        if message is not None:
            self._obey(message)
        return 0.0

    def _obey(self, message: bytes) -> None:
        """Do what RQ's command says, as far as it means something here; anybody may have published it."""
        try:
            command = clean_text(str(loads(message)["command"]), 80)
        except (MalformedMessage, TypeError, LookupError) as error:
            log.warning("ignored", command="not understood", error=type(error).__name__)
            return
        if command == "shutdown":
            # RQ would send itself a Ctrl-C, and a second one means to leave at once. A command never means that.
            self.request_stop(None, None)
        else:
            log.warning("ignored", command=command, reason="a cancel that was sent cannot be stopped")


def _unique_name(settings: Settings) -> str:
    """RQ refuses the name of a killed worker for minutes, so none is used twice."""
    process = settings.process_name or f"{socket.gethostname()}.{os.getpid()}"
    return f"{process}.{uuid4().hex[:12]}"
