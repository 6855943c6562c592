"""
`shiftworker bench`: what this worker gains, as ratios measured in one run.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from common import logs
from common.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Measure this machine: ratios, each side in turn.")
_err = Console(stderr=True, soft_wrap=True)

_Json = Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object, in the last line.")]


@app.command()
def switch(
    *, runs: Annotated[int, typer.Option(min=1, help="of each side; medians are shown")] = 5, as_json: _Json = False
) -> None:
    """A switch between two tiny models, beside a restart of vLLM's own server."""
    from worker.bench.switch import bench_switch  # noqa: PLC0415 - it needs every part of a worker
    from worker.catalog.download import resolve_files  # noqa: PLC0415 - as above
    from worker.catalog.spec import EngineKind  # noqa: PLC0415 - as above
    from worker.engines.vllm_server import VllmServerEngine, find_python  # noqa: PLC0415 - as above
    from worker.hardware.detect import open_reader  # noqa: PLC0415 - as above
    from worker.wiring import build_engines  # noqa: PLC0415 - as above

    kind = EngineKind.VLLM
    with _ready() as (settings, folder):
        reader, python = open_reader(settings.worker).reader, find_python(settings.vllm)
        theirs = VllmServerEngine(run_dir=folder / "server", files_of=resolve_files, python=python)
        ours = build_engines(settings, {kind}, folder / "ours")[kind]
        found = bench_switch(folder, reader, ours=ours, theirs=theirs, runs=runs, tell=_tell)
    _show(dataclasses.asdict(found), "switch_s", "restart_s", as_json=as_json)


@app.command()
def levels(
    *,
    hidden: Annotated[int, typer.Option(min=64, help="of the model; 4096 and 32 layers are 5 billion weights")] = 4096,
    layers: Annotated[int, typer.Option(min=1, help="of the model")] = 32,
    runs: Annotated[int, typer.Option(min=1, help="of each level; medians are shown")] = 3,
    as_json: _Json = False,
) -> None:
    """What sleep costs and gives back on a card, beside the speed of its bus. Needs a card, and vLLM for it."""
    from worker.bench.levels import bench_levels, measure_bandwidth, place_on_card  # noqa: PLC0415 - as above
    from worker.catalog.spec import EngineKind  # noqa: PLC0415 - as above
    from worker.engines.vllm_server import find_python  # noqa: PLC0415 - as above
    from worker.hardware.detect import open_reader  # noqa: PLC0415 - as above
    from worker.wiring import build_engines  # noqa: PLC0415 - as above

    kind = EngineKind.VLLM
    with _ready() as (settings, folder):
        reader = open_reader(settings.worker).reader
        placement = place_on_card(folder, reader, hidden=hidden, layers=layers)
        ours = build_engines(settings, {kind}, folder / "ours")[kind]
        try:
            found = bench_levels(
                placement, ours, reader, runs=runs, tell=_tell,
                bandwidth=lambda: measure_bandwidth(find_python(settings.vllm), placement.gpus[0]),
            )  # fmt: skip
        finally:
            ours.close()
    _show(dataclasses.asdict(found), "restart_s", "wake_1_s", as_json=as_json)


@app.command()
def throughput(
    *,
    prompts: Annotated[int, typer.Option(min=1)] = 2000,
    tokens: Annotated[int, typer.Option(min=1, help="of each answer")] = 32,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="requests that both engines work on at once")] = 64,
    runs: Annotated[int, typer.Option(min=1, help="of each side; medians are shown")] = 3,
    as_json: _Json = False,
) -> None:
    """Jobs a second through the whole path, beside vLLM's own LLM.generate over the same prompts."""
    from worker.bench.throughput import Load, bench_throughput  # noqa: PLC0415 - it needs every part of a worker

    load = Load(prompts=prompts, tokens=tokens, max_num_seqs=max_num_seqs)
    with _ready() as (settings, folder):
        found = bench_throughput(settings, folder, load, runs=runs, tell=_tell)
    _show(dataclasses.asdict(found), "queue_jobs_per_s", "engine_jobs_per_s", as_json=as_json)


@contextmanager
def _ready() -> Iterator[tuple[Settings, Path]]:
    """The settings, and a folder that is gone afterwards."""
    settings = Settings.from_env()
    logs.configure("ERROR", settings.log.format)
    with tempfile.TemporaryDirectory(prefix="sw-", ignore_cleanup_errors=True) as folder:
        yield settings, Path(folder)


_tell: Callable[[str], None] = _err.print


def _show(figures: dict[str, object], above: str, below: str, *, as_json: bool) -> None:
    """Print the figures, and the ratio that matters: the first of the two by the second."""
    for name, value in figures.items():
        _tell(f"{name:>28}  {value}")
    first, second = figures[above], figures[below]
    if isinstance(first, float) and isinstance(second, float) and second:
        _tell(f"{f'{above} / {below}':>28}  {first / second:.3f}")
    if as_json:
        sys.stdout.write(json.dumps(figures) + "\n")
