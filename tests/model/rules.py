"""What must hold for every job, whatever happens to its queue.

The model is told what was asked of the queue and what it answered, in the order in which it happened, and is shown from
time to time what stands in Redis. It raises :class:`Finding` where one of these rules is broken:

1.  Every acknowledged request ends in exactly one outcome for each of its runs, unless a person deleted its job.
2.  No run stands in the ledger twice.
3.  A completion under a lost lease, or of another run, changes nothing; one that is repeated is answered alike.
4.  A live lease is never given to a second holder, ours or stock.
5.  Attempts are never forgotten within a run, and a lost lease adds one that is unclear.
6.  A run starts by our retry, or where the record says failed, RQ calls the job neither failed nor finished, and the id
    has left the FailedJobRegistry; by nothing else. A retry of a job that has not ended starts none.
7.  Deadlines never get shorter, and a job is not ended by one that has moved.
8.  A request by algo id joins an unfinished job of its order and no other; one by client id alone joins none of an
    earlier call's.
9.  A job is given when it is due and not before, and never once it has ended.
10. Every unfinished job stands in the index, in the band of its state; a job that has ended does not.
11. While the queue is paused, only what needs nothing sent is given.
12. What has ended does not stay in Redis for ever, and what has not does not run out.
13. A job that a person cancelled through RQ is ended without another call, unless RQ itself says otherwise; a listing
    makes no request then.
14. A listing of open orders ends together with a request for each order that it names, or with one that was open: that
    is made once, with its deadline and what it wants done with children.
15. The counts of outcomes by kind are those of the ledger.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from producer.keys import Band
from producer.message import DEFAULT_ACCOUNT, CancelRequest, Outcome, OutcomeKind, decode_attempts
from worker.store import Done, Lease, Release, Retry, Row

#: How much later the index may look at a retry of RQ's own than now, ms: RQ's longest wait in these tests.
RQ_WAIT_MS = 600_000
FAILED = frozenset(kind.value for kind in OutcomeKind if kind.failed)
BY_DEADLINE = frozenset({"overdue", "gave_up", "unknown"})


class Finding(AssertionError):
    """A rule is broken: which, for which job, and what was seen."""

    def __init__(self, rule: int, job_id: str, text: str, *seen: object) -> None:
        shown = f": {', '.join(map(str, seen))}" if seen else ""
        super().__init__(f"rule {rule}: {job_id[:8]} {text}{shown}")
        self.rule = rule
        self.job_id = job_id


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it was enqueued. ``call`` numbers the calls: words that are sent again are the same call."""

    call: int
    order: str
    joins: bool
    deadline_ms: int | None  # from the moment of asking; None: the worker's
    cancels_child: bool = False


@dataclass(slots=True)
class Hold:
    """A lease that was given. ``ends_ms``: by Redis' clock; not before, unless the holder ends it."""

    token: str
    ends_ms: float


@dataclass(slots=True)
class Job:
    """What the model knows of a job."""

    id: str
    order: str
    call: int
    deadline_ms: int  # at least
    run: int = 1
    hold: Hold | None = None
    due_ms: int = 0
    attempts: int = 0
    done: str = ""
    outcomes: dict[int, str] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)  # leases that their holders ended, and what they were told
    is_acknowledged: bool = True
    left_failed: bool = False  # RQ was told to take it off the FailedJobRegistry
    is_recalled: bool = False  # a person cancelled it through RQ
    was_recalled: bool = False  # at some time RQ called it canceled or stopped
    is_surely_recalled: bool = False  # and RQ has not said otherwise since
    is_deleted: bool = False  # a person deleted it
    is_expired: bool = False  # its hash has run out, as it does after the end
    record_is_expired: bool = False
    cancels_child: bool = False  # some request for it wanted what it becomes by triggering cancelled, too

    @property
    def is_counted_anew(self) -> bool:
        """Whether its runs may be counted anew: with the hash their count is gone, and the last one's record was."""
        return self.is_deleted and self.run > 1

    @property
    def is_open(self) -> bool:
        """Whether it is to end yet, and nobody meddled with it."""
        return not self.done and not self.is_deleted and not self.is_recalled


