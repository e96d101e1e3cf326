-- Find buffered runs by id in one partition, each in its own environment only.
--
-- KEYS   per environment: entries, index
-- ARGV   per environment: n, and n run ids
-- return per run, in order: its snapshot, or false

local answer, argument = {}, 1

for environment = 1, #KEYS / 2 do
  local entries, index = KEYS[2 * environment - 1], KEYS[2 * environment]
  local runs = tonumber(ARGV[argument])
  for offset = 1, runs do
    local entry = redis.call('HGET', index, ARGV[argument + offset])
    local found = entry and redis.call('XRANGE', entries, entry, entry)[1]
    answer[#answer + 1] = found and found[2][4] or false
  end
  argument = argument + runs + 1
end

return answer
