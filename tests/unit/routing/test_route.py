"""
The router's choice, question by question, and what holds for every job and every fleet.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common.errors import EngineNotReady, PromptTooLong, Refused, UnknownModel
from common.schemas import JobRequest, OfferedModel
from worker.routing.route import route_job
from worker.routing.score import Complexity


def model(model_id: str, **changes: Any) -> OfferedModel:
    facts = {"tier": 1, "complexity_up_to": 0.45, "max_model_len": 2048, "capabilities": ("chat",)}
    return OfferedModel(**{"id": model_id, **facts, **changes})


SMALL = model("small", aliases=("fast",))
LARGE = model("large", tier=2, complexity_up_to=0.9, max_model_len=8192, capabilities=("chat", "tools", "vision"))
EMBED = model("embed", capabilities=("embedding",), auto=False)
FLEET = (SMALL, LARGE, EMBED)


def job(text: str = "Hello", **body: Any) -> JobRequest:
    return JobRequest.parse({"messages": [{"role": "user", "content": text}], **body})


def hard(value: float) -> Complexity:
    return Complexity(value=value, signals=())


@pytest.mark.parametrize(
    ("complexity", "chosen", "why"),
    [
        (0.3, "small", "complexity 0.3 is within small's 0.45"),
        (0.45, "small", "complexity 0.45 is within small's 0.45"),
        (0.55, "large", "complexity 0.55 is above small's 0.45; large is the smallest model trusted with it"),
        (0.95, "large", "complexity 0.95 is above what any model is trusted with; large, up to 0.9, is the strongest"),
    ],
)
def test_auto_takes_the_cheapest_model_that_is_trusted(complexity: float, chosen: str, why: str) -> None:
    """
    The reason carries the numbers that were compared.
    """
    route = route_job(job(), hard(complexity), FLEET)

    assert (route.model, route.complexity, route.why) == (chosen, complexity, why)


@pytest.mark.parametrize("name", ["small", "SMALL", "fast", "Fast"])
def test_a_named_model_is_obeyed(name: str) -> None:
    """
    By id or alias in any case, however hard the job is.
    """
    route = route_job(job(model=name), hard(1.0), FLEET)

    assert (route.model, route.why) == ("small", f"the job names {name}")


def test_a_model_that_auto_may_not_choose_can_be_named() -> None:
    """
    `auto = false` in the catalogue keeps a model for those who ask for it.
    """
    hidden = model("hidden", auto=False)

    assert route_job(job(model="hidden"), hard(0.1), (SMALL, hidden)).model == "hidden"
    assert route_job(job(), hard(1.0), (SMALL, hidden)).model == "small"


def test_an_alias_of_several_models_is_a_choice_among_them() -> None:
    """
    Then complexity decides, as for "auto".
    """
    fleet = (model("a", aliases=("any",)), model("b", aliases=("any",), tier=2, complexity_up_to=1.0), LARGE)

    assert route_job(job(model="any"), hard(0.2), fleet).model == "a"
    assert route_job(job(model="any"), hard(0.7), fleet).model == "b"


def test_an_unknown_name_is_refused_with_what_there_is() -> None:
    """
    At most ten names are listed, in order.
    """
    fleet = [model(f"m{number:02}") for number in range(12)]

    with pytest.raises(UnknownModel) as refusal:
        route_job(job(model="gpt"), hard(0.1), fleet)

    names = ", ".join(f"m{number:02}" for number in range(10))
    assert refusal.value.message == f"No model or alias is named 'gpt'. Offered: {names} and 2 more."


def test_without_any_offer_the_job_waits() -> None:
    """
    No worker has started yet: that is no fault of the job, and a retry helps.
    """
    with pytest.raises(EngineNotReady) as waiting:
        route_job(job(), hard(0.1), ())

    assert waiting.value.retry_helps


IMAGE = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
TOOL = {"type": "function", "function": {"name": "look_up"}}


@pytest.mark.parametrize(
    ("body", "lacking"),
    [
        ({"tools": [TOOL]}, "tools"),
        ({"messages": [{"role": "user", "content": IMAGE}]}, "vision"),
    ],
)
def test_a_job_goes_to_a_model_that_can_do_it(body: dict[str, Any], lacking: str) -> None:
    """
    Auto passes over the model that lacks it and says so; the named model that lacks it is refused.
    """
    route = route_job(job(**body), hard(0.2), FLEET)
    assert route.model == "large"
    assert route.why == f"complexity 0.2 is within large's 0.9; small has no {lacking}"

    with pytest.raises(UnknownModel, match=f"small has no {lacking}"):
        route_job(job(model="small", **body), hard(0.2), FLEET)


@pytest.mark.parametrize("form", ["json_object", "json_schema"])
def test_json_that_no_model_declares_is_refused(form: str) -> None:
    """
    Every model that was meant is told with what it lacks.
    """
    with pytest.raises(UnknownModel, match="large has no json; small has no json"):
        route_job(job(response_format={"type": form}), hard(0.2), FLEET)


def test_each_kind_of_body_needs_its_kind_of_model() -> None:
    """
    Completions go to chat models too; embeddings only to embedding models.
    """
    completion = JobRequest.parse({"prompt": "Once upon a time"})
    embedding = JobRequest.parse({"input": ["one", "two"], "model": "embed"})

    assert route_job(completion, hard(0.1), FLEET).model == "small"
    assert route_job(embedding, hard(0.1), FLEET).model == "embed"
    with pytest.raises(UnknownModel, match="embed has no chat"):
        route_job(job(model="embed"), hard(0.1), FLEET)
    with pytest.raises(UnknownModel, match="no embedding"):
        route_job(JobRequest.parse({"input": "one"}), hard(0.1), FLEET)


@pytest.mark.parametrize(
    ("text", "max_tokens", "chosen"),
    [
        ("x" * 5_000, None, "small"),  # 5,000 / 3 = 1,666 of 2,048
        ("x" * 5_000, 500, "large"),  # 1,666 + 500 = 2,166
        ("x" * 6_300, None, "large"),  # 2,100
        ("字" * 2_100, None, "large"),  # three bytes each: 2,100
        ("x" * 60_000, None, "large"),  # 20,000: longer than any, so the longest
    ],
)
def test_a_long_prompt_goes_to_a_model_that_holds_it(text: str, max_tokens: int | None, chosen: str) -> None:
    """
    Prompt and answer together, counted rather too high.
    """
    assert route_job(job(text, max_tokens=max_tokens), hard(0.1), FLEET).model == chosen


def test_a_long_prompt_says_who_was_too_short() -> None:
    """
    6,300 characters are about 2,100 tokens, and the small model takes 2,048.
    """
    route = route_job(job("x" * 6_300), hard(0.1), FLEET)

    assert route.why == "complexity 0.1 is within large's 0.9; small is too short for about 2,100 tokens"


def test_a_hard_job_that_only_the_small_model_holds_goes_there() -> None:
    """
    Better the weaker model than none, and the reason says why.
    """
    route = route_job(
        job("x" * 6_300), hard(0.8), (model("long", max_model_len=4096), model("strong", tier=2, complexity_up_to=1.0))
    )

    assert (route.model, route.why) == (
        "long",
        "complexity 0.8 is above long's 0.45; strong is too short for about 2,100 tokens",
    )


def test_a_prompt_is_refused_only_if_it_certainly_does_not_fit() -> None:
    """
    More words than tokens cannot fit; anything less is left to the engine, which counts.
    """
    assert route_job(job("word " * 8_192), hard(0.1), FLEET).model == "large"
    with pytest.raises(PromptTooLong) as refusal:
        route_job(job("word " * 8_193), hard(0.1), FLEET)
    assert "at least 8,193 tokens; large takes 8,192" in refusal.value.message

    with pytest.raises(PromptTooLong, match="small takes 2,048"):
        route_job(job("word " * 2_049, model="small"), hard(0.1), FLEET)


def test_token_ids_are_counted_one_by_one_and_inputs_apart() -> None:
    """
    Several inputs are several sequences: the longest counts, not their sum.
    """
    many = JobRequest.parse({"input": ["word " * 2_000] * 10, "model": "embed"})
    ids = JobRequest.parse({"prompt": list(range(8_193))})
    id_lists = JobRequest.parse({"prompt": [[1] * 8_000, [1] * 8_000]})

    assert route_job(many, hard(0.1), FLEET).model == "embed"
    assert route_job(id_lists, hard(0.1), FLEET).model == "large"
    with pytest.raises(PromptTooLong):
        route_job(ids, hard(0.1), FLEET)


FLEETS = st.lists(
    st.builds(
        model,
        st.sampled_from(["a", "b", "c", "d", "e"]),
        aliases=st.sampled_from([(), ("any",), ("A",)]),
        tier=st.integers(1, 3),
        complexity_up_to=st.sampled_from([0.2, 0.5, 1.0]),
        max_model_len=st.sampled_from([16, 2048]),
        capabilities=st.sampled_from([("chat",), ("chat", "tools"), ("embedding",)]),
        auto=st.booleans(),
    ),
    unique_by=lambda offered: offered.id,
    min_size=1,
    max_size=5,
)
JOBS = st.builds(
    job,
    st.text(st.characters(codec="utf-8"), max_size=200),
    model=st.sampled_from(["auto", "a", "A", "any", "nobody"]),
    tools=st.sampled_from([[], [TOOL]]),
    max_tokens=st.none() | st.integers(1, 100),
)


def answer(request: JobRequest, complexity: float, fleet: list[OfferedModel]) -> tuple[str, str]:
    """The route, or the refusal, as a value to compare."""
    try:
        route = route_job(request, hard(complexity), fleet)
    except Refused as refusal:
        return refusal.kind, refusal.message
    return route.model, route.why


@given(request=JOBS, complexity=st.sampled_from([0.0, 0.2, 0.35, 0.5, 1.0]), fleet=FLEETS, order=st.randoms())
def test_the_order_of_the_fleet_never_matters(
    request: JobRequest, complexity: float, fleet: list[OfferedModel], order: Any
) -> None:
    """
    Any permutation of the offered models gives the same answer, word for word.
    """
    shuffled = list(fleet)
    order.shuffle(shuffled)

    assert answer(request, complexity, fleet) == answer(request, complexity, shuffled)


@example(request=job("x"), complexity=1.0, fleet=[model("a", tier=1), model("b", tier=2)])
@given(request=JOBS, complexity=st.sampled_from([0.0, 0.2, 0.35, 0.5, 1.0]), fleet=FLEETS)
def test_a_route_names_a_model_that_is_offered_and_can_do_it(
    request: JobRequest, complexity: float, fleet: list[OfferedModel]
) -> None:
    """
    It is in the fleet, was meant, declares what the body needs, and of its equals it is the cheapest: or the strongest,
    if none of them is trusted with the job.
    """
    offered = {model.id: model for model in fleet}
    name, _ = answer(request, complexity, fleet)
    if name not in offered:
        assert name in {"UnknownModel", "PromptTooLong"}
        return

    chosen = offered[name]
    assert "chat" in chosen.capabilities
    assert not (request.model_extra or {}).get("tools") or "tools" in chosen.capabilities
    assert (
        chosen.auto
        if request.model == "auto"
        else request.model.casefold() in {chosen.id, *map(str.casefold, chosen.aliases)}
    )
    twins = [
        twin
        for twin in fleet
        if twin.model_copy(update={"id": "", "tier": 0}) == chosen.model_copy(update={"id": "", "tier": 0})
    ]
    best = min if complexity <= chosen.complexity_up_to else max
    assert request.model in {"a", "A"} or chosen.tier == best(twin.tier for twin in twins)
