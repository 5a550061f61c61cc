-- Start a new run of failed jobs, for all ids or for none. What RQ's requeue leaves to the claim is done at once: the
-- new deadline counts from now, and a cancel of the same order finds this job.
-- ARGV  1 RQ's stamp, 2 compressed nothing (RQ's exc_info), 3 what: check, all (or none), known; then the ids
-- Gives the ids that are not among the failed ones.
local known, unknown, seen = {}, {}, {}
for i = 4, #ARGV do
  local id = ARGV[i]
  if not seen[id] then
    seen[id] = true
    -- RQ also files jobs there that go on: it knows nothing of leases.
    local s = on('ZSCORE', FAILED, id) and job.read(id)
    local is_failed = s and s.done and FAILED_KINDS[job.kind_of(id, s)]
    if is_failed then known[#known + 1] = {id, s} else unknown[#unknown + 1] = id end
  end
end
if ARGV[3] == 'check' or (ARGV[3] == 'all' and #unknown > 0) then return unknown end
for _, one in ipairs(known) do
  local id, s = one[1], one[2]
  on('ZREM', FAILED, id)
  job.start_run(id, s)
  redis.call('HSET', JOB_PREFIX .. id, 'enqueued_at', ARGV[1], 'started_at', '', 'ended_at', '', 'exc_info', ARGV[2])
  on('RPUSH', WAITING, id)
end
if #known > 0 then on('SADD', QUEUES, WAITING) end
return unknown
