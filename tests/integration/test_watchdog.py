"""A process whose event loop stands still ends with 70 and says where it stood; one that was only held up goes on."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from tests.servers import ROOT, eventually, scrubbed
from worker.watchdog import Watchdog

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
    tick()
    watchdog.start()
    open(sys.argv[2], "w").close()
    loop.call_later(0.1, globals()["meet_" + sys.argv[1]])
    await stop.wait()
    watchdog.stop()

log.configure("INFO", "logfmt")
asyncio.run(main())
"""
_LIMIT_S = LOOK_S * LOOKS

Watched = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    """Starts a watched process that meets something, with its streams in files or where they are told to go."""
    made: list[subprocess.Popen[bytes]] = []

    def start(what: str, stream: int | None = None) -> subprocess.Popen[bytes]:
        with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
            streams: list[int | IO[bytes]] = [out, err] if stream is None else [stream, stream]
            process = subprocess.Popen(
                [sys.executable, "-c", WATCHED, what, str(tmp_path / "started")],
                cwd=ROOT,
                env=scrubbed(),
                stdout=streams[0],
                stderr=streams[1],
                start_new_session=True,
            )
        made.append(process)
        eventually((tmp_path / "started").exists, 20, "it starts")
        return process

    yield start
    for process in made:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_loop_that_stands_still(watched: Watched, tmp_path: Path) -> None:
    """A loop that waits in a call ends its process with 70; file and line of that call are told, and no value."""
    began = time.monotonic()
    process = watched("sleep")

    assert process.wait(20) == 70
    assert time.monotonic() - began > _LIMIT_S
    said = (tmp_path / "err").read_text("utf-8").splitlines()
    assert re.fullmatch(r'at=\S+Z level=error event=defect where=loop error="it stands still; .*" exit=70', said[0])
    number = WATCHED.splitlines().index("    time.sleep(60)  # here") + 1
    assert any(re.search(rf'event=stands thread=MainThread frames="<string>:{number} asyncio/', line) for line in said)
    assert "the-secret-word" not in "".join(said)
    assert "event=last" in (tmp_path / "out").read_text("utf-8")


@pytest.mark.parametrize("what", ["endless_work", "locked_log"])
def test_other_ways_to_stand_still(watched: Watched, what: str) -> None:
    """Neither endless work nor a lock that is never released keeps the process from its end."""
    assert watched(what).wait(20) == 70


def test_nobody_reads_what_is_said(watched: Watched) -> None:
    """Nor does it wait for a reader with what it says of each of its threads."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"." * 4096)
    os.set_blocking(writer, True)
    try:
        assert watched("sleep_of_many", writer).wait(20) == 70
    finally:
        os.close(reader)
        os.close(writer)


def pause(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Stop the process for a while, as a debugger, a container's pause or a host's sleep does."""
    process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    process.send_signal(signal.SIGCONT)


def test_process_that_was_stopped(watched: Watched, tmp_path: Path) -> None:
    """A process that was paused for longer than its loop may stand still goes on where it was."""
    process = watched("nothing")

    pause(process, 2 * _LIMIT_S)

    time.sleep(1.5 * _LIMIT_S)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0, (tmp_path / "err").read_text("utf-8")


def test_pauses_do_not_add_up(watched: Watched, tmp_path: Path) -> None:
    """A loop that stands still for less than it may, in a process that is paused again and again meanwhile, goes on."""
    process = watched("long_moment")

    for _ in range(LOOKS + 1):
        time.sleep(0.6 * LOOK_S)
        pause(process, 3 * LOOK_S)
    (tmp_path / "started.enough").touch()

    eventually(lambda: "event=through" in (tmp_path / "out").read_text("utf-8") or process.poll() is not None)
    time.sleep(_LIMIT_S)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0, (tmp_path / "err").read_text("utf-8")


def test_pause_does_not_save_a_loop_that_stands_still(watched: Watched) -> None:
    """After a pause a loop that does not move is found out as soon as any other."""
    process = watched("sleep")

    pause(process, 2 * _LIMIT_S)

    assert process.poll() is None
    assert process.wait(20) == 70


@pytest.mark.parametrize("what", ["busy_moments", "nothing"])
def test_loop_that_moves(watched: Watched, tmp_path: Path, what: str) -> None:
    """A loop that is busy all the time, or idle, and ticks is left alone."""
    process = watched(what)

    time.sleep(3 * _LIMIT_S)

    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0, (tmp_path / "err").read_text("utf-8")
    assert (tmp_path / "err").read_text("utf-8") == ""


def test_loop_that_is_watched_no_more(watched: Watched) -> None:
    """After `stop` nobody minds whether the loop moves."""
    assert watched("stop").wait(20) == 3


def test_loop_that_never_moves() -> None:
    """A loop that does not even begin to tick is found out once, by whoever asked to be told."""
    calls: list[str] = []
    told = threading.Event()

    def on_stuck() -> None:
        calls.append(threading.current_thread().name)
        told.set()

    watchdog = Watchdog(0.01, 3, on_stuck)
    watchdog.start()

    assert told.wait(10)
    time.sleep(0.2)
    assert calls == ["watchdog"]
