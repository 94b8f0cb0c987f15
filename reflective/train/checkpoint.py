"""A training run's state on disk, so that a run that was killed goes on where it stood."""

import json
from pathlib import Path
from typing import Any

import torch

from ..utils.outputs import folder, replacing


class Checkpoint:
    """The newest state of one run, ``training_state.pt`` in a directory. It is replaced as a whole: whenever a run is killed, a
    complete state is there, or none.

    Args:
        directory: made on the first ``save``; None keeps nothing.
        settings: what the run depends on, as JSON can say it.
    """

    def __init__(self, directory: str | Path | None, settings: dict[str, Any]) -> None:
        self.file = None if directory is None else Path(directory).expanduser() / "training_state.pt"
        self.settings = json.loads(json.dumps(settings))

    def load(self) -> dict[str, Any] | None:
        """What was saved last, on the CPU; None at the beginning.

        Raises:
            ValueError: it is of a run with other settings, named.
        """
        if self.file is None or not self.file.is_file():
            return None
        saved = torch.load(self.file, map_location="cpu", weights_only=True)
        then, now = saved["settings"], self.settings
        if then != now:
            other = "; ".join(
                f"{name} was {then.get(name)!r}, is {now.get(name)!r}"
                for name in sorted(then.keys() | now.keys())
                if then.get(name) != now.get(name)
            )
            raise ValueError(f"{self.file.parent} holds a run with other settings ({other}); choose another directory")
        return saved["state"]

    def save(self, state: dict[str, Any]) -> None:
        """Keep ``state``: tensors, numbers, strings, and lists and dicts of these."""
        if self.file is None:
            return
        folder(self.file.parent, "directory")
        with replacing(self.file, what="directory") as file:
            torch.save({"settings": self.settings, "state": state}, file)
