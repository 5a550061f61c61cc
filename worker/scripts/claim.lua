-- Lease jobs to a holder: a worker of ours, as many as it has free slots; or a stock RQ worker, the one that it popped.
-- Runs when the BLMOVE before it in the same pipeline returns, so that waiting and claiming are one round trip.
-- ARGV  1 holder's name, 2 free slots, 3 prefix of its lease tokens, 4 number of the first one,
--       5 take lost leases (1 or 0), 6 look for what stands in no list (1 or 0),
--       7 when the asker stops waiting for the answer, in ms (0: not known), 8 id of the one job (absent: a worker asks)
-- Gives: now in ms, the gate's end in ms (0: open), suspended (1 or 0), names of keys that were set aside or entries
-- that were dropped, why the one job was not leased (empty: it was, or nobody asked for one; `settled`, `held`, `gone`,
-- `scheduled` and when it is due, `closed` and its deadline), then a row for each job:
-- id, lease, data, enqueued, deadline, run, attempts, pin, fault, when the order was first meant.
local holder, slots, only = ARGV[1], tonumber(ARGV[2]), ARGV[8]
local STEP = 100 -- entries of one kind brought back in one call: the server must not stand still
local SWEEP = 500 -- waiting jobs looked at in one call during a pause
local OVERLOOKED_MS = 5000 -- a job that waits so long while the queue is empty stands in no list
local RQ_GRACE_S = 3600 -- RQ's clean-up may take a job for abandoned only this long after its deadline

local dropped = {}
local function drop(what) if #dropped < 20 then dropped[#dropped + 1] = string.sub(what, 1, MAX_ID_BYTES) end end

local function is_id(id)
  if #id > MAX_ID_BYTES then drop(id) end
  return #id <= MAX_ID_BYTES
end

own(WAITING, 'list')
own(CLAIMING, 'list')
own(UNFINISHED, 'zset')
own(SCHEDULED, 'zset')
own(STARTED, 'zset')
own(FAILED, 'zset')
first_write()

-- Back to where any claim finds it, before all others.
local function to_front(id)
  redis.call('ZADD', UNFINISHED, WAITING_BAND + now_ms, id)
  redis.call('LPUSH', WAITING, id)
end

-- An id that a claim moved here and could not take (its connection broke) goes back to the front.
local function empty_claiming()
  local ids = redis.call('LRANGE', CLAIMING, 0, -1)
  for i = #ids, 1, -1 do
    if #ids[i] <= MAX_ID_BYTES then redis.call('LPUSH', WAITING, ids[i]) else drop(ids[i]) end
  end
  if #ids > 0 then redis.call('DEL', CLAIMING) end
end

local function note_lost_attempt(id, began_ms)
  local job = JOB_PREFIX .. id
  local length = redis.call('HSTRLEN', job, 'c_attempts')
  if length > MAX_ATTEMPTS_BYTES then return end -- its reader takes it for a doubt as it is
  local before = length > 0 and redis.call('HGET', job, 'c_attempts') .. ',' or ''
  local n = tonumber(string.match(before, '.*"n":(%d+)') or '0') + 1
  redis.call('HSET', job, 'c_attempts', before .. string.format('{"n":%d,"at_ms":%s,"call":"cancel","http":null,' ..
    '"code":null,"msg":"worker lost","verdict":"unclear","ms":%s}', n, text(began_ms),
    text(math.max(now_ms - began_ms, 0))))
end

-- The holder of an expired lease is dead, paused or cut off. What it had begun may have been sent.
local function lose(id, s)
  redis.call('HDEL', JOB_PREFIX .. id, 'c_lease', 'c_open_at_ms')
  redis.call('ZREM', STARTED, id .. ':' .. s.lease)
  if not s.done then note_lost_attempt(id, tonumber(s.open_at) or now_ms) end
  s.lease, s.open_at = nil, nil
end

local function bring_back_lost()
  local ids = redis.call('ZRANGEBYSCORE', UNFINISHED, '-inf', text(now_ms), 'LIMIT', 0, STEP)
  for i = #ids, 1, -1 do
    local id = ids[i]
    local s = is_id(id) and read(id)
    if s and s.lease then lose(id, s) end
    if s and not s.done then
      redis.call('HSET', JOB_PREFIX .. id, 'status', is_recalled(s) and s.status or 'queued')
      to_front(id)
    else
      redis.call('ZREM', UNFINISHED, id)
    end
  end
end

