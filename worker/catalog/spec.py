"""
What a model is: the facts of models.toml, checked, as values.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from worker.catalog.architecture import Architecture
from worker.catalog.tensors import GgufHeader


class EngineKind(StrEnum):
    """Which program runs the model."""

    VLLM = "vllm"
    LLAMACPP = "llamacpp"
    STUB = "stub"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """
    One model of the catalogue.

    `repo` names a Hugging Face repository, `path` a local file or folder; one of the two is set (a stub
    has neither). `file` names the GGUF file inside the repository.
    """

    id: str  # also the queue's name: letters, digits, '.', '_' and '-'
    engine: EngineKind
    tier: int  # 1 is the smallest; orders the cascade
    complexity_up_to: float  # the hardest job that this model is trusted with, 0 to 1
    max_model_len: int  # tokens, prompt and answer together: the longest the model was made for
    aliases: tuple[str, ...] = ()
    repo: str | None = None
    path: Path | None = None
    file: str | None = None
    revision: str | None = None
    quantization: str | None = None  # None = as the files say
    capabilities: frozenset[str] = frozenset({"chat"})  # chat, tools, vision, thinking, json, embedding
    tool_parser: str | None = None  # vLLM's name for how the model writes tool calls; None = it cannot read them
    reasoning_parser: str | None = None  # vLLM's name for how it marks its thoughts; None = they stay in the answer
    substitute: bool = True  # may a larger model that is ready take its jobs that name no model?
    trust_remote_code: bool = False
    licence: str | None = None

    # What memory depends on; None = read it from the files, or unknown.
    weights_bytes: int | None = None  # of the files, all shards
    loaded_bytes: int | None = None  # of the tensors that an engine loads, from the files' headers
    architecture: Architecture | None = None  # from config.json, or the entry's [models.config]
    header: GgufHeader | None = None  # of a GGUF file that is here

    @property
    def source(self) -> str:
        """Where the files come from, for people."""
        if self.path is not None:
            return str(self.path)
        return f"{self.repo}/{self.file}" if self.file else (self.repo or "nowhere")
