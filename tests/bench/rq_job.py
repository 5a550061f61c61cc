"""The job of the stock RQ workers: one signed DELETE over a kept connection. Trying again is left to RQ."""

from __future__ import annotations

import os

import requests

from tests.bench.signing import signed_target

_session = requests.Session()
_session.headers["X-MBX-APIKEY"] = os.environ.get("BINANCE_API_KEY", "")


def cancel(algo_id: int) -> dict[str, object]:
    """Cancel one order; the exchange's answer is the job's result.

    Raises:
        requests.RequestException: no answer, or a refusal.
    """
    target = signed_target(algo_id, os.environ["BINANCE_API_SECRET"].encode())
    response = _session.delete(os.environ["BINANCE_BASE_URL"] + target, timeout=10)
    response.raise_for_status()
    answer: dict[str, object] = response.json()
    return answer
