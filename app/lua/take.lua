#!lua flags=allow-oom
-- Take the oldest queued entries of environments of one partition: they are DRAINING until settled,
-- put back, or their holder's heartbeat is gone.
--
-- KEYS   1 ready; then per environment: entries, drain, overlays
-- ARGV   1 the taker    2 its name for this hold; then per environment: its id, the holder it is expected to have
--        ('' for none), n
-- return per environment: {now as a generation, then its oldest entries, at most n: {entry id, snapshot, overlay
--        or false}}; or the name of the other drainer that holds it
--
-- Of an environment that a dead drainer held, just what that one had taken is taken: it may be under way still.
-- So may what the taker itself had taken, if it looked dead meanwhile. Until it is settled, that stays DRAINING.
-- Safe to run twice: the taker is handed the same entries again, since nothing past `done` was settled.

local taker, hold = ARGV[1], ARGV[2]
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000000 + time[2])
local answer = {}

local function numbers(id)
  local ms, sequence = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(ms), tonumber(sequence)
end

local function reaches(id, mark)
  local ms, sequence = numbers(id)
  local mark_ms, mark_sequence = numbers(mark)
  return ms > mark_ms or (ms == mark_ms and sequence >= mark_sequence)
end

-- An entry that was not written by us is told as the text of its fields: nothing can be read from that.
local function snapshot_of(fields)
  for i = 1, #fields, 2 do
    if fields[i] == 'snapshot' then
      return fields[i + 1]
    end
  end
  return table.concat(fields, ' ')
end

for environment = 1, (#KEYS - 1) / 3 do
  local entries, drain, overlays = KEYS[3 * environment - 1], KEYS[3 * environment], KEYS[3 * environment + 1]
  local id, expected, most = ARGV[3 * environment], ARGV[3 * environment + 1], ARGV[3 * environment + 2]
  local state = redis.call('HMGET', drain, 'holder', 'done', 'taken', 'uncertain')
  local holder = state[1] or ''
  local taken = holder

  if holder == expected or holder == taker then
    taken = { now }
    local start = state[2] and '(' .. state[2] or '-'
    local is_inherited = holder ~= '' and holder ~= taker and state[3]
    local found = is_inherited and redis.call('XRANGE', entries, start, state[3])
      or redis.call('XRANGE', entries, start, '+', 'COUNT', most)
    local has_overlays = #found > 0 and redis.call('EXISTS', overlays) == 1
    for i, entry in ipairs(found) do
      local overlay = has_overlays and redis.call('HGET', overlays, entry[2][2])
      taken[i + 1] = { entry[1], snapshot_of(entry[2]), overlay }
    end
    if #found > 0 then
      if state[3] and not (state[4] and reaches(state[4], state[3])) then
        redis.call('HSET', drain, 'uncertain', state[3])
      end
      redis.call('HSET', drain, 'holder', taker, 'hold', hold, 'taken', found[#found][1])
    else
      redis.call('ZREM', KEYS[1], id)
      redis.call('HDEL', drain, 'holder', 'hold', 'taken')
    end
  end
  answer[environment] = taken
end

return answer
