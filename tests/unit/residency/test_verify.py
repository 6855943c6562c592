"""
What tells a model that woke up right from one that did not.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.schemas import BodyKind
from tests.factories import make_placement, make_spec
from worker.catalog.spec import EngineKind
from worker.engines.base import Call, Completion, StopSignal
from worker.engines.stub import StubEngine
from worker.residency.verify import Said, differs, verify


def said(*tokens: int) -> Said:
    return Said(prompt=(7, 8), answer=list(tokens))


def text(content: str) -> Said:
    """Of an engine that does not tell its tokens."""
    return Said(prompt=None, answer=[{"message": {"content": content}}])


def vector(*values: float) -> Said:
    return Said(prompt=None, vector=values)


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        (said(1, 2), said(1, 2), True),
        (said(1, 2), said(1, 3), False),
        (said(1, 2), said(1), False),
        (text("OK."), text("OK."), True),
        (text("OK."), text("!!!!"), False),
        (said(1, 2), text("OK."), False),
        (vector(1, 0), vector(1, 0.001), True),
        (vector(1, 0), vector(0.9, 0.3), False),
        (vector(1, 0), vector(1, 0, 0), False),
        (vector(1, 0), vector(0, 0), False),
        (vector(1, 0), vector(float("nan"), 0), False),
    ],
)
def test_another_answer_is_told(before: Said, after: Said, same: bool) -> None:  # noqa: FBT001
    """Rows: tokens must be the same ones, vectors must point the same way."""
    assert (differs(before, after) is None) == same


@pytest.mark.parametrize("capability", ["chat", "embedding"])
def test_a_real_answer_is_compared_with_itself(capability: str) -> None:
    """Twice asked, the same said; nothing that changes from call to call (an id, a time) is kept."""
    engine = StubEngine()
    spec = make_spec("m", engine=EngineKind.STUB, capabilities=frozenset({capability}))
    placement = make_placement("m", spec=spec)
    engine.ensure_ready(placement, timeout_s=1)

    first, again = (verify(engine, placement, timeout_s=1) for _ in range(2))
    assert first.answer or first.vector
    assert first == again


class Dated(StubEngine):
    """An engine that tells its tokens, and whose chat template puts the day into the prompt."""

    day = 1
    weights = 100

    def generate(self, model_id: str, call: Call, stop: StopSignal) -> Completion:
        """The answer follows from the prompt and the weights."""
        done = super().generate(model_id, call, stop)
        chat = call.path == BodyKind.CHAT
        prompt = [7, self.day] if chat else call.body["prompt"]
        choice = {"token_ids": [self.weights + token for token in prompt]}
        return replace(done, response={"choices": [choice], **({"prompt_token_ids": prompt} if chat else {})})


@pytest.mark.parametrize("day", [1, 2])
def test_a_wake_on_another_day_is_compared_as_well(day: int) -> None:
    """The tokens of the load's day are asked again: the same weights answer the same, others do not."""
    engine = Dated()
    placement = make_placement("m", spec=make_spec("m", engine=EngineKind.STUB))
    engine.ensure_ready(placement, timeout_s=1)
    before = verify(engine, placement, timeout_s=1)

    engine.day = day
    assert differs(before, verify(engine, placement, timeout_s=1, before=before)) is None
    engine.weights = 200
    assert differs(before, verify(engine, placement, timeout_s=1, before=before)) == "[207, 201] instead of [107, 101]"
