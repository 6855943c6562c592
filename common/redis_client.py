"""
One way to reach Redis: short time limits, text answers, and an error that says where we looked.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import redis
import redis.asyncio
import redis.asyncio.retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import NoScriptError, OutOfMemoryError, ReadOnlyError
from redis.retry import Retry
from tenacity import RetryCallState, retry, retry_if_exception_type, wait_exponential_jitter

from common.errors import RedisUnavailable
from common.logs import get_logger

logger = get_logger(__name__)

# redis-py's annotations mix the answers of its sync and async clients, and of bytes and text.
RedisClient = Any

CONNECT_TIMEOUT_S = 3.0
ANSWER_TIMEOUT_S = 10.0  # a full Redis on a slow disk may pause; a dead connection must not hang for ever

_OPTIONS: dict[str, Any] = {
    "decode_responses": True,
    "socket_connect_timeout": CONNECT_TIMEOUT_S,
    "socket_timeout": ANSWER_TIMEOUT_S,
}


_patience_is_over = threading.Event()


def end_patience() -> None:
    """Let the clients of this process give up at the first failure from now on: it leaves."""
    _patience_is_over.set()


def patience_is_over() -> bool:
    """Does this process leave, so that nobody in it waits for Redis any more?"""
    return _patience_is_over.is_set()


class _Retry(Retry):
    """Tries again *retries* times; None = until it is done, also while Redis is full, or until patience is over."""

    def __init__(self, retries: int | None, *, cap_s: float) -> None:
        backoff = ExponentialWithJitterBackoff(base=0.05, cap=cap_s)
        super().__init__(backoff, retries=-1 if retries is None else retries)
        if retries is None:
            self.update_supported_errors([OutOfMemoryError, ReadOnlyError])

    @property
    def _retries(self) -> int:
        return 0 if patience_is_over() else self._given

    @_retries.setter
    def _retries(self, value: int) -> None:
        self._given = value


def connect(url: str, *, patient: bool = False) -> RedisClient:
    """
    A client for *url*; it connects at the first command.

    A broken connection is tried twice more; a *patient* client, for what must not be lost, does not give up before
    `end_patience`.
    """
    retry = _Retry(None, cap_s=2) if patient else _Retry(2, cap_s=0.5)
    return redis.Redis.from_url(url, retry=retry, **_OPTIONS)


def connect_async(url: str) -> RedisClient:
    """The same for asyncio; it belongs to the event loop that uses it first."""
    backoff = ExponentialWithJitterBackoff(base=0.05, cap=0.5)
    return redis.asyncio.Redis.from_url(url, retry=redis.asyncio.retry.Retry(backoff, retries=2), **_OPTIONS)


def ping(client: RedisClient, url: str) -> None:
    """
    See that Redis answers.

    Raises
    ------
    RedisUnavailable
        It does not; the message names the address without its password.
    """
    try:
        client.ping()
    except (redis.RedisError, OSError) as error:
        raise RedisUnavailable(
            f"No Redis answers at {without_password(url)} ({error}). Start one (`shiftworker up` brings its own), "
            "or set REDIS_URL to where it is."
        ) from error


def wait_until_there(client: RedisClient, url: str) -> None:
    """Ping until Redis answers: back-off from half a second to ten, each failure logged; no end."""

    def tell(attempt: RetryCallState) -> None:
        problem = attempt.outcome.exception() if attempt.outcome else None
        pause_s = attempt.next_action.sleep if attempt.next_action else 0
        logger.warning("redis.unavailable", problem=str(problem), retry_in_s=round(pause_s, 1))

    retry(
        retry=retry_if_exception_type(RedisUnavailable),
        wait=wait_exponential_jitter(initial=0.5, max=10),
        before_sleep=tell,
    )(ping)(client, url)


@cache
def digest(script: str) -> str:
    """The name under which Redis knows a Lua script."""
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()


def run_script(client: RedisClient, script: str, key_count: int, *keys_and_args: Any) -> Any:
    """Run a Lua script; its text is sent only to a Redis that does not know it yet."""
    try:
        return client.evalsha(digest(script), key_count, *keys_and_args)
    except NoScriptError:
        return client.eval(script, key_count, *keys_and_args)


def run_for_each(
    client: RedisClient, script: str, calls: Sequence[tuple[Sequence[Any], Sequence[Any]]], *then: Any
) -> list[Any]:
    """
    Run a Lua script once for each of *calls* (its keys, its arguments), and the command *then* after them, in one round
    trip; the text is sent only to a Redis that does not know it.

    What fails is tried again as *client* does with a command, without the calls that are done already; then the first
    error is raised.
    """
    replies: list[Any] = [NoScriptError()] * len(calls)  # of what is not done yet: an error

    def run() -> None:
        left = [number for number, reply in enumerate(replies) if isinstance(reply, Exception)]
        with client.pipeline(transaction=False) as pipe:
            for number in left:
                names, args = calls[number]
                pipe.evalsha(digest(script), len(names), *names, *args)
            if then:
                pipe.execute_command(*then)
            found = pipe.execute(raise_on_error=False)
        for number, reply in zip(left, found, strict=False):
            replies[number] = reply
        for reply in (*replies, *found[len(left) :]):
            if isinstance(reply, Exception):
                raise reply

    def run_known() -> None:
        try:
            run()
        except NoScriptError:
            client.script_load(script)
            run()

    client.get_retry().call_with_retry(run_known, lambda _error: None)
    return replies


def without_password(url: str) -> str:
    """*url* as it may be shown, also when it is not valid: the password replaced by dots."""
    return re.sub(r"://([^/:@]*):.*@", r"://\1:...@", re.sub(r"([?&]password=)[^&#]*", r"\1...", url))
