-- Prepended to every script: Redis' own time, RQ's spelling of it, and what two scripts say of a job alike.
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local now_s = time[1] + time[2] / 1000000

-- Numbers beyond 2^53 never pass through here; those below must not come out as 1.7e+12.
local function text(number) return string.format('%.0f', number) end

-- YYYY-MM-DDThh:mm:ss.ffffffZ as rq.utils.utcformat writes it (days to civil date: Howard Hinnant's algorithm), of now
-- unless told.
local function rq_time(seconds, micros)
  local s = seconds or tonumber(time[1])
  local z = math.floor(s / 86400) + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local day = doy - math.floor((153 * mp + 2) / 5) + 1
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  local rest = s % 86400
  return string.format('%04d-%02d-%02dT%02d:%02d:%02d.%06dZ', year, month, day, math.floor(rest / 3600),
    math.floor(rest % 3600 / 60), rest % 60, micros or tonumber(time[2]))
end

-- A whole number of a job hash, or nil. Somebody else may have written there.
local function whole(value)
  return value and #value <= 16 and string.match(value, '^%-?%d+$') and tonumber(value) or nil
end

-- When the gate opens, in ms; 0: it is open.
local function closed_until(gate)
  local until_ms = whole(redis.call('HGET', gate, 'until_ms')) or 0
  return until_ms > now_ms and until_ms or 0
end

-- Take away those of our fields that should hold a whole number and do not; gives the name of one of them.
local NUMBERS = {'c_enqueued_at_ms', 'c_asked_at_ms', 'c_deadline_at_ms', 'c_run', 'c_open_at_ms',
  'c_meant_at_ms'}
local function mend(job)
  local damaged
  for i, value in ipairs(redis.call('HMGET', job, unpack(NUMBERS))) do
    if value and not whole(value) then
      damaged = NUMBERS[i]
      redis.call('HDEL', job, damaged)
    end
  end
  return damaged
end

-- A deadline given by a request holds; one left to the worker counts from the moment of asking; the later one wins.
local function deadline_at(asked_at, deadline_at_ms, enqueued_at, default_ms)
  if not asked_at and not deadline_at_ms then asked_at = enqueued_at end
  local by_default = asked_at and tonumber(asked_at) + default_ms or 0
  return math.max(by_default, tonumber(deadline_at_ms or '0'))
end

-- Where requests find the open job of an order: nowhere if they name it by client id alone, which may mean another order
-- by now (jobs of former versions have such keys). False: nowhere.
local function pointer_to(order, prefix)
  return order and string.find(order, '^[^:]*:a:') and prefix .. order
end

-- RQ's requeue puts a settled job back with its end cleared. That starts a new run, with a new deadline.
local function start_run(id, job, pointer, pointer_life_s, outcome)
  -- A job that RQ itself enqueued has no run, and a damaged one is not mended while a worker of ours holds the job.
  if not whole(redis.call('HGET', job, 'c_run')) then redis.call('HSET', job, 'c_run', '1') end
  -- By a client id the order is meant that had it when the request was first made.
  redis.call('HSETNX', job, 'c_meant_at_ms', redis.call('HGET', job, 'c_enqueued_at_ms') or text(now_ms))
  redis.call('HINCRBY', job, 'c_run', 1)
  redis.call('HDEL', job, 'c_done', 'c_attempts', 'c_deadline_at_ms')
  redis.call('HSET', job, 'c_enqueued_at_ms', text(now_ms), 'c_asked_at_ms', text(now_ms))
  redis.call('PERSIST', job)
  redis.call('DEL', outcome)
  -- A key of another type in that place points to nothing.
  if pointer and redis.call('TYPE', pointer).ok ~= 'string' then redis.call('SET', pointer, id, 'EX', pointer_life_s) end
end

-- Attempts with one more: begun by somebody who never came back with its answer, hence perhaps done.
local function with_lost_attempt(attempts, began_ms)
  local before = (attempts and attempts ~= '') and attempts .. ',' or ''
  local _, n = string.gsub(before, '"at_ms"', '')
  return before .. string.format('{"n":%d,"at_ms":%s,"call":"cancel","http":null,"code":null,"msg":"worker lost",' ..
    '"verdict":"unclear","ms":%s}', n + 1, text(began_ms), text(math.max(now_ms - began_ms, 0)))
end
