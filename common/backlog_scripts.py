"""
The scripts that move a waiting job: each is one step in Redis, so that a job is always in exactly one place.

A backlog lies under one prefix (keys.backlog), q below:

    q:messages           hash: job id -> the message, as kombu would put it into a list
    q:places             hash: job id -> its Place and where its message goes (MessagePack)
    q:order              sorted set: the jobs in the order in which they are served
    q:overdue            sorted set: when each has waited for its bound; q:binding: when its deadline binds
    q:sums               hash: per lane its jobs, their tokens, and how many do not say ("?"); a lane is a class, "*" if
                         its jobs name no model, and a tenant
    q:arrivals:<lane>    sorted set: job id -> when it was queued; q:deadlines:<lane>: -> its deadline
    q:shares:<class>     hash: jobs that wait in the class, its virtual time, and where each tenant's share ends

The order is (level, class, x, arrival, id). Level and class, and x behind them, are one score: a double holds 53 bits,
x has 48 of them. A member is "<arrival in microseconds, 16 digits>:<job id>", which is how Redis orders equal scores.

    level binding   a deadline binds                       x = the deadline, in milliseconds
    level overdue   the job has waited for its bound       x = its tag
    level usual     the others                             x = its tag; 0 if it overtakes the others of its class

The tag is that of start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996), weights 1, in tokens: a job starts
where its tenant's last one ends, or at the class's virtual time if that is later. The virtual time is the tag of the
job served last; a class in which nothing waits begins again at nought.
"""

from __future__ import annotations

from typing import Final

LIBRARY: Final = """
local UNIT, BINDING, OVERDUE, USUAL = 2^48, 0, 10, 20
local AT_ONCE = 100  -- jobs that change their level in one call, lest it takes long; the others do in the next

local function lane_of(p) return p.priority .. (p.any_model and '*' or '') .. ':' .. p.tenant end

local function member_of(id, p) return string.format('%016.0f:', p.queued_at * 1e6) .. id end

local function id_of(member) return string.sub(member, 18) end

local function tally(q, p, sign)
  local sums, lane = q .. ':sums', lane_of(p)
  local fields = {'jobs ' .. lane}
  for _, tokens in ipairs({'prompt_tokens', 'output_tokens'}) do
    local said, silent = tokens .. ' ' .. lane, tokens .. '? ' .. lane
    redis.call('HINCRBY', sums, p[tokens] and said or silent, string.format('%d', sign * (p[tokens] or 1)))  -- -0, too
    fields[#fields + 1], fields[#fields + 2] = said, silent
  end
  if redis.call('HINCRBY', sums, fields[1], sign) == 0 then redis.call('HDEL', sums, unpack(fields)) end
  local shares = q .. ':shares:' .. p.priority
  if redis.call('HINCRBY', shares, 'jobs', sign) == 0 then redis.call('DEL', shares) end
end

-- The tag of a new job; its tenant's share ends behind it.
local function next_tag(q, p)
  local shares, mine = q .. ':shares:' .. p.priority, 'end of ' .. p.tenant
  local at = redis.call('HMGET', shares, 'now', mine)
  local tag = math.max(tonumber(at[1] or 0), tonumber(at[2] or 0))
  redis.call('HSET', shares, mine, tag + math.max(1, (p.prompt_tokens or 0) + (p.output_tokens or 0)))
  return tag
end

-- Put a job in; of a job that waits already only the message is replaced. Without tag it gets one. Returns 1 if new.
local function put(q, id, p, message, tag)
  local waiting = redis.call('HGET', q .. ':places', id)
  if waiting then
    local kept = cmsgpack.unpack(waiting)
    kept.delivery_tag, kept.exchange, kept.routing_key = p.delivery_tag, p.exchange, p.routing_key
    redis.call('HSET', q .. ':places', id, cmsgpack.pack(kept))
    redis.call('HSET', q .. ':messages', id, message)
    return 0
  end
  local member, lane = member_of(id, p), lane_of(p)
  p.tag = tag or next_tag(q, p)
  redis.call('HSET', q .. ':places', id, cmsgpack.pack(p))
  redis.call('HSET', q .. ':messages', id, message)
  redis.call('ZADD', q .. ':order', (USUAL + p.priority) * UNIT + p.tag, member)
  redis.call('ZADD', q .. ':arrivals:' .. lane, p.queued_at, id)
  if p.max_wait_s then redis.call('ZADD', q .. ':overdue', p.queued_at + p.max_wait_s, member) end
  if p.deadline_at then
    redis.call('ZADD', q .. ':binding', (p.queued_at + p.deadline_at) / 2, member)
    redis.call('ZADD', q .. ':deadlines:' .. lane, p.deadline_at, id)
  end
  tally(q, p, 1)
  return 1
end

-- Take a job out, wherever it stands. Returns its place and its message, or nothing.
local function drop(q, id)
  local packed = redis.call('HGET', q .. ':places', id)
  if not packed then return end
  local p, message = cmsgpack.unpack(packed), redis.call('HGET', q .. ':messages', id)
  local member, lane = member_of(id, p), lane_of(p)
  redis.call('HDEL', q .. ':places', id)
  redis.call('HDEL', q .. ':messages', id)
  redis.call('ZREM', q .. ':order', member)
  redis.call('ZREM', q .. ':arrivals:' .. lane, id)
  if p.max_wait_s then redis.call('ZREM', q .. ':overdue', member) end
  if p.deadline_at then
    redis.call('ZREM', q .. ':binding', member)
    redis.call('ZREM', q .. ':deadlines:' .. lane, id)
  end
  tally(q, p, -1)
  return p, message
end

-- Give each job the level that it has at *now*; a job changes it twice at most.
local function promote(q, now)
  local order = q .. ':order'
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', q .. ':overdue', '-inf', now, 'LIMIT', 0, AT_ONCE)) do
    redis.call('ZREM', q .. ':overdue', member)
    local score = tonumber(redis.call('ZSCORE', order, member))
    if score >= USUAL * UNIT then redis.call('ZADD', order, score - (USUAL - OVERDUE) * UNIT, member) end
  end
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', q .. ':binding', '-inf', now, 'LIMIT', 0, AT_ONCE)) do
    redis.call('ZREM', q .. ':binding', member)
    local p = cmsgpack.unpack(redis.call('HGET', q .. ':places', id_of(member)))
    redis.call('ZADD', order, (BINDING + p.priority) * UNIT + math.floor(p.deadline_at * 1000), member)
  end
end

-- Put a delivery back: the first of its class, unless a newer copy of the job waits already.
local function give_back(q, id, p, message)
  if redis.call('HEXISTS', q .. ':places', id) == 0 then put(q, id, p, message, 0) end
end

-- The level and class of the job that is served next; the least is the most urgent. Nothing if none waits.
local function urgency(q, now)
  promote(q, now)
  local first = redis.call('ZRANGE', q .. ':order', 0, 0, 'WITHSCORES')
  return first[2] and math.floor(first[2] / UNIT)
end

-- Take out the jobs that are served next, at most *most*. Returns a list of {place, message}.
local function take(q, most, now)
  promote(q, now)
  local taken, found = {}, redis.call('ZRANGE', q .. ':order', 0, most - 1, 'WITHSCORES')
  for i = 1, #found, 2 do
    local score = tonumber(found[i + 1])
    if score >= OVERDUE * UNIT then
      local shares = q .. ':shares:' .. math.floor(score / UNIT) % 10
      local tag = math.max(tonumber(redis.call('HGET', shares, 'now') or 0), score % UNIT)
      redis.call('HSET', shares, 'now', tag)
    end
    local p, message = drop(q, id_of(found[i]))
    taken[#taken + 1] = {p, message}
  end
  return taken
end
"""

