"""
What is here, and what can it serve? Looks at the machine, the catalogue and the engines before anything is started.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from redis.exceptions import RedisError

from common.errors import EngineMissing
from common.redis_client import connect
from common.settings import Settings
from worker.catalog.catalogue import Catalogue
from worker.catalog.hub import out_of_reach
from worker.catalog.local import read_all_facts, spec_from_path
from worker.catalog.spec import EngineKind, ModelSpec
from worker.catalog.toml_file import load_catalogue
from worker.engines.llamacpp_server import find_server
from worker.hardware.detect import Detected, open_reader
from worker.hardware.gpu import Machine
from worker.memory.measured import LoadKey, Measurement, device_name
from worker.selection.choose import Choice, choose_models
from worker.selection.lessons import Lessons
from worker.selection.overrides import Overrides
from worker.selection.placement import Placement
from worker.telemetry.redis_measured import RedisMeasurements
from worker.wiring.engines import engine_names, most_asleep, vllm_version, why_not_here


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The machine, the catalogue and the choice: all that is known before anything is started."""

    detected: Detected
    machine: Machine
    catalogue: Catalogue
    engines: Mapping[EngineKind, str | None]  # why an engine is not available; None = it is
    choice: Choice
    lessons: Lessons

    def measured(self, placement: Placement) -> Measurement | None:
        """What the last load of this very *placement* took; None if nobody has loaded it yet."""
        engine = self.lessons.engines[placement.spec.engine]
        key = placement.load_key(engine=engine, device=device_name(self.machine, placement.gpus))
        return self.lessons.measurements.get(key)


def survey(settings: Settings) -> Survey:
    """
    Look at the machine and choose the models; nothing is started, nothing is written.

    What earlier loads measured counts if Redis is there to say it.

    Raises
    ------
    Misconfigured
        A setting, the catalogue, or VLLM_MODEL is wrong; the message says what to do.
    """
    detected = open_reader(settings.worker)
    machine = detected.reader.read()
    catalogue = load_catalogue(settings.models.file, base_dir=settings.models.dir)
    model = _asked_model(settings, catalogue)
    if settings.worker.stub_engine:
        catalogue = Catalogue(
            models=tuple(replace(spec, engine=EngineKind.STUB, path=None, repo=None) for spec in catalogue)
        )
    catalogue, missing = read_all_facts(catalogue)
    engines = why_not_here(settings)
    lessons = Lessons(measurements=_measurements(settings), engines=engine_names(settings))
    choice = choose_models(
        machine,
        catalogue,
        engines=engines,
        overrides=_overrides(settings, model),
        missing={**missing, **out_of_reach(catalogue)},
        lessons=lessons,
    )
    return Survey(
        detected=detected, machine=machine, catalogue=catalogue, engines=engines, choice=choice, lessons=lessons
    )


def _measurements(settings: Settings) -> Mapping[LoadKey, Measurement]:
    """What earlier loads of this fleet measured; nothing where no Redis answers."""
    client = connect(settings.redis.url)
    try:
        client.ping()
    except (RedisError, OSError):
        return {}
    return RedisMeasurements(client).read()


def _asked_model(settings: Settings, catalogue: Catalogue) -> str | ModelSpec | None:
    """VLLM_MODEL as the choice wants it: a name that the catalogue knows, or an entry made for it."""
    name = settings.vllm.model
    if name is None or catalogue.find(name) is not None:
        return name
    return spec_from_path(name, base_dir=settings.models.dir)


def _overrides(settings: Settings, model: str | ModelSpec | None) -> Overrides:
    return Overrides(
        model=model,
        only=settings.models.only,
        force=settings.vllm.force,
        quantization=settings.vllm.quantization,
        max_model_len=settings.vllm.max_model_len,
        gpu_memory_utilization=settings.vllm.gpu_memory_utilization,
        tensor_parallel_size=settings.vllm.tensor_parallel_size,
        max_num_seqs=settings.vllm.max_num_seqs,
        llamacpp_parallel=settings.llamacpp.parallel,
        n_gpu_layers=_gpu_layers(settings),
        vllm_version=vllm_version(settings),
        residents=settings.switch.max_residents,
        asleep=most_asleep(settings),
    )


def _gpu_layers(settings: Settings) -> int | None:
    """The operator's number of layers, or none on the card for xllamacpp: its build on PyPI knows no card."""
    asked = settings.llamacpp.n_gpu_layers
    if asked is not None:
        return asked
    try:
        program = Path(find_server(settings.llamacpp)[0])
    except EngineMissing:
        return None
    return 0 if program == Path(sys.executable) else None
