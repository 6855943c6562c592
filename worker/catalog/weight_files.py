"""
Which files on this machine hold a model's weights? The network is never asked.
"""

from __future__ import annotations

from pathlib import Path

import huggingface_hub

from worker.catalog.download import shard_names
from worker.catalog.spec import ModelSpec

_WHOLE_AGAIN = "consolidated"  # Mistral's folders hold every weight twice: sharded, and in one such file


def weight_files(spec: ModelSpec) -> tuple[Path, ...]:
    """Name them in the order in which a load reads them; () if the model is not here yet, or is a stand-in's."""
    start = spec.path or _cached(spec)
    if start is None or not start.exists():
        return ()
    if start.suffix == ".gguf":
        return tuple(shard for name in shard_names(start.name) if (shard := start.with_name(name)).exists())
    folder = start if start.is_dir() else start.parent
    found = sorted(folder.glob("*.safetensors"))
    return tuple(file for file in found if not file.name.startswith(_WHOLE_AGAIN)) or tuple(found)


def _cached(spec: ModelSpec) -> Path | None:
    if spec.repo is None:
        return None
    found = huggingface_hub.try_to_load_from_cache(spec.repo, spec.file or "config.json", revision=spec.revision)
    return Path(found) if isinstance(found, str) else None
