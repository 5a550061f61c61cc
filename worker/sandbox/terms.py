"""What a new conditional order may be: POST /fapi/v1/algoOrder, read and judged.

Codes and texts are those of the exchange's list of errors [D]; which of them a given mistake gets on this endpoint is
UNCONFIRMED but for -2021, -4061, -4116 and -1102, and so is everything that a comment says is.
"""

from __future__ import annotations

import re
from decimal import Decimal

from worker.sandbox.book import OrderTerms
from worker.sandbox.market import ORDER_TYPES, SYMBOLS, TIMES_IN_FORCE, Symbol
from worker.sandbox.signed import Refusal, integer, known_symbol, mandatory, read_client_algo_id

WORKING_TYPES = ("CONTRACT_PRICE", "MARK_PRICE")
PRICE_MATCHES = tuple(f"{side}{depth}" for side in ("OPPONENT", "QUEUE") for depth in ("", "_5", "_10", "_20"))
STP_MODES = ("NONE", "EXPIRE_TAKER", "EXPIRE_MAKER", "EXPIRE_BOTH")
MAX_GOOD_TILL_MS = 253_402_300_799_000
MIN_GOOD_FOR_MS = 600_000
MAX_CALLBACK_RATE = 20  # since 2026-10-23 (exchange.md 1.1)

_DECIMAL = re.compile(r"[0-9]{1,20}(\.[0-9]{1,20})?")


def read_terms(said: dict[str, str], *, dual: bool, price: Decimal, server_ms: int) -> OrderTerms:
    """The terms of a new order of an account in one-way or `dual` position mode, at this price of its symbol.

    Raises:
        Refusal: as the exchange words it.
    """
    _chosen(said, "algoType", ("CONDITIONAL",), -4500, "Invalid algo type.")  # the code: UNCONFIRMED
    name = known_symbol(said)
    terms = OrderTerms(
        symbol=name,
        side=_chosen(said, "side", ("BUY", "SELL"), -1117, "Invalid side."),
        order_type=_chosen(said, "type", ORDER_TYPES, -1116, "Invalid orderType."),
        quantity=_decimal(said, "quantity"),
        trigger_price=_decimal(said, "triggerPrice"),
        client_algo_id=read_client_algo_id(said["clientAlgoId"]) if "clientAlgoId" in said else "",
        price=_decimal(said, "price"),
        position_side=_chosen(said, "positionSide", ("BOTH", "LONG", "SHORT"), -4060, "Invalid position side.", "BOTH"),
        time_in_force=_chosen(said, "timeInForce", TIMES_IN_FORCE, -1115, "Invalid timeInForce.", "GTC"),
        working_type=_chosen(said, "workingType", WORKING_TYPES, -1130, _bad("workingType"), WORKING_TYPES[0]),
        price_match=_chosen(said, "priceMatch", ("NONE", *PRICE_MATCHES), -1130, _bad("priceMatch"), "NONE"),
        close_position=_flag(said, "closePosition"),
        price_protect=_flag(said, "priceProtect"),
        reduce_only=_flag(said, "reduceOnly"),
        activate_price=_decimal(said, "activatePrice"),
        callback_rate=_decimal(said, "callbackRate"),
        stp_mode=_chosen(said, "selfTradePreventionMode", STP_MODES, -1130, _bad("selfTradePreventionMode"), "NONE"),
        good_till_date=integer("goodTillDate", said.get("goodTillDate", "0")),
    )
    _chosen(said, "newOrderRespType", ("ACK", "RESULT"), -1130, _bad("newOrderRespType"), "ACK")
    _check_needed(terms, said)
    _check_position(terms, said, dual)
    _check_filters(terms, SYMBOLS[name], price)
    _check_good_till(terms, server_ms)
    if terms.is_met_by(price) or _activates_at_once(terms, price):
        raise Refusal.of(-2021, "Order would immediately trigger.")
    return terms


def _bad(name: str) -> str:
    return f"Invalid data sent for parameter '{name}'."


def _chosen(
    said: dict[str, str], name: str, legal: tuple[str, ...], code: int, msg: str, default: str | None = None
) -> str:
    value = mandatory(said, name) if default is None else said.get(name) or default
    if value not in legal:
        raise Refusal.of(code, msg)
    return value


