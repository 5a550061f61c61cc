-- End the hold on claimed jobs: record outcomes, schedule retries, hand unstarted jobs back. One call for a group.
-- A row whose lease another worker has taken changes nothing (it answers 0), so an outcome is recorded once.
-- KEYS  1 waiting list, 2 leases, 3 scheduled, 4 started, 5 finished, 6 failed, 7 ledger, 8 worker, 9 its executions
-- ARGV  1 job prefix, 2 execution prefix, 3 executions prefix, 4 order prefix, 5 outcome prefix, 6 result prefix,
--       7 worker's name, 8 outcome's life in s, 9 ledger's length, 10 result's life in s, 11 failure's life in s,
--       12 default deadline in ms, then for each row nine words:
--       what (done, again, back), id, lease (empty: a stock worker holds it), then
--       done   outcome record, failed (1 or 0), result (base64), deadline it was decided by in ms (empty: the decision
--              does not hang on the deadline), attempts, pin
--       again  attempts, pin, delay in ms, three unused
--       back   attempts, pin, four unused
-- Gives for each row: -1 its keys are damaged, 0 not ours any more, 1 done, 2 not done because the deadline has moved
-- (the job goes on), or for `again` the due time in ms; where a row is repeated, what it gave before.
local job_prefix, executions_prefix, worker = ARGV[1], ARGV[3], ARGV[7]
local finished, failed = 0, 0
local working_s = 0

local stamp = nil -- of now, as RQ writes it

