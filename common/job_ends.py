"""
What a job holds from its routing to its end, and all that its end does, as Lua for the scripts that route and end.

At the end the outcome is stored, the tenant gets its share back, the webhook falls due, and answers beyond the limit
go: in one script with whatever else the caller does there, so exactly once for each job, whatever dies, and without
a round trip of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from common import keys
from common.errors import AnswerDropped
from common.may_enter import Entry, Held, Taken
from common.outcome_text import pack
from common.schemas import ErrorBody, JobState, Outcome

ALIVE_S: Final = 30 * 24 * 3600  # a job that has not ended is forgotten when nothing was heard of it for so long

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

# Take a share of the tenant's limits for a job, and note its deadline and its idempotency key; ARGV has `hold_args`
# from *at* on. Gives nothing; {jobs, bytes, gap} if there is no room; {job, is it the same body?} if its key is another
# job's. A job that holds a share already (its message came twice) needs no other.
HOLD: Final = (
    f"""
local OUTCOME, DEADLINES = '{keys.outcome("")}', '{keys.DEADLINES}'
"""
    """
local function hold(held, tenants, id, at)
  local entry, tenant, size, max_jobs, max_bytes, deadline, key, body = unpack(ARGV, at, at + 7)
  if entry == '' then return end
  if key ~= '' then
    local first = redis.call('HMGET', key, 'job', 'body')
    if first[1] and first[1] ~= id
       and (redis.call('HEXISTS', held, first[1]) == 1 or redis.call('EXISTS', OUTCOME .. first[1]) == 1) then
      return {first[1], first[2] == body and 1 or 0}
    end
  end
  if redis.call('HEXISTS', held, id) == 1 then return end
  local now = redis.call('HMGET', tenants, 'jobs ' .. tenant, 'bytes ' .. tenant, 'gap ' .. tenant)
  local jobs, bytes = tonumber(now[1] or 0), tonumber(now[2] or 0)
  if jobs + 1 > tonumber(max_jobs) or bytes + tonumber(size) > tonumber(max_bytes) then
    return {jobs, bytes, now[3] or ''}
  end
  redis.call('HINCRBY', tenants, 'jobs ' .. tenant, 1)
  redis.call('HINCRBY', tenants, 'bytes ' .. tenant, size)
  redis.call('HSET', held, id, entry)
  if deadline ~= '' then redis.call('ZADD', DEADLINES, deadline, id) end
  if key ~= '' then
    redis.call('HSET', key, 'job', id, 'body', body)
    redis.call('PERSIST', key)
  end
end
"""
)

# Give back what the job holds, and its webhook's URL if it has one. Its idempotency key lives as long as its outcome,
# and the router gets the messages of its twins. `gap` is a moving mean of the seconds between two ends of a tenant's
# jobs; a tenant without jobs leaves nothing behind.
_LET_GO: Final = (
    f"""
local DEADLINES, TWINS, SUBMIT, WAKE = '{keys.DEADLINES}', '{keys.twins("")}', '{keys.SUBMIT_QUEUE}', '{keys.WAKE}'
local CANCEL = '{keys.cancel("")}'
"""
    """
local function let_go(held, tenants, id, now, ttl)
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
  if entry.deadline then redis.call('ZREM', DEADLINES, id) end
  if entry.key then
    redis.call('EXPIRE', entry.key, ttl)
    if redis.call('EXISTS', TWINS .. id) == 1 then
      while redis.call('LMOVE', TWINS .. id, SUBMIT, 'RIGHT', 'RIGHT') do end
      redis.call('XADD', WAKE, 'MAXLEN', '8', '*', 'q', '')
    end
  end
  return entry.webhook
end
"""
)

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
      redis.call('DEL', '{keys.stream("")}' .. old)
      redis.call('SET', '{keys.CELERY_RESULT_PREFIX}' .. old, [==[{_CELERYS}]==] .. ',"task_id":' .. tail,
                 'XX', 'KEEPTTL')
"""
    """
    end
  end
end
"""
)

