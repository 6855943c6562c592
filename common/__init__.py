"""
What a producer needs: `JobClient`, the request and the outcome, and the errors by name.

Imports no model code: no vLLM, no CUDA, no engine.
"""

from common.client import JobClient
from common.errors import (
    AttemptsExhausted,
    DeadlineExceeded,
    InvalidRequest,
    JobCancelled,
    KeyReused,
    NotEndedYet,
    PoisonJob,
    PromptTooLong,
    QueueFull,
    RedisUnavailable,
    Refused,
    SetAside,
    ShiftworkerError,
    Stopped,
    TimeLimitExceeded,
    Unavailable,
    UnknownModel,
)
from common.schemas import Estimate, HardwareStatus, JobRequest, JobState, JobView, Ledger, Outcome, StreamEvent

__all__ = [
    "AttemptsExhausted",
    "DeadlineExceeded",
    "Estimate",
    "HardwareStatus",
    "InvalidRequest",
    "JobCancelled",
    "JobClient",
    "JobRequest",
    "JobState",
    "JobView",
    "KeyReused",
    "Ledger",
    "NotEndedYet",
    "Outcome",
    "PoisonJob",
    "PromptTooLong",
    "QueueFull",
    "RedisUnavailable",
    "Refused",
    "SetAside",
    "ShiftworkerError",
    "Stopped",
    "StreamEvent",
    "TimeLimitExceeded",
    "Unavailable",
    "UnknownModel",
]
