#!lua flags=allow-oom
-- Put environments of one partition among the arrivals again: they are ready, and no drainer knows of them.
--
-- KEYS   1 ready    2 arrivals; then per environment: drain
-- ARGV   1 the wake channel; then per environment: its id, the score in `ready` that it is expected to have
-- return how many were put there; not those that have moved on, or may be among the arrivals still
--
-- An arrival is as old as its environment's score or older, since that only moves on. So an environment that is
-- older than every arrival is not among them.
-- Safe to run twice: the second run finds arrivals that are as old.

local arrival = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')[2]
local first = arrival and math.floor(arrival / 1000) or math.huge
local announced = 0

for environment = 1, #KEYS - 2 do
  local id, score = ARGV[2 * environment], tonumber(ARGV[2 * environment + 1])
  local state = redis.call('HMGET', KEYS[environment + 2], 'organization_id', 'queued')
  local organization = state[1]
  if organization and score < first and tonumber(redis.call('ZSCORE', KEYS[1], id) or -1) == score then
    local generation = string.format('%.0f', score * 1000)
    local entries = string.format('%.0f', math.max(1, tonumber(state[2]) or 1))
    redis.call('ZADD', KEYS[2], generation,
      table.concat({ generation, entries, #organization, organization .. id }, ' '))
    announced = announced + 1
  end
end

if announced > 0 then
  redis.call('PUBLISH', ARGV[1], '')
end
return announced
