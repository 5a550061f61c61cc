-- Lease jobs to a holder: a worker of ours, as many as it has free slots; or a stock RQ worker, the one that it popped.
-- Runs when the BLMOVE before it in the same pipeline returns, so that waiting and claiming are one round trip.
-- ARGV  1 holder's name, 2 free slots, 3 prefix of its lease tokens, 4 number of the first one,
--       5 bring back what is due (1 or 0), 6 take lost leases (1 or 0), 7 look for what stands in no list (1 or 0),
--       8 when the asker stops waiting for the answer, in ms (0: not known), 9 id of the one job (absent: a worker asks)
-- Gives: now in ms, the gate's end in ms (0: open), suspended (1 or 0), names of keys that were set aside or entries
-- that were dropped, why the one job was not leased (empty: it was, or nobody asked for one; `settled`, `held`, `gone`,
-- `scheduled` and when it is due, `closed` and its deadline), then a row for each job:
-- id, lease, data, enqueued, deadline, run, attempts, pin, fault, when the order was first meant, whether a child is to be
-- cancelled (1 or empty).
local STEP = 100 -- entries of one kind brought back in one call: the server must not stand still
local SWEEP = 500 -- waiting jobs looked at in one call during a pause
local OVERLOOKED_MS = 5000 -- a job that waits so long while the queue is empty stands in no list
local OLD_STEP_MS = 60000 -- the time-out that the version before gave its jobs
local MAX_CLAIM_BYTES = 4194304 -- histories may be large, each within its bound: a claim ends behind so much
local RQ_GRACE_S = 3600 -- RQ's clean-up may take a job for abandoned only this long after its deadline
local slots, only = tonumber(ARGV[2]), ARGV[9]
local out = {number = tonumber(ARGV[4]), lease_ends = text(now.ms + LEASE_MS), dropped = 0, rows = {}, leases = {},
  started = {}, unscheduled = {}, bytes = 0}

