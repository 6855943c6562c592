"""
Which kind is each layer of a Hugging Face config, and which matrices is it made of?
"""

from __future__ import annotations

from enum import StrEnum

from worker.catalog.architecture import Cache, KeysAndValues, Latent, Matrix, Shard, State
from worker.catalog.hf_facts import Facts


class Mixer(StrEnum):
    """What mixes the tokens of a layer."""

    FULL = "full"
    SLIDING = "sliding"
    CHUNKED = "chunked"
    LATENT = "latent"
    DELTA = "delta"
    MAMBA2 = "mamba2"
    MAMBA = "mamba"
    CONV = "conv"
    NONE = "none"


_LAYER_TYPES = {
    "full_attention": Mixer.FULL, "attention": Mixer.FULL, "sliding_attention": Mixer.SLIDING,
    "chunked_attention": Mixer.CHUNKED, "linear_attention": Mixer.DELTA, "mamba": Mixer.MAMBA2, "mamba2": Mixer.MAMBA2,
    "conv": Mixer.CONV, "mlp": Mixer.NONE, "moe": Mixer.NONE,
}  # fmt: skip
_PATTERN_LETTERS = {"M": Mixer.MAMBA2, "*": Mixer.FULL, "-": Mixer.NONE, "E": Mixer.NONE}


def mixers_of(facts: Facts, layers: int) -> tuple[Mixer, ...]:
    """
    Say of each layer what it is. The questions, in order, the first that the config answers decides:

    1. Does it name every layer?        layer_types, layers_block_type, hybrid_override_pattern
    2. Is attention compressed?         kv_lora_rank: all layers are MLA
    3. Is only every n-th layer full?   the others are recurrent, chunked or sliding, as the family has it
    4. Is there a window?               all layers slide
    5. Otherwise                        full attention everywhere
    """
    # (1) Every layer has a name. MLA models name theirs too.
    if (named := _named(facts, layers)) is not None:
        return tuple(Mixer.LATENT if facts.has("kv_lora_rank") and m is Mixer.FULL else m for m in named)
    # (2) MLA.
    if facts.number("kv_lora_rank") is not None:
        return (Mixer.LATENT,) * layers
    # (3) Every n-th.
    others, every = _every(facts, layers)
    if every is not None:
        return tuple(Mixer.FULL if (index + 1) % every == 0 else others for index in range(layers))
    # (4) A window, (5) none.
    sliding = facts.number("sliding_window") is not None and facts.flag("use_sliding_window", default=True)
    return (Mixer.SLIDING if sliding else Mixer.FULL,) * layers


def _named(facts: Facts, layers: int) -> tuple[Mixer, ...] | None:
    pattern = facts.raw("hybrid_override_pattern")
    if isinstance(pattern, str) and len(pattern) == layers:
        return tuple(_PATTERN_LETTERS.get(letter, Mixer.FULL) for letter in pattern)
    names = facts.raw("layer_types") or facts.raw("layers_block_type")
    if isinstance(names, list) and len(names) == layers and all(name in _LAYER_TYPES for name in names):
        mamba1 = facts.has("mamba_dt_rank") or facts.has("time_step_rank")
        kinds = (_LAYER_TYPES[name] for name in names)
        return tuple(Mixer.MAMBA if kind is Mixer.MAMBA2 and mamba1 else kind for kind in kinds)
    period, offset = facts.number("attn_layer_period"), facts.number("attn_layer_offset") or 0
    if period is not None:
        return tuple(Mixer.FULL if index % period == offset else Mixer.MAMBA for index in range(layers))
    return None


