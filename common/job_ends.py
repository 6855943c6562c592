"""
What the script that stores an outcome does besides, in Lua: shares go back, webhooks fall due, old answers go.

Everything here runs inside that one script (see redis_job_store.py), so it happens exactly once for each job and
together with its end, whatever dies; and it costs no round trip.
"""

from __future__ import annotations

import json
from typing import Final

from common import keys
from common.errors import AnswerDropped
from common.schemas import ErrorBody, JobState

_DROPPED = AnswerDropped(
    "The job was answered. Its answer is no longer kept: newer ones needed the room (JOB_RESULT_MAX_BYTES). Fetch "
    "answers sooner, or send the job again under a new id."
)
# Behind these two comes the job's id as JSON, and a brace. Celery's copy goes too: it is the larger one.
_RECORD = f'{{"state":"{JobState.ANSWERED}","error":{ErrorBody.of(_DROPPED).model_dump_json()},"job_id":'
_CELERYS = json.dumps(
    {
        "status": "FAILURE",
        "result": {
            "exc_type": _DROPPED.kind,
            "exc_message": list(_DROPPED.args),
            "exc_module": AnswerDropped.__module__,
        },
        "traceback": None,
        "children": [],
    }
).removesuffix("}")

# Take a share of the tenant's limits for a job; give nothing, or {jobs, bytes, gap} if there is no room.
# A job that holds one already (its message came twice) needs no other.
HOLD: Final = """
local function hold(held, tenants, id, entry, tenant, size, max_jobs, max_bytes)
  if redis.call('HEXISTS', held, id) == 1 then return end
  local now = redis.call('HMGET', tenants, 'jobs ' .. tenant, 'bytes ' .. tenant, 'gap ' .. tenant)
  local jobs, bytes = tonumber(now[1] or 0), tonumber(now[2] or 0)
  if jobs + 1 > tonumber(max_jobs) or bytes + tonumber(size) > tonumber(max_bytes) then
    return {jobs, bytes, now[3] or ''}
  end
  redis.call('HINCRBY', tenants, 'jobs ' .. tenant, 1)
  redis.call('HINCRBY', tenants, 'bytes ' .. tenant, size)
  redis.call('HSET', held, id, entry)
end
"""

# Give the job's share back, and its webhook's URL if it has one. `gap` is a moving mean of the seconds between two
# ends of a tenant's jobs; a tenant without jobs leaves nothing behind.
_LET_GO: Final = """
local function let_go(held, tenants, id, now)
  local entry = redis.call('HGET', held, id)
  if not entry then return end
  redis.call('HDEL', held, id)
  entry = cjson.decode(entry)
  local jobs, bytes, ended, gap = 'jobs ' .. entry.tenant, 'bytes ' .. entry.tenant,
                                  'ended ' .. entry.tenant, 'gap ' .. entry.tenant
  if redis.call('HINCRBY', tenants, jobs, -1) <= 0 then
    redis.call('HDEL', tenants, jobs, bytes, ended, gap)
  else
    redis.call('HINCRBY', tenants, bytes, string.format('%d', -entry.bytes))
    local last = redis.call('HMGET', tenants, ended, gap)
    if last[1] then
      local mean = now - last[1]
      if last[2] then mean = 0.9 * last[2] + 0.1 * mean end
      redis.call('HSET', tenants, gap, string.format('%.6f', mean))
    end
    redis.call('HSET', tenants, ended, string.format('%.6f', now))
  end
  return entry.webhook
end
"""

# Count what is kept, forget what has expired (a few each time: one comes, so more than one goes), and drop the oldest
# answers while there are too many bytes. What is dropped stays an outcome, so that its job never runs again.
_KEEP: Final = (
    """
local function keep(kept, total, id, state, size, max, ttl, now)
  redis.call('ZADD', kept, now, size .. ' ' .. state .. ' ' .. id)
  local bytes = redis.call('INCRBY', total, size)
  redis.call('EXPIRE', kept, ttl)
  redis.call('EXPIRE', total, ttl)
  local function forget(entry)
    redis.call('ZREM', kept, entry)
    bytes = redis.call('DECRBY', total, entry:match('^%d+'))
  end
  for _, entry in ipairs(redis.call('ZRANGEBYSCORE', kept, '-inf', now - ttl, 'LIMIT', 0, 8)) do forget(entry) end
  if max == '' or bytes <= tonumber(max) then return end
  for _, entry in ipairs(redis.call('ZRANGE', kept, 0, 99)) do
    local old_state, old = entry:match('^%d+ (%S+) (.*)$')
    if bytes <= tonumber(max) or old == id then return end
    forget(entry)
    if old_state == 'answered' then
      local tail = cjson.encode(old) .. '}'
"""
    f"""
      redis.call('SET', '{keys.outcome("")}' .. old, [==[{_RECORD}]==] .. tail, 'XX', 'KEEPTTL')
      redis.call('SET', '{keys.CELERY_RESULT_PREFIX}' .. old, [==[{_CELERYS}]==] .. ',"task_id":' .. tail,
                 'XX', 'KEEPTTL')
"""
    """
    end
  end
end
"""
)

# KEYS: the outcome, the job's hash, its stream; held, tenants, kept, kept_bytes, webhooks, webhook_calls.
# ARGV: the outcome as text, its state, lifetime in seconds, the job's id, bytes it takes, bytes that may be kept
# ('' = any), the webhook ('' = the one that the job came with).
# Returns the outcome of record. A webhook falls due once, however often the end is told.
FINISH: Final = (
    _LET_GO
    + _KEEP
    + """
local kept, url = redis.call('GET', KEYS[1]), ARGV[7]
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
if not kept then
  redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[3])
  redis.call('HSET', KEYS[2], 'end', ARGV[2])
  redis.call('EXPIRE', KEYS[2], ARGV[3])
  if redis.call('HEXISTS', KEYS[2], 'stream') == 1 then
    redis.call('XADD', KEYS[3], '*', 'kind', 'end', 'state', ARGV[2])
    redis.call('EXPIRE', KEYS[3], ARGV[3])
  end
  url = let_go(KEYS[4], KEYS[5], ARGV[4], now) or url
  keep(KEYS[6], KEYS[7], ARGV[4], ARGV[2], ARGV[5], ARGV[6], ARGV[3], now)
end
if url ~= '' and redis.call('HSETNX', KEYS[2], 'webhook', 'due') == 1 then
  redis.call('EXPIRE', KEYS[2], ARGV[3])
  redis.call('ZADD', KEYS[8], now, ARGV[4])
  redis.call('HSET', KEYS[9], ARGV[4], cjson.encode({url = url, calls = 0, since = now}))
end
return kept or ARGV[1]
"""
)
