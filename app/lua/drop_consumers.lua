#!lua flags=allow-oom
-- Drop consumers of a request stream's group that have nothing pending. What is pending would go with them,
-- so the look and the drop are one.
--
-- KEYS   1 the stream
-- ARGV   1 the group    2 for how many ms they must have been idle; then the consumers
-- return how many were dropped
--
-- Safe to run twice.

local is_named, dropped = {}, 0
for argument = 3, #ARGV do
  is_named[ARGV[argument]] = true
end

for _, fields in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local consumer = {}
  for field = 1, #fields, 2 do
    consumer[fields[field]] = fields[field + 1]
  end
  if is_named[consumer.name] and consumer.pending == 0 and consumer.idle > tonumber(ARGV[2]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], consumer.name)
    dropped = dropped + 1
  end
end

return dropped
