#!lua flags=allow-oom
-- Settle deliveries, then hand out up to `limit` jobs under lease.
-- KEYS[1] the queue's prefix
-- ARGV[1] receiver       ARGV[2] number of this call; sent again it is answered again, and does nothing
-- ARGV[3] limit          ARGV[4] lease, ms                         ARGV[5] crash limit of jobs that bring none
-- ARGV[6] 16 hex digits  ARGV[7] bytes of the largest body to hand out
-- ARGV[8] 1 if the receiver is going to wait should there be nothing
-- ARGV[9] how many are Done, then their receipts
-- ARGV..  five each for the others: receipt, 'retry' | 'dead' | 'release', delay in ms or reason, error, error in short;
--   'retry crash' and 'dead crash' count a crash as well
-- Returns format, and 'missing' for a queue that is not there; or 'ok', a digit for each receipt (1 settled, 0 the lease
--   was lost before), ms until this receiver has to look again (-1: another does, or nothing is due), whether there are more,
--   and for each delivery its receipt, its body and 'attempts crashes releases priority crash_limit'.
-- Order: answer a repeated call; settle; collect what is due and what has lapsed; hand out. So a late settlement that
-- comes before anyone collected its lease still counts.

local RECEIVER, NUMBER, LIMIT, LEASE = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local CRASH_LIMIT, RANDOM, LARGEST, WAITS = tonumber(ARGV[5]), ARGV[6], tonumber(ARGV[7]), ARGV[8] == '1'
local CALL = prefix .. 'call:' .. RECEIVER
local PASSING = 500              -- due jobs and lapsed leases that one call moves
local REPLY = 8 * 1024 * 1024    -- bytes of bodies in one reply, unless the first one alone is longer

local ENTRY = '^' .. string.rep('%d', 16) .. '%w[%w._:-]*$'

local reply = {FORMAT, 'ok', '', -1, 0}

local function id_and_number(receipt)
  local number, id = string.match(receipt, '^[^:]*:(%d+):(.*)$')
  return id or receipt, tonumber(number) or 0
end

local function add_delivery(receipt, body, job)
  local n = #reply
  reply[n + 1], reply[n + 2] = receipt, body
  reply[n + 3] = string.format('%d %d %d %d %d', job.attempts, job.crashes, job.releases, job.priority, job.crash_limit)
end

-- The same call again: its answer was lost on the way. What lapsed since is not given any more.
local function answer_again(settled, receipts)
  reply[3], reply[5] = settled, redis.call('ZCARD', READY)
  for receipt in string.gmatch(receipts, '[^\n]+') do
    if redis.call('ZSCORE', LEASED, receipt) then
      local id = id_and_number(receipt)
      add_delivery(receipt, redis.call('HGET', JOBS, id) or '', numbers_of(redis.call('HGET', STATES, id)))
    end
  end
end

