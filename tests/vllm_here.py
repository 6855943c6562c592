"""
Where the tests' vLLM is: .venv-vllm, made by `make setup`; a missing one skips at home and fails in CI.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def vllm_python() -> Path:
    """The Python that has vLLM."""
    python = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"
    if not python.exists():
        reason = f"no {python}: run `make setup`"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return python
