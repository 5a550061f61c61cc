"""Faults for the scripts, as a literal table: file, text, what stands there instead, and what that breaks."""

from __future__ import annotations

from dataclasses import dataclass

JOB, PLACE, RETRY = (f"producer/scripts/{name}.lua" for name in ("job", "place", "retry"))
COMMON, CLAIM, ENDING, SPREAD, BEAT, GATE, KEY, TIDY, WAKE = (
    f"worker/scripts/{name}.lua"
    for name in ("common", "claim", "ending", "spread", "beat", "gate", "key", "tidy", "wake")
)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault: in the file at ``path``, ``new`` stands where ``old`` did."""

    path: str
    old: str
    new: str
    breaks: str

    @property
    def name(self) -> str:
        """For people."""
        return self.path.rpartition("/")[2]

    def applied(self, text: str) -> str:
        """The file with the fault.

        Raises:
            ValueError: the text that it changes does not stand there, or more than once.
        """
        if text.count(self.old) != 1:
            raise ValueError(f"{self.path} has {text.count(self.old)} times: {self.old}")
        return text.replace(self.old, self.new)


MUTANTS = (
    # -- what every script knows --
    Mutant(JOB, " or s.status == 'stopped' end", " end", "a job that RQ stopped is sent for again"),
    Mutant(JOB, " and not on('ZSCORE', FAILED, id)", "", "a copy saved late starts a run"),
    Mutant(JOB, "text((s.run or 1) + 1)", "text(s.run or 1)", "a new run has the number of the last"),
    Mutant(JOB, "  redis.call('PERSIST', key)\n", "", "a new run runs out with the hash"),
    Mutant(
        JOB,
        "  on('ZADD', UNFINISHED, text(WAITING_BAND + now.ms), id)\n",
        "",
        "a new run stands nowhere in the index",
    ),
    Mutant(
        JOB,
        "if other == id or not job.is_open(other) then",
        "if true then",
        "a retry takes the pointer from an open job",
    ),
    Mutant(
        JOB,
        "if not s.run and not s.done and redis.call('EXISTS', OUTCOME_PREFIX .. id) == 1 then s.done = '1' end",
        "",
        "what RQ saves over a deleted hash runs again",
    ),
    # -- enqueueing --
    Mutant(PLACE, "if at_ms > tonumber(s.deadline_at", "if at_ms < tonumber(s.deadline_at", "a deadline gets shorter"),
    Mutant(
        PLACE,
        "    redis.call('HSET', key, 'c_asked_at_ms', now.text)\n",
        "    key = key\n",
        "a request that leaves its deadline to the worker does not move it",
    ),
    Mutant(PLACE, " or job.is_recalled(s) then", " then", "a job that a person cancelled is joined"),
    Mutant(PLACE, "(order and s.order ~= order)", "false", "a pointer to the job of another order is followed"),
    Mutant(
        PLACE,
        "if not job.is_requeued(id, s) then return false end",
        "if s.done == nil then return false end",
        "a job that has ended is joined",
    ),
    Mutant(PLACE, "      on('RPUSH', WAITING, id)\n", "      id = id\n", "a join does not see to the job's place"),
    Mutant(
        PLACE,
        "  if #placed.indexed > 0 then on('ZADD', UNFINISHED, unpack(placed.indexed)) end\n",
        "",
        "a new job stands nowhere in the index",
    ),
    Mutant(
        PLACE,
        "    redis.call('SET', ORDER_PREFIX .. pointer[1], pointer[2], 'EX', POINTER_LIFE_S)\n",
        "",
        "no order leads to its job",
    ),
    Mutant(
        PLACE,
        "redis.call('EXISTS', JOB_PREFIX .. id, OUTCOME_PREFIX .. id)",
        "redis.call('EXISTS', JOB_PREFIX .. id)",
        "words that are sent again after the job's end make it anew",
    ),
    Mutant(
        RETRY,
        "s and (not s.done or FAILED_KINDS[job.kind_of(id, s)])",
        "s",
        "what ended well is retried where RQ calls it failed",
    ),
    Mutant(RETRY, "  if s.done then\n", "  if s then\n", "a retry starts a run of a job that has not ended"),
    # -- claiming --
    Mutant(
        CLAIM,
        "  if not s.done then job.note_lost_attempt(id, tonumber(s.open_at) or now.ms) end\n",
        "",
        "a lost lease leaves no doubt",
    ),
    Mutant(
        CLAIM,
        "  redis.call('HDEL', JOB_PREFIX .. id, 'c_lease', 'c_open_at_ms')\n  on('ZREM', STARTED",
        "  on('ZREM', STARTED",
        "a lost lease is not cleared",
    ),
    Mutant(CLAIM, "  on('ZREM', STARTED, id .. ':' .. s.lease)\n", "", "RQ shows a lost hold as being worked on"),
    Mutant(
        CLAIM,
        "redis.call('HSET', JOB_PREFIX .. id, 'status', job.is_recalled(s) and s.status or 'queued')",
        "redis.call('HSET', JOB_PREFIX .. id, 'status', 'queued')",
        "a dead holder makes a cancelled job go on",
    ),
    Mutant(
        CLAIM,
        "text(RETRY_BAND + now.ms), 'WITHSCORES'",
        "text(RETRY_BAND + now.ms + 100000), 'WITHSCORES'",
        "retries come before they are due",
    ),
    Mutant(
        CLAIM, "then return ends_ms > now.ms end", "then return false end", "a live lease is given to somebody else"
    ),
    Mutant(
        CLAIM,
        "(s.done and not job.is_requeued(id, s))",
        "(s.done and s.status == 'finished')",
        "a job that has failed runs again by itself",
    ),
    Mutant(CLAIM, "    if s then job.put_right(id, s) end\n", "", "what RQ popped after its end stays for ever"),
    Mutant(
        CLAIM,
        "if due_ms and due_ms > now.ms and not job.is_recalled(s) then",
        "if due_ms == 0 then",
        "an entry of a list takes a job's backoff",
    ),
    Mutant(CLAIM, "  redis.call('PERSIST', key)\n", "", "a job in hand runs out"),
    Mutant(TIDY, "for _, id in ipairs(endless) do", "for _, id in ipairs({}) do", "a lease that was forged never ends"),
    Mutant(
        CLAIM,
        "  if run ~= '1' then redis.call('DEL', OUTCOME_PREFIX .. id) end -- it is of the run before\n",
        "",
        "a new run goes on beside the record of the last",
    ),
    Mutant(
        CLAIM,
        "local status = job.is_recalled(s) and s.status or 'started'",
        "local status = 'started'",
        "a job that a person cancelled goes on when its holder dies",
    ),
    Mutant(
        CLAIM,
        "  if job.is_recalled(s) then return 'recalled ' .. s.status end\n",
        "",
        "a job that a person cancelled is sent for",
    ),
    Mutant(
        CLAIM,
        "= out.lease_ends, id\n",
        "= text(WAITING_BAND + now.ms), id\n",
        "a held job stands among the waiting ones",
    ),
    Mutant(CLAIM, "if only_overdue and now.ms < deadline_ms", "if only_overdue and false", "a closed gate is ignored"),
    Mutant(
        CLAIM,
        "redis.call('DEL', CLAIMING) end\n  return ids",
        "redis.call('DEL', CLAIMING) end\n  return {}",
        "moved ids are lost",
    ),
    Mutant(
        CLAIM,
        "if ARGV[5] == '1' and #out.rows < slots then job.give_overlooked(slots - #out.rows, OVERLOOKED_MS) end",
        "",
        "what fell off the list is never given",
    ),
    Mutant(COMMON, "return math.max(by_default,", "return math.min(by_default,", "the earlier deadline holds"),
    # -- completing --
    Mutant(
        ENDING,
        "if f[1] ~= lease or (f[2] or '1') ~= run then",
        "if (f[2] or '1') ~= run then",
        "a completion under a lost lease counts",
    ),
    Mutant(
        ENDING,
        "if f[1] ~= lease or (f[2] or '1') ~= run then",
        "if f[1] ~= lease then",
        "a completion of another run counts",
    ),
    Mutant(
        ENDING,
        "  redis.call('HSET', key, 'c_ended', s.lease .. ' ' .. answer, 'status',",
        "  redis.call('HSET', key, 'status',",
        "a repeated row is not answered alike",
    ),
    Mutant(
        ENDING,
        "  redis.call('HDEL', key, 'c_lease', 'c_open_at_ms', 'c_due_at_ms')\n",
        "  redis.call('HDEL', key, 'c_open_at_ms', 'c_due_at_ms')\n",
        "a retry or a release leaves the lease",
    ),
    Mutant(
        ENDING,
        "  if attempts ~= '' then redis.call('HSET', key, 'c_attempts', attempts) end\n",
        "",
        "attempts are forgotten",
    ),
    Mutant(ENDING, "(out.counted[position] or 0) + number", "number", "a group is counted as one outcome"),
    Mutant(ENDING, "  pcall(job.count)", "  out = out", "no outcome is counted"),
    Mutant(
        ENDING,
        "  redis.call('BITFIELD', MINUTES",
        "  (function() end)('BITFIELD', MINUTES",
        "a minute lacks its first group",
    ),
    Mutant(ENDING, " or was == minute + 1 then return", " then return", "a clock that is behind begins a minute again"),
    Mutant(ENDING, "'c_done', kind, ", "", "a job does not know that it has ended"),
    Mutant(
        ENDING,
        "job.deadline_of(s) > tonumber(decided_by_ms)",
        "job.deadline_of(s) < tonumber(decided_by_ms)",
        "a job ends by a deadline that has moved",
    ),
    Mutant(
        ENDING,
        "if leaves_child == '1' and s.cancels_child then return true end",
        "",
        "a child is left alone though a later request wants it cancelled",
    ),
    Mutant(ENDING, "  job.enter(record)\n", "", "outcomes are missing in the ledger"),
    Mutant(
        ENDING,
        "  if job.pointed_to(order) == id then out.over[#out.over + 1] = ORDER_PREFIX .. order end\n",
        "",
        "an order leads to a job that has ended well",
    ),
    Mutant(ENDING, "  redis.call('EXPIRE', JOB_PREFIX .. id, life_s)\n", "", "ended jobs stay for ever"),
    Mutant(ENDING, "  write('ZREM', UNFINISHED, out.ended)\n", "", "ended jobs stay in the index"),
    Mutant(ENDING, "text(RETRY_BAND + due_ms)", "text(WAITING_BAND + due_ms)", "retries stand among the waiting jobs"),
    Mutant(
        ENDING,
        "  if before then return before == ARGV[i + 4] and '1' or '0' end\n",
        "",
        "a deleted job ends twice",
    ),
    # -- completing a listing --
    Mutant(
        SPREAD, "  if answer then return answer end\n", "", "who lost a listing, or ended it, makes its requests again"
    ),
    Mutant(SPREAD, "job.first_of_ends(1 + ROW)\n", "", "RQ shows a listing that has ended as being worked on"),
    Mutant(SPREAD, "#ARGV, 7 do", "8 + ROW, 7 do", "of all requests of a listing the first is made"),
    Mutant(SPREAD, "= job.pointed_to(ARGV[i + 1])", "= nil", "a listed order gets a second open job"),
    Mutant(
        SPREAD, "  if other and not string.find(other, '^[%w_-]+$') then other = nil end\n", "", "an odd id is recorded"
    ),
    Mutant(SPREAD, "    carried[ARGV[i]] = job.place", "    job.place", "a record names a job that was not made"),
    Mutant(SPREAD, "if s and job.is_recalled(s) then", "if false then", "a listing goes on that a person cancelled"),
    Mutant(SPREAD, "    job.to_front(id)\n", "", "a listing that a person cancelled stands nowhere"),
    Mutant(SPREAD, "ARGV[10], ARGV[11]", "'', ''", "a listing that a person cancelled forgets its attempts"),
    Mutant(SPREAD, "  job.write_placed()\n", "", "requests of a listing stand nowhere"),
    Mutant(SPREAD, "  if not is_fine then return '-1' end", "", "a listing ends without its requests"),
    Mutant(
        SPREAD, "  return job.complete('done', id, 2)\n", "  return '1'\n", "a listing makes requests and does not end"
    ),
    Mutant(SPREAD, "job.write_ends()\n", "", "a listing that has ended stays in the index"),
    Mutant(
        PLACE,
        "then return tonumber(string.sub(deadline, 2)) end",
        "then return now.ms + 1000 end",
        "requests of a listing do not have its deadline",
    ),
    Mutant(
        PLACE,
        "  if ARGV[i + 6] == '1' then redis.call('HSET', JOB_PREFIX .. id, 'c_on_trigger', 'cancel_child') end\n",
        "",
        "a new job does not know that a child is to be cancelled",
    ),
    # -- all else --
    Mutant(
        BEAT,
        "if redis.pcall('HGET', JOB_PREFIX .. ARGV[i], 'c_lease') == ARGV[i + 1] then",
        "if redis.pcall('HGET', JOB_PREFIX .. ARGV[i], 'c_lease') then",
        "a holder that lost its lease renews another's",
    ),
    Mutant(BEAT, "write('ZADD', UNFINISHED, leases)\n", "", "a beat prolongs nothing"),
    Mutant(GATE, "if until_ms > before then", "if true then", "a shorter pause ends a longer one"),
    Mutant(
        KEY,
        "    redis.call('HSET', JOB_PREFIX .. id, 'c_due_at_ms', now.text)\n",
        "",
        "what waited for its key waits on when it is accepted",
    ),
    Mutant(TIDY, "    redis.call('PERSIST', JOB_PREFIX .. id)\n", "", "a waiting job runs out when RQ was late"),
    Mutant(
        TIDY,
        "else job.put_right(id, s) end",
        "end",
        "what a stock worker died with after its end stays for ever",
    ),
    Mutant(WAKE, "f[1] == ARGV[i + 1] and ", "", "a retry that is due at another time by now is woken"),
    Mutant(WAKE, " and not f[2]", "", "a job in work is woken"),
    Mutant(
        WAKE,
        "    redis.call('HSET', key, 'c_due_at_ms', now.text)\n",
        "",
        "a woken job is put back to wait for its time",
    ),
)
