"""
What travels through Redis: the request, the outcome, the offer of a worker, the hardware's status.

Pydantic models at the edge of the system; sizes in bytes, times in seconds, moments as aware UTC.
A reader ignores fields it does not know, so that old and new programs can share one Redis.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticSerializationError

from common.errors import InvalidRequest, ShiftworkerError, error_for

AUTO = "auto"
_LONGEST_RUN_S = 7 * 24 * 3600
_NOT_THE_WORK = {
    "priority", "deadline", "time_limit", "latency_sensitive", "webhook", "tenant", "idempotency_key",
}  # fmt: skip


def utc_now() -> datetime:
    """Now, as an aware UTC moment; the one place where stored times come from."""
    return datetime.now(UTC)


def earliest(*moments: datetime | None) -> datetime | None:
    """Give the first of these; None is none, and a moment without a zone is UTC's, as Celery writes them."""
    known = (moment if moment.tzinfo else moment.replace(tzinfo=UTC) for moment in moments if moment is not None)
    return min(known, default=None)


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


# --- The job's way in ----------------------------------------------------------------------------------


class BodyKind(StrEnum):
    """Which OpenAI endpoint the body belongs to; the value is the endpoint's path."""

    CHAT = "/v1/chat/completions"
    COMPLETION = "/v1/completions"
    EMBEDDING = "/v1/embeddings"