local function bring_back_due()
  local ids = redis.call('ZRANGEBYSCORE', UNFINISHED, RETRY_BAND, RETRY_BAND + now_ms, 'LIMIT', 0, STEP)
  for i = #ids, 1, -1 do
    local id = ids[i]
    local s = is_id(id) and read(id)
    redis.call('ZREM', SCHEDULED, id)
    if not s or s.done then
      redis.call('ZREM', UNFINISHED, id)
    elseif s.lease then
      redis.call('ZADD', UNFINISHED, now_ms + LEASE_MS, id)
    else
      if not is_recalled(s) then redis.call('HSET', JOB_PREFIX .. id, 'status', 'queued') end
      redis.call('HDEL', JOB_PREFIX .. id, 'c_due_at_ms')
      to_front(id)
    end
  end
end

-- Whether somebody has the job in hand. The end of a lease stands in the index; one that is missing there begins anew.
local function is_held(id, s)
  if not s.lease then return false end
  local ends_ms = tonumber(redis.call('ZSCORE', UNFINISHED, id) or '')
  if ends_ms and ends_ms < WAITING_BAND then return ends_ms > now_ms end
  redis.call('ZADD', UNFINISHED, now_ms + LEASE_MS, id)
  return true
end

-- Whether a job may be leased now, and its state; else why not. An entry of a list is a hint: the job alone tells.
local function free_state(id)
  local s = read(id)
  if not s then
    redis.call('ZREM', UNFINISHED, id)
    return nil, 'gone'
  end
  if s.done then
    if not is_requeued(id, s) then
      redis.call('ZREM', UNFINISHED, id)
      return nil, 'settled'
    end
    start_run(id, s)
    local damaged = s.damaged
    s = read(id)
    s.damaged = damaged
  end
  if is_held(id, s) then return nil, 'held' end
  if s.lease then
    if ARGV[5] ~= '1' then return nil, 'held' end
    lose(id, s)
  elseif s.open_at then
    note_lost_attempt(id, tonumber(s.open_at)) -- a stock worker of the version before began it
  end
  local due_ms = due_at(id, s)
  if due_ms and due_ms > now_ms and not is_recalled(s) then
    redis.call('ZADD', UNFINISHED, RETRY_BAND + due_ms, id)
    return nil, 'scheduled ' .. text(due_ms)
  end
  return s
end

-- What may be too large is measured before it is read.
local function bounded(job, field, most)
  if redis.call('HSTRLEN', job, field) > most then return nil end
  return redis.call('HGET', job, field) or ''
end

local function fault_of(s, data, attempts, pin)
  if is_recalled(s) then return 'recalled ' .. s.status end
  if s.damaged then return 'number ' .. s.damaged[1] end
  if not data then return 'size data' end
  if not attempts then return 'size c_attempts' end
  return pin and '' or 'size c_pin'
end

local number, stamp = tonumber(ARGV[4]), rq_time()
local leases, started, unscheduled = {}, {}, {}
local function lease(id, s, deadline_ms)
  local job, token = JOB_PREFIX .. id, ARGV[3] .. text(number)
  number = number + 1
  if s.damaged then redis.call('HDEL', job, unpack(s.damaged)) end
  -- The attempt is noted before it is sent: should nobody come back with its answer, it counts as perhaps done.
  local new = {'status', 'started', 'started_at', stamp, 'last_heartbeat', stamp, 'worker_name', holder,
    'c_lease', token, 'c_open_at_ms', text(now_ms)}
  if not s.enqueued_at then
    s.enqueued_at = text(now_ms)
    add(new, 'c_enqueued_at_ms', s.enqueued_at)
    if not s.asked_at and not s.deadline_at then add(new, 'c_asked_at_ms', s.enqueued_at) end
  end
  if not s.run then add(new, 'c_run', '1') end
  redis.call('HSET', job, unpack(new))
  redis.call('PERSIST', job)
  if s.due_at then redis.call('HDEL', job, 'c_due_at_ms') end
  if s.due_at or s.status == 'scheduled' then add(unscheduled, id) end
  add(leases, now_ms + LEASE_MS, id)
  -- RQ has made its own entry for a stock worker.
  if not only then add(started, math.ceil(math.max(deadline_ms, now_ms) / 1000) + RQ_GRACE_S, id .. ':' .. token) end
  local data, attempts = bounded(job, 'data', MAX_DATA_BYTES), bounded(job, 'c_attempts', MAX_ATTEMPTS_BYTES)
  local pin = bounded(job, 'c_pin', MAX_DATA_BYTES)
  return {id, token, data or '', s.enqueued_at, text(deadline_ms), s.run or '1', attempts or '', pin or '',
    fault_of(s, data, attempts, pin), s.meant_at or s.enqueued_at}
