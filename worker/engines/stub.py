"""
An engine in memory: answers at once or as slowly as asked, always the same to the same request.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from common.errors import (
    EngineDied,
    EngineFailed,
    EngineNotReady,
    EngineTimeout,
    InvalidRequest,
    LoadFailed,
    PromptTooLong,
)
from common.schemas import BodyKind, JobRequest
from worker.catalog.spec import EngineKind
from worker.engines.base import Call, Completion, EngineState, JobStopped, Loaded, StopSignal
from worker.selection.placement import Placement
from worker.state.residency import Level

ECHOED_WORDS = 8
EMBEDDING_DIMENSIONS = 8


class StubEngine:
    """
    An `Engine` without processes, for tests, demonstrations and simulations.

    A word counts as a token. An answer is a digest of the request and the first words of its prompt; streamed, its
    words are spread over the time that the request takes.

    Parameters
    ----------
    load_s, run_s, sleep_s
        How long a load, a request and falling asleep take, in seconds.
    wake_s
        The levels at which a model on a card can sleep, and the seconds to wake from each; none = it cannot.
    """

    kind = EngineKind.STUB
    standby = Level.COLD

    def __init__(
        self,
        *,
        load_s: float = 0.0,
        run_s: float = 0.0,
        sleep_s: float = 0.0,
        wake_s: Mapping[Level, float] | None = None,
    ) -> None:
        self._load_s = load_s
        self._run_s = run_s
        self._sleep_s = sleep_s
        self._wake_s = wake_s or {}
        self._lock = threading.Lock()
        self._models: dict[str, _Model] = {}

    def ensure_ready(self, placement: Placement, *, timeout_s: float) -> Loaded:
        """Make the model answer; see `Engine`."""
        with self._lock:
            model = self._models.get(placement.model_id)
            if model is not None and model.state is EngineState.READY:
                return Loaded(seconds=0.0)
            wakes = model is not None and model.state is EngineState.ASLEEP and model.placement == placement
            if model is None or not wakes:
                model = self._models[placement.model_id] = _Model(placement)
            model.state = EngineState.STARTING
        level, takes_s = (model.level, self._wake_s[model.level]) if wakes else (Level.COLD, self._load_s)
        if model.gone.wait(min(takes_s, timeout_s)):
            raise LoadFailed(f"{placement.model_id} was stopped while it was loading.")
        if takes_s > timeout_s:
            self.ensure_stopped(placement.model_id, timeout_s=0)
            raise LoadFailed(f"{placement.model_id} did not become ready within {timeout_s:g} s.")
        model.level, model.state = Level.READY, EngineState.READY
        return Loaded(seconds=takes_s, level=level)

    def standby_bytes(self) -> int:
        """Nothing stands ready; see `Engine`."""
        return 0

    def sleep_levels(self, placement: Placement) -> tuple[Level, ...]:
        """The levels it was made with, for a model on a card; see `Engine`."""
        return tuple(self._wake_s) if placement.gpus else ()

    def ensure_asleep(self, model_id: str, level: Level, *, timeout_s: float) -> None:
        """Put the model to sleep; see `Engine`."""
        with self._lock:
            model = self._models.get(model_id)
            if model is not None and (model.state, model.level) == (EngineState.ASLEEP, level):
                return
            if model is None or model.state is not EngineState.READY or level not in self.sleep_levels(model.placement):
                raise EngineFailed(f"{model_id} is {self.state(model_id)} and cannot fall asleep at {level}.")
            model.state = EngineState.STARTING  # neither ready nor asleep
        if model.gone.wait(min(self._sleep_s, timeout_s)) or self._sleep_s > timeout_s:
            self.ensure_stopped(model_id, timeout_s=0)
            raise EngineFailed(f"{model_id} did not fall asleep within {timeout_s:g} s.")
        model.level, model.state = level, EngineState.ASLEEP

    def ensure_stopped(self, model_id: str, *, timeout_s: float) -> None:  # noqa: ARG002 - the protocol's signature
        """End the model; see `Engine`."""
        with self._lock:
            model = self._models.pop(model_id, None)
        if model is not None:
            model.go(EngineState.STOPPED)

    def die(self, model_id: str) -> None:
        """End the model as a crash would: running requests fail, the state is DEAD."""
        self._models[model_id].go(EngineState.DEAD)

    def in_flight(self, model_id: str) -> int:
        """How many requests the model works on."""
        model = self._models.get(model_id)
        return 0 if model is None else len(model.calls)

    def state(self, model_id: str) -> EngineState:
        """What is known of *model_id*; see `Engine`."""
        model = self._models.get(model_id)
        return EngineState.STOPPED if model is None else model.state

    def generate(self, model_id: str, call: Call, stop: StopSignal) -> Completion:
        """Answer one request; see `Engine`."""
        model = self._models.get(model_id)
        if model is None or model.state is not EngineState.READY:
            raise EngineNotReady(f"{model_id} is {self.state(model_id)} on this worker; the job waits for its turn.")
        request = _read(call)
        words = request.text.split()
        length = model.placement.max_model_len
        if len(words) >= length:
            raise PromptTooLong(f"The prompt has {len(words)} words; {model_id} takes fewer than {length}.")

        answer = " ".join([_digest(call.body), *words[:ECHOED_WORDS]])
        tokens = min(len(answer.split()), request.answer_tokens or length)
        text = " ".join(answer.split()[:tokens])
        response = _response(request, model_id=model_id, text=text, prompt_tokens=len(words), tokens=tokens)
        began = time.monotonic()
        self._work(model, call, stop, _chunks(response) if call.on_chunk else ())
        run_s = time.monotonic() - began
        return Completion(
            response=response,
            run_s=run_s,
            prefill_s=0.0,
            decode_s=run_s,
            prompt_tokens=len(words),
            completion_tokens=0 if request.kind is BodyKind.EMBEDDING else tokens,
        )

    def close(self) -> None:
        """Stop every model; see `Engine`."""
        for model_id in list(self._models):
            self.ensure_stopped(model_id, timeout_s=0)

    def _work(self, model: _Model, call: Call, stop: StopSignal, chunks: Sequence[Mapping[str, Any]]) -> None:
        """Take `run_s`, giving out *chunks* meanwhile, and end at once when the job is stopped or the model goes."""
        woken = threading.Event()
        stop.on_stop(woken.set)
        began = time.monotonic()
        with model.watched_by(woken):
            for number, chunk in enumerate([None, *chunks]):
                due = began + min(self._run_s * (number + 1) / (len(chunks) + 1), call.timeout_s)
                woken.wait(max(0.0, due - time.monotonic()))
                if stop.reason is not None:
                    raise JobStopped(stop.reason)
                if model.gone.is_set():
                    raise EngineDied("The engine ended while it worked on the job.")
                if chunk is not None and call.on_chunk is not None:
                    call.on_chunk(chunk)
        if self._run_s > call.timeout_s:
            raise EngineTimeout(f"The engine did not answer within {call.timeout_s:g} s.")


class _Model:
    """One model in memory, and the calls that must learn of its end."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.level = Level.STARTING
        self.state = EngineState.STARTING
        self.gone = threading.Event()
        self._lock = threading.Lock()
        self.calls: set[threading.Event] = set()

    @contextmanager
    def watched_by(self, woken: threading.Event) -> Iterator[None]:
        """Set *woken* when the model goes, also if it has gone already."""
        with self._lock:
            self.calls.add(woken)
        if self.gone.is_set():
            woken.set()
        try:
            yield
        finally:
            with self._lock:
                self.calls.discard(woken)

    def go(self, state: EngineState) -> None:
        """End, in *state*; every running call wakes."""
        self.state = state
        self.gone.set()
        with self._lock:
            for woken in self.calls:
                woken.set()


