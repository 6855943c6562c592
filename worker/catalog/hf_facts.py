"""
Takes facts out of a config.json by their many names, and keeps note of what was missing, assumed or nonsense.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# One meaning, many spellings: Hugging Face's usual name first, then those of older classes and of GGUF.
_SPELLINGS: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim", "model_dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_key_value_heads": (
        "num_key_value_heads", "n_head_kv", "n_kv_heads", "num_kv_heads", "num_query_groups", "multi_query_group_num",
    ),
    "head_dim": ("head_dim", "n_embd_head_k", "attention_head_dim", "kv_channels"),
    "intermediate_size": (
        "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "block_ff_dim", "d_ff", "n_ff",
    ),
    "vocab_size": ("vocab_size", "n_vocab", "padded_vocab_size"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx_train"),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "n_expert"),
    "num_experts_per_tok": ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k"),
    "moe_intermediate_size": ("moe_intermediate_size", "expert_ffn_hidden_size"),
    "sliding_window": ("sliding_window", "sliding_window_size", "n_swa"),
    "shared_expert_intermediate_size": (
        "shared_expert_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size",
    ),
    "num_shared_experts": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    "dense_layers": ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"),
    "experts_every": ("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval"),
    "qkv_bias": ("qkv_bias", "add_qkv_bias"),
    "mamba_num_heads": ("mamba_num_heads", "mamba_n_heads"),
    "mamba_head_dim": ("mamba_head_dim", "mamba_d_head"),
    "mamba_groups": ("n_groups", "mamba_n_groups"),
    "state_size": ("ssm_state_size", "mamba_d_state", "state_size"),
    "conv_kernel": ("conv_kernel", "mamba_d_conv"),
    "expand": ("mamba_expand", "expand"),
    "dt_rank": ("mamba_dt_rank", "time_step_rank"),
}  # fmt: skip

_LARGEST = {
    "num_hidden_layers": 2000, "vocab_size": 2**24, "max_position_embeddings": 2**31, "num_experts": 2**14,
    "sliding_window": 2**31, "total_params": 2**46, "extra_params": 2**40,
}  # fmt: skip
_LARGEST_SIZE = 2**20


class Facts:
    """A config.json with one question: `number`. What is not there is noted in `missing`, nonsense in `wrong`."""

    def __init__(
        self, config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, *, whole: bool = True
    ) -> None:
        self.whole = whole  # a real config.json: what it leaves out has the value that its class gives it
        self._config = config
        self._defaults = dict(defaults or {})
        self.missing: list[str] = []
        self.wrong: list[str] = []
        self.assumed: list[str] = []

    def number(self, name: str) -> int | None:
        """A positive whole number of a sane size; None if the config has none, 0 or nonsense."""
        for spelling in _SPELLINGS.get(name, (name,)):
            value = self._config.get(spelling)
            if value is None or value is False or value == 0:
                continue
            if isinstance(value, list) and value and all(item == value[0] for item in value):
                value = value[0]
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if not isinstance(value, int) or isinstance(value, bool):
                self.refuse(f"{spelling}={_short(value)} is no whole number")
            elif not 0 < value <= _LARGEST.get(name, _LARGEST_SIZE):
                self.refuse(f"{spelling}={_short(value)} makes no sense")
            else:
                return value
        default = self._defaults.get(name)
        return default if isinstance(default, int) else None

    def needed(self, name: str) -> int:
        """Like `number`; what is missing is noted as unknown, and 0."""
        found = self.number(name)
        if found is None:
            self.miss(name)
        return found or 0

    def flag(self, name: str, *, default: bool = False) -> bool:
        """A yes or no."""
        value = next((v for key in _SPELLINGS.get(name, (name,)) if (v := self._config.get(key)) is not None), None)
        return bool(self._defaults.get(name, default) if value is None else value)

    def raw(self, name: str) -> Any:
        """Whatever is there, or the family's default."""
        value = self._config.get(name)
        return self._defaults.get(name) if value is None else value

    def family(self, name: str) -> Any:
        """What all models of the family have, whatever this config says."""
        return self._defaults.get(name)

    def items(self, name: str) -> list[Any] | None:
        """A list that is not empty."""
        value = self.raw(name)
        return value if isinstance(value, list) and value else None

    def table(self, name: str) -> Mapping[str, Any]:
        """A table; empty if the config has none."""
        value = self.raw(name)
        if value is not None and not isinstance(value, Mapping):
            self.refuse(f"{name}={_short(value)} is no table")
        return value if isinstance(value, Mapping) else {}

    def share(self, name: str, default: float = 1.0) -> float:
        """A number between 0 and 1."""
        value = self.raw(name)
        usable = isinstance(value, int | float) and 0 < value <= 1
        return float(value) if usable else default

    def has(self, name: str) -> bool:
        """Does the config itself say anything about it?"""
        return any(self._config.get(spelling) is not None for spelling in _SPELLINGS.get(name, (name,)))

    def miss(self, what: str) -> None:
        """Say what is not there."""
        if what not in self.missing:
            self.missing.append(what)

    def refuse(self, what: str) -> None:
        """Say what is there and cannot be used."""
        if what not in self.wrong:
            self.wrong.append(what)

    @property
    def unknown(self) -> tuple[str, ...]:
        """Everything that keeps the model from being counted."""
        return (*self.wrong, *self.missing)


