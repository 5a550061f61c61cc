-- How a hold ends: what is written of a job at its outcome, its retry, its release. Each end is a row of twelve words in
-- ARGV; the first word of all is the holder's name.
--       what (done, retry, release), id, lease, run, then
--       done     record, kind, result (base64), deadline it was decided by in ms (empty: the decision does not hang on
--                the deadline), attempts, pin, whether it leaves a triggered order's child alone (1 or empty), what
--                it adds to the counts: positions, each followed by a number
--       retry    attempts, pin, delay in ms, five unused
--       release  attempts (empty: as they were), pin, six unused
local ROW = 12
-- What all rows of a group say of one key is written at the end, with one call.
local out = {entries = {}, ended = {}, indexed = {}, scheduled = {}, finished = {}, failed = {}, unfailed = {}, over = {},
  front = {}, counted = {}, stamp = now.stamp(), ended_at = now.seconds(now.ms)}

-- In the job's hash: the end of the hold, and the answer for a repeat of its row. What a person took back stays so.
function job.end_hold(key, s, answer, attempts, pin, status)
  redis.call('HDEL', key, 'c_lease', 'c_open_at_ms', 'c_due_at_ms')
  redis.call('HSET', key, 'c_ended', s.lease .. ' ' .. answer, 'status', job.is_recalled(s) and s.status or status)
  if attempts ~= '' then redis.call('HSET', key, 'c_attempts', attempts) end
  if pin ~= '' then redis.call('HSET', key, 'c_pin', pin) end
end

