-- What RQ's requeue does, for all ids or for none, and the start of the new run with it. Left to the claim, the start
-- would come later: the deadline would not count yet, and a cancel of the same order would not find this job.
-- KEYS  1 waiting list, 2 set of queues, 3 failed registry
-- ARGV  1 job prefix, 2 outcome prefix, 3 order prefix, 4 pointer's life in s, 5 RQ's stamp, 6 retries that RQ may
--       count down, 7 compressed nothing (RQ's exc_info), 8 what: check, all (or none), known; then the ids
-- Gives the ids that are not among the failed ones.
local time = redis.call('TIME')
local now_ms = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
local known, unknown, seen = {}, {}, {}
for i = 9, #ARGV do
  local id = ARGV[i]
  if not seen[id] then
    seen[id] = true
    local is_failed = redis.call('ZSCORE', KEYS[3], id) and redis.call('EXISTS', ARGV[1] .. id) == 1
    table.insert(is_failed and known or unknown, id)
  end
end
if ARGV[8] == 'check' or (ARGV[8] == 'all' and #unknown > 0) then return unknown end
for _, id in ipairs(known) do
  local job = ARGV[1] .. id
  redis.call('ZREM', KEYS[3], id)
  -- By a client id the order is meant that had it when the request was first made.
  redis.call('HSETNX', job, 'c_meant_at_ms', redis.call('HGET', job, 'c_enqueued_at_ms') or now_ms)
  redis.call('HSET', job, 'status', 'queued', 'enqueued_at', ARGV[5], 'started_at', '', 'ended_at', '',
    'exc_info', ARGV[7], 'retries_left', ARGV[6], 'c_enqueued_at_ms', now_ms, 'c_asked_at_ms', now_ms)
  redis.call('HSETNX', job, 'c_run', '1')
  redis.call('HINCRBY', job, 'c_run', 1)
  redis.call('HDEL', job, 'c_done', 'c_attempts', 'c_deadline_at_ms')
  redis.call('PERSIST', job)
  redis.call('DEL', ARGV[2] .. id)
  redis.call('RPUSH', KEYS[1], id)
  -- Only an order that is named by algo id is noted (former versions kept client ids too). A key of another type in
  -- that place points to nothing.
  local order = redis.call('HGET', job, 'c_order')
  local pointer = order and string.find(order, '^[^:]*:a:') and ARGV[3] .. order
  if pointer and redis.call('TYPE', pointer).ok ~= 'string' then
    redis.call('SET', pointer, id, 'EX', tonumber(ARGV[4]))
  end
end
if #known > 0 then redis.call('SADD', KEYS[2], KEYS[1]) end
return unknown
