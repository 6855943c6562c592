"""
Which constants hold for which version of vLLM, and what the name of a card tells.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.memory.constants import GIB, VLLM, card_bytes, constants_for, is_large, server_defaults


@pytest.mark.parametrize(
    ("version", "since"),
    [
        ("0.5.4", (0, 0)), ("0.7.2", (0, 0)), ("0.8.0", (0, 8)), ("0.16.0", (0, 8)), ("0.17.1", (0, 17)),
        ("0.19.0", (0, 18)), ("v0.22.2.dev45+g1b3919d8c", (0, 20)), ("0.32.0", (0, 32)), ("1.0.0", (0, 32)),
        (None, (0, 32)), ("main", (0, 32)),
    ],
)  # fmt: skip
def test_each_version_has_its_row(version: str | None, since: tuple[int, int]) -> None:
    """
    The last row that began before it; the newest where nobody says a version.
    """
    assert constants_for(version).since == since


def test_rows_are_in_order() -> None:
    """
    And the first holds from the beginning.
    """
    assert [row.since for row in VLLM] == sorted({row.since for row in VLLM})
    assert VLLM[0].since == (0, 0)


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("NVIDIA H100 80GB HBM3", 79.19), ("4x A100-40GB", 39.38), ("NVIDIA L40S", 44.4), ("Tesla T4 (Kaggle)", 14.56),
        ("2x RTX 5090", 31.36), ("NVIDIA GeForce RTX 3090", 23.6), ("12 GB card (12288 MiB)", 11.64),
        ("RTX 4060 8GB", 7.76), ("2x AMD MI50 32GB", 31.04), ("some card", None), ("", None), (None, None),
        ("RTX 5070 Ti + RTX 5090 D", None), ("L4 + L4", 22.03),
    ],
)  # fmt: skip
def test_a_name_tells_what_the_card_offers(name: str | None, gib: float | None) -> None:
    """
    What CUDA reports, less than on the box; None where it is not known, or where cards differ.
    """
    offered = card_bytes(name)

    assert (None if offered is None else offered / GIB) == (None if gib is None else pytest.approx(gib, abs=0.01))


@given(st.text() | st.from_regex(r"\d+ ?(MiB|GB)"))
def test_any_name_is_read(name: str) -> None:
    """
    No text raises, and no card has no bytes.
    """
    assert card_bytes(name) is None or card_bytes(name)


@pytest.mark.parametrize(
    ("gib", "name", "large", "seqs", "batched"),
    [(79.2, "NVIDIA H100 80GB HBM3", True, 1024, 8192), (79.2, "NVIDIA A100-SXM4-80GB", False, 256, 2048),
     (44.4, "L40S", False, 256, 2048), (141, None, True, 1024, 8192), (178.4, "NVIDIA B200", True, 1024, 16384),
     (None, None, False, 256, 2048)],
)  # fmt: skip
def test_large_cards_have_defaults_of_their_own(
    gib: float | None, name: str | None, seqs: int, batched: int, *, large: bool
) -> None:
    """
    From 70 GiB on, but not the A100, and once more from 160 GiB on (arg_utils.py).
    """
    total = None if gib is None else int(gib * GIB)

    assert is_large(total, name) == large
    assert server_defaults(total, name).max_num_seqs == seqs
    assert server_defaults(total, name).max_num_batched_tokens == batched
