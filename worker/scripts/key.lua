-- The breaker of one API key: after failures in a row its jobs wait, and one probe goes out now and then.
-- KEYS  1 breaker, 2 held jobs, 3 scheduled, 4 accounts under suspicion
-- ARGV  1 what (failed, answered, ask), 2 failures that open it, 3 ms between probes, 4 reason (failed) or job id (ask),
--       5 account
-- Gives the time of the next probe in ms while it is open and the caller has to wait, else 0.
local breaker, held, what = KEYS[1], KEYS[2], ARGV[1]
local open = redis.call('HGET', breaker, 'probe_at_ms')

if what == 'failed' then
  local failures = redis.call('HINCRBY', breaker, 'failures', 1)
  redis.call('HSET', breaker, 'reason', ARGV[4])
  redis.call('EXPIRE', breaker, 8 * 86400)
  redis.call('SADD', KEYS[4], ARGV[5])
  redis.call('EXPIRE', KEYS[4], 8 * 86400)
  if not open and failures >= tonumber(ARGV[2]) then
    open = text(now_ms + tonumber(ARGV[3]))
    redis.call('HSET', breaker, 'since_ms', text(now_ms), 'probe_at_ms', open)
  end
  return open or '0'
end

if what == 'answered' then
  redis.call('DEL', breaker)
  redis.call('SREM', KEYS[4], ARGV[5])
  local ids = redis.call('SPOP', held, 1000)
  for _, id in ipairs(ids) do
    if redis.call('ZSCORE', KEYS[3], id) then redis.call('ZADD', KEYS[3], string.format('%.6f', now_s), id) end
  end
  return '0'
end

if not open then return '0' end
if now_ms >= tonumber(open) then
  redis.call('HSET', breaker, 'probe_at_ms', text(now_ms + tonumber(ARGV[3])))
  return '0'
end
redis.call('SADD', held, ARGV[4])
redis.call('EXPIRE', held, 8 * 86400)
return open
