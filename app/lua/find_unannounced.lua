-- Find environments of one partition that are ready and are not among the arrivals (any more).
--
-- KEYS   1 ready    2 arrivals
-- ARGV   1 for how many ms they must have been ready    2 how many to pass over    3 most to name
-- return pairs, the oldest first: environment, its score in `ready`
--
-- An arrival is as old as its environment's score or older, since that only moves on. So what is older than
-- every arrival is not among them.
-- Safe to run twice: it only reads.

local time = redis.call('TIME')
local last = time[1] * 1000 + math.floor(time[2] / 1000) - ARGV[1]
local arrival = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')[2]
if arrival then
  last = math.min(last, math.floor(arrival / 1000) - 1)
end

return redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', last, 'WITHSCORES', 'LIMIT', ARGV[2], ARGV[3])
