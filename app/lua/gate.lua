#!lua flags=allow-oom
-- Count requests against the rate of each scope (an environment, or the whole fleet) and say how many
-- may pass. n requests are decided exactly as if they had come one by one at this instant.
--
-- KEYS   per scope: gate, drain (the environment's drain hash; the gate's own key again for the fleet)
-- ARGV   1 now in ms, or '' for the server's clock    2 '1' sliding, '0' fixed windows
--        3 '1' to stay tripped while the environment has queued entries
--        then per scope: requests, window ms, threshold, hold ms
-- return per scope: how many of the requests pass, counted from the first; the count of this window
--
-- Running it twice counts the requests twice: a repeated call errs towards mollifying.

local now = tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
local sliding, hold_until_drained = ARGV[2] == '1', ARGV[3] == '1'
local answer = {}

for scope = 1, #KEYS / 2 do
  local gate, drain = KEYS[2 * scope - 1], KEYS[2 * scope]
  local argument = 3 + 4 * (scope - 1)
  local requests = tonumber(ARGV[argument + 1])
  local window = tonumber(ARGV[argument + 2])
  local threshold = tonumber(ARGV[argument + 3])
  local hold = tonumber(ARGV[argument + 4])

  -- The lengths may be others than last time, and for a while differ from worker to worker: a window goes on
  -- from where it began, and no hold lasts longer than the one that is asked for now.
  local start, count, previous, tripped_until = now - now % window, 0, 0, 0
  local state = redis.call('GET', gate)
  if state then
    local s, c, p, t = string.match(state, '^(%d+) (%d+) (%d+) (%d+)$')
    local ended = math.floor((now - s) / window)
    if ended < 1 then
      -- If the clock was set back since, that is a window of a time to come: what it counted is counted now.
      start = ended < 0 and start or tonumber(s)
      count, previous = tonumber(c), tonumber(p)
    elseif ended == 1 then
      start, previous = s + window, tonumber(c)
    end
    tripped_until = math.min(tonumber(t), now + hold)
  end

  -- What the previous window still weighs: the part of it that a window ending now overlaps.
  local carried = 0
  if sliding then
    carried = previous * (window - (now - start)) / window
  end

  local tripped = tripped_until > now
  if not tripped and hold_until_drained and drain ~= gate then
    tripped = (tonumber(redis.call('HGET', drain, 'queued')) or 0) > 0
  end

  local pass = 0
  if not tripped then
    pass = math.max(0, math.min(requests, math.floor(threshold - carried) - count))
  end
  count = count + requests
  if carried + count > threshold then
    tripped_until = now + hold
  end
  redis.call('SET', gate, string.format('%.0f %.0f %.0f %.0f', start, count, previous, tripped_until),
    'PX', 2 * window + hold)
  answer[#answer + 1] = pass
  answer[#answer + 1] = count
end

return answer
