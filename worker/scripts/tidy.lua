-- In bounded steps, what RQ's maintenance would do for this queue, without running anything of a job's: entries of
-- registries go when they have expired (entries, never jobs), dead workers leave RQ's sets, what stands in RQ's lists
-- alone (enqueued by the version before this one, or left there by a stock worker) gets into the index, and what RQ has
-- overwritten of jobs that have ended is put right.
-- ARGV  1 cursor through RQ's workers, 2 position in the queue
-- Gives the next cursor and position, and names of keys that were set aside.
local STEP, INTERMEDIATE_MS = 200, 60000
local STOCK_LIFE_S = 3000 -- entries of stock workers live no longer; our own outlast their deadline by an hour
for key, kind in pairs({[WAITING] = 'list', [UNFINISHED] = 'zset', [SCHEDULED] = 'zset', [STARTED] = 'zset',
  [FINISHED] = 'zset', [FAILED] = 'zset', [CANCELED] = 'zset', [INTERMEDIATE] = 'list', [WORKERS] = 'set',
  [QUEUE_WORKERS] = 'set'}) do
  own(key, kind)
end
first_write()

-- A job without lease and end that the index does not know stands there from now on. Gives whether it has ended.
local function see_to(id, band)
  local s = #id <= MAX_ID_BYTES and read(id)
  if not s then return true end
  if not s.done then
    redis.call('ZADD', UNFINISHED, 'NX', s.lease and now_ms + LEASE_MS or band, id)
    return false
  end
  if is_requeued(id, s) then start_run(id, s) else put_right(id, s) end
  return true
end

for _, entry in ipairs(redis.call('ZRANGEBYSCORE', STARTED, '-inf', text(now_s + STOCK_LIFE_S), 'LIMIT', 0, STEP)) do
  see_to(string.match(entry, '^(.*):') or entry, WAITING_BAND + now_ms)
end
for _, registry in ipairs({FINISHED, FAILED, STARTED}) do
  write('ZREM', registry, redis.call('ZRANGEBYSCORE', registry, '-inf', text(now_s), 'LIMIT', 0, STEP))
end

local position = tonumber(ARGV[2])
local waiting = redis.call('LRANGE', WAITING, position, position + STEP - 1)
for _, id in ipairs(waiting) do see_to(id, WAITING_BAND + now_ms) end
position = #waiting == STEP and position + STEP or 0

for _, id in ipairs(redis.call('LRANGE', INTERMEDIATE, 0, STEP - 1)) do
  see_to(id, WAITING_BAND + now_ms)
  local since = tonumber(redis.call('ZSCORE', UNFINISHED, id) or '')
  if not since or (since >= WAITING_BAND and since < RETRY_BAND and now_ms - (since - WAITING_BAND) > INTERMEDIATE_MS)
  then redis.call('LREM', INTERMEDIATE, 1, id) end
end

-- Retries of the version before this one, and those that a stock worker was told to make.
local due = redis.call('ZRANGE', SCHEDULED, 0, STEP - 1, 'WITHSCORES')
for i = 1, #due, 2 do
  if see_to(due[i], RETRY_BAND + math.floor(tonumber(due[i + 1]) * 1000)) then redis.call('ZREM', SCHEDULED, due[i]) end
end

-- What a person took back is in no list any more, and gets its outcome all the same.
for _, id in ipairs(redis.call('ZRANGE', CANCELED, 0, STEP - 1)) do
  if see_to(id, WAITING_BAND + now_ms) then redis.call('ZREM', CANCELED, id) end
end

local found = redis.call('SSCAN', WORKERS, ARGV[1], 'COUNT', 50)
for _, key in ipairs(found[2]) do
  if redis.call('EXISTS', key) == 0 then
    redis.call('SREM', WORKERS, key)
    redis.call('SREM', QUEUE_WORKERS, key)
  end
end
return {found[1], text(position), set_aside}
