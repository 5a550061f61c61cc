-- In bounded steps, what RQ's maintenance would do for this queue, without running anything of a job's: entries of
-- registries go when they have expired (entries, never jobs), dead workers leave RQ's sets, what stands in RQ's lists
-- alone (enqueued by the version before this one, or left there by a stock worker) gets into the index, and what RQ has
-- overwritten of jobs that have ended is put right.
-- ARGV  1 cursor through RQ's workers, 2 position in the queue
-- Gives the next cursor and position, and names of keys that were set aside.
local STEP, INTERMEDIATE_MS = 200, 60000
local STOCK_LIFE_S = 3000 -- entries of stock workers live no longer; our own outlast their deadline by an hour
job.first_write()

-- A job without end that the index does not know stands there from now on. RQ may have ended an earlier run of it late,
-- and let it run out. Gives whether it has ended.
function job.see_to(id, band)
  local s = #id <= MAX_ID_BYTES and job.read(id)
  if not s then return true end
  if not s.done then
    redis.call('PERSIST', JOB_PREFIX .. id)
    on('ZADD', UNFINISHED, 'NX', text(s.lease and now.ms + LEASE_MS or band), id)
    return false
  end
  if job.is_requeued(id, s) then job.start_run(id, s) else job.put_right(id, s) end
  return true
end

local since_now = WAITING_BAND + now.ms
-- An end that no lease can have: the clock was set back, or somebody else wrote there. Whoever holds the job renews it.
local endless = on('ZRANGEBYSCORE', UNFINISHED, '(' .. text(now.ms + MAX_LEASE_MS), '(' .. text(WAITING_BAND),
  'LIMIT', '0', STEP)
for _, id in ipairs(endless) do on('ZADD', UNFINISHED, text(now.ms + LEASE_MS), id) end

local may_be_stock = on('ZRANGEBYSCORE', STARTED, '-inf', text(now.s + STOCK_LIFE_S), 'LIMIT', '0', STEP)
for _, entry in ipairs(may_be_stock) do job.see_to(string.match(entry, '^(.*):') or entry, since_now) end
for _, registry in ipairs({FINISHED, FAILED, STARTED}) do
  write('ZREM', registry, on('ZRANGEBYSCORE', registry, '-inf', text(now.s), 'LIMIT', '0', STEP))
end

local position = tonumber(ARGV[2])
local waiting = on('LRANGE', WAITING, position, position + STEP - 1)
for _, id in ipairs(waiting) do job.see_to(id, since_now) end
position = #waiting == STEP and position + STEP or 0

for _, id in ipairs(on('LRANGE', INTERMEDIATE, '0', STEP - 1)) do
  job.see_to(id, since_now)
  local since = tonumber(on('ZSCORE', UNFINISHED, id) or '')
  if not since or (since >= WAITING_BAND and since < RETRY_BAND and since_now - since > INTERMEDIATE_MS) then
    on('LREM', INTERMEDIATE, '1', id)
  end
end

-- Retries of the version before this one, and those that a stock worker was told to make.
local due = on('ZRANGE', SCHEDULED, '0', STEP - 1, 'WITHSCORES')
for i = 1, #due, 2 do
  if job.see_to(due[i], RETRY_BAND + (job.moment(due[i + 1]) or now.ms)) then on('ZREM', SCHEDULED, due[i]) end
end

-- What a person took back is in no list any more, and gets its outcome all the same.
for _, id in ipairs(on('ZRANGE', CANCELED, '0', STEP - 1)) do
  if job.see_to(id, since_now) then on('ZREM', CANCELED, id) end
end

on('SCARD', QUEUE_WORKERS) -- one of another type would keep workers from being known to RQ
on('SCARD', QUEUES) -- and this one strategies from enqueueing
local found = on('SSCAN', WORKERS, ARGV[1], 'COUNT', '50')
for _, key in ipairs(found[2]) do
  if redis.call('EXISTS', key) == 0 then
    on('SREM', WORKERS, key)
    on('SREM', QUEUE_WORKERS, key)
  end
end
return {found[1], text(position), set_aside}
