-- Accept runs into the buffer of one partition: append, index, publish the claim of the idempotency key, and
-- register the environment as ready. A run id that the buffer knows, queued or materialised a moment ago, is
-- left as it is; a run whose key has a winner is answered with that winner.
--
-- KEYS   1 ready    2 arrivals    3 totals; then per environment: entries, index, drain; then per run with a
--        key, in order: its claim
-- ARGV   1 most entries an environment may have queued, 0: no limit    2 the wake channel    3 environments
--        then per environment: its id, its organization's id, n, and n times: run id, snapshot, the value its
--        claim must have ('' when it has none), the life of the published claim in ms (0: no key)
-- return per run, in order: 1 accepted, -1 full, -2 the claim was lost: to be claimed again,
--        {'', snapshot} known already, {winner's run id, its snapshot if buffered, else ''}, or the text of the
--        server's refusal
--
-- Safe to run twice: the second run finds every run known.

local limit, wake, environments = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local answer, argument, claim_key, total, woken = {}, 4, 3 + 3 * environments, 0, false

-- The entry of a run that the buffer knows.
local function known(entries, index, run_id)
  local entry = redis.call('HGET', index, run_id)
  return entry and redis.call('XRANGE', entries, entry, entry)[1]
end

for environment = 1, environments do
  local entries, index, drain = KEYS[3 * environment + 1], KEYS[3 * environment + 2], KEYS[3 * environment + 3]
  local id, organization, runs = ARGV[argument], ARGV[argument + 1], tonumber(ARGV[argument + 2])
  argument = argument + 3
  local queued = tonumber(redis.call('HGET', drain, 'queued')) or 0
  local accepted = 0

  for _ = 1, runs do
    local run_id, snapshot, expected, life =
      ARGV[argument], ARGV[argument + 1], ARGV[argument + 2], tonumber(ARGV[argument + 3])
    argument = argument + 4
    local claim, value
    if life > 0 then
      claim_key = claim_key + 1
      claim = KEYS[claim_key]
      value = redis.call('GET', claim)
    end
    local is_pending = value and string.sub(value, 1, 8) == 'pending:'
    local is_taken = value and not is_pending and value ~= run_id
    local is_lost = expected ~= '' and value ~= expected and value ~= run_id
    local is_full = limit > 0 and queued + accepted >= limit

    -- What is not to be accepted, or cannot be, may be there already. Of the others the index tells.
    local own = (is_taken or is_lost or is_full or value == run_id) and known(entries, index, run_id)
    if own then
      answer[#answer + 1] = { '', own[2][4] }
    elseif is_taken then
      local winner = known(entries, index, value)
      if winner or expected == '' then
        answer[#answer + 1] = { value, winner and winner[2][4] or '' }
      else
        answer[#answer + 1] = -2
      end
    elseif is_lost then
      answer[#answer + 1] = -2
    elseif is_full then
      answer[#answer + 1] = -1
    else
      local entry = redis.pcall('XADD', entries, '*', 'run_id', run_id, 'snapshot', snapshot)
      if type(entry) == 'table' then
        own = known(entries, index, run_id)
        answer[#answer + 1] = own and { '', own[2][4] } or entry.err
      else
        local is_new = redis.call('HSETNX', index, run_id, entry) == 1
        own = not is_new and known(entries, index, run_id)
        if own then
          redis.call('XDEL', entries, entry)
          answer[#answer + 1] = { '', own[2][4] }
        else
          if not is_new then  -- the index is left of an entry that is gone
            redis.call('HSET', index, run_id, entry)
          end
          if claim and (not is_pending or value == expected) then
            redis.call('SET', claim, run_id, 'PX', life)
          end
          accepted = accepted + 1
          answer[#answer + 1] = 1
        end
      end
    end
  end

  if accepted > 0 then
    redis.call('HSET', drain, 'organization_id', organization, 'queued', queued + accepted)
    total = total + accepted
    if redis.call('ZADD', KEYS[1], 'NX', now, id) == 1 then
      local generation = string.format('%.0f', time[1] * 1000000 + time[2])
      redis.call('ZADD', KEYS[2], generation,
        table.concat({ generation, accepted, #organization, organization .. id }, ' '))
      woken = true
    end
  end
end

if total > 0 then
  redis.call('HINCRBY', KEYS[3], 'queued', total)
end
if woken then
  redis.call('PUBLISH', wake, '')
end
return answer