def _read(call: Call) -> JobRequest:
    request = JobRequest.parse(dict(call.body))
    if request.kind != call.path:
        raise InvalidRequest(f"A body for {request.kind} was sent to {call.path}. Send it to its own path.")
    return request


def _digest(body: Mapping[str, Any]) -> str:
    asked = {key: value for key, value in body.items() if key not in {"stream", "stream_options"}}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]


def _chunks(response: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Cut *response* as OpenAI's endpoint for its kind does: a chunk for each word, then the end, then the usage."""
    chat = response["object"] == "chat.completion"
    [choice] = response["choices"]
    text = choice["message"]["content"] if chat else choice["text"]
    common = {"object": "chat.completion.chunk" if chat else response["object"], "model": response["model"]}

    def chunk(piece: str, finish_reason: str | None) -> dict[str, Any]:
        said = {"delta": {"content": piece}} if chat else {"text": piece}
        return {**common, "choices": [{"index": 0, **said, "finish_reason": finish_reason}]}

    return [
        *(chunk(piece, None) for piece in re.findall(r"\S+\s*", text)),
        chunk("", choice["finish_reason"]),
        {**common, "choices": [], "usage": response["usage"]},
    ]


def _response(request: JobRequest, *, model_id: str, text: str, prompt_tokens: int, tokens: int) -> dict[str, Any]:
    """Shape the answer as OpenAI's endpoint for this kind of body does."""
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}
    if request.kind is BodyKind.CHAT:
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return {"object": "chat.completion", "model": model_id, "choices": [choice], "usage": usage}
    if request.kind is BodyKind.COMPLETION:
        choice = {"index": 0, "text": text, "finish_reason": "stop"}
        return {"object": "text_completion", "model": model_id, "choices": [choice], "usage": usage}
    inputs = request.input if isinstance(request.input, list) else [request.input]
    data = [{"object": "embedding", "index": i, "embedding": _embedding(found)} for i, found in enumerate(inputs)]
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    return {"object": "list", "model": model_id, "data": data, "usage": usage}


def _embedding(text: object) -> list[float]:
    digest = hashlib.sha256(json.dumps(text).encode()).digest()
    return [byte / 255 for byte in digest[:EMBEDDING_DIMENSIONS]]
