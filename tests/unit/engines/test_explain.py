"""
Why an engine did not start, out of logs as vLLM 0.32 and llama.cpp print them.
"""

from __future__ import annotations

import pytest

from worker.engines.explain import KILLED, MAX_CHARS, explain_failure, ran_out_of_memory

VLLM_KV = """\
INFO 11-21 12:00:00 [importing.py:68] Triton not installed
(EngineCore pid=71) ERROR 11-21 12:00:09 [core.py:1102] EngineCore failed to start.
(EngineCore pid=71) ERROR 11-21 12:00:09 [core.py:1102] Traceback (most recent call last):
(EngineCore pid=71) ERROR 11-21 12:00:09 [core.py:1102]   File "core.py", line 1, in run
(EngineCore pid=71) ERROR 11-21 12:00:09 [core.py:1102] ValueError: To serve at least one request, 2.0 GiB are needed
(APIServer pid=70) Traceback (most recent call last):
(APIServer pid=70) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
VLLM_PYDANTIC = """\
(APIServer pid=70)     s.__pydantic_validator__.validate_python(ArgsKwargs(args, kwargs), self_instance=s)
(APIServer pid=70) pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
(APIServer pid=70)   Value error, User-specified max_model_len (100000) is greater than the derived max_model_len
"""
LLAMACPP = """\
0.00.004.504 W srv          init: security: no API key is set and CORS allows all origins
0.00.004.186 E llama_model_load: error loading model: tensor 'output.weight' data is not within the file bounds
0.00.004.212 E llama_model_load_from_file_impl: failed to load model
0.00.004.395 E cmn  common_init_: failed to load model '/models/a.gguf'
0.00.004.717 E srv          init: exiting due to model loading error
"""

ROWS = [
    (VLLM_KV, "It said: ValueError: To serve at least one request, 2.0 GiB are needed."),
    (
        VLLM_PYDANTIC,
        (
            "It said: pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig / "
            "Value error, User-specified max_model_len (100000) is greater than the derived max_model_len."
        ),
    ),
    (
        LLAMACPP,
        (
            "It said: llama_model_load: error loading model: tensor 'output.weight' data is not within the file bounds"
            " / llama_model_load_from_file_impl: failed to load model"
            " / cmn  common_init_: failed to load model '/models/a.gguf'."
        ),
    ),
    ("one\ntwo\nthree\nfour\n", "It said: two / three / four."),
    ("", "It printed nothing."),
    ("\n \n", "It printed nothing."),
]


@pytest.mark.parametrize(("log", "said"), ROWS)
def test_the_lines_that_help_are_picked(log: str, said: str) -> None:
    """The root cause, without process ids and dates, and not what followed from it."""
    assert explain_failure(log) == said


def test_a_generic_line_is_better_than_none() -> None:
    """When vLLM gave no other reason, its last word is still told."""
    log = "RuntimeError: Engine core initialization failed. See root cause above.\n"

    assert "Engine core initialization failed" in explain_failure(log)


def test_an_endless_line_is_cut() -> None:
    """A message stays readable whatever the engine prints."""
    assert len(explain_failure("ValueError: " + "x" * 100_000)) < MAX_CHARS + 20


@pytest.mark.parametrize(
    "line",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.16 GiB. GPU 0 has 23.99 GiB",
        "torch.cuda.OutOfMemoryError: CUDA out of memory.",
        "RuntimeError: CUDA error: out of memory",
        "ValueError: Free memory on device cuda:0 (3/24 GiB) on startup is less than desired GPU memory utilization",
        "ValueError: Available memory on node 0 (3.2/24.0 GiB) on startup is less than desired CPU memory utilization",
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
        "ValueError: To serve at least one request, (4.0 GiB KV cache is needed, which is larger than the available",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to",
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 5174 MiB on device: cudaMalloc failed: out of memory",
        "ggml_gallocr_reserve_n_impl: failed to allocate CUDA1 buffer of size 54262464512",
        "llama_model_load: error loading model: unable to allocate CUDA0 buffer",
        "alloc_tensor_range: failed to allocate CPU buffer of size 4398046511104",
        "terminate called after throwing an instance of 'std::bad_alloc'",
    ],
)
def test_want_of_memory_is_known_by_the_words_of_each_engine(line: str) -> None:
    """Wherever in the log it stands: what follows it are consequences."""
    assert ran_out_of_memory(f"INFO loading\n0.00.004.504 E {line}\nINFO shutting down", 1)


@pytest.mark.parametrize(
    "log",
    [
        *(log for log, _ in ROWS if log is not VLLM_KV),
        "INFO If out-of-memory error occurs during cudagraph capture, consider decreasing `gpu_memory_utilization`",
        "INFO GPU KV cache size: 80,544 tokens",
    ],
)
def test_other_failures_are_no_want_of_memory(log: str) -> None:
    """Nor is a hint of what could happen."""
    assert not ran_out_of_memory(log, 1)
    assert not ran_out_of_memory(log, None)


def test_a_killed_engine_may_have_lacked_memory() -> None:
    """The kernel leaves no word in the engine's own log."""
    assert ran_out_of_memory("", KILLED)
