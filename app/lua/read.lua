#!lua flags=allow-oom
-- Read one buffered run as it is now.
--
-- KEYS   1 entries    2 index    3 drain    4 overlays
-- ARGV   1 run id
-- return {state, snapshot, overlay or false}, or false when the buffer does not know it
--
-- Safe to run twice.

local entry = redis.call('HGET', KEYS[2], ARGV[1])
local found = entry and redis.call('XRANGE', KEYS[1], entry, entry)[1]
if not found then
  return false
end

local function numbers(id)
  local ms, sequence = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(ms), tonumber(sequence)
end

local function reaches(mark)
  if not mark then
    return false
  end
  local ms, sequence = numbers(entry)
  local mark_ms, mark_sequence = numbers(mark)
  return ms < mark_ms or (ms == mark_ms and sequence <= mark_sequence)
end

local marks = redis.call('HMGET', KEYS[3], 'done', 'taken', 'uncertain')
local state = 'QUEUED'
if reaches(marks[1]) then
  state = 'MATERIALISED'
elseif reaches(marks[2]) or reaches(marks[3]) then
  state = 'DRAINING'
end
return { state, found[2][4], redis.call('HGET', KEYS[4], ARGV[1]) }
