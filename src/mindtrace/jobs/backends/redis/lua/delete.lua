#!lua flags=allow-oom
-- Delete the queue with all its jobs, if none is leased or dead, or if told to.
-- KEYS[1] the queue's prefix
-- ARGV[1] the call's id    ARGV[2] 1: also with leased and dead jobs
-- Returns format, and 'missing'; or 'in use', leased, dead; or 'ok'.

local before = answered()
if before then
  return before
end
if redis.call('EXISTS', SPEC) == 0 then
  return {FORMAT, 'missing'}
end
local leased = redis.call('ZCOUNT', LEASED, digits(now), '+inf')
local dead = redis.call('ZCARD', DEAD)
if ARGV[2] ~= '1' and leased + dead > 0 then
  return {FORMAT, 'in use', leased, dead}
end
-- UNLINK: the memory of a million jobs is given back beside the server's work.
redis.call('UNLINK', SPEC, READY, SCHEDULED, LEASED, JOBS, STATES, ERRORS, DEAD, DEATHS, BELL, WATCH, known_key(0),
  known_key(1), known_key(2), known_key(3))
return once({FORMAT, 'ok'})
