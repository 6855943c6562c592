"""
The shipped jobs: every line is a job, and together they need both of two models.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from common.schemas import JobRequest, OfferedModel
from worker.routing.route import route_job
from worker.routing.rules_file import load_rules
from worker.routing.score import score_prompt

JOBS = Path(__file__).parents[3] / "examples" / "jobs.jsonl"
MODELS = [
    OfferedModel(id=name, tier=tier, complexity_up_to=up_to, max_model_len=2048, capabilities=("chat",))
    for name, tier, up_to in (("small", 1, 0.45), ("large", 2, 1.0))
]


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in JOBS.read_text(encoding="utf-8").splitlines()]


def test_every_line_is_a_batch_line_with_a_job() -> None:
    """
    OpenAI's batch form, ids that differ, bodies that parse, answers short enough for a demonstration.
    """
    assert len(lines()) == 24
    assert len({line["custom_id"] for line in lines()}) == 24
    for line in lines():
        assert set(line) == {"custom_id", "method", "url", "body"}
        request = JobRequest.parse(line["body"])
        assert (line["method"], line["url"]) == ("POST", request.kind)
        assert 48 <= (request.answer_tokens or 0) <= 96


def test_both_models_get_their_share() -> None:
    """
    With the shipped rules at least eight jobs go to each of two models.
    """
    rules = load_rules()
    chosen: Counter[str] = Counter()
    for line in lines():
        request = JobRequest.parse(line["body"])
        complexity = score_prompt(request.text, task_type=request.task_type, rules=rules)
        chosen[route_job(request, complexity, MODELS).model] += 1

    assert min(chosen["small"], chosen["large"]) >= 8
