-- How a request is put on the queue, or joins the unfinished job of its order. Each is a row of seven words in ARGV:
--       id, order key (empty: no earlier call's job may be joined), data, description, deadline (empty: the worker's
--       default), urgent (1 or empty), whether a triggered order's child is to be cancelled (1 or empty)
local LOOKED_THROUGH = 1000 -- entries of the queue in which a job's own is looked for
local LOST_LOOK_MS = 60000 -- when to look at a held job next whose lease the index does not know
-- Written with one call each when all rows are through; pointers last, when their jobs stand in the queue.
local placed = {fresh = {}, behind = {}, indexed = {}, pointers = {}, since = text(WAITING_BAND + now.ms)}

-- A deadline is a time from now (`60000`) or, of what a worker asks for, a moment (`@1764403200000`).
function job.deadline_at(deadline)
  if string.sub(deadline, 1, 1) == '@' then return tonumber(string.sub(deadline, 2)) end
  return now.ms + tonumber(deadline)
end

-- The later deadline holds. One that leaves it to the worker is kept as the moment of asking.
function job.ask(key, s, deadline)
  if deadline == '' then
    redis.call('HSET', key, 'c_asked_at_ms', now.text)
  else
    local at_ms = job.deadline_at(deadline)
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
    on('ZADD', UNFINISHED, 'NX', placed.since, id)
    if urgent == '1' then
      on('LPUSH', WAITING, id)
    elseif not on('LPOS', WAITING, id, 'MAXLEN', LOOKED_THROUGH) then
      on('RPUSH', WAITING, id)
    end
  end
end

-- The job is of that order (nil: whatever its order is), or it is not joined.
function job.join(id, order, i)
  local urgent = ARGV[i + 5]
  local s, key = job.read(id), JOB_PREFIX .. id
  if not s or (order and s.order ~= order) or job.is_recalled(s) then return false end
  if s.done then
    if not job.is_requeued(id, s) then return false end
    job.start_run(id, s)
    s = job.read(id)
  end
  job.ask(key, s, ARGV[i + 4])
  redis.call('PERSIST', key) -- RQ may have ended an earlier run of it late
  if urgent == '1' then redis.call('HSET', key, 'c_urgent', '1') end
  if ARGV[i + 6] == '1' then redis.call('HSET', key, 'c_on_trigger', 'cancel_child') end
  if not placed.fresh[id] then job.see_to_its_place(id, s, urgent) elseif urgent == '1' then on('LPUSH', WAITING, id) end
  return true
end

function job.create(id, order, i)
  local deadline, stamp = ARGV[i + 4], placed.stamp
  local asked, at = 'c_asked_at_ms', now.text
  if deadline ~= '' then asked, at = 'c_deadline_at_ms', text(job.deadline_at(deadline)) end
  local named, value = 'c_order', order
  if order == '' then named, value = 'c_run', '1' end -- not noted at all
  redis.call('HSET', JOB_PREFIX .. id, 'data', ARGV[i + 2], 'description', ARGV[i + 3], named, value, 'c_run', '1',
    'c_enqueued_at_ms', now.text, asked, at, 'created_at', stamp, 'enqueued_at', stamp, 'last_heartbeat', stamp,
    unpack(JOB_FIELDS))
  if ARGV[i + 6] == '1' then redis.call('HSET', JOB_PREFIX .. id, 'c_on_trigger', 'cancel_child') end
  placed.fresh[id] = true
  placed.indexed[#placed.indexed + 1] = placed.since
  placed.indexed[#placed.indexed + 1] = id
  if ARGV[i + 5] == '1' then
    redis.call('HSET', JOB_PREFIX .. id, 'c_urgent', '1')
    on('LPUSH', WAITING, id)
  else
    placed.behind[#placed.behind + 1] = id
  end
  if job.is_shared(order) then placed.pointers[#placed.pointers + 1] = {order, id} end
end

-- A row's request joins the job that the order's pointer names, or makes its own; gives the id of the job that carries
-- it, and 1 if it is another one's.
function job.place(id, order, i, pointed_to)
  if redis.call('EXISTS', JOB_PREFIX .. id, OUTCOME_PREFIX .. id) > 0 then return id, 0 end
  if pointed_to and job.join(pointed_to, order, i) then return pointed_to, 1 end
  job.create(id, order, i)
  return id, 0
end

function job.write_placed()
  if #placed.behind > 0 then on('RPUSH', WAITING, unpack(placed.behind)) end
  if #placed.indexed > 0 then on('ZADD', UNFINISHED, unpack(placed.indexed)) end
  for _, pointer in ipairs(placed.pointers) do
    redis.call('SET', ORDER_PREFIX .. pointer[1], pointer[2], 'EX', POINTER_LIFE_S)
  end
end
