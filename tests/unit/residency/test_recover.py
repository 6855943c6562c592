"""
The ladder on every small world: what failed, what is left of the model, and what else there is.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from common.errors import (
    EngineTimeout,
    LoadFailed,
    LoadRefused,
    ModelMissing,
    OutOfMemory,
    ShiftworkerError,
    TooLittleMemory,
)
from worker.residency.recover import Failure, Others, Rung, recover
from worker.state.residency import Level

ERRORS = [kind("it failed") for kind in (LoadFailed, OutOfMemory, TooLittleMemory, LoadRefused, ModelMissing)]
LEVELS = (Level.COLD, Level.SPARE, Level.ASLEEP_1, Level.ASLEEP_2)

FAILURES = [
    Failure(model_id="m", error=error, level=level, attempts_left=attempts, plans_left=plans, shrunk=shrunk)
    for error, level, attempts, plans, shrunk in product(ERRORS, LEVELS, (0, 2), (0, 2), (False, True))
]
OTHERS = [
    Others(ready=ready, cascade=cascade, previous=previous, substitutable=substitutable, cloud=cloud)
    for ready, cascade, previous, substitutable, cloud in product(
        ((), ("r",)), ((), ("c", "d")), (None, "p"), (False, True), (False, True)
    )
]
WORLDS = list(product(FAILURES, OTHERS))
ORDER = list(Rung)


def lacks_memory(error: ShiftworkerError) -> bool:
    return isinstance(error, OutOfMemory | TooLittleMemory)


def after_failing(failure: Failure, others: Others, rung: Rung) -> tuple[Failure, Others]:
    """The world in which *rung* was taken and failed as well."""
    match rung:
        case Rung.RETRY:
            return replace(failure, attempts_left=failure.attempts_left - 1), others
        case Rung.COLDER:
            return replace(failure, level=Level.COLD), others
        case Rung.SMALLER:
            return replace(failure, plans_left=failure.plans_left - 1, shrunk=True), others
        case Rung.CASCADE:
            first, *rest = others.cascade
            return Failure(model_id=first, error=failure.error), replace(others, cascade=tuple(rest))
        case _:
            return Failure(model_id="p", error=failure.error), replace(others, previous=None, cascade=())


def test_every_ladder_ends() -> None:
    """Take the rung, have it fail again, and again: each model has its turn once, and at the end the jobs wait."""
    for world in WORLDS:
        failure, others = world
        taken: list[Rung] = []
        while (rung := recover(failure, others).rung) not in (Rung.HOLD, Rung.CLOUD):
            taken.append(rung)
            failure, others = after_failing(failure, others, rung)
        assert len(taken) <= 8, taken  # 2 retries, 1 colder, 2 smaller, 2 of the cascade, 1 previous
        # A sleeper that failed to wake was ended: it starts from its files first, and may be tried again then.
        others_taken = [rung for rung in taken if rung is not Rung.COLDER]
        assert others_taken == sorted(others_taken, key=ORDER.index), taken
        assert Rung.COLDER not in taken or {*taken[: taken.index(Rung.COLDER)]} <= {Rung.RETRY}, taken


def test_a_model_that_is_named_is_one_that_there_is() -> None:
    """The same one for the first rungs, one of the others for the next two, none for the last two."""
    for failure, others in WORLDS:
        after = recover(failure, others)
        expected = {
            Rung.RETRY: "m", Rung.COLDER: "m", Rung.SMALLER: "m",
            Rung.CASCADE: next(iter(others.cascade), "?"), Rung.PREVIOUS: others.previous,
        }.get(after.rung)  # fmt: skip
        assert after.model_id == expected, (failure, others, after)
        assert after.reason


def test_the_same_plan_is_tried_again_only_where_that_may_help() -> None:
    """Not without attempts, nor what an operator must change, nor what had all free memory, nor what is ended."""
    for failure, others in WORLDS:
        helps = failure.error.retry_helps and not isinstance(failure.error, OutOfMemory)
        helps = helps and (isinstance(failure.error, LoadRefused) or not failure.level.asleep)
        assert (recover(failure, others).rung is Rung.RETRY) == bool(helps and failure.attempts_left)


def test_what_slept_is_started_cold_before_anything_is_given_up() -> None:
    """Whatever the error, and whatever else there is; only where the cards refuse any load it sleeps on."""
    for failure, others in WORLDS:
        rung = recover(failure, others).rung
        hot = isinstance(failure.error, LoadRefused) and not lacks_memory(failure.error)
        if failure.level.asleep and not hot:
            assert rung in (Rung.RETRY, Rung.COLDER)
        else:
            assert rung is not Rung.COLDER


def test_smaller_plans_are_for_want_of_memory() -> None:
    """Broken files stay broken at any size; a card that is too hot stays hot. A smaller plan may fail in new ways."""
    for failure, others in WORLDS:
        if recover(failure, others).rung is Rung.SMALLER:
            assert failure.plans_left
            assert lacks_memory(failure.error) or (failure.shrunk and isinstance(failure.error, LoadFailed))


def test_the_worker_is_never_without_a_model_that_it_could_have() -> None:
    """When the model itself is given up: either one is ready, or one is loaded, or the cards refuse every load."""
    for failure, others in WORLDS:
        after = recover(failure, others)
        if after.rung not in (Rung.HOLD, Rung.CLOUD):
            continue
        refused = isinstance(failure.error, LoadRefused) and not lacks_memory(failure.error)
        could = others.previous is not None or others.cascade
        assert others.ready or refused or not could, (failure, others, after)


def test_jobs_that_may_go_elsewhere_come_before_the_model_that_was_there() -> None:
    """And a model that was there comes before one that nobody asked for."""
    for failure, others in WORLDS:
        after = recover(failure, others)
        if after.rung is Rung.PREVIOUS:
            assert not (others.substitutable and others.cascade)
        if after.rung is Rung.CASCADE:
            assert others.substitutable or others.previous is None


def test_a_model_that_is_ready_is_left_to_work() -> None:
    """Nothing is stopped, and nothing loaded, for one that is broken."""
    for failure, others in WORLDS:
        if others.ready:
            assert recover(failure, others).rung in (Rung.RETRY, Rung.COLDER, Rung.SMALLER, Rung.HOLD)


def test_the_cloud_is_the_last_resort_and_only_where_there_is_one() -> None:
    """Off unless it is configured and jobs wait that may leave the machine."""
    for failure, others in WORLDS:
        if recover(failure, others).rung is Rung.CLOUD:
            assert others.cloud
            without = recover(failure, replace(others, cloud=False))
            assert without.rung is Rung.HOLD


@pytest.mark.parametrize(
    ("error", "left", "others", "rung", "model_id"),
    [
        (LoadFailed("slow"), {"attempts_left": 1}, {}, Rung.RETRY, "m"),
        (LoadFailed("slow"), {"level": Level.ASLEEP_2, "attempts_left": 2}, {}, Rung.COLDER, "m"),  # it was ended
        (TooLittleMemory("full"), {"level": Level.ASLEEP_1, "attempts_left": 2}, {}, Rung.RETRY, "m"),
        (LoadRefused("99 C"), {"level": Level.ASLEEP_1}, {"previous": "p"}, Rung.HOLD, None),  # it sleeps on
        (OutOfMemory("full"), {"attempts_left": 2, "plans_left": 3}, {}, Rung.SMALLER, "m"),
        (TooLittleMemory("full"), {"plans_left": 1}, {"ready": ("r",)}, Rung.SMALLER, "m"),
        (LoadFailed("no kernel"), {"plans_left": 1}, {"previous": "p"}, Rung.PREVIOUS, "p"),
        (LoadFailed("no kernel"), {"plans_left": 1, "shrunk": True}, {"previous": "p"}, Rung.SMALLER, "m"),
        (
            OutOfMemory("full"),
            {},
            {"cascade": ("8b", "4b"), "previous": "p", "substitutable": True},
            Rung.CASCADE,
            "8b",
        ),
        (OutOfMemory("full"), {}, {"cascade": ("8b", "4b"), "previous": "p"}, Rung.PREVIOUS, "p"),  # jobs name m
        (OutOfMemory("full"), {}, {"cascade": ("8b", "4b")}, Rung.CASCADE, "8b"),  # at boot
        (EngineTimeout("it will not end"), {}, {"previous": "p"}, Rung.PREVIOUS, "p"),
        (LoadRefused("99 C"), {}, {"cascade": ("8b",), "previous": "p"}, Rung.HOLD, None),
        (LoadRefused("99 C"), {}, {"previous": "p", "cloud": True}, Rung.CLOUD, None),
        (ModelMissing("no file"), {"attempts_left": 2}, {"ready": ("p",)}, Rung.HOLD, None),
        (ModelMissing("no file"), {}, {"cloud": True}, Rung.CLOUD, None),
        (ModelMissing("no file"), {}, {}, Rung.HOLD, None),
    ],
)
def test_what_is_tried_next(
    error: ShiftworkerError, left: dict[str, object], others: dict[str, object], rung: Rung, model_id: str | None
) -> None:
    """Rows, each rung at least once."""
    failure = Failure(model_id="m", error=error, **left)  # type: ignore[arg-type]  # its own field names
    after = recover(failure, Others(**others))  # type: ignore[arg-type]

    assert (after.rung, after.model_id) == (rung, model_id)
