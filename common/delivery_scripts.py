"""
The scripts that move a delivery: popped, acknowledged, given back, set aside; each is one step in Redis.
"""

from __future__ import annotations

from typing import Final

from common.backlog_scripts import LIBRARY

# KEYS: the lists in the order to look, the backlogs, then unacked, unacked_index, unacked_owner, wake, malformed.
# ARGV: owner, how many messages at most, how many of KEYS are lists, then per list and backlog "1" if its consumer
# acknowledges and "0" if not.
# Returns {key, message, ...} of the first list that has any, else of the backlog whose first job is the most urgent,
# or {false, newest id of the wake stream}.
# The time is Redis's own. cjson only reads here: the message is stored as it came, since cjson would turn [] into {}.
POP: Final = f"""{LIBRARY}
local lists, n = tonumber(ARGV[3]), #KEYS - 5
local unacked, index, owners, wake, malformed = KEYS[n+1], KEYS[n+2], KEYS[n+3], KEYS[n+4], KEYS[n+5]
local most, now = tonumber(ARGV[2]), redis.call('TIME')[1]

local function hold(i, raw, tag, exchange, routing_key)
  if ARGV[3+i] ~= '1' then return end
  redis.call('HSET', unacked, tag, '[' .. raw .. ',' .. cjson.encode(exchange)
                                       .. ',' .. cjson.encode(routing_key) .. ']')
  redis.call('ZADD', index, now, tag)
  redis.call('HSET', owners, tag, ARGV[1])
end

for i = 1, lists do
  local taken = {{KEYS[i]}}
  while #taken <= most do
    local raw = redis.call('LINDEX', KEYS[i], -1)
    if not raw then break end
    local ok, message = pcall(cjson.decode, raw)
    local properties = ok and type(message) == 'table' and message['properties']
    local delivery = type(properties) == 'table' and properties['delivery_info']
    local tag = type(delivery) == 'table' and properties['delivery_tag']
    if type(tag) == 'string' and type(delivery['exchange']) == 'string'
       and type(delivery['routing_key']) == 'string' then
      hold(i, raw, tag, delivery['exchange'], delivery['routing_key'])
      redis.call('RPOP', KEYS[i])
      taken[#taken + 1] = raw
    else
      redis.call('RPOPLPUSH', KEYS[i], malformed)
      redis.call('LTRIM', malformed, 0, 999)
    end
  end
  if #taken > 1 then return taken end
end

local first, best
for i = lists + 1, n do
  local found = urgency(KEYS[i], now)
  if found and not (best and best <= found) then first, best = i, found end
end
if first then
  local reply = {{KEYS[first]}}
  for _, job in ipairs(take(KEYS[first], most, now)) do
    hold(first, job[2], job[1].delivery_tag, job[1].exchange, job[1].routing_key)
    reply[#reply + 1] = job[2]
  end
  return reply
end
local newest = redis.call('XREVRANGE', wake, '+', '-', 'COUNT', 1)
return {{false, newest[1] and newest[1][1] or '0'}}
"""

# KEYS: unacked, unacked_index, unacked_owner. ARGV: tag, owner. Returns 1 if the delivery was the owner's.
ACK: Final = """
local owner = redis.call('HGET', KEYS[3], ARGV[1])
if owner and owner ~= ARGV[2] then return 0 end
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('HDEL', KEYS[3], ARGV[1])
return redis.call('HDEL', KEYS[1], ARGV[1])
"""

# KEYS: unacked, unacked_index, unacked_owner, wake, the list or backlog to put it into.
# ARGV: tag, the owner it must still have ("" = none), the entry it must still be, the message to put, then for a list
# the side, for a backlog the job's id and its place.
# Compare and move: nothing happens if somebody else moved it in between. Returns 1 if it was moved.
GIVE_BACK: Final = f"""{LIBRARY}
if (redis.call('HGET', KEYS[3], ARGV[1]) or '') ~= ARGV[2] then return 0 end
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[3] then return 0 end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('HDEL', KEYS[3], ARGV[1])
if ARGV[6] then
  give_back(KEYS[5], ARGV[5], cjson.decode(ARGV[6]), ARGV[4])
else
  redis.call(ARGV[5] == 'back' and 'LPUSH' or 'RPUSH', KEYS[5], ARGV[4])
end
redis.call('XADD', KEYS[4], 'MAXLEN', '8', '*', 'q', '')
return 1
"""

# KEYS: unacked, unacked_index, unacked_owner, malformed. ARGV: tag, the entry as it was popped.
SET_ASIDE: Final = """
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('HDEL', KEYS[3], ARGV[1])
redis.call('LPUSH', KEYS[4], ARGV[2])
redis.call('LTRIM', KEYS[4], 0, 999)
"""
