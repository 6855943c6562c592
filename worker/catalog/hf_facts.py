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
    "num_key_value_heads": ("num_key_value_heads", "n_head_kv", "n_kv_heads", "num_kv_heads", "num_query_groups"),
    "head_dim": ("head_dim", "n_embd_head_k", "attention_head_dim", "kv_channels"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "n_ff"),
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
}  # fmt: skip

_LARGEST = {
    "num_hidden_layers": 2000, "vocab_size": 2**24, "max_position_embeddings": 2**31, "num_experts": 2**14,
    "sliding_window": 2**31, "total_params": 2**46, "extra_params": 2**40,
}  # fmt: skip
_LARGEST_SIZE = 2**20


class Facts:
    """A config.json with one question: `number`. What cannot be used is noted in `unknown`."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
        self._config = config
        self._defaults = dict(defaults or {})
        self.unknown: list[str] = []
        self.assumed: list[str] = []

    def number(self, name: str) -> int | None:
        """A positive whole number of a sane size; None if the config has none, 0 or nonsense."""
        for spelling in _SPELLINGS.get(name, (name,)):
            value = self._config.get(spelling)
            if value is None or value is False or value == 0:
                continue
            if isinstance(value, list) and value and len(set(map(str, value))) == 1:
                value = value[0]
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if not isinstance(value, int) or isinstance(value, bool):
                self._note(f"{spelling}={value!r:.40} is no whole number")
            elif not 0 < value <= _LARGEST.get(name, _LARGEST_SIZE):
                self._note(f"{spelling}={value} makes no sense")
            else:
                return value
        default = self._defaults.get(name)
        return default if isinstance(default, int) else None

    def needed(self, name: str) -> int:
        """Like `number`; what is missing is noted as unknown, and 0."""
        found = self.number(name)
        if found is None:
            self._note(name)
        return found or 0

    def flag(self, name: str, *, default: bool = False) -> bool:
        """A yes or no."""
        value = self._config.get(name)
        return bool(self._defaults.get(name, default) if value is None else value)

    def raw(self, name: str) -> Any:
        """Whatever is there, or the family's default."""
        value = self._config.get(name)
        return self._defaults.get(name) if value is None else value

    def share(self, name: str, default: float = 1.0) -> float:
        """A number between 0 and 1."""
        value = self.raw(name)
        usable = isinstance(value, int | float) and 0 < value <= 1
        return float(value) if usable else default

    def has(self, name: str) -> bool:
        """Does the config itself say anything about it?"""
        return any(self._config.get(spelling) is not None for spelling in _SPELLINGS.get(name, (name,)))

    def _note(self, what: str) -> None:
        if what not in self.unknown:
            self.unknown.append(what)


# --- Families: what their config classes in transformers fill in ---------------------------------------------

_GATED_DELTA_NET: dict[str, Any] = {
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "attn_output_gate": True,
    "qk_norm": "head",
    "partial_rotary_factor": 0.25,
}
_QWEN_3_5: dict[str, Any] = {
    **_GATED_DELTA_NET, "mamba_ssm_dtype": "float32",
    "vision_config": {
        "hidden_size": 1152, "depth": 27, "intermediate_size": 4304, "patch_size": 16, "temporal_patch_size": 2,
        "spatial_merge_size": 2, "num_position_embeddings": 2304,
    },
}  # fmt: skip
_GEMMA: dict[str, Any] = {"tie_word_embeddings": True}
# Google trains these for 4 bits in groups of 32 (Q4_0), and repacked checkpoints keep the groups.
_GEMMA_QAT: dict[str, Any] = {**_GEMMA, "qat_groups": True}

FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": {**_GEMMA, "head_dim": 256},
    "gemma2": {**_GEMMA, "norms_per_layer": 4, "sliding_window_pattern": 2},
    "gemma3": {
        **_GEMMA_QAT, "norms_per_layer": 4, "qk_norm": "head", "sliding_window_pattern": 6, "local_rope": True,
        "sliding_window": 1024, "vocab_size": 262208,
    },
    "gemma4": {
        **_GEMMA_QAT, "norms_per_layer": 4, "qk_norm": "head", "sliding_window_pattern": 6, "local_rope": True,
        "global_head_dim": 512, "num_global_key_value_heads": 2, "attention_k_eq_v": True, "dense_beside_experts": True,
    },
    "cohere": dict(_GEMMA), "cohere2": {**_GEMMA, "sliding_window_pattern": 4},
    "phi": {"mlp_mats": 2, "all_bias": True, "lm_head_bias": True},
    "gpt2": {**_GEMMA, "mlp_mats": 2, "all_bias": True, "learned_positions": True},
    "gptj": {"mlp_mats": 2}, "gpt_neox": {"mlp_mats": 2, "all_bias": True},
    "opt": {**_GEMMA, "mlp_mats": 2, "all_bias": True, "learned_positions": True},
    "bloom": {**_GEMMA, "mlp_mats": 2, "all_bias": True}, "falcon": {**_GEMMA, "mlp_mats": 2},
    "starcoder2": {**_GEMMA, "mlp_mats": 2, "all_bias": True}, "nemotron": {"mlp_mats": 2},
    "arcee": {"mlp_mats": 2}, "stablelm": {}, "internlm2": {}, "baichuan": {}, "yi": {}, "exaone": {}, "exaone4": {},
    "llama": {}, "mistral": {}, "mistral3": {}, "ministral": {}, "ministral3": {}, "mixtral": {}, "pixtral": {},
    "mllama": {}, "llava": {}, "granite": {**_GEMMA}, "granitemoe": {**_GEMMA}, "smollm3": {**_GEMMA},
    "qwen2": {"qkv_bias": True}, "qwen2_vl": {"qkv_bias": True}, "qwen2_5_vl": {"qkv_bias": True},
    "qwen2_moe": {"qkv_bias": True}, "dots_ocr": {"qkv_bias": True}, "dots1": {"qk_norm": "head"},
    "qwen3": {"qk_norm": "head"}, "qwen3_moe": {"qk_norm": "head"}, "qwen3_vl": {"qk_norm": "head"},
    "qwen3_vl_moe": {"qk_norm": "head"},
    "qwen3_next": dict(_GATED_DELTA_NET), "qwen3_5": _QWEN_3_5, "qwen3_5_moe": _QWEN_3_5,
    "olmo2": {"qk_norm": "full"}, "olmo3": {"qk_norm": "full", "sliding_window_pattern": 4},
    "olmoe": {"qk_norm": "full"}, "phi3": {}, "phimoe": {"all_bias": True},
    "gpt_oss": {"all_bias": True, "sliding_window_pattern": 2, "head_dim": 64, "sinks": True},
    "llama4": {
        "full_attention_every": 4, "chunked_attention": True, "num_experts_per_tok": 1, "shared_like_expert": True,
    },
    "deepseek_v2": {}, "deepseek_v3": {}, "kimi_k2": {}, "glm": {}, "glm4": {"norms_per_layer": 4},
    "glm4_moe": {"dense_layers": 1}, "glm_moe_dsa": {"dense_layers": 3}, "ernie4_5": {}, "ernie4_5_moe": {},
    "minimax_m2": {"qk_norm": "full"}, "seed_oss": {"qkv_bias": True}, "hunyuan_v1_dense": {"qk_norm": "head"},
    "lfm2": {**_GEMMA, "qk_norm": "head"}, "lfm2_moe": {**_GEMMA, "qk_norm": "head"},
    "nemotron_h": {"mlp_mats": 2}, "bamba": {}, "granitemoehybrid": {**_GEMMA}, "jamba": {}, "mamba2": {}, "mamba": {},
    "bert": {"mlp_mats": 2, "all_bias": True, "encoder": True},
    "xlm_roberta": {"mlp_mats": 2, "all_bias": True, "encoder": True},
}  # fmt: skip

# Families whose layers are put together in a way that is not counted here: better no answer than a wrong one.
UNLIKE = frozenset({"gemma3n", "falcon_h1", "deepseek_v4", "rwkv", "whisper", "t5", "bart", "nemotron_nas", "deci"})

# What a model's name says of its family, where the config is too poor to say it.
_NAMED = (
    (r"gemma-?4", "gemma4"), (r"gemma-?3", "gemma3"), (r"gemma-?2", "gemma2"), (r"gemma", "gemma"),
    (r"qwen3[._-]?next", "qwen3_next"), (r"qwen3\.[5-9].*a\d+b", "qwen3_5_moe"), (r"qwen3\.[5-9]", "qwen3_5"),
    (r"qwen3.*a\d+b", "qwen3_moe"), (r"qwen3", "qwen3"), (r"qwen1\.5-moe|qwen2.*-a\d+b", "qwen2_moe"),
    (r"qwen2|qwq|qwen1\.5", "qwen2"), (r"gpt-?oss", "gpt_oss"), (r"llama-?4", "llama4"),
    (r"olmo-?3", "olmo3"), (r"olmo-?2", "olmo2"), (r"phi-?[12](\b|[._])", "phi"), (r"mixtral", "mixtral"),
    (r"kimi-vl|moonlight|deepseek-v2", "deepseek_v2"), (r"granite", "granite"), (r"glm-?5", "glm_moe_dsa"),
    (r"nemotron-?(nano|h)", "nemotron_h"),
)  # fmt: skip

# Model types that are another family's under a name of their own.
_ALIASES = {"mistral_small": "mistral", "gemma3n": "gemma3n", "kimi_vl": "deepseek_v2", "kimi_vl_text": "deepseek_v2"}


def find_family(config: Mapping[str, Any], text: Mapping[str, Any], name: str | None) -> tuple[str, str]:
    """
    Name the family and where the name comes from: "config", "name" or "".

    The language model's own model_type counts before that of the whole.
    """
    for said in (text.get("model_type"), config.get("model_type"), *_architectures(config)):
        if isinstance(said, str) and said:
            kind = said.lower().removesuffix("_text").removesuffix("_language")
            return _ALIASES.get(kind, kind), "config"
    for pattern, kind in _NAMED:
        if name is not None and re.search(pattern, name.lower()):
            return kind, "name"
    return "", ""


def _architectures(config: Mapping[str, Any]) -> list[str]:
    """The class names as model types: Qwen3MoeForCausalLM is qwen3_moe."""
    classes = config.get("architectures") or []
    names = [re.sub(r"(For|LMHead|Model$).*", "", str(name)) for name in classes if isinstance(classes, list)]
    return [re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower() for name in names]