@dataclass(frozen=True, slots=True)
class Seen:
    """What stands in Redis about a job, all of one moment."""

    id: str
    exists: bool
    status: str
    lease: str
    done: str
    run: int
    due_ms: int
    open_at: str
    attempts: str
    ttl: int
    score: float | None  # in the index
    has_record: bool


class Model:
    """All jobs of one queue. ``deadline_ms``: of a request that leaves it to the worker."""

    def __init__(self, deadline_ms: int) -> None:
        self.jobs: dict[str, Job] = {}
        self.pointers: dict[str, str] = {}
        self._doubtful: set[str] = set()  # orders whose pointer hangs on what RQ calls a job
        self.ledger: set[tuple[str, int]] = set()
        self.recorded_kinds = Counter[OutcomeKind]()
        self.forgotten: set[str] = set()  # ended, expired, and of no interest any more
        self.leaving = Counter[str]()  # RQ is about to take them off the FailedJobRegistry
        self._listings = 0
        self.first: Finding | None = None  # RQ's code, through which it may pass, swallows whatever is raised
        self._deadline_ms = deadline_ms

    def finding(self, rule: int, job_id: str, text: str, *seen: object) -> Finding:
        """A broken rule, to be raised; the first one is kept."""
        found = Finding(rule, job_id, text, *seen)
        self.first = self.first or found
        return found

    # -- producers --

    def acknowledged(self, asked: Asked, job_id: str, now_ms: int, *, is_repeat: bool = False) -> Job:
        """A request was answered with a ticket; ``now_ms``: when it was asked, or earlier."""
        job = self.jobs.get(job_id)
        deadline_ms = now_ms + (self._deadline_ms if asked.deadline_ms is None else asked.deadline_ms)
        if job is None:
            if asked.joins and (other := self.pointers.get(asked.order)) and self.jobs[other].is_open:
                raise self.finding(8, job_id, "stands beside the open job of its order", other[:8], asked.order)
            self.jobs[job_id] = job = Job(job_id, asked.order, asked.call, deadline_ms)
            job.cancels_child = asked.cancels_child
            if asked.joins:
                self.pointers[asked.order] = job_id
            return job
        if job.order != asked.order:
            raise self.finding(8, job_id, "is the ticket of another order", job.order, asked.order)
        job.cancels_child = job.cancels_child or asked.cancels_child
        if asked.call != job.call:
            self._joined(job, asked, now_ms)
        elif is_repeat:
            return job
        if not job.done:
            job.deadline_ms = max(job.deadline_ms, deadline_ms)
        return job

    def _joined(self, job: Job, asked: Asked, now_ms: int) -> None:
        if not asked.joins:
            raise self.finding(8, job.id, "of an earlier call is joined by client id alone", asked.order)
        if job.is_surely_recalled:
            raise self.finding(13, job.id, "is joined, though a person cancelled it")
        if job.done and not job.is_deleted:
            if not job.left_failed:
                raise self.finding(8, job.id, "is joined though it has ended", job.done)
            self._start_run(job, now_ms)

    def retried(self, job_id: str, now_ms: int) -> None:
        """The client's retry said that it has started the job."""
        job = self._known(job_id)
        if job.done:
            if job.done not in FAILED:
                raise self.finding(6, job_id, "is retried though it ended well", job.done)
            self._start_run(job, now_ms)
        job.deadline_ms = max(job.deadline_ms, now_ms + self._deadline_ms)

    # -- holders --

    def leased(self, lease: Lease, now_ms: int, lease_ms: int) -> None:
        """A script gave a lease, when Redis' clock said ``now_ms``."""
        job = self._known(lease.id)
        self._losing(job, now_ms)
        self._run_is(job, lease.run, now_ms)
        shown = len(decode_attempts(lease.attempts))
        if not job.is_deleted:
            self._may_be_given(job, lease, now_ms)
            if lease.cancels_child != job.cancels_child:
                raise self.finding(7, job.id, "is given without what was asked of its child", lease.cancels_child)
            if shown != job.attempts:
                raise self.finding(5, job.id, f"is given with {shown} attempts, {job.attempts} were made")
        job.attempts, job.due_ms = shown, 0
        job.hold = Hold(lease.token, now_ms + lease_ms)

    def _may_be_given(self, job: Job, lease: Lease, now_ms: int) -> None:
        if job.done:
            raise self.finding(9, job.id, "is given though it has ended", job.done)
        if job.is_surely_recalled and not lease.fault.startswith("recalled"):
            raise self.finding(13, job.id, "is given to be sent, though a person cancelled it")
        if now_ms < job.due_ms and not lease.fault.startswith("recalled"):
            raise self.finding(9, job.id, f"is given {job.due_ms - now_ms} ms before it is due")
        if lease.deadline_at_ms < job.deadline_ms:
            short_ms = job.deadline_ms - lease.deadline_at_ms
            raise self.finding(7, job.id, f"is given with a deadline that is {short_ms} ms shorter than asked for")

    def _losing(self, job: Job, now_ms: float) -> None:
        """Somebody else has the job, or nobody: the hold that there was must have run out."""
        hold, job.hold = job.hold, None
        if hold is None:
            return
        if now_ms < hold.ends_ms and not job.is_deleted:
            raise self.finding(4, job.id, f"loses a live lease, {hold.ends_ms - now_ms:.0f} ms left", hold.token)
        job.attempts += 1

    def renewed(self, job_id: str, token: str, ends_ms: float) -> None:
        """A beat prolonged a lease."""
        job = self.jobs.get(job_id)
        if job is not None and job.hold is not None and job.hold.token == token:
            job.hold.ends_ms = max(job.hold.ends_ms, ends_ms)
        elif job is not None and not job.is_deleted:
            raise self.finding(3, job_id, "is renewed under a lease that was lost", token)

    def not_renewed(self, job_id: str, token: str, now_ms: int) -> None:
        """A beat said that a lease is somebody else's by now."""
        job = self.jobs.get(job_id)
        if job is not None and job.hold is not None and job.hold.token == token:
            self._losing(job, now_ms)

    def completed(self, row: Row, answer: int, now_ms: int) -> None:
        """A holder ended its hold, and was told ``answer``, at ``now_ms`` or earlier."""
        lease = row.lease
        job = self.jobs.get(lease.id)
        if job is None:
            if answer != 0 and lease.id not in self.forgotten:
                raise self.finding(3, lease.id, "is unknown, but completed", answer)
            return
        if job.is_deleted:
            self._ended_without_hash(job, row, answer)
        elif job.hold is None or job.hold.token != lease.token:
            if answer not in (0, job.ended.get(lease.token, 0)):
                raise self.finding(3, job.id, "is completed under a lease that was lost", lease.token, answer)
        elif answer == 0:
            self._losing(job, now_ms)
        elif answer < 0:
            raise self.finding(1, job.id, "is said to be damaged", answer)
        else:
            job.hold = None
            job.ended[lease.token] = answer
            self._ended(job, row, answer)

    def _ended(self, job: Job, row: Row, answer: int) -> None:
        lease = row.lease
        if isinstance(row, Retry):
            job.due_ms, job.attempts = answer, len(row.attempts)
        elif isinstance(row, Release):
            job.attempts = job.attempts if row.attempts is None else len(row.attempts)
        else:
            kind = row.outcome.kind.value
            has_moved = kind in BY_DEADLINE and job.deadline_ms > lease.deadline_at_ms
            leaves_child = kind == "triggered" and job.cancels_child and not lease.cancels_child
            is_recalled = bool(row.requests) and (job.is_recalled or job.was_recalled)
            if row.requests and job.is_surely_recalled and answer != 2:
                raise self.finding(13, job.id, "makes requests, though a person cancelled it")
            if answer == 2 and (kind in BY_DEADLINE or leaves_child or is_recalled):
                job.attempts = len(row.outcome.attempts)
            elif answer == 2:
                raise self.finding(1, job.id, f"is not recorded as {kind}, which hangs on no later request")
            elif leaves_child:
                raise self.finding(7, job.id, "ends as triggered, though a child is to be cancelled")
            elif has_moved:
                raise self.finding(7, job.id, f"ends as {kind} by a deadline that has moved")
            else:
                self._settle(job, lease.run, kind)

    def _ended_without_hash(self, job: Job, row: Row, answer: int) -> None:
        if not isinstance(row, Done) or answer != 1:
            return
        kind = row.outcome.kind.value
        if job.outcomes.setdefault(row.lease.run, kind) != kind and not job.is_counted_anew:
            raise self.finding(2, job.id, f"run {row.lease.run} was deleted and has ended twice", kind)

    def _settle(self, job: Job, run: int, kind: str) -> None:
        if run in job.outcomes and not job.is_counted_anew:
            raise self.finding(2, job.id, f"run {run} ends twice", job.outcomes[run], kind)
        job.outcomes[run] = job.done = kind
        job.hold, job.attempts, job.due_ms = None, 0, 0
        job.left_failed = self.leaving[job.id] > 0
        job.is_recalled = job.is_surely_recalled = False
        if self.pointers.get(job.order) == job.id and kind not in FAILED:  # RQ may put a failed job back
            del self.pointers[job.order]

    # -- runs --

    def _run_is(self, job: Job, run: int, now_ms: int) -> None:
        if run == job.run or job.is_deleted:
            return
        if run != job.run + 1 or job.done not in FAILED or not job.left_failed:
            raise self.finding(6, job.id, f"is in run {run} that nobody asked for, after run {job.run}", job.done)
        self._start_run(job, now_ms)
        if not now_ms:  # nobody told when: of several that began since the last look, any may have been the first
            self._doubtful.add(job.order)

    def _start_run(self, job: Job, now_ms: int) -> None:
        job.run += 1
        job.done, job.attempts, job.due_ms = "", 0, 0
        job.left_failed = job.record_is_expired = False
        job.ended.clear()
        job.deadline_ms = now_ms + self._deadline_ms
        other = self.jobs.get(self.pointers.get(job.order, ""))
        if ":a:" in job.order and (other is None or not other.is_open):
            self.pointers[job.order] = job.id
            if other is not None and (other.left_failed or other.is_recalled or other.is_deleted):
                self._doubtful.add(job.order)

    def _known(self, job_id: str) -> Job:
        job = self.jobs.get(job_id)
        if job is None:
            raise self.finding(9, job_id, "comes back" if job_id in self.forgotten else "was not asked for")
        return job

    def rq_writes(self) -> None:
        """RQ may write a status over any job."""
        for job in self.jobs.values():
            job.is_surely_recalled = False

    # -- what stands in Redis --

    def recorded(self, outcome: Outcome) -> None:
        """The ledger has a new entry."""
        self.recorded_kinds[outcome.kind] += 1
        key, job = (outcome.id, outcome.run), self._known(outcome.id)
        if key in self.ledger and not job.is_counted_anew:
            raise self.finding(2, outcome.id, f"run {outcome.run} stands in the ledger twice", outcome.kind)
        self.ledger.add(key)
        self._listed(job, outcome)
        if job.outcomes.get(outcome.run) == outcome.kind.value:
            return
        if not job.is_deleted:
            raise self.finding(1, job.id, f"run {outcome.run} has an outcome of nobody", outcome.kind)
        self._settle(job, outcome.run, outcome.kind.value)

    def _listed(self, listing: Job, outcome: Outcome) -> None:
        """It names orders: their requests are on the queue from then on."""
        self._listings += 1
        for order in outcome.orders or ():
            order_key = CancelRequest(algo_id=order.algo_id, account=outcome.account or DEFAULT_ACCOUNT).order_key
            asked = Asked(-self._listings, order_key, True, listing.deadline_ms, listing.cancels_child)
            self.acknowledged(asked, order.id, 0).is_acknowledged = True

    def seen(self, seen: Seen, now_ms: int, *, is_in_rqs_hands: bool = False) -> None:
        """What stands in Redis; the ledger was read after that. ``is_in_rqs_hands``: a stock worker has popped the job
        and is not through with it, or died with it."""
        job = self._known(seen.id)
        if job.is_deleted or job.is_expired:
            return
        if not seen.exists:
            raise self.finding(1, job.id, "is gone", job.done)
        job.was_recalled = job.was_recalled or job.is_recalled or seen.status in ("canceled", "stopped")
        self._run_is(job, seen.run, 0)
        if job.hold is not None and seen.lease != job.hold.token:
            self._losing(job, now_ms)
        if job.done:
            self._is_over(job, seen, is_in_rqs_hands=is_in_rqs_hands)
        else:
            self._is_open(job, seen, now_ms)

    def leads_to(self, order: str, job_id: str) -> None:
        """Where the pointer of an order leads to; empty: there is none."""
        known = self.pointers.get(order, "")
        if job_id == known:
            return
        two = [self.jobs[one] for one in (job_id, known) if one in self.jobs]
        # Which of two open jobs it is hangs on what RQ called them when one of them began anew.
        may_be_either = any(job.was_recalled for job in two) and any(job.run > 1 for job in two)
        is_deleted = any(job.is_deleted for job in two)
        if not is_deleted and order not in self._doubtful and not may_be_either:
            raise self.finding(8, job_id or known, "is not the job that its order leads to", order, job_id, known)
        self._doubtful.discard(order)
        self.pointers.pop(order, None)
        if job_id:
            self.pointers[order] = job_id

    def _is_over(self, job: Job, seen: Seen, *, is_in_rqs_hands: bool) -> None:
        if seen.done != job.done:
            raise self.finding(1, job.id, f"has ended as {job.done}, its field says so", repr(seen.done))
        if seen.lease or seen.open_at or seen.attempts or seen.due_ms:
            raise self.finding(3, job.id, "has ended, but keeps parts of a hold", seen)
        if seen.score is not None:
            raise self.finding(10, job.id, "has ended, but stands in the index", seen.score)
        if not seen.has_record and not job.record_is_expired:
            raise self.finding(1, job.id, "has ended, but has no record")
        if seen.ttl < 0 and not is_in_rqs_hands:
            raise self.finding(12, job.id, "has ended, but stays for ever", seen.status)

    def _is_open(self, job: Job, seen: Seen, now_ms: int) -> None:
        if seen.done:
            raise self.finding(1, job.id, "has an end without an outcome", seen.done)
        if seen.has_record and (job.run == 1 or seen.lease):  # that of the run before stands until the claim
            raise self.finding(1, job.id, f"run {job.run} goes on beside a record")
        if seen.score is None:
            raise self.finding(10, job.id, "goes on, but stands nowhere in the index", seen.status)
        band = next(band for band in (Band.RETRY, Band.WAITING, Band.HELD) if seen.score >= band)
        if seen.lease:
            right = band is Band.HELD
        elif seen.due_ms:  # a stock worker that pops it during a pause puts it off to the end of that
            right = seen.score >= Band.RETRY + seen.due_ms
        else:  # RQ's own retries stand there as RQ scheduled them
            right = band is Band.WAITING or Band.RETRY <= seen.score < Band.RETRY + now_ms + RQ_WAIT_MS
        if not right:
            raise self.finding(10, job.id, f"stands in the index as {band.name} at {seen.score:.0f}", seen)
