"""RQ workers that are killed right after they have popped a job, before a line of the job's function is run.

For `rq worker -w tests.horses.…`: no signal from outside comes at so exact a moment.
"""

from __future__ import annotations

import os
import signal

from rq import Worker
from rq.job import Job


class HorseIsKilled(Worker):
    """SIGKILL to the process that has the job."""

    def prepare_job_execution(self, job: Job, remove_from_intermediate_queue: bool = False) -> None:
        """RQ's last step before the function."""
        super().prepare_job_execution(job, remove_from_intermediate_queue)
        os.kill(os.getpid(), signal.SIGKILL)


class AllAreKilled(Worker):
    """SIGKILL to that process and its parent."""

    def prepare_job_execution(self, job: Job, remove_from_intermediate_queue: bool = False) -> None:
        """RQ's last step before the function."""
        super().prepare_job_execution(job, remove_from_intermediate_queue)
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
