-- The breaker of one API key: after failures in a row its jobs wait, and one probe goes out now and then.
-- ARGV  1 what (failed, answered, ask), 2 breaker's key, 3 key of the set of its held jobs, 4 account,
--       5 failures that open it, 6 ms between probes, 7 reason (failed) or job id (ask)
-- Gives the time of the next probe in ms while it is open and the caller has to wait, else 0.
local what, breaker, held, account = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local LIFE_S, RELEASED = 8 * 86400, 1000
job.first_write()
local open = job.whole(on('HGET', breaker, 'probe_at_ms'))

if what == 'failed' then
  local failures = (job.whole(redis.call('HGET', breaker, 'failures')) or 0) + 1
  redis.call('HSET', breaker, 'failures', text(failures), 'reason', ARGV[7])
  redis.call('EXPIRE', breaker, LIFE_S)
  on('SADD', SUSPECTS, account)
  redis.call('EXPIRE', SUSPECTS, LIFE_S)
  if not open and failures >= tonumber(ARGV[5]) then
    open = now.ms + tonumber(ARGV[6])
    redis.call('HSET', breaker, 'since_ms', now.text, 'probe_at_ms', text(open))
  end
  return text(open or 0)
end

-- Its jobs wait no longer for their next try.
local function release(id)
  local s = job.read(id)
  if s and s.due_at and not s.done and not s.lease then
    redis.call('HSET', JOB_PREFIX .. id, 'c_due_at_ms', now.text)
    on('ZADD', UNFINISHED, text(RETRY_BAND + now.ms), id)
    on('ZADD', SCHEDULED, 'XX', now.seconds(now.ms), id)
  end
end

if what == 'answered' then
  redis.call('DEL', breaker)
  on('SREM', SUSPECTS, account)
  for _, id in ipairs(on('SPOP', held, RELEASED)) do release(id) end
  return '0'
end

if not open then return '0' end
if now.ms >= open then
  redis.call('HSET', breaker, 'probe_at_ms', text(now.ms + tonumber(ARGV[6])))
  return '0'
end
on('SADD', held, ARGV[7])
redis.call('EXPIRE', held, LIFE_S)
return text(open)
