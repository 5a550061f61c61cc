"""Enqueue cancels of conditional orders and learn what became of each. See :class:`CancelClient`."""

from producer.aio import AsyncCancelClient, AsyncTicket
from producer.client import CancelClient, Ticket
from producer.message import Attempt, CancelRequest, InvalidRequest, Outcome, OutcomeKind
from producer.wire import CancelQueueError, NotDurable, QueueUnavailable, UnknownRequest, WaitTimeout

__all__ = [
    "AsyncCancelClient",
    "AsyncTicket",
    "Attempt",
    "CancelClient",
    "CancelQueueError",
    "CancelRequest",
    "InvalidRequest",
    "NotDurable",
    "Outcome",
    "OutcomeKind",
    "QueueUnavailable",
    "Ticket",
    "UnknownRequest",
    "WaitTimeout",
]
