"""
Reading traces and costs: what is wrong is named by line and field.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.errors import BadSetting, InvalidRequest
from worker.simulate.costs import read_costs
from worker.simulate.trace import TracedJob, read_trace

GOOD = {"id": "x", "arrival_s": 1.5, "model": "a", "prompt_tokens": 3, "output_tokens": 4}
COSTS = "load_s = 5\nwake_s = 1\nprefill_tokens_per_s = 100\ndecode_tokens_per_s = 10\nmax_num_seqs = 2\n"


def write(tmp_path: Path, *lines: object) -> Path:
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return file


def test_jobs_come_in_the_order_of_their_arrival(tmp_path: Path) -> None:
    """Equal arrivals in that of the file; empty lines count nothing; what is optional has a value."""
    late = {**GOOD, "id": 7, "arrival_s": 9, "priority": 0, "deadline_s": 20, "tenant": "t"}
    jobs = read_trace(write(tmp_path, late, "", {**GOOD, "id": "y"}, GOOD), ["a"])

    assert [job.id for job in jobs] == ["y", "x", "7"]
    assert jobs[1] == TracedJob("x", 1.5, "a", 3, 4, priority=3, deadline_s=None, tenant="default")
    assert (jobs[2].priority, jobs[2].deadline_s, jobs[2].tenant) == (0, 20, "t")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "is not JSON"),
        ([1], "is list, not an object"),
        ({**GOOD, "id": ""}, "id must be a text"),
        ({**GOOD, "arrival_s": -1}, "arrival_s must be a number of seconds, 0 or more, not -1"),
        ({**GOOD, "arrival_s": True}, "arrival_s must"),
        ('{"id": "z", "arrival_s": NaN}', "arrival_s must"),
        ({**GOOD, "model": "b"}, "model 'b' is not in the costs, which have a"),
        ({**GOOD, "model": None}, "model None is not in the costs"),
        ({**GOOD, "prompt_tokens": 1.5}, "prompt_tokens must be a whole number"),
        ({**GOOD, "output_tokens": None}, "output_tokens must be a whole number"),
        ({**GOOD, "priority": 10}, "priority must be a whole number from 0 (first) to 9, not 10"),
        ({**GOOD, "deadline_s": "soon"}, "deadline_s must be a moment like arrival_s"),
        ({**GOOD, "tenant": 4}, "tenant must be a text"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, problem: str) -> None:
    """With its number, its field and what is allowed there."""
    with pytest.raises(InvalidRequest) as caught:
        read_trace(write(tmp_path, {**GOOD, "id": "before"}, line), ["a"])

    assert f"line 2: {problem}" in caught.value.message


def test_every_bad_line_is_named_up_to_a_limit(tmp_path: Path) -> None:
    """Twenty of them; of the rest, how many."""
    with pytest.raises(InvalidRequest) as caught:
        read_trace(write(tmp_path, *["{"] * 25), ["a"])

    assert caught.value.message.count("\n") == 21
    assert "and 5 more" in caught.value.message


def test_an_id_stands_once(tmp_path: Path) -> None:
    """The second line of an id is a mistake."""
    with pytest.raises(InvalidRequest, match="line 2: id 'x' was there before"):
        read_trace(write(tmp_path, GOOD, GOOD), ["a"])


def test_a_trace_without_jobs_and_one_that_is_not_there(tmp_path: Path) -> None:
    """Both say what to give."""
    with pytest.raises(InvalidRequest, match="has no jobs"):
        read_trace(write(tmp_path, ""), ["a"])
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_trace(tmp_path / "nowhere", ["a"])


@pytest.mark.parametrize("head", ["[a]\n", '["a"]\n', "[models.a]\n"])
def test_costs_are_a_table_for_each_model(tmp_path: Path, head: str) -> None:
    """At the top, or all of them under [models]."""
    file = tmp_path / "costs.toml"
    file.write_text(head + COSTS)

    assert read_costs(file)["a"].max_num_seqs == 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a]\n" + COSTS.replace("wake_s = 1", "wake_s = -1"), "a.wake_s: Input should be greater than or equal to 0"),
        ("[a]\n" + COSTS.replace("wake_s = 1", ""), "a.wake_s: Field required"),
        ("[a]\n" + COSTS + "wake = 3\n", "a.wake: Extra inputs are not permitted"),
        ("[a", "cannot be read"),
        ("", "name no model"),
    ],
)
def test_bad_costs_are_named(tmp_path: Path, text: str, problem: str) -> None:
    """With model and field."""
    file = tmp_path / "costs.toml"
    file.write_text(text)

    with pytest.raises(BadSetting) as caught:
        read_costs(file)
    assert problem in caught.value.message
