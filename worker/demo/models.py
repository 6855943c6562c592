"""
The demo's two models: small real ones from the hub where it answers, otherwise two tiny ones made here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from worker.catalog.catalogue import Catalogue
from worker.catalog.download import fetch_gguf
from worker.catalog.hub import in_cache, out_of_reach
from worker.catalog.spec import EngineKind, ModelSpec
from worker.catalog.toml_file import load_catalogue
from worker.demo.tiny_models import make_tiny_gguf

_REAL = ("qwen2.5-0.5b", "qwen2.5-1.5b")  # catalogue ids, the smaller one first
_TRUSTED = (0.45, 1.0)  # of the two, the hardest job each is trusted with: about half of the examples to each
_TINY_CONTEXT = 4096  # tokens; a tiny model's token is one character


@dataclass(frozen=True, kw_only=True)
class DemoModels:
    """Two models, and what a person should know of them."""

    specs: tuple[ModelSpec, ModelSpec]
    note: str
    real: bool


def prepare_models(folder: Path, fetching: Callable[[ModelSpec, int, int | None], None]) -> DemoModels:
    """
    Get the two models ready; *fetching* hears of every piece that comes from the hub (bytes so far, in all).

    Raises
    ------
    ModelMissing
        The hub answers but does not give a file.
    """
    small, large = (_trusted(_shipped(name), up_to) for name, up_to in zip(_REAL, _TRUSTED, strict=True))
    unreachable = out_of_reach(Catalogue(models=(small, large)))
    if not unreachable:
        for spec in (small, large):
            if not in_cache(spec):
                fetch_gguf(spec, on_progress=lambda done, total, spec=spec: fetching(spec, done, total))  # type: ignore[misc]
        sizes = " and ".join(f"{s.source} ({(s.weights_bytes or 0) / 1e6:.0f} MB)" for s in (small, large))
        return DemoModels(specs=(small, large), note=f"Real models from the hub: {sizes}.", real=True)
    name, reason = next(iter(unreachable.items()))
    return DemoModels(
        specs=_tiny(folder),
        note=(
            f"Real models cannot be had here ({name}: {reason}). These are two tiny ones of random weights, made "
            "on the spot: they load, switch and answer as real ones do, and their text means nothing."
        ),
        real=False,
    )


def write_catalogue(models: DemoModels, file: Path) -> None:
    """Write the two models as the only ones of a catalogue."""
    entries = "".join(_entry(spec) for spec in models.specs)
    file.write_text(f"replace = true\n{entries}", encoding="utf-8")


def _shipped(name: str) -> ModelSpec:
    spec = load_catalogue().find(name)
    assert spec is not None, name  # noqa: S101 - a test reads the same catalogue
    return spec


def _trusted(spec: ModelSpec, up_to: float) -> ModelSpec:
    return replace(spec, complexity_up_to=up_to)


def _tiny(folder: Path) -> tuple[ModelSpec, ModelSpec]:
    def spec(name: str, tier: int, up_to: float, hidden: int, layers: int) -> ModelSpec:
        path = folder / f"{name}.gguf"
        if not path.exists():
            unfinished = path.with_suffix(".part")
            make_tiny_gguf(unfinished, hidden=hidden, layers=layers, seed=tier, context=_TINY_CONTEXT)
            unfinished.rename(path)  # a demo that was interrupted leaves no half a model
        return ModelSpec(
            id=name, engine=EngineKind.LLAMACPP, tier=tier, complexity_up_to=up_to, max_model_len=_TINY_CONTEXT,
            path=path.absolute(), capabilities=frozenset({"chat", "completion", "json", "tools"}),
        )  # fmt: skip

    return spec("tiny-small", 1, _TRUSTED[0], 64, 2), spec("tiny-large", 2, _TRUSTED[1], 256, 8)


def _entry(spec: ModelSpec) -> str:
    """One table of a catalogue file; JSON's strings, numbers and lists are TOML's too."""
    fields = {
        "id": spec.id,
        "engine": spec.engine,
        "tier": spec.tier,
        "complexity_up_to": spec.complexity_up_to,
        "max_model_len": spec.max_model_len,
        "capabilities": sorted(spec.capabilities),
        **({"path": str(spec.path)} if spec.path else {"repo": spec.repo, "file": spec.file}),
        "weights_bytes": spec.weights_bytes,
    }
    known = (f"{key} = {json.dumps(value)}\n" for key, value in fields.items() if value is not None)
    return f"\n[[models]]\n{''.join(known)}"
