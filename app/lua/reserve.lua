#!lua flags=allow-oom
-- Reserve caller-chosen run ids for their tenants until the run is a row (or never was one).
--
-- KEYS   1 chosen
-- ARGV   pairs: run id, tenant
-- return per pair: 1 if the id is this tenant's, 0 if another's
--
-- Safe to run twice.

local answer = {}
for pair = 1, #ARGV, 2 do
  local mine = redis.call('HSETNX', KEYS[1], ARGV[pair], ARGV[pair + 1]) == 1
    or redis.call('HGET', KEYS[1], ARGV[pair]) == ARGV[pair + 1]
  answer[#answer + 1] = mine and 1 or 0
end
return answer