class JobRequest(BaseModel):
    """
    One job: an OpenAI body (chat completions, completions or embeddings) and a few fields of ours.

    Every field that is not listed here belongs to OpenAI's body and reaches the engine unchanged.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    # OpenAI's: exactly one of the three says what kind of body this is.
    messages: list[dict[str, Any]] | None = Field(default=None, min_length=1)
    prompt: str | list[Any] | None = None
    input: str | list[Any] | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    n: int | None = Field(default=None, ge=1, description="answers to each prompt")
    best_of: int | None = Field(default=None, ge=1)
    stream: bool | None = Field(default=None, description="true: the tokens also go to the job's stream")
    stream_options: dict[str, Any] | None = None

    # Ours.
    model: str = Field(default=AUTO, min_length=1, max_length=200)
    task_type: str | None = Field(default=None, max_length=100)
    priority: int = Field(default=3, ge=0, le=9, description="0 is served first")
    deadline: AwareDatetime | None = Field(default=None, description="ISO 8601 or Unix seconds")
    time_limit: float | None = Field(default=None, gt=0, le=_LONGEST_RUN_S, description="seconds in the engine")
    latency_sensitive: bool = True
    privacy_required: bool = Field(default=True, description="true: the job never leaves the operator's machines")
    tenant: str = Field(default="default", max_length=100)
    idempotency_key: str | None = Field(default=None, max_length=200)
    webhook: str | None = Field(default=None, max_length=2000)

    @classmethod
    def parse(cls, body: object) -> Self:
        """
        Read *body* as a request.

        Raises
        ------
        InvalidRequest
            Names each field that is wrong and what is allowed there.
        """
        if not isinstance(body, dict):
            raise InvalidRequest(
                f"The job's body is {type(body).__name__}, not an object. Send an OpenAI chat-completions "
                'body, for example {"messages": [{"role": "user", "content": "Hello"}]}.'
            )
        try:
            request = cls.model_validate(body)
            _ = request.size_bytes  # half a surrogate pair is a str in Python, and nothing that can be stored
        except ValidationError as error:
            raise InvalidRequest(f"The job's body is not valid: {_problems(error)}.") from None
        except PydanticSerializationError as error:
            raise InvalidRequest(f"The job's body cannot be written as JSON in UTF-8: {error}.") from None
        return request

    @model_validator(mode="after")
    def _exactly_one_kind(self) -> Self:
        given = [name for name in ("messages", "prompt", "input") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "exactly one of messages (chat), prompt (completion) or input (embedding) is needed, "
                f"found {' and '.join(given) or 'none'}"
            )
        for position, message in enumerate(self.messages or ()):
            if not isinstance(message.get("role"), str):
                raise ValueError(f'messages[{position}] has no "role"')  # noqa: TRY004 - pydantic wants it
        if self.stream and self.input is not None:
            raise ValueError("stream: an embedding is one piece; leave it out")
        return self

    def within(self, *, time_limits: Iterable[float | None] = (), expires: datetime | None = None) -> Self:
        """
        Give the same job under the limits that Celery knows of its task too: the nearest of each counts.

        *time_limits* in seconds, of which None and 0 are none; *expires* as in `earliest`.
        """
        limits = (*time_limits, self.time_limit, _LONGEST_RUN_S)
        shortest = min(limit for limit in limits if limit and limit > 0)
        changed: dict[str, Any] = {} if shortest in {self.time_limit, _LONGEST_RUN_S} else {"time_limit": shortest}
        if expires is not None:
            changed["deadline"] = earliest(expires, self.deadline)
        return self.model_copy(update=changed) if changed else self

    @property
    def kind(self) -> BodyKind:
        """Which endpoint the body belongs to."""
        if self.messages is not None:
            return BodyKind.CHAT
        return BodyKind.COMPLETION if self.prompt is not None else BodyKind.EMBEDDING

    @property
    def digest(self) -> str:
        """What tells apart two jobs with one idempotency key: the work that is asked, and not how soon it is wanted."""
        asked = self.model_dump(mode="json", exclude_none=True, exclude=_NOT_THE_WORK)
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    @property
    def text(self) -> str:
        """All text of the prompt, for scoring and for counting; images and token ids count nothing."""
        if self.messages is not None:
            return "\n".join(part for message in self.messages for part in _texts(message.get("content")))
        return "\n".join(_texts(self.prompt if self.prompt is not None else self.input))

    @property
    def answer_tokens(self) -> int | None:
        """The longest answer the producer allows, in tokens; None if the body does not say."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def answers(self) -> int:
        """How many answers the engine must make: `n`, or `best_of`, for each prompt."""
        several = isinstance(self.prompt, list) and not all(isinstance(token, int) for token in self.prompt)
        return max(self.n or 1, self.best_of or 1) * (len(self.prompt or ()) if several else 1)

    @cached_property
    def size_bytes(self) -> int:
        """The body's length as JSON in UTF-8."""
        return len(self.model_dump_json(exclude_none=True).encode())

    def engine_body(self, served_model: str) -> dict[str, Any]:
        """
        Build the body for the engine: OpenAI's fields as they came, the model resolved.

        A stream ends with the usage whatever the producer asked for: the ledger needs it.
        """
        ours = {
            "model", "task_type", "priority", "deadline", "time_limit", "latency_sensitive", "privacy_required",
            "tenant", "idempotency_key", "webhook", "stream", "stream_options",
        }  # fmt: skip
        body = self.model_dump(mode="json", exclude_none=True, exclude=ours)
        body |= {"model": served_model, "stream": bool(self.stream)}
        if self.stream:
            body["stream_options"] = {**(self.stream_options or {}), "include_usage": True}
        return body


def _texts(content: object) -> list[str]:
    """Every piece of text in an OpenAI content: a string, or a list of strings and {"text": ...} parts."""
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        return []
    found = (part if isinstance(part, str) else part.get("text") for part in content if isinstance(part, str | dict))
    return [text for text in found if isinstance(text, str)]


def _problems(error: ValidationError) -> str:
    """Pydantic's findings on one line: where, what."""
    return "; ".join(
        f"{'.'.join(str(step) for step in found['loc']) or 'body'}: {found['msg'].removeprefix('Value error, ')}"
        for found in error.errors(include_url=False, include_input=False)
    )


# --- The job's way through -----------------------------------------------------------------------------


class JobState(StrEnum):
    """Where a job is. The last four are ends: an outcome is stored and never changes."""

    UNKNOWN = "unknown"  # nobody has seen this id, or it has expired
    QUEUED = "queued"  # the router has seen it and not yet chosen
    ROUTED = "routed"  # it waits in its model's queue
    RUNNING = "running"  # an engine works on it
    ANSWERED = "answered"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class Route(_Stored):
    """The router's answer: which model takes the job, and why."""

    model: str
    complexity: float = Field(ge=0, le=1)
    why: str
    cloud: str | None = Field(default=None, description="on its way there: why; None = the model itself answers")
    instead_of: str | None = Field(default=None, description="the smaller model that it was routed to at first")
    stays: bool = Field(default=False, description="the cloud has refused the body: it waits for the model itself")


