"""
How fast a model answers on this worker: what was measured, and what it says of jobs that wait.
"""

from __future__ import annotations

from dataclasses import dataclass

from worker.state.backlog import Lane


@dataclass(frozen=True, kw_only=True)
class Pace:
    """The rates of one model's engine; either those of tokens or the time of a whole job is enough."""

    prefill_tokens_per_s: float | None = None  # of the engine: prompts are read one after the other
    decode_tokens_per_s: float | None = None  # of one sequence
    job_s: float | None = None  # seconds for a job among others: the engine's time divided by its answers
    at_once: int = 1  # jobs that run side by side
    output_tokens: float | None = None  # of a usual answer
    output_share: float = 1.0  # of the longest answer that its job allows

    def work_s(self, lane: Lane) -> float | None:
        """
        Seconds that the engine needs for the jobs of *lane* if its places stay taken; None = nobody knows.

        Prompts are read one after the other; the places share what the jobs take in all. The slower of the two holds.
        """
        alone = self.alone_s(lane)
        if alone is None:
            return None if self.job_s is None else self.job_s * lane.count
        reading, whole = alone
        return max(reading, whole / min(self.at_once, lane.count))

    def one_s(self, lane: Lane) -> float | None:
        """Seconds from start to end of a usual job of *lane*; None = nobody knows."""
        alone = self.alone_s(lane)
        if alone is None:
            return None if self.job_s is None else self.job_s * self.at_once
        return alone[1] / lane.count

    def answers_tokens(self, lane: Lane) -> float | None:
        """Tokens that the answers to *lane* will have in all, going by those of late; None = nobody knows."""
        if lane.output_tokens is not None:
            return lane.output_tokens * self.output_share
        return None if self.output_tokens is None else self.output_tokens * lane.count

    def alone_s(self, lane: Lane) -> tuple[float, float] | None:
        """Seconds to read all prompts of *lane*, and of all its jobs one after the other; None = nobody knows."""
        prefill, decode = self.prefill_tokens_per_s, self.decode_tokens_per_s
        output = self.answers_tokens(lane)
        if not prefill or not decode or not lane.count or lane.prompt_tokens is None or output is None:
            return None
        reading = lane.prompt_tokens / prefill
        return reading, reading + output / decode
