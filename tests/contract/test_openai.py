"""
What OpenAI's body asks for goes through every engine unchanged, streamed and not: tools, JSON, thoughts, embeddings.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest

from common.schemas import JobRequest
from common.settings import LlamaCppSettings
from tests.factories import make_placement, make_spec
from tests.vllm_here import vllm_python
from worker.catalog.spec import EngineKind, ModelSpec
from worker.demo.tiny_hf import byte_vocabulary, make_tiny_hf
from worker.demo.tiny_models import make_tiny_gguf
from worker.engines.base import Call, Completion, Engine, StopSignal
from worker.engines.llamacpp_server import LlamaCppEngine, find_server
from worker.engines.stub import StubEngine
from worker.engines.vllm_host import VllmHostEngine
from worker.engines.vllm_server import VllmServerEngine

LENGTH = 2048
START_S = 250
# Thinks unless it is told not to, as Qwen3 does; knows tools.
TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: "
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content or '' }}\n"
    "{% endfor %}"
    "assistant:"
    "{% if add_generation_prompt and (enable_thinking is not defined or enable_thinking) %}<think>\n{% endif %}"
)
PLAIN = {"chat_template_kwargs": {"enable_thinking": False}}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Bonn", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "of", "parameters": CITY, "strict": True}}
# JSON may have any white space, and a model of random weights likes it; a byte of it is a token of the tiny vLLM model.
NO_SPACE = {"logit_bias": {str(byte_vocabulary()[space]): -100 for space in "\u0120\u010a\u0109\u010d"}}


@dataclass(frozen=True, kw_only=True)
class Kit:
    """One engine, its chat model and its embedding model; each starts when it is first asked."""

    engine: Engine
    chat: ModelSpec
    embedder: ModelSpec
    thoughts: str  # the field they come in
    tidy: Mapping[str, Any]  # what keeps this engine's JSON short

    def ask(self, *, stream: bool = False, **body: Any) -> Completion:
        """Send a job's body, as the runner does; a chat at temperature 0 where nothing else is said."""
        spec = self.embedder if "input" in body else self.chat
        if not {"prompt", "input"} & body.keys():
            body = {"messages": [{"role": "user", "content": "Hi"}], **body}
        request = JobRequest.parse({"temperature": 0, "max_tokens": 8, **body, "stream": stream})
        placement = make_placement(spec.id, spec=spec, max_model_len=LENGTH, max_num_seqs=4, kv_cache_bytes=64 * 2**20)
        self.engine.ensure_ready(placement, timeout_s=START_S)
        call = Call(
            path=request.kind,
            body=request.engine_body(spec.id),
            timeout_s=60,
            on_chunk=(lambda _chunk: None) if stream else None,
        )
        return self.engine.generate(spec.id, call, StopSignal())

    def both(self, **body: Any) -> tuple[Completion, Completion]:
        """The same without a stream and with one."""
        return self.ask(**body), self.ask(stream=True, **body)


def files_of(spec: ModelSpec) -> Path:
    assert spec.path is not None
    return spec.path


def llamacpp_kit(folder: Path) -> Kit:
    chat = make_tiny_gguf(folder / "chat.gguf", context=LENGTH, chat_template=TEMPLATE)
    embedder = make_tiny_gguf(folder / "embedder.gguf", context=LENGTH, pooling=gguf.PoolingType.MEAN)
    return Kit(
        engine=LlamaCppEngine(run_dir=folder / "run", files_of=files_of, server=find_server(LlamaCppSettings())),
        chat=make_spec("chat", path=chat, repo=None, file=None),
        embedder=make_spec("embedder", path=embedder, repo=None, file=None, capabilities=frozenset({"embedding"})),
        thoughts="reasoning_content",
        tidy={},
    )


def vllm_kit(folder: Path, engine: Engine) -> Kit:
    model = make_tiny_hf(folder / "model", context=LENGTH)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    common = {"engine": EngineKind.VLLM, "path": model, "repo": None, "file": None}
    return Kit(
        engine=engine,
        chat=make_spec("chat", tool_parser="hermes", reasoning_parser="qwen3", **common),
        embedder=make_spec("embedder", capabilities=frozenset({"embedding"}), **common),
        thoughts="reasoning",
        tidy=NO_SPACE,
    )


def vllm_server_kit(folder: Path) -> Kit:
    return vllm_kit(folder, VllmServerEngine(run_dir=folder / "run", files_of=files_of, python=vllm_python()))


def vllm_host_kit(folder: Path) -> Kit:
    engine = VllmHostEngine(run_dir=folder / "run", files_of=files_of, python=vllm_python(), several_cards=StubEngine())
    return vllm_kit(folder, engine)


LLAMACPP = pytest.param(llamacpp_kit, id="llamacpp")
VLLM = (
    pytest.param(vllm_server_kit, id="vllm-server", marks=pytest.mark.vllm),
    pytest.param(vllm_host_kit, id="vllm-host", marks=pytest.mark.vllm),
)
only_vllm = pytest.mark.parametrize("kit", VLLM, indirect=True)


