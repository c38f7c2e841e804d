#!lua flags=allow-oom
-- Forget dead jobs.
-- KEYS[1] the queue's prefix
-- ARGV[1] the call's id    ARGV[2..] ids, up to 500; those that are not dead any more are left out
-- Returns format, and 'missing'; or 'ok' and how many went.

local before = answered()
if before then
  return before
end
if redis.call('EXISTS', SPEC) == 0 then
  return {FORMAT, 'missing'}
end
local count = 0
for i = 2, #ARGV do
  if redis.call('ZREM', DEAD, ARGV[i]) == 1 then
    for _, key in ipairs({JOBS, STATES, ERRORS, DEATHS}) do
      redis.call('HDEL', key, ARGV[i])
    end
    count = count + 1
  end
end
return once({FORMAT, 'ok', count})
