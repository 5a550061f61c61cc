"""Processes whose stdout is out of order: they go on, end in time with their own exit code, and tell what is lost."""

from __future__ import annotations

import os
import re
import resource
import sys
import threading
import time
from pathlib import Path

import pytest

from producer import CancelClient, OutcomeKind
from tests.processes import Child, NewChild, Pipe, logging_program, python, redirected
from tests.servers import Workers, eventually
from worker.output import MAX_LINES
from worker.sandbox.control import RunningExchange

#: A loop that logs a hundred numbered lines a turn, as many as it is told, and writes how many to a file.
TICKING = """
import asyncio, os, signal, sys
from worker import log

async def main():
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    n = 0
    while not stop.is_set():
        if n < int(sys.argv[2]):
            for n in range(n + 1, n + 101):
                log.info("tick", n=n, word="\\u00fc\\u4e2d\\U0001f642", end="here")
        with open(sys.argv[1] + ".new", "w") as file:
            file.write(str(n))
        os.replace(sys.argv[1] + ".new", sys.argv[1])
        await asyncio.sleep(0.002)

log.configure("INFO", "logfmt")
if "print" in sys.argv:
    sys.stdout.write("not flushed by anybody")
asyncio.run(main())
"""
#: Where a disk ends, in the middle of a line.
FULL_BYTES = 100 * 1024
_TICK = re.compile(r'at=[-\dT:.]+Z level=info event=tick n=(\d+) word="ü中🙂" end=here')
_DROPPED = re.compile(r"at=[-\dT:.]+Z level=warning event=log_dropped count=(\d+)")


def ticking(progress: Progress, *arguments: str, lines: int = 1_000_000_000) -> list[str]:
    """The command that runs it."""
    return python(TICKING, str(progress.path), str(lines), *arguments)


class Progress:
    """How far a ticking child is."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "progress"

    def __call__(self) -> int:
        """Lines that it has logged so far."""
        return int(self.path.read_text()) if self.path.exists() else 0

    def wait_for(self, more: int, child: Child) -> None:
        """Wait until it has logged so many more."""
        goal = self() + more
        eventually(lambda: self() >= goal or child.process.poll() is not None, 30, "it goes on")
        assert self() >= goal, child.errors()


@pytest.fixture
def progress(tmp_path: Path) -> Progress:
    """Where a ticking child tells how far it is."""
    return Progress(tmp_path)


def accounted(text: str) -> tuple[int, list[tuple[int, int]]]:
    """Number of the last line that is told of, and each gap: the number before it, and how many lines it tells of.

    Fails if a line is not a whole one or a gap is told of otherwise than it is.
    """
    n, gaps = 0, []
    for line in text.splitlines():
        if dropped := _DROPPED.fullmatch(line):
            gaps.append((n, int(dropped[1])))
            n += int(dropped[1])
        else:
            tick = _TICK.fullmatch(line)
            assert tick, line
            n += 1
            assert int(tick[1]) == n
    return n, gaps


# ---- out of order ----------------------------------------------------------------------------------------------------


def test_stdout_that_nobody_reads(child: NewChild, pipe: Pipe, progress: Progress) -> None:
    """A process whose stdout nobody reads keeps ticking, holds a bounded part of its lines, and ends on SIGTERM."""
    pipe.fill()
    started = child(ticking(progress), pipe.writer)
    progress.wait_for(2 * MAX_LINES, started)
    before_kb = resident_kb(started)
    progress.wait_for(4 * MAX_LINES, started)
    assert resident_kb(started) < before_kb + 1024
    assert started.stop() == 0
    assert started.errors() == ""


def resident_kb(child: Child) -> int:
    """Its memory."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{child.process.pid}/status").read_text())
    assert found
    return int(found[1])


