#!lua flags=allow-oom
-- Pass on what only one process may hold, if the holder is the one that is expected.
--
-- KEYS   1 the name of the holder
-- ARGV   1 the holder it is expected to have ('' for none)    2 the new one ('' for none)
-- return the holder by now ('' for none)
--
-- Safe to run twice: the second run finds the new holder.

local holder = redis.call('GET', KEYS[1]) or ''

if holder == ARGV[1] then
  holder = ARGV[2]
  if holder == '' then
    redis.call('DEL', KEYS[1])
  else
    redis.call('SET', KEYS[1], holder)
  end
end

return holder
