"""What the local exchange trades: its symbols with their filters.

Pure. Filters are those of the real symbols as of 2026, as far as an order's terms can break them.
"""

from __future__ import annotations

from dataclasses import dataclass

ORDER_TYPES = ("STOP", "STOP_MARKET", "TAKE_PROFIT", "TAKE_PROFIT_MARKET", "TRAILING_STOP_MARKET")
TIMES_IN_FORCE = ("GTC", "IOC", "FOK", "GTX", "GTD", "GTE_GTC")
_FAR_MS = 4_133_404_800_000  # the delivery date that perpetual contracts show


@dataclass(frozen=True, slots=True)
class Symbol:
    """A perpetual contract. Decimals beyond a precision, and steps that are not met, are refused."""

    base: str
    price: str  # mark price and last price at the start
    tick: str
    step: str
    price_precision: int = 2
    quantity_precision: int = 3
    min_notional: str = "5"

    def shown(self, name: str) -> dict[str, object]:
        """As exchangeInfo lists it."""
        quantities = {"minQty": self.step, "maxQty": "10000", "stepSize": self.step}
        return {
            "symbol": name,
            "pair": name,
            "contractType": "PERPETUAL",
            "deliveryDate": _FAR_MS,
            "onboardDate": 1_569_398_400_000,
            "status": "TRADING",
            "maintMarginPercent": "2.5000",
            "requiredMarginPercent": "5.0000",
            "baseAsset": self.base,
            "quoteAsset": "USDT",
            "marginAsset": "USDT",
            "pricePrecision": self.price_precision,
            "quantityPrecision": self.quantity_precision,
            "baseAssetPrecision": 8,
            "quotePrecision": 8,
            "underlyingType": "COIN",
            "underlyingSubType": [],
            "settlePlan": 0,
            "triggerProtect": "0.0500",
            "liquidationFee": "0.012500",
            "marketTakeBound": "0.05",
            "filters": [
                {"filterType": "PRICE_FILTER", "minPrice": self.tick, "maxPrice": "10000000", "tickSize": self.tick},
                {"filterType": "LOT_SIZE"} | quantities,
                {"filterType": "MARKET_LOT_SIZE"} | quantities,
                {"filterType": "MAX_NUM_ORDERS", "limit": 200},
                {"filterType": "MIN_NOTIONAL", "notional": self.min_notional},
            ],
            "orderTypes": ["LIMIT", "MARKET", *ORDER_TYPES],
            "timeInForce": list(TIMES_IN_FORCE),
        }


SYMBOLS = {
    "BTCUSDT": Symbol("BTC", "60000", "0.10", "0.001", min_notional="50"),
    "ETHUSDT": Symbol("ETH", "3000", "0.01", "0.001", min_notional="20"),
    "SOLUSDT": Symbol("SOL", "150", "0.0100", "0.01", price_precision=4, quantity_precision=2),
    "BNBUSDT": Symbol("BNB", "600", "0.010", "0.01", price_precision=3, quantity_precision=2),
    # Such symbols are listed, and have to be percent-encoded (exchange.md 2).
    "币安人生USDT": Symbol("币安人生", "0.15", "0.0000100", "1", price_precision=7, quantity_precision=0),
}
