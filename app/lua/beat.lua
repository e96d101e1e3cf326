#!lua flags=allow-oom
-- Renew a heartbeat, also when memory is full: a live process must not look dead.
--
-- KEYS   1 heartbeat
-- ARGV   1 its life in ms
-- return OK
--
-- Safe to run twice.

return redis.call('SET', KEYS[1], '1', 'PX', ARGV[1])
