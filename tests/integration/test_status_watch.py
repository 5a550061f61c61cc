"""``status --watch`` on a real terminal: its alternate screen, its size, an outage, and every way out."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator

import pytest
import redis

from producer import CancelClient
from producer.keys import Keys
from tests.servers import ROOT, Valkey, eventually, running_valkey, scrubbed

KEYS = Keys()
ENTER, LEAVE = b"\x1b[?1049h", b"\x1b[?1049l"
HIDE_CURSOR, SHOW_CURSOR = b"\x1b[?25l", b"\x1b[?25h"
HOME = b"\x1b[H"
WITHOUT_RICH = (
    "import sys; sys.modules['rich'] = None; from producer.__main__ import main; sys.exit(main(sys.argv[1:]))"
)


class Terminal:
    """A pseudo-terminal with a process that is its foreground."""

    def __init__(self, url: str, command: tuple[str, ...], width: int, height: int, term: str) -> None:
        self._leader, self._follower = pty.openpty()
        self.resize(width, height)
        self.modes = termios.tcgetattr(self._follower)
        environment = scrubbed() | {"REDIS_URL": url, "TERM": term}
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=self._follower,
            stdout=self._follower,
            stderr=self._follower,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self.output = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._leader, 65536)
            except OSError as error:
                if error.errno in (errno.EIO, errno.EBADF):
                    return
                raise
            if not data:
                return
            self.output += data

    def close(self) -> None:
        """End it, and give the terminal back."""
        self.process.kill()
        self.process.wait(10)
        os.close(self._follower)
        self._reader.join(10)  # its read ends with the last open follower
        os.close(self._leader)

    def resize(self, width: int, height: int) -> None:
        """Give it another size, as a window manager does."""
        fcntl.ioctl(self._leader, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def type(self, keys: bytes) -> None:
        """Keys pressed by a person."""
        os.write(self._leader, keys)

    def frame(self) -> list[str]:
        """The lines of the newest whole picture, without colours."""
        pictures = self.output.split(HOME)
        if len(pictures) < 3:
            return []
        text = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", pictures[-2]).decode()
        return text.replace("\r", "").split("\n")

    def shows(self, words: str, timeout_s: float = 10) -> None:
        """Wait until a line of the picture has these words."""
        eventually(lambda: any(words in line for line in self.frame()), timeout_s, words)

    def ended(self) -> int:
        """Wait for the end of the process; gives its exit code."""
        code = self.process.wait(10)
        eventually(lambda: self.output.endswith(SHOW_CURSOR) or LEAVE in self.output, 5, "the last output")
        return code


@contextlib.contextmanager
def watching(
    url: str, *, width: int = 80, height: int = 24, term: str = "xterm-256color", rich: bool = True
) -> Iterator[Terminal]:
    """The command on a terminal of this size."""
    start = ("-m", "producer") if rich else ("-c", WITHOUT_RICH)
    command = (sys.executable, "-W", "error", *start, "status", "--watch")
    with contextlib.closing(Terminal(url, command, width, height, term)) as terminal:
        yield terminal


def given_back(terminal: Terminal) -> bool:
    """Whether the screen was taken once and given back after all else, with cursor and modes as they were."""
    output = terminal.output
    tail = output[output.rindex(LEAVE) :]
    assert (output.count(ENTER), output.count(LEAVE)) == (1, 1)
    assert output.index(ENTER) < output.index(HOME)
    assert HIDE_CURSOR in output
    assert output.rindex(SHOW_CURSOR) > output.rindex(HIDE_CURSOR)
    assert b"Traceback" not in output
    assert HOME not in tail
    return termios.tcgetattr(terminal._follower) == terminal.modes


def test_ctrl_c_gives_the_terminal_back(valkey: Valkey) -> None:
    """The view lives on the alternate screen, which Ctrl-C leaves with 130; what was typed is not echoed."""
    with watching(valkey.url) as terminal:
        terminal.shows("Ctrl-C leaves")
        assert not termios.tcgetattr(terminal._follower)[3] & termios.ECHO
        terminal.type(b"quit?")
        seen = terminal.output.count(HOME)
        eventually(lambda: terminal.output.count(HOME) > seen + 1, 10, "further pictures")
        terminal.type(b"\x03")
        assert terminal.ended() == 130
        assert given_back(terminal)
        assert b"quit?" not in terminal.output
        assert b"\x1b[2J" not in terminal.output  # nothing is wiped before it is drawn


def test_sigterm_gives_the_terminal_back(valkey: Valkey) -> None:
    """Whoever ends the process from elsewhere leaves a usable terminal behind."""
    with watching(valkey.url) as terminal:
        terminal.shows("queue cancels")
        terminal.process.terminate()
        assert terminal.ended() == -signal.SIGTERM
        assert given_back(terminal)


def test_the_view_follows_the_size_of_the_terminal(valkey: Valkey, client: CancelClient) -> None:
    """At 80x24 each line has its place; after a resize the whole new size is used."""
    client.cancel(algo_id=1)
    with watching(valkey.url) as terminal:
        terminal.shows("1 queued")
        frame = terminal.frame()
        assert len(frame) == 24
        assert all(len(line) <= 80 for line in frame)
        assert [len(frame[0]), frame[2].rstrip()] == [80, "gate all       open"]
        terminal.resize(120, 40)
        eventually(lambda: (len(terminal.frame()), len(terminal.frame()[0])) == (40, 120), 5, "the new size")
        terminal.type(b"\x03")
        assert terminal.ended() == 130


def test_an_outage_keeps_the_last_view_and_tells_its_age() -> None:
    """While Redis is away the view stays, and says so with its age and cause; it goes on by itself."""
    with running_valkey() as server:
        with redis.Redis(port=server.port) as connection:
            connection.sadd(KEYS.suspects, "desk2")
            connection.hset(KEYS.breaker("desk2"), mapping={"failures": 2, "reason": "401 [red]no[/red]\x1b[2J"})
        with watching(server.url) as terminal:
            terminal.shows("key desk2      refused 2 times in a row, still tried: 401 [red]no[/red] [2J")
            server.stop(signal.SIGKILL)
            terminal.shows("NOT OF NOW, 2 s old: Redis did not answer (ConnectionError: Connection refused)")
            assert any("key desk2" in line for line in terminal.frame())
            server.start()
            eventually(lambda: not any("NOT OF NOW" in line for line in terminal.frame()), 10, "a view of now")
            assert not any("key desk2" in line for line in terminal.frame())
            terminal.type(b"\x03")
            assert terminal.ended() == 130
            assert given_back(terminal)


@pytest.mark.parametrize(("rich", "term"), [(False, "xterm"), (True, "dumb")])
def test_plain_lines_where_nothing_can_be_drawn(valkey: Valkey, rich: bool, term: str) -> None:
    """Without rich, or on a terminal that cannot, the lines of the status follow each other."""
    with watching(valkey.url, rich=rich, term=term) as terminal:
        eventually(lambda: terminal.output.count(b"queued") >= 2, 10, "two looks")
        terminal.type(b"\x03")
        assert terminal.process.wait(10) == 130
        assert ENTER not in terminal.output
        assert b"\x1b" not in terminal.output
