-- Accept runs into the buffer of one partition: append, index, and register the environment as ready.
-- A run id that the buffer knows, queued or materialised a moment ago, is left as it is.
--
-- KEYS   1 ready; then per environment: entries, index, drain
-- ARGV   1 most entries an environment may have queued, 0: no limit    2 the wake channel
--        then per environment: its id, its organization's id, n, and n times: run id, snapshot
-- return per run, in order: 1 accepted, 0 known already, -1 full, or the text of the server's refusal
--
-- Safe to run twice: the second run finds every run known.

local limit, wake = tonumber(ARGV[1]), ARGV[2]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local answer, argument, woken = {}, 3, false

for environment = 1, (#KEYS - 1) / 3 do
  local entries, index, drain = KEYS[3 * environment - 1], KEYS[3 * environment], KEYS[3 * environment + 1]
  local id, organization, runs = ARGV[argument], ARGV[argument + 1], tonumber(ARGV[argument + 2])
  argument = argument + 3
  local queued = tonumber(redis.call('HGET', drain, 'queued')) or 0
  local accepted = 0

  for _ = 1, runs do
    local run_id, snapshot = ARGV[argument], ARGV[argument + 1]
    argument = argument + 2
    if redis.call('HEXISTS', index, run_id) == 1 then
      answer[#answer + 1] = 0
    elseif limit > 0 and queued + accepted >= limit then
      answer[#answer + 1] = -1
    else
      local entry = redis.pcall('XADD', entries, '*', 'run_id', run_id, 'snapshot', snapshot)
      if type(entry) == 'table' then
        answer[#answer + 1] = entry.err
      else
        redis.call('HSET', index, run_id, entry)
        accepted = accepted + 1
        answer[#answer + 1] = 1
      end
    end
  end

  if accepted > 0 then
    redis.call('HSET', drain, 'organization_id', organization, 'queued', queued + accepted)
    if redis.call('ZADD', KEYS[1], 'NX', now, id) == 1 then
      woken = true
    end
  end
end

if woken then
  redis.call('PUBLISH', wake, '')
end
return answer
