"""
llama.cpp's buffers: as public logs have them, piece by piece on card and host, and as llama.cpp itself sets them aside.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from worker.catalog.architecture import Cache, KeysAndValues, Latent, State
from worker.memory.estimate import Unknown
from worker.memory.estimate_llamacpp import LlamaCppEstimate, LlamaCppOptions, estimate_llamacpp
from worker.memory.gguf import GgufModel, GgufWeights

MIB = 2**20


def model(*caches: Cache, layers: int = 4, **facts: Any) -> GgufModel:
    """A model of layers that repeat *caches*; the bytes of its pieces tell them apart."""
    usual: dict[str, Any] = {
        "kind": "llama", "hidden_size": 64, "vocab_size": 1000, "heads": 8, "query_width": 64, "feed_forward": 128,
        "weights": GgufWeights(
            embedding=7 * MIB, layers=tuple(2**n * MIB for n in range(layers)), output=1000 * MIB,
            largest_tensor=2 * MIB,
        ),
        "caches": tuple((caches[n % len(caches)],) for n in range(layers)) if caches else ((),) * layers,
    }  # fmt: skip
    return GgufModel(**{**usual, **facts})


def estimate(model: GgufModel, n_gpu_layers: int | None = None, **options: Any) -> LlamaCppEstimate:
    """The estimate at 4,096 tokens, of a model that is known."""
    found = estimate_llamacpp(model, LlamaCppOptions(**{"max_model_len": 4096, **options}), n_gpu_layers=n_gpu_layers)
    assert isinstance(found, LlamaCppEstimate)
    return found


def attention(kv_heads: int, size: int, window: int | None = None) -> KeysAndValues:
    """Keys and values of heads of one size."""
    return KeysAndValues(kv_heads=kv_heads, head_dim=size, v_head_dim=size, window=window)


GEMMA4 = model(*[attention(8, 256, 1024)] * 5, attention(2, 512), layers=30)
QWEN35_9B = model(
    *[State(conv_elements=3 * 8192, ssm_elements=128 * 4096)] * 3, attention(4, 256), layers=32,
    hidden_size=4096, vocab_size=248320, heads=16, query_width=4096, feed_forward=12288,
)  # fmt: skip


# Sources of the figures: https://github.com/ghghang2/v1.6, /lota09/local_LLM_llama, /Jantoniio3/TFG, /bgpr/armage
# (llama_server.log, ollama.log), https://github.com/ollama/ollama/issues/6160 and ggml-org/llama.cpp/issues/7450.
@pytest.mark.parametrize(
    ("found", "kv", "state"),
    [
        (estimate(GEMMA4, max_model_len=16384, slots=2), 1240, 0),
        (estimate(GEMMA4, max_model_len=262144), 5420, 0),
        (estimate(QWEN35_9B, max_model_len=65536), 2048, 50.25),
        (estimate(QWEN35_9B, max_model_len=131072, key_type="q8_0", value_type="q8_0"), 2176, 50.25),
        (
            estimate(model(attention(8, 128), layers=56), max_model_len=49152, key_type="Q8_0", value_type="Q8_0"),
            5712,
            0,
        ),
        (estimate(model(attention(8, 128), layers=80), max_model_len=32768), 10240, 0),
        (estimate(model(attention(8, 64), layers=16), max_model_len=32768, slots=4), 4096, 0),
        (estimate(model(attention(8, 128), layers=32), max_model_len=32000), 4000, 0),
    ],
)
def test_cache_and_state_are_those_that_were_logged(found: LlamaCppEstimate, kv: float, state: float) -> None:
    """
    To the byte: grouped heads, windows, hybrids, 16 and 8.5 bits, slots.
    """
    assert found.kv_host / MIB == kv
    assert found.state_host / MIB == state


def test_slots_in_one_pool_share_its_cells() -> None:
    """
    Qwen3.5-35B-A3B with 4 x 1,728 tokens: 135 MiB in one pool; apart each would be rounded up to 1,792.
    """
    hybrid = model(*[State(conv_elements=3 * 8192, ssm_elements=128 * 4096)] * 3, attention(2, 256), layers=40)

    one = estimate(hybrid, max_model_len=1728, slots=4, unified=True)
    four = estimate(hybrid, max_model_len=1728, slots=4)

    assert (one.kv_host / MIB, four.kv_host / MIB) == (135, 140)
    assert one.state_host == four.state_host == 251.25 * MIB


QWEN3_4B = model(
    attention(8, 128), layers=36, hidden_size=2560, vocab_size=151936, heads=32, query_width=4096, feed_forward=9728,
    weights=GgufWeights(embedding=1, layers=(1,) * 36, output=151936 * 2560 // 256 * 210, largest_tensor=1),
)  # fmt: skip
CODESTRAL = model(
    attention(8, 128), layers=56, hidden_size=6144, vocab_size=32768, heads=48, query_width=6144, feed_forward=16384
)
LLAMA_70B = model(
    attention(8, 128), layers=80, hidden_size=8192, vocab_size=128256, heads=64, query_width=8192, feed_forward=28672
)


@pytest.mark.parametrize(
    ("found", "card", "within"),
    [
        (estimate(QWEN35_9B, 33, max_model_len=65536, flash_attention=False), 2220.01, 0.001),
        (estimate(QWEN35_9B, 33, max_model_len=65536), 493.0, 0.001),
        (estimate(QWEN35_9B, 33, max_model_len=16384, ubatch=2048), 1972.0, 0.001),
        (estimate(QWEN3_4B, 0, flash_attention=False), 606.03, 0.001),  # the output is copied for a batch
        (estimate(CODESTRAL, 57, old_reserve=False), 136.01, 0.001),
        (estimate(LLAMA_70B, 64, max_model_len=32768, flash_attention=False), 4400.0, 0.01),
    ],
)
def test_the_compute_buffer_is_the_one_that_was_logged(found: LlamaCppEstimate, card: float, within: float) -> None:
    """
    Ruled by the logits, by attention without flash attention, by the MLP, or by what is copied for a batch.
    """
    assert found.compute_card / MIB == pytest.approx(card, rel=within)


@pytest.mark.parametrize("n_gpu_layers", [None, *range(7)])
def test_each_layer_is_where_llama_cpp_puts_it(n_gpu_layers: int | None) -> None:
    """
    The output first, then layers from the last; cache and state with their layer; the embedding never.
    """
    mixed = model(attention(2, 8), State(conv_elements=5, ssm_elements=6))
    found = estimate(mixed, n_gpu_layers)
    moved = max(0, min(n_gpu_layers or 0, 5) - 1)  # layers on the card, beside the output
    card = sum((1, 2, 4, 8)[4 - moved :]) + (1000 if n_gpu_layers else 0)

    assert (found.weights_card / MIB, found.weights_host / MIB) == (card, 1022 - card)
    assert found.kv_card == (moved // 2) * 4096 * 2 * 2 * 8 * 2
    assert found.state_card == (-(-moved // 2)) * 4 * 11
    assert found.kv_card + found.kv_host == 2 * 4096 * 2 * 2 * 8 * 2
    assert (found.cuda_context == 0) == (n_gpu_layers is None)
    assert (found.compute_card == 0) == (n_gpu_layers is None)


def test_a_layer_on_the_host_is_copied_for_a_batch() -> None:
    """
    While one is left there: its largest matrix, or its keys and values, beside what the MLP or attention needs.
    """
    by_mlp, larger = (
        model(weights=GgufWeights(embedding=1, layers=(1,) * 4, output=1, largest_tensor=size * MIB))
        for size in (500, 700)
    )
    by_attention = model(attention(8, 128))

    assert estimate(larger, 4).compute_card - estimate(by_mlp, 4).compute_card == 200 * MIB
    assert estimate(larger, 5).compute_card == estimate(by_mlp, 5).compute_card
    copied = estimate(by_attention, 4).compute_card - estimate(by_attention, 5).compute_card
    assert copied == 4096 * 2 * 8 * 128 * 2


def test_a_tied_output_is_a_copy_on_the_card_and_none_on_the_host() -> None:
    """
    On the host one table serves both ends.
    """
    tied = model(weights=GgufWeights(embedding=50, layers=(1,) * 4, output=53, head_shared=50, largest_tensor=1))

    assert (estimate(tied, None).weights_card, estimate(tied, None).weights_host) == (0, 57)
    assert (estimate(tied, 5).weights_card, estimate(tied, 5).weights_host) == (57, 50)


def test_a_compressed_cache_has_keys_alone() -> None:
    """
    DeepSeek-V2: 576 numbers for a token, in the type of the keys.
    """
    assert estimate(model(Latent(width=576)), key_type="F16", value_type="F32").kv_host == 4 * 4096 * 576 * 2


def test_what_is_unknown_gives_no_estimate() -> None:
    """
    Of the model, of the cache's type, of the heads where attention's scores need them.
    """
    options = LlamaCppOptions(max_model_len=1)
    known = model(attention(1, 8))

    def unknown(model: GgufModel, options: LlamaCppOptions = options) -> object:
        return estimate_llamacpp(model, options, n_gpu_layers=None)

    assert unknown(replace(known, unknown=("this",))) == Unknown(missing=("this",))
    assert unknown(replace(known, weights=None)) == Unknown(missing=("weights",))
    assert unknown(known, replace(options, key_type="fp8")) == Unknown(missing=("the KV cache type fp8",))
    headless = replace(known, heads=0)
    assert unknown(headless, replace(options, flash_attention=False)) == Unknown(missing=("attention heads",))
    assert isinstance(unknown(headless), LlamaCppEstimate)
