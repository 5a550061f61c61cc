-- Close the gate for everybody on the same address; a later end holds.
-- KEYS  1 gate    ARGV  1 pause in ms, 2 reason, 3 who closed it
-- Gives the gate's end in ms.
local until_ms = now_ms + tonumber(ARGV[1])
local before = tonumber(redis.call('HGET', KEYS[1], 'until_ms') or '0')
if until_ms > before then
  redis.call('HSET', KEYS[1], 'until_ms', text(until_ms), 'reason', ARGV[2], 'by', ARGV[3], 'closed_at_ms', text(now_ms))
  -- It outlives every worker, and is kept an hour longer for people who ask what happened.
  redis.call('PEXPIRE', KEYS[1], until_ms - now_ms + 3600000)
else
  until_ms = before
end
return text(until_ms)
