-- Enqueue cancel requests, or join them to the open job of the same order. Safe to repeat: the caller makes the ids.
-- KEYS  1 waiting list, 2 set of queues
-- ARGV  1 RQ's stamp of now, then for each request six words:
--       id (rows of one order stand side by side, have the same one, and share its job), order key (empty: a client id
--       alone, which may mean another order by the next call, so that no other call joins its job), data, description,
--       deadline in ms from now (empty: the worker's default), urgent (1 or empty)
-- Gives for each request: the id of the job that carries it, and 1 if another request had made that job.
-- The lines before these, made by producer.wire, say what no call of a client changes: JOB_PREFIX, ORDER_PREFIX,
-- OUTCOME_PREFIX, POINTER_LIFE_S, and FIELDS: RQ's own fields of such a job (field, value, ...).
local waiting, stamp = KEYS[1], ARGV[1]
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local OPEN = {queued = true, scheduled = true, started = true}

local function text(number) return string.format('%.0f', number) end

-- The later deadline holds. One that leaves it to the worker is kept as the moment of asking.
local function ask(job, deadline_ms)
  if deadline_ms == '' then
    redis.call('HSET', job, 'c_asked_at_ms', text(now_ms))
  else
    local at_ms = now_ms + tonumber(deadline_ms)
    local before = tonumber(redis.call('HGET', job, 'c_deadline_at_ms') or '0') or 0
    if at_ms > before then redis.call('HSET', job, 'c_deadline_at_ms', text(at_ms)) end
  end
end

local function join(id, deadline_ms, urgent)
  local job = JOB_PREFIX .. id
  local status = redis.pcall('HGET', job, 'status') -- an error where the key is no hash
  if not (type(status) == 'string' and OPEN[status]) then return false end
  ask(job, deadline_ms)
  if urgent == '1' then
    redis.call('HSET', job, 'c_urgent', '1')
    -- A second entry, not a move: entries are hints, and a list has no quick way to find one.
    if status == 'queued' then redis.call('LPUSH', waiting, id) end
  end
  return true
end

local behind, pointers = {}, {} -- new ids for the end of the queue, and where to note them; written at the end
local function create(id, order, i)
  local job, deadline_ms, urgent = JOB_PREFIX .. id, ARGV[i + 4], ARGV[i + 5]
  local asked, at = 'c_asked_at_ms', text(now_ms)
  if deadline_ms ~= '' then asked, at = 'c_deadline_at_ms', text(now_ms + tonumber(deadline_ms)) end
  redis.call('HSET', job, 'data', ARGV[i + 2], 'description', ARGV[i + 3], 'c_run', '1', 'c_enqueued_at_ms',
    text(now_ms), asked, at, 'created_at', stamp, 'enqueued_at', stamp, unpack(FIELDS))
  if urgent == '1' then redis.call('HSET', job, 'c_urgent', '1') end
  if urgent == '1' then redis.call('LPUSH', waiting, id) else behind[#behind + 1] = id end
  if order ~= '' then
    redis.call('HSET', job, 'c_order', order)
    pointers[ORDER_PREFIX .. order] = id
  end
end

local answer = {}
redis.call('SADD', KEYS[2], waiting)
local asked_id, carrying_id -- of the row before
for i = 2, #ARGV, 6 do
  local id, order, duplicate = ARGV[i], ARGV[i + 1], 0
  if id == asked_id then
    -- If its job has its outcome already, this is a repeat: requests of one call share a ticket all the same.
    id, duplicate = carrying_id, 1
    join(id, ARGV[i + 4], ARGV[i + 5])
  elseif redis.call('EXISTS', JOB_PREFIX .. id, OUTCOME_PREFIX .. id) == 0 then
    local other = order ~= '' and redis.pcall('GET', ORDER_PREFIX .. order) -- an error where the key is no text
    if type(other) == 'string' and join(other, ARGV[i + 4], ARGV[i + 5]) then
      id, duplicate = other, 1
    else
      create(id, order, i)
    end
  end
  asked_id, carrying_id = ARGV[i], id
  answer[#answer + 1] = id
  answer[#answer + 1] = duplicate
end
if #behind > 0 then redis.call('RPUSH', waiting, unpack(behind)) end
-- Last: whatever fails before this, no later request joins a job that stands nowhere.
for pointer, id in pairs(pointers) do redis.call('SET', pointer, id, 'EX', POINTER_LIFE_S) end
return answer
