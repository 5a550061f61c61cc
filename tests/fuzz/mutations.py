"""Inputs for the targets without a guide: what they read in everyday work, damaged."""

from __future__ import annotations

import sys
import time

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, seeds

#: What has broken readers elsewhere.
_PIECES = (
    *(b"NaN", b"1e999", b"-1", b"null", b"true", b"[", b"]", b"{}", b'"', b"\\ud800", b"\\u0000", b"\xff", b",", b"\0"),
    *(
        b"\r\n",
        b"\r\n\r\n",
        b"0\r\n",
        b"\r\n ",
        b"chunked",
        b"Content-Length: 3\r\n",
        b"Transfer-Encoding: chunked\r\n",
    ),
    *(b"9223372036854775808", b"1e30", b"0.5", b'"7"', b"[" * 1000, b'{"a":' * 1000),
)


def damaged(name: str) -> st.SearchStrategy[bytes]:
    """Seeds with pieces put in, taken out and swapped, and bytes that are nobody's."""
    cuts = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 7), _piece()), max_size=6)
    return st.binary(max_size=200) | st.builds(_put, st.sampled_from(seeds(name)), cuts)


def _piece() -> st.SearchStrategy[bytes]:
    return st.binary(max_size=12) | st.sampled_from(_PIECES)


def _put(data: bytes, cuts: list[tuple[int, int, bytes]]) -> bytes:
    for place, length, instead in cuts:
        at = place % (len(data) + 1)
        data = data[:at] + instead + data[at + length :]
    return data


def search(name: str, seconds: float) -> None:
    """Call the target with damaged seeds for so long; whatever it raises is shrunk first and then raised."""
    ends_at, tried = time.monotonic() + seconds, 0
    while time.monotonic() < ends_at:

        @settings(
            max_examples=2000,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )
        @given(damaged(name))
        def attempt(data: bytes) -> None:
            nonlocal tried
            tried += 1
            TARGETS[name](data)

        attempt()
    sys.stdout.write(f"{name}: nothing found in {seconds:g} s, {tried} inputs\n")
