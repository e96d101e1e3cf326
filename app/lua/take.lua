#!lua flags=allow-oom
-- Take the oldest queued entries of environments of one partition: they are DRAINING until settled,
-- put back, or their holder's heartbeat is gone.
--
-- KEYS   1 ready; then per environment: entries, drain
-- ARGV   1 the taker; then per environment: its id, the holder it is expected to have ('' for none), n
-- return per environment: its entries as {entry id, snapshot}, oldest first, at most n; or the name of
--        the other drainer that holds it
--
-- Safe to run twice: the taker is handed the same entries again, since nothing past `done` was settled.

local taker = ARGV[1]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local answer = {}

for environment = 1, (#KEYS - 1) / 2 do
  local entries, drain = KEYS[2 * environment], KEYS[2 * environment + 1]
  local id, expected, most = ARGV[3 * environment - 1], ARGV[3 * environment], ARGV[3 * environment + 1]
  local state = redis.call('HMGET', drain, 'holder', 'done')
  local holder = state[1] or ''
  local taken = holder

  if holder == expected or holder == taker then
    taken = {}
    local start = state[2] and '(' .. state[2] or '-'
    for i, entry in ipairs(redis.call('XRANGE', entries, start, '+', 'COUNT', most)) do
      taken[i] = { entry[1], entry[2][4] }
    end
    if #taken > 0 then
      redis.call('HSET', drain, 'holder', taker, 'taken', taken[#taken][1])
      redis.call('ZADD', KEYS[1], 'XX', now, id)
    else
      redis.call('ZREM', KEYS[1], id)
      redis.call('HDEL', drain, 'holder', 'taken')
    end
  end
  answer[environment] = taken
end

return answer
