"""
A switcher on a real card with vLLM's CUDA build, for the tests of this folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from common.schemas import SwitchRecord
from tests.vllm_here import cuda_python, on_card
from worker.catalog.download import resolve_files
from worker.catalog.local import spec_from_path
from worker.catalog.spec import EngineKind
from worker.demo.tiny_hf import make_tiny_hf
from worker.engines.stub import StubEngine
from worker.engines.vllm_host import VllmHostEngine
from worker.hardware.nvml import NvmlReader
from worker.residency.board import ResidencyBoard
from worker.residency.check import LoadLimits
from worker.residency.parts import SwitchLimits
from worker.residency.switcher import Switcher
from worker.selection.placement import Placement

START_S = 400  # vLLM imports, compiles and captures its graphs


class CardBox:
    """Models of random weights, each placed on the card beside others, and a switcher for them."""

    def __init__(self, run_dir: Path, models: Path, layers: Mapping[str, int], *, max_residents: int = 1) -> None:
        self.reader = NvmlReader()
        self.engine = VllmHostEngine(
            run_dir=run_dir, files_of=resolve_files, python=cuda_python(), several_cards=StubEngine(), sleeps=True
        )
        self.placements: dict[str, Placement] = {}
        for seed, (name, count) in enumerate(layers.items()):
            path = make_tiny_hf(models / name, hidden=4096, layers=count, seed=seed)
            self.placements[name] = on_card(spec_from_path(str(path)), max_model_len=1024)
        machine = self.reader.read()
        self.board = ResidencyBoard(
            capacity=machine.ram_total_bytes,
            cards={gpu.index: gpu.total_bytes for gpu in machine.gpus},
            max_residents=max_residents,
        )
        self.switcher = Switcher(
            board=self.board,
            placements=self.placements,
            engines={EngineKind.VLLM: self.engine},
            machine=self.reader,
            limits=SwitchLimits(
                attempt_s=START_S,
                attempts=1,
                drain_s=60,
                quarantine_s=1,
                asleep=2,
                load=LoadLimits(max_temperature_c=95, max_power_share=2),
            ),
            fetch=lambda _spec: None,
            hand_back=lambda _model_id: None,
            record=lambda _record: None,
        )

    def switch(self, model_id: str) -> SwitchRecord:
        """Make it ready; fails if it cannot be."""
        record = self.switcher.switch(model_id)
        print(f"{record.from_model} -> {model_id} from {record.level}: {record.seconds:.2f} s, {record.stages}")
        assert record.outcome == "ready", record.reason
        return record

    def free_bytes(self) -> int:
        """What NVML says of the card that the models are on."""
        [index] = {placement.gpus[0] for placement in self.placements.values()}
        free = next(gpu.free_bytes for gpu in self.reader.read().gpus if gpu.index == index)
        assert free is not None
        return free
