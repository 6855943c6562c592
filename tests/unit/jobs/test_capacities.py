"""
What is known of an engine's capacity grows with loads and answers.
"""

from __future__ import annotations

import pytest

from tests.factories import make_placement, make_spec
from worker.catalog.spec import EngineKind
from worker.engines.base import Completion
from worker.engines.stub import StubEngine
from worker.jobs.capacities import Capacities
from worker.memory.measured import Measured


def completion(prompt: int | None, answer: int | None) -> Completion:
    return Completion(response={}, run_s=1.0, prompt_tokens=prompt, completion_tokens=answer)


def test_nothing_is_made_up_before_it_was_measured() -> None:
    """Places are known from the placement; the pool from a load; the length from answers that say it."""
    placement = make_placement(spec=make_spec(engine=EngineKind.STUB), max_num_seqs=12)
    capacities = Capacities({"small": placement}, {EngineKind.STUB: StubEngine()}, threads=5)
    found = capacities.of("small")
    assert (found.max_num_seqs, found.kv_tokens, found.tokens_per_job, found.threads) == (12, None, None, 5)

    capacities.loaded(placement, Measured(kv_tokens=4096))
    capacities.answered("small", completion(None, None))
    assert (capacities.of("small").tokens_per_job, capacities.of("small").job_s) == (None, 1.0)
    capacities.answered("small", completion(100, 20))
    found = capacities.of("small")
    assert (found.kv_tokens, found.tokens_per_job) == (4096, 120.0)


def test_the_length_follows_the_last_jobs() -> None:
    """One long job moves it a little, many move it all the way."""
    placement = make_placement(spec=make_spec(engine=EngineKind.STUB))
    capacities = Capacities({"small": placement}, {EngineKind.STUB: StubEngine()}, threads=5)
    for _ in range(10):
        capacities.answered("small", completion(80, 20))
    capacities.answered("small", completion(1000, 100))
    assert capacities.of("small").tokens_per_job == pytest.approx(150)
    for _ in range(200):
        capacities.answered("small", completion(1000, 100))
    assert capacities.of("small").tokens_per_job == pytest.approx(1100, rel=0.01)


def test_an_engine_with_a_channel_needs_no_threads() -> None:
    """As far as this very model has one."""

    class WithChannel(StubEngine):
        def channel(self, model_id: str) -> object | None:
            return self if model_id == "small" else None

    placements = {
        name: make_placement(name, spec=make_spec(name, engine=EngineKind.STUB)) for name in ("small", "large")
    }
    capacities = Capacities(placements, {EngineKind.STUB: WithChannel()}, threads=5)
    assert capacities.of("small").threads is None
    assert capacities.of("large").threads == 5
