"""The files beside a head, by name, and their JSON. No torch here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..utils.json_file import read  # noqa: F401
from ..utils.outputs import json_text, write_text

CONFIG_NAME = "reflective.json"
ADAPTER = "adapter_config.json"
REPORT = "report.json"
COMPANIONS = (ADAPTER, "adapter_model.safetensors", REPORT, "prune.json", "select.json", "exit.json", "auto.json")  # of a head


def write(file: Path, value: Mapping[str, Any]) -> None:
    """``value`` as a JSON object, indented."""
    write_text(file, json_text(value, indent=2) + "\n")
