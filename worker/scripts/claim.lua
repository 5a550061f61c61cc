-- Give jobs to a worker: bring back what is due or lost, then hand out as many as it has free slots, each with a lease.
-- Runs when the BLMOVE before it in the same pipeline returns, so that waiting and claiming are one round trip.
-- KEYS  1 waiting list, 2 claiming list, 3 leases, 4 scheduled, 5 started, 6 suspended, 7 gate, 8 worker's executions
-- ARGV  1 job prefix, 2 execution prefix, 3 executions prefix, 4 order prefix, 5 outcome prefix, 6 worker prefix,
--       7 worker's name, 8 free slots, 9 lease in ms, 10 default deadline in ms, 11 execution id's prefix,
--       12 first execution number, 13 largest payload in bytes, 14 take lost leases (1 or 0), 15 pointer's life in s,
--       16 when the asker stops waiting for the answer, in ms (0: not known)
-- Gives: now in ms, the gate's end in ms (0: open), suspended (1 or 0), then one row for each job given.
local waiting, claiming, leases, scheduled, started = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local job_prefix, execution_prefix, executions_prefix = ARGV[1], ARGV[2], ARGV[3]
local worker, slots, lease_ms, default_deadline_ms = ARGV[7], tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
local STEP = 100 -- entries of one kind brought back in one call: the server must not stand still
local SWEEP = 500 -- waiting entries looked at in one call during a pause
local TAKEN = '\0taken' -- stands where an entry was until the list is cleared of it; no id begins so
local GRACE_S = 3600 -- RQ's maintenance may take a job for abandoned only this long after its deadline

-- An id that a claim moved here and could not take (its connection broke) goes back to the front.
local function empty_claiming()
  local ids = redis.call('LRANGE', claiming, 0, -1)
  for i = #ids, 1, -1 do redis.call('LPUSH', waiting, ids[i]) end
  if #ids > 0 then redis.call('DEL', claiming) end
end

local function bring_back_due()
  local ids = redis.call('ZRANGEBYSCORE', scheduled, '-inf', string.format('%.6f', now_s), 'LIMIT', 0, STEP)
  for i = #ids, 1, -1 do
    redis.call('ZREM', scheduled, ids[i])
    local job = job_prefix .. ids[i]
    if redis.pcall('HGET', job, 'status') == 'scheduled' then -- an error where the key is no hash
      redis.call('HSET', job, 'status', 'queued')
      redis.call('LPUSH', waiting, ids[i])
    end
  end
end

-- The holder of an expired lease is dead, paused or cut off. What it had begun may have been sent.
local function take_lost()
  local ids = redis.call('ZRANGEBYSCORE', leases, '-inf', text(now_ms), 'LIMIT', 0, STEP)
  for i = #ids, 1, -1 do
    local id, job = ids[i], job_prefix .. ids[i]
    redis.call('ZREM', leases, id)
    local held = redis.pcall('HMGET', job, 'c_lease', 'c_open_at_ms', 'c_attempts', 'worker_name', 'status', 'c_done')
    if not held.err then redis.call('HDEL', job, 'c_lease', 'c_open_at_ms') end
    local status = held[5] -- a stock worker may have written it beside the holder
    if status == 'scheduled' and not redis.call('ZSCORE', scheduled, id) then status = 'queued' end
    local goes_on = status == 'started' or status == 'queued' or status == 'scheduled'
    if held[1] and not held[6] and goes_on then
      local entry = id .. ':' .. held[1]
      redis.call('ZREM', started, entry)
      redis.call('DEL', execution_prefix .. entry, executions_prefix .. id)
      if held[4] then redis.call('SREM', ARGV[6] .. held[4] .. ':executions', entry) end
      redis.call('HSET', job, 'c_attempts', with_lost_attempt(held[3], whole(held[2]) or now_ms))
      if status ~= 'scheduled' then
        redis.call('HSET', job, 'status', 'queued')
        redis.call('LPUSH', waiting, id)
      end
    end
  end
end

-- An entry of the waiting list is a hint: whether its job may be given is told by the job alone.
local function read(job)
  local f = redis.pcall('HMGET', job, 'status', 'ended_at', 'c_done', 'c_lease', 'c_order', 'c_enqueued_at_ms',
    'c_open_at_ms', 'c_attempts', 'c_asked_at_ms', 'c_deadline_at_ms', 'c_run', 'c_pin', 'c_meant_at_ms')
  if f.err then return nil end -- the key is no hash
  return {status = f[1], ended_at = f[2], done = f[3], lease = f[4], order = f[5], enqueued_at = f[6], open_at = f[7],
    attempts = f[8], asked_at = f[9], deadline_at = f[10], run = f[11], pin = f[12],
    meant_at = f[13]}
end

local function is_sound(state)
  return (whole(state.enqueued_at) or not state.enqueued_at) and (whole(state.asked_at) or not state.asked_at) and
    (whole(state.deadline_at) or not state.deadline_at) and (whole(state.run) or not state.run) and
    (whole(state.open_at) or not state.open_at) and (whole(state.meant_at) or not state.meant_at)
end

