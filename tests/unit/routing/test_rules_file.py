"""
The rules file: what is read, and how a broken one is refused.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import BadSetting
from worker.routing.rules import Indicator, LengthStep, Rules
from worker.routing.rules_file import load_rules

VALID = """
[task_types]
Translate = 0.2
other = 0.5
[[length]]
over = 10
add = 0.3
[[indicators]]
name = "law"
any_of = ["contract law"]
all_of = ["court"]
tables_over = 0
add = 0.4
"""


def test_a_file_of_ones_own_replaces_the_shipped_rules(tmp_path: Path) -> None:
    """
    Every entry arrives; task types are compared in lower case.
    """
    path = tmp_path / "rules.toml"
    path.write_text(VALID)

    assert load_rules(path) == Rules(
        task_types={"translate": 0.2, "other": 0.5},
        other=0.5,
        length=(LengthStep(over=10, add=0.3),),
        indicators=(Indicator(name="law", add=0.4, any_of=("contract law",), all_of=("court",), tables_over=0),),
    )


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("other = 0.5", "", 'task_types needs an entry "other"'),
        ("add = 0.4", "add = 1.4", "indicators 1.add: Input should be less than or equal to 1"),
        ("add = 0.3", 'add = "a lot"', "length 1.add: Input should be a valid number"),
        ("over = 10", "ovr = 10", "length 1.ovr: Extra inputs are not permitted"),
        ('"contract law"', '"c++"', "indicators 1.any_of 1: String should match pattern"),
        ("[[length]]", "[[length", "Expected ']]'"),
        ('any_of = ["contract law"]\nall_of = ["court"]\ntables_over = 0', "", "needs any_of, all_of or tables_over"),
    ],
)
def test_a_broken_file_is_refused_with_the_entry_that_is_wrong(tmp_path: Path, old: str, new: str, said: str) -> None:
    """
    The message names the variable, the file, the entry and what is allowed.
    """
    path = tmp_path / "rules.toml"
    path.write_text(VALID.replace(old, new))

    with pytest.raises(BadSetting) as refusal:
        load_rules(path)

    assert refusal.value.message.startswith(f"ROUTING_RULES_FILE={path}: ")
    assert said in refusal.value.message


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """
    The message says where it looked.
    """
    with pytest.raises(BadSetting, match=r"nowhere\.toml.*No such file"):
        load_rules(tmp_path / "nowhere.toml")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """
    Bytes that are no UTF-8 are a bad setting, not a crash.
    """
    (tmp_path / "rules.toml").write_bytes(b"\xff\xfe")

    with pytest.raises(BadSetting, match="utf-8"):
        load_rules(tmp_path / "rules.toml")
