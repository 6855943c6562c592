"""
`shiftworker models`, `doctor`, `estimate`: what is here, what fits, and what a model would take.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from common.errors import BadSetting
from worker import show
from worker.cli.console import EXIT_UNAVAILABLE, Json, err, out, print_json, read_settings, wiring

app = typer.Typer()


@app.command()
def models(*, as_json: Json = False) -> None:
    """Show which models this machine can serve, how, and why each other one is left out."""
    found = wiring().survey(read_settings())
    if as_json:
        print_json(show.choice_as_dict(found.choice, found.measured))
        return
    out.print(show.machine_line(found.machine))
    for reason in found.detected.passed_over:
        out.print(f"  passed over {reason}", style="dim", highlight=False)
    out.print(show.choice_table(found.choice, found.measured))


@app.command()
def doctor(*, as_json: Json = False) -> None:
    """Look at this machine: what is here, what fits, what would be chosen and why, what is missing."""
    from worker import doctor as examine  # noqa: PLC0415 - it knows every part, and a producer has only some

    report = examine.examine(read_settings())
    if as_json:
        print_json(report.as_dict())
    else:
        out.print(show.doctor_report(report))
    if not report.healthy:
        raise typer.Exit(EXIT_UNAVAILABLE)


@app.command()
def estimate(
    model: Annotated[
        str | None, typer.Argument(help="catalogue id, folder, config.json, .gguf file, or hub id")
    ] = None,
    *,
    engine: Annotated[str | None, typer.Option(help="vllm or llamacpp")] = None,
    vllm_version: Annotated[str | None, typer.Option(help="constants of this version")] = None,
    quantization: Annotated[str | None, typer.Option(help="awq, gptq, fp8, mxfp4, Q4_K_M ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="of weights that are not packed")] = None,
    kv_cache_dtype: Annotated[str | None, typer.Option(help="auto, fp8; llama.cpp: f16, q8_0 ...")] = None,
    tensor_parallel_size: Annotated[int | None, typer.Option(help="cards that share every layer")] = None,
    pipeline_parallel_size: Annotated[int | None, typer.Option(help="stages of layers, one after the other")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="tokens of prompt and answer")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="requests at once; llama.cpp: slots")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="tokens of one step; llama.cpp: ubatch")] = None,
    gpu_memory_gib: Annotated[float | None, typer.Option(help="of one card, as the driver says")] = None,
    gpu_memory_utilization: Annotated[float | None, typer.Option(help="share of it, 0 to 1")] = None,
    gpu: Annotated[str | None, typer.Option(help="the card's name, where its memory is not given")] = None,
    n_gpu_layers: Annotated[int | None, typer.Option(help="llama.cpp: layers on the card; -1 = all")] = None,
    batch: Annotated[Path | None, typer.Option(help="a file with a JSON object for each case")] = None,
    as_json: Json = False,
) -> None:
    """Compute what a model takes on a card, term by term, before it is loaded."""
    from worker import estimates  # noqa: PLC0415 - it reads files that a producer has no use for

    options = {key: value for key, value in locals().items() if key not in {"batch", "as_json", "estimates"}}
    if (model is None) == (batch is None):
        raise BadSetting("shiftworker estimate needs a MODEL, or --batch with a file: one of the two.")
    if batch is not None:
        _estimate_batch(batch)
        return
    answer = estimates.answer_named(options, read_settings())
    if as_json:
        print_json(answer.model_dump(mode="json"))
    else:
        out.print(show.answer_table(answer))


def _estimate_batch(file: Path) -> None:
    """Print an answer for each line of *file*; keys that mean nothing are named once, on stderr."""
    from worker import estimates  # noqa: PLC0415 - as above

    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadSetting(f"--batch {file} cannot be read: {error}.") from None
    ignored: set[str] = set()
    for answer, unknown in estimates.answer_lines(lines, read_settings()):
        for key in [key for key in unknown if key not in ignored]:
            err.print(f"ignored: {escape(key)} means nothing here", highlight=False, soft_wrap=True)
            ignored.add(key)
        sys.stdout.write(answer.model_dump_json() + "\n")