local function state_if_free(id)
  local job = job_prefix .. id
  local state, damaged = read(job), nil
  if not state or state.lease then return nil end
  if not is_sound(state) then
    damaged = mend(job)
    state = read(job)
  end
  local status, changed = state.status, false
  if not status and redis.call('EXISTS', job) == 0 then return nil end
  if state.done then
    if status ~= 'queued' or (state.ended_at and state.ended_at ~= '') then return nil end
    start_run(id, job, pointer_to(state.order, ARGV[4]), tonumber(ARGV[15]), ARGV[5] .. id)
    changed = true
  elseif status == 'started' then
    -- Not ours: a stock worker runs it, unless its execution has run out.
    local running = redis.pcall('ZCOUNT', executions_prefix .. id, text(now_s), '+inf')
    if type(running) == 'number' and running > 0 then return nil end
  elseif status and status ~= 'queued' then
    return nil -- a hash without a status is somebody's mistake, which gets an outcome too
  end
  if state.open_at then
    -- Nobody holds it, yet an attempt is open: a stock worker began one and never came back.
    redis.call('HSET', job, 'c_attempts', with_lost_attempt(state.attempts, whole(state.open_at)))
    redis.call('HDEL', job, 'c_open_at_ms')
    changed = true
  end
  if not state.enqueued_at then
    redis.call('HSET', job, 'c_enqueued_at_ms', text(now_ms), 'c_asked_at_ms', text(now_ms))
    changed = true
  end
  if changed then state = read(job) end
  state.damaged = damaged
  return state
end

local number = tonumber(ARGV[12])
local stamp, now_text = nil, string.format('%.6f', now_s)
local new_leases, new_started, new_entries = {}, {}, {} -- written at the end, with one call each
local function give(id, state, deadline_ms)
  local job, execution = job_prefix .. id, ARGV[11] .. text(number)
  local entry = id .. ':' .. execution
  local end_s = math.ceil(math.max(deadline_ms, now_ms) / 1000) + GRACE_S
  local life_s = end_s - math.floor(now_s)
  number, stamp = number + 1, stamp or rq_time()
  -- The attempt is noted before it is sent: should nobody come back with its answer, it counts as perhaps done.
  redis.call('HSET', job, 'status', 'started', 'started_at', stamp, 'last_heartbeat', stamp, 'worker_name', worker,
    'c_lease', execution, 'c_open_at_ms', text(now_ms))
  redis.call('HSET', execution_prefix .. entry, 'id', execution, 'job_id', id, 'created_at', now_text,
    'last_heartbeat', now_text, 'worker_name', worker)
  redis.call('EXPIRE', execution_prefix .. entry, life_s)
  if type(redis.pcall('ZADD', executions_prefix .. id, end_s, execution)) ~= 'number' then -- a key of another type
    redis.call('DEL', executions_prefix .. id)
    redis.call('ZADD', executions_prefix .. id, end_s, execution)
  end
  redis.call('EXPIRE', executions_prefix .. id, life_s)
  local n = #new_entries
  new_leases[2 * n + 1], new_leases[2 * n + 2] = now_ms + lease_ms, id
  new_started[2 * n + 1], new_started[2 * n + 2] = end_s, entry
  new_entries[n + 1] = entry
  local data = false
  if redis.call('HSTRLEN', job, 'data') <= tonumber(ARGV[13]) then data = redis.call('HGET', job, 'data') end
  return {id, execution, data, state.enqueued_at, text(deadline_ms), state.run or '1', state.attempts or '',
    state.pin or '', state.damaged or '', state.meant_at or state.enqueued_at}
end

local given = {}
local function try_sound(id, only_overdue)
  local state = state_if_free(id)
  if not state then return 'drop' end
  local deadline_ms = deadline_at(state.asked_at, state.deadline_at, state.enqueued_at, default_deadline_ms)
  if only_overdue and now_ms < deadline_ms then return 'keep' end
  given[#given + 1] = give(id, state, deadline_ms)
  return 'given'
end

-- What is wrong with one job must not cost those that were taken off the list with it.
local function try(id, only_overdue)
  local is_sound_job, answer = pcall(try_sound, id, only_overdue)
  if is_sound_job then return answer end
  redis.pcall('HDEL', job_prefix .. id, 'c_lease', 'c_open_at_ms')
  return only_overdue and 'keep' or 'drop'
end

-- Nothing may be sent; a request whose deadline has passed needs nothing sent. Each second another stretch of the queue
-- is looked through, so that a long one is, too, before long.
local function give_overdue()
  local stretches = math.ceil(redis.call('LLEN', waiting) / SWEEP)
  if stretches == 0 then return end
  local first = math.floor(now_s) % stretches * SWEEP
  local taken = false
  redis.call('ZREM', leases, TAKEN) -- the first write: a full or read-only server refuses the script, not one job
  for i, id in ipairs(redis.call('LRANGE', waiting, first, first + SWEEP - 1)) do
    if #given >= slots then break end
    if try(id, true) ~= 'keep' then
      redis.call('LSET', waiting, first + i - 1, TAKEN)
      taken = true
    end
  end
  if taken then redis.call('LREM', waiting, 0, TAKEN) end
end

empty_claiming()
-- After a pause of the server or the network this may run long after it was sent: what it gave, nobody would take.
local gives_up_at_ms = tonumber(ARGV[16])
if gives_up_at_ms > 0 and now_ms >= gives_up_at_ms then return {text(now_ms), '0', redis.call('EXISTS', KEYS[6])} end
bring_back_due()
if ARGV[14] == '1' then take_lost() end
local closed_until_ms = closed_until(KEYS[7])
local suspended = redis.call('EXISTS', KEYS[6])

if closed_until_ms > 0 or suspended == 1 then
  give_overdue()
else
  local looked = 0
  while #given < slots and looked < slots + STEP do
    local ids = redis.call('LPOP', waiting, slots - #given)
    if not ids then break end
    for _, id in ipairs(ids) do try(id, false) end
    looked = looked + #ids
  end
end
if #given > 0 then
  redis.call('ZADD', leases, unpack(new_leases))
  redis.call('ZADD', started, unpack(new_started))
  redis.call('SADD', KEYS[8], unpack(new_entries))
  redis.call('EXPIRE', KEYS[8], 86400)
end
return {text(now_ms), text(closed_until_ms), suspended, unpack(given)}
