-- In bounded steps, what RQ's maintenance would do for this queue, without running anything of a job's: entries of
-- registries go when they have expired (entries, never jobs), dead workers leave RQ's sets, and what stands in RQ's
-- lists alone (enqueued by the version before this one, or left there by a stock worker) gets into the index.
-- ARGV  1 cursor through RQ's workers, 2 position in the queue
-- Gives the next cursor and position, and names of keys that were set aside.
local STEP, INTERMEDIATE_MS = 200, 60000
for key, kind in pairs({[WAITING] = 'list', [UNFINISHED] = 'zset', [SCHEDULED] = 'zset', [STARTED] = 'zset',
  [FINISHED] = 'zset', [FAILED] = 'zset', [INTERMEDIATE] = 'list', [WORKERS] = 'set', [QUEUE_WORKERS] = 'set'}) do
  own(key, kind)
end
first_write()

for _, registry in ipairs({FINISHED, FAILED, STARTED}) do
  local expired = redis.call('ZRANGEBYSCORE', registry, '-inf', text(now_s), 'LIMIT', 0, STEP)
  for _, entry in ipairs(registry == STARTED and expired or {}) do
    local id = string.match(entry, '^(.*):')
    local s = id and #id <= MAX_ID_BYTES and read(id)
    if s and s.done then end_again(id, s) end
  end
  write('ZREM', registry, expired)
end

-- A job without lease and end that the index does not know stands there from now on. RQ may have ended an earlier run
-- of it late, and let it run out.
local function adopt(id, band)
  if #id > MAX_ID_BYTES then return end
  local s = read(id)
  if not s or s.done then return end
  redis.call('PERSIST', JOB_PREFIX .. id)
  redis.call('ZADD', UNFINISHED, 'NX', s.lease and now_ms + LEASE_MS or band, id)
end

local position = tonumber(ARGV[2])
local waiting = redis.call('LRANGE', WAITING, position, position + STEP - 1)
for _, id in ipairs(waiting) do adopt(id, WAITING_BAND + now_ms) end
position = #waiting == STEP and position + STEP or 0

for _, id in ipairs(redis.call('LRANGE', INTERMEDIATE, 0, STEP - 1)) do
  adopt(id, WAITING_BAND + now_ms)
  local since = tonumber(redis.call('ZSCORE', UNFINISHED, id) or '')
  if not since or (since >= WAITING_BAND and since < RETRY_BAND and now_ms - (since - WAITING_BAND) > INTERMEDIATE_MS)
  then redis.call('LREM', INTERMEDIATE, 1, id) end
end

-- Retries of the version before this one, and those that a stock worker was told to make.
local due = redis.call('ZRANGE', SCHEDULED, 0, STEP - 1, 'WITHSCORES')
for i = 1, #due, 2 do
  local s = read(due[i])
  if not s or s.done then
    redis.call('ZREM', SCHEDULED, due[i])
  else
    adopt(due[i], RETRY_BAND + math.floor(tonumber(due[i + 1]) * 1000))
  end
end

local found = redis.call('SSCAN', WORKERS, ARGV[1], 'COUNT', 50)
for _, key in ipairs(found[2]) do
  if redis.call('EXISTS', key) == 0 then
    redis.call('SREM', WORKERS, key)
    redis.call('SREM', QUEUE_WORKERS, key)
  end
end
return {found[1], text(position), set_aside}
