"""
What a job that streams says while it runs, and how its stream ends.
"""

from __future__ import annotations

from typing import Any

import pytest

from common.schemas import JobState
from tests.factories import make_placement, make_spec
from tests.runner_world import LONG_S, World
from tests.waiting import eventually
from worker.catalog.spec import EngineKind
from worker.engines.base import StopSignal
from worker.jobs.failures import HandBack

STREAMED = {"stream": True}


def heard(world: World) -> list[tuple[str, Any]]:
    """The job's stream: the attempts, each attempt's text, and how it ended."""
    return [
        (event.kind, {"reset": event.attempt, "chunk": event.text, "end": event.state}[event.kind])
        for event in world.store.stream("job")
    ]


def spoken(world: World) -> str:
    return "".join(event.text for event in world.store.stream("job"))


def test_a_job_that_streams_says_its_whole_answer_and_then_ends() -> None:
    """The outcome is the same as without; the engine was asked for a stream."""
    plain, world = World(), World()
    world.store.note_streams("job")
    outcome = world.run(**STREAMED)

    assert outcome.response == plain.run().response
    assert spoken(world) == outcome.answer
    assert heard(world)[0] == ("reset", 1)
    assert heard(world)[-1] == ("end", JobState.ANSWERED)
    assert [event.chunk["usage"] for event in world.store.stream("job") if event.chunk and "usage" in event.chunk]
    assert world.engine.calls[0].body["stream"] is True
    assert plain.engine.calls[0].on_chunk is None
    assert plain.store.stream("job") == ()


def test_tokens_are_there_before_the_job_ends() -> None:
    """A reader has the first words while the engine works on the others."""
    world = World(run_s=2.0)
    world.store.note_streams("job")
    with world.running(**STREAMED) as running:
        eventually(lambda: spoken(world))
        assert not running.done()
        assert heard(world)[-1][0] == "chunk"
        assert running.result(10).answer == spoken(world)


def test_an_engine_that_dies_in_mid_stream_resets_it() -> None:
    """The next attempt begins anew, and only its words stay."""
    world = World(run_s=1.0)
    world.store.note_streams("job")
    with world.running(**STREAMED) as first:
        eventually(lambda: spoken(world))
        world.engine.die("small")
        with pytest.raises(HandBack):
            first.result(10)
    position = world.store.stream("job")[-1].position
    world.engine.ensure_ready(make_placement(spec=make_spec(engine=EngineKind.STUB)), timeout_s=1)
    outcome = world.run(**STREAMED)

    later = world.store.stream("job")
    assert all(int(event.position) > int(position) for event in later)
    assert heard(world)[0] == ("reset", 2)
    assert spoken(world) == outcome.answer


@pytest.mark.parametrize("reason", ["cancelled", "time limit"])
def test_a_job_stopped_in_mid_stream_ends_it(reason: str) -> None:
    """What was said stays; the end says why there is no more."""
    world, stop = World(run_s=LONG_S), StopSignal()
    world.store.note_streams("job")
    with world.running(stop=stop, **STREAMED) as running:
        stop.stop(reason)
        outcome = running.result(10)

    assert heard(world)[-1] == ("end", outcome.state)


def test_a_job_that_never_ran_ends_its_stream_too() -> None:
    """A reader does not wait for ever for what will not come."""
    world = World()
    world.store.note_streams("job")
    outcome = world.run(deadline="2020-01-01T00:00:00Z", **STREAMED)

    assert heard(world) == [("end", outcome.state)]
