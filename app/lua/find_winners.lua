#!lua flags=allow-oom
-- Find the buffered winners of idempotency keys of one partition. Nothing is claimed.
--
-- KEYS   per key: claim; then entries and index of its environment
-- ARGV   none
-- return per key: the snapshot of its winner if the buffer has it, else false

local answer = {}

for key = 1, #KEYS / 3 do
  local claim, entries, index = KEYS[3 * key - 2], KEYS[3 * key - 1], KEYS[3 * key]
  local value = redis.call('GET', claim)
  local entry = value and redis.call('HGET', index, value)
  local found = entry and redis.call('XRANGE', entries, entry, entry)[1]
  answer[key] = found and found[2][4] or false
end

return answer
