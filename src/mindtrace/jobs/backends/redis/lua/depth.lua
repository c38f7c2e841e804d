#!lua flags=no-writes
-- How many jobs there are, by state, at this instant. What is due or has lapsed counts as ready, without being moved.
-- KEYS[1] the queue's prefix
-- Returns format, and 'missing'; or 'ok', ready, scheduled, leased, dead.

if redis.call('EXISTS', SPEC) == 0 then
  return {FORMAT, 'missing'}
end
local due = redis.call('ZCOUNT', SCHEDULED, '-inf', digits(now))
local lapsed = redis.call('ZCOUNT', LEASED, '-inf', '(' .. digits(now))
return {
  FORMAT, 'ok', redis.call('ZCARD', READY) + due + lapsed, redis.call('ZCARD', SCHEDULED) - due,
  redis.call('ZCARD', LEASED) - lapsed, redis.call('ZCARD', DEAD),
}
