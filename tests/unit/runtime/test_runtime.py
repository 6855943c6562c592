"""
The heartbeat in a world that only writes down what it was asked.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace

import pytest

from common.errors import RedisUnavailable
from common.schemas import HardwareStatus, SwitchStage
from tests.factories import make_machine
from worker.hardware.gpu import Machine
from worker.runtime import Heart, Runtime
from worker.scheduling.overtake import Overtaking
from worker.scheduling.pick import Knowledge, Turn
from worker.state.backlog import Backlog, Lane, Waiting
from worker.state.pace import Pace
from worker.state.residency import Level, Quarantine, Residency, Resident, Switching
from worker.telemetry.summarize import summarize

NOTHING = Residency(capacity=9, max_residents=2)


def with_ready(*models: str) -> Residency:
    return replace(NOTHING, residents=tuple(Resident(model_id=m, level=Level.READY, bytes=1, since=0) for m in models))


def waiting(**counts: int) -> Backlog:
    return Backlog(by_model={model: Waiting(count=count, oldest_at=0.0) for model, count in counts.items()})


class PaperWorld:
    """A world that is what it is told to be; the deeds of one step are read and forgotten together."""

    def __init__(self) -> None:
        self.now = 100.0
        self.is_loaded = NOTHING
        self.waits = Backlog()
        self.known = Knowledge()
        self.takes = 0
        self.foretold: tuple[Residency, Backlog, Knowledge] | None = None
        self.deeds: list[str] = []
        self.prefetched: tuple[Residency, Backlog, float] | None = None
        self.offered_to_cloud: tuple[Residency, Backlog, float] | None = None

    def machine(self) -> Machine:
        return make_machine(24)

    def backlog(self) -> Backlog:
        return self.waits

    def residency(self) -> Residency:
        return self.is_loaded

    def knowledge(self, residency: Residency, *, now: float) -> Knowledge:
        return self.known

    def substitute(self, model_id: str, by: str, reason: str) -> int:
        self.deeds.append(f"{by} takes {self.takes} jobs of {model_id}")
        return self.takes

    def foretell(self, residency: Residency, backlog: Backlog, known: Knowledge, **bounds: float) -> None:
        self.foretold = (residency, backlog, known)

    def ask_for_switch(self, turn: Turn, residency: Residency) -> None:
        self.deeds.append(f"switch to {turn.model_id}")
        self.is_loaded = replace(
            self.is_loaded, switching=Switching(to_model=turn.model_id or "", epoch=1, since=self.now)
        )

    def overtake(self, some: Overtaking) -> None:
        self.deeds.append(f"long jobs of {some.model_id} first")

    def use_cloud(self, residency: Residency, backlog: Backlog, *, now: float) -> None:
        self.offered_to_cloud = (residency, backlog, now)

    def serve(self, models: Iterable[str]) -> None:
        self.deeds.append(f"serve {' '.join(models)}".strip())

    def stop_cancelled_jobs(self) -> None:
        self.deeds.append("stop cancelled")

    def route_again(self, model_id: str) -> None:
        self.deeds.append(f"route {model_id} again")

    def prefetch(self, residency: Residency, backlog: Backlog, *, now: float) -> None:
        self.prefetched = (residency, backlog, now)

    def publish(
        self, machine: Machine, residency: Residency, backlog: Backlog, *, turn: Turn, now: float
    ) -> HardwareStatus:
        self.deeds.append("publish")
        return summarize(
            worker="w", machine=machine, residency=residency, backlog=backlog, switches=(),
            max_temperature_c=85, stopping=False, turn=turn, now=now,
        )  # fmt: skip


class Beat:
    """A runtime over a world of paper; a call is a beat, some seconds after the last, and gives its deeds."""

    def __init__(self) -> None:
        self.world = PaperWorld()
        self.runtime = Runtime(
            self.world, models=["a", "b"], larger={"a": ["b"]}, starting="a", max_wait_s=600, min_turn_s=30,
            status_every_s=5, clock=lambda: self.world.now,
        )  # fmt: skip

    def __call__(self, *, after_s: float = 0.2) -> list[str]:
        self.world.now += after_s
        self.world.deeds.clear()
        self.runtime.step()
        return list(self.world.deeds)


@pytest.fixture
def beat() -> Beat:
    """A runtime with two models to serve, nothing loaded and nothing waiting."""
    return Beat()


def test_the_first_beat_loads_the_model_to_start_with(beat: Beat) -> None:
    """And tells the outside at once."""
    assert beat() == ["switch to a", "serve", "stop cancelled", "publish"]


def test_a_switch_is_asked_for_once(beat: Beat) -> None:
    """While it is asked for or under way, however long that takes."""
    beat()
    assert "switch to a" not in beat(after_s=9)

    beat.world.is_loaded = replace(
        NOTHING, switching=Switching(to_model="a", epoch=1, since=beat.world.now, begun=True)
    )
    assert "switch to a" not in beat(after_s=3600)  # its files come over the network

    beat.world.is_loaded = replace(
        NOTHING,
        switching=Switching(to_model="a", epoch=1, since=beat.world.now, begun=True, stage=SwitchStage.LOADING),
    )
    assert "switch to a" not in beat(after_s=3600)


def test_a_switch_asked_for_in_vain_is_asked_for_again(beat: Beat) -> None:
    """The task was lost, or has expired: after ten seconds, and then again after ten."""
    beat()
    asked = [second for second in range(1, 25) if "switch to a" in beat(after_s=1)]

    assert asked == [11, 22]


def test_only_what_is_ready_is_served(beat: Beat) -> None:
    """A model that starts or stops gets no jobs."""
    beat.world.is_loaded = with_ready("b", "a")
    assert "serve a b" in beat()

    starting = Resident(model_id="a", level=Level.STARTING, bytes=1, since=0)
    stopping = Resident(model_id="b", level=Level.STOPPING, bytes=1, since=0)
    beat.world.is_loaded = replace(NOTHING, residents=(starting, stopping))
    assert "serve" in beat()


def test_waiting_jobs_bring_their_model(beat: Beat) -> None:
    """Once what is ready has none left."""
    beat.world.is_loaded = with_ready("a")
    beat.world.waits = waiting(a=1, b=1)
    assert "switch to b" not in beat()

    beat.world.waits = waiting(a=0, b=1)
    assert "switch to b" in beat()


def test_when_nothing_can_be_loaded_nothing_is_asked(beat: Beat) -> None:
    """Both models are in quarantine; their jobs wait."""
    left_alone = Quarantine(until=1e9, failures=1, reason="")
    beat.world.is_loaded = replace(NOTHING, quarantined={"a": left_alone, "b": left_alone})
    beat.world.waits = waiting(a=1, b=1)

    assert beat() == ["serve", "stop cancelled", "publish"]


def broken(*models: str, since: float = 100.0) -> Residency:
    quarantine = Quarantine(since=since, until=since + 60, failures=1, reason="")
    return replace(with_ready("a"), quarantined=dict.fromkeys(models, quarantine))


def test_jobs_of_a_model_that_failed_are_routed_again_once(beat: Beat) -> None:
    """As soon as every router knows; those that come back to it have nowhere else to go."""
    beat.world.is_loaded = broken("b", since=beat.world.now)
    beat.world.waits = waiting(b=3)
    seconds = [second for second in range(1, 60) if "route b again" in beat(after_s=1)]
    assert seconds == [3]

    beat.world.is_loaded = broken("b", since=beat.world.now)
    assert [second for second in range(1, 60) if "route b again" in beat(after_s=1)] == [3]


@pytest.mark.parametrize(
    ("models", "waits"),
    [
        (("b",), {"a": 1}),
        (("a", "b"), {"b": 1}),
        ((), {"b": 1}),
    ],  # none of its jobs wait; nothing else; it is not broken
)
def test_jobs_are_not_routed_again_in_vain(beat: Beat, models: tuple[str, ...], waits: dict[str, int]) -> None:
    """Nobody would come, or back they would come."""
    beat.world.is_loaded = broken(*models, since=beat.world.now)
    beat.world.waits = waiting(**waits)

    assert not any("again" in deed for _ in range(20) for deed in beat(after_s=1))


def test_what_is_needed_next_is_looked_at_in_every_beat(beat: Beat) -> None:
    """With what waits and what is loaded as they are then."""
    beat.world.is_loaded = with_ready("a")
    beat.world.waits = waiting(a=1, b=1)
    beat()

    assert beat.world.prefetched == (beat.world.is_loaded, beat.world.waits, beat.world.now)


def test_the_status_is_published_every_few_seconds(beat: Beat) -> None:
    """Here every 5, and not at each beat."""
    beat.world.is_loaded = with_ready("a")
    published = [second for second in range(12) if "publish" in beat(after_s=1)]

    assert published == [0, 5, 10]


@pytest.mark.parametrize(
    ("change", "at_once"),
    [
        (with_ready("a"), False),
        (with_ready("a", "b"), True),
        (NOTHING, True),
        (replace(with_ready("a"), switching=Switching(to_model="b", epoch=1, since=0)), True),
        (replace(with_ready("a"), quarantined={"b": Quarantine(until=1e9, failures=1, reason="")}), True),
        (replace(NOTHING, residents=(Resident(model_id="a", level=Level.STOPPING, bytes=1, since=0),)), True),
        (
            replace(NOTHING, residents=(Resident(model_id="a", level=Level.READY, bytes=1, since=0, in_flight=3),)),
            False,
        ),
    ],
)
def test_the_status_is_published_at_every_change(beat: Beat, change: Residency, at_once: bool) -> None:  # noqa: FBT001 - a parameter
    """Of who is loaded and how far, of switches and of quarantines; jobs in and out are no change."""
    beat.world.is_loaded = with_ready("a")
    beat()
    beat.world.is_loaded = change

    assert ("publish" in beat()) is at_once


def test_a_beat_that_fails_does_not_stop_the_heart(beat: Beat) -> None:
    """Redis away, a driver gone: the next beat tries again."""
    tries = 0
    enough = threading.Event()

    def backlog() -> Backlog:
        nonlocal tries
        tries += 1
        if tries == 3:
            enough.set()
        raise RedisUnavailable("nobody answers")

    beat.world.backlog = backlog  # type: ignore[method-assign]
    heart = Heart(beat.runtime, interval_s=0.001)
    heart.start()
    assert enough.wait(10)
    heart.end()
    assert not heart.is_alive()


def test_the_cloud_is_looked_at_with_what_is_loaded_and_what_waits(beat: Beat) -> None:
    """In every beat, as things are then."""
    beat.world.is_loaded = with_ready("a")
    beat.world.waits = waiting(a=1, b=3)
    beat()

    assert beat.world.offered_to_cloud == (beat.world.is_loaded, beat.world.waits, beat.world.now)


def auto_jobs(**counts: int) -> Backlog:
    """Jobs that name no model, and have waited since the beginning."""
    lanes = {m: (Lane(count=n, oldest_at=0.0, newest_at=0.0, any_model=True),) for m, n in counts.items()}
    return Backlog(by_model={m: Waiting(count=counts[m], oldest_at=0.0, lanes=lanes[m]) for m in counts})


@pytest.mark.parametrize(
    ("takes", "deeds"),
    [
        (3, ["b takes 3 jobs of a"]),  # 3 jobs of 2 s, against a switch of 10 s: and the switch is saved
        (0, ["b takes 0 jobs of a", "switch to a"]),  # it may take none of them
    ],
)
def test_a_larger_model_takes_jobs_in_place_of_a_switch(beat: Beat, takes: int, deeds: list[str]) -> None:
    """Where it is ready and that ends them sooner; where it may take none, the switch comes after all."""
    beat.world.is_loaded = replace(with_ready("b"), switch_s={"a": 10.0, "b": 10.0})
    beat.world.waits = auto_jobs(a=3)
    beat.world.known = Knowledge(paces={"a": Pace(job_s=1.0), "b": Pace(job_s=2.0)})
    beat.world.takes = takes

    assert beat()[: len(deeds)] == deeds


def test_long_jobs_of_a_batch_begin_first_at_the_end_of_a_turn(beat: Beat) -> None:
    """Eight jobs on four places, and more for another model than can be overtaken; not where nobody knows the pace."""
    lanes = {
        model: Lane(count=count, oldest_at=0.0, newest_at=1.0, prompt_tokens=100 * count, output_tokens=100 * count)
        for model, count in (("a", 8), ("b", 32))
    }
    beat.world.waits = Backlog(
        by_model={model: Waiting(count=lane.count, oldest_at=0.0, lanes=(lane,)) for model, lane in lanes.items()}
    )
    beat.world.is_loaded = with_ready("a")
    assert "long jobs of a first" not in beat()

    beat.world.known = Knowledge(paces={"a": Pace(prefill_tokens_per_s=1000, decode_tokens_per_s=10, at_once=4)})
    assert "long jobs of a first" in beat()


def test_what_other_workers_serve_is_left_to_them(beat: Beat) -> None:
    """The one job of a model that is ready elsewhere is no reason for a switch."""
    beat.world.is_loaded = replace(with_ready("a"), switch_s={"a": 10.0, "b": 10.0})
    beat.world.waits = waiting(b=1)
    assert "switch to b" in beat()

    beat.world.is_loaded = replace(with_ready("a"), switch_s={"a": 10.0, "b": 10.0})
    beat.world.known = Knowledge(elsewhere={"b": 1})
    assert "switch to b" not in beat()


def test_producers_are_told_what_is_foreseen_from_what_is_seen(beat: Beat) -> None:
    """In every beat: what is loaded, what waits, what is known."""
    beat.world.is_loaded = with_ready("a")
    beat.world.waits = waiting(a=1)
    beat()

    assert beat.world.foretold == (beat.world.is_loaded, beat.world.waits, beat.world.known)
