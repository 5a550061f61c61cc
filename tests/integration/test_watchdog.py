"""A process whose event loop stands still ends with 70 and says where it stood; one that was only held up goes on."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import Child, NewChild, Pipe, python
from tests.servers import eventually

LOOK_S, LOOKS = 0.2, 5
#: A loop that is watched, ticks, and meets what `meet` does; SIGTERM ends it in order.
WATCHED = f"""
import asyncio, logging, os, signal, sys, threading, time
from worker import log
from worker.watchdog import Watchdog

watchdog = Watchdog({LOOK_S}, {LOOKS})

def meet_sleep():
    password = "the-secret-word"
    log.info("last")
    time.sleep(60)  # here

def meet_sleep_of_many():
    for _ in range(150):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    time.sleep(60)

def meet_endless_work():
    while True:
        pass

def meet_locked_log():
    logging.getLogger().handlers[0].acquire()
    time.sleep(60)

def meet_busy_moments():
    ends_at = time.monotonic() + {LOOK_S / 4}
    while time.monotonic() < ends_at:
        pass
    asyncio.get_running_loop().call_soon(meet_busy_moments)

def meet_long_moment():
    while not os.path.exists(sys.argv[2] + ".enough"):
        time.sleep(0.005)
    log.info("through")

def meet_stop():
    watchdog.stop()
    time.sleep({LOOK_S * LOOKS * 3})
    os._exit(3)

def meet_nothing():
    pass

async def main():
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    def tick():
        watchdog.tick()
        loop.call_later({LOOK_S / 4}, tick)
    if sys.argv[1] != "no_tick":
        tick()
    watchdog.start()
    open(sys.argv[2], "w").close()
    loop.call_later(0.1, globals()["meet_" + sys.argv[1]])
    await stop.wait()
    watchdog.stop()

meet_no_tick = meet_nothing
log.configure("INFO", "logfmt")
asyncio.run(main())
"""
_LIMIT_S = LOOK_S * LOOKS

Watched = Callable[..., Child]


@pytest.fixture
def watched(child: NewChild, tmp_path: Path) -> Watched:
    """Starts a watched process that meets something."""

    def start(what: str, stdout: int | None = None) -> Child:
        started = child(python(WATCHED, what, str(tmp_path / "started")), stdout)
        eventually((tmp_path / "started").exists, 20, "it starts")
        return started

    return start


def test_loop_that_stands_still(watched: Watched) -> None:
    """A loop that waits in a call ends its process with 70; file and line of that call are told, and no value."""
    began = time.monotonic()
    process = watched("sleep")

    process.ends_with(70)
    assert time.monotonic() - began > _LIMIT_S
    said = process.errors().splitlines()
    assert re.fullmatch(r'at=\S+Z level=error event=defect where=loop error="it stands still; .*" exit=70', said[0])
    number = WATCHED.splitlines().index("    time.sleep(60)  # here") + 1
    assert any(re.search(rf'event=stands thread=MainThread frames="<string>:{number} asyncio/', line) for line in said)
    assert "the-secret-word" not in "".join(said)
    assert "event=last" in process.output()


@pytest.mark.parametrize(("what", "code"), [("endless_work", 70), ("locked_log", 70), ("no_tick", 70), ("stop", 3)])
def test_other_ways_to_stand_still(watched: Watched, what: str, code: int) -> None:
    """Neither endless work nor a lock that is never released keeps the process from its end, nor that the loop never
    moved at all; after `stop` nobody minds whether it moves."""
    watched(what).ends_with(code)


def test_nobody_reads_what_is_said(child: NewChild, pipe: Pipe, tmp_path: Path) -> None:
    """Nor does it wait for a reader with what it says of each of its threads."""
    pipe.fill()
    words = python(WATCHED, "sleep_of_many", str(tmp_path / "started"))
    child(["sh", "-c", 'exec "$@" 2>&1', "sh", *words], pipe.writer).ends_with(70)


def pause(child: Child, seconds: float) -> None:
    """Stop the process for a while, as a debugger, a container's pause or a host's sleep does."""
    child.process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    child.process.send_signal(signal.SIGCONT)


def goes_on(child: Child) -> None:
    """See that it is left alone, and leaves in order."""
    time.sleep(1.5 * _LIMIT_S)
    assert (child.stop(), child.errors()) == (0, "")


def test_process_that_was_stopped(watched: Watched) -> None:
    """A process that was paused for longer than its loop may stand still goes on where it was."""
    process = watched("nothing")

    pause(process, 2 * _LIMIT_S)

    goes_on(process)


def test_pauses_do_not_add_up(watched: Watched, tmp_path: Path) -> None:
    """A loop that stands still for less than it may, in a process that is paused again and again meanwhile, goes on."""
    process = watched("long_moment")

    for _ in range(LOOKS + 1):
        time.sleep(0.6 * LOOK_S)
        pause(process, 3 * LOOK_S)
    (tmp_path / "started.enough").touch()

    eventually(lambda: "event=through" in process.output() or process.process.poll() is not None)
    goes_on(process)


def test_pause_does_not_save_a_loop_that_stands_still(watched: Watched) -> None:
    """After a pause a loop that does not move is found out as soon as any other."""
    process = watched("sleep")

    pause(process, 2 * _LIMIT_S)

    assert process.process.poll() is None
    process.ends_with(70)


@pytest.mark.parametrize("what", ["busy_moments", "nothing"])
def test_loop_that_moves(watched: Watched, what: str) -> None:
    """A loop that is busy all the time, or idle, and ticks is left alone."""
    process = watched(what)

    time.sleep(1.5 * _LIMIT_S)

    goes_on(process)
