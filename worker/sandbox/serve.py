"""`python -m worker sandbox --serve`: Redis, exchange and workers for a strategy under development, until told to stop.

The parts are those of a run (:mod:`worker.sandbox.run`); nobody but the strategy asks for cancels.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from worker.sandbox.control import PREFIX, ControlError, PlacedOrder, RunningExchange, start_exchange
from worker.sandbox.orders import plan
from worker.sandbox.run import (
    Fleet,
    Interrupts,
    Options,
    RunKeys,
    exchange_config,
    start_workers,
    supervised,
    worker_settings,
)
from worker.sandbox.valkey import Valkey

#: Between two looks at signals and at the parts, s.
_LOOK_S = 0.05
#: How long "no such order" is asked again where the exchange tells the truth, s.
_HONEST_HORIZON_S = "2"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions(Options):
    """What the command line asks for; a port of 0 is any free one."""

    port: int = 0
    redis_port: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a strategy finds everything."""

    redis_url: str
    base_url: str
    orders: list[PlacedOrder]
    #: For a strategy's own library. Made for this run, known to its exchange and workers, worth nothing elsewhere.
    keys: RunKeys = field(repr=False)

    @property
    def _exports(self) -> dict[str, str]:
        return {
            "REDIS_URL": self.redis_url,
            "BINANCE_BASE_URL": self.base_url,
            **{name: self.keys.variables[name] for name in ("BINANCE_API_KEY", "BINANCE_API_SECRET")},
        }

    def as_dict(self) -> dict[str, object]:
        """For a program; names are those of the variables, in lower case."""
        return {
            **{name.lower(): value for name, value in self._exports.items()},
            "orders": [order._asdict() for order in self.orders],
            "control_url": self.base_url + PREFIX,
        }

    def as_text(self) -> str:
        """For a person, who pastes the exports into another terminal while this one serves; the rest is comments."""
        control = f"curl -s $BINANCE_BASE_URL{PREFIX}"
        order = '{"orders": [{"symbol": "BTCUSDT", "client_algo_id": ""}]}'
        move = f'{{"algo_id": {self.orders[0].algo_id}, "move": "trigger"}}'
        return "\n".join(
            (
                *(f"export {name}={value}" for name, value in self._exports.items()),
                "# the key is made for this sandbox and ends with it",
                f"# open orders: {' '.join(str(order.algo_id) for order in self.orders)}",
                f"# open another: {control}orders -d '{order}'",
                f"# trigger, cancel, expire or reject one behind the strategy's back: {control}move -d '{move}'",
                f"# what became of them: {control}book",
                "# all that can be moved and broken: worker/docs/sandbox.md, python -m worker sandbox --help",
                "# stop: Ctrl-C",
            )
        )


def serve(options: ServeOptions, server: str | None, environment: Mapping[str, str]) -> int:
    """Keep the parts up until a signal comes; gives the exit code: 0 on SIGTERM. Arguments as of ``run``."""

    def stay(binary: str, logs: Path, interrupts: Interrupts, parts: ExitStack) -> int:
        keys = RunKeys.make()
        data = Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="cancel-sandbox-")))
        valkey = parts.enter_context(Valkey(binary, data, options.redis_port))
        exchange = parts.enter_context(start_exchange(exchange_config(options, keys, port=options.port)))
        horizon = {"NOT_FOUND_HORIZON_S": _HONEST_HORIZON_S} if options.faults == "none" else {}
        fleet = Fleet(logs, {**environment, **worker_settings(options, keys, valkey, exchange), **horizon})
        parts.callback(fleet.kill)
        start_workers(fleet, options.workers, valkey, interrupts)
        parts.callback(fleet.stop)
        place = Place(valkey.url, exchange.url, _open_orders(options, exchange), keys)
        sys.stdout.write((json.dumps(place.as_dict()) if options.as_json else place.as_text()) + "\n")
        sys.stdout.flush()
        while True:
            interrupts.check()
            fleet.check()
            valkey.check()
            if exchange.process.poll() is not None:
                raise ControlError("the local exchange ended by itself")
            time.sleep(_LOOK_S)

    return supervised(options, server, stay, ends_well=signal.SIGTERM)


def _open_orders(options: ServeOptions, exchange: RunningExchange) -> list[PlacedOrder]:
    """As many orders as were asked for, of the account that requests name by default, on several symbols."""
    opened: list[PlacedOrder] = []
    groups: dict[str, list[str]] = {}
    for wanted in plan(options.orders, options.seed):
        groups.setdefault(wanted.symbol, []).append(wanted.client_algo_id)
    for symbol, names in groups.items():
        opened += exchange.add_orders(symbol=symbol, client_algo_ids=names)
    return opened
