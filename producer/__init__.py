"""Enqueue cancels of conditional orders and learn what became of each. See :class:`CancelClient`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from producer.aio import AsyncCancelClient, AsyncOpenTicket, AsyncTicket
    from producer.client import CancelClient, OpenTicket, Ticket
    from producer.message import Attempt, CancelRequest, OnTrigger, Outcome, OutcomeKind
    from producer.open_orders import OpenOrder, OpenOutcome
    from producer.protocol import (
        CancelQueueError,
        LedgerGap,
        NotDurable,
        QueueUnavailable,
        UnknownRequest,
        WaitTimeout,
    )
    from producer.untrusted import InvalidRequest, MalformedMessage
    from producer.waiting import Waited

    __version__: str

__all__ = [
    "AsyncCancelClient",
    "AsyncOpenTicket",
    "AsyncTicket",
    "Attempt",
    "CancelClient",
    "CancelQueueError",
    "CancelRequest",
    "InvalidRequest",
    "LedgerGap",
    "MalformedMessage",
    "NotDurable",
    "OnTrigger",
    "OpenOrder",
    "OpenOutcome",
    "OpenTicket",
    "Outcome",
    "OutcomeKind",
    "QueueUnavailable",
    "Ticket",
    "UnknownRequest",
    "WaitTimeout",
    "Waited",
    "__version__",
]

#: Where these names are looked for, in this order: each module has loaded those before it, or needs none of them.
_HOMES = ("message", "untrusted", "protocol", "open_orders", "waiting", "client", "aio")


def __getattr__(name: str) -> object:
    """Public names are loaded when they are first used: a worker, which needs the contract alone, loads no client."""
    if name == "__version__":
        return _version()
    if name in _HOMES:
        return importlib.import_module(f"producer.{name}")
    for home in _HOMES if name in __all__ else ():
        if (value := getattr(importlib.import_module(f"producer.{home}"), name, None)) is not None:
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("algo-cancel-queue")
    except PackageNotFoundError:  # a copied folder
        return "unknown"


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
