"""
The baseline: runs in vLLM's Python, reads one order from stdin, prints one line that begins with ANSWER.
"""

from __future__ import annotations

import json
import sys
import time

ANSWER = "jobs a second:"


def main() -> None:
    """Generate once to warm up, then all prompts at once, timed."""
    from vllm import LLM, SamplingParams

    order = json.load(sys.stdin)
    llm = LLM(**order["llm"])
    params = SamplingParams(max_tokens=order["tokens"], temperature=0, ignore_eos=True)
    llm.generate(order["prompts"][:8], params, use_tqdm=False)
    began = time.perf_counter()
    llm.generate(order["prompts"], params, use_tqdm=False)
    print(ANSWER, len(order["prompts"]) / (time.perf_counter() - began))


if __name__ == "__main__":
    main()
