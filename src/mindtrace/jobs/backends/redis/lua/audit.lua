#!lua flags=no-writes,allow-cross-slot-keys
-- All keys of a namespace, at one instant. The server does nothing else meanwhile: for tests and small servers.
-- ARGV[1] the namespace
-- Returns the time, ms since the epoch; then for each key its name, its type, ms left to it (-1: no limit), and what
--   lies in it: members and scores of a zset; members of a set; fields of a hash, those of `spec`, `states` and
--   `deaths` with their values, since those are small.

local SMALL = {spec = true, states = true, deaths = true}

local time = redis.call('TIME')
local reply = {time[1] * 1000 + math.floor(time[2] / 1000)}

local function inside(key, kind)
  if kind == 'zset' then
    return redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  elseif kind == 'set' then
    return redis.call('SMEMBERS', key)
  elseif kind == 'hash' then
    return redis.call(SMALL[string.match(key, '[^:]*$')] and 'HGETALL' or 'HKEYS', key)
  end
  return {}
end

for _, key in ipairs(redis.call('KEYS', ARGV[1] .. ':*')) do
  local kind = redis.call('TYPE', key).ok
  reply[#reply + 1] = {key, kind, redis.call('PTTL', key), inside(key, kind)}
end
return reply
