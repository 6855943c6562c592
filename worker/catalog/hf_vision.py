"""
How many numbers are in the vision and audio towers of a Hugging Face config, and in the projectors behind them?
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from worker.catalog.hf_facts import Facts

_GATED = {"silu", "swiglu"}
_ALWAYS_GATED = {"pixtral", "gemma4_vision"}
_ONE_MATRIX = {"gemma3", "gemma4", "paligemma"}  # their projector


def count_towers(config: Mapping[str, Any], facts: Facts, *, usual: bool) -> int:
    """
    Count the numbers in towers and projectors; 0 if there are none. What cannot be counted is noted in `facts.assumed`.

    *usual*: where the config has no tower, take the one that all models of the family have.
    """
    if (extra := facts.number("extra_params")) is not None:
        return extra
    return _count_vision(config, facts, usual=usual) + _count_audio(config, facts)


def _count_vision(config: Mapping[str, Any], facts: Facts, *, usual: bool) -> int:
    tower = config.get("vision_config")
    least = facts.number("vision_from") or 0
    if tower is None and usual and (facts.number("hidden_size") or least) >= least:
        tower = facts.raw("vision_config")
    if not isinstance(tower, Mapping):
        if tower is not None:
            facts.refuse("vision_config is no table")
        return 0
    see = Facts(tower)
    width = see.number("embed_dim") or see.number("hidden_size") or see.number("width") or see.number("d_model")
    depth = see.number("depth") or see.number("num_hidden_layers") or see.number("layers")
    if width is None or depth is None or see.unknown:
        facts.assumed.append("a vision tower whose size the config does not say is not counted")
        return 0
    kind = str(tower.get("model_type"))
    own = see.number("hidden_size") if see.has("embed_dim") else None  # Qwen2-VL: that is the text's
    out = see.number("out_hidden_size") or own or facts.number("hidden_size") or width
    inner = see.number("intermediate_size") or width * (see.number("mlp_ratio") or 4)
    if kind.startswith("glm4v"):
        return _count_glm(see, width, depth, inner, out)
    gated = kind in _ALWAYS_GATED or (tower.get("hidden_act") in _GATED and kind != "qwen2_vl")
    # Fewer keys and values than queries: EXAONE 4.5.
    kv_width = width * (see.number("num_key_value_heads") or 1) // (see.number("num_heads") or 1)
    if not see.has("num_key_value_heads") or not see.has("num_heads"):
        kv_width = width
    layer = 2 * width * (width + kv_width) + (3 if gated else 2) * width * inner
    depth += see.number("num_global_layers") or 0  # Llama 3.2
    deepest = tower.get("deepstack_visual_indexes")
    mergers = 1 + (len(deepest) if isinstance(deepest, list) else 0)
    return depth * layer + _stem(see, width) + mergers * _projector(config, kind, see, width, out)


def _stem(see: Facts, width: int) -> int:
    """Patches and positions."""
    side = see.number("patch_size") or 14
    positions = see.number("num_position_embeddings") or 2 * (see.number("position_embedding_size") or 0)
    if not positions and (image := see.number("image_size")) is not None and see.raw("model_type") != "pixtral":
        positions = (image // side) ** 2
    return (side * side * 3 * (see.number("temporal_patch_size") or 1) + positions) * width


def _projector(config: Mapping[str, Any], kind: str, see: Facts, width: int, out: int) -> int:
    whole = Facts(config)
    ratio = whole.share("downsample_ratio")
    merge = see.number("spatial_merge_size") or whole.number("spatial_merge_size") or round(1 / ratio)
    wide = (see.number("vision_output_dim") or width) * merge**2
    if kind == "mllama_vision_model" or str(config.get("model_type")) in _ONE_MATRIX:
        return wide * out
    if kind == "pixtral" and merge > 1:  # Mistral 3 merges patches, then projects
        return wide * width + width * out + out * out
    first = wide if see.has("spatial_merge_size") and merge > 1 else out
    return wide * first + first * out


def _count_glm(see: Facts, width: int, depth: int, inner: int, out: int) -> int:
    """GLM-4.1V: the MLPs of the tower are as wide as the text, `intermediate_size` is the merger's."""
    layer = 4 * width * width + 3 * width * out
    merge = (see.number("spatial_merge_size") or 2) ** 2
    return depth * layer + _stem(see, width) + merge * width * out + out * out + 3 * out * inner


def _count_audio(config: Mapping[str, Any], facts: Facts) -> int:
    tower = config.get("audio_config")
    if not isinstance(tower, Mapping):
        return 0
    hear = Facts(tower)
    width, depth = hear.number("hidden_size"), hear.number("num_hidden_layers")
    if tower.get("model_type") != "gemma4_audio" or width is None or depth is None:
        facts.assumed.append("an audio tower is not counted")
        return 0
    # A conformer: two MLPs four times as wide, attention with relative keys, and gated convolutions.
    out = hear.number("output_proj_dims") or width
    return depth * (16 + 5 + 3) * width**2 + width**2 + out * (width + (facts.number("hidden_size") or out))
