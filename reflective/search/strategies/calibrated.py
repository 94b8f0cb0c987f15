"""Strategies whose rule was calibrated on questions, and lies as a JSON file beside the head."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import Self

from ...utils.outputs import json_text, write_text
from . import Strategy


@dataclass
class Calibrated(Strategy):
    """Base of those strategies.

    Attributes:
        file: name of the rule's file.
        rule: the fields that are in it, the first of which must be given where there is no file.
    """

    file: ClassVar[str]
    rule: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        super().__post_init__()
        if getattr(self, self.rule[0]) is None:
            kind = type(self).__name__
            raise ValueError(
                f"{self.name}: no {self.rule[0]}; use {kind}.calibrate, {kind}.load or a checkpoint that comes with one"
            )

    @classmethod
    def of(cls, home: str | Path | None, **settings: Any) -> Self:
        if cls.rule[0] in settings or not cls.lies_in(home):
            return cls(**settings)
        return cls.load(Path(home) / cls.file, **settings)

    @classmethod
    def lies_in(cls, home: str | Path | None) -> bool:
        """Whether the checkpoint at ``home`` comes with the rule."""
        return home is not None and (Path(home) / cls.file).is_file()

    def save(self, path: str | Path) -> None:
        """Write the rule to a JSON file, or under its name into a directory.

        Raises:
            ValueError: a rule of what is no number. OSError: ``path`` cannot be written.
        """
        rule = {k: getattr(self, k) for k in self.rule}
        for name, value in rule.items():
            if isinstance(value, float) and not math.isfinite(value):  # as of questions whose step scores are missing
                raise ValueError(f"{name}={value}: {self.file} holds numbers alone; calibrate on questions with scores")
        path = Path(path) / self.file if Path(path).is_dir() else Path(path)
        write_text(path, json_text(rule, indent=2) + "\n", "path")

    @classmethod
    def load(cls, path: str | Path, **settings: Any) -> Self:
        """What ``save`` wrote, with ``settings`` in its place.

        Raises:
            ValueError: the file, which is named, holds no rule.
        """
        path = Path(path) / cls.file if Path(path).is_dir() else Path(path)
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")) | settings)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a valid {cls.file}: {error}") from error