@pytest.fixture(scope="module", params=[LLAMACPP, *VLLM])
def kit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    """One engine for all tests of this page."""
    build: Callable[[Path], Kit] = request.param
    made = build(tmp_path_factory.mktemp("openai"))
    yield made
    made.engine.close()


def message(completion: Completion) -> dict[str, Any]:
    [choice] = completion.response["choices"]
    found: dict[str, Any] = choice["message"]
    return found


def same(plain: Completion, streamed: Completion, *fields: str) -> bool:
    """Are these fields of all choices alike, and the usage?"""
    picked = [
        [
            {field: choice.get(field) for field in ("index", "finish_reason", *fields)}
            for choice in found.response["choices"]
        ]
        for found in (plain, streamed)
    ]
    return picked[0] == picked[1] and plain.completion_tokens == streamed.completion_tokens


def test_log_probabilities(kit: Kit) -> None:
    """One for each token, with its rivals."""
    plain, streamed = kit.both(logprobs=True, top_logprobs=2, **PLAIN)

    found = [
        [entry["token"] for entry in done.response["choices"][0]["logprobs"]["content"]] for done in (plain, streamed)
    ]
    assert found[0] == found[1]
    assert len(found[0]) == 8
    rivals = [len(entry["top_logprobs"]) for entry in streamed.response["choices"][0]["logprobs"]["content"]]
    assert rivals == [2] * 8
    assert message(plain)["content"] == message(streamed)["content"]


def test_several_choices_and_a_seed(kit: Kit) -> None:
    """Two answers to one question, the same two each time."""
    plain, streamed = kit.both(n=2, temperature=1, seed=7, **PLAIN)

    texts = [[choice["message"]["content"] for choice in done.response["choices"]] for done in (plain, streamed)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 2
    assert same(plain, streamed)


def test_a_completion(kit: Kit) -> None:
    """The older endpoint, with its own form of log probabilities."""
    plain, streamed = kit.both(prompt="Once", logprobs=2)

    assert same(plain, streamed, "text")
    assert streamed.response["object"] == "text_completion"
    for part, values in plain.response["choices"][0]["logprobs"].items():
        assert len(streamed.response["choices"][0]["logprobs"][part]) == len(values) == 8


def test_an_answer_in_a_schema(kit: Kit) -> None:
    """A model of random weights cannot but answer with one of the two cities."""
    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}

    plain, streamed = kit.both(response_format=schema, max_tokens=200, **PLAIN, **kit.tidy)

    assert json.loads(message(plain)["content"])["city"] in {"Bonn", "Rome"}
    assert message(plain)["content"] == message(streamed)["content"]
    assert same(plain, streamed)


def test_thoughts_are_told_from_the_answer(kit: Kit) -> None:
    """All of it, since this model never stops to think."""
    plain, streamed = kit.both()

    assert message(plain)[kit.thoughts] == message(streamed)[kit.thoughts]
    assert len(message(plain)[kit.thoughts]) > 3
    assert not message(plain)["content"]
    assert not message(streamed)["content"]
    assert same(plain, streamed)


def test_tools_reach_the_model(kit: Kit) -> None:
    """They stand in its prompt, and it may answer without them; an answer of a tool may stand there too."""
    alone = kit.ask(**PLAIN)
    plain, streamed = kit.both(tools=[TOOL], tool_choice="auto", **PLAIN)

    assert (plain.prompt_tokens or 0) > (alone.prompt_tokens or 0) + 50
    assert plain.prompt_tokens == streamed.prompt_tokens
    assert message(plain)["content"] == message(streamed)["content"]
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "rain"},
    ]
    assert kit.ask(messages=talk, tools=[TOOL], **PLAIN).completion_tokens == 8


@only_vllm
def test_a_call_of_a_tool(kit: Kit) -> None:
    """
    Named by the producer, so that the model of random weights cannot but call it, with arguments of its schema.

    llama.cpp does not take the call of a named tool.
    """
    choice = {"type": "function", "function": {"name": "weather"}}

    for done in kit.both(tools=[TOOL], tool_choice=choice, max_tokens=200, **PLAIN, **kit.tidy):
        [call] = message(done)["tool_calls"]
        assert call["type"] == "function"
        assert call["id"]
        assert call["function"]["name"] == "weather"
        assert json.loads(call["function"]["arguments"])["city"] in {"Bonn", "Rome"}
        assert not message(done)["content"]
        assert "index" not in call


def test_embeddings(kit: Kit) -> None:
    """One vector for each input, as numbers or as bytes; nothing is generated."""
    done = kit.ask(input=["count the birds", "b"])
    [whole] = kit.ask(input="count the birds", encoding_format="base64").response["data"]

    vectors = [entry["embedding"] for entry in done.response["data"]]
    assert vectors[0] != vectors[1]
    packed = base64.b64decode(whole["embedding"])
    assert struct.unpack(f"<{len(packed) // 4}f", packed) == pytest.approx(vectors[0], abs=1e-2)
    assert done.prompt_tokens
    assert not done.completion_tokens
