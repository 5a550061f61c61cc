-- A stock RQ worker is about to run one step of a job: note the attempt, tell what is known.
-- KEYS  1 job, 2 gate, 3 outcome, 4 leases
-- ARGV  1 id, 2 default deadline in ms, 3 order prefix, 4 pointer's life in s
-- Gives: now, the gate's end (0: open), enqueued at, deadline (all ms), run, attempts, pin, and whether the step is to
-- be taken: 0 yes, 1 no, this run has its outcome already, 2 no, a worker of ours has the job in hand; then the field
-- of ours that made no sense, if any, and when the order was first meant. After a no only the first two say anything.
local id, job = ARGV[1], KEYS[1]
-- A stock worker takes every entry of the waiting list for a job, also one that `urgent` has put there a second time.
local lease_ends_at_ms = tonumber(redis.call('ZSCORE', KEYS[4], id) or '0')
local held = lease_ends_at_ms > now_ms and redis.call('HEXISTS', job, 'c_lease') == 1
local damaged = not held and mend(job) or ''
local f = redis.call('HMGET', job, 'c_done', 'ended_at', 'c_order')
local settled = f[1]
if settled and (not f[2] or f[2] == '') then
  start_run(id, job, pointer_to(f[3], ARGV[3]), tonumber(ARGV[4]), KEYS[3])
  settled = false
end
local closed_until_ms = closed_until(KEYS[2])
if settled or held then
  -- Nothing of the job is read here: its holder sees to damaged fields, and an outcome does not hang on them any more.
  return {text(now_ms), text(closed_until_ms), text(now_ms), text(now_ms), '1', '', '', settled and 1 or 2, '',
    text(now_ms)}
end
f = redis.call('HMGET', job, 'c_enqueued_at_ms', 'c_asked_at_ms', 'c_deadline_at_ms', 'c_run', 'c_attempts', 'c_pin',
  'c_open_at_ms', 'c_meant_at_ms')
local enqueued_at, asked_at = f[1] or text(now_ms), f[2]
if not f[1] then
  asked_at = enqueued_at
  redis.call('HSET', job, 'c_enqueued_at_ms', enqueued_at, 'c_asked_at_ms', asked_at)
end
local attempts = f[5] or ''
if f[7] then
  attempts = with_lost_attempt(attempts, tonumber(f[7]))
  redis.call('HSET', job, 'c_attempts', attempts)
  redis.call('HDEL', job, 'c_open_at_ms')
end
if closed_until_ms == 0 then redis.call('HSET', job, 'c_open_at_ms', text(now_ms)) end
return {text(now_ms), text(closed_until_ms), enqueued_at, text(deadline_at(asked_at, f[3], enqueued_at, tonumber(ARGV[2]))),
  f[4] or '1', attempts, f[6] or '', 0, damaged, f[8] or enqueued_at}