# KEYS: the backlog, wake. ARGV: job id, its place as JSON, its message. Returns 1 if the job did not wait already.
PUT: Final = f"""{LIBRARY}
local new = put(KEYS[1], ARGV[1], cjson.decode(ARGV[2]), ARGV[3])
redis.call('XADD', KEYS[2], 'MAXLEN', '8', '*', 'q', '')
return new
"""

# KEYS: the backlog, a list, malformed. ARGV: an entry of the list, job id, its place as JSON; no place = no message.
# Returns 1 if the entry was there.
ADOPT: Final = f"""{LIBRARY}
if redis.call('LREM', KEYS[2], -1, ARGV[1]) == 0 then return 0 end
if ARGV[3] then
  put(KEYS[1], ARGV[2], cjson.decode(ARGV[3]), ARGV[1])
else
  redis.call('LPUSH', KEYS[3], ARGV[1])
  redis.call('LTRIM', KEYS[3], 0, 999)
end
return 1
"""

# KEYS: the backlog, where to, wake. ARGV: job id, the message it must still have, what becomes of it, its new routing
# key; without one KEYS[2] is a list. Nothing happens if somebody else took it in between. Returns 1 if it was moved.
MOVE: Final = f"""{LIBRARY}
if redis.call('HGET', KEYS[1] .. ':messages', ARGV[1]) ~= ARGV[2] then return 0 end
local p = drop(KEYS[1], ARGV[1])
if ARGV[4] then
  p.routing_key = ARGV[4]
  put(KEYS[2], ARGV[1], p, ARGV[3], p.tag)
else
  redis.call('LPUSH', KEYS[2], ARGV[3])
end
redis.call('XADD', KEYS[3], 'MAXLEN', '8', '*', 'q', '')
return 1
"""

