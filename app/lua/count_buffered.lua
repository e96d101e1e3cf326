-- Count what one partition has buffered, and find the environments whose oldest entry is stale.
--
-- KEYS   1 ready    2 totals
-- ARGV   1 dwell in ms over which an entry is stale    2 most environments to name
-- return {now in ms, entries, ms that the oldest waits, environments with stale entries, {the oldest of them}}
--
-- Safe to run twice: it only reads.

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local cutoff = now - ARGV[1]
local oldest = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2]

return {
  now,
  tonumber(redis.call('HGET', KEYS[2], 'queued')) or 0,
  oldest and math.max(0, now - oldest) or 0,
  redis.call('ZCOUNT', KEYS[1], '-inf', cutoff),
  redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', cutoff, 'LIMIT', 0, ARGV[2]),
}
