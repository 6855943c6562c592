"""
What earlier loads measured decides the next placement; what is not known of them changes nothing.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from tests.factories import GIB, make_machine, make_spec
from worker.catalog.spec import EngineKind, ModelSpec
from worker.hardware.gpu import Machine
from worker.memory.measured import Measured, Measurement
from worker.selection.lessons import Lessons
from worker.selection.overrides import Overrides
from worker.selection.place import place_model
from worker.selection.placement import Placement
from worker.selection.places import Refusal

ENGINE = "vllm 0.32.0"
CARD = make_machine(24)
SPEC = make_spec("wide", engine=EngineKind.VLLM, loaded_bytes=10 * GIB)


def placed(spec: ModelSpec = SPEC, machine: Machine = CARD, lessons: Lessons | None = None) -> Placement:
    answer = place_model(spec, machine, Overrides(), lessons or Lessons())
    assert isinstance(answer, Placement), answer
    return answer


def taught(placement: Placement, measured: Measured, *, engine: str = ENGINE, device: str = "Card 24 GiB") -> Lessons:
    key = placement.load_key(engine=engine, device=device)
    measurement = Measurement(key=key, predicted=placement.memory, measured=measured, at=datetime.now(UTC))
    return Lessons(measurements={key: measurement}, engines={EngineKind.VLLM: ENGINE})


def test_measured_weights_take_the_place_of_the_computed_ones() -> None:
    """
    A gibibyte more than was computed: the pool has one less, and the whole still fits.
    """
    before = placed()
    after = placed(lessons=taught(before, Measured(weights=before.memory.weights + GIB)))

    assert after.memory.weights == before.memory.weights + GIB
    assert after.kv_cache_bytes == before.kv_cache_bytes - GIB
    assert after.memory.total == before.memory.total


def test_what_was_measured_too_large_is_refused_the_next_time() -> None:
    """
    Weights that leave no room for a request: the refusal shows the measured sum.
    """
    before = placed()
    lessons = taught(before, Measured(weights=19 * GIB))
    answer = place_model(SPEC, make_machine(16), Overrides(), taught_on(lessons, "Card 16 GiB"))

    assert isinstance(answer, Refusal)
    assert "19.0 GiB weights" in answer.reason


def taught_on(lessons: Lessons, device: str) -> Lessons:
    """The same measurements, of another card."""
    found = {replace(key, device=device): m for key, m in lessons.measurements.items()}
    moved = {key: replace(measurement, key=key) for key, measurement in found.items()}
    return replace(lessons, measurements=moved)


@pytest.mark.parametrize(("engine", "device"), [("vllm 0.31.0", "Card 24 GiB"), (ENGINE, "Another card")])
def test_another_engine_or_card_teaches_nothing(engine: str, device: str) -> None:
    """
    Versions and cards differ in what they take.
    """
    before = placed()
    lessons = taught(before, Measured(weights=before.memory.weights + GIB), engine=engine, device=device)

    assert placed(lessons=lessons) == before


def test_what_nobody_measured_stays_computed() -> None:
    """
    A measurement of the pool alone says nothing of the weights.
    """
    before = placed()

    assert placed(lessons=taught(before, Measured(kv_tokens=1000))).memory.weights == before.memory.weights
