"""The orders of a sandbox run, and how their cancels are asked for: drawn from a seed, the same for the same seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum, auto

from producer.message import DEFAULT_ACCOUNT, CancelRequest, OnTrigger

SECOND_ACCOUNT = "second"
SYMBOLS = ("BTCUSDT", "ETHUSDT", "SOLUSDT", "BNBUSDT")


class By(Enum):
    """Which ids a request names."""

    ALGO_ID = auto()
    CLIENT_ID = auto()
    BOTH = auto()


class Twice(Enum):
    """Whether a second strategy asks for the same order."""

    NO = auto()
    AT_ONCE = auto()  # in the same call
    LATER = auto()  # at the end of all: the first request may have its outcome by then


@dataclass(frozen=True, slots=True)
class Wanted:
    """An order to open, and how its cancel is asked for."""

    account: str
    symbol: str
    client_algo_id: str
    by: By
    alone: bool  # by a call of its own
    urgent: bool
    twice: Twice
    on_trigger: OnTrigger
    order_type: str
    triggered: bool  # before its cancel is asked for, in a run with faults

    def request(self, algo_id: int) -> CancelRequest:
        """The request, once the exchange has named the order."""
        return CancelRequest(
            None if self.by is By.CLIENT_ID else algo_id,
            None if self.by is By.ALGO_ID else self.client_algo_id,
            self.account,
            urgent=self.urgent,
            symbol=self.symbol,
            tag="sandbox",
            on_trigger=self.on_trigger,
        )


def plan(orders: int, seed: int) -> list[Wanted]:
    """The orders of a run and the requests for them; they depend on the arguments alone."""
    draw = random.Random(seed)
    return [_wanted(draw, f"sb:{seed}/{number}") for number in range(orders)]


def _wanted(draw: random.Random, client_algo_id: str) -> Wanted:
    by = draw.choices(list(By), (60, 20, 20))[0]
    alone = draw.random() < 0.3
    twice = draw.choices(list(Twice), (90, 5, 5))[0]
    if twice is Twice.LATER and by is By.CLIENT_ID:
        # By then the id may belong to a newer order, and that one would be what is asked for.
        twice = Twice.AT_ONCE
    return Wanted(
        account=draw.choices((DEFAULT_ACCOUNT, SECOND_ACCOUNT), (70, 30))[0],
        symbol=draw.choice(SYMBOLS),
        client_algo_id=client_algo_id,
        by=by,
        alone=alone and twice is not Twice.AT_ONCE,
        urgent=draw.random() < 0.1,
        twice=twice,
        on_trigger=draw.choices(list(OnTrigger), (60, 40))[0],
        order_type=draw.choices(("STOP_MARKET", "STOP"), (70, 30))[0],
        triggered=draw.random() < 0.05,
    )
