"""
The models that a job may go to are those that the router would choose at some complexity, and no others.
"""

from __future__ import annotations

from itertools import combinations, product

import pytest

from common.errors import PromptTooLong, UnknownModel
from common.find_choices import find_choices
from common.schemas import JobRequest, OfferedModel
from worker.routing.route import route_job
from worker.routing.score import Complexity

CHAT = JobRequest.parse({"messages": [{"role": "user", "content": "Hello"}]})
TOOLS = JobRequest.parse({"messages": [{"role": "user", "content": "Hello"}], "tools": [{"type": "function"}]})
LONG = JobRequest.parse({"prompt": "word " * 60})
MODELS = [
    OfferedModel(
        id=f"{tier}-{up_to}-{length}", tier=tier, complexity_up_to=up_to, max_model_len=length, auto=tier != 3,
        capabilities=("chat", "tools") if length == 50 else ("chat",),
    )
    for tier, up_to, length in product((1, 2, 3), (0.3, 0.6), (50, 500))
]  # fmt: skip


@pytest.mark.parametrize("request_", [CHAT, TOOLS, LONG], ids=["chat", "tools", "long"])
def test_the_choices_are_what_the_router_chooses_at_some_complexity(request_: JobRequest) -> None:
    """In every fleet of up to four models: of all complexities together, each choice is made, and none beside them."""
    for count in (1, 2, 3, 4):
        for fleet in combinations(MODELS, count):
            try:
                choices = {model.id for model in find_choices(request_, fleet)}
            except (UnknownModel, PromptTooLong) as refused:
                with pytest.raises(type(refused)):
                    route_job(request_, Complexity(value=0.5, signals=()), fleet)
                continue
            routed = {route_job(request_, Complexity(value=n / 20, signals=()), fleet).model for n in range(21)}
            assert routed == choices, fleet
