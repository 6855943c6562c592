"""
A tiny Llama in Hugging Face's form, written without torch: config.json, tokenizer.json, model.safetensors.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

from worker.demo.tiny_models import CHAT_TEMPLATE

SPECIAL = ("<s>", "</s>")
HEAD_DIM = 32  # the smallest that vLLM's attention on the CPU takes


def make_tiny_hf(folder: Path, *, hidden: int = 128, layers: int = 2, seed: int = 0, context: int = 2048) -> Path:
    """
    Write a Llama of random bfloat16 weights into *folder*; equal arguments give equal files.

    A token is one byte of the prompt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = byte_vocabulary()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(vocabulary),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": hidden // HEAD_DIM,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(vocabulary)))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "model_max_length": context,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    write_safetensors(folder / "model.safetensors", tensors(hidden, layers, len(vocabulary), seed))
    return folder


def byte_vocabulary() -> dict[str, int]:
    """The special tokens and GPT-2's 256 stand-ins for bytes: printable ones as they are, the others from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_ins = [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))]
    return {token: number for number, token in enumerate([*SPECIAL, *stand_ins])}


def tokenizer(vocabulary: dict[str, int]) -> dict[str, object]:
    """Byte-level BPE without a single merge."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": token, **flags} for number, token in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }


def tensors(hidden: int, layers: int, vocabulary: int, seed: int) -> dict[str, np.ndarray]:
    """Random weights under Llama's names, float32."""
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (random.standard_normal((rows, columns)) * 0.05).astype(np.float32)

    ones = np.ones(hidden, np.float32)
    found = {
        "model.embed_tokens.weight": matrix(vocabulary, hidden),
        "lm_head.weight": matrix(vocabulary, hidden),
        "model.norm.weight": ones,
    }
    for layer in range(layers):
        block = f"model.layers.{layer}."
        for name in ("q", "k", "v", "o"):
            found[f"{block}self_attn.{name}_proj.weight"] = matrix(hidden, hidden)
        found[f"{block}mlp.gate_proj.weight"] = matrix(2 * hidden, hidden)
        found[f"{block}mlp.up_proj.weight"] = matrix(2 * hidden, hidden)
        found[f"{block}mlp.down_proj.weight"] = matrix(hidden, 2 * hidden)
        found[f"{block}input_layernorm.weight"] = ones
        found[f"{block}post_attention_layernorm.weight"] = ones
    return found


def write_safetensors(path: Path, weights: dict[str, np.ndarray]) -> None:
    """Write float32 tensors as bfloat16: the upper half of each number."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    chunks: list[bytes] = []
    end = 0
    for name, tensor in weights.items():
        chunk = (np.ascontiguousarray(tensor).view(np.uint32) >> 16).astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + len(chunk)]}
        chunks.append(chunk)
        end += len(chunk)
    text = json.dumps(header).encode()
    path.write_bytes(b"".join((struct.pack("<Q", len(text)), text, *chunks)))
