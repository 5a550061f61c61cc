-- In bounded steps, what RQ's maintenance would do for this queue, without running anything of a job's: entries of
-- registries go when they have expired (entries, never jobs), dead workers leave RQ's sets, and what stands in RQ's
-- lists alone (enqueued by the version before this one, or left there by a stock worker) gets into the index.
-- ARGV  1 cursor through RQ's workers, 2 position in the queue
-- Gives the next cursor and position, and names of keys that were set aside.
local STEP, INTERMEDIATE_MS = 200, 60000
job.first_write()

for _, registry in ipairs({FINISHED, FAILED, STARTED}) do
  write('ZREM', registry, on('ZRANGEBYSCORE', registry, '-inf', text(now.s), 'LIMIT', 0, STEP))
end

-- A job without lease and end that the index does not know stands there from now on.
local function adopt(id, band)
  if #id > MAX_ID_BYTES then return end
  local s = job.read(id)
  if not s or s.done then return end
  on('ZADD', UNFINISHED, 'NX', text(s.lease and now.ms + LEASE_MS or band), id)
end

local position = tonumber(ARGV[2])
local waiting = on('LRANGE', WAITING, position, position + STEP - 1)
for _, id in ipairs(waiting) do adopt(id, WAITING_BAND + now.ms) end
position = #waiting == STEP and position + STEP or 0

for _, id in ipairs(on('LRANGE', INTERMEDIATE, 0, STEP - 1)) do
  adopt(id, WAITING_BAND + now.ms)
  local since = tonumber(on('ZSCORE', UNFINISHED, id) or '')
  if not since or (since >= WAITING_BAND and since < RETRY_BAND and now.ms - (since - WAITING_BAND) > INTERMEDIATE_MS)
  then on('LREM', INTERMEDIATE, 1, id) end
end

-- Retries of the version before this one, and those that a stock worker was told to make.
local due = on('ZRANGE', SCHEDULED, 0, STEP - 1, 'WITHSCORES')
for i = 1, #due, 2 do
  local s = job.read(due[i])
  if not s or s.done then
    on('ZREM', SCHEDULED, due[i])
  else
    adopt(due[i], RETRY_BAND + (job.moment(due[i + 1]) or now.ms))
  end
end

local found = on('SSCAN', WORKERS, ARGV[1], 'COUNT', 50)
for _, key in ipairs(found[2]) do
  if redis.call('EXISTS', key) == 0 then
    on('SREM', WORKERS, key)
    on('SREM', QUEUE_WORKERS, key)
  end
end
return {found[1], text(position), set_aside}
