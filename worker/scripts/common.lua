-- What the workers' scripts say alike, after what every script knows of a job.

-- This moment as rq.utils.utcformat writes it, YYYY-MM-DDThh:mm:ss.ffffffZ (days to civil date: Howard Hinnant's
-- algorithm).
function now.stamp()
  local z = math.floor(now.s / 86400) + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local day = doy - math.floor((153 * mp + 2) / 5) + 1
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  local rest = now.s % 86400
  return string.format('%04d-%02d-%02dT%02d:%02d:%02d.%06dZ', year, month, day, math.floor(rest / 3600),
    math.floor(rest % 3600 / 60), rest % 60, now.micros)
end

-- Milliseconds as RQ's seconds.
function now.seconds(ms) return string.format('%d.%03d', math.floor(ms / 1000), ms % 1000) end

-- When the gate opens, in ms; 0: it is open, or what stands there is no record of it.
function job.closed_until()
  local said = redis.pcall('HGET', GATE, 'until_ms')
  local until_ms = type(said) == 'string' and job.whole(said) or 0
  return until_ms > now.ms and until_ms or 0
end

-- A deadline given by a request holds; one left to the worker counts from the moment of asking; the later one wins.
function job.deadline_of(s)
  local asked_at = s.asked_at
  if not asked_at and not s.deadline_at then asked_at = s.enqueued_at or now.text end
  local by_default = asked_at and tonumber(asked_at) + DEADLINE_MS or 0
  return math.max(by_default, tonumber(s.deadline_at or '0'))
end

-- A server that is full takes all writes of a script whose first one needs no room; a read-only one refuses that one,
-- and with it all.
function job.first_write() on('ZREM', UNFINISHED, '\0') end

-- Written with one call each at the end of a script, or a few: Lua's stack takes no more than some thousand words.
local function write(command, key, list)
  for i = 1, #list, 5000 do on(command, key, unpack(list, i, math.min(i + 4999, #list))) end
end

-- RQ's popping says of a job that has ended that it has begun and never ends; a clean-up of RQ's, that it waits.
function job.put_right(id, s)
  local key = JOB_PREFIX .. id
  local is_failed = FAILED_KINDS[job.kind_of(id, s)]
  local status = is_failed and 'failed' or 'finished'
  if s.status == status and redis.call('TTL', key) >= 0 then return end
  local life_s = is_failed and FAILURE_TTL_S or RESULT_TTL_S
  redis.call('EXPIRE', key, life_s)
  redis.call('HSET', key, 'status', status)
  on('ZREM', is_failed and FINISHED or FAILED, id)
  on('ZADD', is_failed and FAILED or FINISHED, 'NX', text(now.s + life_s), id)
end
