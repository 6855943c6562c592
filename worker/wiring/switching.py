"""
What switches work with here: the board, the limits, and what earlier switches and loads taught, which Redis keeps.
"""

from __future__ import annotations

from collections.abc import Callable

from common.redis_client import RedisClient
from common.schemas import utc_now
from common.settings import Settings
from worker.hardware.gpu import Machine
from worker.memory.measured import Measured, Measurement, device_name
from worker.residency.board import ResidencyBoard
from worker.residency.check import LoadLimits
from worker.residency.history import SwitchHistory
from worker.residency.parts import SwitchLimits
from worker.residency.sleep_notes import SleepNotes
from worker.selection.placement import Placement
from worker.telemetry.redis_measured import RedisMeasurements
from worker.telemetry.redis_sleep_notes import RedisSleepNotes
from worker.telemetry.redis_status import RedisStatus
from worker.telemetry.redis_switch_times import RedisSwitchTimes
from worker.wiring.engines import engine_names


def limits_of(settings: Settings) -> SwitchLimits:
    """How long and how often, as the operator says."""
    switch = settings.switch
    return SwitchLimits(
        attempt_s=switch.timeout_s,
        attempts=switch.attempts,
        drain_s=switch.drain_s,
        quarantine_s=switch.quarantine_s,
        asleep=switch.max_asleep,
        load=LoadLimits(max_temperature_c=switch.max_temperature_c, max_power_share=switch.max_power_share),
    )


def board_of(settings: Settings, machine: Machine, sleeps: SleepNotes) -> ResidencyBoard:
    """An empty board of this machine, on which stands what sleeps no more."""
    return ResidencyBoard(
        capacity=machine.ram_total_bytes,
        cards={gpu.index: gpu.total_bytes for gpu in machine.gpus},
        max_residents=settings.switch.max_residents,
        banned=sleeps.banned(),
    )


def history_of(client: RedisClient, worker: str, status: RedisStatus) -> SwitchHistory:
    """What switches of this worker took, earlier starts included."""
    times = RedisSwitchTimes(client, worker)
    return SwitchHistory(lambda record: status.record(worker, record), times=times.read(), keep_time=times.save)


def sleeps_of(client: RedisClient, worker: str) -> SleepNotes:
    """How models sleep on this worker, earlier starts included."""
    notes = RedisSleepNotes(client, worker)
    return SleepNotes(notes.read(), keep=notes.save)


def keeper_of_measurements(
    client: RedisClient, settings: Settings, machine: Machine
) -> Callable[[Placement, Measured], None]:
    """What a load measured goes to Redis, beside what was predicted."""
    measurements, names = RedisMeasurements(client), engine_names(settings)

    def keep(placement: Placement, measured: Measured) -> None:
        key = placement.load_key(engine=names[placement.spec.engine], device=device_name(machine, placement.gpus))
        measurements.save(Measurement(key=key, predicted=placement.memory, measured=measured, at=utc_now()))

    return keep
