"""
What a model's loads and jobs take, as a file of costs says it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from common.errors import BadSetting

_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ModelCosts(BaseModel):
    """One table of the file, named after its model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    load_s: _Seconds  # the first start on a worker
    wake_s: _Seconds  # every later one
    prefill_tokens_per_s: _Rate  # of the engine: prompts are read one after the other
    decode_tokens_per_s: _Rate  # of one sequence
    max_num_seqs: int = Field(ge=1)  # jobs at once

    def alone_s(self, prompt_tokens: int, output_tokens: int) -> tuple[float, float]:
        """Seconds to read these prompts, and to read and answer them one after the other."""
        reading_s = prompt_tokens / self.prefill_tokens_per_s
        return reading_s, reading_s + output_tokens / self.decode_tokens_per_s


def read_costs(file: Path) -> Mapping[str, ModelCosts]:
    """
    Read the costs of every model: a table for each, at the top or under [models].

    Raises
    ------
    BadSetting
        The file cannot be read or is no TOML, or a field is missing or wrong: each is named.
    """
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadSetting(f"The costs {file} cannot be read: {error}. Write a TOML table for each model.") from None
    if set(tables) == {"models"}:
        tables = tables["models"]
    if not tables:
        raise BadSetting(f"The costs {file} name no model. Write a TOML table for each, with load_s and the rest.")
    try:
        return TypeAdapter(dict[str, ModelCosts]).validate_python(tables)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise BadSetting(f"The costs {file} are not right: {problems}.") from None
