"""
Everything that a lent card can tell, in one go: memory as predicted and as measured, sleep and wake, jobs a second.

    VLLM_PYTHON=/path/to/python-with-vllm-for-cuda .venv/bin/python bench/gpu/measure.py --out OUT

The parts are independent: one that fails is told, and the others go on. OUT/figures.json has what was measured, and
OUT/performance.md the rows for docs/performance.md, with the date and the card. About half an hour for --part all.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.errors import Misconfigured, ShiftworkerError
from common.settings import Settings
from worker.bench.levels import place_on_card
from worker.catalog.spec import EngineKind
from worker.hardware.detect import open_reader
from worker.hardware.gpu import MachineReader
from worker.residency.verify import verify
from worker.wiring import build_engines

_START_S = 600.0  # vLLM imports, compiles and captures its graphs
_SETTLED_S = 10.0  # for the driver to count what a process has given back
_SIZES = {"0.2 billion weights": (1024, 8), "1 billion": (2048, 16), "5 billion": (4096, 24)}  # hidden, layers

Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing to measure."""

    title: str
    measure: Callable[[], Figures]


def memory(settings: Settings, reader: MachineReader) -> Figures:
    """Load models of several sizes, each alone: bytes that the card's free memory lost, beside the plan's."""
    return {name: dict(_load(settings, reader, *size)) for name, size in _SIZES.items()}


def _load(settings: Settings, reader: MachineReader, hidden: int, layers: int) -> Iterator[tuple[str, float | None]]:
    with tempfile.TemporaryDirectory(prefix="sw-") as folder:
        placement = place_on_card(Path(folder), reader, hidden=hidden, layers=layers)

        def free() -> int:
            found = next(gpu.free_bytes for gpu in reader.read().gpus if gpu.index == placement.gpus[0])
            if found is None:
                raise Misconfigured("The driver does not say how much of the card is free.")
            return found

        [engine] = build_engines(settings, {EngineKind.VLLM}, Path(folder) / "run").values()
        try:
            before = free()
            loaded = engine.ensure_ready(placement, timeout_s=_START_S)
            verify(engine, placement, timeout_s=_START_S)
            taken = before - free()
            engine.ensure_stopped(placement.model_id, timeout_s=_START_S)
            time.sleep(_SETTLED_S)
            yield "load_s", round(loaded.seconds, 2)
            yield "predicted_bytes", placement.memory.total
            yield "measured_bytes", taken
            yield "error", round(placement.memory.total / taken - 1, 3)
            yield "kv_predicted_bytes", placement.kv_cache_bytes
            yield "kv_measured_bytes", loaded.measured.kv_pool
            yield "not_given_back_bytes", before - free()
        finally:
            engine.close()


def bench(*arguments: str) -> Figures:
    """Run `shiftworker bench` as an operator does; its last line is the figures."""
    line = [sys.executable, "-m", "worker", "bench", *arguments, "--json"]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise Misconfigured(f"`{' '.join(line)}` ended with {done.returncode}; what it said stands above.")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def parts(settings: Settings, reader: MachineReader) -> Mapping[str, Part]:
    """Name what can be measured, the shortest first."""
    return {
        "memory": Part(title="Memory, predicted and measured", measure=lambda: memory(settings, reader)),
        "levels": Part(title="Sleep and wake", measure=lambda: bench("levels")),
        "switch": Part(title="A switch, beside a restart of vLLM's server", measure=lambda: bench("switch")),
        "throughput": Part(
            title="Jobs a second, beside LLM.generate",
            measure=lambda: bench("throughput", "--max-num-seqs", "256"),
        ),
    }


def as_rows(title: str, figures: Figures) -> Iterator[str]:
    """Write *figures* as a section of a page; those of several things as a row for each."""
    yield f"\n## {title}\n"
    rows = figures if all(isinstance(value, dict) for value in figures.values()) else {"": figures}
    names = list(next(iter(rows.values()), {}))
    if "" in rows:
        yield "| figure | |\n| --- | --- |"
        yield from (f"| `{name}` | {_shown(figures[name])} |" for name in names)
    else:
        yield f"| | {' | '.join(f'`{name}`' for name in names)} |\n| --- |{' --- |' * len(names)}"
        yield from (f"| {key} | {' | '.join(_shown(row.get(n)) for n in names)} |" for key, row in rows.items())


def _shown(value: object) -> str:
    if value is None:
        return "not measured"
    return f"{value:,}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def main() -> int:
    """Measure what was asked for; returns 1 if some part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", choices=["all", "memory", "levels", "switch", "throughput"], default="all")
    options = parser.parse_args()
    settings = Settings.from_env()
    reader = open_reader(settings.worker).reader
    cards = ", ".join(gpu.name for gpu in reader.read().gpus)
    if not cards:
        sys.exit("This machine has no card. Run it where nvidia-smi shows one.")
    options.out.mkdir(parents=True, exist_ok=True)
    page, found, failed = [f"{datetime.now(UTC):%d %B %Y}, {cards}"], dict[str, Figures](), False
    for name, part in parts(settings, reader).items():
        if options.part not in (name, "all"):
            continue
        try:
            found[name] = part.measure()
        except ShiftworkerError as error:
            failed = True
            sys.stderr.write(f"{name}: {error.message}\n")
            continue
        page += as_rows(part.title, found[name])
        # After each part: the machine may be taken back at any moment.
        (options.out / "figures.json").write_text(json.dumps({"card": cards, **found}, indent=1))
        (options.out / "performance.md").write_text("\n".join(page) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
