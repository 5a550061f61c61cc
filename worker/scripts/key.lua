-- The breaker of one API key: after failures in a row its jobs wait, and one probe goes out now and then.
-- ARGV  1 what (failed, answered, ask, or try: a process that was just started asks), 2 account, 3 fingerprint of its key,
--       4 failures that open it, 5 ms between probes, 6 reason (failed) or job id (ask, try)
-- Gives the time of the next probe in ms while it is open and the caller has to wait, else 0; then a blank and the reason.
local what, account, print = ARGV[1], ARGV[2], ARGV[3]
local breaker, LIFE_S, RELEASED, SUSPECTED = BREAKER_PREFIX .. print, 8 * 86400, 1000, 100
job.first_write()
local open = job.whole(on('HGET', breaker, 'probe_at_ms'))

if what == 'failed' then
  local failures = (job.whole(redis.call('HGET', breaker, 'failures')) or 0) + 1
  redis.call('HSET', breaker, 'failures', text(failures), 'reason', ARGV[6])
  redis.call('EXPIRE', breaker, LIFE_S)
  on('SADD', SUSPECTS, account .. ' ' .. print)
  redis.call('EXPIRE', SUSPECTS, LIFE_S)
  if not open and failures >= tonumber(ARGV[4]) then
    open = now.ms + tonumber(ARGV[5])
    redis.call('HSET', breaker, 'since_ms', now.text, 'probe_at_ms', text(open))
  end
  return text(open or 0) .. ' '
end

-- Its jobs wait no longer for their next try.
local function release(of)
  for _, id in ipairs(on('SPOP', HELD_PREFIX .. of, RELEASED)) do
    local s = job.read(id)
    if s and s.due_at and not s.done and not s.lease then
      redis.call('HSET', JOB_PREFIX .. id, 'c_due_at_ms', now.text)
      on('ZADD', UNFINISHED, text(RETRY_BAND + now.ms), id)
      on('ZADD', SCHEDULED, 'XX', now.seconds(now.ms), id)
    end
  end
end

-- The account has a key that works. Where that is another one than was refused, the refused one's breaker stays for as
-- long as a worker still has that key; nobody is told of it any more.
if what == 'answered' then
  redis.call('DEL', breaker)
  release(print)
  for _, member in ipairs(on('SRANDMEMBER', SUSPECTS, SUSPECTED)) do
    local name, its = string.match(member, '^(.*) (%x+)$')
    if not its or #its ~= 16 then name, its = member, member end
    if name == account or its == print then
      redis.call('SREM', SUSPECTS, member)
      release(its)
      if name == its then redis.call('DEL', BREAKER_PREFIX .. its) end -- of the version that knew accounts alone
    end
  end
  return '0 '
end

if not open then return '0 ' end
if now.ms >= open or what == 'try' then
  redis.call('HSET', breaker, 'probe_at_ms', text(now.ms + tonumber(ARGV[5])))
  return '0 '
end
local held = HELD_PREFIX .. print
on('SADD', held, ARGV[6])
redis.call('EXPIRE', held, LIFE_S)
return text(open) .. ' ' .. string.sub(redis.call('HGET', breaker, 'reason') or '', 1, 400)
