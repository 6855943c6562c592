"""
What an engine promises that can put its model to sleep, shown on the stub, and on vLLM where there is a card.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from common.errors import EngineFailed, EngineNotReady
from tests.engine_kits import LENGTH, START_S, Kit, stub_kit, vllm_card_kit
from tests.waiting import eventually
from worker.engines.base import EngineState

SLEEPERS = [pytest.param(stub_kit, id="stub"), pytest.param(vllm_card_kit, id="vllm-card", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=SLEEPERS)
def sleeper(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    """One engine that can put its model to sleep, for all tests of sleep."""
    made: Kit = request.param(tmp_path_factory.mktemp("engine"))
    yield made
    made.engine.close()


def test_asleep_and_awake_again_it_answers_the_same(sleeper: Kit) -> None:
    """At each of its levels, in the same processes; asleep it takes no request, and asked again it sleeps on."""
    levels = sleeper.engine.sleep_levels(sleeper.placement)
    assert levels
    for level in levels:
        sleeper.ready()
        before, loaded = sleeper.ask(), sleeper.engine.ensure_ready(sleeper.placement, timeout_s=START_S)
        sleeper.asleep(level)
        sleeper.asleep(level)
        assert sleeper.engine.state(sleeper.model_id) is EngineState.ASLEEP
        with pytest.raises(EngineNotReady):
            sleeper.ask()

        woken = sleeper.engine.ensure_ready(sleeper.placement, timeout_s=START_S)
        assert (woken.level, woken.pids) == (level, loaded.pids)
        assert sleeper.ask().response["choices"] == before.response["choices"]


def test_a_sleeper_of_another_plan_is_started_anew(sleeper: Kit) -> None:
    """It would have the wrong length."""
    sleeper.ready()
    sleeper.asleep()
    other = replace(sleeper.placement, max_model_len=LENGTH // 2)

    assert not sleeper.engine.ensure_ready(other, timeout_s=START_S).level.asleep
    sleeper.engine.ensure_stopped(sleeper.model_id, timeout_s=20)


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_sleeper_that_has_ended_does_not_wake(sleeper: Kit, how: str) -> None:
    """Its next start is one from its files."""
    sleeper.ready()
    sleeper.asleep()
    if how == "killed":
        sleeper.kill()
    else:
        sleeper.engine.ensure_stopped(sleeper.model_id, timeout_s=20)
    gone = EngineState.DEAD if how == "killed" else EngineState.STOPPED
    eventually(lambda: sleeper.engine.state(sleeper.model_id) is gone, within_s=10, what="the sleeper has ended")

    assert not sleeper.engine.ensure_ready(sleeper.placement, timeout_s=START_S).level.asleep


def test_what_is_not_ready_does_not_fall_asleep(sleeper: Kit) -> None:
    """A stopped model is no sleeper."""
    sleeper.engine.ensure_stopped(sleeper.model_id, timeout_s=20)

    with pytest.raises(EngineFailed):
        sleeper.asleep()
    assert sleeper.engine.state(sleeper.model_id) is EngineState.STOPPED
