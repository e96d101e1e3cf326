#!lua flags=allow-oom
-- Claim idempotency keys of one partition, each for one attempt of one request.
--
-- KEYS   per key: claim; then entries, index and drain of its environment
-- ARGV   per key: the attempt's run id, its token (which starts with the run id), the claim's life in ms
-- return per key: {'claimed'}, {'pending'} (another request holds it), or {'taken', run id, snapshot} where the
--        snapshot is that of the winner if the buffer has it, else ''; of one that is a row Postgres knows more
--
-- Safe to run twice: a request takes over the pending claim of its own earlier attempt.

local answer = {}

for key = 1, #KEYS / 4 do
  local claim, entries, index, drain = unpack(KEYS, 4 * key - 3, 4 * key)
  local run_id, token, life = ARGV[3 * key - 2], ARGV[3 * key - 1], ARGV[3 * key]
  local value = redis.call('GET', claim)
  local own = 'pending:' .. run_id .. ':'

  if not value or string.sub(value, 1, #own) == own then
    redis.call('SET', claim, 'pending:' .. token, 'PX', life)
    answer[key] = { 'claimed' }
  elseif string.sub(value, 1, 8) == 'pending:' then
    answer[key] = { 'pending' }
  else
    local entry = redis.call('HGET', index, value)
    local done = entry and redis.call('HGET', drain, 'done')
    local found = entry and redis.call('XREVRANGE', entries, entry, done and '(' .. done or '-', 'COUNT', 1)[1]
    answer[key] = { 'taken', value, found and found[2][4] or '' }
  end
end

return answer
