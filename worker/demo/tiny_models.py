"""
Makes tiny GGUF models of random weights: they load and run as real ones do, and their text means nothing.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

# The only tokens such a model ever says; real words, so that its answers can be shown.
WORDS = (  # noqa: SIM905 - a hundred quoted words in a list read worse
    "the of and a to in is it that was for on are as with his they at be this from have or by one had not but what "
    "all were when we there can an your which their said if do will each about how up out them then she many some so "
    "these would other into has more her two like him see time could no make than first been its who now people my "
    "made over did down only way find use may water long little very after words called just where most know"
).split()
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"

_SPECIAL = ("<unk>", "<s>", "</s>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
_UNSAID = -1e3  # weight that keeps a token from ever being the answer


def make_tiny_gguf(
    path: Path,
    *,
    hidden: int = 64,
    head_dim: int = 16,
    layers: int = 2,
    seed: int = 0,
    context: int = 4096,
    chat_template: str = CHAT_TEMPLATE,
    pooling: gguf.PoolingType | None = None,
) -> Path:
    """
    Write a Llama of random weights to *path*; equal arguments give an equal file.

    Parameters
    ----------
    hidden
        Width, a multiple of 16; 64 and 2 layers make a file of about 300 KB.
    context
        Longest prompt and answer together, in tokens; a token is one character of the prompt.
    pooling
        How an embedding is made of the tokens' vectors; None = it is no model for that.
    """
    tokens, types = _vocabulary()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(2 * hidden)
    writer.add_head_count(hidden // head_dim)
    writer.add_head_count_kv(hidden // head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(rank) for rank in range(len(tokens))])
    writer.add_token_types(types)
    writer.add_bos_token_id(_SPECIAL.index("<s>"))
    writer.add_eos_token_id(_SPECIAL.index("</s>"))
    writer.add_chat_template(chat_template)
    if pooling is not None:
        writer.add_pooling_type(pooling)
    for name, tensor in _tensors(hidden, layers, len(tokens), seed).items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _vocabulary() -> tuple[list[str], list[gguf.TokenType]]:
    """Special tokens, every byte and printable character (to read any prompt), and the words (to say)."""
    parts = (
        (_SPECIAL[:1], gguf.TokenType.UNKNOWN),
        (_SPECIAL[1:], gguf.TokenType.CONTROL),
        ([f"<0x{byte:02X}>" for byte in range(256)], gguf.TokenType.BYTE),
        ([_SPACE, *(chr(code) for code in range(33, 127))], gguf.TokenType.NORMAL),
        ([f"{_SPACE}{word}" for word in WORDS], gguf.TokenType.NORMAL),
    )
    tokens = [token for found, _ in parts for token in found]
    return tokens, [kind for found, kind in parts for _ in found]


def _tensors(hidden: int, layers: int, vocabulary: int, seed: int) -> dict[str, npt.NDArray[np.generic]]:
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> npt.NDArray[np.float16]:
        return (random.standard_normal((rows, columns)) * 0.05).astype(np.float16)

    embedding, output = matrix(vocabulary, hidden), matrix(vocabulary, hidden)
    # The first channel is the same for every token, and so tells the output layer which tokens not to say.
    embedding[:, 0] = 1
    output[:, 0] = 0
    output[: vocabulary - len(WORDS), 0] = _UNSAID
    tensors: dict[str, npt.NDArray[np.generic]] = {
        "token_embd": embedding,
        "output": output,
        "output_norm": np.ones(hidden, np.float32),
    }
    for layer in range(layers):
        block = f"blk.{layer}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensors[block + name] = matrix(hidden, hidden)
        for name in ("ffn_gate", "ffn_up"):
            tensors[block + name] = matrix(2 * hidden, hidden)
        tensors[block + "ffn_down"] = matrix(hidden, 2 * hidden)
        for name in ("attn_norm", "ffn_norm"):
            tensors[block + name] = np.ones(hidden, np.float32)
    return tensors
