-- Close the gate for everybody on the same address; a later end holds.
-- ARGV  1 pause in ms, 2 reason, 3 who closed it, 4 doubling (1 or 0)
-- Gives the gate's end in ms.
job.first_write()
local before = job.whole(on('HGET', GATE, 'until_ms')) or 0
local pause_ms = tonumber(ARGV[1])
if ARGV[4] == '1' and before <= now.ms then
  -- Not while it is closed: the requests that were in flight are refused together, and are one refusal.
  local blocks = (job.whole(redis.call('HGET', GATE, 'blocks')) or 0) + 1
  redis.call('HSET', GATE, 'blocks', text(blocks))
  pause_ms = pause_ms * 2 ^ math.min(blocks - 1, 10)
end
local until_ms = now.ms + pause_ms
if until_ms > before then
  redis.call('HSET', GATE, 'until_ms', text(until_ms), 'reason', ARGV[2], 'by', ARGV[3], 'closed_at_ms', now.text)
  -- It outlives every worker, and is kept an hour longer for people who ask what happened.
  redis.call('PEXPIRE', GATE, until_ms - now.ms + 3600000)
else
  until_ms = before
end
return text(until_ms)