@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "nonblocking"])
def test_reader_that_comes_back(child: NewChild, pipe: Pipe, progress: Progress, blocking: bool) -> None:
    """Who reads on after a pause gets all lines in their order, and where some are missing how many."""
    pipe.fill()
    os.set_blocking(pipe.writer, blocking)
    started = child(ticking(progress), pipe.writer)
    progress.wait_for(3 * MAX_LINES, started)

    read: list[str] = [pipe.read_slowly(3)]
    reader = threading.Thread(target=lambda: read.append(pipe.read_all()))
    reader.start()
    progress.wait_for(10 * MAX_LINES, started)
    assert started.stop() == 0
    reader.join(10)

    n, gaps = accounted("".join(read).lstrip(".\n"))
    assert n == progress()
    assert gaps[0][0] >= MAX_LINES  # what there was room for is kept
    lost = sum(count for _, count in gaps)
    assert len(gaps) <= 2 + (n - lost) / (MAX_LINES / 2)  # long gaps, not one after every few lines
    assert started.errors() == ""


@pytest.mark.parametrize(
    ("how", "printing"), [("closed", False), ("full", True), ("left", False), ("left", True), ("read-only", False)]
)
def test_stdout_that_takes_nothing(child: NewChild, pipe: Pipe, progress: Progress, how: str, printing: bool) -> None:
    """Neither the log nor what is left in sys.stdout holds up the end, changes the exit code, or shows on stderr."""
    command = ticking(progress, *(["print"] if printing else []))
    if how == "left":
        pipe.close_reader()
    way = {"closed": ">&-", "full": ">/dev/full", "read-only": "1</dev/null"}.get(how, "")
    started = child(redirected(way, command), pipe.writer)
    progress.wait_for(3 * MAX_LINES, started)
    assert started.stop() == 0
    assert started.errors() == ""


