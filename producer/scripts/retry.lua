-- Start a new run of failed jobs, for all ids or for none. What RQ's requeue leaves to the claim is done at once: the
-- new deadline counts from now, and a cancel of the same order finds this job. A job that RQ alone calls failed has not
-- ended: it goes on in its run, with a new deadline too.
-- ARGV  1 RQ's stamp, 2 compressed nothing (RQ's exc_info), 3 what: check, all (or none), known; then the ids
-- Gives the ids that are not among the failed ones.
local known, unknown, seen = {}, {}, {}
for i = 4, #ARGV do
  local id = ARGV[i]
  if not seen[id] then
    seen[id] = true
    local s = on('ZSCORE', FAILED, id) and job.read(id)
    local may_run = s and (not s.done or FAILED_KINDS[job.kind_of(id, s)])
    if may_run then known[#known + 1] = {id, s} else unknown[#unknown + 1] = id end
  end
end
if ARGV[3] == 'check' or (ARGV[3] == 'all' and #unknown > 0) then return unknown end
for _, one in ipairs(known) do
  local id, s, key = one[1], one[2], JOB_PREFIX .. one[1]
  on('ZREM', FAILED, id)
  if s.done then
    job.start_run(id, s)
    redis.call('HSET', key, 'enqueued_at', ARGV[1], 'started_at', '', 'ended_at', '', 'exc_info', ARGV[2])
  else
    redis.call('HSET', key, 'c_asked_at_ms', now.text)
    redis.call('PERSIST', key)
    on('ZADD', UNFINISHED, 'NX', text(WAITING_BAND + now.ms), id)
  end
  on('RPUSH', WAITING, id)
end
if #known > 0 then on('SADD', QUEUES, WAITING) end
return unknown
