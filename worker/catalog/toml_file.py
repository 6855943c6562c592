"""
Reads models.toml, and a user's own file beside it, into the catalogue.
"""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from common.errors import BadCatalogue
from worker.catalog.catalogue import Catalogue
from worker.catalog.hf_config import read_config
from worker.catalog.spec import EngineKind, ModelSpec

Capability = Literal["chat", "completion", "embedding", "json", "thinking", "tools", "vision"]
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


class _Entry(BaseModel):
    """One [[models]] table, as people write it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: _Name
    engine: EngineKind
    tier: int = Field(ge=1, le=9)
    complexity_up_to: float = Field(ge=0, le=1)
    max_model_len: PositiveInt
    aliases: tuple[_Name, ...] = ()
    repo: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$")
    path: Path | None = None
    file: str | None = None
    revision: str | None = None
    quantization: str | None = None
    capabilities: frozenset[Capability] = frozenset({"chat"})
    tool_parser: _Name | None = None
    reasoning_parser: _Name | None = None
    substitute: bool = True
    trust_remote_code: bool = False
    licence: str | None = None
    weights_bytes: PositiveInt | None = None
    config: dict[str, Any] | None = None  # of config.json, in its own words: what memory depends on

    @model_validator(mode="after")
    def _says_where_its_files_are(self) -> Self:
        if self.engine is EngineKind.STUB:
            return self
        if (self.repo is None) == (self.path is None):
            raise ValueError("exactly one of repo and path is needed")
        if self.engine is EngineKind.LLAMACPP and self.repo is not None and self.file is None:
            raise ValueError("llamacpp with a repo needs file, the name of the GGUF file in it")
        return self

    def spec(self, base_dir: Path) -> ModelSpec:
        """Give the entry as a value, its relative path resolved against *base_dir*."""
        fields = self.model_dump(exclude={"config"})
        if self.path is not None:
            fields["path"] = base_dir / self.path.expanduser()
        if self.config is not None:
            fields["architecture"] = read_config(self.config, name=self.repo or self.id)
        return ModelSpec(**fields)


class _File(BaseModel):
    """A whole catalogue file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    replace: bool = False
    models: tuple[_Entry, ...] = ()


def load_catalogue(user_file: Path | None = None, *, base_dir: Path | None = None) -> Catalogue:
    """
    Read the shipped catalogue and add *user_file* to it.

    An entry with a shipped id takes that entry's place; `replace = true` at the top of *user_file* drops
    the shipped ones. Relative paths start at *base_dir*, else at the folder of the file that names them.

    Raises
    ------
    BadCatalogue
        A file cannot be read, or an entry is wrong: names the file, the entry, and what is allowed.
    """
    shipped = Path(str(files("worker.catalog") / "models.toml"))
    _, models = _read(shipped, base_dir)
    if user_file is not None:
        replace, own = _read(user_file, base_dir)
        models = own if replace else {**models, **own}
    catalogue = Catalogue(models=tuple(models.values()))
    _check_names(catalogue, user_file or shipped)
    return catalogue


def _read(file: Path, base_dir: Path | None) -> tuple[bool, dict[str, ModelSpec]]:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadCatalogue(
            f"The catalogue {file} cannot be read: {error.strerror or error}. Check MODELS_FILE."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadCatalogue(f"The catalogue {file} is no TOML: {error}.") from None
    try:
        read = _File.model_validate(content)
    except ValidationError as error:
        raise BadCatalogue(f"The catalogue {file} is wrong. {_problems(error, content)}") from None

    models: dict[str, ModelSpec] = {}
    for entry in read.models:
        if entry.id in models:
            raise BadCatalogue(f"The catalogue {file} has two models with the id {entry.id}. Rename one of them.")
        models[entry.id] = entry.spec(base_dir or file.parent.resolve())
    return read.replace, models


def _check_names(catalogue: Catalogue, file: Path) -> None:
    """An id or alias names one model: a job that asks for it must not depend on the order of entries."""
    owners: dict[str, str] = {}
    for spec in catalogue:
        for name in {alias.casefold() for alias in (spec.id, *spec.aliases)}:
            if name in owners:
                raise BadCatalogue(
                    f"In the catalogue {file}, {name!r} names both {owners[name]} and {spec.id} "
                    "(letter case does not count). Rename or remove one of the two."
                )
            owners[name] = spec.id


def _problems(error: ValidationError, content: dict[str, object]) -> str:
    """Pydantic's findings as sentences: which entry, which key, what is allowed."""
    return " ".join(
        _problem(tuple(found["loc"]), found["type"], found["msg"], content)
        for found in error.errors(include_url=False, include_input=False)
    )


def _problem(where: tuple[int | str, ...], kind: str, message: str, content: dict[str, object]) -> str:
    match where:
        case ("models", int(position), *keys):
            entries = content["models"]
            entry = entries[position] if isinstance(entries, list) else None
            name = entry.get("id") if isinstance(entry, dict) else None
            place = f"Model {name or f'number {position + 1}'}"
            allowed = _Entry.model_fields
        case _:
            place, keys, allowed = "Top of the file", list(where), _File.model_fields
    key = ".".join(str(step) for step in keys)
    if kind == "extra_forbidden":
        return f"{place}: unknown key {key}; allowed are {', '.join(allowed)}."
    return f"{place}{f', {key}' if key else ''}: {message.removeprefix('Value error, ')}."