# End a job. KEYS begins with `end_keys`, ARGV with `end_args`. Gives the outcome of record if there was one already;
# then nothing has happened, but that a webhook which nobody knew of falls due: once, however often the end is told.
# An answer that is not the newest attempt's (a worker came back from a pause, and is the first to end after all) is
# told anew, for the stream has another one's beginning. Without its words nothing happens, and the script gives "".
END: Final = (
    _LET_GO
    + _KEEP
    + """
local function end_job()
  local id, text, state, ttl, size, max, url, attempt, whole = unpack(ARGV, 1, 9)
  local stored = redis.call('GET', KEYS[1])
  local time = redis.call('TIME')
  local now = time[1] + time[2] / 1000000
  if not stored then
    local found = redis.call('HMGET', KEYS[2], 'stream', 'attempts')
    local untold = found[1] and state == 'answered' and found[2] ~= attempt
    if untold and whole == '' then return '' end
    redis.call('SET', KEYS[1], text, 'EX', ttl)
    redis.call('HSET', KEYS[2], 'end', state)
    redis.call('EXPIRE', KEYS[2], ttl)
    redis.call('EXPIRE', CANCEL .. id, ttl)
    if untold then
      redis.call('XADD', KEYS[3], 'MAXLEN', 1, '*', 'kind', 'reset', 'attempt', attempt)
      redis.call('XADD', KEYS[3], '*', 'kind', 'chunk', 'attempt', attempt, 'chunk', whole)
    end
    if found[1] then
      redis.call('XADD', KEYS[3], '*', 'kind', 'end', 'state', state)
      redis.call('EXPIRE', KEYS[3], ttl)
      size = size + redis.call('MEMORY', 'USAGE', KEYS[3])
    end
    url = let_go(KEYS[4], KEYS[5], id, now, ttl) or url
    keep(KEYS[6], KEYS[7], id, state, size, max, ttl, now)
  end
  if url ~= '' and redis.call('HSETNX', KEYS[2], 'webhook', 'due') == 1 then
    redis.call('EXPIRE', KEYS[2], ttl)
    redis.call('ZADD', KEYS[8], now, id)
    redis.call('HSET', KEYS[9], id, cjson.encode({url = url, calls = 0, since = now}))
  end
  return stored
end
"""
)


def hold_args(entry: Entry | None) -> list[str | float]:
    """Arguments of `hold`: what the job holds as JSON ("" = nothing), its tenant's limits, its deadline, its key."""
    if entry is None:
        return ["", "", 0, 0, 0, "", "", ""]
    key = "" if entry.key is None else keys.same_key(entry.tenant, entry.key)
    text: dict[str, object] = {"tenant": entry.tenant, "bytes": entry.bytes}
    if entry.webhook is not None:
        text["webhook"] = entry.webhook
    if entry.deadline_at is not None:
        text["deadline"] = True
    if key:
        text["key"] = key
    return [
        json.dumps(text, ensure_ascii=False), entry.tenant, entry.bytes, entry.max_jobs, entry.max_bytes,
        "" if entry.deadline_at is None else entry.deadline_at, key, entry.body,
    ]  # fmt: skip


def read_refusal(found: Sequence[Any]) -> Held | Taken:
    """Read what `hold` gives of a job that it does not take."""
    if len(found) == len(("job", "is it the same body?")):
        return Taken(job_id=found[0], same_body=bool(found[1]))
    jobs, size, gap = found
    return Held(jobs=int(jobs), bytes=int(size), gap_s=float(gap) if gap else None)


def end_keys(job_id: str) -> list[str]:
    """The keys that a script with `end_job` begins with."""
    return [
        keys.outcome(job_id), keys.job(job_id), keys.stream(job_id), keys.HELD, keys.TENANTS, keys.KEPT,
        keys.KEPT_BYTES, keys.WEBHOOKS, keys.WEBHOOK_CALLS,
    ]  # fmt: skip


def end_args(
    outcome: Outcome, *, ttl_s: int, max_bytes: int | None, webhook: str | None = None, whole: str = ""
) -> list[str | int]:
    """
    The arguments that a script with `end_job` begins with.

    *webhook* is that of a job which was never routed; *whole* the answer as a chunk, for where it must be told anew.
    """
    plain = outcome.model_dump_json(exclude_none=True)
    text = pack(plain)
    size = len(text.encode()) + len(plain.encode())  # ours, and Celery's copy
    return [
        outcome.job_id, text, outcome.state, ttl_s, size, "" if max_bytes is None else max_bytes, webhook or "",
        outcome.ledger.attempt, whole,
    ]  # fmt: skip
