"""
A tiny model for vLLM with tools and thoughts.
"""

from __future__ import annotations

import json
from pathlib import Path

from worker.demo.tiny_hf import make_tiny_hf

_TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}{% if shout %}!{% endif %}"
)
_THINK, _END_THINK = "<think>", "</think>"


def make_thinker(folder: Path) -> Path:
    """Write it; two bytes that no text holds become the tokens around a thought, the last two of the vocabulary."""
    make_tiny_hf(folder, context=2048)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for number, token in zip(sorted(vocabulary.values())[-2:], (_THINK, _END_THINK), strict=True):
        old = next(name for name, found in vocabulary.items() if found == number)
        del vocabulary[old]
        vocabulary[token] = number
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        tokenizer["added_tokens"].append({"id": number, "content": token, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": _TEMPLATE}))
    return folder
