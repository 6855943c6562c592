"""
Work over several models in the real system: each model is loaded once, and not at all where a larger one is ready.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from celery import chain, group
from celery.canvas import Signature

from common import keys
from tests.e2e.conftest import Box
from tests.e2e.stub_models import stub_env
from tests.waiting import eventually

MODELS = {"small": (1, 0.45), "large": (2, 1.0), "other": (3, 1.0)}


@pytest.fixture
def node_env(node_env: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Three models on the stand-in engine, one ready at a time: 1.5 s to load, 0.05 s a job, four at once."""
    return node_env | stub_env(tmp_path, MODELS, load_s=1.5, run_s=0.05, WORKER_CONCURRENCY=4)


def loads(box: Box) -> Counter[str]:
    """How often each model was loaded."""
    return Counter(event["to_model"] for event in box.events("residency.switched") if event["outcome"] == "ready")


def job(box: Box, model: str, text: str) -> Signature:
    """A job as a part of a canvas, made by an app that knows nothing of ours."""
    body = {"messages": [{"role": "user", "content": text}], "model": model}
    return box.setup.app.signature(keys.SUBMIT_TASK, args=[body], queue=keys.SUBMIT_QUEUE, immutable=True)


def test_drafts_on_one_model_and_judges_on_another_load_each_once(box: Box) -> None:
    """Thirty chains that begin on one model and end on another, and jobs of a third, which is ready, before them."""
    first = next(iter(loads(box)))
    second, third = sorted(set(MODELS) - {first})
    before = group(job(box, first, f"before {n}") for n in range(20))
    chains = group(chain(job(box, second, f"draft {n}"), job(box, third, f"judge {n}")) for n in range(30))
    sent: list[Any] = [before.apply_async(), chains.apply_async()]
    done, judged = (each.get(timeout=120) for each in sent)

    assert [result["ledger"]["model"] for result in done] == [first] * 20
    assert [result["ledger"]["model"] for result in judged] == [third] * 30
    assert loads(box) == dict.fromkeys(MODELS, 1)


def test_a_larger_model_that_is_ready_takes_a_few_jobs_and_its_ledger_says_why(box: Box) -> None:
    """
    Easy jobs that name no model go to the small one; while a larger one is ready, a switch would take longer than they
    do there. Once paces and switches are known, those are not made. A job that names the small model gets it.
    """
    for model in ("small", "large", "small", "large"):  # until the times of both are known
        for sent in [box.send(f"{n}", model=model) for n in range(16)]:
            assert sent.get(timeout=60)["ledger"]["model"] == model
    eventually(lambda: box.client.estimate({"messages": [{"role": "user", "content": "x"}], "model": "small"}))

    before = loads(box)
    easy = [box.send(f"Easy {n}", task_type="simple_extraction") for n in range(3)]
    ledgers = [sent.get(timeout=60)["ledger"] for sent in easy]
    assert [ledger["model"] for ledger in ledgers] == ["large"] * 3
    for ledger in ledgers:
        assert ledger["why"].startswith("complexity 0.1 is within small's 0.45; large instead of small: large is ready")
    assert loads(box) == before

    named = box.send("By name", model="small", task_type="simple_extraction")
    assert named.get(timeout=60)["ledger"]["model"] == "small"
    assert loads(box) == before + Counter(small=1)
