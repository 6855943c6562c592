"""
What the outside is told, out of values: the state, the alerts, and everything that was read.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from common.schemas import HardwareStatus, SwitchRecord, SwitchStage, SwitchTime, TurnStatus, WorkerState
from tests.factories import GIB, make_gpu, make_machine
from worker.hardware.gpu import Machine
from worker.scheduling.pick import Turn
from worker.state.backlog import Backlog, Waiting
from worker.state.residency import Level, Quarantine, Residency, Resident, Switching
from worker.telemetry.summarize import summarize

NOW = 1_800_000_000.0
NOTHING = Residency(capacity=9, max_residents=2)
READY = replace(NOTHING, residents=(Resident(model_id="a", level=Level.READY, bytes=7, since=NOW - 60),))
BUSY = replace(NOTHING, residents=(replace(READY.residents[0], in_flight=2),))
SWITCHING = Switching(to_model="b", epoch=1, since=NOW, stage=SwitchStage.LOADING)
ENDED = SwitchRecord(
    from_model=None, to_model="a", outcome="ready", seconds=2, stages={SwitchStage.LOADING: 1.5}, attempts=1,
    reason="its turn", at=datetime.fromtimestamp(NOW - 60, UTC),
)  # fmt: skip


def look(
    residency: Residency = NOTHING, *, machine: Machine | None = None, backlog: Backlog | None = None, **changes: Any
) -> HardwareStatus:
    """The status of a worker without jobs, at NOW."""
    facts: dict[str, Any] = {"switches": (), "max_temperature_c": 85, "stopping": False, **changes}
    return summarize(
        worker="w", machine=machine or make_machine(24), residency=residency, backlog=backlog or Backlog(), now=NOW,
        **facts,
    )  # fmt: skip


def waits(count: int) -> Backlog:
    return Backlog(by_model={"a": Waiting(count=count, oldest_at=NOW - 12.34)})


@pytest.mark.parametrize(
    ("residency", "facts", "state"),
    [
        (NOTHING, {}, WorkerState.STARTING),
        (replace(NOTHING, switching=SWITCHING), {}, WorkerState.STARTING),  # the first load
        (replace(READY, switching=SWITCHING), {"switches": (ENDED,)}, WorkerState.SWITCHING),
        (READY, {"switches": (ENDED,)}, WorkerState.IDLE),
        (READY, {"switches": (ENDED,), "backlog": waits(0)}, WorkerState.IDLE),
        (READY, {"switches": (ENDED,), "backlog": waits(1)}, WorkerState.SERVING),
        (BUSY, {"switches": (ENDED,)}, WorkerState.SERVING),
        (NOTHING, {"switches": (ENDED,)}, WorkerState.IDLE),  # it failed, or its engine died
        (BUSY, {"switches": (ENDED,), "stopping": True}, WorkerState.DRAINING),
        (replace(READY, switching=SWITCHING), {"stopping": True}, WorkerState.DRAINING),
    ],
)
def test_what_the_worker_does_now(residency: Residency, facts: dict[str, Any], state: WorkerState) -> None:
    """One word for each situation."""
    assert look(residency, **facts).state is state


def test_whose_turn_it_is_and_an_overload_are_told() -> None:
    """The reason of the turn stands in the status; what it means for the waiting is an alert."""
    status = look(READY, turn=Turn(model_id="a", reason="9 of its jobs wait", overload="some jobs will be late"))

    assert status.turn == TurnStatus(model="a", why="9 of its jobs wait")
    assert status.alerts == ("overload: some jobs will be late",)
    assert look(READY).turn is None


def test_a_hot_card_and_a_model_left_alone_are_alerts() -> None:
    """With what follows from them, and why."""
    machine = replace(
        make_machine(24),
        gpus=tuple(make_gpu(24, index=index, temperature_c=t) for index, t in enumerate([None, 85, 86.4])),
    )
    residency = replace(
        NOTHING,
        quarantined={
            "b": Quarantine(until=NOW + 60, failures=2, reason="out of memory"),
            "over": Quarantine(until=NOW, failures=1, reason=""),
        },
    )

    assert look(residency, machine=machine).alerts == (
        "card 2 is at 86 C: no model is loaded above 85 C",
        "b failed to load 2 times and is left alone for 60 s: out of memory",
    )
    assert look().alerts == ()


def test_everything_that_was_read_is_told() -> None:
    """Bytes, seconds and moments; unknown is None."""
    card = make_gpu(
        24, free_gib=4, uuid="GPU-1", utilization=0.5, temperature_c=60.0, power_w=200.0, power_limit_w=300.0,
        sm_clock_mhz=1500, throttle_reasons=("thermal",), processes={7: GIB},
    )  # fmt: skip
    other = Resident(model_id="0", level=Level.STARTING, bytes=1, since=NOW)
    status = look(
        replace(BUSY, residents=(*BUSY.residents, other), switching=SWITCHING),
        machine=replace(make_machine(24, ram_available_gib=3), gpus=(card,)),
        backlog=Backlog(by_model={"b": Waiting(count=2, oldest_at=None), **waits(3).by_model}),
        switches=(ENDED,),
    )

    assert (status.worker, status.source, status.version) == ("w", "stub", 1)
    assert status.at == datetime.fromtimestamp(NOW, UTC)
    assert (status.ram_total_bytes, status.ram_available_bytes) == (64 * GIB, 3 * GIB)
    told = status.gpus[0].model_dump()
    assert told == {name: getattr(card, name) for name in told}
    assert (status.stage, status.switching_to, status.switches) == (SwitchStage.LOADING, "b", (ENDED,))
    assert [(r.model, r.level, r.bytes, r.in_flight) for r in status.residents] == [
        ("0", "starting", 1, 0), ("a", "ready", 7, 2),
    ]  # fmt: skip
    assert status.residents[1].since == datetime.fromtimestamp(NOW - 60, UTC)
    assert {model: (q.waiting, q.oldest_s) for model, q in status.backlog.items()} == {"a": (3, 12.3), "b": (2, None)}


def test_a_clock_that_is_behind_makes_no_negative_age() -> None:
    """The router's machine may be ahead of ours."""
    ahead = Backlog(by_model={"a": Waiting(count=1, oldest_at=NOW + 5)})

    assert look(backlog=ahead).backlog["a"].oldest_s == 0