def _short(value: object) -> str:
    """Show *value* in a few characters, also a number of thousands of digits."""
    try:
        return f"{value!r:.40}"
    except ValueError:
        return "a number of thousands of digits"


# --- Families: what their config classes in transformers fill in ---------------------------------------------

_GATED_DELTA_NET: dict[str, Any] = {
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "attn_output_gate": True,
    "qk_norm": "head",
    "partial_rotary_factor": 0.25,
}
# The tower of all larger models of Qwen3-VL and Qwen3.5.
_QWEN_TOWER: dict[str, Any] = {
    "hidden_size": 1152, "depth": 27, "intermediate_size": 4304, "patch_size": 16, "temporal_patch_size": 2,
    "spatial_merge_size": 2, "num_position_embeddings": 2304,
}  # fmt: skip
_QWEN_3_5: dict[str, Any] = {
    **_GATED_DELTA_NET, "mamba_ssm_dtype": "float32", "max_position_embeddings": 262144, "vision_config": _QWEN_TOWER,
}  # fmt: skip
_QWEN_3_VL: dict[str, Any] = {
    "qk_norm": "head", "vision_config": {**_QWEN_TOWER, "deepstack_visual_indexes": [8, 16, 24]},
}  # fmt: skip
# Narrower models have a smaller tower; how small, a poor config does not say.
_WIDE_TOWER: dict[str, Any] = {"vision_from": 4096}
_QWEN_2: dict[str, Any] = {"qkv_bias": True, "use_sliding_window": False}
_TIED: dict[str, Any] = {"tie_word_embeddings": True}
_PLAIN_MLP: dict[str, Any] = {"mlp_mats": 2, "mlp_ratio": 4}
_GPT: dict[str, Any] = {**_PLAIN_MLP, "all_bias": True}
_ENCODER: dict[str, Any] = {**_GPT, "encoder": True}
# Google trains these for 4 bits in groups of 32 (Q4_0), and repacked checkpoints keep the groups.
_GEMMA_QAT: dict[str, Any] = {
    **_TIED, "qat_groups": True, "norms_per_layer": 4, "qk_norm": "head", "sliding_window_pattern": 6,
    "local_rope": True,
}  # fmt: skip
_SPARSE_MLA: dict[str, Any] = {"dense_layers": 3, "index_n_heads": 64, "index_head_dim": 128, "q_lora_rank": 1536}

