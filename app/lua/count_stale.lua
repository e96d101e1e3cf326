-- Count the stale entries of environments of one partition, queued or being drained.
--
-- KEYS   per environment: index, drain
-- ARGV   1 time in ms up to which an entry is stale    2 about how many entries to look at in one environment
-- return per environment: how many; reckoned from those that were looked at when it has more
--
-- The index has the time of every entry and no snapshot, so nothing large is copied.
-- Safe to run twice: it only reads.

local cutoff, most = tonumber(ARGV[1]), ARGV[2]
local answer = {}

local function parts(entry_id)
  local ms, sequence = string.match(entry_id or '0-0', '^(%d+)-(%d+)$')
  return tonumber(ms), tonumber(sequence)
end

for environment = 1, #KEYS / 2 do
  local index, drain = KEYS[2 * environment - 1], KEYS[2 * environment]
  local state = redis.call('HMGET', drain, 'queued', 'done')
  local queued = tonumber(state[1]) or 0
  local done_ms, done_sequence = parts(state[2] or nil)
  local page = redis.call('HSCAN', index, 0, 'COUNT', most)
  local seen, stale = 0, 0
  for field = 2, #page[2], 2 do
    local ms, sequence = parts(page[2][field])
    if ms > done_ms or (ms == done_ms and sequence > done_sequence) then
      seen = seen + 1
      stale = stale + (ms <= cutoff and 1 or 0)
    end
  end
  if page[1] ~= '0' then
    stale = math.max(1, math.floor(queued * stale / math.max(1, seen)))
  end
  answer[environment] = math.min(stale, queued)
end

return answer
