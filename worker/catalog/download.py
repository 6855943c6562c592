"""
Fetches model files from the Hugging Face hub, each once: the hub's own cache keeps them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tqdm import tqdm

from common.errors import ModelMissing
from worker.catalog.spec import EngineKind, ModelSpec

OnProgress = Callable[[int, int | None], None]  # bytes so far, bytes in all if the hub says

# Weights only as safetensors: many repositories hold the same ones in two or three other forms.
_FOR_VLLM = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.py", "*.tiktoken", "*.txt"]

_SHARD = re.compile(r"-00001-of-(\d{5})(?=\.gguf$)")


def resolve_files(spec: ModelSpec, *, on_progress: OnProgress | None = None) -> Path | str:
    """
    Give what the engine is told to load: a local path, or for vLLM a repository, which it fetches itself.

    Raises
    ------
    ModelMissing
        The files are not there and cannot be fetched: says why, and what to do.
    """
    if spec.path is not None:
        if not spec.path.exists():
            raise ModelMissing(
                f"{spec.id}: there is nothing at {spec.path}. Put the model there, or correct its path in the "
                "catalogue (relative paths start at MODELS_DIR, else at the catalogue's folder)."
            )
        return spec.path
    if spec.engine is EngineKind.LLAMACPP:
        return fetch_gguf(spec, on_progress=on_progress)
    if spec.repo is None:
        raise ModelMissing(f"{spec.id} has neither repo nor path. Give its catalogue entry one of the two.")
    return spec.repo


def fetch_gguf(spec: ModelSpec, *, on_progress: OnProgress | None = None) -> Path:
    """
    Give the local path of the GGUF file, fetched if it is not in the cache; of several shards, the first.

    Raises
    ------
    ModelMissing
        It is not in the cache and cannot be fetched: says why, and what to do.
    """
    if spec.repo is None or spec.file is None:
        raise ModelMissing(f"{spec.id} names no GGUF file on the hub. Give its catalogue entry repo and file.")
    first, *_ = [
        fetch_file(spec.repo, name, revision=spec.revision, on_progress=on_progress) for name in shard_names(spec.file)
    ]
    return first


def shard_names(file: str) -> tuple[str, ...]:
    """Name every shard of a split GGUF file, given the first; a whole file is its only shard."""
    found = _SHARD.search(file)
    if found is None:
        return (file,)
    count = int(found[1])
    return tuple(_SHARD.sub(f"-{number:05}-of-{count:05}", file) for number in range(1, count + 1))


def fetch_file(repo: str, file: str, *, revision: str | None = None, on_progress: OnProgress | None = None) -> Path:
    """
    Give the local path of one file of a hub repository; the network is asked only if the cache lacks it.

    HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE count, as everywhere with this hub.

    Raises
    ------
    ModelMissing
        It is not in the cache and cannot be fetched: says why, and what to do.
    """
    try:
        return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as error:
        raise ModelMissing(f"{repo} is no name of a repository: {error} Correct repo in the catalogue.") from None
    try:
        bar = _reporting_bar(on_progress) if on_progress else None
        return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision, tqdm_class=bar))
    except (HfHubHTTPError, EntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ModelMissing(f"{repo}/{file} cannot be fetched: {_why(error)}") from error


def fetch_repository(repo: str, *, revision: str | None = None) -> Path:
    """
    Give the local folder of what vLLM needs of a hub repository, fetched if the cache lacks any of it.

    Raises
    ------
    ModelMissing
        It cannot be fetched: says why, and what to do.
    """
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=_FOR_VLLM))
    except (HfHubHTTPError, EntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ModelMissing(f"{repo} cannot be fetched: {_why(error)}") from error


def weights_bytes(repo: str, *, revision: str | None = None) -> int | None:
    """Ask the hub for the bytes of all safetensors files of *repo*; None if it does not say or is not there."""
    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return None
    files = {file.rfilename: file.size for file in info.siblings or () if file.rfilename.endswith(".safetensors")}
    # Mistral's repositories hold every weight twice: sharded, and in one consolidated file.
    sizes = [size for name, size in files.items() if not name.startswith("consolidated")]
    return sum(size or 0 for size in sizes) if sizes and all(sizes) else None


def _why(error: Exception) -> str:
    match error:
        case GatedRepoError():
            return "its owner asks for consent first. Accept the terms on its page and set HF_TOKEN."
        case RevisionNotFoundError():
            return "there is no such revision. Correct revision in the catalogue."
        case RepositoryNotFoundError():
            return "there is no such repository, or it is private. Check the name; if it is private, set HF_TOKEN."
        case OfflineModeIsEnabled():
            return _OFFLINE
        case LocalEntryNotFoundError():
            if huggingface_hub.is_offline_mode():
                return _OFFLINE
            return (
                "the hub cannot be reached and the file is not in the cache. Check the network (or HF_ENDPOINT), "
                "or fetch it elsewhere and name it with path in the catalogue."
            )
        case EntryNotFoundError():
            return "the repository has no such file. Correct file in the catalogue."
        case _:
            return f"{error}. Check the network and the free space in HF_HOME, then try again."


_OFFLINE = (
    "HF_HUB_OFFLINE is set and the file is not in the cache. Unset it, or fetch the file before, "
    "or name a local one with path in the catalogue."
)


def _reporting_bar(on_progress: OnProgress) -> Any:
    """Make the class of progress bar that the hub's client asks for; it reports and prints nothing."""

    class ReportingBar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "file": io.StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> None:
            super().update(n)
            on_progress(int(self.n), None if self.total is None else int(self.total))

    return ReportingBar
