#!lua flags=allow-oom
-- Find the buffered winners of idempotency keys of one partition. Nothing is claimed.
--
-- KEYS   per key: claim; then entries, index and drain of its environment
-- ARGV   none
-- return per key: the snapshot of its winner if the buffer has it and it is not yet a row, else false

local answer = {}

for key = 1, #KEYS / 4 do
  local claim, entries, index, drain = unpack(KEYS, 4 * key - 3, 4 * key)
  local value = redis.call('GET', claim)
  local entry = value and redis.call('HGET', index, value)
  local done = entry and redis.call('HGET', drain, 'done')
  local found = entry and redis.call('XREVRANGE', entries, entry, done and '(' .. done or '-', 'COUNT', 1)[1]
  answer[key] = found and found[2][4] or false
end

return answer
