#!lua flags=allow-oom
-- Share the drain by weighted virtual time (start-time fair queueing), organizations first, then the
-- environments of one: take a drainer's reports, note what became ready, and hand out what is to be drained next.
--
-- KEYS   1 turns: the name that all keys here begin with (app/keys.py); they share its hash tag
-- ARGV   1 the taker    2 '1' to return all that it holds to the others (it is dead), else '0'
--        3 most entries to hand out    4 a full batch of the fleet    5 entries a second for the fleet, 0: no limit
--        6 n reports, each: environment, entries taken, entries it still has ('' unknown), the generation that
--        this is true of, 'done', 'busy' (another drainer has it), or 'failed' (to be tried on its own, later)
--        then arrivals, each: environment, its generation, entries, organization
-- return {ms until there may be more, how many environments the taker holds, then pairs: environment, how many
--        entries}
--
-- What is handed out is the taker's alone until it reports. A generation is a time of the server in us, an
-- environment's own is when it last became ready: that it was empty before that does not count any more.
--
-- Safe to run twice: a second report is ignored, and the taker can see that it holds more than it was told of.

local turns, taker = KEYS[1], ARGV[1]
local most, batch, rate, reports = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local organizations, choosable, idle = turns .. ':organizations', turns .. ':choosable', turns .. ':idle'
local states, clocks, weights = turns .. ':states', turns .. ':clocks', turns .. ':weights'
local resting, apart = turns .. ':resting', turns .. ':apart'
local takers, held, drained = turns .. ':takers', turns .. ':held:' .. taker, turns .. ':drained'
local MANY, ENVIRONMENTS, LONGEST_REST, BUSY_REST = 2 ^ 40, 64, 30000, 100
-- While others wait, an environment gets a quantum at a time, times its organization's weight.
local quantum = math.max(1, math.floor(most / 25))
-- So many batches of a drainer may hold what failed before: should it hang again, the others go on.
local APART = 2

local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
local bucket = redis.call('HMGET', turns .. ':bucket', 'tokens', 'at')
local tokens, at = tonumber(bucket[1]), tonumber(bucket[2]) or now
local clock = tonumber(redis.call('HGET', clocks, '')) or 0

local function environments_of(organization)
  return turns .. ':environments:' .. organization
end

local function weight_of(organization)
  return tonumber(redis.call('HGET', weights, organization)) or 1
end

local function time_of(organization)
  return tonumber(redis.call('ZSCORE', organizations, organization)) or clock
end

-- A state is `<generation> <entries> <failures> <virtual time> <organization>`.
local function load(environment)
  local state = redis.call('HGET', states, environment)
  if state then
    local generation, entries, failures, virtual, organization =
      string.match(state, '^(%d+) (%d+) (%d+) (-?[%d.]+) (.*)$')
    return {
      environment = environment, generation = tonumber(generation), entries = tonumber(entries),
      failures = tonumber(failures), virtual = tonumber(virtual), organization = organization,
    }
  end
end

local function save(state)
  local numbers = string.format('%.0f %.0f %d %.3f ', state.generation, state.entries, state.failures, state.virtual)
  redis.call('HSET', states, state.environment, numbers .. state.organization)
end

-- An organization can be chosen while one of its environments can; those that cannot have the score +inf.
local function first_of(organization)
  return redis.call('ZRANGEBYSCORE', environments_of(organization), '-inf', '(+inf', 'LIMIT', 0, 1)[1]
end

local function refresh(organization)
  if first_of(organization) then
    redis.call('ZADD', choosable, time_of(organization), organization)
  else
    redis.call('ZREM', choosable, organization)
  end
end

local function place(state, score)
  redis.call('ZADD', environments_of(state.organization), score, state.environment)
  refresh(state.organization)
end

local function charge(state, entries)
  state.virtual = state.virtual + entries
  redis.call('ZINCRBY', organizations, entries / weight_of(state.organization), state.organization)
