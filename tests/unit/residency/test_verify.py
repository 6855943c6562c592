"""
What tells a model that woke up right from one that did not.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.factories import make_placement, make_spec
from worker.catalog.spec import EngineKind
from worker.engines.stub import StubEngine
from worker.residency.verify import Said, differs, verify


def said(text: str = "OK.", tokens: tuple[int, ...] = (1, 2), prompt: Any = (7, 8)) -> Said:
    return Said(prompt=prompt, choices=[{"message": {"content": text}, "token_ids": list(tokens)}])


def vector(*values: float) -> Said:
    return Said(prompt="Say OK.", choices=None, vector=values)


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        (said(), said(), True),
        (said(), said("!!!!"), False),
        (said(), said(tokens=(1, 3)), False),  # another token that is written alike
        (said(), said("!!!!", prompt=(7, 9)), True),  # its template has the date in it, and midnight has passed
        (said(prompt=None), said(prompt=None), True),  # an engine that does not tell
        (said(prompt=None), said("!!!!", prompt=None), False),
        (vector(1, 0), vector(1, 0.001), True),
        (vector(1, 0), vector(0.9, 0.3), False),
        (vector(1, 0), vector(1, 0, 0), False),
        (vector(1, 0), vector(0, 0), False),
        (vector(1, 0), vector(float("nan"), 0), False),
    ],
)
def test_another_answer_to_the_same_prompt_is_told(before: Said, after: Said, same: bool) -> None:  # noqa: FBT001
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
    assert first.choices or first.vector
    assert first == again
