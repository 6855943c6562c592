"""
An endpoint elsewhere that takes OpenAI's bodies, in place of models that cannot be made ready here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, Final

import httpx
from pydantic import SecretStr

from common.errors import EngineDied, EngineFailed, EngineNotReady, LoadFailed
from common.logs import get_logger
from worker.engines.assemble import complete, join
from worker.engines.base import Call, Completion, EngineState, JobStopped, Loaded, NeverAsleep, OnChunk, StopSignal
from worker.engines.http import Answer, EngineHttp
from worker.engines.interpret import completion_of, interpret, quote, read_chunk
from worker.selection.placement import Placement

logger = get_logger(__name__)

REST_S = 10.0  # after a failure, if the endpoint does not say how long; doubles with each further one
MAX_REST_S = 300.0  # also for what only the operator can put right: he need not restart the worker then

_NOT_FOUND = 404
# What neither the body is to blame for nor the endpoint: the key, the account, the address.
_OPERATORS = {401, 402, 403, _NOT_FOUND, 405}
# The endpoint, or what stands before it, takes nothing now; 529 is Anthropic's "overloaded".
_BUSY = {408, 425, 429, 502, 503, 504, 529}


class RemoteEngine(NeverAsleep):
    """
    An `Engine` without processes: each model it is asked to make ready is answered by *model* at *url*.

    An endpoint that fails, or asks for patience, is left alone for a while; its models are DEAD until then. The key
    leaves this object in one header, to *url* alone: redirects are not followed, and what the endpoint says is
    cleared of it.

    Parameters
    ----------
    url
        As OpenAI's clients take it, with the version: https://api.openai.com/v1.
    api_key
        Sent as a bearer token; None = the endpoint needs none.
    model
        What the endpoint calls the model.
    clock
        Monotonic seconds.
    """

    kind: Final = None

    def __init__(
        self, *, url: str, api_key: SecretStr | None, model: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.model = model
        self._url = url.rstrip("/")
        self._key = api_key.get_secret_value() if api_key else None
        self._headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._clock = clock
        self._http = EngineHttp()
        self._lock = threading.Lock()
        self._calls: dict[str, set[StopSignal]] = {}  # of each model that it stands in for
        self._failures = 0  # in a row
        self._rests_until = float("-inf")
        self._rests_why = ""

    @property
    def resting(self) -> str | None:
        """Why the endpoint is left alone now; None = it may be asked."""
        return self._rests_why if self._clock() < self._rests_until else None

    @property
    def in_flight(self) -> int:
        """How many requests the endpoint works on for us."""
        with self._lock:
            return sum(map(len, self._calls.values()))

    def ensure_ready(self, placement: Placement, *, timeout_s: float) -> Loaded:
        """
        See that the endpoint is there and takes our key, as far as its list of models says; see `Engine`.

        An endpoint that has no such list (404) is taken at its word.
        """
        began = self._clock()
        if self.state(placement.model_id) is EngineState.READY:
            return Loaded(seconds=0.0)
        try:
            found = httpx.get(f"{self._url}/models", headers=self._headers, timeout=timeout_s)
        except httpx.RequestError as error:
            self._rest(f"{self._url}/models does not answer: {type(error).__name__} {error}".rstrip())
            raise LoadFailed(self._rests_why) from error
        if found.status_code not in {200, _NOT_FOUND}:
            self._refused(Answer(status=found.status_code, content=found.content))
            raise LoadFailed(self._rests_why)
        with self._lock:
            self._rests_until = float("-inf")
            self._calls.setdefault(placement.model_id, set())
        return Loaded(seconds=self._clock() - began, details={"url": self._url, "model": self.model})

    def ensure_stopped(self, model_id: str, *, timeout_s: float) -> None:  # noqa: ARG002 - nothing is waited for
        """Stand in for the model no longer; see `Engine`."""
        with self._lock:
            calls = list(self._calls.pop(model_id, ()))  # each leaves the set as it ends
        for call in calls:
            call.stop("ended")

    def state(self, model_id: str) -> EngineState:
        """What is known of the endpoint; asks nobody. See `Engine`."""
        if model_id not in self._calls:
            return EngineState.STOPPED
        return EngineState.READY if self.resting is None else EngineState.DEAD

    def generate(self, model_id: str, call: Call, stop: StopSignal) -> Completion:
        """Answer one request; see `Engine`. The endpoint rests after what was not the body's fault."""
        if (resting := self.resting) is not None:
            raise EngineNotReady(resting)
        with self._until_ended(model_id, stop) as either:
            try:
                completion = self._ask(call, either)
            except JobStopped:
                if stop.reason is None:
                    raise EngineDied(f"The cloud endpoint does not stand in for {model_id} any more.") from None
                raise
            except (EngineNotReady, EngineDied, EngineFailed) as error:
                self._rest(error.message)
                raise
        self._failures = 0
        return completion

    def close(self) -> None:
        """Stand in for nothing any more; see `Engine`."""
        for model_id in list(self._calls):
            self.ensure_stopped(model_id, timeout_s=0)
        self._http.close()

    @contextmanager
    def _until_ended(self, model_id: str, stop: StopSignal) -> Iterator[StopSignal]:
        """Give a signal that is set by *stop*, and also when the model is stopped."""
        either = StopSignal()
        stop.on_stop(lambda: either.stop(stop.reason or ""))
        with self._lock:
            calls = self._calls.get(model_id)
            if calls is None:
                raise EngineNotReady(f"The cloud endpoint does not stand in for {model_id}.")
            calls.add(either)
        try:
            yield either
        finally:
            with self._lock:
                calls.discard(either)

    def _ask(self, call: Call, stop: StopSignal) -> Completion:
        began = time.monotonic()
        whole: dict[str, Any] = {}
        try:
            answer = self._http.post(
                self._url,
                call.path.removeprefix("/v1"),  # it is a part of the URL, which may have another version
                {**call.body, "model": self.model},
                timeout_s=call.timeout_s,
                stop=stop,
                on_event=None if call.on_chunk is None else partial(self._take, whole, call.on_chunk),
                headers=self._headers,
            )
        except EngineDied as error:
            if isinstance(error.__cause__, httpx.ConnectError | httpx.ConnectTimeout):
                raise EngineNotReady(f"The cloud endpoint {self._url} does not answer: {error.__cause__}") from None
            raise
        run_s = time.monotonic() - began
        if answer.streamed:
            return completion_of(complete(whole), run_s=run_s)
        if answer.status in _OPERATORS | _BUSY or 300 <= answer.status < 400:  # noqa: PLR2004
            self._refused(answer)
            raise EngineNotReady(self._rests_why)
        return interpret(status=answer.status, content=self._cleared(answer.content), run_s=run_s)

    def _take(self, whole: dict[str, Any], on_chunk: OnChunk, event: bytes) -> None:
        """Add what came to *whole*, and hand it on."""
        chunk = read_chunk(self._cleared(event))
        join(whole, chunk)
        on_chunk(chunk)

    def _refused(self, answer: Answer) -> None:
        """Let the endpoint rest after an answer that says so."""
        said = f"The cloud endpoint {self._url} says HTTP {answer.status}: {quote(self._cleared(answer.content))}"
        if answer.status in _BUSY or answer.status >= 500:  # noqa: PLR2004
            return self._rest(said, rest_s=read_retry_after(answer.retry_after, now=datetime.now(UTC)))
        return self._rest(f"{said} Correct CLOUD_URL, CLOUD_API_KEY or CLOUD_MODEL.", rest_s=MAX_REST_S)

    def _rest(self, why: str, *, rest_s: float | None = None) -> None:
        """Leave the endpoint alone; the first of several calls that fail together decides for how long."""
        with self._lock:
            now = self._clock()
            if now < self._rests_until:
                return
            if rest_s is None:
                rest_s = min(REST_S * 2**self._failures, MAX_REST_S)
            self._failures = min(self._failures + 1, 16)
            self._rests_until, self._rests_why = now + rest_s, why
        logger.warning("engines.cloud_rests", seconds=rest_s, reason=why)

    def _cleared(self, content: bytes) -> bytes:
        """Take our key out of what the endpoint says: some quote it where they refuse it."""
        return content.replace(self._key.encode(), b"[our key]") if self._key else content


def read_retry_after(header: str | None, *, now: datetime) -> float | None:
    """Read how many seconds a server wants to be left alone, at most an hour; None = it does not say (RFC 9110)."""
    if header is None:
        return None
    try:
        seconds = float(header) if header.strip().isdigit() else (parsedate_to_datetime(header) - now).total_seconds()
    except (ValueError, TypeError):
        return None
    return min(max(1.0, seconds), 3600.0)