function job.to_front(id)
  out.indexed[#out.indexed + 1] = text(WAITING_BAND + now.ms)
  out.indexed[#out.indexed + 1] = id
  out.front[#out.front + 1] = id
end

-- A ledger that takes no entry any more (its last id is the largest there is) is set aside like any damaged key.
function job.enter(record)
  local said = redis.pcall('XADD', OUTCOMES, 'MAXLEN', '~', LEDGER_MAXLEN, '*', 'outcome', record)
  if type(said) == 'table' and said.err then
    if not string.find(said.err, 'NOPERM', 1, true) then put_aside(OUTCOMES) end
    redis.call('XADD', OUTCOMES, '*', 'outcome', record)
  end
end

-- The ledger first: it is what a user may have no right to, and then nothing of the row is written.
-- A pointer to a job that has failed stays: should RQ put it back, the next request for its order finds it.
function job.record(id, order, i)
  local record, kind = ARGV[i + 4], ARGV[i + 5]
  job.enter(record)
  redis.call('SET', OUTCOME_PREFIX .. id, record, 'EX', OUTCOME_TTL_S)
  out.ended[#out.ended + 1] = id
  for position, number in string.gmatch(ARGV[i + 11], '(%d+) (%d+)') do
    out.counted[position] = (out.counted[position] or 0) + number
  end
  if not order or #order > 200 or (FAILED_KINDS[kind] and job.is_shared(order)) then return end
  if job.pointed_to(order) == id then out.over[#out.over + 1] = ORDER_PREFIX .. order end
end

-- What RQ leaves behind a job that has ended, but for a dependent, webhook or callback: a cancel job has none.
function job.as_rq_does(id, lease, began_at, is_failed, result)
  local life_s = is_failed and FAILURE_TTL_S or RESULT_TTL_S
  local results, registry = RESULT_PREFIX .. id, is_failed and out.failed or out.finished
  redis.call('EXPIRE', JOB_PREFIX .. id, life_s)
  redis.pcall('XADD', results, 'MAXLEN', '10', '*', 'type', is_failed and '2' or '1', 'worker_name', ARGV[1],
    is_failed and 'exc_string' or 'return_value', result, 'execution_id', lease,
    'execution_started_at', began_at, 'execution_ended_at', out.ended_at)
  redis.call('EXPIRE', results, life_s)
  registry[#registry + 1] = text(now.s + life_s)
  registry[#registry + 1] = id
  if not is_failed then out.unfailed[#out.unfailed + 1] = id end -- RQ fails the job of a horse that was killed
end

-- While it was decided that the deadline had passed, or that a child is only told of, another strategy may have asked
-- for the same order.
function job.has_moved(id, decided_by_ms, leaves_child)
  if decided_by_ms == '' and leaves_child == '' then return false end
  local s = job.read(id)
  if leaves_child == '1' and s.cancels_child then return true end
  return decided_by_ms ~= '' and job.deadline_of(s) > tonumber(decided_by_ms)
end

function job.done(id, key, s, i)
  if job.has_moved(id, ARGV[i + 7], ARGV[i + 10]) then
    job.end_hold(key, s, '2', ARGV[i + 8], ARGV[i + 9], 'queued')
    job.to_front(id)
    return '2'
  end
  local kind = ARGV[i + 5]
  local is_failed = FAILED_KINDS[kind]
  job.record(id, s.order, i)
  redis.call('HDEL', key, 'c_lease', 'c_open_at_ms', 'c_due_at_ms', 'c_attempts')
  redis.call('HSET', key, 'c_ended', s.lease .. ' 1', 'c_done', kind, 'status', is_failed and 'failed' or 'finished',
    'ended_at', out.stamp, 'last_heartbeat', out.stamp)
  job.as_rq_does(id, s.lease, now.seconds(job.whole(s.open_at) or now.ms), is_failed, ARGV[i + 6])
  return '1'
end

function job.retry(id, key, s, i)
  local due_ms = now.ms + tonumber(ARGV[i + 6])
  local due = text(due_ms)
  job.end_hold(key, s, due, ARGV[i + 4], ARGV[i + 5], 'scheduled')
  redis.call('HSET', key, 'c_due_at_ms', due)
  redis.pcall('HINCRBY', key, 'number_of_retries', '1') -- RQ's field, and not worth an outcome
  out.indexed[#out.indexed + 1] = text(RETRY_BAND + due_ms)
  out.indexed[#out.indexed + 1] = id
  out.scheduled[#out.scheduled + 1] = now.seconds(due_ms)
  out.scheduled[#out.scheduled + 1] = id
  return due
end

-- Without its hash (somebody deleted it) a held job still has its end, once: as long as the index knows the hold.
function job.answer_without_hash(what, id, i)
  if what ~= 'done' then return '0' end
  local before = redis.pcall('GET', OUTCOME_PREFIX .. id)
  if before then return before == ARGV[i + 4] and '1' or '0' end
  local ends_ms = tonumber(on('ZSCORE', UNFINISHED, id) or '')
  return (not ends_ms or ends_ms >= WAITING_BAND) and '0' or nil
end

-- The answer to a row that changes nothing: its hold has ended, by this row or by another. Else nil and the job's state.
function job.answered(what, id, i)
  local lease, run = ARGV[i + 2], ARGV[i + 3]
  local f = redis.pcall('HMGET', JOB_PREFIX .. id, 'c_lease', 'c_run', 'c_ended', 'c_order', 'c_open_at_ms', 'status')
  if f.err or not (f[1] or f[3] or f[6]) then return job.answer_without_hash(what, id, i) end
  if f[1] ~= lease or (f[2] or '1') ~= run then
    local last = f[3] or ''
    return string.sub(last, 1, #lease + 1) == lease .. ' ' and string.sub(last, #lease + 2) or '0'
  end
  return nil, {lease = lease, order = f[4], open_at = f[5], status = f[6]}
end

function job.complete(what, id, i)
  local answer, s = job.answered(what, id, i)
  if answer then return answer end
  if not s then
    job.record(id, nil, i)
    return '1'
  end
  local key = JOB_PREFIX .. id
  if s.status == 'scheduled' then on('ZREM', SCHEDULED, id) end -- by RQ: a stock worker popped a second entry
  if what == 'done' then return job.done(id, key, s, i) end
  if what == 'retry' then return job.retry(id, key, s, i) end
  job.end_hold(key, s, '1', ARGV[i + 4], ARGV[i + 5], 'queued')
  job.to_front(id)
  return '1'
end

-- An entry of RQ's goes with its lease, whoever ended that: first of all a write that needs no room.
function job.first_of_ends(last)
  for i = 2, last, ROW do out.entries[#out.entries + 1] = ARGV[i + 1] .. ':' .. ARGV[i + 2] end
  write('ZREM', STARTED, out.entries)
end

-- The group's part of the counts, as changes of the numbers from a position on.
function job.changes(base, sign)
  local changes = {}
  for position, number in pairs(out.counted) do
    local n = #changes
    changes[n + 1], changes[n + 2], changes[n + 3] = 'INCRBY', 'i64', '#' .. base + position
    changes[n + 4] = text(sign * number)
  end
  return unpack(changes)
end

-- One command counts the group. The first group of a minute also keeps what the counts were before it, in the place of
-- the minute that leaves the ring.
function job.count()
  if #out.ended == 0 then return end
  local minute = math.floor(now.s / 60)
  local was = on('BITFIELD', COUNTS, 'OVERFLOW', 'SAT', 'GET', 'i64', '#0', job.changes(0, 1))[1]
  if was == minute or was == minute + 1 then return end -- a server that took over may be a moment behind
  if minute < was then on('DEL', MINUTES) end -- the clock was ahead: what it dated later would be believed one day
  local place = minute % MINUTES_KEPT * POSITIONS
  local begins_ms = was == 0 and now.text or '0'
  redis.call('BITFIELD', COUNTS, 'SET', 'i64', '#0', text(minute), 'INCRBY', 'i64', '#' .. SINCE, begins_ms)
  on('SETRANGE', MINUTES, 8 * POSITIONS * MINUTES_KEPT, '0') -- grown bit by bit it would take twice the room
  redis.call('SETRANGE', MINUTES, text(8 * place), redis.call('GETRANGE', COUNTS, '0', text(8 * POSITIONS - 1)))
  redis.call('BITFIELD', MINUTES, 'OVERFLOW', 'SAT', job.changes(place, -1))
  redis.call('EXPIRE', MINUTES, 60 * MINUTES_KEPT)
end

function job.write_ends()
  write('ZREM', UNFINISHED, out.ended)
  write('ZADD', UNFINISHED, out.indexed)
  write('ZADD', SCHEDULED, out.scheduled)
  write('ZADD', FINISHED, out.finished)
  write('ZADD', FAILED, out.failed)
  write('ZREM', FAILED, out.unfailed)
  if #out.over > 0 then redis.call('DEL', unpack(out.over)) end
  for i = #out.front, 1, -1 do on('LPUSH', WAITING, out.front[i]) end
  pcall(job.count) -- a user without these rights still ends jobs
end
