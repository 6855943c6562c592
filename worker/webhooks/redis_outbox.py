"""
The webhooks that are owed, in Redis: due at a time, and held for a while by whoever calls.

The script that ends a job puts its webhook here (common/job_ends.py). Nothing leaves but by `settle`; a sender that
dies holds what it had for *hold_s* and no longer, so each is called at least once, whatever dies.
"""

from __future__ import annotations

import json

from common import keys
from common.redis_client import RedisClient
from worker.webhooks.judge import Owed

# KEYS: webhooks, webhook_calls. ARGV: how many at most, seconds to hold them. Returns {id, call as JSON, ...}.
_CLAIM = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local claimed = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[1])) do
  local call = redis.call('HGET', KEYS[2], id)
  if call then
    redis.call('ZADD', KEYS[1], now + ARGV[2], id)
    claimed[#claimed + 1] = id
    claimed[#claimed + 1] = call
  else
    redis.call('ZREM', KEYS[1], id)
  end
end
return claimed
"""

# KEYS: webhooks, webhook_calls. ARGV: id, seconds until it is due again, calls to add.
_POSTPONE = """
local call = redis.call('HGET', KEYS[2], ARGV[1])
if not call then return end
call = cjson.decode(call)
call.calls = call.calls + ARGV[3]
redis.call('HSET', KEYS[2], ARGV[1], cjson.encode(call))
local time = redis.call('TIME')
redis.call('ZADD', KEYS[1], time[1] + time[2] / 1000000 + ARGV[2], ARGV[1])
"""

# KEYS: webhooks, webhook_calls, the job's hash. ARGV: id, how it ended.
_SETTLE = """
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[2], ARGV[1])
if redis.call('EXISTS', KEYS[3]) == 1 then redis.call('HSET', KEYS[3], 'webhook', ARGV[2]) end
"""


class RedisOutbox:
    """What is owed; *client* is an asyncio one. Every method may raise redis.RedisError."""

    def __init__(self, client: RedisClient) -> None:
        self._claim = client.register_script(_CLAIM)
        self._postpone = client.register_script(_POSTPONE)
        self._settle = client.register_script(_SETTLE)

    async def claim(self, most: int, *, hold_s: float) -> list[Owed]:
        """Take webhooks that are due; nobody else gets them for *hold_s* seconds."""
        found = await self._claim(keys=[keys.WEBHOOKS, keys.WEBHOOK_CALLS], args=[most, hold_s])
        return [Owed(job_id=job_id, **json.loads(call)) for job_id, call in zip(found[::2], found[1::2], strict=True)]

    async def postpone(self, job_id: str, in_s: float, *, called: bool) -> None:
        """Let it be due again in *in_s* seconds; *called* = a call was made, in vain."""
        await self._postpone(keys=[keys.WEBHOOKS, keys.WEBHOOK_CALLS], args=[job_id, in_s, int(called)])

    async def settle(self, job_id: str, how: str) -> None:
        """Strike it off: "delivered", or why it was given up."""
        await self._settle(keys=[keys.WEBHOOKS, keys.WEBHOOK_CALLS, keys.job(job_id)], args=[job_id, how])
