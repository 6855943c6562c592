"""
How many jobs should this worker hold at once? What its ready engines can work on, and a few more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Jobs that stand behind what an engine works on, so that it never waits for the next one: as many as end while others
# are fetched; at least and at most so many times what it works on.
_REFILL_S = 1.0
_LEAST_BEHIND, _MOST_BEHIND = 0.25, 3.0


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What one ready engine can hold; None = nobody said."""

    model_id: str
    max_num_seqs: int  # requests it works on at once
    kv_tokens: int | None = None  # that its KV pool holds
    tokens_per_job: float | None = None  # prompt and answer together, of its jobs lately
    job_s: float | None = None  # from the request to the answer, of its jobs lately
    threads: int | None = None  # that there are for its jobs; None = it needs none

    @property
    def at_once(self) -> int:
        """Jobs that it works on side by side."""
        return self.max_num_seqs if self.threads is None else min(self.max_num_seqs, self.threads)


@dataclass(frozen=True, kw_only=True)
class Admission:
    """How many jobs to hold, and why."""

    jobs: int
    reason: str


def admit_jobs(engines: Sequence[Capacity], *, otherwise: int) -> Admission:
    """
    Decide how many jobs to take from the queues of the models that are ready.

    An engine works on as many as it has places for, and as have room in its KV pool, going by how long jobs were
    lately; where no job was measured yet, its places count. A quarter more stand behind them; where jobs are shorter
    than a few seconds, as many as end in one second. What waits beyond that waits in its queue, where it can be
    counted, ordered, cancelled and given to another worker.

    *otherwise* is the answer where nothing is ready.
    """
    if not engines:
        return Admission(jobs=otherwise, reason="no model is ready")
    each = [_room(engine) for engine in engines]
    return Admission(jobs=sum(room.jobs for room in each), reason="; ".join(room.reason for room in each))


def _room(engine: Capacity) -> Admission:
    """How many jobs one engine is given."""
    at_once, limit = engine.max_num_seqs, "its places"
    if engine.kv_tokens is not None and engine.tokens_per_job:
        fitting = max(1, int(engine.kv_tokens / engine.tokens_per_job))
        if fitting < at_once:
            at_once, limit = fitting, f"{engine.kv_tokens:,} tokens of KV at {engine.tokens_per_job:.0f} a job"
    jobs = at_once + math.ceil(_behind(engine.job_s) * at_once)
    if engine.threads is not None and engine.threads < jobs:
        jobs, limit = engine.threads, "a thread for each"
    return Admission(jobs=jobs, reason=f"{engine.model_id}: {jobs} ({limit})")


def _behind(job_s: float | None) -> float:
    """The share of what an engine works on that stands behind it."""
    if job_s is None:
        return _LEAST_BEHIND
    return max(_LEAST_BEHIND, _REFILL_S / max(job_s, _REFILL_S / _MOST_BEHIND))
