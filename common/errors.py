"""
Every error that Shiftworker raises, and whether a retry helps.

    ShiftworkerError
    ├── Refused                 the job itself is at fault: a retry cannot help
    │   ├── InvalidRequest          the body is no request we understand
    │   ├── KeyReused               its idempotency key is that of a job which asks for something else
    │   ├── OverLimit               the job is larger, or asks for more, than the operator allows
    │   ├── AddressRefused          a URL in the body leads where jobs may not lead us
    │   ├── UnknownModel            no such model in the catalogue, or none that can do this
    │   └── PromptTooLong           the prompt is longer than the model's length
    ├── Unavailable             the job is fine, something under it is not: a retry helps
    │   ├── RedisUnavailable        nobody answers at the Redis address
    │   ├── RedisFull               Redis is there, and has no memory for another job
    │   ├── QueueFull               too much of the tenant, or of everybody, waits already: `retry_after_s`
    │   ├── EngineNotReady          the model's engine is not (or no longer) ready
    │   ├── EngineDied              the engine's process ended under the job
    │   ├── WorkerDied              the worker's process, and all that was under it
    │   ├── EngineFailed            the engine lives, but answered with an error of its own, or with nonsense
    │   ├── EngineTimeout           the engine did not answer in time
    │   ├── LoadFailed              the engine did not come up, or its canary did not answer
    │   │   └── OutOfMemory             it ended for want of memory: a smaller plan may do
    │   ├── LoadRefused             too hot, or too much power, to load now
    │   │   └── TooLittleMemory         too little of it is free to load now: a smaller plan may do
    │   └── NotEndedYet             the producer's wait is over and the job is not: wait again
    ├── Stopped                 the job was ended on purpose: a retry is the producer's choice
    │   ├── JobCancelled            somebody cancelled it
    │   ├── DeadlineExceeded        its deadline passed
    │   └── TimeLimitExceeded       it took longer in the engine than it may
    ├── SetAside                the job lies in the dead-letter queue: `shiftworker dead retry ID` runs it again
    │   ├── AttemptsExhausted       it failed as often as is allowed, in engines that lived on
    │   └── PoisonJob               its engine, or its worker, died whenever it was alone there
    ├── AnswerDropped           the job was answered, and the answer has made room for newer ones
    ├── InternalError           a fault of ours; the worker's log has the traceback
    └── Misconfigured           the operator must change something first
        ├── BadSetting              a setting has a value that is not allowed
        ├── BadCatalogue            models.toml does not say what it must
        ├── ModelMissing            the model's files are not where the catalogue says
        │   └── BadModelFile            a file of it is there, but broken
        ├── DoesNotFit              the model needs more memory than there is
        └── EngineMissing           the engine's program is not installed here

An error says what happened, where, and what to do. It travels through Celery's JSON as its class name
and its arguments: the message, and for the few that know it the time after which to try again.
"""

from __future__ import annotations

from typing import ClassVar


class ShiftworkerError(Exception):
    """The root of the tree; `retry_helps` says whether the same call may succeed later."""

    retry_helps: ClassVar[bool] = False

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message, *([] if retry_after_s is None else [retry_after_s]))
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message

    @property
    def kind(self) -> str:
        """The class name: what is stored in an outcome and matched by producers."""
        return type(self).__name__


class Refused(ShiftworkerError):
    """The job itself is at fault; sending it again unchanged ends the same way."""


class InvalidRequest(Refused):
    """The body is no chat-completions, completions or embeddings body."""


class KeyReused(Refused):
    """The job's idempotency key belongs to another job, with another body."""


class OverLimit(Refused):
    """The job is larger, or asks for more, than the operator's LIMIT_ settings allow."""


class AddressRefused(Refused):
    """A URL in the body does not lead to a public address, nor to one that the operator allows."""


class UnknownModel(Refused):
    """The job names a model that the catalogue does not have, or asks what no model can do."""


class PromptTooLong(Refused):
    """The prompt does not fit into the model's context length."""


class Unavailable(ShiftworkerError):
    """The job is fine; something it needs is away for now."""

    retry_helps = True


class RedisUnavailable(Unavailable):
    """Nobody answers at the Redis address."""


class RedisFull(Unavailable):
    """Redis takes no writes: its memory is at `maxmemory`."""


class QueueFull(Unavailable):
    """As much waits as the operator allows; `retry_after_s` says when to try again."""


class EngineNotReady(Unavailable):
    """The engine of the job's model is not ready; the job goes back to its queue."""


class EngineDied(Unavailable):
    """The engine's process ended while it worked on the job."""


class WorkerDied(Unavailable):
    """The worker was not heard of any more while it ran the job."""


class EngineFailed(Unavailable):
    """The engine lives, but answered with an error of its own (HTTP 5xx), or with something that is no answer."""


class EngineTimeout(Unavailable):
    """The engine did not answer within the time allowed."""


class LoadFailed(Unavailable):
    """The engine did not become ready: it ended, hung, or failed its canary prompt."""


class OutOfMemory(LoadFailed):
    """The engine ended for want of memory while it loaded."""


class LoadRefused(Unavailable):
    """The hardware says no for now: temperature, power, or free memory."""


class TooLittleMemory(LoadRefused):
    """Nothing speaks against the load but that too little memory is free."""


class NotEndedYet(Unavailable):
    """The time that a producer waits for an outcome is over; the job goes on."""


class Stopped(ShiftworkerError):
    """The job was ended on purpose."""


class JobCancelled(Stopped):
    """Somebody cancelled the job."""


class DeadlineExceeded(Stopped):
    """The job's deadline passed."""


class TimeLimitExceeded(Stopped):
    """The job took longer in the engine than its own time limit allows; it was stopped there."""


class SetAside(ShiftworkerError):
    """The job lies in the dead-letter queue until somebody retries or drops it."""


class AttemptsExhausted(SetAside):
    """The job failed as often as is allowed, in engines that lived on."""


class PoisonJob(SetAside):
    """The engine, or the whole worker, died under this job, and nobody else was there."""


class AnswerDropped(ShiftworkerError):
    """The job was answered; the answer was dropped when JOB_RESULT_MAX_BYTES was reached."""


class InternalError(ShiftworkerError):
    """Something that should not happen did; the message names it, the log has the traceback."""


class Misconfigured(ShiftworkerError):
    """The operator must change something before this can work."""


class BadSetting(Misconfigured):
    """An environment variable holds a value that is not allowed."""


class BadCatalogue(Misconfigured):
    """A catalogue file cannot be read as a catalogue."""


class ModelMissing(Misconfigured):
    """The model's files are not where the catalogue or VLLM_MODEL says."""


class BadModelFile(ModelMissing):
    """A file of the model is there, but it is cut off, broken, or claims what cannot be."""


class DoesNotFit(Misconfigured):
    """The model needs more memory than the machine has; the message shows the arithmetic."""


class EngineMissing(Misconfigured):
    """The program that runs this kind of model is not installed."""


def error_for(kind: str, message: str, retry_after_s: float | None = None) -> ShiftworkerError:
    """
    Build the error whose class is named *kind*; an unknown name gives the root class.

    The way back from a stored outcome to something a producer can catch.
    """
    return _BY_KIND.get(kind, ShiftworkerError)(message, retry_after_s)


def _descendants(cls: type[ShiftworkerError]) -> list[type[ShiftworkerError]]:
    return [cls, *(found for child in cls.__subclasses__() for found in _descendants(child))]


_BY_KIND = {cls.__name__: cls for cls in _descendants(ShiftworkerError)}
