-- Close the gate for everybody on the same address; a later end holds.
-- KEYS  1 gate    ARGV  1 pause in ms, 2 reason, 3 who closed it, 4 doubling (1 or 0)
-- Gives the gate's end in ms.
local before = whole(redis.call('HGET', KEYS[1], 'until_ms')) or 0
local pause_ms = tonumber(ARGV[1])
if ARGV[4] == '1' and before <= now_ms then
  -- Not while it is closed: the requests that were in flight are refused together, and are one refusal.
  pause_ms = pause_ms * 2 ^ math.min(redis.call('HINCRBY', KEYS[1], 'blocks', 1) - 1, 10)
end
local until_ms = now_ms + pause_ms
if until_ms > before then
  redis.call('HSET', KEYS[1], 'until_ms', text(until_ms), 'reason', ARGV[2], 'by', ARGV[3], 'closed_at_ms', text(now_ms))
  -- It outlives every worker, and is kept an hour longer for people who ask what happened.
  redis.call('PEXPIRE', KEYS[1], until_ms - now_ms + 3600000)
else
  until_ms = before
end
return text(until_ms)
