#!lua flags=allow-oom
-- Settle what a drainer took and Postgres has committed: up to the given entry of each environment.
-- The entries stay readable until the grace time is over (forget.lua).
--
-- KEYS   1 ready    2 grace; then per environment: entries, drain
-- ARGV   1 the taker    2 grace time in ms; then per environment: its id, the last settled entry's id
--        ('' for none: only put back), how many were settled
-- return per environment: 1, or 0 when the taker no longer holds it
--
-- Safe to run twice: the second run finds that the taker holds nothing.

local taker, grace = ARGV[1], tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local answer = {}

for environment = 1, (#KEYS - 2) / 2 do
  local entries, drain = KEYS[2 * environment + 1], KEYS[2 * environment + 2]
  local id, last, settled = ARGV[3 * environment], ARGV[3 * environment + 1], tonumber(ARGV[3 * environment + 2])

  if redis.call('HGET', drain, 'holder') == taker then
    redis.call('HDEL', drain, 'holder', 'taken')
    if settled > 0 then
      redis.call('HSET', drain, 'done', last)
      local queued = redis.call('HINCRBY', drain, 'queued', -settled)
      redis.call('ZADD', KEYS[2], now + grace, last .. ' ' .. id)
      if queued <= 0 then
        redis.call('ZREM', KEYS[1], id)
      end
    end
    answer[environment] = 1
  else
    answer[environment] = 0
  end
end

return answer
