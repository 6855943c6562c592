"""
How far is the estimate of memory off? Makes the table of docs/memory.md from start-up logs.

    python bench/memory_table.py DATA_DIR [--write docs/memory.md]

DATA_DIR has vllm.jsonl and gguf.jsonl, a line for each start-up that was logged, and models.jsonl, what was known of
each model. Every row is asked as a line of `shiftworker estimate --batch` would be.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.estimates import answer_case
from worker.memory.case import Answer, Case, read_case
from worker.memory.constants import GIB

_MIB = 2**20
_MARKS = "<!-- table: made by bench/memory_table.py -->", "<!-- end of the table -->"
_TOO_LOW = 0.02  # of the card
_ROUNDING = 0.01  # percent; logs have two decimals of a MiB
_WORST = 10

# Why a row is far off, where the log or its source tells. A row without a line here has no known cause.
CAUSES = {
    "Laguna-S": "nothing is known of the model but its name, which says no size",
    "Qwen3.8-27B": "nothing is known but the name: a guess",
    "gemma-3-27b-it-int4-awq": "a fork of the old engine for AMD; quantization_config is not known",
    "qwen3.5-122b-a10b-nvfp4": "the draft layer is loaded too; quantization_config is not known",
    "Qwen3.5-27B 4-bit": "neither the scheme nor the type of the KV cache is known",
    "Qwen3-VL-Embedding-2B": "the tower is not in the config (with it the estimate is 16 % too high: not explained)",
    "gemma-4-26B-A4B-it-qat-AWQ": "quantization_config is not known",
    "Qwen2.5-1.5B-Instruct": "a private build of vLLM",
    "llava-v1.5-13B-AWQ": "the tower is not in the config",
    "Huihui-gpt-oss-20b": "vLLM has the defaults of large cards on this one in 0.32; the log has those of small ones",
    "Qwen3-8B-AWQ": "max_num_batched_tokens is not in the log",
    "Qwen2.5-7B-Instruct-AWQ": "max_num_batched_tokens is not in the log",
    "Qwen3.5-0.8B": "the size of the file is not in the log: a guess from the name",
    "Gemma-4-26B-A4B-It": "the log says no number of KV heads, for it differs by layer",
    "Mistral-Small-2409": "the type of the cache is not in the log; with q8_0 the estimate is exact",
    "Mistral-Small-3.2-24B-Instruct-2506": "max_num_seqs is not in the log",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of one start-up: what was logged, and what was estimated (None = not answered)."""

    figure: str
    model: str
    where: str
    logged: float
    estimated: float | None
    unit: str = "GiB"

    @property
    def error(self) -> float | None:
        """Relative; negative = too low."""
        return None if self.estimated is None else self.estimated / self.logged - 1


@dataclass(frozen=True, kw_only=True)
class Bars:
    """What issue 3 asks for, in percent; None = it asks nothing."""

    median: float | None = None
    mean: float | None = None
    high: float | None = None  # of 95 % of the rows
    largest: float | None = None


# The order of the table.
FIGURES = {
    "vLLM: weights": Bars(median=0.3, mean=1, high=6),
    "vLLM: KV tokens of a known pool": Bars(mean=0.5),
    "vLLM: maximum concurrency, windows and states": Bars(mean=5),
    "vLLM: KV pool before loading": Bars(median=1.5, mean=5),
    "llama.cpp: weights, all layers on the card": Bars(largest=0.5),
    "llama.cpp: KV cache": Bars(largest=0),
}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def ask(row: dict[str, Any], config: dict[str, Any], **more: Any) -> Answer:
    """Ask for *row* what a batch would."""
    known = {key: row[key] for key in Case.model_fields if key in row and key != "engine"}
    case, problem, _ = read_case({**known, "config": config, **more})
    if case is None:
        raise SystemExit(f"{row['model']}: {problem}")
    return answer_case(case, None)


# --- vLLM ---------------------------------------------------------------------------------------------------


