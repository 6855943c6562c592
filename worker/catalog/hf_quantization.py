"""
Reads quantization_config of a Hugging Face config.json, or the name of a method where there is none.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from worker.catalog.quantization import Quantization

# Kernels want experts' sizes in whole tiles: Marlin rounds inputs up to 256 and outputs to 128 (vLLM 0.32,
# fused_moe/oracle/mxfp4.py); a gpt-oss-20b then takes the 13.7 GiB that were measured.
_MXFP4 = Quantization("mxfp4", 4, 32, scale_bytes=1, pad_to=(256, 128), only=("experts",))
# Its checkpoints bring an FP8 KV cache with them, unless their config says otherwise.
_NVFP4 = Quantization("nvfp4", 4, 16, scale_bytes=1, kv_cache_bits=8)

# What a method means when only its name is known: the settings of most checkpoints of that kind.
_NAMED: tuple[tuple[str, Quantization], ...] = (
    (r"mxfp4", _MXFP4),
    (r"nvfp4|modelopt_fp4", _NVFP4),
    (r"awq", Quantization("awq", 4, 128, zero_points=True)),
    (r"gptq.*(int8|8bit|8-bit)|(int8|8bit|8-bit).*gptq", Quantization("gptq", 8, 128, zero_points=True)),
    (r"gptq", Quantization("gptq", 4, 128, zero_points=True, row_order=True)),
    (r"w4a16|int4|4bit|4-bit", Quantization("w4a16", 4, 128)),
    (r"w8a8|w8a16|int8|8bit|8-bit", Quantization("w8a8", 8, scale_bytes=4)),
    (r"fp8|modelopt", Quantization("fp8", 8, scale_bytes=4)),
    (r"bitsandbytes|bnb", Quantization("bitsandbytes", 4, 64, scale_bytes=4)),
)


def read_quantization(config: Mapping[str, Any]) -> Quantization | str | None:
    """
    Read *config*, a quantization_config; None if it is empty, a text if the method is not known here.

    Sources: the config classes in vLLM 0.32, model_executor/layers/quantization/.
    """
    if not config:
        return None
    method = str(config.get("quant_method") or config.get("method") or "").lower().replace("-", "_")
    try:
        found = _read(method, config)
    except (TypeError, ValueError, AttributeError):
        return f"quantization_config of {method or 'no method'} is malformed"
    return found or f"the quantization method {method or '?'} is not known"


def named_quantization(text: str) -> Quantization | None:
    """Guess the scheme that *text*, a method's or a model's name, speaks of; None if it names none."""
    return next((scheme for pattern, scheme in _NAMED if re.search(pattern, text.lower())), None)


def _read(method: str, config: Mapping[str, Any]) -> Quantization | None:
    skipped = _names(config, "modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules", "exclude")
    if method in {"awq", "awq_marlin"}:
        return Quantization(
            "awq", _bits(config), _group(config), zero_points=bool(config.get("zero_point", True)), ignored=skipped
        )
    if method in {"gptq", "gptq_marlin", "auto_round", "autoround"}:
        left = [f"re:{rule[2:]}" for rule in config.get("dynamic") or {} if rule.startswith("-:")]
        return Quantization(
            "gptq",
            _bits(config),
            _group(config),
            zero_points=True,  # kept in the file, and on the card, even where they are all equal
            row_order=True,
            ignored=(*skipped, *left),
            lm_head=bool(config.get("lm_head")),
        )
    if method in {"fp8", "fbgemm_fp8", "ptpc_fp8"}:
        block = config.get("weight_block_size")
        size = (int(block[1]), int(block[0])) if block else None
        return Quantization("fp8", 8, scale_bytes=4, block=size, ignored=skipped)
    if method == "mxfp4":
        return dataclasses.replace(_MXFP4, ignored=skipped)
    if method == "bitsandbytes":
        skipped = _names(config, "llm_int8_skip_modules")
        if config.get("load_in_8bit"):
            return Quantization("bitsandbytes", 8, scale_bytes=4, ignored=skipped)
        return Quantization("bitsandbytes", 4, 64, scale_bytes=4, ignored=skipped)
    if method.startswith("modelopt") or "quant_algo" in config or "quantization" in config:
        return _modelopt(config, skipped)
    if method == "compressed_tensors":
        return _compressed_tensors(config, skipped)
    return None


def _modelopt(config: Mapping[str, Any], skipped: tuple[str, ...]) -> Quantization | None:
    inner = config.get("quantization") or config
    algorithm = str(inner.get("quant_algo") or config.get("quant_method") or "").upper()
    skipped = skipped or _names(inner, "exclude_modules", "ignore")
    skipped = tuple("re:" + name.replace(".", r"\.").replace("*", ".*") if "*" in name else name for name in skipped)
    kv_bits = int((inner.get("kv_cache_scheme") or {}).get("num_bits") or 0) or None
    if "FP8" in str(inner.get("kv_cache_quant_algo") or "").upper():
        kv_bits = 8
    if "FP4" in algorithm:
        return dataclasses.replace(_NVFP4, ignored=skipped, kv_cache_bits=kv_bits)
    if "FP8" in algorithm:
        return Quantization("fp8", 8, scale_bytes=4, ignored=skipped, kv_cache_bits=kv_bits)
    if "W4A16" in algorithm or "INT4" in algorithm:
        return Quantization("awq", 4, int(inner.get("group_size") or 128), ignored=skipped, kv_cache_bits=kv_bits)
    return None


def _compressed_tensors(config: Mapping[str, Any], skipped: tuple[str, ...]) -> Quantization | None:
    groups = [group for group in (config.get("config_groups") or {}).values() if group.get("weights")]
    if not groups:
        return None
    weights = groups[0]["weights"]
    bits, kind = int(weights["num_bits"]), str(weights.get("type") or "int")
    kv_bits = int((config.get("kv_cache_scheme") or {}).get("num_bits") or 0) or None
    if (bits, kind) == (4, "float"):
        scheme = _MXFP4 if weights.get("group_size") == _MXFP4.group else _NVFP4
        return dataclasses.replace(scheme, pad_to=None, only=(), ignored=skipped, kv_cache_bits=kv_bits)
    block = weights.get("block_structure") if weights.get("strategy") == "block" else None
    if isinstance(block, str):
        block = [int(side) for side in block.split("x")]
    grouped = weights.get("strategy") in {"group", "tensor_group"} or bool(weights.get("group_size"))
    return Quantization(
        f"{'fp' if kind == 'float' else 'int'}{bits}",
        bits,
        _group(weights) if grouped else None,
        scale_bytes=2 if grouped else 4,
        zero_points=not weights.get("symmetric", True),
        block=(int(block[1]), int(block[0])) if block else None,
        ignored=skipped,
        kv_cache_bits=kv_bits,
    )


def _bits(config: Mapping[str, Any]) -> int:
    bits = int(config.get("bits") or config.get("w_bit") or 4)
    if bits not in {2, 3, 4, 5, 6, 8}:
        raise ValueError(f"{bits} bits")
    return bits


def _group(config: Mapping[str, Any]) -> int | None:
    """Weights that share a scale; -1 means all of a row."""
    size = int(config.get("group_size") or config.get("q_group_size") or 128)
    return size if size > 0 else None


def _names(config: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    """The modules that stay as they are; lm_head is asked for elsewhere."""
    found = next((config[key] for key in keys if config.get(key)), None) or ()
    return tuple(str(name) for name in found)
