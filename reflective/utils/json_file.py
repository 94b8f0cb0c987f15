"""Files that hold one JSON object."""

import json
from pathlib import Path
from typing import Any


def read(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig")) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(value).__name__}")  # noqa: TRY004
    return value
