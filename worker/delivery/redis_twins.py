"""
Where a job waits for its twin: its message lies aside until the job that has its idempotency key ends.

The script that ends that job gives the messages back to the router (common/job_ends.py), which finds the outcome there.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import replace

from common import keys
from common.job_ends import ALIVE_S, HOLD, hold_args, read_refusal
from common.may_enter import Entry, Held
from common.redis_client import RedisClient
from common.transport import acknowledged_already

# KEYS: unacked, unacked_index, unacked_owner, held, tenants, the messages of the first's twins, the job's hash.
# ARGV: tag, owner, message, the first's id, lifetime in seconds, the job's id, `hold_args`.
# Returns 1 if it was put aside, 0 if the first has ended or the delivery is another's now, or what `hold` says.
_PARK = (
    HOLD
    + """
if redis.call('HGET', KEYS[3], ARGV[1]) ~= ARGV[2] or redis.call('HEXISTS', KEYS[4], ARGV[4]) == 0 then return 0 end
local refused = hold(KEYS[4], KEYS[5], ARGV[6], 7)
if refused then return refused end
redis.call('LPUSH', KEYS[6], ARGV[3])
redis.call('HSET', KEYS[7], 'why', 'the same as job ' .. ARGV[4] .. ', by its idempotency_key')
redis.call('EXPIRE', KEYS[7], ARGV[5])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[3], ARGV[1])
return 1
"""
)


class RedisTwins:
    """Puts aside messages that *owner* holds. May raise redis.RedisError; then it may or may not have done so."""

    def __init__(self, client: RedisClient, *, owner: str, ttl_s: float) -> None:
        self._redis = client
        self._owner = owner
        self._alive_s = max(int(ttl_s), ALIVE_S)
        self._park = client.register_script(_PARK)

    def park(self, job_id: str, first: str, *, delivery: str, entry: Entry) -> bool | Held:
        """
        Put the message of *delivery* aside until *first* ends; the job has a share of its tenant's limits meanwhile.

        False: that has ended by now, or the message is somebody else's. Held: its tenant has no room.
        """
        held = self._redis.hget(keys.UNACKED, delivery)
        if held is None:
            return False
        message = json.loads(held)[0]
        message["properties"]["delivery_tag"] = str(uuid.uuid4())  # the old one is acknowledged yet
        found = self._park(
            keys=[
                keys.UNACKED, keys.UNACKED_INDEX, keys.UNACKED_OWNER, keys.HELD, keys.TENANTS, keys.twins(first),
                keys.job(job_id),
            ],
            args=[
                delivery, self._owner, json.dumps(message), first, self._alive_s, job_id,
                *hold_args(replace(entry, key=None)),
            ],
        )  # fmt: skip
        if isinstance(found, list):
            refused = read_refusal(found)
            assert isinstance(refused, Held)  # noqa: S101 - the entry has no key of its own here
            return refused
        if found:
            acknowledged_already(delivery)
        return bool(found)