end

local rows = {}
local function try_one(id, only_overdue)
  local s, why = free_state(id)
  if not s then return why end
  local deadline_ms = deadline_of(s)
  if only_overdue and now_ms < deadline_ms and not is_recalled(s) then return 'closed ' .. text(deadline_ms) end
  rows[#rows + 1] = lease(id, s, deadline_ms)
  return ''
end

-- What is wrong with one job must not cost those that were taken off the list with it.
local function try(id, only_overdue)
  if not is_id(id) then
    redis.call('ZREM', UNFINISHED, id)
    return 'gone'
  end
  local is_fine, why = pcall(try_one, id, only_overdue)
  if is_fine then return why end
  redis.pcall('HDEL', JOB_PREFIX .. id, 'c_lease', 'c_open_at_ms')
  drop(id)
  return 'gone'
end

-- Nothing may be sent; a request whose deadline has passed needs nothing sent. Each second another stretch of the
-- waiting jobs is looked through, so that a long queue is, too, before long.
local function give_overdue()
  local all = redis.call('ZCOUNT', UNFINISHED, WAITING_BAND, '(' .. text(RETRY_BAND))
  local stretches = math.ceil(all / SWEEP)
  if stretches == 0 then return end
  local first = math.floor(now_s) % stretches * SWEEP
  local ids = redis.call('ZRANGEBYSCORE', UNFINISHED, WAITING_BAND, '(' .. text(RETRY_BAND), 'LIMIT', first, SWEEP)
  for _, id in ipairs(ids) do
    if #rows >= slots then return end
    -- Its entry goes with it, unless the queue is too long to look for one.
    if try(id, true) == '' and redis.call('LLEN', WAITING) <= 10 * SWEEP then redis.call('LREM', WAITING, 1, id) end
  end
end

local function give()
  local looked = 0
  while #rows < slots and looked < slots + STEP do
    local ids = redis.call('LPOP', WAITING, slots - #rows)
    if not ids then break end
    for _, id in ipairs(ids) do try(id, false) end
    looked = looked + #ids
  end
end

-- Jobs that a crash or RQ took off every list: since when they wait is known.
local function give_overlooked(share, waited_ms)
  local since = WAITING_BAND + now_ms - waited_ms
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', UNFINISHED, WAITING_BAND, since, 'LIMIT', 0, share)) do
    try(id, false)
  end
end

-- RQ's popping says `started` of a job that has ended, and that it never ends.
local function put_right(id, why)
  if why == 'settled' then
    local is_failed = FAILED_KINDS[kind_of(id, read(id))]
    local life_s = is_failed and FAILURE_TTL_S or RESULT_TTL_S
    redis.call('HSET', JOB_PREFIX .. id, 'status', is_failed and 'failed' or 'finished')
    redis.call('EXPIRE', JOB_PREFIX .. id, life_s)
    if not is_failed then own(FINISHED, 'zset') end
    redis.call('ZADD', is_failed and FAILED or FINISHED, 'NX', math.floor(now_s) + life_s, id)
  elseif string.find(why, '^scheduled') then
    redis.call('HSET', JOB_PREFIX .. id, 'status', 'scheduled')
    redis.call('ZADD', SCHEDULED, 'NX', string.format('%.6f', due_at(id, read(id)) / 1000), id)
  end
end

local closed_until_ms, suspended, why = closed_until(), redis.call('EXISTS', SUSPENDED), ''
if only then
  why = try(only, closed_until_ms > 0)
  put_right(only, why)
else
  empty_claiming()
  -- After a pause of the server or the network this may run long after it was sent: what it gave, nobody would take.
  local gives_up_at_ms = tonumber(ARGV[7])
  if gives_up_at_ms == 0 or now_ms < gives_up_at_ms then
    bring_back_due()
    if ARGV[5] == '1' then bring_back_lost() end
    if closed_until_ms > 0 or suspended == 1 then
      give_overdue()
    else
      -- While the queue is never empty they get a part of the slots; else what is left.
      if ARGV[6] == '1' then give_overlooked(math.ceil(slots / 8), 6 * OVERLOOKED_MS) end
      give()
      if #rows < slots then give_overlooked(slots - #rows, OVERLOOKED_MS) end
    end
  end
end
write('ZADD', UNFINISHED, leases)
write('ZADD', STARTED, started)
write('ZREM', SCHEDULED, unscheduled)
add(set_aside, unpack(dropped))
return {text(now_ms), text(closed_until_ms), suspended, set_aside, why, unpack(rows)}
