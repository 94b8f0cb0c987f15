"""The files beside a head, by name, and their JSON. No torch here."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..utils.outputs import json_text, write_text

CONFIG_NAME = "reflective.json"
ADAPTER = "adapter_config.json"
REPORT = "report.json"
COMPANIONS = (ADAPTER, "adapter_model.safetensors", REPORT, "prune.json")  # of a head


def read(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig")) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(value).__name__}")  # noqa: TRY004
    return value


def write(file: Path, value: Mapping[str, Any]) -> None:
    """``value`` as a JSON object, indented."""
    write_text(file, json_text(value, indent=2) + "\n")