function job.drop(what)
  if out.dropped < 20 then set_aside[#set_aside + 1] = string.sub(what, 1, MAX_ID_BYTES) end
  out.dropped = out.dropped + 1
end

function job.is_id(id)
  if #id > MAX_ID_BYTES then job.drop(id) end
  return #id <= MAX_ID_BYTES
end

-- Back to where any claim finds it, before all others. It waits since it was due, or since its lease ran out.
function job.to_front(id, since_ms)
  on('ZADD', UNFINISHED, text(WAITING_BAND + math.max(since_ms, 0)), id)
  on('LPUSH', WAITING, id)
end

function job.note_lost_attempt(id, began_ms)
  local key = JOB_PREFIX .. id
  local length = redis.call('HSTRLEN', key, 'c_attempts')
  if length > MAX_ATTEMPTS_BYTES then return end -- its reader takes it for a doubt as it is
  local before = length > 0 and redis.call('HGET', key, 'c_attempts') .. ',' or ''
  -- From the beginning: else a text without a number would be gone through again from each of its letters.
  local n = tonumber(string.match(before, '^.*"n":(%d+)') or '0') + 1
  redis.call('HSET', key, 'c_attempts', before .. string.format('{"n":%d,"at_ms":%s,"call":"cancel","http":null,' ..
    '"code":null,"msg":"worker lost","verdict":"unclear","ms":%s}', n, text(began_ms),
    text(math.max(now.ms - began_ms, 0))))
end

-- The holder of an expired lease is dead, paused or cut off. What it had begun may have been sent.
function job.lose(id, s)
  redis.call('HDEL', JOB_PREFIX .. id, 'c_lease', 'c_open_at_ms')
  on('ZREM', STARTED, id .. ':' .. s.lease)
  if not s.done then job.note_lost_attempt(id, tonumber(s.open_at) or now.ms) end
  s.lease, s.open_at = nil, nil
end

function job.bring_back_lost()
  local due = on('ZRANGEBYSCORE', UNFINISHED, '-inf', now.text, 'WITHSCORES', 'LIMIT', '0', STEP)
  if #due > 0 then job.first_write() end
  for i = #due - 1, 1, -2 do
    local id = due[i]
    local s = job.is_id(id) and job.read(id)
    if s and s.lease then job.lose(id, s) end
    if s and not s.done then
      redis.call('HSET', JOB_PREFIX .. id, 'status', job.is_recalled(s) and s.status or 'queued')
      job.to_front(id, tonumber(due[i + 1]))
    else
      on('ZREM', UNFINISHED, id)
    end
  end
end

function job.bring_back_due()
  local due = on('ZRANGEBYSCORE', UNFINISHED, text(RETRY_BAND), text(RETRY_BAND + now.ms), 'WITHSCORES',
    'LIMIT', '0', STEP)
  for i = #due - 1, 1, -2 do
    local id = due[i]
    local s = job.is_id(id) and job.read(id)
    on('ZREM', SCHEDULED, id)
    if s and s.lease and not s.done then
      on('ZADD', UNFINISHED, out.lease_ends, id)
    elseif s and not s.done then
      redis.call('HDEL', JOB_PREFIX .. id, 'c_due_at_ms')
      if not job.is_recalled(s) then redis.call('HSET', JOB_PREFIX .. id, 'status', 'queued') end
      job.to_front(id, tonumber(due[i + 1]) - RETRY_BAND)
    else
      on('ZREM', UNFINISHED, id)
    end
  end
end

-- Whether somebody has the job in hand. The end of a lease stands in the index; one that is missing there begins anew.
function job.is_held(id, s)
  if not s.lease then return false end
  local ends_ms = tonumber(on('ZSCORE', UNFINISHED, id) or '')
  if ends_ms and ends_ms < WAITING_BAND then return ends_ms > now.ms end
  on('ZADD', UNFINISHED, out.lease_ends, id)
  return true
end

-- Whether a job may be leased now, and its state; else why not. An entry of a list is a hint: the job alone tells.
function job.free_state(id)
  local s = job.read(id)
  if not s or (s.done and not job.is_requeued(id, s)) then
    on('ZREM', UNFINISHED, id)
    if s then job.put_right(id, s) end
    return nil, s and 'settled' or 'gone'
  end
  if s.done then
    job.start_run(id, s)
    s = job.read(id)
  end
  if job.is_held(id, s) then return nil, 'held' end
  if s.lease then
    if ARGV[6] ~= '1' then return nil, 'held' end
    job.lose(id, s)
    on('ZADD', UNFINISHED, text(WAITING_BAND + now.ms), id) -- during a pause nobody may take it at once
  elseif s.open_at then
    -- A stock worker of the version before began it; it took no lease, and is at it for as long as RQ lets it.
    local ends_ms = tonumber(s.open_at) + OLD_STEP_MS
    if s.status == 'started' and ends_ms > now.ms and ends_ms <= now.ms + OLD_STEP_MS then
      on('ZADD', UNFINISHED, text(ends_ms), id)
      return nil, 'held'
    end
    job.note_lost_attempt(id, tonumber(s.open_at))
  end
  local due_ms = (s.due_at or s.status == 'scheduled') and job.due_at(id, s)
  if due_ms and due_ms > now.ms and not job.is_recalled(s) then
    on('ZADD', UNFINISHED, text(RETRY_BAND + due_ms), id)
    return nil, 'scheduled ' .. text(due_ms)
  end
  return s
end

-- What may be too large is measured before it is read.
function job.bounded(key, field, most)
  local length = redis.call('HSTRLEN', key, field)
  if length > most then return nil end
  return length > 0 and redis.call('HGET', key, field) or ''
end

local TOO_LARGE = '?' -- stands for a history that is not read: a doubt, whatever else is wrong with the job

function job.fault_of(s, data, pin)
  if job.is_recalled(s) then return 'recalled ' .. s.status end
  if s.damaged then return 'number ' .. s.damaged[1] end
  if not data then return 'size data' end
  return pin and '' or 'size c_pin'
end

-- What the request lacks, or has too much of, before it is leased.
function job.put_in_order(key, id, s)
  if s.damaged then redis.call('HDEL', key, unpack(s.damaged)) end
  if job.is_recalled(s) then on('ZREM', CANCELED, id) end
  if s.due_at then redis.call('HDEL', key, 'c_due_at_ms') end
  if s.due_at or s.status == 'scheduled' then out.unscheduled[#out.unscheduled + 1] = id end
  if not s.enqueued_at then
    s.enqueued_at = now.text
    redis.call('HSET', key, 'c_enqueued_at_ms', now.text)
    if not s.asked_at and not s.deadline_at then redis.call('HSET', key, 'c_asked_at_ms', now.text) end
  end
end

function job.lease(id, s, deadline_ms)
  local key, token = JOB_PREFIX .. id, ARGV[3] .. text(out.number)
  local run = text(s.run or '1') -- as its holder will write it: somebody may have put zeros before it
  out.number, out.stamp = out.number + 1, out.stamp or now.stamp()
  redis.call('PERSIST', key)
  if run ~= '1' then redis.call('DEL', OUTCOME_PREFIX .. id) end -- it is of the run before
  job.put_in_order(key, id, s)
  -- The attempt is noted before it is sent: should nobody come back with its answer, it counts as perhaps done.
  local status = job.is_recalled(s) and s.status or 'started'
  redis.call('HSET', key, 'status', status, 'started_at', out.stamp, 'last_heartbeat', out.stamp,
    'worker_name', ARGV[1], 'c_lease', token, 'c_open_at_ms', now.text, 'c_run', run)
  local n = #out.leases
  out.leases[n + 1], out.leases[n + 2] = out.lease_ends, id
  if not only then -- RQ has made its own entry for a stock worker
    out.started[n + 1] = text(math.ceil(math.max(deadline_ms, now.ms) / 1000) + RQ_GRACE_S)
    out.started[n + 2] = id .. ':' .. token
  end
  local data, attempts = job.bounded(key, 'data', MAX_DATA_BYTES), job.bounded(key, 'c_attempts', MAX_ATTEMPTS_BYTES)
  local pin = job.bounded(key, 'c_pin', MAX_DATA_BYTES)
  return {id, token, data or '', s.enqueued_at, text(deadline_ms), run, attempts or TOO_LARGE, pin or '',
    job.fault_of(s, data, pin), s.meant_at or s.enqueued_at, s.cancels_child and '1' or ''}
end

function job.try(id, only_overdue)
  local s, why = job.free_state(id)
  if not s then return why end
  local deadline_ms = job.deadline_of(s)
  if only_overdue and now.ms < deadline_ms and not job.is_recalled(s) then return 'closed ' .. text(deadline_ms) end
  local row = job.lease(id, s, deadline_ms)
  out.rows[#out.rows + 1], out.bytes = row, out.bytes + #row[3] + #row[7]
  if out.bytes >= MAX_CLAIM_BYTES then slots = #out.rows end
  return ''
end

-- What is wrong with one job must not cost those that were taken off the list with it.
function job.try_safely(id, only_overdue)
  if not job.is_id(id) then
    on('ZREM', UNFINISHED, id)
    return 'gone'
  end
  local is_fine, why = pcall(job.try, id, only_overdue)
  if is_fine then return why end
  redis.pcall('HDEL', JOB_PREFIX .. id, 'c_lease', 'c_open_at_ms')
  job.drop(id)
  return 'gone'
end

-- Nothing may be sent; a request whose deadline has passed needs nothing sent. Each second another stretch of the
-- waiting jobs is looked through, so that a long queue is, too, before long.
function job.give_overdue()
  local first, last = text(WAITING_BAND), '(' .. text(RETRY_BAND)
  local stretches = math.ceil(on('ZCOUNT', UNFINISHED, first, last) / SWEEP)
  if stretches == 0 then return end
  job.first_write()
  local ids = on('ZRANGEBYSCORE', UNFINISHED, first, last, 'LIMIT', now.s % stretches * SWEEP, SWEEP)
  for _, id in ipairs(ids) do
    if #out.rows >= slots then return end
    -- Its entry goes with it, unless the queue is too long to look for one.
    if job.try_safely(id, true) == '' and on('LLEN', WAITING) <= 10 * SWEEP then on('LREM', WAITING, '1', id) end
  end
end

-- An id that a claim moved here before its own script ran (also one whose connection broke in between) is the first.
function job.moved()
  local ids = on('LRANGE', CLAIMING, '0', '-1')
  if #ids > 0 then redis.call('DEL', CLAIMING) end
  return ids
end

function job.give(moved)
  local looked = 0
  while true do
    for i, id in ipairs(moved) do
      if #out.rows >= slots then
        for n = #moved, i, -1 do on('LPUSH', WAITING, moved[n]) end
        return
      end
      job.try_safely(id, false)
    end
    looked = looked + #moved
    if #out.rows >= slots or looked >= slots + STEP then return end
    moved = on('LPOP', WAITING, slots - #out.rows)
    if not moved then return end
  end
end

-- Jobs that a crash or RQ took off every list: since when they wait is known.
function job.give_overlooked(share, waited_ms)
  local ids = on('ZRANGEBYSCORE', UNFINISHED, text(WAITING_BAND), text(WAITING_BAND + now.ms - waited_ms),
    'LIMIT', '0', share)
  if #ids > 0 then job.first_write() end
  for _, id in ipairs(ids) do
    if #out.rows >= slots then return end
    job.try_safely(id, false)
  end
end

-- RQ's popping says `started` of a job that waits for its next try.
function job.put_back_in_schedule(id)
  redis.call('HSET', JOB_PREFIX .. id, 'status', 'scheduled')
  on('ZADD', SCHEDULED, 'NX', now.seconds(job.due_at(id, job.read(id))), id)
end

local closed_until_ms, suspended, why = job.closed_until(), redis.call('EXISTS', SUSPENDED), ''
if only then
  job.first_write()
  why = job.try_safely(only, closed_until_ms > 0)
  if string.find(why, '^scheduled') then
    job.put_back_in_schedule(only)
  elseif string.find(why, '^closed') then -- popped, it stands in no list: it comes back when the pause ends
    local until_ms = math.min(closed_until_ms, tonumber(string.match(why, '%d+')))
    on('ZADD', UNFINISHED, text(RETRY_BAND + until_ms), only)
  end
else
  local moved, gives_up_at_ms = job.moved(), tonumber(ARGV[8])
  if gives_up_at_ms > 0 and now.ms >= gives_up_at_ms then
    -- After a pause of the server or the network this runs long after it was sent: what it gave, nobody would take.
    for i = #moved, 1, -1 do on('LPUSH', WAITING, moved[i]) end
  else
    local is_closed = closed_until_ms > 0 or suspended == 1
    if is_closed or ARGV[5] == '1' then
      for i = #moved, 1, -1 do on('LPUSH', WAITING, moved[i]) end -- what is brought back goes before it
      moved = {}
      job.bring_back_due()
      if ARGV[6] == '1' then job.bring_back_lost() end
    end
    if is_closed then
      job.give_overdue()
    else
      -- While the queue is never empty they get a part of the slots; else what is left.
      if ARGV[7] == '1' then job.give_overlooked(math.ceil(slots / 8), 6 * OVERLOOKED_MS) end
      job.give(moved)
      if ARGV[5] == '1' and #out.rows < slots then job.give_overlooked(slots - #out.rows, OVERLOOKED_MS) end
    end
  end
end
write('ZADD', UNFINISHED, out.leases)
write('ZADD', STARTED, out.started)
write('ZREM', SCHEDULED, out.unscheduled)
if only then -- where all workers are stock ones, nobody else does it
  job.bring_back_due()
  job.bring_back_lost()
end
return {now.text, text(closed_until_ms), suspended, set_aside, why, unpack(out.rows)}
