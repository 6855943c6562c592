"""
What do a model's own files say? Reads the facts of an estimate from config.json or a GGUF header.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import BadCatalogue, ModelMissing
from worker.catalog.catalogue import Catalogue
from worker.catalog.download import fetch_file, shard_names, weights_bytes
from worker.catalog.spec import EngineKind, ModelSpec

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CAPABILITIES = frozenset({"chat", "completion", "json", "tools"})


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the files say; None where they do not."""

    max_model_len: int | None = None
    quantization: str | None = None
    weights_bytes: int | None = None
    layers: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    vocab_size: int | None = None


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
            f"VLLM_MODEL={name}: no catalogue entry, no folder or file {path.absolute()}, and no hub repository "
            "either (those are org/name). Run `shiftworker models` for what is known."
        )
    config = _config_facts(_json(fetch_file(name, "config.json")))
    facts = dataclasses.replace(config, weights_bytes=weights_bytes(name))
    return _spec(name.rpartition("/")[2], EngineKind.VLLM, facts, repo=name)


def read_facts(spec: ModelSpec) -> ModelSpec:
    """
    Fill in what the catalogue leaves out of a local model, from its files; what it says stays.

    Raises
    ------
    ModelMissing
        There is nothing at its path.
    """
    if spec.path is None:
        return spec
    if not spec.path.exists():
        raise ModelMissing(f"there is nothing at {spec.path}. Put the model there, or correct its path.")
    found = dataclasses.asdict(_local_facts(spec.path))
    return dataclasses.replace(spec, **{key: value for key, value in found.items() if getattr(spec, key) is None})


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
    known = {key: value for key, value in dataclasses.asdict(facts).items() if value is not None}
    return ModelSpec(
        id=re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "model",
        engine=engine,
        tier=1,
        complexity_up_to=1.0,
        capabilities=_CAPABILITIES,
        path=path,
        repo=repo,
        **known,
    )


def _local_facts(path: Path) -> Facts:
    if path.suffix == ".gguf":
        return _gguf_facts(path)
    config = path / "config.json"
    if not config.is_file():
        raise ModelMissing(
            f"{path} is no model: it has no config.json. Name the folder that holds config.json, or a .gguf file."
        )
    return dataclasses.replace(_config_facts(_json(config)), weights_bytes=_safetensors_bytes(path))


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelMissing(f"{file} cannot be read as JSON: {error}. Fetch the model again.") from None
    return content if isinstance(content, dict) else {}


def _config_facts(config: dict[str, Any]) -> Facts:
    """Read a Hugging Face config.json; models with vision keep the language model's part in text_config."""
    text: dict[str, Any] = config.get("text_config") or config
    quantization = (config.get("quantization_config") or text.get("quantization_config") or {}).get("quant_method")
    heads = text.get("num_attention_heads")
    hidden = text.get("hidden_size")
    # MLA (DeepSeek) keeps one compressed vector for each token: heads x head size would be far too much.
    mla = "kv_lora_rank" in text
    return Facts(
        max_model_len=text.get("max_position_embeddings") or text.get("n_positions"),
        quantization=quantization,
        layers=text.get("num_hidden_layers"),
        kv_heads=None if mla else text.get("num_key_value_heads") or heads,
        head_dim=None if mla else text.get("head_dim") or (hidden // heads if hidden and heads else None),
        vocab_size=text.get("vocab_size"),
    )


def _safetensors_bytes(folder: Path) -> int | None:
    """Add up the weight files that the index names, or without one all of them; None if there are none."""
    index = folder / "model.safetensors.index.json"
    names = set(_json(index).get("weight_map", {}).values()) if index.is_file() else ()
    shards = [folder / name for name in names] or list(folder.glob("*.safetensors"))
    return sum(shard.stat().st_size for shard in shards if shard.is_file()) or None


def _gguf_facts(file: Path) -> Facts:
    """Read the header of a GGUF file; without the package gguf only the size is known."""
    shards = [file.with_name(name) for name in shard_names(file.name)]
    size = sum(shard.stat().st_size for shard in shards if shard.is_file())
    try:
        from gguf import GGUFReader  # noqa: PLC0415 - it comes with the extra [llamacpp]
    except ImportError:
        return Facts(weights_bytes=size)
    try:
        fields = GGUFReader(file).fields
    except (OSError, ValueError, IndexError) as error:
        raise ModelMissing(f"{file} cannot be read as GGUF: {error}. Fetch the file again.") from None

    def value(key: str) -> Any:
        field = fields.get(key)
        content = None if field is None else field.contents()
        # Hybrid models say it for each layer; the largest is on the safe side.
        return max(content) if isinstance(content, list) and content else content

    arch = value("general.architecture")
    heads, hidden = value(f"{arch}.attention.head_count"), value(f"{arch}.embedding_length")
    tokens = fields.get("tokenizer.ggml.tokens")
    return Facts(
        max_model_len=value(f"{arch}.context_length"),
        weights_bytes=size,
        layers=value(f"{arch}.block_count"),
        kv_heads=value(f"{arch}.attention.head_count_kv") or heads,
        head_dim=value(f"{arch}.attention.key_length") or (hidden // heads if hidden and heads else None),
        vocab_size=value(f"{arch}.vocab_size") or (len(tokens.data) if tokens is not None else None),
    )
