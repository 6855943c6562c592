"""
Which type does llama.cpp's quantizer give to a tensor? Its recipe for each mix, src/llama-quant.cpp of 2026.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from worker.catalog.ggml_types import block_elements


class Role(StrEnum):
    """What a tensor does, as far as the recipes tell tensors apart."""

    EMBEDDING = "embedding"
    OUTPUT = "output"
    QUERY = "query"
    KEY = "key"
    VALUE = "value"  # also fused with keys and queries
    MIXED = "mixed"  # the output matrix of attention
    UP = "up"  # and gate
    DOWN = "down"
    OTHER = "other"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The facts of a model that its recipe looks at."""

    layers: int
    values: int  # layers that have a tensor of the role VALUE
    heads_per_kv_head: int
    experts: int = 0
    tied: bool = False  # the embedding is the output matrix too


# Each mix and the type that it is named after.
MIXES = {
    "F32": "F32", "F16": "F16", "BF16": "BF16",
    "Q4_0": "Q4_0", "Q4_1": "Q4_1", "Q5_0": "Q5_0", "Q5_1": "Q5_1", "Q8_0": "Q8_0",
    "Q2_K": "Q2_K", "Q2_K_S": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K",
    "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "Q6_K": "Q6_K",
    "IQ1_S": "IQ1_S", "IQ1_M": "IQ1_M", "IQ2_XXS": "IQ2_XXS", "IQ2_XS": "IQ2_XS", "IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S",
    "IQ3_XXS": "IQ3_XXS", "IQ3_XS": "IQ3_S", "IQ3_S": "IQ3_S", "IQ3_M": "IQ3_S", "IQ4_XS": "IQ4_XS", "IQ4_NL": "IQ4_NL",
    "TQ1_0": "TQ1_0", "TQ2_0": "TQ2_0", "MXFP4_MOE": "MXFP4",
}  # fmt: skip

# What a type becomes where a row is no whole number of its blocks.
_FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1",
              "Q6_K": "Q8_0"}  # fmt: skip
_TINY = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M"})
_MANY_HEADS = 4  # query heads per KV head, from which the values are so small that they may be large
_MIXTRAL = 8  # experts: it was tuned by hand, and every model of that many inherits it
_70B = 80  # layers


def find_mix(name: str) -> str | None:
    """
    Find the mix that *name* means; None if it means none.

    Takes llama.cpp's spelling ("Q4_K - Medium", "IQ4_XS - 4.25 bpw"), that of file names ("Q4_K_M") and of their
    variants ("UD-Q4_K_XL", "Q6_K_L"), which begin with the mix that they are nearest to.
    """
    text = name.upper().replace("IQ3_S MIX", "IQ3_M").replace("MXFP4 MOE", "MXFP4_MOE").replace("ALL F32", "F32")
    text = text.replace("Q8_K", "Q8_0")  # Q8_K_XL; Q8_K itself is no type of weights
    text = re.sub(r"(Q\d_K) - (S|M|L)\w+", r"\1_\2", text)
    words = re.findall(r"I?Q\d_[A-Z0-9]+(?:_[A-Z]+)?|TQ\d_0|BF16|F16|F32|MXFP4(?:_MOE)?", text)
    for word in words:
        for known in (word, f"{word}_M", re.sub(r"_(XL|L|XXL)$", "_M", word), re.sub(r"_[A-Z]+$", "", word)):
            if known in MIXES:
                return known
        if word == "MXFP4":
            return "MXFP4_MOE"
    return "Q2_K" if "Q2_K" in text else None


def tensor_type(mix: str, role: Role, *, shape: Shape, columns: int, layer: int = 0, value: int = 0) -> str:
    """
    Name the type of a matrix with rows of *columns* elements.

    *layer* is its layer's number; *value* counts the layers before it that have a tensor of the role VALUE.
    """
    if mix in {"F32", "F16", "BF16"}:
        return mix
    kind = _wanted(mix, role, shape, columns=columns, layer=layer, value=value)
    if columns % block_elements(kind) == 0:
        return kind
    fallback = _FALLBACKS.get(kind, "IQ4_NL" if kind.startswith("IQ") else kind)
    return fallback if columns % block_elements(fallback) == 0 else "F16"


def _wanted(mix: str, role: Role, shape: Shape, *, columns: int, layer: int, value: int) -> str:
    plain = MIXES[mix]
    if role is Role.OUTPUT or (role is Role.EMBEDDING and shape.tied):
        return _output(mix, plain, columns)
    if mix == "MXFP4_MOE":
        return "MXFP4" if shape.experts and role in {Role.UP, Role.DOWN} else "Q8_0"
    if role is Role.EMBEDDING:
        return _embedding(mix, plain)
    if mix in _TINY:
        return _tiny(mix, plain, role, shape, layer)
    match role:
        case Role.VALUE:
            return _value(mix, plain, shape, value)
        case Role.QUERY | Role.KEY:
            return _query_or_key(mix, plain, role, shape)
        case Role.DOWN:
            return _down(mix, plain, shape, layer)
        case Role.MIXED:
            return _mixed(mix, plain, shape)
        case Role.UP:
            return "IQ3_XXS" if mix == "IQ3_XS" and shape.layers // 8 <= layer < 7 * shape.layers // 8 else plain
        case _:
            return plain


