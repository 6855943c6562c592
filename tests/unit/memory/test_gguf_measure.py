"""
GGUF models weighed by their headers, and what their layers keep, family by family.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.catalog.architecture import KeysAndValues, Latent, State
from worker.catalog.gguf_header import read_gguf_file
from worker.catalog.tensors import GgufHeader, Scalar, Tensor
from worker.demo.tiny_models import make_tiny_gguf
from worker.memory.gguf import GgufModel
from worker.memory.gguf_measure import measure_gguf


def header(
    kind: str, facts: Mapping[str, Any], tensors: tuple[tuple[str, int], ...] = (("token_embd.weight", 1),)
) -> GgufHeader:
    """A header of *kind* with the facts every family has, and tensors by name and bytes."""
    usual = {"block_count": 4, "embedding_length": 64, "attention.head_count": 8, "attention.head_count_kv": 2}
    metadata: dict[str, Scalar | tuple[Scalar, ...]] = {"general.architecture": kind}
    metadata |= {f"{kind}.{key}": value for key, value in {**usual, **facts}.items() if value is not None}
    return GgufHeader(
        metadata=metadata,
        lengths={},
        tensors=tuple(Tensor(name=name, dtype="F16", shape=(100, 64), nbytes=size) for name, size in tensors),
        file_bytes=0,
        data_bytes=0,
        complete=True,
    )


def keeps(kind: str, **facts: Any) -> GgufModel:
    """A model of which only the metadata matter."""
    return measure_gguf(header(kind, {key.replace("__", "."): value for key, value in facts.items()}))


FULL = KeysAndValues(kv_heads=2, head_dim=8, v_head_dim=8)
WINDOW = KeysAndValues(kv_heads=2, head_dim=8, v_head_dim=8, window=512)
SSM = {"ssm__conv_kernel": 4, "ssm__inner_size": 128, "ssm__state_size": 16, "ssm__group_count": 2}
STATE = State(conv_elements=3 * (128 + 2 * 2 * 16), ssm_elements=16 * 128, ssm_bytes=4)


class TestPieces:
    """Where llama.cpp puts each tensor."""

    def test_every_tensor_is_in_one_piece(self) -> None:
        """
        By name: what tokens are looked up in, the layers, what belongs to the first of them, and the output.
        """
        tensors = (
            ("token_embd.weight", 1), ("per_layer_token_embd.weight", 2), ("blk.0.attn_q.weight", 10),
            ("blk.3.ffn_up.weight", 70), ("blk.3.ffn_down.weight", 30), ("rope_freqs.weight", 4),
            ("output_norm.weight", 200), ("output.weight", 1000),
        )  # fmt: skip

        weights = measure_gguf(header("llama", {}, tensors)).weights

        assert weights is not None
        assert (weights.embedding, weights.layers, weights.output) == (3, (14, 0, 0, 100), 1200)
        assert (weights.head_shared, weights.largest_tensor, weights.total) == (0, 70, 1317)

    def test_a_head_that_is_the_embedding_is_copied(self) -> None:
        """
        Without output.weight the output has the table's bytes, and the whole is no larger for it.
        """
        weights = measure_gguf(header("qwen3", {}, (("token_embd.weight", 50), ("output_norm.weight", 3)))).weights

        assert weights is not None
        assert (weights.output, weights.head_shared, weights.total) == (53, 50, 53)

    def test_layers_for_predicting_several_tokens_are_not_loaded(self) -> None:
        """
        They count as layers, but have neither bytes nor a cache.
        """
        tensors = (("token_embd.weight", 1), ("blk.2.a.weight", 5), ("blk.3.a.weight", 7))

        model = measure_gguf(header("glm4moe", {"nextn_predict_layers": 1}, tensors))

        assert model.weights is not None
        assert model.weights.layers == (0, 0, 5, 0)
        assert model.caches == ((FULL,),) * 3 + ((),)

    def test_a_real_file_is_measured_to_the_byte(self, tmp_path: Path) -> None:
        """
        A tiny Llama as the package gguf writes it: the pieces are all there is.
        """
        make_tiny_gguf(path := tmp_path / "tiny.gguf")
        found = read_gguf_file(path)

        model = measure_gguf(found)

        assert model.weights is not None
        assert not model.unknown
        assert model.weights.total == sum(tensor.nbytes for tensor in found.tensors)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (keeps("llama"), [FULL] * 4),
        (keeps("llama", attention__head_count_kv=None), [KeysAndValues(kv_heads=8, head_dim=8, v_head_dim=8)] * 4),
        # Mistral's and Phi-3's files may name a window that llama.cpp does not use.
        (keeps("llama", attention__sliding_window=512), [FULL] * 4),
        (keeps("phi3", attention__sliding_window=512), [FULL] * 4),
        (keeps("gemma2", attention__sliding_window=512), [WINDOW, FULL, WINDOW, FULL]),
        (keeps("gpt-oss", attention__sliding_window=512), [WINDOW, FULL, WINDOW, FULL]),
        (keeps("cohere2", attention__sliding_window=512), [WINDOW, WINDOW, WINDOW, FULL]),
        (keeps("smallthinker", attention__sliding_window=512), [FULL, WINDOW, WINDOW, WINDOW]),
        (keeps("gemma3", attention__sliding_window=512), [WINDOW] * 4),  # the sixth would be full
        (keeps("gemma3"), [FULL] * 4),
        (
            keeps(
                "gemma4", attention__sliding_window=512, attention__sliding_window_pattern=(True, False, True, True),
                attention__head_count_kv=(2, 1, 2, 2), attention__key_length=16, attention__value_length=16,
                attention__key_length_swa=8, attention__value_length_swa=8, attention__shared_kv_layers=1,
            ),
            [WINDOW, KeysAndValues(kv_heads=1, head_dim=16, v_head_dim=16), WINDOW, None],
        ),
        (
            keeps("deepseek2", attention__head_count_kv=1, attention__key_length=576, attention__value_length=512,
                  attention__key_length_mla=192, attention__value_length_mla=128),
            [Latent(width=576)] * 4,
        ),
        (keeps("mamba2", attention__head_count=0, attention__head_count_kv=None, **SSM), [STATE] * 4),
        (keeps("qwen35", **SSM), [STATE, STATE, STATE, FULL]),
        (keeps("qwen3next", full_attention_interval=2, **SSM), [STATE, FULL, STATE, FULL]),
        (keeps("jamba", attention__head_count_kv=(0, 2, 0, 0), **SSM), [STATE, FULL, STATE, STATE]),
        (
            keeps("nemotron_h", attention__head_count_kv=(0, 0, 2, 0), feed_forward_length=(0, 9, 0, 9), **SSM),
            [STATE, None, FULL, None],
        ),
        (
            keeps("lfm2", attention__head_count_kv=(0, 2, 0, 2), shortconv__l_cache=3),
            [State(conv_elements=128, ssm_elements=0, ssm_bytes=4), FULL] * 2,
        ),
        (keeps("bert"), [None] * 4),
        (keeps("deci", attention__head_count_kv=(2, 0, 2, 0)), [FULL, None, FULL, None]),
    ],
)  # fmt: skip
def test_each_family_keeps_what_llama_cpp_gives_it(model: GgufModel, expected: list[Any]) -> None:
    """
    Windows by pattern, heads by layer, compressed keys, states of hybrids.
    """
    assert not model.unknown
    assert [kept[0] if kept else None for kept in model.caches] == expected


def test_falcon_h1_keeps_both() -> None:
    """
    Every layer has attention and a state.
    """
    assert keeps("falcon-h1", **SSM).caches == ((STATE, FULL),) * 4


@pytest.mark.parametrize(
    ("model", "unknown"),
    [
        (keeps("deepseek4"), "the cache of the architecture deepseek4"),
        (keeps("clip"), "the cache of the architecture clip"),
        (keeps("llama", block_count=None), "block_count"),
        (keeps("llama", attention__head_count=None, attention__head_count_kv=None), "attention.head_count"),
        (keeps("llama", attention__head_count_kv=(1, 2)), "attention.head_count_kv of each layer"),
        (keeps("llama", attention__head_count_kv=-1), "attention.head_count_kv=-1 makes no sense"),
        (keeps("gemma4", attention__sliding_window=512), "attention.sliding_window_pattern"),
        (keeps("gpt-oss"), "attention.sliding_window"),
        (keeps("qwen35"), "ssm.inner_size"),
        (measure_gguf(header("llama", {}, ())), "token_embd.weight"),
        (
            measure_gguf(header("llama", {}, (("token_embd.weight", 1), ("blk.9.a", 1)))),
            "a tensor of layer 9 in a model of 4",
        ),
    ],
)
def test_what_a_file_leaves_open_is_named(model: GgufModel, unknown: str) -> None:
    """
    No figure is made up for it.
    """
    assert unknown in model.unknown


SCALARS = st.one_of(st.integers(-(2**63), 2**64), st.floats(), st.booleans(), st.sampled_from(["", "x", "12"]))
KEYS = (
    "block_count", "embedding_length", "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.sliding_window", "attention.sliding_window_pattern", "ssm.inner_size", "nextn_predict_layers",
    "feed_forward_length", "attention.shared_kv_layers", "full_attention_interval", "expert_used_count",
)  # fmt: skip
KINDS = ("llama", "gemma3", "gemma4", "qwen35", "nemotron_h", "mamba", "falcon-h1", "lfm2", "rwkv7", "deepseek2")


@settings(deadline=1000)
@given(
    kind=st.sampled_from(KINDS),
    facts=st.dictionaries(st.sampled_from(KEYS), SCALARS | st.lists(SCALARS, max_size=6).map(tuple)),
    names=st.lists(st.sampled_from(["token_embd.weight", "blk.0.a", "blk.99999999999.a", "x", "blk..a", ""])),
)
def test_nonsense_is_answered(kind: str, facts: dict[str, Any], names: list[str]) -> None:
    """
    Any metadata of any type: an answer with a figure for each layer, or what is unknown.
    """
    facts = {key: value for key, value in facts.items() if key != "block_count" or value in range(200)}
    model = measure_gguf(header(kind, facts, tuple((name, 1) for name in names)))

    assert model.unknown or model.weights is not None
    assert model.weights is None or len(model.weights.layers) == model.layers
