-- Enqueue cancel requests, or join them to the unfinished job of the same order. Safe to repeat: the caller makes ids.
-- ARGV  1 RQ's stamp of now, then for each request seven words:
--       id, order key (empty: no earlier call's job may be joined), data, description, deadline in ms from now (empty:
--       the worker's default), urgent (1 or empty), whether a triggered order's child is to be cancelled (1 or empty)
-- Gives the first request's id, which proves whose answer it is, then for each request: the id of the job that carries
-- it, and 1 if another request had made that job.
-- Requests for one order stand side by side under one id: inside one call they share a job.
local LOOKED_THROUGH = 1000 -- entries of the queue in which a job's own is looked for
local LOST_LOOK_MS = 60000 -- when to look at a held job next whose lease the index does not know
local waits_since = text(WAITING_BAND + now.ms)
local fresh = {} -- ids that this call has made
-- Written with one call each when all rows are through; pointers last, when their jobs stand in the queue.
local behind, indexed, pointers = {}, {}, {}

-- The later deadline holds. One that leaves it to the worker is kept as the moment of asking.
function job.ask(key, s, deadline_ms)
  if deadline_ms == '' then
    redis.call('HSET', key, 'c_asked_at_ms', now.text)
  else
    local at_ms = now.ms + tonumber(deadline_ms)
    if at_ms > tonumber(s.deadline_at or '0') then redis.call('HSET', key, 'c_deadline_at_ms', text(at_ms)) end
  end
end

-- Whatever RQ or a crash did to a job's place: after this somebody will come by. One entry more does no harm.
function job.see_to_its_place(id, s, urgent)
  local due_ms = job.due_at(id, s)
  if s.lease then
    on('ZADD', UNFINISHED, 'NX', text(now.ms + LOST_LOOK_MS), id)
  elseif due_ms and due_ms > now.ms then
    on('ZADD', UNFINISHED, 'NX', text(RETRY_BAND + due_ms), id)
  else
    on('ZADD', UNFINISHED, 'NX', waits_since, id)
    if urgent == '1' then
      on('LPUSH', WAITING, id)
    elseif not on('LPOS', WAITING, id, 'MAXLEN', LOOKED_THROUGH) then
      on('RPUSH', WAITING, id)
    end
  end
end

-- The job is of that order (nil: whatever its order is), or it is not joined.
function job.join(id, order, i)
  local deadline_ms, urgent = ARGV[i + 4], ARGV[i + 5]
  local s, key = job.read(id), JOB_PREFIX .. id
  if not s or (order and s.order ~= order) or job.is_recalled(s) then return false end
  if s.done then
    if not job.is_requeued(id, s) then return false end
    job.start_run(id, s)
    s = job.read(id)
  end
  job.ask(key, s, deadline_ms)
  redis.call('PERSIST', key) -- RQ may have ended an earlier run of it late
  if urgent == '1' then redis.call('HSET', key, 'c_urgent', '1') end
  if ARGV[i + 6] == '1' then redis.call('HSET', key, 'c_on_trigger', 'cancel_child') end
  if not fresh[id] then job.see_to_its_place(id, s, urgent) elseif urgent == '1' then on('LPUSH', WAITING, id) end
  return true
end

function job.create(id, order, i)
  local deadline_ms, stamp = ARGV[i + 4], ARGV[1]
  local asked, at = 'c_asked_at_ms', now.text
  if deadline_ms ~= '' then asked, at = 'c_deadline_at_ms', text(now.ms + tonumber(deadline_ms)) end
  local named, value = 'c_order', order
  if order == '' then named, value = 'c_run', '1' end -- not noted at all
  redis.call('HSET', JOB_PREFIX .. id, 'data', ARGV[i + 2], 'description', ARGV[i + 3], named, value, 'c_run', '1',
    'c_enqueued_at_ms', now.text, asked, at, 'created_at', stamp, 'enqueued_at', stamp, 'last_heartbeat', stamp,
    unpack(JOB_FIELDS))
  if ARGV[i + 6] == '1' then redis.call('HSET', JOB_PREFIX .. id, 'c_on_trigger', 'cancel_child') end
  fresh[id] = true
  indexed[#indexed + 1] = waits_since
  indexed[#indexed + 1] = id
  if ARGV[i + 5] == '1' then
    redis.call('HSET', JOB_PREFIX .. id, 'c_urgent', '1')
    on('LPUSH', WAITING, id)
  else
    behind[#behind + 1] = id
  end
  if job.is_shared(order) then pointers[#pointers + 1] = {order, id} end
end

local answer = {ARGV[2]}
on('SADD', QUEUES, WAITING)
local last_asked, last_id
for i = 2, #ARGV, 7 do
  local asked, order = ARGV[i], ARGV[i + 1]
  local id, duplicate = asked, 0
  if asked == last_asked then
    -- Also where the job has ended meanwhile: this is a repeat then, and requests of one call share a ticket.
    id, duplicate = last_id, 1
    job.join(id, nil, i)
  elseif redis.call('EXISTS', JOB_PREFIX .. id, OUTCOME_PREFIX .. id) == 0 then
    local other = job.is_shared(order) and job.pointed_to(order)
    if other and job.join(other, order, i) then
      id, duplicate = other, 1
    else
      job.create(id, order, i)
    end
  end
  last_asked, last_id = asked, id
  answer[#answer + 1] = id
  answer[#answer + 1] = duplicate
end
if #behind > 0 then on('RPUSH', WAITING, unpack(behind)) end
if #indexed > 0 then on('ZADD', UNFINISHED, unpack(indexed)) end
for _, pointer in ipairs(pointers) do
  redis.call('SET', ORDER_PREFIX .. pointer[1], pointer[2], 'EX', POINTER_LIFE_S)
end
return answer
