-- End holds: record outcomes, schedule retries, release jobs. One call for a group; each row is carried out whole or
-- not at all, and one whose lease or run is another by now changes nothing.
-- ARGV  1 holder's name, 2 key of its worker hash, then for each row ten words:
--       what (done, retry, release), id, lease, run, then
--       done     record, kind, result (base64), deadline it was decided by in ms (empty: the decision does not hang on
--                the deadline), attempts, pin
--       retry    attempts, pin, delay in ms, three unused
--       release  attempts (empty: as they were), pin, four unused
-- Gives for each row: -1 its keys are damaged, 0 not ours any more, 1 done, 2 not done because the deadline has moved
-- (the job goes on), or for `retry` the due time in ms; where a row is repeated, what it gave before.
local holder = ARGV[1]
for key, kind in pairs({[WAITING] = 'list', [UNFINISHED] = 'zset', [SCHEDULED] = 'zset', [STARTED] = 'zset',
  [FINISHED] = 'zset', [FAILED] = 'zset', [OUTCOMES] = 'stream', [ARGV[2]] = 'hash'}) do own(key, kind) end
first_write()

local finished, failed, working_s, stamp = 0, 0, 0, rq_time()
-- What all rows of a group say of one key is written at the end, with one call.
local ended, started, unscheduled, indexed, scheduled = {}, {}, {}, {}, {}
local registered, announced, over, front = {finished = {}, failed = {}}, {}, {}, {}

local function keep(new, attempts, pin)
  if attempts ~= '' then add(new, 'c_attempts', attempts) end
  if pin ~= '' then add(new, 'c_pin', pin) end
end

local function end_hold(id, lease, answer)
  add(started, id .. ':' .. lease)
  return {'c_ended', lease .. ' ' .. answer}
end

-- A job that a person took back stays so.
local function show(new, s, status) add(new, 'status', is_recalled(s) and s.status or status) end

