-- What every script knows of a job, prepended to each of them; the lines before these give the keys and the constants.
-- A job's state stands in fields of ours (c_…) and, for all that is unfinished, in one index. RQ may write its own
-- fields at any moment: they are kept for RQ's tools and decide nothing but what is said here.
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local now_s = time[1] + time[2] / 1000000

-- Numbers beyond 2^53 never pass through here; those below must not come out as 1.7e+12.
local function text(number) return string.format('%.0f', number) end

-- A whole number, or nil. Somebody else may have written there.
local function whole(value)
  return value and #value <= 16 and string.match(value, '^%-?%d+$') and tonumber(value) or nil
end

-- The index tells of each unfinished job when to look at it next. Held jobs stand there by the end of their lease;
-- retries by when they are due and waiting jobs by since when they wait, each in a band of its own.
local WAITING_BAND, RETRY_BAND = 1e13, 2e13

-- Keys of another type than they should have are set aside under a name that says so: whoever wrote there must not
-- stop everybody's service. The names are told to whoever called.
local set_aside = {}
local function own(key, kind)
  local is = redis.call('TYPE', key).ok
  if is ~= kind and is ~= 'none' then
    redis.call('RENAME', key, key .. ':set-aside')
    set_aside[#set_aside + 1] = key
  end
end

local FAILED_KINDS = {not_found = true, refused = true, overdue = true, gave_up = true, unknown = true}
local NUMBERS = {'enqueued_at', 'asked_at', 'deadline_at', 'run', 'open_at', 'meant_at', 'due_at'}
local NUMBER_FIELDS = {'c_enqueued_at_ms', 'c_asked_at_ms', 'c_deadline_at_ms', 'c_run', 'c_open_at_ms',
  'c_meant_at_ms', 'c_due_at_ms'}

-- The state of a job, numbers as they stand; nil where the key is no hash of a job. What should be a number and is
-- none counts as absent and is named in `damaged`.
local function read(id)
  local f = redis.pcall('HMGET', JOB_PREFIX .. id, 'status', 'c_done', 'c_lease', 'c_order', unpack(NUMBER_FIELDS))
  if f.err then return nil end
  local s = {status = f[1], done = f[2], lease = f[3], order = f[4]}
  local is_there = f[1] or f[2] or f[3] or f[4]
  for i, name in ipairs(NUMBERS) do
    local value = f[4 + i]
    if value then
      is_there = true
      if whole(value) then s[name] = value else
        s.damaged = s.damaged or {}
        table.insert(s.damaged, NUMBER_FIELDS[i])
      end
    end
  end
  if not is_there and redis.call('EXISTS', JOB_PREFIX .. id) == 0 then return nil end
  -- What RQ saves over a hash that was deleted has none of our fields: the record knows of its end.
  if not s.run and not s.done and redis.call('EXISTS', OUTCOME_PREFIX .. id) == 1 then s.done = '1' end
  return s
end

-- Jobs that a person took back through RQ.
local function is_recalled(s) return s.status == 'canceled' or s.status == 'stopped' end

-- When a retry is due, in ms; nil for none. Before this field there was one, RQ's registry alone told it.
local function due_at(id, s)
  if s.due_at then return tonumber(s.due_at) end
  local due_s = s.status == 'scheduled' and redis.pcall('ZSCORE', SCHEDULED, id)
  return type(due_s) == 'string' and tonumber(due_s) * 1000 or nil
end

-- Requests by algo id share an unfinished job. A client id may mean another order by now; the version before this one
-- noted it all the same.
local function is_shared(order) return order and #order <= 200 and string.find(order, '^[^:]*:a:') ~= nil end

local function pointed_to(order)
  local id = redis.pcall('GET', ORDER_PREFIX .. order)
  return type(id) == 'string' and #id <= MAX_ID_BYTES and id or nil
end

-- The kind of a job's outcome. The version before this one wrote no more than that there was one: its record knows.
local function kind_of(id, s)
  if s.done ~= '1' then return s.done end
  local record = redis.pcall('GET', OUTCOME_PREFIX .. id)
  return type(record) == 'string' and string.match(record, '"kind":"([a-z_]+)"') or 'unknown'
end

-- Whether RQ has put a failed job back: its entry has left the registry of failed ones. A copy that RQ saved late over
-- an ended job has not.
local function is_requeued(id, s)
  if s.status == 'finished' or s.status == 'failed' or is_recalled(s) then return false end
  return FAILED_KINDS[kind_of(id, s)] and not redis.call('ZSCORE', FAILED, id)
end

-- A failed job runs once more, with a new deadline. By a client id the order is meant that had it at first.
local function start_run(id, s)
  local job, now = JOB_PREFIX .. id, text(now_ms)
  redis.call('HSET', job, 'status', 'queued', 'retries_left', ENDLESS_RETRIES, 'c_run', text((s.run or 1) + 1),
    'c_enqueued_at_ms', now, 'c_asked_at_ms', now, 'c_meant_at_ms', s.meant_at or s.enqueued_at or now)
  redis.call('HDEL', job, 'c_done', 'c_ended', 'c_attempts', 'c_deadline_at_ms', 'c_due_at_ms', 'c_lease',
    'c_open_at_ms')
  redis.call('PERSIST', job)
  redis.call('DEL', OUTCOME_PREFIX .. id)
  redis.call('ZADD', UNFINISHED, WAITING_BAND + now_ms, id)
  if is_shared(s.order) then redis.call('SET', ORDER_PREFIX .. s.order, id, 'NX', 'EX', POINTER_LIFE_S) end
end
