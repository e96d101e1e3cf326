#!lua flags=allow-oom
-- Note when a process was last alive, also when memory is full, and forget those that were silent for long.
--
-- KEYS   1 processes
-- ARGV   1 its kind and name    2 for how many ms the dead are remembered
-- return how many were forgotten
--
-- Safe to run twice.

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZADD', KEYS[1], now, ARGV[1])
return redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[2])