local function to_front(id, job, s, new)
  show(new, s, 'queued')
  redis.call('HSET', job, unpack(new))
  redis.call('HDEL', job, 'c_lease', 'c_open_at_ms', 'c_due_at_ms')
  add(indexed, WAITING_BAND + now_ms, id)
  front[#front + 1] = id
end

-- A ledger that takes no entry any more (its last id is the largest there is) is set aside like any damaged key.
local function enter(record)
  local entry = {'MAXLEN', '~', LEDGER_MAXLEN, '*', 'outcome', record}
  if redis.pcall('XADD', OUTCOMES, unpack(entry)).err then
    redis.call('RENAME', OUTCOMES, OUTCOMES .. ':set-aside')
    redis.call('XADD', OUTCOMES, unpack(entry))
  end
end

local function record(id, order, i)
  redis.call('SET', OUTCOME_PREFIX .. id, ARGV[i + 4], 'EX', OUTCOME_TTL_S)
  enter(ARGV[i + 4])
  announced[#announced + 1] = id
  add(ended, id)
  if order and #order <= 200 and pointed_to(order) == id then add(over, ORDER_PREFIX .. order) end
end

-- What RQ leaves behind a job that has ended, but for a dependent, webhook or callback: a cancel job has none.
local function as_rq_does(id, job, lease, began_ms, is_failed, result)
  local life_s = is_failed and FAILURE_TTL_S or RESULT_TTL_S
  redis.call('EXPIRE', job, life_s)
  local results = RESULT_PREFIX .. id
  redis.pcall('XADD', results, 'MAXLEN', 10, '*', 'type', is_failed and 2 or 1, 'worker_name', holder,
    is_failed and 'exc_string' or 'return_value', result, 'execution_id', lease,
    'execution_started_at', string.format('%.6f', began_ms / 1000),
    'execution_ended_at', string.format('%.6f', now_s))
  redis.call('EXPIRE', results, life_s)
  add(is_failed and registered.failed or registered.finished, math.floor(now_s) + life_s, id)
  if is_failed then failed = failed + 1 else finished = finished + 1 end
  working_s = working_s + math.max(now_ms - began_ms, 0) / 1000
end

-- While it was decided that the deadline had passed, another strategy may have asked for the same order.
local function has_moved(s, decided_by_ms) return decided_by_ms ~= '' and deadline_of(s) > tonumber(decided_by_ms) end

local function done(id, job, s, i)
  if has_moved(s, ARGV[i + 7]) then
    local new = end_hold(id, s.lease, '2')
    keep(new, ARGV[i + 8], ARGV[i + 9])
    to_front(id, job, s, new)
    return 2
  end
  local is_failed, lease = FAILED_KINDS[ARGV[i + 5]], s.lease
  local new = end_hold(id, lease, '1')
  add(new, 'status', is_failed and 'failed' or 'finished', 'ended_at', stamp, 'last_heartbeat', stamp,
    'c_done', ARGV[i + 5])
  redis.call('HSET', job, unpack(new))
  redis.call('HDEL', job, 'c_lease', 'c_open_at_ms', 'c_attempts', 'c_due_at_ms')
  record(id, s.order, i)
  as_rq_does(id, job, lease, tonumber(s.open_at) or now_ms, is_failed, ARGV[i + 6])
  return 1
end

local function retry(id, job, s, i)
  local delay_ms = tonumber(ARGV[i + 6])
  local due_ms = now_ms + delay_ms
  local new = end_hold(id, s.lease, text(due_ms))
  keep(new, ARGV[i + 4], ARGV[i + 5])
  show(new, s, 'scheduled')
  add(new, 'c_due_at_ms', text(due_ms))
  redis.call('HSET', job, unpack(new))
  redis.call('HDEL', job, 'c_lease', 'c_open_at_ms')
  redis.pcall('HINCRBY', job, 'number_of_retries', 1) -- RQ's field, and not worth an outcome
  add(indexed, RETRY_BAND + due_ms, id)
  add(scheduled, string.format('%.6f', now_s + delay_ms / 1000), id)
  return due_ms
end

-- Without its hash (somebody deleted it) a held job still has its end, once: as long as the index knows the hold.
local function done_without_hash(what, id, i)
  if what ~= 'done' then return 0 end
  local before = redis.pcall('GET', OUTCOME_PREFIX .. id)
  if before then return before == ARGV[i + 4] and 1 or 0 end
  local ends_ms = tonumber(redis.call('ZSCORE', UNFINISHED, id) or '')
  if not ends_ms or ends_ms >= WAITING_BAND then return 0 end
  record(id, nil, i)
  add(started, id .. ':' .. ARGV[i + 2])
  return 1
end

local function complete(what, id, i)
  local job, lease, run = JOB_PREFIX .. id, ARGV[i + 2], ARGV[i + 3]
  local s = read(id)
  if not s then return done_without_hash(what, id, i) end
  if s.lease ~= lease or (s.run or '1') ~= run then
    local last = redis.call('HGET', job, 'c_ended') or ''
    return string.sub(last, 1, #lease + 1) == lease .. ' ' and tonumber(string.sub(last, #lease + 2)) or 0
  end
  add(unscheduled, id)
  if what == 'done' then return done(id, job, s, i) end
  if what == 'retry' then return retry(id, job, s, i) end
  local new = end_hold(id, lease, '1')
  keep(new, ARGV[i + 4], ARGV[i + 5])
  to_front(id, job, s, new)
  return 1
end

local answer = {}
for i = 3, #ARGV, 10 do
  local is_fine, said = pcall(complete, ARGV[i], ARGV[i + 1], i)
  answer[#answer + 1] = is_fine and text(said) or '-1'
end
write('ZREM', UNFINISHED, ended)
write('ZADD', UNFINISHED, indexed)
write('ZREM', STARTED, started)
write('ZREM', SCHEDULED, unscheduled)
write('ZADD', SCHEDULED, scheduled)
write('ZADD', FINISHED, registered.finished)
write('ZADD', FAILED, registered.failed)
if #over > 0 then redis.call('DEL', unpack(over)) end
for i = #front, 1, -1 do redis.call('LPUSH', WAITING, front[i]) end

-- RQ counts a worker's jobs in its hash; one that expired must not come back without its other fields.
if finished + failed > 0 and redis.call('EXISTS', ARGV[2]) == 1 then
  if finished > 0 then redis.pcall('HINCRBY', ARGV[2], 'successful_job_count', finished) end
  if failed > 0 then redis.pcall('HINCRBY', ARGV[2], 'failed_job_count', failed) end
  redis.pcall('HINCRBYFLOAT', ARGV[2], 'total_working_time', string.format('%.6f', working_s))
end
-- Told when all is written, and not worth any of it: a user without channels may not publish.
for _, id in ipairs(announced) do redis.pcall('PUBLISH', OUTCOME_PREFIX .. id, '1') end
return {set_aside, unpack(answer)}
