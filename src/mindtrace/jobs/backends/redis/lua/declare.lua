#!lua
-- Make the queue if there is none.
-- KEYS[1] the queue's prefix
-- ARGV    kind, levels, most: the last two -1 for none
-- Returns format, then kind, levels, most of the queue that is there now.

if redis.call('EXISTS', SPEC) == 0 then
  redis.call('HSET', SPEC, 'kind', ARGV[1], 'levels', ARGV[2], 'most', ARGV[3], 'place', 0)
end
local spec = redis.call('HMGET', SPEC, 'kind', 'levels', 'most')
return {FORMAT, spec[1], spec[2], spec[3]}