def test_the_status_survives_json() -> None:
    """What is published is what is read; a field from a newer worker is no reason to fail."""
    status = look(replace(BUSY, switching=SWITCHING), backlog=waits(3), switches=(ENDED,))
    body = status.model_dump_json()

    assert HardwareStatus.model_validate_json(body) == status
    assert HardwareStatus.model_validate_json(f'{body[:-1]}, "newer": 1}}') == status


def test_a_model_that_was_loaded_smaller_says_so_as_long_as_it_is() -> None:
    """Beside the resident, with the length in force, and as an alert; one that is as planned says nothing."""
    smaller = replace(READY.residents[0], smaller="smaller than planned: 2,048 tokens", max_model_len=2048)
    status = look(replace(READY, residents=(smaller,)))

    assert (status.residents[0].smaller, status.residents[0].max_model_len) == (smaller.smaller, 2048)
    assert status.alerts == ("a had too little memory and is smaller than planned: 2,048 tokens",)
    assert look(READY).alerts == ()
    assert look(READY).residents[0].smaller is None


def test_memory_that_did_not_come_back_is_an_alert() -> None:
    """With the model that held it, and what is missing."""
    status = look(replace(READY, unfreed={"b": "card 0 has 1.0 GiB free, 9.0 GiB were expected"}))

    assert status.alerts == (
        "the memory of b is not all back although it has ended: card 0 has 1.0 GiB free, 9.0 GiB were expected",
    )


def test_a_sleep_that_is_not_trusted_any_more_is_an_alert() -> None:
    """With the model, the level, and what was wrong."""
    status = look(replace(READY, banned={("b", Level.ASLEEP_2): "b woke from asleep_2 and answers otherwise"}))

    assert status.alerts == ("b is put to sleep no more at level asleep_2: b woke from asleep_2 and answers otherwise",)


def test_what_switches_take_is_shown() -> None:
    """For each pair of models, as it was measured."""
    time = SwitchTime(
        from_model=None, to_model="a", level="cold", mean_s=2, last_s=3, load_s=1, load_bytes=7, count=4,
        at=datetime.fromtimestamp(NOW, UTC),
    )  # fmt: skip

    assert look(switch_times=(time,)).switch_times == (time,)
