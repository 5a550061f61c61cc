-- Enqueue cancel requests, or join them to the unfinished job of the same order. Safe to repeat: the caller makes ids.
-- ARGV  1 RQ's stamp of now, then for each request six words:
--       id, order key (empty: no earlier call's job may be joined), data, description, deadline in ms from now (empty:
--       the worker's default), urgent (1 or empty)
-- Gives for each request: the id of the job that carries it, and 1 if another request had made that job.
-- Requests for one order stand side by side under one id: inside one call they share a job.
local stamp = ARGV[1]
local LOOKED_THROUGH = 1000 -- entries of the queue in which a job's own is looked for
local LOST_LOOK_MS = 60000 -- when to look at a held job next whose lease the index does not know

own(WAITING, 'list')
own(QUEUES, 'set')
own(UNFINISHED, 'zset')
own(FAILED, 'zset')

-- The later deadline holds. One that leaves it to the worker is kept as the moment of asking.
local function ask(job, s, deadline_ms)
  if deadline_ms == '' then
    redis.call('HSET', job, 'c_asked_at_ms', text(now_ms))
  else
    local at_ms = now_ms + tonumber(deadline_ms)
    if at_ms > tonumber(s.deadline_at or '0') then redis.call('HSET', job, 'c_deadline_at_ms', text(at_ms)) end
  end
end

-- Whatever RQ or a crash did to a job's place: after this somebody will come by. One entry more does no harm.
local function see_to_its_place(id, s, urgent)
  local due_ms = due_at(id, s)
  if s.lease then
    redis.call('ZADD', UNFINISHED, 'NX', now_ms + LOST_LOOK_MS, id)
  elseif due_ms and due_ms > now_ms then
    redis.call('ZADD', UNFINISHED, 'NX', RETRY_BAND + due_ms, id)
  else
    redis.call('ZADD', UNFINISHED, 'NX', WAITING_BAND + now_ms, id)
    if urgent == '1' then
      redis.call('LPUSH', WAITING, id)
    elseif not redis.call('LPOS', WAITING, id, 'MAXLEN', LOOKED_THROUGH) then
      redis.call('RPUSH', WAITING, id)
    end
  end
end

local fresh = {} -- ids that this call has made
local function join(id, deadline_ms, urgent)
  local s, job = read(id), JOB_PREFIX .. id
  if not s or is_recalled(s) then return false end
  if s.done then
    if not is_requeued(id, s) then return false end
    start_run(id, s)
    s = read(id)
  end
  ask(job, s, deadline_ms)
  redis.call('PERSIST', job)
  if urgent == '1' then redis.call('HSET', job, 'c_urgent', '1') end
  if not fresh[id] then see_to_its_place(id, s, urgent) elseif urgent == '1' then redis.call('LPUSH', WAITING, id) end
  return true
end

-- Written with one call each when all rows are through; pointers last, when their jobs stand in the queue.
local behind, indexed, pointers = {}, {}, {}
local function create(id, order, i)
  local deadline_ms, urgent = ARGV[i + 4], ARGV[i + 5]
  local asked, at = 'c_asked_at_ms', text(now_ms)
  if deadline_ms ~= '' then asked, at = 'c_deadline_at_ms', text(now_ms + tonumber(deadline_ms)) end
  local named, key = 'c_order', order
  if order == '' then named, key = 'c_run', '1' end -- not noted at all
  redis.call('HSET', JOB_PREFIX .. id, 'data', ARGV[i + 2], 'description', ARGV[i + 3], named, key, 'c_run', '1',
    'c_enqueued_at_ms', text(now_ms), asked, at, 'created_at', stamp, 'enqueued_at', stamp, 'last_heartbeat', stamp,
    unpack(JOB_FIELDS))
  fresh[id] = true
  indexed[#indexed + 1] = WAITING_BAND + now_ms
  indexed[#indexed + 1] = id
  if urgent == '1' then
    redis.call('HSET', JOB_PREFIX .. id, 'c_urgent', '1')
    redis.call('LPUSH', WAITING, id)
  else
    behind[#behind + 1] = id
  end
  if is_shared(order) then pointers[#pointers + 1] = {order, id} end
end

local answer = {}
redis.call('SADD', QUEUES, WAITING)
local last_asked, last_id
for i = 2, #ARGV, 6 do
  local asked, order = ARGV[i], ARGV[i + 1]
  local id, duplicate = asked, 0
  if asked == last_asked then
    -- Also where the job has ended meanwhile: this is a repeat then, and requests of one call share a ticket.
    id, duplicate = last_id, 1
    join(id, ARGV[i + 4], ARGV[i + 5])
  elseif redis.call('EXISTS', JOB_PREFIX .. id, OUTCOME_PREFIX .. id) == 0 then
    local other = is_shared(order) and pointed_to(order)
    if other and join(other, ARGV[i + 4], ARGV[i + 5]) then
      id, duplicate = other, 1
    else
      create(id, order, i)
    end
  end
  last_asked, last_id = asked, id
  answer[#answer + 1] = id
  answer[#answer + 1] = duplicate
end
if #behind > 0 then redis.call('RPUSH', WAITING, unpack(behind)) end
if #indexed > 0 then redis.call('ZADD', UNFINISHED, unpack(indexed)) end
for _, pointer in ipairs(pointers) do
  redis.call('SET', ORDER_PREFIX .. pointer[1], pointer[2], 'EX', POINTER_LIFE_S)
end
return answer
