"""
What the catalogue is: the known models in order, found by id, alias or repository.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from worker.catalog.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """Every model that jobs and settings may name."""

    models: tuple[ModelSpec, ...]

    def __iter__(self) -> Iterator[ModelSpec]:
        return iter(self.models)

    def __len__(self) -> int:
        return len(self.models)

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids, in the catalogue's order."""
        return tuple(spec.id for spec in self.models)

    def find(self, name: str) -> ModelSpec | None:
        """The model whose id, alias or repository is *name*; ids win, letter case counts only for them."""
        folded = name.casefold()
        by_id = next((spec for spec in self.models if spec.id == name), None)
        return by_id or next((spec for spec in self.models if folded in _names(spec)), None)


def _names(spec: ModelSpec) -> set[str]:
    return {name.casefold() for name in (spec.id, *spec.aliases, spec.repo or spec.id)}
