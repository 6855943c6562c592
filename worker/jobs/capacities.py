"""
Keeps what is known of the engines' capacity: as they were placed, as they measured it, and how long jobs turned out.
"""

from __future__ import annotations

from collections.abc import Mapping

from worker.catalog.spec import EngineKind
from worker.engines.base import Completion, Engine, HasChannels
from worker.memory.measured import Measured
from worker.scheduling.admit import Capacity
from worker.selection.placement import Placement

_NEWEST = 0.05  # the weight of the newest job in the mean length: about the last twenty count


class Capacities:
    """What each model's engine can hold; told by loads and answers, from any thread."""

    def __init__(
        self, placements: Mapping[str, Placement], engines: Mapping[EngineKind, Engine], *, threads: int
    ) -> None:
        self._placements = placements
        self._engines = engines
        self._threads = threads
        self._kv_tokens: dict[str, int | None] = {}
        self._tokens: dict[str, float] = {}
        self._seconds: dict[str, float] = {}

    def loaded(self, placement: Placement, measured: Measured) -> None:
        """Note what a load has measured."""
        self._kv_tokens[placement.model_id] = measured.kv_tokens

    def answered(self, model_id: str, completion: Completion) -> None:
        """Note how long a job was; one without a usage says nothing of its tokens."""
        _note(self._seconds, model_id, completion.run_s)
        if completion.prompt_tokens is not None:
            _note(self._tokens, model_id, completion.prompt_tokens + (completion.completion_tokens or 0))

    def of(self, model_id: str) -> Capacity:
        """What the model's engine can hold now."""
        placement = self._placements[model_id]
        engine = self._engines[placement.spec.engine]
        has_channel = isinstance(engine, HasChannels) and engine.channel(model_id) is not None
        return Capacity(
            model_id=model_id,
            max_num_seqs=placement.max_num_seqs,
            kv_tokens=self._kv_tokens.get(model_id),
            tokens_per_job=self._tokens.get(model_id),
            job_s=self._seconds.get(model_id),
            threads=None if has_channel else self._threads,
        )


def _note(means: dict[str, float], model_id: str, value: float) -> None:
    mean = means.get(model_id, value)
    means[model_id] = mean + _NEWEST * (value - mean)
