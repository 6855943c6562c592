"""
Models that share a card: never over a budget, no layer and no doubled length left over; the planned case of 6 GB.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from worker.catalog.architecture import KeysAndValues
from worker.memory.estimate_llamacpp import LlamaCppEstimate, LlamaCppOptions, estimate_llamacpp
from worker.memory.gguf import GgufModel, GgufWeights
from worker.memory.share import NoShare, Share, Wish, share_card

MIB = 2**20
GIB = 2**30


def model(layers: tuple[int, ...], **facts: Any) -> GgufModel:
    """A model of layers of so many MiB, each with 4 KiB of cache for a token."""
    usual: dict[str, Any] = {
        "kind": "llama", "hidden_size": 64, "vocab_size": 1000, "heads": 8, "query_width": 64, "feed_forward": 128,
        "weights": GgufWeights(
            embedding=50 * MIB, layers=tuple(size * MIB for size in layers), output=40 * MIB,
            largest_tensor=max(layers) * MIB // 2,
        ),
        "caches": ((KeysAndValues(kv_heads=8, head_dim=128, v_head_dim=128),),) * len(layers),
    }  # fmt: skip
    return GgufModel(**{**usual, **facts})


def wish(model_id: str, model: GgufModel, shortest: int = 1024, wished: int = 8192) -> Wish:
    """A wish for one slot."""
    return Wish(model_id=model_id, model=model, options=LlamaCppOptions(max_model_len=wished), shortest_len=shortest)


def estimate(wish: Wish, length: int, n_gpu_layers: int | None) -> LlamaCppEstimate:
    """The estimate of a known model at that length."""
    found = estimate_llamacpp(wish.model, replace(wish.options, max_model_len=length), n_gpu_layers=n_gpu_layers)
    assert isinstance(found, LlamaCppEstimate)
    return found


def fits(estimates: list[LlamaCppEstimate], card: int, host: int | None) -> bool:
    """Do they fit together?"""
    on_card, on_host = sum(e.card for e in estimates), sum(e.host for e in estimates)
    return on_card <= card and (host is None or on_host <= host)


SMALL, LARGE, SINGLE = model((60,) * 3), model((90, 120, 120, 90, 30)), model((200,))
GROUPS = [
    (wish("a", SMALL), wish("b", LARGE)),
    (wish("b", LARGE, 2000, 9000), wish("a", SMALL)),
    (wish("c", SINGLE, 256, 256), wish("a", SMALL, 500, 100_000), wish("b", LARGE)),
    (wish("a", SMALL), wish("b", SMALL), wish("c", SINGLE), wish("d", LARGE)),
    (wish("a", SMALL, 8192, 1024),),
]
WORLDS = list(product(GROUPS, range(0, 3200, 100), (None, 0, 200, 500, 900, 2000)))


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: "".join(wish.model_id for wish in group))
class TestEverySmallWorld:
    """Cards of 0 to 3.1 GiB, hosts of 0 to 2, one to four models."""

    def test_no_budget_is_exceeded_and_no_layer_or_doubling_is_left(self, group: tuple[Wish, ...]) -> None:
        """
        What is granted fits together. Any more layers of any model, at its shortest length or at the one it has,
        would be too much; so would any doubled length.
        """
        for card, host in [(card, host) for known, card, host in WORLDS if known is group]:
            answers = share_card(group, card_bytes=card * MIB, host_bytes=None if host is None else host * MIB)
            granted = [(w, a) for w, a in zip(group, answers, strict=True) if isinstance(a, Share)]
            budget = (card * MIB, None if host is None else host * MIB)
            assert fits([share.estimate for _, share in granted], *budget)

            for index, (wish, share) in enumerate(granted):
                others = [other.estimate for n, (_, other) in enumerate(granted) if n != index]
                layers = share.estimate.n_gpu_layers
                for more in range((layers or 0) + 1, wish.model.layers + 2):
                    assert not fits([*others, estimate(wish, share.max_model_len, more)], *budget)
                if share.max_model_len < wish.options.max_model_len:
                    longer = min(2 * share.max_model_len, wish.options.max_model_len)
                    assert not fits([*others, estimate(wish, longer, layers)], *budget)
                assert share.estimate == estimate(wish, share.max_model_len, layers)
                assert min(wish.shortest_len, wish.options.max_model_len) <= share.max_model_len
                assert share.max_model_len <= wish.options.max_model_len

    def test_an_earlier_model_never_suffers_from_a_later_one(self, group: tuple[Wish, ...]) -> None:
        """
        Without the last model the others have the same number of layers on the card, or are refused as before.
        """
        for card, host in [(card, host) for known, card, host in WORLDS if known is group]:
            host_bytes = None if host is None else host * MIB
            answers = share_card(group, card_bytes=card * MIB, host_bytes=host_bytes)
            without = share_card(group[:-1], card_bytes=card * MIB, host_bytes=host_bytes)

            assert [layers(answer) for answer in answers[:-1]] == [layers(answer) for answer in without]

    def test_only_the_host_refuses(self, group: tuple[Wish, ...]) -> None:
        """
        With RAM enough every model is ready, if need be without the card; a refusal names a term of the host.
        """
        for card, host in [(card, host) for known, card, host in WORLDS if known is group]:
            answers = share_card(group, card_bytes=card * MIB, host_bytes=None if host is None else host * MIB)
            refused = [answer for answer in answers if isinstance(answer, NoShare)]

            assert not refused or host is not None
            assert all(answer.term is not None and answer.term.endswith("_host") for answer in refused)


def layers(answer: Share | NoShare) -> object:
    """Layers on the card, or why there are none."""
    return answer.estimate.n_gpu_layers if isinstance(answer, Share) else answer.term


def qwen(layers: int, hidden: int, kv_heads: int, sizes: tuple[float, float, float], *, tied: bool) -> GgufModel:
    """A Qwen2.5 in Q4_K_M: MiB of embedding, of a layer and of the output."""
    embedding, layer, output = (int(size * MIB) for size in sizes)
    return GgufModel(
        kind="qwen2", hidden_size=hidden, vocab_size=152_000, heads=hidden // 128, query_width=hidden,
        feed_forward=5 * hidden, caches=((KeysAndValues(kv_heads=kv_heads, head_dim=128, v_head_dim=128),),) * layers,
        weights=GgufWeights(
            embedding=embedding, layers=(layer,) * layers, output=output, head_shared=embedding if tied else 0,
            largest_tensor=layer // 3,
        ),
    )  # fmt: skip


QWEN_3B = qwen(36, 2048, 2, (243.4, 44.2, 243.4), tied=True)
QWEN_7B = qwen(28, 3584, 4, (292.4, 133.6, 426.4), tied=False)


class TestThePlannedCase:
    """Qwen2.5 3B and 7B in 4 bits on a card of 6 GB, of which 5.6 GiB are free, and 16 GiB of RAM."""

    def test_the_3b_is_on_the_card_and_the_7b_as_far_as_it_goes(self) -> None:
        """
        All of the first, part of the second, and for both at least the 4,096 tokens that are asked for.
        """
        wishes = (wish("3b", QWEN_3B, 4096, 32768), wish("7b", QWEN_7B, 4096, 32768))
        small, large = share_card(wishes, card_bytes=int(5.6 * GIB), host_bytes=16 * GIB)

        assert isinstance(small, Share)
        assert isinstance(large, Share)
        assert small.estimate.n_gpu_layers == 37
        assert 10 <= (large.estimate.n_gpu_layers or 0) < 29
        assert min(small.max_model_len, large.max_model_len) >= 4096
        assert small.reason.startswith("wholly on the card; ")
        assert "of 29 layers on the card; " in large.reason
        assert "MiB more of the card" in large.reason

    def test_the_order_is_the_preference(self) -> None:
        """
        With the 7B first it gets more layers than it had as the second.
        """
        wishes = (wish("7b", QWEN_7B, 4096, 32768), wish("3b", QWEN_3B, 4096, 32768))
        large, small = share_card(wishes, card_bytes=int(5.6 * GIB), host_bytes=16 * GIB)

        assert layers(large) == 29
        assert layers(small) != 37

    def test_too_little_ram_refuses_the_second_and_keeps_the_first(self) -> None:
        """
        The reason has the figures.
        """
        wishes = (wish("3b", QWEN_3B, 4096, 8192), wish("7b", QWEN_7B, 4096, 8192))
        small, large = share_card(wishes, card_bytes=3 * GIB, host_bytes=2 * GIB)

        assert isinstance(small, Share)
        assert small.reason == "wholly on the card; 8,192 tokens: as long as was wished"
        assert isinstance(large, NoShare)
        assert large.term == "weights_host"
        assert "of RAM, where 1.7" in large.reason

    def test_what_is_unknown_takes_nothing_from_the_others(self) -> None:
        """
        The 7B is planned as if the other had not asked.
        """
        strange = replace(QWEN_3B, unknown=("the cache of the architecture x",))
        refused, large = share_card((wish("x", strange), wish("7b", QWEN_7B)), card_bytes=6 * GIB)

        assert refused == NoShare(
            model_id="x", term=None, reason="cannot be estimated without the cache of the architecture x"
        )
        assert (large,) == share_card((wish("7b", QWEN_7B),), card_bytes=6 * GIB)
