"""
The dead-letter queue: jobs that were set aside, each with its history, until somebody retries or drops it.

A retry withdraws the job's outcome, which was its failure, and forgets its attempts: a new life under the same id, in
which the first outcome wins again. Nothing else ever takes an outcome away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from common import keys
from common.job_ends import END
from common.outcome_text import pack, unpack
from common.redis_client import RedisClient
from common.schemas import DeadLetter

_MOST = 1000  # letters; of more, the oldest go. It takes a job several deaths of an engine to get here.

# End a job and keep its letter. KEYS and ARGV as END has them; then DEAD, DEAD_LETTERS; the letter, how many to keep.
SET_ASIDE: Final = (
    END
    + """
local stored = end_job()
if stored then return stored end
local dead, letters, id, time = KEYS[#KEYS - 1], KEYS[#KEYS], ARGV[1], redis.call('TIME')
redis.call('HSET', KEYS[2], 'dead', '1')
redis.call('HSET', letters, id, ARGV[#ARGV - 1])
redis.call('ZADD', dead, time[1] + time[2] / 1000000, id)
while redis.call('ZCARD', dead) > tonumber(ARGV[#ARGV]) do
  redis.call('HDEL', letters, redis.call('ZPOPMIN', dead)[1])
end
"""
)

# KEYS: dead-letters, the job's hash; then all that is left of the job's first life. ARGV: id. Gives the letter.
# What is left goes only as long as it is that of the failure: a job that was retried already lives on.
_REVIVE: Final = """
local letter = redis.call('HGET', KEYS[1], ARGV[1])
if letter and redis.call('HEXISTS', KEYS[2], 'dead') == 1 then redis.call('DEL', unpack(KEYS, 2)) end
return letter
"""

# KEYS: dead, dead-letters. ARGV: id, the letter it must still be. Returns 1 if it was there.
_TAKE_OUT: Final = """
if redis.call('HGET', KEYS[2], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[1], ARGV[1])
return 1
"""


def set_aside_keys() -> list[str]:
    """The last keys of SET_ASIDE."""
    return [keys.DEAD, keys.DEAD_LETTERS]


def set_aside_args(letter: DeadLetter) -> list[Any]:
    """The last arguments of SET_ASIDE."""
    return [pack(letter.model_dump_json()), _MOST]


class DeadLetters:
    """The dead-letter queue, for operators."""

    def __init__(self, client: RedisClient) -> None:
        self._redis = client

    def all(self) -> list[DeadLetter]:
        """Every letter, the newest first."""
        ids = self._redis.zrevrange(keys.DEAD, 0, -1)
        found = self._redis.hmget(keys.DEAD_LETTERS, ids) if ids else []
        return [_read(text) for text in found if text is not None]

    def find(self, job_id: str) -> DeadLetter | None:
        """The letter of one job; None = it is not here."""
        text = self._redis.hget(keys.DEAD_LETTERS, job_id)
        return None if text is None else _read(text)

    def drop(self, job_id: str) -> bool:
        """Forget the letter; the job's outcome stays what it is. False = it is not here."""
        text = self._redis.hget(keys.DEAD_LETTERS, job_id)
        return text is not None and self._take_out(job_id, text)

    def retry(self, job_id: str, submit: Callable[[dict[str, Any]], object]) -> bool:
        """
        Run the job again, with its attempts at nought; False = it is not here.

        *submit* sends its body under its own id; should it raise, or this process die, the letter is still here and
        the retry can be repeated.
        """
        old = [
            keys.job(job_id), keys.outcome(job_id), keys.stream(job_id), keys.cancel(job_id),
            f"{keys.CELERY_RESULT_PREFIX}{job_id}",
        ]  # fmt: skip
        text = self._redis.eval(_REVIVE, 1 + len(old), keys.DEAD_LETTERS, *old, job_id)
        if text is None:
            return False
        submit(_read(text).body)
        self._take_out(job_id, text)
        return True

    def _take_out(self, job_id: str, text: str) -> bool:
        return bool(self._redis.eval(_TAKE_OUT, 2, keys.DEAD, keys.DEAD_LETTERS, job_id, text))


def _read(text: str) -> DeadLetter:
    return DeadLetter.model_validate_json(unpack(text))
