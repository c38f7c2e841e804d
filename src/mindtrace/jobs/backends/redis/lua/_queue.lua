-- In front of every command: the queue's keys (see keys.py), the server's time, a job's numbers, its moves, the bell.

local prefix = KEYS[1]
local SPEC, READY, SCHEDULED, LEASED = prefix .. 'spec', prefix .. 'ready', prefix .. 'scheduled', prefix .. 'leased'
local JOBS, STATES, ERRORS = prefix .. 'jobs', prefix .. 'states', prefix .. 'errors'
local DEAD, DEATHS = prefix .. 'dead', prefix .. 'deaths'
local BELL, WATCH = prefix .. 'bell', prefix .. 'watch'

local FORMAT = 1 -- of every reply: during a deploy two versions of the library may share a queue

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- Numbers never go through tostring: it writes 1e+15 from fifteen digits on.
local function digits(number)
  return string.format('%d', number)
end

local function known_key(minutes_ago)
  return prefix .. 'known:' .. digits(math.floor(now / 60000) - minutes_ago)
end

-- These ids stay known for 60 to 120 s.
local function remember(ids)
  redis.call('SADD', known_key(0), unpack(ids))
  redis.call('PEXPIRE', known_key(0), 180000)
end

-- The last of n fresh places.
local function new_places(n)
  return redis.call('HINCRBY', SPEC, 'place', n)
end

local function member(place, id)
  return string.format('%016d', place) .. id
end

local PLACE = '^' .. string.rep('%d', 16)

-- What stands behind the place; all of an entry that somebody else wrote without one.
local function id_of(entry)
  return string.find(entry, PLACE) and string.sub(entry, 17) or entry
end

local NUMBERS = '^(%d+) (%d+) (%d+) (%d+) (%d+) (%-?%d+) (%d+) (%-?%d+)$'

-- The eight numbers beside a body; those of a job never received if there are none, or if they are not ours.
local function numbers_of(text)
  if string.find(text or '', string.rep('%d', 17)) then
    text = '' -- nor of ours, and more than a number holds
  end
  local attempts, crashes, releases, number, replays, priority, place, crash_limit = string.match(text or '', NUMBERS)
  return {
    attempts = tonumber(attempts) or 0, crashes = tonumber(crashes) or 0, releases = tonumber(releases) or 0,
    number = tonumber(number) or 0, replays = tonumber(replays) or 0, priority = tonumber(priority) or 0,
    place = tonumber(place) or 0, crash_limit = tonumber(crash_limit) or -1,
  }
end

local function text_of(job)
  return string.format('%d %d %d %d %d %d %d %d', job.attempts, job.crashes, job.releases, job.number, job.replays,
    job.priority, job.place, job.crash_limit)
end

-- Wake one receiver that waits. It wakes the next while there is more, so that one publish never wakes two hundred.
local function ring()
  if redis.call('LLEN', BELL) == 0 then
    redis.call('RPUSH', BELL, '1')
    redis.call('PEXPIRE', BELL, 60000)
  end
end

-- Ready, in the place it had.
local function put_back(id, job)
  redis.call('HSET', STATES, id, text_of(job))
  redis.call('ZADD', READY, -job.priority, member(job.place, id))
end

-- Due at `due`. If that is before all others, whoever watches the clock has to look anew.
local function schedule(due, place, id)
  local entry = member(place, id)
  redis.call('ZADD', SCHEDULED, digits(due), entry)
  if redis.call('ZRANGE', SCHEDULED, 0, 0)[1] == entry then
    redis.call('DEL', WATCH)
    ring()
  end
end

local function bury(id, job, reason)
  redis.call('HSET', STATES, id, text_of(job))
  redis.call('HSET', DEATHS, id, digits(now) .. ' ' .. reason)
  redis.call('ZADD', DEAD, new_places(1), id)
end
