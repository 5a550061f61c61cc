"""`python -m worker sandbox`: orders, their cancels by real workers, then the reckoning with the exchange's book."""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from producer import CancelClient, Outcome
from worker.sandbox.orders import Twice, Wanted, plan
from worker.sandbox.report import Asked, Report
from worker.sandbox.show import Screen, note, progress, show
from worker.sandbox.stage import EXIT_FAILED, EXIT_OK, TIMING, Options, Stage, supervised

#: How long outcomes may take to come after the last deadline, s.
_PATIENCE_S = 10.0
#: Requests enqueued by one call.
_BATCH = 40


def run(options: Options, server: str | None, environment: Mapping[str, str]) -> int:
    """Run the sandbox and print its report; gives the exit code. Arguments as of :func:`supervised`."""

    def body(stage: Stage) -> int:
        with progress() as screen, stage.parts:  # so that all has ended before the report
            report = _Run(stage, screen)()
        if not options.as_json:
            show(report)
        else:
            sys.stdout.write(json.dumps(report.as_dict(), ensure_ascii=False) + "\n")
            for problem in report.problems:
                note(f"FAILED: {problem}")
        return EXIT_OK if report.ok else EXIT_FAILED

    return supervised(options, server, environment, body)


class _Run:
    """One run, from the first process to the report."""

    def __init__(self, stage: Stage, screen: Screen) -> None:
        self._stage, self._options, self._screen = stage, stage.options, screen
        self._requests = 0
        self._asked: dict[str, Asked] = {}
        self._outcomes: list[Outcome] = []
        self._position = "0-0"
        self._began_s = 0.0
        self._shown_s = 0.0

    def __call__(self) -> Report:
        """Run."""
        began_s, options, stage = time.monotonic(), self._options, self._stage
        self._screen.say("starting Redis, the exchange and the workers")
        ledger = max(4 * options.orders, 1_000)
        bounds = {"CANCEL_DEADLINE_S": str(options.deadline_s), "LEDGER_MAXLEN": str(ledger)}
        stage.open(bounds, faults_for_ms=options.deadline_s * 1_000 // 3)
        self._client = stage.parts.enter_context(CancelClient.from_url(stage.valkey.url, timeout_s=10.0))
        stage.exchange.reset()  # the faults' time begins now
        self._enqueue(self._open_orders())
        self._follow()
        self._screen.say("stopping the workers")
        exit_codes = stage.fleet.stop()
        self._read_ledger()
        return Report(
            orders=options.orders,
            workers=options.workers,
            concurrency=options.concurrency,
            faults=options.faults,
            seed=options.seed,
            requests=self._requests,
            asked=list(self._asked.values()),
            outcomes=self._outcomes,
            book=list(stage.exchange.book().values()),
            stats=stage.exchange.stats(),
            exit_codes=exit_codes,
            wall_s=time.monotonic() - began_s,
        )

    def _open_orders(self) -> list[tuple[Wanted, int]]:
        """The orders of the plan with the ids that the exchange gave them."""
        self._screen.say("opening orders")
        groups: dict[tuple[str, str, str], list[Wanted]] = {}
        for wanted in plan(self._options.orders, self._options.seed):
            groups.setdefault((wanted.account, wanted.symbol, wanted.order_type), []).append(wanted)
        opened = []
        for (account, symbol, order_type), group in sorted(groups.items()):
            names = [wanted.client_algo_id for wanted in group]
            # Longer than what is not known of the clocks: of a younger order nobody can tell whether a request by
            # client id meant it.
            placed = self._stage.exchange.add_orders(
                account=account, symbol=symbol, client_algo_ids=names, age_ms=60_000, order_type=order_type
            )
            opened += [(wanted, order.algo_id) for wanted, order in zip(group, placed, strict=True)]
        for wanted, algo_id in opened:
            if wanted.triggered and self._options.faults != "none":
                rests = wanted.order_type == "STOP"
                self._stage.exchange.trigger(algo_id, finished_after_ms=None if rests else TIMING.finished_after_ms)
        random.Random(self._options.seed).shuffle(opened)
        return opened

    def _enqueue(self, opened: Sequence[tuple[Wanted, int]]) -> None:
        self._screen.say("cancelling")
        self._began_s = time.monotonic()
        for first in range(0, len(opened), _BATCH):
            group = opened[first : first + _BATCH]
            together = [each for each in group if not each[0].alone]
            self._ask(together + [each for each in together if each[0].twice is Twice.AT_ONCE])
            for each in group:
                if each[0].alone:
                    self._ask([each])
            self._look()
        for each in opened:
            if each[0].twice is Twice.LATER:
                self._ask([each])

    def _ask(self, orders: Sequence[tuple[Wanted, int]]) -> None:
        """Have these cancelled, by one call."""
        tickets = self._client.cancel_many(wanted.request(algo_id) for wanted, algo_id in orders)
        self._requests += len(orders)
        for ticket, (_, algo_id) in zip(tickets, orders, strict=True):
            self._asked[ticket.id] = Asked(ticket.id, algo_id)  # requests for one order may share a ticket

    def _follow(self) -> None:
        """Wait until every request has its outcome, or until none can be expected any more."""
        ends_at = time.monotonic() + self._options.deadline_s + _PATIENCE_S
        while not self._is_done() and self._stage.fleet.alive() and time.monotonic() < ends_at:
            self._look()
            time.sleep(0.05)
        self._look(at_once=True)

    def _is_done(self) -> bool:
        return len({outcome.id for outcome in self._outcomes}) >= len(self._asked)

    def _look(self, *, at_once: bool = False) -> None:
        self._stage.interrupts.check()
        self._read_ledger()
        now_s = time.monotonic()
        if at_once or now_s - self._shown_s >= self._screen.every_s:
            self._shown_s = now_s
            kinds = Counter(outcome.kind for outcome in self._outcomes)
            answers = self._stage.exchange.stats().requests.values()
            requests = sum(sum(by_status.values()) for by_status in answers)
            self._screen.show(len(self._asked), kinds, requests, now_s - self._began_s)

    def _read_ledger(self) -> None:
        for position, outcome in self._client.outcomes(self._position):
            self._position = position
            self._outcomes.append(outcome)
