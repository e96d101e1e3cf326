-- Count the entries that drainers were handed and have not reported on.
--
-- KEYS   1 turns: the name that all keys here begin with (app/keys.py); they share its hash tag
-- ARGV   none
-- return how many
--
-- Safe to run twice: it only reads.

local draining = 0

for _, taker in ipairs(redis.call('SMEMBERS', KEYS[1] .. ':takers')) do
  for _, entries in ipairs(redis.call('HVALS', KEYS[1] .. ':held:' .. taker)) do
    draining = draining + entries
  end
end

return draining