def _every(facts: Facts, layers: int) -> tuple[Mixer, int | None]:
    interval = facts.number("full_attention_interval")
    if interval is not None:
        return Mixer.DELTA, interval
    if (full := facts.number("kv_layers")) is not None and full < layers:
        return Mixer.DELTA, max(1, layers // full)
    every = facts.number("full_attention_every")
    window = facts.number("sliding_window") is not None
    if every is not None and (facts.flag("chunked_attention") or facts.has("attention_chunk_size")):
        return Mixer.CHUNKED, every
    if (every := every or facts.number("sliding_window_pattern")) is not None and window:
        return Mixer.SLIDING, every
    return Mixer.FULL, None


# --- What mixes the tokens --------------------------------------------------------------------------------


def mixer_parts(kind: Mixer, facts: Facts) -> tuple[list[Matrix], Cache | None]:
    """Give the matrices of one layer's mixer and what it keeps for its tokens."""
    match kind:
        case Mixer.FULL | Mixer.SLIDING | Mixer.CHUNKED:
            return _attention(kind, facts)
        case Mixer.LATENT:
            return _latent(facts)
        case Mixer.DELTA:
            return _delta(facts)
        case Mixer.MAMBA2:
            return _mamba2(facts)
        case Mixer.MAMBA:
            return _mamba(facts)
        case Mixer.CONV:
            return _conv(facts)
        case Mixer.NONE:
            return [], None


def head_dim_of(facts: Facts) -> int:
    """The size of a head; hidden size / heads where the config does not say."""
    found = facts.number("head_dim")
    if found is not None:
        return found
    hidden, heads = facts.number("hidden_size"), facts.number("num_attention_heads")
    return hidden // heads if hidden and heads else facts.needed("head_dim")


def _attention(kind: Mixer, facts: Facts) -> tuple[list[Matrix], Cache]:
    hidden, heads = facts.needed("hidden_size"), facts.needed("num_attention_heads")
    kv_heads = facts.number("num_key_value_heads")
    if kv_heads is None:
        kv_heads = 1 if facts.flag("multi_query") else heads
    head_dim = head_dim_of(facts)
    shared_kv = False
    if kind is Mixer.FULL and (global_dim := facts.number("global_head_dim")) is not None:
        head_dim, shared_kv = global_dim, facts.flag("attention_k_eq_v")
        kv_heads = (facts.number("num_global_key_value_heads") if shared_kv else None) or kv_heads
    v_dim = facts.number("n_embd_head_v") or facts.number("v_head_dim") or head_dim
    gate = 2 if facts.flag("attn_output_gate") else 1

    matrices = [
        Matrix(name="self_attn.q_proj", inputs=hidden, outputs=heads * head_dim * gate),
        Matrix(name="self_attn.k_proj", inputs=hidden, outputs=kv_heads * head_dim, shard=Shard.HEADS),
        Matrix(name="self_attn.o_proj", inputs=heads * v_dim, outputs=hidden),
    ]
    if not shared_kv:
        matrices.append(Matrix(name="self_attn.v_proj", inputs=hidden, outputs=kv_heads * v_dim, shard=Shard.HEADS))
    biases = 0
    everywhere = facts.flag("all_bias") or facts.flag("attention_bias")
    if everywhere or facts.flag("qkv_bias"):
        biases += heads * head_dim * gate + kv_heads * (head_dim + v_dim)
    biases += hidden if everywhere else 0
    biases += heads if facts.flag("sinks") else 0
    norms = facts.raw("qk_norm")
    if norms == "full" or facts.flag("qk_norm_full"):
        biases += (heads + kv_heads) * head_dim
    elif norms:
        biases += 2 * head_dim
    window = None
    if kind is Mixer.SLIDING:
        window = facts.needed("sliding_window")
    elif kind is Mixer.CHUNKED:
        window = facts.number("attention_chunk_size") or facts.needed("sliding_window")
    cache = KeysAndValues(
        kv_heads=kv_heads, head_dim=head_dim, v_head_dim=v_dim, window=window, chunked=kind is Mixer.CHUNKED
    )
    return [*matrices, small("self_attn.biases", biases)], cache


def _latent(facts: Facts) -> tuple[list[Matrix], Cache]:
    """MLA (DeepSeek-V2, arXiv 2405.04434): keys and values come from one compressed vector."""
    hidden, heads = facts.needed("hidden_size"), facts.needed("num_attention_heads")
    rank, rope = facts.needed("kv_lora_rank"), facts.number("qk_rope_head_dim") or 64
    # 128 and 128 in every released model; poorer configs leave them out.
    nope, value = facts.number("qk_nope_head_dim") or 128, facts.number("v_head_dim") or 128
    q_rank = facts.number("q_lora_rank")
    queries = heads * (nope + rope)
    matrices = [
        Matrix(name="self_attn.kv_a_proj_with_mqa", inputs=hidden, outputs=rank + rope, shard=Shard.COPY),
        Matrix(name="self_attn.kv_b_proj", inputs=rank, outputs=heads * (nope + value)),
        Matrix(name="self_attn.o_proj", inputs=heads * value, outputs=hidden),
        # vLLM unfolds kv_b_proj once more for decoding (mla_attention.py, process_weights_after_loading).
        Matrix(
            name="self_attn.kv_b_unfolded",
            inputs=rank,
            outputs=heads * (nope + value),
            quantizable=False,
            counted=False,
        ),
        small("self_attn.norms", rank + (q_rank or 0)),
    ]
    if q_rank is None:
        matrices.append(Matrix(name="self_attn.q_proj", inputs=hidden, outputs=queries))
    else:
        matrices.append(Matrix(name="self_attn.q_a_proj", inputs=hidden, outputs=q_rank, shard=Shard.COPY))
        matrices.append(Matrix(name="self_attn.q_b_proj", inputs=q_rank, outputs=queries))
    return matrices, Latent(width=rank + rope)


def _delta(facts: Facts) -> tuple[list[Matrix], Cache]:
    """Gated DeltaNet, as in Qwen3-Next and Qwen3.5 (vLLM 0.32, MambaStateShapeCalculator)."""
    hidden = facts.needed("hidden_size")
    k_heads, v_heads = facts.number("linear_num_key_heads") or 16, facts.number("linear_num_value_heads") or 32
    k_dim, v_dim = facts.number("linear_key_head_dim") or 128, facts.number("linear_value_head_dim") or 128
    kernel = facts.number("linear_conv_kernel_dim") or 4
    mixed = 2 * k_heads * k_dim + v_heads * v_dim
    matrices = [
        Matrix(name="linear_attn.in_proj_qkvz", inputs=hidden, outputs=mixed + v_heads * v_dim),
        Matrix(name="linear_attn.in_proj_ba", inputs=hidden, outputs=2 * v_heads, quantizable=False),
        Matrix(name="linear_attn.conv1d", inputs=kernel, outputs=mixed, quantizable=False),
        Matrix(name="linear_attn.out_proj", inputs=v_heads * v_dim, outputs=hidden),
        small("linear_attn.norm", v_dim + 2 * v_heads),
    ]
    state = State(conv_elements=(kernel - 1) * mixed, ssm_elements=v_heads * k_dim * v_dim, ssm_bytes=_ssm_bytes(facts))
    return matrices, state


def _mamba2(facts: Facts) -> tuple[list[Matrix], Cache]:
    hidden = facts.needed("hidden_size")
    heads = facts.number("mamba_num_heads") or facts.number("mamba_n_heads") or facts.needed("num_heads")
    head_dim = facts.number("mamba_head_dim") or facts.number("mamba_d_head") or facts.needed("head_dim")
    groups = facts.number("n_groups") or facts.number("mamba_n_groups") or 1
    size = facts.number("ssm_state_size") or facts.number("mamba_d_state") or facts.number("state_size") or 128
    kernel = facts.number("conv_kernel") or facts.number("mamba_d_conv") or 4
    inner, mixed = heads * head_dim, heads * head_dim + 2 * groups * size
    matrices = [
        Matrix(name="mixer.in_proj", inputs=hidden, outputs=inner + mixed + heads),
        Matrix(name="mixer.conv1d", inputs=kernel + 1, outputs=mixed, quantizable=False),
        Matrix(name="mixer.out_proj", inputs=inner, outputs=hidden),
        small("mixer.norm", inner + 3 * heads),
    ]
    state = State(conv_elements=(kernel - 1) * mixed, ssm_elements=inner * size, ssm_bytes=_ssm_bytes(facts))
    return matrices, state


def _mamba(facts: Facts) -> tuple[list[Matrix], Cache]:
    hidden = facts.needed("hidden_size")
    inner = hidden * (facts.number("mamba_expand") or 2)
    size = facts.number("mamba_d_state") or facts.number("state_size") or 16
    kernel = facts.number("mamba_d_conv") or facts.number("conv_kernel") or 4
    rank = facts.number("mamba_dt_rank") or facts.number("time_step_rank") or -(-hidden // 16)
    matrices = [
        Matrix(name="mamba.in_proj", inputs=hidden, outputs=2 * inner),
        Matrix(name="mamba.x_proj", inputs=inner, outputs=rank + 2 * size, quantizable=False),
        Matrix(name="mamba.dt_proj", inputs=rank + 1, outputs=inner, quantizable=False),
        Matrix(name="mamba.conv1d", inputs=kernel + 1 + size + 1, outputs=inner, quantizable=False),
        Matrix(name="mamba.out_proj", inputs=inner, outputs=hidden),
    ]
    return matrices, State(conv_elements=(kernel - 1) * inner, ssm_elements=inner * size, ssm_bytes=_ssm_bytes(facts))


def _conv(facts: Facts) -> tuple[list[Matrix], Cache]:
    """The short convolutions of LFM2."""
    hidden, kernel = facts.needed("hidden_size"), facts.number("conv_L_cache") or 3
    matrices = [
        Matrix(name="conv.in_proj", inputs=hidden, outputs=3 * hidden),
        Matrix(name="conv.conv", inputs=kernel, outputs=hidden, quantizable=False),
        Matrix(name="conv.out_proj", inputs=hidden, outputs=hidden),
    ]
    return matrices, State(conv_elements=(kernel - 1) * hidden, ssm_elements=0)


def _ssm_bytes(facts: Facts) -> int:
    return 4 if facts.raw("mamba_ssm_dtype") == "float32" or facts.raw("mamba_ssm_cache_dtype") == "float32" else 2


# --- What thinks about each token --------------------------------------------------------------------------


def mlp_parts(kind: Mixer, facts: Facts, *, sparse: bool) -> list[Matrix]:
    """Give the matrices of one layer's MLP: dense, experts, or (Gemma 4) both."""
    if sparse:
        matrices = _experts(facts)
        return [*matrices, *_dense(facts)] if facts.flag("dense_beside_experts") else matrices
    pattern = facts.raw("hybrid_override_pattern")
    if isinstance(pattern, str) and kind is not Mixer.NONE:
        return []  # Nemotron-H: the layer is a mixer or an MLP, not both
    return _dense(facts)


def has_experts(index: int, facts: Facts) -> bool:
    """Is the MLP of this layer a mixture of experts?"""
    if facts.number("num_experts") is None:
        return False
    pattern = facts.raw("hybrid_override_pattern")
    if isinstance(pattern, str):
        return pattern[index : index + 1] == "E"
    dense_only = facts.raw("mlp_only_layers")
    if isinstance(dense_only, list) and index in dense_only:
        return False
    if index < (facts.number("dense_layers") or 0):
        return False
    if (period := facts.number("expert_layer_period")) is not None:  # Jamba
        return index % period == (facts.number("expert_layer_offset") or 0)
    step = facts.number("decoder_sparse_step") or facts.number("interleave_moe_layer_step") or 1
    return (index + 1) % step == 0


def _dense(facts: Facts) -> list[Matrix]:
    hidden = facts.needed("hidden_size")
    inner = facts.number("intermediate_size_mlp") or facts.number("intermediate_size")
    if inner is None:
        inner = _usual_width(facts)
    matrices = [
        Matrix(name="mlp.up_proj", inputs=hidden, outputs=inner),
        Matrix(name="mlp.down_proj", inputs=inner, outputs=hidden),
    ]
    if (facts.number("mlp_mats") or 3) > 2:  # noqa: PLR2004 - a gate beside up and down
        matrices.append(Matrix(name="mlp.gate_proj", inputs=hidden, outputs=inner))
    if facts.flag("all_bias") or facts.flag("mlp_bias"):
        matrices.append(small("mlp.biases", inner + hidden))
    return matrices


def _usual_width(facts: Facts) -> int:
    """Take an MLP as wide as Llama 1's (8/3 of the hidden size, in steps of 256), where the rest is Llama 1's too."""
    heads, kv_heads = facts.number("num_attention_heads"), facts.number("num_key_value_heads")
    hidden = facts.number("hidden_size")
    if hidden is None or heads != kv_heads or facts.number("total_params") is None:
        return facts.needed("intermediate_size")
    width = -(-8 * hidden // 3 // 256) * 256
    facts.assumed.append(f"intermediate_size {width}, as in a Llama of this hidden size")
    return width


def _experts(facts: Facts) -> list[Matrix]:
    hidden, count = facts.needed("hidden_size"), facts.needed("num_experts")
    inner = expert_width(facts) or facts.needed("moe_intermediate_size")
    matrices = [
        Matrix(name="mlp.experts.up_proj", inputs=hidden, outputs=inner, count=count),
        Matrix(name="mlp.experts.down_proj", inputs=inner, outputs=hidden, count=count),
        Matrix(name="mlp.gate", inputs=hidden, outputs=count, shard=Shard.COPY, quantizable=False),
    ]
    if (facts.number("mlp_mats") or 3) > 2:  # noqa: PLR2004 - a gate beside up and down
        matrices.append(Matrix(name="mlp.experts.gate_proj", inputs=hidden, outputs=inner, count=count))
    if facts.flag("all_bias"):
        matrices.append(small("mlp.experts.biases", count * (2 * inner + hidden + 1)))
    shared = facts.number("shared_expert_intermediate_size") or (facts.number("num_shared_experts") or 0) * inner
    if facts.flag("shared_like_expert"):
        shared = shared or inner
    if shared:
        matrices += [
            Matrix(name="mlp.shared_expert.up_gate_proj", inputs=hidden, outputs=2 * shared),
            Matrix(name="mlp.shared_expert.down_proj", inputs=shared, outputs=hidden),
        ]
    return matrices


def expert_width(facts: Facts) -> int | None:
    """The inner size of one routed expert."""
    return facts.number("moe_intermediate_size") or facts.number("intermediate_size")


def small(name: str, params: int) -> Matrix:
    """Norms and biases: never packed, and on every card."""
    return Matrix(name=name, inputs=1, outputs=params, shard=Shard.COPY, quantizable=False)
