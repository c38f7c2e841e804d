-- For a command of which a second sending must not count again. ARGV[1] is the call's id, good for a minute.

local CALL = prefix .. 'call:' .. ARGV[1]

local function once(answer)
  redis.call('SET', CALL, cjson.encode(answer), 'PX', 60000)
  return answer
end

local function answered()
  local before = redis.call('GET', CALL)
  return before and cjson.decode(before)
end