# Counted against the models that transformers 5 builds from these families' own configs: the number of parameters is
# that of the model to 0.1 %, but for biases of norms.
FAMILIES: dict[str, dict[str, Any]] = {
    # as Llama
    "llama": {}, "mistral": {}, "mistral3": {}, "ministral": {}, "ministral3": {}, "mixtral": {}, "pixtral": {},
    "llava": {}, "internlm2": {}, "internlm3": {}, "baichuan": {}, "yi": {}, "exaone": {}, "aquila": {}, "olmo": {},
    "stablelm": {}, "phi3": {}, "glm": {}, "ernie4_5": {}, "deepseek_v2": {}, "deepseek_v3": {}, "kimi_k2": {},
    "axk1": {}, "minicpm3": {}, "hyperclovax": {}, "cwm": {}, "solar_open": {}, "aria": {},
    "smollm3": {**_TIED}, "granite": {**_TIED}, "granitemoe": {**_TIED}, "granitemoeshared": {**_TIED},
    "chatglm": {"partial_rotary_factor": 0.5}, "ernie4_5_moe": {}, "glm4": {"norms_per_layer": 4},
    "seed_oss": {"qkv_bias": True}, "phimoe": {"all_bias": True}, "apertus": {"mlp_mats": 2, "qk_norm": "head"},
    "exaone4": {"qk_norm": "head"}, "exaone_moe": {"qk_norm": "head"},
    "olmo2": {"qk_norm": "full"}, "olmo3": {"qk_norm": "full", "sliding_window_pattern": 4},
    "olmoe": {"qk_norm": "full"}, "minimax_m2": {"qk_norm": "full"}, "dots1": {"qk_norm": "head"},
    "hunyuan_v1_dense": {"qk_norm": "head"}, "hunyuan_v1_moe": {"qk_norm": "head"}, "dots_ocr": {"qkv_bias": True},
    "afmoe": {"attn_output_gate": True, "qk_norm": "head", "norms_per_layer": 4},
    "laguna": {"head_gate": True, "qk_norm": "head"},
    "glm4_moe": {"dense_layers": 1, "head_dim": 128}, "glm4v_moe": {"dense_layers": 1, "head_dim": 128},
    "glm4_moe_lite": {"dense_layers": 1},
    "glm4v": {"qkv_bias": True, "norms_per_layer": 4}, "mllama": {"extra_embeddings": 8},
    "llama4": {
        "full_attention_every": 4, "chunked_attention": True, "num_experts_per_tok": 1, "shared_like_expert": True,
    },
    "gpt_oss": {"all_bias": True, "sliding_window_pattern": 2, "head_dim": 64, "sinks": True},
    "deepseek_v32": {**_SPARSE_MLA},
    "glm_moe_dsa": {
        **_SPARSE_MLA, "index_n_heads": 32, "q_lora_rank": 2048, "qk_nope_head_dim": 192, "v_head_dim": 256,
        "num_shared_experts": 1,
    },
    # Qwen
    "qwen2": {**_QWEN_2}, "qwen2_moe": {**_QWEN_2},
    "qwen2_vl": {
        **_QWEN_2, "vision_config": {"embed_dim": 1280, "depth": 32, "spatial_merge_size": 2, "temporal_patch_size": 2},
    },
    "qwen2_5_vl": {
        **_QWEN_2, "vision_config": {
            "hidden_size": 1280, "depth": 32, "intermediate_size": 3420, "hidden_act": "silu", "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    },
    "qwen3": {"qk_norm": "head", "use_sliding_window": False},
    "qwen3_moe": {"qk_norm": "head", "use_sliding_window": False}, "qwen3_vl": {**_QWEN_3_VL, **_WIDE_TOWER},
    "qwen3_vl_moe": _QWEN_3_VL,
    "qwen3_next": {**_GATED_DELTA_NET}, "qwen3_5": {**_QWEN_3_5, **_WIDE_TOWER}, "qwen3_5_moe": _QWEN_3_5,
    # Gemma, Cohere
    "gemma": {**_TIED, "head_dim": 256}, "gemma2": {**_TIED, "norms_per_layer": 4, "sliding_window_pattern": 2},
    "gemma3": {**_GEMMA_QAT, "sliding_window": 1024, "vocab_size": 262208},
    "gemma4": {
        **_GEMMA_QAT, "global_head_dim": 512, "num_global_key_value_heads": 2, "attention_k_eq_v": True,
        "dense_beside_experts": True, "partial_rotary_factor": 0.25, "vision_from": 2816,
        "vision_config": {
            "model_type": "gemma4_vision", "hidden_size": 1152, "depth": 27, "intermediate_size": 4304,
            "patch_size": 16, "position_embedding_size": 10240,
        },
    },
    "cohere": {**_TIED, "norms_per_layer": 1}, "cohere2": {**_TIED, "norms_per_layer": 1, "sliding_window_pattern": 4},
    # as GPT
    "phi": {**_GPT, "lm_head_bias": True}, "gpt2": {**_TIED, **_GPT, "learned_positions": True},
    "gptj": {**_PLAIN_MLP, "mlp_bias": True, "lm_head_bias": True}, "gpt_neox": {**_GPT}, "bloom": {**_TIED, **_GPT},
    "gpt_bigcode": {**_TIED, **_GPT, "learned_positions": True, "multi_query": True},
    "opt": {**_TIED, **_GPT, "learned_positions": True}, "falcon": {**_TIED, **_PLAIN_MLP},
    "starcoder2": {**_TIED, **_GPT}, "nemotron": {"mlp_mats": 2}, "arcee": {"mlp_mats": 2},
    # recurrent
    "lfm2": {**_TIED, "qk_norm": "head", "recurrent": "conv", "block_auto_adjust_ff_dim": True},
    "lfm2_moe": {**_TIED, "qk_norm": "head", "recurrent": "conv"},
    "nemotron_h": {"mlp_mats": 2, "recurrent": "mamba2", "one_part": True, "norms_per_layer": 1},
    "bamba": {"recurrent": "mamba2"}, "granitemoehybrid": {**_TIED, "recurrent": "mamba2"},
    "jamba": {"recurrent": "mamba", "inner_norms": True},
    "mamba2": {"only": "mamba2", "one_part": True, "norms_per_layer": 1},
    "mamba": {**_TIED, "only": "mamba", "one_part": True, "norms_per_layer": 1},
    "falcon_mamba": {**_TIED, "only": "mamba", "one_part": True, "norms_per_layer": 1},
    # encoders
    "bert": _ENCODER, "roberta": _ENCODER, "xlm_roberta": _ENCODER,
}  # fmt: skip

# Models around a language model of these families whose towers and projectors are counted (hf_vision.py).
WRAPPERS = frozenset({
    "aria", "cosmos3_omni", "exaone4_5", "gemma3", "gemma4", "glm4v", "glm4v_moe", "glmga", "glm46v", "internvl",
    "internvl_chat", "kimi_k25", "kimi_vl", "lfm2_vl", "lighton_ocr", "llama4", "llava", "llava_next",
    "llava_next_video", "llava_onevision", "mistral3", "mllama", "nemotron_h_omni", "paligemma", "pixtral",
    "qianfan_ocr", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe", "video_llama_3",
    "vipllava",
})  # fmt: skip

# What a model's name says of its family, where the config is too poor to say it.
_NAMED = (
    (r"gemma-?4", "gemma4"), (r"gemma-?3(?!n)", "gemma3"), (r"gemma-?2", "gemma2"), (r"gemma(?!-?3n)", "gemma"),
    (r"qwen3[._-]?next", "qwen3_next"), (r"qwen3\.[5-9].*a\d+b", "qwen3_5_moe"), (r"qwen3\.[5-9]", "qwen3_5"),
    (r"qwen3-vl.*a\d+b", "qwen3_vl_moe"), (r"qwen3-vl", "qwen3_vl"), (r"qwen3.*a\d+b", "qwen3_moe"),
    (r"qwen3", "qwen3"), (r"qwen2\.5-vl", "qwen2_5_vl"), (r"qwen2-vl", "qwen2_vl"),
    (r"qwen1\.5-moe|qwen2.*-a\d+b", "qwen2_moe"), (r"qwen2|qwq|qwen1\.5", "qwen2"), (r"gpt-?oss", "gpt_oss"),
    (r"llama-?4", "llama4"), (r"llama", "llama"), (r"olmo-?3", "olmo3"), (r"olmo-?2", "olmo2"),
    (r"phi-?[12](\b|[._])", "phi"), (r"mixtral", "mixtral"), (r"kimi-vl|moonlight|deepseek-?v2", "deepseek_v2"),
    (r"granite-?4.*-h-", "granitemoehybrid"), (r"granite", "granite"), (r"glm-?5", "glm_moe_dsa"),
    (r"nemotron-?(nano|h|3)", "nemotron_h"),
)  # fmt: skip

# Model types that are another family's under a name of their own.
_ALIASES = {
    "mistral_small": "mistral", "kimi_vl": "deepseek_v2", "kimi_vl_text": "deepseek_v2", "xlm-roberta": "xlm_roberta",
}  # fmt: skip
_SUFFIX = re.compile(r"(_text_model|_text|_language)$")


def find_family(config: Mapping[str, Any], text: Mapping[str, Any], name: str | None) -> tuple[str, str]:
    """
    Name the family and where the name comes from: "config", "name" or "".

    The language model's own model_type counts before that of the whole.
    """
    for said in (text.get("model_type"), config.get("model_type"), *_architectures(config)):
        if isinstance(said, str) and said:
            kind = _SUFFIX.sub("", said.lower())
            return _ALIASES.get(kind, kind), "config"
    for pattern, kind in _NAMED:
        if name is not None and re.search(pattern, name.lower()):
            return kind, "name"
    return "", ""


def _architectures(config: Mapping[str, Any]) -> list[str]:
    """The class names as model types: Qwen3MoeForCausalLM is qwen3_moe."""
    classes = config.get("architectures")
    listed = classes if isinstance(classes, list) else []
    names = [re.sub(r"(For|LMHead|Model$).*", "", str(name)).lower() for name in listed]
    families = {family.replace("_", ""): family for family in FAMILIES}
    return [families.get(name.replace("_", ""), name) for name in names]
