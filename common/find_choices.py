"""
Which of the offered models can take a job? The router asks it, and whoever wants to know when one would end. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from common.errors import PromptTooLong, UnknownModel
from common.schemas import AUTO, BodyKind, JobRequest, OfferedModel

_NAMES_SHOWN = 10

# A body can go to a model that declares at least one of these.
_SERVES = {
    BodyKind.CHAT: ("chat",),
    BodyKind.COMPLETION: ("completion", "chat"),
    BodyKind.EMBEDDING: ("embedding",),
}


def find_choices(request: JobRequest, models: Sequence[OfferedModel]) -> list[OfferedModel]:
    """
    Give the models that *request* may go to, whatever its complexity turns out to be.

    As the router chooses: of those that can take it, the cheapest that is trusted with it. Raises as `find_meant` and
    `find_roomy` do.
    """
    roomy = find_roomy(request, find_meant(request.model, models), offered=models)
    chosen = [cheapest_trusted(roomy, complexity) for complexity in (0.0, *(m.complexity_up_to for m in roomy), 1.0)]
    return [model for model in roomy if model in chosen]


def find_roomy(
    request: JobRequest, meant: Sequence[OfferedModel], *, offered: Sequence[OfferedModel]
) -> list[OfferedModel]:
    """
    Give those of the models that are *meant* that can take *request*; *offered* are all, for the message.

    Raises
    ------
    UnknownModel
        None of them can do this.
    PromptTooLong
        The prompt has more words than the longest of these models takes tokens.
    """
    able = [model for model in meant if missing_in(request, model) is None]
    if not able:
        lacks = "; ".join(f"{model.id} has no {missing_in(request, model)}" for model in _some(meant))
        raise UnknownModel(f"No model can take this job: {lacks}. {_offered(offered)}")

    least = _least_tokens(request)
    possible = [model for model in able if least <= model.max_model_len]
    if not possible:
        longest = max(able, key=lambda model: (model.max_model_len, model.id))
        raise PromptTooLong(
            f"The prompt has at least {least:,} tokens; {longest.id} takes {longest.max_model_len:,}, answer included. "
            "Send a shorter prompt, or name a model with a greater length."
        )

    possible = [model for model in possible if not model.away] or possible
    reach = min(likely_tokens(request), max(model.max_model_len for model in possible))
    return [model for model in possible if model.max_model_len >= reach]


def find_meant(name: str, models: Sequence[OfferedModel]) -> list[OfferedModel]:
    """
    Give every model that *name* may mean, in order of the ids: an id before an alias, any case.

    Raises
    ------
    UnknownModel
        There is none.
    """
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


def can_take(request: JobRequest, model: OfferedModel) -> bool:
    """Can *model* do what the body asks for, and hold prompt and answer by a careful estimate?"""
    return missing_in(request, model) is None and likely_tokens(request) <= model.max_model_len


def cheapest_trusted(models: Sequence[OfferedModel], complexity: float) -> OfferedModel:
    """Choose the cheapest of *models* that is trusted with so much, or the strongest; ties go by tier, then by id."""
    trusted = [model for model in models if model.complexity_up_to >= complexity]
    if trusted:
        return min(trusted, key=lambda model: (model.tier, model.id))
    return min(models, key=lambda model: (-model.complexity_up_to, -model.tier, model.id))


def _offered(models: Sequence[OfferedModel]) -> str:
    names = ", ".join(model.id for model in _some(sorted(models, key=lambda model: model.id)))
    more = len(models) - _NAMES_SHOWN
    return f"Offered: {names}{f' and {more} more' if more > 0 else ''}."


def _some(models: Sequence[OfferedModel]) -> Sequence[OfferedModel]:
    return models[:_NAMES_SHOWN]


def missing_in(request: JobRequest, model: OfferedModel) -> str | None:
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


def likely_tokens(request: JobRequest) -> int:
    """
    Estimate prompt and answer, rather too high: three UTF-8 bytes to a token.

    English has about four characters to a token, code about three, Chinese about one (three bytes).
    """
    sizes = (
        len(p.encode("utf-8", errors="surrogatepass")) // 3 if isinstance(p, str) else len(p) for p in _prompts(request)
    )
    return max(sizes, default=0) + (request.answer_tokens or 0)
