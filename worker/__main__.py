"""`python -m worker`: run a worker, check the set-up, or see it all work in the sandbox."""

from __future__ import annotations

import sys
from typing import Any

import click  # comes with rq
import redis

from worker import log
from worker.runner import EX_UNAVAILABLE, CancelWorker
from worker.settings import Settings, SettingsError

EX_CONFIG = 78  # sysexits.h


def _settings(queue: str | None = None, concurrency: int | None = None) -> Settings:
    try:
        settings = Settings.from_env().overridden(queue=queue, concurrency=concurrency)
    except SettingsError as error:
        for problem in error.problems:
            click.echo(problem, err=True)
        sys.exit(EX_CONFIG)
    log.configure(settings.log_level, settings.log_format)
    return settings


@click.group(invoke_without_command=True)
@click.option("--queue", help="Queue to serve, instead of CANCEL_QUEUE.")
@click.option("--concurrency", help="Requests in flight at the most, instead of WORKER_CONCURRENCY.")
@click.option("--burst", is_flag=True, help="Leave when queue, retries and leases are empty.")
@click.pass_context
def main(context: click.Context, /, **options: Any) -> None:
    """Cancel orders from the queue until told to stop."""
    if context.invoked_subcommand is None:
        run(**options)


def run(queue: str | None, concurrency: int | None, burst: bool) -> None:
    settings = _settings(queue, concurrency)
    try:
        worker = CancelWorker([settings.queue], settings=settings)
        worker.work(burst=burst)
    except redis.AuthenticationError:
        log.error("redis", state="refused", redis=settings.display_redis_url)
        sys.exit(EX_UNAVAILABLE)
    sys.exit(worker.exit_code)


if __name__ == "__main__":
    main(prog_name="python -m worker")
