#!lua flags=allow-oom
-- Settle what a drainer took and Postgres has committed: up to the given entry of each environment. With it
-- end the published claims of their keys, which Postgres guards by now. The entries stay readable until the
-- grace time is over (forget.lua).
--
-- KEYS   1 ready    2 grace    3 totals; then per environment: entries, drain, and the claims of its keyed runs
-- ARGV   1 the taker    2 grace time in ms; then per environment: its id, the taker's name for the hold, the last
--        settled entry's id, how many were settled, n, and the run ids that its n claims must name. None settled:
--        all is put back; up to the entry that is named then, if one is, it may be in Postgres all the same, so it
--        stays DRAINING
-- return per environment: {entries still queued, now as a generation}, or false when that hold is over
--
-- Safe to run twice: the second run finds that the taker holds nothing.

local taker, grace = ARGV[1], tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local generation = string.format('%.0f', time[1] * 1000000 + time[2])
local answer, key, argument = {}, 4, 3

local function numbers(id)
  local ms, sequence = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(ms), tonumber(sequence)
end

local function reaches(id, mark)
  local ms, sequence = numbers(id)
  local mark_ms, mark_sequence = numbers(mark)
  return ms > mark_ms or (ms == mark_ms and sequence >= mark_sequence)
end

-- A call from here costs more than what it does, so there is one for many claims.
local AT_ONCE = 1000

local function end_claims(key, argument, claims)
  for first = 0, claims - 1, AT_ONCE do
    local last = math.min(first + AT_ONCE, claims) - 1
    local ended = {}
    for place, value in ipairs(redis.call('MGET', unpack(KEYS, key + first, key + last))) do
      if value == ARGV[argument + first + place - 1] then
        ended[#ended + 1] = KEYS[key + first + place - 1]
      end
    end
    if #ended > 0 then
      redis.call('DEL', unpack(ended))
    end
  end
end

while argument <= #ARGV do
  local entries, drain = KEYS[key], KEYS[key + 1]
  local id, hold, last = ARGV[argument], ARGV[argument + 1], ARGV[argument + 2]
  local settled, claims = tonumber(ARGV[argument + 3]), tonumber(ARGV[argument + 4])
  key, argument = key + 2, argument + 5
  local state = redis.call('HMGET', drain, 'holder', 'hold', 'queued', 'uncertain')
  local queued, uncertain = tonumber(state[3]) or 0, state[4]

  if state[1] ~= taker or state[2] ~= hold then
    answer[#answer + 1] = false
  else
    redis.call('HDEL', drain, 'holder', 'hold', 'taken')
    if settled == 0 and last ~= '' and not (uncertain and reaches(uncertain, last)) then
      redis.call('HSET', drain, 'uncertain', last)
    elseif settled > 0 and uncertain and reaches(last, uncertain) then
      redis.call('HDEL', drain, 'uncertain')
    end
    if settled > 0 then
      redis.call('HSET', drain, 'done', last)
      queued = redis.call('HINCRBY', drain, 'queued', -settled)
      if redis.call('HINCRBY', KEYS[3], 'queued', -settled) <= 0 then
        redis.call('DEL', KEYS[3])
      end
      redis.call('ZADD', KEYS[2], now + grace, last .. ' ' .. id)
      local oldest = queued > 0 and redis.call('XRANGE', entries, '(' .. last, '+', 'COUNT', 1)[1]
      if oldest then
        redis.call('ZADD', KEYS[1], 'XX', string.match(oldest[1], '^%d+'), id)
      else
        redis.call('ZREM', KEYS[1], id)
      end
      end_claims(key, argument, claims)
    end
    answer[#answer + 1] = { queued, generation }
  end
  key, argument = key + claims, argument + claims
end

return answer