def vllm_rows(logs: Sequence[dict[str, Any]], models: dict[str, dict[str, Any]]) -> Iterator[Row]:
    """Every figure that a log has."""
    for log in logs:
        config = models[log["model"]]
        card = log["total_gpu_memory_GiB"]
        answer = ask(log, config, gpu_memory_gib=card)
        where = f"{log['vllm_version'] or '?'}, tp {log['tensor_parallel_size']}"
        yield from _weights(log, answer, where)
        if (pool := log["available_kv_cache_GiB"]) and pool > 0:
            held = ask(log, config, gpu_memory_gib=card, kv_pool_gib=pool)
            yield from _cache(log, config, held, where)
            # The old engine profiled in another way.
            if log["gpu_memory_utilization"] and log["engine"] != "V0" and (card or answer.kv_pool_bytes is not None):
                yield Row(
                    figure="vLLM: KV pool before loading", model=log["model"], where=where, logged=pool,
                    estimated=_gib(answer.kv_pool_bytes),
                )  # fmt: skip


def logged_weights(log: dict[str, Any]) -> float | None:
    """GiB; older logs say GB and mean GiB."""
    logged = log["model_loading_GiB"] or log["loading_weights_GB_as_logged"] or log["weights_take_GiB"]
    return None if logged is None else float(logged)


def _weights(log: dict[str, Any], answer: Answer, where: str) -> Iterator[Row]:
    if (logged := logged_weights(log)) is not None:
        yield Row(
            figure="vLLM: weights", model=log["model"], where=where, logged=logged, estimated=_gib(answer.weights_bytes)
        )


def _cache(log: dict[str, Any], config: dict[str, Any], held: Answer, where: str) -> Iterator[Row]:
    # With several kinds of layers the logged tokens are no capacity; the concurrency is (vllm#51041).
    mixed = any(config.get(key) for key in ("sliding_window", "hybrid", "full_attention_interval"))
    if mixed and log["max_concurrency_x"]:
        yield Row(
            figure="vLLM: maximum concurrency, windows and states", model=log["model"], where=where,
            logged=log["max_concurrency_x"], estimated=held.max_concurrency, unit="x",
        )  # fmt: skip
    elif log["gpu_kv_cache_tokens"] and not mixed:
        yield Row(
            figure="vLLM: KV tokens of a known pool", model=log["model"], where=where,
            logged=log["gpu_kv_cache_tokens"], estimated=held.kv_tokens, unit="tokens",
        )  # fmt: skip


def too_low(logs: Sequence[dict[str, Any]], models: dict[str, dict[str, Any]]) -> tuple[int, list[str]]:
    """Rows of the present engine with all terms, and those whose sum is too low by more than 2 % of the card."""
    asked, low = 0, []
    for log in logs:
        weights, card = logged_weights(log), log["total_gpu_memory_GiB"]
        if log["peak_activation_GiB"] is None or weights is None or card is None or log["engine"] == "V0":
            continue
        answer = ask(log, models[log["model"]], gpu_memory_gib=card)
        logged = weights + log["peak_activation_GiB"] + max(0, log["non_torch_GiB"] or 0)
        terms = answer.weights_bytes, answer.activation_bytes, answer.non_torch_bytes
        if None in terms:
            continue
        asked += 1
        estimated = sum(term or 0 for term in terms) / GIB
        if estimated - logged < -_TOO_LOW * card:
            low.append(f"{log['model']}: {estimated:.2f} of {logged:.2f} GiB on {card:g} GiB{_cause(log['model'])}")
    return asked, low


# --- llama.cpp ----------------------------------------------------------------------------------------------


