#!lua flags=allow-oom
-- Forget materialised entries whose grace time is over, and all of an environment with nothing left.
--
-- KEYS   1 grace; then per element: entries, index, drain, overlays
-- ARGV   per element: the element of `grace` (`<last entry id> <environment id>`), the last entry id
-- return how many entries were forgotten
--
-- Safe to run twice.

local forgotten = 0

for element = 1, #ARGV / 2 do
  local entries, index, drain, overlays = unpack(KEYS, 4 * element - 2, 4 * element + 1)
  local last = ARGV[2 * element]
  local old = redis.call('XRANGE', entries, '-', last)
  for start = 1, #old, 1000 do
    local ids, run_ids = {}, {}
    for i = start, math.min(start + 999, #old) do
      ids[#ids + 1], run_ids[#run_ids + 1] = old[i][1], old[i][2][2]
    end
    redis.call('XDEL', entries, unpack(ids))
    redis.call('HDEL', index, unpack(run_ids))
    redis.call('HDEL', overlays, unpack(run_ids))
  end
  forgotten = forgotten + #old
  if redis.call('XLEN', entries) == 0 then
    redis.call('DEL', entries, index, drain, overlays)
  end
  redis.call('ZREM', KEYS[1], ARGV[2 * element - 1])
end

return forgotten
