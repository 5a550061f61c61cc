-- Enqueue cancel requests, or join them to the unfinished job of the same order. Safe to repeat: the caller makes ids.
-- ARGV  1 RQ's stamp of now, then the rows (place.lua)
-- Gives the first request's id, which proves whose answer it is, and when this call made its job (ms; 0: it did not, as
-- it is a repeat or joined another one), then for each request: the id of the job that carries it, and 1 if another
-- request had made that job.
-- Requests for one order stand side by side under one id: inside one call they share a job.
placed.stamp = ARGV[1]
local answer = {''}
-- Before anything is written: a strategy cannot set aside what has another type than it should.
on('LLEN', WAITING)
on('ZCARD', UNFINISHED)
on('SADD', QUEUES, WAITING)
local last_asked, last_id
for i = 2, #ARGV, 7 do
  local asked, order = ARGV[i], ARGV[i + 1]
  local id, duplicate = asked, 0
  if asked == last_asked then
    -- Also where the job has ended meanwhile: this is a repeat then, and requests of one call share a ticket.
    id, duplicate = last_id, 1
    job.join(id, nil, i)
  else
    id, duplicate = job.place(id, order, i, job.is_shared(order) and job.pointed_to(order))
  end
  last_asked, last_id = asked, id
  answer[#answer + 1] = id
  answer[#answer + 1] = duplicate
end
job.write_placed()
answer[1] = ARGV[2] .. ' ' .. (placed.fresh[ARGV[2]] and now.text or '0')
return answer
