"""
Calls the webhooks that are owed, on a thread of its own: signed, to public addresses, until somebody answers.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from typing import Any, Self

import httpx
import redis

from common import keys
from common.errors import AddressRefused
from common.logs import get_logger
from common.may_reach import Address, Allowed, Target, check_reach, target_of
from common.outcome_text import read_outcome
from common.redis_client import RedisClient, connect_async
from common.resolve import resolve
from common.schemas import JobState, Outcome
from common.settings import WebhookSettings
from common.standard_webhook import signed_headers
from worker.webhooks.judge import Ended, Owed, judge
from worker.webhooks.redis_outbox import RedisOutbox

logger = get_logger(__name__)

_LOOK_EVERY_S = 0.25
_REDIS_AWAY_PAUSE_S = 1.0
_HOLD_MORE_S = 30.0  # beyond a call's time limit, before another sender may take it
_FAILING_S = 5.0  # until another look at a webhook whose host has not answered others
_MOST_HOSTS = 1000  # remembered


class WebhookSender:
    """
    Sends webhooks while it is entered; the senders of several processes share the work.

    Parameters
    ----------
    allowed
        Where calls may lead, besides public addresses.
    """

    def __init__(self, redis_url: str, settings: WebhookSettings, allowed: Allowed) -> None:
        assert settings.secret is not None  # noqa: S101 - without one webhooks are off
        self._url = redis_url
        self._secret = settings.secret.get_secret_value()
        self._timeout_s = settings.timeout_s
        self._give_up_s = settings.give_up_s
        self._parallel = settings.parallel
        self._allowed = allowed
        self._busy: Counter[str] = Counter()  # calls under way, by host
        self._answering: set[str] = set()  # hosts that took the last call
        self._ending = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="webhooks", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop; calls that are under way are made again by somebody else."""
        self._ending.set()
        self._thread.join(_LOOK_EVERY_S + self._timeout_s)

    async def _run(self) -> None:
        client = connect_async(self._url)
        outbox, calls = RedisOutbox(client), set[asyncio.Task[None]]()
        # No proxy from the environment: it would resolve the name again, and reach what we may not.
        async with httpx.AsyncClient(trust_env=False, timeout=self._timeout_s) as http:
            while not self._ending.is_set():
                pause_s = _LOOK_EVERY_S
                try:
                    free = self._parallel - len(calls)
                    owed = await outbox.claim(free, hold_s=self._timeout_s + _HOLD_MORE_S) if free else []
                    for one in owed:
                        call = await self._begin(one, outbox, client, http)
                        calls.update(call)
                        for task in call:
                            task.add_done_callback(calls.discard)
                    if owed and len(owed) == free:
                        pause_s = 0.0
                except (redis.RedisError, OSError) as error:
                    logger.warning("webhooks.redis_away", problem=str(error))
                    pause_s = _REDIS_AWAY_PAUSE_S
                except Exception:
                    logger.exception("webhooks.internal_error")
                    pause_s = _REDIS_AWAY_PAUSE_S
                await asyncio.sleep(pause_s)
            for task in calls:
                task.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        await client.aclose()

    async def _begin(
        self, owed: Owed, outbox: RedisOutbox, client: RedisClient, http: httpx.AsyncClient
    ) -> list[asyncio.Task[None]]:
        """
        Start the call, unless its host has its share of calls already.

        That is three quarters of all for one that answers, and one quarter for the others: whoever does not answer
        holds up nobody else.
        """
        try:
            host = target_of(owed.url).host
        except AddressRefused as error:
            await outbox.settle(owed.job_id, f"given up: {error.message}")
            return []
        quarters, pause_s = (3, _LOOK_EVERY_S) if host in self._answering else (1, _FAILING_S)
        if self._busy[host] >= max(1, self._parallel * quarters // 4):
            await outbox.postpone(owed.job_id, pause_s, called=False)
            return []
        self._busy[host] += 1
        return [asyncio.create_task(self._deliver(owed, host, outbox, client, http))]

    async def _deliver(
        self, owed: Owed, host: str, outbox: RedisOutbox, client: RedisClient, http: httpx.AsyncClient
    ) -> None:
        try:
            stored = await client.get(keys.outcome(owed.job_id))
            ended = await self._call(owed, payload(owed.job_id, read_outcome(stored) if stored else None), http)
            verdict = judge(owed, ended, now=time.time(), give_up_s=self._give_up_s)
            self._remember(host, answers=verdict.delivered)
            tell = logger.info if verdict.delivered else logger.warning
            tell(
                "webhooks.called", job_id=owed.job_id, host=host, delivered=verdict.delivered, reason=verdict.reason,
                again_in_s=verdict.again_in_s,
            )  # fmt: skip
            if verdict.again_in_s is not None:
                await outbox.postpone(owed.job_id, verdict.again_in_s, called=True)
            else:
                await outbox.settle(owed.job_id, "delivered" if verdict.delivered else verdict.reason)
        except (redis.RedisError, OSError) as error:  # held until its time is over, then called again
            logger.warning("webhooks.redis_away", problem=str(error))
        except Exception:
            logger.exception("webhooks.internal_error", job_id=owed.job_id)
        finally:
            self._busy[host] -= 1
            self._busy += Counter()  # forgets hosts without calls

    def _remember(self, host: str, *, answers: bool) -> None:
        if len(self._answering) >= _MOST_HOSTS:
            self._answering.clear()
        (self._answering.add if answers else self._answering.discard)(host)

    async def _call(self, owed: Owed, body: bytes, http: httpx.AsyncClient) -> Ended:
        """Make one call; everything that happens outside is an Ended."""
        at = int(time.time())
        try:
            async with asyncio.timeout(self._timeout_s):
                target = target_of(owed.url)
                found = await asyncio.to_thread(resolve, target.host, target.port, timeout_s=self._timeout_s)
                if not found:
                    return Ended(problem=f"{target.host} has no address")
                address = check_reach(target, found, self._allowed)
                headers = signed_headers(self._secret, message_id=owed.job_id, at=at, body=body)
                # The answer's status is all we read: whoever answers without end holds nobody up.
                async with http.stream(
                    "POST",
                    _pinned(target, address),
                    content=body,
                    headers={**headers, "host": _authority(target), "content-type": "application/json"},
                    extensions={"sni_hostname": target.host},  # TLS asks for the name, and checks it
                ) as answer:
                    return Ended(status=answer.status_code, retry_after_s=_seconds(answer.headers.get("retry-after")))
        except AddressRefused as error:
            return Ended(problem=error.message, refused=True)
        except TimeoutError:
            return Ended(problem=f"no answer after {self._timeout_s:g} s")
        except (httpx.HTTPError, OSError, ValueError) as error:
            return Ended(problem=f"{type(error).__name__}: {error}".rstrip(": "))


def payload(job_id: str, outcome: Outcome | None) -> bytes:
    """Write what a webhook says: how the job ended, with its result or its error; None = both have expired."""
    data: dict[str, Any] = {"id": job_id, "state": outcome.state if outcome else JobState.UNKNOWN}
    if outcome is not None:
        data["ledger"] = outcome.ledger.model_dump(mode="json")
        if outcome.error is not None:
            data["error"] = outcome.error.model_dump(mode="json", exclude_none=True)
        else:
            data["result"] = outcome.response
    at = outcome.ledger.finished_at if outcome else None
    event = {"type": f"job.{data['state']}", "timestamp": at.isoformat() if at else None, "data": data}
    return json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()


def _pinned(target: Target, address: Address) -> str:
    """The URL with the address that was checked in place of the name, which may have another one by now."""
    host = f"[{address}]" if address.version == 6 else str(address)  # noqa: PLR2004
    return f"{target.scheme}://{host}:{target.port}{target.rest or '/'}"


def _authority(target: Target) -> str:
    host = f"[{target.host}]" if ":" in target.host else target.host
    usual = {"http": 80, "https": 443}[target.scheme]
    return host if target.port == usual else f"{host}:{target.port}"


def _seconds(retry_after: str | None) -> float | None:
    """Read HTTP's Retry-After; None if it is not there, or a date."""
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else None
