"""
Which model should take this job?
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from common.errors import EngineNotReady, PromptTooLong, UnknownModel
from common.schemas import AUTO, BodyKind, JobRequest, OfferedModel, Route
from worker.routing.score import Complexity

_NAMES_SHOWN = 10

# A body can go to a model that declares at least one of these.
_SERVES = {
    BodyKind.CHAT: ("chat",),
    BodyKind.COMPLETION: ("completion", "chat"),
    BodyKind.EMBEDDING: ("embedding",),
}


def route_job(request: JobRequest, complexity: Complexity, models: Sequence[OfferedModel]) -> Route:
    """
    Choose the model for *request* among *models*, all that the fleet offers (each id once).

    The questions, in order:

    1. Which models are meant?            The one that is named, if any; else those that "auto" may choose.
    2. Which of them can do it?           Tools, images, JSON and embeddings need a model that declares them.
    3. Which could hold the prompt?       Refused only where it certainly cannot; the exact count is the engine's.
                                          Of those the ones that are here; else the job waits for one that is away.
    4. Which hold prompt and answer by a  Those; if none does, the longest.
       careful estimate?
    5. Which is the cheapest that is      That one, or the strongest if none is. Ties go by tier, then by id.
       trusted with this complexity?

    Raises
    ------
    EngineNotReady
        No worker has offered a model yet: the job should wait.
    UnknownModel
        Nothing offered has this name, or what has it cannot do this.
    PromptTooLong
        The prompt has more words than the longest of these models takes tokens.
    """
    if not models:
        raise EngineNotReady("No worker has offered a model yet. Start one with `shiftworker worker`.")

    # (1) Meant.
    meant = _meant(request.model, models)

    # (2) Able.
    able = [model for model in meant if _missing(request, model) is None]
    if not able:
        lacks = "; ".join(f"{model.id} has no {_missing(request, model)}" for model in _some(meant))
        raise UnknownModel(f"No model can take this job: {lacks}. {_offered(models)}")

    # (3) Possible.
    least = _least_tokens(request)
    possible = [model for model in able if least <= model.max_model_len]
    if not possible:
        longest = max(able, key=lambda model: (model.max_model_len, model.id))
        raise PromptTooLong(
            f"The prompt has at least {least:,} tokens; {longest.id} takes {longest.max_model_len:,}, answer included. "
            "Send a shorter prompt, or name a model with a greater length."
        )

    possible = [model for model in possible if not model.away] or possible

    # (4) Roomy.
    reach = min(_likely_tokens(request), max(model.max_model_len for model in possible))
    roomy = [model for model in possible if model.max_model_len >= reach]

    # (5) Trusted.
    chosen = _cheapest_trusted(roomy, complexity.value)
    why = _why(request, complexity.value, chosen, meant)
    return Route(model=chosen.id, complexity=complexity.value, why=why)


def can_take(request: JobRequest, model: OfferedModel) -> bool:
    """Can *model* do what the body asks for, and hold prompt and answer by a careful estimate?"""
    return _missing(request, model) is None and _likely_tokens(request) <= model.max_model_len


def _meant(name: str, models: Sequence[OfferedModel]) -> list[OfferedModel]:
    """Every model that *name* may mean, in order of the ids: an id before an alias, any case."""
    ordered = sorted(models, key=lambda model: model.id)
    wanted = name.casefold()
    found = (
        [model for model in ordered if wanted == AUTO and model.auto]
        or [model for model in ordered if name == model.id]
        or [model for model in ordered if wanted in map(str.casefold, (model.id, *model.aliases))]
    )
    if not found:
        what = 'No model may be chosen by "auto"' if wanted == AUTO else f"No model or alias is named {name!r}"
        raise UnknownModel(f"{what}. {_offered(ordered)}")
    return found


def _offered(models: Sequence[OfferedModel]) -> str:
    names = ", ".join(model.id for model in _some(sorted(models, key=lambda model: model.id)))
    more = len(models) - _NAMES_SHOWN
    return f"Offered: {names}{f' and {more} more' if more > 0 else ''}."


def _some(models: Sequence[OfferedModel]) -> Sequence[OfferedModel]:
    return models[:_NAMES_SHOWN]


def _missing(request: JobRequest, model: OfferedModel) -> str | None:
    """Name the first capability that *request* needs and *model* does not declare; None = it can."""
    serves = _SERVES[request.kind]
    if not set(serves) & set(model.capabilities):
        return serves[0]
    return next((need for need in needs_of(request) if need not in model.capabilities), None)


def needs_of(request: JobRequest) -> Iterator[str]:
    """Name what the body asks for beside the text."""
    extra = request.model_extra or {}
    if extra.get("tools"):
        yield "tools"
    contents = [message.get("content") for message in request.messages or ()]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    if any(part.get("type") == "image_url" for part in parts):
        yield "vision"
    form = extra.get("response_format")
    if isinstance(form, dict) and form.get("type") in {"json_object", "json_schema"}:
        yield "json"


def _prompts(request: JobRequest) -> list[str | list[int]]:
    """List the prompts of the body, each a sequence of its own in the engine: text, or token ids."""
    given = request.prompt if request.prompt is not None else request.input
    if not isinstance(given, list):
        return [request.text]
    if all(isinstance(item, int) for item in given):
        return [given]
    return [item for item in given if isinstance(item, str | list)]


def _least_tokens(request: JobRequest) -> int:
    """
    Count what the longest prompt has at the very least: its words, for tokens do not reach over white space.

    Characters say less: a long run of blanks can be one token, and scripts without blanks are left to the engine.
    """
    return max((len(p.split()) if isinstance(p, str) else len(p) for p in _prompts(request)), default=0)


def _likely_tokens(request: JobRequest) -> int:
    """
    Estimate prompt and answer, rather too high: three UTF-8 bytes to a token.

    English has about four characters to a token, code about three, Chinese about one (three bytes).
    """
    sizes = (
        len(p.encode("utf-8", errors="surrogatepass")) // 3 if isinstance(p, str) else len(p) for p in _prompts(request)
    )
    return max(sizes, default=0) + (request.answer_tokens or 0)


def _cheapest_trusted(models: Sequence[OfferedModel], complexity: float) -> OfferedModel:
    trusted = [model for model in models if model.complexity_up_to >= complexity]
    if trusted:
        return min(trusted, key=lambda model: (model.tier, model.id))
    return min(models, key=lambda model: (-model.complexity_up_to, -model.tier, model.id))


def _why(request: JobRequest, complexity: float, chosen: OfferedModel, meant: Sequence[OfferedModel]) -> str:
    """Say in one sentence, with the numbers, why *chosen* and not another of those that were meant."""
    if len(meant) == 1:
        named = request.model.casefold() != AUTO
        return f"the job names {request.model}" if named else f"{chosen.id} is the only model for auto"

    wished = _cheapest_trusted(meant, complexity)
    trusted = complexity <= chosen.complexity_up_to
    score = f"complexity {complexity:g} is"
    if wished != chosen:
        missing = _missing(request, wished)
        lack = f"has no {missing}" if missing else f"is too short for about {_likely_tokens(request):,} tokens"
        side = "within" if trusted else "above"
        return f"{score} {side} {chosen.id}'s {chosen.complexity_up_to:g}; {wished.id} {lack}"
    if not trusted:
        strongest = f"{chosen.id}, up to {chosen.complexity_up_to:g}, is the strongest"
        return f"{score} above what any model is trusted with; {strongest}"
    if weaker := [model for model in meant if model.complexity_up_to < complexity and model.tier <= chosen.tier]:
        best = max(weaker, key=lambda model: (model.complexity_up_to, model.id))
        limit = f"{best.id}'s {best.complexity_up_to:g}"
        return f"{score} above {limit}; {chosen.id} is the smallest model trusted with it"
    return f"{score} within {chosen.id}'s {chosen.complexity_up_to:g}"