# KEYS: the backlog, another model's, wake, the job's hash. ARGV: job id, the message it must still have, what becomes
# of it, its new routing key, its model, why. There it gets a new tag: the two have no virtual time in common.
# Nothing happens if somebody else took it in between. Returns 1 if it was moved.
TAKE_OVER: Final = f"""{LIBRARY}
if redis.call('HGET', KEYS[1] .. ':messages', ARGV[1]) ~= ARGV[2] then return 0 end
local p = drop(KEYS[1], ARGV[1])
p.routing_key, p.tag = ARGV[4], nil
put(KEYS[2], ARGV[1], p, ARGV[3])
if redis.call('EXISTS', KEYS[4]) == 1 then redis.call('HSET', KEYS[4], 'model', ARGV[5], 'why', ARGV[6]) end
redis.call('XADD', KEYS[3], 'MAXLEN', '8', '*', 'q', '')
return 1
"""

# KEYS: the backlog. ARGV: job id, the message it must still have. Returns 1 if the job waited there.
REMOVE: Final = f"""{LIBRARY}
if redis.call('HGET', KEYS[1] .. ':messages', ARGV[1]) ~= ARGV[2] then return 0 end
drop(KEYS[1], ARGV[1])
return 1
"""

# KEYS: the backlog. ARGV: job id, now (without it, Redis's time). Returns how many jobs are served before it, or nil.
RANK: Final = f"""{LIBRARY}
local packed = redis.call('HGET', KEYS[1] .. ':places', ARGV[1])
if not packed then return false end
promote(KEYS[1], ARGV[2] or redis.call('TIME')[1])
return redis.call('ZRANK', KEYS[1] .. ':order', member_of(ARGV[1], cmsgpack.unpack(packed)))
"""

# KEYS: the backlog. ARGV: a class, a tenant. Returns how many jobs would be served before one of theirs that came now.
RANK_OF_NEW: Final = f"""{LIBRARY}
promote(KEYS[1], redis.call('TIME')[1])
local at = redis.call('HMGET', KEYS[1] .. ':shares:' .. ARGV[1], 'now', 'end of ' .. ARGV[2])
local tag = math.max(tonumber(at[1] or 0), tonumber(at[2] or 0))
return redis.call('ZCOUNT', KEYS[1] .. ':order', '-inf', string.format('%.0f', (USUAL + ARGV[1]) * UNIT + tag))
"""

# KEYS: the backlog. ARGV: seconds, those of a prompt's token and of an answer's, how many jobs to look at, now (without
# it, Redis's time). Of the jobs that are level with the first, those that take so many seconds or more become the first
# of their class; nobody overtakes a deadline that binds. Returns how many have moved.
OVERTAKE: Final = f"""{LIBRARY}
local order, first = KEYS[1] .. ':order', urgency(KEYS[1], ARGV[5] or redis.call('TIME')[1])
if not first or first < OVERDUE then return 0 end
local least, beyond = string.format('%.0f', first * UNIT), string.format('(%.0f', (first + 1) * UNIT)
local members, ids, moved = redis.call('ZRANGEBYSCORE', order, least, beyond, 'LIMIT', 0, ARGV[4]), {{}}, 0
for i, member in ipairs(members) do ids[i] = id_of(member) end
for i, packed in ipairs(redis.call('HMGET', KEYS[1] .. ':places', unpack(ids))) do
  local p = cmsgpack.unpack(packed)
  local takes_s = (p.prompt_tokens or 0) * ARGV[2] + (p.output_tokens or 0) * ARGV[3]
  if takes_s >= tonumber(ARGV[1]) then moved = moved + redis.call('ZADD', order, 'CH', least, members[i]) end
end
return moved
"""

# KEYS: the backlog, the lists of its queue. Returns {the sums as they lie there, per lane {lane, first arrival, last,
# first deadline or nil, the bound of its first job or nil, as text}, how many messages lie in the lists}. Whatever the
# number of jobs, it looks at each lane once.
READ: Final = """
local sums, heads = redis.call('HGETALL', KEYS[1] .. ':sums'), {}
for i = 1, #sums, 2 do
  if string.sub(sums[i], 1, 5) == 'jobs ' then
    local lane = string.sub(sums[i], 6)
    local arrivals = KEYS[1] .. ':arrivals:' .. lane
    local oldest = redis.call('ZRANGE', arrivals, 0, 0, 'WITHSCORES')
    local newest = redis.call('ZRANGE', arrivals, -1, -1, 'WITHSCORES')
    local deadline = redis.call('ZRANGE', KEYS[1] .. ':deadlines:' .. lane, 0, 0, 'WITHSCORES')
    local max_wait = cmsgpack.unpack(redis.call('HGET', KEYS[1] .. ':places', oldest[1])).max_wait_s
    heads[#heads + 1] = {lane, oldest[2], newest[2], deadline[2] or false, max_wait and tostring(max_wait) or false}
  end
end
local listed = 0
for i = 2, #KEYS do listed = listed + redis.call('LLEN', KEYS[i]) end
return {sums, heads, listed}
"""
