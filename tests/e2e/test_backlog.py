"""
Many jobs that wait for several models: each runs on its own model, none is lost, and Celery's canvas works over them.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group
from celery.canvas import Signature

from common import keys
from common.backlog import RedisBacklog
from common.redis_client import connect
from common.schemas import JobState
from tests.e2e.conftest import Box
from tests.e2e.stub_models import stub_env
from tests.waiting import eventually

MODELS = ("red", "green", "blue")


@pytest.fixture
def node_env(node_env: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Three models on the stand-in engine, one ready at a time, with turns so short that there are many."""
    return node_env | stub_env(tmp_path, MODELS, load_s=0.1, run_s=0.01, SWITCH_MIN_TURN_S=0.5, SWITCH_MAX_WAIT_S=2)


def job(box: Box, model: str, text: str = "Hello", *, immutable: bool = False) -> Signature:
    """A job as a part of a canvas, made by an app that knows nothing of ours."""
    body = {"messages": [{"role": "user", "content": text}], "model": model}
    return box.setup.app.signature(keys.SUBMIT_TASK, args=[body], queue=keys.SUBMIT_QUEUE, immutable=immutable)


def test_a_thousand_mixed_jobs_run_on_their_own_models_and_none_is_lost(box: Box) -> None:
    """
    In four waves, of which each needs all three models and begins before the one before it has ended; each job ends
    once.
    """
    wanted = [MODELS[n % 3] for n in range(1000)]
    sent: list[Any] = []
    for n, model in enumerate(wanted):
        if n and n % 250 == 0:
            for before in sent[:-30]:
                before.get(timeout=240)
        sent.append(box.send(f"Job {n}", model=model, tenant=f"tenant {n % 7}"))
    results = [sent_job.get(timeout=240) for sent_job in sent]

    assert [(result["model"], result["ledger"]["model"]) for result in results] == [(m, m) for m in wanted]
    outcomes = [box.client.result(sent_job.id) for sent_job in sent]
    assert Counter(outcome.state for outcome in outcomes if outcome) == {JobState.ANSWERED: 1000}
    assert len(box.events("residency.switched")) > 2 * 4
    served = [
        tuple(queue for queue in event["queues"] if queue.startswith("model."))
        for event in box.events("scheduling.serving")
    ]
    assert {keys.model_queue(model) for model in MODELS} == {queue for queues in served for queue in queues}
    assert max(map(len, served)) == 1  # the consumer takes from one of them at a time, or from none
    redis = connect(box.url)
    eventually(lambda: not redis.exists(keys.UNACKED), within_s=20, what="nothing is in hand")
    assert [RedisBacklog(redis).count(keys.model_queue(model)) for model in MODELS] == [0, 0, 0]
    assert not list(redis.scan_iter(f"{keys.backlog('*')}*", count=1000))


def test_a_chain_goes_from_model_to_model(box: Box) -> None:
    """Each step is sent when the one before it has its outcome; the last one's result is the chain's."""
    sent = chain(job(box, "red"), job(box, "green", immutable=True), job(box, "blue")).apply_async()
    assert sent.get(timeout=60)["ledger"]["model"] == "blue"
    assert sent.parent.get(timeout=1)["ledger"]["model"] == "green"
    assert sent.parent.parent.get(timeout=1)["ledger"]["model"] == "red"


def test_a_chord_over_models_ends_with_its_last_part(box: Box) -> None:
    """Drafts on two models, and the one job that comes after them all on a third."""
    drafts = group(job(box, model, f"draft {n}") for n in range(4) for model in ("red", "green"))
    sent: Any = chord(drafts)(job(box, "blue", "judge"))
    assert sent.get(timeout=60)["ledger"]["model"] == "blue"
    assert [result["ledger"]["model"] for result in sent.parent.get(timeout=1)] == ["red", "green"] * 4