end

local function enter(environment, generation, entries, organization)
  local state = load(environment)
  if state then
    if state.generation < generation then
      state.generation, state.entries = generation, entries
      save(state)
    end
    return
  end
  if not redis.call('ZSCORE', organizations, organization) then
    -- Who was idle comes in at the present: no credit for the time, and no debt is forgotten.
    local owed = tonumber(redis.call('ZSCORE', idle, organization)) or 0
    redis.call('ZADD', organizations, math.max(clock, owed), organization)
    redis.call('ZREM', idle, organization)
  end
  state = {
    environment = environment, generation = generation, entries = entries, failures = 0,
    virtual = tonumber(redis.call('HGET', clocks, organization)) or 0, organization = organization,
  }
  save(state)
  place(state, state.virtual)
end

local function leave(state)
  local organization = state.organization
  redis.call('HDEL', states, state.environment)
  redis.call('ZREM', environments_of(organization), state.environment)
  refresh(organization)
  if redis.call('EXISTS', environments_of(organization)) == 0 then
    local owed = time_of(organization)
    redis.call('ZREM', organizations, organization)
    redis.call('HDEL', clocks, organization)
    if owed > clock then
      redis.call('ZADD', idle, owed, organization)
    end
  end
  if redis.call('EXISTS', organizations) == 0 then
    redis.call('DEL', idle, clocks, drained)
    clock = 0
  end
end

local function report(environment, taken, entries, generation, outcome)
  local given = tonumber(string.match(redis.call('HGET', held, environment) or '', '^%d+'))
  local state = given and load(environment)
  redis.call('HDEL', held, environment)
  if not state then
    return
  end
  local unused = given - (taken or given)
  if unused > 0 then
    charge(state, -unused)
    tokens = tokens and tokens + unused
  end
  if taken and taken > 0 then
    redis.call('INCRBY', drained, string.format('%.0f', taken))
  end
  if outcome == 'done' and entries == 0 and state.generation <= generation then
    return leave(state)
  end
  state.entries = (entries and entries > 0) and entries or MANY
  if outcome == 'done' then
    state.failures = 0
    -- Its time stood still while it was held. It catches up on what the others had meanwhile, unless it was stuck.
    if time_of(state.organization) < clock - 2 * batch then
      redis.call('ZADD', organizations, clock, state.organization)
    end
    save(state)
    return place(state, state.virtual)
  end
  local rest = BUSY_REST
  if outcome == 'failed' then
    state.failures = state.failures + 1
    rest = math.min(LONGEST_REST, 125 * 2 ^ math.min(state.failures, 10))
  end
  save(state)
  redis.call('ZADD', resting, now + rest, environment)
end

-- The dead say nothing about their last turn; the living must not be held up by a debt of theirs.
if ARGV[2] == '1' then
  for _, environment in ipairs(redis.call('HKEYS', held)) do
    report(environment, nil, nil, 0, 'done')
  end
end

local argument = 7
for _ = 1, reports do
  report(ARGV[argument], tonumber(ARGV[argument + 1]), tonumber(ARGV[argument + 2]), tonumber(ARGV[argument + 3]),
    ARGV[argument + 4])
  argument = argument + 5
end

while argument <= #ARGV do
  enter(ARGV[argument], tonumber(ARGV[argument + 1]), tonumber(ARGV[argument + 2]), ARGV[argument + 3])
  argument = argument + 4
end

for _, environment in ipairs(redis.call('ZRANGEBYSCORE', resting, '-inf', now, 'LIMIT', 0, ENVIRONMENTS)) do
  redis.call('ZREM', resting, environment)
  local state = load(environment)
  if state and state.failures > 0 then
    redis.call('RPUSH', apart, environment)
  elseif state then
    place(state, state.virtual)
  end
end

