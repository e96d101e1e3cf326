-- Compare and set the overlay of one buffered run, while it is queued.
--
-- KEYS   1 entries    2 index    3 drain    4 overlays; and 5 the claim to end, if the run loses its key
-- ARGV   1 run id    2 the overlay it must have ('' for none)    3 its new overlay
-- return 1, or 0 when it has another overlay, is not queued any more, or is not known
--
-- Safe to run twice: the second run finds another overlay, unless they are equal.

local entry = redis.call('HGET', KEYS[2], ARGV[1])
if not entry or not redis.call('XRANGE', KEYS[1], entry, entry)[1] then
  return 0
end

local function numbers(id)
  local ms, sequence = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(ms), tonumber(sequence)
end

local ms, sequence = numbers(entry)
for _, mark in ipairs({ 'done', 'taken', 'uncertain' }) do
  local id = redis.call('HGET', KEYS[3], mark)
  if id then
    local mark_ms, mark_sequence = numbers(id)
    if ms < mark_ms or (ms == mark_ms and sequence <= mark_sequence) then
      return 0
    end
  end
end
if (redis.call('HGET', KEYS[4], ARGV[1]) or '') ~= ARGV[2] then
  return 0
end
redis.call('HSET', KEYS[4], ARGV[1], ARGV[3])
if KEYS[5] and redis.call('GET', KEYS[5]) == ARGV[1] then
  redis.call('DEL', KEYS[5])
end
return 1