class Ledger(_Stored):
    """What became of the job on its way; None where nobody measured it."""

    model: str | None = None
    complexity: float | None = None
    why: str | None = None
    cloud: str | None = Field(default=None, description="what answered in place of the model; None = the model did")
    same_as: str | None = Field(default=None, description="the job that was done for it: one with its idempotency_key")
    worker: str | None = None
    attempt: int = 0
    queued_at: AwareDatetime | None = None
    finished_at: AwareDatetime | None = None
    waited_s: float | None = Field(default=None, description="from the router to the start of the run")
    switch_s: float | None = Field(default=None, description="the part of waited_s spent in a switch")
    prefill_s: float | None = None
    decode_s: float | None = None
    run_s: float | None = Field(default=None, description="in the engine: prefill, decode and its own queue")
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class ErrorBody(_Stored):
    """Why there is no answer."""

    kind: str
    message: str
    retry_helps: bool
    retry_after_s: float | None = Field(default=None, description="when a retry may help; None = nobody knows")

    @classmethod
    def of(cls, error: ShiftworkerError) -> Self:
        """Describe *error* for storage."""
        return cls(
            kind=error.kind,
            message=error.message,
            retry_helps=error.retry_helps,
            retry_after_s=error.retry_after_s,
        )

    def as_exception(self) -> ShiftworkerError:
        """Give back the error that was stored, to be raised again."""
        return error_for(self.kind, self.message, self.retry_after_s)


class Outcome(_Stored):
    """The result of record: exactly one per job, written once."""

    job_id: str
    state: Literal[JobState.ANSWERED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED]
    response: dict[str, Any] | None = Field(default=None, description="OpenAI's response; only if answered")
    error: ErrorBody | None = Field(default=None, description="only if not answered, or the answer was dropped")
    ledger: Ledger = Ledger()

    @property
    def answer(self) -> str | None:
        """The text of the first choice; None for embeddings and for jobs without an answer."""
        choices = (self.response or {}).get("choices") or [{}]
        first: dict[str, Any] = choices[0]
        text = (first.get("message") or {}).get("content", first.get("text"))
        return text if isinstance(text, str) else None

    def for_twin(self, job_id: str) -> Self:
        """Give the outcome of another job with the same idempotency key: this one's."""
        ledger = self.ledger.model_copy(update={"same_as": self.job_id})
        return self.model_copy(update={"job_id": job_id, "ledger": ledger})

    def result(self) -> dict[str, Any]:
        """What Celery's `AsyncResult.get()` returns: OpenAI's response, and the ledger beside it."""
        return {**(self.response or {}), "ledger": self.ledger.model_dump(mode="json")}


class StreamEvent(_Stored):
    """
    One thing that happened on a job's stream.

    `reset`: an attempt begins; what came before it is void. `chunk`: a piece of the answer in OpenAI's form; what was
    made at the same time is one chunk. `end`: the job has its outcome; always the last.
    """

    position: str = Field(description="where a reader who has had this event goes on")
    kind: Literal["reset", "chunk", "end"]
    attempt: int | None = Field(default=None, description="of a reset or a chunk")
    chunk: dict[str, Any] | None = Field(default=None, description="of a chunk: OpenAI's")
    state: JobState | None = Field(default=None, description="of an end: how the job ended")

    @property
    def text(self) -> str:
        """The piece of the first choice's text; empty where there is none."""
        for choice in (self.chunk or {}).get("choices") or ():
            if choice.get("index", 0) == 0:
                return (choice.get("delta") or {}).get("content") or choice.get("text") or ""
        return ""


class Fault(_Stored):
    """What failed under one attempt of a job, though another one may be answered."""

    at: AwareDatetime
    worker: str
    attempt: int
    kind: str = Field(description="the error's class")
    message: str
    company: int | None = Field(
        default=None, description="jobs in the engine (WorkerDied: in the worker) when it died; None = it did not die"
    )


