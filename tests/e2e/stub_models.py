"""
A catalogue of models that run on the stand-in engine, and how a worker is set to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.catalogues import write_catalogue
from worker.demo.tiny_models import make_tiny_gguf


def stub_env(
    folder: Path,
    models: Sequence[str] | Mapping[str, tuple[int, float]],
    *,
    load_s: float,
    run_s: float,
    **settings: float,
) -> dict[str, str]:
    """
    Write the catalogue to *folder*; give the environment of a worker that serves it, with these *settings* besides.

    *models* are names, or names with a tier and the complexity up to which each is trusted. One is ready at a time.
    """
    trusted = models if isinstance(models, Mapping) else dict.fromkeys(models, (1, 1.0))
    tiny = {"engine": "llamacpp", "max_model_len": 4096, "path": "tiny.gguf"}
    entries = [
        {"id": model, "tier": tier, "complexity_up_to": up_to, **tiny} for model, (tier, up_to) in trusted.items()
    ]
    make_tiny_gguf(folder / "tiny.gguf", hidden=64, layers=2, seed=1)
    return {
        **write_catalogue(folder, *entries),
        "WORKER_STUB_ENGINE": "true",
        "WORKER_STUB_LOAD_S": str(load_s),
        "WORKER_STUB_RUN_S": str(run_s),
        **{name: str(value) for name, value in settings.items()},
    }
