-- End the hold of a listing: record it, and put a request for each order that it names on the queue, all in one call.
-- ARGV  1 holder's name, one row of ending.lua, then for each order a row of place.lua. The record names each order's
--       request by the id that the row proposes; here it gets the id of the job that carries it.
-- Gives what complete.lua gives.
job.first_of_ends(1 + ROW)
placed.stamp = out.stamp
local carried = {}

function job.place_all()
  on('SADD', QUEUES, WAITING)
  for i = 2 + ROW, #ARGV, 7 do
    local other = job.pointed_to(ARGV[i + 1])
    -- What stands there goes into the record: it may be an enemy's.
    if other and not string.find(other, '^[%w_-]+$') then other = nil end
    carried[ARGV[i]] = job.place(ARGV[i], ARGV[i + 1], i, other)
  end
end

function job.spread(id)
  local answer, s = job.answered('done', id, 2)
  if answer then return answer end
  if s and job.is_recalled(s) then -- nothing more is to be done for it: its next holder says so
    job.end_hold(JOB_PREFIX .. id, s, '2', ARGV[10], ARGV[11], 'queued')
    job.to_front(id)
    return '2'
  end
  local is_fine = pcall(job.place_all)
  job.write_placed()
  if not is_fine then return '-1' end -- what was placed stands; the next listing joins it
  ARGV[6] = string.gsub(ARGV[6], '"id":"(%x+)"', function(asked)
    return carried[asked] and '"id":"' .. carried[asked] .. '"'
  end)
  return job.complete('done', id, 2)
end

local is_fine, said = pcall(job.spread, ARGV[3])
job.write_ends()
return {set_aside, is_fine and said or '-1'}
