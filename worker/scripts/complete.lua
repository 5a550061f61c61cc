-- End holds: record outcomes, schedule retries, release jobs. One call for a group; each row is carried out whole or
-- not at all, and one whose lease or run is another by now changes nothing.
-- ARGV  1 holder's name, then the rows (ending.lua)
-- Gives names of keys that were set aside, and for each row: -1 its keys are damaged, 0 not ours any more, 1 done, 2 not
-- done because more is asked for by now than it was decided by (the job goes on), or for `retry` the due time in ms;
-- where a row is repeated, what it gave before.
job.first_of_ends(#ARGV)
local answer = {}
for i = 2, #ARGV, ROW do
  local is_fine, said = pcall(job.complete, ARGV[i], ARGV[i + 1], i)
  answer[#answer + 1] = is_fine and said or '-1'
end
job.write_ends()
return {set_aside, unpack(answer)}
