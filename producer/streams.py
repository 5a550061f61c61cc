"""The standard streams of a process, whatever it was started with: closed ones, and such as take nothing."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path


def silence(fd: int) -> None:
    """Let go nowhere what is still written to a descriptor.

    The interpreter's last act is to write out what sys.stdout and sys.stderr hold: it would wait for a reader that has
    stopped, and end with 120 where the disk is full.
    """
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        if nowhere != fd:
            os.dup2(nowhere, fd)
            os.close(nowhere)


def open_closed_streams() -> None:
    """Where the process was started with a standard stream closed, put `/dev/null` in its place.

    Otherwise the first connection would get the number, and with it whatever anybody prints.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - for good
