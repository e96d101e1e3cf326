#!lua flags=allow-oom
-- Let go of reserved run ids, each only if it is held for the given tenant.
--
-- KEYS   1 chosen
-- ARGV   pairs: run id, tenant
-- return how many were let go
--
-- Safe to run twice.

local released = 0
for pair = 1, #ARGV, 2 do
  if redis.call('HGET', KEYS[1], ARGV[pair]) == ARGV[pair + 1] then
    released = released + redis.call('HDEL', KEYS[1], ARGV[pair])
  end
end
return released
