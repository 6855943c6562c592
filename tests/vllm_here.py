"""
Where the tests' vLLM is: .venv-vllm, made by `make setup`; a missing one skips at home and fails in CI.

For a card it is the one that VLLM_PYTHON names; without it, or without a card, what needs it is skipped.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.settings import Settings
from worker.catalog.spec import ModelSpec
from worker.engines.vllm_server import find_python
from worker.hardware.nvml import NvmlReader
from worker.selection.overrides import Overrides
from worker.selection.place import place_model
from worker.selection.placement import Placement


def vllm_python() -> Path:
    """The Python that has vLLM."""
    python = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"
    if not python.exists():
        reason = f"no {python}: run `make setup`"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return python


def cuda_python() -> Path:
    """The Python that has vLLM's CUDA build."""
    if not os.environ.get("VLLM_PYTHON"):
        pytest.skip("set VLLM_PYTHON to the Python that has vLLM's CUDA build")
    return find_python(Settings.from_env().vllm)


def on_card(spec: ModelSpec, *, max_model_len: int, residents: int = 2, asleep: int = 2) -> Placement:
    """A place for the model on one card, beside others."""
    overrides = Overrides(max_model_len=max_model_len, tensor_parallel_size=1, residents=residents, asleep=asleep)
    placement = place_model(spec, NvmlReader().read(), overrides, asked=True)
    assert isinstance(placement, Placement), placement
    return placement
