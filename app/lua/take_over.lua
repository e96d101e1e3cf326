#!lua flags=allow-oom
-- Take over pending entries of a request stream, each only from the consumer that was seen to have it: of several
-- that found it abandoned, one gets it.
--
-- KEYS   1 the stream
-- ARGV   1 group    2 the taker; then pairs: entry id, its consumer
-- return per entry that was taken: {entry id, fields, deliveries}
--
-- Safe to run twice, but for what the taker itself has by then: that it is not given again.

local group, taker = ARGV[1], ARGV[2]
local answer = {}

for pair = 3, #ARGV, 2 do
  local id = ARGV[pair]
  local pending = redis.call('XPENDING', KEYS[1], group, id, id, 1)[1]
  if pending and pending[2] == ARGV[pair + 1] then
    local entry = redis.call('XCLAIM', KEYS[1], group, taker, 0, id)[1]
    if entry then
      answer[#answer + 1] = { id, entry[2], pending[4] + 1 }
    end
  end
end

return answer
