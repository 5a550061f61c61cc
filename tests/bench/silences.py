"""What stays away: answers that never come, and a burst after a calm behind a firewall that forgets what is still."""

from __future__ import annotations

import sys
import time
from dataclasses import replace

from tests.bench.common import NEAR_MS, Bench, forget, lost_and_repeats, put_paced, warm_up
from tests.bench.figures import AfterCalm, Silences
from tests.bench.rig import Rig
from tests.bench.systems import PROJECT, ProjectProducer, running, wait_recorded
from tests.fault.proxy import Proxy

#: The part of all answers that never come.
SILENT_PART = 0.05
#: Orders of a burst before and after the calm.
BURST = 40
#: Between two cancels that are asked for one at a time, s.
_PACE_S = 0.02


def silences(bench: Bench, rig: Rig) -> Silences:
    """Cancels one at a time while some answers never come, to cancels and queries alike."""
    forget(rig)
    with (
        Proxy(rig.exchange.port) as proxy,
        running(PROJECT, rig, environment={"BINANCE_BASE_URL": proxy.http_url}) as worker,
    ):
        warm_up(bench, rig, worker)
        orders, recorded = bench.take(bench.sizes.silences), worker.producer.recorded()
        rig.exchange.reset(delay_ms=NEAR_MS)
        proxy.let_it_rain(mute=SILENT_PART)
        put_paced(worker, orders, _PACE_S)
        wait_recorded(worker.producer, recorded + len(orders), bench.sizes.limit_s)
        proxy.let_it_rain()
        took_ms = _outcomes_ms(worker.producer, orders)
        lost, repeats = lost_and_repeats(orders, rig.exchange.arrivals())
        bench.say(f"silence: {len(orders)} cancels, {proxy.count.silences} answers stayed away")
        return Silences(
            part=SILENT_PART,
            silent=proxy.count.silences,
            outcomes_ms=took_ms,
            lost=lost,
            unrecorded=worker.producer.unrecorded(orders),
            repeats=repeats,
        )


def after_calm(bench: Bench, rig: Rig) -> AfterCalm:
    """A burst, a calm in which all flows but the warm ones are forgotten, and the same burst again."""
    forget(rig)
    sizes = bench.sizes
    worker_of_ours = replace(PROJECT, command=(sys.executable, "-m", "tests.bench.warm_worker"))
    with Proxy(rig.exchange.port) as proxy:
        variables = {"BINANCE_BASE_URL": proxy.http_url, "BENCH_WARM_S": sizes.warm_behind_s}
        with running(worker_of_ours, rig, environment=variables) as worker:
            warm_up(bench, rig, worker)
            rig.exchange.reset(delay_ms=NEAR_MS)
            proxy.forget(sizes.forgets_after_s)
            figures = []
            for calm_s in (0.0, sizes.calm_s):
                time.sleep(calm_s)
                orders, recorded = bench.take(BURST), worker.producer.recorded()
                worker.producer.put_many(orders)
                wait_recorded(worker.producer, recorded + BURST, sizes.limit_s)
                lost = lost_and_repeats(orders, rig.exchange.arrivals())[0]
                figures.append((_outcomes_ms(worker.producer, orders), lost, worker.producer.unrecorded(orders)))
            (before_ms, *_), (after_ms, lost, unrecorded) = figures
            bench.say(f"calm: two bursts of {BURST}, {sizes.calm_s:.0f} s between them")
            return AfterCalm(sizes.forgets_after_s, sizes.calm_s, before_ms, after_ms, lost, unrecorded)


def _outcomes_ms(producer: object, orders: list[int]) -> list[float]:
    """From request to outcome, ms by Redis' clock."""
    assert isinstance(producer, ProjectProducer)
    found = producer.client.outcomes_of(producer.jobs[order] for order in orders)
    return [float((one.finished_at_ms or 0) - (one.enqueued_at_ms or 0)) for one in found.values()]
