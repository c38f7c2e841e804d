#!lua
-- Store messages whose ids are not known: all of them or, where they do not all fit into the queue, none.
-- (Without the flag allow-oom: on a server that is out of memory it writes nothing.)
-- KEYS[1] the queue's prefix
-- ARGV    for each message, up to 500: id, body, and either '' or 'priority due crash_limit', where due is 0,
--         '+' and ms from now, or '@' and ms since the epoch, and crash_limit -1 for none
-- Returns format, and 'missing' for a queue that is not there; or 'ok', a letter for each message, levels, most, kind:
--   s stored, d duplicate, b duplicate with another body, f full, k no priority queue, l not one of its levels

local spec = redis.call('HMGET', SPEC, 'kind', 'levels', 'most')
if not spec[1] then
  return {FORMAT, 'missing'}
end
local levels, most = tonumber(spec[2]), tonumber(spec[3])

local ids = {}
for i = 1, #ARGV, 3 do
  ids[#ids + 1] = ARGV[i]
end
local ended_now = redis.call('SMISMEMBER', known_key(0), unpack(ids))
local ended_before = redis.call('SMISMEMBER', known_key(1), unpack(ids))

local outcomes, new, first = {}, {}, {} -- `first`: body by id, of those that are stored here
for i, id in ipairs(ids) do
  local body, options = ARGV[3 * i - 1], ARGV[3 * i]
  local priority, sign, due, crash_limit = 0, '', 0, -1
  if options ~= '' then
    local p, s, d, c = string.match(options, '^(%-?%d+) ([+@]?)(%d+) (%-?%d+)$')
    priority, sign, due, crash_limit = tonumber(p), s, tonumber(d), tonumber(c)
    if sign == '+' then
      due = now + due
    end
  end
  if priority ~= 0 and spec[1] ~= 'priority' then
    outcomes[i] = 'k'
  elseif priority ~= 0 and levels >= 0 and (priority < 0 or priority > levels) then
    outcomes[i] = 'l'
  elseif ended_now[i] == 1 or ended_before[i] == 1 then
    outcomes[i] = 'd'
  elseif first[id] then
    outcomes[i] = first[id] == body and 'd' or 'b'
  elseif redis.call('HEXISTS', JOBS, id) == 1 then
    outcomes[i] = redis.call('HGET', JOBS, id) == body and 'd' or 'b'
  else
    outcomes[i] = 's'
    first[id] = body
    new[#new + 1] = {id = id, body = body, priority = priority, due = due, crash_limit = crash_limit}
  end
end

if most >= 0 and #new > 0 then
  if redis.call('ZCARD', READY) + redis.call('ZCARD', SCHEDULED) + #new > most then
    for i, id in ipairs(ids) do
      if first[id] and string.find(outcomes[i], '[sdb]') then
        outcomes[i] = 'f'
      end
    end
    new = {}
  end
end

if #new > 0 then
  local place = new_places(#new) - #new
  local bodies, entries = {}, {}
  for i, job in ipairs(new) do
    bodies[#bodies + 1] = job.id
    bodies[#bodies + 1] = job.body
    if job.due <= now then
      entries[#entries + 1] = -job.priority
      entries[#entries + 1] = member(place + i, job.id)
    else
      schedule(job.due, place + i, job.id)
    end
    if job.crash_limit >= 0 or (job.priority ~= 0 and job.due > now) then
      local numbers = numbers_of(nil)
      numbers.priority, numbers.crash_limit = job.priority, job.crash_limit
      redis.call('HSET', STATES, job.id, text_of(numbers))
    end
  end
  redis.call('HSET', JOBS, unpack(bodies))
  if #entries > 0 then
    redis.call('ZADD', READY, unpack(entries))
    ring()
  end
end
return {FORMAT, 'ok', table.concat(outcomes), spec[2], spec[3], spec[1]}
