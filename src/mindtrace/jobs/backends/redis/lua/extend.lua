#!lua flags=allow-oom
-- Make the leases of deliveries longer, where they are still held.
-- KEYS[1] the queue's prefix
-- ARGV[1] lease, ms    ARGV[2..] receipts, up to 500
-- Returns format, and a digit for each receipt: 1 extended, 0 the job has since gone to another.

local receipts, leases = {}, {}
local deadline = digits(now + ARGV[1])
for i = 2, #ARGV do
  receipts[i - 1] = ARGV[i]
  leases[#leases + 1] = deadline
  leases[#leases + 1] = ARGV[i]
end
-- XX: a receiver that stalled past its lease must not take back a job someone else is running. GT: never shorter.
redis.call('ZADD', LEASED, 'XX', 'GT', unpack(leases))
local outcomes = {}
for i, score in ipairs(redis.call('ZMSCORE', LEASED, unpack(receipts))) do
  outcomes[i] = score and '1' or '0'
end
return {FORMAT, table.concat(outcomes)}
