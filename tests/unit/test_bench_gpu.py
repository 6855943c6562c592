"""
The page that a lent card leaves behind.
"""

from __future__ import annotations

from bench.gpu.measure import as_rows


def test_figures_of_one_thing_are_a_column() -> None:
    """Numbers with their thousands; what nobody has measured says so."""
    found = {"wake_s": 1.5, "freed_bytes": 10**9, "same_tokens": True, "bus_share": None}

    assert "\n".join(as_rows("Sleep", found)).splitlines() == [
        "", "## Sleep", "",
        "| figure | |", "| --- | --- |",
        "| `wake_s` | 1.5 |",
        "| `freed_bytes` | 1,000,000,000 |",
        "| `same_tokens` | True |",
        "| `bus_share` | not measured |",
    ]  # fmt: skip


def test_figures_of_several_things_are_a_row_each() -> None:
    """One for each size of model."""
    found = {"small": {"load_s": 2, "kv": None}, "large": {"load_s": 9, "kv": 7000}}

    assert "\n".join(as_rows("Memory", found)) == (
        "\n## Memory\n\n| | `load_s` | `kv` |\n| --- | --- | --- |\n| small | 2 | not measured |\n| large | 9 | 7,000 |"
    )
