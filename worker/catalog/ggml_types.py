"""
How ggml stores numbers: the types of GGUF tensors and of llama.cpp's KV cache, and their bytes.
"""

from __future__ import annotations

# The number in a file -> name, elements in a block, bytes of a block (the package gguf, GGML_QUANT_SIZES).
GGML_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 22: ("IQ2_S", 256, 82),
    18: ("IQ3_XXS", 256, 98), 21: ("IQ3_S", 256, 110),
    19: ("IQ1_S", 256, 50), 29: ("IQ1_M", 256, 56), 20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip

_BLOCKS = {name: (elements, size) for name, elements, size in GGML_TYPES.values()}


def is_ggml_type(name: str) -> bool:
    """Is *name* (upper case) a type of ggml's?"""
    return name in _BLOCKS


def block_elements(name: str) -> int:
    """Elements that are packed together; a row has a whole number of such blocks."""
    return _BLOCKS[name][0]


def row_bytes(name: str, elements: int) -> int:
    """Bytes of a row of that many elements, its last block whole."""
    in_block, size = _BLOCKS[name]
    return -(-elements // in_block) * size
