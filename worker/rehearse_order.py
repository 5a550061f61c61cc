"""The order of a rehearsal: a reducing stop that cannot trigger, by the rules of its symbol. Pure.

Nothing that works on a queue may import this: an order is placed by `rehearse` alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal, localcontext
from typing import Any

from producer.message import Outcome, OutcomeKind
from producer.untrusted import shown
from worker.classify import Means

__all__ = ["REFUSALS", "Stop", "SymbolRules", "Unusable", "far_stop", "mark_price", "rules_of", "verdict"]

#: The trigger's part of the mark price: nothing falls so far within a minute, and the mark price, by which it is
#: triggered, does not follow a thin book's.
_FAR = Decimal("0.5")
#: Below this part of it the symbol's rules would force a price on us that is not far any more.
_NEAREST = Decimal("0.8")
_DECIMAL = re.compile(r"[0-9]{1,20}(\.[0-9]{1,20})?")

_REPEAT = "repeat the rehearsal"
_FILTER = "the symbol's rules may have changed meanwhile: repeat, or choose another --symbol"
#: What a refusal of the order means, and the way out, by its code (the exchange's list of errors).
REFUSALS: Mapping[int, str] = {
    -1013: f"price or quantity break a rule of the symbol; {_FILTER}",
    -1106: f"a parameter does not fit the account's position mode, which has changed since it was read; {_REPEAT}",
    -1111: f"price or quantity have too many digits; {_FILTER}",
    -1121: "the exchange does not trade this symbol: choose another --symbol",
    -2018: "the balance is not sufficient: fund the account (the demo site gives play money)",
    -2019: "the margin is not sufficient: fund the account (the demo site gives play money)",
    -2021: f"it would trigger at once: the market is below its trigger price, however far that is; {_REPEAT}",
    -2022: (
        "a reducing order is refused: the exchange wants a position that it can reduce; open the smallest long "
        "position on the symbol (on the demo site), or choose a --symbol that has one"
    ),
    -4003: f"the quantity is refused; {_FILTER}",
    -4004: f"the quantity is below the symbol's least; {_FILTER}",
    -4005: f"the quantity is above the symbol's most; {_FILTER}",
    -4014: f"the price is no multiple of the symbol's tick; {_FILTER}",
    -4023: f"the quantity is no multiple of the symbol's step; {_FILTER}",
    -4024: "the price is too far below the market for this symbol: choose another --symbol",
    -4045: "too many conditional orders are open (200 at the most): cancel some",
    -4061: (
        "its position side does not fit the account's position mode (one-way or hedge), which has changed since it was "
        f"read; {_REPEAT}"
    ),
    -4118: "a reducing order is refused beside the position's other orders: cancel those, or choose another --symbol",
    -4131: "the symbol's book is too thin for market orders: choose another --symbol",
    -4140: "the symbol is not open for trading: choose another --symbol",
    -4141: "the symbol is closed: choose another --symbol",
    -4164: f"its notional value is below the symbol's least; {_FILTER}",
}


class Unusable(ValueError):
    """What the exchange tells of a symbol cannot be used; the text says what, and may quote it."""


@dataclass(frozen=True, slots=True)
class SymbolRules:
    """What an order on a symbol must keep to; prices in the quote asset, quantities in the base asset."""

    symbol: str
    tick: Decimal
    least_price: Decimal
    step: Decimal
    least_quantity: Decimal
    most_quantity: Decimal
    least_notional: Decimal


@dataclass(frozen=True, slots=True)
class Stop:
    """A stop that sells, and may only reduce: in hedge mode by its position side, else by its flag."""

    symbol: str
    quantity: str
    trigger_price: str
    is_hedged: bool

    def parameters(self, client_algo_id: str) -> list[tuple[str, str]]:
        """As POST algoOrder takes them (exchange.md 1.2); in hedge mode `reduceOnly` is refused (-1106)."""
        reducing = ("positionSide", "LONG") if self.is_hedged else ("reduceOnly", "true")
        return [
            ("algoType", "CONDITIONAL"),
            ("symbol", self.symbol),
            ("side", "SELL"),
            ("type", "STOP_MARKET"),
            ("quantity", self.quantity),
            ("triggerPrice", self.trigger_price),
            ("workingType", "MARK_PRICE"),
            reducing,
            ("clientAlgoId", client_algo_id),
        ]


def _number(source: Mapping[str, Any], name: str, *, may_be_zero: bool = False) -> Decimal:
    value = source.get(name)
    if not isinstance(value, str) or not _DECIMAL.fullmatch(value):
        raise Unusable(f"{name} is {shown(value)}, not a decimal number as text")
    number = Decimal(value)
    if not number and not may_be_zero:
        raise Unusable(f"{name} is {value!r}")
    return number


def rules_of(info: Any, symbol: str) -> SymbolRules | None:
    """The symbol's rules out of exchangeInfo; None where it is not listed.

    Raises:
        Unusable: the answer, or what it tells of the symbol, is not as documented.
    """
    symbols = info.get("symbols") if isinstance(info, dict) else None
    if not isinstance(symbols, list):
        raise Unusable("exchangeInfo lists no symbols")
    entry = next((each for each in symbols if isinstance(each, dict) and each.get("symbol") == symbol), None)
    if entry is None:
        return None
    if entry.get("status") != "TRADING":
        raise Unusable(f"{symbol} is {shown(entry.get('status'))}, not TRADING: choose another --symbol")
    listed = entry.get("filters")
    filters = {each.get("filterType"): each for each in listed if isinstance(each, dict)} if listed else {}
    try:
        price, lots = filters["PRICE_FILTER"], [filters["LOT_SIZE"], filters["MARKET_LOT_SIZE"]]
        notional = filters["MIN_NOTIONAL"]
    except KeyError as error:
        raise Unusable(f"{symbol} has no filter {error.args[0]}") from None
    return SymbolRules(
        symbol=symbol,
        tick=_number(price, "tickSize"),
        least_price=_number(price, "minPrice", may_be_zero=True),
        step=max(_number(lot, "stepSize") for lot in lots),
        least_quantity=max(_number(lot, "minQty", may_be_zero=True) for lot in lots),
        most_quantity=min(_number(lot, "maxQty") for lot in lots),
        least_notional=_number(notional, "notional", may_be_zero=True),
    )


def mark_price(premium_index: Any, symbol: str) -> Decimal:
    """The symbol's mark price out of premiumIndex.

    Raises:
        Unusable: it is not there.
    """
    if not isinstance(premium_index, dict) or premium_index.get("symbol") != symbol:
        raise Unusable(f"premiumIndex does not tell of {symbol}")
    return _number(premium_index, "markPrice")


def far_stop(rules: SymbolRules, mark: Decimal, is_hedged: bool) -> Stop:
    """The smallest stop that the rules allow, at about half the mark price.

    Raises:
        Unusable: the rules leave no price that is far away, or no quantity.
    """
    with localcontext(prec=60):
        trigger = max(_rounded(mark * _FAR, rules.tick, ROUND_FLOOR), rules.tick)
        if trigger < rules.least_price:
            trigger = _rounded(rules.least_price, rules.tick, ROUND_CEILING)
        if trigger > mark * _NEAREST:
            raise Unusable(f"{rules.symbol} takes no price far below its mark price {mark:f}")
        # By the lower of the two prices, as it is not documented by which one the notional value counts.
        least = max(rules.least_quantity, rules.least_notional / trigger, rules.step)
        quantity = _rounded(least, rules.step, ROUND_CEILING)
    if quantity > rules.most_quantity:
        raise Unusable(f"{rules.symbol} takes no quantity between {least:f} and {rules.most_quantity:f}")
    return Stop(rules.symbol, _plain(quantity), _plain(trigger), is_hedged)


def _rounded(value: Decimal, to: Decimal, how: str) -> Decimal:
    return (value / to).to_integral_value(how) * to


def _plain(value: Decimal) -> str:
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def verdict(outcome: Outcome | None, state: Means, said: str, seconds: float) -> tuple[str, str]:
    """What a rehearsal has shown, in a word and in a sentence: by the outcome, and the state that a query showed.

    ``said`` are the query's words, ``seconds`` the time since the order was placed.
    """
    kind = None if outcome is None else outcome.kind
    if state is Means.TRIGGERING:
        return "inconclusive", "the order is stuck TRIGGERING, as has been seen on demo for hours: look at it; repeat"
    if kind is OutcomeKind.CANCELLED and state is Means.CANCELED:
        return "passed", "the order was placed, cancelled through the queue, and is gone"
    if kind in (OutcomeKind.ALREADY_CANCELLED, OutcomeKind.EXPIRED) and state in (Means.CANCELED, Means.EXPIRED):
        return "inconclusive", (
            f"the order was gone ({said}) before our cancel, within {seconds:.0f} s: the demo exchange drops stops by "
            "itself about 53 s after they were placed, or somebody else cancelled it; repeat"
        )
    if state in (Means.TRIGGERED, Means.FINISHED):
        return "failed", f"the order triggered ({said}), far from the market as it was: look at order and position"
    told = "no outcome came in time" if outcome is None else f"the outcome is {outcome.kind}: {outcome.error or '-'}"
    return "failed", f"{told}; a query shows {said or state}"
