"""
A catalogue of models that run on the stand-in engine, and how a worker is set to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from worker.demo.tiny_models import make_tiny_gguf

_ENTRY = """
[[models]]
id = "{id}"
engine = "llamacpp"
tier = {tier}
complexity_up_to = {up_to}
max_model_len = 4096
path = "tiny.gguf"
"""


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
    entries = (_ENTRY.format(id=model, tier=tier, up_to=up_to) for model, (tier, up_to) in trusted.items())
    make_tiny_gguf(folder / "tiny.gguf", hidden=64, layers=2, seed=1)
    (folder / "models.toml").write_text("replace = true\n" + "".join(entries))
    return {
        "MODELS_FILE": str(folder / "models.toml"),
        "WORKER_STUB_ENGINE": "true",
        "WORKER_STUB_LOAD_S": str(load_s),
        "WORKER_STUB_RUN_S": str(run_s),
        **{name: str(value) for name, value in settings.items()},
    }
