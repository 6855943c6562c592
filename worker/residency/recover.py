"""
A model could not be made ready: what is tried next? Pure: one rung down the ladder, with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from common.errors import LoadFailed, LoadRefused, OutOfMemory, ShiftworkerError, TooLittleMemory
from worker.state.residency import Level


class Rung(StrEnum):
    """What may be tried, in this order."""

    RETRY = "retry"
    COLDER = "colder level"
    SMALLER = "smaller plan"
    CASCADE = "next model of the cascade"
    PREVIOUS = "previous model"
    CLOUD = "cloud endpoint"
    HOLD = "hold the jobs"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What failed, and what of the same model is left to try."""

    model_id: str
    error: ShiftworkerError
    level: Level = Level.COLD  # from where it was being made ready
    attempts_left: int = 0  # of the same plan
    plans_left: int = 0  # smaller ones
    shrunk: bool = False  # was it a smaller plan already?


@dataclass(frozen=True, kw_only=True)
class Others:
    """What there is besides the model that failed."""

    ready: tuple[str, ...] = ()  # models that are ready now
    cascade: tuple[str, ...] = ()  # smaller models that could be loaded, the next one first
    previous: str | None = None  # the model that was ready before, if it can be loaded again
    substitutable: bool = False  # do jobs wait for the model that may go to another one?
    cloud: bool = False  # is an endpoint configured, and do jobs wait that may leave the machine?


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """The next rung."""

    rung: Rung
    model_id: str | None = None  # that is to be made ready; None = none
    reason: str


def recover(failure: Failure, others: Others) -> Recovery:
    """
    Decide what to try after *failure*.

    The questions, in order:

    1. May the same succeed now?                       Retry. Not what needs an operator, nor what ran out of memory,
                                                       nor a sleeper that did not wake as it should: it was ended.
    2. Did it sleep?                                   Start it from its files: what slept may be what is broken.
                                                       Unless the cards refuse any load.
    3. Is memory lacking, and is there a smaller plan? Load that one. Once smaller, whatever made the load fail.
    4. Is another model ready?                         Let it work; nothing is worth stopping it.
    5. Do the cards refuse any load?                   The cloud or nothing: another model would heat them as well.
    6. Do jobs wait that may go elsewhere, or was      The next model of the cascade.
       nothing ready before?
    7. Was something ready before?                     That, so that the worker has a model.
    8. Is there a cloud endpoint for the jobs?         That.
    9. Otherwise                                       The jobs wait.

    A model that was given up is left alone for a while, longer each time; a restart of the worker forgets that, for it
    is what an operator does once he has mended the cause.
    """
    model_id, error = failure.model_id, failure.error
    lacks_memory = isinstance(error, OutOfMemory | TooLittleMemory)

    # (1) The same again.
    slept = failure.level.asleep
    ended = slept and not isinstance(error, LoadRefused)
    if failure.attempts_left and error.retry_helps and not isinstance(error, OutOfMemory) and not ended:
        return Recovery(rung=Rung.RETRY, model_id=model_id, reason=f"{failure.attempts_left} attempts are left")

    # (2) Colder.
    may_load = lacks_memory or not isinstance(error, LoadRefused)
    if slept and may_load:
        reason = f"{model_id} starts from its files instead of {failure.level}"
        return Recovery(rung=Rung.COLDER, model_id=model_id, reason=reason)

    # (3) Smaller.
    if failure.plans_left and (lacks_memory or (failure.shrunk and isinstance(error, LoadFailed))):
        return Recovery(rung=Rung.SMALLER, model_id=model_id, reason=f"{failure.plans_left} smaller plans are left")

    # (4) Another one works. (5) Nothing may be loaded.
    if others.ready:
        return Recovery(rung=Rung.HOLD, reason=f"{', '.join(others.ready)} stays ready; the jobs of {model_id} wait")

    # (6) The cascade.
    if may_load and others.cascade and (others.substitutable or others.previous is None):
        after = others.cascade[0]
        return Recovery(rung=Rung.CASCADE, model_id=after, reason=f"{model_id} failed, {after} is the next smaller one")

    # (7) Back.
    if may_load and others.previous is not None:
        return Recovery(rung=Rung.PREVIOUS, model_id=others.previous, reason=f"{model_id} failed, it was ready before")

    # (8) Away.
    if others.cloud:
        return Recovery(rung=Rung.CLOUD, reason=f"{model_id} failed; the jobs that may leave the machine do")

    # (9) Wait.
    return Recovery(rung=Rung.HOLD, reason=f"{model_id} failed, and there is nothing else to load; its jobs wait")
