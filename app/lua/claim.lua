#!lua flags=allow-oom
-- Claim idempotency keys of one partition, each for one attempt of one request.
--
-- KEYS   per environment: entries, index, drain, and the claims of its n keys
-- ARGV   1 the attempt    2 '1': a run that the buffer knows itself claims nothing
--        then per environment: n, and n times: run id, the claim's life in ms
-- return per key: 1 claimed, with the value `pending:<run id>:<attempt>`; 0 pending (another request holds it); or
--        {run id, snapshot} taken, with the snapshot of the winner if the buffer has it, else ''; of one that is a
--        row Postgres knows more
--
-- Safe to run twice: a request takes over the pending claim of its own earlier attempt.

local attempt, seek = ARGV[1], ARGV[2] == '1'
local answer, key, argument = {}, 1, 3

-- A run that was accepted, with its snapshot while it is not drained.
local function buffered(run_id)
  local entries, index, drain = KEYS[key], KEYS[key + 1], KEYS[key + 2]
  local entry = redis.call('HGET', index, run_id)
  local done = entry and redis.call('HGET', drain, 'done')
  return entry and redis.call('XREVRANGE', entries, entry, done and '(' .. done or '-', 'COUNT', 1)[1]
end

while argument <= #ARGV do
  local claims = tonumber(ARGV[argument])
  for number = 1, claims do
    local claim = KEYS[key + 2 + number]
    local run_id, life = ARGV[argument + 2 * number - 1], ARGV[argument + 2 * number]
    local own = 'pending:' .. run_id .. ':'
    local known = seek and buffered(run_id)
    local value = not known and redis.call('SET', claim, own .. attempt, 'NX', 'GET', 'PX', life)

    if known then
      answer[#answer + 1] = { run_id, known[2][4] }
    elseif not value then
      answer[#answer + 1] = 1
    elseif string.sub(value, 1, #own) == own then
      redis.call('SET', claim, own .. attempt, 'PX', life)
      answer[#answer + 1] = 1
    elseif string.sub(value, 1, 8) == 'pending:' then
      answer[#answer + 1] = 0
    else
      local found = buffered(value)
      answer[#answer + 1] = { value, found and found[2][4] or '' }
    end
  end
  key, argument = key + 3 + claims, argument + 1 + 2 * claims
end

return answer
