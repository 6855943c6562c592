"""
How hard is this job? A first scorer: task type, length, and what stands in the prompt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from worker.routing.rules import Indicator, Rules

# Characters looked at for indicators, from each end of the prompt: instructions stand at the beginning or at
# the end, and a prompt of 10 MB must cost milliseconds. The length steps count every character.
SCAN_CHARS = 50_000

_WORD = re.compile(r"\w+")
_HTML_TABLE = re.compile(r"<table\b", re.IGNORECASE)
_RULED_LINE = re.compile(r"^[ \t\r|:-]++$", re.MULTILINE)  # possessive: one pass over any line


@dataclass(frozen=True, kw_only=True)
class Signal:
    """One thing that made the job easier or harder."""

    name: str
    weight: float


@dataclass(frozen=True, kw_only=True)
class Complexity:
    """How hard a job is taken to be, and the signals this comes from."""

    value: float  # 0 to 1: the sum of the weights, at most 1, to 4 digits
    signals: tuple[Signal, ...]


def score_prompt(text: str, *, task_type: str | None, rules: Rules) -> Complexity:
    """
    Score the whole prompt *text* of a job whose producer calls it *task_type* (None = does not say).

    The sum of:

    1. Where jobs of this task type start.
    2. The highest length step that the prompt exceeds.
    3. Every indicator that is found in the first and the last `SCAN_CHARS` characters.
    """
    # (1) Task type.
    known = (task_type or "").strip().lower()
    start = rules.task_types.get(known)
    signals = [
        Signal(name=f"task type {'other' if start is None else known}", weight=rules.other if start is None else start)
    ]

    # (2) Length.
    if passed := [step for step in rules.length if len(text) > step.over]:
        step = max(passed, key=lambda step: step.over)
        signals.append(Signal(name=f"over {step.over:,} characters", weight=step.add))

    # (3) Indicators.
    scanned = text if len(text) <= 2 * SCAN_CHARS else f"{text[:SCAN_CHARS]}\n{text[-SCAN_CHARS:]}"
    words = as_words(scanned)
    tables = _count_tables(scanned)
    signals += [Signal(name=found.name, weight=found.add) for found in rules.indicators if _holds(found, words, tables)]

    return Complexity(value=min(1.0, round(sum(signal.weight for signal in signals), 4)), signals=tuple(signals))


def as_words(text: str) -> str:
    """Give the words of *text*, lower case, one space around each: a phrase in it is a phrase of whole words."""
    return f" {' '.join(_WORD.findall(text.lower()))} "


def _holds(indicator: Indicator, words: str, tables: int) -> bool:
    return (
        (not indicator.any_of or any(as_words(phrase) in words for phrase in indicator.any_of))
        and all(as_words(phrase) in words for phrase in indicator.all_of)
        and (indicator.tables_over is None or tables > indicator.tables_over)
    )


def _count_tables(text: str) -> int:
    """Count `<table>` tags and the |---|---| lines under the heads of Markdown tables."""
    ruled = _RULED_LINE.findall(text)
    return len(_HTML_TABLE.findall(text)) + sum("|" in line and "---" in line for line in ruled)
