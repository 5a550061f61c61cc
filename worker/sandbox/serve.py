"""`python -m worker sandbox --serve`: Redis, exchange and workers for a strategy under development, until told to stop.

Nobody but the strategy asks for cancels.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Mapping

from worker.sandbox.control import PREFIX, ControlError, PlacedOrder
from worker.sandbox.orders import plan
from worker.sandbox.stage import Options, Stage, supervised

#: Between two looks at signals and at the parts, s.
_LOOK_S = 0.05
#: How long "no such order" is asked again where the exchange tells the truth, s.
_HONEST_HORIZON_S = "2"


def serve(options: Options, server: str | None, environment: Mapping[str, str]) -> int:
    """Keep the parts up until a signal comes; gives the exit code: 0 on SIGTERM. Arguments as of :func:`supervised`."""

    def stay(stage: Stage) -> int:
        stage.open({"NOT_FOUND_HORIZON_S": _HONEST_HORIZON_S} if options.faults == "none" else {})
        stage.parts.callback(stage.fleet.stop)
        sys.stdout.write(_place(stage, _open_orders(stage)) + "\n")
        sys.stdout.flush()
        while True:
            stage.interrupts.check()
            stage.fleet.check()
            stage.valkey.check()
            if stage.exchange.process.poll() is not None:
                raise ControlError("the local exchange ended by itself")
            time.sleep(_LOOK_S)

    return supervised(options, server, environment, stay, ends_well=signal.SIGTERM)


def _place(stage: Stage, orders: list[PlacedOrder]) -> str:
    """Where a strategy finds everything: one JSON object, whose names are those of the variables in lower case, or what
    a person pastes into another terminal while this one serves.

    The key is for a strategy's own library: made for this run, known to its exchange and workers, worth nothing
    elsewhere.
    """
    exports = {"REDIS_URL": stage.valkey.url, "BINANCE_BASE_URL": stage.exchange.url}
    exports |= {name: stage.variables[name] for name in ("BINANCE_API_KEY", "BINANCE_API_SECRET")}
    if stage.options.as_json:
        named = {"orders": [order._asdict() for order in orders], "control_url": stage.exchange.url + PREFIX}
        return json.dumps({name.lower(): value for name, value in exports.items()} | named)
    control = f"curl -s $BINANCE_BASE_URL{PREFIX}"
    order = '{"orders": [{"symbol": "BTCUSDT", "client_algo_id": ""}]}'
    move = f'{{"algo_id": {orders[0].algo_id}, "move": "trigger"}}'
    return "\n".join(
        (
            *(f"export {name}={value}" for name, value in exports.items()),
            "# the key is made for this sandbox and ends with it",
            f"# open orders: {' '.join(str(each.algo_id) for each in orders)}",
            f"# open another: {control}orders -d '{order}'",
            f"# trigger, cancel, expire or reject one behind the strategy's back: {control}move -d '{move}'",
            f"# what became of them: {control}book",
            "# all that can be moved and broken: worker/docs/sandbox.md, python -m worker sandbox --help",
            "# stop: Ctrl-C",
        )
    )


def _open_orders(stage: Stage) -> list[PlacedOrder]:
    """As many orders as were asked for, of the account that requests name by default, on several symbols."""
    opened: list[PlacedOrder] = []
    groups: dict[str, list[str]] = {}
    for wanted in plan(stage.options.orders, stage.options.seed):
        groups.setdefault(wanted.symbol, []).append(wanted.client_algo_id)
    for symbol, names in groups.items():
        opened += stage.exchange.add_orders(symbol=symbol, client_algo_ids=names)
    return opened
