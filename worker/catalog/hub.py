"""
Which models of the hub can be had here: in the cache, or the hub answers?
"""

from __future__ import annotations

import httpx
import huggingface_hub
from huggingface_hub import constants

from common.errors import ModelMissing
from worker.catalog.catalogue import Catalogue
from worker.catalog.download import fetch_gguf, fetch_repository
from worker.catalog.spec import EngineKind, ModelSpec

_ANSWER_S = 3.0  # a hub that takes longer to say anything is no place to fetch gigabytes from


def out_of_reach(catalogue: Catalogue) -> dict[str, str]:
    """
    Say of each model that is neither in the cache nor to be fetched why it is not, by id.

    The hub is asked once, and only if some model is not in the cache.
    """
    absent = [spec for spec in catalogue if spec.path is None and spec.repo is not None and not in_cache(spec)]
    why = _why_unreachable() if absent else None
    return {} if why is None else {spec.id: f"its files are not in the cache, and {why}" for spec in absent}


def in_cache(spec: ModelSpec) -> bool:
    """Is the file that every load of *spec* begins with in the hub's cache?"""
    if spec.repo is None:
        return False
    file = spec.file or "config.json"
    return isinstance(huggingface_hub.try_to_load_from_cache(spec.repo, file, revision=spec.revision), str)


def check_reach(repo: str) -> None:
    """
    See that *repo*'s config.json is in the cache, or that the hub answers: its client alone would try for 23 s.

    Raises
    ------
    ModelMissing
        Neither; says why, and what to do.
    """
    cached = isinstance(huggingface_hub.try_to_load_from_cache(repo, "config.json"), str)
    if not cached and (why := _why_unreachable()) is not None:
        raise ModelMissing(
            f"{repo} is not in the cache, and {why}. Check the network (or HF_ENDPOINT), or fetch it elsewhere and "
            "name its folder."
        )


def fetch_files(spec: ModelSpec) -> None:
    """
    Bring the files of *spec* into the hub's cache, however long it takes; nothing to do for local files.

    Raises
    ------
    ModelMissing
        They cannot be fetched: says why, and what to do.
    """
    if spec.path is not None or spec.repo is None:
        return
    if spec.engine is EngineKind.LLAMACPP:
        fetch_gguf(spec)
    elif spec.engine is EngineKind.VLLM:
        fetch_repository(spec.repo, revision=spec.revision)


def _why_unreachable() -> str | None:
    if huggingface_hub.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        httpx.head(constants.ENDPOINT, timeout=_ANSWER_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return f"the hub at {constants.ENDPOINT} does not answer ({type(error).__name__})"
    return None
