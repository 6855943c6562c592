"""
How do several GGUF models share one card, so that they are ready together?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from worker.memory.estimate import Unknown
from worker.memory.estimate_llamacpp import LlamaCppEstimate, LlamaCppOptions, estimate_llamacpp
from worker.memory.gguf import GgufModel
from worker.memory.offload import TooLarge, offload_layers

_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A model that wants to share the card."""

    model_id: str
    model: GgufModel
    options: LlamaCppOptions  # its max_model_len is the length that is wished for
    shortest_len: int  # tokens: with fewer it is of no use


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one model gets."""

    model_id: str
    max_model_len: int  # tokens
    estimate: LlamaCppEstimate  # its n_gpu_layers is the number of layers on the card
    reason: str


@dataclass(frozen=True, kw_only=True)
class NoShare:
    """A model that is not among those that are ready together."""

    model_id: str
    term: str | None  # the field of LlamaCppEstimate that is too large; None if it cannot be estimated
    reason: str


def share_card(
    wishes: Sequence[Wish], *, card_bytes: int, host_bytes: int | None = None
) -> tuple[Share | NoShare, ...]:
    """
    Divide a card, and the host's memory, among models in their order of preference; the answers are in that order.

    The questions, in order:

    1. Does it fit?           Each model in turn, at its shortest length, gets as many layers on the card as what
                              the earlier ones left holds; the others stay on the host. If the host is too small
                              for them the model gets nothing, and takes nothing from the others.
    2. How long a context?    In turn each length is doubled, up to what is wished, as long as all still fits,
                              until no length can be. No layer leaves the card for that.

    So the first model is wholly on the card if it can be, at any length; a second one takes the rest; and context
    grows into what layers could not use. Never over a budget (*host_bytes* None: not asked); no layer could be
    added and no length doubled within it.
    """
    room, granted, refused = _Room(card_bytes, host_bytes), {}, {}
    for wish in wishes:  # (1)
        shortest = replace(wish.options, max_model_len=min(wish.shortest_len, wish.options.max_model_len))
        found = offload_layers(wish.model, shortest, card_bytes=room.card, host_bytes=room.host)
        if isinstance(found, LlamaCppEstimate):
            granted[wish.model_id] = _Grant(wish, shortest.max_model_len, found)
            room = room.after(found)
        else:
            refused[wish.model_id] = _refuse(wish, found)

    growing = list(granted)  # (2)
    while growing:
        for model_id in tuple(growing):
            longer = granted[model_id].doubled()
            if longer is None or not (rest := room.before(granted[model_id].estimate).after(longer.estimate)).holds:
                growing.remove(model_id)
            else:
                granted[model_id], room = longer, rest
    return tuple(
        refused[wish.model_id] if wish.model_id in refused else granted[wish.model_id].share(room) for wish in wishes
    )


@dataclass(frozen=True)
class _Room:
    """Bytes that are left; None = not asked."""

    card: int
    host: int | None

    @property
    def holds(self) -> bool:
        return self.card >= 0 and (self.host is None or self.host >= 0)

    def after(self, estimate: LlamaCppEstimate) -> _Room:
        return _Room(self.card - estimate.card, None if self.host is None else self.host - estimate.host)

    def before(self, estimate: LlamaCppEstimate) -> _Room:
        return _Room(self.card + estimate.card, None if self.host is None else self.host + estimate.host)


@dataclass(frozen=True)
class _Grant:
    """What a model has while the others are still being asked."""

    wish: Wish
    length: int
    estimate: LlamaCppEstimate

    def doubled(self) -> _Grant | None:
        """Give twice the length with as many layers; None if it is as long as was wished."""
        if self.length >= self.wish.options.max_model_len:
            return None
        length = min(2 * self.length, self.wish.options.max_model_len)
        options = replace(self.wish.options, max_model_len=length)
        estimate = estimate_llamacpp(self.wish.model, options, n_gpu_layers=self.estimate.n_gpu_layers)
        return _Grant(self.wish, length, estimate) if isinstance(estimate, LlamaCppEstimate) else None

    def share(self, room: _Room) -> Share:
        """Put it in words, with what is left in the end."""
        model, layers = self.wish.model, self.estimate.n_gpu_layers
        where = (
            "wholly on the card" if layers == model.layers + 1 else f"{layers} of {model.layers + 1} layers on the card"
        )
        if layers is None:
            where = "on the host alone, for the card has no room for a layer"
        why = "as long as was wished"
        if (longer := self.doubled()) is not None:
            lacking = room.before(self.estimate).after(longer.estimate)
            short = [f"{-lacking.card / _MIB:,.0f} MiB more of the card"] if lacking.card < 0 else []
            short += (
                [f"{-lacking.host / _MIB:,.0f} MiB more of RAM"]
                if lacking.host is not None and lacking.host < 0
                else []
            )
            why = f"{longer.length:,} would need {' and '.join(short)}"
        return Share(
            model_id=self.wish.model_id,
            max_model_len=self.length,
            estimate=self.estimate,
            reason=f"{where}; {self.length:,} tokens: {why}",
        )


def _refuse(wish: Wish, found: TooLarge | Unknown) -> NoShare:
    if isinstance(found, TooLarge):
        return NoShare(model_id=wish.model_id, term=found.term, reason=found.reason)
    return NoShare(model_id=wish.model_id, term=None, reason=f"cannot be estimated without {', '.join(found.missing)}")
