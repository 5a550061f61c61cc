-- Prolong the leases of all jobs in flight in one call.
-- KEYS  1 leases    ARGV  1 job prefix, 2 lease in ms, then id and lease of each job
-- Gives the leases that somebody else has taken.
local lost = {}
redis.call('ZREM', KEYS[1], '\0') -- the first write is one that a full server takes, as it takes all that follow it then
for i = 3, #ARGV, 2 do
  if redis.call('HGET', ARGV[1] .. ARGV[i], 'c_lease') == ARGV[i + 1] then
    redis.call('ZADD', KEYS[1], now_ms + tonumber(ARGV[2]), ARGV[i])
  else
    lost[#lost + 1] = ARGV[i + 1]
  end
end
return lost
