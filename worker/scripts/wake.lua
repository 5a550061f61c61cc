-- Bring forward the retries of jobs that wait because the exchange was away: it is back.
-- ARGV  id and due time in ms of each, as far as the asker knows; one that is due at another time by now is left alone.
-- Gives names of keys that were set aside.
job.first_write()
for i = 1, #ARGV, 2 do
  local key = JOB_PREFIX .. ARGV[i]
  local f = redis.pcall('HMGET', key, 'c_due_at_ms', 'c_lease')
  if not f.err and f[1] == ARGV[i + 1] and not f[2] then
    redis.call('HSET', key, 'c_due_at_ms', now.text)
    on('ZADD', UNFINISHED, 'XX', text(RETRY_BAND + now.ms), ARGV[i])
  end
end
return set_aside
