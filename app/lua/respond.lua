#!lua flags=allow-oom
-- Publish replies, then acknowledge and delete their requests: a reply before its acknowledgement.
--
-- KEYS   1 the stream of requests
-- ARGV   1 the consumer group    2 n, and n entry ids; then pairs: channel, message
-- return how many entries were acknowledged
--
-- Safe to run twice: replies are sent again, nothing else happens.

local ids = {}
for i = 1, tonumber(ARGV[2]) do
  ids[i] = ARGV[2 + i]
end
for pair = 3 + #ids, #ARGV, 2 do
  redis.call('PUBLISH', ARGV[pair], ARGV[pair + 1])
end
local acknowledged = redis.call('XACK', KEYS[1], ARGV[1], unpack(ids))
redis.call('XDEL', KEYS[1], unpack(ids))
return acknowledged
