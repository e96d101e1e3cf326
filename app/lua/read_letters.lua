-- Read dead letters as they were written: all pairs in their order, also those that share a name.
--
-- KEYS   1 dead letters
-- ARGV   1 the first id    2 the last id    3 most letters    4 '' for all of each letter; else its first six
--        pairs only, and of each value at most so many bytes
-- return per letter: {id, name, value, name, value, ...}
--
-- Safe to run twice: it only reads.

local most_bytes = tonumber(ARGV[4])
local answer = {}

for i, letter in ipairs(redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[2], 'COUNT', ARGV[3])) do
  local parts = letter[2]
  answer[i] = { letter[1] }
  for part = 1, most_bytes and math.min(12, #parts) or #parts do
    answer[i][part + 1] = string.sub(parts[part], 1, most_bytes or -1)
  end
end

return answer
