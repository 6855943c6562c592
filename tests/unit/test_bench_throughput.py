"""
`shiftworker bench throughput`: its turns and medians on known figures, and what the baseline is given.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from common.errors import EngineFailed
from worker.bench.throughput import Form, Load, Throughput, list_forms, llm_arguments, measure_in_turns, run_baseline

LOAD = Load(prompts=2000, tokens=32, max_num_seqs=64)
SLOW, FAST = Form(in_process=True, threads=1), Form(in_process=False, threads=2)


def test_the_fastest_form_is_found_by_its_best_trial_and_both_sides_take_turns() -> None:
    """A first trial that a neighbour slowed does not cost the baseline its form; then each side with all prompts."""
    trials = {SLOW: iter([90.0, 80.0]), FAST: iter([50.0, 100.0])}
    turns = list[str]()
    engine, path = iter([400.0, 100.0, 300.0]), iter([(320.0, 10.0), (90.0, 40.0), (240.0, 30.0)])

    def engine_alone(load: Load, form: Form) -> float:
        turns.append(f"{load.prompts} {form}")
        return next(engine) if load == LOAD else next(trials[form])

    def whole_path(load: Load) -> tuple[float, float]:
        turns.append(f"{load.prompts} queue")
        return next(path)

    found = measure_in_turns(
        LOAD, [SLOW, FAST], generate=engine_alone, queue=whole_path, runs=3, tell=lambda _line: None
    )

    assert turns == [*[f"200 {SLOW}", f"200 {FAST}"] * 2, *[f"2000 {FAST}", "2000 queue"] * 3]
    assert found == Throughput(
        queue_jobs_per_s=240.0, engine_jobs_per_s=300.0, one_at_a_time_jobs_per_s=30.0, baseline=str(FAST), runs=3
    )


def test_no_two_prompts_begin_alike() -> None:
    """A prefix cache would else do the work of one side and not of the other."""
    assert len({text.split()[0] for text in LOAD.texts()}) == 2000


def _vllm(folder: Path, monkeypatch: pytest.MonkeyPatch, generates: str) -> None:
    """Lay a module in *folder* that stands in for vLLM where its Python looks."""
    (folder / "vllm.py").write_text(
        "import json, os, sys\n"
        "class SamplingParams:\n"
        "    def __init__(self, **given): self.given = given\n"
        "class LLM:\n"
        "    def __init__(self, **given): self.given = given\n"
        f"    def generate(self, prompts, params, use_tqdm): {generates}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_the_baseline_warms_up_and_then_generates_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the arguments, the form and the prompts that were asked for; what vLLM prints besides does not matter."""
    seen = tmp_path / "seen"
    call = "json.dumps([self.given, params.given, len(prompts), os.environ['OMP_NUM_THREADS']])"
    _vllm(tmp_path, monkeypatch, f"print({call}, file=open({str(seen)!r}, 'a')); print('vLLM says')")
    model = tmp_path / "m"

    assert run_baseline(Path(sys.executable), model, LOAD, FAST, gpus=()) > 0

    calls = [json.loads(line) for line in seen.read_text().splitlines()]
    params = {"max_tokens": 32, "temperature": 0, "ignore_eos": True}
    assert calls == [[llm_arguments(model, LOAD, gpus=()), params, prompts, "2"] for prompts in (8, 2000)]


def test_a_baseline_that_dies_gives_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last words are in the message."""
    _vllm(tmp_path, monkeypatch, "sys.exit('out of memory')")

    with pytest.raises(EngineFailed, match="out of memory"):
        run_baseline(Path(sys.executable), tmp_path / "m", LOAD, SLOW, gpus=())


def test_on_a_card_the_baseline_has_vllms_defaults() -> None:
    """Nothing slows it: it compiles, captures graphs and takes what memory there is, as our engine does there."""
    same = {"model": "/m", "max_model_len": 512, "max_num_seqs": 64, "disable_log_stats": True}

    assert llm_arguments(Path("/m"), LOAD, gpus=[0]) == same
    assert llm_arguments(Path("/m"), LOAD, gpus=[]) == {
        **same, "enforce_eager": True, "kv_cache_memory_bytes": 256 * 2**20,
    }  # fmt: skip


def test_the_forms_are_both_ways_by_the_threads_that_matter() -> None:
    """Without a card 1, all but one, and all of the cores; on a card torch's own choice."""
    told = [str(form) for form in list_forms(gpus=[], cores=4)]

    assert told == [f"{how}, OMP_NUM_THREADS={n}" for how in ("in process", "default") for n in (1, 3, 4)]
    assert len(list_forms(gpus=[], cores=1)) == 2
    assert [str(form) for form in list_forms(gpus=[0], cores=16)] == ["in process", "default"]


def test_a_form_is_told_to_vllm_by_its_environment() -> None:
    """The threads only where the form says how many."""
    [there, *_] = list_forms(gpus=[], cores=2)
    [_, default] = list_forms(gpus=[0], cores=2)

    assert there.environment() == {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    assert default.environment() == {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
