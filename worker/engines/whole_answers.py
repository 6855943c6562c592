"""
Which of an engine's outputs need to be told now? Of who wants the whole answer, only the last, with all before in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class WholeAnswers:
    """
    What requests have said so far that want their answer whole, not token by token.

    An engine gives each request's new tokens after each step, and its front end does some work for each of them: with
    many small requests as much as the step itself. Joined, they are one output of many tokens, which vLLM knows from
    speculative decoding (EngineCoreOutput, vllm/v1/engine/__init__.py). Nothing else may be in the outputs of such a
    request: with log probabilities, or words that end it, each step counts.
    """

    def __init__(self) -> None:
        self._began: dict[str, Any | None] = {}  # request id -> its first output; None = it has said nothing yet
        self._said: dict[str, list[int]] = {}

    def expect(self, request_id: str) -> None:
        """Hold back what this request says until it has said all."""
        self._began[request_id] = None
        self._said[request_id] = []

    def forget(self, request_ids: Iterable[str]) -> None:
        """Nobody wants these answers any more."""
        for request_id in request_ids:
            self._began.pop(request_id, None)
            self._said.pop(request_id, None)

    def join(self, outputs: Iterable[Any]) -> list[Any]:
        """Take the outputs of one step; give those that are to be told now."""
        told = []
        for output in outputs:
            said = self._said.get(output.request_id)
            if said is None:
                told.append(output)
                continue
            said.extend(output.new_token_ids)
            began = self._began[output.request_id]
            if output.finish_reason is None:
                if began is None:
                    self._began[output.request_id] = output
                continue
            if began is not None:
                output.prefill_stats = began.prefill_stats  # told with a request's first tokens only
            output.new_token_ids = said
            self.forget([output.request_id])
            told.append(output)
        return told
