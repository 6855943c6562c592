"""
Which model should take this job?
"""

from __future__ import annotations

from collections.abc import Sequence

from common.errors import EngineNotReady
from common.find_choices import cheapest_trusted, find_meant, find_roomy, likely_tokens, missing_in
from common.schemas import AUTO, JobRequest, OfferedModel, Route
from worker.routing.score import Complexity


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
    meant = find_meant(request.model, models)

    # (2) (3) (4) Able, possible, roomy.
    roomy = find_roomy(request, meant, offered=models)

    # (5) Trusted.
    chosen = cheapest_trusted(roomy, complexity.value)
    why = _why(request, complexity.value, chosen, meant)
    return Route(model=chosen.id, complexity=complexity.value, why=why)


def _why(request: JobRequest, complexity: float, chosen: OfferedModel, meant: Sequence[OfferedModel]) -> str:
    """Say in one sentence, with the numbers, why *chosen* and not another of those that were meant."""
    if len(meant) == 1:
        named = request.model.casefold() != AUTO
        return f"the job names {request.model}" if named else f"{chosen.id} is the only model for auto"

    wished = cheapest_trusted(meant, complexity)
    trusted = complexity <= chosen.complexity_up_to
    score = f"complexity {complexity:g} is"
    if wished != chosen:
        missing = missing_in(request, wished)
        lack = f"has no {missing}" if missing else f"is too short for about {likely_tokens(request):,} tokens"
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
