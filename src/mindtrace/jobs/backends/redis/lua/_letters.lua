-- Dead letters as the client reads them.

-- Six values each, appended to `reply`: order, id, '<ms> <reason>', the eight numbers, body, errors.
local function add_letters(reply, orders, ids)
  if #ids == 0 then
    return reply
  end
  local deaths, states = redis.call('HMGET', DEATHS, unpack(ids)), redis.call('HMGET', STATES, unpack(ids))
  local bodies, errors = redis.call('HMGET', JOBS, unpack(ids)), redis.call('HMGET', ERRORS, unpack(ids))
  for i, id in ipairs(ids) do
    for _, value in ipairs({orders[i], id, deaths[i] or '', states[i] or '', bodies[i] or '', errors[i] or ''}) do
      reply[#reply + 1] = value
    end
  end
  return reply
end
