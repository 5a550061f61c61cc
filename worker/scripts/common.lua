-- What the workers' scripts say alike, after what every script knows of a job.

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

-- When the gate opens, in ms; 0: it is open, or what stands there is no record of it.
local function closed_until()
  local said = redis.pcall('HGET', GATE, 'until_ms')
  local until_ms = type(said) == 'string' and whole(said) or 0
  return until_ms > now_ms and until_ms or 0
end

-- A deadline given by a request holds; one left to the worker counts from the moment of asking; the later one wins.
local function deadline_of(s)
  local asked_at = s.asked_at
  if not asked_at and not s.deadline_at then asked_at = s.enqueued_at or text(now_ms) end
  local by_default = asked_at and tonumber(asked_at) + DEADLINE_MS or 0
  return math.max(by_default, tonumber(s.deadline_at or '0'))
end

-- A server that is full takes all writes of a script whose first one needs no room; a read-only one refuses that one,
-- and with it all.
local function first_write() redis.call('ZREM', UNFINISHED, '\0') end

-- RQ's popping says `started` of a job that has ended, and takes its life off: a stock worker that dies then leaves it
-- so. The registries must be there as what they are.
local function end_again(id, s)
  if redis.call('TTL', JOB_PREFIX .. id) ~= -1 then return end
  local is_failed = FAILED_KINDS[kind_of(id, s)]
  local life_s = is_failed and FAILURE_TTL_S or RESULT_TTL_S
  redis.call('HSET', JOB_PREFIX .. id, 'status', is_failed and 'failed' or 'finished')
  redis.call('EXPIRE', JOB_PREFIX .. id, life_s)
  redis.call('ZADD', is_failed and FAILED or FINISHED, 'NX', math.floor(now_s) + life_s, id)
end

-- Written with one call each at the end of a script.
local function write(command, key, list)
  if #list > 0 then redis.call(command, key, unpack(list)) end
end

local function add(list, ...)
  for i = 1, select('#', ...) do list[#list + 1] = (select(i, ...)) end
end
