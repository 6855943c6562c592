"""
The engine host answers as vLLM's own server does: one model, one body, field by field.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import ShiftworkerError
from tests.factories import make_placement, make_spec
from tests.vllm_here import vllm_python
from tests.vllm_models import make_thinker
from worker.catalog.spec import EngineKind, ModelSpec
from worker.engines.base import Call, Engine, StopSignal
from worker.engines.stub import StubEngine
from worker.engines.vllm_host import VllmHostEngine
from worker.engines.vllm_server import VllmServerEngine

pytestmark = pytest.mark.vllm

START_S = 200
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
# What may differ between two answers to the same body: names drawn at random, and the time.
DRAWN = {"id", "created", "system_fingerprint"}

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 3}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": SCHEMA}}
HELLO = [{"role": "user", "content": "hello"}]
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d\u2028é"},
]


def chat(**more: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": HELLO, "max_tokens": 6, "temperature": 0, **more}


def text(**more: Any) -> tuple[str, dict[str, Any]]:
    return TEXT, {"prompt": "hello", "max_tokens": 6, "temperature": 0, **more}


def schema(**more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, **more}}


BODIES = {
    "plain": chat(),
    "conversation": chat(messages=TALK),
    "sampled with a seed": chat(temperature=1.0, seed=7),
    "another seed": chat(temperature=1.0, seed=8),
    "top_p and top_k": chat(temperature=1.0, seed=1, top_p=0.5, top_k=5),
    "min_p": chat(temperature=1.0, seed=1, min_p=0.1),
    "penalties": chat(presence_penalty=1.0, frequency_penalty=1.0, repetition_penalty=1.3, max_tokens=12),
    "two choices": chat(n=2, temperature=1.0, seed=3),
    "logprobs": chat(logprobs=True, top_logprobs=3),
    "logprobs without top": chat(logprobs=True),
    "prompt logprobs": chat(prompt_logprobs=1),
    "stop by text": chat(stop=["a", "e", "\\"], max_tokens=60, ignore_eos=True),
    "stop by text, kept": chat(stop=["\\"], max_tokens=60, include_stop_str_in_output=True),
    "stop by token": chat(stop_token_ids=list(range(40, 258)), max_tokens=60),
    "at least": chat(min_tokens=5, max_tokens=9),
    "max_completion_tokens": (CHAT, {"messages": HELLO, "max_completion_tokens": 3, "temperature": 0}),
    "token ids returned": chat(return_token_ids=True),
    "logit bias": chat(logit_bias={"70": 100}),
    "allowed tokens": chat(allowed_token_ids=[70, 71, 72]),
    "bad words": chat(bad_words=["a"]),
    "template argument": chat(chat_template_kwargs={"shout": True}),
    "no generation prompt": chat(add_generation_prompt=False),
    "continue the last message": chat(
        messages=[*HELLO, {"role": "assistant", "content": "well"}],
        add_generation_prompt=False,
        continue_final_message=True,
    ),
    "echo": chat(echo=True),
    "json object": chat(response_format={"type": "json_object"}, max_tokens=20),
    "json schema": chat(response_format=schema(), max_tokens=60),
    "json schema, strict": chat(response_format=schema(strict=True), max_tokens=60),
    "regex": chat(structured_outputs={"regex": "[0-9]{3}"}, max_tokens=9),
    "choice": chat(structured_outputs={"choice": ["yes", "no"]}),
    "thinking ended": chat(logit_bias={"257": 100}),
    "tools, none": chat(tools=[TOOL], tool_choice="none"),
    "tools, auto": chat(tools=[TOOL], tool_choice="auto"),
    "tools, required": chat(tools=[TOOL], tool_choice="required", max_tokens=120),
    "tools, named": chat(
        tools=[TOOL], tool_choice={"type": "function", "function": {"name": "weather"}}, max_tokens=90
    ),
    "streamed": chat(stream=True),
    "streamed with usage": chat(stream=True, stream_options={"include_usage": True}),
    "streamed, two choices": chat(stream=True, n=2, temperature=1.0, seed=3),
    "text": text(),
    "text, several": text(prompt=["hello", "world"]),
    "text, token ids": text(prompt=[70, 71, 72]),
    "text, echo and logprobs": text(echo=True, logprobs=2),
    "text, two choices": text(n=2, temperature=1.0, seed=5),
    "text, streamed": text(stream=True),
    "text, stop": text(stop="\\", max_tokens=40),
    "prompt too long": chat(messages=[{"role": "user", "content": "x" * 3000}]),
    "answer too long": chat(max_tokens=5000),
    "no messages": (CHAT, {}),
    "messages are text": chat(messages="no"),
    "a field of the wrong kind": chat(max_tokens="many"),
    "nothing to generate": chat(max_tokens=0),
    "temperature below zero": chat(temperature=-1),
    "no such schema": chat(
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 3}}}
    ),
    "no such role": chat(messages=[{"content": "x"}]),
    "tool_choice without tools": chat(tool_choice="required"),
    "too many logprobs": chat(logprobs=True, top_logprobs=500),
    "token out of the vocabulary": text(prompt=[100000]),
    "another model": chat(model="somebody"),
    "no such path": ("/v1/nothing", {}),
}


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """A model with tools and thoughts: two bytes that no text holds become the tokens around a thought."""
    folder = make_thinker(tmp_path_factory.mktemp("model") / "tiny")
    return make_spec(
        "tiny",
        engine=EngineKind.VLLM,
        path=folder,
        repo=None,
        file=None,
        tool_parser="hermes",
        reasoning_parser="deepseek_r1",
    )


@pytest.fixture(scope="module")
def engines(spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Engine]]:
    """Both with the same model, and one core each, so that they add in the same order."""
    python = vllm_python()
    server = VllmServerEngine(run_dir=tmp_path_factory.mktemp("s"), files_of=files_of, python=python, cpu_count=2)
    host = VllmHostEngine(
        run_dir=tmp_path_factory.mktemp("h"),
        files_of=files_of,
        python=python,
        cpu_count=2,
        several_cards=StubEngine(),
    )
    placement = make_placement("tiny", spec=spec, max_num_seqs=8)
    for engine in (server, host):
        engine.ensure_ready(placement, timeout_s=START_S)
    yield server, host
    server.close()
    host.close()


def files_of(spec: ModelSpec) -> Path:
    assert spec.path is not None
    return spec.path


def ask(engine: Engine, path: str, body: dict[str, Any]) -> tuple[str, object]:
    """What comes back: a response, or the error's class and words."""
    chunks: list[Any] = []
    call = Call(
        path=path,
        body={"model": "tiny", **body},
        timeout_s=60,
        on_chunk=chunks.append if body.get("stream") else None,
    )
    try:
        done = engine.generate("tiny", call, StopSignal())
    except ShiftworkerError as error:
        return error.kind, error.message
    assert bool(chunks) == bool(body.get("stream"))
    return "answer", without_drawn(done.response)


def without_drawn(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_drawn(found) for key, found in value.items() if key not in DRAWN}
    return [without_drawn(found) for found in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", BODIES)
def test_the_host_answers_as_the_server_does(engines: tuple[Engine, Engine], name: str) -> None:
    """Every field, and of a refused body the error and its words."""
    server, host = engines

    assert ask(host, *BODIES[name]) == ask(server, *BODIES[name])


def test_most_bodies_are_answered(engines: tuple[Engine, Engine]) -> None:
    """Two engines that refuse everything would agree too."""
    _, host = engines

    kinds = {name: ask(host, path, body)[0] for name, (path, body) in BODIES.items()}

    refused = [name for name, kind in kinds.items() if kind != "answer"]
    assert set(kinds.values()) == {"answer", "InvalidRequest", "PromptTooLong"}
    assert refused == list(BODIES)[list(BODIES).index("prompt too long") :]