-- What all rows of a group say of one key is written at the end, with one call. A row is settled at the moment in which
-- its job loses `c_lease`: no other row of the group can hold the same job.
local over = {leases = {}, started = {}, keys = {}, entries = {}, finished = {}, failed = {}}
local function add(list, ...)
  for i = 1, select('#', ...) do list[#list + 1] = (select(i, ...)) end
end

local function write(command, key, list)
  if #list > 0 then redis.call(command, key, unpack(list)) end
end

local function end_hold(id, lease)
  local entry = id .. ':' .. lease
  add(over.leases, id)
  add(over.started, entry)
  add(over.entries, entry)
  add(over.keys, ARGV[2] .. entry, executions_prefix .. id)
end

local function release(id, job, lease)
  end_hold(id, lease)
  redis.call('HDEL', job, 'c_lease', 'c_open_at_ms')
end

-- While it was decided that the deadline had passed, another strategy may have asked for the same order.
local function deadline_moved(job, decided_by_ms)
  if decided_by_ms == '' then return false end
  local f = redis.call('HMGET', job, 'c_asked_at_ms', 'c_deadline_at_ms', 'c_enqueued_at_ms')
  return deadline_at(whole(f[1]) and f[1], whole(f[2]) and f[2], whole(f[3]) and f[3] or text(now_ms),
    tonumber(ARGV[12])) > tonumber(decided_by_ms)
end

local function keep(job, attempts, pin)
  redis.call('HSET', job, 'c_attempts', attempts)
  if pin ~= '' then redis.call('HSET', job, 'c_pin', pin) end
end

-- What RQ's handle_job_success and handle_job_failure leave behind, except for a dependent, webhook or callback: a
-- cancel job has none.
local function as_rq_does(id, lease, began_ms, i)
  local life_s, registry, is_failed = tonumber(ARGV[10]), over.finished, ARGV[i + 4] == '1'
  if is_failed then life_s, registry = tonumber(ARGV[11]), over.failed end
  local result = ARGV[6] .. id
  redis.call('EXPIRE', job_prefix .. id, life_s)
  redis.call('XADD', result, 'MAXLEN', 10, '*', 'type', is_failed and 2 or 1, 'worker_name', worker,
    is_failed and 'exc_string' or 'return_value', ARGV[i + 5], 'execution_id', lease,
    'execution_started_at', string.format('%.6f', began_ms / 1000),
    'execution_ended_at', string.format('%.6f', now_s))
  redis.call('EXPIRE', result, life_s)
  add(registry, math.floor(now_s) + life_s, id)
  if is_failed then failed = failed + 1 else finished = finished + 1 end
  working_s = working_s + math.max(now_ms - began_ms, 0) / 1000
end

local function record(id, job, order, is_failed, outcome, ...)
  stamp = stamp or rq_time()
  redis.call('HSET', job, 'status', is_failed and 'failed' or 'finished', 'ended_at', stamp, 'last_heartbeat', stamp,
    'c_done', '1')
  redis.call('HDEL', job, 'c_open_at_ms', 'c_attempts', ...)
  redis.call('SET', ARGV[5] .. id, outcome, 'EX', tonumber(ARGV[8]))
  redis.call('XADD', KEYS[7], 'MAXLEN', '~', tonumber(ARGV[9]), '*', 'outcome', outcome)
  redis.call('PUBLISH', ARGV[5] .. id, '1')
  if order and redis.pcall('GET', ARGV[4] .. order) == id then add(over.keys, ARGV[4] .. order) end
end

local front = {} -- ids for the front of the queue, in the order in which they stood there
local function requeue(id, job)
  redis.call('HSET', job, 'status', 'queued')
  front[#front + 1] = id
end

local function done(id, job, lease, held, i)
  if held[3] then -- a stock worker ran it beside us; the first outcome stands
    release(id, job, lease)
    return 0
  end
  if deadline_moved(job, ARGV[i + 6]) then
    release(id, job, lease)
    keep(job, ARGV[i + 7], ARGV[i + 8])
    requeue(id, job)
    return 2
  end
  end_hold(id, lease)
  record(id, job, held[4], ARGV[i + 4] == '1', ARGV[i + 3], 'c_lease')
  as_rq_does(id, lease, whole(held[2]) or now_ms, i)
  return 1
end

local function again(id, job, lease, i)
  local delay_ms = tonumber(ARGV[i + 5])
  local due_ms = now_ms + delay_ms
  release(id, job, lease)
  keep(job, ARGV[i + 3], ARGV[i + 4])
  redis.call('HSET', job, 'status', 'scheduled')
  redis.pcall('HINCRBY', job, 'number_of_retries', 1) -- RQ's field, and not worth an outcome
  redis.call('ZADD', KEYS[3], string.format('%.6f', now_s + delay_ms / 1000), id)
  return due_ms
end

-- The lease is gone. A worker that did not hear the answer asks again: then that answer stands.
local function as_answered_before(what, id, job, i)
  if what == 'done' then return redis.call('GET', ARGV[5] .. id) == ARGV[i + 3] and 1 or 0 end
  local f = redis.call('HMGET', job, 'c_attempts', 'c_lease', 'status')
  local is_written = f[1] == ARGV[i + 3]
  if what == 'back' then
    return not f[2] and f[3] == 'queued' and (is_written or ARGV[i + 3] == '') and 1 or 0
  end
  if not is_written then return 0 end
  local due_s = redis.call('ZSCORE', KEYS[3], id)
  return due_s and math.floor(due_s * 1000 + 0.0005) or now_ms -- given again already: nothing to wait for
end

local function settle(what, id, lease, i)
  local job = job_prefix .. id
  if lease == '' then
    -- A stock worker: RQ does RQ's part, here only the outcome is recorded, and the first one of a run stands.
    local f = redis.call('HMGET', job, 'c_done', 'c_order')
    if f[1] or redis.call('EXISTS', job) == 0 then return 0 end
    if what == 'done' and deadline_moved(job, ARGV[i + 6]) then
      keep(job, ARGV[i + 7], ARGV[i + 8])
      redis.call('HDEL', job, 'c_open_at_ms')
      return 2
    elseif what == 'done' then
      record(id, job, f[2], ARGV[i + 4] == '1', ARGV[i + 3])
    else
      keep(job, ARGV[i + 3], ARGV[i + 4])
      redis.call('HDEL', job, 'c_open_at_ms')
    end
    return 1
  end
  local held = redis.call('HMGET', job, 'c_lease', 'c_open_at_ms', 'c_done', 'c_order')
  if held[1] ~= lease then return as_answered_before(what, id, job, i) end
  if what == 'done' then return done(id, job, lease, held, i) end
  if what == 'again' then return again(id, job, lease, i) end
  release(id, job, lease)
  if ARGV[i + 3] ~= '' then keep(job, ARGV[i + 3], ARGV[i + 4]) end
  requeue(id, job)
  return 1
end

-- The first write is one that a full server takes, as it takes all that follow it then, and a read-only one refuses
-- for all rows at once.
redis.call('ZREM', KEYS[2], '\0')
local answer = {}
for i = 13, #ARGV, 9 do
  local is_fine, said = pcall(settle, ARGV[i], ARGV[i + 1], ARGV[i + 2], i)
  answer[#answer + 1] = is_fine and text(said) or '-1'
end
write('ZREM', KEYS[2], over.leases)
write('ZREM', KEYS[4], over.started)
write('SREM', KEYS[9], over.entries)
write('ZADD', KEYS[5], over.finished)
write('ZADD', KEYS[6], over.failed)
if #over.keys > 0 then redis.call('DEL', unpack(over.keys)) end
for i = #front, 1, -1 do redis.call('LPUSH', KEYS[1], front[i]) end

-- RQ counts a worker's jobs in its hash; one that expired must not come back without its other fields.
if finished + failed > 0 and redis.call('EXISTS', KEYS[8]) == 1 then
  if finished > 0 then redis.call('HINCRBY', KEYS[8], 'successful_job_count', finished) end
  if failed > 0 then redis.call('HINCRBY', KEYS[8], 'failed_job_count', failed) end
  redis.call('HINCRBYFLOAT', KEYS[8], 'total_working_time', string.format('%.6f', working_s))
end
-- RQ trims its registries when somebody looks; a few expired entries a call keep them short without that.
for _, registry in ipairs({KEYS[5], KEYS[6]}) do
  local expired = redis.call('ZRANGEBYSCORE', registry, '-inf', text(now_s), 'LIMIT', 0, 2 * #answer + 2)
  if #expired > 0 then redis.call('ZREM', registry, unpack(expired)) end
end
return answer
