-- Find environments of one partition that have been ready for a while.
--
-- KEYS   1 ready
-- ARGV   1 for how many ms at least    2 how many to pass over    3 most to name
-- return pairs, the oldest first: environment, its score in `ready`
--
-- Safe to run twice: it only reads.

local time = redis.call('TIME')
local last = time[1] * 1000 + math.floor(time[2] / 1000) - ARGV[1]

return redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', last, 'WITHSCORES', 'LIMIT', ARGV[2], ARGV[3])
