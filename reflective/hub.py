"""``reflective.checkpoints.hub`` by the name that users import."""

from .checkpoints.files import ADAPTER, CONFIG_NAME, REPORT
from .checkpoints.hub import (
    HEAD,
    MODEL,
    base_model,
    directory,
    is_repository,
    model_directory,
    push_to_hub,
    save_head,
    write_card,
)

__all__ = [
    "ADAPTER",
    "CONFIG_NAME",
    "HEAD",
    "MODEL",
    "REPORT",
    "base_model",
    "directory",
    "is_repository",
    "model_directory",
    "push_to_hub",
    "save_head",
    "write_card",
]
