#!lua flags=no-writes
-- Which ids are among the dead letters.
-- KEYS[1] the queue's prefix
-- ARGV    ids, up to 500
-- Returns format, and 'missing'; or 'ok' and a digit for each id.

if redis.call('EXISTS', SPEC) == 0 then
  return {FORMAT, 'missing'}
end
local outcomes = {}
for i, order in ipairs(#ARGV > 0 and redis.call('ZMSCORE', DEAD, unpack(ARGV)) or {}) do
  outcomes[i] = order and '1' or '0'
end
return {FORMAT, 'ok', table.concat(outcomes)}
