#!lua
-- Put dead jobs back under their ids, behind what is ready, as new but for their number and their past.
-- KEYS[1] the queue's prefix
-- ARGV[1] the call's id    ARGV[2..] ids, up to 500; those that are not dead any more are left out
-- Returns format, and 'missing'; or 'ok' and how many were put back.

local before = answered()
if before then
  return before
end
if redis.call('EXISTS', SPEC) == 0 then
  return {FORMAT, 'missing'}
end
local count = 0
for i = 2, #ARGV do
  local id = ARGV[i]
  if redis.call('ZREM', DEAD, id) == 1 then
    local job = numbers_of(redis.call('HGET', STATES, id))
    job.attempts, job.crashes, job.releases = 0, 0, 0
    job.replays = job.replays + 1
    job.place = new_places(1)
    redis.call('HDEL', DEATHS, id)
    put_back(id, job)
    count = count + 1
  end
end
if count > 0 then
  ring()
end
return once({FORMAT, 'ok', count})