local budget, wait = most, nil
if rate > 0 then
  local capacity = math.max(1, rate / 10)
  tokens = math.min(capacity, (tokens or capacity) + (now - at) * rate / 1000)
  local enough = math.min(capacity, quantum)
  if tokens < enough then
    budget, wait = 0, (enough - tokens) * 1000 / rate
  end
  budget = math.min(budget, math.floor(tokens))
end

-- While the entries of others are being written, nobody may get ahead of them by more than a batch. One that lags
-- two batches behind is stuck, and is not waited for.
local function limit_of_time()
  local known = redis.call('ZRANGE', organizations, 0, 7, 'WITHSCORES')
  for i = 1, #known, 2 do
    local at = tonumber(known[i + 1])
    if at >= clock - 2 * most and not redis.call('ZSCORE', choosable, known[i]) then
      return at + most
    end
  end
  return math.huge
end

local chosen, shares = {}, {}

local function choose(state, entries)
  entries = math.min(entries, budget, state.entries)
  local share = shares[state.environment]
  if not share then
    share = { state = state, entries = 0 }
    chosen[#chosen + 1], shares[state.environment] = state.environment, share
  end
  share.entries = share.entries + entries
  budget = budget - entries
  state.entries = state.entries - entries
  charge(state, entries)
  place(state, (state.entries > 0 and state.failures == 0) and state.virtual or '+inf')
end

local function next_apart()
  if redis.call('EXISTS', apart) == 0 then
    return
  end
  local busy = 0
  for _, entries in ipairs(redis.call('HVALS', held)) do
    busy = busy + (string.find(entries, 'apart', 1, true) and 1 or 0)
  end
  return busy < APART and load(redis.call('LPOP', apart)) or nil
end

local alone = budget > 0 and next_apart()
if alone then
  choose(alone, math.ceil(quantum * weight_of(alone.organization)))
  budget = 0
end

local limit = budget > 0 and limit_of_time()
while budget > 0 and #chosen < ENVIRONMENTS do
  local organization = redis.call('ZRANGE', choosable, 0, 0)[1]
  if not organization then
    break
  end
  local at, weight = time_of(organization), weight_of(organization)
  if at >= limit and #chosen > 0 then
    break
  end
  local environment, set = first_of(organization), environments_of(organization)
  local state = shares[environment] and shares[environment].state or load(environment)
  clock = math.max(clock, at)
  redis.call('HSET', clocks, '', string.format('%.3f', clock), organization, string.format('%.3f', state.virtual))
  local entries = math.ceil(quantum * weight)
  if redis.call('ZCARD', choosable) == 1 and redis.call('ZCOUNT', set, '-inf', '(+inf') == 1 then
    entries = math.max(entries, math.floor(math.min(budget, (limit - at) * weight)))
  end
  choose(state, entries)
end

local answer, spent = { 1000, 0 }, 0
for _, environment in ipairs(chosen) do
  local share = shares[environment]
  place(share.state, '+inf')
  save(share.state)
  redis.call('HSET', held, environment, share.entries .. (alone and ' apart' or ''))
  answer[#answer + 1] = environment
  answer[#answer + 1] = share.entries
  spent = spent + share.entries
end
redis.call('ZREMRANGEBYSCORE', idle, '-inf', clock)
redis.call(redis.call('EXISTS', held) == 1 and 'SADD' or 'SREM', takers, taker)
if rate > 0 then
  redis.call('HSET', turns .. ':bucket', 'tokens', string.format('%.3f', tokens - spent), 'at',
    string.format('%.3f', now))
elseif bucket[1] then
  redis.call('DEL', turns .. ':bucket')
end

local next_rest = redis.call('ZRANGE', resting, 0, 0, 'WITHSCORES')[2]
if next_rest then
  wait = math.min(wait or 1000, tonumber(next_rest) - now)
end
answer[1] = math.max(1, math.ceil(math.min(wait or 1000, 1000)))
answer[2] = redis.call('HLEN', held)
return answer
