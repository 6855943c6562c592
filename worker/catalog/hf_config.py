"""
Reads a Hugging Face config.json, whole or poor, as an `Architecture`.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from worker.catalog.architecture import Architecture, Block, Matrix, RopeTable, Shard, State
from worker.catalog.hf_facts import FAMILIES, WRAPPERS, Facts, find_family
from worker.catalog.hf_layers import Kind, expert_width, head_dim_of, kinds_of, layer_parts, small
from worker.catalog.hf_quantization import named_quantization, read_quantization
from worker.catalog.hf_vision import count_towers
from worker.catalog.quantization import Quantization

_TEXT = ("text_config", "llm_config", "language_config", "thinker_config")
_WIDE = {"float32", "float", "torch.float32", "fp32"}
_LARGEST_FACTOR = 1000
_MOST_PARAMS = 2**46  # 70 trillion; nobody has published a tenth of it
_EMBEDS = re.compile(r"(?i)embed|rerank|reward")
_SEES = re.compile(r"(?i)-vl\b|vision|llava|pixtral|omni")


def read_config(config: Mapping[str, Any], *, name: str | None = None, quantization: str | None = None) -> Architecture:
    """
    Read *config*; never raises: what it leaves open is in `assumed`, `unknown_weights` and `unknown_cache`.

    *name* is the model's, for what the config does not say; *quantization* the method that the engine is told.
    """
    text = next((config[key] for key in _TEXT if isinstance(config.get(key), Mapping)), config)
    kind, said_by = find_family(config, text, name)
    poor = said_by != "config"
    facts = Facts({**config, **text} if text is not config else config, FAMILIES.get(kind), whole=not poor)
    if said_by == "name":
        facts.assumed.append(f"the family {kind}, from the model's name")
    elif not poor and kind not in FAMILIES:
        facts.refuse(f"the architecture {kind[:40]} is not known here")
    around = str(config.get("model_type") or "")
    if text is not config and around and around not in WRAPPERS | FAMILIES.keys():
        facts.refuse(f"the architecture {around[:40]} around it is not known here")

    packing, packing_unknown = _packing(config, text, facts, name, quantization, poor=poor)
    built = Architecture(
        kind=kind,
        hidden_size=facts.number("hidden_size") or 0,
        vocab_size=facts.number("vocab_size") or 0,
        heads=facts.number("num_attention_heads") or 0,
        max_position_embeddings=facts.number("max_position_embeddings"),
        blocks=_blocks(facts),
        outside=_outside(facts),
        vision=count_towers(config, facts, usual=poor),
        dtype_bytes=4 if str(facts.raw("dtype") or facts.raw("torch_dtype") or "").lower() in _WIDE else 2,
        quantization=packing,
        experts_per_token=(facts.number("num_experts_per_tok") or 2) if facts.number("num_experts") else 0,
        expert_width=(expert_width(facts) or 0) if facts.number("num_experts") else 0,
        mlp_width=facts.number("intermediate_size_mlp") or facts.number("intermediate_size") or 0,
        generates=not (name and _EMBEDS.search(name)) and not facts.flag("encoder"),
    )
    sees = "vision_config" in config or bool(name and _SEES.search(name))
    built, counted = _with_total(built, facts, name, sees=sees, poor=poor)
    rope = _rope(facts, kind, built.vision)
    if built.params > _MOST_PARAMS:
        facts.refuse(f"{built.params:.0e} parameters make no sense")
        counted = False
    return dataclasses.replace(
        built,
        rope=rope,
        multimodal=bool(built.vision) or sees,
        assumed=tuple(dict.fromkeys(facts.assumed)),
        unknown_weights=(*(facts.wrong if counted else facts.unknown), *packing_unknown),
        unknown_cache=_unknown_cache(facts),
    )


def packed_as(architecture: Architecture, method: str | None) -> Architecture:
    """The same model packed by *method*, if it is not packed yet: on the fly, or in files whose config is not here."""
    if method is None or architecture.quantization is not None:
        return architecture
    named = named_quantization(method)
    if named is None:
        unknown = (*architecture.unknown_weights, f"the quantization method {method}")
        return dataclasses.replace(architecture, unknown_weights=unknown)
    return dataclasses.replace(architecture, quantization=named)


# --- Layers, and what is outside them ---------------------------------------------------------------------


def _blocks(facts: Facts) -> tuple[Block, ...]:
    alike: defaultdict[Kind, list[int]] = defaultdict(list)
    for index, kind in enumerate(kinds_of(facts)):
        alike[kind].append(index)
    blocks = []
    for kind, indices in alike.items():
        matrices, cache = layer_parts(kind, facts)
        blocks.append(Block(layers=tuple(indices), matrices=tuple(matrices), cache=cache))
    return tuple(blocks)


def _outside(facts: Facts) -> tuple[Matrix, ...]:
    hidden, vocab = facts.needed("hidden_size"), facts.needed("vocab_size")
    matrices = [
        Matrix(
            name="embed_tokens",
            inputs=hidden,
            outputs=vocab + (facts.number("extra_embeddings") or 0),
            quantizable=False,
        ),
        small("norm", hidden),
    ]
    if (width := facts.number("hidden_size_per_layer_input")) is not None:  # Gemma 4 E2B and E4B
        all_layers = width * facts.needed("num_hidden_layers")
        rows = facts.number("vocab_size_per_layer_input") or vocab
        matrices += [
            Matrix(name="embed_tokens_per_layer", inputs=all_layers, outputs=rows, quantizable=False),
            Matrix(name="per_layer_model_projection", inputs=hidden, outputs=all_layers),
            small("per_layer_projection_norm", width),
        ]
    if not facts.flag("tie_word_embeddings") and not facts.flag("encoder"):
        bias = vocab if facts.flag("lm_head_bias") else 0
        matrices.append(Matrix(name="lm_head", inputs=hidden, outputs=vocab))
        matrices.append(small("lm_head.bias", bias))
    if facts.flag("learned_positions") or facts.flag("encoder"):
        positions = facts.number("max_position_embeddings") or 0
        matrices.append(
            Matrix(name="embed_positions", inputs=hidden, outputs=positions, shard=Shard.COPY, quantizable=False)
        )
    return tuple(matrices)


# --- A declared or guessed total ----------------------------------------------------------------------------


def _with_total(
    built: Architecture, facts: Facts, name: str | None, *, sees: bool, poor: bool
) -> tuple[Architecture, bool]:
    """
    Use the number of parameters that a poor config declares, or that the name says.

    What the layers do not explain is a tower in a model that sees, else more weights of the layers. Where facts are
    missing, all of it is spread over the layers. Also says whether the weights are known with it.
    """
    declared = facts.number("total_params")
    loose = bool(facts.missing) or (poor and _state_assumed(built.blocks, facts))
    if loose and declared is None and not facts.wrong and (guessed := _named_size(name)) is not None:
        facts.assumed.append(f"a guess: {guessed / 1e9:g} billion parameters, from the name")
        declared = guessed + built.vision
    if declared is None:
        return built, not facts.missing
    if facts.missing:
        return _spread(declared - built.vision, built, facts), True
    rest = max(0, declared - built.params)
    if not built.vision and sees:
        return dataclasses.replace(built, vision=rest), True
    if not built.vision or _state_assumed(built.blocks, facts):
        return dataclasses.replace(built, blocks=_fill_up(built, rest)), True
    return built, True


def _spread(total: int, built: Architecture, facts: Facts) -> Architecture:
    """Where the layers are not known in detail, spread the known *total* over them evenly."""
    layers = facts.number("num_hidden_layers")
    if not built.hidden_size or not layers or not built.vocab_size:
        width = 4096  # any: it only says how many weights share a row's scale
        return dataclasses.replace(built, outside=(Matrix(name="layers.all", inputs=width, outputs=total // width),))
    rest = max(0, total - sum(matrix.params for matrix in built.outside))
    matrix = Matrix(name="all", inputs=built.hidden_size, outputs=rest // built.hidden_size // layers)
    blocks = tuple(dataclasses.replace(block, matrices=(matrix,)) for block in built.blocks)
    return dataclasses.replace(built, blocks=blocks)


def _fill_up(built: Architecture, rest: int) -> tuple[Block, ...]:
    """Add what the declared total has and the layers do not explain, evenly, as more of the same weights."""
    if not built.hidden_size or not built.layers or (outputs := rest // built.hidden_size // built.layers) == 0:
        return built.blocks
    more = Matrix(name="rest", inputs=built.hidden_size, outputs=outputs)
    return tuple(dataclasses.replace(block, matrices=(*block.matrices, more)) for block in built.blocks)


def _state_assumed(blocks: tuple[Block, ...], facts: Facts) -> bool:
    """Has it recurrent layers whose sizes are the family's usual ones, not the config's?"""
    recurrent = any(isinstance(block.cache, State) for block in blocks)
    return recurrent and not any(map(facts.has, ("linear_num_value_heads", "mamba_num_heads", "num_attention_heads")))


def _unknown_cache(facts: Facts) -> tuple[str, ...]:
    """Of what is unknown, the facts that the KV cache needs too."""
    needed = {
        "num_hidden_layers", "num_key_value_heads", "head_dim", "sliding_window", "kv_lora_rank",
        "which of its layers are recurrent",
    }  # fmt: skip
    if facts.number("num_key_value_heads") is None:
        needed.add("num_attention_heads")
    return (*facts.wrong, *(name for name in facts.missing if name in needed))


def _named_size(name: str | None) -> int | None:
    """
    Read "Qwen3-14B" as 14 billion. Names of mixtures lie (8x7B, 17B-16E, MoE-A2.7B) and say nothing.
    """
    if name is None or re.search(r"\d+x\d|\d+b-\d+e|moe-a\d", name.lower()):
        return None
    sizes = set(re.findall(r"(?<![a-z0-9.])(\d{1,4}(?:\.\d{1,2})?)b(?![a-z0-9])", name.lower()))
    return int(float(sizes.pop()) * 1e9) or None if len(sizes) == 1 else None


# --- Rope tables -------------------------------------------------------------------------------------------


def _rope(facts: Facts, kind: str, vision: int) -> tuple[RopeTable, ...]:
    """
    Say which tables vLLM computes (model_executor/layers/rotary_embedding): one row for each position.

    Linear and dynamic scaling lengthen the table by their factor, YaRN starts from the length before it.
    """
    rows = facts.number("max_position_embeddings")
    if rows is None or facts.flag("learned_positions") or facts.flag("encoder") or facts.family("only") is not None:
        return ()
    scaling = facts.table("rope_scaling") or facts.table("rope_parameters")
    if isinstance(full := scaling.get("full_attention"), Mapping):
        scaling = full
    if (width := facts.number("rotary_dim") or facts.number("qk_rope_head_dim")) is None:
        share = Facts(scaling).share("partial_rotary_factor", facts.share("partial_rotary_factor"))
        width = int(head_dim_of(facts) * share)
    method, factor = str(scaling.get("rope_type") or scaling.get("type") or ""), scaling.get("factor")
    factor = float(factor) if isinstance(factor, int | float) and 1 <= factor <= _LARGEST_FACTOR else 1.0
    scaled = rows
    if method in {"linear", "dynamic"}:
        scaled = int(rows * factor)
    elif method == "yarn":
        original = scaling.get("original_max_position_embeddings")
        scaled = int(original * factor) if isinstance(original, int) and 0 < original <= rows else rows
    elif not scaling and kind == "gemma3" and vision:
        scaled = rows * 8  # every Gemma 3 that sees scales by 8; only a poor config does not say so
    tables = [RopeTable(rows=scaled, width=width)]
    if facts.flag("local_rope"):
        tables.append(RopeTable(rows=rows, width=facts.number("head_dim") or width))
    return tuple(tables)


# --- Packing -----------------------------------------------------------------------------------------------


def _packing(
    config: Mapping[str, Any], text: Mapping[str, Any], facts: Facts, name: str | None, told: str | None, *, poor: bool
) -> tuple[Quantization | None, tuple[str, ...]]:
    """The scheme of the files; of what the engine is told, if the files are in 16 bit; of the name, if nobody says."""
    said = config.get("quantization_config") or text.get("quantization_config") or config.get("compression_config")
    if said:
        found = read_quantization(said) if isinstance(said, Mapping) else "quantization_config is malformed"
        return (None, (found,)) if isinstance(found, str) else (found, ())
    if told:
        named = named_quantization(told if told != "compressed-tensors" else f"{name} {told}")
        if named is None and name is not None:
            named = named_quantization(name)
        if named is None:
            return None, (f"the quantization method {told}",)
        if named.group and facts.flag("qat_groups") and named.bits == 4:  # noqa: PLR2004 - int4
            named = dataclasses.replace(named, group=32)
        if named.method != "fp8":
            facts.assumed.append(
                f"{told} with the usual settings: {named.bits} bits, groups of {named.group or 'a row'}"
            )
        return named, ()
    if poor and name is not None and (named := named_quantization(name)) is not None:
        facts.assumed.append(f"{named.method}, from the model's name")
        return named, ()
    return None, ()