def _output(mix: str, plain: str, columns: int) -> str:
    if mix == "MXFP4_MOE" or plain == "Q8_0" or columns % block_elements(plain):
        return "Q8_0"
    return "Q5_K" if mix in _TINY | {"IQ3_XXS"} else "Q6_K"


def _embedding(mix: str, plain: str) -> str:
    if mix in {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"}:
        return "Q2_K"
    if mix in {"IQ2_S", "IQ2_M", "IQ3_XXS"}:
        return "IQ3_S"
    return "Q4_K" if mix in {"TQ1_0", "TQ2_0"} else plain


def _tiny(mix: str, plain: str, role: Role, shape: Shape, layer: int) -> str:
    better = "IQ3_S" if mix in {"IQ2_S", "IQ2_M"} else "Q2_K"
    if role is Role.VALUE:
        return "Q4_K" if shape.heads_per_kv_head >= _MANY_HEADS or shape.experts >= _MANY_HEADS else better
    if role is Role.KEY and shape.experts == _MIXTRAL:
        return "Q4_K"
    if role is Role.DOWN and layer < shape.layers // 8:
        return better
    if role is Role.MIXED:
        if shape.experts == _MIXTRAL:
            return "Q5_K"
        return {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}.get(mix, plain)
    return plain


def _value(mix: str, plain: str, shape: Shape, value: int) -> str:
    many, kind = shape.heads_per_kv_head >= _MANY_HEADS, plain
    match mix:
        case "Q2_K":
            kind = "Q4_K" if many else "Q3_K"
        case "Q2_K_S" | "IQ3_XXS" | "IQ3_XS" | "IQ3_S":
            kind = "Q4_K" if many else plain
        case "IQ3_M":
            kind = "Q4_K"
        case "Q3_K_M":
            kind = "Q5_K" if value < 2 else "Q4_K"  # noqa: PLR2004 - the first two layers
        case "Q3_K_L":
            kind = "Q5_K"
        case "IQ4_NL" | "IQ4_XS":
            kind = "Q5_K" if many else plain
        case "Q4_K_M" | "Q5_K_M":
            kind = "Q6_K" if _more_bits(value, shape.values) else plain
        case "Q4_K_S":
            kind = "Q5_K" if value < 4 else plain  # noqa: PLR2004 - the first four layers
    if shape.layers == _70B and not shape.experts and kind in {"Q3_K", "Q4_K"}:
        kind = "Q5_K"
    return "Q8_0" if shape.experts == _MIXTRAL else kind


def _query_or_key(mix: str, plain: str, role: Role, shape: Shape) -> str:
    if role is Role.KEY and shape.experts == _MIXTRAL:
        return "Q8_0"
    return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(mix, plain)


def _down(mix: str, plain: str, shape: Shape, layer: int) -> str:
    """Type of the way down. The IQ mixes are made with an importance matrix, the others are taken to be without."""
    first = layer < shape.layers // 8
    match mix:
        case "Q2_K":
            return "Q3_K"
        case "Q2_K_S" | "IQ3_M" if first:
            return "Q4_K"
        case "IQ3_M" if shape.experts == _MIXTRAL and _more_bits(layer, shape.layers):
            return "Q4_K"
        case "Q3_K_M":
            return "Q5_K" if layer < shape.layers // 16 else "Q4_K"
        case "Q3_K_L":
            return "Q5_K"
        case "Q4_K_M" | "Q5_K_M" if _more_bits(layer, shape.layers):
            return "Q6_K"
        case "Q4_K_S" if first:
            return "Q5_K"
    return plain


def _mixed(mix: str, plain: str, shape: Shape) -> str:
    if shape.experts == _MIXTRAL:
        low = {
            "Q2_K",
            "IQ3_XS",
            "IQ3_XXS",
            "Q3_K_S",
            "Q3_K_M",
            "IQ4_NL",
            "Q4_K_S",
            "Q4_K_M",
            "IQ3_S",
            "IQ3_M",
            "IQ4_XS",
        }
        return "Q5_K" if mix in low else plain
    return {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}.get(mix, plain)


def _more_bits(index: int, count: int) -> bool:
    """llama.cpp's use_more_bits: the first and last eighth, and every third between."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2  # noqa: PLR2004
