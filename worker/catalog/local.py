"""
What do a model's own files say? Reads the facts of an estimate from config.json or a GGUF header.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub

from common.errors import BadCatalogue, ModelMissing
from worker.catalog.architecture import Architecture
from worker.catalog.catalogue import Catalogue
from worker.catalog.download import fetch_file, weights_bytes
from worker.catalog.gguf_header import read_gguf_file
from worker.catalog.hf_config import read_config
from worker.catalog.hub import check_reach
from worker.catalog.safetensors_header import read_safetensors_folder, read_safetensors_repository
from worker.catalog.spec import EngineKind, ModelSpec
from worker.catalog.tensors import GgufHeader, Tensor

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LAYER = re.compile(r"^(?:model\.)?(?:language_model\.)?layers\.(\d+)\.")
_CAPABILITIES = frozenset({"chat", "completion", "json", "tools"})


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the files say; None where they do not."""

    max_model_len: int | None = None
    quantization: str | None = None
    weights_bytes: int | None = None
    loaded_bytes: int | None = None
    architecture: Architecture | None = None
    header: GgufHeader | None = None


def spec_from_path(name: str, *, base_dir: Path | None = None) -> ModelSpec:
    """
    Make an entry for a model that no catalogue knows: a folder, a .gguf file, or a hub repository "org/name".

    It is trusted with every job, because whoever names a model in VLLM_MODEL wants it to answer.

    Raises
    ------
    ModelMissing
        There is no such folder or file, or the hub does not give its config.json: says why and what to do.
    BadCatalogue
        Its files do not say how long its context may be.
    """
    path = (base_dir or Path()) / Path(name).expanduser()
    if path.exists():
        engine = EngineKind.LLAMACPP if path.suffix == ".gguf" else EngineKind.VLLM
        return _spec(path.stem if path.is_file() else path.resolve().name, engine, _local_facts(path), path=path)
    if not _HUB_ID.fullmatch(name):
        raise ModelMissing(
            f"Model {name}: no catalogue entry, no folder or file {path.absolute()}, and no hub repository "
            "either (those are org/name). Run `shiftworker models` for what is known."
        )
    check_reach(name)
    facts = _weighed(_config_facts(_json(fetch_file(name, "config.json")), name), name)
    return _spec(name.rpartition("/")[2], EngineKind.VLLM, facts, repo=name)


def read_facts(spec: ModelSpec) -> ModelSpec:
    """
    Correct an entry by its own files, at its path or in the hub's cache; of a file that is there, only the header is
    read. The entry's own max_model_len, quantization and bytes stay where the files do not say them.

    Raises
    ------
    ModelMissing
        There is nothing at its path, or the files there are broken.
    """
    if spec.path is None:
        return _from_cache(spec)
    if not spec.path.exists():
        raise ModelMissing(f"there is nothing at {spec.path}. Put the model there, or correct its path.")
    return _corrected(spec, _local_facts(spec.path))


def _from_cache(spec: ModelSpec) -> ModelSpec:
    """What the cache has of it; an entry whose files are not there, or only in part, stays as it is."""
    if spec.repo is None:
        return spec
    found = huggingface_hub.try_to_load_from_cache(spec.repo, spec.file or "config.json", revision=spec.revision)
    if not isinstance(found, str):
        return spec
    path = Path(found)
    try:
        return _corrected(spec, _local_facts(path if spec.file else path.parent))
    except ModelMissing:
        return spec


def _corrected(spec: ModelSpec, facts: Facts) -> ModelSpec:
    """Files know best how large they are; how the model is used is the entry's to say."""
    stays = {key for key in ("max_model_len", "quantization") if getattr(spec, key) is not None}
    return dataclasses.replace(spec, **{key: value for key, value in _known(facts).items() if key not in stays})


