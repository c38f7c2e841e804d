#!lua flags=no-writes
-- Dead letters, newest first, from a place on; looks at 500 of them at the most.
-- KEYS[1] the queue's prefix
-- ARGV[1] those before this one in the order of death, or 'all'    ARGV[2] limit
-- ARGV[3] reason, or ''    ARGV[4] died at or after, ms since the epoch, or -1
-- Returns format, and 'missing'; or 'ok', the order up to which it looked ('' if that was all), and six values each.

if redis.call('EXISTS', SPEC) == 0 then
  return {FORMAT, 'missing'}
end
local LIMIT, REASON, SINCE = tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
local LOOKS, REPLY = 500, 8 * 1024 * 1024

local found = redis.call('ZRANGE', DEAD, ARGV[1] == 'all' and '+inf' or '(' .. ARGV[1], '-inf', 'BYSCORE', 'REV', 'LIMIT', 0, LOOKS, 'WITHSCORES')
local orders, ids, bytes, looked = {}, {}, 0, ''
for i = 1, #found, 2 do
  if #ids >= LIMIT or bytes > REPLY then
    break
  end
  looked = found[i + 1]
  local died, reason = string.match(redis.call('HGET', DEATHS, found[i]) or '', '^(%d+) (.*)$')
  if (REASON == '' or reason == REASON) and (SINCE < 0 or (tonumber(died) or 0) >= SINCE) then
    ids[#ids + 1], orders[#orders + 1] = found[i], found[i + 1]
    bytes = bytes + redis.call('HSTRLEN', JOBS, found[i])
  end
end
if #found < 2 * LOOKS and looked == (found[#found] or '') then
  looked = ''
end
return add_letters({FORMAT, 'ok', looked}, orders, ids)
