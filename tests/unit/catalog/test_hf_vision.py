"""
Towers and projectors, against the models that transformers builds from the same configs.
"""

from __future__ import annotations

from typing import Any

import pytest

from worker.catalog.hf_config import read_config

TEXT = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 32,
    "intermediate_size": 11008, "vocab_size": 32000,
}  # fmt: skip


def around(model_type: str, tower: Any, *, hidden_size: int = 4096, **changes: Any) -> dict[str, Any]:
    text = {**TEXT, "hidden_size": hidden_size}
    return {"model_type": model_type, "text_config": text, "vision_config": tower, **changes}


CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip
PIXTRAL = {
    "model_type": "pixtral", "hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096,
    "image_size": 1540, "patch_size": 14, "hidden_act": "gelu",
}  # fmt: skip
QWEN_2 = {
    "depth": 32, "embed_dim": 1280, "hidden_size": 1536, "mlp_ratio": 4, "patch_size": 14, "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}  # fmt: skip
QWEN_3 = {
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 3584, "patch_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}  # fmt: skip
GLM = {
    "model_type": "glm4v_vision", "depth": 24, "hidden_size": 1536, "intermediate_size": 13696,
    "out_hidden_size": 4096, "hidden_act": "silu", "patch_size": 14, "image_size": 336, "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}  # fmt: skip
INTERN = {
    "model_type": "internvl_vision", "hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096,
    "image_size": [448, 448], "patch_size": [14, 14],
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "params"),
    [
        (around("llava", CLIP), 324_487_168),
        (around("mistral3", PIXTRAL, hidden_size=5120, spatial_merge_size=2), 438_958_080),
        (around("qwen2_vl", QWEN_2, hidden_size=1536), 665_271_296),
        (around("qwen3_vl", QWEN_3), 566_949_104),
        (around("glm4v", GLM), 892_498_432),
        (around("internvl", INTERN, downsample_ratio=0.5), 337_509_376),
    ],
    ids=["LLaVA", "Mistral 3", "Qwen2-VL", "Qwen3-VL", "GLM-4.1V", "InternVL"],
)
def test_a_tower_counts_as_it_is_built(config: dict[str, Any], params: int) -> None:
    """
    To 0.2 %: patches, positions, layers, mergers; norms and biases are left out.
    """
    assert read_config(config).vision == pytest.approx(params, rel=2e-3)


def test_a_tower_without_sizes_is_said_not_to_be_counted() -> None:
    """
    The model is larger than the estimate, and the answer says so.
    """
    read = read_config(around("llava", {"model_type": "clip_vision_model"}))

    assert (read.vision, read.multimodal) == (0, True)
    assert "a vision tower whose size the config does not say is not counted" in read.assumed


def test_ears_are_counted_or_said_not_to_be() -> None:
    """
    Gemma 4's conformer is known: 0.3 billion numbers; others are not.
    """
    ears = {"model_type": "gemma4_audio", "hidden_size": 1024, "num_hidden_layers": 12, "output_proj_dims": 1536}
    known = read_config(around("gemma4", None, audio_config=ears))
    other = read_config(around("gemma4", None, audio_config={"model_type": "whisper"}))

    assert known.vision == pytest.approx(0.31e9, rel=0.02)
    assert (other.vision, other.assumed[-1]) == (0, "an audio tower is not counted")


@pytest.mark.parametrize(
    ("name", "hidden_size", "counted"),
    [("Qwen3.5-27B", 5120, True), ("Qwen3.5-4B", 2560, False), ("Qwen3-8B", 4096, False), ("gemma-4-31B", 5376, True)],
)
def test_a_poor_config_has_its_familys_usual_tower(name: str, hidden_size: int, *, counted: bool) -> None:
    """
    Where all models of this size in the family have the same one.
    """
    poor = {key: value for key, value in TEXT.items() if key != "model_type"}
    read = read_config({**poor, "hidden_size": hidden_size}, name=name)

    assert (read.vision > 400_000_000) == counted
