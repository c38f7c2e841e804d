#!lua flags=no-writes
-- One dead letter.
-- KEYS[1] the queue's prefix
-- ARGV[1] its id
-- Returns format, and 'missing'; or 'ok' and its six values, none if there is no such dead letter.

if redis.call('EXISTS', SPEC) == 0 then
  return {FORMAT, 'missing'}
end
local order = redis.call('ZSCORE', DEAD, ARGV[1])
return add_letters({FORMAT, 'ok'}, {order or ''}, order and {ARGV[1]} or {})
