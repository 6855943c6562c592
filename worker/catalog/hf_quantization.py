"""
Reads quantization_config of a Hugging Face config.json, or the name of a method where there is none.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from worker.catalog.quantization import Quantization

# Kernels want experts' sizes in whole tiles: Marlin rounds inputs up to 256 and outputs to 128 (vLLM 0.32,
# fused_moe/oracle/mxfp4.py); a gpt-oss-20b then takes the 13.7 GiB that were measured.
_MXFP4 = Quantization("mxfp4", 4, 32, scale_bytes=1, pad_to=(256, 128), only=("experts",))
# Its checkpoints bring an FP8 KV cache with them, unless their config says otherwise.
_NVFP4 = Quantization("nvfp4", 4, 16, scale_bytes=1, kv_cache_bits=8)

_WHOLE_BITS = 16

# What a method means when only its name is known: the settings of most checkpoints of that kind.
_NAMED: tuple[tuple[str, Quantization], ...] = (
    (r"mxfp4", _MXFP4),
    (r"nvfp4|modelopt_fp4", _NVFP4),
    (r"awq", Quantization("awq", 4, 128, zero_points=True)),
    (r"gptq.*(int8|8bit|8-bit)|(int8|8bit|8-bit).*gptq", Quantization("gptq", 8, 128, zero_points=True)),
    (r"gptq", Quantization("gptq", 4, 128, zero_points=True, row_order=True)),
    (r"w4a16|int4|4bit|4-bit", Quantization("w4a16", 4, 128)),
    (r"w8a8|w8a16|int8|8bit|8-bit", Quantization("w8a8", 8, scale_bytes=4)),
    (r"fp8-?_?dynamic", Quantization("fp8", 8, scale_bytes=4)),
    (r"fp8|modelopt", Quantization("fp8", 8, scale_bytes=4, block=(128, 128))),
    (r"bitsandbytes|bnb", Quantization("bitsandbytes", 4, 64, scale_bytes=4)),
)


def read_quantization(config: Mapping[str, Any]) -> Quantization | str | None:
    """
    Read *config*, a quantization_config; None if it is empty, a text if it cannot be used.

    Sources: the config classes in vLLM 0.32, model_executor/layers/quantization/.
    """
    if not config:
        return None
    method = str(config.get("quant_method") or config.get("method") or "").lower().replace("-", "_")
    try:
        found = _read(method, config)
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError):
        return f"quantization_config of {method[:40] or 'no method'} is malformed"
    return found or f"the quantization method {method[:40] or '?'} is not known"


def named_quantization(text: str) -> Quantization | None:
    """Guess the scheme that *text*, a method's or a model's name, speaks of; None if it names none."""
    return next((scheme for pattern, scheme in _NAMED if re.search(pattern, text.lower())), None)


def _read(method: str, config: Mapping[str, Any]) -> Quantization | None:
    skipped = _names(config, "modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules", "exclude")
    match method:
        case "awq" | "awq_marlin":
            zeros = bool(config.get("zero_point", True))
            return Quantization("awq", _bits(config), _group(config), zero_points=zeros, ignored=skipped)
        case "gptq" | "gptq_marlin" | "gptqmodel":
            return _gptq(config, skipped)
        case "auto_round" | "autoround" | "intel/auto_round":
            return _auto_round(config, skipped)
        case "fp8" | "fbgemm_fp8" | "ptpc_fp8":
            block = _block(config.get("weight_block_size"))
            by_row = method != "fp8"
            return Quantization("fp8", 8, scale_bytes=4 if block or by_row else 0, block=block, ignored=skipped)
        case "mxfp4":
            return dataclasses.replace(_MXFP4, ignored=skipped)
        case "bitsandbytes":
            skipped = _names(config, "llm_int8_skip_modules")
            wide = bool(config.get("load_in_8bit"))
            return Quantization(method, 8 if wide else 4, None if wide else 64, scale_bytes=4, ignored=skipped)
        case "compressed_tensors":
            return _compressed_tensors(config, skipped)
    if method.startswith("modelopt") or "quant_algo" in config or "quantization" in config:
        return _modelopt(config, skipped)
    return None


def _gptq(config: Mapping[str, Any], skipped: tuple[str, ...]) -> Quantization:
    only = config.get("modules_in_block_to_quantize") or []
    scheme = Quantization(
        "gptq",
        _bits(config),
        _group(config),
        zero_points=True,  # kept in the file, and on the card, even where they are all equal
        row_order=True,
        lm_head=bool(config.get("lm_head")),
        only=tuple(str(name) for names in only for name in (names if isinstance(names, list) else [names])),
    )
    left, others = list(skipped), []
    for rule, settings in (config.get("dynamic") or {}).items():  # GPTQModel: by module, "-:" leaves it as it is
        pattern = f"re:{rule[2:] if rule[:2] in ('-:', '+:') else rule}"
        if rule.startswith("-:"):
            left.append(pattern)
        else:
            others.append(_otherwise(scheme, settings, pattern))
    return dataclasses.replace(scheme, ignored=tuple(left), others=tuple(others))


def _auto_round(config: Mapping[str, Any], skipped: tuple[str, ...]) -> Quantization | None:
    if "int" not in str(config.get("data_type") or "int"):
        return None
    scheme = Quantization("gptq", _bits(config), _group(config), zero_points=True, row_order=True)
    if "awq" in str(config.get("packing_format")):
        scheme = dataclasses.replace(scheme, method="awq", row_order=False)
    left, others = list(skipped), []
    for name, settings in (config.get("extra_config") or {}).items():
        pattern = name if re.fullmatch(r"[\w.]+", name) else f"re:{name}"
        if int(settings.get("bits") or scheme.bits) >= _WHOLE_BITS:
            left.append(pattern)
        else:
            others.append(_otherwise(scheme, settings, pattern))
    return dataclasses.replace(scheme, ignored=tuple(left), others=tuple(others))


def _otherwise(scheme: Quantization, settings: Mapping[str, Any], module: str) -> Quantization:
    """The same scheme with other bits or groups for one module."""
    bits = _bits({"bits": settings.get("bits") or scheme.bits})
    group = _group({"group_size": settings.get("group_size") or scheme.group or -1})
    return dataclasses.replace(scheme, bits=bits, group=group, only=(module,))


def _modelopt(config: Mapping[str, Any], skipped: tuple[str, ...]) -> Quantization | None:
    inner = config.get("quantization") or config
    skipped = tuple(map(_wildcard, skipped or _names(inner, "exclude_modules", "ignore")))
    kv_bits = int((inner.get("kv_cache_scheme") or {}).get("num_bits") or 0) or None
    if "FP8" in str(inner.get("kv_cache_quant_algo") or "").upper():
        kv_bits = 8
    layers = inner.get("quantized_layers")
    if isinstance(layers, Mapping) and layers:  # MIXED_PRECISION: each module says its own
        alike: defaultdict[Quantization | None, list[str]] = defaultdict(list)
        for name, layer in layers.items():
            alike[_modelopt_scheme(layer)].append(_wildcard(name))
        schemes = [dataclasses.replace(one, only=tuple(names)) for one, names in alike.items() if one is not None]
        if None in alike:
            return None
        return dataclasses.replace(schemes[0], ignored=skipped, kv_cache_bits=kv_bits, others=tuple(schemes[1:]))
    scheme = _modelopt_scheme({**inner, "quant_algo": inner.get("quant_algo") or config.get("quant_method")})
    return None if scheme is None else dataclasses.replace(scheme, ignored=skipped, kv_cache_bits=kv_bits)


def _modelopt_scheme(layer: Mapping[str, Any]) -> Quantization | None:
    algorithm = str(layer.get("quant_algo") or "").upper()
    if "NVFP4" in algorithm or algorithm.endswith("_FP4"):
        return _NVFP4
    if "MXFP8" in algorithm:
        return Quantization("mxfp8", 8, 32, scale_bytes=1)
    if algorithm == "FP8":  # one scale for the whole matrix
        return Quantization("fp8", 8, scale_bytes=0)
    if "FP8" in algorithm:
        return Quantization(
            "fp8", 8, scale_bytes=4, block=(128, 128) if "BLOCK" in algorithm or "PB" in algorithm else None
        )
    if "W4A16" in algorithm or "INT4" in algorithm:
        return Quantization("awq", 4, _group(layer))
    return None


def _wildcard(name: str) -> str:
    """Write a module's name with "*" as a regular expression; it takes what is inside the module too."""
    if "*" not in name:
        return name
    return "re:" + ".*".join(map(re.escape, name.split("*"))) + r"(?:\.|$)"