local function settle_done(receipts)
  local outcomes, held, ids = {}, {}, {}
  for i, deadline in ipairs(redis.call('ZMSCORE', LEASED, unpack(receipts))) do
    outcomes[i] = deadline and '1' or '0'
    if deadline then
      held[#held + 1] = receipts[i]
      ids[#ids + 1] = string.match(receipts[i], ':(.*)$', 18) or '' -- behind 16 digits, ':' and the number's first one
    end
  end
  if #held > 0 then
    redis.call('ZREM', LEASED, unpack(held))
    redis.call('HDEL', JOBS, unpack(ids))
    redis.call('HDEL', STATES, unpack(ids))
    redis.call('HDEL', ERRORS, unpack(ids))
    remember(ids)
  end
  return table.concat(outcomes)
end

-- The newest failure in full, then ten in short, newest first.
local function add_error(id, full, short)
  if full == '' then
    return
  end
  local lines = {full, short}
  for line in string.gmatch(redis.call('HGET', ERRORS, id) or '', '\n([^\n]*)') do
    if #lines > 10 then
      break
    end
    lines[#lines + 1] = line
  end
  redis.call('HSET', ERRORS, id, table.concat(lines, '\n'))
end

local function settle_retry(id, job, delay, full, short)
  add_error(id, full, short)
  job.place = new_places(1)
  if tonumber(delay) > 0 then
    redis.call('HSET', STATES, id, text_of(job))
    schedule(now + tonumber(delay), job.place, id)
  else
    put_back(id, job)
  end
end

local function settle_dead(id, job, reason, full, short)
  add_error(id, full, short)
  bury(id, job, reason)
end

local function settle_release(id, job, delay)
  job.attempts = job.attempts - 1 -- a hand-back is no attempt
  job.releases = job.releases + 1
  if tonumber(delay) > 0 then
    job.place = new_places(1)
    redis.call('HSET', STATES, id, text_of(job))
    schedule(now + tonumber(delay), job.place, id)
  else
    put_back(id, job)
  end
end

local function after_crash(settle_as)
  return function(id, job, ...)
    job.crashes = job.crashes + 1
    settle_as(id, job, ...)
  end
end

local settle = {
  retry = settle_retry, dead = settle_dead, release = settle_release,
  ['retry crash'] = after_crash(settle_retry), ['dead crash'] = after_crash(settle_dead),
}

-- What is due becomes ready, behind what is ready.
local function promote()
  local due = redis.call('ZRANGE', SCHEDULED, '-inf', digits(now), 'BYSCORE', 'LIMIT', 0, PASSING)
  if #due == 0 then
    return
  end
  local ids, entries = {}, {}
  for i, entry in ipairs(due) do
    ids[i] = id_of(entry)
  end
  local place = new_places(#due) - #due
  for i, text in ipairs(redis.call('HMGET', STATES, unpack(ids))) do
    entries[#entries + 1] = -numbers_of(text).priority
    entries[#entries + 1] = member(place + i, ids[i])
  end
  redis.call('ZREMRANGEBYRANK', SCHEDULED, 0, #due - 1)
  redis.call('ZADD', READY, unpack(entries))
end

-- Lapsed leases: a crash each, and the last one a job may have sends it to the dead letters.
local function collect()
  local lapsed = redis.call('ZRANGE', LEASED, '-inf', '(' .. digits(now), 'BYSCORE', 'LIMIT', 0, PASSING)
  for _, receipt in ipairs(lapsed) do
    redis.call('ZREM', LEASED, receipt)
    local id = id_and_number(receipt)
    local job = numbers_of(redis.call('HGET', STATES, id))
    job.crashes = job.crashes + 1
    if job.crashes >= (job.crash_limit >= 0 and job.crash_limit or CRASH_LIMIT) then
      bury(id, job, 'crash_limit')
    else
      put_back(id, job)
    end
  end
end

local function priority_of(score)
  return math.max(-2147483648, math.min(2147483647, math.floor(0 - tonumber(score))))
end

-- Bytes or a name that nobody of ours wrote: dead without being loaded.
local function bury_foreign(entry, score, reason)
  local id = id_of(entry)
  local job = numbers_of(redis.call('HGET', STATES, id))
  job.priority = priority_of(score)
  redis.call('HSETNX', JOBS, id, '')
  bury(id, job, reason)
end

-- Gives how many are left, or 1 for some.
local function hand_out(kind)
  local heads -- one more than may be taken, which tells whether there are more
  if kind == 'stack' then
    heads = redis.call('ZREVRANGE', READY, 0, LIMIT, 'WITHSCORES')
  else
    heads = redis.call('ZRANGE', READY, 0, LIMIT, 'WITHSCORES')
  end
  local taken, ids, entries, priorities, bytes = {}, {}, {}, {}, 0
  for i = 1, math.min(#heads, 2 * LIMIT), 2 do
    local entry, score = heads[i], heads[i + 1]
    local id = id_of(entry)
    local size = redis.call('HSTRLEN', JOBS, id) -- before any body is read
    if size > LARGEST then
      bury_foreign(entry, score, 'too_large')
    elseif #id > 128 or not string.find(entry, ENTRY) then
      bury_foreign(entry, score, 'malformed')
    else
      bytes = bytes + size
      if bytes > REPLY and #ids > 0 then
        break
      end
      ids[#ids + 1], entries[#entries + 1], priorities[#priorities + 1] = id, entry, priority_of(score)
    end
    taken[#taken + 1] = entry
  end
  if #taken > 0 then
    redis.call('ZREM', READY, unpack(taken))
  end
  local left = #heads / 2 - #taken
  if #ids == 0 then
    return left
  end
  local bodies, states = redis.call('HMGET', JOBS, unpack(ids)), redis.call('HMGET', STATES, unpack(ids))
  local leases, texts = {}, {}
  local deadline = digits(now + LEASE)
  for i, id in ipairs(ids) do
    local receipt, text
    if not bodies[i] then
      redis.call('HSET', JOBS, id, '') -- an entry without a body: the worker will find that it says nothing
    end
    if states[i] then
      local job = numbers_of(states[i])
      job.attempts = job.attempts + 1 -- on receive, not on settle, or a job that kills its worker would never run out
      job.number = job.number + 1
      job.priority, job.place = priorities[i], tonumber(string.sub(entries[i], 1, 16))
      receipt, text = RANDOM .. ':' .. digits(job.number) .. ':' .. id, text_of(job)
      add_delivery(receipt, bodies[i] or '', job)
    else -- the same for a job's first time, which nearly all are, and at half the price
      receipt = RANDOM .. ':1:' .. id
      text = '1 0 0 1 0 ' .. priorities[i] .. ' ' .. string.sub(entries[i], 1, 16) .. ' -1'
      local n = #reply
      reply[n + 1], reply[n + 2], reply[n + 3] = receipt, bodies[i] or '', '1 0 0 ' .. priorities[i] .. ' -1'
    end
    leases[2 * i - 1], leases[2 * i] = deadline, receipt
    texts[2 * i - 1], texts[2 * i] = id, text
  end
  redis.call('HSET', STATES, unpack(texts))
  redis.call('ZADD', LEASED, unpack(leases))
  return left
end

-- Only one of those that wait sets a timer; the others look once a second, as everyone does.
local function next_look()
  local due = redis.call('ZRANGE', SCHEDULED, 0, 0, 'WITHSCORES')[2]
  local lapse = redis.call('ZRANGE', LEASED, 0, 0, 'WITHSCORES')[2]
  local at = math.min(tonumber(due) or math.huge, lapse and tonumber(lapse) + 1 or math.huge)
  if at == math.huge then
    return -1
  end
  local watcher = redis.call('GET', WATCH)
  if watcher and watcher ~= RECEIVER then
    return -1
  end
  redis.call('SET', WATCH, RECEIVER, 'PX', 1500)
  return math.max(0, at - now)
end

local kind = redis.call('HGET', SPEC, 'kind')
if not kind then
  return {FORMAT, 'missing'}
end
local number, settled, receipts = string.match(redis.call('GET', CALL) or '', '^(%d+) (%d*) (.*)$')
if number == NUMBER then
  answer_again(settled, receipts)
  return reply
elseif number and tonumber(number) > tonumber(NUMBER) then
  -- Bytes of a connection that is long gone: whoever sent them has gone on.
  reply[3] = string.rep('0', tonumber(ARGV[9]) + (#ARGV - 9 - tonumber(ARGV[9])) / 5)
  return reply
end

local done = tonumber(ARGV[9])
local others = 9 + done
settled = ''
if done > 0 then
  settled = settle_done({unpack(ARGV, 10, others)})
end
for i = others + 1, #ARGV, 5 do
  if redis.call('ZREM', LEASED, ARGV[i]) == 1 then -- the fence: 0 means that the lease was lost
    local id = id_and_number(ARGV[i])
    settle[ARGV[i + 1]](id, numbers_of(redis.call('HGET', STATES, id)), ARGV[i + 2], ARGV[i + 3], ARGV[i + 4])
    settled = settled .. '1'
  else
    settled = settled .. '0'
  end
end
reply[3] = settled

promote()
local left
if LIMIT > 0 then
  collect() -- here only: it needs the receiver's crash limit
  left = hand_out(kind)
else
  left = redis.call('ZCARD', READY)
end
reply[5] = left
if left > 0 then
  ring()
else
  redis.call('DEL', BELL)
end
if #reply > 5 or settled ~= '' then
  local given = {}
  for i = 6, #reply, 3 do
    given[#given + 1] = reply[i]
  end
  redis.call('SET', CALL, NUMBER .. ' ' .. settled .. ' ' .. table.concat(given, '\n'), 'PX', 300000)
end
if WAITS and left == 0 and #reply == 5 then
  reply[4] = next_look()
elseif left > 0 and #reply == 5 then
  reply[4] = 0
end
return reply
