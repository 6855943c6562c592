"""
Catalogues of a test's own models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

_USUAL = {"tier": 1, "complexity_up_to": 1.0}


def write_catalogue(folder: Path, *entries: Mapping[str, object]) -> dict[str, str]:
    """
    Write a catalogue of only these *entries* to *folder*; give the setting that names it.

    Paths in it start from *folder*. An entry that does not say so is of tier 1, and trusted with every job.
    """
    # JSON's strings, numbers and lists are TOML's too.
    tables = (
        "".join(f"{key} = {json.dumps(value)}\n" for key, value in (_USUAL | {**entry}).items()) for entry in entries
    )
    file = folder / "models.toml"
    file.write_text("replace = true\n" + "".join(f"\n[[models]]\n{table}" for table in tables))
    return {"MODELS_FILE": str(file)}