class DeadLetter(_Stored):
    """A job that was set aside: all that is needed to understand it, and to run it again."""

    job_id: str
    at: AwareDatetime
    model: str | None
    error: ErrorBody
    faults: tuple[Fault, ...]
    body: dict[str, Any] = Field(description="the request, as it was sent")


class Estimate(_Stored):
    """When a job will have ended."""

    low_s: float = Field(description="from now")
    high_s: float = Field(description="from now")
    confidence: float = Field(default=0.8, description="the share of jobs that end between the two")
    model: str | None = Field(default=None, description="None = the router has not chosen: the range covers its choice")
    ahead: int | None = Field(default=None, description="waiting jobs of its model that are served before it")
    switches: int | None = Field(default=None, description="of models that it is likely to wait for")
    unknown: tuple[str, ...] = Field(
        default=(), description="models that the router may choose too, and of which nobody knows: not in the range"
    )


class JobView(_Stored):
    """What is known of a job that may not have ended yet."""

    job_id: str
    state: JobState
    model: str | None = None
    complexity: float | None = None
    why: str | None = None
    queued_at: AwareDatetime | None = None
    ahead: int | None = Field(default=None, description="waiting jobs of its model that are served before it")
    finish: Estimate | None = Field(default=None, description="when it will have ended; None = nobody knows")
    attempts: int = 0
    webhook: str | None = Field(default=None, description='"due", "delivered", or why it was given up; None = none')
    faults: tuple[Fault, ...] = Field(default=(), description="what failed under its attempts, the oldest first")

    @property
    def ledger(self) -> Ledger:
        """What a job that ends now can say of its way."""
        return Ledger(
            model=self.model, complexity=self.complexity, why=self.why, attempt=self.attempts, queued_at=self.queued_at
        )


# --- What a worker offers ------------------------------------------------------------------------------


class OfferedModel(_Stored):
    """A model that a worker can serve, as the router needs to know it."""

    id: str
    aliases: tuple[str, ...] = ()
    tier: int = Field(description="1 is the smallest; the order of the cascade")
    complexity_up_to: float = Field(description="the hardest job that this model is trusted with")
    max_model_len: int = Field(description="tokens of prompt and answer together")
    capabilities: tuple[str, ...] = ()
    auto: bool = Field(default=True, description='may the router choose it for "auto"?')
    away: bool = Field(default=False, description="nobody can serve it now: it failed to load, or its workers are gone")


class Offer(_Stored):
    """Everything one worker can serve; the last offer is kept when the worker is away."""

    worker: str
    models: tuple[OfferedModel, ...]
    at: AwareDatetime


# --- Hardware status: a contract with whoever watches ---------------------------------------------------


class GpuStatus(_Stored):
    """One card; None where the driver does not say."""

    index: int
    uuid: str | None
    name: str
    total_bytes: int
    used_bytes: int | None
    free_bytes: int | None
    utilization: float | None = Field(description="0 to 1")
    temperature_c: float | None
    power_w: float | None
    power_limit_w: float | None
    sm_clock_mhz: int | None
    throttle_reasons: tuple[str, ...] = ()
    processes: dict[int, int] = Field(default_factory=dict, description="pid -> bytes")


class SwitchStage(StrEnum):
    """The stages of a switch, in order; FAILED may follow any."""

    DRAINING = "draining"  # jobs in flight end, nothing new is taken
    UNLOADING = "unloading"  # the old engine's process ends, its memory is seen free
    LOADING = "loading"
    VERIFYING = "verifying"  # a canary prompt must answer
    READY = "ready"
    FAILED = "failed"


class WorkerState(StrEnum):
    """What the worker does now."""

    STARTING = "starting"
    SERVING = "serving"
    SWITCHING = "switching"
    IDLE = "idle"
    DRAINING = "draining"  # it was told to stop: takes nothing, what runs may end


class ResidentStatus(_Stored):
    """A model that is on the machine now."""

    model: str
    level: str = Field(description="starting, ready, asleep_1, asleep_2 or stopping")
    bytes: int | None
    in_flight: int
    since: AwareDatetime
    smaller: str | None = Field(
        default=None, description="what it was loaded with instead of its plan; None = as planned"
    )
    max_model_len: int | None = Field(default=None, description="tokens, where it was loaded with fewer than planned")


