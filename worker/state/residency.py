"""
What is on the machine now: a frozen reading. Only the switcher writes it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from common.schemas import SwitchStage

HOST: Final = -1  # stands for the host's memory where the index of a card could


def by_place(*, size: int, gpus: Collection[int], host_bytes: int = 0) -> Mapping[int, int]:
    """Bytes by card, or of HOST: *size* on each of *gpus* and *host_bytes* beside them; without cards, all of HOST."""
    return {**dict.fromkeys(gpus, size), HOST: host_bytes} if gpus else {HOST: size}


class Level(StrEnum):
    """How far a model is from answering; on the way there, or in one of the places it can be made ready from."""

    READY = "ready"
    ASLEEP_1 = "asleep_1"  # its process lives, its weights are in the host's memory
    ASLEEP_2 = "asleep_2"  # its process lives, its weights are in its files
    SPARE = "spare"  # a process lives that could be any model's
    COLD = "cold"  # nothing but files
    STARTING = "starting"
    STOPPING = "stopping"

    @property
    def asleep(self) -> bool:
        """Does its process wait to be woken?"""
        return self in (Level.ASLEEP_1, Level.ASLEEP_2)


@dataclass(frozen=True, kw_only=True)
class Resident:
    """A model that holds memory."""

    model_id: str
    level: Level
    bytes: int  # what it takes of each of its cards, or of the host; measured where it can be, else estimated
    since: float  # Unix seconds
    gpus: tuple[int, ...] = ()  # its cards; empty = the host
    host_bytes: int = 0  # what a model on cards takes of the host
    in_flight: int = 0  # jobs the engine works on ...
    begun: tuple[float, ...] = ()  # ... and when each came to it, in Unix seconds; absent = unknown
    smaller: str | None = None  # what it was loaded with instead of its plan, and why; None = as planned
    max_model_len: int | None = None  # tokens, where it was loaded with fewer than planned

    @property
    def held(self) -> Mapping[int, int]:
        """What it takes, by card and HOST."""
        return by_place(size=self.bytes, gpus=self.gpus, host_bytes=self.host_bytes)


@dataclass(frozen=True, kw_only=True)
class Quarantine:
    """A model that failed to load, left alone until a time."""

    until: float  # Unix seconds
    failures: int
    reason: str
    since: float = 0.0  # Unix seconds


@dataclass(frozen=True, kw_only=True)
class Switching:
    """The switch that is asked for or under way."""

    to_model: str
    epoch: int
    since: float  # Unix seconds; of its stage, once it has one
    priced_since: float | None = None  # since when it takes what such switches take: not while it drains or files come
    begun: bool = False  # False = asked for; no thread has taken it up yet
    stage: SwitchStage | None = None  # None = none yet: not begun, or files still come; READY, FAILED = just ended


@dataclass(frozen=True, kw_only=True)
class Residency:
    """Everything that decisions need to know of the loaded models."""

    capacity: int  # bytes of the host that models may take together
    cards: Mapping[int, int] = field(default_factory=dict)  # card -> its bytes
    max_residents: int  # how many may be ready side by side; sleepers do not count
    residents: tuple[Resident, ...] = ()
    switching: Switching | None = None
    quarantined: Mapping[str, Quarantine] = field(default_factory=dict)
    unfreed: Mapping[str, str] = field(default_factory=dict)  # model that ended -> what of its memory is not back
    banned: Mapping[tuple[str, Level], str] = field(default_factory=dict)  # model, and how it sleeps no more -> why
    standby_bytes: int = 0  # of the host, taken by a process that stands ready for any model
    others: Mapping[int, int] = field(default_factory=dict)  # bytes that no model of ours takes and that are not free
    switch_s: Mapping[str, float] = field(
        default_factory=dict
    )  # model -> what a switch to it will take; unknown = absent

    beside: frozenset[str] = frozenset()  # models that could be made ready now while all that are ready stay so

    @property
    def places(self) -> Mapping[int, int]:
        """All bytes there are, by card and HOST."""
        return {HOST: self.capacity - self.standby_bytes, **self.cards}

    def free(self, residents: Collection[Resident] | None = None) -> Mapping[int, int]:
        """Bytes that nobody takes, by card and HOST; or that nobody would if *residents* were all of ours."""
        held = [self.others, *(r.held for r in (self.residents if residents is None else residents))]
        return {place: size - sum(taken.get(place, 0) for taken in held) for place, size in self.places.items()}

    def resident(self, model_id: str) -> Resident | None:
        """The resident named *model_id*, whatever its level."""
        return next((found for found in self.residents if found.model_id == model_id), None)

    def ready(self, model_id: str) -> bool:
        """May jobs of *model_id* run now?"""
        found = self.resident(model_id)
        return found is not None and found.level is Level.READY

    @property
    def awake(self) -> tuple[Resident, ...]:
        """The residents that do not sleep."""
        return tuple(r for r in self.residents if not r.level.asleep)

    @property
    def ready_models(self) -> tuple[str, ...]:
        """The models whose jobs may run now, in order of their names."""
        return tuple(sorted(r.model_id for r in self.residents if r.level is Level.READY))

    def is_quarantined(self, model_id: str, now: float) -> bool:
        """Did *model_id* fail to load, too short a while ago to try again?"""
        found = self.quarantined.get(model_id)
        return found is not None and now < found.until
