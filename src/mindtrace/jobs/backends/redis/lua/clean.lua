#!lua flags=allow-oom
-- Cancel ready and scheduled jobs, a few hundred at a time; their ids stay known.
-- KEYS[1] the queue's prefix
-- ARGV[1] the call's id    ARGV[2] the most to cancel, up to 500
-- Returns format, and 'missing'; or 'ok', how many went, how many there were before.

local before = answered()
if before then
  return before
end
if redis.call('EXISTS', SPEC) == 0 then
  return {FORMAT, 'missing'}
end
local there = redis.call('ZCARD', READY) + redis.call('ZCARD', SCHEDULED)
local ids, room = {}, tonumber(ARGV[2])
for _, key in ipairs({READY, SCHEDULED}) do
  local entries = room > 0 and redis.call('ZPOPMIN', key, room) or {}
  for i = 1, #entries, 2 do
    ids[#ids + 1] = id_of(entries[i])
  end
  room = tonumber(ARGV[2]) - #ids
end
if #ids > 0 then
  redis.call('HDEL', JOBS, unpack(ids))
  redis.call('HDEL', STATES, unpack(ids))
  redis.call('HDEL', ERRORS, unpack(ids))
  remember(ids)
end
return once({FORMAT, 'ok', #ids, there})
