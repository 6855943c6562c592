"""
What the scorer counts: the rules of a rules file, checked, as values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LengthStep:
    """Prompts longer than `over` characters get `add`."""

    over: int  # characters
    add: float  # 0 to 1


@dataclass(frozen=True, kw_only=True)
class Indicator:
    """
    Something in the prompt that makes a job harder; every condition that is set must hold.

    Phrases are matched as whole words, in any case, with whatever stands between the words.
    """

    name: str
    add: float  # 0 to 1
    any_of: tuple[str, ...] = ()  # at least one of these phrases
    all_of: tuple[str, ...] = ()  # each of these phrases
    tables_over: int | None = None  # more tables than this, HTML and Markdown together


@dataclass(frozen=True, kw_only=True)
class Rules:
    """All that `score_prompt` knows."""

    task_types: Mapping[str, float]  # task type in lower case -> where its jobs start, 0 to 1
    other: float  # for any other task type, and for none
    length: tuple[LengthStep, ...]  # only the highest step that applies counts
    indicators: tuple[Indicator, ...]
