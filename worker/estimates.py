"""
Finds a model wherever it is named, and answers what it takes: the work behind `shiftworker estimate`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import BadCatalogue, BadSetting, Misconfigured, ModelMissing
from common.settings import Settings
from worker.catalog.hf_config import packed_as, read_config
from worker.catalog.local import read_facts, spec_from_path
from worker.catalog.spec import EngineKind, ModelSpec
from worker.catalog.toml_file import load_catalogue
from worker.memory.case import Answer, Case, Files, judge_vllm, read_case
from worker.memory.gguf_predict import predict_gguf
from worker.memory.judge_llamacpp import judge_llamacpp
from worker.selection.fit_llamacpp import gguf_model


@dataclass(frozen=True, kw_only=True)
class Found:
    """A model, and where its facts are from."""

    spec: ModelSpec
    source: str


def find_model(name: str, settings: Settings) -> Found:
    """
    Find what *name* means, the first that there is:

    1. a catalogue id or alias, corrected by its files where they are here;
    2. a folder with config.json, a config.json, or a .gguf file;
    3. a repository on the hub: its config.json and the headers of its weights.

    Raises
    ------
    ModelMissing, BadCatalogue
        It is none of these, or its files are broken: says why, and what to do.
    """
    spec = load_catalogue(settings.models.file, base_dir=settings.models.dir).find(name)
    if spec is not None:
        read = read_facts(spec)
        return Found(spec=read, source="its files" if read != spec else "the catalogue")
    path = (settings.models.dir or Path()) / Path(name).expanduser()
    if path.is_file() and path.suffix == ".json":
        return Found(spec=_from_config(path), source=str(path))
    return Found(
        spec=spec_from_path(name, base_dir=settings.models.dir), source=str(path) if path.exists() else "the hub"
    )


def answer_named(options: dict[str, Any], settings: Settings) -> Answer:
    """
    Answer for the model and the flags of the command.

    Raises
    ------
    BadSetting
        A flag has a value that makes no sense.
    ModelMissing, BadCatalogue
        There is no such model: see `find_model`.
    """
    case, problem, _ = read_case(options)
    if case is None:
        raise BadSetting(f"shiftworker estimate: {problem}.")
    return answer_case(case, find_model(str(case.model), settings))


def answer_case(case: Case, found: Found | None) -> Answer:
    """Answer *case* by the model that was *found*, or by the config that the case brings."""
    engine = case.engine or (found.spec.engine if found else EngineKind.VLLM)
    if engine == EngineKind.LLAMACPP:
        return _answer_llamacpp(case, found)
    if found is None:
        return judge_vllm(case)
    if found.spec.architecture is None:
        return Answer(model=case.model, engine="vllm", reason="a GGUF file is llama.cpp's: use --engine llamacpp")
    in_files = packed_as(found.spec.architecture, found.spec.quantization)
    held = found.spec.loaded_bytes or (found.spec.weights_bytes if in_files.unknown_weights else None)
    files = Files(weights_bytes=held, source=found.source)
    return judge_vllm(case, architecture=packed_as(in_files, case.quantization), files=files)


def answer_lines(lines: Iterable[str], settings: Settings) -> Iterator[tuple[Answer, tuple[str, ...]]]:
    """
    Answer each line of a batch file, in order, with the keys of the line that mean nothing here.

    A line that cannot be judged gets an answer of nulls with the reason. The network is not asked.
    """
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _answer_line(line, number, settings)


def _answer_line(line: str, number: int, settings: Settings) -> tuple[Answer, tuple[str, ...]]:
    try:
        data: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Answer(model=None, engine="vllm", reason=f"line {number} is no JSON: {error}"), ()
    if not isinstance(data, dict):
        return Answer(model=None, engine="vllm", reason=f"line {number} is no object"), ()
    case, problem, unknown = read_case(data)
    if case is None:
        name = data.get("model")
        return Answer(model=name if isinstance(name, str) else None, engine="vllm", reason=problem), unknown
    found = None
    if case.config is None and case.model is not None:
        try:
            found = _find_here(case.model, settings)
        except Misconfigured as error:
            return Answer(model=case.model, engine=case.engine or "vllm", reason=error.message), unknown
    return answer_case(case, found), unknown


def _find_here(name: str, settings: Settings) -> Found | None:
    """A model of the catalogue or of this disk; None leaves it to the name."""
    known = load_catalogue(settings.models.file, base_dir=settings.models.dir).find(name)
    here = ((settings.models.dir or Path()) / Path(name).expanduser()).exists()
    return find_model(name, settings) if known is not None or here else None


def _from_config(path: Path) -> ModelSpec:
    """An entry for a config.json alone."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelMissing(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(config, dict):
        raise BadCatalogue(f"{path} is no config.json: it holds no object.")
    architecture = read_config(config, name=path.resolve().parent.name)
    return ModelSpec(
        id=path.resolve().parent.name or "model", engine=EngineKind.VLLM, tier=1, complexity_up_to=1.0,
        max_model_len=architecture.max_position_embeddings or 1, path=path, architecture=architecture,
    )  # fmt: skip


def _answer_llamacpp(case: Case, found: Found | None) -> Answer:
    if found is not None and found.spec.header is not None:
        return judge_llamacpp(case, gguf_model(found.spec), source="the file's header, tensor by tensor")
    config = case.config or {}
    architecture = found.spec.architecture if found else read_config(config, name=case.model)
    mix = case.quantization or (found.spec.quantization if found else None) or config.get("quant") or "Q4_K_M"
    size = found.spec.weights_bytes if found and found.spec.engine is EngineKind.LLAMACPP else _file_bytes(config)
    if architecture is None:
        return Answer(model=case.model, engine="llamacpp", reason="unknown: its config, or its file")
    model = predict_gguf(architecture, str(mix), weights_bytes=size)
    return judge_llamacpp(
        case, model, source=f"llama.cpp's recipe for {mix}{', and the size of the file' if size else ''}"
    )


def _file_bytes(config: dict[str, Any]) -> int | None:
    """The size of the tensors as llama.cpp logs it ("file size"), if the config brings it."""
    for key, unit in (("weights_bytes", 1), ("file_size_MiB", 2**20), ("file_size_GiB", 2**30)):
        value = config.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value * unit < 2**45:
            return int(value * unit)
    return None