def read_all_facts(catalogue: Catalogue) -> tuple[Catalogue, dict[str, str]]:
    """Fill in every local model; those whose files are not there keep their entry and get a reason, by id."""
    models: list[ModelSpec] = []
    missing: dict[str, str] = {}
    for spec in catalogue:
        try:
            models.append(read_facts(spec))
        except ModelMissing as error:
            models.append(spec)
            missing[spec.id] = error.message
    return Catalogue(models=tuple(models)), missing


def _spec(
    name: str, engine: EngineKind, facts: Facts, *, path: Path | None = None, repo: str | None = None
) -> ModelSpec:
    if facts.max_model_len is None:
        raise BadCatalogue(
            f"The files of {path or repo} do not say how many tokens the model was made for. "
            "Write an entry for it with max_model_len into a catalogue of your own and name that in MODELS_FILE."
        )
    return ModelSpec(
        id=re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "model",
        engine=engine,
        tier=1,
        complexity_up_to=1.0,
        capabilities=_CAPABILITIES,
        path=path,
        repo=repo,
        **_known(facts),
    )


def _known(facts: Facts) -> dict[str, Any]:
    """The facts that are there, by field; not `asdict`, which would take the architecture apart."""
    return {
        field.name: value for field in dataclasses.fields(facts) if (value := getattr(facts, field.name)) is not None
    }


def _local_facts(path: Path) -> Facts:
    if path.suffix == ".gguf":
        return _gguf_facts(path)
    config = path / "config.json"
    if not config.is_file():
        raise ModelMissing(
            f"{path} is no model: it has no config.json. Name the folder that holds config.json, or a .gguf file."
        )
    facts = _config_facts(_json(config), path.resolve().name)
    if any(path.glob("*.safetensors")):
        facts = _with_tensors(facts, read_safetensors_folder(path))
    return facts


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelMissing(f"{file} cannot be read as JSON: {error}. Fetch the model again.") from None
    return content if isinstance(content, dict) else {}


def _config_facts(config: dict[str, Any], name: str) -> Facts:
    """Read a Hugging Face config.json."""
    architecture = read_config(config, name=name)
    quantization = config.get("quantization_config")
    return Facts(
        max_model_len=architecture.max_position_embeddings,
        quantization=quantization.get("quant_method") if isinstance(quantization, dict) else None,
        architecture=architecture,
    )


def _weighed(facts: Facts, repo: str) -> Facts:
    """Add what the headers in a hub repository say; the files' sizes, if it serves no ranges."""
    try:
        return _with_tensors(facts, read_safetensors_repository(repo))
    except ModelMissing:
        return dataclasses.replace(facts, weights_bytes=weights_bytes(repo))


def _with_tensors(facts: Facts, tensors: Iterable[Tensor]) -> Facts:
    """
    Add up what an engine loads of *tensors*.

    It leaves an output head that is tied to the embeddings, and layers of a draft; and it casts 32-bit floats to
    16 bit, but for the scales of packed weights.
    """
    tensors, architecture = tuple(tensors), facts.architecture
    assert architecture is not None  # noqa: S101 - a folder without config.json is no model
    tied = not any(matrix.name == "lm_head" for matrix in architecture.outside)
    loaded = 0
    for tensor in tensors:
        layer = _LAYER.search(tensor.name)
        draft = tensor.name.startswith("mtp.") or (layer is not None and int(layer[1]) >= architecture.layers > 0)
        if not draft and not (tied and tensor.name == "lm_head.weight"):
            wide = tensor.dtype in {"F32", "F64"} and architecture.quantization is None
            loaded += math.prod(tensor.shape) * architecture.dtype_bytes if wide else tensor.nbytes
    return dataclasses.replace(facts, weights_bytes=sum(tensor.nbytes for tensor in tensors), loaded_bytes=loaded)


def _gguf_facts(file: Path) -> Facts:
    """Read the header of a GGUF file."""
    header = read_gguf_file(file)
    length = header.metadata.get(f"{header.metadata.get('general.architecture')}.context_length")
    return Facts(
        max_model_len=length if isinstance(length, int) and length > 0 else None,
        weights_bytes=sum(tensor.nbytes for tensor in header.tensors),
        header=header,
    )