def gguf_rows(logs: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """Weights where all layers are on cards, and the KV cache wherever it is."""
    for log in logs:
        kept_as = re.search(r"K \((\w+)\)", log["kv_types"] or "")
        answer = ask(
            log, log, engine="llamacpp", quantization=log["quant"], max_model_len=log["n_ctx"],
            n_gpu_layers=log["n_gpu_layers_offloaded"],
            kv_cache_dtype=kept_as[1] if kept_as else None, gpu=None,
        )  # fmt: skip
        where = str(log["quant"] or "?")
        on_cards = sum(
            size for name, size in log["model_buffer_MiB"].items() if not name.startswith("CPU") and "Host" not in name
        )
        if on_cards and log["quant"] and log["n_gpu_layers_offloaded"] == log["layers_total_incl_output"]:
            yield Row(
                figure="llama.cpp: weights, all layers on the card", model=log["model"], where=where,
                logged=on_cards / 1024, estimated=_gib(answer.weights_bytes),
            )  # fmt: skip
        if log["kv_buffer_MiB"]:
            yield Row(
                figure="llama.cpp: KV cache", model=log["model"], where=where,
                logged=sum(log["kv_buffer_MiB"].values()) / 1024, estimated=_gib(answer.kv_pool_bytes),
            )  # fmt: skip


# --- The table ----------------------------------------------------------------------------------------------


def make_table(rows: Sequence[Row], asked: int, low: Sequence[str]) -> str:
    """Write the figures, the rows that are too low, and the worst of the weights as Markdown."""
    by_figure: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_figure[row.figure].append(row)
    lines = [
        "| Figure | Rows | Answered | Median | Mean | 95 % under | Largest |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(_line(figure, by_figure[figure], bars) for figure, bars in FIGURES.items() if by_figure[figure]),
        "",
        f"Too low in total (weights, activation, CUDA) by more than 2 % of the card: {len(low)} of {asked} (3 %).",
        *(f"- {line}" for line in low),
        "",
        "Rows of llama.cpp beyond the bar, or without an answer:",
        "",
        *(f"- {_beyond(row)}" for row in rows if _is_beyond(row)),
        "",
        f"The {_WORST} worst rows of vLLM's weights, and those without an answer:",
        "",
        "| Model | vLLM | Logged | Estimated | Error | Cause |",
        "|---|---|---:|---:|---:|---|",
        *map(_worst, _by_error(by_figure["vLLM: weights"])),
    ]
    return "\n".join(lines)


def _line(figure: str, rows: Sequence[Row], bars: Bars) -> str:
    errors = sorted(abs(row.error) * 100 for row in rows if row.error is not None)
    if not errors:
        return f"| {figure} | {len(rows)} | 0 | | | | |"
    high = errors[min(len(errors) - 1, int(0.95 * len(errors)))]
    cells = (
        (statistics.median(errors), bars.median),
        (statistics.mean(errors), bars.mean),
        (high, bars.high),
        (errors[-1], bars.largest),
    )
    shown = " | ".join(f"{value:.2f} %{'' if bar is None else f' ({bar:g})'}" for value, bar in cells)
    return f"| {figure} | {len(rows)} | {100 * len(errors) / len(rows):.0f} % | {shown} |"


def _is_beyond(row: Row) -> bool:
    bar = FIGURES[row.figure].largest
    return bar is not None and (row.error is None or abs(row.error) * 100 > bar + _ROUNDING)


def _beyond(row: Row) -> str:
    found = "no answer" if row.error is None else f"{row.estimated:.2f} of {row.logged:.2f} {row.unit}"
    return f"{row.figure.partition(': ')[2]}, {row.model}, {row.where}: {found}{_cause(row.model)}"


def _by_error(rows: Sequence[Row]) -> list[Row]:
    unanswered = [row for row in rows if row.error is None]
    answered = sorted((row for row in rows if row.error is not None), key=lambda row: -abs(row.error or 0))
    return [*answered[:_WORST], *unanswered]


def _worst(row: Row) -> str:
    error = "" if row.error is None else f"{100 * row.error:+.1f} %"
    estimated = "" if row.estimated is None else f"{row.estimated:.2f}"
    cause = _cause(row.model).removeprefix("; ")
    return f"| {row.model} | {row.where} | {row.logged:.2f} | {estimated} | {error} | {cause} |"


def _cause(model: str) -> str:
    return next((f"; {why}" for name, why in CAUSES.items() if name in model), "")


def _gib(size: int | None) -> float | None:
    return None if size is None else size / GIB


def main() -> None:
    """Print the table, or put it between the marks of a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA_DIR")
    parser.add_argument("--write", type=Path, metavar="PAGE")
    told = parser.parse_args()
    models = {row["model"]: row for row in read_rows(told.data / "models.jsonl")}
    logs = read_rows(told.data / "vllm.jsonl")
    rows = [*vllm_rows(logs, models), *gguf_rows(read_rows(told.data / "gguf.jsonl"))]
    table = make_table(rows, *too_low(logs, models))
    if told.write is None:
        sys.stdout.write(f"{table}\n")
        return
    before, _, rest = told.write.read_text(encoding="utf-8").partition(_MARKS[0])
    after = rest.partition(_MARKS[1])[2]
    told.write.write_text(f"{before}{_MARKS[0]}\n\n{table}\n\n{_MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