@pytest.mark.parametrize("lines", [3000, 1_000_000_000], ids=["quiet", "busy"])
def test_disk_that_is_full_for_a_while(child: NewChild, progress: Progress, tmp_path: Path, lines: int) -> None:
    """Once there is room again the log goes on with a line of its own, and tells how many lines were lost."""
    target = tmp_path / "log"
    with target.open("wb") as file:
        limited = ["bash", "-c", f'ulimit -S -f {FULL_BYTES // 1024}; exec "$@"', "bash"]
        started = child([*limited, *ticking(progress, lines=lines)], file.fileno())
    progress.wait_for(3000, started)
    time.sleep(1.5)  # what was logged is lost by now: the pauses between two tries grow up to 1 s
    assert target.stat().st_size == FULL_BYTES

    resource.prlimit(started.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    eventually(lambda: b"log_dropped" in target.read_bytes(), 10, "it is told")

    assert started.stop() == 0
    written = target.read_bytes()
    torn = written[:FULL_BYTES].rpartition(b"\n")[2]
    assert torn
    n, gaps = accounted(written.replace(torn + b"\n", b"", 1).decode())
    assert n == progress()
    assert 0 < gaps[0][0] < 3000
    assert started.errors() == ""


#: A connection that has stdout's number, and must be sent nothing.
HEARS_NOTHING = """
import socket, sys
ours, theirs = socket.socketpair()
assert ours.fileno() == 1, ours
def listen():
    log.flush(1)
    theirs.settimeout(0.5)
    try:
        sys.exit(f"got {theirs.recv(100)}")
    except TimeoutError:
        sys.exit(0)
"""


def test_closed_stdout_is_not_the_next_connection(child: NewChild) -> None:
    """A connection that was given stdout's number, as stdout was closed, gets no line of the log."""
    text = f"""
from worker import log
{HEARS_NOTHING}
log.configure("INFO", "logfmt")
log.error("defect", where="here")
listen()
"""
    child(redirected(">&-", python(text))).ends_with(0)


def test_stdout_that_is_closed_later(child: NewChild, pipe: Pipe) -> None:
    """Nor does one that is given its number later, once the log has found it closed."""
    text = f"""
log.info("before")
log.flush(5)
os.close(1)
log.info("at the closed one")
log.flush(5)
{HEARS_NOTHING}
log.info("after")
listen()
"""
    child(logging_program(text), pipe.writer).ends_with(0)

    assert [line.split("event=")[1] for line in pipe.read_all().splitlines()] == ["before"]


@pytest.mark.parametrize(
    "environment",
    [{"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "cp437"}],
    ids=["ascii", "C", "cp437"],
)
def test_any_letter_in_any_locale(child: NewChild, pipe: Pipe, environment: dict[str, str]) -> None:
    """No line is lost to a locale or an encoding that lacks its letters."""
    text = """
log.info("tick", n=1, word="\\u00fc\\u4e2d\\U0001f642", end="here")
"""
    started = child(logging_program(text), pipe.writer, **environment)

    assert accounted(pipe.read_all()) == (1, [])
    started.ends_with(0)
    assert started.errors() == ""


@pytest.mark.parametrize("how", ["full", "left"])
def test_stdout_that_takes_nothing_costs_no_work(child: NewChild, pipe: Pipe, how: str) -> None:
    """A process that has logged and now waits does not use up its processor in trying."""
    pipe.close_reader()
    text = """
for _ in range(100):
    log.info("tick")
time.sleep(0.2)
before_s = time.process_time()
time.sleep(2)
sys.exit(time.process_time() - before_s > 0.5)
"""
    way = {"full": ">/dev/full", "left": ""}[how]
    child(redirected(way, logging_program(text)), pipe.writer).ends_with(0)


# ---- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("end", "code"), [("sys.exit(7)", 7), ("pass", 0), ("1 / 0", 1)])
def test_end_of_a_process_loses_no_line(child: NewChild, pipe: Pipe, end: str, code: int) -> None:
    """A process that ends by itself has written all that it logged, down to its last line."""
    text = f"""
for n in range(1, 5001):
    log.info("tick", n=n, word="\\u00fc\\u4e2d\\U0001f642", end="here")
{end}
"""
    started = child(logging_program(text), pipe.writer)

    assert accounted(pipe.read_all()) == (5000, [])
    started.ends_with(code)


def test_flush_waits_no_longer_than_it_may(child: NewChild, pipe: Pipe) -> None:
    """`flush` says that not everything is written, after the time it was given, and the end waits no second time."""
    pipe.fill()
    text = """
log.info("tick")
began = time.monotonic()
assert not log.flush(1.5)
assert 1.4 < time.monotonic() - began < 10
os._exit(9)
"""
    child(logging_program(text), pipe.writer).ends_with(9)


def test_signal_in_the_middle_of_a_line(child: NewChild, pipe: Pipe) -> None:
    """A handler of a signal may log at any moment, in the middle of a line of the same thread too."""
    text = """
import signal
told = 0
def tell(*_):
    global told
    told += 1
    log.info("told", told=told)
signal.signal(signal.SIGALRM, tell)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
ends_at = time.monotonic() + 1
said = 0
while time.monotonic() < ends_at:
    said += 1
    log.info("said", said=said)
    if said % 1000 == 0:
        log.flush(10)
signal.setitimer(signal.ITIMER_REAL, 0)
log.info("sums", said=said, told=told)
"""
    started = child(logging_program(text), pipe.writer)

    lines = [line.split("event=")[1] for line in pipe.read_all().splitlines()]
    started.ends_with(0)
    said, told = (sum(line.startswith(name) for line in lines) for name in ("said", "told"))
    assert lines[-1] == f"sums said={said} told={told}"
    assert told > 50


# ---- fork ------------------------------------------------------------------------------------------------------------


FORKING = """
import os, sys, threading, time
from worker import log
log.configure("INFO", "logfmt")
ended = threading.Event()
def keep_logging(name):
    n = 0
    while not ended.is_set():
        n += 1
        log.info("parent", thread=name, n=n)
        if n % 200 == 0:
            log.flush(10)
    log.info("parent", thread=name, n=n + 1, last=True)
threads = [threading.Thread(target=keep_logging, args=(name,)) for name in ("a", "b")]
for thread in threads:
    thread.start()
for horse in range(30):
    pid = os.fork()
    if pid == 0:
        log.info("horse", horse=horse, n=1)
        log.info("horse", horse=horse, n=2)
        os._exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
ended.set()
for thread in threads:
    thread.join()
"""


def test_forked_processes_log(child: NewChild, pipe: Pipe) -> None:
    """Each line of a horse that ends by `os._exit` is there, in order and once, and its parent's lines are too."""
    started = child(python(FORKING), pipe.writer)
    lines = [line.split("event=")[1] for line in pipe.read_all().splitlines()]
    started.ends_with(0)
    horses = [line for line in lines if line.startswith("horse")]
    assert horses == [f"horse horse={horse} n={n}" for horse in range(30) for n in (1, 2)]
    for name in "ab":
        parent = [line for line in lines if line.startswith(f"parent thread={name}")]
        assert [int(line.split("n=")[1].split()[0]) for line in parent] == list(range(1, len(parent) + 1))
        assert parent[-1].endswith("last=true")


def test_forked_process_that_nobody_reads(child: NewChild, pipe: Pipe) -> None:
    """A horse whose stdout nobody reads is through with a thousand lines in time, and ends with its own code."""
    pipe.fill()
    text = """
log.info("parent")
if (pid := os.fork()) == 0:
    for n in range(1000):
        log.info("horse", n=n)
    os._exit(5)
os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    child(logging_program(text), pipe.writer).ends_with(5)


def test_each_line_is_waited_for_where_asked(child: NewChild, pipe: Pipe) -> None:
    """A process that says so when it sets up its log has each line written before it goes on."""
    text = """
import os
from worker import log
log.configure_unless_done("INFO", "logfmt", wait_for_each=True)
log.info("first")
log.info("last")
os._exit(5)
"""
    started = child(python(text), pipe.writer)

    assert [line.split("event=")[1] for line in pipe.read_all().splitlines()] == ["first", "last"]
    started.ends_with(5)


# ---- the commands ----------------------------------------------------------------------------------------------------


def test_worker_without_streams(
    workers: Workers, client: CancelClient, exchange: RunningExchange, child: NewChild
) -> None:
    """A worker that was started with all streams closed cancels, and gives none of their numbers to a connection."""
    started = child(redirected("<&- >&- 2>&-", [sys.executable, "-m", "worker"]), **workers.environment)

    (order,) = exchange.add_orders(1)
    assert client.cancel(algo_id=order.algo_id).wait(30).kind is OutcomeKind.CANCELLED
    assert [str(Path(f"/proc/{started.process.pid}/fd/{fd}").readlink()) for fd in range(3)] == ["/dev/null"] * 3

    assert started.stop() == 0


def test_children_of_a_process_without_streams(child: NewChild) -> None:
    """A process that such a worker starts finds its standard streams open as well."""
    text = """
import subprocess, sys
from producer.streams import open_closed_streams
open_closed_streams()
sys.stdout.write("to nobody")
sys.exit(subprocess.run([sys.executable, "-c", "import os; [os.fstat(fd) for fd in range(3)]"]).returncode)
"""
    child(redirected("<&- >&- 2>&-", python(text))).ends_with(0)


@pytest.mark.parametrize(
    ("arguments", "code", "streams"),
    [
        *((("check",), 69, streams) for streams in (">&-", "2>&-", ">&- 2>&-", ">/dev/full", "2>/dev/full")),
        ((), 78, ">/dev/full 2>/dev/full"),
        (("check",), 78, ">&- 2>&-"),
    ],
)
def test_exit_codes_of_commands(streams: str, arguments: tuple[str, ...], code: int, child: NewChild) -> None:
    """What cannot be printed changes no exit code: bad settings stay 78, and what cannot be reached 69."""
    settings = {"BINANCE_API_KEY": "key", "BINANCE_API_SECRET": "secret"}
    settings |= {"REDIS_URL": "redis://127.0.0.1:1/0", "BINANCE_BASE_URL": "http://127.0.0.1:1"}
    if code == 78:
        settings["LEASE_S"] = "soon"
    started = child(redirected(streams, [sys.executable, "-m", "worker", *arguments]), **settings)

    started.ends_with(code)
    assert "Traceback" not in started.errors()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_check_in_any_encoding(
    encoding: str, workers: Workers, exchange: RunningExchange, child: NewChild, pipe: Pipe
) -> None:
    """`check` shows a letter that the terminal's encoding lacks in another way, and ends as it would have."""
    command = [sys.executable, "-m", "worker", "check"]
    child(command, pipe.writer, **workers.environment, PYTHONIOENCODING=encoding).ends_with(0)
    assert "accepted" in pipe.read_all()
