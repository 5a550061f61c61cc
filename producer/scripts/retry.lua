-- Start a new run of failed jobs, for all ids or for none. What RQ's requeue leaves to the claim is done at once: the
-- new deadline counts from now, and a cancel of the same order finds this job. A job that RQ alone calls failed has not
-- ended: it goes on in its run, with a new deadline too.
-- ARGV  1 RQ's stamp, 2 compressed nothing (RQ's exc_info), 3 what: check, all (or none), known; then the ids
-- Gives the ids that are not among the failed ones.
own(WAITING, 'list')
own(QUEUES, 'set')
own(UNFINISHED, 'zset')
own(FAILED, 'zset')
local known, unknown, seen = {}, {}, {}
for i = 4, #ARGV do
  local id = ARGV[i]
  if not seen[id] then
    seen[id] = true
    local s = redis.call('ZSCORE', FAILED, id) and read(id)
    if s and (not s.done or FAILED_KINDS[kind_of(id, s)]) then known[#known + 1] = {id, s} else unknown[#unknown + 1] = id end
  end
end
if ARGV[3] == 'check' or (ARGV[3] == 'all' and #unknown > 0) then return unknown end
for _, one in ipairs(known) do
  local id, s = one[1], one[2]
  redis.call('ZREM', FAILED, id)
  if s.done then
    start_run(id, s)
    redis.call('HSET', JOB_PREFIX .. id, 'enqueued_at', ARGV[1], 'started_at', '', 'ended_at', '', 'exc_info', ARGV[2])
  else
    redis.call('HSET', JOB_PREFIX .. id, 'c_asked_at_ms', text(now_ms))
    redis.call('PERSIST', JOB_PREFIX .. id)
    redis.call('ZADD', UNFINISHED, 'NX', WAITING_BAND + now_ms, id)
  end
  redis.call('RPUSH', WAITING, id)
end
if #known > 0 then redis.call('SADD', QUEUES, WAITING) end
return unknown
