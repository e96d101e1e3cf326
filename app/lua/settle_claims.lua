#!lua flags=allow-oom
-- End claims of one partition: published with the winner's run id, or released. Each only by its holder.
--
-- KEYS   claims
-- ARGV   per claim: the value it must have (`pending:<token>`, or a run id; `pending:<run id>:` stands for every
--        token of that run), the run id to publish ('' to release), the published claim's life in ms
-- return per claim: 1, or 0 when it has another value by now
--
-- Safe to run twice: the second run finds another value.

local answer = {}

for key = 1, #KEYS do
  local expected, run_id, life = ARGV[3 * key - 2], ARGV[3 * key - 1], ARGV[3 * key]
  local value = redis.call('GET', KEYS[key])
  if value and string.sub(expected, -1) == ':' then
    value = string.sub(value, 1, #expected)
  end
  if value ~= expected then
    answer[key] = 0
  else
    if run_id == '' then
      redis.call('DEL', KEYS[key])
    else
      redis.call('SET', KEYS[key], run_id, 'PX', life)
    end
    answer[key] = 1
  end
end

return answer