def _flag(said: dict[str, str], name: str) -> bool:
    # Documented are "true" and "false"; python-binance sends Python's "True". That it passes is UNCONFIRMED.
    value = said.get(name, "false").lower()
    if value not in ("true", "false"):
        raise Refusal.of(-1130, _bad(name))
    return value == "true"


def _decimal(said: dict[str, str], name: str) -> str:
    value = said.get(name, "")
    if value and not _DECIMAL.fullmatch(value):
        raise Refusal.of(-1100, f"Illegal characters found in parameter '{name}'.")
    return value


def _check_needed(terms: OrderTerms, said: dict[str, str]) -> None:
    """What a type needs and what excludes what, as the official SDK's documentation says [S]."""
    if terms.close_position and terms.quantity:
        raise Refusal.of(-4137, "Quantity must be zero with closePosition equals true.")
    needed = {
        "quantity": not terms.close_position,
        "triggerPrice": not terms.trailing,
        "callbackRate": terms.trailing,
        "price": not terms.at_market and terms.price_match == "NONE",
        "goodTillDate": terms.time_in_force == "GTD",
    }
    unwanted = {
        "closePosition": terms.close_position and terms.order_type not in ("STOP_MARKET", "TAKE_PROFIT_MARKET"),
        "reduceOnly": terms.close_position and terms.reduce_only,
        "priceMatch": terms.price_match != "NONE" and (terms.at_market or bool(terms.price)),
    }
    for name in needed:
        if needed[name]:
            mandatory(said, name)
    for name in unwanted:
        if unwanted[name]:
            raise Refusal.of(-1106, f"Parameter '{name}' sent when not required.")
    for value in (terms.quantity, terms.trigger_price, terms.price):
        if value and not Decimal(value):
            raise Refusal.of(-4003, "Quantity less than zero.")
    if terms.trailing and not Decimal("0.1") <= Decimal(terms.callback_rate) <= MAX_CALLBACK_RATE:
        raise Refusal.of(-1130, _bad("callbackRate"))


def _check_position(terms: OrderTerms, said: dict[str, str], dual: bool) -> None:
    if dual != (terms.position_side != "BOTH"):
        raise Refusal.of(-4061, "Order's position side does not match user's setting.")
    if dual and "reduceOnly" in said:
        raise Refusal.of(-1106, "Parameter 'reduceonly' sent when not required.")  # the spelling is the exchange's
    if terms.close_position and (terms.side, terms.position_side) in {("BUY", "LONG"), ("SELL", "SHORT")}:
        raise Refusal.of(-2022, "ReduceOnly Order is rejected.")


def _check_filters(terms: OrderTerms, symbol: Symbol, price: Decimal) -> None:
    quantity = (terms.quantity, symbol.step, symbol.quantity_precision, -4023, "Qty not increased by step size.")
    tick = (symbol.tick, symbol.price_precision, -4014, "Price not increased by tick size.")
    prices = [(value, *tick) for value in (terms.trigger_price, terms.price, terms.activate_price)]
    for value, step, precision, code, msg in (quantity, *prices):
        if not value:
            continue
        if len(value.partition(".")[2].rstrip("0")) > precision:
            raise Refusal.of(-1111, "Precision is over the maximum defined for this asset.")
        if Decimal(value) % Decimal(step):
            raise Refusal.of(code, msg)
    if terms.close_position or terms.reduce_only:
        return
    if Decimal(terms.quantity) * Decimal(terms.price or terms.trigger_price or price) < Decimal(symbol.min_notional):
        text = f"Order's notional must be no smaller than {symbol.min_notional} (unless you choose reduce only)."
        raise Refusal.of(-4164, text)


def _check_good_till(terms: OrderTerms, server_ms: int) -> None:
    if terms.time_in_force != "GTD":
        return
    if not server_ms + MIN_GOOD_FOR_MS < terms.good_till_date < MAX_GOOD_TILL_MS:
        raise Refusal.of(-1130, _bad("goodTillDate"))


def _activates_at_once(terms: OrderTerms, price: Decimal) -> bool:
    """A trailing order must be activated above the price to sell, below it to buy [S]."""
    if not (terms.trailing and terms.activate_price):
        return False
    activates = Decimal(terms.activate_price)
    return activates <= price if terms.side == "SELL" else activates >= price
