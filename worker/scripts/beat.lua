-- A worker's sign of life: prolong the leases that it names, tell RQ and people of it, look at gate and suspension.
-- ARGV  1 key of its worker hash, 2 life of that in s, 3 how many words of fields and values follow, those, then id and
--       lease of each job
-- Gives: now in ms, what the gate's record says (empty: nothing), suspended (1 or 0), whether RQ does not know the
-- worker any more (1 or 0), names of keys that were set aside, the leases that somebody else has taken, and keys of the
-- exchange that are refused.
job.first_write()
local lost, leases, fields, ends = {}, {}, tonumber(ARGV[3]), text(now.ms + LEASE_MS)
for i = 4 + fields, #ARGV, 2 do
  if redis.pcall('HGET', JOB_PREFIX .. ARGV[i], 'c_lease') == ARGV[i + 1] then
    leases[#leases + 1] = ends
    leases[#leases + 1] = ARGV[i]
    redis.call('PERSIST', JOB_PREFIX .. ARGV[i])
  else
    lost[#lost + 1] = ARGV[i + 1]
  end
end
write('ZADD', UNFINISHED, leases)
local kind = redis.call('TYPE', ARGV[1]).ok
local is_unknown = kind ~= 'hash' -- RQ could not read one that has these fields alone
if is_unknown and kind ~= 'none' then put_aside(ARGV[1]) end
if fields > 0 and not is_unknown then
  redis.call('HSET', ARGV[1], 'last_heartbeat', now.stamp(), BEAT_AT_MS, now.text, unpack(ARGV, 4, 3 + fields))
  redis.call('EXPIRE', ARGV[1], ARGV[2])
end
local gate = redis.pcall('HGET', GATE, 'until_ms')
gate = type(gate) == 'string' and job.whole(gate) and gate or ''
return {now.text, gate, redis.call('EXISTS', SUSPENDED), is_unknown and 1 or 0, set_aside, lost, on('SRANDMEMBER', SUSPECTS, 100)}
