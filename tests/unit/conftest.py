"""Fixtures of the tests without servers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis


@pytest.fixture
def unconnected() -> Iterator[redis.Redis]:
    """A client for RQ's classes that need one to be built; nothing makes it connect."""
    with redis.Redis(host="127.0.0.1", port=1) as client:
        yield client
