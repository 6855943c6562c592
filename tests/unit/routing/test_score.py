"""
The scorer: every signal by itself, their sums, and what holds for any text.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.routing.rules_file import load_rules
from worker.routing.score import SCAN_CHARS, score_prompt

RULES = load_rules()
TABLES = "| a | b |\n|---|---|\n| 1 | 2 |\n\n"
ANY_TEXT = st.text(st.characters(), max_size=2000)  # surrogates included: JSON can carry them


@pytest.mark.parametrize(
    ("task_type", "expected"),
    [
        ("simple_extraction", 0.1),
        ("standard_parsing", 0.3),
        ("salary_analysis", 0.5),
        ("complex_reasoning", 0.7),
        ("multi_step_analysis", 0.8),
        ("edge_case_handling", 0.9),
        ("other", 0.4),
        ("poetry", 0.4),
        ("", 0.4),
        (None, 0.4),
        (" Simple_Extraction ", 0.1),
    ],
)
def test_the_task_type_sets_the_start(task_type: str | None, expected: float) -> None:
    """
    A short plain prompt scores what its task type says; unknown and absent types are "other".
    """
    assert score_prompt("Hello.", task_type=task_type, rules=RULES).value == expected


@pytest.mark.parametrize(
    ("length", "expected"),
    [(5_000, 0.4), (5_001, 0.5), (20_000, 0.5), (20_001, 0.6), (50_000, 0.6), (50_001, 0.7), (200_000, 0.7)],
)
def test_only_the_highest_length_step_counts(length: int, expected: float) -> None:
    """
    0.4 for no task type, plus 0.1, 0.2 or 0.3: not their sum.
    """
    assert score_prompt("x" * length, task_type=None, rules=RULES).value == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Salary and equity.", 0.3),  # 0.1 + 0.2
        ("STOCK\n  OPTIONS after a year", 0.3),
        ("stock-options", 0.3),
        ("Equity, stock options, RSUs", 0.3),  # one indicator, counted once
        ("inequity and equityless", 0.1),  # parts of words are no words
        ("stock of options", 0.1),
        ("remote", 0.1),
        ("Remote on Mondays, hybrid otherwise", 0.2),  # 0.1 + 0.1
        ("remote hybrid equity", 0.4),  # 0.1 + 0.1 + 0.2
        (TABLES * 2, 0.1),
        (TABLES * 3, 0.3),  # 0.1 + 0.2
        ("<table><tr></table>" * 2 + TABLES, 0.3),
        ("<TABLE class='x'>" * 3, 0.3),
        ("<tablet>" * 3, 0.1),
        ("---\n" * 3, 0.1),  # rules between paragraphs
    ],
)
def test_indicators_are_whole_words_and_tables(text: str, expected: float) -> None:
    """
    Each indicator adds its weight once, on top of 0.1 for a simple extraction.
    """
    assert score_prompt(text, task_type="simple_extraction", rules=RULES).value == expected


def test_the_score_is_capped_and_names_its_signals() -> None:
    """
    0.9 + 0.2 + 0.1 is 1, and every signal is told with its weight.
    """
    complexity = score_prompt("equity, remote or hybrid", task_type="edge_case_handling", rules=RULES)

    assert complexity.value == 1.0
    assert [(signal.name, signal.weight) for signal in complexity.signals] == [
        ("task type edge_case_handling", 0.9),
        ("equity", 0.2),
        ("remote and hybrid", 0.1),
    ]


def test_both_ends_of_a_huge_prompt_are_read_and_its_middle_is_not() -> None:
    """
    Indicators are looked for where instructions stand, so that 10 MB cost no more than 100 KB.
    """
    filler = " x" * SCAN_CHARS

    def score(text: str) -> float:
        return score_prompt(text, task_type=None, rules=RULES).value

    assert score(f"equity {filler}{filler}") == 0.9  # 0.4 + 0.3 + 0.2
    assert score(f"{filler}{filler} equity") == 0.9
    assert score(f"{filler} equity {filler}") == 0.7  # 0.4 + 0.3


@given(text=ANY_TEXT, task_type=st.none() | st.text(max_size=20))
def test_any_text_has_one_score_between_0_and_1(text: str, task_type: str | None) -> None:
    """
    No text raises, and equal inputs give equal answers.
    """
    complexity = score_prompt(text, task_type=task_type, rules=RULES)

    assert 0 <= complexity.value <= 1
    assert complexity == score_prompt(text, task_type=task_type, rules=RULES)


@given(text=ANY_TEXT, shorter=st.integers(0, 60_000), longer=st.integers(0, 60_000))
def test_more_plain_text_never_lowers_the_score(text: str, shorter: int, longer: int) -> None:
    """
    Filler without any indicator can only lift a prompt over a length step.
    """
    shorter, longer = sorted((shorter, longer))

    def score(filler: int) -> float:
        return score_prompt(text + " " + "y" * filler, task_type=None, rules=RULES).value

    assert score(shorter) <= score(longer)