class SwitchRecord(_Stored):
    """One switch that ended."""

    from_model: str | None
    to_model: str
    outcome: Literal["ready", "failed", "stale"]
    seconds: float
    stages: dict[SwitchStage, float] = Field(default_factory=dict, description="seconds spent in each")
    attempts: int
    reason: str
    at: AwareDatetime
    level: str = Field(default="cold", description="from where it was made ready: cold, spare, asleep_1 or asleep_2")
    load_bytes: int | None = Field(default=None, description="of weights that were loaded, on all cards together")


class SwitchTime(_Stored):
    """What one kind of switch takes on this worker, by all that it has made; seconds, without draining."""

    from_model: str | None
    to_model: str
    level: str = Field(description="from where it is made ready: cold, spare, asleep_1 or asleep_2")
    mean_s: float = Field(description="a moving mean: the newest counts most")
    last_s: float
    load_s: float = Field(description="the part of mean_s in the stage loading")
    load_bytes: int | None = Field(description="of weights")
    count: int = Field(description="how many were measured")
    at: AwareDatetime


class ModelPace(_Stored):
    """What a model's jobs take on one worker: means, in which the newest jobs count most."""

    worker: str
    model: str
    count: int = Field(description="jobs that were measured, ever")
    at_once: int = Field(ge=1, description="jobs that run side by side")
    in_flight: float = Field(ge=0, description="jobs that were in the engine together, those that stood behind too")
    run_s: float = Field(ge=0, description="of a job among others")
    job_s: float | None = Field(default=None, description="for each answer, all together, while others waited")
    deviation_s: float = Field(ge=0, description="how far single jobs are from run_s: the standard deviation")
    prompt_tokens: float | None = None
    prefill_s: float | None = None
    output_tokens: float | None = None
    decode_s: float | None = None
    output_share: float | None = Field(default=None, description="of the longest answer that a job allows")
    at: AwareDatetime


class Foreseen(_Stored):
    """When a job ends that has so many jobs of its model before it: 8 of 10 times between low and high."""

    ahead: int = Field(ge=0)
    low_s: float = Field(description="after the forecast was made, as all of these")
    high_s: float
    switches: int = Field(description="that it waits for, the one under way too")


class Forecast(_Stored):
    """When the jobs that wait for a model will end, as far as a worker can foresee it."""

    model: str
    worker: str
    at: AwareDatetime
    valid_s: float = Field(description="nobody should go by it for longer")
    serving: bool = Field(description="its jobs are being answered: those before a job leave while time passes")
    points: tuple[Foreseen, ...] = Field(min_length=1, description="by growing `ahead`, from 0")
    next_s: float = Field(ge=0, description="later, for each job beyond the last of the points")
    longest_s: float | None = Field(default=None, description="9 of 10 jobs take no longer, once they run")


class QueueStatus(_Stored):
    """What waits for one model."""

    waiting: int
    oldest_s: float | None = Field(description="how long the job at the head has waited")


class TurnStatus(_Stored):
    """Whose jobs should run now."""

    model: str | None
    why: str


class HardwareStatus(_Stored):
    """What a worker publishes every few seconds and at each stage of a switch."""

    version: Literal[1] = 1
    worker: str
    at: AwareDatetime
    state: WorkerState
    source: str = Field(description="who read the cards: nvml, nvidia-smi, none or stub")
    gpus: tuple[GpuStatus, ...]
    ram_total_bytes: int
    ram_available_bytes: int
    stage: SwitchStage | None = Field(description="the stage of the switch that is under way")
    switching_to: str | None
    residents: tuple[ResidentStatus, ...]
    backlog: dict[str, QueueStatus]
    turn: TurnStatus | None = Field(default=None, description="whose turn it is, and why")
    switches: tuple[SwitchRecord, ...] = Field(description="the last ones, newest first")
    switch_times: tuple[SwitchTime, ...] = Field(default=(), description="what each kind of switch takes here")
    alerts: tuple[str, ...]