def _compressed_tensors(config: Mapping[str, Any], skipped: tuple[str, ...]) -> Quantization | None:
    kv_bits = int((config.get("kv_cache_scheme") or {}).get("num_bits") or 0) or None
    groups = [group for group in (config.get("config_groups") or {}).values() if group.get("weights")]
    schemes = []
    for group in groups:
        targets = tuple(str(target) for target in group.get("targets") or ())
        # "Linear" is every matrix; other targets are names.
        only = () if "Linear" in targets else targets
        schemes.append(dataclasses.replace(_compressed(group["weights"]), only=only))
    if not schemes:
        return None
    schemes.sort(key=lambda scheme: bool(scheme.only))
    return dataclasses.replace(schemes[0], ignored=skipped, kv_cache_bits=kv_bits, others=tuple(schemes[1:]))


def _compressed(weights: Mapping[str, Any]) -> Quantization:
    bits, kind = _bits({"bits": weights["num_bits"]}), str(weights.get("type") or "int")
    if (bits, kind) == (4, "float"):
        scheme = _MXFP4 if weights.get("group_size") == _MXFP4.group else _NVFP4
        return dataclasses.replace(scheme, pad_to=None, only=(), kv_cache_bits=None)
    block = weights.get("block_structure") if weights.get("strategy") == "block" else None
    grouped = weights.get("strategy") in {"group", "tensor_group"} or bool(weights.get("group_size"))
    return Quantization(
        f"{'fp' if kind == 'float' else 'int'}{bits}",
        bits,
        _group(weights) if grouped else None,
        scale_bytes=2 if grouped else 4,
        zero_points=not weights.get("symmetric", True),
        block=_block(block.split("x") if isinstance(block, str) else block),
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


def _block(sides: Any) -> tuple[int, int] | None:
    """Inputs x outputs that share a scale; configs write outputs first."""
    if not sides:
        return None
    outputs, inputs = (int(side) for side in sides)
    if min(outputs, inputs) <= 0:
        raise ValueError(f"blocks of {outputs} x {inputs}")
    return inputs, outputs


def _names(config: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    """The modules that stay as they are; lm_head is asked for elsewhere."""
    found = next((config[key] for key in keys if config.get(key)), None) or ()
    if isinstance(found, str | Mapping):
        raise TypeError(f"{keys[0]} is no list")
    return tuple(str(name) for name in found)
