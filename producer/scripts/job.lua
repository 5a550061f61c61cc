-- What every script knows of a job, prepended to each of them. Keys and constants (in capitals) are put in as literals.
-- A job's state stands in fields of ours (c_…) and, for all that is unfinished, in one index. RQ may write its own
-- fields at any moment: they are kept for RQ's tools and decide nothing but what is said here.
-- Functions stand in tables: Lua makes them anew at each call, and that is cheap for those that share few locals.
local job, now = {}, {}
do
  local time = redis.call('TIME')
  now.ms = time[1] * 1000 + math.floor(time[2] / 1000)
  now.s, now.micros = tonumber(time[1]), tonumber(time[2])
end

-- Lua would write a number of this size as 1.7e+12.
local function text(number) return string.format('%d', number) end
now.text = text(now.ms)

-- A whole number, or nil. Somebody else may have written there.
function job.whole(value)
  return value and #value <= 16 and string.match(value, '^%-?%d+$') and tonumber(value) or nil
end

-- The index (UNFINISHED) tells of each unfinished job when to look at it next. Held jobs stand there by the end of
-- their lease; retries by when they are due and waiting jobs by since when they wait, each in a band of its own.

-- A command on a key that all jobs share. One of another type than it should have is set aside under a name that says
-- so: whoever wrote there must neither stop everybody's service nor leave half a transition. The names are told to
-- whoever called.
local set_aside = {}
local function put_aside(key)
  local said = redis.pcall('RENAME', key, key .. ':set-aside')
  if not said.err then set_aside[#set_aside + 1] = key end -- a strategy may not: the next claim of a worker does
end

local function on(command, key, ...)
  local said = redis.pcall(command, key, ...)
  if type(said) ~= 'table' or not said.err then return said end
  if string.find(said.err, 'WRONGTYPE', 1, true) then put_aside(key) end
  -- Any other error comes once more, and is told as it is: the first word says which.
  return redis.call(command, key, ...)
end

job.numbers = {'enqueued_at', 'asked_at', 'deadline_at', 'run', 'open_at', 'meant_at', 'due_at'}
job.number_fields = {'c_enqueued_at_ms', 'c_asked_at_ms', 'c_deadline_at_ms', 'c_run', 'c_open_at_ms',
  'c_meant_at_ms', 'c_due_at_ms'}

-- The state of a job, numbers as they stand; nil where the key is no hash of a job. What should be a number and is
-- none counts as absent and is named in `damaged`.
function job.read(id)
  local f = redis.pcall('HMGET', JOB_PREFIX .. id, 'status', 'c_done', 'c_lease', 'c_order', 'c_on_trigger',
    unpack(job.number_fields))
  if f.err then return nil end
  local s = {status = f[1], done = f[2], lease = f[3], order = f[4], cancels_child = f[5] == 'cancel_child'}
  local is_there = f[1] or f[2] or f[3] or f[4]
  for i, name in ipairs(job.numbers) do
    local value = f[5 + i]
    if value then
      is_there = true
      if job.whole(value) then s[name] = value else
        s.damaged = s.damaged or {}
        table.insert(s.damaged, job.number_fields[i])
      end
    end
  end
  if not is_there and redis.call('EXISTS', JOB_PREFIX .. id) == 0 then return nil end
  -- What RQ saves over a hash that was deleted has none of our fields: the record knows of its end.
  if not s.run and not s.done and redis.call('EXISTS', OUTCOME_PREFIX .. id) == 1 then s.done = '1' end
  return s
end

-- A score of RQ's in s as ms, or nil: there are endless ones too.
function job.moment(score)
  local seconds = tonumber(score)
  return seconds and seconds > 0 and seconds < 1e12 and math.floor(seconds * 1000) or nil
end

-- Jobs that a person took back through RQ.
function job.is_recalled(s) return s.status == 'canceled' or s.status == 'stopped' end

-- When a retry is due, in ms; nil for none. Before this field there was one, RQ's registry alone told it.
function job.due_at(id, s)
  if s.due_at then return tonumber(s.due_at) end
  local score = s.status == 'scheduled' and redis.pcall('ZSCORE', SCHEDULED, id)
  return type(score) == 'string' and job.moment(score) or nil
end

-- Requests by algo id share an unfinished job. A client id may mean another order by now; the version before this one
-- noted it all the same.
function job.is_shared(order) return order and #order <= 200 and string.find(order, '^[^:]*:a:') ~= nil end

function job.pointed_to(order)
  local id = redis.pcall('GETRANGE', ORDER_PREFIX .. order, '0', MAX_ID_BYTES) -- whatever stands there, no more is read
  return type(id) == 'string' and #id > 0 and #id <= MAX_ID_BYTES and id or nil
end

-- The kind of a job's outcome. The version before this one wrote no more than that there was one: its record knows.
function job.kind_of(id, s)
  if s.done ~= '1' then return s.done end
  local record = redis.pcall('GET', OUTCOME_PREFIX .. id)
  return type(record) == 'string' and string.match(record, '"kind":"([a-z_]+)"') or 'unknown'
end

-- Whether RQ has put a failed job back: its entry has left the registry of failed ones. A copy that RQ saved late over
-- an ended job has not.
function job.is_requeued(id, s)
  if s.status == 'finished' or s.status == 'failed' or job.is_recalled(s) then return false end
  return FAILED_KINDS[job.kind_of(id, s)] and not on('ZSCORE', FAILED, id)
end

-- Whether a later request may join the job.
function job.is_open(id)
  local s = id and job.read(id)
  return s and not job.is_recalled(s) and (not s.done or job.is_requeued(id, s))
end

-- A failed job runs once more, with a new deadline. By a client id the order is meant that had it at first. The record
-- of the run before stands until the claim: who starts a run may have no right to remove it.
function job.start_run(id, s)
  local key = JOB_PREFIX .. id
  local run, meant_at = text((s.run or 1) + 1), s.meant_at or s.enqueued_at or now.text
  for _, field in ipairs(s.damaged or {}) do -- nobody knows what stood there: it is left to the claim to refuse
    if field == 'c_run' then run = '?' end
    if field == 'c_meant_at_ms' or (field == 'c_enqueued_at_ms' and not s.meant_at) then meant_at = '?' end
  end
  redis.call('HDEL', key, 'c_done', 'c_ended', 'c_attempts', 'c_deadline_at_ms', 'c_due_at_ms', 'c_lease',
    'c_open_at_ms')
  redis.call('HSET', key, 'status', 'queued', 'retries_left', ENDLESS_RETRIES, 'c_run', run,
    'c_enqueued_at_ms', now.text, 'c_asked_at_ms', now.text, 'c_meant_at_ms', meant_at)
  redis.call('PERSIST', key)
  on('ZADD', UNFINISHED, text(WAITING_BAND + now.ms), id)
  if not job.is_shared(s.order) then return end
  local other = job.pointed_to(s.order)
  if other == id or not job.is_open(other) then
    redis.call('SET', ORDER_PREFIX .. s.order, id, 'EX', POINTER_LIFE_S)
  end
end
