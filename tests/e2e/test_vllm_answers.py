"""
Tools, JSON schema, thoughts and vectors through the whole path on the real vLLM: what it answers is what arrives.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.schemas import StreamEvent
from tests.e2e.conftest import Box
from tests.vllm_here import vllm_python
from tests.vllm_models import make_thinker
from worker.demo.tiny_hf import make_tiny_hf

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(420)]

PATIENCE_S = 200.0  # the first job waits for vLLM's imports
CATALOGUE = """
replace = true

[[models]]
id = "thinker"
engine = "vllm"
tier = 1
complexity_up_to = 1.0
max_model_len = 1024
path = "thinker"
capabilities = ["chat", "completion", "json", "thinking"]
reasoning_parser = "deepseek_r1"

[[models]]
id = "caller"
engine = "vllm"
tier = 1
complexity_up_to = 1.0
max_model_len = 1024
path = "thinker"
capabilities = ["chat", "completion", "json", "tools"]
tool_parser = "hermes"

[[models]]
id = "vectors"
engine = "vllm"
tier = 1
complexity_up_to = 1.0
max_model_len = 1024
path = "vectors"
capabilities = ["embedding"]
"""
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}}
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "model": "thinker", "temperature": 0}
# Where only the form is given a random model must be let choose at random: its likeliest token is a blank, for ever.
FORMED = {**ASK, "model": "caller", "temperature": 1.0, "seed": 1, "max_tokens": 400}
CALLS = {**FORMED, "tools": [TOOL], "tool_choice": "required"}
FORMAT = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that thinks or calls tools (it never ends a thought to do both), one that embeds, and their catalogue."""
    folder = tmp_path_factory.mktemp("models")
    make_thinker(folder / "thinker")
    make_tiny_hf(folder / "vectors", context=2048, seed=1)
    (folder / "models.toml").write_text(CATALOGUE)
    return folder


@pytest.fixture
def node_env(node_env: dict[str, str], models: Path) -> dict[str, str]:
    """A worker for these, side by side."""
    return {
        **node_env,
        "MODELS_FILE": str(models / "models.toml"),
        "VLLM_PYTHON": str(vllm_python()),
        "SWITCH_MAX_RESIDENTS": "3",
    }


def send(box: Box, body: dict[str, Any]) -> Any:
    """Send it by the task's name, as an app does that knows nothing of ours; gives its AsyncResult."""
    return box.setup.app.send_task("shiftworker.submit", args=[body], queue="shiftworker")


def is_place(text: str) -> bool:
    found = json.loads(text)
    return found.keys() == {"city", "warm"} and found["city"] in ("Oslo", "Rome") and isinstance(found["warm"], bool)


def said(events: list[StreamEvent], field: str) -> str:
    """What the chunks say in one field of the message, joined."""
    deltas = [choice["delta"] for event in events if event.chunk for choice in event.chunk["choices"]]
    return "".join(delta.get(field) or "" for delta in deltas)


def test_what_vllm_answers_is_what_arrives(box: Box) -> None:
    """All sent at once, for three models, and each answered in its own way; then streams, read again from anywhere."""
    plain = send(box, {**ASK, "max_tokens": 8, "ignore_eos": True})
    tools = send(box, CALLS)
    named = send(box, {**CALLS, "tool_choice": {"type": "function", "function": {"name": "weather"}}})
    schema = send(box, {**FORMED, "response_format": FORMAT})
    vectors = send(box, {"model": "vectors", "input": ["hello", "world", "hello"]})

    # Thoughts: the model never writes the token that ends them.
    message = plain.get(timeout=PATIENCE_S)["choices"][0]["message"]
    thought = message["reasoning"]
    assert thought
    assert not message["content"]

    # Tools: the one there is, with arguments as it wants them.
    for answer in (tools.get(timeout=PATIENCE_S), named.get(timeout=PATIENCE_S)):
        calls = [call["function"] for call in answer["choices"][0]["message"]["tool_calls"]]
        assert calls
        assert all(call["name"] == "weather" and is_place(call["arguments"]) for call in calls)

    # JSON schema.
    assert is_place(schema.get(timeout=PATIENCE_S)["choices"][0]["message"]["content"])

    # Vectors.
    first, second, third = (entry["embedding"] for entry in vectors.get(timeout=PATIENCE_S)["data"])
    assert first == pytest.approx(third, abs=1e-3)
    assert first != pytest.approx(second, abs=1e-2)
    assert sum(x * x for x in first) == pytest.approx(1.0, rel=1e-3)

    # Streams: the same thought and the same call, piece by piece, from any position.
    job_id = box.client.submit({**ASK, "max_tokens": 8, "ignore_eos": True, "stream": True})
    whole = list(box.client.stream(job_id, timeout=PATIENCE_S))
    assert said(whole, "reasoning") == thought
    for index in range(len(whole) - 1):
        assert list(box.client.stream(job_id, whole[index].position, timeout=PATIENCE_S)) == whole[index + 1 :]

    job_id = box.client.submit({**CALLS, "stream": True})
    events = list(box.client.stream(job_id, timeout=PATIENCE_S))
    outcome = box.client.wait(job_id, timeout=10)
    assert outcome.response is not None
    pieces = [
        (piece["index"], piece["function"].get("arguments") or "")
        for event in events
        if event.chunk
        for choice in event.chunk["choices"]
        for piece in choice["delta"].get("tool_calls") or ()
    ]
    calls = [call["function"]["arguments"] for call in outcome.response["choices"][0]["message"]["tool_calls"]]
    assert len(pieces) >= len(calls) > 0
    assert ["".join(text for at, text in pieces if at == index) for index in range(len(calls))] == calls
    assert all(is_place(call) for call in calls)
