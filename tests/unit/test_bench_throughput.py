"""
`shiftworker bench throughput`: what both sides are given, on a card and without one.
"""

from __future__ import annotations

from pathlib import Path

from worker.bench.throughput import Load, list_forms, llm_arguments

LOAD = Load(prompts=2000, tokens=32, max_num_seqs=64)


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
